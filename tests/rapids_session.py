"""Runs the job's real plans in a session that has the RAPIDS plugin, in explainOnly mode.

``python tests/rapids_session.py DIRECTORY DETECTOR`` writes ``report.json`` into the
directory; the plugin's own log goes to stderr. It is a program of its own because the
plugin is chosen when a JVM starts, and the other tests' session has none.
"""

import json
import re
import sys
from pathlib import Path

import pyarrow as pa
from pyspark.sql import SparkSession

sys.path.append(str(Path(__file__).parents[1]))  # for the examples
from scoring import score_into

from examples.photographs import write_photograph_shards
from spark_nsfw import NsfwClassifier, TimmImageEmbedder
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import ShardSource
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.plans import metadata_rows

#: What Spark says where no repository has the plugin.
CANNOT_BE_HAD = re.compile("unresolved dependency|Server access error|download failed")

PLUGIN = "com.nvidia:rapids-4-spark_2.13:26.08.1"

#: Columns that a sidecar may bring along.
COLUMN_TYPES = {
    "string": pa.string(),
    "long": pa.int64(),
    "double": pa.float64(),
    "boolean": pa.bool_(),
    "array": pa.list_(pa.string()),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "timestamp_ntz": pa.timestamp("us"),
    "date": pa.date32(),
    "binary": pa.binary(),
    "decimal": pa.decimal128(20, 0),
    "map": pa.map_(pa.string(), pa.string()),
    "struct": pa.struct([("w", pa.int64())]),
}


def registered_keys(spark):
    """Every ``spark.rapids.*`` key of the plugin, and what its documentation says."""
    jvm, new_array = spark._jvm, spark.sparkContext._gateway.new_array
    loader = jvm.java.lang.Thread.currentThread().getContextClassLoader()
    # Settings for Python workers are registered when this object is first used.
    jvm.java.lang.Class.forName("com.nvidia.spark.rapids.python.PythonConfEntries$", True, loader)
    conf = loader.loadClass("com.nvidia.spark.rapids.RapidsConf$")
    method = conf.getDeclaredMethod("registeredConfs", new_array(jvm.java.lang.Class, 0))
    method.setAccessible(True)
    entries = method.invoke(conf.getField("MODULE$").get(None), new_array(jvm.java.lang.Object, 0))
    found = [entries.apply(index) for index in range(entries.size())]
    return {entry.key(): entry for entry in found}


def refusal(entry, value):
    """Why the plugin refuses a value of one of its settings, or None."""
    try:
        entry.converter().apply(value)
    except Exception as exc:
        return str(exc)
    return None


def settings(path):
    """The lines of a properties file as Spark reads them."""
    lines = [line.strip() for line in Path(path).read_text().splitlines()]
    return dict(line.split(None, 1) for line in lines if line and not line.startswith("#"))


def rapids_settings():
    """(file, key, value) of every setting of the plugin in conf/."""
    files = sorted((Path(__file__).parents[1] / "conf").glob("*.conf"))
    found = [(file.name, *item) for file in files for item in settings(file).items()]
    return [setting for setting in found if setting[1].startswith("spark.rapids.")]


def main(directory, detector):
    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.jars.packages", PLUGIN)
        .config("spark.plugins", "com.nvidia.spark.SQLPlugin")
        .config("spark.rapids.sql.mode", "explainOnly")
        .config("spark.python.daemon.module", "rapids.daemon")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.sql.shuffle.partitions", "2")
        .getOrCreate()
    )
    # As conf/spark-defaults.conf does with the jar in an executor's directory.
    (jar,) = spark.sparkContext.getConf().get("spark.jars").split(",")
    spark.sparkContext.environment["PYTHONPATH"] = jar.removeprefix("file:").replace("///", "/")

    write_photograph_shards(directory / "shards", num_shards=2, samples_per_shard=3)
    inputs = ShardInputs.parse(directory / "shards")
    embedder = TimmImageEmbedder(
        "test_vit2", embedding_size=768, classifiers=[NsfwClassifier(model_path=detector)]
    )
    summaries = {}
    for plan in ("fused", "dataframe"):
        print(f"job: {plan}", file=sys.stderr, flush=True)
        output = str(directory / plan)
        summary = score_into(spark, inputs, output, embedder, plan=plan)
        summaries[plan] = [summary.num_samples, summary.num_scored, summary.num_new_images]
    print("job: done", file=sys.stderr, flush=True)

    explain = spark._jvm.com.nvidia.spark.rapids.ExplainPlan.explainPotentialGpuPlan
    source = ShardSource(inputs)
    units, recipe = source.units(), Recipe.of(embedder).ready(device="cpu")

    def told(plan, *own):
        rows = metadata_rows(spark, units, source, recipe, source.schema(own), plan)
        return explain(rows._jdf, "ALL")

    explained = {plan: told(plan) for plan in ("fused", "dataframe")}
    for name, data_type in COLUMN_TYPES.items():
        explained[f"column {name}"] = told("fused", pa.field("column", data_type))

    known = registered_keys(spark)
    report = {
        "summaries": summaries,
        "explained": explained,
        "known": {key: entry.doc() for key, entry in known.items()},
        "refused": {
            f"{file} {key}": refusal(known[key], value)
            for file, key, value in rapids_settings()
            if key in known
        },
        "nonsense": refusal(known["spark.rapids.memory.gpu.allocFraction"], "much"),
    }
    (directory / "report.json").write_text(json.dumps(report))
    spark.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
