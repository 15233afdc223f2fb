"""Errors that a person can act on.

`UserError` says in one line what was wrong, where (file, line or key), and the fix. The command
line prints that line and exits with code 2; everything else is a defect of ours and keeps its
traceback.
"""


class UserError(ValueError):
    """Input that cannot be used: the message is one line that names what, where and the fix."""


class ConfigError(UserError):
    """A recipe or command-line option that does not make sense."""


class DataError(UserError):
    """A record, shard or tokenizer file that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, truncated or of another model."""
