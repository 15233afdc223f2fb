"""The real clients: where `scripts/install_clients.sh` put them, and how a test runs one against a server."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent
INSTALLER = ROOT / "scripts" / "install_clients.sh"
SECONDS = 120


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    is_ours: bool


def clients_folder() -> Path:
    """The folder with bin/ and node_modules/; skips the test where they are not installed."""
    (version,) = [line.split()[0][8:] for line in INSTALLER.read_text().splitlines() if line.startswith("version=")]
    default = Path.home() / ".cache" / "foundry-tests" / f"clients-{version}"
    folder = Path(os.environ.get("CLIENTS_DIR") or default)
    if not (folder / ".complete").exists():
        pytest.skip(f"no clients in {folder}: run scripts/install_clients.sh first")
    return folder


def run_client(program: list[str], home: Path, *, stdin: str = "", environment: dict[str, str] | None = None) -> str:
    """What a client prints, run with `home` as its home and without the settings of whoever runs the tests."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        program,
        env=kept | {"HOME": str(home), "NO_PROXY": "*", "LITELLM_LOCAL_MODEL_COST_MAP": "True"} | (environment or {}),
        cwd=home,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{program}\n{done.stdout[-4_000:]}\n{done.stderr[-8_000:]}"
    return done.stdout


def run_python(script: str, served: Served, home: Path, **values: Any) -> dict[str, Any]:
    """What one of the scripts beside this file finds with the clients' Python: JSON in, JSON out."""
    program = [str(clients_folder() / "bin" / "python"), str(HERE / script), served.url]
    found: dict[str, Any] = json.loads(run_client(program, home, stdin=json.dumps(values)))
    return found


def run_node(script: str, served: Served, home: Path, **values: Any) -> dict[str, Any]:
    """The same with Node. Imports are resolved where a script lies, so it is copied beside node_modules."""
    copy = clients_folder() / script
    copy.write_text((HERE / script).read_text(encoding="utf-8"), encoding="utf-8")
    found: dict[str, Any] = json.loads(run_client(["node", str(copy), served.url], home, stdin=json.dumps(values)))
    return found
