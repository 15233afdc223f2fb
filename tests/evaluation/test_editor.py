"""`smelter evaluate --editor`: everybody is asked the same, every figure is in results.json and on the page."""

import json
from pathlib import Path

import pytest

from smelter.__main__ import main
from smelter.base import DataError
from smelter.evaluation.editor import choose_questions, judged, latency_of, word_rows
from smelter.evaluation.places import PLACE_KINDS
from smelter.evaluation.suggestions import Suggestion, ask
from smelter.run.results import read_results
from tests import tiny
from tests.evaluation.completion_stub import stub
from tests.servers import running
from tests.shards_of_pieces import make_shards

FEW = ["--editor", "--editor-places", "2", "--editor-lines", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


def test_who_knows_the_file_saves_nearly_everything() -> None:
    questions = choose_questions(1, lambda _: tiny.CODE, 8, 4)
    perfect = judged(questions, [Suggestion(place.missing, True) for place in questions.all])
    assert {kind: right.end for kind, right in perfect.places.items()} == dict.fromkeys(PLACE_KINDS, 1.0)
    assert perfect.typed.keys == 2 * 4, "a key that takes the line, and the line break"
    assert perfect.typed.characters == sum(len(line.missing) + 1 for line in questions.lines)
    silent = judged(questions, [Suggestion("", True) for _ in questions.all])
    assert {kind: right.first_character for kind, right in silent.places.items()} == dict.fromkeys(PLACE_KINDS, 0.0)
    assert silent.typed.saved == 0.0
    with pytest.raises(ValueError, match="shorter"):
        judged(questions, [Suggestion("", True) for _ in questions.all[1:]])


def test_the_buffers_words_save_something_and_a_menu_more() -> None:
    first, menu = word_rows(choose_questions(1, lambda _: tiny.CODE, 50, 30)).items()
    assert first[0] in ("Vim's Ctrl-N, first match", "Vim's Ctrl-P, first match")
    assert menu[0] in ("Vim's Ctrl-N, menu", "Vim's Ctrl-P, menu")
    assert 5 < first[1].typed.saved < menu[1].typed.saved < 60
    assert first[1].places["in_word"].word > first[1].places["word_start"].word


def test_no_code_no_questions() -> None:
    with pytest.raises(DataError, match="no line of code"):
        choose_questions(2, lambda _: "# x\n", 3, 3)


def test_latency() -> None:
    assert latency_of([Suggestion("", True)]) is None
    times = [Suggestion("", True, seconds / 1_000) for seconds in range(101)]
    latency = latency_of(times)
    assert latency is not None
    assert latency.median_ms == pytest.approx(50)
    assert latency.p95_ms == pytest.approx(95)
    assert latency.requests == 101


def test_unhealed_prompts_are_asked_otherwise() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    places = choose_questions(1, lambda _: tiny.CODE, 12, 1, characters=120).places["in_word"]
    healed = ask(model, tokenizer, places, "plain", characters=120)
    unhealed = ask(model, tokenizer, places, "plain", heal=False, characters=120)
    assert healed != unhealed
    psm = [ask(model, tokenizer, places, "psm", heal=heal, characters=120) for heal in (True, False)]
    assert psm[0] == psm[1], "prefix first there is nothing to heal"


def test_every_row_is_in_the_results_the_table_and_the_page(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smelter.evaluation.editor.TIMED_PLACES", 2)
    model = tiny.model()
    run = tiny.checkpoint(tmp_path / "run", model, shards=str(shards))
    with running(model=model) as (url, _):
        options = [*FEW, "--editor-characters", "100", "--max-infill", "0", "--url", f"ours={url}"]
        assert main(["evaluate", str(run), *options]) == 0
    out = capsys.readouterr().out
    editor = read_results(run / "results.json").editor
    assert editor is not None
    assert (editor.seed, editor.characters) == (0, 100)
    names = ["suffix first, healed", "prefix first", "no suffix, healed", "no suffix", "untrained", "ours (infill)"]
    assert list(editor.rows)[:6] == names
    assert [name[:9] for name in list(editor.rows)[6:]] == ["Vim's Ctr"] * 2
    for name in names:
        row = editor.rows[name]
        assert set(row.places) == set(PLACE_KINDS)
        assert {right.places for right in row.places.values()} == {1 if name == "untrained" else 2}
        assert row.latency is not None
        assert 0 < row.latency.median_ms <= row.latency.p95_ms
        assert name in out
    same = editor.rows["suffix first, healed"], editor.rows["ours (infill)"]
    assert same[0].places == same[1].places
    assert same[0].typed == same[1].typed
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    for words in ("At the cursor", "Keystrokes saved per 100", "ours (infill)", "inside a word"):
        assert words in page
    assert "saved per 100" in out
    assert "Editor(" not in page, "not as an object"
    assert main(["evaluate", "--compare", str(run / "results.json"), str(run / "results.json")]) == 0
    compared = capsys.readouterr().out
    assert "ours (infill): keys saved" in compared
    assert "word right inside a word" in compared


def test_servers_need_no_checkpoint(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with stub({"/v1/completions": (200, {"choices": [{"text": "x", "finish_reason": "stop"}]})}) as (server, _):
        options = [*FEW, "--shards", str(shards), "--url", f"one={server.url}", "--url", f"two={server.url}"]
        assert main(["evaluate", *options, "--url-kind", "plain", "--out", str(tmp_path / "e.json")]) == 0
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "e.json").read_text())["editor"]["rows"]
    assert list(rows)[:2] == ["one (plain)", "two (plain)"]
    assert rows["one (plain)"]["places"] == rows["two (plain)"]["places"]
    assert "two (plain)" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--url", "http://127.0.0.1:1"], "add --editor"),
        (["--editor", "--url", "http://127.0.0.1:1"], "give --shards"),
        (["--editor", "--url", "localhost:1", "--shards", "s"], "give [NAME=]URL[#MODEL]"),
        (["--editor", "--shards", "s", "--url", "a=http://b", "--url", "a=http://c"], "two servers are called a"),
        (["--editor", "--shards", "nowhere", "--url", "http://127.0.0.1:1"], "nowhere"),
        (["run", "--editor", "--editor-places", "0"], "--editor-places"),
        (["run", "--editor", "--editor-lines", "0"], "--editor-lines"),
        (["run", "--editor", "--editor-characters", "99"], "--editor-characters"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    assert main(["evaluate", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_server_that_is_not_there_is_known_before_anything_is_measured(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.checkpoint(tmp_path / "run", tiny.model(), shards=str(shards))
    assert main(["evaluate", str(run), *FEW, "--url", "http://127.0.0.1:1"]) == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:1: cannot connect" in error
    assert error.count("\n") == 1
