#!/usr/bin/env bash
# asyncio and uvicorn: TCP_NODELAY is set only on sockets that name their protocol.
#
# Expected: a listening socket from `socket.socket(AF_INET, SOCK_STREAM)` serves as one with IPPROTO_TCP does.
# Seen (uvicorn 0.54.0, Python 3.11.7, Linux): connections of the first have TCP_NODELAY 0, of the second 1. asyncio looks at
# the socket's protocol, which is 0 where none was named, and accepted connections inherit it. A server that sends the
# head and the body of an answer apart, as uvicorn does, then waits for the client's delayed acknowledgement between
# the two: a request of ours on a kept connection took 44 ms instead of 0.5.
#
# Installs into a temporary folder; ends with 1 where the behaviour is another. Needs Python 3.11 or later.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet uvicorn==0.54.0
"$work/venv/bin/python" - <<'PYTHON'
import asyncio
import socket
import sys

import uvicorn


async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


async def option(protocol):
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error", loop="asyncio"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    (connection,) = server.server_state.connections
    value = connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    writer.close()
    server.should_exit = True
    await serving
    return bool(value)


unnamed, named = asyncio.run(option(0)), asyncio.run(option(socket.IPPROTO_TCP))
print(f"uvicorn {uvicorn.__version__}, Python {sys.version.split()[0]}: TCP_NODELAY without a protocol {unnamed}, named {named}")
sys.exit(0 if (unnamed, named) == (False, True) else "it is no longer so")
PYTHON
