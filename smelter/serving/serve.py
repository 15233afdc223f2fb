"""`smelter serve`: the trained model behind HTTP, for editors, for OpenAI's clients, and as a page to try it on.

The parts are in `smelter.serving`; they need the packages of the extra `serve`.
"""

import importlib.util
import ipaddress
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from annotated_types import Ge

from smelter.base import UserError, key_from_environment, left_alone, parse, stop_signals

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from smelter.run import Checkpoint
    from smelter.serving.gate import Rules

KEY_VARIABLE = "SMELTER_API_KEY"
EXTRA = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class ServeOptions:
    """Put a trained model behind HTTP: OpenAI's and llama.cpp's interfaces, and a page to try it on."""

    checkpoint: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN_OR_CKPT")]]
    """Run folder (its newest checkpoint) or checkpoint."""
    host: str = "127.0.0.1"
    """Address to listen at. Any but a loopback address lets other machines ask: set a key then."""
    port: int = 8080
    """Port to listen at; 0 takes a free one."""
    api_key_file: Path | None = None
    """File with the key that clients must send (Authorization: Bearer KEY); by default what SMELTER_API_KEY holds, if
    anything. Not an option of its own: command lines are everybody's to read."""
    allow_origin: tuple[str, ...] = ()
    """Web sites whose pages may ask, such as http://localhost:3000 (CORS). By default only the server's own page."""
    name: str | None = None
    """Name of the model for clients; by default the run's."""
    slots: Annotated[int, Ge(1)] = 8
    """Requests that are decoded at the same time; each takes a context's worth of memory."""
    queue: Annotated[int, Ge(0)] = 64
    """Requests that may wait; more are answered with 429."""
    engine: Literal["smelter", "llama.cpp"] = "smelter"
    """smelter: our own, the very model. llama.cpp: its llama-server with the exported GGUF file, faster on a CPU."""
    gguf: Path | None = None
    """For llama.cpp: the file; by default the one in the run's export/gguf/."""
    llama_server: Path | None = None
    """For llama.cpp: its llama-server; by default the one on PATH."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N; llama.cpp chooses itself."""
    threads: Annotated[int | None, Ge(1)] = None
    """CPU threads of the decoder; by default PyTorch's choice."""


def check_extra() -> None:
    """Raises UserError where the packages of the extra are missing."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the server needs {', '.join(missing)}: pip install 'smelter-foundry[serve]'")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; UserError where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once (TCP_NODELAY) on sockets that name their protocol; on others each answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2_048)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host} port {port}: {reason}: choose another --port or --host") from None
    return listener


def rules_of(options: ServeOptions) -> "Rules":
    """Who may ask, by the options."""
    from smelter.serving.gate import LOOPBACK_NAMES, Rules

    key = key_from_environment(KEY_VARIABLE, "") if options.api_key_file is None else _read_key(options.api_key_file)
    hosts = LOOPBACK_NAMES | {options.host} if is_loopback(options.host) else None
    return Rules(key or None, hosts, options.allow_origin)


def _read_key(file: Path) -> str:
    """The key in a file of one line. Raises UserError where there is none."""
    try:
        (key,) = file.read_text(encoding="utf-8-sig").split()
    except ValueError:  # UnicodeDecodeError is one
        raise UserError(f"{file}: must hold the key and nothing else, on one line") from None
    return key


def run(app: "ASGIApp", listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM, SIGHUP or SIGINT; then finish what is in flight. A second signal ends at once."""
    import uvicorn

    from smelter.serving.connections import Connection

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            left_alone(sig)
            if self.should_exit:
                os._exit(128 + sig)
            self.should_exit = True  # before it is said: who reads it may answer with the second signal
            print("smelter serve: finishing what is in flight; once more to stop at once", file=sys.stderr, flush=True)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        lifespan="off",
        server_header=False,
        http=Connection,
    )
    # Set here too: a signal may come before uvicorn listens for it.
    server = Server(config)
    for number in stop_signals():
        signal.signal(number, server.handle_exit)
    server.run(sockets=[listener])


