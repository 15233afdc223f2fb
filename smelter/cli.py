"""Command lines from dataclasses (tyro), with one-line errors.

tyro explains every option from its docstring; its boxed errors become `UserError`, so that every
mistake, on the command line or in a file, reads alike: one line that names the fix.
"""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

from smelter.errors import UserError

T = TypeVar("T")


def parse(options: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> T:
    """Parse `argv` into the dataclass `options`; its docstring is the help text.

    Nested dataclasses appear without prefix (`--muon-lr`, or `--muon_lr`). Raises UserError.
    """
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise):
            return tyro.cli(
                options,
                args=list(argv),
                prog=prog,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(noise.getvalue(), prog)) from None


def _one_line(box: str, prog: str) -> str:
    """tyro's boxed message as one line, with its suggestion."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ").strip() for line in text.splitlines() if line.startswith("│")]
    lines = [line for line in lines if line and not set(line) <= set("─ ")]
    message = lines[0] if lines else text.strip()
    if any(line.startswith("Perhaps you meant") for line in lines):
        start = next(i for i, line in enumerate(lines) if line.startswith("Perhaps you meant"))
        options = [line.split()[0] for line in lines[start + 1 :] if line.startswith("-")]
        if options:
            message += f": did you mean {options[0].rstrip(',')}?"
    return f"{message} (see {prog} --help)"
