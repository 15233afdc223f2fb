"""What a teacher with another tokenizer says of every training document, on the disk. `smelter teach` writes it.

The folder, all little-endian:

    index.json     what it was made from; the files with their sizes and sha256; counts
    chunks.f16     [num_tokens of the train split]: `tokens.chunk_log_probs` of every document, and NaN for eos
    states.u1      [num_docs]: whether the teacher has read the document, or why not (`READ`, `NOT_SPELT`, `NOT_TEXT`)

It belongs to the shards alone, not to an arrangement of their rows: whatever the context length, the seed and the
rate of fill-in-the-middle, a row takes the slices of its documents. Two bytes a token; float16 is right to three
digits of a chunk's nats.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smelter.base import ConfigError
from smelter.distillation.cache import AGAIN, check_files, finished_index
from smelter.tokens import ShardSet, alignment

FORMAT = "smelter-chunk-teacher"
VALUES, STATES = "chunks.f16", "states.u1"
VALUE_DTYPE = np.dtype("<f2")
READ, NOT_SPELT, NOT_TEXT = 1, 2, 3
"""States of a document: read; the teacher's tokens do not spell its bytes; it holds tokens that stand for no text."""


class ChunkTeacher:
    """A finished folder, open for reading. From `ChunkTeacher.open`."""

    def __init__(self, path: Path, index: dict[str, Any], shards: ShardSet) -> None:
        self.path, self.index = path, index
        self._offsets = shards.split("train").offsets
        self._values: NDArray[np.float16] = np.memmap(path / VALUES, dtype=VALUE_DTYPE, mode="r")

    @classmethod
    def open(cls, path: Path, shards: ShardSet, *, verify: bool = False) -> "ChunkTeacher":
        """Check that it is whole and of these shards, with `verify` also every file's sha256.

        Raises DataError for a damaged or unfinished folder, and ConfigError that says which of shards and tokenizer
        is another.
        """
        index = finished_index(path, FORMAT, "smelter teach --method chunks")
        for name, here in (("tokenizer", shards.tokenizer.hash), ("shards", shards.hash)):
            if index[name] != here:
                raise ConfigError(
                    f"distillation.chunk_teachers: {path} was made for other {name} than those of {shards.path} "
                    f"({index[name][:12]}, not {here[:12]}): {AGAIN}"
                )
        check_files(path, index["files"], verify)
        return cls(path, index, shards)

    def chunks(self, doc: int, begin: int, size: int) -> alignment.Chunks:
        """The chunks among tokens begin .. begin + size - 1 of a training document, its eos included."""
        start, end = int(self._offsets[doc]), int(self._offsets[doc + 1])
        return alignment.chunks_of_slice(self._values[start:end], begin, size)
