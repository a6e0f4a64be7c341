#!/bin/sh
# Fetch the servers that stand for object stores in `make test-stores`, into .stores.
# What cannot be had here is told; its tests are skipped.
set -u
missing=0
cd "$(dirname "$0")/.."
mkdir -p .stores/bin

if command -v go >/dev/null; then
    for server in github.com/versity/versitygw/cmd/versitygw@v1.8.0 \
        github.com/fsouza/fake-gcs-server@v1.56.1; do
        echo "stores: building $server (minutes, once)"
        GOBIN="$PWD/.stores/bin" GOFLAGS=-modcacherw go install "$server" ||
            { missing=1; echo "stores: that failed; its tests are skipped"; }
    done
else
    missing=1
    echo "stores: no Go (apt-get install golang-go, 1.22 or later): no S3 and GCS servers"
fi

if command -v npm >/dev/null; then
    npm install --silent --no-fund --no-audit --prefix .stores azurite@3.37.0 ||
        { missing=1; echo "stores: no Azurite; its tests are skipped"; }
else
    missing=1
    echo "stores: no npm (apt-get install npm): no Azure server"
fi

echo "stores: fetching HDFS"
home=$("${VENV:-.venv}/bin/python" -c 'import pyspark; print(pyspark.__path__[0])')
SPARK_HOME="$home" "$home/bin/spark-submit" --conf "spark.jars.ivy=$PWD/.stores/ivy" \
    --packages "org.apache.hadoop:hadoop-client-minicluster:3.4.2,junit:junit:4.13.2,org.mockito:mockito-core:2.28.2,commons-cli:commons-cli:1.5.0,javax.xml.bind:jaxb-api:2.3.1" \
    --class org.apache.hadoop.util.VersionInfo spark-internal >.stores/hdfs.log 2>&1 ||
    { missing=1; echo "stores: no HDFS, .stores/hdfs.log says why; its tests are skipped"; }

if [ $missing = 0 ]; then touch .stores/.ready; fi # else it is tried again next time
