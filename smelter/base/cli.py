"""What a person types: a program of commands, and each command's options from a dataclass, with one-line errors.

A command's module is imported only when it is called, so `--help` is quick. tyro explains every option from its
docstring; its boxed errors become `UserError`, so that every mistake, on the command line or in a file, reads alike:
one line that names the fix.
"""

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from smelter.base.errors import UserError, nearest
from smelter.base.signals import Stopped, ending_cleanly
from smelter.base.strict import check_ranges

T = TypeVar("T")


def run(prog: str, usage: str, commands: Mapping[str, tuple[str, str]], argv: Sequence[str] | None = None) -> int:
    """Run one command of a program; 0 on success, 2 on bad input, 141 when nobody reads on, 128 and a signal's number.

    `commands` are the module, whose `main(argv)` is called, and a line of help of each; `usage` has a place for them.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal's encoding need not have every name's letters
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    try:
        try:
            with ending_cleanly():
                return _run(prog, usage, commands, name, rest)
        finally:
            sys.stdout.flush()  # here, where a closed pipe is expected
    except UserError as error:
        message = str(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # The reader (`| head`) has gone; what Python would still flush at exit goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}: check the path, its permissions and the free disk space"
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except Stopped as stopped:
        print(f"{prog}: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    print(f"{prog} {name}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _run(prog: str, usage: str, commands: Mapping[str, tuple[str, str]], name: str, argv: list[str]) -> int:
    if name in ("", "-h", "--help"):
        print(usage.format(commands="\n".join(f"  {name:10} {text}" for name, (_, text) in commands.items())), end="")
        return 0 if name else 2
    if name == "--version":
        from smelter import __version__

        print(f"{prog} {__version__}")
        return 0
    if name not in commands:
        raise UserError(f"unknown command {name!r}: {nearest(name, commands)}")
    return int(importlib.import_module(commands[name][0]).main(argv))


def parse(options: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> T:
    """Parse `argv` into the dataclass `options`; its docstring is the help text.

    Nested dataclasses appear without prefix (`--muon-lr`, or `--muon_lr`). Ranges stand beside the fields, as in
    `strict`. Raises UserError.
    """
    import tyro  # only here: a third of the time of `--help`

    noise = io.StringIO()
    wants_help = bool({"-h", "--help"} & set(argv))
    try:
        with contextlib.redirect_stderr(noise), contextlib.nullcontext() if wants_help else _wide_terminal():
            parsed: T = tyro.cli(
                options,
                args=list(argv),
                prog=prog,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_one_line(noise.getvalue())} (see {prog} --help)") from None
    check_ranges(parsed, as_options=True)
    return parsed


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """tyro breaks its error messages to the terminal's width; they are to stay in one piece."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _one_line(box: str) -> str:
    """What tyro's box says first, and the options that it suggests.

    The box is a title, the message, and maybe suggestions, with rules between them; where stdout is not
    UTF-8 it is drawn with dashes.
    """
    blocks: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines():
        if line.startswith("╭") or not line.strip("│─╰╯- "):
            blocks.append([])
        else:
            blocks[-1].append(re.sub(r"^[│ ] |[│ ]+$", "", line))
    blocks = [block for block in blocks[1:] if block] or [[" ".join(box.split())]]
    # A configuration checks itself: its message names table and key, and the class means nothing to a user.
    message = re.sub(r"^Error parsing [A-Za-z][\w.]*: ", "", blocks[0][0])
    if message.endswith(":"):
        # The options that are missing, each with its help indented below.
        message += f" {', '.join(line.strip() for line in blocks[0] if re.match(r' {4}[^ ]', line))}"
    options = [
        next((line.split()[0].rstrip(",") for line in block[1:] if line.startswith("    -")), "")
        for block in blocks[1:]
        if block[0].startswith(("Perhaps you meant", "Arguments similar to"))
    ]
    hint = " and ".join(filter(None, options))
    return f"{message}: did you mean {hint}?" if hint else message
