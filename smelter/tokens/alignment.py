"""Where two tokenizers agree: the bytes of a document at which both end a token.

A teacher with another tokenizer has no probabilities for the student's tokens, but both read the same bytes. Where
both have a boundary at the same byte a *chunk* ends, and of every chunk both state one likelihood: the sum of their
tokens' log-probabilities (approximate likelihood matching, arXiv 2503.20083).

Of a document the teacher's side is kept as one number for each of the student's tokens: the log-likelihood of the
chunk that ends with this token, NaN where none does. So any slice of the document finds its chunks by itself.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from smelter.base import DataError
from smelter.tokens.reversible import SPACE_MARK, check_ids
from smelter.tokens.tokenizer import Tokenizer

Ids = NDArray[np.int64]

NONE = -1
"""Place of a token that belongs to no chunk."""


@dataclass(frozen=True)
class Spelling:
    """A document as the teacher's tokenizer reads it."""

    ids: Ids
    """[n]: the teacher's token ids."""
    ends: Ids
    """[n]: byte of the document at which each token ends; 0 for a space that the tokenizer puts before the text."""


class TeacherTokenizer:
    """A tokenizer.json used as it is, normalisation and added space included, as the teacher was trained with it."""

    def __init__(self, path: Path) -> None:
        """`path` is the file or the folder that holds it. Raises DataError for one that cannot be used."""
        self.path = path / "tokenizer.json" if path.is_dir() else path
        own = Tokenizer.load(self.path)  # checks that every byte has a token
        self.hash = own.hash
        self._backend = tokenizers.Tokenizer.from_file(str(self.path))
        self._backend.no_truncation()
        self._backend.no_padding()
        self._bytes = [own.decode_bytes([index]) for index in range(own.vocab_size)]
        values = json.loads(self.path.read_text(encoding="utf-8"))
        try:
            check_ids(values, self._backend.get_vocab(with_added_tokens=True))
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None
        added: dict[int, Any] = self._backend.get_added_tokens_decoder()
        for index, token in added.items():
            name, is_piece = token.content, token.content in values["model"]["vocab"] or SPACE_MARK in token.content
            if token.special or name in own.special.names:
                self._bytes[index] = b""  # text that spells such a name is not what the token means
            elif not (is_piece and self._bytes[index]):
                self._bytes[index] = name.encode()
        with_special, without = (self._backend.encode("a", add_special_tokens=flag).ids for flag in (True, False))
        first = with_special[: len(with_special) - len(without)]
        self.first_id: int | None = first[0] if first and with_special[len(first) :] == without else None
        """The token that this tokenizer puts before every text, None if there is none."""

    def spell(self, documents: Sequence[bytes]) -> list[Spelling | None]:
        """How each document is read; None where the tokens do not spell its bytes, or it is not UTF-8.

        Tokens lose bytes to normalisation (NFC, lower case), unknown characters and names of special tokens.
        """
        texts: list[str] = []
        places: list[int] = []
        for place, raw in enumerate(documents):
            try:
                texts.append(raw.decode("utf-8"))
                places.append(place)
            except UnicodeDecodeError:
                continue
        spellings: list[Spelling | None] = [None] * len(documents)
        for place, encoding in zip(places, self._backend.encode_batch(texts, add_special_tokens=False), strict=True):
            spellings[place] = self._checked(np.array(encoding.ids, dtype=np.int64), documents[place])
        return spellings

    def _checked(self, ids: Ids, raw: bytes) -> Spelling | None:
        parts = [self._bytes[index] for index in ids.tolist()]
        spelled = b"".join(parts)
        if spelled not in (raw, b" " + raw):
            return None
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return Spelling(ids, ends - (len(spelled) - len(raw)))


def chunk_log_probs(student_ends: Ids, teacher_ends: Ids, teacher_log_probs: NDArray[Any]) -> NDArray[np.float64]:
    """[n]: log-likelihood of the chunk that ends with each of the student's n tokens, NaN where none does.

    student_ends [n] and teacher_ends [m] are the bytes at which the tokens of one document end, ascending;
    teacher_log_probs [m] are those of the teacher's tokens. The document begins with a boundary. What the teacher's
    tokens that end at byte 0 took (an added space) is no part of the text.
    """
    log_probs = np.full(len(student_ends), np.nan)
    if not len(student_ends) or not len(teacher_ends):
        return log_probs
    sums = np.concatenate(([0.0], np.cumsum(teacher_log_probs, dtype=np.float64)))
    counts = np.searchsorted(teacher_ends, student_ends, side="right")
    common = np.flatnonzero((counts > 0) & (teacher_ends[np.maximum(counts, 1) - 1] == student_ends))
    start = sums[int(np.searchsorted(teacher_ends, 0, side="right"))]
    log_probs[common] = np.diff(sums[counts[common]], prepend=start)
    return log_probs


