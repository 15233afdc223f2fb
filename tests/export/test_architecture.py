"""What others compute of an export is what the model computes, or there is no export."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from smelter.bitnet import RMSNorm, apply_together
from smelter.export import export as export_module
from smelter.export.architecture import qwen3_logits
from smelter.export.hf import baked_tensors, qwen3_config
from smelter.model import MLP
from tests import tiny
from tests.export.test_export import FREE, GGUF_SHAPE, calm_model, run_export


def relu_squared(self: MLP, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    """Somebody's change of one line in smelter/model.py."""
    gate, up = apply_together(x, [self.gate_proj, self.up_proj], norm)
    hidden: torch.Tensor = self.down_proj(torch.relu(gate) ** 2 * up)
    return hidden


@pytest.mark.parametrize("options", [(), ("--force",)])
@pytest.mark.parametrize("part", ["hf", "gguf", "all"])
@pytest.mark.parametrize("has_transformers", [True, False])
def test_another_architecture_is_not_published(
    tmp_path: Path,
    part: str,
    options: tuple[str, ...],
    has_transformers: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Weights, shapes and configuration are Qwen3's; what is computed of them is not."""
    run, out = tiny.checkpoint(tmp_path / "run", calm_model(**GGUF_SHAPE)), tmp_path / "out"
    if not has_transformers:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "transformers" else find_spec(name)
        )
    monkeypatch.setattr(MLP, "forward", relu_squared)
    assert run_export(run, out, "--format", part, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the exported model is another" in error
    assert "top1_architecture = 0." in error
    assert not out.exists()


def test_a_model_that_other_rounding_changes_needs_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tiny.checkpoint(tmp_path / "run", calm_model(**GGUF_SHAPE)), tmp_path / "out"
    monkeypatch.setitem(export_module.MOST, "kl_as_trained", 1e-12)
    assert run_export(run, out, "--format", "gguf") == 2
    error = capsys.readouterr().err
    assert f"error: {out}: the exported model is another (kl_as_trained = " in error
    assert "--force" in error
    assert error.count("\n") == 1
    assert not out.exists()
    assert run_export(run, out, "--format", "gguf", "--force") == 0


def test_qwen3_written_out_is_that_of_transformers() -> None:
    for changes in ({}, {"tie_embeddings": False, "num_kv_heads": 1, "rope_base": 1e6}, {"use_ternary": False}):
        model = tiny.model(**FREE, **changes)
        theirs = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**qwen3_config(model.config, tiny.tokenizer()))
        ).eval()
        tensors = baked_tensors(model)
        theirs.load_state_dict(tensors, strict=False)
        ids = torch.randint(0, 512, (1, 90), generator=torch.manual_seed(1))
        ours = qwen3_logits(model.config, tensors.__getitem__)(ids)
        with torch.no_grad():
            torch.testing.assert_close(ours, theirs.float()(ids).logits[0], atol=1e-5 * float(ours.abs().max()), rtol=0)
