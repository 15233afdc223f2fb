"""The server's configuration from foundry.toml, and what start_server.sh says to mistakes (no server is started)."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from foundry.opencode_client import PLUGIN_AGENT, PLUGIN_MARK
from foundry.opencode_server import PLUGIN, main, missing_variables, server_config, server_teachers
from foundry.settings import Settings, load_settings
from smelter.base.errors import UserError
from smelter.base.strict import from_table

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "foundry.toml"
SCRIPT = ROOT / "scripts" / "start_server.sh"
KEYS = ["AZURE_API_KEY", "AZURE_RESOURCE", "MINIMAX_API_KEY", "ZAI_API_KEY"]


def teacher(name: str = "t", **changes: Any) -> dict[str, Any]:
    table = {"name": name, "backend": "opencode", "model": "vendor/m", "base_url": "http://127.0.0.1:1/v1"}
    return table | {"key_env": "VENDOR_KEY"} | changes


def config(*teachers: dict[str, Any], port: int | None = None) -> dict[str, Any]:
    return server_config(server_teachers(from_table(Settings, {"teacher": list(teachers)}, "x.toml"), port))


def test_the_shipped_recipe_names_its_keys_and_holds_none() -> None:
    settings = load_settings(RECIPE)
    assert [one.name for one in settings.teachers] == [
        "azure/claude-sonnet-4-5",
        "zai/glm-4.7",
        "minimax/minimax-m2.1",
    ]
    made = server_config(server_teachers(settings))
    assert {name: provider["npm"] for name, provider in made["provider"].items()} == {
        "azure-claude": "@ai-sdk/anthropic",
        "zai": "@ai-sdk/openai-compatible",
        "minimax": "@ai-sdk/anthropic",
    }
    keys = [provider["options"]["apiKey"] for provider in made["provider"].values()]
    assert keys == ["{env:AZURE_API_KEY}", "{env:ZAI_API_KEY}", "{env:MINIMAX_API_KEY}"]
    assert all(one.has_price for one in settings.teachers)
    assert settings.generate.max_cost > 0


def test_the_configuration_makes_no_agent_of_it() -> None:
    made = config(teacher(max_tokens=99, price_cache_read=0.5, timeout_seconds=7))
    assert made["permission"] == {"*": "deny"}
    assert (made["share"], made["autoupdate"], made["snapshot"]) == ("disabled", False, False)
    assert made["enabled_providers"] == ["vendor"]
    assert made["plugin"] == [PLUGIN.as_uri()]
    options = {"baseURL": "http://127.0.0.1:1/v1", "timeout": 7_000, "apiKey": "{env:VENDOR_KEY}"}
    assert made["provider"]["vendor"]["options"] == options
    model = made["provider"]["vendor"]["models"]["m"]
    assert model["cost"] == {"input": 0.0, "output": 0.0, "cache_read": 0.5}
    assert model["limit"]["output"] == 99


def test_other_ways_to_give_a_key() -> None:
    with_header = config(teacher(key_header="api-key"))["provider"]["vendor"]["options"]
    assert with_header["headers"] == {"api-key": "{env:VENDOR_KEY}"}
    assert "apiKey" not in with_header
    assert "apiKey" not in config(teacher(key_env=""))["provider"]["vendor"]["options"]
    built_in = config(teacher(base_url=""))["provider"]["vendor"]
    assert "npm" not in built_in
    assert "baseURL" not in built_in["options"]


def test_client_and_plugin_are_of_one_version() -> None:
    source = PLUGIN.read_text(encoding="utf-8")
    assert json.dumps(PLUGIN_MARK) in source
    assert f"const AGENT = {json.dumps(PLUGIN_AGENT)};" in source


@pytest.mark.parametrize(
    ("teachers", "port", "message"),
    [
        ([{"name": "a", "backend": "local"}], None, "there is no server to start"),
        ([teacher(server_url="http://127.0.0.1")], None, "server_url needs a port"),
        ([teacher(server_url="http://127.0.0.1:99999")], None, "server_url needs a port"),
        ([teacher(server_url="http://example.invalid:4096")], None, "not on this machine"),
        ([teacher()], 5000, "no opencode teacher has a server_url with port 5000: they have 4096"),
        ([teacher(model="m")], None, 'must be "provider/model"'),
        ([teacher(), teacher("u", key_env="OTHER")], None, "give one of them another provider name"),
    ],
)
def test_mistakes_are_named(teachers: list[dict[str, Any]], port: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(*teachers, port=port)


def test_two_servers_and_two_models_of_one_provider() -> None:
    three = [teacher(), teacher("u", model="vendor/n"), teacher("v", server_url="http://localhost:4097")]
    assert set(config(*three)["provider"]["vendor"]["models"]) == {"m", "n"}
    assert set(config(*three, port=4097)["provider"]["vendor"]["models"]) == {"m"}


def test_missing_keys_are_all_named_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    assert missing_variables(server_config(server_teachers(load_settings(RECIPE)))) == KEYS
    assert main(["config", str(RECIPE)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"not set in the environment: {', '.join(KEYS)}" in error
    for name in KEYS:
        monkeypatch.setenv(name, f"secret-{name}")
    assert main(["config", str(RECIPE)]) == 0
    printed = capsys.readouterr().out
    assert "secret-" not in printed
    assert set(json.loads(printed)["provider"]) == {"azure-claude", "minimax", "zai"}
    assert main(["port", str(RECIPE)]) == 0
    assert capsys.readouterr().out == "4096\n"


def test_check_of_a_server_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENCODE_SERVER_PASSWORD", "hunter2")
    path = tmp_path / "foundry.toml"
    text = RECIPE.read_text().replace('backend = "opencode"', 'backend = "opencode"\nserver_url = "http://127.0.0.1:9"')
    path.write_text(text)
    assert tomllib.loads(text)["teacher"][0]["server_url"] == "http://127.0.0.1:9"
    assert main(["check", str(path)]) == 2
    error = capsys.readouterr().err
    assert "is the server running?" in error
    assert "hunter2" not in error


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in KEYS}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return subprocess.run(
        [str(SCRIPT), *argv], env=kept | {"PATH": path} | environment, capture_output=True, text=True, check=False
    )


def test_start_server_explains_itself() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    words = ("--config", "--port", "--stop", "OPENCODE_SERVER_PASSWORD", "FOUNDRY_SERVER_DIR", "OPENCODE_BIN")
    assert all(word in shown.stdout for word in words)
    assert "set -euo" not in shown.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stpo"], "unknown option --stpo"),
        (["--port"], "--port needs a value"),
        (["--port", "x"], "--port x: must be a number"),
        (["--config", "/no/such.toml"], "/no/such.toml"),
        (["--config", str(RECIPE), "--port", "1"], "no opencode teacher has a server_url with port 1"),
        (["--config", str(RECIPE)], f"not set in the environment: {', '.join(KEYS)}"),
    ],
)
def test_start_server_names_mistakes_and_starts_nothing(tmp_path: Path, argv: list[str], message: str) -> None:
    done = run(*argv, FOUNDRY_SERVER_DIR=str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("pid"))


def test_a_program_that_does_not_run_is_said(tmp_path: Path) -> None:
    keys = dict.fromkeys(KEYS, "secret-key")
    done = run("--config", str(RECIPE), FOUNDRY_SERVER_DIR=str(tmp_path), OPENCODE_BIN="/bin/false", **keys)
    assert done.returncode == 2
    assert "OPENCODE_BIN=/bin/false does not run" in done.stderr
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0
        assert not path.is_file() or "secret-key" not in path.read_text()


def test_stopping_what_does_not_run_is_no_error(tmp_path: Path) -> None:
    done = run("--stop", "--config", str(RECIPE), FOUNDRY_SERVER_DIR=str(tmp_path))
    assert done.returncode == 0
    assert "No server of ours runs on port 4096." in done.stdout
