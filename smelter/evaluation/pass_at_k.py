"""pass@k: the chance that at least one of k completions passes its tests, run in the sandbox.

Estimated without bias from n >= k completions of which c pass (Chen et al., arXiv 2107.03374): 1 - C(n-c, k) / C(n, k),
as a product that neither overflows nor cancels. A program passes when it prints a random word after its last test: to
end early, by `exit()` or otherwise, is not to pass. Programs run while the model writes on, as many at once as there
are cores.
"""

import math
import os
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from smelter.base import Limits, Reason, SandboxError, UserError, run_python
from smelter.decoding import complete_many
from smelter.evaluation.answers import is_accepted, is_same_code, is_same_text
from smelter.evaluation.gaps import edit_similarity, is_exact
from smelter.evaluation.problems import Problem
from smelter.model import Model
from smelter.run import LevelSolved, ProblemCase, Solved
from smelter.tokens import Tokenizer

Verdict = Literal["passed", "failed", "timeout", "memory", "output", "processes"]
LIMITS = Limits(wall_seconds=60.0, cpu_seconds=10)
"""Of one program: twice what the slowest solution of the published files takes (SAFIM's, 5 s). Processor time, which
other work on the machine stretches by a half or so, where it stretches the clock's time without bounds."""


@dataclass(frozen=True)
class Attempt:
    """One completion of a problem and what became of it."""

    problem: Problem
    completion: str
    verdict: Verdict

    @property
    def passed(self) -> bool:
        """Whether all tests passed."""
        return self.verdict == "passed"


def pass_at_k(num_completions: int, num_passed: int, k: int) -> float:
    """Unbiased estimate from `num_completions` of which `num_passed` pass. Raises ValueError unless k <= n, c <= n."""
    if not (1 <= k <= num_completions and 0 <= num_passed <= num_completions):
        raise ValueError(f"pass@{k} of {num_passed} in {num_completions}: needs 1 <= k <= n and 0 <= c <= n")
    failed = num_completions - num_passed
    return 1.0 - math.prod(1.0 - k / i for i in range(failed + 1, num_completions + 1)) if failed >= k else 1.0


def judge(problem: Problem, completion: str, limits: Limits = LIMITS) -> Verdict:
    """Compare with the solution; where that says nothing, run the problem's program with the completion in it.

    The solution itself passes, however long it takes.
    """
    return "passed" if is_same_text(completion, problem.solution) else judge_otherwise(problem, completion, limits)


def judge_otherwise(problem: Problem, completion: str, limits: Limits = LIMITS) -> Verdict:
    """The verdict on an answer that is not the solution word by word."""
    if not problem.is_runnable:
        return "passed" if is_same_code(completion, problem.solution, problem.language) else "failed"
    program = problem.program(completion)
    if not problem.cases:
        word = secrets.token_hex(8)
        result = run_python(f"{program}\nprint({word!r})\n", limits=limits)
        if result.reason == "ok" and result.stdout.rstrip("\n").endswith(word):
            return "passed"
        return _verdict_on(result.reason)
    for stdin, accepted in problem.cases:
        result = run_python(program, stdin=stdin, limits=limits)
        if result.reason != "ok" or not is_accepted(result.stdout, accepted):
            return _verdict_on(result.reason)
    return "passed"


def _verdict_on(reason: Reason) -> Verdict:
    """Of a program that did not pass."""
    match reason:
        case "ok" | "error":
            return "failed"
        case limit:
            return limit


def attempt(
    model: Model,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    *,
    num_completions: int = 1,
    temperature: float = 0.0,
    max_tokens: int = 256,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Attempt]:
    """`num_completions` of every problem, judged; those of one problem stand together.

    Raises UserError where the sandbox cannot be set up.
    """
    tasks = [problem for problem in problems for _ in range(num_completions)]
    verdicts: list[Future[Verdict]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = complete_many(
            model,
            tokenizer,
            [problem.prompt for problem in tasks],
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            progress=progress,
            on_text=lambda i, text: verdicts.append(pool.submit(judge, tasks[i], text)),
        )
        try:
            judged = [verdict.result() for verdict in verdicts]
        except SandboxError as error:
            raise UserError(f"the sandbox cannot run programs here: {error}") from None
    return [Attempt(*parts) for parts in zip(tasks, texts, judged, strict=True)]


def problem_cases(measure: str, attempts: Sequence[Attempt]) -> list[ProblemCase]:
    """A case of every problem, for the result file."""
    by_task: dict[str, list[Attempt]] = {}
    for one in attempts:
        by_task.setdefault(one.problem.task_id, []).append(one)
    return [
        ProblemCase(
            measure=measure,
            case=task,
            num_completions=len(tries),
            num_passed=sum(one.passed for one in tries),
            verdicts=tuple(one.verdict for one in tries),
            completions=tuple(one.completion for one in tries),
        )
        for task, tries in by_task.items()
    ]


def solved(attempts: Sequence[Attempt], ks: Sequence[int], *, temperature: float, max_tokens: int) -> Solved:
    """pass@k over all problems and by difficulty, how the programs ended, and for gaps how near the answers come."""
    whole = _level(attempts, ks)
    exact = similarity = None
    if any(one.problem.is_infill for one in attempts):
        pairs = [(one.completion, one.problem.solution) for one in attempts]
        exact = sum(is_exact(*pair) for pair in pairs) / len(pairs)
        similarity = sum(edit_similarity(*pair) for pair in pairs) / len(pairs)
    levels = sorted({one.problem.difficulty for one in attempts if one.problem.difficulty is not None})
    return Solved(
        pass_at=whole.pass_at,
        num_problems=whole.num_problems,
        num_completions=len(attempts) // whole.num_problems,
        verdicts=dict(Counter(one.verdict for one in attempts).most_common()),
        exact_match=exact,
        edit_similarity=similarity,
        by_difficulty={
            str(level): _level([one for one in attempts if one.problem.difficulty == level], ks) for level in levels
        },
        temperature=temperature,
        max_tokens=max_tokens,
    )


def _level(attempts: Sequence[Attempt], ks: Sequence[int]) -> LevelSolved:
    cases = problem_cases("", attempts)
    return LevelSolved({k: sum(estimate(case, k) for case in cases) / len(cases) for k in ks}, len(cases))


def estimate(case: ProblemCase, k: int) -> float:
    """pass@k of one problem."""
    return pass_at_k(case.num_completions, case.num_passed, k)
