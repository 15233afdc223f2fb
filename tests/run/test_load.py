"""Full precision first: a phase of its own within a run, or the weights of another run."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smelter.__main__ import main
from smelter.base.errors import ConfigError
from smelter.bitnet import bit_linears
from smelter.config import Config, ModelConfig, TrainingConfig
from smelter.run.checkpoint import load_checkpoint
from smelter.run.metrics import progress_line, read_metrics
from smelter.run.schedule import lr_factor
from smelter.tokens.tokenize import TokenizeOptions, tokenize
from tests import tiny
from tests.test_train import command, losses, write_records

PHASES = ("--ternary-start-step", "5")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    records = write_records(folder / "records.jsonl")
    return tokenize(TokenizeOptions(records=(records,), out=folder / "shards", vocab_size=512, val_fraction=0.2))


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `full`, in full precision, and `phases`, ternary after five steps."""
    folder = tmp_path_factory.mktemp("runs")
    keep = ("--checkpoint-every", "1", "--keep-checkpoints", "0")
    assert main(command(shards, folder / "full", "--no-use-ternary", *keep)) == 0
    assert main(command(shards, folder / "phases", *PHASES, *keep)) == 0
    return folder


def test_the_first_phase_is_a_full_precision_run_bit_for_bit(runs: Path) -> None:
    full, phases = losses(runs / "full"), losses(runs / "phases")
    assert phases[:5] == full[:5]
    assert all(a != b for a, b in zip(phases[5:], full[5:], strict=True))
    rows = read_metrics(runs / "phases" / "metrics.jsonl")
    assert [row["is_ternary"] for row in rows] == [0.0] * 5 + [1.0] * 7
    assert ["trit_flips" in row for row in rows] == [False] * 5 + [True] * 7
    assert rows[-1]["loss"] < rows[4]["loss"]
    for step in (1, 5):
        here, there = (load_checkpoint(runs / r / "checkpoints" / f"step_{step:07d}", with_state=True) for r in
                       ("phases", "full"))  # fmt: skip
        assert here.config.model == there.config.model
        assert all(bool((here.tensors[name] == there.tensors[name]).all()) for name in here.tensors)


def test_the_switch_changes_layers_and_no_weight() -> None:
    made = tiny.model(use_ternary=False)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    parameters = list(made.parameters())
    made.make_ternary()
    assert all(old is new for old, new in zip(parameters, made.parameters(), strict=True))
    assert all(bool((before[name] == tensor).all()) for name, tensor in made.state_dict().items())
    ternary = tiny.model()
    ternary.load_state_dict(before)
    ternary.quantize_weights()
    assert made.config == ternary.config
    for (_, layer), (_, other) in zip(bit_linears(made), bit_linears(ternary), strict=True):
        assert bool((layer.trits == other.trits).all())
        assert layer.scale == other.scale


