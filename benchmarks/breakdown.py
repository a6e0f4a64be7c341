"""Where the time of an image goes, on one core: ``python -m benchmarks.breakdown``.

Every step runs alone over the same photographs of 400 to 600 pixels, once to warm up and
then ``ROUNDS`` times; the best counts. The last line is the scorer with all of them: what it
takes beyond their sum is handing over between threads.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch

from benchmarks.table import report
from examples.photographs import write_photograph_shards
from spark_nsfw import NsfwClassifier, SampleOptions, Scorer, TimmImageEmbedder, iter_sample_rows
from spark_nsfw.read.tar import iter_samples
from spark_nsfw.score.pixels import decode_image
from spark_nsfw.score.tower import CPU_BLOCK_IMAGES

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--detector", default="../shared/laion/clip_autokeras_binary_nsfw.zip")
    parser.add_argument("--model", default="test_vit")
    parser.add_argument("--images", type=int, default=800)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    embedder = TimmImageEmbedder(
        options.model,
        embedding_size=768,
        num_threads_per_worker=1,
        classifiers=[NsfwClassifier(model_path=options.detector)],
    )
    scorer = Scorer(embedder, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        write_photograph_shards(Path(folder), 1, options.images)
        shards = [(str(path), path.stem) for path in Path(folder).glob("*.tar")]
        rows = steps(shards, scorer)
    total = sum(row[1] for row in rows[:-1])
    report(
        "breakdown",
        [
            {
                "step": step,
                "ms per image": 1000 * seconds / options.images,
                "of the sum": seconds / total,
            }
            for step, seconds in [*rows[:-1], ("sum", total), rows[-1]]
        ],
    )


def best(work: Callable[[], object]) -> float:
    """Seconds of the best of some rounds."""
    work()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def consume(results: Iterable[object]) -> None:
    """Keep no result: fresh memory for every picture would take as long as to decode it."""
    deque(results, maxlen=0)


def steps(shards: list[tuple[str, str]], scorer: Scorer) -> list[tuple[str, float]]:
    embedder, size = scorer.passes.embedder, scorer.passes.embedder.image_size
    images = [s.members["jpg"] for path, _ in shards for s in iter_samples(path)]
    batches = list(iter_sample_rows(shards, SampleOptions()))
    tower = embedder.tower("cpu")
    pixels = torch.randint(0, 256, (CPU_BLOCK_IMAGES, size, size, 3), dtype=torch.uint8)
    (classifier,) = scorer.passes.classifiers
    metadata = pa.Table.from_batches(scorer.score_rows(batches))
    blocks = range(len(images) // CPU_BLOCK_IMAGES)
    with torch.inference_mode():
        embeddings = tower(pixels)
        read = best(lambda: consume(sample for path, _ in shards for sample in iter_samples(path)))
        rows = best(lambda: consume(iter_sample_rows(shards, SampleOptions())))
        jpeg = best(lambda: consume(map(simplejpeg.decode_jpeg, images)))
        decode = best(lambda: consume(decode_image(i, size, decode="fast") for i in images))
        forward = best(lambda: consume(tower(pixels) for _ in blocks))
        classify = best(lambda: consume(classifier.score(embeddings) for _ in blocks))
    write = best(lambda: pq.write_table(metadata, io.BytesIO(), compression="zstd"))
    return [
        ("read tar members", read),
        ("samples to Arrow", rows - read),
        ("decode JPEG", jpeg),
        ("resize and crop", decode - jpeg),
        (f"tower {embedder.model_name}", forward),
        ("detector", classify),
        ("write Parquet", write),
        (
            "scorer, all but the last",
            best(lambda: consume(scorer.score_rows(iter_sample_rows(shards, SampleOptions())))),
        ),
    ]


if __name__ == "__main__":
    main()
