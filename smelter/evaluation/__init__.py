"""How good a model is, and how that is told."""

from smelter.evaluation.bpb import validation_loss
from smelter.evaluation.gaps import samples
from smelter.evaluation.middles import middle_bpb
from smelter.evaluation.places import CONTEXT_CHARACTERS, Place, PlaceKind, choose_places
from smelter.evaluation.servers import Server, ask_server
from smelter.evaluation.suggestions import score
