"""The Triton operations equal the specification: in Triton's interpreter everywhere, compiled where a GPU is.

Whether Triton interprets is decided for a process when triton is first imported, which PyTorch's compiler does
as well. So the checks, `interpreted_triton.py`, run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_checks(interpret: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted_triton.py"],
        cwd=ROOT,
        env={**environment, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert interpret == "0" or "skipped" not in run.stdout


@pytest.mark.slow
def test_interpreted() -> None:
    run_checks("1")


@pytest.mark.slow
@pytest.mark.gpu
def test_compiled() -> None:
    run_checks("0")
