"""What both programs stand on: what is typed, read and written, foreign code, and what is said when it is wrong."""

from smelter.base import cli
from smelter.base.cli import parse, run
from smelter.base.errors import CheckpointError, ConfigError, DataError, UserError, nearest, require
from smelter.base.files import (
    DISK_FULL,
    append_bytes,
    errors_name,
    file_sha256,
    free_bytes,
    fsync,
    fsync_all,
    make_folder,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)
from smelter.base.keys import key_from_environment
from smelter.base.lock import LOCK_FILE, only_writer
from smelter.base.record import (
    MAX_LINE_BYTES,
    MAX_WEIGHT,
    InputFile,
    Record,
    RecordError,
    RecordReader,
    Response,
    content_id,
    read_records,
    write_records,
)
from smelter.base.sandbox import Limits, Reason, SandboxError, run_python
from smelter.base.seal import is_intact, sealed
from smelter.base.signals import left_alone, stop_signals
from smelter.base.strict import check_ranges, from_table, read_toml
from smelter.base.terminal import Progress, megabytes, percent, short_duration, short_number, table
