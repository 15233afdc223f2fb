"""Exact and near duplicates, by signatures that stay in memory while the texts stream by.

Exact: equal tokens, whatever the white space (16 bytes a text). Near: MinHash over shingles of five tokens
(Broder 1997), 128 values of 32 bits a text, made by rensa's R-MinHash; bands of values find candidates (LSH), and
each candidate is verified against the threshold by all 128. The Jaccard similarity is thus estimated, with a
standard error of 0.035 at 0.8; a pair that close to the threshold may fall either way, always the same way.

Tokens are split and hashed for a batch of texts at once in numpy: a polynomial of each token's bytes from prefix
sums modulo 2^64. Strings in Python would take ten times as long as the signatures.
"""

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import rensa  # type: ignore[import-untyped]

NUM_PERM = 128
"""Values in a signature."""
SHINGLE = 5
"""Tokens in a shingle."""
_SEED = 42
_RECALL = 0.99
"""Share of the pairs at the threshold that the bands must find."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_TOKENS = re.compile(r"\w+|[^\w\s]")

Array = np.ndarray[Any, Any]

_SPACE, _WORD, _OTHER = 0, 1, 2
_CLASS = np.full(256, _OTHER, dtype=np.uint8)
_CLASS[list(b" \t\n\r\f\v")] = _SPACE
_CLASS[[code for code in range(256) if code >= 128 or chr(code).isalnum() or code == ord("_")]] = _WORD


def exact_key(text: str) -> bytes:
    """16 bytes that two texts share if they differ in white space alone."""
    return hashlib.blake2b("\n".join(_TOKENS.findall(text)).encode(), digest_size=16).digest()


def shingle_hashes(texts: Sequence[str]) -> tuple[Array, Array]:
    """64-bit hashes of all shingles, and where each text's begin: uint64 [N], uint64 [texts + 1].

    Each text has as many shingles as tokens (its end is padded), at least one.
    """
    padding = b"\0" * SHINGLE  # each is a token of its own, so that no shingle spans two texts
    encoded = [text.replace("\0", " ").encode() + padding for text in texts]
    ends = np.cumsum([len(data) for data in encoded])
    data = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    kind = _CLASS[data]
    is_word = kind == _WORD
    starts_here = kind == _OTHER
    starts_here[0] |= is_word[0]
    starts_here[1:] |= is_word[1:] & ~is_word[:-1]
    begins = np.flatnonzero(starts_here)
    # A token ends where its word does.
    no_word = np.flatnonzero(~is_word)
    stops = np.where(
        is_word[begins], no_word[np.minimum(np.searchsorted(no_word, begins), len(no_word) - 1)], begins + 1
    )
    powers = np.cumprod(np.full(len(data), _BASE, dtype=np.uint64))
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers)))
    # Divided by the power of the token's place: the same token hashes alike wherever it stands, in any batch.
    tokens = _mixed((sums[stops] - sums[begins]) * np.cumprod(np.full(len(data), _INVERSE, dtype=np.uint64))[begins])
    hashes = np.zeros(max(0, len(tokens) - SHINGLE + 1), dtype=np.uint64)
    for place in range(SHINGLE):
        hashes = hashes * _BASE + tokens[place : place + len(hashes)]
    real = np.flatnonzero(data[begins[: len(hashes)]] != 0)
    firsts = np.concatenate(([0], np.searchsorted(begins[real], ends)))
    hashes = _mixed(hashes[real])
    if (np.diff(firsts) == 0).any():  # nothing but white space: a shingle that stands for it
        hashes = np.insert(hashes, firsts[:-1][np.diff(firsts) == 0], np.uint64(0))
        firsts = np.concatenate(([0], np.cumsum(np.maximum(np.diff(firsts), 1))))
    return hashes, firsts.astype(np.uint64)


def _mixed(values: Array) -> Array:
    """splitmix64's finish: every bit depends on every other."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def signatures(texts: Sequence[str]) -> Array:
    """MinHash signatures, uint32 [texts, NUM_PERM]."""
    if not texts:
        return np.zeros((0, NUM_PERM), dtype=np.uint32)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(*shingle_hashes(texts), NUM_PERM, _SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)


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
