"""The journal: what is acknowledged survives, and the books never say less than may be spent."""

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundry.journal import Account, BudgetReachedError, JournalError, Ledger


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
    with pytest.raises(JournalError, match=r"j:2: damaged, and not at the end .* `truncate --size=\d+ "):
        Account(path)
    assert path.read_bytes() == data  # untouched
    path.write_text("something else\n")
    with pytest.raises(JournalError, match="not a journal of version 1"):
        Account(path)


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
        with pytest.raises(BudgetReachedError, match=r"spent \$0\.1000, and up to \$0\.6000"):
            async with account.call(key(3), 0.4):
                raise AssertionError("there is no room")
        await account.journal.close()

    asyncio.run(run())


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.01, 1), st.sampled_from(["reserve", "release", "settle"]))))
def test_the_ledger_never_exceeds_its_cap(steps: list[tuple[int, float, str]]) -> None:
    ledger, open_calls = Ledger(2.0), dict[int, list[float]]()
    settled = 0.0
    for number, usd, step in steps:
        calls = open_calls.setdefault(number, [])
        if step == "reserve" and ledger.fits(usd):
            ledger.reserve(key(number), usd)
            calls.append(usd)
        elif step == "release" and calls:
            ledger.release(key(number))
            calls.pop()
        elif step == "settle" and calls:
            cost = min(calls) * usd  # no call costs more than its worst case
            ledger.settle(key(number), cost)
            settled += cost * len(calls)
            calls.clear()
        assert ledger.settled + ledger.reserved <= ledger.cap + 1e-7
        assert ledger.settled == pytest.approx(settled)
        assert ledger.reserved == pytest.approx(sum(map(sum, open_calls.values())), abs=1e-9)
