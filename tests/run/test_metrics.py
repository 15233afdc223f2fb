"""The metrics file is one line per logged step, resumed or not; trackers get a copy that they can read."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from smelter.base.errors import DataError, UserError
from smelter.config import preset
from smelter.run import distributed
from smelter.run.metrics import (
    MetricsLogger,
    Sample,
    drop_after,
    progress_line,
    read_metrics,
)

CONFIG = preset("tiny")


def logged(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run / "metrics.jsonl")]


def test_a_line_is_readable_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path / "run", CONFIG, (), None)
    logger.log(10, {"loss": 3.25, "tokens": 40_960, "mfu": np.float32(0.5), "grad_norm": torch.tensor(0.25)})
    expected = {"step": 10, "loss": 3.25, "tokens": 40_960, "mfu": 0.5, "grad_norm": 0.25}
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [expected]
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("40960,") == 1  # counts stay whole numbers
    logger.close()
    logger.close()


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, CONFIG, (), None)
    logger.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "z_loss": float("-inf")})
    logger.close()
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": None, "grad_norm": None, "z_loss": None}


def test_samples_hold_any_code(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, CONFIG, (), None)
    sample = Sample(prefix="s = '<b>\n", suffix="é\u2028€", completion="", expected='"\\')
    logger.samples(5, [sample, sample])
    logger.samples(6, [])
    logger.close()
    assert read_metrics(tmp_path / "samples.jsonl") == [{"step": 5, **asdict(sample)}] * 2


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    first = MetricsLogger(tmp_path, CONFIG, (), None)
    for step in (10, 20, 30, 40):
        first.log(step, {"loss": step / 7})
        first.samples(step, [Sample("", "", "first life", "")])
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')  # killed while writing

    second = MetricsLogger(tmp_path, CONFIG, (), 20)
    assert logged(tmp_path) == [10, 20]
    second.log(30, {"loss": 30 / 7})
    second.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": step, "loss": step / 7} for step in (10, 20, 30)]
    assert [row["step"] for row in read_metrics(tmp_path / "samples.jsonl")] == [10, 20]

    MetricsLogger(tmp_path, CONFIG, (), None).close()
    assert logged(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_resuming_at_step_0_keeps_step_0(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    drop_after(tmp_path / "metrics.jsonl", 0)
    assert logged(tmp_path) == [0]
    drop_after(tmp_path / "absent.jsonl", 0)
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_full_disk_leaves_the_lines_and_nothing_else(small_disk: Path) -> None:
    path = small_disk / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "text": "x" * 1_200_000}) + '\n{"step": 2}\n')
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        drop_after(path, 1)
    assert list(small_disk.iterdir()) == [path]
    assert logged(small_disk) == [1, 2]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n', 2),
        ('{"step": 1}\n\n', 2),
        ('{"step": "1"}\n', 1),
        ("[1]\n", 1),
        ('{"step": 1}\n\x00\x00\n', 2),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, content: str, line: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read_metrics(path)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert "\n" not in str(error.value)


def test_only_an_unfinished_last_line_is_passed_over_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(path) == [{"step": 1}]
    assert f"{path}:2: unfinished" in capsys.readouterr().err
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text("")
    assert read_metrics(path) == []
    assert capsys.readouterr().err == ""
    with pytest.raises(DataError, match="cannot read"):
        read_metrics(tmp_path / "absent.jsonl")


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    logger = MetricsLogger(tmp_path / "run", CONFIG, ("tensorboard", "wandb"), None)
    logger.log(1, {"loss": 1.0})
    logger.samples(1, [Sample("", "", "x", "")])
    logger.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_missing_tracker_is_named_with_its_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    for name in [name for name in sys.modules if name.startswith(("torch.utils.tensorboard", "tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(UserError, match=f"not installed: pip install {tracker}"):
        MetricsLogger(tmp_path, CONFIG, (tracker,), None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def scalars() -> list[tuple[int, float]]:
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars("loss")]

    first = MetricsLogger(tmp_path, CONFIG, ("tensorboard",), None)
    for step in (10, 20, 30):
        first.log(step, {"loss": step / 2})
    first.log(40, {"loss": float("nan")})
    assert scalars() == [(10, 5.0), (20, 10.0), (30, 15.0)]
    first.close()
    second = MetricsLogger(tmp_path, CONFIG, ("tensorboard",), 20)
    second.log(30, {"loss": 0.5})
    second.close()
    assert scalars() == [(10, 5.0), (20, 10.0), (30, 0.5)]


WANDB = """
import sys
from dataclasses import asdict
from pathlib import Path
from smelter.config import preset
from smelter.run.metrics import MetricsLogger
run, resume_step = Path(sys.argv[1]), int(sys.argv[2]) or None
logger = MetricsLogger(run, preset("tiny"), ("wandb",), resume_step)
for step in range((resume_step or 0) + 10, (resume_step or 0) + 30, 10):
    logger.log(step, {"loss": 1.0 / step, "nothing": float("nan")})
logger.close()
"""


@pytest.mark.slow
def test_wandb_writes_its_files_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "my-run"
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    for resume_step in (0, 20):
        command = [sys.executable, "-c", WANDB, str(run), str(resume_step)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    assert logged(run) == [10, 20, 30, 40]
    run_id = (run / "wandb_id.txt").read_text()
    files = sorted((run / "wandb").glob(f"offline-run-*-{run_id}*/run-{run_id}.wandb"))
    assert files, sorted(run.rglob("*"))
    # wandb's own format: the names of what was logged stand in it as they are.
    assert all(b"loss" in file.read_bytes() and b"my-run" in file.read_bytes() for file in files)


def test_wandb_that_cannot_start_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def fail(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(UserError, match=r"No API key configured.*WANDB_MODE=offline"):
        MetricsLogger(tmp_path, CONFIG, ("wandb",), None)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {
                "step": 120,
                "num_steps": 2_000,
                "loss": 3.2104,
                "tok_per_sec": 18_234.0,
                "mfu": 0.412,
                "lr_muon": 0.02,
                "lr_adamw": 0.003,
                "lr_embedding": 0.006,
                "eta_seconds": 372.4,
            },
            "step 120/2000 | loss 3.210 | 18.2k tok/s | mfu 41% | lr .02/.006 | ETA 6m12s",
        ),
        ({"step": 3}, "step 3"),
        ({"step": 5, "loss": float("nan"), "skipped_steps": 2}, "step 5 | loss nan | 2 skipped"),
        ({"step": 5, "loss": None, "skipped_steps": 0}, "step 5 | loss not finite"),
        (
            {"step": 5, "val_loss": 1.5, "val_bpb": 0.987, "mfu": 0.0123, "lr_adamw": 1.0},
            "step 5 | val loss 1.500 | val bpb 0.987 | mfu 1.2% | lr 1",
        ),
        ({"step": 5, "lr_muon": 0.0, "lr_embedding": 3e-5}, "step 5 | lr 0/3e-05"),
    ],
)
def test_progress_line(values: dict[str, float | None], line: str) -> None:
    assert progress_line(values) == line
