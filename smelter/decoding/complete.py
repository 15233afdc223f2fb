"""`smelter complete`: a text continued, a gap filled in, or a message answered, from the command line."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from smelter.base.cli import parse
from smelter.base.errors import UserError
from smelter.decoding.generate import Completion, FimOrder, complete_text, generate, load_model, pick_device
from smelter.model import Model
from smelter.tokens.chat import ChatFormat, stop_ids
from smelter.tokens.tokenizer import Tokenizer


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
