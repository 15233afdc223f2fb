"""The commands of docs/evaluate.md, run as they stand there."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest

from smelter.__main__ import main
from smelter.evaluation.problems import load_problems
from smelter.run.results import read_results
from tests import tiny
from tests.evaluation.test_problems import HUMAN_EVAL, INFILLING, MBPP, SAFIM
from tests.shards_of_pieces import make_shards

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evaluate.md"
COMMANDS = re.findall(r"^    (smelter .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands find what they name."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "data").mkdir()
    shards = make_shards(folder / "data")
    for seed, name in enumerate(("quickstart", "longer")):
        tiny.checkpoint(folder / "runs" / name, tiny.model(seed), shards=str(shards))
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(HUMAN_EVAL).encode()))
    (folder / "mbpp.jsonl").write_text(json.dumps(MBPP))
    (folder / "HumanEval-SingleLineInfilling.jsonl.gz").write_bytes(gzip.compress(json.dumps(INFILLING).encode()))
    (folder / "safim.jsonl").write_text(json.dumps(SAFIM))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert main(shlex.split(command)[1:]) == 0
    results = read_results(folder / "runs" / "quickstart" / "results.json")
    for name in re.findall(r"(?:--problems|--infill-file) ([^ .]+)", command):
        assert name in {**results.pass_at_k, **results.infill_files}


def test_what_the_page_says_of_our_problems() -> None:
    page = PAGE.read_text(encoding="utf-8")
    problems = load_problems(PAGE.parent.parent / "smelter" / "evaluation" / "problems.jsonl")
    assert f"{len(problems)} small Python problems" in page
    for level in range(1, 5):
        assert f"| {level} | {sum(problem.difficulty == level for problem in problems)} |" in page
    assert len(COMMANDS) == 7
