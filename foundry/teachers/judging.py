"""Which answers are good: by their form, by running their code, or by what a teacher says of them."""

import ast
import asyncio
import re
from collections.abc import Sequence

from foundry.teacher import Answer, GarbledAnswerError
from smelter.base import Limits, SandboxError, UserError, run_python

LIMITS = Limits(wall_seconds=40.0, cpu_seconds=10)
"""Of an answer's code: of the clock's time more than of the processor's, so that a busy machine judges alike."""
_CODE = re.compile(r"^```[ \t]*(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def code_of(text: str) -> str:
    """The Python of an answer: its fenced blocks, or all of it where there are none."""
    blocks = [code for language, code in _CODE.findall(text) if language.lower() in ("", "python", "py", "python3")]
    return "\n".join(blocks) if blocks or "```" in text else text


def is_good(answer: Answer) -> bool:
    """A cascade's test: the answer is finished and the Python in it parses."""
    if answer.finish == "length":
        return False
    try:
        ast.parse(code_of(answer.text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "```" not in answer.text  # prose needs not parse
    return True


async def runs(answer: Answer) -> bool:
    """Whether an answer's code runs to its end in the sandbox. Raises UserError where there is no sandbox."""
    try:
        result = await asyncio.to_thread(run_python, code_of(answer.text), limits=LIMITS)
    except SandboxError as error:
        raise UserError(f'judge = "execution": {error}: name a teacher as the judge instead') from None
    return result.reason == "ok"


def judge_prompt(task: str, answers: Sequence[Answer]) -> str:
    """The question which answer to `task` is best."""
    shown = "\n\n".join(
        f'<answer number="{number}">\n{answer.text}\n</answer>' for number, answer in enumerate(answers, start=1)
    )
    return (
        "Here is a task and several answers to it. Judge them as an experienced programmer: the code must be correct, "
        "then complete, then clear.\n\n"
        f"<task>\n{task}\n</task>\n\n{shown}\n\n"
        "Which answer is the best? End your reply with its number alone on the last line."
    )


def verdict(text: str, number: int) -> int:
    """Index of the answer that the judge names: the last number in the reply. Raises GarbledAnswerError."""
    numbers = re.findall(r"\d+", text)
    if not numbers or not 1 <= int(numbers[-1][:9]) <= number:
        raise GarbledAnswerError(f"the judge names none of {number} answers: {text.strip()[-40:]!r}")
    return int(numbers[-1]) - 1
