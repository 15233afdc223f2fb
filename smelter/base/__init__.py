"""What both programs stand on: what is typed, read and written, foreign code, and what is said when it is wrong."""

from smelter.base import cli, sandbox
from smelter.base.cli import parse, run
from smelter.base.errors import CheckpointError, ConfigError, DataError, UserError, nearest, require
from smelter.base.files import file_sha256, write_json, write_text
from smelter.base.record import (
    MAX_LINE_BYTES,
    MAX_WEIGHT,
    InputFile,
    Record,
    RecordError,
    RecordReader,
    Response,
    content_id,
    output_file,
    read_records,
    write_records,
)
from smelter.base.sandbox import Limits, Reason, SandboxError, run_python
from smelter.base.strict import check_ranges, from_table, read_toml

__all__ = [
    "MAX_LINE_BYTES",
    "MAX_WEIGHT",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "InputFile",
    "Limits",
    "Reason",
    "Record",
    "RecordError",
    "RecordReader",
    "Response",
    "SandboxError",
    "UserError",
    "check_ranges",
    "cli",
    "content_id",
    "file_sha256",
    "from_table",
    "nearest",
    "output_file",
    "parse",
    "read_records",
    "read_toml",
    "require",
    "run",
    "run_python",
    "sandbox",
    "write_json",
    "write_records",
    "write_text",
]
