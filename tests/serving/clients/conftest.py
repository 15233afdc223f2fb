"""Both servers with the same model, each started once: `smelter serve` and the real llama-server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from smelter.__main__ import main
from tests.export.real_llama_cpp import llama_cpp_folder, serve
from tests.servers import command
from tests.serving.clients import student
from tests.serving.clients.programs import Served


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the model that knows its pages."""
    return student.checkpoint(tmp_path_factory.mktemp("runs") / "student")


@pytest.fixture(scope="session", params=["smelter serve", "llama-server"])
def server(request: pytest.FixtureRequest, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One of the two, ready."""
    if request.param == "smelter serve":
        with command(run) as (_, url):
            yield Served(url, is_ours=True)
        return
    folder, out = llama_cpp_folder(), run / "export" / "gguf"
    assert main(["export", str(run), "--format", "gguf", "--out", str(out)]) == 0
    (gguf,) = out.glob("*.gguf")
    with serve(folder, gguf, student.CONTEXT, tmp_path_factory.mktemp("llama-server") / "log") as running:
        yield Served(running.url, is_ours=False)
