"""The video pixel network: frames whose pixels are predicted one after the other."""
