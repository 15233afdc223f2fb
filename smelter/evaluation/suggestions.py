"""What arrives at a cursor, and how much of it is right: the first character, the first word, the whole line, the end.

A model in process is asked in the ways in which it is asked by others: suffix first and healed, as by `smelter serve`;
prefix first and not healed, as by llama.cpp's server; or with nothing behind the cursor.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from smelter.decoding import FimOrder, Request, generate_in_batches, make_prompt
from smelter.evaluation.gaps import GAP_TOKENS
from smelter.evaluation.places import CONTEXT_CHARACTERS, Place
from smelter.model import Model
from smelter.run import AtCursor
from smelter.tokens import Tokenizer

Asked = FimOrder | Literal["plain"]
MAX_TOKENS = GAP_TOKENS["single_line"]
FIRST_WORD = re.compile(r"\w+|[^\w\s]+")


@dataclass(frozen=True)
class Suggestion:
    """A text, of which only the first line is looked at; whether it ended by itself or at a line break; seconds."""

    text: str
    ended: bool
    seconds: float | None = None


@dataclass(frozen=True)
class Right:
    """What of a suggestion is as it stands in the file."""

    first_character: bool
    word: bool
    line: bool
    end: bool


def first_word(text: str) -> str:
    """The word that a text begins with, or the signs where it begins with none; "" before a blank."""
    match = FIRST_WORD.match(text)
    return match[0] if match else ""


def judge(suggestion: Suggestion, place: Place) -> Right:
    """Compare with what is missing.

    The word is right if it is all that is missing of it and no more, the line but for blanks at its end; the end, if
    nothing follows a right line.
    """
    text, missing = suggestion.text, place.missing
    line = text.partition("\n")[0].rstrip()
    is_line = line == missing
    return Right(
        first_character=text[:1] == missing[:1],
        word=first_word(text) == first_word(missing),
        line=is_line,
        end=is_line and (suggestion.ended or "\n" in text),
    )


def score(suggestions: Sequence[Suggestion], places: Sequence[Place]) -> AtCursor:
    """The shares that are right. Raises ValueError where there is not one suggestion for each place, or none."""
    rights = [judge(suggestion, place) for suggestion, place in zip(suggestions, places, strict=True)]
    if not rights:
        raise ValueError("no places: nothing to score")

    num = len(rights)
    return AtCursor(
        first_character=sum(right.first_character for right in rights) / num,
        word=sum(right.word for right in rights) / num,
        line=sum(right.line for right in rights) / num,
        end=sum(right.end for right in rights) / num,
        places=num,
    )


def request_at(
    tokenizer: Tokenizer,
    context: int,
    place: Place,
    order: Asked = "spm",
    *,
    heal: bool = True,
    characters: int = CONTEXT_CHARACTERS,
) -> Request:
    """How a model of that context is asked for the rest of the line, greedily."""
    prefix, suffix = place.around(characters)
    prompt = make_prompt(
        tokenizer,
        context,
        prefix,
        None if order == "plain" else suffix,
        max_tokens=MAX_TOKENS,
        order="spm" if order == "plain" else order,
        heal=heal,
    )
    return Request(
        prompt.ids,
        prompt.pending,
        max_tokens=MAX_TOKENS,
        stops=["\n"],
        stop_ids=[tokenizer.eos_id],
        line_end=prompt.line_end,
    )


def ask(
    model: Model,
    tokenizer: Tokenizer,
    places: Sequence[Place],
    order: Asked = "spm",
    *,
    heal: bool = True,
    characters: int = CONTEXT_CHARACTERS,
    progress: Callable[[int], None] | None = None,
) -> list[Suggestion]:
    """What the model suggests at each place, in batches."""
    context = model.config.max_seq_len
    requests = [request_at(tokenizer, context, place, order, heal=heal, characters=characters) for place in places]
    return [
        Suggestion(row.text.close(), row.finish == "stop")
        for row in generate_in_batches(model, tokenizer, requests, progress)
    ]


def ask_singly(
    model: Model,
    tokenizer: Tokenizer,
    places: Sequence[Place],
    order: Asked = "spm",
    *,
    heal: bool = True,
    characters: int = CONTEXT_CHARACTERS,
) -> list[Suggestion]:
    """`ask`, one place after the other, with the seconds that each took."""
    suggestions = []
    for place in places:
        start = time.perf_counter()
        (suggestion,) = ask(model, tokenizer, [place], order, heal=heal, characters=characters)
        suggestions.append(Suggestion(suggestion.text, suggestion.ended, time.perf_counter() - start))
    return suggestions
