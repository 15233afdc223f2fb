"""Peeks: in running text, what stands a little later is shown at once, and then the text goes on.

    before [fim_suffix] later [fim_middle] after ...

`later` is a part of what follows `after`. A rearranged piece has one place where the model must take up the text again
across the suffix; a peek costs a handful of tokens, so that a row can have dozens. They teach two things that a small
model hardly learns in a short training: to go on, after [fim_middle], from what stands before [fim_suffix], and to look
back for where the same text was already seen (`later` comes twice), which helps with all code. Text without a
[fim_prefix] is told apart by it: after a peek's middle the text goes on, and no eos follows.
"""

import numpy as np

from smelter.tokens.cuts import at_cursor, log_uniform
from smelter.tokens.fim import Ids, Piece
from smelter.tokens.tokenizer import Tokenizer

MAX_LATER_CHARACTERS = 240
"""Characters shown ahead at most; how many is log-uniform, so half of the peeks show 14 or fewer."""


def with_peeks(tokenizer: Tokenizer, ids: Ids, room: int, rng: np.random.Generator, tokens_each: int) -> list[int]:
    """Consecutive `ids` of an encoded document with a peek every `tokens_each` tokens on average, cut to `room` tokens.

    Peeks stand where a cursor may (`cuts.at_cursor`), so words are cut there, and each part of the text is encoded on
    its own. An eos at the end of `ids` stays.
    """
    ids = ids[:room]
    has_eos = len(ids) > 0 and ids[-1] == tokenizer.eos_id
    piece = Piece(tokenizer, ids[:-1] if has_eos else ids)
    size = len(piece.text)
    gaps = [at_cursor(piece.text, rng) for _ in range(int(rng.poisson(len(ids) / tokens_each)))] if size else []
    arranged: list[int] = []
    done = 0
    for first, second in sorted(gaps):
        if first == done:
            continue
        later = min(size, second + log_uniform(MAX_LATER_CHARACTERS, rng))
        arranged += piece.encode(done, first)
        arranged += [tokenizer.fim_suffix_id, *piece.encode(second, later), tokenizer.fim_middle_id]
        done = first
        if len(arranged) >= room:
            break
    arranged += [*piece.encode(done, size), *([tokenizer.eos_id] if has_eos else [])]
    return arranged[:room]
