#!/usr/bin/env bash
# Everything that needs a GPU in one call of less than ten minutes: correctness first, then the benchmarks.
#
#   benchmarks/gpu.sh [--quick]          # --quick: every benchmark in its short form
#
# Needs no network and no installation of Smelter, but the package annotated-types (in WHEELS, see below, where the machine
# lacks it); what else is missing is named, and the rest runs.
# Each benchmark leaves one JSON file with date, device, command and result; one that fails does not stop the others.
#
# Settings, as environment variables:
#   OUT         folder of the JSON files                         (benchmarks/results/DATE-DEVICE)
#   PYTHON      an interpreter with PyTorch for CUDA             (.venv/bin/python, else python3)
#   WHEELS      folder of wheels to use for this call only       (none)
#               e.g. from: pip download --no-deps -d wheels torchao==0.18.0 onebitllms==0.0.4 tomli-w==1.2.0 annotated-types==0.8.0
#   TRACE       also write the profiler's record of a step here  (none)
#   TIME_LIMIT  seconds for everything                           (570)
#
# Exit codes: 0 all ran and all is right, 1 something failed (named at the end), 2 no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

options=()
for argument in "$@"; do
    case $argument in
        --quick) options+=(--quick) ;;
        -h | --help)
            sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "benchmarks/${0##*/}"
            exit 0
            ;;
        *)
            echo "gpu.sh: unknown option $argument: the only one is --quick" >&2
            exit 2
            ;;
    esac
done

python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null) || {
    echo "gpu.sh: no GPU that PyTorch of $python sees: scripts/setup_cuda.sh says what is missing" >&2
    exit 2
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [[ -n ${WHEELS:-} ]]; then
    # Beside the machine's own packages, which stay as they are.
    "$python" -m pip install --quiet --no-index --no-deps --target "$work/site" "$WHEELS"/*.whl
    PYTHONPATH=$PYTHONPATH:$work/site
fi
"$python" -c 'import annotated_types' 2>/dev/null || {
    echo "gpu.sh: the package annotated-types is missing: install it, or put its wheel into WHEELS (see --help)" >&2
    exit 2
}
date=$(date -u +%Y-%m-%d)
name_of_device=$(tr -c 'A-Za-z0-9\n' - <<<"$device")
out=${OUT:-benchmarks/results/$date-$name_of_device}
mkdir -p "$out"
deadline=${TIME_LIMIT:-570}
failed=()

nvidia-smi || echo "nvidia-smi is not here"
"$python" - <<'END'
import importlib.metadata as metadata
import platform

print("Python", platform.python_version())
for name in ("torch", "triton", "transformers", "onebitllms", "torchao", "tomli-w", "pytest", "hypothesis"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is missing")
END

has() { # has MODULE...: whether all can be imported
    local module
    for module in "$@"; do
        "$python" -c "import $module" 2>/dev/null || return 1
    done
}

limited() { # limited NAME LIMIT COMMAND...: run it within LIMIT seconds and what is left of all; sets `code`
    local name=$1 limit=$2 left=$((deadline - SECONDS))
    shift 2
    code=0
    if ((left < 10)); then
        echo "== $name: no time left"
        code=124
    else
        if ((limit > left)); then
            limit=$left
        fi
        echo "== $name (at most $limit s)"
        timeout --kill-after=5 "$limit" "$@" | tee "$work/$name.out" || code=$?
    fi
    if ((code)); then
        echo "== $name: failed with exit code $code" >&2
        failed+=("$name")
    fi
}

record() { # record NAME LIMIT SCRIPT [OPTION...]: the last line of its output becomes NAME.json
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    if [[ ! -e $1 ]]; then
        echo "== $name: there is no $1 yet"
        return
    fi
    limited "$name" "$limit" "$python" "$@" --json
    "$python" - "$work/$name.out" "$date" "$device" "$code" "$((SECONDS - start))" "$* --json" >"$out/$name.json" <<'END'
import json
import sys
from pathlib import Path

path, date, device, code, seconds, command = sys.argv[1:]
lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
try:
    result = json.loads(lines[-1])
except (IndexError, ValueError):
    result = None
values = {"date": date, "device": device, "command": f"python {command}", "exit_code": int(code)}
print(json.dumps(values | {"seconds": int(seconds), "result": result}, indent=1))
END
}

if has pytest hypothesis; then
    # Not every file: others with GPU tests import packages that a bare machine lacks.
    files=(tests/test_gpu.py tests/kernels/test_capability.py tests/kernels/test_linear_triton.py tests/kernels/test_attention_flex.py)
    # A warning from another version of PyTorch is no defect of ours.
    SMELTER_REQUIRE_GPU=1 limited tests 150 "$python" -m pytest -q -m gpu -W default -p no:cacheprovider "${files[@]}"
else
    echo "pytest or hypothesis is missing: the training step alone is checked"
    record agreement 150 benchmarks/agreement.py
fi
trace=()
if [[ -n ${TRACE:-} ]]; then
    trace=(--trace "$TRACE")
fi
record train_gpu 240 benchmarks/train_gpu.py --parts speed fp16 "${trace[@]}" "${options[@]}"
record kernels 60 benchmarks/kernels.py "${options[@]}"
record optimizers 60 benchmarks/optimizers.py "${options[@]}"
record memory 60 benchmarks/memory.py "${options[@]}"
record loss_memory 60 benchmarks/loss_memory.py "${options[@]}"
record train_gpu_growth 120 benchmarks/train_gpu.py --parts growth "${options[@]}"

echo "== results in $out, after $SECONDS s"
if ((${#failed[@]})); then
    echo "gpu.sh: failed: ${failed[*]}" >&2
    exit 1
fi
