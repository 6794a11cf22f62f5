#!/usr/bin/env bash
# Make .venv with the pinned packages of requirements.txt: once, and again only when the pins change (or the folder moved).
#
#   scripts/bootstrap.sh && .venv/bin/python ...
#
#   PYTHON             the Python (3.11 or newer) to build with; without it python3.11, 3.12, 3.13 and python3 are tried
#   MOAI_TORCH_INDEX   another wheel index for torch, so that a machine without a GPU pulls no CUDA packages, for instance
#                      https://download.pytorch.org/whl/cpu
#
# pip's own configuration (pip.conf, PIP_*) holds throughout. Runs in bash 3.2.
set -eu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
# What a finished .venv was made from. Written last, so that a killed install is done again.
stamp=$venv/.bootstrap.stamp

say() { printf 'bootstrap: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 2
}

wanted() {
    printf '%s\n' "$root"
    cat "$root/requirements.txt"
}

is_current() {
    [ -x "$venv/bin/python" ] && [ -r "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted)" ]
}

# Prints the version, and fails when it is too old or no Python at all.
version_of() {
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local name version seen=""
    if [ -n "${PYTHON:-}" ]; then
        version=$(version_of "$PYTHON") || die "PYTHON=$PYTHON: ${version:+is Python $version, }not a Python 3.11 or newer; name another one or unset PYTHON"
        python=$PYTHON
        return
    fi
    for name in python3.11 python3.12 python3.13 python3; do
        if version=$(version_of "$name"); then
            python=$name
            return
        fi
        seen="$seen${version:+; $name is $version}"
    done
    die "Python 3.11 or newer is missing (tried python3.11, python3.12, python3.13, python3$seen)." \
        "Install it (Debian, Ubuntu: apt install python3.11 python3.11-venv; macOS: brew install python@3.11) or name one: PYTHON=/path/to/python3.11"
}

check_modules() {
    "$python" -c 'import venv' 2>/dev/null || die "the venv module of $python is missing (Debian, Ubuntu: apt install python3-venv)"
    "$python" -c 'import ensurepip' 2>/dev/null || die "pip for new environments (the ensurepip module of $python) is missing (Debian, Ubuntu: apt install python3-venv)"
}

# One start installs, the others wait. The lock belongs to the open file, which pip inherits: it lasts until the last of them ends.
take_lock() {
    mkdir -p "$venv" 2>/dev/null || die "$venv cannot be made: this user may not write into the folder; use a clone of your own"
    if [ ! -w "$venv" ] || { [ -e "$venv/.bootstrap.lock" ] && [ ! -w "$venv/.bootstrap.lock" ]; }; then
        die "$venv is not ready for this user, who may not write into it; use a clone of your own, or remove .venv and start again"
    fi
    exec 9>>"$venv/.bootstrap.lock"
    if ! "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null; then
        say "another start is installing into .venv; waiting for it"
        "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    fi
}

# A .venv that was copied or moved still names its old place at the head of every script.
made_here() {
    [ -x "$venv/bin/python" ] && [ -r "$venv/bin/pip" ] || return 1
    case $(head -n 2 "$venv/bin/pip") in
        *"$venv/bin/"*) "$venv/bin/python" -m pip --version >/dev/null 2>&1 ;;
        *) return 1 ;;
    esac
}

pip_install() {
    local quiet=--quiet
    [ ! -t 2 ] || quiet=--disable-pip-version-check
    "$venv/bin/python" -m pip install --disable-pip-version-check "$quiet" "$@" >&2 ||
        die "pip could not install: $* (its message is above; without a network name an index or wheels in pip.conf or PIP_*)"
}

install() {
    local started=$SECONDS pin
    if ! made_here; then
        say "making .venv with $python ($(version_of "$python"))"
        # All but the lock, which the next start would otherwise not find.
        find "$venv" -mindepth 1 -maxdepth 1 ! -name .bootstrap.lock -exec rm -rf {} +
        "$python" -m venv "$venv" || die "$python -m venv failed (Debian, Ubuntu: apt install python3-venv)"
    fi
    rm -f "$stamp"
    if [ -n "${MOAI_TORCH_INDEX:-}" ]; then
        pin=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' "$root/requirements.txt")
        say "installing $pin from $MOAI_TORCH_INDEX"
        pip_install --no-deps --index-url "$MOAI_TORCH_INDEX" "$pin"
    fi
    say "installing the packages of requirements.txt (minutes the first time)"
    pip_install -r "$root/requirements.txt"
    # setuptools is among the pins: an isolated build would fetch it again, unpinned.
    pip_install --no-deps --no-build-isolation -e "$root"
    wanted >"$stamp.new"
    mv "$stamp.new" "$stamp"
    say ".venv is ready ($((SECONDS - started)) s)"
}

case ${1:-} in
    "") ;;
    -h | --help)
        sed -n '2,/^set -eu/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) die "takes no arguments, but got $1 (--help says what it does)" ;;
esac

is_current && exit 0
find_python
check_modules
take_lock
is_current || install
