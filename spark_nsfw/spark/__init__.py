"""The thin Spark shell around the core."""
