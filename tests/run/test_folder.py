"""A run folder is known again, holds nothing that was not written by a run, and a copy of it is a run of its own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smelter.base.errors import CheckpointError, ConfigError
from smelter.config import Config, config_to_dict, load_config
from smelter.run import folder
from smelter.run.folder import MAY_DIFFER, in_place, prepare_run_dir
from tests.run.saving import CONFIG, names, one_line, rewrite, save, write_tokenizer


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "made_tokenizer.json")


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
        rewrite(path / "config.json", changed)
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
    rewrite(path / "config.json", manifest)
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
    monkeypatch.setattr(folder, "is_main", lambda: False)
    assert prepare_run_dir(tmp_path / "run", CONFIG, "auto") is None
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- copies


def with_run_dir(run_dir: Path) -> Config:
    return replace(CONFIG, training=replace(CONFIG.training, run_dir=str(run_dir)))


def test_a_configuration_in_a_run_folder_means_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run_dir in (Path("runs/a"), tmp_path / "runs" / "a"):
        shutil.rmtree("runs", ignore_errors=True)
        prepare_run_dir(run_dir, with_run_dir(run_dir), "auto")
        shutil.copytree("runs/a", "runs/b")
        for name, meant in (("a", str(run_dir)), ("b", "runs/b")):
            recipe = Path("runs") / name / "config.toml"
            assert in_place(load_config(recipe), recipe).training.run_dir == meant
    monkeypatch.chdir(tmp_path / "runs" / "b")
    assert in_place(load_config(Path("config.toml")), Path("config.toml")) == with_run_dir(tmp_path / "runs" / "b")
    shutil.copy("config.toml", tmp_path / "config.toml")  # a recipe like any other: no run is there
    assert in_place(load_config(tmp_path / "config.toml"), tmp_path / "config.toml") == with_run_dir(run_dir)


@pytest.mark.parametrize(("how", "keeps"), [(shutil.copytree, False), (shutil.move, True)])
def test_a_copy_has_a_curve_of_its_own_and_a_moved_run_keeps_its_own(tmp_path: Path, how: Any, keeps: bool) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    prepare_run_dir(first, with_run_dir(first), "auto")
    (first / "wandb_id.txt").write_text("1234")
    prepare_run_dir(first, with_run_dir(first), "auto")
    how(first, second)
    for _ in range(2):
        prepare_run_dir(second, with_run_dir(second), "auto")
        assert (second / "wandb_id.txt").exists() == keeps
    assert (first / "wandb_id.txt").exists() != keeps
    if not keeps:  # the copy's tracker has begun
        (second / "wandb_id.txt").write_text("5678")
        prepare_run_dir(second, with_run_dir(second), "auto")
        assert (second / "wandb_id.txt").read_text() == "5678"
