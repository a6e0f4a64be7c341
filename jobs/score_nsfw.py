"""Score WebDataset shards: ``spark-submit jobs/score_nsfw.py INPUT... OUTPUT [options]``."""

import sys

from spark_nsfw.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
