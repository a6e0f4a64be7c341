"""Every section of the GPU's benchmark, each with a deadline, in one run of ten to fifteen minutes.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --model test_vit --embedding-size 768  # to try it out

Each row is printed, and written to ``benchmarks/results/gpu.jsonl``, as soon as it is known, so
that a run that is cut off keeps what it has measured. Weights are random, of the real
architecture; photographs are scikit-image's, or those of ``--shard``.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu import end_to_end, exactness, forward, rates, under_spark
from benchmarks.gpu.setup import MODEL, Row, Setup
from benchmarks.table import RESULTS, machine

#: What is measured, in this order: a section of that name, and its deadline in seconds.
SECTIONS: dict[str, tuple[Callable[[Setup], Iterator[Row]], int]] = {
    "matrix": (rates.matrix, 30),
    "decode": (rates.decode, 30),
    "forward": (forward.variants, 100),
    "batch": (forward.batch_sizes, 60),
    "profile": (forward.profile, 20),
    "exactness": (exactness.drift, 40),
    "determinism": (exactness.determinism, 40),
    "memory": (exactness.memory, 40),
    "end to end": (end_to_end.rates, 150),
    "compile": (forward.compiled, 90),
    "float8": (forward.float8, 90),
    "spark": (under_spark.rates, 500),
}


def run(setup: Setup, sections: list[str], out: Path) -> None:
    """Run sections one after another; what fails is a row, too."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w") as file:

        def tell(row: Row) -> None:
            line = json.dumps(row, default=str)
            print(line, flush=True)
            print(line, file=file, flush=True)

        tell({"section": "machine", **machine()})
        for name in sections:
            section, seconds = SECTIONS[name]
            started = time.perf_counter()
            try:
                for row in section(setup):
                    spent = time.perf_counter() - started
                    rounded = {
                        key: float(f"{value:.5g}") if isinstance(value, float) else value
                        for key, value in row.items()
                    }
                    tell({"section": name, **rounded, "at s": round(spent, 1)})
                    if spent > seconds:
                        tell({"section": name, "stopped": f"{seconds} s are over"})
                        break
            except Exception:
                tell({"section": name, "failed": traceback.format_exc()})
            if setup.on_gpu:
                torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--embedding-size", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sections", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--shard", help="a tar of JPEGs instead of scikit-image's pictures")
    parser.add_argument("--detectors", default="../shared/laion", help="LAION's zips, golden sets")
    parser.add_argument("--seconds", type=float, default=3, help="how long each rate is measured")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.jsonl")
    options = parser.parse_args()
    setup = Setup(
        options.model,
        options.embedding_size,
        options.device,
        options.shard,
        options.detectors,
        options.seconds,
    )
    run(setup, options.sections, options.out)


if __name__ == "__main__":
    main()
