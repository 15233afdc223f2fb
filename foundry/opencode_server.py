"""The OpenCode server's side of foundry.toml: its configuration, and whether it runs as configured.

    python -m foundry.opencode_server port foundry.toml      # the port that the teachers expect
    python -m foundry.opencode_server config foundry.toml    # opencode.json, on stdout
    python -m foundry.opencode_server check foundry.toml     # waits until the server is there and has all it needs

`scripts/start_server.sh` uses these three. The configuration holds no key, only `{env:NAME}`, which OpenCode replaces
when it starts; everything that makes OpenCode an agent (tools, titles, snapshots, sharing, updates) is off.
"""

import argparse
import asyncio
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from foundry.opencode_client import OpenCodeClient
from foundry.settings import Settings, TeacherSettings, load_settings
from smelter.base import UserError

PLUGIN = Path(__file__).parent / "opencode" / "plugin.js"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_VARIABLE = re.compile(r"\{env:([^}]*)\}")


def server_teachers(settings: Settings, port: int | None = None) -> tuple[TeacherSettings, ...]:
    """The teachers behind the server on this port (by default the first opencode teacher's). Raises UserError."""
    teachers = [teacher for teacher in settings.teachers if teacher.backend == "opencode"]
    if not teachers:
        raise UserError('no teacher has backend = "opencode": there is no server to start')
    port = _port(teachers[0]) if port is None else port
    served = tuple(teacher for teacher in teachers if _port(teacher) == port)
    if not served:
        ports = ", ".join(sorted({str(_port(teacher)) for teacher in teachers}))
        raise UserError(f"no opencode teacher has a server_url with port {port}: they have {ports}")
    for teacher in served:
        if urlsplit(teacher.server_url).hostname not in _LOOPBACK:
            raise UserError(f"teacher {teacher.name}: server_url is not on this machine: start the server there")
    return served


def server_config(teachers: Sequence[TeacherSettings]) -> dict[str, Any]:
    """opencode.json for these teachers. Raises UserError where two of them contradict each other."""
    providers: dict[str, dict[str, Any]] = {}
    for teacher in teachers:
        name, _, model = teacher.model.partition("/")
        provider = _provider(teacher)
        models = providers.setdefault(name, {**provider, "models": {}})["models"]
        if {**provider, "models": models} != providers[name]:
            raise UserError(
                f"teacher {teacher.name}: another teacher has provider {name!r} with another base_url, key_env or"
                f" timeout_seconds: give one of them another provider name"
            )
        models[model] = _model(teacher)
    first = teachers[0].model
    return {
        "autoupdate": False,
        "share": "disabled",
        "snapshot": False,
        "lsp": False,
        "formatter": False,
        "compaction": {"auto": False, "prune": False},
        "permission": {"*": "deny"},
        "plugin": [PLUGIN.resolve().as_uri()],
        "default_agent": "foundry",
        "agent": {"title": {"disable": True}},
        "enabled_providers": sorted(providers),
        "model": first,
        "small_model": first,
        "provider": providers,
    }


def missing_variables(config: dict[str, Any]) -> list[str]:
    """Environment variables that the configuration names and nobody has set."""
    names = set(_VARIABLE.findall(json.dumps(config)))
    return sorted(name for name in names if not os.environ.get(name, "").strip())


def _provider(teacher: TeacherSettings) -> dict[str, Any]:
    options: dict[str, Any] = {"timeout": round(teacher.timeout_seconds * 1_000)}
    # Vendors that offer Anthropic's interface do so below such a path; the key has its own header there.
    is_anthropic = "/anthropic" in urlsplit(teacher.base_url).path
    if teacher.key_env:
        key = f"{{env:{teacher.key_env}}}"
        if is_anthropic or teacher.key_header == "Authorization":
            options["apiKey"] = key
        else:
            options["headers"] = {teacher.key_header: key}
    if not teacher.base_url:  # a vendor that OpenCode knows by name
        return {"options": options}
    npm = "@ai-sdk/anthropic" if is_anthropic else "@ai-sdk/openai-compatible"
    return {"npm": npm, "options": {"baseURL": teacher.base_url.rstrip("/"), **options}}


def _model(teacher: TeacherSettings) -> dict[str, Any]:
    cost = {"input": teacher.price_input, "output": teacher.price_output}
    if teacher.price_cache_read is not None:
        cost["cache_read"] = teacher.price_cache_read
    return {
        "temperature": "temperature" not in teacher.omit,
        "reasoning": True,
        # Nothing is ever shortened to fit; the vendor says when a question is too long.
        "limit": {"context": 1_000_000, "output": teacher.max_tokens},
        "cost": cost,
    }


def _port(teacher: TeacherSettings) -> int:
    try:
        port = urlsplit(teacher.server_url).port
    except ValueError:
        port = None
    if port is None:
        raise UserError(f"teacher {teacher.name}: server_url needs a port, as in http://127.0.0.1:4096")
    return port


async def _check(teachers: Sequence[TeacherSettings], wait: float) -> str:
    async with OpenCodeClient(teachers[0].server_url, password=teachers[0].password()) as client:
        version = await client.health(wait=wait)
        for teacher in teachers:
            await client.check(agent=teacher.agent, models=(teacher.model,))
        return version


def main(argv: Sequence[str] | None = None) -> int:
    """Print the port or the configuration, or check the server; 2 with one line on stderr when something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m foundry.opencode_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["port", "config", "check"])
    parser.add_argument("settings", help="foundry.toml")
    parser.add_argument("--port", type=int, help="the server's port, where the teachers name several")
    parser.add_argument("--wait", type=float, default=0.0, help="check: seconds to wait for the server")
    options = parser.parse_args(argv)
    try:
        teachers = server_teachers(load_settings(options.settings), options.port)
        match options.what:
            case "port":
                print(_port(teachers[0]))
            case "config":
                config = server_config(teachers)
                if missing := missing_variables(config):
                    raise UserError(f"not set in the environment: {', '.join(missing)}: export the keys first")
                print(json.dumps(config, indent=2))
            case "check":
                print(asyncio.run(_check(teachers, options.wait)))
    except UserError as error:
        print(f"start_server: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
