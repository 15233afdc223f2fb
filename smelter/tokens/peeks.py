"""Peeks: in running text, what stands a little later is shown at once, and then the text goes on.

    before [fim_suffix] later [fim_middle] after ...

`later` is a part of what follows `after`. A rearranged piece has one place where the model must take up the text again
across the suffix; a peek costs a handful of tokens, so that a row can have dozens. They teach two things that a small
model hardly learns in a short training: to go on, after [fim_middle], from what stands before [fim_suffix], and to look
back for where the same text was already seen (`later` comes twice), which helps with all code. Text without a
[fim_prefix] is told apart by it: after a peek's middle the text goes on, and no eos follows.
"""

import numpy as np

from smelter.tokens.cuts import Gap, at_cursor, in_words, log_uniform
from smelter.tokens.fim import Ids, Piece
from smelter.tokens.tokenizer import Tokenizer

IN_WORD, ANYWHERE = 0.5, 0.2
"""Shares of the peeks that stand inside words, and at any character; the others stand where a cursor may."""
MAX_SKIPPED_CHARACTERS = 24
"""Of the first two kinds, characters at most between a peek and what it shows."""
NOTHING_SHOWN = 0.3
"""Share of the peeks that show nothing; what matters most, where to go on, is learned from those too."""
MAX_LATER_CHARACTERS = 240
"""Characters shown ahead at most; how many is log-uniform, so half of what is shown has 14 or fewer."""


def with_peeks(
    tokenizer: Tokenizer, ids: Ids, room: int, rng: np.random.Generator, tokens_each: int, cut_rate: float = 0.0
) -> list[int]:
    """Consecutive `ids` of an encoded document with a peek every `tokens_each` tokens on average, cut to `room` tokens.

    0: none. The text between two peeks is encoded on its own, and so are the parts of the words that are cut, about
    `cut_rate` for each token. An eos at the end of `ids` stays.
    """
    ids = ids[:room]
    has_eos = len(ids) > 0 and ids[-1] == tokenizer.eos_id
    piece = Piece(tokenizer, ids[:-1] if has_eos else ids)
    size = len(piece.text)
    num = int(rng.poisson(len(ids) / tokens_each)) if size and tokens_each else 0
    gaps = [_gap(piece.text, rng) for _ in range(num)]
    piece.cut_words(cut_rate, rng)
    arranged: list[int] = []
    done = 0
    for first, second in sorted(gaps):
        if first == done:
            continue
        shown = 0 if rng.random() < NOTHING_SHOWN else log_uniform(MAX_LATER_CHARACTERS, rng)
        arranged += piece.encode(done, first)
        arranged += [tokenizer.fim_suffix_id, *piece.encode(second, min(size, second + shown)), tokenizer.fim_middle_id]
        done = first
        if len(arranged) >= room:
            break
    arranged += [*piece.encode(done, size), *([tokenizer.eos_id] if has_eos else [])]
    return arranged[:room]


def _gap(text: str, rng: np.random.Generator) -> Gap:
    """Where a peek stands, and where what it shows begins."""
    kind = rng.random()
    if kind >= IN_WORD + ANYWHERE:
        return at_cursor(text, rng)
    inside = in_words(text, 1, rng) if kind < IN_WORD else []
    first = inside[0] if inside else int(rng.integers(len(text)))
    return first, min(len(text), first + int(rng.integers(1, MAX_SKIPPED_CHARACTERS + 1)))
