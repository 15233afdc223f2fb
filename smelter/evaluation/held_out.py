"""The documents that training did not see, as text."""

from dataclasses import dataclass
from pathlib import Path

from smelter.tokens import Split, Tokenizer, open_shards


@dataclass(frozen=True)
class HeldOut:
    """The held-out split of shards, and what was written in each of its documents."""

    split: Split
    documents: list[bytes]

    @classmethod
    def open(cls, shards: Path, tokenizer: Tokenizer) -> "HeldOut":
        """Raises DataError for shards that cannot be used, or not with this tokenizer."""
        split = open_shards(shards, tokenizer).split("val")
        written = enumerate(zip(*split.written, strict=True))
        return cls(split, [tokenizer.decode_bytes(split.doc(i)[begin:end]) for i, (begin, end) in written])

    def code(self, doc: int) -> str:
        """A document as text; "" for a conversation: there is no gap in one, and nobody types it into a file."""
        return "" if self.split.is_chat(doc) else self.documents[doc].decode(errors="replace")
