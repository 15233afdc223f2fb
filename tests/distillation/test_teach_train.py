"""From teacher to student through the command line: stored, shared, accumulated, resumed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smelter.__main__ import main
from smelter.run.metrics import read_metrics
from tests import tiny
from tests.distillation.teaching import make_cache, make_shards
from tests.test_train import SHAPE, losses


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("teach"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("run") / "big", tiny.model())


@pytest.fixture(scope="module")
def cache(teacher: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 rows: training with 8 a step begins anew in the fourth step."""
    return make_cache(teacher, shards, tmp_path_factory.mktemp("cache") / "c", rows=30).path


def command(shards: Path, run: Path, *options: str) -> list[str]:
    return ["train", *SHAPE, "--shards", str(shards), "--run-dir", str(run), *options]


def test_teach_then_train_mixed_and_accumulated(teacher: Path, shards: Path, cache: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    words = ["--shards", str(shards), "--seq-len", "64", "--rows", "30", "--device", "cpu", "--out", str(whole)]
    top_k = ["--method", "top_k", "--top-k", "512", "--log-prob-dtype", "float32"]
    assert main(["teach", "--teacher", str(teacher), *words, *top_k]) == 0
    for name, options in {
        "mixed": ("--cached", str(cache), str(whole), "--teachers", str(teacher), "--teacher-weights", "1", "2", "3"),
        "small": ("--cached", str(cache), "--device-batch-size", "2"),
        "large": ("--cached", str(cache), "--seed", "0"),
    }.items():
        assert main(command(shards, tmp_path / name, "--num-steps", "5", "--no-use-ternary", *options)) == 0
        for row in read_metrics(tmp_path / name / "metrics.jsonl"):
            total = 0.1 * row["ce_loss"] + 0.9 * row["kl_loss"] + 1e-4 * row["z_loss"]
            assert row["loss"] == pytest.approx(total, rel=1e-4)
            assert row["kl_loss"] > 0.1
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), rel=2e-5)


def test_the_stored_teacher_is_the_one_beside(teacher: Path, shards: Path, tmp_path: Path) -> None:
    """The same run twice; the cache's rows are those that training reads anyway, as the seeds are equal."""
    options: dict[str, Any] = {"method": "top_k", "top_k": 512, "log_prob_dtype": "float32", "rows": 30, "seed": 0}
    made = make_cache(teacher, shards, tmp_path / "c", **options)
    for name, words in {"stored": ("--cached", str(made.path)), "beside": ("--teachers", str(teacher))}.items():
        assert main(command(shards, tmp_path / name, "--num-steps", "3", "--no-use-ternary", *words)) == 0
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "beside"), rel=1e-5)


def test_what_does_not_fit_is_one_line_before_the_run(
    shards: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        (("--fim-rate", "0.3"), "data.fim_rate = 0.5, this run has 0.3"),
        (("--temperature", "2"), "distillation.temperature = 2.0"),
        (("--kl-direction", "reverse"), 'kl_direction = "reverse"'),
        (("--teacher-weighting", "validation"), 'teacher_weighting = "validation"'),
    ):
        assert main(command(shards, tmp_path / "r", "--cached", str(cache), *options)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "r" / "checkpoints").exists()


@pytest.mark.slow
def test_resumed_and_shared_runs_are_the_plain_one(shards: Path, cache: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = ("--cached", str(cache), "--no-use-ternary", "--adamw-schedule", "constant")
    assert main(command(shards, tmp_path / "plain", *words)) == 0
    for steps in ("5", "12"):
        assert main(command(shards, tmp_path / "resumed", *words, "--checkpoint-every", "5", "--num-steps", steps)) == 0
    plain, resumed = losses(tmp_path / "plain"), losses(tmp_path / "resumed")
    assert len(plain) == 12
    assert resumed == plain
    assert plain[-1] < plain[0] - 0.3
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "smelter"]
    arguments = command(shards, tmp_path / "shared", *words, "--device-batch-size", "4")
    subprocess.run([*launch, *arguments], check=True, env=environment, capture_output=True, timeout=300)
    assert losses(tmp_path / "shared") == pytest.approx(plain, rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler trips over warnings of its own that are made errors
def test_compiled_equals_eager(shards: Path, cache: Path, tmp_path: Path) -> None:
    words = ("--cached", str(cache), "--num-steps", "5")
    assert main(command(shards, tmp_path / "eager", *words)) == 0
    assert main([*command(shards, tmp_path / "compiled", *words), "--use-torch-compile"]) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
