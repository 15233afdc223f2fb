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
from typing import Any, Literal

from smelter.base import Limits, Reason, SandboxError, UserError, run_python
from smelter.decoding import complete_many
from smelter.evaluation.gaps import edit_similarity, is_exact
from smelter.evaluation.problems import Problem
from smelter.model import Model
from smelter.tokens import Tokenizer

Verdict = Literal["passed", "failed", "timeout", "memory", "output", "processes"]
LIMITS = Limits(wall_seconds=20.0, cpu_seconds=3)
"""Of one program: HumanEval's 3 seconds, of processor time so that a busy machine changes no verdict."""


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
    """Run the problem's program with the completion in it, or compare where there is nothing to run."""
    if not problem.is_runnable:
        return "passed" if "".join(completion.split()) == "".join(problem.solution.split()) else "failed"
    program = problem.before + completion + problem.after
    if not problem.cases:
        word = secrets.token_hex(8)
        result = run_python(f"{program}\nprint({word!r})\n", limits=limits)
        if result.reason == "ok" and result.stdout.rstrip("\n").endswith(word):
            return "passed"
        return _verdict_on(result.reason)
    for given, accepted in problem.cases:
        result = run_python(program, stdin=given, limits=limits)
        if result.reason != "ok" or result.stdout.split() not in [output.split() for output in accepted]:
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
            found = [verdict.result() for verdict in verdicts]
        except SandboxError as error:
            raise UserError(f"the sandbox cannot run programs here: {error}") from None
    return [Attempt(*item) for item in zip(tasks, texts, found, strict=True)]


def passed_by_problem(attempts: Sequence[Attempt]) -> dict[str, tuple[int, int]]:
    """{task_id: (completions, passed)}."""
    totals, passed = Counter[str](), Counter[str]()
    for item in attempts:
        totals[item.problem.task_id] += 1
        passed[item.problem.task_id] += item.passed
    return {task: (totals[task], passed[task]) for task in totals}


def _means(attempts: Sequence[Attempt], ks: Sequence[int]) -> dict[str, float]:
    counts = passed_by_problem(attempts).values()
    return {f"pass@{k}": sum(pass_at_k(n, c, k) for n, c in counts) / len(counts) for k in ks}


def summary(attempts: Sequence[Attempt], ks: Sequence[int]) -> dict[str, Any]:
    """pass@k over all problems and by difficulty, how the programs ended, and for gaps what `infill` measures."""
    found: dict[str, Any] = {
        **_means(attempts, ks),
        "num_problems": len(passed_by_problem(attempts)),
        "num_completions": len(attempts) // len(passed_by_problem(attempts)),
        "verdicts": dict(Counter(item.verdict for item in attempts).most_common()),
    }
    if any(item.problem.is_infill for item in attempts):
        pairs = [(item.completion, item.problem.solution) for item in attempts]
        found["exact_match"] = sum(is_exact(*pair) for pair in pairs) / len(pairs)
        found["edit_similarity"] = sum(edit_similarity(*pair) for pair in pairs) / len(pairs)
    levels = sorted({item.problem.difficulty for item in attempts if item.problem.difficulty is not None})
    if levels:
        found["by_difficulty"] = {}
        for level in levels:
            chosen = [item for item in attempts if item.problem.difficulty == level]
            number = len(passed_by_problem(chosen))
            found["by_difficulty"][str(level)] = {**_means(chosen, ks), "num_problems": number}
    return found
