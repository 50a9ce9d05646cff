"""One file per archive format."""
