"""Exact and near duplicates, by signatures that stay in memory while the texts stream by.

Exact: equal tokens, whatever the white space (16 bytes a text). Near: 128 values of 32 bits a text that agree between
two texts as often as their shingles of five tokens do (Jaccard similarity, Broder 1997); bands of values find
candidates (LSH), and each candidate is verified against the threshold by all 128. The similarity is thus estimated,
with a standard error of at most 0.035 at 0.8; a pair that close to the threshold may fall either way, always the same
way.

MinHash computes 128 hashes of every shingle. Fast similarity sketching (Dahlgaard, Knudsen and Thorup, FOCS 2017)
throws each shingle into one of 128 bins instead and keeps the smallest hash in each, again and again until no bin is
empty: earlier rounds win. It has no bias either and errs no more, for some ten hashes a shingle.

Everything is done in numpy for a batch of texts at once, small enough for a core's cache: strings in Python would
take ten times as long as the signatures. A token's hash is a polynomial of its bytes from prefix sums modulo 2^64.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

NUM_PERM = 128
"""Values in a signature."""
SHINGLE = 5
"""Tokens in a shingle."""
_RECALL = 0.99
"""Share of the pairs at the threshold that the bands must find."""
_BATCH = 2**17
"""Characters of text and values that are worked on at once, unless one text is longer."""
_ROUNDS = 8
"""Times that all shingles are thrown into bins before the bins still empty are filled one by one."""
_VALUE_BITS = 28
"""Bits of a value that come from a hash; those above are the round's number."""
_EMPTY = np.uint32(2**32 - 1)
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_BIN_BITS = NUM_PERM.bit_length() - 1
_TOKENS = re.compile(r"\w+|[^\w\s]")

Array = np.ndarray[Any, Any]

_SPACE, _WORD, _OTHER = b"\0\1\2"
_CLASS = bytes(
    _SPACE if code in b" \t\n\r\f\v" else _WORD if code >= 128 or chr(code).isalnum() or code == ord("_") else _OTHER
    for code in range(256)
)


def exact_key(text: str) -> bytes:
    """16 bytes that two texts share if they differ in white space alone."""
    return hashlib.blake2b("\n".join(_TOKENS.findall(text)).encode(), digest_size=16).digest()


def shingle_hashes(texts: Sequence[str]) -> tuple[Array, Array]:
    """64-bit hashes of all shingles, and where each text's begin: uint64 [N], int64 [texts + 1].

    Each text has as many shingles as tokens (its end is padded), at least one.
    """
    padding = b"\0" * SHINGLE  # each is a token of its own, so that no shingle spans two texts
    encoded = [text.replace("\0", " ").encode() for text in texts]
    data = padding.join([*encoded, b""])
    kind = np.frombuffer(data.translate(_CLASS), dtype=np.uint8)
    is_edge = kind == _OTHER
    is_edge[1:] |= kind[1:] != kind[:-1]
    is_edge[0] = True
    edges = np.flatnonzero(is_edge)  # words and runs of white space, and each other character
    powers, inverses = _powers(max(len(data), 2 * _BATCH))
    sums = np.cumsum(np.frombuffer(data, dtype=np.uint8) * powers[: len(data)])[np.append(edges[1:], len(data)) - 1]
    sums = np.diff(sums, prepend=np.uint64(0))
    # Divided by the power of the token's place: the same token hashes alike wherever it stands, in any batch.
    places = np.flatnonzero(kind[edges] != _SPACE)
    begins = edges[places]
    tokens = _mixed(sums[places] * inverses[begins])
    hashes = tokens[: 1 - SHINGLE].copy()
    for place in range(1, SHINGLE):
        hashes *= _BASE
        hashes += tokens[place : len(tokens) - SHINGLE + 1 + place]
    ends = np.searchsorted(begins, np.cumsum([len(one) + SHINGLE for one in encoded]))
    num_tokens = np.diff(ends, prepend=0) - SHINGLE
    # Shingles of padding alone go, but for the one that stands for a text of nothing but white space.
    is_kept = np.ones(len(tokens), dtype=bool)
    is_kept[(ends[:, None] - np.arange(1, SHINGLE + 1)).ravel()] = False
    is_kept[(ends - SHINGLE)[num_tokens == 0]] = True
    firsts = np.concatenate(([0], np.cumsum(np.maximum(num_tokens, 1))))
    return _mixed(hashes[is_kept[: len(hashes)]]), firsts


