"""What is computed: pixels, towers, classifiers, the pipeline. No Spark."""
