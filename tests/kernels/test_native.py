"""The C++ kernels are compiled once, touch no memory but their own, and are done without where they cannot be had."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from smelter.kernels import native
from smelter.kernels.capability import cpu_has_kernels

PROGRAMS = Path(__file__).with_name("native")
needs_kernels = pytest.mark.skipif(not cpu_has_kernels(), reason="no AVX-512 with BF16 and VNNI, or no C++ compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of compiled kernels, and `native.library` as if not called yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield tmp_path / "cache" / "smelter"
    native.library.cache_clear()


def failing(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'x.cpp:1: error: what is this' >&2; exit 1", ".*failed: x.cpp:1: error: what is this"),
        (
            "test \"$1\" = --version && exit 0; echo 'x.cpp:1: error: odd' >&2; exit 1",
            ".*failed: x.cpp:1: error: odd",
        ),
        ("exit 0", "no C\\+\\+ kernels, .*No such file"),  # says it has compiled, and has not
    ],
    ids=["no version", "does not compile", "makes nothing"],
)
def test_a_compiler_that_fails_is_no_end(
    script: str,
    said: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", failing(tmp_path / "cxx", script))
    assert native.library() is None
    assert native.library() is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.match(said, lines[0])
    assert not list(cache.glob("*.so"))


def test_a_folder_that_cannot_be_written_is_no_end(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("CXX", failing(tmp_path / "cxx", "exit 0"))
    assert native.library() is None
    assert "XDG_CACHE_HOME names another folder" in capsys.readouterr().err


def test_no_compiler_is_no_end(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert native.library() is None
    assert "no C++ compiler found (g++ or clang++; CXX names another)" in capsys.readouterr().err
    assert not cache.exists()


@pytest.mark.slow
@needs_kernels
def test_is_compiled_once(cache: Path) -> None:
    command = native.compiler()
    assert command
    first = native.build(command, cache)
    made = first.stat().st_mtime_ns
    assert native.build(command, cache) == first
    assert first.stat().st_mtime_ns == made
    assert [path.name for path in cache.iterdir()] == [first.name]


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("name", [path.stem for path in sorted(PROGRAMS.glob("*.cpp"))])
def test_touches_no_memory_but_its_own(name: str, tmp_path: Path) -> None:
    """Under the compiler's sanitizers."""
    command = native.compiler()
    assert command
    flags = [flag for flag in native.FLAGS if flag not in ("-shared", "-fPIC", "-O3")]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g"]
    built = str(tmp_path / name)
    compiled = subprocess.run(
        [command, *flags, *sanitize, str(PROGRAMS / f"{name}.cpp"), "-o", built],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([built], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
