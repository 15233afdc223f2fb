#!/usr/bin/env bash
# From source code on this machine to a small ternary model in three formats: the whole way, readable.
#
#   make quickstart          # or, after `make setup`: scripts/quickstart.sh
#
# The corpus is the Python standard library's own source, so nothing is downloaded. Safe to repeat: a
# training that was interrupted goes on from its last checkpoint, a finished one is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."

# glibc would give large blocks back to the system after each step, and fault them in again: training is faster without.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296

if [[ -d .venv/bin ]]; then
    PATH=$PWD/.venv/bin:$PATH
fi
data=data/quickstart
run=runs/quickstart
seconds=()

step() { # NAME COMMAND...: run it, showing the command and keeping its time
    local name=$1 start=$SECONDS
    shift
    printf '\n\033[1m== %s\033[0m\n$' "$name"
    printf ' %q' "$@"
    printf '\n'
    "$@"
    seconds+=("$(printf '%-11s %5d s' "$name" $((SECONDS - start)))")
}

# 1. Source files -> records, one JSON object a line. One file in twenty is held out.
step corpus foundry corpus --source stdlib --out $data/corpus.jsonl

# 2. Records -> a byte-level BPE tokenizer (trained here) and packed shards of token ids.
step tokenize smelter tokenize $data/corpus.jsonl --vocab-size 4096 --out $data/shards

# 3. Shards -> a model whose weights are -1, 0 and +1. The recipe says how large and for how long.
step train smelter train recipes/quickstart.toml

# 4. Bits per byte on the held-out files, beside gzip and xz; infilling of lines cut out of them; what arrives at the
#    cursor of an editor while they are typed.
step evaluate smelter evaluate $run --editor --editor-places 100 --editor-lines 20

# 5. What it writes: the end of a function, then the middle of one.
step complete smelter complete $run --max-tokens 48 \
    --prompt $'def read_lines(path):\n    """Return the lines of a text file."""\n'
step infill smelter complete $run --max-tokens 32 \
    --prefix $'def mean(values):\n    total = 0\n    for value in values:\n' \
    --suffix $'\n    return total / len(values)\n'

# 6. For the tools you use: Transformers and its kin read the first, llama.cpp and its kin the second. A small
#    vocabulary can afford its embedding in float32, and llama.cpp then computes what training did.
step export-hf smelter export $run --format hf --out $run/export/hf
step export-gguf smelter export $run --format gguf --gguf-embedding F32 --out $run/export/gguf

# 7. Curves, figures and samples on one page.
step report smelter report $run

printf '\n\033[1mDone.\033[0m\n'
printf '  %s\n' "${seconds[@]}"
cat <<END

  $run/report.html      curves, figures and samples: open it in a browser
  $run/results.json     the figures for programs
  $run/checkpoints/     the model, and all that training needs to go on
  $run/export/hf/       for Transformers
  $run/export/gguf/     for llama.cpp
END
