"""A teacher behind an OpenAI-compatible endpoint: any vendor, vLLM, llama-server.

One POST to `{base_url}/chat/completions` a question, without streaming, over aiohttp: 0.2 ms of CPU a call where the
vendors' own clients take ten times that, which is what decides how many hundreds of calls one core keeps in flight.
Everything that can go wrong becomes one of `teacher`'s errors, in one place (`_error`), with the endpoint's own words
and without the key. Trade-off: without streaming a long answer is one silent wait, so `timeout_seconds` must cover it.

Reasoning comes in a field of its own or as `<think>...</think>` at the front of the answer; either way it is told
apart, and a text that is nothing but reasoning is no answer.
"""

import email.utils
import json
import math
import re
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

import aiohttp
from yarl import URL

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

MAX_ANSWER_BYTES = 32 * 2**20
"""Largest body that is read: an endpoint that sends without end does not fill our memory."""

_FINISH = {"stop": "stop", "eos": "stop", "end_turn": "stop", "length": "length", "max_tokens": "length"}
_FINISH |= {"content_filter": "filter", "sensitive": "filter", "refusal": "filter"}


class OpenAITeacher:
    """One model at one endpoint. The session is opened with the first question; `close` ends it."""

    def __init__(
        self,
        name: str,
        *,
        model: str,
        base_url: str,
        key: str = "",
        key_header: str = "Authorization",
        timeout_seconds: float = 300.0,
        logprobs: bool = False,
        max_tokens_key: str = "max_tokens",
        omit: tuple[str, ...] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._model = model
        base = URL(base_url)
        self._url = (base / "chat/completions").with_query(base.query)  # Azure's has ?api-version=
        self._key = key
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers[key_header] = f"Bearer {key}" if key_header.lower() == "authorization" else key
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=min(30.0, timeout_seconds))
        self._timeout_seconds = timeout_seconds
        self._logprobs = logprobs
        self._max_tokens_key = max_tokens_key
        self._omit = omit
        self._extra = dict(extra or {})
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, question: Question) -> Answer:
        """The answer. Raises a TeacherError; when cancelled, the connection is closed and the endpoint can stop."""
        if self._session is None:
            # As many connections as calls in flight: `limits` limits those.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=self._timeout,
                headers=self._headers,
                trust_env=bool(urllib.request.getproxies()),  # looking for a proxy costs a thread a call
            )
        data = json.dumps(self._body(question), ensure_ascii=False).encode()
        is_sent = False
        try:
            async with self._session.post(self._url, data=data, allow_redirects=False) as response:
                is_sent = True
                body = await _read(response)
        except aiohttp.ConnectionTimeoutError:
            raise UnavailableError(f"{self.name}: {self._url.authority} does not take connections") from None
        except TimeoutError:
            raise AnswerTimeoutError(f"{self.name}: no answer within {self._timeout_seconds:g} s") from None
        except aiohttp.ClientConnectorError as error:
            raise UnavailableError(f"{self.name}: cannot connect to {self._url.authority}: {error.strerror}") from None
        except aiohttp.InvalidURL:
            raise RejectedQuestionError(f"{self.name}: base_url {self._url} is not a usable URL") from None
        except aiohttp.ClientPayloadError:
            raise GarbledAnswerError(f"{self.name}: the connection broke in the middle of an answer") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            what = "in the middle of an answer" if is_sent else "before an answer"
            raise UnavailableError(f"{self.name}: disconnected {what} ({type(error).__name__})") from None
        if response.status != 200:
            raise self._error(response.status, response.headers, body)
        return self._answer(body)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _body(self, question: Question) -> dict[str, Any]:
        messages = [{"role": "user", "content": question.prompt}]
        if question.system:
            messages.insert(0, {"role": "system", "content": question.system})
        body: dict[str, Any] = {"model": self._model, "messages": messages, "temperature": question.temperature}
        body[self._max_tokens_key] = question.max_tokens
        if question.top_p != 1.0:
            body["top_p"] = question.top_p
        if question.seed is not None:
            body["seed"] = question.seed
        if self._logprobs:
            body["logprobs"] = True
        body |= self._extra
        return {key: value for key, value in body.items() if key not in self._omit}

    def _error(self, status: int, headers: Mapping[str, str], body: bytes) -> TeacherError:
        """What an HTTP status other than 200 means."""
        message = f"{self.name}: HTTP {status}: {self._words(body)}"
        wait = _retry_after(headers)
        if status in (401, 403):
            return RefusedKeyError(f"{message}: check the key")
        if status == 402 or (status == 429 and OUT_OF_CREDIT.search(message)):
            return RefusedKeyError(f"{message}: the account is out of credit")
        if status in (429, 529):
            return RateLimitedError(message, retry_after=wait)
        if status in (408, 504):
            return AnswerTimeoutError(message, retry_after=wait)
        if status >= 500 or status in (409, 425):
            return UnavailableError(message, retry_after=wait)
        if 300 <= status < 400:
            return RejectedQuestionError(f"{message}: moved to {headers.get('Location', '?')}: correct base_url")
        return RejectedQuestionError(message)

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
        text = " ".join(text.split())
        return (text if len(text) <= 300 else f"{text[:297]}...") or "no explanation"

    def _answer(self, body: bytes) -> Answer:
        try:
            value = json.loads(body)
        except ValueError:  # also UnicodeDecodeError
            what = "an empty body" if not body.strip() else "not JSON"
            raise GarbledAnswerError(f"{self.name}: {what} instead of an answer") from None
        if (
            isinstance(value, dict) and value.get("error") and not value.get("choices")
        ):  # gateways send 200 with an error
            error = value["error"]
            status = error.get("code") if isinstance(error, dict) else None
            raise self._error(status if isinstance(status, int) and status > 299 else 502, {}, body)
        try:
            choice = value["choices"][0]
            message = choice["message"]
            text = message.get("content") or ""
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            reason = choice.get("finish_reason") or ""
            usage = _usage(value.get("usage") or {})
            logprobs = _logprobs(choice.get("logprobs")) if self._logprobs else None
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise GarbledAnswerError(f"{self.name}: JSON of another shape than a chat completion's") from None
        if not all(isinstance(part, str) for part in (text, reasoning, reason)):
            raise GarbledAnswerError(f"{self.name}: an answer that is not text")
        thought, text = split_reasoning(text)
        reasoning = reasoning or thought
        finish = _FINISH.get(reason, reason)
        if not text.strip():
            if finish == "filter":
                raise RejectedQuestionError(f"{self.name}: held back by the endpoint's content filter")
            if reasoning and finish == "length":
                raise OnlyReasonedError(f"{self.name}: all of max_tokens went into reasoning: raise max_tokens")
            raise GarbledAnswerError(f"{self.name}: an empty answer (finish_reason {reason!r})")
        return Answer(text=text, finish=finish, reasoning=reasoning, usage=usage, logprobs=logprobs)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            response.close()
            raise GarbledAnswerError(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
    return b"".join(parts)


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
    found = tuple((str(token["token"]), float(token["logprob"])) for token in logprobs["content"])
    if not all(math.isfinite(value) for _, value in found):
        raise ValueError("a log-probability that is not finite")
    return found
