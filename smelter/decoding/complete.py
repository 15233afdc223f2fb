"""`smelter complete`: a text continued, a gap filled in, or a message answered, from the command line."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from smelter.base import UserError, parse
from smelter.decoding.generate import generate
from smelter.decoding.healing import Healing
from smelter.decoding.prompts import FimOrder, make_prompt
from smelter.model import Model
from smelter.run import load_model, pick_device
from smelter.tokens import ChatFormat, Tokenizer, stop_ids

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


@dataclass(frozen=True)
class Completion:
    """A completed text; `num_dropped` tokens of the given context did not fit and were left out."""

    text: str
    finish: Literal["stop", "length"]
    num_prompt_tokens: int
    num_dropped: int


def complete_text(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    suffix: str | None = None,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    order: FimOrder = "spm",
) -> Completion:
    """Continue `prompt`, or fill in between `prompt` and `suffix`: see `make_prompt`."""
    asked = make_prompt(tokenizer, model.config.max_seq_len, prompt, suffix, max_tokens=max_tokens, order=order)
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    (result,) = generate(
        model,
        [asked.ids],
        max_tokens=max_tokens,
        stop_ids=[tokenizer.eos_id],
        healing=Healing(tokenizer, [asked.pending]),
        with_logprobs=False,
        **sampling,
    )
    text = tokenizer.decode_bytes(result.ids)[len(asked.pending) :].decode("utf-8", "replace")
    return Completion(text, result.finish, asked.num_tokens, asked.num_dropped)


def answer_messages(
    model: Model,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Completion:
    """The assistant's next message in a conversation of {"role", "content"} messages.

    Raises DataError if the model's tokenizer knows no conversations, UserError if these do not fit the context.
    """
    prompt = ChatFormat(tokenizer).render(messages, add_generation_prompt=True).ids
    (result,) = generate(
        model,
        [prompt],
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_ids=stop_ids(tokenizer),
        with_logprobs=False,
    )
    return Completion(tokenizer.decode(result.ids), result.finish, len(prompt), 0)


@dataclass(frozen=True)
class CompleteOptions:
    """Complete or infill code with a trained model. Standard output is the completion alone."""

    checkpoint: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN_OR_CKPT")]]
    """Run folder (its newest checkpoint) or checkpoint."""
    prompt: str | None = None
    """Text to continue. Give this, or chat, or prefix and suffix."""
    chat: str | None = None
    """Message to answer."""
    prefix: str | None = None
    """Text before the gap to fill in."""
    suffix: str | None = None
    """Text after the gap to fill in."""
    fim_order: FimOrder = "spm"
    """Order of a fill-in prompt: suffix-prefix-middle, or prefix-suffix-middle as llama.cpp has it."""
    max_tokens: int = 64
    """Most tokens to write."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; 1 samples as the model believes."""
    top_k: int = 0
    """Sample among this many likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Sample among the fewest tokens that hold this share of the probability."""
    seed: int = 0
    """Seed of the sampling; the same seed writes the same text."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""


def main(argv: list[str]) -> int:
    """`smelter complete`."""
    options = parse(CompleteOptions, argv, "smelter complete")
    infill = options.prefix is not None or options.suffix is not None
    if infill + (options.prompt is not None) + (options.chat is not None) != 1:
        raise UserError("give either --prompt, or --chat, or --prefix and/or --suffix")
    model, tokenizer, _ = load_model(options.checkpoint, device=pick_device(options.device))
    sampling: dict[str, Any] = {
        name: getattr(options, name) for name in ("max_tokens", "temperature", "top_k", "top_p", "seed")
    }
    if options.chat is not None:
        completion = answer_messages(model, tokenizer, [{"role": "user", "content": options.chat}], **sampling)
    else:
        text = (options.prefix if infill else options.prompt) or ""
        suffix = (options.suffix or "") if infill else None
        completion = complete_text(model, tokenizer, text, suffix, order=options.fim_order, **sampling)
    if completion.num_dropped:
        print(
            f"smelter complete: the context is {completion.num_dropped} tokens longer than fits beside the answer: "
            f"used the nearest {completion.num_prompt_tokens}",
            file=sys.stderr,
        )
    sys.stdout.buffer.write(completion.text.encode())
    if sys.stdout.isatty():
        sys.stdout.buffer.write(b"\n")
    sys.stdout.flush()
    return 0
