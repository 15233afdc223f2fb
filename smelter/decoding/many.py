"""Many completions at once: batches of prompts of any lengths, each ended where a pattern says so.

A pattern (of bytes, searched in what was written) does what stop sequences do, and more: "the first line break after
something was written" ends a line that may begin with indentation. A row that has ended leaves the batch, so a batch
costs what its longest rows cost.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smelter.decoding.generate import FimOrder, generate, make_prompt
from smelter.decoding.healing import Healing
from smelter.evaluation.gaps import InfillCase, choose_cases
from smelter.model import Model
from smelter.tokens.tokenizer import Tokenizer

LINE_BREAK = re.compile(rb"\n")
END_OF_LINE = re.compile(rb"(?<=[^\s])[^\S\n]*\n")
"""The first line break after something that is no space."""
SCORES_AT_ONCE = 2**23
"""Numbers in a prefill's [B, T, T]: with the heads, a few hundred megabytes."""
MAX_BATCH_SIZE = 64


@dataclass(frozen=True)
class Prompt:
    """Text to continue or, with a suffix (even ""), a gap to fill in; what matches `stop` ends it and is cut off."""

    prefix: str
    suffix: str | None = None
    stop: re.Pattern[bytes] | None = None


def stop_pattern(stops: Sequence[str]) -> re.Pattern[bytes]:
    """Matches the first of the given stop sequences."""
    return re.compile(b"|".join(re.escape(stop.encode()) for stop in stops))


class _Stops:
    """What each row has written, and whether its pattern is in there; `skip[row]` bytes are the prompt's own."""

    def __init__(self, tokenizer: Tokenizer, patterns: Sequence[re.Pattern[bytes] | None], skip: Sequence[int]) -> None:
        self._bytes_of = tokenizer.decode_bytes
        self._patterns, self._skip = patterns, skip
        self._written = [bytearray() for _ in patterns]

    def __call__(self, row: int, token: int) -> bool:
        self._written[row] += self._bytes_of([token])
        return self._match(row) is not None

    def _match(self, row: int) -> re.Match[bytes] | None:
        pattern = self._patterns[row]
        return pattern.search(self._written[row], self._skip[row]) if pattern is not None else None

    def text(self, row: int) -> str:
        """What the row wrote, up to its stop."""
        match = self._match(row)
        return bytes(self._written[row][self._skip[row] : match.start() if match else None]).decode("utf-8", "replace")


def complete_many(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    order: FimOrder = "spm",
    progress: Callable[[int], None] | None = None,
    each: Callable[[int, str], None] | None = None,
) -> list[str]:
    """What the model writes for every prompt, in their order; texts are the same for every batch size.

    Context that does not fit beside `max_tokens` (or half the model's context, if that is more) is left out, the
    farthest first. Row i samples with seed `seed + i`. `each(i, text)` is called as soon as a batch is done,
    `progress` with the number that is.
    """
    context = model.config.max_seq_len
    asked = [
        make_prompt(tokenizer, context, prompt.prefix, prompt.suffix, max_tokens=max_tokens, order=order)
        for prompt in prompts
    ]
    longest = max((len(each.ids) for each in asked), default=1)
    batch_size = max(1, min(MAX_BATCH_SIZE, SCORES_AT_ONCE // longest**2))
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = asked[start : start + batch_size]
        pending = [each.pending for each in batch]
        patterns = [prompt.stop for prompt in prompts[start : start + batch_size]]
        stops = _Stops(tokenizer, patterns, [len(spelt) for spelt in pending])
        generate(
            model,
            [each.ids for each in batch],
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed + start,
            stop_ids=[tokenizer.eos_id],
            healing=Healing(tokenizer, pending),
            until=stops,
            with_logprobs=False,
        )
        for row in range(len(batch)):
            texts.append(stops.text(row))
            if each is not None:
                each(start + row, texts[-1])
        if progress is not None:
            progress(len(texts))
    return texts


def infill_lines(
    model: Model,
    tokenizer: Tokenizer,
    cases: Sequence[InfillCase],
    *,
    order: FimOrder = "spm",
    max_tokens: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy line for every case: up to its end of text or the first line break."""
    prompts = [Prompt(case.prefix, case.suffix, LINE_BREAK) for case in cases]
    return complete_many(model, tokenizer, prompts, max_tokens=max_tokens, order=order, progress=progress)


def samples(
    model: Model,
    tokenizer: Tokenizer,
    num_docs: int,
    doc: Callable[[int], Sequence[int]],
    *,
    num_samples: int = 4,
    max_tokens: int = 48,
    context_characters: int = 400,
    seed: int = 0,
) -> list[dict[str, str]]:
    """What the model writes into the same few held-out lines, as {prefix, suffix, completion, expected}.

    `doc(i)` is held-out document i as token ids (`split.num_docs, split.doc`). Prefix and suffix are shortened
    to `context_characters` each, in the prompt too, so that samples stay cheap and readable.
    """
    found = choose_cases(num_docs, lambda i: tokenizer.decode([int(t) for t in doc(i)]), num_samples, seed)
    cases = [
        InfillCase(case.doc, case.prefix[-context_characters:], case.middle, case.suffix[:context_characters])
        for case in found
    ]
    lines = infill_lines(model, tokenizer, cases, max_tokens=max_tokens)
    return [
        {"prefix": case.prefix, "suffix": case.suffix, "completion": line, "expected": case.middle}
        for case, line in zip(cases, lines, strict=True)
    ]
