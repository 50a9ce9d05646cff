"""Transferable memory for spatiotemporal predictive networks, trained on a cluster."""

__version__ = "0.1.0"