@functools.lru_cache(1)
def _powers(count: int) -> tuple[Array, Array]:
    """The powers of the base and of its inverse, from the first on."""
    powers, inverses = (np.cumprod(np.full(count, base, dtype=np.uint64)) for base in (_BASE, _INVERSE))
    return powers, inverses


def _mixed(values: Array) -> Array:
    """splitmix64's finish: every bit depends on every other."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


_ODD = _mixed(np.arange(1, 1 + _ROUNDS + NUM_PERM, dtype=np.uint64)) | np.uint64(1)
"""A multiplier for each round and then for each bin."""


def signatures(texts: Sequence[str]) -> Array:
    """Similarity sketches, uint32 [texts, NUM_PERM]: a text has the same in any batch."""
    return np.concatenate([np.zeros((0, NUM_PERM), dtype=np.uint32), *map(_sketch, _batches(texts))])


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in order, by `_BATCH` characters and values."""
    start = size = 0
    for i, text in enumerate(texts):
        size += len(text) + NUM_PERM  # a short one takes as much time and memory by its values
        if size > _BATCH and i > start:
            yield texts[start:i]
            start, size = i, len(text) + NUM_PERM
    if start < len(texts):
        yield texts[start:]


def _sketch(texts: Sequence[str]) -> Array:
    """The signatures of one batch."""
    hashes, firsts = shingle_hashes(texts)
    counts = np.diff(firsts)
    rows = np.full((len(texts), NUM_PERM), _EMPTY)
    flat = rows.reshape(-1)
    offsets = np.repeat(np.arange(0, rows.size, NUM_PERM), counts)
    for turn in range(_ROUNDS):
        thrown = hashes * _ODD[turn]
        bins = (thrown >> np.uint64(64 - _BIN_BITS)).view(np.int64)
        bins += offsets
        np.minimum.at(flat, bins, _values(thrown, turn))
    empty = np.flatnonzero(flat == _EMPTY)
    if len(empty):  # a hash of its own for each such bin, of every shingle, as in MinHash
        places, bins = empty // NUM_PERM, empty % NUM_PERM
        num = counts[places]
        begins = np.cumsum(num) - num
        thrown = hashes[np.arange(num.sum()) + np.repeat(firsts[places] - begins, num)]
        thrown *= np.repeat(_ODD[_ROUNDS + bins], num)
        flat[empty] = np.minimum.reduceat(_values(thrown, _ROUNDS), begins)
    return rows


def _values(thrown: Array, turn: int) -> Array:
    """uint32 that grow with the round first, from bits of a hash that do not choose the bin."""
    values = (thrown >> np.uint64(64 - _BIN_BITS - _VALUE_BITS)).astype(np.uint32)
    values &= np.uint32(2**_VALUE_BITS - 1)
    values |= np.uint32(turn << _VALUE_BITS)
    return values


def rows_per_band(threshold: float) -> int:
    """The most values a band can have, the fewest wrong candidates, that still finds `_RECALL` at the threshold."""
    fitting = [rows for rows in range(1, NUM_PERM + 1) if 1 - (1 - threshold**rows) ** (NUM_PERM // rows) >= _RECALL]
    return max(fitting, default=1)


class NearDuplicates:
    """The texts kept so far, by signature; about 3 KB each.

    `threshold`: Jaccard similarity of shingles from which a text is a duplicate, above 0 and at most 1.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._rows = rows_per_band(threshold)
        self._buckets: dict[bytes, list[int]] = {}
        self._signatures = np.zeros((1024, NUM_PERM), dtype=np.uint32)
        self._names: list[str] = []

    def add(self, name: str, signature: Array) -> tuple[str, float] | None:
        """Keep a text, or say which kept one it is like and how much (0 to 1), the most similar one."""
        bands = NUM_PERM // self._rows
        keys = [
            bytes([band]) + signature[band * self._rows : (band + 1) * self._rows].tobytes() for band in range(bands)
        ]
        candidates = sorted(set(itertools.chain.from_iterable(self._buckets.get(key, ()) for key in keys)))
        if candidates:
            similar = (self._signatures[candidates] == signature).mean(axis=1)
            best = int(similar.argmax())
            if similar[best] >= self.threshold:
                return self._names[candidates[best]], float(similar[best])
        index = len(self._names)
        if index == len(self._signatures):
            self._signatures = np.concatenate((self._signatures, np.zeros_like(self._signatures)))
        self._signatures[index] = signature
        self._names.append(name)
        for key in keys:
            self._buckets.setdefault(key, []).append(index)
        return None
