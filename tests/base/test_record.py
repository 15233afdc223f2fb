"""The record: what is written is read back, and every mistake is named with file, line and fix."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelter.base.errors import UserError
from smelter.base.record import (
    InputFile,
    Record,
    RecordError,
    RecordReader,
    Response,
    content_id,
    read_records,
    write_records,
)
from smelter.tokens.documents import Records

TEXT = {"kind": "text", "text": "x = 1\n"}
ANSWER = {"teacher": "human", "text": "4"}
INSTRUCT = {"kind": "instruct", "prompt": "2 + 2?", "responses": [ANSWER]}

plain_text = st.text(st.characters(exclude_categories=["Cs"]))
filled_text = plain_text.filter(bool)
responses = st.builds(
    Response,
    teacher=filled_text,
    text=plain_text,
    weight=st.floats(0, 1e9),
    finish=plain_text,
    usage=st.dictionaries(plain_text, st.integers(0, 10**9)),
    cost=st.floats(0, 1e3),
)
meta = st.dictionaries(plain_text, st.none() | st.booleans() | st.integers() | plain_text | st.lists(plain_text))
common = {
    "language": plain_text,
    "source": plain_text,
    "license": plain_text,
    "split": st.sampled_from(["", "train", "val"]),
    "meta": meta,
}
records = st.builds(Record, kind=st.just("text"), text=filled_text, **common) | st.builds(
    Record,
    kind=st.just("instruct"),
    prompt=filled_text,
    responses=st.lists(responses, min_size=1, max_size=3).map(tuple),
    **common,
)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    marked = Record(kind="text", text="\ufeffimport os\n")
    assert marked == Record(kind="text", text="import os\n")
    inside = Record(kind="text", text="a = '\ufeff'\n")
    assert inside.text == "a = '\ufeff'\n"
    answer = Response(teacher="t", text="\ufeffx = 1")
    asked = Record(kind="instruct", prompt="\ufeffWrite.", responses=(answer,))
    assert (asked.prompt, asked.responses[0].text) == ("Write.", "x = 1")
    with pytest.raises(RecordError, match='"text" is missing or empty'):
        Record(kind="text", text="\ufeff")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"kind": "text", "text": "\ufeffimport os\n"}) + "\n")
    assert list(read_records(path)) == [marked]


@given(records)
def test_json_gives_back_the_record(record: Record) -> None:
    line = record.to_json()
    assert "\n" not in line
    assert Record.from_json(line.encode()) == record
    assert set(json.loads(line)) >= {"id", "kind"}


@given(st.lists(records, max_size=5))
def test_file_gives_back_the_records(tmp_path_factory: pytest.TempPathFactory, written: list[Record]) -> None:
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    assert write_records(path, written) == len(written)
    assert list(read_records(path)) == written


@given(st.lists(records, max_size=5, unique_by=lambda record: record.id))
def test_smelter_reads_what_foundry_writes(tmp_path_factory: pytest.TempPathFactory, written: list[Record]) -> None:
    path = tmp_path_factory.mktemp("records") / "r.jsonl"
    write_records(path, written)
    texts = []
    for record in written:
        texts += (
            [record.text]
            if record.kind == "text"
            else [f"{record.prompt}\n{r.text}" for r in record.responses if r.weight > 0 and r.text]
        )
    if written:
        documents = Records([path])
        assert [document.content for document in documents] == texts


def test_null_is_not_given() -> None:
    assert Record.from_values(TEXT | {"split": None, "meta": None}) == Record(kind="text", text="x = 1\n")


def test_text_id_is_the_sha256_of_the_text() -> None:
    record = Record(kind="text", text="naïve = 1\n", source="a.py")
    assert record.id == hashlib.sha256("naïve = 1\n".encode()).hexdigest()
    assert record.id == Record(kind="text", text="naïve = 1\n", source="elsewhere.py").id


def test_content_id_keeps_parts_apart() -> None:
    assert content_id("ab", "c") != content_id("a", "bc")
    assert content_id("a", "") != content_id("a")


def test_a_given_id_stays() -> None:
    assert Record.from_values(INSTRUCT | {"id": "a" * 64}).id == "a" * 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (TEXT | {"licence": "MIT"}, "unknown key 'licence': did you mean 'license'?"),
        (TEXT | {"zzz": 1}, "unknown key 'zzz': known: id, kind"),
        ({"text": "x"}, '"kind" is missing'),
        (TEXT | {"kind": "code"}, 'must be "text" or "instruct"'),
        (TEXT | {"text": ""}, '"text" is missing or empty'),
        (TEXT | {"text": None}, '"text" is missing or empty'),
        (TEXT | {"text": 7}, '"text" is 7: must be a string'),
        (TEXT | {"prompt": "p"}, '"prompt" does not belong in a record of kind "text"'),
        (TEXT | {"split": "test"}, '"split" is \'test\': must be "train" or "val"'),
        (TEXT | {"id": "12"}, "must be the 64 hexadecimal digits"),
        (TEXT | {"id": "A" * 64}, "must be the 64 hexadecimal digits"),
        (TEXT | {"meta": []}, '"meta" is []: must be an object'),
        (TEXT | {"text": "a\ud800"}, "half a surrogate pair at character 1"),
        (INSTRUCT | {"responses": []}, '"responses" is missing or empty'),
        (INSTRUCT | {"responses": ANSWER}, "must be a list of objects"),
        (INSTRUCT | {"responses": ["4"]}, "responses[0]: '4' is not an object"),
        (INSTRUCT | {"responses": [ANSWER, {"text": "4"}]}, 'responses[1]: "teacher" is missing'),
        (INSTRUCT | {"responses": [ANSWER | {"wieght": 1}]}, "did you mean 'weight'?"),
        (
            INSTRUCT | {"responses": [ANSWER | {"weight": -1}]},
            'responses[0]: "weight" is -1.0: must lie between 0 and 1,000,000,000',
        ),
        (INSTRUCT | {"responses": [ANSWER | {"weight": True}]}, '"weight" is True: must be a number'),
        (INSTRUCT | {"responses": [ANSWER | {"usage": {"in": 1.5}}]}, "must be a count of tokens"),
        (INSTRUCT | {"responses": [ANSWER | {"teacher": ""}]}, '"teacher" is empty'),
        (INSTRUCT | {"responses": [ANSWER | {"weight": 1e10}]}, '"weight" is 10000000000.0: must lie between 0 and'),
        (INSTRUCT | {"responses": [ANSWER | {"cost": 10**400}]}, '"cost" is 1000000'),
        (INSTRUCT | {"prompt": ""}, '"prompt" is missing or empty'),
        (INSTRUCT | {"text": "t"}, '"text" does not belong in a record of kind "instruct"'),
        ([], "[] is not a JSON object"),
    ],
)
def test_a_wrong_record_is_named_with_file_and_line(tmp_path: Path, values: Any, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(TEXT) + "\n" + json.dumps(values) + "\n")
    with pytest.raises(RecordError) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\n", "an empty line"),
        (b'{"kind": "text"\n', "not JSON"),
        (b'\xef\xbb\xbf{"kind": "text", "text": "x"}\n', "not JSON: begins with a byte order mark"),
        (b'{"kind": "text", "text": "caf\xe9"}\n', "not UTF-8 at byte 29"),
        (b'{"kind": "text", "text": "a", "text": "b"}\n', "key 'text' is given twice"),
        (b'{"kind": "text", "text": "a", "meta": {"x": NaN}}\n', "NaN is not JSON"),
        (b'{"kind": "text", "text": "a", "meta": {"x": ' + b"9" * 5_000 + b"}}\n", "not usable JSON"),
        (b'{"kind": "text", "text": "a", "meta": {"x": -1e999}}\n', "'-1e999' is larger than any float"),
        (b"[" * 200_000 + b"\n", "nested too deeply"),
        ('{"kind": "text", "text": "x"}\n'.encode("utf-16-le"), "not "),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(line)
    with pytest.raises(RecordError, match=message):
        list(read_records(path))


def test_skipping_tells_each_line_and_why(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(["{}", json.dumps(TEXT), "nonsense"]))
    skipped: list[RecordError] = []
    reader = RecordReader(path, on_error=skipped.append)
    assert [(record.text, reader.place) for record in reader] == [("x = 1\n", f"{path}:2")]
    assert [str(error).split(": ")[0] for error in skipped] == [f"{path}:1", f"{path}:3"]
    assert [error.reason for error in skipped] == ["wrong field", "not JSON"]
    assert reader.line_number == 3
    raw = path.read_bytes()
    assert reader.input_file == InputFile(str(path), len(raw), hashlib.sha256(raw).hexdigest())


def test_the_longest_line_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    line = json.dumps(TEXT)
    path.write_text(line + "\n" + line + " \n" + line)
    skipped: list[RecordError] = []
    reader = RecordReader(path, on_error=skipped.append, max_line_bytes=len(line))
    assert len(list(reader)) == 2
    assert [(error.reason, str(error)) for error in skipped] == [
        ("line too long", f"{path}:2: line longer than {len(line)} bytes: split the document")
    ]
    assert (reader.line_number, reader.input_file.num_bytes) == (3, path.stat().st_size)
    with pytest.raises(RecordError, match=rf":2: line longer than {len(line)} bytes"):
        list(RecordReader(path, max_line_bytes=len(line)))


FOREIGN = [
    TEXT | {"id": "bisect.py"},
    TEXT | {"id": "A" * 64},
    INSTRUCT | {"responses": [ANSWER | {"teacher": ""}]},
    INSTRUCT | {"responses": [ANSWER | {"usage": {"prompt_tokens": 3, "details": {"cached": 1}}}]},
    INSTRUCT | {"responses": [ANSWER | {"usage": {"output": -1}}]},
    INSTRUCT | {"responses": [ANSWER | {"cost": -1}]},
]


@pytest.mark.parametrize("values", FOREIGN)
def test_a_record_from_elsewhere_can_be_trained_on_but_is_none_of_foundry_s(tmp_path: Path, values: Any) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(values))
    assert len(list(Records([path]))) == 1
    with pytest.raises(RecordError, match=r"r\.jsonl:1: "):
        list(read_records(path))
    with pytest.raises(RecordError):
        write_records(tmp_path / "out.jsonl", RecordReader(path))
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_surrogate_pair_in_meta_comes_back(tmp_path: Path) -> None:
    """It is no text to train on, but nothing else than a JSON string: written as JSON escapes it."""
    path = tmp_path / "r.jsonl"
    record = Record.from_values(TEXT | {"meta": {"\udc80": "\\\ud800", "é": "漢🙂"}})
    write_records(path, [record])
    assert list(read_records(path)) == [record]


def test_the_deepest_meta_that_is_read_is_written(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"kind": "text", "text": "x", "meta": {"x": ' + "[" * 400 + "]" * 400 + "}}")
    (record,) = read_records(path)
    write_records(path, [record])
    assert list(read_records(path)) == [record]


@pytest.mark.slow
def test_an_endless_line_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with path.open("wb") as file:
        file.truncate(2**30)  # a gigabyte of NULs that takes no disk
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + json.dumps(TEXT).encode())
    code = (
        "import sys; from smelter.base.record import RecordReader\n"
        "print([record.text for record in RecordReader(sys.argv[1], on_error=lambda error: None)])\n"
        # Not ru_maxrss: a new process inherits that from the one that started it.
        "print(next(int(line.split()[1]) // 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    texts, mebibytes = run.stdout.splitlines()
    assert texts == "['x = 1\\n']"
    assert int(mebibytes) < 400


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("precious")

    def failing() -> Any:
        yield Record(kind="text", text="new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(path, failing())
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_alone(tmp_path: Path) -> None:
    """A file-size limit is as good as a full disk: the write fails in the middle."""
    path = tmp_path / "r.jsonl"
    path.write_text("precious")
    code = (
        "import resource, signal, sys; from smelter.base.record import Record, write_records\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_records(sys.argv[1], [Record(kind='text', text='x' * 100_000)])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "File too large" in run.stderr
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_writing_follows_a_link_and_refuses_a_device(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "real" / "r.jsonl")
    write_records(link, [Record(kind="text", text="x")])
    assert link.is_symlink()
    assert (tmp_path / "real" / "r.jsonl").is_file()
    with pytest.raises(UserError, match="not a regular file"):
        write_records("/dev/null", [])
    with pytest.raises(UserError, match="not a regular file"):
        write_records(tmp_path, [])
