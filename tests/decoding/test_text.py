"""Text as it may be shown, and what ends it, however its bytes were cut into tokens."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelter.decoding.text import Text


def split(raw: bytes, sizes: list[int]) -> list[bytes]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(raw[start : start + size])
        start += size
    return [*pieces, raw[start:]]


def push(text: Text, raw: bytes) -> str:
    """What may be shown after these bytes."""
    return text.close() if text.push(raw) else text.show()


@given(
    st.text(st.sampled_from("ab\né漢🙂"), max_size=30),
    st.lists(st.text(st.sampled_from("ab\né漢"), min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), max_size=40),
)
def test_text_in_pieces_against_the_whole_text(whole: str, stops: list[str], sizes: list[int]) -> None:
    text, shown = Text(stops), ""
    where = [(at + len(stop), at) for stop in stops if (at := whole.find(stop)) >= 0]
    expected = whole[: min(where)[1]] if where else whole
    for piece in split(whole.encode(), sizes):
        if text.stop is not None:
            break
        shown += push(text, piece)
        assert expected.startswith(shown)
    shown += text.close()
    assert shown == expected
    assert (text.stop is not None) == bool(where)


def test_what_the_prompt_has_is_skipped() -> None:
    text = Text([" "], skip=3)
    assert [push(text, b"ab"), push(text, b"cde"), push(text, b"f g")] == ["", "de", "f"]
    assert text.stop == " "


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_a_pattern_matches_across_tokens(size: int) -> None:
    """And sees what the prompt has; until it matches, nothing is shown."""
    text = Text(["end", re.compile(rb"(?<=x)[ ]*\n")], skip=1)
    raw = b"x1 \n x  \n end"
    for start in range(0, len(raw), size):
        if text.push(raw[start : start + size]):
            break
        assert text.show() == ""
    assert (text.stop, text.close()) == ("  \n", "1 \n x")
    text = Text([re.compile(rb"(?<=x)\n")], skip=1)
    assert text.push(b"x\n")
    assert text.close() == ""


def test_stops_are_taken_literally() -> None:
    text = Text(["[DONE]", "", "a.c"])
    assert push(text, b"DONE abc ") == "DONE abc "
    assert push(text, b"a.c[DONE]") == ""
    assert text.stop == "a.c"


def test_invalid_bytes_are_shown_as_such() -> None:
    text = Text()
    assert push(text, b"a\xe6\xbc") == "a"
    assert push(text, b"b") == "\ufffdb"
    assert push(text, b"\xf0\x9f") + text.close() == "\ufffd"


def as_llama_server(whole: str, n_indent: int) -> str:
    """Its `process_token` (tools/server/server-context.cpp), byte by byte and so long that its delay is over."""
    text: str = ""
    last_line, has_new_line = 0, False
    for sign in [*whole, "", ""]:
        text += sign
        if has_new_line and last_line > 0:
            at = last_line
            while at < len(text) and text[at] in " \t":
                at += 1
            if at < len(text) and at - last_line < n_indent:
                return text[:at]
        if has_new_line and (at := text.find("\n", last_line)) >= 0:
            last_line = at + 1
        has_new_line = has_new_line or sign == "\n"
    return text


@given(st.text(st.sampled_from("a \t\n"), max_size=40), st.integers(1, 4), st.lists(st.integers(1, 5), max_size=40))
def test_a_line_indented_less_ends_the_text(whole: str, n_indent: int, sizes: list[int]) -> None:
    text, shown = Text(n_indent=n_indent), ""
    expected = as_llama_server(whole, n_indent)
    for piece in split(whole.encode(), sizes):
        if text.has_ended:
            break
        shown += push(text, piece)
        assert expected.startswith(shown)
    assert shown + text.close() == expected
    assert text.has_ended == (expected != whole)
    assert text.stop is None


def test_indentation_beside_stops_and_what_the_prompt_has() -> None:
    text = Text(["\n\n"], n_indent=4)  # complete at the same byte: the stop, which takes more with it
    assert text.push(b"a\n\nb")
    assert (text.close(), text.stop) == ("a", "\n\n")
    text = Text(["def"], n_indent=4)
    assert text.push(b"a\n  def")
    assert (text.close(), text.stop) == ("a\n  ", None)
    text = Text(skip=3, n_indent=10**9)
    assert push(text, b"\na") == push(text, b"b") == ""
    assert push(text, b"c\n" + b" " * 50) == "c\n" + " " * 50
    assert text.push(b"x")
