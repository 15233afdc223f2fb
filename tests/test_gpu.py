"""What only a CUDA device can show: the compiled step, the kernels at real shapes, memory, and that nothing waits.

Skipped without a GPU; `make test-gpu` demands one. The kernels' own tests run without a GPU, on small shapes, under
Triton's interpreter.
"""

import gc
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smelter.bitnet import bit_linears
from smelter.config import Config, load_config, preset
from smelter.kernels import reference
from smelter.kernels.capability import capability
from smelter.run.plan import plan

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # behind the packages: foundry.py has the name of one
agreement: Any = importlib.import_module("agreement")
contestants: Any = importlib.import_module("contestants")

pytestmark = [
    pytest.mark.gpu,
    # The compiler's advice to round float32 products.
    pytest.mark.filterwarnings("ignore:.*TensorFloat32.*:UserWarning"),
]

DEVICE = torch.device("cuda")
CONFIG = preset("100m")
GIB = 2**30


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Every test starts and ends with an empty card, so that peaks are its own."""
    yield
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def ops() -> Any:
    """The Triton operations, where this device runs them."""
    if not capability(DEVICE).use_triton:
        pytest.skip(f"{capability(DEVICE).describe()}: no Triton kernels")
    return importlib.import_module("smelter.kernels.linear_triton")


def dtypes() -> list[str]:
    """Compute dtypes that this device multiplies."""
    has_bf16 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return ["bf16", "fp16"] if has_bf16 else ["fp16"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE)


# --- the training step -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", dtypes())
def test_compiled_step_is_the_specification(dtype: str) -> None:
    length = agreement.affordable_length(DEVICE, CONFIG.model.max_seq_len)
    config = replace(CONFIG.model, max_seq_len=length, num_layers=CONFIG.model.num_layers if dtype == "bf16" else 2)
    found = agreement.compare(config, dtype, DEVICE)
    assert all(each.holds for each in found), "\n" + agreement.table(found)


@pytest.mark.parametrize("length", [97, 640])
def test_step_at_odd_lengths_is_the_specification(length: int) -> None:
    config = replace(CONFIG.model, num_layers=2, max_seq_len=length)
    found = agreement.compare(config, dtypes()[0], DEVICE, batch_size=3, use_compile=False)
    assert all(each.holds for each in found), "\n" + agreement.table(found)


def random_tokens(setting: Any, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (setting.batch_size, setting.seq_len + 1)
    return torch.randint(0, setting.model.vocab_size, shape, generator=generator).to(DEVICE)


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_in_a_step_waits_for_the_device(recompute: bool) -> None:
    setting = contestants.Setting(batch_size=2, device="cuda", dtype=dtypes()[0], recompute=recompute)
    trained = contestants.Smelter(setting)
    tokens = random_tokens(setting)
    for _ in range(2):  # compiles, tunes, makes the optimizer's state
        trained.micro_step(tokens)
        trained.optimizer_step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained.micro_step(tokens)
        trained.micro_step(tokens)
        if setting.dtype == "bf16":  # with a loss scale, the scaler must look whether a gradient overflowed
            trained.optimizer_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fp16_learns_with_a_loss_scale_and_survives_overflow() -> None:
    setting = contestants.Setting(preset="tiny", seq_len=256, batch_size=4, device="cuda", dtype="fp16")
    torch.manual_seed(0)
    trained = contestants.Smelter(setting, use_compile=False)
    tokens = random_tokens(setting)
    losses = []
    for _ in range(40):
        losses.append(float(trained.micro_step(tokens)))
        trained.optimizer_step()
    assert all(loss == loss for loss in losses)
    assert losses[-1] < losses[0] - 1
    # A scale that overflows costs the step and halves; the weights stay what they were.
    before = [parameter.detach().clone() for parameter in trained.model.parameters()]
    trained.scaler.update(2.0**40)
    trained.micro_step(tokens)
    trained.optimizer_step()
    assert trained.scaler.get_scale() == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, trained.model.parameters(), strict=True))


# --- memory ----------------------------------------------------------------------------------------


def peak_of_training(config: Config, dtype: str) -> int:
    """Bytes allocated at most during whole steps of one device batch, counted from an empty card."""
    model, training = config.model, config.training
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    setting = contestants.Setting(
        seq_len=model.max_seq_len,
        batch_size=training.device_batch_size,
        device="cuda",
        dtype=dtype,
        recompute=training.use_gradient_checkpointing,
    )
    assert setting.model == model
    trained = contestants.Smelter(setting)
    last_trits = [layer.trits.clone() for _, layer in bit_linears(trained.model)]  # as the trainer keeps them
    for _ in range(3):
        for _ in range(2):  # the second adds to the gradients of the first
            trained.micro_step(random_tokens(setting))
        trained.optimizer_step()
    del last_trits
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", dtypes())
def test_memory_is_as_predicted(dtype: str, recompute: bool) -> None:
    training = replace(CONFIG.training, device_batch_size=8, use_gradient_checkpointing=recompute)
    config = replace(CONFIG, training=training)
    predicted = plan(config, bytes_per_value=2).peak_bytes
    assert peak_of_training(config, dtype) == pytest.approx(predicted, rel=0.15)


def test_the_8_gb_recipe_fits() -> None:
    recipe = ROOT / "recipes" / "2080super.toml"
    if not recipe.exists():
        pytest.skip("no recipes/2080super.toml")
    config = load_config(recipe)
    assert config.training.device_batch_size * config.model.max_seq_len == 8 * 2_048
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    # 8 GiB less what the driver and PyTorch's context take there.
    torch.cuda.set_per_process_memory_fraction(min(1.0, 7.3 * GIB / total))
    try:
        assert peak_of_training(config, "fp16") <= 6.5e9
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# --- kernels at real shapes ------------------------------------------------------------------------

ROWS = [8 * 2_048, 1_031]
WIDTHS = [768, 2_048, 771]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_quantize_rows(ops: Any, rows: int, width: int, dtype: torch.dtype) -> None:
    x = (randn(rows, width) * randn(rows, 1, seed=1).exp()).to(dtype)
    x[0] = 0
    q, scale = ops.quantize_rows(x)
    want_q, want_scale = reference.quantize_activations(x)
    assert torch.equal(scale, want_scale)
    assert torch.equal(q.float(), want_q)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm_quantize(ops: Any, rows: int, width: int, dtype: torch.dtype) -> None:
    x = (randn(rows, width) * randn(rows, 1, seed=1).exp()).to(dtype)
    weight = 1 + 0.2 * randn(width, seed=2)
    q, scale, rstd = ops.rms_norm_quantize(x, weight, 1e-6)
    want_q, want_scale = reference.quantize_activations(reference.rms_norm(x, weight, 1e-6))
    want_rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(rstd, want_rstd, rtol=1e-5, atol=0)
    # The squares are added in another order: a normed value may round to its neighbour.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(scale, want_scale, rtol=2 * unit + 1e-5, atol=0)
    difference = (q.float() - want_q).abs()
    assert float(difference.max()) <= 1
    assert float(difference.mean()) < 1e-3 + unit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("columns", "inner"), [(1_280, 768), (768, 768), (4_096, 768), (768, 2_048), (130, 771)])
@pytest.mark.parametrize("rows", ROWS)
def test_int8_matmul_is_exact(ops: Any, rows: int, columns: int, inner: int, dtype: torch.dtype) -> None:
    if capability(DEVICE).int8_product != "triton":
        pytest.skip(f"{capability(DEVICE).describe()}: no int8 product by Triton")
    q = randn(rows, inner).mul(40).round().clamp(-127, 127).to(torch.int8)
    trits = randn(columns, inner, seed=1).round().clamp(-1, 1).to(torch.int8)
    row_scale = randn(rows, 1, seed=2).exp() / 127
    column_scale = randn(columns, seed=3).exp() / 30
    got = ops.int8_matmul(q, trits, row_scale, column_scale, dtype)
    product = q.double() @ trits.double().T  # exact
    assert torch.equal(got, (product.float() * (row_scale * column_scale)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16], ids=str)
def test_quantize_weights_of_a_whole_model(ops: Any, dtype: torch.dtype) -> None:
    quantize_weights = importlib.import_module("smelter.kernels.weights_triton").quantize_weights
    model = CONFIG.model
    shapes = [(model.query_size, model.hidden_size), (model.kv_size, model.hidden_size)] * 2
    shapes += [(model.intermediate_size, model.hidden_size)] * 2 + [(model.hidden_size, model.intermediate_size)]
    weights = [randn(*shape, seed=seed) / shape[1] ** 0.5 for seed, shape in enumerate(shapes * model.num_layers)]
    trits = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    scales = [torch.empty((), device=DEVICE) for _ in weights]
    quantize_weights(weights, trits, scales)
    for weight, got, scale in zip(weights, trits, scales, strict=True):
        _, want = reference.quantize_weight(weight)
        # Sums in another order may round to the neighbouring bf16 number; the trits are then those of that scale.
        assert float((scale / want - 1).abs()) <= 2**-7
        assert torch.equal(got.float(), (weight / scale).round().clamp(-1, 1))
