"""What arrives at the cursor of an editor that asks the exported file: prefix first, and nothing healed.

Editors' plug-ins, Ollama and llama.cpp's server show the code before the cursor first; our own server shows it last,
next to where the model writes. A model may know one of the two well and the other not at all, and its file is then of
no use where people work: so both are measured here, and llama.cpp's server itself is asked where it is installed.
"""

import shlex
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from smelter.base import UserError
from smelter.evaluation import (
    CONTEXT_CHARACTERS,
    Place,
    PlaceKind,
    Server,
    ask_server,
    choose_places,
    middle_bpb,
    score,
)
from smelter.export.check import find_llama_cpp
from smelter.model import Model
from smelter.tokens import Tokenizer

PLACES = 40
"""Of each kind."""
START_SECONDS = 60.0


def cursor_places(texts: Sequence[str]) -> dict[str, list[Place]]:
    """Places in the texts, by kind."""
    kinds: tuple[PlaceKind, ...] = ("line_start", "in_word")
    return {kind: choose_places(len(texts), texts.__getitem__, PLACES, kind) for kind in kinds}


def check_cursor(model: Model, tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """Bits per byte of what is missing at a cursor, asked in four ways; empty where the texts hold no line of code.

    psm and continued are what llama.cpp's server does with the code behind the cursor and without it, spm and plain
    what ours does: it heals.
    """
    places = [place for some in cursor_places(texts).values() for place in some]
    if not places:
        return {}
    bits = {f"cursor_bpb_{asked}": middle_bpb(model, tokenizer, places, asked) for asked in ("psm", "spm", "plain")}
    continued = middle_bpb(model, tokenizer, places, "plain", heal=False)
    return {"cursor_places": len(places), **bits, "cursor_bpb_continued": continued}


def check_llama_server(command: str, texts: Sequence[str]) -> dict[str, Any]:
    """What the real llama-server, started by `command` on another port, gets right; empty if it is not installed."""
    program, places = find_llama_cpp("llama-server"), cursor_places(texts)
    if program is None or not all(places.values()):
        return {}
    with _running([str(program), *shlex.split(command)[1:]]) as url:
        shares: dict[str, float] = {}
        for kind, chosen in places.items():
            _, suggestions = ask_server(Server("llama-server", url), chosen, "infill", characters=CONTEXT_CHARACTERS)
            right = score(suggestions, chosen)
            shares |= {f"llama_server_{kind}_character": right.first_character, f"llama_server_{kind}_word": right.word}
    return {"llama_server_places": PLACES, **shares}


def objection(checks: dict[str, Any]) -> str | None:
    """Why the file will serve an editor badly, or None."""
    psm, continued = checks.get("cursor_bpb_psm"), checks.get("cursor_bpb_continued")
    if psm is None or continued is None or psm <= continued:
        return None
    return (
        f"asked prefix first, as llama.cpp's server and Ollama ask, what is missing at a cursor costs {psm:.2f} bits "
        f"per byte, and {continued:.2f} without the code behind it: ask this model for continuations there, or train "
        "it with a larger data.fim_cursor_rate and a smaller data.fim_spm_rate"
    )


@contextmanager
def _running(command: Sequence[str]) -> Iterator[str]:
    """The server's URL while it runs. Raises UserError where it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=log)
        try:
            end = time.monotonic() + START_SECONDS
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    reason = (log.read().decode(errors="replace").strip() or "it said nothing").splitlines()[-1]
                    raise UserError(f"{command[0]}: does not serve the file: {reason[:200]}: try another llama.cpp")
                time.sleep(0.1)
            yield url
        finally:
            process.kill()
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
