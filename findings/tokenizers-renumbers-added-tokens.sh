#!/usr/bin/env bash
# tokenizers: the id that a tokenizer.json states for an added token is not the id that it gets, where ids have a gap.
#
# Expected: `{"id": 605, "content": "<|x|>"}` in `added_tokens` is token 605, as every other reader of the file will take
# it (a vocabulary of 500 and rows kept free in the embedding up to 605 is nothing unusual).
# Seen (tokenizers 0.23.3): the file loads without a word, "<|x|>" is token 500, and saving writes 500 in place of 605.
# Added tokens are counted on from the vocabulary's size; the stated id is only used to order them. A model whose row 605
# was trained for it is fed another row, and `token_to_id` agrees with the wrong one.
#
# Installs into a temporary folder; ends with 1 where the behaviour is another. Needs Python 3.11 or later.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet tokenizers==0.23.3
"$work/venv/bin/python" - <<'PYTHON'
import json
import sys

import tokenizers

vocabulary = {chr(0x4E00 + number): number for number in range(500)}
added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
stated = {
    "version": "1.0",
    "added_tokens": [{"id": 605, "content": "<|x|>", **added}],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
}
loaded = tokenizers.Tokenizer.from_str(json.dumps(stated))
seen = loaded.token_to_id("<|x|>"), loaded.encode("<|x|>").ids, loaded.id_to_token(605)
saved = [token["id"] for token in json.loads(loaded.to_str())["added_tokens"]]
print(f"tokenizers {tokenizers.__version__}: stated 605; token_to_id, encode, id_to_token(605): {seen}; saved {saved}")
sys.exit(0 if (*seen, saved) == (500, [500], None, [500]) else "it is no longer so")
PYTHON
