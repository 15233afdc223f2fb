#!/usr/bin/env bash
# Make .venv with the pinned packages, or leave it as it is when nothing has changed.
#
#   scripts/setup_venv.sh
#
# PYTHON=python3.12 chooses the interpreter for a new .venv; otherwise it is the first of python3,
# python3.11 ... that runs, is 3.11 or later and can make virtual environments. pip is used with the
# settings that it finds (PIP_* and pip.conf): mirrors and offline wheels work as usual.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.set-up
# The folder is part of the stamp because a virtual environment that was moved or copied is broken.
wanted="$(cat pyproject.toml constraints.txt "$0" | sha256sum | cut -d' ' -f1) $PWD"

usable() { # INTERPRETER: runs (a pyenv shim may exist and not run), is new enough, can make a venv
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no usable Python (tried: ${PYTHON:-python3, python3.11 to python3.14})." >&2
    echo "setup: needed is 3.11 or later with its venv module; on Debian or Ubuntu: apt-get install python3-venv." >&2
    echo "setup: or name one: make PYTHON=/path/to/python3 ..." >&2
    return 2
}

if [[ -f $stamp && "$(cat "$stamp")" == "$wanted" ]] && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

# An environment that belongs here is brought up to date; one that cannot run, or was moved (its programs'
# first lines name the old place), is made anew.
if ! grep -qsF -- "$PWD/.venv" .venv/bin/activate || ! usable .venv/bin/python; then
    python="$(find_python)"
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

torch="$(grep -E '^torch==' constraints.txt)"
echo "setup: installing $torch, then the rest (pinned in constraints.txt)"
# PyTorch first and alone: it is the largest piece, and its build (CPU, CUDA) is the one that pip finds for
# this machine. The second command then keeps it.
.venv/bin/python -m pip install --quiet "$torch"
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
echo "$wanted" >"$stamp"
echo "setup: done"
