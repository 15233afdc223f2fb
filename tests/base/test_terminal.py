"""Progress speaks rarely, on standard error, and says what is done, how fast, and how long it will take."""

import time

import pytest

from smelter.base.terminal import Progress, megabytes, percent, short_duration, short_number, table


class Clock:
    """`time.monotonic` that stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_short_work_is_quiet_and_long_work_speaks_every_few_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("teaching", "rows", 1_500, done=100)
    for done in range(101, 1_401):
        clock.now += 0.01
        progress(done)
    out = capsys.readouterr()
    assert not out.out
    assert out.err.splitlines() == [
        "teaching: 601 of 1,500 rows, 100 rows/s, 9s left",
        "teaching: 1,102 of 1,500 rows, 100 rows/s, 4s left",
    ]
    quiet = Progress("work", "rows", 100)
    for done in range(101):
        clock.now += 0.04
        quiet(done)
    assert not capsys.readouterr().err


def test_bytes_are_shown_as_megabytes_and_can_be_added(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("tokenizing", "MB", 1_096_400_000)
    progress.add(5_000_000)
    clock.now += 6.0
    assert progress.is_due
    progress.add(7_000_000)
    assert not progress.is_due
    assert capsys.readouterr().err == "tokenizing: 12.0 of 1,096.4 MB, 2 MB/s, 9m02s left\n"


def test_without_a_total_and_with_notes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("cleaning", "records", seconds=10.0)
    clock.now += 9.9
    progress(1, "0 kept")
    clock.now += 0.1
    progress(123_456, "99 kept", "at a.py")
    assert capsys.readouterr().err == "cleaning: 123,456 records, 12.3k records/s, 99 kept, at a.py\n"


def test_work_that_ends_here_says_so_at_once_and_nothing_of_what_is_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("asking", "seeds", 10)
    progress(0, now=True)
    clock.now += 0.5
    progress(2, "1 timeout", now=True)
    assert capsys.readouterr().err.splitlines() == [
        "asking: 0 of 10 seeds, 0 seeds/s",
        "asking: 2 of 10 seeds, 4 seeds/s, 1 timeout",
    ]


def test_the_rate_is_that_of_the_last_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("work", "rows", 1_000)
    done = 0
    for seconds in range(300):
        clock.now += 1.0
        done += 3 if seconds < 100 else 0
        progress(done)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 60
    assert lines[0] == "work: 15 of 1,000 rows, 3 rows/s, 5m28s left"
    assert lines[-1] == "work: 300 of 1,000 rows, 0 rows/s"


def test_numbers_for_people() -> None:
    numbers = [0, 0.01234, 950, 999.7, 18_234, 999_960, 101_000_000, 2.5e9]
    assert [short_number(value) for value in numbers] == ["0", "0.0123", "950", "1k", "18.2k", "1M", "101M", "2.5B"]
    seconds = [-3, 11.6, 59.6, 372, 3_599.7, 11_100, 86_400 * 2 + 4 * 3_600]
    assert [short_duration(value) for value in seconds] == ["0s", "12s", "1m00s", "6m12s", "1h00m", "3h05m", "2d04h"]
    assert [megabytes(value) for value in (0, 12_345_678, 2e12)] == ["0.0 MB", "12.3 MB", "2,000,000.0 MB"]
    assert [percent(value) for value in (None, 0, 0.1234, 1)] == ["-", "0.0%", "12.3%", "100.0%"]


def test_a_table_is_aligned_and_has_no_spaces_at_its_ends() -> None:
    assert table([["a", "bb", "c"], ["long", "b"], ["", "", "last one"]]) == "a     bb  c\nlong  b\n          last one"
