"""One writer a folder: whoever comes second is told who is there, and has changed nothing.

The lock is the kernel's (`flock`), so a process that is killed leaves none behind; the file that carries it says who
holds it, and goes with its holder. What a killed process leaves of it keeps nobody out.
"""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from smelter.base.errors import UserError
from smelter.base.files import errors_name, make_folder

LOCK_FILE = ".lock"

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Error numbers of a file system that has no locks."""


@contextlib.contextmanager
def only_writer(folder: Path, option: str, *, beside: bool = False) -> Iterator[None]:
    """No other process is in such a block for the same folder, which is made if it is missing.

    Raises UserError that names the process that is; `option` chooses another folder. The lock lies in the folder, or
    `beside` it where the folder itself is going to be replaced. A folder that was made here and stayed empty goes.
    """
    target = Path(os.path.realpath(folder))
    file = target.with_name(f"{target.name}{LOCK_FILE}") if beside else target / LOCK_FILE
    if file.parent.exists() and not file.parent.is_dir():
        raise UserError(f"{folder}: exists and is not a folder: choose another {option}")
    made = [path for path in (file.parent, *file.parent.parents) if not path.exists()]
    try:
        with errors_name(folder, file):
            make_folder(file.parent)
            descriptor = _locked(file, folder, option)
        try:
            yield
        finally:
            # Removed while it is held, and only if it is still ours: the folder may have been moved meanwhile. A file
            # that cannot be removed keeps nobody out.
            with contextlib.suppress(OSError):
                if _is_at(descriptor, file):
                    file.unlink()
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):  # one that is not empty ends the row
            for path in made:
                path.rmdir()


def _locked(file: Path, folder: Path, option: str) -> int:
    """The descriptor of `file`, locked by us and with our name in it."""
    while True:
        descriptor, is_ours = os.open(file, os.O_RDWR | os.O_CREAT, 0o666), False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(descriptor, file):  # its holder removed it between the two lines above
                os.close(descriptor)
                continue
            is_ours = True
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {os.uname().nodename}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(descriptor, 300, 0)
            os.close(descriptor)
            raise UserError(
                f"{folder}: {_named(holder)} is writing there: wait for its end, or choose another {option}"
            ) from None
        except OSError as error:
            if is_ours:  # no room for our name, say
                file.unlink(missing_ok=True)
            if is_ours or error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            print(f"{folder}: no locks on this file system: start nothing else that writes there", file=sys.stderr)
        return descriptor


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether `file` still is the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _named(holder: bytes) -> str:
    """The process that a lock file names."""
    pid, _, host = holder.decode("utf-8", "replace").strip().partition(" ")
    if not pid:  # it has the lock and has not yet said who it is
        return "another process"
    return f"process {pid}" + (f" on {host}" if host != os.uname().nodename else "")
