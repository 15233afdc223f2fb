"""Checkpoints are whole or absent, whatever happens while they are written, and damage is named."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from tokenizers import Tokenizer

from smelter.base.errors import CheckpointError, ConfigError
from smelter.run.checkpoint import (
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    write_tensors,
)
from tests.run.saving import CONFIG, names, one_line, rewrite, save, some_tensors, write_tokenizer


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer.json")


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path, tokenizer_file: Path) -> None:
    tensors = some_tensors()
    state = {"python": random.Random(1).getstate(), "nested": [{"a": (1, 2.5, None, "x", True)}], "t": torch.arange(5)}
    path = save(tmp_path, 7, tokenizer_file, tensors=tensors, state=state)
    assert path == tmp_path / "checkpoints" / "step_0000007"
    loaded = load_checkpoint(path, with_state=True)
    assert (loaded.path, loaded.step, loaded.config) == (path, 7, CONFIG)
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor), name
    assert loaded.state is not None
    assert torch.equal(loaded.state.pop("t"), torch.arange(5))
    del state["t"]
    assert loaded.state == state
    assert load_checkpoint(path, with_state=False).state is None
    # Other programs read the files as they are.
    with safetensors.safe_open(path / "model.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("transposed"), tensors["transposed"].numpy())
    assert Tokenizer.from_file(str(loaded.tokenizer_file)).get_vocab() == {"a": 0, "b": 1}


def test_a_resumed_optimizer_takes_the_same_step(tmp_path: Path, tokenizer_file: Path) -> None:
    def step(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (weight * torch.randn_like(weight)).square().sum().backward()
        optimizer.step()

    torch.manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.95))
    step(weight, optimizer)
    state = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    save(tmp_path, 1, tokenizer_file, tensors={"weight": weight}, state=state)
    step(weight, optimizer)

    loaded = load_checkpoint(tmp_path, with_state=True)
    assert loaded.state is not None
    other = torch.nn.Parameter(loaded.tensors["weight"])
    resumed = torch.optim.AdamW([other], lr=0.5)
    resumed.load_state_dict(loaded.state["optimizer"])
    torch.set_rng_state(loaded.state["rng"])
    step(other, resumed)
    assert torch.equal(other, weight)


def test_state_that_could_not_be_loaded_is_refused_when_saved(tmp_path: Path, tokenizer_file: Path) -> None:
    with pytest.raises(TypeError, match=r"state\.rng\[1\] is a ndarray"):
        save(tmp_path, 1, tokenizer_file, state={"rng": ["MT19937", np.zeros(3)]})
    assert latest_checkpoint(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path: Path, tokenizer_file: Path) -> None:
    for step in (1, 2, 30, 4):
        save(tmp_path, step, tokenizer_file, keep=2)
    # Step 30 is newer than step 4 and none of its business.
    assert names(tmp_path) == ["step_0000002", "step_0000004", "step_0000030"]
    save(tmp_path, 31, tokenizer_file, keep=1)
    assert names(tmp_path) == ["step_0000031"]
    for step in (32, 33, 34):
        save(tmp_path, step, tokenizer_file, keep=0)
    assert len(names(tmp_path)) == 4


def test_saving_a_step_again_replaces_it(tmp_path: Path, tokenizer_file: Path) -> None:
    save(tmp_path, 5, tokenizer_file)
    save(tmp_path, 5, tokenizer_file, tensors={"new": torch.ones(2)})
    assert list(load_checkpoint(tmp_path, with_state=True).tensors) == ["new"]
    assert names(tmp_path) == ["step_0000005"]


def test_leftovers_of_a_killed_save_go_with_the_next(tmp_path: Path, tokenizer_file: Path) -> None:
    leftover = tmp_path / "checkpoints" / ".tmp_step_0000009" / "state"
    leftover.mkdir(parents=True)
    (leftover / "state.pt").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, 10, tokenizer_file)
    assert names(tmp_path) == ["step_0000010"]


def test_everything_is_on_disk_before_the_rename(tmp_path: Path, tokenizer_file: Path, disk_events: list[str]) -> None:
    save(tmp_path / "runs" / "new", 1, tokenizer_file)
    place = disk_events.index("-> step_0000001")
    files = {"model.safetensors", "tokenizer.json", "state.pt", "config.json", "state", ".tmp_step_0000001"}
    above = {tmp_path.name, "runs", "new"}  # where the names of new folders stand
    assert set(disk_events[:place]) == {*files, *above, "~", "-> config.json"}
    assert disk_events[place + 1 :] == ["checkpoints"]


@pytest.mark.parametrize("failing_call", range(1, 10))
def test_a_save_that_fails_anywhere_leaves_the_previous_one(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    save(tmp_path, 1, tokenizer_file, keep=1)
    fsync, calls = os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CheckpointError, match="Input/output error") as error:
        save(tmp_path, 2, tokenizer_file, keep=1)
    assert "step_0000002" in one_line(error)
    # The last call comes after the rename: then the new one is there as well, and both are whole.
    assert names(tmp_path) == ["step_0000001"] + ["step_0000002"] * (failing_call == 9)
    for name in names(tmp_path):
        load_checkpoint(tmp_path / "checkpoints" / name, with_state=True)


KILLED = """
import sys
from pathlib import Path
import torch
from smelter.run.checkpoint import save_checkpoint
from smelter.config import preset
run, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
for step in range(1, 10**6):
    tensors = {"w": torch.full((512, 1024), float(step))}
    save_checkpoint(run, step, config=preset("tiny"), tensors=tensors, tokenizer_file=tokenizer,
                    state={"moment": tensors["w"] * 2, "step": step}, keep=1)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path: Path, tokenizer_file: Path) -> None:
    rng = random.Random(0)
    for attempt in range(4):
        run = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(run), str(tokenizer_file)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        announced = [1, *map(int, process.stdout.read().split())][-1]
        process.stdout.close()
        process.wait()
        loaded = load_checkpoint(run, with_state=True)
        assert loaded.step >= announced
        assert loaded.state is not None
        assert (loaded.tensors["w"] == loaded.step).all()
        assert (loaded.state["moment"] == 2 * loaded.step).all()


