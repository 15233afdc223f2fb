"""Records to documents: each file once, each record once, a bad line named or counted."""

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from smelter.base.errors import DataError
from smelter.tokens.documents import Records
from tests.tokens.test_shards import record, tokenize, write_lines


def test_folders_and_files_are_read_once(tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", [record(i) for i in range(40)])
    (tmp_path / "more").mkdir()
    write_lines(tmp_path / "more" / "b.jsonl", [record(i) for i in range(40, 50)])
    records = Records([tmp_path, corpus, tmp_path / "more"])
    assert len(list(records)) == 50
    assert [Path(file.name).name for file in records.files] == ["corpus.jsonl", "b.jsonl"]
    assert records.files[0].sha256 == hashlib.sha256(corpus.read_bytes()).hexdigest()


def test_without_ids_records_are_the_same_if_prompt_teachers_and_answers_are(tmp_path: Path) -> None:
    instruct = {"kind": "instruct", "prompt": "Is it?", "responses": [{"teacher": "a", "text": "yes"}]}
    other = instruct | {"responses": [{"teacher": "b", "text": "yes"}]}
    joined = {"kind": "text", "text": "Is it?\nyes"}
    path = write_lines(tmp_path / "r.jsonl", [instruct, other, joined])
    assert [document.teacher for document in Records([path])] == ["a", "b", ""]
    write_lines(path, [instruct, other, instruct])
    with pytest.raises(DataError, match=r"r\.jsonl:3: same id as .*r\.jsonl:1: remove one"):
        list(Records([path]))


BAD_LINES: dict[str, tuple[Any, str]] = {
    "cut": (b'{"kind": "text", "text": "a', "not JSON"),
    "two objects": (b"{} {}", "not JSON"),
    "blank": (b"", "an empty line"),
    "byte order mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "Latin-1": (b'{"kind": "text", "text": "caf\xe9"}', "not UTF-8 at byte 29"),
    "UTF-16": ('{"kind": "text", "text": "a"}'.encode("utf-16-le"), "not JSON"),
    "a list": ([1, 2], "not a JSON object"),
    "NaN": (b'{"kind": "text", "text": "a", "meta": {"x": NaN}}', "NaN is not JSON"),
    "key twice": (b'{"kind": "text", "text": "a", "text": "b"}', "'text' is given twice"),
    "too deep": (b'{"meta": ' + b"[" * 100_000, "nested too deeply"),
    "long number": (b'{"meta": ' + b"1" * 10_000 + b"}", "not usable JSON"),
    "half a surrogate pair": (b'{"kind": "text", "text": "a\\ud800"}', "half a surrogate pair at character 1"),
    "no kind": ({"text": "a"}, '"kind" is missing'),
    "unknown kind": (record(1, kind="chat"), "\"kind\" is 'chat'"),
    "unknown key": (record(1, licence="MIT"), "unknown key 'licence': did you mean 'license'"),
    "wrong type": (record(1, text=["a"]), "\"text\" is ['a']: must be a string"),
    "null": (b'{"kind": "text", "text": null}', '"text" is missing or empty'),
    "no text": (record(1, text=None), '"text" is missing or empty'),
    "empty text": (record(1, text=""), '"text" is missing or empty'),
    "text and prompt": (record(1, prompt="?"), '"prompt" does not belong'),
    "unknown split": (record(1, split="test"), "\"split\" is 'test'"),
    "no responses": ({"kind": "instruct", "prompt": "?"}, '"responses" is missing'),
    "odd response": ({"kind": "instruct", "prompt": "?", "responses": ["yes"]}, "responses[0]: 'yes' is not an object"),
    "nameless response": (
        {"kind": "instruct", "prompt": "?", "responses": [{"text": "a"}]},
        'responses[0]: "teacher" is missing',
    ),
    "response with unknown key": (
        {"kind": "instruct", "prompt": "?", "responses": [{"teacher": "t", "text": "a", "wieght": 1}]},
        "did you mean 'weight'",
    ),
    "negative weight": (
        {"kind": "instruct", "prompt": "?", "responses": [{"teacher": "t", "text": "a", "weight": -1}]},
        '"weight" is -1',
    ),
    "endless weight": (
        {"kind": "instruct", "prompt": "?", "responses": [{"teacher": "t", "text": "a", "weight": 10**400}]},
        '"weight" is 1000',
    ),
    "duplicate": (record(0, text="other"), "same id as"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_or_skipped_and_counted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, message = BAD_LINES[name]
    path = write_lines(tmp_path / "r.jsonl", [record(0), line, record(7)])
    assert tokenize(path, "--out", tmp_path / "s") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path}:2: " in error
    assert message in error
    assert not list(tmp_path.glob("*s*/")), "nothing half-made stays"
    assert tokenize(path, "--out", tmp_path / "s", "--vocab-size", 300, "--skip-invalid") == 0
    output = capsys.readouterr().out
    assert "2 records, 2 documents" in output
    assert "skipped 1: " in output
    assert f"{path}:2: " in output


def test_an_empty_file_is_named_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", [record(i) for i in range(40)])
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert tokenize(corpus, empty, "--out", tmp_path / "s") == 2
    assert f"{empty}: the file is empty" in capsys.readouterr().err
    assert tokenize(corpus, empty, "--out", tmp_path / "s", "--skip-invalid", "--vocab-size", 300) == 0
    assert tokenize(empty, "--out", tmp_path / "t", "--skip-invalid") == 2
    assert "no usable record" in capsys.readouterr().err


def test_a_long_line_takes_no_memory_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with path.open("wb") as file:
        file.write(b'{"kind": "text", "text": "')
        for _ in range(200):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + json.dumps(record(1)).encode() + b"\n")
    with pytest.raises(DataError, match=rf"^{path}:1: line longer than 4,194,304 bytes"):
        list(Records([path], max_line_bytes=2**22))
    tracemalloc.start()
    records = Records([path], max_line_bytes=2**22, skip_invalid=True)
    assert [document.source for document in records] == ["source1"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20
    assert records.skipped == {"line too long": 1}
    assert records.files[0].num_bytes == path.stat().st_size


def test_a_line_of_just_the_limit_is_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", [record(1)])
    size = path.stat().st_size - 1
    for content in (path.read_bytes(), path.read_bytes()[:-1]):
        path.write_bytes(content)
        assert len(list(Records([path], max_line_bytes=size))) == 1
        with pytest.raises(DataError, match="line longer"):
            list(Records([path], max_line_bytes=size - 1))
