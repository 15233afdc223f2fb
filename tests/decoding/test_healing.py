"""Token healing: the prompt's last token is spelled again, by whatever tokens the model knows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smelter.decoding.complete import complete_text
from smelter.decoding.generate import generate
from smelter.decoding.healing import MAX_TAKEN_BACK, Healing, take_back
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
    healing = Healing(TOKENS, [b"", pending])
    generator = torch.Generator().manual_seed(seed)
    written = b""
    while healing.is_pending(1):
        logits = torch.randn(2, TOKENS.vocab_size + 3, generator=generator)  # an embedding may have spare rows
        restricted = healing.restrict(logits, [0, 1])
        assert torch.equal(restricted[0], logits[0])
        token = int(restricted[1].argmax())
        assert float(restricted[1, token]) == float(logits[1, token])
        written += TOKENS.decode_bytes([token])
        healing.advance(1, token)
    assert written.startswith(pending)
    assert torch.equal(healing.restrict(logits, [0, 1]), logits)


def test_a_token_of_training_that_spans_the_cursor_is_found() -> None:
    """After eight spaces of indentation, ` return` is one token of training: seven spaces and it must be possible."""
    healing = Healing(TOKENS, [b" " * 8])
    seven, word = TOKENS.encode(" " * 8 + "return")
    assert TOKENS.decode_bytes([seven]) == b" " * 7
    logits = torch.zeros(1, TOKENS.vocab_size)
    logits[0, seven] = 1.0
    assert int(healing.restrict(logits, [0]).argmax()) == seven
    healing.advance(0, seven)
    logits[0, word] = 2.0
    assert int(healing.restrict(logits, [0]).argmax()) == word
    healing.advance(0, word)
    assert not healing.is_pending(0)


@pytest.mark.parametrize("cut", [700, 1_003, 1_500])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_goes_on_from_the_cursor(cut: int, temperature: float) -> None:
    model, prompt = tiny.model(), tiny.CODE[:cut]
    done = complete_text(model, TOKENS, prompt, max_tokens=12, temperature=temperature, seed=3)
    kept, pending = take_back(TOKENS, TOKENS.encode(prompt)[-84:])
    (made,) = generate(
        model,
        [kept],
        max_tokens=12,
        temperature=temperature,
        seed=3,
        stop_ids=[TOKENS.eos_id],
        healing=Healing(TOKENS, [pending]),
    )
    assert TOKENS.decode_bytes(made.ids) == pending + done.text.encode() or "\ufffd" in done.text
    assert TOKENS.decode_bytes(made.ids).startswith(pending)


def test_rows_are_healed_apart() -> None:
    model = tiny.model()
    prompts = [take_back(TOKENS, TOKENS.encode(tiny.CODE[:cut])[-40:]) for cut in (300, 511, 900)]
    options = {"max_tokens": 6, "stop_ids": [TOKENS.eos_id]}
    healing = Healing(TOKENS, [pending for _, pending in prompts])
    together = generate(model, [ids for ids, _ in prompts], healing=healing, **options)  # type: ignore[arg-type]
    for (ids, pending), row in zip(prompts, together, strict=True):
        (alone,) = generate(model, [ids], healing=Healing(TOKENS, [pending]), **options)  # type: ignore[arg-type]
        assert alone.ids == row.ids
