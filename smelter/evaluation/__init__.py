"""How good a model is, and how that is told."""

from smelter.evaluation.bpb import validation_loss
from smelter.evaluation.gaps import samples
