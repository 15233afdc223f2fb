"""Every strategy in a whole run with three teachers over HTTP: who is asked, what is kept with which weight."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from smelter.base.record import Record, read_records
from tests.foundry.processes import run
from tests.foundry.stub_teacher import Faults, StubTeacher

PROMPTS = [f"Write function number {i}." for i in range(60)]
Stubs = dict[str, StubTeacher]


@pytest.fixture
def stubs() -> Iterator[Stubs]:
    """Three teachers: a, b and c."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(StubTeacher()) for name in "abc"}


def always(fault: str) -> Faults:
    return lambda prompt, number: fault


def records_of(folder: Path, stubs: Stubs, generate: str, prompts: list[str] = PROMPTS) -> list[Record]:
    """A run to its end; repeating it asks nothing and writes the same."""
    (folder / "seeds.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    settings, out = folder / "f.toml", folder / "t.jsonl"
    teachers = "".join(
        f'[[teacher]]\nname = "{name}"\nmodel = "m"\nbase_url = "{stub.url}"\nretries = 0\nweight = {weight}\n'
        for (name, stub), weight in zip(stubs.items(), (1, 2, 5), strict=True)
    )
    settings.write_text(
        f'[generate]\n{generate}\n[seeds]\nbuiltin = false\nfiles = ["{folder / "seeds.jsonl"}"]\ncount = 999\n'
        f"{teachers}"
    )
    code, _, stderr = run(settings, out)
    assert code == 0, stderr
    first, asked = out.read_bytes(), [stub.prompts.total() for stub in stubs.values()]
    if not any(record.meta.get("failures") for record in read_records(out)):
        assert run(settings, out)[0] == 0
        assert out.read_bytes() == first
        assert [stub.prompts.total() for stub in stubs.values()] == asked
    return list(read_records(out))


def answers_of(record: Record) -> dict[str, float]:
    return {response.teacher: response.weight for response in record.responses}


def test_all(tmp_path: Path, stubs: Stubs) -> None:
    for record in records_of(tmp_path, stubs, 'strategy = "all"'):
        assert answers_of(record) == {"a": 1.0, "b": 2.0, "c": 5.0}
    assert {stub.prompts.total() for stub in stubs.values()} == {60}


@pytest.mark.parametrize(("strategy", "shares"), [("round_robin", (20, 20, 20)), ("weighted", (7.5, 15, 37.5))])
def test_one_of_them(tmp_path: Path, stubs: Stubs, strategy: str, shares: tuple[float, ...]) -> None:
    records = records_of(tmp_path, stubs, f'strategy = "{strategy}"')
    assert {len(record.responses) for record in records} == {1}
    counts = Counter(record.responses[0].teacher for record in records)
    for name, share in zip("abc", shares, strict=True):
        assert counts[name] == stubs[name].prompts.total()
        assert abs(counts[name] - share) <= 4 * (share * (1 - share / 60)) ** 0.5  # four standard deviations


def test_fallback(tmp_path: Path, stubs: Stubs) -> None:
    stubs["a"].faults = always("filter")
    for record in records_of(tmp_path, stubs, 'strategy = "fallback"'):
        assert answers_of(record) == {"b": 1.0}
    assert [stub.prompts.total() for stub in stubs.values()] == [60, 60, 0]


def test_cascade(tmp_path: Path, stubs: Stubs) -> None:
    """The dear one is asked only where the cheap one's code does not parse."""
    hard = set(PROMPTS[::3])
    stubs["a"].faults = lambda prompt, number: "broken" if prompt in hard else ""
    for record in records_of(tmp_path, stubs, 'strategy = "cascade"'):
        assert answers_of(record) == ({"a": 0.0, "b": 1.0} if record.prompt in hard else {"a": 1.0})
    assert [stub.prompts.total() for stub in stubs.values()] == [60, 20, 0]


@pytest.mark.slow
def test_best_of_by_execution(tmp_path: Path, stubs: Stubs) -> None:
    stubs["a"].faults, stubs["c"].faults = always("crashes"), always("broken")
    for record in records_of(tmp_path, stubs, 'strategy = "best_of"', PROMPTS[:8]):
        assert answers_of(record) == {"a": 0.0, "b": 1.0, "c": 0.0}


def test_best_of_by_a_judge(tmp_path: Path, stubs: Stubs) -> None:
    """The judge sees both answers without their teachers' names, and answers nothing itself."""
    stubs["a"].faults, stubs["c"].faults = always("length"), always("judge")
    records = records_of(tmp_path, stubs, 'strategy = "best_of"\njudge = "c"', PROMPTS[:8])
    for record in records:
        assert sorted(answers_of(record)) == ["a", "b"]
        assert sorted(answers_of(record).values()) == [0.0, 1.0]
        (asked,) = [prompt for prompt in stubs["c"].prompts if record.prompt in prompt]
        best = max(record.responses, key=lambda response: response.weight)
        assert f'<answer number="2">\n{best.text}' in asked
    assert stubs["c"].prompts.total() == len(records) == 8
