"""foundry.toml: what is wrong is said in one line, with the place and the fix."""

from pathlib import Path
from typing import get_type_hints

import pytest

from foundry.settings import GenerateSettings, SeedSettings, TeacherSettings, load_settings
from smelter.base.errors import UserError

TEACHER = """
[[teacher]]
name = "a/b"
model = "b"
base_url = "http://127.0.0.1:1/v1"
"""
PRICED = f"[generate]\nmax_cost = 1\n{TEACHER}price_output = 1\n"


def load(tmp_path: Path, text: str) -> str:
    """The error's message."""
    path = tmp_path / "foundry.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_settings(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


def test_a_small_file_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "foundry.toml"
    path.write_text(TEACHER + "temperature = 1\nomit = ['temperature']\nextra = { effort = 'low' }\n")
    settings = load_settings(path)
    (teacher,) = settings.teachers
    assert (teacher.name, teacher.temperature, teacher.omit) == ("a/b", 1.0, ("temperature",))
    assert type(teacher.temperature) is float
    assert teacher.extra == {"effort": "low"}
    assert teacher.key() == ""
    assert settings.generate.strategy == "round_robin"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEACHER + "key_header = 'a b'\n", "key_header = 'a b': must be the name of a header"),
        (TEACHER + "temprature = 1\n", "[[teacher]] a/b: unknown key 'temprature': did you mean 'temperature'?"),
        ("[generate]\nin_fligt = 1\n" + TEACHER, "[generate]: unknown key 'in_fligt': did you mean 'in_flight'?"),
        ("[seed]\n" + TEACHER, "unknown table 'seed': did you mean 'seeds'?"),
        (TEACHER.replace("[[teacher]]", "[teacher]"), "[teacher] must be written [[teacher]]"),
        ("", "no [[teacher]]: name at least one"),
        (TEACHER + TEACHER, "two teachers are named 'a/b'"),
        ("[[teacher]]\nmodel = 'b'\n", "[[teacher]] number 1: name is missing"),
        (TEACHER.replace('model = "b"', ""), "a/b: model is missing"),
        (TEACHER.replace("http://", ""), "base_url = '127.0.0.1:1/v1': must be a URL"),
        (TEACHER + "max_tokens = 1.5\n", "max_tokens = 1.5: must be a whole number"),
        (TEACHER + "max_tokens = true\n", "max_tokens = True: must be a whole number"),
        (TEACHER + "temperature = nan\n", "temperature = nan: must be a finite number"),
        (TEACHER + "temperature = 3\n", "temperature = 3.0: must lie between 0 and 2"),
        (TEACHER + "concurrency = 0\n", "concurrency = 0: must be at least 1"),
        (TEACHER + "omit = 'seed'\n", "omit = 'seed': must be a list"),
        (TEACHER + "price_output = 10\n", "[generate]: max_cost is not set, but a/b costs money"),
        (PRICED + "omit = ['max_tokens']\n", 'a/b: omit = ["max_tokens"]: the spending cap needs that limit'),
        (PRICED + "extra = { max_tokens = 9 }\n", "a/b: extra = { max_tokens = ... }: set max_tokens instead"),
        (PRICED + "extra = { n = 4 }\n", "a/b: extra = { n = ... }: several answers are billed and one is kept"),
        ("[generate]\nstrategy = 'best'\n" + TEACHER, "strategy = 'best': must be one of 'all', 'round_robin'"),
        ("[generate]\nstrategy = 'best_of'\njudge = 'a/c'\n" + TEACHER, "judge = 'a/c': must be \"execution\" or"),
        ("[generate]\nstrategy = 'best_of'\njudge = 'a/b'\n" + TEACHER, "the judge is the only teacher"),
        ("[seeds]\nbuiltin = false\n" + TEACHER, "nothing would be asked"),
        ("generate = 3\n" + TEACHER, "[generate] must be a table"),
        ("[generate\n", "not valid TOML"),
    ],
)
def test_each_mistake_has_its_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in load(tmp_path, text)


RANGES: list[tuple[str, str, tuple[float, ...], str]] = [
    ("[seeds]", "count", (0, -1), "must be at least 1"),
    ("[generate]", "samples in_flight", (0, -1), "must be at least 1"),
    ("[generate]", "max_cost grace_seconds", (-0.5,), "must not be negative"),
    ("[[teacher]] a/b", "max_tokens concurrency", (0, -1), "must be at least 1"),
    ("[[teacher]] a/b", "timeout_seconds give_up_seconds weight", (0.0, -0.5), "must be positive"),
    ("[[teacher]] a/b", "price_input price_output price_cache_read price_cache_write", (-0.5,), "must not be negative"),
    ("[[teacher]] a/b", "requests_per_minute tokens_per_minute", (-0.5,), "must not be negative"),
    ("[[teacher]] a/b", "retries", (-1,), "must not be negative"),
    ("[[teacher]] a/b", "temperature", (-0.5, 2.5), "must lie between 0 and 2"),
    ("[[teacher]] a/b", "top_p", (0.0, 1.5), "must lie above 0 and at most at 1"),
]
"""Table, keys, values beyond each end, and what is said: written down once more, so that a lost range is noticed."""


@pytest.mark.parametrize(("table", "keys", "values", "demand"), RANGES)
def test_every_range_stands(tmp_path: Path, table: str, keys: str, values: tuple[float, ...], demand: str) -> None:
    for key in keys.split():
        for value in values:
            line = f"{key} = {value}\n"
            text = TEACHER + line if "teacher" in table else f"{table}\n{line}{TEACHER}"
            assert load(tmp_path, text) == f": {table}: {key} = {value}: {demand}"


def test_the_list_of_ranges_is_whole() -> None:
    kinds = {"[seeds]": SeedSettings, "[generate]": GenerateSettings, "[[teacher]] a/b": TeacherSettings}
    hints = {table: get_type_hints(kind, include_extras=True) for table, kind in kinds.items()}
    with_range = {
        (table, key) for table, keys in hints.items() for key, hint in keys.items() if "Annotated" in str(hint)
    }
    assert with_range == {(table, key) for table, keys, _, _ in RANGES for key in keys.split()}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml: cannot read the settings"):
        load_settings(tmp_path / "nowhere.toml")


def test_the_key_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "foundry.toml"
    path.write_text(TEACHER + 'key_env = "SOME_TEACHER_KEY"\n')
    (teacher,) = load_settings(path).teachers
    monkeypatch.delenv("SOME_TEACHER_KEY", raising=False)
    with pytest.raises(UserError, match='teacher a/b: key_env = "SOME_TEACHER_KEY" is not set'):
        teacher.key()
    monkeypatch.setenv("SOME_TEACHER_KEY", "s3cret")
    assert teacher.key() == "s3cret"
    assert "s3cret" not in repr(teacher)
