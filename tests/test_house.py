"""The house rules, held: who imports whom, what stays small, what stays light, what is explained.

The import table reads from the bottom up: a file may import the files named beside it, and those all
stand above it. A new file needs a line here, which is the moment to ask where it belongs.
"""

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 450

BASE = "errors training_config config cli"
"""What everything in Smelter may import."""

SMELTER = {
    "__init__": "",
    "errors": "",
    "training_config": "errors",
    "config": "errors training_config",
    "cli": "errors",
    "tokenizer": BASE,
    "sandbox": BASE,
    "distributed": BASE,
    "kernels.reference": "",
    "kernels.native": "",
    "kernels.capability": "kernels.native",
    "kernels.triton_ops": "",
    "kernels.triton_weights": "kernels.triton_ops",
    "kernels.flex": "",
    "kernels.soft_cap": "",
    "kernels.blocked": "kernels.soft_cap",
    "kernels.tiled": "kernels.native kernels.soft_cap",
    "kernels.cached": "kernels.reference",
    "kernels.screened": "kernels.reference",
    "kernels.ternary": "kernels.reference kernels.capability kernels.triton_ops",
    "kernels.decode": "kernels.native kernels.ternary",
    "kernels": (
        "kernels.reference kernels.capability kernels.cached kernels.screened kernels.ternary kernels.blocked "
        "kernels.flex kernels.tiled kernels.decode"
    ),
    "bitnet": f"{BASE} kernels kernels.reference kernels.triton_weights",
    "cache": BASE,
    "infill": BASE,
    "model": f"{BASE} kernels kernels.reference bitnet",
    "divergence": "",
    "mixture": f"{BASE} kernels kernels.reference divergence",
    "soft_target": f"{BASE} kernels.soft_cap mixture",
    "loss": f"{BASE} kernels kernels.reference kernels.soft_cap divergence mixture soft_target",
    "muon": BASE,
    "records": BASE,
    "shards": f"{BASE} tokenizer",
    "chat": f"{BASE} tokenizer",
    "write_shards": f"{BASE} tokenizer chat records shards",
    "fim": f"{BASE} tokenizer",
    "chunk_alignment": f"{BASE} tokenizer",
    "chunk_teacher": f"{BASE} shards chunk_alignment",
    "chunk_loss": "soft_target",
    "data": f"{BASE} tokenizer shards fim chunk_alignment",
    "checkpoint": f"{BASE} distributed",
    "metrics": f"{BASE} distributed",
    "signals": f"{BASE} distributed",
    "schedule": BASE,
    "hardware": f"{BASE} distributed kernels.capability",
    "plan": BASE,
    "healing": f"{BASE} tokenizer",
    "packed": f"{BASE} tokenizer bitnet model checkpoint",
    "generate": f"{BASE} tokenizer bitnet model cache healing infill checkpoint packed",
    "complete": f"{BASE} tokenizer chat model generate",
    "decode": f"{BASE} tokenizer model healing infill generate",
    "intervals": "",
    "bpb": f"{BASE} tokenizer model shards data",
    "problems": f"{BASE} decode",
    "pass_at_k": f"{BASE} tokenizer sandbox model infill decode problems",
    "results": f"{BASE} intervals",
    "compare": f"{BASE} intervals pass_at_k results",
    "evaluate": (
        f"{BASE} tokenizer bitnet model infill shards checkpoint generate decode bpb problems pass_at_k results compare"
    ),
    "warm_start": f"{BASE} tokenizer distributed model checkpoint",
    "sparse": BASE,
    "teacher_cache": f"{BASE} tokenizer shards data sparse",
    "write_teacher": f"{BASE} shards sparse teacher_cache",
    "teacher_model": f"{BASE} tokenizer kernels.reference kernels model shards checkpoint generate",
    "objective": f"{BASE} distributed tokenizer model loss chunk_loss shards bpb teacher_cache teacher_model",
    "train": (
        f"{BASE} tokenizer distributed kernels bitnet model infill muon shards data checkpoint metrics "
        "schedule hardware plan decode bpb signals teacher_cache objective warm_start chunk_teacher"
    ),
    "teach_chunks": (
        f"{BASE} shards checkpoint metrics generate signals chunk_alignment chunk_loss chunk_teacher write_teacher "
        "teacher_model"
    ),
    "teach": (
        f"{BASE} tokenizer kernels kernels.reference shards data checkpoint metrics generate signals sparse "
        "teacher_cache write_teacher teacher_model teach_chunks"
    ),
    "export_hf": f"{BASE} tokenizer chat kernels.reference bitnet model checkpoint",
    "export_gguf": f"{BASE} tokenizer chat kernels.reference bitnet model checkpoint export_hf",
    "export_check": f"{BASE} tokenizer kernels.reference model evaluate export_hf",
    "model_card": f"{BASE} tokenizer checkpoint export_check",
    "export": (
        f"{BASE} tokenizer model checkpoint packed generate results evaluate export_hf export_gguf export_check "
        "model_card"
    ),
    "serving": "",
    "serving.text": "",
    "serving.request": "serving.text",
    "serving.engine": f"{BASE} tokenizer model cache healing generate serving.text serving.request",
    "serving.schema": "",
    "serving.errors": "",
    "serving.stats": "serving.engine serving.request",
    "serving.gate": "serving.errors serving.stats",
    "serving.asking": "tokenizer serving.request serving.engine serving.errors serving.stats",
    "serving.openai_routes": (
        "errors tokenizer chat generate serving.request serving.errors serving.schema serving.asking"
    ),
    "serving.llama_routes": (
        "tokenizer generate serving.request serving.errors serving.schema serving.asking serving.openai_routes"
    ),
    "serving.app": (
        "serving serving.errors serving.schema serving.stats serving.gate serving.asking serving.openai_routes "
        "serving.llama_routes"
    ),
    "serving.proxy": (
        "errors serving.errors serving.schema serving.stats serving.gate serving.asking serving.openai_routes "
        "serving.app"
    ),
    "serve": (
        f"{BASE} tokenizer model checkpoint generate "
        "serving.engine serving.stats serving.gate serving.asking serving.app serving.proxy"
    ),
    "report": f"{BASE} metrics intervals results",
    "__main__": BASE,
}

