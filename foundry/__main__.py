"""The commands of `foundry`; each one's module is imported only when it is called, so `--help` is quick."""

import sys
from collections.abc import Sequence

from smelter.base import run

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on bad input, 130 when interrupted."""
    return run("foundry", USAGE, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
