"""The Triton operations against the specification; `test_triton_ops.py` runs this file in a process of its own.

TRITON_INTERPRET=1 must be set before anything imports triton, and decides for a whole process. With it the
kernels run in Triton's interpreter on the CPU; without it they are compiled and run on the GPU.
"""

import os
from typing import Any

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smelter.kernels import linear_triton as triton_ops
from smelter.kernels import reference
from smelter.kernels import weights_triton as triton_weights
from smelter.kernels.linear_triton import int8_matmul, quantize_rows, rms_norm_quantize
from smelter.kernels.weights_triton import quantize_weights

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = st.integers(0, 2**32 - 1)
EPS = 1e-6

needs_tensor_cores = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 0), reason="no integer product in Triton here"
)
pytestmark = [
    # The interpreter of triton 3.6 reads one-element arrays as numbers.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def hard_rows(columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows [columns] on which quantisers go wrong."""
    ties = (torch.arange(columns) % 127 + 0.5) * (1 - 2.0 * (torch.arange(columns) % 2))
    ties[0] = 127.0  # the scale is then exactly 1
    huge, tiny = torch.full((columns,), 1e-3), torch.full((columns,), torch.finfo(dtype).smallest_normal / 4)
    huge[columns // 2] = -0.9 * torch.finfo(dtype).max
    single = torch.zeros(columns)
    single[-1] = 1.0
    rows = {
        "zeros": torch.zeros(columns),
        "negative zeros": -torch.zeros(columns),
        "ties": ties,
        "one huge value": huge,
        "denormals": tiny,
        "one value, the last": single,
        "all equal": torch.full((columns,), -3.0),
        "below the smallest scale": torch.linspace(-9e-6, 9e-6, columns),
        "at the smallest scale": torch.linspace(-1e-5, 1e-5, columns),
    }
    return {name: row.to(dtype) for name, row in rows.items()}


def check_rows(x: Tensor) -> None:
    q, scale = (y.cpu() for y in quantize_rows(x.to(DEVICE)))
    expected_q, expected_scale = reference.quantize_activations(x)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q.float(), expected_q)


def check_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> None:
    q, scale, rstd = (y.cpu() for y in rms_norm_quantize(x.to(DEVICE), weight.to(DEVICE), eps))
    exact = torch.rsqrt(x.double().square().mean(dim=-1, keepdim=True) + eps)
    torch.testing.assert_close(rstd.double(), exact, rtol=2e-6, atol=0)
    # From its own rstd on, which may differ from PyTorch's in the last bit, every bit is the specification's.
    normed = (x.float() * rstd * weight).to(x.dtype)
    expected_q, expected_scale = reference.quantize_activations(normed)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q.float(), expected_q)
    # And against the whole of it nothing is further off than rounding is.
    whole_q, whole_scale = reference.quantize_activations(reference.rms_norm(x, weight, eps))
    torch.testing.assert_close(scale, whole_scale, rtol=2 * torch.finfo(x.dtype).eps, atol=0)
    assert float((q.float() - whole_q).abs().max()) <= 1


# --- activations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 2), (5, 7), (4, 768), (2, 1_025), (2, 9_000)])
def test_rows_are_the_specification(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_rows(randn(*shape, scale=3.0).to(dtype))


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 200),
    seed=SEEDS,
    scale=st.sampled_from([1e-9, 1e-6, 1e-3, 0.02, 1.0, 37.5, 1e4]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=40)
def test_any_rows(rows: int, columns: int, seed: int, scale: float, dtype: torch.dtype) -> None:
    check_rows(randn(rows, columns, seed=seed, scale=scale).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [3, 300, triton_ops.MAX_BLOCK + 3])
