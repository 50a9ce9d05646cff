"""Archives on their way out: one file per format, and what the formats share."""
