"""Tokens out of a model: for one prompt, for many, for a batch that requests join and leave."""

from smelter.decoding.complete import END_OF_LINE, Prompt, complete_many, stop_pattern
from smelter.decoding.engine import Engine, EngineBusy, EngineStopped
from smelter.decoding.prompts import FimOrder, make_prompt
from smelter.decoding.request import Answer, End, Piece, Request, Token

__all__ = [
    "END_OF_LINE",
    "Answer",
    "End",
    "Engine",
    "EngineBusy",
    "EngineStopped",
    "FimOrder",
    "Piece",
    "Prompt",
    "Request",
    "Token",
    "complete_many",
    "make_prompt",
    "stop_pattern",
]