def main(argv: list[str]) -> int:
    """`smelter serve`."""
    options = parse(ServeOptions, argv, "smelter serve")
    check_extra()
    rules = rules_of(options)
    with listen(options.host, options.port) as listener:
        (_serve_llama_cpp if options.engine == "llama.cpp" else _serve_smelter)(options, rules, listener)
    return 0


def _serve_smelter(options: ServeOptions, rules: "Rules", listener: socket.socket) -> None:
    import torch

    from smelter.decoding import Engine
    from smelter.run import load_model, pick_device
    from smelter.serving.app import make_app
    from smelter.serving.bridge import Service
    from smelter.serving.stats import Stats

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model, tokenizer, checkpoint = load_model(options.checkpoint, device=pick_device(options.device))
    engine = Engine(model, tokenizer, num_slots=options.slots, max_queue=options.queue)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    name = _name(options, checkpoint)
    service = Service(engine, tokenizer, name, int(time.time()), num_params, Stats(engine))
    engine.start()
    try:
        about = f"{name} ({num_params:,} parameters, context {engine.context:,})"
        run(make_app(service, rules), listener, lambda: _announce(options, rules, listener, about))
    finally:
        engine.stop()


def _serve_llama_cpp(options: ServeOptions, rules: "Rules", listener: socket.socket) -> None:
    from smelter.run import load_checkpoint
    from smelter.serving.app import make_app
    from smelter.serving.bridge import Service
    from smelter.serving.llama_engine import LlamaEngine
    from smelter.serving.llama_server import find_llama_server, start_llama_server
    from smelter.serving.stats import Stats
    from smelter.tokens import Tokenizer

    checkpoint = load_checkpoint(options.checkpoint, with_state=False)
    name, context = _name(options, checkpoint), checkpoint.config.model.max_seq_len
    tokenizer, num_params = Tokenizer.load(checkpoint.tokenizer_file), checkpoint.config.model.num_params_estimate
    files = sorted((options.checkpoint / "export" / "gguf").glob("*.gguf"))
    gguf = options.gguf or (files[0] if files else options.checkpoint / "export" / "gguf" / "model.gguf")
    server = start_llama_server(
        find_llama_server(options.llama_server), gguf, context=context, num_slots=options.slots, threads=options.threads
    )
    try:
        words = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
        # Special tokens too: they stand behind all others, so their ids tell of another size.
        probe = "".join(word for word in words if re.fullmatch("[ A-Za-z_]+", word)) + "".join(tokenizer.special.names)
        if server.tokenize(probe) != tokenizer.parse(probe):
            raise UserError(f"{gguf}: has another tokenizer than {checkpoint.path}: export it anew, with --force")
        engine = LlamaEngine(server, tokenizer, context=context, max_queue=options.queue)
        service = Service(engine, tokenizer, name, int(time.time()), num_params, Stats(engine))
        about = f"{name} (llama.cpp, {gguf.name}, context {context:,})"
        run(make_app(service, rules), listener, lambda: _announce(options, rules, listener, about))
    finally:
        server.stop()


def _name(options: ServeOptions, checkpoint: "Checkpoint") -> str:
    from smelter.run import run_folder

    folder = run_folder(checkpoint.path)  # what it is called now, not when it was trained
    own = folder if folder != checkpoint.path.resolve() else Path(checkpoint.config.training.run_dir)
    return options.name or own.name or "smelter"


def _announce(options: ServeOptions, rules: "Rules", listener: socket.socket, about: str) -> None:
    """Say where it is, on stdout, once it can be asked."""
    host, port = listener.getsockname()[:2]
    if rules.hosts is None and rules.api_key is None:
        warning = f"anyone who reaches {options.host} may ask: set --api-key-file or {KEY_VARIABLE}"
        print(f"smelter serve: {warning}", file=sys.stderr)
    print(f"{about} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
