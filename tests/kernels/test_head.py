"""The screened head against the plain one: all logits in float32, and where the largest is."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smelter.kernels import ScreenedHead
from smelter.kernels import head as screened
from tests import tiny


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screened, "MIN_PRODUCTS", 0)


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch, at_any_size: None) -> None:
    def all_logits(*_: Any) -> Tensor:
        raise AssertionError("too many candidates are left")

    monkeypatch.setattr(ScreenedHead, "_argmax_of_all", all_logits)


def plain(hidden: Tensor, weight: Tensor, count: int) -> list[int]:
    return [int(i) for i in F.linear(hidden.double(), weight.double())[:, :count].argmax(dim=-1)]


@pytest.mark.parametrize(("rows", "vocab", "size"), [(1, 4_096, 64), (5, 1_000, 96), (64, 2_051, 32), (3, 64, 8)])
def test_equals_the_plain_head(no_fallback: None, rows: int, vocab: int, size: int) -> None:
    """Also for the first tokens alone, and with a few activations that are far larger than the others."""
    torch.manual_seed(rows)
    weight, hidden = torch.randn(vocab, size) * torch.rand(vocab, 1), torch.randn(rows, size)
    hidden[0, 3] = 20.0
    head = ScreenedHead.of(weight)
    for count in (vocab, vocab - 7, 65, 1):
        count = min(count, vocab)
        assert head.argmax(hidden, count).tolist() == plain(hidden, weight, count)


def test_finds_what_int8_cannot_tell_apart(no_fallback: None) -> None:
    """Forty tokens that differ by less than the rounding errors, and two that do not differ: the first counts."""
    torch.manual_seed(0)
    weight, hidden = 0.1 * torch.randn(2_000, 64), torch.randn(6, 64)
    near = torch.arange(50, 2_000, 50)
    weight[near] = hidden[0] + 3e-3 * torch.randn(len(near), 64)
    weight[1_777] = weight[near][(weight[near] @ hidden[0]).argmax()]
    hidden[1:] = hidden[0] * torch.rand(5, 1) + 0.01 * hidden[1:]
    head = ScreenedHead.of(weight)
    q, scale = head.q[: len(weight)], head.scale[: len(weight), None]
    assert plain(hidden, q * scale, 2_000) != plain(hidden, weight, 2_000)  # else rounding would do
    assert head.argmax(hidden, 2_000).tolist() == plain(hidden, weight, 2_000)


@given(seed=st.integers(0, 1_000), spread=st.sampled_from([1e-6, 1e-2, 1.0, 30.0]), rows=st.integers(1, 4))
def test_equals_the_plain_head_at_any_spread(seed: int, spread: float, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(130, 16, generator=generator) * spread
    hidden = torch.randn(rows, 16, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    assert ScreenedHead.of(weight).argmax(hidden, 130).tolist() == plain(hidden, weight, 130)


def test_equal_logits_and_numbers_that_are_none() -> None:
    weight = torch.randn(1_000, 16)
    head = ScreenedHead.of(weight)
    hidden = torch.zeros(2, 16)
    assert head.argmax(hidden, 1_000).tolist() == [0, 0]
    hidden[1, 3] = torch.nan
    assert head.argmax(hidden, 1_000).tolist() == F.linear(hidden, weight).argmax(dim=-1).tolist()
    assert ScreenedHead.of(-weight.abs()).argmax(weight[:3].abs(), 1_000).tolist() == plain(
        weight[:3].abs(), -weight.abs(), 1_000
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("vocab", [1_000, 1_024])
def test_a_row_that_is_no_number_breaks_nothing(bad: float, vocab: int) -> None:
    """Neither it nor its neighbours, also where the last block of tokens is filled up."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(vocab, 16), torch.randn(64, 16)
    hidden[5, 3] = hidden[6, 2] = hidden[6, 4] = bad
    hidden[7, 3] = -bad
    for count in (vocab, 900):
        expected = F.linear(hidden, weight)[:, :count].argmax(dim=-1)
        assert ScreenedHead.of(weight).argmax(hidden, count).tolist() == expected.tolist()


@pytest.mark.parametrize("changes", [{}, {"final_logit_soft_cap": 30.0}, {"tie_embeddings": False}])
def test_a_frozen_model_finds_the_largest_logit(changes: dict[str, Any]) -> None:
    model = tiny.model(**changes)
    with torch.inference_mode():
        hidden = model(torch.arange(40)[None])[0]
        expected = model.logits(hidden)[:, :500].argmax(dim=-1)
        assert torch.equal(model.likeliest(hidden, 500), expected)
        model.freeze()
        model.screened = model.screened or ScreenedHead.of(model.head)  # also where int8 is not quick
        assert torch.equal(model.likeliest(hidden, 500), expected)
