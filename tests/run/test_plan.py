"""The plan's figures against what the real model, loss and optimizer keep."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smelter.config import Config, ModelConfig, TrainingConfig, load_config, preset
from smelter.kernels import attention_blocked as blocked
from smelter.kernels import linear as ternary
from smelter.kernels import reference
from smelter.model import Model
from smelter.muon import MuonAdamW
from smelter.run.plan import Plan, plan
from smelter.train import main
from tests import tiny

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "2080super.toml"
SHORT_50M = replace(preset("50m").model, num_layers=3, max_seq_len=160, vocab_size=1_000)
DTYPES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}

# What the compiler saves, without the time that it takes to write programs.
PARTITIONED = "aot_eager_decomp_partition"

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler trips over warnings of its own that are made errors


@pytest.fixture
def _attention_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its passes over the scores: the compiler of the blocks does not see them, and they take most of its time."""
    compiled = blocked._pass_over_scores
    monkeypatch.setattr(
        blocked, "_pass_over_scores", lambda function, scale, cap, _: compiled(function, scale, cap, False)
    )


def planned(model: ModelConfig, dtype: torch.dtype, batch: int, device_type: str = "cpu", **training: Any) -> Plan:
    config = Config(model=model, training=replace(TrainingConfig(), device_batch_size=batch, **training))
    return plan(config, bytes_per_value=DTYPES[dtype], device_type=device_type)


