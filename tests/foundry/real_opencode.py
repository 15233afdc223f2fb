"""A real OpenCode server, started by scripts/start_server.sh in a folder of its own, before a stub teacher.

OPENCODE_BIN names a program that is there already; else the script installs the pinned one (npm), once for all runs.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from foundry.opencode_client import OpenCodeClient
from foundry.settings import TeacherSettings
from foundry.teachers.opencode import OpenCodeTeacher
from tests.foundry.streaming_stub import StreamingStub

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "start_server.sh"
KEY = "sk-stub-500-key"
PASSWORD = "correct-horse-battery"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def link_program(folder: Path) -> None:
    """Let the script install its program where all tests have it: once, not once for every run."""
    if "OPENCODE_BIN" not in os.environ:
        programs = Path.home() / ".cache" / "foundry-tests"
        (version,) = [line[8:] for line in SCRIPT.read_text().splitlines() if line.startswith("version=")]
        (programs / f"npm-{version}").mkdir(parents=True, exist_ok=True)
        (folder / f"npm-{version}").symlink_to(programs / f"npm-{version}")


class Server:
    """One OpenCode server: teachers stub/one and, with a wrong key, wrong/one."""

    def __init__(self, folder: Path, stub: StreamingStub) -> None:
        self.port = free_port()
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.port}"
        self.settings = folder / "foundry.toml"
        self.settings.write_text(
            "".join(
                f'[[teacher]]\nname = "{name}"\nbackend = "opencode"\nmodel = "{name}"\nbase_url = "{stub.url}"\n'
                f'key_env = "{key}"\nserver_url = "{self.url}"\n'
                for name, key in [("stub/one", "STUB_KEY"), ("wrong/one", "WRONG_KEY")]
            )
        )
        self.secrets = {"OPENCODE_SERVER_PASSWORD": PASSWORD, "STUB_KEY": KEY, "WRONG_KEY": "sk-wrong"}
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "FOUNDRY_SERVER_DIR": str(folder),
            **self.secrets,
        }

    def script(self, *argv: str) -> subprocess.CompletedProcess[str]:
        command = [str(SCRIPT), "--config", str(self.settings), *argv]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done

    @property
    def pid(self) -> int:
        return int((self.folder / f"server-{self.port}" / "pid").read_text())

    def teacher(self, model: str = "stub/one", **options: Any) -> OpenCodeTeacher:
        settings = TeacherSettings(name="stub", backend="opencode", model=model, server_url=self.url, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENCODE_SERVER_PASSWORD", PASSWORD)
            return OpenCodeTeacher(settings)

    def client(self) -> OpenCodeClient:
        return OpenCodeClient(self.url, password=PASSWORD)


@contextmanager
def running(folder: Path, stub: StreamingStub) -> Iterator[Server]:
    """The server, up; it is stopped at the end."""
    link_program(folder)
    one = Server(folder, stub)
    one.script()
    try:
        yield one
    finally:
        one.script("--stop")
