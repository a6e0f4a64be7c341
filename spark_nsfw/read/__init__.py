"""Where samples come from: paths, tars, sidecars and stored embeddings. No torch, no Spark."""
