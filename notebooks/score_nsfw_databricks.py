# Databricks notebook source
# MAGIC %md
# MAGIC # Find NSFW images with spark_nsfw
# MAGIC
# MAGIC Scores WebDataset shards in a Volume, or a table with a column of images: CLIP ViT-L/14,
# MAGIC then LAION's NSFW detector, 0 to 1 with 1 = NSFW. Run it from the top; the widgets ask what
# MAGIC to score and where the results go. It needs classic compute, not serverless; cluster
# MAGIC settings are in `docs/databricks.md`.

# COMMAND ----------

# MAGIC %pip install /Volumes/main/default/spark_nsfw/spark_nsfw-0.2.0-py3-none-any.whl

# COMMAND ----------

dbutils.library.restartPython()

# COMMAND ----------

dbutils.widgets.text("source", "/Volumes/main/default/images/shards", "Shards, or a table")
dbutils.widgets.text("scores", "main.default.nsfw_scores", "Scores: a table, or a directory")
dbutils.widgets.text("models", "/Volumes/main/default/spark_nsfw/models", "Staged weights")
dbutils.widgets.text("threshold", "0.5", "Kept below this score")

source, scores = dbutils.widgets.get("source"), dbutils.widgets.get("scores")
models = dbutils.widgets.get("models")
tower = "vit_large_patch14_clip_quickgelu_224.openai"

# COMMAND ----------

# MAGIC %md
# MAGIC ## Weights
# MAGIC Fetched once into the Volume, with their checksums; every worker reads them from there and
# MAGIC checks them. Where the workspace has no internet, run
# MAGIC `spark-nsfw models fetch models/` elsewhere and upload the directory.

# COMMAND ----------

from pathlib import Path

from spark_nsfw.score.staging import fetch_models

if not Path(models, "SHA256SUMS").exists():
    fetch_models(models, [tower])

# COMMAND ----------

# MAGIC %md
# MAGIC ## Score
# MAGIC Shards are read and scored in one Python worker, and give the columns `shard`, `key`, the
# MAGIC dataset's own, `status`, `error_message`, `image_embedding`, `embedding_norm` and
# MAGIC `nsfw_score`. A table needs a binary column `image` with encoded images; its other columns
# MAGIC stay. An image that cannot be scored keeps its row, and `status` says why. Shards that go
# MAGIC into a directory are written in waves: after an interruption run the cell again, and it
# MAGIC continues.

# COMMAND ----------

from spark_nsfw import ImageTextPairDataset, NsfwClassifier, TimmImageEmbedder, score_samples

spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", 256)  # images are large
embedder = TimmImageEmbedder(
    tower,
    pretrained=True,
    batch_size=256,
    models_dir=models,
    classifiers=[NsfwClassifier(models_dir=models)],
)
if "/" in source:
    dataset = embedder(ImageTextPairDataset.from_webdataset(source, spark=spark))
if "/" in source and "/" in scores:
    dataset.save_metadata(scores)
else:
    metadata = dataset.metadata if "/" in source else score_samples(spark.table(source), embedder)
    rows = metadata.write.mode("overwrite")
    rows.parquet(scores) if "/" in scores else rows.saveAsTable(scores)
scored = spark.read.parquet(scores) if "/" in scores else spark.table(scores)

# COMMAND ----------

# MAGIC %md
# MAGIC ## Look at the scores
# MAGIC What could not be scored, and how the scores are distributed.

# COMMAND ----------

from pyspark.sql import functions as F

display(scored.groupBy("status").count().orderBy(F.desc("count")))

# COMMAND ----------

bin_start = F.floor(F.col("nsfw_score") * 20) / 20
histogram = scored.where("nsfw_score is not null").groupBy(bin_start.alias("nsfw_score")).count()
display(histogram.orderBy("nsfw_score"))

# COMMAND ----------

# MAGIC %md
# MAGIC ## Choose a threshold
# MAGIC How many images each threshold keeps. Look at images just below the one you mean to take
# MAGIC before you set the widget: what is acceptable is a decision about the dataset, and the
# MAGIC detector errs in both directions.

# COMMAND ----------

thresholds = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9]
kept = [F.avg((F.col("nsfw_score") < t).cast("double")).alias(f"below {t}") for t in thresholds]
display(scored.where("nsfw_score is not null").select(*kept))

# COMMAND ----------

# MAGIC %md
# MAGIC ## Keep
# MAGIC Images without a score are left out: nobody knows whether they are safe.

# COMMAND ----------

threshold = float(dbutils.widgets.get("threshold"))
safe = scored.where(F.col("nsfw_score") < threshold).drop("image_embedding", "embedding_norm")
if "/" in scores:
    safe.write.mode("overwrite").parquet(scores.rstrip("/") + "_safe")
else:
    safe.write.mode("overwrite").saveAsTable(scores + "_safe")
print(f"{safe.count():,} of {scored.count():,} rows are below {threshold}")
