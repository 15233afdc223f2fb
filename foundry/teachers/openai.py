"""A teacher behind an OpenAI-compatible endpoint: any vendor, vLLM, llama-server.

One POST to `{base_url}/chat/completions` a question, without streaming, over aiohttp: 0.2 ms of CPU a call where the
vendors' own clients take ten times that, which is what decides how many hundreds of calls one core keeps in flight.
Everything that can go wrong becomes one of `teacher`'s errors, with the endpoint's own words and without the key.
Trade-off: without streaming a long answer is one silent wait, so `timeout_seconds` must cover it.
"""

import contextlib
import json
import math
import urllib.request
from collections.abc import Mapping
from typing import Any

import aiohttp
from yarl import URL

from foundry.settings import TeacherSettings
from foundry.teacher import (
    Answer,
    GarbledAnswerError,
    Question,
    RejectedQuestionError,
    TeacherError,
    UnavailableError,
    http_error,
    read_answer,
    read_body,
    short,
)


class OpenAITeacher:
    """One model at one endpoint; implements `Teacher`. Raises UserError where its key is not in the environment.

    The session is opened with the first question; `close` ends it.
    """

    def __init__(self, settings: TeacherSettings) -> None:
        self.name = settings.name
        self._settings = settings
        base = URL(settings.base_url)
        self._url = (base / "chat/completions").with_query(base.query)  # Azure's has ?api-version=
        self._key = settings.key()
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, question: Question) -> Answer:
        """The answer. Raises a TeacherError; when cancelled, the connection is closed and the endpoint can stop."""
        seconds, key_header = self._settings.timeout_seconds, self._settings.key_header
        if self._session is None:
            headers = {"Content-Type": "application/json"}
            if self._key:
                headers[key_header] = f"Bearer {self._key}" if key_header.lower() == "authorization" else self._key
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # as many as calls in flight: `limits` limits those
                timeout=aiohttp.ClientTimeout(total=seconds, sock_connect=min(30.0, seconds)),
                headers=headers,
                trust_env=bool(urllib.request.getproxies()),  # looking for a proxy costs a thread a call
            )
        data = json.dumps(self._body(question), ensure_ascii=False).encode()
        is_sent = False
        try:
            async with self._session.post(self._url, data=data, allow_redirects=False) as response:
                is_sent = True
                body = await read_body(response)
        except aiohttp.ConnectionTimeoutError:
            raise UnavailableError(f"{self._url.authority} does not take connections", is_free=True) from None
        except TimeoutError:
            raise UnavailableError(f"no answer within {seconds:g} s", cause="timeout") from None
        except aiohttp.ClientConnectorError as error:
            message = f"cannot connect to {self._url.authority}: {error.strerror}"
            raise UnavailableError(message, is_free=True) from None
        except aiohttp.InvalidURL:
            raise RejectedQuestionError(f"base_url {self._url} is not a usable URL") from None
        except aiohttp.ClientPayloadError:
            raise GarbledAnswerError("the connection broke in the middle of an answer") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            what = "in the middle of an answer" if is_sent else "before an answer"
            raise UnavailableError(f"disconnected {what} ({type(error).__name__})") from None
        if response.status != 200:
            raise self._error(response.status, response.headers, body)
        return self._answer(body)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _body(self, question: Question) -> dict[str, Any]:
        settings = self._settings
        messages = [{"role": "user", "content": question.prompt}]
        if question.system:
            messages.insert(0, {"role": "system", "content": question.system})
        body: dict[str, Any] = {"model": settings.model, "messages": messages, "temperature": question.temperature}
        body[settings.max_tokens_key] = question.max_tokens
        if question.top_p != 1.0:
            body["top_p"] = question.top_p
        if question.seed is not None:
            body["seed"] = question.seed
        if settings.logprobs:
            body["logprobs"] = True
        body |= settings.extra
        return {key: value for key, value in body.items() if key not in settings.omit}

    def _error(self, status: int, headers: Mapping[str, str], body: bytes) -> TeacherError:
        return http_error(f"HTTP {status}: {self._words(body)}", status, headers)

    def _words(self, body: bytes) -> str:
        """What an error's body says, in one line, shortened, without the key."""
        text = body.decode("utf-8", "replace")
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if isinstance(value, dict):
            error = value.get("error", value)
            if isinstance(error, dict):
                code = error.get("code") or error.get("type")
                error = f"{error.get('message') or error}" + (f" ({code})" if code else "")
            text = str(error)
        if self._key:
            text = text.replace(self._key, "***")
        return short(text) or "no explanation"

    def _error_within(self, value: Mapping[str, Any], body: bytes) -> TeacherError:
        """What an error means that came as an answer, with HTTP 200: a gateway's, and it may have begun to write."""
        status = value["error"].get("code") if isinstance(value["error"], dict) else None
        error = self._error(status if isinstance(status, int) and status > 299 else 502, {}, body)
        if isinstance(error, UnavailableError):
            error.is_free = False
        with contextlib.suppress(AttributeError, TypeError):
            error.usage = _usage(value.get("usage") or {})
        return error

    def _answer(self, body: bytes) -> Answer:
        try:
            value = json.loads(body)
        except ValueError:  # also UnicodeDecodeError
            what = "an empty body" if not body.strip() else "not JSON"
            raise GarbledAnswerError(f"{what} instead of an answer") from None
        if isinstance(value, dict) and value.get("error") and not value.get("choices"):  # gateways send it with 200
            raise self._error_within(value, body)
        usage: Mapping[str, int] = {}
        try:
            usage = _usage(value.get("usage") or {})
            choice = value["choices"][0]
            message = choice["message"]
            text = message.get("content") or ""
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            finish = choice.get("finish_reason") or ""
            logprobs = _logprobs(choice.get("logprobs")) if self._settings.logprobs else None
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            message = "JSON of another shape than a chat completion's"
            raise GarbledAnswerError(message, usage=usage) from None
        if not all(isinstance(part, str) for part in (text, reasoning, finish)):
            raise GarbledAnswerError("an answer that is not text", usage=usage)
        return read_answer(text, finish=finish, reasoning=reasoning, usage=usage, logprobs=logprobs)


def _usage(usage: Mapping[str, Any]) -> dict[str, int]:
    """The endpoint's counts under the contract's names; output includes reasoning, input what was cached."""
    counts = {
        "input": usage.get("prompt_tokens"),
        "output": usage.get("completion_tokens"),
        "reasoning": (usage.get("completion_tokens_details") or {}).get("reasoning_tokens"),
        "cache_read": (usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
    }
    return {key: count for key, count in counts.items() if type(count) is int and count >= 0}


def _logprobs(logprobs: Mapping[str, Any] | None) -> tuple[tuple[str, float], ...] | None:
    if not logprobs or not logprobs.get("content"):
        return None
    pairs = tuple((str(token["token"]), float(token["logprob"])) for token in logprobs["content"])
    if not all(math.isfinite(value) for _, value in pairs):
        raise ValueError("a log-probability that is not finite")
    return pairs
