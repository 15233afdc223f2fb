r"""Problems with tests: four published file formats read into one shape.

A file holds a JSON object on each line (`.gz` as well). The keys decide the format:

- HumanEval (github.com/openai/human-eval): `task_id, prompt, entry_point, canonical_solution, test`. The program is
  prompt + completion + "\n" + test + "\n" + `check(entry_point)`; a completion ends before `STOPS` (Chen et al.,
  arXiv 2107.03374).
- MBPP (google-research/mbpp, README; Austin et al., arXiv 2108.07732): `task_id, text, code, test_list,
  test_setup_code`, or, in the sanitized file, `prompt` and `test_imports`. The prompt is the README's `MBPP_PROMPT`,
  three-shot with tasks 2, 3 and 4 where the file has them; `[DONE]` ends a completion. Of the whole file the test
  split, tasks 11 to 510, is taken. The program is imports + completion + setup (which uses its classes) + tests.
- HumanEval-Infilling (github.com/openai/human-eval-infilling): HumanEval's keys and `suffix`. The program is
  prompt + completion + suffix + "\n" + test + "\n" + `check(entry_point)`.
- SAFIM (github.com/gonglinyuan/safim, its data and evaluate.py; Gong et al., arXiv 2403.04814): `task_id, lang,
  prompt, eval_prompt, ground_truth, unit_tests`. `prompt` has a TODO comment in the place of the gap, `eval_prompt`
  (the program) `{{completion}}`; every unit test is an `input` and a list of accepted `output`s. Programs in Python
  are run; in other languages, and without unit tests (calls of an API), the completion is compared with the ground
  truth.

`SingleLine...` tasks, and SAFIM's `control...` tasks and calls where the ground truth is one line, end at the first
line break after something was written, the others where the model ends them. A gap whose solution ends with a line
break has one at its end whether the model writes it or not. Only Python is run: files with HumanEval's keys in another
language (HumanEvalPack, HumanEval-X) are refused, their gaps compared.
"""

import gzip
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smelter.base import DataError
from smelter.decoding import Prompt

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""What ends a HumanEval completion."""
END_OF_LINE = re.compile(rb"(?<=[^\s])[^\S\n]*\n")
"""The first line break after something that is no space."""
MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}\n[BEGIN]\n"
)
MBPP_SHOTS = (2, 3, 4)
MBPP_TEST = range(11, 511)
GAP = "{{completion}}"
LANGUAGES = {
    **{
        name: name
        for name in ("cpp", "csharp", "go", "java", "javascript", "php", "python", "ruby", "rust", "typescript")
    },
    **{"c++": "cpp", "c#": "csharp", "js": "javascript", "py": "python", "python3": "python", "ts": "typescript"},
}
"""What a row may call its language: our name for it."""
SAFIM_PLACEHOLDERS = ("# TODO: Your code here", "/* TODO: Your code here */")
OWN_PROBLEMS = Path(__file__).with_name("problems.jsonl")
"""Small problems of our own, in HumanEval's format with a `difficulty` from 1 to 4."""


@dataclass(frozen=True)
class Problem:
    """What the model is asked, and how its answer is judged.

    The program (`program`) passes where it ends well and, for every (input, accepted outputs) in `cases`, prints one
    of them; without either there is only the solution to compare with.
    """

    task_id: str
    prompt: Prompt
    solution: str
    before: str = ""
    after: str = ""
    cases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    is_runnable: bool = True
    language: str = "python"
    difficulty: int | None = None

    @property
    def is_infill(self) -> bool:
        """Whether there is text after the gap."""
        return self.prompt.suffix is not None

    def program(self, completion: str) -> str:
        """What is run: a line that the solution ends is ended, which the stop of a single line cuts off."""
        is_open = self.solution.endswith("\n") and not completion.endswith("\n")
        return self.before + completion + ("\n" if is_open else "") + self.after


def _language(row: dict[str, Any]) -> str:
    """As the row says it, by a key or at the beginning of its task_id, as in `JavaScript/0`."""
    if named := str(row.get("language") or row.get("lang") or "").lower():
        return LANGUAGES.get(named, named)
    return LANGUAGES.get(str(row["task_id"]).partition("/")[0].lower(), "python")


def _human_eval(row: dict[str, Any]) -> Problem:
    test = f"\n{row['test']}\ncheck({row['entry_point']})\n"
    return Problem(
        task_id=str(row["task_id"]),
        prompt=Prompt(row["prompt"], stops=STOPS),
        solution=row["canonical_solution"],
        before=row["prompt"],
        after=test,
        language=_language(row),
        difficulty=row.get("difficulty"),
    )


def _infilling(row: dict[str, Any]) -> Problem:
    has_test = bool(row.get("test")) and bool(row.get("entry_point"))
    stops = [END_OF_LINE] if str(row["task_id"]).startswith("SingleLine") else []
    language = _language(row)
    test = f"\n{row['test']}\ncheck({row['entry_point']})\n" if has_test else ""
    return Problem(
        task_id=str(row["task_id"]),
        prompt=Prompt(row["prompt"], row["suffix"], stops),
        solution=row["canonical_solution"],
        before=row["prompt"],
        after=row["suffix"] + test,
        is_runnable=has_test and language == "python",
        language=language,
        difficulty=row.get("difficulty"),
    )