@pytest.mark.parametrize("large", ["model", "state"])
def test_a_full_disk_costs_nothing_but_the_new_checkpoint(small_disk: Path, tokenizer_file: Path, large: str) -> None:
    save(small_disk, 1, tokenizer_file)
    heavy = {"heavy": torch.zeros(3 * 2**18)}
    with pytest.raises(CheckpointError, match="No space left on device: it needs 3") as error:
        save(small_disk, 2, tokenizer_file, **({"tensors": heavy} if large == "model" else {"state": heavy}))
    message = one_line(error)
    assert str(small_disk / "checkpoints" / "step_0000002") in message
    assert "MB are free" in message
    assert names(small_disk) == ["step_0000001"]
    load_checkpoint(small_disk, with_state=True)
    save(small_disk, 3, tokenizer_file)  # and what was half written no longer takes room


@pytest.mark.parametrize("large", ["model", "state"])
def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path: Path, tokenizer_file: Path, large: str) -> None:
    heavy = {"heavy": torch.zeros(2**20)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large") as error:
            save(tmp_path, 2, tokenizer_file, **({"tensors": heavy} if large == "model" else {"state": heavy}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "it needs 4" in one_line(error)
    assert names(tmp_path) == []


FILES = ["model.safetensors", "config.json", "tokenizer.json", "state/state.pt"]


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_with_the_way_out(tmp_path: Path, tokenizer_file: Path, name: str, how: str) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, tokenizer_file)
    first, second, third = (tmp_path / "checkpoints" / f"step_000000{step}" for step in (1, 2, 3))
    damage(second / "model.safetensors", "flipped")
    damage(third / name, how)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path, with_state=True)
    message = one_line(error)
    assert message.startswith(str(third / name))
    # The second is damaged too, so the first is the one to go on from.
    assert f"remove {third} to go on from {first}" in message
    # Nor does a later one count as previous.
    damage(first / "model.safetensors", "truncated")
    save(tmp_path, 4, tokenizer_file)
    for path in (first, third):
        with pytest.raises(CheckpointError, match="copy the checkpoint again"):
            load_checkpoint(path, with_state=True)


def test_weights_load_without_the_training_state(tmp_path: Path, tokenizer_file: Path) -> None:
    path = save(tmp_path, 1, tokenizer_file)
    shutil.rmtree(path / "state")
    assert load_checkpoint(path, with_state=False).step == 1
    with pytest.raises(CheckpointError, match=r"state\.pt is missing"):
        load_checkpoint(path, with_state=True)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": "other"}, "not a Smelter checkpoint"),
        ({"format_version": 99}, "format version 99"),
        ({"step": "7"}, "no valid 'step'"),
        ({"files": {"model.safetensors": 1}}, "no valid 'files'"),
        ({"config": {"model": {"hidden_sise": 1}}}, "did you mean 'hidden_size'"),
    ],
)
def test_a_foreign_manifest_is_refused(
    tmp_path: Path, tokenizer_file: Path, change: dict[str, Any], expected: str
) -> None:
    path = save(tmp_path, 1, tokenizer_file)
    manifest = json.loads((path / "config.json").read_text())
    rewrite(path / "config.json", manifest | change)
    with pytest.raises((CheckpointError, ConfigError), match=expected) as error:
        load_checkpoint(path, with_state=False)
    assert str(path / "config.json") in one_line(error)


