"""What clients of llama-server send, put to the real one and to `smelter serve` with the same model."""

import re
from collections.abc import Iterator

import pytest

from tests.serving.beside import ask, both
from tests.serving.rows import CODE, EXTRA, GREEDY, HELLO, LACKING, ROWS

pytestmark = [pytest.mark.slow, pytest.mark.real]


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    with both(tmp_path_factory.mktemp("both")) as urls:
        yield urls


@pytest.mark.parametrize("name", ROWS)
def test_the_same(urls: tuple[str, str], name: str) -> None:
    row = ROWS[name]
    ours, theirs = (ask(url, row.route, row.body) for url in urls)
    assert ours.status == row.status, ours.raw
    assert theirs.status == (row.theirs_status or row.status), theirs.raw
    assert row.why or not (row.ours or row.theirs or row.theirs_status), "what differs is explained"
    assert {path: ours.at(path) for path in row.same} == {path: theirs.at(path) for path in row.same}
    assert {path: ours.at(path) for path in row.ours} == row.ours
    assert {path: theirs.at(path) for path in row.theirs} == row.theirs
    if ours.status == theirs.status == 200 and not isinstance(ours.json, list):
        assert theirs.json.keys() - ours.json.keys() <= LACKING, "keys of theirs that ours does not have"


@pytest.mark.parametrize("name", ["a line that is indented less", "stop as a text", "stop as a list"])
def test_these_rows_end_early(urls: tuple[str, str], name: str) -> None:
    body = ROWS[name].body
    assert all(0 < ask(url, "POST /completion", body).at("tokens_predicted") < body["n_predict"] for url in urls)


def test_out_of_time_an_answer_ends_with_its_line(urls: tuple[str, str]) -> None:
    for url in urls:
        answer = ask(url, "POST /completion", {"prompt": CODE, "n_predict": 400, "t_max_predict_ms": 1, **GREEDY})
        assert answer.at("content").endswith("\n"), (url, answer.raw)
        assert answer.at("tokens_predicted") < 200
        assert (answer.at("stop_type"), answer.at("has_new_line")) == ("limit", True)


def test_the_infill_sampler_ends_early(urls: tuple[str, str]) -> None:
    """As llama.vim samples: 20 seeds at temperature 1, with it and without; seeds draw otherwise in either."""

    def texts(url: str, *samplers: str) -> dict[str, int]:
        body = {"prompt": CODE, "n_predict": 32, "temperature": 1, "samplers": ["top_k", "top_p", *samplers]}
        answers = [ask(url, "POST /completion", body | {"seed": i}) for i in range(20)]
        return {answer.at("content"): answer.at("tokens_predicted") for answer in answers}

    for url in urls:
        plain = texts(url)
        assert len(plain) == 20
        assert set(plain.values()) == {32}
    ours, theirs = (texts(url, "infill") for url in urls)
    assert max(len(ours), len(theirs)) <= 8, "few tokens are likely enough to be drawn"
    assert min(ours.values()) < 8
    assert ours.keys() & theirs.keys(), (ours, theirs)


FORMS = {
    "none": {},
    "a form's, as of curl -d": {"Content-Type": "application/x-www-form-urlencoded"},
    "text": {"Content-Type": "text/plain"},
}


@pytest.mark.parametrize("name", FORMS)
def test_a_body_of_any_content_type_is_json(urls: tuple[str, str], name: str) -> None:
    body = b'{"prompt":"import re\\n","n_predict":4,"temperature":0}'
    answers = [ask(url, "POST /completion", body, **FORMS[name]) for url in urls]
    assert [answer.status for answer in answers] == [200, 200]
    assert answers[0].at("content") == answers[1].at("content")


def test_answers_are_compact(urls: tuple[str, str]) -> None:
    """llama.vim looks for `"content"\\s*:"` in the bytes: after a space it sees no suggestion."""
    bodies = {
        "POST /infill": {"input_prefix": CODE, "input_suffix": "", "n_predict": 3},
        "POST /completion": {"prompt": CODE, "n_predict": 3, "n_cmpl": 2},
        "POST /v1/chat/completions": {"messages": HELLO, "max_tokens": 3},
    }
    for url in urls:
        for route, body in bodies.items():
            for stream in (False, True):
                raw = ask(url, route, body | GREEDY | {"stream": stream}).raw
                assert re.search(rb'"content"\s*:"', raw), (url, route, raw)
                assert b'": ' not in raw, (url, route, raw)


def test_streams_spell_what_the_whole_is(urls: tuple[str, str]) -> None:
    body = {"prompt": [CODE, "a\n"], "n_predict": 8, "n_cmpl": 2, **GREEDY}
    for url in urls:
        whole = ask(url, "POST /completion", body).json
        texts = [""] * 4
        for event in ask(url, "POST /completion", body | {"stream": True}).events():
            texts[event["index"]] += event["content"]
        assert texts == [answer["content"] for answer in whole]


def test_files_that_are_sent_ahead_are_not_read_again(urls: tuple[str, str]) -> None:
    """As llama.vim warms its ring: the other files alone, and nothing to write."""
    ahead = {"input_prefix": "", "input_suffix": "", "prompt": "", "n_predict": 0, "samplers": [], "input_extra": EXTRA}
    asked = {"input_prefix": CODE, "input_suffix": "\n", "prompt": "    def ", "n_predict": 4, "input_extra": EXTRA}
    for url in urls:
        assert ask(url, "POST /infill", ahead | {"t_max_predict_ms": 1, "response_fields": [""]}).json == {}
        assert ask(url, "POST /infill", asked | GREEDY).at("timings/cache_n") > 100, url
