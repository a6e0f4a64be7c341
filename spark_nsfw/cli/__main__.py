"""The program ``spark-nsfw``, and ``python -m spark_nsfw.cli``."""

import gc
import os
import sys
from typing import NoReturn

from spark_nsfw.cli import main

__all__ = ["run"]


def run() -> NoReturn:
    """Run one command in a process that is for nothing else, and end it."""
    gc.set_threshold(100_000)  # else a quarter of the time that imports take goes into collections
    status = main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)  # what torch and Spark would tidy up ends with the process, a second sooner


if __name__ == "__main__":
    run()
