"""The servers, with the same model, each started once: `smelter serve` with either engine, the real llama-server."""

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


@pytest.fixture(scope="session")
def gguf(run: Path) -> Path:
    """The model as a file for llama.cpp, where `smelter serve` looks for it."""
    out = run / "export" / "gguf"
    assert main(["export", str(run), "--format", "gguf", "--out", str(out)]) == 0
    (file,) = out.glob("*.gguf")
    return file


@pytest.fixture(scope="session", params=["smelter serve", "with llama.cpp", "llama-server"])
def server(request: pytest.FixtureRequest, run: Path, gguf: Path) -> Iterator[Served]:
    """One of them, ready."""
    if request.param == "llama-server":
        with serve(llama_cpp_folder(), gguf, student.CONTEXT, run / "llama-server.log") as running:
            yield Served(running.url, is_ours=False)
        return
    engine = ["--engine", "llama.cpp", "--llama-server", str(llama_cpp_folder() / "bin" / "llama-server")]
    with command(run, "--threads", "1", *(engine if request.param == "with llama.cpp" else [])) as (_, url):
        yield Served(url, is_ours=True)
