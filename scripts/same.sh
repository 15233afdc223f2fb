#!/usr/bin/env bash
# Does a change keep every number? Runs the same commands with two checkouts and compares all that they leave.
#
#   scripts/same.sh [--keep DIR] [--strict] [--quick] OLD NEW
#
#   OLD NEW      two checkouts, such as a clone of the last commit and this folder
#   --keep DIR   work in DIR (new or empty) and leave there what both have made; DIR/old beside DIR/new
#   --strict     other words on standard error count as a difference too; otherwise they are only shown
#   --quick      without the run through torch.compile, which is most of the time
#
# Foundry makes, cleans and counts records; Smelter tokenizes, trains (Muon and AdamW, FIM, a resume, a compiled run,
# distillation from three kinds of teachers), evaluates, exports, completes and serves, all on the CPU with one thread;
# every --help and some mistakes are asked for. Only commands are used, so the code may be arranged in any way.
# What is compared how, and what cannot be equal from run to run, is in scripts/same.py.
#
# PYTHON names the interpreter; otherwise it is NEW's .venv, or OLD's. WORK names the folder for temporary files.
# Exit codes: 0 nothing differs, 1 something does, 2 it could not be found out.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)

stop() { # MESSAGE: nothing that this script can do
    echo "same: $1" >&2
    exit 2
}

keep='' strict=() quick=0 checkouts=()
while (($#)); do
    case $1 in
        -h | --help)
            sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$here/${0##*/}"
            exit 0
            ;;
        --keep)
            [[ -n ${2:-} ]] || stop "--keep needs a folder"
            keep=$2
            shift
            ;;
        --strict) strict=(--strict) ;;
        --quick) quick=1 ;;
        -*) stop "unknown option $1: known are --keep, --strict, --quick, --help" ;;
        *) checkouts+=("$1") ;;
    esac
    shift
