"""Which files `.gitignore` names: as git itself says, in trees and with rules that chance makes."""

import os
import random
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from foundry.ignored import Ignored
from smelter.base import DataError

PATTERNS = (
    *("*", "!*/", "!*.py", "a/", "/a", "a", "a/b", "**/b", "b/**", "a/**/b", "build/", "!build/", "*.py", "!x.py"),
    *("/x.py", "x.*", "!a/", "foo/*", "!foo/a/", "!foo/", "k?log", "[xy].py", "[!x].py", "[^x].py", "\\!x.py", "x.py "),
    *("x.py\\ ", "#c", "/*", "!/a", "/a/*", "!/a/b", "**", "a/**", "!a/**", "*/x.py", "**/foo/**", "**/", "!", "a\\"),
    *("[", "[z-a]", "/", "!**/", "a//b", "./a", "***", "*a*", "foo/**", "!foo/x.py", "x.py\r"),
)
FOLDERS = ("a", "b", "build", "foo")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def kept(root: Path) -> list[str]:
    ignored, found = Ignored(root), []
    for folder, folders, names in os.walk(root):
        below = PurePosixPath(Path(folder).relative_to(root))
        is_ignored = ignored.in_folder(below)
        folders[:] = [name for name in folders if name != ".git" and not is_ignored(name, True)]
        found += [str(below / name) for name in names if not is_ignored(name, False)]
    return sorted(found)


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
@pytest.mark.parametrize("seed", range(40))
def test_as_git_says(seed: int, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "core.excludesFile=", "-c", "core.quotePath=false", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    chance = random.Random(seed)
    git("init", "--quiet")
    for _ in range(14):
        folder = tmp_path.joinpath(*chance.choices(FOLDERS, k=chance.randint(0, 3)))
        if not any(path.is_file() for path in (folder, *folder.parents)):
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / chance.choice(["x.py", "y.py", "k.log", "a", "b"])
            if not file.exists():
                file.touch()
    for folder in [path for path in tmp_path.rglob("*") if path.is_dir() and ".git" not in path.parts]:
        if chance.random() < 0.3:
            (folder / ".gitignore").write_text("\n".join(chance.choices(PATTERNS, k=chance.randint(1, 4))) + "\n")
    (tmp_path / ".gitignore").write_text("\n".join(chance.choices(PATTERNS, k=chance.randint(1, 4))))
    (tmp_path / ".git/info/exclude").write_text(chance.choice(PATTERNS))
    assert kept(tmp_path) == sorted(git("ls-files", "-z", "--others", "--exclude-standard").split("\0")[:-1])


def test_rules_above_a_tree_count_up_to_the_top_of_its_repository(tmp_path: Path) -> None:
    files = dict.fromkeys(("src/a.py", "src/private/b.py", "src/c.log", "out/d.py", "src/e.tmp"), "")
    write(tmp_path / "repository", files)
    write(tmp_path / "repository", {".git/info/exclude": "*.tmp\n", ".gitignore": "*.log\n/src/private/\n/out/\n"})
    (tmp_path / ".gitignore").write_text("*.py\n")  # of another repository, or of none
    assert kept(tmp_path / "repository/src") == ["a.py"]
    # A folder that a person names is meant.
    assert kept(tmp_path / "repository/out") == ["d.py"]
    shutil.rmtree(tmp_path / "repository/.git")
    assert kept(tmp_path / "repository/src") == ["a.py", "c.log", "e.tmp", "private/b.py"]
    assert kept(tmp_path / "repository") == [".gitignore", "src/a.py", "src/e.tmp"]


def test_rules_that_cannot_be_read_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {".gitignore": "a\n"})

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)  # root may read everything
    with pytest.raises(DataError, match=r"\.gitignore: Permission denied: it says what is to be left out"):
        kept(tmp_path)
