"""What a teacher is: something that answers one question, and says what that took.

A backend puts the question to one model and turns what comes back into an `Answer`, or into one of the errors below. It
knows nothing of retries, limits, budgets or other teachers: `teachers.limits` and `teachers.ensemble` add those to any
of them. Everything that determines an answer is in `Question`, so its hash can be the key of the journal.

What models and vendors say in many ways is read here, for all backends alike: `read_answer` tells reasoning from answer
and knows each word for why it ended, `http_error` knows what a status means.
"""

import email.utils
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from smelter.base import UserError

if TYPE_CHECKING:
    import aiohttp

MAX_ANSWER_BYTES = 64 * 2**20
"""Largest body that is read: a server that sends without end does not fill our memory."""

_THINK = re.compile(r"\s*<think>(.*?)(?:</think>\s*|\Z)", re.DOTALL)
_FINISH = {"stop": "stop", "eos": "stop", "end_turn": "stop", "length": "length", "max_tokens": "length"}
_FINISH |= dict.fromkeys(("content_filter", "content-filter", "sensitive", "refusal"), "filter")
# Statuses of a vendor's refusal or failure, which it does not bill. Not here: time-outs (408, 504, 524 and their like)
# and 502, behind which an answer may have been written, and what nobody has documented.
_FREE_STATUSES = {*range(300, 500), 500, 503, 529} - {408, 499}
# Azure bills a prompt that its filter refuses with HTTP 400.
_FILTERED = re.compile(r"content_filter|content_policy|content management policy", re.IGNORECASE)
# No connection was made: what a plug-in's status 0 says in Node's, Bun's and the system's words.
_NEVER_SENT = re.compile(
    r"ECONNREFUSED|ConnectionRefused|ENOTFOUND|EAI_AGAIN|EHOSTUNREACH|ENETUNREACH|Unable to connect"
)
# What vendors say with HTTP 429 when it is not the pace that is too high, but the account that is empty.
_OUT_OF_CREDIT = re.compile(r"insufficient_quota|insufficient balance|billing_hard_limit", re.IGNORECASE)


class TeacherError(UserError):
    """A teacher did not answer. Its class says what to do about it, its cause is for the statistics.

    Whoever tells of it puts the teacher's name before it: the backend need not.
    """

    cause = "failed"
    is_worth_retrying = False
    """Whether the same question may fare better later."""
    is_free = False
    """Whether it was certainly not billed. Else the call's worst case stays in the books, or what `usage` costs."""

    def __init__(
        self,
        message: str,
        *,
        cause: str = "",
        is_worth_retrying: bool | None = None,
        retry_after: float | None = None,
        is_free: bool | None = None,
        usage: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.cause = cause or self.cause
        if is_worth_retrying is not None:
            self.is_worth_retrying = is_worth_retrying
        self.retry_after = retry_after
        """Seconds that the teacher asks to wait, if it does."""
        if is_free is not None:
            self.is_free = is_free
        self.usage = usage or {}
        """Tokens billed for an answer of no use, as in `Answer`, where they came with it."""


class RateLimitedError(TeacherError):
    """Too many requests, or overloaded for the moment."""

    cause = "rate limit"
    is_worth_retrying = True
    is_free = True


class UnavailableError(TeacherError):
    """Down, disconnected, failing inside, or too slow."""

    cause = "unavailable"
    is_worth_retrying = True


class GarbledAnswerError(TeacherError):
    """An answer that is of no use: not JSON, of another shape, empty, or half of one."""

    cause = "garbled"
    is_worth_retrying = True


class RefusedKeyError(TeacherError):
    """The key is wrong, missing or without permission, or the account is empty: no other question will fare better."""

    cause = "key refused"
    is_free = True


class RejectedQuestionError(TeacherError):
    """This question cannot be answered: too long, of no use to this teacher, or put to an unknown model."""

    cause = "rejected"
    is_free = True


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


def read_answer(text: str, *, finish: str, reasoning: str = "", is_worth_retrying: bool = True, **more: Any) -> Answer:
    """What a model said as an Answer (`more`: its other fields), with reasoning told apart and `finish` in our words.

    A text may begin with <think>...</think>; without its end, all is reasoning. Raises GarbledAnswerError where nothing
    but reasoning is left; whether it `is_worth_retrying` then is the caller's to say where chance has a part in it.
    """
    finish, usage = _FINISH.get(finish, finish), more.get("usage")
    if think := _THINK.match(text):
        reasoning, text = reasoning or think[1].strip(), text[think.end() :]
    if text.strip():
        return Answer(text=text, finish=finish, reasoning=reasoning, **more)
    if finish == "filter":
        problem, cause = "held back by a content filter", "rejected"
    elif finish == "length" and reasoning:
        problem, cause = "all of max_tokens went into reasoning: raise max_tokens", "only reasoning"
    else:
        message = f"an empty answer (finish: {finish!r})"
        raise GarbledAnswerError(message, is_worth_retrying=is_worth_retrying, usage=usage)
    raise GarbledAnswerError(problem, cause=cause, is_worth_retrying=False, usage=usage)


def is_billed(usage: Mapping[str, int], text: str = "") -> bool:
    """Whether this can be what a call with an answer `text` was billed: a prompt has tokens, and so has a text."""
    return usage.get("input", 0) > 0 and usage.get("output", -1) >= (1 if text else 0)


def http_error(message: str, status: int, headers: Mapping[str, str]) -> TeacherError:
    """What a status other than 200 means to the question; 0 stands for no connection."""
    error = _http_error(message, status, headers)
    is_sent = bool(status) or not _NEVER_SENT.search(message) or "broke off" in message
    error.is_free = not is_sent or (status in _FREE_STATUSES and not (status == 400 and _FILTERED.search(message)))
    return error


def _http_error(message: str, status: int, headers: Mapping[str, str]) -> TeacherError:
    wait = _retry_after(headers)
    if status in (401, 403):
        return RefusedKeyError(f"{message}: check the key")
    if status == 402 or (status == 429 and _OUT_OF_CREDIT.search(message)):
        return RefusedKeyError(f"{message}: the account is out of credit")
    if status in (429, 529):
        return RateLimitedError(message, retry_after=wait)
    if status in (408, 504):
        return UnavailableError(message, cause="timeout", retry_after=wait)
    if status >= 500 or status in (0, 409, 425):
        return UnavailableError(message, retry_after=wait)
    if 300 <= status < 400:
        return RejectedQuestionError(f"{message}: moved to {headers.get('Location', '?')}: correct base_url")
    return RejectedQuestionError(message)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `retry-after` (seconds or a date)."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1_000)
        value = headers.get("retry-after", "")
        if not value:
            return None
        if re.fullmatch(r"\s*[0-9.]+\s*", value):
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


async def read_body(response: "aiohttp.ClientResponse") -> bytes:
    """The whole body. Raises GarbledAnswerError where it is larger than MAX_ANSWER_BYTES."""
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            response.close()
            raise GarbledAnswerError(f"{response.url.path}: an answer of more than {MAX_ANSWER_BYTES:,} bytes")
    return bytes(body)


def short(text: str) -> str:
    """One line of at most 300 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."
