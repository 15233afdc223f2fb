"""The documentation: builds as a site without network, its links lead somewhere, its commands know their options."""

import contextlib
import importlib
import io
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", *PAGES]
COMMAND = re.compile(r"^\s{4,}(?:\$ )?(smelter|foundry) +([a-z]+)\b(.*)$", re.MULTILINE)
ELSEWHERE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^"'> ]+""")


@lru_cache(maxsize=32)
def help_of(program: str, command: str) -> str:
    main = importlib.import_module(f"{program}.__main__").main
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        assert main([command, "--help"]) == 0, f"{program} {command}"
    return out.getvalue()


def commands(path: Path) -> list[tuple[str, str, str]]:
    """(program, command, the rest of the line) of every command in a code block."""
    return [match.groups() for match in COMMAND.finditer(path.read_text(encoding="utf-8"))]  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_commands_know_the_options_that_pages_give_them(path: Path) -> None:
    for program, command, rest in commands(path):
        known = help_of(program, command)
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", rest.split(" #")[0]):
            if option != "--any-option":
                assert re.search(rf"{option}\b", known), f"{path.name}: {program} {command} has no {option}"


def test_there_are_commands_to_check() -> None:
    assert sum(len(commands(path)) for path in TEXTS) > 30


def test_every_page_is_in_the_navigation() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = [entry if isinstance(entry, str) else next(iter(entry.values())) for entry in navigation]
    assert sorted(named) == [page.name for page in PAGES]


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) == len(PAGES) + 1  # and one for what is not found
    for page in pages:
        found = [each for each in ELSEWHERE.findall(page.read_text(encoding="utf-8")) if 'rel="canonical"' not in each]
        assert not found, f"{page.name}: {found}"
