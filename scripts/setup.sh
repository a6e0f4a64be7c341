#!/bin/sh
# Set up .venv with the package and everything its demo, tests and linters need.
# Usage: scripts/setup.sh [VENV_DIRECTORY]; PYTHON names the interpreter, otherwise one that fits
# is looked for on the PATH.
set -eu
cd "$(dirname "$0")/.."
venv=${1:-.venv}
python=$(scripts/find_python.sh) || exit 1

install_package() {
    # Debian and Ubuntu; as root, or through sudo where it asks no password.
    if [ "$(id -u)" = 0 ]; then sudo=""; else sudo="sudo -n"; fi
    if ! command -v apt-get >/dev/null; then return 1; fi
    $sudo apt-get update -qq
    for name in "$@"; do
        if $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$name" >/dev/null; then
            return 0
        fi
    done
    return 1
}

java_is_good() {
    java=${JAVA_HOME:+$JAVA_HOME/bin/}java
    version=$("$java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1)
    [ "${version:-0}" -ge 17 ] 2>/dev/null
}

if ! java_is_good; then
    echo "setup: no Java 17 or later, installing it"
    install_package openjdk-17-jre-headless openjdk-21-jre-headless || {
        echo "setup: Spark needs Java 17 or 21; install it and run this again" >&2
        exit 1
    }
fi

if ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null; then
    echo "setup: no browser for the test that looks at the report, installing Chromium"
    install_package chromium chromium-browser || echo "setup: none to be had; that test is skipped"
fi

if [ ! -x "$venv/bin/pip" ]; then
    "$python" -m venv "$venv" 2>/dev/null || {
        echo "setup: this Python has no venv module, installing it"
        rm -rf "$venv"
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        install_package "python$version-venv" python3-venv || {
            echo "setup: install python$version-venv and run this again" >&2
            exit 1
        }
        "$python" -m venv "$venv"
    }
fi

echo "setup: installing packages into $venv (torch is several GB, this takes minutes)"
"$venv/bin/pip" install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'

echo "setup: keeping Spark's classes in the form that Java starts with fastest"
"$venv/bin/python" -m spark_nsfw.spark.jvm >/dev/null 2>&1 ||
    echo "setup: that failed; every start takes a few seconds longer, and nothing else changes"
