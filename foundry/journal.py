"""The write-ahead journal: what was asked, answered and spent, so that a kill at any moment loses nothing.

An append-only file beside the output, one line an entry: the CRC-32 of the rest, then a JSON object. One process
writes it (a lock says so), and many entries share one `fdatasync` (group commit, as in ARIES and every database
since): on a disk that syncs in 4 ms that is the difference between 250 and thousands of entries a second. An entry is
acknowledged, by the return of `sync`, only when it is on the disk. A crash leaves at most a line without an end, which
was never acknowledged and is cut off at the next opening; a line that has its end and is not whole was damaged later.

Kinds of entries, by their "t":

- `reserve` a call is about to be made that may cost `usd`; written before the call
- `answer` what the teacher said and what it cost; `unusable` it said nothing of use, but what it cost is known
- `release` that call was certainly free; `held` it may have been billed, and `why` nobody knows how much
- `settle_held` the calls held back until then cost `usd` together: a person has read the vendor's bill
- `record` a seed is finished: everything of its record, with the keys of its answers; `failed` it could not be

Keys are sha256 of all that determines the content, so asking the same thing twice finds the first answer. What the
entries say of money is `foundry.ledger`'s to judge.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import re
import stat
import threading
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from foundry.ledger import BudgetReachedError, Ledger
from smelter.base import DISK_FULL, UserError, fsync, make_folder

_VERSION = 1
_HEADER = {"t": "journal", "version": _VERSION}
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class JournalError(UserError):
    """The journal cannot be read or written: the message says what to do. What was acknowledged is safe."""


class Account:
    """What was asked, answered, spent, reserved and failed in all runs with one journal: the sense of its entries.

    Keys and offsets are in memory (about 200 bytes an entry), the texts are not. For one event loop. Raises
    JournalError where the file cannot be used.
    """

    def __init__(self, path: Path | str, *, cap: float = 0.0) -> None:
        self.ledger = Ledger(cap)
        self.answers: dict[bytes, int] = {}
        """Key -> offset of its answer."""
        self.records: dict[bytes, int] = {}
        """Key -> offset of a seed's record, the latest."""
        self.incomplete: set[bytes] = set()
        """Keys of records that lack an answer which is worth asking for again."""
        self.failed: dict[bytes, int] = {}
        """Key -> offset of the reason, for seeds that have no record."""
        self._live = 0  # calls in flight that hold a reservation
        self._call_ended = asyncio.Event()
        self.journal = Journal(path)
        try:
            for offset, entry in self.journal.replay():
                self._apply(entry, offset)
            self.ledger.hold_all()
        except BaseException:
            self.journal.unlock()
            raise

    def _apply(self, entry: Mapping[str, Any], offset: int) -> None:
        """Take an entry into index and ledger: the same when written and when replayed, so the two cannot differ."""
        key = bytes.fromhex(entry["key"])
        match entry["t"]:
            case "reserve":
                self.ledger.reserve(key, entry["usd"], entry.get("teacher", ""))
            case "release":
                self.ledger.release(key)
            case "held":
                self.ledger.hold(key, entry["why"])
            case "unusable":
                self.ledger.settle(key, entry["cost"])
            case "settle_held":
                self.ledger.settle_held(entry["usd"])
            case "answer":
                self.answers[key] = offset
                self.ledger.settle(key, entry["cost"])
            case "record":
                self.records[key] = offset
                self.failed.pop(key, None)
                if entry["complete"]:
                    self.incomplete.discard(key)
                else:
                    self.incomplete.add(key)
            case "failed":
                self.failed[key] = offset

    def write(self, kind: str, key: bytes, **parts: Any) -> None:
        """Hand an entry over; it is on the disk once a later `sync` returns. Raises JournalError after a failure."""
        entry = {"t": kind, "key": key.hex(), **parts}
        self._apply(entry, self.journal.append(entry))

    def settle_held(self, usd: float) -> None:
        """Book all calls that are held back at so many US dollars together; none may be in flight.

        Raises UserError for more than is held back.
        """
        held = sum(part for _, part in self.ledger.held.values())
        if usd > held + 1e-8:
            raise UserError(
                f"--settle-held {usd:g}: only up to ${held:,.4f} is held back in {self.journal.path}: give what the"
                " vendor's bill has for these calls beyond what is booked as spent"
            )
        self.write("settle_held", b"", usd=usd)

    def read(self, entries: Mapping[bytes, int], key: bytes) -> dict[str, Any] | None:
        """The entry of a key in `answers`, `records` or `failed`."""
        return self.journal.read(entries[key]) if key in entries else None

    def is_finished(self, key: bytes) -> bool:
        """Whether that seed needs no more work."""
        return key in self.records and key not in self.incomplete

    @contextlib.asynccontextmanager
    async def call(self, key: bytes, usd: float, teacher: str = "") -> AsyncIterator[None]:
        """Around a call: its worst case is in the books before it, and stays there if no entry says what came of it.

        All that was written before is on the disk before the call is made, so whoever works through the seeds has at
        most one call to lose at any moment, and one sync a call does for answer and reservation. Waits while calls in
        flight may yet make room; raises BudgetReachedError where no room can come.
        """
        if not usd:  # needs no entry
            await self.journal.sync()
            yield
            return
        ledger = self.ledger
        while not ledger.fits(usd):
            if not self._live:
                raise BudgetReachedError(
                    f"the cap of ${ledger.cap:,.4f} has no room for a call of up to ${usd:,.4f}: spent "
                    f"${ledger.settled:,.4f}, and {ledger.held_words() or 'nothing held back'}"
                )
            await self._call_ended.wait()
        self._live += 1
        try:
            self.write("reserve", key, usd=usd, **({"teacher": teacher} if teacher else {}))
            try:
                await self.journal.sync()
            except asyncio.CancelledError:  # before the call was made
                with contextlib.suppress(JournalError):
                    self.write("release", key)
                raise
            yield
        finally:
            self._live -= 1
            self._call_ended.set()
            self._call_ended = asyncio.Event()