def _mbpp_prompt(row: dict[str, Any]) -> str:
    return MBPP_PROMPT.format(row.get("text") or row["prompt"], "\n".join(row["test_list"]))


def _mbpp(row: dict[str, Any], shots: str) -> Problem:
    setup = f"{row['test_setup_code']}\n" if row.get("test_setup_code") else ""
    return Problem(
        task_id=str(row["task_id"]),
        prompt=Prompt(shots + _mbpp_prompt(row), stops=["[DONE]"]),
        solution=row["code"],
        before="".join(f"{line}\n" for line in row.get("test_imports") or ()),
        after="\n" + setup + "\n".join(row["test_list"]) + "\n",
    )


def _safim(row: dict[str, Any]) -> Problem:
    before, gap, after = row["eval_prompt"].partition(GAP)
    if not gap:
        raise KeyError(f"{GAP} in eval_prompt")
    shown = [row["prompt"].split(mark) for mark in SAFIM_PLACEHOLDERS]
    prefix, suffix = next((parts for parts in shown if len(parts) == 2), (before, after))
    tests = row.get("unit_tests") or []
    tests = json.loads(tests) if isinstance(tests, str) else tests  # the data set's server keeps them as text
    outputs = [test["output"] if isinstance(test["output"], list) else [test["output"]] for test in tests]
    # The published calls of an API are named as blocks are, and have no tests.
    is_line = (not tests or str(row["task_id"]).startswith("control")) and "\n" not in row["ground_truth"].strip()
    return Problem(
        task_id=str(row["task_id"]),
        prompt=Prompt(prefix, suffix, [END_OF_LINE] if is_line else []),
        solution=row["ground_truth"],
        before=before,
        after=after,
        cases=tuple((test["input"], tuple(accepted)) for test, accepted in zip(tests, outputs, strict=True)),
        is_runnable=bool(tests) and _language(row) == "python",
        language=_language(row),
    )


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank. Raises DataError that names file and line."""
    number, rows = 0, []
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.lstrip().startswith(b"["):  # sanitized-mbpp.json is one array
                    rows = list(enumerate(json.loads(line + file.read()), 1))
                    break
                if line.strip():
                    rows.append((number, json.loads(line)))
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}:{number}: not JSON ({error}): give one problem on each line") from None
    seen = set()
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: not a JSON object: give one problem on each line")
        if row.get("task_id") in seen:
            raise DataError(f"{path}:{number}: task_id {row['task_id']!r} is there twice: give each its own")
        seen.add(row.get("task_id"))
    return rows


def _reader(rows: Sequence[tuple[int, dict[str, Any]]]) -> Callable[[dict[str, Any]], Problem]:
    """What reads the rows of a file, by the keys of the first."""
    keys = rows[0][1].keys()
    if "eval_prompt" in keys:
        return _safim
    if "suffix" in keys:
        return _infilling
    if "test_list" in keys:
        by_id = {row.get("task_id"): row for _, row in rows}
        shots = [by_id[number] for number in MBPP_SHOTS if number in by_id]
        shown = "".join(f"{_mbpp_prompt(row)}{row['code']}\n[DONE]\n\n" for row in shots)
        return lambda row: _mbpp(row, shown if len(shots) == len(MBPP_SHOTS) else "")
    return _human_eval


def load_problems(path: Path) -> list[Problem]:
    """The problems of a file in any of the formats above. Raises DataError that names file, line and what is amiss."""
    rows = _rows(path)
    if not rows:
        raise DataError(f"{path}: no problem in it: give a JSONL file in a format that `smelter evaluate` reads")
    read = _reader(rows)
    if "test_list" in rows[0][1]:  # of the whole of MBPP, its test set
        rows = [item for item in rows if item[1].get("task_id") in MBPP_TEST] or rows
    problems = []
    for number, row in rows:
        try:
            problems.append(read(row))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{path}:{number}: {what}: not a problem as HumanEval, MBPP, HumanEval-Infilling or SAFIM have them"
            ) from None
        if not problems[-1].is_infill and problems[-1].language != "python":
            what = f"{problems[-1].task_id} is in {problems[-1].language}"
            raise DataError(f"{path}:{number}: {what}, and only Python is run: give the file for Python")
    return problems


def line_variants(path: Path) -> list[Problem]:
    """Every line of every solution of a HumanEval file as a gap: HumanEval-Infilling's single-line format.

    The line's break belongs to the gap, as there.
    """
    variants = []
    for _, row in _rows(path):
        lines = re.findall(r"[^\n]*\n|[^\n]+$", row["canonical_solution"])
        for number, line in enumerate(lines):
            if line.strip():
                variant = {
                    **row,
                    "task_id": f"SingleLineInfilling/{row['task_id']}/L{number}",
                    "prompt": row["prompt"] + "".join(lines[:number]),
                    "canonical_solution": line,
                    "suffix": "".join(lines[number + 1 :]),
                }
                variants.append(_infilling(variant))
    return variants
