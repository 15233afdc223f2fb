"""Writing a teacher's cache so that a kill or a full disk costs seconds, not the whole.

Records are appended to the rows file. Every so often the file is fsynced, and only then are the records' lengths
appended to `row_bytes.bin` and fsynced too: a row is done if its length is there, and whatever the rows files hold
beyond that is cut off when the work goes on. `unfinished.json` says what is being made, so that only the same can go
on; `index.json` takes its place at the end. Nothing depends on when the process was killed, so the bytes do not.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from smelter.base import (
    DISK_FULL,
    LOCK_FILE,
    ConfigError,
    DataError,
    append_bytes,
    file_sha256,
    free_bytes,
    fsync,
    make_folder,
    megabytes,
    sealed,
    write_json,
)
from smelter.distillation.cache import INDEX, LENGTH_DTYPE, LENGTHS, UNFINISHED, TeacherCache

Resume = Literal["auto", "must", "never"]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """An index's settings in one level: arrangement.seed and so on."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def begin(folder: Path, settings: dict[str, Any], resume: Resume) -> int | None:
    """Rows that `folder` holds of the cache with these settings; None where the cache is complete.

    Raises what `state_of` raises. Changes nothing.
    """
    state = state_of(folder, settings, resume)
    if state == "complete":
        return None
    return len(_lengths(folder, settings)) if state == "unfinished" else 0


def state_of(folder: Path, settings: dict[str, Any], resume: Resume) -> Literal["new", "unfinished", "complete"]:
    """How far a folder with these settings has come.

    Raises DataError where `must` finds nothing, `never` finds something or the folder is another thing, and
    ConfigError naming the settings in which what is there differs. Changes nothing.
    """
    state = next((name for name in (INDEX, UNFINISHED) if (folder / name).is_file()), None)
    if state is None:
        if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {LOCK_FILE}):
            raise DataError(f"{folder}: exists and is not a teacher's cache: choose another --out")
        if resume == "must":
            raise DataError(f"{folder}: nothing to go on with: use --resume auto to begin")
        return "new"
    if resume == "never":
        raise DataError(f"{folder}: already holds a cache, which --resume never leaves alone: choose another --out")
    try:
        earlier = _flat(json.loads((folder / state).read_text(encoding="utf-8")))
    except (ValueError, AttributeError):
        raise DataError(f"{folder / state}: damaged: remove {folder}, or choose another --out") from None
    differing = [
        f"{key} = {value!r} (there: {earlier.get(key)!r})"
        for key, value in _flat(settings).items()
        if earlier.get(key) != value and key != "teacher.path"
    ]
    if differing:
        raise ConfigError(
            f"{folder}: holds a cache made otherwise: {', '.join(differing)}: set them back, or choose another --out"
        )
    return "complete" if state == INDEX else "unfinished"


