"""A teacher behind an OpenCode server: any vendor that OpenCode speaks to, without our knowing its interface.

It costs some 70 ms and 40 ms of CPU a question against asking the vendor directly, and gives no log-probabilities; in
return it brings every vendor's interface, and the person's own set-up. The server must run our plugin
(scripts/start_server.sh): that is checked before the first question, since without it the teacher would get a prompt
of OpenCode's own making.
"""

import asyncio
from collections.abc import Collection, Mapping
from typing import Any

from foundry.opencode import (
    ModelError,
    NoAnswerInTimeError,
    OpenCodeError,
    PasswordError,
    Prompt,
    ServerError,
    SetupError,
    UnreadableError,
)
from foundry.opencode_client import OpenCodeClient
from foundry.teacher import (
    OUT_OF_CREDIT,
    Answer,
    AnswerTimeoutError,
    GarbledAnswerError,
    OnlyReasonedError,
    Question,
    RateLimitedError,
    RefusedKeyError,
    RejectedQuestionError,
    TeacherError,
    UnavailableError,
    split_reasoning,
)

_FINISH = {"content-filter": "filter"}


class OpenCodeTeacher:
    """One model ("provider/model") of one OpenCode server; implements `Teacher`.

    `timeout_seconds` runs from when the server has room for the question. `extra` is more of the vendor's request,
    `omit` what it refuses ("temperature", "top_p", "max_tokens", "seed"). Raises UserError for an unusable address.
    """

    def __init__(
        self,
        name: str,
        *,
        model: str,
        server_url: str = "http://127.0.0.1:4096",
        password: str = "",
        agent: str = "foundry",
        timeout_seconds: float = 300.0,
        extra: Mapping[str, Any] | None = None,
        omit: Collection[str] = (),
    ) -> None:
        self.name = name
        self._model = model
        self._agent = agent
        self._timeout_seconds = timeout_seconds
        self._extra = dict(extra or {})
        self._omit = frozenset(omit)
        self._client = OpenCodeClient(server_url, password=password)
        self._checking: asyncio.Lock | None = None
        self._is_checked = False

    def __repr__(self) -> str:
        return f"OpenCodeTeacher({self.name!r}, model={self._model!r}, server_url={self._client.server_url!r})"

    async def ask(self, question: Question) -> Answer:
        """The answer. Raises a TeacherError; when cancelled, the generation is stopped and its session deleted."""
        wanted: dict[str, Any] = {
            "temperature": question.temperature,
            # 1 is every vendor's default, and some refuse it beside a temperature.
            "top_p": question.top_p if question.top_p != 1 else None,
            "max_tokens": question.max_tokens,
        }
        seed = {"seed": question.seed} if question.seed is not None and "seed" not in self._omit else {}
        prompt = Prompt(
            text=question.prompt,
            model=self._model,
            agent=self._agent,
            system=question.system,
            options=seed | self._extra,
            **{key: value for key, value in wanted.items() if key not in self._omit},
        )
        try:
            await self._check()
            reply = await self._client.ask(prompt, timeout=self._timeout_seconds)
        except OpenCodeError as error:
            self._is_checked = self._is_checked and isinstance(error, ModelError | NoAnswerInTimeError)
            raise _teacher_error(self.name, error) from None
        thought, text = split_reasoning(reply.text)
        if not text.strip():
            if reply.finish == "length":
                raise OnlyReasonedError(
                    f"{self.name}: all of max_tokens = {question.max_tokens} went into reasoning: raise max_tokens"
                )
            raise GarbledAnswerError(f"{self.name}: an empty answer (finish: {reply.finish})")
        if reply.finish in ("unknown", "other", "error"):
            raise GarbledAnswerError(f"{self.name}: half an answer: it ended without saying why")
        return Answer(
            text=text,
            finish=_FINISH.get(reply.finish, reply.finish),
            reasoning=reply.reasoning or thought,
            usage=_usage(reply.usage),
            # Not the server's figure: foundry.toml has the prices, the server a copy that may be older.
            cost=None,
        )

    async def close(self) -> None:
        """Delete what sessions are left and close the connections."""
        await self._client.close()

    async def _check(self) -> None:
        if not self._is_checked:
            self._checking = self._checking or asyncio.Lock()
            async with self._checking:
                if not self._is_checked:
                    await self._client.check(agent=self._agent, models=(self._model,))
                    self._is_checked = True


def _usage(usage: Mapping[str, int]) -> dict[str, int]:
    """The server's counts under the contract's names: there, input includes what was cached, and output reasoning."""
    cached = usage.get("cache_read", 0) + usage.get("cache_write", 0)
    total = {"input": usage.get("input", 0) + cached, "output": usage.get("output", 0) + usage.get("reasoning", 0)}
    return {**usage, **total}


def _teacher_error(name: str, error: OpenCodeError) -> TeacherError:
    """The same in the words that all backends share."""
    text = f"{name}: {error}"
    match error:
        case PasswordError() | ModelError(name="ProviderAuthError") | ModelError(status=401 | 402 | 403):
            return RefusedKeyError(text)
        case ModelError(status=429) if OUT_OF_CREDIT.search(text):
            return RefusedKeyError(text)
        case ModelError(status=429 | 529):
            return RateLimitedError(text, retry_after=error.retry_after)
        case NoAnswerInTimeError() | ModelError(status=408 | 504):
            return AnswerTimeoutError(text)
        case ModelError(name="MessageAbortedError") | ModelError(status=0 | 409 | 425):
            return UnavailableError(text)
        case ModelError(status=int(status)) if status >= 500:
            return UnavailableError(text, retry_after=error.retry_after)
        case SetupError() | ModelError(name="ContextOverflowError") | ServerError(status=400 | 413 | 422):
            return RejectedQuestionError(text)
        case ModelError(status=int(status)) if status >= 400:
            return RejectedQuestionError(text)
        case ModelError() | UnreadableError():
            return GarbledAnswerError(text)
        case _:
            return UnavailableError(text)
