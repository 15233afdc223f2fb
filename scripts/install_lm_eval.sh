#!/usr/bin/env bash
# lm-evaluation-harness for the tests, in an environment of its own that borrows PyTorch and Transformers from .venv.
# Prints its Python on standard output.
#
#   make setup && scripts/install_lm_eval.sh
#
# LM_EVAL_DIR names another folder than ~/.cache/foundry-tests/lm-eval-VERSION. At once where it is there already; made
# anew where it belongs to another .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.4.13
target=${LM_EVAL_DIR:-$HOME/.cache/foundry-tests/lm-eval-$version}
venv=${VENV:-$PWD/.venv}
lender=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

if [[ -f $target/.lender && "$(cat "$target/.lender")" == "$lender" ]]; then
    echo "$target/bin/python"
    exit 0
fi
if [[ -e $target && ! -f $target/pyvenv.cfg ]]; then
    echo "install_lm_eval: $target is there and is no environment: remove it, or name another with LM_EVAL_DIR" >&2
    exit 2
fi
echo "install_lm_eval: installing lm-eval $version into $target" >&2
mkdir -p "$(dirname "$target")"
"$venv/bin/python" -m venv --clear "$target"
site=$("$target/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# What .venv has is there already for pip, too: PyTorch is not fetched a second time.
echo "$lender" >"$site/lender.pth"
"$target/bin/python" -m pip install --quiet --constraint constraints.txt "lm-eval==$version" accelerate peft >&2
echo "$lender" >"$target/.lender"
echo "$target/bin/python"
