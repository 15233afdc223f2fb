"""The teacher that needs no key, no network and no model: it answers from the code that the question was made from.

Asked for the body of a function it gives the body that its author wrote, asked for a docstring the author's, asked
for tests those of the project, asked for uses the real calls. It invents nothing: a question whose answer is not in
the local code is rejected. That is honest data and enough to try the whole way on a fresh machine, but it teaches
only what the code says; it is no substitute for a model that can explain. Records name it as their teacher, so what
it made can be told apart, weighted or dropped.
"""

import re
from typing import Any

from foundry.settings import TeacherSettings
from foundry.teacher import Answer, Question, RejectedQuestionError

_WORD = re.compile(r"\S+")


class LocalTeacher:
    """Answers code-seeded questions with what the code itself says. Costs nothing."""

    def __init__(self, settings: TeacherSettings) -> None:
        self.name = settings.name

    async def ask(self, question: Question) -> Answer:
        """The mined answer in a code block; `usage` counts words between white space, as there is no tokenizer here.

        Raises RejectedQuestionError where the question brings no known answer.
        """
        text = f"```python\n{mined_answer(question.material)}\n```"
        words = list(_WORD.finditer(text))
        is_cut = len(words) > question.max_tokens
        if is_cut:
            text = text[: words[question.max_tokens - 1].end()]
        return Answer(
            text=text,
            finish="length" if is_cut else "stop",
            usage={
                "input": len(_WORD.findall(question.system)) + len(_WORD.findall(question.prompt)),
                "output": min(len(words), question.max_tokens),
            },
            cost=0.0,
        )

    async def close(self) -> None:
        """Nothing is held."""


def mined_answer(material: Any) -> str:
    """The answer that a seed's material brings, without its code fence. Raises RejectedQuestionError."""
    if "task" not in material:
        raise RejectedQuestionError(
            "a local teacher answers only code-seeded questions: set builtin = false, corpus and kinds in [seeds],"
            " or choose a teacher with a model"
        )
    answer = material.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        raise RejectedQuestionError(
            f"a local teacher answers only code-seeded questions whose answer is in the code, and there is none for"
            f" {material['task']} of {material.get('file', 'this question')}: leave this kind to a teacher with a model"
        )
    return answer.rstrip()
