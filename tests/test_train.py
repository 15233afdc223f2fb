"""The loop: resumed, shared, accumulated and interrupted runs give the losses of the plain one."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smelter.__main__ import main
from smelter.config import load_config
from smelter.data import BatchStream
from smelter.run import Machine, distributed
from smelter.run.load import load_model
from smelter.run.metrics import read_metrics
from smelter.tokens.tokenize import TokenizeOptions, tokenize
from smelter.train import Trainer, parse_options
from tests import tiny
from tests.base.test_signals import in_a_terminal
from tests.house import ROOT

SHAPE = (
    *("--vocab-size=512", "--hidden-size=32", "--num-layers=2", "--num-heads=2", "--num-kv-heads=1", "--head-dim=16"),
    *("--intermediate-size=64", "--max-seq-len=64", "--total-batch-size=512", "--device-batch-size=8"),
    *("--precision=fp32", "--no-use-torch-compile", "--device=cpu", "--num-steps=12", "--warmup-steps=2"),
    *("--log-every=1", "--sample-every=0", "--eval-every=0", "--eval-tokens=128"),
)


def write_records(path: Path, count: int = 40) -> Path:
    lines = tiny.CODE.splitlines(keepends=True)
    size = len(lines) // count
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text = "".join(lines[i * size : (i + 1) * size])
            record = {"id": str(i), "kind": "text", "text": text, "source": f"{i % 20}.py"}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    records = write_records(folder / "records.jsonl")
    return tokenize(TokenizeOptions(records=(records,), out=folder / "shards", vocab_size=512, val_fraction=0.2))


def command(shards: Path, run: Path, *options: str) -> list[str]:
    return ["train", *SHAPE, "--shards", str(shards), "--run-dir", str(run), *options]


def losses(run: Path) -> list[float]:
    rows: list[dict[str, Any]] = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def plain(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("runs") / "plain"
    assert main(command(shards, run)) == 0
    found = losses(run)
    assert len(found) == 12
    assert found[-1] < found[0] - 0.3
    return found


def test_accumulation_changes_nothing(shards: Path, plain: list[float], tmp_path: Path) -> None:
    assert main(command(shards, tmp_path / "r", "--device-batch-size", "2")) == 0
    # Sums in another order: from about the fifth step on, some latent weight at the edge between two trits falls
    # to the other side. Without trits the two stay together.
    assert losses(tmp_path / "r")[:4] == pytest.approx(plain[:4], rel=1e-5)
    for batch in ("2", "8"):
        options = ("--no-use-ternary", "--device-batch-size", batch)
        assert main(command(shards, tmp_path / f"full{batch}", *options)) == 0
    assert losses(tmp_path / "full2") == pytest.approx(losses(tmp_path / "full8"), rel=2e-5)


def test_gradient_checkpointing_changes_no_bit(shards: Path, plain: list[float], tmp_path: Path) -> None:
    assert main(command(shards, tmp_path / "r", "--use-gradient-checkpointing")) == 0
    assert losses(tmp_path / "r") == plain


def test_int8_gradients_train(shards: Path, plain: list[float], tmp_path: Path) -> None:
    assert main(command(shards, tmp_path / "r", "--int8-gradients")) == 0
    found = losses(tmp_path / "r")
    assert found[0] == pytest.approx(plain[0], rel=1e-5)
    assert found != plain
    assert found[-1] == pytest.approx(plain[-1], abs=0.1)


def test_trits_are_made_once_a_step(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smelter.kernels import reference

    calls = []
    original = reference.quantize_weight

    def counted(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return original(weight)

    monkeypatch.setattr(reference, "quantize_weight", counted)
    options = ("--device-batch-size", "2", "--use-gradient-checkpointing", "--num-steps", "5")
    assert main(command(shards, tmp_path / "r", *options)) == 0
    assert len(calls) == 2 * 7 * (5 + 2)  # 2 layers of 7; at initialisation, at the start, and after each step


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kills"),
    [((), (1, 3, 4, 8, 11)), (("--precision", "bf16", "--use-torch-compile"), (8,))],
    ids=["eager", "compiled-bf16"],
)
def test_killed_again_and_again_it_shows_the_losses_of_the_run_never_killed(
    shards: Path, tmp_path: Path, options: tuple[str, ...], kills: tuple[int, ...]
) -> None:
    run, whole = tmp_path / "r", tmp_path / "whole"
    start = [sys.executable, "-m", "smelter", *command(shards, run, "--checkpoint-every", "2", *options)]
    subprocess.run([*start, "--run-dir", str(whole)], check=True, env=environment(), capture_output=True)
    for kill_at in kills:
        process = subprocess.Popen(start, env=environment(), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step ") and int(line.split("/")[0].split()[1]) >= kill_at:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(start, check=True, env=environment(), capture_output=True)
    assert losses(run) == losses(whole)
    assert losses(run)[-1] < losses(run)[0] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_same_command_goes_on(shards: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "r"
    start = [sys.executable, "-m", "smelter", *command(shards, run, "--num-steps", "4000")]
    process = subprocess.Popen(start, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "the same command goes on" in rest
    done = len(losses(run))
    assert (run / "checkpoints" / f"step_{done:07d}").is_dir()
    assert main(command(shards, run, "--num-steps", str(done + 2))) == 0
    assert len(losses(run)) == done + 2


@pytest.mark.slow
def test_a_closed_terminal_saves(shards: Path, tmp_path: Path) -> None:
    """What it says then goes nowhere, which must not be what ends it."""
    start = ["-m", "smelter", *command(shards, tmp_path / "r", "--num-steps", "4000")]
    assert in_a_terminal(start, lambda said: "step 3/" in said, OMP_NUM_THREADS="1") == 128 + signal.SIGHUP
    done = len(losses(tmp_path / "r"))
    assert (tmp_path / "r" / "checkpoints" / f"step_{done:07d}").is_dir()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_copied_run_goes_on_by_itself(shards: Path, plain: list[float], tmp_path: Path) -> None:
    first, second = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    assert main(command(shards, first, "--num-steps", "12", "--checkpoint-every", "5")) == 0
    shutil.rmtree(first / "checkpoints" / "step_0000012")
    before = everything(first)
    shutil.copytree(first, second)
    assert main(["train", str(second / "config.toml"), "--resume", "must"]) == 0
    assert everything(first) == before
    assert losses(second) == plain
    assert sorted(path.name for path in (second / "checkpoints").iterdir()) == ["step_0000010", "step_0000012"]


def test_what_was_logged_is_on_the_disk_before_the_checkpoint(
    shards: Path, tmp_path: Path, disk_events: list[str]
) -> None:
    assert main(command(shards, tmp_path / "r", "--num-steps", "2")) == 0
    saved = disk_events.index("-> step_0000002")
    written = [place for place, name in enumerate(disk_events) if name == "metrics.jsonl"]
    assert written
    assert max(written) < saved
    assert "r" in disk_events[max(written) : saved], "its name, too"


@pytest.mark.slow
def test_the_commands_in_its_readme_work_in_a_copy(shards: Path, tmp_path: Path) -> None:
    project = tmp_path / "project of mine"
    shutil.copytree(shards, project / "data" / "shards")
    smelter = f'smelter() {{ "{sys.executable}" -m smelter "$@"; }}'
    environ = environment() | {"PYTHONPATH": str(ROOT)}

    def bash(text: str, folder: Path) -> str:
        script = f"set -eu\n{smelter}\n{text}"
        run = subprocess.run(
            ["bash", "-c", script], cwd=folder, env=environ, check=True, capture_output=True, text=True, timeout=200
        )
        return run.stdout

    options = shlex.join(command(Path("data/shards"), Path("runs/a"), "--final-logit-soft-cap=0"))
    bash(f"smelter {options} --attn-logit-soft-cap 0", project)
    before = everything(project / "runs" / "a")
    shutil.copytree(project / "runs" / "a", project / "runs" / "b")
    readme = (project / "runs" / "b" / "README.md").read_text()
    block = "\n".join(line for line in readme.splitlines() if line.startswith("    "))
    assert block.count("smelter ") == 4
    bash(block.replace("--resume must", "--resume must --num-steps 14").replace("gguf", "hf"), project / "runs" / "b")
    assert everything(project / "runs" / "a") == before
    assert len(losses(project / "runs" / "b")) == 14
    assert json.loads((project / "runs" / "b" / "results.json").read_text())["step"] == 14
    assert (project / "runs" / "b" / "report.html").is_file()
    assert (project / "runs" / "b" / "export" / "hf" / "model.safetensors").is_file()


def test_more_ranks_change_neither_loss_nor_gradient(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ranks with the same batches treble every sum; the mean of their gradients is that of each."""
    steps = []
    for world_size in (1, 3):
        config = parse_options(command(shards, tmp_path / str(world_size))[1:]).config
        trainer = Trainer(config, Machine.of(config.training))
        trainer.machine = replace(trainer.machine, world_size=world_size)
        monkeypatch.setattr(distributed, "sum_over_ranks", lambda tensor, ranks=world_size: tensor * ranks)
        stream = BatchStream(
            trainer.shards.split("train"), trainer.tokenizer, trainer.config.data, seq_len=64, seed=0,
            device_batch_size=4, rows_per_step=8,
        )  # fmt: skip
        steps.append(trainer._train_step(stream.step(0, 0, 1)))
        trainer.metrics.close()
    assert steps[0]["grad_norm"] > 0.1
    assert steps[1] == pytest.approx(steps[0], rel=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(shards: Path, plain: list[float], tmp_path: Path) -> None:
    run = tmp_path / "r"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "smelter"]
    arguments = command(shards, run, "--device-batch-size", "4")
    subprocess.run([*launch, *arguments], check=True, env=environment(), capture_output=True, timeout=200)
    assert losses(run) == pytest.approx(plain, rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler trips over warnings of its own that are made errors
def test_compiled_equals_eager(shards: Path, plain: list[float], tmp_path: Path) -> None:
    assert main([*command(shards, tmp_path / "r", "--num-steps", "4"), "--use-torch-compile"]) == 0
    assert losses(tmp_path / "r") == pytest.approx(plain[:4], rel=1e-3)


def test_too_high_a_loss_scale_is_no_divergence(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 starts with a scale at which gradients overflow: it halves until they fit, however many steps that takes."""
    scaler, clip, calls = torch.amp.GradScaler, torch.nn.utils.clip_grad_norm_, iter(range(100))
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0**16))

    def overflowing(*arguments: Any) -> torch.Tensor:
        norm = clip(*arguments)
        return norm if next(calls) >= 12 else torch.full_like(norm, float("inf"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflowing)
    assert main(command(shards, tmp_path / "r", "--num-steps", "20")) == 0
    rows = read_metrics(tmp_path / "r" / "metrics.jsonl")
    assert rows[-1]["skipped_steps"] == 12
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1


def test_a_line_of_metrics_tells_the_loss_scale_of_its_step(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the one that the scaler has made of it for the next."""
    scaler = torch.amp.GradScaler
    doubling = scaler("cpu", init_scale=2.0, growth_interval=1)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: doubling)
    assert main(command(shards, tmp_path / "r", "--num-steps", "4")) == 0
    assert [row["loss_scale"] for row in read_metrics(tmp_path / "r" / "metrics.jsonl")] == [2.0, 4.0, 8.0, 16.0]


def test_ten_steps_that_are_not_finite_stop_the_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Trainer._train_step

    def broken(self: Trainer, batches: Any) -> dict[str, float]:
        if self.step == 3:
            self.model.norm.weight.data.fill_(float("nan"))
        return original(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", broken)
    assert main(command(shards, tmp_path / "r", "--checkpoint-every", "2", "--num-steps", "30")) == 2
    error = capsys.readouterr().err
    assert "not finite 10 steps in a row" in error
    assert "step_0000002" in error


def test_a_teacher_in_the_same_process(shards: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    assert main(command(shards, teacher, "--num-steps", "2")) == 0
    assert main(command(shards, tmp_path / "r", "--num-steps", "2", "--teachers", str(teacher))) == 0
    rows = read_metrics(tmp_path / "r" / "metrics.jsonl")
    for row in rows:
        total = 0.1 * row["ce_loss"] + 0.9 * row["kl_loss"] + 1e-4 * row["z_loss"]
        assert row["loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
def test_training_for_a_time_ends_in_time(shards: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    assert main(command(shards, tmp_path / "r", "--train-minutes", "0.06")) == 0
    assert time.monotonic() - start < 20
    assert len(losses(tmp_path / "r")) > 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--muon-lrr", "1"], "--muon-lr"),
        (["--muon-lr", "fast"], "--muon-lr"),
        (["--num-kv-heads", "3"], "does not divide"),
        (["--total-batch-size", "100"], "multiple"),
        (["--vocab-size", "300"], "vocab_size = 512"),
        (["--resume", "must"], "--resume auto"),
        (["--train-minutes", "1", "--adamw-schedule", "cosine"], "cosine"),
        (["--device", "tpu9"], "device"),
    ],
)
def test_bad_options_are_one_line(
    shards: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(shards, tmp_path / "r", *options)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


FOLDER = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("*.toml") if not path.name.startswith("foundry"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_divides(recipe: Path) -> None:
    assert load_config(recipe).micro_steps() >= 1


def test_a_recipe_with_a_typo_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[model]\nnum_kv_head = 2\n")
    assert main(["train", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert f"{recipe}: [model]: unknown key 'num_kv_head': did you mean 'num_kv_heads'?" in error
    assert main(["train", str(tmp_path / "none.toml")]) == 2
    assert "check the path" in capsys.readouterr().err


def test_dry_run_says_what_it_would_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", "tiny", "--dry-run", "--muon-lr", "0.03"]) == 0
    out = capsys.readouterr().out
    assert "muon_lr = 0.03" in out
    for word in ("parameters", "tokens", "FLOPs", "predicted peak memory", "predicted time"):
        assert word in out


def test_results_are_json_lines(shards: Path, tmp_path: Path) -> None:
    assert main(command(shards, tmp_path / "r", "--num-steps", "3", "--eval-every", "3")) == 0
    last = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss", "val_bpb", "val_loss", "trit_flips", "sparsity/q_proj", "tok_per_sec", "lr_muon"} <= last.keys()


def test_the_final_cap_is_annealed_away_and_checkpoints_say_so(shards: Path, tmp_path: Path) -> None:
    run, options = tmp_path / "r", ("--final-cap-anneal-fraction", "0.5", "--final-logit-soft-cap", "2.0")
    assert main(command(shards, run, *options, "--checkpoint-every", "9")) == 0
    rows = read_metrics(run / "metrics.jsonl")
    caps = [row["final_logit_soft_cap"] for row in rows]  # the one that the step's loss was computed with
    assert caps[:6] == [2.0] * 6
    assert [1 / cap for cap in caps[6:11]] == pytest.approx(
        [share / 2 for share in (5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)]
    )
    assert caps[11:] == [0.0]
    stored = {}
    for step in (9, 12):
        manifest = json.loads((run / "checkpoints" / f"step_{step:07d}" / "config.json").read_text())
        stored[step] = manifest["config"]["model"]["final_logit_soft_cap"]
    assert stored == {9: pytest.approx(6.0), 12: 0.0}
    model, _, _ = load_model(run)
    assert model.config.final_logit_soft_cap == 0.0
    # From a checkpoint on the way the same numbers follow.
    shutil.rmtree(run / "checkpoints" / "step_0000012")
    assert main(command(shards, run, *options, "--checkpoint-every", "9")) == 0
    again = read_metrics(run / "metrics.jsonl")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert main(command(shards, run, "--final-logit-soft-cap", "2.0", "--resume", "must")) == 2
