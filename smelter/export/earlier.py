"""What earlier exports wrote into a folder: that may be replaced, and nothing else.

`export.json` keeps the SHA-256 of every file that an export wrote beside it, those of an earlier one that are still
there too. A file that it does not name, or that was changed since, is somebody's own.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from smelter.base import UserError, file_sha256

REPORT = "export.json"

FIRST = {
    "all": ("README.md", REPORT),
    "hf": ("README.md", "config.json", REPORT),
    "gguf": ("Modelfile", REPORT),
    "packed": ("config.json", REPORT),
}
"""Names that each format takes, of those that others use too: looked at before the work begins."""


def still_there(folder: Path) -> dict[str, str]:
    """SHA-256 of the files in `folder` that exports wrote and nobody changed, by name."""
    digests = {}
    for name, trace in _traces(folder).items():
        path = folder / name
        if path.is_file() and (isinstance(trace, str) or trace in (None, path.stat().st_size)):
            digest = file_sha256(path)
            if trace == digest or not isinstance(trace, str):
                digests[name] = digest
    return digests


def _traces(folder: Path) -> dict[str, str | int | None]:
    """What export.json knows of each file: its SHA-256; in one of an older version its size, or nothing."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        if report["format"] not in FIRST:
            return {}
        if "sha256" in report:
            return {REPORT: None, **report["sha256"]}
        return {REPORT: None, **report.get("files", {"README.md": None})}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def check_ours(paths: Iterable[Path]) -> None:
    """UserError for the first of the paths that is there and was not written by an earlier export, as it is now."""
    ours: dict[Path, dict[str, str]] = {}
    for path in paths:
        if not path.exists():
            continue
        if path.parent not in ours:
            ours[path.parent] = still_there(path.parent)
        if path.name not in ours[path.parent]:
            raise UserError(
                f"{path}: no export wrote this, or it was changed since: move it, give another --out, or --force to "
                f"overwrite it"
            )
