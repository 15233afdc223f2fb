"""The built-in seed prompts: some 300 templates over the whole of programming in Python, filled at random.

The templates stand in `seeds.toml`, which is for reading and writing prose; here they are drawn. A round goes through
every template once in random order and fills its choices and words anew, so the first few hundred prompts already
touch every area, and thousands repeat no prompt. What is asked besides (tests, hints, form of the answer) is drawn
too: a model that has only ever seen one way of asking answers only that one.

Every number comes from `random.Random.random()`, the one method whose sequence Python promises to keep.
"""

import functools
import hashlib
import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from foundry.seeds.seed import Seed

SHARE_OF_EXTRAS = 0.35
"""How often each list of further asks gives one; the list `always` gives one each time."""

T = TypeVar("T")
_SLOT = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Area:
    """Prompts of one subject and kind, and what is asked besides."""

    name: str
    kind: str
    prompts: tuple[str, ...]
    snippets: tuple[str, ...]
    always: tuple[str, ...]
    extras: tuple[tuple[str, ...], ...]

    @property
    def num_entries(self) -> int:
        """What a round draws from this area: each snippet once, or each prompt once."""
        return len(self.snippets) or len(self.prompts)


@functools.cache
def load_areas() -> tuple[tuple[Area, ...], Mapping[str, tuple[str, ...]]]:
    """The areas and the lists of words of `seeds.toml`."""
    tables = tomllib.loads(Path(__file__).with_name("seeds.toml").read_text(encoding="utf-8"))
    areas = []
    for table in tables["area"]:
        asks = dict(tables["asks"][table["kind"]])
        always = tuple(asks.pop("always"))
        extras = [*asks.values(), *([table["asks"]] if "asks" in table else [])]
        snippets = tuple(snippet.strip("\n") for snippet in table.get("snippets", ()))
        areas.append(
            Area(table["name"], table["kind"], tuple(table["prompts"]), snippets, always, tuple(map(tuple, extras)))
        )
    return tuple(areas), {name: tuple(words) for name, words in tables["words"].items()}


def builtin_prompts(seed: int) -> Iterator[Seed]:
    """Seeds in an order that `seed` determines, no prompt twice; ends when a whole round brings nothing new.

    `source` names the template, so that all its variants fall into one split.
    """
    areas, words = load_areas()
    entries = [(area, index) for area in areas for index in range(area.num_entries)]
    rng = random.Random(seed)
    seen: set[bytes] = set()  # hashes: a million prompts take some 100 MB less
    while True:
        num_before = len(seen)
        for area, index in shuffled(entries, rng):
            prompt = draw(area, index, words, rng)
            key = hashlib.sha256(prompt.encode()).digest()
            if key not in seen:
                seen.add(key)
                yield Seed(prompt=prompt, source=f"builtin/{area.name}/{index}", license="MIT")
        if len(seen) == num_before:
            return


def draw(area: Area, index: int, words: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """One prompt of an area: entry `index` with its choices made and its asks added."""
    template = pick(area.prompts, rng) if area.snippets else area.prompts[index]
    asks = [pick(area.always, rng)]
    asks += [pick(extra, rng) for extra in area.extras if rng.random() < SHARE_OF_EXTRAS]
    chosen: dict[str, str] = {}
    # The snippet comes last and is not looked into: code has braces of its own.
    before, marker, after = template.partition("{snippet}")
    text = fill(before, words, chosen, rng)
    if marker:
        text += f"```python\n{area.snippets[index]}\n```{fill(after, words, chosen, rng)}"
    added = " ".join(fill(ask, words, chosen, rng) for ask in asks if ask)
    if not added:
        return text
    return f"{text}\n\n{added}" if marker else f"{text} {added}"


def fill(template: str, words: Mapping[str, Sequence[str]], chosen: dict[str, str], rng: random.Random) -> str:
    """Make the choices of a template, innermost first; a word is the same wherever it occurs in one prompt."""
    while match := _SLOT.search(template):
        slot = match[1]
        if "|" in slot:
            value = pick(slot.split("|"), rng)
        else:
            if slot not in chosen:
                chosen[slot] = pick(words[slot], rng)
            value = chosen[slot]
        template = template[: match.start()] + value + template[match.end() :]
    return template


def pick(items: Sequence[T], rng: random.Random) -> T:
    """One of the items, all equally likely."""
    return items[int(rng.random() * len(items))]


def shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    """The items in random order."""
    keys = [rng.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]