@pytest.mark.parametrize(
    "step", [pytest.param(3, marks=pytest.mark.slow), 5, 6, pytest.param(9, marks=pytest.mark.slow)]
)
def test_resumed_in_either_phase_it_shows_the_losses_of_the_run_never_stopped(
    runs: Path, shards: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "r"
    (run / "checkpoints").mkdir(parents=True)
    whole = runs / "phases"
    (run / "metrics.jsonl").write_bytes((whole / "metrics.jsonl").read_bytes())
    (run / "checkpoints" / f"step_{step:07d}").symlink_to(whole / "checkpoints" / f"step_{step:07d}")
    assert main(command(shards, run, *PHASES, "--resume", "must")) == 0
    assert losses(run) == losses(whole)


def test_a_checkpoint_says_what_its_model_is(
    runs: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = runs / "phases" / "checkpoints"
    for step, is_ternary in ((5, False), (6, True)):
        path = steps / f"step_{step:07d}"
        manifest: dict[str, Any] = json.loads((path / "config.json").read_text())
        assert manifest["config"]["model"]["use_ternary"] is is_ternary
        assert main(["complete", str(path), "--prompt", "def", "--max-tokens", "2", "--device", "cpu"]) == 0
    capsys.readouterr()
    export = ["export", str(steps / "step_0000005"), "--format", "gguf", "--out", str(tmp_path / "gguf")]
    assert main([*export, "--gguf-type", "TQ2_0"]) == 2
    error = capsys.readouterr().err
    assert "ternary_start_step" in error
    assert "--gguf-type F16" in error
    # Beyond its own step the first phase may still be made longer or shorter, the second has been learned.
    go_on = command(shards, tmp_path / "r", "--resume", "must", "--num-steps", "6")
    for step, code in ((4, 0), (6, 2)):
        folder = tmp_path / "r" / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"step_{step:07d}").symlink_to(steps / f"step_{step:07d}")
        assert main([*go_on, "--ternary-start-step", "4"]) == code
        for path in folder.iterdir():
            path.rename(tmp_path / f"{step}_{path.name}")
    assert "training.ternary_start_step = 4 (was 5)" in capsys.readouterr().err


def test_weights_of_another_run(runs: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ("--init-from", str(runs / "full"))
    assert main(command(shards, tmp_path / "r", *start, "--num-steps", "4")) == 0
    assert "use_ternary False -> True" in capsys.readouterr().out
    found = losses(tmp_path / "r")
    assert len(found) == 4
    assert found[0] < losses(runs / "phases")[0] - 0.3
    # In full precision the first loss is that of the weights themselves on the run's own first batch.
    assert main(command(shards, tmp_path / "same", *start, "--no-use-ternary", "--num-steps", "1")) == 0
    assert losses(tmp_path / "same")[0] < losses(runs / "full")[0] - 0.5
    # A resumed run has its own weights, even where the others are gone.
    gone = tmp_path / "gone"
    assert main(command(shards, gone, "--init-from", str(tmp_path / "same"), "--num-steps", "1")) == 0
    (tmp_path / "same").rename(tmp_path / "elsewhere")
    assert main(command(shards, gone, "--init-from", str(tmp_path / "same"), "--num-steps", "3")) == 0
    assert len(losses(gone)) == 3


def test_what_does_not_fit_is_named_in_one_line(
    runs: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.checkpoint(tmp_path / "other", tiny.model())
    records = write_records(tmp_path / "records.jsonl", 20)
    again = TokenizeOptions(records=(records,), out=tmp_path / "shards", vocab_size=500, val_fraction=0.2)
    for arguments, message in (
        (command(shards, tmp_path / "a", "--init-from", str(other)), "model.hidden_size = 64, this run 32"),
        (command(tokenize(again), tmp_path / "b", "--init-from", str(runs / "full")), "another tokenizer"),
        (command(shards, tmp_path / "c", "--init-from", str(tmp_path / "none")), "no such folder"),
        (command(shards, tmp_path / "d", "--ternary-start-step", "12"), "would never be ternary"),
        (command(shards, tmp_path / "e", "--no-use-ternary", *PHASES), "needs model.use_ternary = true"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "a" / "checkpoints").exists()


def test_rates_may_rise_again_after_the_switch() -> None:
    config = TrainingConfig(num_steps=100, warmup_steps=10, ternary_start_step=40, ternary_warmup_steps=4)
    for schedule in ("constant", "wsd", "cosine"):
        plain = TrainingConfig(num_steps=100, warmup_steps=10)
        shares = [lr_factor(schedule, s, 100, config) / lr_factor(schedule, s, 100, plain) for s in range(100)]
        assert shares == pytest.approx([1.0] * 40 + [0.25, 0.5, 0.75] + [1.0] * 57)


def test_a_step_decides_what_the_model_is() -> None:
    config = Config(training=TrainingConfig(ternary_start_step=5))
    assert [config.at_step(step).model.use_ternary for step in (0, 5, 6)] == [False, False, True]
    assert config.at_step(6) is config
    assert Config().at_step(0).model.use_ternary
    with pytest.raises(ConfigError, match="use_ternary"):
        Config(model=ModelConfig(use_ternary=False), training=TrainingConfig(ternary_start_step=5))
    assert "full precision" in progress_line({"step": 1, "is_ternary": 0.0})
    assert "| ternary" in progress_line({"step": 1, "is_ternary": 1.0})


def test_int8_gradients_need_ternary_layers_that_quantise_per_token() -> None:
    training = TrainingConfig(int8_gradients=True)
    for model in (ModelConfig(use_ternary=False), ModelConfig(activation_quant="none")):
        with pytest.raises(
            ConfigError, match=r"training\.int8_gradients needs ternary weights and activations quantised"
        ):
            Config(model=model, training=training)
    # Before it turns ternary, the model is trained as if it were off.
    config = Config(training=replace(training, ternary_start_step=5))
    assert not config.at_step(5).training.int8_gradients
    assert config.at_step(6).training.int8_gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kills"),
    [((), (3, 8)), (("--precision", "bf16", "--use-torch-compile"), (3,))],
    ids=["eager", "compiled"],
)
def test_killed_in_both_phases(shards: Path, tmp_path: Path, options: tuple[str, ...], kills: tuple[int, ...]) -> None:
    """Also through the compiler, which compiles the blocks again at the switch."""
    run, whole = tmp_path / "r", tmp_path / "whole"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "smelter", *command(shards, run, *PHASES, "--checkpoint-every", "2", *options)]
    subprocess.run([*start, "--run-dir", str(whole)], check=True, env=environment, capture_output=True)
    for kill_at in kills:
        process = subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step ") and line[5].isdigit() and int(line.split("/")[0].split()[1]) >= kill_at:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(start, check=True, env=environment, capture_output=True)
    assert losses(run) == losses(whole)
    assert losses(run)[-1] < losses(run)[0] - 0.3
