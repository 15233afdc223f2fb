"""The commands of `smelter`; each one's module is imported only when it is called, so `--help` is quick."""

import sys
from collections.abc import Sequence

from smelter.base import run

COMMANDS = {
    "tokenize": ("smelter.tokens.tokenize", "JSONL records -> tokenizer and packed shards"),
    "teach": ("smelter.distillation.teach", "a local teacher's probabilities, stored beside the shards for training"),
    "train": ("smelter.train", "shards -> a trained model, resumable (also under torchrun)"),
    "evaluate": ("smelter.evaluation.evaluate", "bits per byte, gaps filled in, pass@k; two models beside each other"),
    "complete": ("smelter.decoding.complete", "complete or infill code, or answer, from the command line"),
    "serve": ("smelter.serving.serve", "the model behind HTTP: for editors, OpenAI clients, and a page"),
    "export": ("smelter.export.export", "checkpoint -> Hugging Face folder or GGUF file"),
    "report": ("smelter.evaluation.report", "run folder -> one self-contained HTML page"),
}

USAGE = """usage: smelter COMMAND [OPTIONS]

Train small ternary (BitNet b1.58) code models and hand them to the tools you use.

commands:
{commands}

`smelter COMMAND --help` explains every option. Training data comes from `foundry`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on bad input, 130 when interrupted."""
    return run("smelter", USAGE, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
