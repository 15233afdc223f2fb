#!/usr/bin/env bash
# Transformers: models with tied weights that are loaded from their folder in several threads at once come out empty,
# and from then on loading one alone fails in that process, too.
#
# Expected: `from_pretrained` in four threads gives four models, as it does one after the other.
# Seen (transformers 5.23.0, torch 2.13.0, CPU): one at a time 20 of 20 load. Four at once, `model.to("cpu")` raises
# "Cannot copy out of meta tensor": weights are left on the meta device. Loading patches the library's own functions
# while it lasts, for all threads, and two that overlap put each other's patch back as if it were the original: loads
# that stand alone afterwards fail as well. Untied weights showed none of it. A lock around the load is the remedy.
#
# Installs into a temporary folder; ends with 1 where the behaviour is another. Needs Python 3.11 or later.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet transformers==5.23.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work/model" <<'PYTHON'
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])


def load(_: int) -> str:
    """What loading the folder came to."""
    try:
        transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True).to("cpu")
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:31]}"
    return "loaded"


before = Counter(map(load, range(20)))
together = Counter()
for _ in range(20):
    with ThreadPoolExecutor(4) as pool:
        together.update(pool.map(load, range(4)))
after = Counter(map(load, range(20)))
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("one at a time:          ", dict(before))
print("four at once, 20 rounds:", dict(together))
print("one at a time, after:   ", dict(after))
sys.exit(0 if before == {"loaded": 20} and together["loaded"] < 80 and after["loaded"] < 20 else 1)
PYTHON
echo "as described"
