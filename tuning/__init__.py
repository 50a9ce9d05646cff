"""Searches for the transfer scheme of a target: `python tuning/search.py` (docs/searches.md)."""
