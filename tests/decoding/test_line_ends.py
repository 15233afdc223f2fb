"""A file with CRLF is shown to the model with LF, and what is written into it has CRLF again."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelter.__main__ import main
from smelter.decoding.generate import Prompt, complete_many
from smelter.decoding.line_ends import CRLF, LF, LineEnds, line_end_of, to_lf
from smelter.decoding.prompts import FimOrder, make_prompt
from smelter.decoding.sentinels import read_prompt
from smelter.decoding.text import Stop, Text
from smelter.evaluation.places import Place
from smelter.evaluation.suggestions import Asked, request_at
from tests import tiny

PREFIX, SUFFIX = "import os\n\n\ndef f(x):\n    y = os.pa", "\n    return y\n"
WRITES_LINES = "import os\n"
"""After which the tiny model, with seed 2 and temperature 1, writes line breaks, also in pairs."""


def crlf(text: str) -> str:
    return text.replace(LF, CRLF)


def test_the_files_line_end_is_that_of_most_lines() -> None:
    assert line_end_of("a\r\nb\r\n", "c\n") == CRLF
    assert line_end_of("a\r\nb\n") == line_end_of("a") == line_end_of() == line_end_of("\r", "x\n") == LF
    assert to_lf("a\r\nb\nc\rd\r\n") == "a\nb\nc\rd\n"


@given(st.lists(st.text(st.sampled_from("a\r\né"), max_size=4), max_size=8))
def test_line_ends_do_not_depend_on_the_cuts(parts: list[str]) -> None:
    whole = "".join(parts).encode()
    ends, same = LineEnds(CRLF), LineEnds(LF)
    assert b"".join(ends.give(part.encode()) for part in parts) == re.sub(rb"\r?\n", b"\r\n", whole)
    assert b"".join(same.give(part.encode()) for part in parts) == whole


@pytest.mark.parametrize("order", ["spm", "psm"])
@pytest.mark.parametrize("suffix", [None, SUFFIX])
def test_the_model_is_shown_lf(suffix: str | None, order: FimOrder) -> None:
    tokens, extra = tiny.tokenizer(), ("a = 1\nb = 2\n",)
    own = make_prompt(tokens, 96, PREFIX, suffix, max_tokens=8, order=order, extra=extra)
    crlf_suffix = None if suffix is None else crlf(suffix)
    theirs = make_prompt(tokens, 96, crlf(PREFIX), crlf_suffix, max_tokens=8, order=order, extra=(crlf(extra[0]),))
    assert (theirs.ids, theirs.pending, theirs.num_tokens) == (own.ids, own.pending, own.num_tokens)
    assert (own.line_end, theirs.line_end) == (LF, CRLF)


def test_a_prompt_with_its_own_sentinels_too() -> None:
    text = f"<|fim_prefix|>{PREFIX}<|fim_suffix|>{SUFFIX}<|fim_middle|>"
    own, theirs = (read_prompt(tiny.tokenizer(), 96, prompt, max_tokens=8) for prompt in (text, crlf(text)))
    assert (theirs.ids, theirs.line_end) == (own.ids, CRLF)


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("stop", ["\r\n\r\n", "\n\n", "b\r\n", re.compile(rb"\nc")])
def test_stops_are_met_whichever_line_ends_they_have(stop: Stop, size: int) -> None:
    text, raw, shown = Text([stop], line_end=CRLF), b"a\nb\n\ncd", ""
    for start in range(0, len(raw), size):
        if text.push(raw[start : start + size]):
            break
        shown += text.show()
    own = to_lf(stop) if isinstance(stop, str) else "\nc"
    assert shown + text.close() == crlf(raw.decode().partition(own)[0])
    assert text.stop == (stop if isinstance(stop, str) else "\nc")


def test_answers_have_the_files_line_ends() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompts = [Prompt(WRITES_LINES), Prompt(crlf(WRITES_LINES))]
    one, two = (
        complete_many(model, tokenizer, [prompt], max_tokens=40, temperature=1.0, seed=2)[0] for prompt in prompts
    )
    assert one.count(LF) > 3
    assert two == crlf(one)


def test_complete_writes_them(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run = str(tiny.checkpoint(tmp_path / "run", tiny.model()))
    options = ["--max-tokens", "40", "--temperature", "1", "--seed", "2", "--device", "cpu"]
    written = []
    for prompt in (WRITES_LINES, crlf(WRITES_LINES)):
        assert main(["complete", run, "--prompt", prompt, *options]) == 0
        written.append(capfdbinary.readouterr().out)
    assert written[0].count(b"\n") > 3
    assert written[1] == written[0].replace(b"\n", b"\r\n")


@pytest.mark.parametrize("asked", ["spm", "psm", "plain"])
def test_places_in_held_out_code_are_asked_with_lf(asked: Asked) -> None:
    requests = []
    for text in (tiny.CODE[:600], crlf(tiny.CODE[:600])):
        at = text.index("import re") + 4
        requests.append(request_at(tiny.tokenizer(), 96, Place(0, text, at, at + 5), asked))
    assert requests[0].ids == requests[1].ids
    assert [request.line_end for request in requests] == [LF, CRLF]
