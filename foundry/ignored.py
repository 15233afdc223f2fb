"""What the owners of a source tree keep out of version control, by its `.gitignore` files.

Read by pathspec, not by asking git: git runs programs that a tree's own configuration names, and not every tree with
such a file is a repository. As in git: a file deeper down overrules those above it, nothing below an ignored folder
comes back, `.git/info/exclude` counts too, and so do the files above the tree up to the top of its repository. Other
than there: a file that is ignored and tracked all the same is left out, and a person's own list for all repositories
(core.excludesFile) is not read, so that two machines make the same records.
"""

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pathspec import GitIgnoreSpec, RegexPattern

from smelter.base import DataError

_NAME = ".gitignore"
_FOLDER_END = "ps_d"
"""pathspec's name for the place in a path where a folder that a pattern matches ends."""

_Rules = tuple[PurePosixPath, list[RegexPattern]]
"""A folder, and the patterns about what is in it."""


class Ignored:
    """Judges the entries of one tree, from the top down: ask of a folder before what is in it."""

    def __init__(self, root: Path) -> None:
        self._rules: dict[PurePosixPath, list[_Rules]] = {}
        """Folder -> what counts in it, the deepest first."""
        self._root = root.resolve()
        above = [self._root, *self._root.parents]
        top = next((number for number, folder in enumerate(above) if (folder / ".git").exists()), None)
        self._outer: list[_Rules] = []
        if top is None:
            return
        for folder in reversed(above[1 : top + 1]):
            self._outer = _read(folder / _NAME, PurePosixPath(folder)) + self._outer
        self._outer += _read(above[top] / ".git/info/exclude", PurePosixPath(above[top]))
        # A folder that a person names is meant, whatever is said of it.
        if any(_judge(self._outer, PurePosixPath(folder), is_folder=True) for folder in above[:top]):
            self._outer = []

    def in_folder(self, below: PurePosixPath) -> Callable[[str, bool], bool]:
        """For a folder of the tree: what says of a name in it, and whether that is a folder, if it is ignored.

        Raises DataError for rules that cannot be read.
        """
        folder = PurePosixPath(self._root, below)
        outer = self._outer if folder == PurePosixPath(self._root) else self._rules[folder.parent]
        rules = self._rules[folder] = _read(Path(folder, _NAME), folder) + outer
        return lambda name, is_folder: bool(rules) and _judge(rules, folder / name, is_folder=is_folder)


def _judge(rules: list[_Rules], path: PurePosixPath, *, is_folder: bool) -> bool:
    """Whether the last pattern that matches `path` says that it is ignored."""
    for folder, patterns in rules:
        if folder not in path.parents:
            continue
        name = str(path.relative_to(folder))
        for pattern in reversed(patterns):
            if _matches(pattern, name, is_folder=is_folder):
                return bool(pattern.include)
    return False


def _matches(pattern: RegexPattern, name: str, *, is_folder: bool) -> bool:
    """Whether a pattern is about this very entry, and not only about a folder that it is in.

    pathspec matches what is below a folder together with it, so `!docs/` would bring back what is ignored in `docs`.
    Its expressions mark where the folder ends.
    """
    assert pattern.regex is not None
    if _FOLDER_END not in pattern.regex.groupindex:  # `*` and `docs/**`: whatever its depth
        return bool(pattern.regex.match(name))
    name = f"{name}/" if is_folder else name
    return any(match.end(_FOLDER_END) in (-1, len(name)) for match in pattern.regex.finditer(name))


def _read(file: Path, folder: PurePosixPath) -> list[_Rules]:
    """The rules of a file, which are about `folder`; none where there is no file."""
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape") if file.is_file() else ""
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}: it says what is to be left out, so make it readable") from None
    patterns: list[RegexPattern] = []
    for line in text.split("\n"):
        try:
            patterns += GitIgnoreSpec.from_lines([line.removesuffix("\r")]).patterns
        except (ValueError, re.error):  # as in git, where it matches nothing
            continue
    patterns = [pattern for pattern in patterns if pattern.include is not None]
    return [(folder, patterns)] if patterns else []
