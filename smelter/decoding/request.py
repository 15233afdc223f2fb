"""What is asked of a model, and what comes back of the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from smelter.decoding.line_ends import LF
from smelter.decoding.text import Stop

Finish = Literal["stop", "length", "time", "cancelled", "error"]
Top = tuple[tuple[int, float], ...]
"""The likeliest tokens and their log-probabilities."""


@dataclass(frozen=True)
class Request:
    """What to continue and how; `ids` and `pending` as in `prompts.EncodedPrompt`."""

    ids: Sequence[int]
    pending: bytes = b""
    max_tokens: int = 64
    """Most tokens that add to the text; those that only spell `pending` do not count.

    0 writes nothing: the prompt is read, and kept for prompts that begin like it.
    """
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stops: Sequence[Stop] = ()
    stop_ids: Sequence[int] = ()
    num_top: int | None = None
    """With each token its log-probability is told and this many likeliest tokens; None tells neither: quicker."""
    scored_ids: Sequence[int] = ()
    """The prompt as its text is encoded, whose log-probabilities are told first; `ids` may be others, to be healed."""
    max_seconds: float | None = None
    """Time to write, from the first token on, for who is served; when it is over the next line break is the end."""
    min_p: float = 0.0
    """Drop tokens with less than this share of the likeliest's probability; 0 drops none."""
    n_indent: int = 0
    """End before a line, the first apart, that is indented by fewer blanks (see `text`); 0 never does."""
    infill_sampler: bool = False
    """End where the model is not sure how to go on; see `infill`."""
    line_end: str = LF
    """How the file's lines end, and so those of the answer; see `line_ends`."""


@dataclass(frozen=True)
class Token:
    """A token of the answer: the bytes that it adds to the text, its log-probability, and the likeliest instead.

    The log-probability is None where nobody asked for it, and for a prompt's first token.
    """

    id: int
    raw: bytes
    logprob: float | None
    top: Top = ()


@dataclass(frozen=True)
class End:
    """Why an answer ended, and what it took; `num_cached` prompt tokens needed no reading.

    `num_tokens` as `max_tokens` counts them. Times in seconds.
    """

    finish: Finish
    stop: str | None = None
    num_prompt: int = 0
    num_cached: int = 0
    num_tokens: int = 0
    wait_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Piece:
    """What comes of an answer: text, the tokens that it completes, and at last the end.

    `prompt` holds the prompt's tokens, where the request asked for their log-probabilities.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    end: End | None = None
    prompt: tuple[Token, ...] = ()
