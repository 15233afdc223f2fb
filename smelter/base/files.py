"""What is written: whole or not at all, and on the disk when it is said to be.

A file or folder is written under a temporary name beside its place, brought to the disk and renamed, so a kill, an
error or a full disk at any moment leaves what was there before. Errors speak of the path that was asked for.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from smelter.base.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a write for which there is no room."""


def write_text(path: Path, text: str) -> None:
    """Replace a file by one that holds `text`, in one step; raises what `whole_file` raises."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any, *, indent: int = 2, ensure_ascii: bool = False) -> None:
    """Replace a JSON file in one step. ValueError for NaN and infinities, which JSON has not."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False) + "\n")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file to be written, which takes the name `path` at the end of the block, or is removed where that fails.

    Missing folders are made, and a link stays one. Half a surrogate pair is written as JSON escapes it. Raises
    UserError where `path` is something else than a file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UserError(f"{path}: exists and is not a regular file: choose another output file")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with errors_name(path, temporary):
        make_folder(target.parent)
        try:
            with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:  # an interruption too
            temporary.unlink(missing_ok=True)
            raise
        fsync(target.parent)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to be filled, which takes the name `path` at the end of the block, or is removed where it fails.

    A folder that is there makes way for the new one only when that is on the disk. What a killed process left goes
    with the next try. Missing folders are made, and a link stays one.
    """
    target = Path(os.path.realpath(path))
    temporary, old = target.with_name(f".tmp_{target.name}"), target.with_name(f".tmp-old_{target.name}")

    def put_back() -> None:
        if old.exists() and not target.exists():
            old.rename(target)

    with errors_name(path, temporary):
        put_back()  # of one that was killed between the two renames below
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        make_folder(target.parent)
        try:
            temporary.mkdir()
            yield temporary
            fsync_all(temporary)
            if target.exists():
                target.rename(old)
            temporary.rename(target)
        except BaseException:
            put_back()
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync(target.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def errors_name(path: Path, temporary: Path) -> Iterator[None]:
    """An OSError in the block names `path`, or a file below it, instead of `temporary`, or of none for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None and " requested and " in str(error):  # numpy's words for a full disk
            error.errno, error.strerror = errno.ENOSPC, os.strerror(errno.ENOSPC)
        if error.filename is not None:
            error.filename = str(error.filename).replace(str(temporary), str(path))
        elif error.errno in DISK_FULL:
            error.filename = str(path)
        raise


def append_bytes(path: Path, data: bytes) -> None:
    """Write `data` at the end of a file; it is on the disk when this returns."""
    with errors_name(path, path), path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, so that they survive a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync(path.parent)


def fsync(path: Path) -> None:
    """Bring a file's contents, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and overlay file systems have no fsync for folders; a rename is still atomic there.
        if not (error.errno == errno.EINVAL and path.is_dir()):
            raise
    finally:
        os.close(descriptor)


def fsync_all(folder: Path) -> None:
    """Bring a folder and everything in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        fsync(path)


def file_sha256(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is or will be."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
