"""What teachers are asked."""

from foundry.seeds.seed import Seed, iterate

__all__ = [
    "Seed",
    "iterate",
]
