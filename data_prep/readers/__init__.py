"""One file per source of raw data."""
