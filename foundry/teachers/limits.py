"""One teacher behind its limits: pace, concurrency, retries, circuit breaker, price.

Requests and tokens a minute are spaced out evenly. After "too many requests" everybody waits as long as the teacher
asks, and fewer calls are in flight until it answers again (additive increase, multiplicative decrease, as in TCP).
After failures in a row a circuit breaker lets one call through at a time, at growing distances; waiting for it costs no
retry, so an outage of a minute costs no question. A teacher that has answered nothing for `give_up_seconds`, or that
refuses the key, is given up for this run: every further question would only repeat the failure.

All of this decides when a question is asked, never which one or of whom.
"""

import asyncio
import contextlib
import json
import math
import random
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from foundry.journal import Account
from foundry.settings import TeacherSettings
from foundry.teacher import (
    Answer,
    GarbledAnswerError,
    Question,
    RateLimitedError,
    RefusedKeyError,
    Teacher,
    TeacherError,
    UnavailableError,
    is_billed,
)
from smelter.base import UserError

BREAKER_FAILURES = 5
"""Failures in a row that open the circuit breaker."""
MAX_UNUSABLE = 20
"""A teacher of whose first answers so many are unusable and none is usable has another fault than the questions."""
MAX_PAUSE = 30.0
"""Longest back-off in seconds; a teacher's own `retry-after` may be longer."""
TEMPLATE_TOKENS = 256
"""Allowance for what an endpoint adds to a prompt (chat template, tool preamble)."""


class StoppedError(Exception):
    """The run is being stopped: no new call is made."""


class Pace:
    """So many a minute, evenly spaced, so that no minute holds more."""

    def __init__(self, per_minute: float) -> None:
        self._seconds_each = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    def take(self, amount: float) -> float:
        """Seconds to wait before using `amount`."""
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + amount * self._seconds_each
        return start - now

    def correct(self, amount: float) -> None:
        """So much more was used than was taken (less, if negative)."""
        self._next += amount * self._seconds_each


