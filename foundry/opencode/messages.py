"""What an OpenCode server is asked and what it answers: prompt, reply, and everything that can go wrong, by name."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from smelter.base import UserError


class OpenCodeError(UserError):
    """Something between us and an answer went wrong."""


class UnreachableError(OpenCodeError):
    """No server there, or it went away in the middle of a request."""


class PasswordError(OpenCodeError):
    """The server does not take our password."""


class SetupError(OpenCodeError):
    """The server runs, but not with what we need: plugin, agent or model."""


class ServerError(OpenCodeError):
    """The server refused a request, or failed inside; `status` is its HTTP status."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class UnreadableError(OpenCodeError):
    """The server's answer is not what its interface promises."""


class NoAnswerInTimeError(OpenCodeError):
    """The time is over; the session was aborted and deleted."""


class ModelError(OpenCodeError):
    """The model behind the server did not answer (HTTP 200 with `info.error`).

    `name` is OpenCode's word for it; `status` the vendor's HTTP status, 0 where there was no answer at all, None where
    it is not about HTTP; `retry_after` the seconds that the vendor asks to wait.
    """

    def __init__(self, message: str, *, name: str, status: int | None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.name = name
        self.status = status
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model said."""

    text: str
    reasoning: str
    finish: str
    """OpenCode's word: "stop", "length", "content-filter", "tool-calls", "unknown"."""
    usage: Mapping[str, int]
    """Tokens: input, output, reasoning, cache_read, cache_write."""
    cost: float
    """US dollars, by the prices in the server's configuration."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question and how it is to be answered."""

    text: str
    model: str
    """ "provider/model", as in the server's configuration."""
    agent: str = "foundry"
    system: str = ""
    """System prompt; empty: none is sent."""
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """More parts of the request that the vendor gets, e.g. {"seed": 1}."""

    def body(self) -> dict[str, Any]:
        """The message as the server takes it: settings travel in `system`, where our plugin finds them."""
        provider, _, model = self.model.partition("/")
        settings = {"system": self.system, "options": dict(self.options)}
        settings |= {
            key: value for key in ("temperature", "top_p", "max_tokens") if (value := getattr(self, key)) is not None
        }
        return {
            "agent": self.agent,
            "model": {"providerID": provider, "modelID": model},
            "system": json.dumps({"foundry": settings}, separators=(",", ":")),
            "parts": [{"type": "text", "text": self.text}],
        }


def read_reply(answer: Any) -> Reply:
    """What the server answered to a message. Raises ModelError and UnreadableError."""
    try:
        info, parts = answer["info"], answer["parts"]
        if info.get("error"):
            raise read_error(info["error"])
        said = {"text": "", "reasoning": ""}
        for part in parts:
            if part["type"] in said and not part.get("ignored"):
                said[part["type"]] += part["text"]
        tokens = info.get("tokens") or {}
        counts = {key: tokens.get(key) for key in ("input", "output", "reasoning")}
        counts |= {f"cache_{key}": (tokens.get("cache") or {}).get(key) for key in ("read", "write")}
        return Reply(
            text=said["text"],
            reasoning=said["reasoning"],
            finish=str(info.get("finish") or "unknown"),
            usage={key: int(count) for key, count in counts.items() if count},
            cost=float(info.get("cost") or 0),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, OpenCodeError):
            raise
        raise UnreadableError(f"the message has another shape ({type(error).__name__}: {error})") from None


def read_error(error: Mapping[str, Any]) -> ModelError:
    """`info.error` as an exception."""
    name = str(error.get("name") or "UnknownError")
    data = error.get("data") or {}
    headers = data.get("responseHeaders") or {}
    text, status = str(data.get("message") or ""), data.get("statusCode")
    if "x-foundry-status" in headers:  # our plugin: what the vendor really said
        status, text = int(headers["x-foundry-status"]), unquote(headers.get("x-foundry-message", ""))
    about = name if status is None else f"HTTP {status}" if status else "no connection"
    return ModelError(f"{about}: {short(text)}", name=name, status=status, retry_after=_seconds(headers))


def _seconds(headers: Mapping[str, str]) -> float | None:
    """`retry-after` as seconds; a date, which clocks disagree about, is left to the caller's own back-off."""
    with contextlib.suppress(KeyError, ValueError):
        return max(0.0, float(headers["retry-after"]))
    return None


def short(text: str) -> str:
    """One line of at most 300 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."
