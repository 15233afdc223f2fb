"""Suggestions of any server that completes code: llama.cpp's, Ollama, vLLM, our own.

Asked as editors ask: `/infill` as llama.vim does it (whole lines before the cursor, the cursor's line, what follows),
or `/v1/completions` with `suffix`; and where a server or its model fills no gaps, `/v1/completions` with what stands
before the cursor. Greedily, one request at a time, up to the line break: an answer is a complete line.
"""

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from smelter.base import UserError, key_from_environment
from smelter.evaluation.places import Place
from smelter.evaluation.suggestions import MAX_TOKENS, Suggestion

ServerKind = Literal["infill", "completions", "plain"]
KINDS: tuple[ServerKind, ...] = ("infill", "completions", "plain")
PATHS: dict[ServerKind, str] = {"infill": "/infill", "completions": "/v1/completions", "plain": "/v1/completions"}
CANNOT = {400, 404, 405, 422, 500, 501}
"""With these servers refuse a way of asking that they do not have."""
MODEL_CANNOT = 501
"""llama.cpp's answer to `/infill` where the model fills no gaps; a `suffix` it would take, and leave unread."""
KEY_VARIABLE = "SMELTER_API_KEY"
TIMEOUT_SECONDS = 300.0
"""Of one answer: the first may have to load a model."""
SMALLER = (1, 2, 4, 8)
"""Where a server's context is too small for what is shown, parts of it are shown."""


@dataclass(frozen=True)
class Server:
    """Who is asked, and for which of its models; None is the first that it names."""

    name: str
    url: str
    model: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Server":
        """Of `[NAME=]URL[#MODEL]`. Raises UserError."""
        match = re.fullmatch(r"(?:([^=:/#]+)=)?(https?://[^/#\s?]+(?:/[^#\s?]*)?)(?:#(\S+))?", text)
        if not match:
            raise UserError(f"--url {text}: give [NAME=]URL[#MODEL], such as http://127.0.0.1:8012")
        url = match[2].rstrip("/").removesuffix("/v1")
        model = match[3]
        return cls(match[1] or " ".join(filter(None, (url.partition("://")[2], model))), url, model)


def ask_server(
    server: Server,
    places: Sequence[Place],
    kind: ServerKind | Literal["auto"] = "auto",
    *,
    characters: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[ServerKind, list[Suggestion]]:
    """What the server suggests at each place, and in which way it was asked: `auto` takes the first that it has.

    Raises UserError where it does not answer, or not as such a server does.
    """
    return asyncio.run(_ask(server, places, kind, characters, progress))


async def _ask(
    server: Server,
    places: Sequence[Place],
    wanted: ServerKind | Literal["auto"],
    characters: int,
    progress: Callable[[int], None] | None,
) -> tuple[ServerKind, list[Suggestion]]:
    key = key_from_environment(KEY_VARIABLE, "--url: ")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS, sock_connect=10)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        connection = _Connection(session, server)
        await connection.choose_model()
        kind = await connection.choose_kind(KINDS if wanted == "auto" else (wanted,))
        suggestions = []
        for place in places:
            suggestions.append(await connection.suggestion(place, kind, characters))
            if progress is not None:
                progress(len(suggestions))
    return kind, suggestions


