"""Token healing: the prompt's last token is spelled again, by whatever tokens the model knows."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smelter.decoding.batch import Row
from smelter.decoding.healing import MAX_TAKEN_BACK, Healing, take_back
from smelter.decoding.request import Request
from tests import tiny

TOKENS = tiny.tokenizer()
CUTS = st.integers(0, len(tiny.CODE))


@given(CUTS)
def test_what_is_taken_back_and_what_is_kept_are_the_prompt(cut: int) -> None:
    ids = TOKENS.encode(tiny.CODE[:cut])
    kept, pending = take_back(TOKENS, ids)
    assert TOKENS.decode_bytes(kept) + pending == tiny.CODE[:cut].encode()
    assert ids[: len(kept)] == kept
    assert len(ids) - len(kept) <= MAX_TAKEN_BACK
    assert b"\n" not in pending
    if cut and not tiny.CODE[:cut].endswith("\n"):
        assert pending


def test_blanks_go_together_and_special_tokens_stay() -> None:
    (eight,) = TOKENS.encode(" " * 8)
    assert take_back(TOKENS, [eight, eight]) == ([], b" " * 16)
    middle = TOKENS.fim_middle_id
    assert take_back(TOKENS, [middle]) == ([middle], b"")
    assert take_back(TOKENS, []) == ([], b"")
    assert take_back(TOKENS, [middle, *TOKENS.encode("x")]) == ([middle], b"x")


@given(st.binary(min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_any_bytes_are_spelled_again_and_nothing_else(pending: bytes, seed: int) -> None:
    healing, row = Healing(TOKENS), Row(Request([1], pending, max_tokens=20), 99)
    generator = torch.Generator().manual_seed(seed)
    while row.pending:
        logits = torch.randn(2, TOKENS.vocab_size, generator=generator)
        restricted = healing.restrict(logits, [b"", row.pending])
        assert torch.equal(restricted[0], logits[0])
        token = int(restricted[1].argmax())
        assert float(restricted[1, token]) == float(logits[1, token])
        row.take(token, TOKENS.decode_bytes([token]))
    assert TOKENS.decode_bytes(row.ids).startswith(pending)
    assert torch.equal(healing.restrict(logits, [b"", row.pending]), logits)


def test_a_token_of_training_that_spans_the_cursor_is_found() -> None:
    """After eight spaces of indentation, ` return` is one token of training: seven spaces and it must be possible."""
    healing = Healing(TOKENS)
    seven, word = TOKENS.encode(" " * 8 + "return")
    assert TOKENS.decode_bytes([seven]) == b" " * 7
    logits = torch.zeros(1, TOKENS.vocab_size)
    logits[0, seven] = 1.0
    assert int(healing.restrict(logits, [b" " * 8]).argmax()) == seven
    logits[0, word] = 2.0
    assert int(healing.restrict(logits, [b" "]).argmax()) == word


@pytest.mark.parametrize("cut", [700, 1_003, 1_500])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_goes_on_from_the_cursor(cut: int, temperature: float) -> None:
    model, prompt = tiny.model(), tiny.CODE[:cut]
    text = tiny.complete(prompt, max_tokens=12, temperature=temperature, seed=3)
    kept, pending = take_back(TOKENS, TOKENS.encode(prompt)[-84:])
    options: dict[str, Any] = {"max_tokens": 12, "temperature": temperature, "seed": 3, "stop_ids": [TOKENS.eos_id]}
    (made,) = tiny.write(model, [kept], pending=[pending], **options)
    assert TOKENS.decode_bytes(made.ids) == pending + text.encode() or "\ufffd" in text
    assert TOKENS.decode_bytes(made.ids).startswith(pending)


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
@pytest.mark.parametrize("cut", [300, 511, 700, 1_003])
def test_tokens_that_only_spell_the_prompt_again_do_not_count(cut: int, max_tokens: int) -> None:
    kept, pending = take_back(TOKENS, TOKENS.encode(tiny.CODE[:cut])[-40:])
    (row,) = tiny.write(tiny.model(), [kept], pending=[pending], max_tokens=max_tokens)
    lengths = [len(TOKENS.decode_bytes(row.ids[:count])) for count in range(1, len(row.ids) + 1)]
    assert sum(length > len(pending) for length in lengths) == max_tokens  # no special token among them
    assert pending
    assert row.text.close()
    assert row.finish == "length"


def test_spelling_ends_at_the_end_of_the_context() -> None:
    """Five tokens of room for six bytes that no token joins."""
    row = Row(Request([1] * 90, b"\x00\x01" * 3, max_tokens=4), 95)
    for byte in b"\x00\x01\x00\x01\x00":
        assert row.finish is None
        row.take(byte, bytes([byte]))
    assert row.finish == "length"
    assert row.num_new == 0


def test_rows_are_healed_apart() -> None:
    model = tiny.model()
    prompts = [take_back(TOKENS, TOKENS.encode(tiny.CODE[:cut])[-40:]) for cut in (300, 511, 900)]
    options: dict[str, Any] = {"max_tokens": 6, "stop_ids": [TOKENS.eos_id]}
    together = tiny.write(model, [ids for ids, _ in prompts], pending=[pending for _, pending in prompts], **options)
    for (ids, pending), row in zip(prompts, together, strict=True):
        (alone,) = tiny.write(model, [ids], pending=[pending], **options)
        assert alone.ids == row.ids
