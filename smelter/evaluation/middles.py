"""Bits per byte of what is missing at a cursor, in each way of asking: does the suffix help, and in which order?

The prompts are those that an answer would be written after: prefix first (PSM), suffix first (SPM), or the prefix
alone. Where the cursor stands inside a token, the last two are healed (`decoding.healing`): the first token's probability
is that among the tokens which spell the rest of the prompt. Asked prefix first, the middle is encoded by itself, as in
training.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from smelter.decoding import FimOrder, Healing, make_prompt
from smelter.evaluation.gaps import InfillCase
from smelter.model import Model
from smelter.tokens import Tokenizer

Asked = FimOrder | Literal["plain"]
MAX_TOKENS = 64
"""Tokens of a middle that are counted."""


@torch.inference_mode()
def middle_bpb(model: Model, tokenizer: Tokenizer, cases: Sequence[InfillCase], asked: Asked) -> float:
    """Bits per byte of the cases' middles, the first 64 tokens of each; the token that ends a middle is not counted.

    Raises ValueError without a middle that has a byte.
    """
    healing, nats, num_bytes = Healing(tokenizer), 0.0, 0
    device = model.embed_tokens.weight.device
    for case in cases:
        prompt = make_prompt(
            tokenizer,
            model.config.max_seq_len,
            case.prefix,
            None if asked == "plain" else case.suffix,
            max_tokens=MAX_TOKENS,
            order="psm" if asked == "psm" else "spm",
        )
        middle = tokenizer.encode_bytes(prompt.pending + case.middle.encode("utf-8", "surrogateescape"))[:MAX_TOKENS]
        if not middle:
            continue
        tokens = torch.tensor([[*prompt.ids, *middle[:-1]]], device=device)
        logits = model.logits(model(tokens)[0, len(prompt.ids) - 1 :]).float().cpu()
        logits[:1] = healing.restrict(logits[:1], [prompt.pending])
        nats -= float(logits.log_softmax(-1).gather(1, torch.tensor(middle)[:, None]).sum())
        num_bytes += len(tokenizer.decode_bytes(middle)) - len(prompt.pending)
    if not num_bytes:
        raise ValueError("no case has a middle")
    return nats / math.log(2) / num_bytes