@dataclass(frozen=True)
class Chunks:
    """The chunks among n tokens; each array is [n], with the same numbers at all tokens of a chunk."""

    starts: Ids
    """Place of the chunk's first token; -1 at tokens without a chunk."""
    ends: Ids
    """Place of its last token; -1 without."""
    log_probs: NDArray[np.float32]
    """The teacher's log-likelihood of the chunk; 0 without."""

    @classmethod
    def empty(cls, size: int) -> "Chunks":
        """No chunk at all among `size` tokens."""
        places = np.full(size, NONE, dtype=np.int64)
        return cls(places, places.copy(), np.zeros(size, dtype=np.float32))

    def put(self, place: int, other: "Chunks") -> None:
        """Write another's chunks into these, its tokens beginning at `place`."""
        here = slice(place, place + len(other.starts))
        self.starts[here] = np.where(other.starts == NONE, NONE, other.starts + place)
        self.ends[here] = np.where(other.ends == NONE, NONE, other.ends + place)
        self.log_probs[here] = other.log_probs

    def as_targets(self) -> "Chunks":
        """Of the n - 1 tokens after the first, counted from 0: the first is no target, its chunk falls away."""
        kept = self.starts[1:] > 0
        return Chunks(
            np.where(kept, self.starts[1:] - 1, NONE),
            np.where(kept, self.ends[1:] - 1, NONE),
            np.where(kept, self.log_probs[1:], np.float32(0)),
        )


def chunks_of_slice(log_probs: NDArray[Any], begin: int, size: int) -> Chunks:
    """The whole chunks among tokens begin .. begin + size - 1 of a document with these `chunk_log_probs`.

    A chunk that the slice cuts, at either end, is left out.
    """
    chunks = Chunks.empty(size)
    values = np.asarray(log_probs[begin : begin + size], dtype=np.float32)
    ends = np.flatnonzero(~np.isnan(values))
    if begin and np.isnan(log_probs[begin - 1]):
        starts, ends = ends[:-1] + 1, ends[1:]
    else:
        starts = np.concatenate(([0], ends[:-1] + 1))[: len(ends)]
    if not len(ends):
        return chunks
    lengths = ends - starts + 1
    inside = np.arange(int(starts[0]), int(ends[-1]) + 1)
    chunks.starts[inside] = np.repeat(starts, lengths)
    chunks.ends[inside] = np.repeat(ends, lengths)
    chunks.log_probs[inside] = np.repeat(values[ends], lengths)
    return chunks


def student_ends(tokenizer: Tokenizer, ids: Ids) -> Ids | None:
    """[n]: byte at which each of a document's ids ends; None if it holds tokens that stand for no text."""
    sizes = tokenizer.token_num_bytes[ids]
    return np.cumsum(sizes) if bool((sizes > 0).all()) else None


def check_vocabulary(path: Path, spelling: Spelling, num_ids: int) -> None:
    """DataError where the teacher's tokenizer gives ids that its model does not have."""
    if len(spelling.ids) and int(spelling.ids.max()) >= num_ids:
        raise DataError(
            f"{path}: its tokenizer gives id {int(spelling.ids.max())}, its model has {num_ids:,} ids: fetch both anew"
        )


def read_as_written(ids: Ids, arranged: "Ids | list[int]", tokenizer: Tokenizer) -> tuple[int, int]:
    """(shift, size): the first `size` of a document's `ids` stand in the arranged piece `arranged` from `shift` on.

    A teacher has read the text from left to right. Of a piece that is rearranged for fill-in-the-middle only the
    prefix of prefix-suffix-middle order is read like that, of one with peeks what comes before the first: there the
    student knows no more than the teacher did.
    """
    shift = int(len(arranged) > 0 and arranged[0] == tokenizer.fim_prefix_id)
    if shift and arranged[1] == tokenizer.fim_suffix_id:
        return 0, 0
    size = min(len(ids), len(arranged) - shift)
    differs = np.flatnonzero(np.asarray(arranged[shift : size + shift]) != ids[:size])
    return shift, int(differs[0]) if len(differs) else size
