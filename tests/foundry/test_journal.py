"""The journal: what is acknowledged survives, and the books never say less than may be spent."""

import asyncio
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from foundry.journal import Account, Journal, JournalError
from foundry.ledger import BudgetReachedError
from smelter.base import UserError


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def answer(number: int) -> dict[str, Any]:
    return {"text": f"line\n\u2028 {number} é", "cost": 0.0}


async def fill(path: Path, number: int) -> None:
    account = Account(path)
    for i in range(number):
        account.write("answer", key(i), **answer(i))
    await account.journal.sync()
    await account.journal.close()


def keys(path: Path) -> set[bytes]:
    async def read() -> set[bytes]:
        account = Account(path)
        for name in account.answers:
            entry = {"t": "answer", "key": name.hex(), **answer(int.from_bytes(name, "big"))}
            assert account.read(account.answers, name) == entry
        await account.journal.close()
        return set(account.answers)

    return asyncio.run(read())


def test_a_torn_end_is_cut_off_wherever_it_tears(tmp_path: Path) -> None:
    path = tmp_path / "j"
    asyncio.run(fill(path, 3))
    data = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(data) if byte == 10]
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = max(0, sum(end <= size for end in ends) - 1)  # without the header
        assert keys(path) == set(map(key, range(whole)))
        assert path.read_bytes() == data[: max([ends[0], *(end for end in ends if end <= size)])]


def test_damage_in_the_middle_is_no_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "j"
    asyncio.run(fill(path, 3))
    data = bytearray(path.read_bytes())
    data[data.index(b"\n") + 30] ^= 1
    path.write_bytes(data)
    with pytest.raises(JournalError, match=r"j:2: damaged after it was written: .* `truncate --size=\d+ "):
        Account(path)
    assert path.read_bytes() == data  # untouched
    path.write_text("something else\n")
    with pytest.raises(JournalError, match="not a journal of version 1"):
        Account(path)


def test_a_damaged_last_line_is_no_torn_end(tmp_path: Path) -> None:
    """A reservation of $5, whose line has its end: whichever of its bytes is another, the books do not lose it."""
    path = tmp_path / "j"

    async def reserve() -> None:
        account = Account(path, cap=9.0)
        async with account.call(key(1), 5.0):
            pass
        await account.journal.close()

    asyncio.run(reserve())
    data = path.read_bytes()
    begin = data.index(b"\n") + 1
    for at in range(begin, len(data)):
        for flipped in (1, 0x40):
            damaged = bytearray(data)
            damaged[at] ^= flipped
            path.write_bytes(damaged)
            with pytest.raises(JournalError, match=rf"j:2: damaged after .* `truncate --size={begin} "):
                Account(path)
            assert path.read_bytes() == damaged  # untouched
    path.write_bytes(data)
    account = Account(path)
    assert account.ledger.reserved == 5.0
    account.journal.unlock()


class Disk:
    """What a power cut would leave of the journal: all that was there at the latest `fdatasync`."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.original, self.safe = path, os.fdatasync, b""
        monkeypatch.setattr("foundry.journal.os.fdatasync", self)

    def __call__(self, file: int) -> None:
        assert os.path.samestat(os.fstat(file), os.stat(self.path))
        self.original(file)
        self.safe = self.path.read_bytes()


def test_what_is_acknowledged_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk_events: list[str]
) -> None:
    """The file's name, each entry once `sync` returns, and a reservation before its call is made."""
    path = tmp_path / "new" / "j"
    path.parent.mkdir()
    disk = Disk(path, monkeypatch)

    def safe() -> list[str]:
        return [line[9:].decode() for line in disk.safe.splitlines()]

    async def run() -> None:
        account = Account(path, cap=1.0)
        assert len(safe()) == 1  # the header
        assert disk_events == ["new"]  # the folder, which holds the name
        for i in range(3):
            account.write("answer", key(i), **answer(i))
            await account.journal.sync()
            assert disk.safe == path.read_bytes()
            assert key(i).hex() in safe()[-1]
        async with account.call(key(9), 0.5):
            assert '"reserve"' in safe()[-1]
            account.write("answer", key(9), **answer(9))
        await account.journal.close()
        assert key(9).hex() in safe()[-1]

    asyncio.run(run())


