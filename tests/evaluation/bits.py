"""Bits per byte over a whole split, for tests that need nothing else of it."""

from typing import Any

from smelter.evaluation.bpb import bits_per_byte, document_nats
from smelter.model import Model
from smelter.tokens.shards import Split


def bits_of_split(model: Model, split: Split, **options: Any) -> float:
    """The options are those of `document_nats`."""
    return bits_per_byte(float(document_nats(model, split, **options).sum()), split.num_bytes)
