"""`foundry clean`, end to end: every record is kept or stands among the rejects with its reason."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foundry.__main__ import main
from smelter.base.record import Record, Response, read_records, write_records

SLUGIFY = '''import re


def slugify(title):
    """Turn a title into a part of an address."""
    words = re.findall(r"[a-z0-9]+", title.lower())
    return "-".join(words)
'''
MEDIAN = """def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
"""
KEY = "ghp_" + "a1B2c3D4e5F6" * 3
"""Looks like a token and is none."""


def text(code: str, **more: Any) -> Record:
    return Record(kind="text", text=code, **({"language": "python"} | more))


def answer(code: str, teacher: str = "a", **more: Any) -> Response:
    return Response(teacher=teacher, text=f"Here it is:\n\n```python\n{code}\n```\n", **more)


def instruct(prompt: str, *answers: Response, **more: Any) -> Record:
    return Record(kind="instruct", prompt=prompt, responses=answers, **({"language": "python"} | more))


def clean(folder: Path, records: list[Record], *options: str) -> tuple[list[Record], list[dict[str, Any]]]:
    """What `foundry clean` keeps and rejects."""
    write_records(folder / "in.jsonl", records)
    assert main(["clean", str(folder / "in.jsonl"), "--out", str(folder / "out.jsonl"), *options]) == 0
    lines = (folder / "out.rejects.jsonl").read_text(encoding="utf-8").splitlines()
    return list(read_records(folder / "out.jsonl")), [json.loads(line) for line in lines]


def reasons(rejects: list[dict[str, Any]]) -> list[str]:
    return [reject["reason"] for reject in rejects]


def test_good_records_stay_as_they_are_and_in_order(tmp_path: Path) -> None:
    records = [
        text(SLUGIFY, license="MIT", source="a/b.py", meta={"n": 1}),
        instruct("Write median.", answer(MEDIAN, finish="stop", cost=0.5), license="MIT"),
        text("def f(x):\n    return [x] * 31 + ['täglich']\n"),
    ]
    kept, rejects = clean(tmp_path, records)
    assert kept == records
    assert rejects == []


def test_code_that_began_with_a_byte_order_mark_parses(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"kind": "text", "text": "\ufeff" + SLUGIFY, "language": "python"}) + "\n")
    assert main(["clean", str(path), "--out", str(tmp_path / "out.jsonl")]) == 0
    assert [record.text for record in read_records(tmp_path / "out.jsonl")] == [SLUGIFY]


def test_each_bad_text_has_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {
        "length": text("x = 1\n"),
        "repetition": text("def f(x):\n    return x\n" + "    print('again and again')\n" * 60),
        "secret": text(f"TOKEN = '{KEY}'\n\n\ndef login():\n    return TOKEN\n"),
        "does not parse": text("def broken(:\n    return 1 + 2 + 3\n"),
        "exact duplicate": text(SLUGIFY.replace("\n\n\n", "\n")),
    }
    kept, rejects = clean(tmp_path, [text(SLUGIFY), *bad.values(), text(MEDIAN)])
    assert [record.text for record in kept] == [SLUGIFY, MEDIAN]
    shown = bad | {"secret": replace(bad["secret"], text=bad["secret"].text.replace(KEY, "<GitHub Token>"))}
    assert {reject["reason"]: Record(**reject["record"]) for reject in rejects} == shown
    assert all(reject["detail"] for reject in rejects)
    table = capsys.readouterr().out
    for reason in bad:
        assert any(line.split("  ")[1:] and line.strip().startswith(reason) for line in table.splitlines()), table


def test_no_secret_is_written_for_whatever_reason(tmp_path: Path) -> None:
    """Beside another reason, in a prompt, beside an answer that stays, in what nobody trains on."""
    records = [
        text(f"x = '{KEY}'\n"),  # too short
        text(f"def f(:\n    return '{KEY}'\n", license="Proprietary"),
        instruct(f"Log in with {KEY}.", answer(MEDIAN)),
        instruct("Write median.", answer(MEDIAN), answer(f"{SLUGIFY}\nKEY = '{KEY}'\n")),
        text(SLUGIFY, meta={"reasoning": ["so", f"the key is {KEY}, they say"]}),
    ]
    kept, rejects = clean(tmp_path, records, "--min-chars", "60", "--allow-license", "", "--allow-license", "MIT")
    assert [len(record.responses) for record in kept] == [1, 0]
    assert kept[1].meta == {"reasoning": ["so", "the key is <GitHub Token>, they say"]}
    assert reasons(rejects) == ["length", "licence", "secret", "secret"]
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert KEY in written.pop("in.jsonl")
    assert KEY not in "".join(written.values())
    # Who keeps secrets keeps them.
    kept, rejects = clean(tmp_path, records, "--no-secrets", "--min-chars", "0")
    assert KEY in "".join(record.text for record in kept)
    assert KEY in json.dumps(rejects)


def test_rejects_are_on_the_disk_before_the_kept_take_their_name(tmp_path: Path, disk_events: list[str]) -> None:
    write_records(tmp_path / "in.jsonl", [text(SLUGIFY), text("x\n")])
    disk_events.clear()
    assert main(["clean", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 0
    folder = tmp_path.name
    assert disk_events == ["~", "~", "-> out.jsonl", folder, "~", "-> out.rejects.jsonl", folder]


def test_a_bad_answer_goes_and_the_others_stay(tmp_path: Path) -> None:
    good, cut = answer(SLUGIFY, "a"), answer(SLUGIFY.upper(), "b", finish="length")
    broken = answer("def f(:\n    return 11111", "c")
    kept, rejects = clean(tmp_path, [instruct("Write slugify.", good, cut, broken), instruct("Write it.", cut, broken)])
    assert [record.responses for record in kept] == [(good,)]
    assert reasons(rejects) == ["not finished", "does not parse", "not finished"]
    assert [len(reject["record"]["responses"]) for reject in rejects] == [1, 1, 2]


def test_what_is_kept_has_the_first_of_its_like(tmp_path: Path) -> None:
    long = "".join(f"def step_{i}(state):\n    state.append({i} * {i + 7})\n    return state[{i}]\n" for i in range(40))
    near = long.replace("step_7(state)", "step_seven(state)")
    kept, rejects = clean(tmp_path, [text(long), text(near), text(near + "\n\n"), text(SLUGIFY)])
    assert [record.text for record in kept] == [long, SLUGIFY]
    # The copy of what was not kept is no duplicate of that, but is as near to what was.
    assert reasons(rejects) == ["near duplicate", "near duplicate"]
    assert all(reject["detail"].endswith(f"like {text(long).id}") for reject in rejects)
    between = [text(f"def number_{i}():\n    return {i}\n") for i in range(200)]  # another batch
    _, rejects = clean(tmp_path, [text(long), *between, text(near)])
    assert rejects[-1]["record"]["text"] == near
    kept, _ = clean(tmp_path, [text(long), text(near)], "--near-duplicates", "0")
    assert len(kept) == 2
    kept, _ = clean(tmp_path, [text(long), text(long + " ")], "--near-duplicates", "0", "--no-exact-duplicates")
    assert len(kept) == 2


def test_a_record_asked_again_is_kept_once(tmp_path: Path) -> None:
    first, again = (instruct("Write it.", answer(code), id="a" * 64) for code in (SLUGIFY, MEDIAN))
    kept, rejects = clean(tmp_path, [first, again])
    assert kept == [first]
    assert rejects[0]["detail"] == f"of {'a' * 64}, by its id"


RUNS = [
    ("passes", MEDIAN, "assert median([3, 1, 2]) == 2", ""),
    ("wrong", MEDIAN, "assert median([3, 1, 2]) == 3", "AssertionError"),
    ("raises", "raise ValueError('as it starts')", "", "ValueError: as it starts"),
    ("object", "class Thing: pass\nraise ValueError(Thing())", "", "ValueError: <__main__.Thing object at 0x...>"),
    ("alone", "print(sum(range(1000)))", "", ""),
    ("foreign", "import numpy_of_nobody as numpy", "", "ModuleNotFoundError: No module named 'numpy_of_nobody'"),
]


def test_programs_must_end_well(tmp_path: Path) -> None:
    answers = [instruct(f"Write {name}.", answer(code), meta={"tests": tests}) for name, code, tests, _ in RUNS]
    texts = [text(f"{code}\n# {name}\n", meta={"tests": tests}) for name, code, tests, _ in RUNS if tests]
    both = instruct("Write both.", answer(MEDIAN, "a"), answer("def median(v): return v[0]", "b"))
    both = Record(**(vars(both) | {"meta": {"tests": "assert median([3, 1, 2]) == 2"}}))
    options = ("--run", "--run-seconds", "60", "--near-duplicates", "0")  # what is asked here is the run alone
    kept, rejects = clean(tmp_path, [*answers, *texts, both], *options)
    good = [*(answers[i] for i, run in enumerate(RUNS) if not run[3]), texts[0]]
    assert kept[:-1] == good
    assert [item.teacher for item in kept[-1].responses] == ["a"]
    details = [run[3] for run in RUNS if run[3]] + [run[3] for run in RUNS if run[3] and run[2]] + ["AssertionError"]
    assert [reject["detail"] for reject in rejects] == details
    assert Counter(reasons(rejects)) == {"fails": len(details) - 1, "needs a package": 1}


def test_a_program_without_end_is_ended(tmp_path: Path) -> None:
    loop = "def f():\n    while True:\n        pass"
    records = [instruct("Write f.", answer(loop), meta={"tests": "f()"})]
    kept, rejects = clean(tmp_path, records, "--run", "--run-seconds", "1")
    assert kept == []
    assert [(reject["reason"], reject["detail"]) for reject in rejects] == [("fails", "limit met: timeout")]


def test_what_waits_for_a_busy_machine_is_no_loop(tmp_path: Path) -> None:
    """Time by the clock is not counted against a program before it is much more than its own."""
    records = [instruct("Wait.", answer("import time\n\n\ndef wait():\n    time.sleep(1.5)"), meta={"tests": "wait()"})]
    assert clean(tmp_path, records, "--run", "--run-seconds", "1")[0] == records


def test_only_python_runs_and_the_rest_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = Response(teacher="a", text="It prints:\n\n```python\n>>> 1 / 0\nTraceback ...\n```\n")
    words = Response(teacher="a", text="A list is a sequence that can be changed.")
    records = [
        instruct("Show an error.", session),
        instruct("What is a list?", words, language=""),
        text("puts 'a text in a language without grammar here'", language="cobol", meta={"tests": "x"}),
    ]
    kept, _ = clean(tmp_path, records, "--run")
    assert kept == records
    assert "not judged: no Python to run 3, cobol not parsed 1" in capsys.readouterr().out
    _, rejects = clean(tmp_path, [instruct("Write it.", session, meta={"tests": "assert True"})], "--run")
    assert rejects[0]["detail"] == "no code to test"


def test_unjudged_counts_only_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cobol = text("DISPLAY 'a text in a language without grammar here'", language="cobol")
    clean(tmp_path, [cobol, cobol])
    assert "not judged: cobol not parsed 1\n" in capsys.readouterr().out


def test_same_bytes_twice(tmp_path: Path) -> None:
    records = [text(f"def f_{i}(x):\n    return x ** {i} + {i % 13}\n") for i in range(150)]
    records += [instruct(f"Do {i}.", answer(f"class A: pass\nassert {i} % 3, A()")) for i in range(30)]
    first, rejected = clean(tmp_path, records, "--run", "--run-seconds", "60")
    outputs = [(tmp_path / name).read_bytes() for name in ("out.jsonl", "out.rejects.jsonl")]
    clean(tmp_path, records, "--run", "--run-seconds", "60")
    assert outputs == [(tmp_path / name).read_bytes() for name in ("out.jsonl", "out.rejects.jsonl")]
    place = {record.id: i for i, record in enumerate(records)}
    assert [place[record.id] for record in first] == sorted(place[record.id] for record in first)
    assert len(first) + len(rejected) == len(records)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.rejects.jsonl"]


def test_benchmarks_are_kept_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {
        "prompt": 'def mean_gap(values):\n    """Mean distance between neighbours of a sorted list of values."""\n',
        "canonical_solution": "    gaps = [b - a for a, b in zip(values, values[1:])]\n"
        "    return sum(gaps) / len(gaps)\n",
        "text": "Write a function that finds the mean gap between all neighbours of a sorted list of values.",
    }
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task) + "\n" + json.dumps({"text": "Add two numbers."}) + "\n")
    laid_out_anew = "def g(values):\n    gaps = [\n        b - a for a, b in zip(values, values[1:])]\n\n" + (
        "    # the mean\n    return sum(gaps)/len(gaps)\n"
    )
    records = [
        text(SLUGIFY),
        text(laid_out_anew),
        instruct(task["text"].upper(), answer(MEDIAN)),
        instruct("Do something.", answer(laid_out_anew)),
    ]
    kept, rejects = clean(tmp_path, records, "--benchmarks", str(tmp_path / "tasks.jsonl"))
    assert kept == records[:1]
    assert reasons(rejects) == ["in a benchmark"] * 3
    assert [reject["detail"] for reject in rejects] == [
        "a function of tasks.jsonl:1",
        "13 words of tasks.jsonl:1",
        "a function of tasks.jsonl:1",
    ]
    assert "benchmarks: tasks 2, too short to be found 1" in capsys.readouterr().out


def test_licences_and_terms(tmp_path: Path) -> None:
    records = [
        text(SLUGIFY, license="MIT"),
        text(MEDIAN, license="GPL-3.0-only"),
        text("def nothing():\n    return None\n"),
        instruct("Write it.", answer(MEDIAN, "a/b"), license="PSF-2.0", meta={"teacher_terms": {"c": "old"}}),
    ]
    options = ["--allow-license", "MIT", "--allow-license", "PSF-2.0", "--teacher-terms", "a/b=no rivals"]
    kept, rejects = clean(tmp_path, records, *options)
    assert [record.license for record in kept] == ["MIT", "PSF-2.0"]
    assert [record.meta for record in kept] == [{}, {"teacher_terms": {"c": "old", "a/b": "no rivals"}}]
    assert [(reject["reason"], reject["detail"]) for reject in rejects] == [
        ("licence", "GPL-3.0-only"),
        ("licence", "not given"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name the files"),
        (["in.jsonl", "--near-duplicates", "1.5"], "--near-duplicates = 1.5: must lie between 0 and 1"),
        (["in.jsonl", "--min-chars", "9", "--max-chars", "8"], "at most --max-chars"),
        (["in.jsonl", "--run-seconds", "nan"], "--run-seconds = nan: must be a finite number"),
        (["in.jsonl", "--teacher-terms", "=terms"], "must be TEACHER=TERMS"),
        (["in.jsonl", "--near-duplicate", "0.5"], "did you mean --near-duplicates"),
        (["missing.jsonl"], "missing.jsonl: No such file"),
        (["bad.jsonl"], "bad.jsonl:1: not JSON"),
        (["in.jsonl", "--out", "in.jsonl"], "is to be read and written"),
        (["in.jsonl", "--rejects", "data/../data/clean.jsonl"], "is the same file as --out"),
        (["in.jsonl", "--rejects", "/dev/null"], "not a regular file"),
        (["in.jsonl", "--out", "."], "not a regular file"),
        (["in.jsonl", "--benchmarks", "in.jsonl.gz"], "in.jsonl.gz:1: not JSON"),
        (["in.jsonl", "--benchmarks", "empty.jsonl"], "empty.jsonl: no task of 13 words"),
        (["tests.jsonl", "--run"], 'meta["tests"] must be Python source'),
        (["in.jsonl", "--run", "--run-memory-mb", "1" + "0" * 14], "did not begin: "),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_records("in.jsonl", [instruct("Write it.", answer(MEDIAN))])
    write_records("tests.jsonl", [text(SLUGIFY, meta={"tests": ["assert True"]})])
    Path("bad.jsonl").write_text("{")
    Path("empty.jsonl").write_text("\n")
    Path("in.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["clean", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    lines = [line for line in error.splitlines() if not line.startswith("sandbox: no bubblewrap")]
    assert len(lines) == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not any(path.is_file() for path in (tmp_path / "data").glob("*"))
    assert os.path.exists("/dev/null")


def test_an_error_leaves_both_outputs_of_before(tmp_path: Path) -> None:
    clean(tmp_path, [text(SLUGIFY), text("x")])
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    with open(tmp_path / "in.jsonl", "a", encoding="utf-8") as file:
        file.write(text(MEDIAN).to_json() + "\nnot json\n")
    assert main(["clean", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*out*")} == before


def test_outputs_among_the_inputs_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean(tmp_path, [text(SLUGIFY), text("x")])
    files = sorted(map(str, tmp_path.glob("*.jsonl")))
    assert main(["clean", *files, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert capsys.readouterr().err.count("left out") == 2
    assert [record.text for record in read_records(tmp_path / "out.jsonl")] == [SLUGIFY]