def test_every_flipped_bit_of_the_manifest_is_noticed(tmp_path: Path, tokenizer_file: Path) -> None:
    """But for those that leave what it says as it is, which are few."""
    path = save(tmp_path, 4, tokenizer_file)
    file = path / "config.json"
    content, silent = file.read_bytes(), 0
    whole = load_checkpoint(path, with_state=False)
    for place in range(0, len(content), 5):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 7  # no bit that makes it other than ASCII
        file.write_bytes(flipped)
        with contextlib.suppress(CheckpointError):
            loaded = load_checkpoint(path, with_state=False)
            assert (loaded.step, loaded.config) == (whole.step, whole.config)
            silent += 1
    assert silent < 10


def test_a_digit_of_the_manifest_is_no_other_model(tmp_path: Path, tokenizer_file: Path) -> None:
    for step in (4, 12):
        save(tmp_path, step, tokenizer_file)
    file = tmp_path / "checkpoints" / "step_0000012" / "config.json"
    text = file.read_text()
    for old, new in (('"final_logit_soft_cap": 30.0', '"final_logit_soft_cap": 70.0'), ('"step": 12', '"step": 13')):
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(CheckpointError, match="is damaged") as error:
            load_checkpoint(tmp_path, with_state=True)
        assert f"to go on from {tmp_path / 'checkpoints' / 'step_0000004'}" in one_line(error)


def test_checkpoints_of_older_versions_load(tmp_path: Path, tokenizer_file: Path) -> None:
    path = save(tmp_path, 4, tokenizer_file)
    rewrite(path / "config.json", json.loads((path / "config.json").read_text()))
    assert load_checkpoint(path, with_state=True).step == 4


def test_finding_a_checkpoint(tmp_path: Path, tokenizer_file: Path) -> None:
    run = tmp_path / "run"
    for step in (9_999_999, 10_000_000):
        save(run, step, tokenizer_file)
    newest = run / "checkpoints" / "step_10000000"
    assert latest_checkpoint(run) == newest
    assert [find_checkpoint(path) for path in (run, run / "checkpoints", newest)] == [newest] * 3
    older = newest.with_name("step_9999999")
    assert find_checkpoint(older) == older
    copied = newest.rename(tmp_path / "my model")
    assert load_checkpoint(copied, with_state=True).step == 10_000_000
    (tmp_path / "empty").mkdir()
    for path, expected in ((tmp_path / "empty", "no checkpoint here"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(CheckpointError, match=expected) as error:
            find_checkpoint(path)
        assert str(path) in one_line(error)


def test_tensors_are_written_like_any_file(small_disk: Path) -> None:
    (small_disk / "any").touch()
    write_tensors(small_disk / "t.safetensors", {"a": torch.ones(2)})
    modes = {path.stat().st_mode for path in small_disk.iterdir()}
    assert len(modes) == 1
    assert torch.equal(safetensors.torch.load_file(small_disk / "t.safetensors")["a"], torch.ones(2))
    with pytest.raises(OSError, match=f"No space left on device: '{small_disk}/large'"):
        write_tensors(small_disk / "large", {"a": torch.ones(2**20)})
