"""What teachers are asked."""

from foundry.seeds.seed import Seed
from foundry.seeds.turns import iterate
