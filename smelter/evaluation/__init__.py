"""How good a model is, and how that is told."""

from smelter.evaluation.bpb import validation_loss
from smelter.evaluation.gaps import samples
from smelter.evaluation.results import table, write_json

__all__ = [
    "samples",
    "table",
    "validation_loss",
    "write_json",
]
