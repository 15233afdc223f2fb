"""What teachers are asked."""

from foundry.seeds.turns import iterate
from foundry.seeds.seed import Seed

__all__ = [
    "Seed",
    "iterate",
]
