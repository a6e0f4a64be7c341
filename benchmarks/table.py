"""What every benchmark does with its numbers."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    about: dict[str, str | int] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": f"{len(names)} x {names[0]}" if names else platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about


def report(name: str, rows: Sequence[dict[str, object]]) -> None:
    """Print rows as a Markdown table and write them to ``benchmarks/results/NAME.json``."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in cells)) for i, c in enumerate(columns)]
    print(f"\n{name}: {machine()}\n")
    for line in [columns, ["-" * width for width in widths], *cells]:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |")
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(), "command": " ".join(sys.argv[1:]), "rows": list(rows)}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2, default=float) + "\n")


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