def forward(
    config: ModelConfig, dtype: torch.dtype, batch: int, backend: str | None
) -> tuple[Model, Callable[[], int]]:
    """A model as in training, and a forward pass that returns the bytes saved for the backward pass."""
    torch.manual_seed(0)
    model = Model(config, dtype)
    model.trit_dtype = torch.int8
    model.quantize_weights()
    if backend:
        torch._dynamo.reset()
        for block in model.layers:
            block.compile(backend=backend)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    tokens = torch.randint(0, config.vocab_size, (batch, config.max_seq_len))

    def run() -> int:
        kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used twice

        def see(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            hidden = model(tokens)
        see(hidden)
        # The loss saves the gradient of the hidden states, of their size.
        saved: int = sum(storage.nbytes() for storage in kept.values()) + hidden.untyped_storage().nbytes()
        return saved

    return model, run


SHAPES: dict[str, tuple[ModelConfig, torch.dtype]] = {
    "tiny fp32": (tiny.TINY, torch.float32),
    "tiny bf16": (tiny.TINY, torch.bfloat16),
    "50m bf16": (SHORT_50M, torch.bfloat16),
    "50m fp16": (SHORT_50M, torch.float16),
    "no query and key norms": (replace(SHORT_50M, use_qk_norm=False), torch.bfloat16),
    "sub-norms": (replace(SHORT_50M, use_sub_norm=True), torch.bfloat16),
    "full precision": (replace(SHORT_50M, use_ternary=False), torch.bfloat16),
    "blocks of activations": (replace(SHORT_50M, activation_quant="block256"), torch.bfloat16),
    "many key heads": (replace(SHORT_50M, num_heads=6, num_kv_heads=6), torch.bfloat16),
}


@pytest.mark.usefixtures("_attention_runs_uncompiled")
@pytest.mark.parametrize("name", SHAPES)
def test_saved_activations_are_as_predicted(name: str) -> None:
    config, dtype = SHAPES[name]
    _, run = forward(config, dtype, 2, PARTITIONED)
    assert run() == pytest.approx(planned(config, dtype, 2).activations_bytes, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny bf16", "50m bf16"])
def test_the_real_compiler_saves_the_same(name: str) -> None:
    config, dtype = SHAPES[name]
    _, run = forward(config, dtype, 2, "inductor")
    assert run() == pytest.approx(planned(config, dtype, 2).activations_bytes, rel=0.1)


@pytest.mark.parametrize("name", ["tiny bf16", "50m bf16"])
def test_eager_saves_more_than_is_predicted(name: str) -> None:
    config, dtype = SHAPES[name]
    _, run = forward(config, dtype, 2, None)
    assert 1.5 < run() / planned(config, dtype, 2).activations_bytes < 1.9


@torch.library.custom_op("smelter_test::quantize_rows", mutates_args=())
def opaque_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = reference.quantize_activations(x)
    return q.to(torch.int8), scale


@opaque_quantize.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@pytest.mark.usefixtures("_attention_runs_uncompiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int8_inputs_are_kept_where_kernels_make_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: the compiler can neither see into the quantisation nor repeat it."""

    def quantize(x: Tensor, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor | None]:
        if norm is None:
            return *opaque_quantize(x), None
        return *opaque_quantize(reference.rms_norm(x, norm, eps)), x.float().square().mean(-1, keepdim=True).rsqrt()

    monkeypatch.setattr(ternary, "_quantize", quantize)
    _, run = forward(SHORT_50M, dtype, 2, PARTITIONED)
    saved = run()
    assert saved == pytest.approx(planned(SHORT_50M, dtype, 2, "cuda").activations_bytes, rel=0.03)
    assert saved > 1.1 * planned(SHORT_50M, dtype, 2, "cpu").activations_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recompute_keeps_the_blocks_inputs(dtype: torch.dtype) -> None:
    model, run = forward(SHORT_50M, dtype, 2, None)
    model.use_gradient_checkpointing = True
    predicted = planned(SHORT_50M, dtype, 2, use_gradient_checkpointing=True)
    assert run() == pytest.approx(predicted.activations_bytes, rel=0.1)
    assert 3 * predicted.activations_bytes < planned(SHORT_50M, dtype, 2).activations_bytes


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("use_ternary", [True, False])
def test_state_is_counted_exactly(optimizer: str, use_ternary: bool) -> None:
    config = replace(tiny.TINY, use_ternary=use_ternary)
    model, _ = forward(config, torch.float32, 1, None)
    made = MuonAdamW(model, use_muon=optimizer == "muon")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    tensors = [*model.parameters(), *(parameter.grad for parameter in model.parameters())]
    for part in made._parts:
        tensors += [value for state in part.state.values() for key, value in state.items() if key != "step"]
    count = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    count += 2 * sum(layer.numel() for name, layer in model.named_buffers() if name.endswith("trits"))
    assert count == planned(config, torch.float32, 1, optimizer=optimizer).state_bytes


def test_the_8_gb_recipe_is_predicted_to_fit() -> None:
    config = load_config(RECIPE)
    assert config.training.precision == "fp16"
    assert config.training.device_batch_size * config.model.max_seq_len == 8 * 2_048
    assert plan(config, bytes_per_value=2).peak_bytes < 3e9
    whole = replace(config, training=replace(config.training, use_gradient_checkpointing=False))
    assert 6e9 < plan(whole, bytes_per_value=2).peak_bytes < 6.5e9


def test_memory_grows_with_the_tokens_and_not_with_their_square() -> None:
    config = preset("100m")

    def activations(batch: int, length: int) -> int:
        model = replace(config.model, max_seq_len=length)
        return planned(model, torch.bfloat16, batch).activations_bytes

    assert activations(2, 1_024) == activations(1, 2_048) == 2 * activations(1, 1_024)
    assert activations(1, 4_096) == 4 * activations(1, 1_024)


def test_the_highest_moment_decides() -> None:
    base = planned(SHORT_50M, torch.bfloat16, 1)
    for changes in ({"loss_bytes": 10**12}, {"backward_bytes": 10**12}):
        peak = replace(base, **changes).peak_bytes
        assert peak == base.state_bytes + base.activations_bytes + 10**12
    assert replace(base, optimizer_bytes=10**12).peak_bytes == base.state_bytes + 10**12


def test_the_8_gb_recipe_is_planned_for_without_its_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECIPE), "--dry-run"]) == 0
    peak = re.search(r"predicted peak memory +([0-9.]+) GB", capsys.readouterr().out)
    assert peak is not None
    assert float(peak[1]) <= 6.5
