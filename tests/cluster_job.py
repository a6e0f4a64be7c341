"""A submitted job that also says where driver and workers have the package from, and who
started the workers.
"""

import sys

import spark_nsfw
from spark_nsfw.cli import main
from spark_nsfw.spark.session import active_or_local_session


def locate(batches):
    import sys

    import pyarrow as pa

    import spark_nsfw

    daemon = sys.modules["__main__"].__spec__.name
    for _ in batches:
        yield pa.RecordBatch.from_pydict({"file": [spark_nsfw.__file__], "daemon": [daemon]})


status = main(["score", *sys.argv[1:]])
spark = active_or_local_session()
print("driver's package:", spark_nsfw.__file__)
workers = spark.range(2, numPartitions=2).mapInArrow(locate, "file string, daemon string")
for row in workers.collect():
    print("worker's package:", row.file)
    print("worker's daemon:", row.daemon)
print("master:", spark.sparkContext.master)
spark.stop()
sys.exit(status)
