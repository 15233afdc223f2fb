"""BitLinear's bookkeeping: trits once per optimizer step, never saved, in the compute dtype; packing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.bitnet import pack_weights

from smelter.bitnet import BitLinear, bit_linears, pack_trits, quantize_weights, unpack_trits
from smelter.kernels import reference
from smelter.loss import LossConfig, chunked_loss
from smelter.muon import MuonAdamW
from tests import tiny


def made(in_features: int = 24, out_features: int = 10, **options: bool | str) -> BitLinear:
    torch.manual_seed(0)
    layer = BitLinear(in_features, out_features, **options)  # type: ignore[arg-type]
    torch.nn.init.normal_(layer.weight, std=0.05)
    layer.quantize(torch.float32)
    return layer


def random_trits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed))


# --- the layer -------------------------------------------------------------------------------------


def test_the_output_is_of_scale_times_trits_and_quantised_activations() -> None:
    layer, x = made(), torch.randn(3, 5, 24)
    q, x_scale = reference.quantize_activations(x)
    torch.testing.assert_close(layer(x), F.linear(q * x_scale, layer.trits * layer.scale))


def test_without_ternary_it_is_an_ordinary_linear() -> None:
    layer, x = made(use_ternary=False), torch.randn(3, 24)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert not list(layer.buffers())
    assert not list(bit_linears(layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trits_live_in_the_compute_dtype_and_weights_in_float32(dtype: torch.dtype) -> None:
    model = tiny.model(dtype=dtype)
    for _, layer in bit_linears(model):
        assert layer.trits.dtype == dtype
        assert layer.scale.dtype == layer.weight.dtype == torch.float32
        trits, scale = reference.quantize_weight(layer.weight)
        assert torch.equal(layer.trits.float(), trits)
        assert torch.equal(layer.scale, scale)


def test_every_matrix_of_the_body_is_ternary() -> None:
    model = tiny.model()
    names = {name for name, _ in bit_linears(model)}
    kinds = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    assert names == {f"layers.{i}.{kind}" for i in range(model.config.num_layers) for kind in kinds}


def test_trits_are_derived_so_neither_saved_nor_trained() -> None:
    model = tiny.model()
    assert not [name for name in model.state_dict() if "trits" in name or name.endswith("scale")]
    assert not [name for name, _ in model.named_parameters() if "trits" in name or name.endswith("scale")]


def test_a_changed_weight_counts_from_the_next_quantisation_on() -> None:
    layer, x = made(), torch.randn(3, 24)
    before = layer(x)
    with torch.no_grad():
        layer.weight.neg_()
    assert torch.equal(layer(x), before)
    quantize_weights(layer, torch.float32)
    torch.testing.assert_close(layer(x), -before)


def test_quantisation_leaves_no_graph() -> None:
    layer = made()
    assert not layer.trits.requires_grad
    layer(torch.randn(2, 24)).sum().backward()
    layer.quantize(torch.float32)
    assert layer.trits.grad_fn is None


@pytest.mark.parametrize("use_gradient_checkpointing", [False, True])
def test_weights_are_quantised_once_per_optimizer_step(
    use_gradient_checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model().train()
    model.use_gradient_checkpointing = use_gradient_checkpointing
    optimizer = MuonAdamW(model)
    num_layers = len(list(bit_linears(model)))
    calls = 0
    quantize = reference.quantize_weight

    def counting(weight: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return quantize(weight)

    monkeypatch.setattr(reference, "quantize_weight", counting)
    tokens = torch.randint(0, 512, (3, 2, 17), generator=torch.Generator().manual_seed(0))
    for step in range(1, 4):
        for micro_batch in tokens:
            hidden = model(micro_batch[:, :-1]).flatten(0, 1)
            chunked_loss(hidden, model.head, micro_batch[:, 1:].flatten(), LossConfig()).total.backward()
        assert calls == (step - 1) * num_layers
        optimizer.step()
        optimizer.zero_grad()
        model.quantize_weights()
        assert calls == step * num_layers


# --- packing ---------------------------------------------------------------------------------------


@given(rows=st.integers(0, 9), size=st.integers(0, 68), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_packing_gives_the_same_trits_back(rows: int, size: int, seed: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64]))
    trits = random_trits(rows, size, seed=seed).to(dtype)
    packed = pack_trits(trits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-size // 4))
    assert torch.equal(unpack_trits(packed, size), trits.to(torch.int8))


@given(codes=st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=20))
def test_unpacked_bytes_pack_to_themselves(codes: list[list[int]]) -> None:
    packed = torch.tensor([sum(code << 2 * i for i, code in enumerate(four)) for four in codes], dtype=torch.uint8)
    trits = unpack_trits(packed, 4 * len(codes))
    assert trits.tolist() == [code - 1 for four in codes for code in four]
    assert torch.equal(pack_trits(trits), packed)


@given(quarter=st.integers(1, 6), columns=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_packing_is_transformers_with_the_axes_turned(quarter: int, columns: int, seed: int) -> None:
    """Transformers packs rows i, i + R/4, i + R/2, ... into one byte; we pack four neighbours of the last axis."""
    trits = random_trits(4 * quarter, columns, seed=seed)
    ours = pack_trits(trits.unflatten(0, (4, quarter)).movedim(0, -1)).squeeze(-1)
    assert torch.equal(ours, pack_weights(trits.clone()))


@pytest.mark.parametrize("value", [2.0, -2.0, 0.5, float("nan"), float("inf")])
def test_other_values_are_refused(value: float) -> None:
    trits = torch.zeros(2, 4)
    trits[1, 2] = value
    with pytest.raises(ValueError, match="values other than"):
        pack_trits(trits)
