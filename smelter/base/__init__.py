"""What both programs stand on: what is typed, read and written, foreign code, and what is said when it is wrong."""

from smelter.base import cli, sandbox
from smelter.base.cli import parse, run
from smelter.base.errors import CheckpointError, ConfigError, DataError, UserError, nearest, require
from smelter.base.files import file_sha256
from smelter.base.record import Record, Response, content_id, read_records, record_from_json, write_records
from smelter.base.sandbox import Limits, Reason, SandboxError, run_python
from smelter.base.strict import check_ranges, from_table, read_toml

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Limits",
    "Reason",
    "Record",
    "Response",
    "SandboxError",
    "UserError",
    "check_ranges",
    "cli",
    "content_id",
    "file_sha256",
    "from_table",
    "nearest",
    "parse",
    "read_records",
    "read_toml",
    "record_from_json",
    "require",
    "run",
    "run_python",
    "sandbox",
    "write_records",
]
