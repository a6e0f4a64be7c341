"""A tower on a GPU, without Spark and without network: ``python -m benchmarks.gpu``."""
