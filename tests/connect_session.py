"""Everything that works through Spark Connect, in a process that has no other Spark.

``python tests/connect_session.py SHARDS DETECTOR DIRECTORY`` writes ``report.pickle`` into
the directory. A Connect session and a classic one cannot live in one process.
"""

import os
import pickle
import shutil
import sys
from pathlib import Path

import pyspark
from pyspark.sql import SparkSession

sys.path.append(str(Path(__file__).parents[1]))  # for the examples; not for Spark's workers
from scoring import score_into
from test_spark import collected

import spark_nsfw
from spark_nsfw import (
    ImageTextPairDataset,
    NsfwClassifier,
    TimmImageEmbedder,
    nsfw_udf,
    read_webdataset,
    register_webdataset,
    score_samples,
)


def where_workers_have_the_package_from(spark):
    def locate(batches):
        import pyarrow as pa

        import spark_nsfw

        for _ in batches:
            yield pa.RecordBatch.from_pydict({"file": [spark_nsfw.__file__]})

    return spark.range(1).mapInArrow(locate, "file string").collect()[0].file


def main(shards, detector, directory):
    if pyspark.__version__ < "4":  # PyPI's pyspark 3.5 comes without the server
        server = f"org.apache.spark:spark-connect_2.12:{pyspark.__version__}"
        os.environ["PYSPARK_SUBMIT_ARGS"] = f"--packages {server} pyspark-shell"
    spark = SparkSession.builder.remote("local[2]").getOrCreate()
    spark.conf.set("spark.sql.session.timeZone", "UTC")
    archive = shutil.make_archive(
        str(directory / "package"), "zip", Path(spark_nsfw.__file__).parents[1], "spark_nsfw"
    )
    spark.addArtifacts(archive, pyfile=True)

    classifier = NsfwClassifier(model_path=detector)
    plain = TimmImageEmbedder("test_vit2", batch_size=8, embedding_size=768)
    embedder = TimmImageEmbedder(
        "test_vit2", batch_size=8, embedding_size=768, classifiers=[classifier]
    )
    samples = read_webdataset(spark, shards)
    dataset = ImageTextPairDataset.from_webdataset(shards)  # finds the session by itself
    embedder(dataset).save_metadata(str(directory / "metadata"))
    report = {
        "session": type(spark).__module__,
        "package": where_workers_have_the_package_from(spark),
        "udf": samples.where("image is not null").select(nsfw_udf(embedder)("image")).count(),
        "rows": {
            "score_samples": collected(score_samples(samples, embedder)),
            "one step": collected(embedder(dataset).metadata),
            "two steps": collected(classifier(plain(dataset)).metadata),
            "saved": collected(spark.read.parquet(str(directory / "metadata"))),
        },
    }
    if pyspark.__version__ >= "4":
        register_webdataset(spark)
        source = spark.read.format("webdataset").load(shards)
        report["rows"]["data source"] = collected(score_samples(source, embedder))
    score_into(spark, shards, directory / "job", embedder, plan="fused", report=lambda _: None)
    report["rows"]["the job"] = collected(spark.read.parquet(str(directory / "job")))
    (directory / "report.pickle").write_bytes(pickle.dumps(report))
    spark.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