def test_hard_rows(columns: int, dtype: torch.dtype) -> None:
    for name, row in hard_rows(columns, dtype).items():
        try:
            check_rows(row[None])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("columns", [5, triton_ops.MAX_BLOCK + 5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_that_is_not_finite_is_seen(bad: float, columns: int) -> None:
    x = randn(3, columns)
    x[1, -1] = bad
    x, gain = x.to(DEVICE), torch.ones(columns, device=DEVICE)
    for scale in (quantize_rows(x)[1], rms_norm_quantize(x, gain, EPS)[1]):
        assert torch.isfinite(scale).flatten().tolist() == [True, False, True]


def test_rows_with_gaps_between_them() -> None:
    x = randn(4, 60)
    check_rows(x[:, 7:40])
    check_rows(x.T)
    check_norm(x[:, 7:40], randn(33, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 2), (5, 7), (4, 768), (2, 1_025), (2, 9_000)])
def test_norms_are_the_specification(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = randn(*shape, scale=3.0).to(dtype)
    if shape[0]:
        check_norm(x, 1 + 0.2 * randn(shape[1], seed=1))
    else:
        x, gain = x.to(DEVICE), torch.ones(8, device=DEVICE)
        assert [tuple(y.shape) for y in rms_norm_quantize(x, gain, EPS)] == [(0, 8), (0, 1), (0, 1)]


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 200),
    seed=SEEDS,
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
    eps=st.sampled_from([1e-8, 1e-6, 1e-5]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=40)
def test_any_norm(rows: int, columns: int, seed: int, scale: float, eps: float, dtype: torch.dtype) -> None:
    check_norm(randn(rows, columns, seed=seed, scale=scale).to(dtype), randn(columns, seed=seed + 1), eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [3, triton_ops.MAX_BLOCK + 3])
def test_norms_of_hard_rows(columns: int, dtype: torch.dtype) -> None:
    for name, row in hard_rows(columns, dtype).items():
        if name == "one huge value":  # squares overflow float32, in the specification too
            row = row.float().clamp(-1e15, 1e15).to(dtype)
        try:
            check_norm(row[None], 1 + 0.2 * randn(columns, seed=1))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


# --- the product -----------------------------------------------------------------------------------


def product_case(rows: int, columns: int, inner: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, trits = integers(-127, 127, rows, inner, seed=seed), integers(-1, 1, columns, inner, seed=seed + 1)
    return q, trits, torch.rand(rows, 1, generator=generator), torch.rand(columns, generator=generator)


def exact_product(q: Tensor, trits: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    product = (q.double() @ trits.double().T).to(torch.int32)
    return (product.float() * (row_scale * column_scale)).to(dtype)


def check_product(case: tuple[Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    got = int8_matmul(*(tensor.to(DEVICE) for tensor in case), dtype).cpu()
    assert got.dtype == dtype
    assert torch.equal(got, exact_product(*case, dtype))


@needs_tensor_cores
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (0, 5, 3), (17, 1, 64), (64, 64, 64), (65, 129, 257), (1_100, 130, 33)],  # the last: several groups
)
def test_products_are_exact(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_product(product_case(*shape), dtype)


@needs_tensor_cores
@given(rows=st.integers(1, 140), columns=st.integers(1, 140), inner=st.integers(1, 300), seed=st.integers(0, 2**31))
@settings(max_examples=25)
def test_any_product(rows: int, columns: int, inner: int, seed: int) -> None:
    check_product(product_case(rows, columns, inner, seed), torch.float32)


@needs_tensor_cores
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_sums(dtype: torch.dtype) -> None:
    inner = 2_048
    q, trits = torch.full((3, inner), 127, dtype=torch.int8), torch.ones(2, inner, dtype=torch.int8)
    trits[1] = -1
    scales = torch.tensor([[1e-3], [0.25], [1e-6]]), torch.tensor([0.07, 0.9])
    check_product((q, trits, *scales), dtype)  # 260,096: beyond fp16 before the scales


@needs_tensor_cores
@pytest.mark.parametrize("tile", triton_ops.TILES, ids=lambda tile: "x".join(map(str, tile.kwargs.values())))
def test_every_tile_shape(tile: triton.Config) -> None:
    """Untuned: a run picks one of them by the clock."""
    rows, columns, inner = 150, 270, 300
    case = product_case(rows, columns, inner)
    out = torch.empty(rows, columns, device=DEVICE)
    grid = (triton.cdiv(rows, tile.kwargs["BLOCK_M"]) * triton.cdiv(columns, tile.kwargs["BLOCK_N"]),)
    triton_ops.int8_matmul_kernel.fn[grid](
        *(tensor.to(DEVICE) for tensor in case), out, rows, columns, inner, 0, **tile.all_kwargs()
    )
    assert torch.equal(out.cpu(), exact_product(*case, torch.float32))


@needs_tensor_cores
def test_together_they_are_the_ternary_layer() -> None:
    x, weight, gain = randn(21, 96), randn(40, 96, seed=1), 1 + 0.1 * randn(96, seed=2)
    trits, scale = torch.zeros(40, 96, dtype=torch.int8, device=DEVICE), torch.zeros((), device=DEVICE)
    quantize_weights([weight.to(DEVICE)], [trits], [scale])
    q, row_scale, _ = rms_norm_quantize(x.to(DEVICE), gain.to(DEVICE), EPS)
    got = int8_matmul(q, trits, row_scale, scale.expand(40), torch.float32).cpu()
    normed = reference.rms_norm(x, gain, EPS)
    want = reference.ternary_linear(normed, weight, *reference.quantize_weight(weight), "token")
    # One step of an activation's quantisation, where the norm's last bit decides.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=float(row_scale.max() * scale) * 1.01)


# --- weights ---------------------------------------------------------------------------------------


def quantise(weights: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Trits and scales on the CPU of weights on DEVICE."""
    trits = [torch.full_like(weight, 7, dtype=dtype) for weight in weights]
    scales = [torch.full((), -1.0, device=DEVICE) for _ in weights]
    quantize_weights(weights, trits, scales)
    return [trit.cpu() for trit in trits], [scale.cpu() for scale in scales]


def check_weights(weights: list[Tensor], dtype: torch.dtype) -> None:
    trits, scales = quantise([weight.to(DEVICE) for weight in weights], dtype)
    for weight, trit, scale in zip(weights, trits, scales, strict=True):
        _, expected = reference.quantize_weight(weight)
        assert float(scale.bfloat16()) == float(scale)
        # The same mean, added up in another order: equal, or the neighbouring bf16 number.
        steps = scale.bfloat16().view(torch.int16).int() - expected.bfloat16().view(torch.int16).int()
        assert abs(int(steps)) <= 1
        assert trit.dtype == dtype
        assert torch.equal(trit.float(), (weight / scale).round().clamp(-1, 1))


@pytest.mark.parametrize("dtype", [torch.int8, *DTYPES])
def test_weights_of_several_shapes(dtype: torch.dtype) -> None:
    shapes = [(3, 7), (40, 60), (7, 3), (1,), (60, 40), (3, 7), (1, 1_025)]
    check_weights([randn(*shape, seed=i, scale=10.0 ** (i - 3)) for i, shape in enumerate(shapes)], dtype)
    check_weights([], dtype)


def test_a_weight_of_more_blocks_than_parts() -> None:
    check_weights([randn(2, triton_weights.BLOCK * (triton_weights.MAX_PARTS + 3) // 2 + 5, scale=0.02)], torch.int8)


@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    seed=SEEDS,
    scale=st.sampled_from([1e-30, 1e-6, 1e-3, 0.02, 1.0, 1e4, 1e30]),
)
@settings(max_examples=30)
def test_any_weights(sizes: list[int], seed: int, scale: float) -> None:
    check_weights([randn(size, seed=seed + i, scale=scale) for i, size in enumerate(sizes)], torch.int8)


def test_ties_and_their_neighbours_at_every_scale() -> None:
    """For each bf16 mantissa: half the scale, the floats beside it, and what brings the mean back to the scale."""
    weights, scales = [], 1 + torch.arange(128) / 128
    for scale in scales:
        half = scale / 2
        up, down = (torch.nextafter(half, half + side) for side in (1.0, -1.0))
        weights.append(torch.stack([half, up, -down, 3 * half, -3 * half, 3 * half]))
    trits, got = quantise([weight.to(DEVICE) for weight in weights], torch.float32)
    assert torch.equal(torch.stack(got), scales)
    assert torch.equal(torch.stack(trits), torch.tensor([0.0, 1, 0, 1, -1, 1]).expand(128, 6))
    check_weights(weights, torch.int8)


@pytest.mark.parametrize("weight", [torch.zeros(5, 3), -torch.zeros(4), torch.full((4, 4), 1e-30)])
def test_vanishing_weights_become_zeros(weight: Tensor) -> None:
    check_weights([weight], torch.bfloat16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_weight_that_is_not_finite_is_seen(bad: float) -> None:
    weights = [randn(4, 4), randn(4, 4)]
    weights[1][2, 3] = bad
    _, scales = quantise([weight.to(DEVICE) for weight in weights], torch.int8)
    assert [bool(scale.isfinite()) for scale in scales] == [True, False]


def test_no_table_outlives_its_tensors() -> None:
    weights = [randn(6, 6, seed=i).to(DEVICE) for i in range(3)]
    first = quantise(weights, torch.int8)
    assert all(torch.equal(a, b) for a, b in zip(first[0], quantise(weights, torch.int8)[0], strict=True))
    for weight in weights:  # the same addresses with other values, as after an optimizer step
        weight.copy_(weight.flip(0) * 2)
    second, scales = quantise(weights, torch.int8)
    for before, after, old, new in zip(first[0], second, first[1], scales, strict=True):
        assert torch.equal(before.flip(0), after)
        assert float(new) == 2 * float(old)
    check_weights([randn(6, 6, seed=i) for i in range(5, 9)], torch.int8)  # other tensors, more of them
    check_weights([weights[2].cpu(), weights[0].cpu()], torch.int8)  # another order


def test_views_at_odd_addresses() -> None:
    storage = randn(3, 101, seed=4).to(DEVICE)
    weights = [storage[i, 1 + i :][:98] for i in range(3)]
    trits, scales = quantise(weights, torch.int8)
    for weight, trit, scale in zip(weights, trits, scales, strict=True):
        assert torch.equal(trit.float(), (weight.cpu() / scale).round().clamp(-1, 1))


def test_equal_weights_get_equal_trits_wherever_they_stand() -> None:
    weight = randn(50, 70, scale=0.02)
    trits, scales = quantise([weight.clone().to(DEVICE) for _ in range(3)], torch.int8)
    assert torch.equal(trits[0], trits[1])
    assert torch.equal(trits[0], trits[2])
    assert len({float(scale) for scale in scales}) == 1


@pytest.mark.parametrize(
    ("weight", "trits", "scale", "message"),
    [
        (torch.zeros(4), torch.zeros(5), torch.zeros(()), r"weight \(4,\), trits \(5,\)"),
        (torch.zeros(4).half(), torch.zeros(4), torch.zeros(()), "weight torch.float16"),
        (torch.zeros(4), torch.zeros(4).double(), torch.zeros(()), "trits torch.float64"),
        (torch.zeros(4), torch.zeros(4), torch.zeros(2), r"scale \(2,\)"),
        (torch.zeros(0), torch.zeros(0), torch.zeros(()), r"weight \(0,\)"),
        (torch.zeros(4, 3).T, torch.zeros(3, 4), torch.zeros(()), "contiguous"),
    ],
)
def test_other_tensors_are_refused(weight: Tensor, trits: Tensor, scale: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_weights([weight], [trits], [scale])
    with pytest.raises(ValueError, match="1 weights, 2 trits"):
        quantize_weights([weight], [trits, trits], [scale])


# --- what PyTorch is told about them -----------------------------------------------------------------


def operations() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, gain = randn(5, 24).to(DEVICE), torch.ones(24, device=DEVICE)
    case = tuple(tensor.to(DEVICE) for tensor in product_case(9, 8, 24))
    weights = [randn(4, 6, seed=i).to(DEVICE) for i in range(2)]
    trits, scales = [w.new_zeros(w.shape, dtype=torch.int8) for w in weights], [w.new_zeros(()) for w in weights]
    return {
        "quantize_rows": (quantize_rows, (x.bfloat16(),)),
        "rms_norm_quantize": (rms_norm_quantize, (x.half(), gain, EPS)),
        "int8_matmul": (int8_matmul, (*case, torch.bfloat16)),
        "quantize_weights": (quantize_weights, (weights, trits, scales)),
    }


@pytest.mark.parametrize("name", operations())
def test_each_is_a_sound_operation(name: str) -> None:
    operation, arguments = operations()[name]
    torch.library.opcheck(operation, arguments)


@needs_tensor_cores
def test_the_compiler_keeps_them_whole() -> None:
    def layer(x: Tensor, gain: Tensor, weight: Tensor, trits: Tensor, scale: Tensor) -> Tensor:
        quantize_weights([weight], [trits], [scale])
        q, row_scale, _ = rms_norm_quantize(x, gain, EPS)
        return torch.relu(int8_matmul(q, trits, row_scale, scale.expand(trits.shape[0]), x.dtype))

    def arguments() -> list[Tensor]:
        tensors = [randn(18, 32), torch.ones(32), randn(16, 32, seed=1), integers(0, 0, 16, 32), torch.zeros(())]
        return [tensor.to(DEVICE) for tensor in tensors]

    eager, compiled = arguments(), arguments()
    want = layer(*eager)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(got, want)
    for mutated, expected in zip(compiled, eager, strict=True):
        assert torch.equal(mutated, expected)
    assert float(want.abs().max()) > 0
