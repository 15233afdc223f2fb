"""Answers compared, and outputs: as SAFIM's judge does it, which its published solutions need."""

import pytest

from smelter.evaluation.answers import is_accepted, is_same_code, is_same_text


@pytest.mark.parametrize(
    ("printed", "accepted", "expected"),
    [
        ("YES\n", ["Yes"], True),
        ("no yes\nTrue", ["No\nYES\nTRUE"], True),
        ("MAYBE", ["maybe"], False),
        ("Yes", ["No", "y es"], False),
        ("0.5", ["0.500000000000", "0.6"], True),
        ("0.3333333333333333", ["0.33333333333333337"], True),
        ("0.333333333", ["0.333333334"], False),
        ("1", ["1.0000000000011"], False),
        ("1e3 -2", ["1000 -2.0"], True),
        ("123456789012345678901234567890123456789012345", ["123456789012345678901234567890123456789012346"], False),
        ("1e999999", ["1"], False),
        ("12345e999999", ["1"], False),
        ("1_0", ["10"], False),
        ("nan", ["1"], False),
        ("NaN", ["NaN"], True),
        ("1 2", ["1"], False),
        ("", [""], True),
        ("1\n", [], False),
        ("\u0661", ["1"], False),
    ],
)
def test_outputs(printed: str, accepted: list[str], expected: bool) -> None:
    assert is_accepted(printed, accepted) == expected


@pytest.mark.parametrize(
    ("written", "expected", "language", "same"),
    [
        ("f( a,b )\n", "f(a, b)", "java", True),
        ("f('a')", 'f("a")', "java", False),
        ("f('a')", 'f("a")', "python", True),
        ("x = f(1, b=2, a=3)", "x = f(1, a=3, b=2)", "python", True),
        ("f(g(b=2, a=1))", "f(g(a=1, b=2))", "python", True),
        ("f(2, 1)", "f(1, 2)", "python", False),
        ("g(1)", "f(1)", "python", False),
        ("f('a b')", 'f("ab")', "python", False),
        ("f(", "f(1", "python", False),
        ("f(\x00)", "f(1)", "python", False),
    ],
)
def test_code(written: str, expected: str, language: str, same: bool) -> None:
    assert is_same_code(written, expected, language) == same


def test_text() -> None:
    assert is_same_text("a\nb\n", "a\r\nb")
    assert is_same_text("  a  \n\n", "  a")
    assert not is_same_text("a", "  a")
