"""One thing to ask, and the user's own files of them.

A text file holds one prompt a line (blank lines are skipped). A prompt of several lines goes into a JSONL file:
{"prompt": ...} with "system", "language", "id", "source" and "license" where wanted.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smelter.base import UserError, content_id, nearest

KEYS = ("prompt", "system", "language", "id", "source", "license")
"""What a line of a user's JSONL file may hold; all are strings."""


@dataclass(frozen=True, kw_only=True)
class Seed:
    """One thing to ask."""

    id: str = ""
    """sha256 of system, prompt and material (or of the id that the user's file gives); computed if not given."""
    prompt: str
    system: str = ""
    """System prompt; empty leaves it to the settings."""
    language: str = "python"
    source: str = ""
    """Where it comes from; answers to seeds of one source all go to training or all to validation."""
    license: str = ""
    """SPDX identifier of what the prompt was made from."""
    kind: str = "builtin"
    """ "builtin", "user", or the kind of code-seeded prompt."""
    material: Mapping[str, Any] = field(default_factory=dict)
    """What is known about the answer; JSON values."""

    def __post_init__(self) -> None:
        if not self.id:
            material = json.dumps(self.material, sort_keys=True, ensure_ascii=False)
            object.__setattr__(self, "id", content_id("seed", self.system, self.prompt, material))


def read_seeds(path: Path | str, ids: dict[str, str] | None = None) -> Iterator[Seed]:
    """A user's prompts: JSONL if the name ends in .jsonl, else a prompt a line. Raises UserError with file:line.

    `ids` (id -> file:line) is added to; give the same to several files that must not share an id.
    """
    path = Path(path)
    ids = {} if ids is None else ids
    if not path.is_file():
        raise UserError(f"{path}: no such file: check files in [seeds]")
    with open(path, "rb") as file:
        for number, data in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                line = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 at byte {error.start}: convert the file with iconv") from None
            if path.suffix.lower() != ".jsonl":
                if line:
                    yield Seed(prompt=line, source=f"{path.name}:{number}", license="unknown", kind="user")
                continue
            values = _checked(line, where)
            given_id = values.pop("id", "")
            if given_id in ids:
                raise UserError(f'{where}: "id" {given_id!r} is that of {ids[given_id]}: give each its own')
            if given_id:
                ids[given_id] = where
                values["id"] = content_id("user", given_id)
            defaults: dict[str, Any] = {"source": f"{path.name}:{number}", "license": "unknown", "kind": "user"}
            yield Seed(**(defaults | values))


def _checked(line: str, where: str) -> dict[str, str]:
    """The object of one line of JSONL. Raises UserError."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:  # not only malformed: an integer may have too many digits
        raise UserError(f'{where}: not JSON ({error}): each line must be an object such as {{"prompt": ...}}') from None
    if not isinstance(values, dict):
        raise UserError(f'{where}: not an object: write {{"prompt": ...}}')
    for key, value in values.items():
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}: {nearest(key, KEYS)}")
        if not isinstance(value, str):
            raise UserError(f'{where}: "{key}" = {value!r}: must be a string')
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f'{where}: "{key}" has half a surrogate pair: not text') from None
    if not values.get("prompt", "").strip():
        raise UserError(f'{where}: "prompt" is missing or empty: say what is asked')
    return {key: value for key, value in values.items() if value}
