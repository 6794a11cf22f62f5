#!/usr/bin/env bash
# Check everything: format, lint, types, scripts, tests. Makes .venv first where it is absent or its pins changed.
#
#   tests/run.sh [--long] [pytest arguments]
#
#   --long    the long grids too (marker `long`)
set -eu

cd "$(dirname "${BASH_SOURCE[0]}")/.."
marker="not long"
case ${1:-} in
    --long)
        marker=""
        shift
        ;;
    -h | --help)
        sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' tests/run.sh
        exit 0
        ;;
esac

./scripts/bootstrap.sh

step() {
    printf '== %s\n' "$*"
    "$@"
}

# Code in the documents is laid out for reading.
step .venv/bin/ruff format --check . --config 'extend-exclude = ["*.md"]'
step .venv/bin/ruff check .
step .venv/bin/mypy
for script in *.sh scripts/*.sh tests/*.sh .ci/run; do
    step bash -n "$script"
done
step .venv/bin/python -m pytest -m "$marker" "$@"
