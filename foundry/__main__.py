"""`foundry COMMAND`: each command's module is imported only when it is called, so `--help` is quick."""

import importlib
import os
import sys
from collections.abc import Sequence

from foundry.errors import FoundryError, nearest

COMMANDS = {
    "corpus": ("foundry.corpus", "source trees on this machine -> records"),
    "generate": ("foundry.generate", "teachers -> records, resumable, within a spending cap"),
    "clean": ("foundry.cleaning.clean", "records -> good records; every reject keeps its reason"),
    "stats": ("foundry.stats", "what records hold, what was dropped, teacher against teacher"),
}

USAGE = """usage: foundry COMMAND [OPTIONS]

Make training data for small code models: one JSONL file of records.

commands:
{commands}

`foundry COMMAND --help` explains every option. `smelter tokenize` reads the records.
"""


def _run(name: str, argv: list[str]) -> int:
    if name in ("", "-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items())), end="")
        return 0 if name else 2
    if name == "--version":
        from foundry import __version__

        print(f"foundry {__version__}")
        return 0
    if name not in COMMANDS:
        raise FoundryError(f"unknown command {name!r}: {nearest(name, COMMANDS)}")
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
    except FoundryError as error:
        message = " ".join(str(error).split())
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # The reader (`| head`) has gone; what Python would still flush at exit goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}: check the path, its permissions and the free disk space"
    except KeyboardInterrupt:
        print("foundry: interrupted", file=sys.stderr)
        return 130
    print(f"foundry {name}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
