"""The statistics add up, the page needs nothing else and escapes what it shows, and bad lines are named."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundry.__main__ import main as foundry
from foundry.stats import (
    MAX_BARS,
    Options,
    Stats,
    dollars,
    gather,
    histogram,
    median_bin,
    origin,
    rarest_joined,
    read_rejects,
    render,
)
from smelter.base.errors import UserError
from smelter.base.record import Record, Response, write_records
from tests.servers import ROOT

HOSTILE = '</title><script>alert("1")</script>\'{{ 77 * 999 }}&\u2028'


def answered(prompt: str, *responses: Response, source: str = "mine.txt:1", license: str = "unknown") -> Record:
    return Record(
        kind="instruct", prompt=prompt, responses=responses, language="python", source=source, license=license
    )


def response(teacher: str, text: str = "x" * 100, cost: float = 0.0, finish: str = "stop") -> Response:
    return Response(teacher=teacher, text=text, cost=cost, finish=finish, usage={"input": 5, "output": 10})


KEPT = [
    Record(kind="text", text="é" * 40, language="python", source="stdlib/ast.py", license="PSF-2.0", split="train"),
    answered("a" * 20, response("big/one", cost=0.25), response("small/two", "y" * 10, cost=0.01)),
    answered("b" * 20, response("big/one", cost=0.25, finish="length"), source="builtin/testing/4", license="MIT"),
]
DROPPED = [("fails", answered("c", response("small/two", "y" * 30, cost=0.01))), ("too short", KEPT[0])]


def reject_lines() -> list[str]:
    """Lines as `foundry clean` writes them."""
    return [
        json.dumps({"reason": reason, "detail": "line 3: no", "record": json.loads(record.to_json())})
        for reason, record in DROPPED
    ]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    write_records(tmp_path / "clean.jsonl", KEPT)
    (tmp_path / "clean.rejects.jsonl").write_text("\n".join(reject_lines()) + "\n", encoding="utf-8")
    return tmp_path / "clean.jsonl", tmp_path / "clean.rejects.jsonl"


class Page(HTMLParser):
    """Tags that are opened, their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in ("meta", "rect", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def test_counts_of_kept_and_dropped_add_up(files: tuple[Path, Path]) -> None:
    stats = gather(Options(records=(files[0],), rejects=files[1]))
    assert (stats.num_kept, stats.num_dropped, stats.num_records) == (3, 2, 5)
    assert stats.num_bytes == 80 + 20 + 100 + 10 + 20 + 100
    assert stats.cost == pytest.approx(0.52)
    assert stats.cost_per_kept == pytest.approx(0.52 / 3)
    assert stats.kinds == {"text": 1, "instruct": 2}
    assert stats.origins == {"stdlib": 1, "mine.txt": 1, "builtin: testing": 1}
    assert stats.licenses == {"PSF-2.0": 1, "unknown": 1, "MIT": 1}
    assert stats.splits == {"train": 1, "not decided": 2}
    assert stats.reasons == {"fails": 1, "too short": 1}
    big, small = stats.teachers["big/one"], stats.teachers["small/two"]
    assert (big.num_kept, big.num_dropped, big.kept_share) == (2, 0, 1.0)
    assert (small.num_kept, small.num_dropped, small.kept_share) == (1, 1, 0.5)
    assert small.mean_characters == 20
    assert small.cost_per_kept == pytest.approx(0.02), "the dropped answer is paid for by the kept one"
    assert small.num_output_tokens == 20
    assert big.finish == {"stop": 1, "length": 1}


def test_without_rejects_nothing_is_said_of_dropped_records(files: tuple[Path, Path]) -> None:
    stats = gather(Options(records=(files[0],)))
    assert (stats.num_kept, stats.num_dropped) == (3, 0)
    assert stats.cost == pytest.approx(0.51)
    assert "dropped" not in stats.table()
    assert "no rejects given" in render(stats, ["a"])
    assert "What was dropped" not in render(stats, ["a"])


def test_the_table_has_a_line_for_everything(files: tuple[Path, Path]) -> None:
    stats = gather(Options(records=(files[0],), rejects=files[1]))
    table = stats.table()
    assert re.search(r"^records +3 kept, 0\.00 MB; 2 dropped \(60\.0% of all kept\)$", table, re.MULTILINE)
    assert re.search(r"^cost +\$ +0\.5200, \$0\.173333 for each kept record$", table, re.MULTILINE)
    assert re.search(r"^from +1 +33\.3%  builtin: testing$", table, re.MULTILINE)
    assert re.search(r"^dropped +1 +50\.0%  fails$", table, re.MULTILINE)
    assert re.search(r"^prompts +2 +half have at least 16 characters$", table, re.MULTILINE)
    assert re.search(r"^big/one +2 +100\.0% +100 +0\.5000  1 stop, 1 length$", table, re.MULTILINE)
    assert re.search(r"^small/two +2 +50\.0% +20 +0\.0200  2 stop$", table, re.MULTILINE)


def test_the_page_is_complete_in_itself(files: tuple[Path, Path]) -> None:
    text = render(gather(Options(records=(files[0],), rejects=files[1])), ["data/clean.jsonl"])
    page = Page(text)
    assert not page.open
    assert not re.search(r"https?:|//|@import|url\(", text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {"src", "href", "srcset"} & {name for name, _ in page.attributes}
    assert "default-src 'none'" in text
    words = " ".join(" ".join(page.words).split())
    for part in ("What was dropped, and why", "Teacher against teacher", "big/one", "small/two", "$0.52", "PSF-2.0"):
        assert part in words
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_hostile_names_are_text_on_the_page_and_harmless_on_the_terminal() -> None:
    record = Record(
        kind="instruct",
        prompt="p",
        responses=(response(HOSTILE, finish=HOSTILE), response("\x1b[2Jtwo\nlines")),
        language=HOSTILE,
        source=HOSTILE,
        license=HOSTILE,
        meta={"kind": HOSTILE},
    )
    stats = Stats()
    stats.add(record)
    stats.add_reject(record, HOSTILE)
    page = Page(render(stats, [HOSTILE]))
    assert page.tags["script"] == 0
    assert page.tags["title"] == 1 + page.tags["rect"]
    assert not page.open
    assert "<script>" in "".join(page.words)
    assert "76923" not in "".join(page.words)
    assert all(not name.startswith("on") for name, _ in page.attributes)
    table = stats.table()
    assert "\x1b" not in table
    assert not any(line.startswith("lines") for line in table.splitlines())


def test_a_file_name_that_is_not_utf8_is_shown_as_well_as_it_can_be(files: tuple[Path, Path]) -> None:
    strange = files[0].with_name(os.fsdecode(b"cl\xe9an.jsonl"))
    files[0].rename(strange)
    page = strange.with_name("page.html")
    assert foundry(["stats", str(strange), "--html", str(page)]) == 0
    assert "cl\ufffdan.jsonl" in page.read_text(encoding="utf-8")


def test_rejects_may_hold_the_record_beside_the_reason_or_none_at_all(tmp_path: Path) -> None:
    record = json.loads(KEPT[1].to_json())
    lines = [{"reason": "a: detail", **record}, {"reason": "b", "record": {"kind": "?"}}, {"reason": "", "record": 3}]
    path = tmp_path / "rejects.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rejects = list(read_rejects(path))
    assert [reason for _, reason in rejects] == ["a", "b", "unknown"]
    assert rejects[0][0] == KEPT[1]
    assert [item for item, _ in rejects[1:]] == [None, None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON .*: give the rejects of foundry clean"),
        (b"\xff", "not JSON .*: give the rejects"),
        (b"[" * 100_000, "not JSON .*: give the rejects"),
        (b'{"record": {}}', 'no "reason": give the rejects of foundry clean'),
        (b"[]", 'no "reason"'),
    ],
)
def test_a_malformed_reject_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rejects.jsonl"
    path.write_bytes(reject_lines()[0].encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}:2: {message}"):
        list(read_rejects(path))


def test_the_command_prints_and_writes(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    page = files[0].parent / "new" / "page.html"
    assert foundry(["stats", str(files[0]), "--rejects", str(files[1]), "--html", str(page)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "3 kept" in output.out
    assert f"wrote {page}" in output.out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert foundry(["stats", str(files[0]), str(files[0])]) == 0
    assert "6 kept" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_names_that_a_terminal_has_no_letters_for(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "\u6f22.jsonl"
    write_records(path, [Record(kind="text", text="x", source="\u65e5\u672c/\u00e9.py", language="\u00e9\u6f22")])
    done = subprocess.run(
        [sys.executable, "-m", "foundry", "stats", str(path), "--html", str(tmp_path / "\u6f22.html")],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        cwd=ROOT,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    shown = "\u00e9\u6f22".encode(encoding, "backslashreplace")
    assert b"language           1 100.0%  " + shown in done.stdout
    assert (tmp_path / "\u6f22.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bad.jsonl"], r"bad\.jsonl:2: unknown key 'txt': did you mean 'text'"),
        (["none.jsonl"], r"none\.jsonl: No such file or directory: check the path"),
        (["empty.jsonl"], r"empty\.jsonl: no records: choose a file that holds some"),
        (["clean.jsonl", "--open"], r"--open without --html: say where the page is to be written"),
        (["clean.jsonl", "--rejects", "bad.jsonl"], r'bad\.jsonl:1: no "reason": give the rejects of foundry clean'),
        (["clean.jsonl", "--htm", "x"], r"--htm"),
        (["clean.jsonl", "--html", "."], r"\.: exists and is not a regular file"),
        ([], r"no file of records: give one, such as data/clean\.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    files: tuple[Path, Path],
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files[0].parent)
    Path("bad.jsonl").write_text('{"kind": "text", "text": "a"}\n{"kind": "text", "txt": "b"}\n', encoding="utf-8")
    Path("empty.jsonl").touch()
    assert foundry(["stats", *arguments]) == 2
    output = capsys.readouterr()
    assert re.search(message, output.err), output.err
    assert output.err.startswith("foundry stats: error: ")
    assert output.err.count("\n") == 1
    assert "wrote" not in output.out


@given(st.dictionaries(st.text(max_size=5), st.integers(1, 1_000), min_size=1, max_size=40))
def test_what_is_joined_still_adds_up(counts: dict[str, int]) -> None:
    joined = rarest_joined(Counter(counts))
    assert sum(joined.values()) == sum(counts.values())
    assert len(joined) <= MAX_BARS + 1
    shown = [joined[key] for key in joined if key in counts][:MAX_BARS]
    assert shown == sorted(counts.values(), reverse=True)[: len(shown)]


@given(st.dictionaries(st.integers(0, 30), st.integers(1, 1_000), min_size=1))
def test_a_histogram_stays_in_its_box_and_its_middle_in_the_data(counts: dict[int, int]) -> None:
    drawn = histogram(counts)
    assert len(drawn["columns"]) == max(counts) - min(counts) + 1
    for column in drawn["columns"]:
        assert 0 <= column["x"] <= column["x"] + column["width"] <= 100.01
        assert 0 <= column["height"] <= 100
    assert max(column["height"] for column in drawn["columns"]) == 100
    assert all(0 <= at <= 100 for at, _ in drawn["ticks"])
    middle = median_bin(counts)
    total = sum(counts.values())
    assert sum(count for key, count in counts.items() if key < middle) * 2 < total
    assert sum(count for key, count in counts.items() if key >= middle) * 2 >= total


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("stdlib/asyncio/tasks.py", "stdlib"),
        ("builtin/data structures/4", "builtin: data structures"),
        ("mine.txt:3", "mine.txt"),
        ("", "unknown"),
    ],
)
def test_origin_is_the_first_part(source: str, name: str) -> None:
    assert origin(source) == name


def test_amounts_have_the_digits_that_matter() -> None:
    amounts = [None, 0, 12.4, 1_234.5, 0.000512, 0.25]
    assert [dollars(amount) for amount in amounts] == [
        "none kept",
        "$0.00",
        "$12.40",
        "$1,234.50",
        "$0.000512",
        "$0.25",
    ]
