"""What is written is whole or not there, on the disk before it has its name, and errors name what was asked for."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smelter.base.cli import run
from smelter.base.errors import UserError
from smelter.base.files import (
    append_bytes,
    errors_name,
    file_sha256,
    free_bytes,
    fsync,
    make_folder,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, text: str) -> None:
    with whole_folder(folder) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a.txt").write_text(text)
        write_text(temporary / "b.txt", text)


class FailingFsync:
    """`os.fsync` that fails at one call; `calls` are those so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        self.calls, self.at, self.error, self.original = 0, at, error, os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        self.original(descriptor)


# ---------------------------------------------------------------- a file


def test_text_and_json(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "grün\r\n\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "grün\r\n\n".encode()
    path = tmp_path / "a.json"
    write_json(path, {"é": [1]})
    assert path.read_text(encoding="utf-8") == '{\n  "é": [\n    1\n  ]\n}\n'
    write_json(path, {"é": [1]}, indent=1, ensure_ascii=True)
    text = '{\n "\\u00e9": [\n  1\n ]\n}\n'
    assert path.read_text(encoding="utf-8") == text
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert contents(tmp_path) == {"new/a.txt": "grün\n\n", "a.json": text}


def test_a_file_is_on_the_disk_before_it_has_its_name_and_so_are_new_folders(
    tmp_path: Path, disk_events: list[str]
) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "x")
    assert sorted(disk_events[:2]) == sorted([tmp_path.name, "a"])
    assert disk_events[2:] == ["~", "-> c.txt", "b"]
    disk_events.clear()
    write_text(tmp_path / "a" / "b" / "c.txt", "y")
    assert disk_events == ["~", "-> c.txt", "b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error"), RuntimeError("no")])
@pytest.mark.parametrize("is_new", [False, True])
def test_what_fails_in_the_middle_leaves_no_trace(tmp_path: Path, is_new: bool, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    if not is_new:
        path.write_text("precious")
    before = contents(tmp_path)

    def write() -> None:
        with whole_file(path) as file:
            file.write("half")
            file.flush()
            raise error

    with pytest.raises(type(error)):
        write()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_failed_fsync_leaves_the_old_or_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    FailingFsync(monkeypatch, failing_call, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OSError, match="Input/output"):
        write_text(path, "new")
    assert contents(tmp_path) == {"a.txt": "old" if failing_call == 1 else "new"}


def test_a_link_stays_one_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "a.txt")
    for text in ("first", "second"):
        write_text(link, text)
        assert link.is_symlink()
        assert contents(tmp_path / "there") == {"a.txt": text}
    for other in (Path("/dev/null"), tmp_path):
        with pytest.raises(UserError, match=f"{other}: exists and is not a regular file"):
            write_text(other, "x")


# ---------------------------------------------------------------- a full disk, and other errors


