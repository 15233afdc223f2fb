"""A server on this machine that completes nothing, and answers what a test wants."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from smelter.evaluation.servers import Server


@contextmanager
def stub(answers: dict[str, Any]) -> Iterator[tuple[Server, list[tuple[str, dict[str, Any], Any]]]]:
    """A server that answers by path (status, JSON or bytes; or a function of the body), and what it is asked."""
    asked: list[tuple[str, dict[str, Any], Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.loads(raw) if raw else {}
            asked.append((self.path, body, self.headers.get("Authorization")))
            answer = answers.get(self.path, (404, {"error": "none such"}))
            status, content = answer(body) if callable(answer) else answer
            sent = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield Server("stub", f"http://127.0.0.1:{http.server_port}"), asked
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