@pytest.mark.parametrize("error", [RuntimeError("cannot schedule new futures"), MemoryError()])
def test_nobody_waits_for_a_writer_that_has_failed(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Journal, data: bytes) -> int:
        raise error

    async def run() -> None:
        account = Account(tmp_path / "j")
        monkeypatch.setattr(Journal, "_write", failing)
        account.write("answer", key(1), **answer(1))
        async with asyncio.timeout(5):
            with pytest.raises(JournalError, match=f"cannot write: {type(error).__name__}.* Mend that, then"):
                await account.journal.sync()
            with pytest.raises(JournalError, match="cannot write"):
                await account.journal.close()

    asyncio.run(run())


def test_nobody_waits_for_a_writer_that_was_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the end of `asyncio.run`. What its thread has brought to the disk stays, and nothing else is written."""
    path = tmp_path / "j"
    entered, go_on, left = threading.Event(), threading.Event(), threading.Event()
    fdatasync = os.fdatasync

    def slow(file: int) -> None:
        entered.set()
        assert go_on.wait(5)
        fdatasync(file)
        left.set()

    async def run() -> None:
        account = Account(path)
        monkeypatch.setattr("foundry.journal.os.fdatasync", slow)
        account.write("answer", key(1), **answer(1))
        waiting = asyncio.create_task(account.journal.sync())
        while not entered.is_set():
            await asyncio.sleep(0.001)
        (flush,) = asyncio.all_tasks() - {asyncio.current_task(), waiting}
        flush.cancel()
        async with asyncio.timeout(5):
            with pytest.raises(JournalError, match="cannot write: CancelledError"):
                await waiting
        threading.Timer(0.05, go_on.set).start()
        account.journal.unlock()
        assert left.is_set()  # it waits for the thread

    asyncio.run(run())
    monkeypatch.undo()
    assert keys(path) == {key(1)}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    async def twice() -> None:
        account = Account(tmp_path / "j")
        with pytest.raises(JournalError, match="another run is writing it"):
            Account(tmp_path / "j")
        await account.journal.close()
        await Account(tmp_path / "j").journal.close()

    asyncio.run(twice())


def test_a_full_disk_loses_nothing_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"
    write = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) <= 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[: len(data) // 2])  # as much as there is room for

    async def run() -> None:
        account = Account(path)
        account.write("answer", key(0), **answer(0))
        await account.journal.sync()
        safe = path.read_bytes()
        monkeypatch.setattr("foundry.journal.os.write", full)
        account.write("answer", key(1), **answer(1))
        with pytest.raises(JournalError, match="No space left on device: everything acknowledged is safe"):
            await account.journal.sync()
        with pytest.raises(JournalError, match="cannot write"):
            account.write("answer", key(2), **answer(2))
        with pytest.raises(JournalError, match="cannot write"):
            await account.journal.close()
        assert path.read_bytes() == safe

    asyncio.run(run())
    monkeypatch.undo()
    assert keys(path) == {key(0)}


def test_reservations_outlive_the_process_and_the_cap_holds(tmp_path: Path) -> None:
    async def run() -> None:
        account = Account(tmp_path / "j", cap=1.0)

        async def cut_off() -> None:
            async with account.call(key(2), 0.6):
                raise TimeoutError

        async with account.call(key(1), 0.6):
            waiting = asyncio.create_task(cut_off())
            await asyncio.sleep(0.01)
            assert not account.ledger.fits(0.6)
            assert account.ledger.reserved == 0.6  # it waits: the first call may yet turn out cheap
            account.write("answer", key(1), text="", cost=0.1)
        with pytest.raises(TimeoutError):
            await waiting
        await account.journal.close()

        account = Account(tmp_path / "j", cap=1.0)
        assert account.ledger.settled == pytest.approx(0.1)
        assert account.ledger.reserved == pytest.approx(0.6)
        with pytest.raises(BudgetReachedError, match=r"spent \$0\.1000, and up to \$0\.6000 held .* 1 x cut off"):
            async with account.call(key(3), 0.4):
                raise AssertionError("there is no room")
        with pytest.raises(UserError, match=r"--settle-held 0\.7: only up to \$0\.6000 is held back"):
            account.settle_held(0.7)
        account.settle_held(0.2)  # the bill has come
        async with account.call(key(3), 0.4):
            account.write("release", key(3))
        await account.journal.close()

        account = Account(tmp_path / "j", cap=1.0)
        assert account.ledger.settled == pytest.approx(0.3)
        assert account.ledger.reserved == 0.0
        await account.journal.close()

    asyncio.run(run())
