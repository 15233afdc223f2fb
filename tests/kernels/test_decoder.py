"""The C++ layers compute what the model computes, for any rows, and refuse what would leave their memory."""

import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smelter.bitnet import RMSNorm, apply_together
from smelter.decoding.engine import Engine
from smelter.decoding.kv_cache import KVCache
from smelter.decoding.request import Piece, Request
from smelter.kernels import decoder as decode
from smelter.kernels.capability import cpu_has_kernels
from smelter.model import MLP, Model
from tests import tiny

pytestmark = pytest.mark.skipif(not cpu_has_kernels(), reason="no AVX-512 VNNI, or no C++ compiler")

SHAPES: list[dict[str, Any]] = [
    {},
    {"use_qk_norm": False, "attn_logit_soft_cap": 0.0},
    {"use_sub_norm": True, "num_kv_heads": 4},
    {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_heads": 4, "activation_quant": "block256"},
    {"hidden_size": 272, "intermediate_size": 1040, "num_heads": 3, "num_kv_heads": 1, "head_dim": 96},
]


def frozen(**changes: Any) -> Model:
    model = tiny.model(**{"head_dim": 32, **changes})
    model.freeze()
    assert model.decoder is not None
    return model


@torch.inference_mode()
def read(model: Model, pieces: list[Tensor], *, native_too: bool, slots: int = 3, first: int = 0) -> list[Tensor]:
    """Hidden states of rows [B, T] of tokens, piece after piece, in a cache that holds other numbers at first."""
    decoder = model.decoder
    cache = KVCache(model.config, slots, model.config.max_seq_len, model.compute_dtype, "cpu")
    cache.keys += 1e3
    found, start = [], 0
    try:
        model.decoder = decoder if native_too else None
        for tokens in pieces:
            positions = torch.arange(start, start + tokens.shape[1]).expand(len(tokens), -1)
            mask = cache.advance(positions, start + tokens.shape[1], first)
            found.append(model(tokens, positions=positions, cache=cache, mask=mask))
            start += tokens.shape[1]
    finally:
        model.decoder = decoder
    return found


def some_tokens(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 512, sizes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_computes_what_the_model_computes(changes: dict[str, Any]) -> None:
    """Up to the order of sums, which now and then takes an activation to the next integer."""
    model = frozen(**changes)
    pieces = [some_tokens(2, 7), some_tokens(2, 1, seed=1), some_tokens(2, 30, seed=2), some_tokens(2, 1, seed=3)]
    for got, want in zip(
        read(model, pieces, native_too=True, first=1), read(model, pieces, native_too=False, first=1), strict=True
    ):
        assert got.shape == want.shape
        distances = (got - want).norm(dim=-1) / want.norm(dim=-1)
        assert distances.max() < 0.05
        assert distances.median() < 5e-3


def test_without_an_activation_at_an_edge_it_is_the_same_to_six_digits() -> None:
    """One layer, one token: nothing has been rounded yet when the first product is made."""
    model = frozen(num_layers=1)
    got, want = (read(model, [some_tokens(3, 1)], native_too=kind)[0] for kind in (True, False))
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).median() < 1e-6


@given(batch=st.integers(1, 6), length=st.integers(1, 9), rows=st.integers(1, 20), threads=st.integers(1, 3))
def test_a_row_is_the_same_in_any_company(batch: int, length: int, rows: int, threads: int) -> None:
    model = frozen()
    tokens = some_tokens(batch, length)
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "MAX_ROWS", rows)
        torch.set_num_threads(threads)
        try:
            (together,) = read(model, [tokens], native_too=True, slots=batch)
        finally:
            torch.set_num_threads(before)
    for index in range(batch):
        apart = read(model, list(tokens[index : index + 1].split(1, dim=1)), native_too=True, slots=1)
        assert torch.equal(together[index : index + 1], torch.cat(apart, dim=1))


