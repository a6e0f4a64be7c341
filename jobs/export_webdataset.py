"""Write clean shards: ``spark-submit jobs/export_webdataset.py METADATA OUTPUT [options]``."""

import sys

from spark_nsfw.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
