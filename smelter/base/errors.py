"""Errors that a person can act on.

A `UserError` says in one line what was wrong, where (file, line or key), and the fix. The command line prints that
line and exits with code 2; everything else is a defect of ours and keeps its traceback. The whole tree:

    UserError                       input that cannot be used
    ├── ConfigError                 a recipe, a foundry.toml, an option
    ├── DataError                   a record, shard or tokenizer file
    │   └── RecordError             smelter.base.record: a line that is no record
    ├── CheckpointError             missing, truncated, or of another model
    ├── JournalError                foundry.journal: damaged, or in use
    ├── BudgetReachedError          foundry.ledger: the spending cap
    └── TeacherError                foundry.teacher: no answer to a question (five kinds; three are asked again)
"""

import difflib
from collections.abc import Collection


class UserError(ValueError):
    """Input that cannot be used: the message is one line that names what, where and the fix."""


class ConfigError(UserError):
    """A recipe, a foundry.toml or a command-line option that does not make sense."""


class DataError(UserError):
    """A record, shard or tokenizer file that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, truncated or of another model."""


def require(condition: bool, message: str) -> None:
    """ConfigError with `message` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def nearest(name: str, known: Collection[str]) -> str:
    """A hint that names the known word nearest to `name`, or all known words where none is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
