#!/usr/bin/env bash
# A real run: your code -> a 100M ternary model. scripts/quickstart.sh explains the steps one by one.
#
#   scripts/train.sh FOLDER_OR_JSONL [--any-option value ...]     # options go to `smelter train`
#   NAME=mine RECIPE=recipes/300m.toml scripts/train.sh ~/code --num-steps 50000
#
# Settings, as environment variables:
#   NAME        name of the run: data/NAME and runs/NAME             (train)
#   RECIPE      the recipe                                           (recipes/100m.toml)
#   VOCAB_SIZE  tokens of the tokenizer that is trained              (32000)
#   TOKENIZER   use this tokenizer.json or folder instead            (none)
#   NUM_GPUS    processes, one for each GPU                          (all that nvidia-smi lists, else 1)
#   LICENSE     licence of the code in FOLDER, an SPDX identifier    (unknown)
#   CLEAN       0: take the records as they are, without
#               `foundry clean`, which drops secrets among others    (1)
#
# Safe to repeat: training goes on from its last checkpoint.
set -euo pipefail
cd_from=$PWD
cd "$(dirname "$0")/.."

if (($# == 0)) || [[ $1 == -h || $1 == --help ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "scripts/${0##*/}"
    exit $(($# == 0 ? 2 : 0))
fi
source=$1
shift
[[ $source == /* ]] || source=$cd_from/$source

name=${NAME:-train}
recipe=${RECIPE:-recipes/100m.toml}
data=data/$name
run=runs/$name

if [[ -d .venv/bin ]]; then
    PATH=$PWD/.venv/bin:$PATH
fi
if ! command -v smelter >/dev/null; then
    echo "train.sh: smelter is not installed: run \`make setup\` first" >&2
    exit 2
fi

if [[ ! -e $source ]]; then
    echo "train.sh: $source: no such file or folder: give a folder of code or a JSONL file of records" >&2
    exit 2
fi

# The shards fix the tokenizer, and a run that goes on must find the ones it began with.
if [[ ! -e $data/shards/index.json || ! -d $run/checkpoints ]]; then
    records=$source
    if [[ -d $source ]]; then
        foundry corpus --source "$source" --license "${LICENSE:-unknown}" --out "$data/corpus.jsonl"
        records=$data/corpus.jsonl
    fi
    if [[ ! -e $data/shards/index.json || $records -nt $data/shards/index.json ]]; then
        if [[ ${CLEAN:-1} != 0 ]]; then
            foundry clean "$records" --out "$data/clean.jsonl"
            records=$data/clean.jsonl
        fi
        if [[ -n ${TOKENIZER:-} ]]; then
            smelter tokenize "$records" --tokenizer "$TOKENIZER" --out "$data/shards"
        else
            smelter tokenize "$records" --vocab-size "${VOCAB_SIZE:-32000}" --out "$data/shards"
        fi
    fi
fi

num_gpus=${NUM_GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)}
train=(train "$recipe" --shards "$data/shards" --run-dir "$run" "$@")
if ((num_gpus > 1)); then
    torchrun --standalone --nproc-per-node "$num_gpus" -m smelter "${train[@]}"
else
    smelter "${train[@]}"
fi

smelter evaluate "$run"
smelter export "$run" --format hf --out "$run/export/hf"
smelter export "$run" --format gguf --out "$run/export/gguf"
smelter report "$run"
echo "Done: $run/report.html has the curves, $run/export the model."