done
((${#checkouts[@]} == 2)) || stop "two checkouts are needed, OLD and NEW; --help says more"
for index in 0 1; do
    folder=${checkouts[index]}
    [[ -f $folder/smelter/__main__.py && -f $folder/foundry/__main__.py ]] ||
        stop "$folder is no checkout: no smelter/__main__.py and foundry/__main__.py in it"
    checkouts[index]=$(cd "$folder" && pwd)
done
old=${checkouts[0]} new=${checkouts[1]}

python=${PYTHON:-}
for folder in "$new" "$old"; do
    [[ -n $python ]] || { [[ -x $folder/.venv/bin/python ]] && python=$folder/.venv/bin/python; }
done
[[ -n $python ]] || stop "no interpreter: neither checkout has a .venv; PYTHON names another"
python=$(command -v "$python") || stop "PYTHON is $python, which does not run"
[[ $python == /* ]] || python=$PWD/$python

if [[ -n $keep ]]; then
    mkdir -p "$keep"
    [[ -z $(ls -A "$keep") ]] || stop "$keep is not empty: name a new folder"
    work=$(cd "$keep" && pwd)
else
    work=$(mktemp -d "${WORK:-${TMPDIR:-/tmp}}/same-XXXXXX") || stop "no folder for temporary files"
fi

# shellcheck disable=SC2329  # the trap calls it
leave() { # end what is still running, and remove what nobody asked to keep
    local child
    for child in $(jobs -p); do
        kill "$child" 2>/dev/null || true
    done
    wait || true
    [[ -n $keep ]] || rm -rf "$work"
}
trap leave EXIT
trap 'exit 2' INT TERM

# Nothing of this machine or its user may decide: one thread each (so both add up in the same order), no GPU, no network,
# no colours, one width of text.
unset SMELTER_API_KEY PYTHONHOME PYTHONSTARTUP PYTHONWARNINGS LLAMA_CPP_DIR
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
    PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0 PYTHONUNBUFFERED=1 COLUMNS=100 NO_COLOR=1 TERM=dumb LC_ALL=C.UTF-8 TZ=UTC
# As in the quickstart: freed memory is kept, which is faster.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296

# --- the same commands, in one checkout ------------------------------------------------------------------

run() { # NAME EXIT-CODE PROGRAM ARGUMENTS...: keep what it says, and how it ends beside how it should
    local name=$1 wanted=$2 code=0 start=$SECONDS
    shift 2
    "$python" -m "$@" >"commands/$name.out" 2>"commands/$name.err" </dev/null || code=$?
    echo "$code expected $wanted" >"commands/$name.code"
    if ((SECONDS - start >= 2)); then
        echo "  $side: $name $((SECONDS - start)) s" >&2
    fi
}

help_texts() {
    local command
    run help-smelter 0 smelter --help
    run help-foundry 0 foundry --help
    for command in tokenize teach train evaluate complete serve export report; do
        run "help-smelter-$command" 0 smelter "$command" --help
    done
    run help-smelter-teach-chunks 0 smelter teach --method chunks --help
    for command in corpus generate clean stats; do
        run "help-foundry-$command" 0 foundry "$command" --help
    done
}

records() { # what Foundry makes
    run generate 0 foundry generate recipes/foundry-local.toml --count 120 --out data/teachers.jsonl
    run generate-again 0 foundry generate recipes/foundry-local.toml --count 140 --out data/teachers.jsonl
    run clean 0 foundry clean data/teachers.jsonl --near-duplicates 0.5 --out data/clean.jsonl
    run clean-run 0 foundry clean data/mixed.jsonl --run --allow-license MIT --out data/mixed-clean.jsonl
    run stats 0 foundry stats data/clean.jsonl data/mixed-clean.jsonl --rejects data/clean.rejects.jsonl \
        --html data/stats.html
    run corpus 0 foundry corpus --source code=source --val-fraction 0.15 --license PSF-2.0 --out data/corpus.jsonl
}

tiny=(--preset tiny --vocab-size 1024 --num-layers 2 --max-seq-len 256 --device cpu --total-batch-size 1024
    --device-batch-size 2 --log-every 1 --eval-tokens 4096 --no-use-torch-compile --warmup-steps 4)
uncapped=(--attn-logit-soft-cap 0 --final-logit-soft-cap 0)

training() { # shards, then runs that take different ways
    local other=shards-other
    run tokenize 0 smelter tokenize data/corpus.jsonl data/clean.jsonl --vocab-size 1024 --out shards
    run tokenize-other 0 smelter tokenize data/corpus.jsonl --vocab-size 512 --shard-tokens 100000 --out $other
    run train-plan 0 smelter train "${tiny[@]}" --shards shards --run-dir runs/plan --dry-run
    run train 0 smelter train "${tiny[@]}" "${uncapped[@]}" --shards shards --run-dir runs/main --num-steps 40 \
        --eval-every 10 --sample-every 20 --checkpoint-every 20 --muon-lr 0.03 --embedding-lr 0.02
    # Half of it, then the rest from the checkpoint: the other halves of the options, too.
    local half=("${tiny[@]}" --shards shards --run-dir runs/resumed --optimizer adamw --adamw-schedule cosine
        --adamw-weight-decay 0.1 --use-document-mask --activation-quant block256 --use-sub-norm --instruct-share 0.5
        --use-gradient-checkpointing --final-cap-anneal-fraction 0.5 --eval-every 5 --sample-every 10)
    run train-half 0 smelter train "${half[@]}" --num-steps 8
    run train-resumed 0 smelter train "${half[@]}" --num-steps 16 --resume must
    run train-other 0 smelter train "${tiny[@]}" --shards $other --run-dir runs/other --num-steps 6 --sample-every 0
    run teach 0 smelter teach --teacher runs/main --shards shards --seq-len 256 --fim-rate 0.5 --rows 24 \
        --device cpu --out shards/teachers/sampled
    run teach-top-k 0 smelter teach --teacher runs/main --shards shards --seq-len 256 --fim-rate 0.5 --rows 24 \
        --device cpu --method top_k --out shards/teachers/top-k
    run teach-chunks 0 smelter teach --method chunks --teacher runs/other --shards shards --device cpu --context 256 \
        --out shards/teachers/chunks
    run train-cached 0 smelter train "${tiny[@]}" --shards shards --run-dir runs/cached --num-steps 6 \
        --cached shards/teachers/sampled shards/teachers/top-k --sample-every 0 --ternary-start-step 3
    run train-online 0 smelter train "${tiny[@]}" --shards shards --run-dir runs/online --num-steps 6 \
        --teachers runs/main --chunk-teachers shards/teachers/chunks --kl-direction js --kl-weight 0.4 --temperature 2 \
        --sample-every 0 --init-from runs/resumed/checkpoints/step_0000008 --use-sub-norm
    if ((!quick)); then
        run train-compiled 0 smelter train "${tiny[@]}" --shards shards --run-dir runs/compiled --num-steps 3 \
            --num-layers 1 --sample-every 0 --use-torch-compile
    fi
}

uses() { # what is done with a trained model
    local head=$'def mean(values):\n    total = 0\n    for value in values:\n' tail=$'\n    return total\n'
    run evaluate 0 smelter evaluate runs/main --max-infill 6 --max-spans 4 --device cpu
    run evaluate-again 0 smelter evaluate runs/resumed --max-infill 3 --max-spans 0 --stride 64 --device cpu
    run compare 0 smelter evaluate --compare runs/main runs/resumed --device cpu
    run export 0 smelter export runs/main --format all --packed --license mit --out export/all
    run export-tq1 0 smelter export runs/main --format gguf --gguf-type TQ1_0 --gguf-embedding F32 --out export/tq1
    run export-refused 2 smelter export runs/resumed --format hf --out export/refused
    run report 0 smelter report runs/main
    run report-cached 0 smelter report runs/cached
    local greedy=(smelter complete runs/main --device cpu --max-tokens 24)
    run complete 0 "${greedy[@]}" --prompt $'import json\n\n\ndef main('
    run complete-seeded 0 "${greedy[@]}" --prompt 'def f(' --temperature 0.9 --top-k 50 --top-p 0.95 --seed 7
    run complete-sampled 0 "${greedy[@]}" --prompt 'class A' --temperature 1 --seed 11
    run complete-infill 0 "${greedy[@]}" --prefix "$head" --suffix "$tail"
    run complete-psm 0 "${greedy[@]}" --prefix "$head" --suffix "$tail" --fim-order psm --temperature 1 --seed 3
    run complete-chat 0 "${greedy[@]}" --chat 'Write a function that adds.' --temperature 1 --seed 5
    run complete-packed 0 smelter complete export/all/packed --device cpu --max-tokens 12 --prompt 'def f(' \
        --temperature 1 --seed 2
}

mistakes() { # what is refused, and in which words
    run no-command 2 smelter nonsense
    run no-option 2 smelter train --num-stepz 3
    run no-recipe-key 2 smelter train recipes/misspelt.toml
    run no-shards 2 smelter train "${tiny[@]}" --shards nowhere --run-dir runs/refused
    run no-prompt 2 smelter complete runs/main
    run no-run 2 smelter report nowhere
    run no-records 2 foundry clean nowhere.jsonl
    run bad-record 2 foundry stats data/bad.jsonl
    run no-settings 2 foundry generate nowhere.toml
}

serving() { # requests to a server, which then is told to end
    local server code=0
    "$python" -m smelter serve runs/main --port 0 --slots 2 --device cpu --name model \
        >commands/serve.out 2>commands/serve.err </dev/null &
    server=$!
    "$python" "$here/same.py" ask commands/serve.out answers || true
    kill -TERM "$server" 2>/dev/null || true
    wait "$server" || code=$?
    echo "$code expected 0" >commands/serve.code
}

one_side() { # NAME CHECKOUT
    side=$1
    local name found
    cd "$work/$side"
    export PYTHONPATH=$2
    for name in smelter foundry; do
        found=$("$python" -c "import $name; print($name.__file__)") || exit 2
        if [[ $found != "$2/$name/__init__.py" ]]; then
            echo "same: $side: $name is imported from $found and not from $2" >&2
            exit 2
        fi
    done
    records
    training
    uses
    serving
    mistakes
    help_texts
    echo "  $side: all commands done" >&2
}

# --- both of them, and the verdict -----------------------------------------------------------------------

# The same inputs for both: recipes of OLD, and some of the standard library as the source code.
for side in old new; do
    mkdir -p "$work/$side/commands" "$work/$side/data"
    "$python" - "$work/$side/source" <<'END'
import email, json, shutil, sys
for package in (email, json):
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package.__path__[0], f"{sys.argv[1]}/{package.__name__}", ignore=skipped)
END
    cp -r "$old/recipes" "$work/$side/recipes"
    printf 'preset = "tiny"\n\n[training]\nnum_stepz = 3\n' >"$work/$side/recipes/misspelt.toml"
    printf '{"kind": "text", "text": "x = 1", "licence": "MIT"}\n' >"$work/$side/data/bad.jsonl"
    # Records for many reasons to put one aside; the first, and one answer of the second, are kept.
    printf '{"kind": "text", "text": "%s", "source": "f.py", "license": "MIT"}\n' \
        "$(printf 'total = total + 1\\n%.0s' {1..40})" >"$work/$side/data/mixed.jsonl"
    cat >>"$work/$side/data/mixed.jsonl" <<'END'
{"kind": "text", "text": "def add(a, b):\n    return a + b\n", "language": "python", "source": "a.py", "license": "MIT", "meta": {"tests": "assert add(1, 2) == 3"}}
{"kind": "instruct", "prompt": "Say hello.", "responses": [{"teacher": "one", "text": "```python\nprint('hello, world')\n```", "finish": "stop"}, {"teacher": "two", "text": "```python\nraise SystemExit(3)\n```", "finish": "stop"}], "language": "python", "license": "MIT"}
{"kind": "text", "text": "def add(a, b):\n    return a - b  # wrong\n", "language": "python", "source": "b.py", "license": "MIT", "meta": {"tests": "assert add(1, 2) == 3"}}
{"kind": "text", "text": "def add(a, b):\n\n    return a + b\n", "language": "python", "source": "c.py", "license": "MIT"}
{"kind": "text", "text": "def broken(:\n    return nothing at all\n", "language": "python", "source": "d.py", "license": "MIT"}
{"kind": "text", "text": "x = 1\n", "language": "python", "source": "e.py", "license": "MIT"}
{"kind": "text", "text": "def other(values):\n    return sorted(values)[0]\n", "language": "python", "source": "g.py", "license": "GPL-3.0-only"}
{"kind": "instruct", "prompt": "Count.", "responses": [{"teacher": "two", "text": "```python\nfor number in range(10):\n    print(num", "finish": "length"}], "language": "python", "license": "MIT"}
END
done

echo "same: $old and $new, in $work" >&2
(one_side old "$old") &
first=$!
(one_side new "$new") &
second=$!
failed=0
wait "$first" || failed=1
wait "$second" || failed=1
((!failed)) || stop "the commands could not be run"
code=0
"$python" "$here/same.py" compare "${strict[@]}" "$work/old" "$work/new" "$old" "$new" || code=$?
echo "same: took $SECONDS s${keep:+; all of it is in $work}" >&2
exit "$code"
