"""Bits per byte at a cursor, beside a plain sum over the tokens of one prompt."""

import math

import pytest
import torch

from smelter.decoding.prompts import make_prompt
from smelter.evaluation.middles import middle_bpb
from smelter.evaluation.places import Place
from tests import tiny

TEXT = "def area(width, height):\n    return width * height\n\n\nprint(area(3, 4))\n"
TOKENS = tiny.tokenizer()


def place(at: str) -> Place:
    start = TEXT.index(at)
    return Place(0, TEXT, start, TEXT.index("\n", start))


@torch.inference_mode()
def test_prefix_first_is_the_sum_over_the_middles_own_tokens() -> None:
    model, here = tiny.model(max_seq_len=128), place("turn width")
    prompt = make_prompt(TOKENS, 128, here.prefix, here.suffix, max_tokens=64, order="psm")
    middle = TOKENS.encode("turn width * height")
    logits = model.logits(model(torch.tensor([[*prompt.ids, *middle]])))[0].float().log_softmax(-1)
    nats = -sum(float(logits[len(prompt.ids) - 1 + i, token]) for i, token in enumerate(middle))
    expected = nats / math.log(2) / len("turn width * height")
    assert middle_bpb(model, TOKENS, [here], "psm") == pytest.approx(expected, rel=1e-5)


@torch.inference_mode()
def test_without_a_suffix_the_first_token_is_one_that_spells_the_prompts_last() -> None:
    model, here = tiny.model(max_seq_len=128), place("turn width")
    prompt = make_prompt(TOKENS, 128, here.prefix, None, max_tokens=64)
    assert prompt.pending
    middle = TOKENS.encode(prompt.pending.decode() + "turn width * height")
    logits = model.logits(model(torch.tensor([[*prompt.ids, *middle]])))[0].float()
    first = logits[len(prompt.ids) - 1]
    spells = [
        index
        for index in range(TOKENS.vocab_size)
        if (raw := TOKENS.decode_bytes([index])) and (raw.startswith(prompt.pending) or prompt.pending.startswith(raw))
    ]
    nats = float(first[spells].logsumexp(0) - first[middle[0]])
    rest = logits[len(prompt.ids) :].log_softmax(-1)
    nats -= sum(float(rest[i, token]) for i, token in enumerate(middle[1:]))
    expected = nats / math.log(2) / len("turn width * height")
    assert middle_bpb(model, TOKENS, [here], "plain") == pytest.approx(expected, rel=1e-5)
    assert middle_bpb(model, TOKENS, [here], "spm") != pytest.approx(expected, rel=1e-3)


def test_nothing_missing_is_an_error() -> None:
    at = TEXT.index("\n")
    with pytest.raises(ValueError, match="nothing is missing"):
        middle_bpb(tiny.model(), TOKENS, [Place(0, TEXT, at, at)], "psm")
