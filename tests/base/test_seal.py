"""A table knows its own digest, however it is laid out."""

import json

import pytest

from smelter.base.seal import is_intact, sealed

VALUES = {"b": [1, 2.5, None, True], "a": {"é": "x", "7": (0.1, 1e-300)}, "step": 4}


def test_what_was_sealed_is_intact_after_a_round_through_json() -> None:
    for layout in ({"indent": 2}, {"sort_keys": True}, {"ensure_ascii": False}):
        read = json.loads(json.dumps(sealed(VALUES), **layout))
        assert is_intact(read)
        assert sealed(read) == read, "again the same"
    assert list(sealed(VALUES))[:-1] == list(VALUES)


@pytest.mark.parametrize("change", [{"step": 5}, {"b": [1, 2.5, None]}, {"more": 1}, {"sha256": "0" * 64}])
def test_a_change_is_noticed(change: dict[str, object]) -> None:
    assert not is_intact(sealed(VALUES) | change)


def test_a_missing_key_is_noticed_and_a_table_without_seal_passes() -> None:
    read = sealed(VALUES)
    del read["step"]
    assert not is_intact(read)
    assert is_intact(VALUES)
