"""`smelter complete`: a text continued, a gap filled in, or a message answered, from the command line."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from smelter.base import UserError, parse
from smelter.decoding.generate import generate
from smelter.decoding.prompts import EncodedPrompt, FimOrder, make_prompt
from smelter.decoding.request import Request
from smelter.run import load_model, pick_device
from smelter.tokens import ChatFormat, Tokenizer, stop_ids


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


def _encode(options: CompleteOptions, tokenizer: Tokenizer, context: int) -> EncodedPrompt:
    """Raises DataError where a message is to be answered, and the tokenizer knows no conversations."""
    if options.chat is not None:
        messages = [{"role": "user", "content": options.chat}]
        ids = ChatFormat(tokenizer).render(messages, add_generation_prompt=True).ids
        return EncodedPrompt(ids, b"", len(ids), 0)
    prefix, suffix = options.prompt, None
    if prefix is None:
        prefix, suffix = options.prefix or "", options.suffix or ""
    return make_prompt(tokenizer, context, prefix, suffix, max_tokens=options.max_tokens, order=options.fim_order)


def main(argv: list[str]) -> int:
    """`smelter complete`."""
    options = parse(CompleteOptions, argv, "smelter complete")
    infill = options.prefix is not None or options.suffix is not None
    if infill + (options.prompt is not None) + (options.chat is not None) != 1:
        raise UserError("give either --prompt, or --chat, or --prefix and/or --suffix")
    model, tokenizer, _ = load_model(options.checkpoint, device=pick_device(options.device))
    prompt = _encode(options, tokenizer, model.config.max_seq_len)
    request = Request(
        prompt.ids,
        prompt.pending,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop_ids=[tokenizer.eos_id] if options.chat is None else stop_ids(tokenizer),
        line_end=prompt.line_end,
    )
    (row,) = generate(model, tokenizer, [request])
    if prompt.num_dropped:
        print(
            f"smelter complete: the context is {prompt.num_dropped} tokens longer than fits beside the answer: "
            f"used the nearest {prompt.num_tokens}",
            file=sys.stderr,
        )
    sys.stdout.buffer.write(row.text.close().encode())
    if sys.stdout.isatty():
        sys.stdout.buffer.write(b"\n")
    sys.stdout.flush()
    return 0
