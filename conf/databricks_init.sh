#!/bin/bash
# Cluster-scoped init script for Databricks: the package on every machine, and the RAPIDS
# Accelerator where the jar has been uploaded. Put it, the wheel and the jar into the Volume.
set -euo pipefail
volume=/Volumes/main/default/spark_nsfw
/databricks/python/bin/pip install "$volume"/spark_nsfw-*-py3-none-any.whl
jar=$volume/rapids-4-spark.jar
if [ -f "$jar" ]; then cp "$jar" /databricks/jars/; fi
