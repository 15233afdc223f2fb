"""Secrets: found by their looks or by a file's name, never shown, and cut out whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundry.credentials import is_key_file, masked, secret

BODY = "MIIEpAIBAAKCAQEA" + "q7Zx" * 12
SECRETS = {
    "AWS Access Key": "AKIA" + "QW3RTY5UI7OP9ASD",
    "GitHub Token": "ghp_" + "a1B2c3D4e5F6" * 3,
    "JSON Web Token": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxIn0." + "c2lnbmF0dXJlLW9mLW5vYm9keQ",
    "Private Key": "-----BEGIN RSA " + f"PRIVATE KEY-----\n{BODY}\n",
    "Slack Token": "xoxb-" + "123456789012-abcdefGHIJKL",
}
"""Made up here, and split so that nobody's scanner takes them for leaked ones."""


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_named_but_not_shown(kind: str) -> None:
    kind_and_line = secret(f"import os\n\nKEY = '''{SECRETS[kind]}'''\n")
    assert kind_and_line == f"{kind} in line 3"


@pytest.mark.parametrize(
    "text",
    [
        "key = 'AKIAIOSFODNN7EXAMPLE'",
        "if '-----BEGIN RSA PRIVATE KEY-----' in text:\n    raise ValueError",
        "password = 'hunter2'",
        "digest = 'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'",
        "token = 'eyJub3Q.a.jwt'",
    ],
)
def test_what_looks_like_a_secret_and_is_none(text: str) -> None:
    assert secret(text) == ""


@pytest.mark.parametrize("kind", SECRETS)
def test_a_masked_text_has_the_kind_in_the_secrets_place(kind: str) -> None:
    around = ("import os\nKEY = '", "'\n\ndef f():\n    return KEY\n")
    credential = SECRETS[kind].rstrip()
    if kind == "Private Key":
        credential += "\n-----END RSA " + "PRIVATE KEY-----"
    value = masked({"a": [f"{around[0]}{credential}{around[1]}", 1, None], credential: True})
    assert value == {"a": [f"{around[0]}<{kind}>{around[1]}", 1, None], f"<{kind}>": True}


def test_what_a_pattern_knows_is_the_least_that_is_cut_out() -> None:
    """A token that is longer than its pattern leaves no end behind, a key without an end nothing at all."""
    assert masked(f"x = '{SECRETS['GitHub Token']}tail' # y") == "x = '<GitHub Token>' # y"
    assert masked(f"key:\n{SECRETS['Private Key']}more of it\n") == "key:\n<Private Key>"
    two = f"{SECRETS['GitHub Token']} and {SECRETS['AWS Access Key']}"
    assert masked(two) == "<GitHub Token> and <AWS Access Key>"


@given(st.text(st.sampled_from("ab \n=(é"), max_size=60))
def test_any_text_can_be_looked_at(text: str) -> None:
    assert secret(text) == ""


@given(st.lists(st.sampled_from([*SECRETS.values(), " ", "\n", "'", "x = ", "é", "EXAMPLE"]), max_size=8))
def test_nothing_is_found_in_a_masked_text(parts: list[str]) -> None:
    text = "".join(parts)
    assert secret(masked(text)) == ""
    if not secret(text):
        assert masked(text) == text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("secrets.py", True),
        ("arduino_secrets.h", True),
        ("wifi-credentials.hpp", True),
        ("config.secret.js", True),
        ("Credentials.cs", True),
        ("api_keys.py", True),
        ("id_rsa.sh", True),
        ("local_settings.py", True),
        ("secretary.py", False),
        ("keyword.py", False),
        ("keys.py", False),
        ("getpass.py", False),
        ("settings.py", False),
    ],
)
def test_files_are_named_for_secrets(name: str, expected: bool) -> None:
    assert is_key_file(name) == expected
