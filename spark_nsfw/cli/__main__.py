"""``python -m spark_nsfw.cli``."""

import sys

from spark_nsfw.cli import main

if __name__ == "__main__":
    sys.exit(main())
