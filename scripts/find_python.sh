#!/bin/sh
# Print the Python to set up with: PYTHON where it is set, else python3 where it is a tested
# version, else the newest tested one, else 3.14.
set -eu

version_of() {
    # Runs it, because a pyenv shim is there even where its Python is not.
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

fits() {
    # Usage: fits PYTHON VERSION...
    found=$(version_of "$1")
    shift
    for version in "$@"; do
        if [ "$found" = "$version" ]; then return 0; fi
    done
    return 1
}

tested="3.13 3.12 3.11 3.10"

if [ -n "${PYTHON:-}" ]; then
    # shellcheck disable=SC2086
    if fits "$PYTHON" $tested 3.14; then
        echo "$PYTHON"
        exit 0
    fi
    found=$(version_of "$PYTHON")
    echo "setup: PYTHON=$PYTHON is ${found:+Python }${found:-no Python that runs}, and Python" \
        "3.10 to 3.14 is needed" >&2
    exit 1
fi

# shellcheck disable=SC2086
for name in python3 $(printf 'python%s ' $tested); do
    if fits "$name" $tested; then
        echo "$name"
        exit 0
    fi
done
for name in python3 python3.14; do
    if fits "$name" 3.14; then
        echo "$name"
        exit 0
    fi
done
found=$(version_of python3)
echo "setup: Python 3.10 to 3.13 is needed, and the PATH has ${found:+only Python }${found:-none}." \
    "Install one, or name one with PYTHON=/path/to/python3.12" >&2
exit 1
