"""Teachers' weights and the schedule of their share, from the recipe to the loss."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from smelter.__main__ import main
from smelter.base.errors import ConfigError
from smelter.config import Config, DistillationConfig, TrainingConfig
from smelter.distillation.objective import Objective, validation_weights, weights_by_loss
from smelter.distillation.teacher import CheckpointTeacher
from smelter.evaluation.bpb import validation_loss
from smelter.model import Model
from smelter.run.metrics import read_metrics
from smelter.tokens.shards import ShardSet
from smelter.tokens.tokenize import TokenizeOptions, tokenize
from tests import tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objective")
    lines = tiny.CODE.splitlines(keepends=True)
    with (folder / "records.jsonl").open("w", encoding="utf-8") as file:
        for i in range(20):
            text = "".join(lines[i * 20 : (i + 1) * 20])
            file.write(json.dumps({"id": str(i), "kind": "text", "text": text, "source": f"{i}.py"}) + "\n")
    tokenizer = folder / "tokenizer.json"  # that of the teachers
    tiny.tokenizer().save(tokenizer)
    records, out = folder / "records.jsonl", folder / "shards"
    return tokenize(TokenizeOptions(records=(records,), out=out, tokenizer=tokenizer, val_fraction=0.2))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two untrained teachers of the quick runs' vocabulary, the second with flat, hence better, predictions."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, scale in (("sharp", 1.0), ("flat", 0.0)):
        made = tiny.model()
        with torch.no_grad():
            made.norm.weight.mul_(scale)
        tiny.checkpoint(folder / name, made)
    return str(folder / "sharp"), str(folder / "flat")


def config_of(**distillation: Any) -> Config:
    return Config(
        model=tiny.TINY,
        distillation=DistillationConfig(**distillation),
        training=TrainingConfig(eval_tokens=256, device_batch_size=4),
    )


def command(shards: Path, run: Path, teachers: tuple[str, ...], *options: str) -> list[str]:
    return [
        *("train", "--vocab-size=512", "--hidden-size=32", "--num-layers=1", "--num-heads=2", "--num-kv-heads=1"),
        *("--head-dim=16", "--intermediate-size=64", "--max-seq-len=64", "--total-batch-size=256"),
        *("--device-batch-size=4", "--precision=fp32", "--no-use-torch-compile", "--device=cpu", "--warmup-steps=1"),
        *("--log-every=1", "--sample-every=0", "--eval-every=0", "--eval-tokens=128"),
        *("--shards", str(shards), "--run-dir", str(run), "--teachers", *teachers, *options),
    ]


def test_weights_fall_by_e_for_each_tau_of_loss() -> None:
    weights = weights_by_loss((1.0, 1.0, 2.0), [3.0, 3.1, 3.2], tau=0.1)
    parts = [1.0, math.exp(-1), 2 * math.exp(-2)]
    assert weights == pytest.approx([part / sum(parts) for part in parts])


def test_weights_of_losses_far_apart_stay_numbers() -> None:
    assert weights_by_loss((1.0, 1.0), [2.0, 900.0], tau=1e-3) == (1.0, 0.0)
    assert weights_by_loss((0.0, 1.0), [2.0, 900.0], tau=1e-3) == (0.0, 1.0)


def test_validation_weights_are_those_of_the_measured_losses(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss of each teacher is that which `validation_loss` gives; both losses and weights are said."""
    models = [tiny.model(seed) for seed in (0, 1)]
    config = config_of(teachers=("a", "b"), teacher_weighting="validation", validation_tau=2.0)
    opened = ShardSet.open(shards)
    split = opened.split("val")
    weights = validation_weights(
        [CheckpointTeacher(Path(), model) for model in models], config, split, opened.tokenizer
    )
    losses = [validation_loss(m, split, 256, tokenizer=opened.tokenizer, batch_size=4)[0] for m in models]
    assert weights[0] / weights[1] == pytest.approx(math.exp((losses[1] - losses[0]) / 2.0))
    assert capsys.readouterr().out.splitlines() == [
        f"teacher {name}: held-out loss {loss:.4f}, weight {weight:.3f}"
        for name, loss, weight in zip("ab", losses, weights, strict=True)
    ]


def test_a_teacher_of_no_finite_loss_is_named(shards: Path) -> None:
    broken = tiny.model()
    with torch.no_grad():
        broken.norm.weight.fill_(float("nan"))
    opened = ShardSet.open(shards)
    config = config_of(teachers=("runs/broken",), teacher_weighting="validation")
    with pytest.raises(ConfigError, match="runs/broken has a held-out loss of nan"):
        validation_weights([CheckpointTeacher(Path(), broken)], config, opened.split("val"), opened.tokenizer)


def test_validation_weighting_in_a_run(
    shards: Path, teachers: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flat teacher is better by many tau: the run is that with it alone."""
    options = ("--num-steps=2", "--kl-weight=1")
    assert main(command(shards, tmp_path / "both", teachers, *options, "--teacher-weighting=validation")) == 0
    assert "weight 1.000" in capsys.readouterr().out
    assert main(command(shards, tmp_path / "alone", teachers[1:], *options)) == 0
    both, alone = (
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("both", "alone")
    )
    assert both == pytest.approx(alone, rel=1e-5)


def test_a_linear_share_goes_from_one_end_to_the_other(shards: Path, teachers: tuple[str, str], tmp_path: Path) -> None:
    options = ("--num-steps=4", "--kl-weight=0.8", "--kl-schedule=linear", "--kl-weight-end=0.4", "--z-loss=0")
    assert main(command(shards, tmp_path / "r", teachers, *options)) == 0
    rows = read_metrics(tmp_path / "r" / "metrics.jsonl")
    assert [row["kl_weight"] for row in rows] == pytest.approx([0.8, 0.7, 0.6, 0.5])
    for row in rows:
        share = row["kl_weight"]
        assert row["loss"] == pytest.approx((1 - share) * row["ce_loss"] + share * row["kl_loss"], rel=1e-5)


def test_a_linear_share_follows_the_clock_where_that_ends_the_run(
    shards: Path, teachers: tuple[str, str], tmp_path: Path
) -> None:
    options = ("--train-minutes=0.01", "--kl-weight=1", "--kl-schedule=linear", "--adamw-schedule=wsd")
    assert main(command(shards, tmp_path / "r", teachers[:1], *options)) == 0
    rows = read_metrics(tmp_path / "r" / "metrics.jsonl")
    assert rows[0]["kl_weight"] == 1.0
    for before, row in itertools.pairwise(rows):
        assert row["kl_weight"] == pytest.approx(1 - min(1.0, before["elapsed_seconds"] / 0.6))
    assert rows[-1]["kl_weight"] < 0.3


@pytest.mark.parametrize(
    ("direction", "name"), [("forward", "forward"), ("reverse", "reverse"), ("skew", "skew"), ("js", "js")]
)
def test_the_recipes_options_reach_the_loss(direction: Any, name: str) -> None:
    config = config_of(
        teachers=("a",), kl_direction=direction, skew_alpha=0.3, js_beta=0.7, teacher_weighting="confidence"
    )
    made: Model = tiny.model()
    loss = Objective(made, config, [CheckpointTeacher(Path(), tiny.model(1))], use_compile=False).loss_config
    assert (loss.direction, loss.skew_alpha, loss.js_beta, loss.use_confidence) == (name, 0.3, 0.7, True)
