"""The sandbox, attacked: each program meets its limit, is named for it, and leaves nothing behind."""

import os
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smelter.base import sandbox
from smelter.base.sandbox import Limits, SandboxError, run, run_python

WITH_BUBBLEWRAP = pytest.param(
    True, marks=pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"), id="bubblewrap"
)
BOTH = pytest.mark.parametrize("use_bubblewrap", [WITH_BUBBLEWRAP, pytest.param(False, id="rlimits")])
ISOLATED = pytest.mark.parametrize("use_bubblewrap", [WITH_BUBBLEWRAP])
LIMITS = Limits(wall_seconds=60, cpu_seconds=60)
SHORT = Limits(wall_seconds=2, cpu_seconds=60)


@BOTH
@pytest.mark.parametrize(
    ("source", "returncode", "stdout", "reason"),
    [
        ("print('ä', __name__, __file__)", 0, "ä __main__ program.py\n", "ok"),
        ("print(input() + input())", 0, "onetwo\n", "ok"),
        ("exit(3)", 3, "", "error"),
        ("def (", 1, "", "error"),
        ("assert 1 == 2", 1, "", "error"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 139, "", "error"),
        ("import os; os.write(1, bytes([255, 10]))", 0, "\N{REPLACEMENT CHARACTER}\n", "ok"),
        ("import tempfile\nwith tempfile.TemporaryFile() as f: print(f.write(b'abc'))", 0, "3\n", "ok"),
        ("import threading\nt = threading.Thread(target=print, args=(5,)); t.start(); t.join()", 0, "5\n", "ok"),
        ("import dataclasses\n@dataclasses.dataclass\nclass A: x: int\nprint(A(1))", 0, "A(x=1)\n", "ok"),
        ("import os; print(len(os.environ.get('SECRET_OF_THE_TESTS', '')))", 0, "0\n", "ok"),
    ],
)
def test_programs_end_as_they_would(
    monkeypatch: pytest.MonkeyPatch, use_bubblewrap: bool, source: str, returncode: int, stdout: str, reason: str
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_TESTS", "key")
    result = run_python(source, stdin="one\ntwo\n", limits=LIMITS, use_bubblewrap=use_bubblewrap)
    assert (result.returncode, result.stdout, result.reason) == (returncode, stdout, reason), result.stderr


@BOTH
@pytest.mark.parametrize(
    ("source", "limits", "reason"),
    [
        ("while True: pass", SHORT, "timeout"),
        ("while True: pass", Limits(wall_seconds=60, cpu_seconds=1), "timeout"),
        ("import time; time.sleep(1000)", SHORT, "timeout"),
        ("x = bytearray(2 * 2**30)", LIMITS, "memory"),
        ("import sys\nfor _ in range(2**14): sys.stdout.write('x' * 2**16)", LIMITS, "output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 2**16)", LIMITS, "output"),
        pytest.param(
            "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
            LIMITS,
            "processes",
            marks=pytest.mark.slow,
        ),
        (
            "import os, time\nfor _ in range(5):\n  if not os.fork():\n    x = bytearray(200 * 2**20)\n"
            "    time.sleep(1000)\ntime.sleep(1000)",
            LIMITS,
            "memory",
        ),
    ],
    ids=["loop", "loop by cpu", "sleep", "2 GiB", "1 GiB out", "endless err", "fork bomb", "memory of all"],
)
def test_attacks_meet_their_limit(use_bubblewrap: bool, source: str, limits: Limits, reason: str) -> None:
    result = run_python(source, limits=limits, use_bubblewrap=use_bubblewrap)
    assert result.reason == reason, result
    assert result.returncode != 0
    assert len(result.stdout) + len(result.stderr) <= limits.output_bytes


def processes_with(mark: str) -> list[str]:
    """Processes that have `mark` in their command line."""
    found = []
    for process in os.listdir("/proc"):
        try:
            # Not by Path.glob, which fails where a process ends between its listing and its look.
            found += (
                [process]
                if process.isdigit() and mark in Path("/proc", process, "cmdline").read_text(errors="replace")
                else []
            )
        except OSError:
            continue
    return found


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("ends", [True, False])
def test_a_detached_child_does_not_survive(use_bubblewrap: bool, ends: bool) -> None:
    mark = f"detached-{os.getpid()}-{use_bubblewrap}-{ends}"
    source = f"""
import os, subprocess, sys, time
read, write = os.pipe()
if not os.fork():
    os.setsid()
    if not os.fork():
        null = os.open("/dev/null", os.O_RDWR)
        for fd in range(3): os.dup2(null, fd)
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1000)", {mark!r}])
        os.write(write, b"1")
        time.sleep(1000)
    os._exit(0)
os.read(read, 1)
print("gone", flush=True)
{"" if ends else "time.sleep(1000)"}
"""
    limits = LIMITS if ends else Limits(wall_seconds=5)
    result = run_python(source, limits=limits, use_bubblewrap=use_bubblewrap)
    assert result.reason == ("ok" if ends else "timeout"), result
    deadline = time.monotonic() + 20
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_with(mark)


@ISOLATED
def test_no_file_of_the_host_is_seen(use_bubblewrap: bool, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    tmp_path.chmod(0o755)
    for path in ("/etc/passwd", "/etc/shadow", str(Path.home() / ".bashrc"), str(secret), __file__):
        result = run_python(f"print(open({path!r}).read())", limits=LIMITS, use_bubblewrap=use_bubblewrap)
        assert result.reason == "error"
        assert "FileNotFoundError" in result.stderr or "PermissionError" in result.stderr


@ISOLATED
@pytest.mark.parametrize("folder", ["/", "/usr", "/dev", os.path.dirname(os.__file__)])
def test_nothing_but_tmp_can_be_written(use_bubblewrap: bool, folder: str) -> None:
    source = f"open({folder!r} + '/planted', 'w')"
    result = run_python(source, limits=LIMITS, use_bubblewrap=use_bubblewrap)
    assert "Read-only file system" in result.stderr or "PermissionError" in result.stderr
    assert not Path(folder, "planted").exists()


@ISOLATED
@pytest.mark.parametrize(
    "attack",
    [
        "os.unlink(victim)",
        "os.truncate(victim, 0)",
        "open(victim, 'w').close()",
        "os.rename(victim, '/tmp/taken')",
        "shutil.rmtree(os.path.dirname(victim))",
        "subprocess.run(['/bin/rm', '-rf', victim], check=True, stderr=2); os.stat(victim)",
    ],
)
def test_no_file_of_the_host_is_deleted(use_bubblewrap: bool, tmp_path: Path, attack: str) -> None:
    """Not even one that everybody may delete."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    victim.chmod(0o666)
    tmp_path.chmod(0o777)
    source = f"import os, shutil, subprocess\nvictim = {str(victim)!r}\n{attack}"
    result = run_python(source, limits=LIMITS, use_bubblewrap=use_bubblewrap)
    assert result.reason == "error", result
    assert "No such file" in result.stderr
    assert victim.read_text() == "kept"


@ISOLATED
def test_tmp_is_bounded_and_gone(use_bubblewrap: bool) -> None:
    limits = Limits(disk_bytes=2**20, wall_seconds=60)
    many = "for i in range(100): open(f'/tmp/{i}', 'wb').write(bytes(100_000))"
    assert "No space left" in run_python(many, limits=limits, use_bubblewrap=use_bubblewrap).stderr
    result = run_python("import os; print(os.listdir('/tmp'))", limits=limits, use_bubblewrap=use_bubblewrap)
    assert result.stdout == "[]\n"


@ISOLATED
def test_there_is_no_network(use_bubblewrap: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        result = run_python(source, limits=LIMITS, use_bubblewrap=use_bubblewrap)
        assert result.reason == "error"
        assert "ConnectionRefusedError" in result.stderr
    source = "import socket\nsocket.create_connection(('192.0.2.1', 80), 5)"
    assert "unreachable" in run_python(source, limits=LIMITS, use_bubblewrap=use_bubblewrap).stderr


@BOTH
def test_any_program(use_bubblewrap: bool) -> None:
    result = run(["/usr/bin/env"], limits=LIMITS, use_bubblewrap=use_bubblewrap)
    assert result.reason == "ok"
    assert "PATH=/usr/bin:/bin" in result.stdout


@BOTH
def test_a_sandbox_that_cannot_be_set_up_is_no_verdict(use_bubblewrap: bool) -> None:
    with pytest.raises(SandboxError, match="the program did not begin"):
        run_python("print(1)", limits=Limits(memory_bytes=2**70), use_bubblewrap=use_bubblewrap)


@BOTH
def test_many_at_once_do_not_mix(use_bubblewrap: bool) -> None:
    def program(number: int) -> str:
        return run_python(f"print({number})", limits=LIMITS, use_bubblewrap=use_bubblewrap).stdout

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(program, range(12))) == [f"{number}\n" for number in range(12)]


def test_a_set_prints_the_same_each_time() -> None:
    source = "print({'a', 'b', 'c', 'd'})"
    assert len({run_python(source, limits=LIMITS).stdout for _ in range(3)}) == 1


def test_without_bubblewrap_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    caches = (sandbox._bubblewrap, sandbox._without_bubblewrap)
    for cache in caches:
        cache.cache_clear()
    try:
        assert run_python("print(1)").stdout == "1\n"
        assert run_python("print(2)", limits=Limits(disk_bytes=2**21)).stdout == "2\n"
        assert capsys.readouterr().err.count("no bubblewrap (it is not installed)") == 1
        with pytest.raises(SandboxError, match="install it"):
            run_python("print(1)", use_bubblewrap=True)
    finally:
        for cache in caches:
            cache.cache_clear()


def test_limits_are_positive() -> None:
    with pytest.raises(ValueError, match="processes = 0: must be positive"):
        Limits(processes=0)
