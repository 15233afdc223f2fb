"""Tokens out of a model: for one prompt, for many, for a batch that requests join and leave."""

from smelter.decoding.engine import Answer, Counts, Engine, EngineBusy, EngineStopped
from smelter.decoding.generate import Prompt, complete_many, generate_in_batches
from smelter.decoding.prompts import FimOrder, make_prompt
from smelter.decoding.request import End, Finish, Piece, Request, Token
from smelter.decoding.sentinels import read_prompt