class _Connection:
    """A server that is being asked."""

    def __init__(self, session: aiohttp.ClientSession, server: Server) -> None:
        self._session, self._server = session, server
        self._model = {} if server.model is None else {"model": server.model}

    async def choose_model(self) -> None:
        """The first model that the server names, where none was given; one that names none needs none."""
        if self._model:
            return
        status, answer, _ = await self._call("/v1/models", None)
        models = answer.get("data") if status == 200 and isinstance(answer, dict) else None
        if isinstance(models, list) and models and isinstance(models[0], dict) and isinstance(models[0].get("id"), str):
            self._model = {"model": models[0]["id"]}

    async def choose_kind(self, kinds: Sequence[ServerKind]) -> ServerKind:
        """The first way of asking that gets an answer; it also has the server load its model. Raises UserError."""
        left = list(kinds)
        while True:
            kind = left.pop(0)
            status, answer, _ = await self._call(PATHS[kind], self._body("def add(a, b):\n    ret", "\n", kind))
            if status == 200:
                _read(answer, kind, self._server.url)
                return kind
            if not left or status not in CANNOT:
                raise self._refused(PATHS[kind], status, answer)
            if kind == "infill" and status == MODEL_CANNOT:
                left = left[-1:]
            print(
                f"evaluate: {self._server.url} answers {status} to {_way(kind)} ({_message(answer)}): "
                f"asking {_way(left[0])}",
                file=sys.stderr,
            )

    async def suggestion(self, place: Place, kind: ServerKind, characters: int) -> Suggestion:
        """What comes for one place; where that is too much for the server's context, less is shown."""
        for part in SMALLER:
            body = self._body(*place.around(characters // part), kind)
            status, answer, seconds = await self._call(PATHS[kind], body)
            if status == 200:
                text, ended = _read(answer, kind, self._server.url)
                return Suggestion(text, ended, seconds)
            if status != 400 or "context" not in _message(answer).lower():
                break
        raise self._refused(PATHS[kind], status, answer)

    def _body(self, prefix: str, suffix: str, kind: ServerKind) -> dict[str, Any]:
        body: dict[str, Any] = {**self._model, "temperature": 0, "stop": ["\n"], "stream": False}
        if kind == "infill":
            lines, line_break, line = prefix.rpartition("\n")
            before = {"input_prefix": lines + line_break, "prompt": line, "input_suffix": suffix}
            return {**before, **body, "n_predict": MAX_TOKENS}
        asked = {"prompt": prefix} if kind == "plain" else {"prompt": prefix, "suffix": suffix}
        return {**asked, **body, "max_tokens": MAX_TOKENS}

    async def _call(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any, float]:
        """(status, JSON or text, seconds) of a POST, or of a GET without a body. Raises UserError."""
        url = self._server.url
        start = time.perf_counter()
        try:
            method = "GET" if body is None else "POST"
            async with self._session.request(method, url + path, json=body, allow_redirects=False) as response:
                raw = await response.read()
        except TimeoutError:
            raise UserError(f"{url}: no answer within {TIMEOUT_SECONDS:g} s: look whether the server is busy") from None
        except aiohttp.InvalidURL:
            raise UserError(f"{url}: not an address: give one such as http://127.0.0.1:8012") from None
        except aiohttp.ClientConnectorError as error:
            raise UserError(f"{url}: cannot connect ({error.strerror}): start the server, or give its --url") from None
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:
            raise UserError(f"{url}: no HTTP answer ({type(error).__name__}): give a server's --url") from None
        seconds = time.perf_counter() - start
        if response.status in (401, 403):
            raise UserError(f"{url}: it refuses the key ({response.status}): set {KEY_VARIABLE} to the server's key")
        try:
            return response.status, json.loads(raw), seconds
        except ValueError:
            return response.status, raw.decode(errors="replace"), seconds

    def _refused(self, path: str, status: int, answer: Any) -> UserError:
        fix = "give a smaller --editor-characters" if "context" in _message(answer) else "see what the server takes"
        return UserError(f"{self._server.url}{path}: answers {status} ({_message(answer)}): {fix}")


def _way(kind: ServerKind) -> str:
    return PATHS[kind] + {"infill": "", "completions": " with suffix", "plain": " without suffix"}[kind]


def _message(answer: Any) -> str:
    """What an error says, in one short line."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:200]


def _read(answer: Any, kind: ServerKind, url: str) -> tuple[str, bool]:
    """(text, whether it ended before the limit) of an answer. Raises UserError for one that is none."""
    try:
        if kind == "infill":
            text, ended = answer["content"], answer.get("stop_type") != "limit"
        else:
            choice = answer["choices"][0]
            text, ended = choice["text"], choice.get("finish_reason") != "length"
    except (TypeError, KeyError, IndexError, AttributeError):
        text, ended = None, False
    if not isinstance(text, str):
        raise UserError(f"{url}{PATHS[kind]}: not an answer with a completion: give a server that completes code")
    return text, ended
