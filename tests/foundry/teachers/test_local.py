"""The local teacher gives what the authors wrote, invents nothing, and is named in every record."""

import ast
import asyncio
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from foundry.settings import TeacherSettings
from foundry.teacher import Answer, Question, RejectedQuestionError
from foundry.teachers.local import LocalTeacher, mined_answer
from smelter.base.record import read_records
from tests.foundry.seeds.test_code import FILES, SHAPES, blocks, prompts, write_corpus

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "recipes" / "foundry-local.toml"
MINED = ("docstring_to_body", "body_to_docstring", "body_to_tests", "body_to_calls")


def ask(**values: Any) -> Answer:
    return asyncio.run(LocalTeacher(TeacherSettings(name="local/miner", backend="local")).ask(Question(**values)))


@pytest.mark.parametrize("kind", MINED)
def test_answers_are_what_the_authors_wrote_and_parse(tmp_path: Path, kind: str) -> None:
    corpus = write_corpus(tmp_path / "code.jsonl")
    items = [item for item in prompts(corpus, kind) if "answer" in item.material]
    assert items
    for item in items:
        answer = ask(prompt=item.prompt, material=item.material)
        (code,) = blocks(answer.text)
        assert answer.text == f"```python\n{code}```"
        assert ast.parse(code).body
        assert (answer.finish, answer.cost) == ("stop", 0.0)
        own = [line.strip() for name in FILES for line in FILES[name].split("\n")]
        lines = [line.strip() for line in code.split("\n")]
        if kind == "body_to_calls":  # each call stands under its place
            places = [line[2:] for line in lines if line.startswith("# ")]
            assert places
            assert all(place.partition(":")[0] in FILES for place in places)
        elif kind == "body_to_docstring":
            lines[0] = own[own.index(lines[0])]
            assert set(lines) <= set(own)
        else:
            assert set(lines) <= set(own), "a line that is in no file"


def test_the_body_is_the_whole_function_as_it_stands(tmp_path: Path) -> None:
    items = {item.material["name"]: item for item in prompts(write_corpus(tmp_path / "c.jsonl"), "docstring_to_body")}
    answer = ask(prompt="p", material=items["circle"].material)
    (code,) = blocks(answer.text)
    assert code in SHAPES
    space: dict[str, Any] = {}
    exec(f"import math\nfrom functools import lru_cache\n{code}", space)
    assert space["circle"](2.0) == pytest.approx(12.566370614)
    with pytest.raises(ValueError, match="-1"):
        space["circle"](-1)


def test_usage_counts_words_and_a_long_answer_is_cut() -> None:
    material = {"task": "docstring_to_body", "answer": "def f(x):\n    return x"}
    whole = ask(prompt="three short words", system="be brief", material=material)
    assert whole.usage == {"input": 5, "output": 6}
    cut = ask(prompt="p", material=material, max_tokens=3)
    assert (cut.text, cut.finish, cut.usage["output"]) == ("```python\ndef f(x):", "length", 3)
    exact = ask(prompt="p", material=material, max_tokens=6)
    assert (exact.text, exact.finish) == (whole.text, "stop")


@pytest.mark.parametrize(
    ("material", "message"),
    [
        ({}, r"answers only code-seeded questions: set builtin = false, corpus and kinds in \[seeds\]"),
        ({"task": "oss_instruct", "file": "a.py"}, r"there is none for oss_instruct of a\.py: leave this kind to"),
        ({"task": "body_to_tests", "answer": " \n"}, r"there is none for body_to_tests of this question"),
        ({"task": "body_to_tests", "answer": 3}, r"there is none for body_to_tests"),
    ],
)
def test_a_question_without_a_known_answer_is_rejected(material: dict[str, Any], message: str) -> None:
    with pytest.raises(RejectedQuestionError, match=message) as caught:
        ask(prompt="p", material=material)
    assert not caught.value.is_worth_retrying
    assert "\n" not in str(caught.value)
    with pytest.raises(RejectedQuestionError):
        mined_answer(material)


def test_the_recipe_is_for_this_teacher_and_the_kinds_it_can_answer() -> None:
    recipe = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    assert recipe["seeds"]["kinds"] == list(MINED)
    assert recipe["seeds"]["builtin"] is False
    assert [teacher["backend"] for teacher in recipe["teacher"]] == ["local"]


def module(number: int) -> str:
    """Code of three functions with names of their own."""
    parts = [
        f'def {verb}_{number}(items):\n    """{verb.title()} the items of shelf {number} one by one."""\n'
        f"    total = {number}\n    for item in items:\n        total += item\n    return total\n"
        for verb in ("count", "weigh", "label")
    ]
    return "\n\n".join(parts)


def generate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "foundry", "generate", "foundry.toml", "--out", str(folder / "local.jsonl"), *arguments],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_recipe_makes_records_that_name_the_miner(tmp_path: Path) -> None:
    files = FILES | {f"lib/shelf_{number}.py": module(number) for number in range(6)}
    write_corpus(tmp_path / "code.jsonl", files)
    recipe = RECIPE.read_text(encoding="utf-8")
    assert '"stdlib"]' in recipe
    assert "count = 1_000" in recipe
    settings = recipe.replace('corpus = ["stdlib"]', 'corpus = ["code.jsonl"]').replace("count = 1_000", "count = 20")
    (tmp_path / "foundry.toml").write_text(settings, encoding="utf-8")

    result = generate(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    records = list(read_records(tmp_path / "local.jsonl"))
    # Of twenty seeds those are missing that have no answer in the code: tests that nobody wrote.
    assert 12 <= len(records) <= 20
    assert f"{20 - len(records)} seeds failed" in result.stdout or len(records) == 20
    for record in records:
        (answer,) = record.responses
        assert answer.teacher == "local/miner"
        assert answer.cost == 0.0
        assert record.meta["kind"] in MINED
        assert record.license == "Apache-2.0"
        assert record.source in files
        assert ast.parse(blocks(answer.text)[0]).body
        if record.meta["kind"] == "docstring_to_body":
            lines = {line.strip() for line in files[record.source].split("\n")}
            assert {line.strip() for line in blocks(answer.text)[0].split("\n")} <= lines
    assert {record.meta["kind"] for record in records} == set(MINED)

    before = (tmp_path / "local.jsonl").read_bytes()
    again = generate(tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "local.jsonl").read_bytes() == before
    assert all(json.loads(line) for line in before.splitlines())


def test_builtin_prompts_put_to_the_miner_fail_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "foundry.toml").write_text(
        '[seeds]\ncount = 3\n\n[[teacher]]\nname = "local/miner"\nbackend = "local"\n', encoding="utf-8"
    )
    result = generate(tmp_path)
    assert "Traceback" not in result.stderr
    assert "set builtin = false, corpus and kinds in [seeds]" in result.stdout + result.stderr
