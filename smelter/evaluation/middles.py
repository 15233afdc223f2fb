"""Bits per byte of what is missing at a cursor, in each way of asking: does the suffix help, and in which order?

The prompts are those that an answer would be written after: prefix first (PSM), suffix first (SPM), or the prefix
alone. Where the cursor stands inside a token, the last two are healed (`decoding.healing`): the first token's
probability is that among the tokens which spell the rest of the prompt. Asked prefix first, or where it shall not be
healed, the middle is encoded by itself, as in training.
"""

import math
from collections.abc import Sequence

import torch

from smelter.decoding import Healing, make_prompt
from smelter.evaluation.places import Place
from smelter.evaluation.suggestions import Asked
from smelter.model import Model
from smelter.tokens import Tokenizer

MAX_TOKENS = 64
"""Tokens of a middle that are counted."""


@torch.inference_mode()
def middle_bpb(
    model: Model, tokenizer: Tokenizer, places: Sequence[Place], asked: Asked, *, heal: bool = True
) -> float:
    """Bits per byte of what is missing at the places, up to 64 tokens of each; what ends a line is not counted.

    Without `heal` it follows on every prompt as that ends, as from llama.cpp's server. Raises ValueError where nothing
    is missing.
    """
    healing, nats, num_bytes = Healing(tokenizer), 0.0, 0
    device = model.embed_tokens.weight.device
    for place in places:
        prefix, suffix = place.around()
        prompt = make_prompt(
            tokenizer,
            model.config.max_seq_len,
            prefix,
            None if asked == "plain" else suffix,
            max_tokens=MAX_TOKENS,
            order="psm" if asked == "psm" else "spm",
            heal=heal,
        )
        room = min(MAX_TOKENS, model.config.max_seq_len - len(prompt.ids) + 1)
        middle = tokenizer.encode_bytes(prompt.pending + place.missing.encode("utf-8", "surrogateescape"))[:room]
        if not middle:
            continue
        tokens = torch.tensor([[*prompt.ids, *middle[:-1]]], device=device)
        logits = model.logits(model(tokens)[0, len(prompt.ids) - 1 :]).float().cpu()
        logits[:1] = healing.restrict(logits[:1], [prompt.pending])
        nats -= float(logits.log_softmax(-1).gather(1, torch.tensor(middle)[:, None]).sum())
        num_bytes += len(tokenizer.decode_bytes(middle)) - len(prompt.pending)
    if not num_bytes:
        raise ValueError("nothing is missing at any place")
    return nats / math.log(2) / num_bytes
