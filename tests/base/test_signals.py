"""SIGTERM and SIGHUP end a command as Ctrl-C does: nothing half written stays, and a closed terminal is no error."""

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from smelter.base.cli import run
from smelter.base.signals import Stopped, ending_cleanly, stop_signals
from tests.house import ROOT

WRITING = """
import sys, time
from pathlib import Path
from smelter.base.cli import run
from smelter.base.files import whole_file, whole_folder
from smelter.base.lock import only_writer

def main(argv):
    with only_writer(Path(argv[0]) / "run", "--out"), whole_folder(Path(argv[0]) / "folder") as folder:
        (folder / "half").write_text("a")
        with whole_file(Path(argv[0]) / "file") as file:
            file.write("half")
            file.flush()
            print("writing", flush=True)
            time.sleep(60)
    return 0

sys.modules["writing"] = sys.modules["__main__"]
sys.exit(run("smelter", "", {"write": ("writing", "")}, ["write", sys.argv[1]]))
"""


def writing(folder: Path, **options: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITING, str(folder)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,  # type: ignore[call-overload]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert len(list(folder.rglob("*"))) == 5
    return process  # type: ignore[no-any-return]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_nothing_half_written_stays(tmp_path: Path, number: signal.Signals) -> None:
    with writing(tmp_path) as process:
        process.send_signal(number)
        _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert error == ("smelter: interrupted\n" if number == signal.SIGINT else f"smelter: {number.name}\n")
    assert list(tmp_path.iterdir()) == []


def test_under_nohup_a_closed_terminal_changes_nothing(tmp_path: Path) -> None:
    with writing(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


def in_a_terminal(command: list[str], until: Callable[[str], bool], **environment: str) -> int:
    """The exit code of a command whose terminal is closed as soon as `until` holds of what it said."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, *command], {**os.environ, **environment})
    said = ""
    while not until(said):
        said += os.read(terminal, 4_096).decode("utf-8", "replace")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_closed_terminal_ends_a_command_cleanly(tmp_path: Path) -> None:
    code = in_a_terminal(["-c", WRITING, str(tmp_path)], lambda said: "writing" in said)
    assert code == 128 + signal.SIGHUP
    assert list(tmp_path.iterdir()) == []


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in stop_signals()]
    with pytest.raises(Stopped, match="SIGTERM"), ending_cleanly():
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in stop_signals()] == before


def test_a_command_in_a_thread_needs_no_signals() -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run("smelter", "{commands}", {}, ["--help"])))
    thread.start()
    thread.join()
    assert codes == [0]
