"""The same shards, the same small tower, five ways, taking turns: ``python -m benchmarks.plans``.

(a) the core's scorer in one process, without Spark; (b) the fused plan; (c) the DataFrame
plan; (d) what a Spark user would write today, a plain reader and ``predict_batch_udf`` with
a PIL preprocess; (e) what a PyTorch user would write, ``webdataset`` with a DataLoader.
Every way has the same cores. Starting processes and loading models is not timed. Spark's
results go to its ``noop`` sink.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.table import report
from examples.photographs import write_photograph_shards
from spark_nsfw import (
    NsfwClassifier,
    SampleOptions,
    Scorer,
    TimmImageEmbedder,
    iter_sample_rows,
    read_webdataset,
    score_samples,
)
from spark_nsfw.read.paths import ShardInputs
from spark_nsfw.read.shards import ShardSource
from spark_nsfw.score.recipe import Recipe
from spark_nsfw.spark.plans import metadata_rows

BATCH_SIZE = 64
#: Rounds that do not count: processes start, models load, the JVM compiles.
WARM_UPS = 2
#: The smallest that timm has: on a GPU the tower takes nothing of the cores.
TOWER = "test_vit"


def plain_transform() -> Callable[[Any], torch.Tensor]:
    from torchvision import transforms as T

    return T.Compose(
        [
            T.Resize(160, interpolation=T.InterpolationMode.BICUBIC),
            T.CenterCrop(160),
            lambda image: image.convert("RGB"),
            T.ToTensor(),
            T.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )


def plain_models(detector: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    import timm

    tower = timm.create_model(TOWER, num_classes=768).eval()
    classifier = NsfwClassifier(model_path=detector).for_embedding_size(768).load_model("cpu")
    return tower, classifier


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--detector", default="../shared/laion/clip_autokeras_binary_nsfw.zip")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--images", type=int, default=260, help="per shard")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    num_images = options.shards * options.images

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_photograph_shards(directory, options.shards, options.images)
        ways = {
            "a: core": core(directory, options.detector, cores),
            **spark_ways(directory, options.detector, cores),
            "e: webdataset + DataLoader": pytorch(directory, options.detector, cores),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(WARM_UPS):
            for name, way in ways.items():
                assert way() == num_images, name
        for _ in range(options.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
                print(f"{name}: {num_images / seconds[name][-1]:.1f} images/s", flush=True)
    rates = {name: num_images / float(np.median(times)) for name, times in seconds.items()}
    report(
        "plans",
        [
            {
                "way": name,
                "images/s": rate,
                "slowest": num_images / max(seconds[name]),
                "fastest": num_images / min(seconds[name]),
                "of (a)": rate / rates["a: core"],
                "of (d)": rate / rates["d: predict_batch_udf + PIL"],
            }
            for name, rate in rates.items()
        ],
    )


def embedder(detector: str, threads: int) -> TimmImageEmbedder:
    return TimmImageEmbedder(
        TOWER,
        embedding_size=768,
        batch_size=BATCH_SIZE,
        num_threads_per_worker=threads,
        classifiers=[NsfwClassifier(model_path=detector)],
    )


def core(directory: Path, detector: str, cores: int) -> Callable[[], int]:
    scorer = Scorer(embedder(detector, cores), device="cpu")
    shards = [(str(path), path.stem) for path in sorted(directory.glob("*.tar"))]

    def run() -> int:
        torch.set_num_threads(cores)
        batches = iter_sample_rows(shards, SampleOptions())
        return sum(batch.num_rows for batch in scorer.score_rows(batches))

    return run


def spark_ways(directory: Path, detector: str, cores: int) -> dict[str, Callable[[], int]]:
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import ArrayType, FloatType, StructField, StructType

    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["PYTHONPATH"] = os.pathsep.join(["", str(Path(__file__).parents[1])])
    spark = (
        SparkSession.builder.master(f"local[{cores}]")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "256")
        .config("spark.python.daemon.module", "spark_nsfw.spark.daemon")
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("OFF")
    source = ShardSource(ShardInputs.parse(str(directory)), columns=())
    units = source.units()
    places = [(unit.place,) for unit in units]
    paths = spark.createDataFrame(places, "path string").repartition(cores)
    ours = embedder(detector, 1)
    recipe = Recipe.of(ours, device="cpu").ready()

    def predict() -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        from PIL import Image

        torch.set_num_threads(1)
        transform = plain_transform()
        tower, classifier = plain_models(detector)

        def score(images: np.ndarray) -> dict[str, np.ndarray]:
            pixels = torch.stack([transform(Image.open(io.BytesIO(i))) for i in images])
            with torch.inference_mode():
                embeddings = torch.nn.functional.normalize(tower(pixels), dim=-1)
                scores = classifier(embeddings)
            return {"image_embedding": embeddings.numpy(), "nsfw_score": scores.numpy()}

        return score

    def read(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import tarfile

        for batch in batches:
            for path in batch.column("path").to_pylist():
                keys: list[str] = []
                images: list[bytes] = []
                with tarfile.open(path.removeprefix("file:")) as archive:
                    for member in archive:
                        if member.name.endswith(".jpg"):
                            keys.append(member.name[:-4])
                            images.append(archive.extractfile(member).read())
                        if len(keys) == 256:
                            yield pa.RecordBatch.from_arrays(
                                [pa.array(keys), pa.array(images, pa.binary())], ["key", "image"]
                            )
                            keys, images = [], []
                if keys:
                    yield pa.RecordBatch.from_arrays(
                        [pa.array(keys), pa.array(images, pa.binary())], ["key", "image"]
                    )

    returned = StructType(
        [
            StructField("image_embedding", ArrayType(FloatType())),
            StructField("nsfw_score", FloatType()),
        ]
    )
    udf = predict_batch_udf(predict, return_type=returned, batch_size=BATCH_SIZE)

    def through(build: Callable[[], DataFrame]) -> Callable[[], int]:
        frame = build()

        def run() -> int:
            frame.write.format("noop").mode("overwrite").save()
            return options_images(directory)

        assert frame.count() == options_images(directory)
        return run

    return {
        "b: fused plan": through(
            lambda: metadata_rows(spark, units, source, recipe, source.schema())
        ),
        "c: DataFrame plan": through(
            lambda: score_samples(
                read_webdataset(spark, str(directory), columns=[]), ours, device="cpu"
            )
        ),
        "d: predict_batch_udf + PIL": through(
            lambda: paths.mapInArrow(read, "key string, image binary").select(
                "key", udf("image").alias("scored")
            )
        ),
    }


def options_images(directory: Path) -> int:
    import tarfile

    count = 0
    for path in directory.glob("*.tar"):
        with tarfile.open(path) as archive:
            count += sum(name.endswith(".jpg") for name in archive.getnames())
    return count


def pytorch(directory: Path, detector: str, cores: int) -> Callable[[], int]:
    import webdataset
    from torch.utils.data import DataLoader

    tower, classifier = plain_models(detector)
    urls = [str(path) for path in sorted(directory.glob("*.tar"))]

    def run() -> int:
        torch.set_num_threads(cores)
        dataset = (
            webdataset.WebDataset(urls, shardshuffle=False)
            .decode("pil")
            .to_tuple("__key__", "jpg")
            .map_tuple(lambda key: key, plain_transform())
        )
        count = 0
        with torch.inference_mode():
            for keys, pixels in DataLoader(dataset, BATCH_SIZE, num_workers=cores):
                classifier(torch.nn.functional.normalize(tower(pixels), dim=-1)).numpy()
                count += len(keys)
        return count

    return run


if __name__ == "__main__":
    main()