class Member:
    """A teacher with its settings, behind its limits."""

    def __init__(self, teacher: Teacher, settings: TeacherSettings) -> None:
        self.teacher = teacher
        self.settings = settings
        self.name = teacher.name
        self.given_up = ""
        """Why this teacher is not asked any more; empty while it is."""
        self.trouble = ""
        """The latest failure while nothing is answered, for the progress line; else empty."""
        self.num_calls = 0
        self.in_flight = 0
        self._stop = asyncio.Event()
        self._requests = Pace(settings.requests_per_minute)
        self._tokens = Pace(settings.tokens_per_minute)
        self._mean_output = min(512.0, settings.max_tokens)
        self._limit = float(settings.concurrency)
        self._closed_until = 0.0
        self._num_limited = 0  # pauses in a row for too many requests
        self._num_failures = 0  # in a row: down, or no answer in time
        self._num_openings = 0  # of the breaker, in a row
        self._failing_since = 0.0
        self._num_answered = 0
        self._num_unusable = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    def stop(self) -> None:
        """No new call; whoever waits for one gets a StoppedError."""
        self._stop.set()
        self._wake(len(self._waiters))

    def cost(self, answer: Answer, question: Question) -> float:
        """US dollars of an answer: as the backend says, else from price and usage, else the worst case."""
        if answer.cost is not None:
            return answer.cost
        if not self.settings.has_price:
            return 0.0
        return self._price(answer.usage) if is_billed(answer.usage, answer.text) else self.worst_cost(question)

    def _price(self, usage: Mapping[str, int]) -> float:
        """US dollars of tokens that were billed."""
        settings = self.settings
        read = min(usage.get("cache_read", 0), usage["input"])
        written = min(usage.get("cache_write", 0), usage["input"] - read)
        dollars = (usage["input"] - read - written) * settings.price_input
        dollars += read * settings.price_of_cache_read + written * settings.price_of_cache_write
        return (dollars + usage["output"] * settings.price_output) / 1e6

    def worst_cost(self, question: Question) -> float:
        """Most that one call can cost in US dollars: a token has at least one byte, and the answer is limited."""
        settings = self.settings
        texts = (question.prompt, question.system, json.dumps(settings.extra) if settings.extra else "")
        num_bytes = sum(len(text.encode()) for text in texts) + TEMPLATE_TOKENS
        price = max(settings.price_input, settings.price_of_cache_read, settings.price_of_cache_write)
        return (num_bytes * price + question.max_tokens * settings.price_output) / 1e6

    async def ask(self, question: Question, key: bytes, account: Account) -> Answer:
        """The answer, after as many tries as it takes and is allowed; each is in the books under `key`.

        Raises TeacherError or StoppedError.
        """
        worst, failures = self.worst_cost(question), 0
        while True:
            await self._enter(question)
            try:
                async with account.call(key, worst, self.name):
                    answer = await self._call(question, key, account, worst)
                self._succeeded(question, answer)
                return answer
            except TeacherError as error:
                pause = self._failed(error, failures)
                failures += not isinstance(error, RateLimitedError)
                if not error.is_worth_retrying or failures > self.settings.retries:
                    raise
            finally:
                self.in_flight -= 1
                self._wake()
            await self._sleep(pause)

    async def _call(self, question: Question, key: bytes, account: Account, worst: float) -> Answer:
        """One try, written down: what timed out, broke off or came without a bill may have cost the `worst`."""
        self.num_calls += 1
        try:
            answer = _checked(await self.teacher.ask(question))
        except UserError as error:
            if worst:
                self._book(error, key, account, worst)
            raise
        cost = self.cost(answer, question)
        extras: dict[str, Any] = {}
        if answer.reasoning and self.settings.keep_reasoning:
            extras["reasoning"] = answer.reasoning
        if answer.logprobs is not None:
            extras["logprobs"] = answer.logprobs
        words = {"teacher": self.name, "text": answer.text, "finish": answer.finish}
        account.write("answer", key, **words, usage=dict(answer.usage), cost=cost, **extras)
        self._compare(cost, worst)
        return answer

    def _book(self, error: UserError, key: bytes, account: Account, worst: float) -> None:
        """What a call without an answer of use cost, as far as that is known."""
        if not isinstance(error, TeacherError) or error.is_free:  # the former: it could not even be asked
            account.write("release", key)
        elif is_billed(error.usage):
            cost = self._price(error.usage)
            account.write("unusable", key, teacher=self.name, why=error.cause, usage=dict(error.usage), cost=cost)
            self._compare(cost, worst)
        else:
            account.write("held", key, why=error.cause)

    def _compare(self, cost: float, worst: float) -> None:
        """The cap holds only while worst cases do."""
        if cost > worst > 0:
            self._give_up(f"billed ${cost:,.4f} for a call of at most ${worst:,.4f}: raise max_tokens or prices")

    async def _enter(self, question: Question) -> None:
        """Wait for a free place, the breaker and the pace; then one more call is in flight."""
        while True:
            if self._stop.is_set():
                raise StoppedError
            if self.given_up:
                raise TeacherError(self.given_up, cause="teacher given up")
            if self.in_flight >= self._places():
                waiter = asyncio.get_running_loop().create_future()
                self._waiters.append(waiter)
                try:
                    await waiter
                except asyncio.CancelledError:
                    self._wake()  # whoever is next
                    raise
            elif (pause := self._closed_until - time.monotonic()) > 0:
                await self._sleep(pause)
            else:
                break
        self.in_flight += 1
        tokens = (len(question.prompt) + len(question.system)) / 4 + self._mean_output
        if pause := max(self._requests.take(1), self._tokens.take(tokens)):
            try:
                await self._sleep(pause)
            except BaseException:
                self.in_flight -= 1
                self._wake()
                raise

    def _places(self) -> int:
        """Calls that may be in flight now: one at a time while the breaker is open."""
        return 1 if self._num_failures >= BREAKER_FAILURES else int(self._limit)

    def _wake(self, number: int = 0) -> None:
        """Let waiters look again, as many as there are free places."""
        for _ in range(min(len(self._waiters), max(number, self._places() - self.in_flight))):
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)

    async def _sleep(self, seconds: float) -> None:
        """Wait; a StoppedError ends it early."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)
        if self._stop.is_set():
            raise StoppedError

    def _succeeded(self, question: Question, answer: Answer) -> None:
        self._num_answered += 1
        self._num_failures = self._num_openings = self._num_limited = 0
        self._failing_since = 0.0
        self.trouble = ""
        self._limit = min(float(self.settings.concurrency), self._limit + 1 / self._limit)
        output = answer.usage.get("output", len(answer.text) / 4)
        guess = (len(question.prompt) + len(question.system)) / 4 + self._mean_output
        self._tokens.correct(answer.usage.get("input", guess - self._mean_output) + output - guess)
        self._mean_output += (output - self._mean_output) / 16

    def _failed(self, error: TeacherError, failures: int) -> float:
        """Draw the conclusions for all calls; returns how many seconds this one waits before it is asked again."""
        now = time.monotonic()
        self.trouble = f"{self.name}: {error}"
        self._failing_since = self._failing_since or now
        wait = error.retry_after
        if isinstance(error, RateLimitedError):
            if now >= self._closed_until:  # the first since the last pause
                self._limit = max(1.0, self._limit / 2)
                self._num_limited += 1
            self._close(now, _backoff(self._num_limited) if wait is None else wait)
        elif isinstance(error, UnavailableError):
            self._num_failures += 1
            # Calls that were in flight together fail together: that is one outage and not many.
            if self._num_failures >= BREAKER_FAILURES and now >= self._closed_until:
                self._close(now, _backoff(self._num_openings))
                self._num_openings += 1
            if wait is not None:
                self._close(now, wait)
        else:
            self._num_unusable += 1
        if isinstance(error, RefusedKeyError):
            self._give_up(str(error))
        elif self._num_unusable >= MAX_UNUSABLE and not self._num_answered:
            self._give_up(f"{self._num_unusable} answers, none usable, the last: {error}")
        elif max(now, self._closed_until) - self._failing_since > self.settings.give_up_seconds and self._is_shut():
            self._give_up(f"no answer for {self.settings.give_up_seconds:g} s (give_up_seconds): {error}")
        return 0.0 if isinstance(error, RateLimitedError) else _backoff(failures)

    def _is_shut(self) -> bool:
        return self._num_failures >= BREAKER_FAILURES or self._num_limited > 0

    def _close(self, now: float, seconds: float) -> None:
        self._closed_until = max(self._closed_until, now + seconds)

    def _give_up(self, reason: str) -> None:
        self.given_up = self.given_up or reason
        self._wake(len(self._waiters))


def _backoff(failures: int) -> float:
    """0.5, 1, 2, 4 ... seconds, at most MAX_PAUSE; less by up to half, so that not all come back at once."""
    return min(MAX_PAUSE, 0.5 * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1)


def _checked(answer: Answer) -> Answer:
    """An answer that can be written down."""
    try:
        f"{answer.text}{answer.reasoning}{answer.finish}".encode()
    except UnicodeEncodeError:
        message = "half a surrogate pair in the answer: not text"
        raise GarbledAnswerError(message, usage=answer.usage) from None
    if not answer.text.strip():
        raise GarbledAnswerError("an empty answer", usage=answer.usage)
    if answer.cost is not None and not (math.isfinite(answer.cost) and answer.cost >= 0):
        raise GarbledAnswerError(f"a cost of {answer.cost}", usage=answer.usage)
    return answer