def begin_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder that says what is being made, and that it is not finished."""
    make_folder(folder)
    write_json(folder / UNFINISHED, settings, indent=1, ensure_ascii=True)


def finish_folder(folder: Path, index: dict[str, Any]) -> None:
    """Write the index, which takes the place of what `begin_folder` wrote."""
    write_json(folder / INDEX, sealed(index), indent=1, ensure_ascii=True)
    (folder / UNFINISHED).unlink()
    fsync(folder)


def _lengths(folder: Path, settings: dict[str, Any]) -> list[int]:
    """Lengths of the rows that are safely written."""
    file = folder / LENGTHS
    raw = file.read_bytes() if file.is_file() else b""
    lengths = np.frombuffer(raw[: len(raw) // LENGTH_DTYPE.itemsize * LENGTH_DTYPE.itemsize], dtype=LENGTH_DTYPE)
    # A file that grew before a power cut and was not filled ends in zeros; no record is that short.
    safe: list[int] = lengths[: int(np.argmin(lengths)) if len(lengths) and not lengths.min() else None].tolist()
    return safe[: settings["arrangement"]["num_rows"]]


class CacheWriter:
    """Appends records to a cache and finishes it; `num_rows` are safe or on their way."""

    def __init__(self, folder: Path, settings: dict[str, Any], file_bytes: int) -> None:
        """Begin, or go on where `begin` found something: a new file of rows for every `file_bytes`."""
        self.folder, self.settings, self.file_bytes = folder, settings, file_bytes
        self.files: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._waiting: list[int] = []
        with self._full_disk_is_said():
            begin_folder(folder, settings)
            done = _lengths(folder, settings)
            for length in done:
                self._count(length)
            for file in folder.glob("rows_*.bin"):
                if file.name not in {entry["name"] for entry in self.files}:
                    file.unlink()
            for entry in self.files:
                self._cut(folder / entry["name"], entry["bytes"])
            lengths = folder / LENGTHS
            lengths.touch()
            self._cut(lengths, len(done) * LENGTH_DTYPE.itemsize)
            if self.files:
                self._file = (folder / self.files[-1]["name"]).open("ab")
            fsync(folder)
        self.num_rows = len(done)

    @property
    def num_bytes(self) -> int:
        """Bytes of all records."""
        return sum(entry["bytes"] for entry in self.files)

    def _cut(self, file: Path, size: int) -> None:
        if not file.is_file() or file.stat().st_size < size:
            raise DataError(f"{file}: shorter than {self.folder / LENGTHS} says: remove {self.folder} and begin anew")
        os.truncate(file, size)

    def _count(self, length: int) -> bool:
        """Put a record of this length down in the table of files; whether it begins one."""
        is_new = not self.files or self.files[-1]["bytes"] + length > self.file_bytes
        if is_new:
            self.files.append({"name": f"rows_{len(self.files):05d}.bin", "rows": 0, "bytes": 0})
        self.files[-1]["rows"] += 1
        self.files[-1]["bytes"] += length
        return is_new

    def append(self, record: bytes) -> None:
        """The next row's record."""
        with self._full_disk_is_said():
            if self._count(len(record)):
                if self._file is not None:
                    self._sync_rows()
                    self._file.close()
                self._file = (self.folder / self.files[-1]["name"]).open("wb")
                fsync(self.folder)  # so that its name survives a power cut
            assert self._file is not None
            self._file.write(record)
        self._waiting.append(len(record))
        self.num_rows += 1

    def flush(self) -> None:
        """Make every appended row safe."""
        if not self._waiting:
            return
        with self._full_disk_is_said():
            self._sync_rows()
            append_bytes(self.folder / LENGTHS, np.array(self._waiting, dtype=LENGTH_DTYPE).tobytes())
        self._waiting = []

    def finish(self) -> TeacherCache:
        """Flush, sum up, write the index; returns the cache, open."""
        self.flush()
        self.close()
        with self._full_disk_is_said():
            index = self.settings | {
                "files": [entry | {"sha256": file_sha256(self.folder / entry["name"])} for entry in self.files],
                "row_bytes": {"name": LENGTHS, "sha256": file_sha256(self.folder / LENGTHS)},
            }
            cache = TeacherCache(self.folder, index)
            tokens = entries = 0
            nats = 0.0
            for number in range(cache.num_rows):
                row, entropy = cache.row(number)
                tokens += int(np.count_nonzero(row.counts))
                entries += len(row.ids)
                nats += float(entropy.sum(dtype=np.float64))
            size = cache.num_rows * cache.arrangement.seq_len
            index |= {
                "num_tokens": tokens,
                "mean_entropy": nats / max(tokens, 1),
                "mean_entries": entries / max(tokens, 1),
                "bytes_per_token": (self.num_bytes + cache.num_rows * LENGTH_DTYPE.itemsize) / size,
            }
            finish_folder(self.folder, index)
        return TeacherCache(self.folder, index)

    def close(self) -> None:
        """Close the file; what was not flushed is written again by the next run."""
        if self._file is not None:
            # Closing writes what is buffered, which a full disk refuses once more.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _sync_rows(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _full_disk_is_said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            done = len(_lengths(self.folder, self.settings))
            left = self.settings["arrangement"]["num_rows"] - done
            needed = left * self.num_bytes // max(sum(entry["rows"] for entry in self.files), 1)
            raise DataError(
                f"{self.folder}: {error.strerror} after {done:,} rows: {megabytes(needed)} more are needed and "
                f"{megabytes(free_bytes(self.folder))} are free: make room and run the same command, which goes on"
            ) from None
