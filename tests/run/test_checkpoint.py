"""Checkpoints are whole or absent, whatever happens while they are written, and damage is named."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from tokenizers import Tokenizer, models

from smelter.base.errors import CheckpointError, ConfigError
from smelter.config import Config, config_to_dict, load_config, preset
from smelter.run import checkpoint
from smelter.run.checkpoint import (
    MAY_DIFFER,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    prepare_run_dir,
    save_checkpoint,
    write_tensors,
)

CONFIG = preset("tiny")


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).save(str(path))
    return path


def some_tensors(seed: int = 0, size: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator)
    return {
        "embed_tokens.weight": weight,
        "transposed": weight.t(),
        "half": weight.half(),
        "bf16": weight.bfloat16(),
        "trits": torch.randint(-1, 2, (size,), dtype=torch.int8, generator=generator),
    }


def save(run: Path, step: int, tokenizer_file: Path, **changes: Any) -> Path:
    given: dict[str, Any] = {
        "config": CONFIG,
        "tensors": some_tensors(step),
        "tokenizer_file": tokenizer_file,
        "state": {"step": step, "rng": torch.get_rng_state()},
        "keep": 0,
    }
    return save_checkpoint(run, step, **(given | changes))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


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
    (path / "config.json").write_text(json.dumps(manifest | change))
    with pytest.raises((CheckpointError, ConfigError), match=expected) as error:
        load_checkpoint(path, with_state=False)
    assert str(path / "config.json") in one_line(error)


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


def test_a_new_run_folder_explains_itself(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "new"
    assert prepare_run_dir(run, CONFIG, "auto") is None
    assert load_config(run / "config.toml") == CONFIG
    assert sorted(path.name for path in run.iterdir()) == ["README.md", "config.toml"]
    assert str(tmp_path) not in (run / "README.md").read_text(), "the folder may be copied"


@pytest.mark.parametrize("name", ["README.md", "config.toml", "metrics.jsonl", "samples.jsonl", "checkpoints/mine"])
def test_what_no_run_wrote_is_not_replaced(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("# A guide to 'A training run of Smelter'\n")
    with pytest.raises(ConfigError, match=f"{name.partition('/')[0]}: no training run wrote this: move it") as error:
        prepare_run_dir(Path(), CONFIG, "auto")
    one_line(error)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert Path(name).read_text() == "# A guide to 'A training run of Smelter'\n"


def test_other_files_may_lie_in_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    prepare_run_dir(tmp_path, CONFIG, "auto")
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_a_readme_that_somebody_went_on_with_stays(tmp_path: Path, tokenizer_file: Path) -> None:
    prepare_run_dir(tmp_path, CONFIG, "auto")
    text = (tmp_path / "README.md").read_text() + "\nThe one with the larger vocabulary.\n"
    (tmp_path / "README.md").write_text(text)
    prepare_run_dir(tmp_path, CONFIG, "auto")
    assert (tmp_path / "README.md").read_text() == text
    save(tmp_path, 1, tokenizer_file)
    (tmp_path / "README.md").write_text("My own words.\n")
    prepare_run_dir(tmp_path, CONFIG, "auto")
    assert (tmp_path / "README.md").read_text() == "My own words.\n"


def test_a_run_folder_of_an_older_version_is_known(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# default\n\nA training run of Smelter 0.1.0. This folder can be moved\n")
    (tmp_path / "config.toml").write_text("")
    (tmp_path / "metrics.jsonl").touch()
    prepare_run_dir(tmp_path, CONFIG, "auto")
    assert load_config(tmp_path / "config.toml") == CONFIG


def test_a_new_run_folder_survives_a_power_cut(tmp_path: Path, disk_events: list[str]) -> None:
    prepare_run_dir(tmp_path / "runs" / "new", CONFIG, "auto")
    assert {tmp_path.name, "runs"} <= set(disk_events[: disk_events.index("-> config.toml")])
    assert disk_events[-1] == "new"


def test_tensors_are_written_like_any_file(small_disk: Path) -> None:
    (small_disk / "any").touch()
    write_tensors(small_disk / "t.safetensors", {"a": torch.ones(2)})
    modes = {path.stat().st_mode for path in small_disk.iterdir()}
    assert len(modes) == 1
    assert torch.equal(safetensors.torch.load_file(small_disk / "t.safetensors")["a"], torch.ones(2))
    with pytest.raises(OSError, match=f"No space left on device: '{small_disk}/large'"):
        write_tensors(small_disk / "large", {"a": torch.ones(2**20)})


def test_resume_must_and_never(tmp_path: Path, tokenizer_file: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from") as error:
        prepare_run_dir(tmp_path, CONFIG, "must")
    assert str(tmp_path) in one_line(error)
    assert not (tmp_path / "config.toml").exists()
    assert prepare_run_dir(tmp_path, CONFIG, "never") is None
    path = save(tmp_path, 3, tokenizer_file)
    assert prepare_run_dir(tmp_path, CONFIG, "auto") == path
    assert prepare_run_dir(tmp_path, CONFIG, "must") == path
    with pytest.raises(CheckpointError, match="--resume auto to go on, or another --run-dir") as error:
        prepare_run_dir(tmp_path, CONFIG, "never")
    one_line(error)
    assert names(tmp_path) == ["step_0000003"]


def flat_keys() -> list[str]:
    return [f"{section}.{key}" for section, table in config_to_dict(CONFIG).items() for key in table]


def test_keys_that_may_differ_exist() -> None:
    assert set(flat_keys()) >= MAY_DIFFER


def test_resuming_with_another_configuration(tmp_path: Path, tokenizer_file: Path) -> None:
    path = save(tmp_path, 3, tokenizer_file)
    manifest = json.loads((path / "config.json").read_text())
    for dotted in flat_keys():
        section, key = dotted.split(".")
        changed = json.loads(json.dumps(manifest))
        changed["config"][section][key] = "something else"
        (path / "config.json").write_text(json.dumps(changed))
        if dotted in MAY_DIFFER:
            assert prepare_run_dir(tmp_path, CONFIG, "auto") == path
        else:
            with pytest.raises(ConfigError) as error:
                prepare_run_dir(tmp_path, CONFIG, "auto")
            message = one_line(error)
            assert f"{dotted} = " in message
            assert "(was 'something else')" in message


def test_keys_that_are_newer_than_the_checkpoint(tmp_path: Path, tokenizer_file: Path) -> None:
    path = save(tmp_path, 3, tokenizer_file)
    manifest = json.loads((path / "config.json").read_text())
    del manifest["config"]["distillation"]["cached"]
    (path / "config.json").write_text(json.dumps(manifest))
    assert prepare_run_dir(tmp_path, CONFIG, "must") == path
    other = replace(CONFIG, distillation=replace(CONFIG.distillation, cached=("c",)))
    with pytest.raises(ConfigError, match=r"distillation\.cached = \['c'\] \(was \[\]\)"):
        prepare_run_dir(tmp_path, other, "must")


def test_a_longer_run_resumes_and_saves_its_configuration(tmp_path: Path, tokenizer_file: Path) -> None:
    path = save(tmp_path, 3, tokenizer_file)
    longer = replace(CONFIG, training=replace(CONFIG.training, num_steps=9_000, keep_checkpoints=5))
    assert prepare_run_dir(tmp_path, longer, "must") == path
    assert load_config(tmp_path / "config.toml") == longer
    other = Config(model=replace(CONFIG.model, hidden_size=512), data=CONFIG.data, training=CONFIG.training)
    with pytest.raises(ConfigError, match=r"model\.hidden_size = 512 \(was 256\)"):
        prepare_run_dir(tmp_path, other, "must")
    assert load_config(tmp_path / "config.toml") == longer


def test_only_the_main_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "is_main", lambda: False)
    assert prepare_run_dir(tmp_path / "run", CONFIG, "auto") is None
    assert not (tmp_path / "run").exists()
