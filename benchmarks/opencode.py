"""What does asking through an OpenCode server cost?

A stub teacher that answers in 200 ms stands behind a real OpenCode server (started by scripts/start_server.sh, in a
folder of its own). Measured: requests a second at 32 in flight, what a single request takes longer than the teacher
itself, CPU of the server and of our side, and whether a session is left. With 32 in flight the ideal is 160 a second.

    python benchmarks/opencode.py [--quick] [--json]

Without an installed OpenCode (scripts/start_server.sh, or OPENCODE_BIN) nothing is measured and the figures are null.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder, whose foundry.py is no package

from foundry.opencode_client import MAX_IN_FLIGHT, OpenCodeClient
from foundry.settings import TeacherSettings
from foundry.teacher import Question
from foundry.teachers.opencode import OpenCodeTeacher

ROOT = Path(__file__).resolve().parent.parent
LATENCY = 0.2
PASSWORD = "benchmark"
Figures = dict[str, float | None]


def installed() -> str:
    """Path of an OpenCode program, or "" if there is none."""
    if given := os.environ.get("OPENCODE_BIN"):
        return given
    home = Path(os.environ.get("FOUNDRY_SERVER_DIR") or Path.home() / ".local/share/foundry/opencode")
    tests = Path.home() / ".cache/foundry-tests"
    for program in sorted(
        [*home.glob("npm-*/node_modules/*/bin/opencode"), *tests.glob("npm-*/node_modules/*/bin/opencode")]
    ):
        if subprocess.run([program, "--version"], capture_output=True, check=False).returncode == 0:
            return str(program)
    return ""


@contextmanager
def stub_teacher() -> Iterator[str]:
    """A teacher in a process of its own; yields its address."""
    command = [sys.executable, "-m", "tests.foundry.streaming_stub", "--latency", str(LATENCY)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.terminate()


@contextmanager
def server(program: str, stub_url: str, folder: Path) -> Iterator[tuple[str, int]]:
    """An OpenCode server before that teacher; yields its address and process."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = folder / "foundry.toml"
    settings.write_text(
        f'[[teacher]]\nname = "stub"\nbackend = "opencode"\nmodel = "stub/one"\nbase_url = "{stub_url}"\n'
        f'server_url = "{url}"\n'
    )
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FOUNDRY_SERVER_DIR": str(folder),
        "OPENCODE_SERVER_PASSWORD": PASSWORD,
        "OPENCODE_BIN": program,
    }
    command = [str(ROOT / "scripts/start_server.sh"), "--config", str(settings)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    try:
        yield url, int((folder / f"server-{port}" / "pid").read_text())
    finally:
        subprocess.run([*command, "--stop"], env=environment, check=True, stdout=subprocess.DEVNULL)


def cpu_seconds(pid: int) -> float:
    """CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _measure(url: str, pid: int, requests: int) -> Figures:
    os.environ["OPENCODE_SERVER_PASSWORD"] = PASSWORD
    settings = TeacherSettings(name="stub", backend="opencode", model="stub/one", server_url=url)
    teacher = OpenCodeTeacher(settings)
    await asyncio.gather(*(teacher.ask(Question(prompt=f"warm {i}")) for i in range(MAX_IN_FLIGHT)))
    singles = []
    for i in range(15):
        start = time.perf_counter()
        await teacher.ask(Question(prompt=f"single {i}"))
        singles.append(time.perf_counter() - start - LATENCY)
        await asyncio.sleep(0.1)
    start, server_cpu, own_cpu = time.perf_counter(), cpu_seconds(pid), time.process_time()
    await asyncio.gather(*(teacher.ask(Question(prompt=f"many {i}")) for i in range(requests)))
    seconds = time.perf_counter() - start
    server_cpu, own_cpu = cpu_seconds(pid) - server_cpu, time.process_time() - own_cpu
    await teacher.close()
    async with OpenCodeClient(url, password=PASSWORD) as client:
        left = len(await client.sessions())
    return {
        "opencode_per_s": requests / seconds,
        "opencode_added_ms": statistics.median(singles) * 1e3,
        "opencode_sessions_left": left,
        "opencode_server_cpu_ms": server_cpu / requests * 1e3,
        "opencode_own_cpu_ms": own_cpu / requests * 1e3,
    }


def measure(requests: int = 3_000) -> Figures:
    """All figures; each is None where OpenCode is not installed."""
    program = installed()
    if not program:
        return dict.fromkeys(("opencode_per_s", "opencode_added_ms", "opencode_sessions_left"))
    with (
        tempfile.TemporaryDirectory() as folder,
        stub_teacher() as stub,
        server(program, stub, Path(folder)) as (url, pid),
    ):
        return asyncio.run(_measure(url, pid, requests))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 requests instead of 3,000")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    requests = 60 if options.quick else 3_000
    figures = measure(requests)
    if figures["opencode_per_s"] is None:
        print("not measured: OpenCode is not installed (scripts/start_server.sh installs it)")
    else:
        print(f"{requests:,} requests, {MAX_IN_FLIGHT} in flight, teacher answers in {LATENCY * 1e3:.0f} ms")
        names = {
            "opencode_per_s": "requests a second",
            "opencode_added_ms": "ms added, one at a time",
            "opencode_server_cpu_ms": "ms of CPU a request, server",
            "opencode_own_cpu_ms": "ms of CPU a request, our side",
            "opencode_sessions_left": "sessions left",
        }
        for key, name in names.items():
            print(f"{name:32} {figures[key]:8.1f}")
    if options.json:
        print(json.dumps({"benchmark": "opencode", "requests": requests, **figures}))


if __name__ == "__main__":
    main()
