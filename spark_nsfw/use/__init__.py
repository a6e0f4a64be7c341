"""What scores are for: new shards, the report, the summary. No torch, no Spark."""
