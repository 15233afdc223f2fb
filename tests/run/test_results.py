"""Results are read back as they were written, and a file that holds none is named with the key that is wrong."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from smelter.__main__ import main
from smelter.base.errors import DataError
from smelter.run.metrics import Sample
from smelter.run.results import (
    AtCursor,
    Case,
    DocumentCase,
    Editor,
    GapCase,
    GapsFilled,
    LanguageBits,
    Latency,
    LevelSolved,
    ProblemCase,
    Results,
    Solved,
    Suggester,
    Typed,
    cases_path,
    read_cases,
    read_results,
    write_results,
)
from tests import tiny

PROBLEMS = Solved(
    pass_at={1: 0.25, 10: 1.0},
    num_problems=2,
    num_completions=10,
    verdicts={"failed": 15, "passed": 5},
    by_difficulty={"1": LevelSolved({1: 0.5, 10: 1.0}, 1), "4": LevelSolved({1: 0.0, 10: 1.0}, 1)},
    temperature=0.8,
    max_tokens=256,
)
WHOLE = tiny.results(
    bpb_by_language={"python": LanguageBits(0.9, 7, 2)},
    infill={"single_line": GapsFilled(0.5, 0.75, 4, 64)},
    trits={"q_proj": {-1: 3, 0: 2, 1: 4}},
    samples=(Sample("é\n", "", "x", "y"),),
    pass_at_k={"own": PROBLEMS},
    infill_files={"gaps": replace(PROBLEMS, pass_at={1: 0.5}, exact_match=0.0, edit_similarity=0.5, by_difficulty={})},
    editor=Editor(
        {
            "a server": Suggester(
                {"in_word": AtCursor(0.5, 0.25, 0.0, 0.0, 4)}, Typed(20.0, 10, 8, 1), Latency(5, 9.5, 4)
            ),
            "a menu": Suggester({}, Typed(0.0, 10, 10, 1)),
        },
        seed=0,
        characters=1_000,
    ),
)
CASES: list[Case] = [
    DocumentCase("bits_per_byte", "0/a\u2028b", "c++", 12.5, 7),
    GapCase("infill/multi_line", "0/é/3+4", True, 1.0, "a\nb", "a\nb"),
    ProblemCase("pass_at_k/own", "X/1", 2, 1, ("passed", "failed"), ("x", "y")),
    ProblemCase("infill_files/gaps", "X/2", 1, 0, ("timeout",), ("",)),
]


def test_results_and_cases_are_read_back(tmp_path: Path) -> None:
    write_results(tmp_path / "x.json", WHOLE, CASES)
    assert read_results(tmp_path / "x.json") == WHOLE
    assert read_cases(tmp_path / "x.json") == CASES
    assert cases_path(tmp_path / "x.json").name == "x_cases.jsonl"
    cases_path(tmp_path / "x.json").unlink()
    assert read_cases(tmp_path / "x.json") == []


def test_the_file_for_other_programs(tmp_path: Path) -> None:
    write_results(tmp_path / "x.json", WHOLE, CASES)
    values = json.loads((tmp_path / "x.json").read_text())
    assert list(values) == [item.name for item in fields(Results)]
    assert values["trits"] == {"q_proj": {"-1": 3, "0": 2, "1": 4}}
    assert list(values["pass_at_k"]["own"]) == [
        *("pass@1", "pass@10", "num_problems", "num_completions", "verdicts", "by_difficulty"),
        *("temperature", "max_tokens"),
    ]
    assert values["pass_at_k"]["own"]["by_difficulty"]["4"] == {"pass@1": 0.0, "pass@10": 1.0, "num_problems": 1}
    assert values["infill_files"]["gaps"]["exact_match"] == 0.0
    assert values["editor"]["rows"]["a server"]["typed"] == {"saved": 20.0, "characters": 10, "keys": 8, "lines": 1}
    assert "latency" not in values["editor"]["rows"]["a menu"]
    lines = [json.loads(line) for line in cases_path(tmp_path / "x.json").read_text().split("\n")[:-1]]
    assert lines[2] == {
        "measure": "pass_at_k/own",
        "case": "X/1",
        "num_completions": 2,
        "num_passed": 1,
        "verdicts": ["passed", "failed"],
        "completions": ["x", "y"],
    }
    # What was not asked for has no key; what could not be known is null.
    write_results(tmp_path / "y.json", tiny.results(train_seconds=None), [])
    values = json.loads((tmp_path / "y.json").read_text())
    assert not {"pass_at_k", "infill_files"} & set(values)
    assert values["train_seconds"] is None
    # Specified names.
    assert {
        *("val_bpb", "gzip_bpb", "xz_bpb", "xz_joined_bpb", "infill_exact_match", "infill_cases"),
        *("train_seconds", "train_tokens", "num_params"),
    } <= set(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"val_bpb": None}, "val_bpb = None: must be a number"),
        ({"val_bpb": "1"}, "val_bpb = '1': must be a number"),
        ({"step": 1.5}, "step = 1.5: must be a whole number"),
        ({"step": True}, "step = True"),
        ({"val_bbp": 1.0}, "unknown key 'val_bbp': did you mean 'val_bpb'?"),
        ({"infill": {"single_line": {"exact_match": 1}}}, "[infill]: [single_line]: edit_similarity is missing"),
        ({"trits": {"q_proj": {"-1": "x"}}}, "[trits]: [q_proj]: -1 = 'x'"),
        ({"samples": [{"prefix": 3}]}, "[[samples]] number 1: suffix is missing"),
        ({"pass_at_k": {"own": {"pass@1": "x"}}}, "[pass_at_k]: [own]: num_problems is missing"),
        ({"pass_at_k": []}, "pass_at_k = []: must be a table"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "r.json"
    write_results(path, WHOLE, CASES)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="evaluate again") as caught:
        read_results(path)
    assert str(caught.value).startswith(f"{path}: {words}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "damaged"),
        (b"[]", "must be a table"),
        (b'{"a": 1}', "checkpoint is missing"),
        (b"\xff{", "utf-8"),
        (None, "No such"),
    ],
)
def test_a_file_that_is_no_result_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, words: str
) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_bytes(content)
    assert main(["evaluate", "--compare", str(path), str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"measure": "infill/x", "case": "1"}', '{"measure": "other", "case": "1"}']
)
def test_a_damaged_case_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    write_results(tmp_path / "r.json", WHOLE, CASES)
    path = cases_path(tmp_path / "r.json")
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match=r"r_cases\.jsonl:5.* evaluate again"):
        read_cases(tmp_path / "r.json")