def test_a_full_disk_is_named_by_the_path_that_was_asked_for(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(small_disk.parent)
    path = Path("disk/a.txt")
    path.write_text("precious")
    large = "x" * 3 * 2**20
    with pytest.raises(OSError, match=r"No space left on device: 'disk/a\.txt'"):
        write_text(path, large)
    with pytest.raises(OSError, match="No space left on device: 'disk/c'"):
        fill(Path("disk/c"), large)
    assert contents(small_disk) == {"a.txt": "precious"}
    with pytest.raises(OSError, match=r"No space left on device: 'disk/b\.bin'"):
        append_bytes(Path("disk/b.bin"), large.encode())
    # And so says the command line.
    sys.modules["a_command"] = type(sys)("a_command")
    monkeypatch.setattr(sys.modules["a_command"], "main", lambda argv: write_text(path, large), raising=False)
    assert run("smelter", "", {"write": ("a_command", "")}, ["write"]) == 2
    del sys.modules["a_command"]
    assert capsys.readouterr().err.startswith("smelter write: error: disk/a.txt: No space left on device: ")


def test_errors_name_the_path_below_the_temporary_one_and_leave_others_alone(tmp_path: Path) -> None:
    def name_of(error: OSError) -> Any:
        with pytest.raises(OSError) as caught, errors_name(Path("shards"), tmp_path / ".tmp_shards"):  # noqa: PT011
            raise error
        return caught.value.filename

    assert name_of(OSError(errno.EACCES, "no", tmp_path / ".tmp_shards" / "a.bin")) == "shards/a.bin"
    assert name_of(OSError(errno.ENOSPC, "full", "/other/file")) == "/other/file"
    assert name_of(OSError(errno.ENOSPC, "full")) == "shards"
    assert name_of(OSError("512 requested and 0 written")) == "shards"  # so says numpy
    assert name_of(OSError(errno.EIO, "of a file that is read, maybe")) is None
    with pytest.raises(FileNotFoundError, match="nowhere"), whole_folder(tmp_path / "a") as temporary:
        write_text(temporary / "a.txt", Path("nowhere").read_text())
    with pytest.raises(OSError, match=f"name too long: '{tmp_path}/a/xx"), whole_folder(tmp_path / "a") as temporary:
        write_text(temporary / ("x" * 255), "x")  # a file in a folder: both have temporary names
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- a folder


def test_a_folder_and_all_in_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, disk_events: list[str]) -> None:
    fill(tmp_path / "new" / "f", "1")
    place = disk_events.index("-> f")
    assert disk_events[0] == tmp_path.name
    assert {"inner", "a.txt", "b.txt", ".tmp_f"} <= set(disk_events[:place])
    assert disk_events[place + 1 :] == ["new"]
    disk_events.clear()
    fill(tmp_path / "new" / "f", "2")
    assert disk_events[-4:] == [".tmp_f", "-> .tmp-old_f", "-> f", "new"]
    assert contents(tmp_path) == {"new/f/inner/a.txt": "2", "new/f/b.txt": "2"}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_folder_that_fails_anywhere_leaves_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    fill(tmp_path / "f", "old")
    calls = FailingFsync(monkeypatch, 0, error)
    fill(tmp_path / "f", "old")
    num_calls = calls.calls
    assert num_calls == 7
    for at in range(1, num_calls + 1):
        calls.calls, calls.at = 0, at
        with pytest.raises(type(error)):
            fill(tmp_path / "f", "new")
        text = "new" if at == num_calls else "old"
        assert contents(tmp_path / "f") == {"inner/a.txt": text, "b.txt": text}
        others = {path.name for path in tmp_path.iterdir()} - {"f"}
        assert others == (set() if text == "old" else {".tmp-old_f"})
    calls.at = 0
    fill(tmp_path / "f", "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "f", "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == ".tmp_f":
            raise OSError(errno.EIO, "Input/output error", str(self), None, str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error") as error:
        fill(tmp_path / "f", "new")
    assert error.value.filename == str(tmp_path / "f")
    assert contents(tmp_path) == {"f/inner/a.txt": "old", "f/b.txt": "old"}


def test_what_a_killed_process_left_is_put_right_by_the_next_try(tmp_path: Path) -> None:
    fill(tmp_path / "f", "old")
    # Killed between the two renames: the old one stands aside, the new one has not its name yet.
    (tmp_path / "f").rename(tmp_path / ".tmp-old_f")
    (tmp_path / ".tmp_f").mkdir()
    (tmp_path / ".tmp_f" / "half.txt").write_text("half")

    def fail() -> None:
        with whole_folder(tmp_path / "f") as temporary:
            assert contents(temporary) == {}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert contents(tmp_path) == {"f/inner/a.txt": "old", "f/b.txt": "old"}


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    link = tmp_path / "link"
    fill(tmp_path / "there" / "f", "old")
    link.symlink_to(tmp_path / "there" / "f")
    fill(link, "new")
    assert link.is_symlink()
    assert contents(tmp_path / "there") == {"f/inner/a.txt": "new", "f/b.txt": "new"}


KILLED = """
import sys
from pathlib import Path
from smelter.base.files import whole_folder, write_text
folder = Path(sys.argv[1])
for number in range(10**6):
    write_text(folder / "file", str(number % 10) * 300_000)
    with whole_folder(folder / str(number // 5)) as temporary:
        (temporary / "a").write_text(str(number % 10) * 300_000)
    print(number, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_files_are_whole(tmp_path: Path) -> None:
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"0\n"
        time.sleep(0.05 + 0.07 * attempt)
        process.send_signal(signal.SIGKILL)
        num_said = len(process.stdout.read().split()) + 1
        process.stdout.close()
        process.wait()
        for path in (folder / "file", *folder.glob("[0-9]*/a")):
            text = path.read_text()
            assert text == text[0] * 300_000
        # All that it said was there, unless it was killed between the two renames of the last one.
        assert len(list(folder.glob("[0-9]*/a"))) >= (num_said - 1) // 5 - 1


# ---------------------------------------------------------------- the rest


def test_appended_bytes_are_on_the_disk(tmp_path: Path, disk_events: list[str]) -> None:
    for data in (b"ab", b"", b"c"):
        append_bytes(tmp_path / "a.bin", data)
    assert (tmp_path / "a.bin").read_bytes() == b"abc"
    assert disk_events == ["a.bin"] * 3


def test_a_new_folder_is_on_the_disk(tmp_path: Path, disk_events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "a" / "b")
    assert sorted(disk_events) == sorted([tmp_path.name, "a"])
    make_folder(tmp_path / "a" / "b")
    assert len(disk_events) == 2
    monkeypatch.chdir(tmp_path)
    make_folder(Path("c"))
    assert disk_events[2:] == [tmp_path.name]


def test_folders_that_cannot_be_fsynced_are_let_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(number: int) -> Iterator[None]:
        def fail(descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)
        yield

    (tmp_path / "a").touch()
    for _ in failing(errno.EINVAL):
        fsync(tmp_path)
        with pytest.raises(OSError, match="Invalid argument"):
            fsync(tmp_path / "a")
    for _ in failing(errno.EIO):
        with pytest.raises(OSError, match="Input/output"):
            fsync(tmp_path)


def test_hash_and_free_space(small_disk: Path) -> None:
    (small_disk / "a").write_bytes(bytes(10**6))
    assert file_sha256(small_disk / "a") == hashlib.sha256(bytes(10**6)).hexdigest()
    free = free_bytes(small_disk / "not" / "yet")
    assert free == free_bytes(small_disk) < 2**21 - 10**6
