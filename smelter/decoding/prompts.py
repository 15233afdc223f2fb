"""How to ask: a text to go on with, or a gap between two, cut to the context, healed where the cursor stands.

Other files come first, each followed by eos, then what the cursor stands in:

    other file [eos] other file [eos] [fim_prefix][fim_suffix] suffix [fim_middle] prefix

That is how training shows them: a row is documents with eos between, each arranged for itself, so never anything but
eos stands before [fim_prefix]. And a cache of keys can be used again up to where two prompts differ: what changes
least is read first, so files that were read once are read, whatever is typed.
"""

from dataclasses import dataclass
from typing import Literal

from smelter.decoding.healing import take_back
from smelter.decoding.line_ends import LF, line_end_of, to_lf
from smelter.tokens import Tokenizer

FimOrder = Literal["spm", "psm"]


def fim_prompt(
    tokenizer: Tokenizer, prefix: str, suffix: str, *, order: FimOrder = "spm", budget: int | None = None
) -> list[int]:
    """Token ids that ask for what stands between prefix and suffix, in either order that training shows.

    spm: [fim_prefix][fim_suffix] suffix [fim_middle] prefix, and the model goes on with the prefix (to be healed).
    psm: [fim_prefix] prefix [fim_suffix] suffix [fim_middle], and the model goes on with the middle.
    Either ends with eos. With `budget` (tokens, at least 3) only the context nearest to the gap is kept.
    """
    if budget is None:
        return tokenizer.fim_prompt(prefix, suffix, use_spm=order == "spm")
    before, after = fit_context(tokenizer.encode(prefix), tokenizer.encode(suffix), budget - 3)
    if order == "spm":
        return [tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, *after, tokenizer.fim_middle_id, *before]
    return [tokenizer.fim_prefix_id, *before, tokenizer.fim_suffix_id, *after, tokenizer.fim_middle_id]


def prompt_budget(context: int, max_tokens: int) -> int:
    """Tokens of the context that a prompt may fill: all but the answer's, and never less than half."""
    return max(context - max_tokens, context // 2)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's tokens, and the bytes that the first new ones spell again; `num_dropped` tokens did not fit."""

    ids: list[int]
    pending: bytes
    num_tokens: int
    num_dropped: int
    line_end: str = LF
    """How the lines of the text end: the model is shown LF."""


def make_prompt(
    tokenizer: Tokenizer,
    context: int,
    prompt: str,
    suffix: str | None,
    *,
    max_tokens: int,
    order: FimOrder = "spm",
    extra: tuple[str, ...] = (),
    heal: bool = True,
) -> EncodedPrompt:
    """How to ask for what follows `prompt`, or where a suffix (even "") is given, for what stands between the two.

    A context longer than the model's `context` is cut to what is nearest to the place of writing; `extra`, texts of
    other files, gets what is left (see `fit_extra`). The cursor may stand inside a word (see `healing`),
    unless `heal` is false: so do others ask.
    """
    budget = prompt_budget(context, max_tokens)
    line_end = line_end_of(prompt, suffix or "")
    prompt, suffix = to_lf(prompt), None if suffix is None else to_lf(suffix)
    if suffix is None:
        whole = tokenizer.encode(prompt)
        used = whole[-budget:]
    else:
        whole = fim_prompt(tokenizer, prompt, suffix, order=order)
        used = fim_prompt(tokenizer, prompt, suffix, order=order, budget=budget) if len(whole) > budget else whole
    others = [token for text in extra for token in (*tokenizer.encode(to_lf(text)), tokenizer.eos_id)]
    num_dropped = len(whole) - len(used) + len(others)
    others = fit_extra(others, budget - len(used), context)
    used = [*others, *used]
    ids, pending = take_back(tokenizer, used) if heal else (used, b"")
    # Nothing: as at the beginning of a document.
    return EncodedPrompt(ids or [tokenizer.eos_id], pending, len(used), num_dropped - len(others), line_end)


def fit_extra(extra: list[int], room: int, context: int) -> list[int]:
    """The end of other files' tokens that fits `room`, and half of the `context`.

    A cut that moved with every key typed would leave nothing of the cache: it moves by a sixteenth of the context. It
    does not move at all while half of the context holds the rest, and so stands where it stood when there was no rest
    yet: when an editor sent its files ahead to have them read.
    """
    room = min(room, context // 2)
    if len(extra) <= room:
        return extra
    step = max(context // 16, 1)
    return extra[len(extra) - room // step * step :]


def fit_context(prefix: list[int], suffix: list[int], budget: int) -> tuple[list[int], list[int]]:
    """The tokens nearest to the cursor that fit `budget`: the prefix's end and the suffix's beginning.

    A quarter of the room is the suffix's; what one side does not need goes to the other.
    """
    budget = max(budget, 0)
    num_suffix = min(len(suffix), max(budget // 4, budget - len(prefix)))
    num_prefix = min(len(prefix), budget - num_suffix)
    return prefix[len(prefix) - num_prefix :], suffix[:num_suffix]