def test_packed_trits() -> None:
    trits = torch.randint(-1, 2, (6, 300), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = decode.pack(trits)
    assert packed.shape == (8, 2, 64)
    for output, inputs in ((0, 0), (3, 63), (5, 64), (5, 255), (2, 256), (4, 299)):
        chunk, place = divmod(inputs, 256)
        part, byte = divmod(place, 64)
        assert int(packed[output, chunk, byte]) >> 2 * part & 3 == int(trits[output, inputs]) + 1


@pytest.mark.parametrize(
    ("tokens", "position", "first", "message"),
    [
        ([[512]], 0, 0, "token 512: must lie between 0 and 511"),
        ([[-1]], 0, 0, "token -1: must lie between 0 and 511"),
        ([[1]], 96, 0, "position 96: must lie between 0 and 95"),
        ([[1]], -1, 0, "position -1: must lie between 0 and 95"),
        ([[1], [2]], 0, 2, "row 3: must lie between 0 and 2"),
    ],
)
def test_what_is_outside_is_refused(tokens: list[list[int]], position: int, first: int, message: str) -> None:
    model = frozen()
    cache = KVCache(model.config, 3, 96, torch.float32, "cpu")
    cache.first = first
    assert model.decoder is not None
    with pytest.raises(IndexError, match=message):
        model.decoder(torch.tensor(tokens), torch.full((len(tokens), 1), position), cache)
    half = KVCache(model.config, 3, 96, torch.bfloat16, "cpu")
    with pytest.raises(TypeError, match=r"a cache in torch\.bfloat16: the kernel reads float32"):
        model.decoder(torch.tensor([[1]]), torch.tensor([[0]]), half)
    assert model.decoder(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1, dtype=torch.long), cache).numel() == 0


def test_another_activation_gets_no_decoder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing in the configuration says so: the code was changed."""

    def gelu(self: MLP, x: Tensor, norm: RMSNorm) -> Tensor:
        gate, up = apply_together(x, [self.gate_proj, self.up_proj], norm)
        hidden: Tensor = self.down_proj(torch.nn.functional.gelu(gate) * up)
        return hidden

    for changes in SHAPES[:2] + SHAPES[3:]:
        model = tiny.model(**{"head_dim": 32, **changes})
        monkeypatch.setattr(MLP, "forward", gelu)
        model.freeze()
        assert model.decoder is None
        assert "PyTorch writes instead" in capsys.readouterr().err
        monkeypatch.undo()
        model.freeze()
        assert model.decoder is not None
        assert capsys.readouterr().err == ""


def test_a_broken_model_is_not_said_to_be_another(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.model(head_dim=32)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    model.freeze()
    assert model.decoder is not None
    assert capsys.readouterr().err == ""


def test_who_gets_no_decoder() -> None:
    refused: list[dict[str, Any]] = [{"head_dim": 16}, {"use_ternary": False}, {"activation_quant": "none"}]
    for changes in refused:
        model = tiny.model(**{"head_dim": 32, **changes})
        model.freeze()
        assert model.decoder is None
    model = tiny.model(head_dim=32, dtype=torch.bfloat16)
    model.freeze()
    assert model.decoder is None


@pytest.mark.parametrize("changes", [{}, SHAPES[3]], ids=["token", "block256"])
def test_writes_what_the_model_writes(changes: dict[str, Any]) -> None:
    """Rows of unequal lengths, of which some end early; where it differs, the likeliest two were nearly as likely."""
    model = frozen(**changes)
    prompts = [some_tokens(length, seed=length).tolist() for length in (3, 17, 1, 40)]
    ours = tiny.write(model, prompts, max_tokens=20, stop_ids=[7])
    model.decoder, decoder = None, model.decoder
    theirs = tiny.write(model, prompts, max_tokens=20, stop_ids=[7])
    model.decoder = decoder
    same = sum(a.ids[:5] == b.ids[:5] for a, b in zip(ours, theirs, strict=True))
    assert same >= 3
    alone = [tiny.write(model, [prompt], max_tokens=20, stop_ids=[7])[0] for prompt in prompts]
    assert [each.ids for each in alone] == [each.ids for each in ours]


def test_serves_what_generate_writes() -> None:
    model = frozen()
    prompts = [some_tokens(length, seed=length).tolist() for length in (3, 17, 1, 40, 25)]
    engine = Engine(model, tiny.tokenizer(), num_slots=3)
    engine.start()
    pieces: list[list[Piece]] = [[] for _ in prompts]
    requests = [Request(prompt, max_tokens=15, num_top=0, seed=1, temperature=0.7) for prompt in prompts]
    engine.submit(requests, [each.append for each in pieces])
    while any(not each or each[-1].end is None for each in pieces):
        time.sleep(0.01)
    engine.stop()
    for prompt, each in zip(prompts, pieces, strict=True):
        (alone,) = tiny.write(model, [prompt], max_tokens=15, seed=1, temperature=0.7)
        spelling = [i for i in alone.ids if tiny.tokenizer().decode_bytes([i])]
        assert [token.id for piece in each for token in piece.tokens] == spelling
