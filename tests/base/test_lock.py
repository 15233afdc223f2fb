"""Two processes never write one folder: the second names the first, and a killed one keeps nobody out."""

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from smelter.base.errors import UserError
from smelter.base.lock import only_writer

HOLD = """
import sys
from pathlib import Path
from smelter.base.lock import only_writer
with only_writer(Path(sys.argv[1]), "--out", beside=sys.argv[2] == "beside"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path, where: str = "inside") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), where], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_the_second_names_the_first_and_gets_in_when_it_ends(tmp_path: Path, where: str) -> None:
    folder, beside = tmp_path / "a" / "run", where == "beside"
    with holder(folder, where) as process:
        for _ in range(2):  # being refused gives nobody's lock away
            said = f"run: process {process.pid} is writing there: wait"
            with pytest.raises(UserError, match=said), only_writer(folder, "--out", beside=beside):
                pass
        process.communicate("")
    with only_writer(folder, "--out", beside=beside):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / ".lock").read_text().startswith(str(process.pid))
        with only_writer(tmp_path, "--out"):
            assert (tmp_path / ".lock").read_text().startswith(str(os.getpid()))
    assert list(tmp_path.iterdir()) == []


def test_another_path_to_the_same_folder_is_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path / "run")
    said = f"process {os.getpid()} is writing there"
    with only_writer(Path(), "--out"), pytest.raises(UserError, match=said), only_writer(tmp_path / "link", "--out"):
        pass
    for beside in (False, True):
        with only_writer(tmp_path / "link", "--out", beside=beside):
            pass


def test_what_was_written_stays(tmp_path: Path) -> None:
    with only_writer(tmp_path / "new" / "run", "--out"):
        (tmp_path / "new" / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["file"]


def test_the_lock_of_a_moved_folder_ends_without_touching_the_new_one(tmp_path: Path) -> None:
    with only_writer(tmp_path / "run", "--out"):
        (tmp_path / "run").rename(tmp_path / "moved")
        process = holder(tmp_path / "run")
    with process, pytest.raises(UserError, match=f"process {process.pid} is"), only_writer(tmp_path / "run", "--out"):
        pass


def test_it_says_on_which_machine(tmp_path: Path) -> None:
    with holder(tmp_path):
        (tmp_path / ".lock").write_text("17 elsewhere\n")
        with pytest.raises(UserError, match="process 17 on elsewhere is"), only_writer(tmp_path, "--out"):
            pass


def test_where_there_are_no_locks_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_writer(tmp_path, "--out"):
        pass
    assert f"{tmp_path}: no locks on this file system" in capsys.readouterr().err


def test_on_a_full_disk_nothing_is_left(small_disk: Path) -> None:
    (small_disk / "others").write_bytes(bytes(2**21))
    said = f"No space left on device: '{small_disk}/run'"
    with pytest.raises(OSError, match=said), only_writer(small_disk / "run", "--out"):
        pass
    assert [path.name for path in small_disk.iterdir()] == ["others"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = "file: exists and is not a folder: choose another --out"
    with pytest.raises(UserError, match=said), only_writer(tmp_path / "file", "--out"):
        pass


def _take_turns(folder: Path, times: int) -> None:
    """Whoever is in writes its name, and must find it again."""
    while times:
        try:
            with only_writer(folder, "--out"):
                (folder / "who").write_text(str(os.getpid()))
                assert (folder / "who").read_text() == str(os.getpid())
            times -= 1
        except UserError:
            pass


def test_there_are_never_two(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_take_turns, args=(tmp_path, 150)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
