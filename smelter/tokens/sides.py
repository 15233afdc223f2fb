"""Which side of the split each document is on, so that what is held out was not trained on.

Documents of one source (a file, a repository, a prompt) are on the same side, by the hash of the source's name: a
document that is added later moves none of the others. One text may stand in sources that fall to both sides (a file
that two repositories have, a prompt that two records ask): its copies then go to one side, by the hash of the text.
What a record says itself is never overruled, only counted.
"""

import hashlib
from array import array
from dataclasses import dataclass

import numpy as np

from smelter.base import DataError, nearest
from smelter.tokens.documents import Document, Records
from smelter.tokens.shards import SPLITS


class Sides:
    """Of a document: its record's word, else that of its text's copies, of its source, of its source's hash."""

    def __init__(self, val_fraction: float) -> None:
        self.val_fraction = val_fraction
        self._said: dict[str, str] = {}
        self._joined: dict[bytes, str] = {}

    def hear(self, document: Document) -> None:
        """Note what a record says about its source."""
        if document.split:
            self._said.setdefault(document.source, document.split)

    def word(self, source: str) -> str:
        """What the first of a source's records to say a side says; "" if none does."""
        return self._said.get(source, "")

    def join(self, text: bytes, words: set[str]) -> str:
        """Put all copies of a text (its `text_key`) on one side, which is returned: that of `words` if they agree."""
        self._joined[text] = words.pop() if len(words) == 1 else self._by_hash(text)
        return self._joined[text]

    def of(self, document: Document) -> str:
        """ "train" or "val"; call once every document was heard."""
        if document.split:
            return document.split
        joined = self._joined.get(text_key(document)) if self._joined else None
        return joined or self.word(document.source) or self._by_hash(hashlib.sha256(document.source.encode()).digest())

    def _by_hash(self, digest: bytes) -> str:
        return "val" if int.from_bytes(digest[:8], "big") < self.val_fraction * 2**64 else "train"


def text_key(document: Document) -> bytes:
    """What should not be on both sides: the hash of a document's text, of a conversation's prompt."""
    return hashlib.sha256((document.prompt or document.text).encode()).digest()


@dataclass(frozen=True)
class Survey:
    """What a first reading of the records found."""

    sides: Sides
    num_docs: dict[str, int]
    num_bytes: dict[str, int]
    num_chats: int
    num_joined: int
    """Texts whose copies were brought to one side."""
    num_leaked: int
    """Held-out documents whose text or prompt is also trained on, as their records say."""
    leaked_bytes: int
    """Their bytes."""


def survey(records: Records, val_fraction: float) -> Survey:
    """Read and check every record. Raises DataError for a bad one, and where a side would be empty."""
    sides = Sides(val_fraction)
    # A row per document: number of its text, number of its source and the record's word, bytes.
    rows = array("q")
    texts: dict[bytes, int] = {}
    groups: dict[tuple[str, str], int] = {}
    num_chats = 0
    for document in records:
        sides.hear(document)
        rows.append(texts.setdefault(text_key(document), len(texts)))
        rows.append(groups.setdefault((document.source, document.split), len(groups)))
        rows.append(len(document.content.encode()))
        num_chats += bool(document.prompt)
    for name in records.teacher_weights:
        if name not in records.teachers:
            known = nearest(name, list(records.teachers)) if records.teachers else "no record has responses"
            raise DataError(f"--teacher-weight: no response is of teacher {name!r}: {known}")
    if not rows:
        raise DataError(f"{records.paths[0]}: no usable record in {len(records.paths)} file(s): nothing to tokenize")
    text, group, size = np.frombuffer(rows, dtype=np.int64).reshape(-1, 3).T
    in_val = np.array([sides.of(Document("", source, split, 1.0)) == "val" for source, split in groups])[group]
    torn = np.zeros(len(texts), dtype=bool)
    torn[np.intersect1d(text[in_val], text[~in_val])] = True
    words: dict[int, set[str]] = {index: set() for index in np.flatnonzero(torn).tolist()}
    says = [split or sides.word(source) for source, split in groups]
    for place in np.flatnonzero(torn[text]).tolist():
        words[int(text[place])] |= {says[group[place]]} - {""}
    keys = list(texts)
    joined = np.array([index in words and sides.join(keys[index], words[index]) == "val" for index in range(len(keys))])
    is_free = np.array([not split for _, split in groups])[group]
    moved = torn[text] & is_free
    in_val[moved] = joined[text[moved]]
    leaked = in_val & np.isin(text, text[~in_val])
    docs_of = {"train": int((~in_val).sum()), "val": int(in_val.sum())}
    for side in SPLITS:
        if not docs_of[side]:
            way = "raise" if side == "val" else "lower"
            raise DataError(
                f"{records.paths[0]}: none of {len(text):,} documents is in {side!r} (they are split by source): give "
                f'some records "split": "{side}", or {way} --val-fraction (now {val_fraction:g})'
            )
    bytes_of = {"train": int(size[~in_val].sum()), "val": int(size[in_val].sum())}
    num_joined = len(words) - len(np.unique(text[leaked]))
    return Survey(sides, docs_of, bytes_of, num_chats, num_joined, int(leaked.sum()), int(size[leaked].sum()))
