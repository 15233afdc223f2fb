"""A teacher behind an OpenCode server: any vendor that OpenCode speaks to, without our knowing its interface.

It costs some 70 ms and 40 ms of CPU a question against asking the vendor directly, and gives no log-probabilities; in
return it brings every vendor's interface, and the person's own set-up. The server must run our plugin
(scripts/start_server.sh): that is checked before the first question, since without it the teacher would get a prompt
of OpenCode's own making.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from foundry.opencode import Prompt
from foundry.opencode_client import OpenCodeClient
from foundry.settings import TeacherSettings
from foundry.teacher import Answer, GarbledAnswerError, Question, TeacherError, UnavailableError, read_answer


class OpenCodeTeacher:
    """One model ("provider/model") of one OpenCode server; implements `Teacher`.

    `timeout_seconds` runs from when the server has room for the question. Raises UserError for an unusable address, and
    where the password is not in the environment.
    """

    def __init__(self, settings: TeacherSettings) -> None:
        self.name = settings.name
        self._settings = settings
        self._client = OpenCodeClient(settings.server_url, password=settings.password())
        self._checking = asyncio.Lock()
        self._is_checked = False

    async def ask(self, question: Question) -> Answer:
        """The answer. Raises a TeacherError; when cancelled, the generation is stopped and its session deleted."""
        settings = self._settings
        wanted: dict[str, Any] = {
            "temperature": question.temperature,
            # 1 is every vendor's default, and some refuse it beside a temperature.
            "top_p": question.top_p if question.top_p != 1 else None,
            "max_tokens": question.max_tokens,
        }
        seed = {"seed": question.seed} if question.seed is not None and "seed" not in settings.omit else {}
        prompt = Prompt(
            text=question.prompt,
            model=settings.model,
            agent=settings.agent,
            system=question.system,
            options={**seed, **settings.extra},
            **{key: value for key, value in wanted.items() if key not in settings.omit},
        )
        try:
            await self._check()
        except TeacherError as error:
            error.is_free = True  # nothing was asked
            raise
        try:
            reply = await self._client.ask(prompt, timeout=settings.timeout_seconds)
        except UnavailableError:
            self._is_checked = False  # it may come back as another
            raise
        answer = read_answer(
            reply.text,
            finish=reply.finish,
            reasoning=reply.reasoning,
            usage=_usage(reply.usage),
            # Not the server's figure: foundry.toml has the prices, the server a copy that may be older.
            cost=None,
        )
        if answer.finish in ("unknown", "other", "error"):
            raise GarbledAnswerError("half an answer: it ended without saying why", usage=answer.usage)
        return answer

    async def close(self) -> None:
        """Delete what sessions are left and close the connections."""
        await self._client.close()

    async def _check(self) -> None:
        async with self._checking:
            if not self._is_checked:
                await self._client.check(agent=self._settings.agent, models=(self._settings.model,))
                self._is_checked = True


def _usage(usage: Mapping[str, int]) -> dict[str, int]:
    """The server's counts under the contract's names: there, input includes what was cached, and output reasoning."""
    cached = usage.get("cache_read", 0) + usage.get("cache_write", 0)
    total = {"input": usage.get("input", 0) + cached, "output": usage.get("output", 0) + usage.get("reasoning", 0)}
    return {**usage, **total}
