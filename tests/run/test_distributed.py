"""One process is one process, whatever a scheduler has put into the environment."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from smelter.__main__ import main
from smelter.base.errors import ConfigError
from smelter.run import distributed

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def announce(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"RANK": "0", "MASTER_ADDR": "localhost"},
        {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    ],
)
def test_one_process_needs_no_group(values: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, **values)
    distributed.start(torch.device("cpu"))
    assert not dist.is_initialized()
    assert (distributed.world_size(), distributed.rank(), distributed.local_rank()) == (1, 0, 0)
    assert distributed.is_main()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment, but no RANK and no MASTER_ADDR and no MASTER_PORT"),
        ({"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "a"}, "but no MASTER_PORT: start with `torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment: must be a number"),
        ({"WORLD_SIZE": "1", "RANK": "-1"}, "RANK=-1 in the environment: must be a number"),
    ],
)
def test_a_part_of_what_several_need_is_named(
    values: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(monkeypatch, **values)
    with pytest.raises(ConfigError, match=words):
        distributed.start(torch.device("cpu"))
    assert not dist.is_initialized()


def test_the_gpu_of_a_rank_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, LOCAL_RANK="first")
    with pytest.raises(ConfigError, match="LOCAL_RANK=first"):
        distributed.local_rank()


def test_the_command_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    announce(monkeypatch, WORLD_SIZE="2")
    command = ["train", "--preset", "tiny", "--device", "cpu", "--precision", "fp32", "--run-dir", str(tmp_path / "r")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "WORLD_SIZE=2 in the environment" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r").exists()
    announce(monkeypatch, WORLD_SIZE="1")
    assert main([*command, "--dry-run"]) == 0
