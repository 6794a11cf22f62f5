#!/usr/bin/env bash
# Check everything: format, lint, types, scripts, tests. Makes .venv first where it is absent or its pins changed.
#
#   tests/run.sh [--long | --quick] [pytest arguments]
#
#   --long    the long grids too (marker `long`)
#   --quick   only tests that start no other process and import neither torch nor Kiwi; one that would is skipped there
#
# Without pytest arguments the tests run in two halves beside each other, since many of them wait for processes.
set -eu

cd "$(dirname "${BASH_SOURCE[0]}")/.."
marker="not long"
case ${1:-} in
    --long)
        marker=""
        shift
        ;;
    --quick)
        set -- "$@" -rfE
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
if [ $# -gt 0 ]; then
    step .venv/bin/python -m pytest -m "$marker" "$@"
    exit
fi
half=(tests/training tests/reembedding tests/coref tests/docs tests/quality)
other=$(mktemp)
trap 'kill $! 2>/dev/null || true; rm -f "$other"' EXIT
.venv/bin/python -m pytest -m "$marker" "${half[@]}" >"$other" 2>&1 &
code=0
step .venv/bin/python -m pytest -m "$marker" "${half[@]/#/--ignore=}" || code=$?
wait $! || code=$?
printf '== %s\n' "${half[*]}"
cat "$other"
exit $code