class Journal:
    """The file: entries are appended, and read back by their offset.

    `replay` is read to its end before the first `append`. For one event loop. Raises JournalError where the file
    cannot be used.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._pending: list[bytes] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._flush: asyncio.Task[None] | None = None
        self._broken: JournalError | None = None
        self._writing = threading.Lock()  # held while a thread writes
        self._synced = self._end = 0  # what is on the disk; the next entry's offset
        self._file = self._open_locked()
        self._reader = os.fdopen(self._file, "rb")

    def _open_locked(self) -> int:
        try:
            make_folder(self.path.parent)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise JournalError(f"{self.path}: {error.strerror}: choose another --out") from None
        problem = ""
        if not stat.S_ISREG(os.fstat(file).st_mode):
            problem = "is not a regular file: choose another --out"
        else:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = "another run is writing it: wait for its end, or choose another --out"
        if problem:
            os.close(file)
            raise JournalError(f"{self.path}: {problem}")
        return file

    def replay(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every entry that was acknowledged, with its offset; then a torn end is cut off."""
        good = 0
        for number, line in enumerate(self._reader, start=1):
            entry = _decode(line)
            if number == 1 and entry != _HEADER and not _encode(_HEADER).startswith(line):
                raise JournalError(f"{self.path}: not a journal of version {_VERSION}: choose another --out")
            if entry is None and (line.endswith(b"\n") or zlib.crc32(line[9:-1]) == _crc(line)):
                raise JournalError(
                    f"{self.path}:{number}: damaged after it was written: restore the file, or give up this line and"
                    f" all that follow, with what they say of money, by `truncate --size={good} {self.path}`"
                )
            if entry is None:  # torn by a crash, and the last one
                os.ftruncate(self._file, good)
                break
            if number > 1:
                yield good, entry
            good += len(line)
        if not good:
            try:
                good = self._write(_encode(_HEADER))
                fsync(self.path.parent)  # so that a new file's name survives a power cut
            except OSError as error:
                raise JournalError(f"{self.path}: {error.strerror}: choose another --out") from None
        self._synced = self._end = good

    def append(self, entry: Mapping[str, Any]) -> int:
        """Hand an entry over, and get its offset. Raises JournalError after a failure."""
        if self._broken:
            raise self._broken
        line, offset = _encode(entry), self._end
        self._end += len(line)
        self._pending.append(line)
        if self._flush is None:
            self._flush = asyncio.get_running_loop().create_task(self._write_pending())
        return offset

    async def sync(self) -> None:
        """Wait until everything handed over so far is on the disk. Raises JournalError where that fails."""
        if self._broken:
            raise self._broken
        if self._flush is None:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    async def _write_pending(self) -> None:
        waiters: list[asyncio.Future[None]] = []
        try:
            while self._pending or self._waiters:
                pending, waiters = self._pending, self._waiters
                self._pending, self._waiters = [], []
                if pending:
                    loop = asyncio.get_running_loop()
                    self._synced += await loop.run_in_executor(None, self._write, b"".join(pending))
                for waiter in waiters:
                    if not waiter.done():
                        waiter.set_result(None)
        except BaseException as error:  # nobody may wait for ever, whatever it was
            self._break(error, waiters)
            if not isinstance(error, Exception):  # a cancellation is whose it was
                raise
        finally:
            self._flush = None

    def _write(self, data: bytes) -> int:
        """In a thread of the loop's executor."""
        with self._writing:
            if self._broken:
                raise self._broken
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fdatasync(self._file)
            return written

    def _break(self, error: BaseException, waiters: list[asyncio.Future[None]]) -> None:
        words = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}".rstrip(": ")
        remedy = "Make room" if isinstance(error, OSError) and error.errno in DISK_FULL else "Mend that"
        self._broken = JournalError(
            f"{self.path}: cannot write: {words}: everything acknowledged is safe. {remedy}, then the same command"
            " goes on"
        )
        if isinstance(error, Exception):  # a cancelled write may have come to its end meanwhile, and answers are dear
            # What was written of this batch is not acknowledged; without it the file ends cleanly. If even that fails,
            # the next opening does it.
            with self._writing, contextlib.suppress(OSError):
                os.ftruncate(self._file, self._synced)
        for waiter in waiters + self._waiters:
            if not waiter.done():
                waiter.set_exception(self._broken)
        self._waiters = []

    def read(self, offset: int) -> dict[str, Any]:
        """The entry at an offset."""
        self._reader.seek(offset)
        entry = _decode(self._reader.readline())
        if entry is None:
            raise JournalError(f"{self.path}: damaged at byte {offset} since it was opened: restore the file")
        return entry

    async def close(self) -> None:
        """Bring what was handed over to the disk and give the lock back. Raises JournalError where that fails."""
        try:
            await self.sync()
        finally:
            self.unlock()

    def unlock(self) -> None:
        """Close the file, when nothing is being written to it any more."""
        with self._writing:  # a thread outlives the task that waited for it, and descriptors are used again
            self._broken = self._broken or JournalError(f"{self.path}: closed")
            self._reader.close()


def _encode(entry: Mapping[str, Any]) -> bytes:
    data = _ENCODER.encode(entry).encode()
    return b"%08x %b\n" % (zlib.crc32(data), data)


def _decode(line: bytes) -> dict[str, Any] | None:
    """The entry, or None if the line is not whole."""
    if line[8:9] != b" " or line[-1:] != b"\n" or zlib.crc32(line[9:-1]) != _crc(line):
        return None
    entry: dict[str, Any] = json.loads(line[9:])
    return entry


def _crc(line: bytes) -> int:
    """The checksum that a line begins with; -1 where there is none."""
    return int(line[:8], 16) if re.match(rb"[0-9a-f]{8} ", line) else -1
