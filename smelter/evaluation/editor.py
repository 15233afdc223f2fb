"""`smelter evaluate --editor`: everybody who suggests is asked the same at the cursor, and is judged by one rule.

Places in held-out code tell what arrives (`suggestions`); lines typed with it, what it is worth (`typist`). A row is
somebody who suggests: the model, in each way in which it is asked; a server (`servers`); and beside them what costs no
model: the buffer's words (`keywords`), and a model that has learned nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from smelter.base import DataError, Progress
from smelter.evaluation.keywords import first_match, menu
from smelter.evaluation.places import CONTEXT_CHARACTERS, PLACE_KINDS, Place, PlaceKind, choose_places, stops_of
from smelter.evaluation.servers import Server, ServerKind, ask_server
from smelter.evaluation.suggestions import Asked, Suggestion, ask, ask_singly, score
from smelter.evaluation.typist import Offer, offers_of, type_lines
from smelter.model import Model
from smelter.run import AtCursor, Latency, Suggester
from smelter.tokens import Tokenizer

TIMED_PLACES = 24
"""Of each row in process: one at a time they take longer than in batches."""
UNTRAINED_SHARE = 4
"""A model that has learned nothing is asked at every fourth place: it writes to the limit each time."""


@dataclass(frozen=True)
class Questions:
    """What everybody is asked: places of each kind, lines to type, and the characters around them that are shown."""

    places: dict[PlaceKind, list[Place]]
    lines: list[Place]
    characters: int

    @property
    def stops(self) -> list[Place]:
        """Where suggestions are asked for while the lines are typed."""
        return [stop for line in self.lines for stop in stops_of(line)]

    @property
    def all(self) -> list[Place]:
        """Every place, those of the lines last."""
        return [*(place for kind in self.places for place in self.places[kind]), *self.stops]

    def every(self, step: int) -> "Questions":
        """A part of them, evenly."""
        places = {kind: chosen[::step] for kind, chosen in self.places.items()}
        return Questions(places, self.lines[::step], self.characters)


def choose_questions(
    num_docs: int,
    text: Callable[[int], str],
    num_places: int,
    num_lines: int,
    *,
    characters: int = CONTEXT_CHARACTERS,
    seed: int = 0,
) -> Questions:
    """Up to `num_places` of each kind and `num_lines` lines in documents; `text(i)` is document i.

    Raises DataError where there is no line of code.
    """
    places = {kind: choose_places(num_docs, text, num_places, kind, seed) for kind in PLACE_KINDS}
    lines = choose_places(num_docs, text, num_lines, "line_start", seed, "typed")
    if not lines:
        raise DataError("no line of code in the held-out files: tokenize more of them, or a larger --val-fraction")
    return Questions({kind: chosen for kind, chosen in places.items() if chosen}, lines, characters)


def latency_of(suggestions: Sequence[Suggestion]) -> Latency | None:
    """Of the suggestions whose time is known; None where there is none."""
    milliseconds = [1_000 * suggestion.seconds for suggestion in suggestions if suggestion.seconds is not None]
    if not milliseconds:
        return None
    median, p95 = np.percentile(milliseconds, [50, 95])
    return Latency(float(median), float(p95), len(milliseconds))


def judged(questions: Questions, suggestions: Sequence[Suggestion], latency: Latency | None = None) -> Suggester:
    """The figures of one who was asked `questions.all`."""
    start = 0
    figures: dict[str, AtCursor] = {}
    for kind, places in questions.places.items():
        figures[kind] = score(suggestions[start : start + len(places)], places)
        start += len(places)
    made = zip(questions.stops, suggestions[start:], strict=True)
    offers = {stop: offers_of(suggestion, stop) for stop, suggestion in made}
    return Suggester(figures, type_lines(questions.lines, offers), latency)


def by_model(
    model: Model, tokenizer: Tokenizer, questions: Questions, what: str, order: Asked, *, heal: bool
) -> Suggester:
    """A model, asked in one way; its latency is that of a few places, one after the other."""
    places = questions.all
    say = Progress(f"evaluate: at the cursor, {what}", "places", len(places))
    made = ask(model, tokenizer, places, order, heal=heal, characters=questions.characters, progress=say)
    few = places[:: max(1, len(places) // TIMED_PLACES)][:TIMED_PLACES]
    timed = ask_singly(model, tokenizer, few, order, heal=heal, characters=questions.characters)
    return judged(questions, made, latency_of(timed))


HEALED = "suffix first, healed"
WAYS: Mapping[str, tuple[Asked, bool]] = {
    HEALED: ("spm", True),
    "prefix first": ("psm", False),
    "no suffix, healed": ("plain", True),
    "no suffix": ("plain", False),
}
"""How the model is asked by `smelter serve`, and by llama.cpp's server, which heals nothing."""


def model_rows(
    model: Model, tokenizer: Tokenizer, questions: Questions, untrained: Model | None = None
) -> dict[str, Suggester]:
    """The model in each way, and the same model `untrained` at a part of the places."""
    rows = {what: by_model(model, tokenizer, questions, what, order, heal=heal) for what, (order, heal) in WAYS.items()}
    if untrained is not None:
        part = questions.every(UNTRAINED_SHARE)
        rows["untrained"] = by_model(untrained, tokenizer, part, "untrained", "spm", heal=True)
    return rows


def server_rows(
    servers: Sequence[Server], kind: ServerKind | Literal["auto"], questions: Questions
) -> dict[str, Suggester]:
    """Each server, asked for one place after the other. Raises UserError."""
    rows = {}
    for server in servers:
        places = questions.all
        say = Progress(f"evaluate: at the cursor, {server.name}", "places", len(places))
        used, suggestions = ask_server(server, places, kind, characters=questions.characters, progress=say)
        rows[f"{server.name} ({used})"] = judged(questions, suggestions, latency_of(suggestions))
    return rows


def _saved(row: Suggester) -> float:
    return row.typed.saved


def word_rows(questions: Questions) -> dict[str, Suggester]:
    """The words of the buffer, in the direction that saves more: the first match, and a list to choose from."""
    firsts, menus = {}, {}
    for key, forward in (("Ctrl-N", True), ("Ctrl-P", False)):
        suggestions = [first_match(place, forward) for place in questions.all]
        firsts[f"Vim's {key}, first match"] = judged(questions, suggestions)
        offers: dict[Place, list[Offer]] = {stop: menu(stop, forward) for stop in questions.stops}
        menus[f"Vim's {key}, menu"] = Suggester({}, type_lines(questions.lines, offers))
    best = [max(rows, key=lambda name: _saved(rows[name])) for rows in (firsts, menus)]
    return {name: (firsts | menus)[name] for name in best}
