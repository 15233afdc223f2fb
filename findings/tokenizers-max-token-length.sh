#!/usr/bin/env bash
# tokenizers: `max_token_length` of BpeTrainer is exclusive.
#
# Expected: trained on nothing but one word of 8 characters, with max_token_length=8, the word becomes a token.
# Seen (tokenizers 0.23.3): it does not; with 9 it does, and so for other lengths. In byte-level BPE a character stands for a
# byte, so a limit meant as 32 bytes makes tokens of at most 31, and an indentation of 32 blanks is never one of them.
#
# Installs into a temporary folder; ends with 1 where the behaviour is another. Needs Python 3.11 or later.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet tokenizers==0.23.3
"$work/venv/bin/python" - <<'PYTHON'
import sys

import tokenizers
from tokenizers import Tokenizer, models, trainers

seen = {}
for word in ("code", "complete", "abcdefghijklmnop"):
    for limit in (len(word), len(word) + 1):
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=200, max_token_length=limit, show_progress=False)
        tokenizer.train_from_iterator([word] * 100, trainer)
        seen[len(word), limit] = word in tokenizer.get_vocab()
print(f"tokenizers {tokenizers.__version__}: (characters, limit): learned as one token: {seen}")
sys.exit(0 if all(learned == (limit > size) for (size, limit), learned in seen.items()) else "it is no longer so")
PYTHON
