"""What a teacher is: something that answers one question, and says what that took.

Backends (`openai_teacher`, `local_teacher`) do one thing each: put the question to one model and
turn what comes back into an `Answer`, or into one of the errors below. They know nothing of retries, limits, budgets
or other teachers: `limits` and `ensemble` add those to any of them. Everything that determines an answer is in
`Question`, so its hash can be the key of the journal.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from smelter.base import UserError

_THINK = re.compile(r"\s*<think>(.*?)(?:</think>\s*|\Z)", re.DOTALL)
OUT_OF_CREDIT = re.compile(r"insufficient_quota|insufficient balance|billing_hard_limit", re.IGNORECASE)
"""What vendors say with HTTP 429 when it is not the pace that is too high, but the account that is empty."""


class TeacherError(UserError):
    """A teacher did not answer. `is_worth_retrying` says whether the same question may fare better later."""

    cause = "failed"
    """One word for the statistics."""
    is_worth_retrying = False

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds that the teacher asks to wait, if it does."""


class RateLimitedError(TeacherError):
    """Too many requests (HTTP 429), or overloaded for the moment (529)."""

    cause = "rate limit"
    is_worth_retrying = True


class UnavailableError(TeacherError):
    """Down, disconnected, or failing inside (HTTP 5xx)."""

    cause = "unavailable"
    is_worth_retrying = True


class AnswerTimeoutError(TeacherError):
    """No answer in time."""

    cause = "timeout"
    is_worth_retrying = True


class GarbledAnswerError(TeacherError):
    """An answer that cannot be read: not JSON, of another shape, empty, or half of one."""

    cause = "garbled"
    is_worth_retrying = True


class OnlyReasonedError(GarbledAnswerError):
    """All its tokens went into reasoning, and as many would again."""

    cause = "only reasoning"
    is_worth_retrying = False


class RefusedKeyError(TeacherError):
    """The key is wrong, missing or without permission (HTTP 401, 403): no other question will fare better."""

    cause = "key refused"


class RejectedQuestionError(TeacherError):
    """This question cannot be answered (HTTP 400, 404, 413, 422): too long, or an unknown model."""

    cause = "rejected"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question to one teacher, with everything that determines the answer."""

    prompt: str
    """What is asked."""
    system: str = ""
    """System prompt; empty: none is sent."""
    max_tokens: int = 2_048
    """Most tokens of the answer."""
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int | None = None
    """Passed on where the teacher takes one."""
    material: Mapping[str, Any] = field(default_factory=dict)
    """What a seed knows besides its words (a snippet, its file): for teachers that do not read English. JSON values."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a teacher said."""

    text: str
    """Without reasoning; never empty."""
    finish: str
    """Why it stopped, in one vocabulary for all backends: "stop", "length", "filter", or the teacher's own word."""
    reasoning: str = ""
    """What it thought aloud, where the backend tells it apart."""
    usage: Mapping[str, int] = field(default_factory=dict)
    """Tokens billed: "input", "output", "reasoning", "cache_read", "cache_write", those that are known."""
    cost: float | None = None
    """US dollars if the backend knows; None: to be computed from the price and usage."""
    logprobs: tuple[tuple[str, float], ...] | None = None
    """(token, log-probability) of the answer's tokens, where offered and asked for."""


class Teacher(Protocol):
    """One model behind one backend."""

    name: str
    """As it stands in records: "provider/model"."""

    async def ask(self, question: Question) -> Answer:
        """The answer. Raises a TeacherError; when cancelled, stops the generation on the other side too."""
        ...

    async def close(self) -> None:
        """Give connections and sessions back; no question follows."""
        ...


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a text that may begin with <think>...</think>; without its end, all is reasoning."""
    if think := _THINK.match(text):
        return think[1].strip(), text[think.end() :]
    return "", text
