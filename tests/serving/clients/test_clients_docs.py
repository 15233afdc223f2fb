"""docs/editors.md and docs/serve.md name the clients, versions and settings that are tested, and no others."""

import re

import pytest

from tests.serving.clients.programs import INSTALLER, ROOT
from tests.serving.clients.replayed import LLAMA_VSCODE, MINUET, REPLAYS, ZED, Replay

EDITORS = (ROOT / "docs" / "editors.md").read_text(encoding="utf-8")
SERVE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")


def test_every_replayed_client_is_in_the_table_and_no_other() -> None:
    rows = [row.split("|") for row in EDITORS.splitlines() if row.startswith("| ") and "replayed" in row]
    assert sorted({replay.client for replay in REPLAYS}) == sorted(row[2].strip() for row in rows)


def test_every_installed_client_is_in_a_table() -> None:
    installed = re.findall(r"([@\w/-]+)(?:==|@)([\d.]+)", "\n".join(INSTALLER.read_text().splitlines()[:20]))
    assert len(installed) == 7
    tables = [re.sub(r" \((?:Python|Node)\)", "", row) for row in (EDITORS + SERVE).splitlines() if row.startswith("|")]
    for name, version in installed:
        assert any(name in row and re.search(rf"[| ]{re.escape(version)} ", row) for row in tables), f"{name} {version}"


def _body(client: str, path: str) -> Replay:
    return next(replay for replay in REPLAYS if replay.client == client and replay.path == path)


@pytest.mark.parametrize(
    ("replay", "field", "setting"),
    [
        (_body(LLAMA_VSCODE, "/infill"), "n_predict", '"llama-vscode.n_predict": {}'),
        (REPLAYS[0], "n_predict", "'n_predict': {}"),
        (_body(MINUET, "/v1/completions"), "max_tokens", "max_tokens = {}, temperature = 0"),
        (_body(ZED, "/v1/completions"), "max_tokens", '"max_output_tokens": {}'),
        (_body("Continue d0a3c0b", "/completion"), "n_predict", "maxTokens: {}"),
        (_body("Continue d0a3c0b", "/completion"), "temperature", "\n          temperature: {}\n"),
        (_body("Continue d0a3c0b", "/completion"), "model", "model: {}"),
    ],
    ids=lambda value: None if isinstance(value, Replay) else str(value),
)
def test_settings_are_those_of_the_requests(replay: Replay, field: str, setting: str) -> None:
    assert setting.format(replay.body[field]) in EDITORS


def test_neovim_asks_for_as_many_lines() -> None:
    script = (ROOT / "tests" / "serving" / "clients" / "infill.lua").read_text(encoding="utf-8")
    asked = re.search(r"n_prefix, n_suffix, n_predict = (\d+), (\d+), (\d+)", script)
    assert asked
    assert "'n_predict': {2}, 'n_prefix': {0}, 'n_suffix': {1}".format(*asked.groups()) in EDITORS
