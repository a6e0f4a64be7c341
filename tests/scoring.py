"""The job as a test starts it: inputs and an embedder in, the summary out."""

from spark_nsfw import SampleOptions
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import ShardSource
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.job import JobOptions, run_job


def score_into(
    spark, inputs, output, embedder, *, report=None, stop=None, columns=None,
    samples=None, keep_embeddings=True, device=None, **options,
):  # fmt: skip
    parsed = inputs if isinstance(inputs, ShardInputs) else ShardInputs.parse(inputs)
    source = ShardSource(parsed, samples or SampleOptions(), columns)
    recipe = Recipe.of(embedder, device=device, keep_embeddings=keep_embeddings)
    return run_job(
        spark, source, recipe, str(output), options=JobOptions(**options), report=report, stop=stop
    )


def run_into(spark, source, output, embedder, *, plan="fused", **options):
    """As `score_into`, of any source, and without a word."""
    return run_job(
        spark, source, Recipe.of(embedder), str(output),
        options=JobOptions(plan=plan, **options), report=lambda _: None,
    )  # fmt: skip
