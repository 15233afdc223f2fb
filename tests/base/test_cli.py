"""The command line as a person meets it: one line to stderr, exit code 2, never a traceback."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import tyro

from smelter import __version__
from smelter.__main__ import COMMANDS, main
from smelter.base import cli
from smelter.base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def smelter(*argv: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "smelter", *argv],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The single line of a refusal."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


# --- as a process ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["smelter trian: error", "'trian'", "'train'"]),
        (["xyzzy"], ["'xyzzy'", "train", "tokenize", "export"]),
        (["train", "nowhere.toml"], ["smelter train: error", "nowhere.toml", "cannot read the recipe", "path"]),
    ],
)
def test_mistakes_are_one_line_and_exit_2(argv: list[str], words: list[str], tmp_path: Path) -> None:
    line = refused(smelter(*argv, cwd=tmp_path))
    for word in words:
        assert word in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("locale", [{"COLUMNS": "40"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_neither_a_narrow_nor_an_ascii_terminal_mangles_the_line(locale: dict[str, str], tmp_path: Path) -> None:
    program = """
from smelter.base import cli
from smelter import config
try:
    cli.parse(config.Config, ["--num-kv-heads", "5"], "smelter train")
except cli.UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **locale},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.stdout == (
        "num_kv_heads = 5 does not divide num_heads = 12: "
        "choose one of [1, 2, 3, 4, 6, 12] (see smelter train --help)\n"
    )


def test_no_command_shows_the_usage_and_fails(tmp_path: Path) -> None:
    done = smelter(cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.startswith("usage: smelter COMMAND")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argv", ["smelter --help", "smelter --version", "smelter report --help", "foundry --help"])
def test_a_closed_pipe_is_no_accident(argv: str, unbuffered: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", *argv.split()],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141


# --- in this process -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_explains_itself_and_refuses_strangers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: smelter {name}" in capsys.readouterr().out
    assert main([name, "--no-such-option-anywhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"smelter {name}: error: ")
    assert line.endswith(f"(see smelter {name} --help)")


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert f"  {name} " in shown
        assert text in shown
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"smelter {__version__}\n"


class Raises:
    """Stands in for a command's module."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def main(self, argv: list[str]) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a.toml:3: two\n  lines"), 2, "smelter train: error: a.toml:3: two lines"),
        (
            PermissionError(13, "Permission denied", "x\n.bin"),
            2,
            "smelter train: error: x .bin: Permission denied: check the path, its permissions and the free disk space",
        ),
        (KeyboardInterrupt(), 130, "smelter: interrupted"),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: Raises(error))
    assert main(["train"]) == code
    assert capsys.readouterr().err == f"{line}\n"


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: Raises(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        main(["train"])


# --- the parser ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    """Numbers."""

    learning_rate: float = 0.5
    """How fast."""
    num_steps: int = 3
    """How far."""

    def __post_init__(self) -> None:
        if self.num_steps < 0:
            raise UserError(f"inner.num_steps = {self.num_steps}: must not be negative: choose a number from 0 up")


@dataclass(frozen=True)
class Options:
    """An example of a command."""

    source: tyro.conf.Positional[Path]
    """Where from."""
    out: Path
    """Where to."""
    format: Literal["hf", "gguf"] = "hf"
    """Kind of file."""
    use_mask: bool = True
    """Whether to hide."""
    inner: Inner = field(default_factory=Inner)


def test_options_parse_with_dashes_or_underscores() -> None:
    parsed = cli.parse(
        Options, ["a", "--out", "o", "--learning-rate", "2", "--num_steps=9", "--no-use-mask"], "smelter x"
    )
    assert parsed == Options(Path("a"), Path("o"), "hf", False, Inner(2.0, 9))


def test_a_default_is_what_the_command_line_is_laid_over() -> None:
    default = Options(Path("b"), Path("o"), "gguf", inner=Inner(num_steps=8))
    parsed = cli.parse(Options, ["c", "--learning-rate", "2"], "smelter x", default)
    assert parsed == Options(Path("c"), Path("o"), "gguf", inner=Inner(2.0, 8))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Missing from smelter x: PATH, --out PATH"),
        (["a", "--out", "o", "--num-steps"], "Missing value for argument '--num-steps'. Expected 1 values."),
        (
            ["a", "--out", "o", "--num-steps", "x"],
            "Error parsing --num-steps: invalid literal for int() with base 10: 'x'",
        ),
        (
            ["a", "--out", "o", "--num-steps=x"],
            "Error parsing --num-steps: invalid literal for int() with base 10: 'x'",
        ),
        (
            ["a", "--out", "o", "--num-steps", "-1"],
            "inner.num_steps = -1: must not be negative: choose a number from 0 up",
        ),
        (
            ["a", "--out", "o", "--format", "onnx"],
            "invalid choice 'onnx' for argument '--format'. Expected one of ('hf', 'gguf').",
        ),
        (
            ["a", "--out", "o", "--lerning-rate", "3"],
            "Unrecognized options: --lerning-rate, 3: did you mean --learning-rate?",
        ),
        (["a", "--out", "o", "--qqq", "3"], "Unrecognized options: --qqq, 3"),
        (["a", "--out", "o", "b"], "Unrecognized options: b"),
    ],
)
@pytest.mark.parametrize("columns", [None, "30"])
def test_every_parser_error_is_one_line(
    argv: list[str], message: str, columns: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(UserError) as error:
        cli.parse(Options, argv, "smelter x")
    assert str(error.value) == f"{message} (see smelter x --help)"
    assert os.environ.get("COLUMNS") == columns


def test_each_of_two_wrong_options_has_its_suggestion() -> None:
    with pytest.raises(UserError) as error:
        cli.parse(Options, ["a", "--out", "o", "--lerning-rate", "3", "--num-stps", "4"], "smelter x")
    hint = str(error.value).partition("did you mean ")[2].partition("?")[0]
    assert set(hint.split(" and ")) == {"--learning-rate", "--num-steps"}
