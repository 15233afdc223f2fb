"""What teachers are asked: built-in prompts, the user's own, and prompts made from local code.

The sources take turns, so any number of seeds holds a fair share of each for as long as each lasts; the built-in ones
do not run out in practice. The same settings and files give the same seeds in the same order, and a larger count
begins with those of a smaller one, so a run can be made longer without asking anything twice.

The user's own prompts: a text file holds one prompt a line (blank lines are skipped). A prompt of several lines goes
into a JSONL file: {"prompt": ...} with "system", "language", "id", "source" and "license" where wanted. The files are
read through once before the first seed is given, so a bad line is found before any answer is paid for.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foundry.seeds.builtin import builtin_prompts
from foundry.seeds.code import CodePrompt, code_prompts
from foundry.settings import SeedSettings
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


def iterate(settings: SeedSettings) -> Iterator[Seed]:
    """At most `settings.count` seeds, without a repeated id or question.

    Raises UserError for a file that cannot be used, naming file and line, and where there is nothing to ask.
    """
    streams = [_builtin(settings.seed)] if settings.builtin else []
    files = list(dict.fromkeys(settings.files))
    given: dict[str, str] = {}
    for name in files:
        for _ in read_seeds(name, given):
            pass
    streams += [read_seeds(name) for name in files]
    if settings.corpus:
        prompts = code_prompts(settings.corpus, settings.kinds, settings.seed)
        streams.append(_in_turn([_from_code(stream) for stream in prompts]))
    ids: set[str] = set()
    questions: set[str] = set()
    for seed in _in_turn(streams):
        question = content_id(seed.system, seed.prompt)
        if seed.id in ids or question in questions:
            continue
        ids.add(seed.id)
        questions.add(question)
        yield seed
        if len(ids) == settings.count:
            return
    if not ids:
        raise UserError("[seeds]: nothing to ask: the files and the corpus hold no usable prompt")


def _in_turn(streams: list[Iterator[Seed]]) -> Iterator[Seed]:
    """One of each stream after the other; a stream that has ended drops out."""
    while streams:
        alive = []
        for stream in streams:
            seed = next(stream, None)
            if seed is not None:
                yield seed
                alive.append(stream)
        streams = alive


def _builtin(number: int) -> Iterator[Seed]:
    for item in builtin_prompts(number):
        yield Seed(prompt=item.prompt, source=item.source, license="MIT")


def _from_code(prompts: Iterator[CodePrompt]) -> Iterator[Seed]:
    for item in prompts:
        yield Seed(
            prompt=item.prompt,
            source=item.source,
            license=item.license,
            kind=item.kind,
            material=item.material,
        )


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
            given = values.pop("id", "")
            if given:
                if given in ids:
                    raise UserError(f'{where}: "id" {given!r} is that of {ids[given]}: give each its own')
                ids[given] = where
            defaults: dict[str, Any] = {"source": f"{path.name}:{number}", "license": "unknown", "kind": "user"}
            yield Seed(id=content_id("user", given) if given else "", **(defaults | values))


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
