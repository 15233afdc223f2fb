"""What stands before every route: who may ask, how much they may send, and the count of it all.

A server on the loopback interface is reachable for every page that the browser shows. So the Host header must name
this machine (a page that points its own name here, DNS rebinding, is turned away), and a request that carries another
site's Origin is refused unless that site was allowed.
"""

import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smelter.serving.errors import ApiError
from smelter.serving.stats import Stats

MAX_BODY_BYTES = 1_000_000
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
OPEN_PATHS = frozenset({"/", "/page.js", "/page.css", "/health", "/docs", "/docs.js", "/openapi.json"})
"""What needs no key: it tells nothing about what is being written, and the page must load before it can send one."""
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'"


@dataclass(frozen=True)
class Rules:
    """Who may ask. `hosts` None allows any Host header; `origins` are other sites whose pages may ask."""

    api_key: str | None = None
    hosts: frozenset[str] | None = LOOPBACK_NAMES
    origins: Sequence[str] = ()


class Gate:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, rules: Rules, stats: Stats) -> None:
        self.app, self.rules, self.stats = app, rules, stats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request, and pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        headers = Headers(scope=scope)

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent_headers = MutableHeaders(scope=message)
                sent_headers["X-Content-Type-Options"] = "nosniff"
                sent_headers["Content-Security-Policy"] = POLICY
                sent_headers["Referrer-Policy"] = "no-referrer"
                sent_headers["Cache-Control"] = "no-store"
                if (origin := headers.get("origin")) in self.rules.origins:
                    sent_headers["Access-Control-Allow-Origin"] = str(origin)
                    sent_headers["Vary"] = "Origin"
            await send(message)

        try:
            error = self._objection(scope["method"], scope["path"], headers)
            body = await _read_body(receive) if error is None else b""
            if body is None:
                error = _too_large()
            if error is not None:
                await error.response()(scope, receive, marked)
            elif scope["method"] == "OPTIONS" and headers.get("origin") in self.rules.origins:
                allowed = {
                    "Access-Control-Allow-Methods": "GET, POST",
                    "Access-Control-Allow-Headers": "Authorization, Content-Type",
                }
                await Response(status_code=204, headers=allowed)(scope, receive, marked)
            else:
                await self.app(scope, _replayed(body or b"", receive), marked)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        finally:
            route = scope.get("route")
            self.stats.note_request(getattr(route, "path", "other"), status, time.monotonic() - started)

    def _objection(self, method: str, path: str, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if self.rules.hosts is not None and _name(host) not in self.rules.hosts:
            return ApiError(403, "the Host header does not name this machine: ask at http://127.0.0.1 or localhost")
        origin = headers.get("origin")
        if origin is not None and origin not in self.rules.origins and urlsplit(origin).netloc != host:
            return ApiError(403, "pages of other sites may not ask this server (see --allow-origin)")
        if self.rules.api_key is not None and path not in OPEN_PATHS and method != "OPTIONS":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # Compared as bytes and in constant time, so that the time tells nothing about the key.
            equal = hmac.compare_digest(key.strip().encode("latin-1"), self.rules.api_key.encode())
            if scheme.lower() != "bearer" or not equal:
                headers_ = {"WWW-Authenticate": "Bearer"}
                return ApiError(401, "a valid key is needed: Authorization: Bearer KEY", headers=headers_)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
            return _too_large()
        return None


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body, or None where it is larger than allowed, whatever its headers say.

    Raises ClientDisconnect where it does not come: half a body is no request.
    """
    body: bytes = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives the body once more, and then what comes after it: that the client went away."""
    is_read = False

    async def replay() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes: send what is near the cursor")


def _name(host: str) -> str:
    """The Host header without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