FOUNDRY = {
    "__init__": "",
    "errors": "",
    "cli": "errors",
    "record": "errors",
    "corpus": "errors cli record",
    "teacher": "errors",
    "settings": "errors",
    "builtin_seeds": "",
    "mining": "",
    "usage": "mining",
    "code_seeds": "errors record corpus builtin_seeds mining usage",
    "seeds": "errors record settings builtin_seeds code_seeds",
    "local_teacher": "teacher",
    "openai_teacher": "teacher",
    "transformers_teacher": "errors teacher",
    "opencode_messages": "errors",
    "opencode_client": "errors opencode_messages",
    "opencode_teacher": "opencode_messages opencode_client teacher",
    "opencode_server": "errors settings opencode_messages opencode_client",
    "backends": "settings teacher openai_teacher opencode_teacher transformers_teacher local_teacher",
    "journal": "errors",
    "limits": "settings teacher",
    "ensemble": "limits record settings teacher",
    "generate": "errors cli record settings teacher journal limits ensemble seeds backends",
    "filter": "record",
    "dedup": "",
    "decontaminate": "errors",
    "clean": "errors cli record filter dedup decontaminate",
    "stats": "errors cli record",
    "__main__": "errors",
}

WITHOUT_TORCH = ["config", "training_config", "tokenizer", "sandbox", "cli", "errors", "__main__"]

SOURCES = sorted(path for package in ("smelter", "foundry") for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> tuple[str, str]:
    """("smelter", "kernels.reference") for smelter/kernels/reference.py."""
    package, *parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return package, ".".join(parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions, as absolute names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import: name the package"
            assert node.module is not None
            folder = ROOT.joinpath(*node.module.split("."))
            for alias in node.names:  # `from smelter.kernels import reference` imports a module
                is_module = (folder / f"{alias.name}.py").exists() or (folder / alias.name / "__init__.py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


@pytest.mark.parametrize("table", [SMELTER, FOUNDRY], ids=["smelter", "foundry"])
def test_the_table_reads_from_the_bottom_up(table: dict[str, str]) -> None:
    above: set[str] = set()
    for name, allowed in table.items():
        assert set(allowed.split()) <= above, f"{name}: {set(allowed.split()) - above} must stand above it"
        above.add(name)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    package, name = module_name(path)
    table = {"smelter": SMELTER, "foundry": FOUNDRY}[package]
    assert name in table, f"{path.relative_to(ROOT)} is not in this test's table: give it a line"
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top == package:
            allowed = {"", "__init__", *table[name].split()}
            assert rest in allowed, f"{path.relative_to(ROOT)} imports {module}: not allowed by the table"
        elif top in ("smelter", "foundry"):
            assert (package, module) == ("foundry", "smelter.base.sandbox"), (
                f"{path.relative_to(ROOT)} imports {module}"
            )


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("tests/*.py")) + SOURCES, ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_file_fits_a_head(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines, more than {MAX_LINES}: it has two ideas"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_light_modules_do_without_torch(name: str) -> None:
    path = ROOT / "smelter" / f"{name}.py"
    if not path.exists():
        pytest.skip(f"no {name}.py yet")
    code = f"import sys, smelter.{name}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
    assert not [module for module in imports(path) if module.split(".")[0] == "torch"]


@pytest.mark.parametrize("package", ["smelter", "foundry"])
def test_help_answers_in_a_blink(package: str) -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run = subprocess.run([sys.executable, "-m", package, "--help"], cwd=ROOT, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
        assert b"usage: " + package.encode() in run.stdout
    assert min(times) < 0.5, f"{package} --help takes {min(times):.2f} s"


def undocumented(node: ast.AST, prefix: str = "") -> Iterator[str]:
    """Public functions, classes and methods without a docstring; a module's `forward` is its class's."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or child.name.startswith("_"):
            continue
        explained = child.name == "forward" or any(
            isinstance(d, ast.Name) and d.id in ("override", "overload") for d in child.decorator_list
        )
        if ast.get_docstring(child) is None and not explained:
            yield f"{prefix}{child.name}"
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child, f"{child.name}.")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_things_are_explained(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"
    assert list(undocumented(tree)) == []


def test_the_docstring_check_can_fail() -> None:
    tree = ast.parse('def f(): ...\nclass A:\n    "doc"\n    def g(self): ...\n    def _h(self): ...\ndef _i(): ...\n')
    assert list(undocumented(tree)) == ["f", "A.g"]


def test_the_two_command_lines_stay_equal() -> None:
    """The one thing that is written down twice, so that neither package needs the other."""
    twins = []
    for package in ("smelter", "foundry"):
        tree = ast.parse((ROOT / package / "cli.py").read_text(encoding="utf-8"))
        functions = {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
        twins.append([functions["_wide_terminal"], functions["_one_line"]])
    assert twins[0] == twins[1]


def test_both_packages_have_one_version() -> None:
    versions = {
        package: re.search(r'^__version__ = "(.+)"$', (ROOT / package / "__init__.py").read_text(), re.MULTILINE)
        for package in ("smelter", "foundry")
    }
    found = {match[1] for match in versions.values() if match}
    assert len(found) == 1
    assert all(versions.values())
    assert found.pop() in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
