"""Every benchmark runs in its quick form, explains itself, and ends in one JSON object."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).resolve().parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_quick_form_ends_in_json(path: Path) -> None:
    run = subprocess.run([sys.executable, path, "--quick", "--json"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    *table, last = run.stdout.splitlines()
    assert table
    assert json.loads(last)["benchmark"] == path.stem


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_each_asks_one_question(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith('"""')
    assert first.endswith("?")
