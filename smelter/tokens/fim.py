"""Fill-in-the-middle: a piece of a document rearranged, so that the model learns to write what is missing.

As in Bavarian et al. (arXiv 2207.14255), a piece is cut at two *characters* before tokenisation, anywhere or where a
cursor stands (`cuts`), so that a cursor inside a word is nothing new to the model, and rearranged as

    PSM: [fim_prefix] prefix [fim_suffix] suffix [fim_middle] middle [eos]
    SPM: [fim_prefix][fim_suffix] suffix [fim_middle] prefix middle [eos]        (the paper's SPM variant 2)

In SPM the prefix and the middle are one text and encoded as one, or, for prompts that are not healed, a share of them
each on its own; else the parts are encoded separately. This happens to the piece of a document that a row holds
("context level"), so no middle is ever cut off.

Each part gets the ids of encoding it whole, but only the words at its ends are encoded: between two *seams* the
piece's own ids are copied. A seam is where an ASCII letter stands before an ASCII sign, that is, before any
character that is no letter: `return| x|.y`. If words are split by Qwen2's pattern, then
encode(a + b) == encode(a) + encode(b) at every seam a|b, since

- a word begins where the one before it ends and depends on nothing before it;
- every alternative of the pattern takes letters last, so no word holds a letter and a sign after it: a seam always
  divides two words;
- whatever has come to the letter before the seam stops at the sign as it stops at the end of a text, so the words
  before the seam are those of `a`.

So ids between two seams depend on nothing outside, neither in the document nor in the part. Trade-off: this holds
for that pattern alone. Other tokenizers encode every part whole: the same ids, several times slower.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from smelter.tokens.cuts import anywhere, at_cursor, in_words
from smelter.tokens.tokenizer import QWEN2_SPLIT_PATTERN, Tokenizer

MIN_FIM_CHARACTERS = 8
NUM_SENTINELS = 4
"""Tokens that arrangement adds to a piece: three sentinels and eos."""
FIM_SLACK = 3
"""Tokens that the two cuts typically add besides: a word cut in two takes more tokens."""

Ids = NDArray[np.int64]


class Seams:
    """Finds the seams of a tokenizer's texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """A tokenizer of another pre-tokenisation than Qwen2's, or with a normaliser, has no seams."""
        values = tokenizer.values
        split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        parts = (values["pre_tokenizer"] or {}).get("pretokenizers", [])
        parts = [{key: part[key] for key in part if key != "trim_offsets"} for part in parts]  # ids do not see it
        self._exist = parts == [split, byte_level] and not values["normalizer"]
        # These are taken out of a text before it is split, wherever they stand.
        self._verbatim = [token["content"] for token in values["added_tokens"] if not token["special"]]
        texts = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        letters = np.array([[t[:1].isalpha(), t[-1:].isalpha()] for t in texts])  # of bytes: ASCII only
        self._ends_in_letter = letters[:, 1]
        self._begins_with_sign = np.array([t[:1].isascii() for t in texts]) & ~letters[:, 0]

    def find(self, ids: Ids, text: str) -> Ids:
        """Indices i, ascending, of the ids before which `text` has a seam; `ids` are consecutive ids of an encoding."""
        if not self._exist or any(name in text for name in self._verbatim):
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(self._ends_in_letter[ids[:-1]] & self._begins_with_sign[ids[1:]]) + 1


_seams = lru_cache(maxsize=4)(Seams)


class Piece:
    """Consecutive ids of an encoded document, as a text of which any part can be encoded."""

    def __init__(self, tokenizer: Tokenizer, ids: Ids) -> None:
        """`ids` must be a slice of what `tokenizer` made of a text: for ids of other origin parts may keep those."""
        self.cuts: list[int] = []
        """Characters, ascending, where a token ends in every part."""
        self._tokenizer = tokenizer
        self._ids = ids
        self._raw = tokenizer.decode_bytes(ids)
        self.text = self._raw.decode("utf-8", "surrogateescape")
        """The piece; a character that the slice cut is kept, as bytes."""
        self._seams = _seams(tokenizer).find(ids, self.text)
        self._seam_bytes = np.cumsum(tokenizer.token_num_bytes[ids])[self._seams - 1]

    def cut_words(self, rate: float, rng: np.random.Generator) -> None:
        """Cut words in two (`cuts.in_words`), about `rate` of them for each token; nothing is drawn for 0.

        Prompts that are not healed end inside words. What comes after a part of a word is other tokens than the whole
        word, and a model must have met them.
        """
        if rate > 0:
            self.cuts = in_words(self.text, int(rng.poisson(rate * len(self._ids))), rng)

    def encode(self, first: int, second: int) -> list[int]:
        """Exactly `tokenizer.encode(text[first:second])`, or between two cuts, of each part."""
        ends = self.cuts[bisect_right(self.cuts, first) : bisect_left(self.cuts, second)]
        ids: list[int] = []
        for end in ends:
            ids += self._encode(first, end)
            first = end
        return [*ids, *self._encode(first, second)] if ids else self._encode(first, second)

    def _encode(self, first: int, second: int) -> list[int]:
        begin, end = self._byte(first), self._byte(second)
        i = int(np.searchsorted(self._seam_bytes, begin, side="left"))
        j = int(np.searchsorted(self._seam_bytes, end, side="right")) - 1
        if i >= j:
            return self._tokenizer.encode(self.text[first:second])
        return [
            *self._tokenizer.encode_bytes(self._raw[begin : self._seam_bytes[i]]),
            *self._ids[self._seams[i] : self._seams[j]].tolist(),
            *self._tokenizer.encode_bytes(self._raw[self._seam_bytes[j] : end]),
        ]

    def _byte(self, character: int) -> int:
        """Where the character begins among the bytes."""
        if len(self._raw) == len(self.text):
            return character
        return len(self.text[:character].encode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class Shares:
    """Of the rearranged pieces: how many are in SPM order, and of those in two parts; how many gaps are at a cursor."""

    spm: float = 0.5
    split: float = 0.0
    """Of those in SPM order, the share whose prefix and middle are encoded each on its own."""
    cursor: float = 0.0
    cut: float = 0.0
    """Words cut in two, for each token."""


def _happens(share: float, rng: np.random.Generator) -> bool:
    """True in that share of cases; nothing is drawn where it never happens."""
    return share > 0 and rng.random() < share


def apply_fim(tokenizer: Tokenizer, piece: Piece, rng: np.random.Generator, shares: Shares) -> list[int]:
    """`piece` cut at two characters and rearranged, with sentinels and eos."""
    size = len(piece.text)
    is_at_cursor = _happens(shares.cursor, rng)
    first, second = at_cursor(piece.text, rng, "near the end") if is_at_cursor else anywhere(piece.text, rng)
    suffix = piece.encode(second, size)
    if rng.random() >= shares.spm:
        ids = tokenizer.join_fim_prompt(piece.encode(0, first), suffix) + piece.encode(first, second)
    elif _happens(shares.split, rng):
        ids = tokenizer.join_fim_prompt(piece.encode(0, first), suffix, use_spm=True) + piece.encode(first, second)
    else:
        ids = tokenizer.join_fim_prompt(piece.encode(0, second), suffix, use_spm=True)
    return [*ids, tokenizer.eos_id]


def fit_fim(tokenizer: Tokenizer, ids: Ids, room: int, rng: np.random.Generator, shares: Shares) -> list[int] | None:
    """A piece rearranged into at most `room` tokens, None if there is too little text to cut.

    `ids` are consecutive ids of an encoded document and may end in eos. Tokens that would not fit are taken from the
    piece's end before it is cut, so the middle and its eos are whole. A character that the window itself cut is kept,
    as bytes.
    """
    body = ids[:-1] if len(ids) and ids[-1] == tokenizer.eos_id else ids
    if len(body) > room - NUM_SENTINELS:
        body = body[: max(0, room - NUM_SENTINELS - FIM_SLACK)]
    while True:
        piece = Piece(tokenizer, body)
        if len(piece.text) < MIN_FIM_CHARACTERS:
            return None
        piece.cut_words(shares.cut, rng)
        arranged = apply_fim(tokenizer, piece, rng, shares)
        excess = len(arranged) - room
        if excess <= 0:
            return arranged
        body = body[: max(0, len(body) - excess)]
