"""`smelter COMMAND`: each command's module is imported only when it is called, so `--help` is quick."""

import importlib
import os
import sys
from collections.abc import Sequence

from smelter.base.errors import UserError
from smelter.config import nearest

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


def _run(name: str, argv: list[str]) -> int:
    if name in ("", "-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items())), end="")
        return 0 if name else 2
    if name == "--version":
        from smelter import __version__

        print(f"smelter {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: {nearest(name, list(COMMANDS))}")
    return int(importlib.import_module(COMMANDS[name][0]).main(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on bad input, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else ""
    try:
        try:
            return _run(name, argv[1:])
        finally:
            sys.stdout.flush()  # here, where a closed pipe is expected
    except UserError as error:
        message = " ".join(str(error).split())
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}: check the path, its permissions and the free disk space"
    except KeyboardInterrupt:
        print("smelter: interrupted", file=sys.stderr)
        return 130
    print(f"smelter {name}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
