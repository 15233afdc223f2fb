"""Seeds: the same for the same settings, none twice, every source in its turn, and the user's files checked first."""

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundry.seeds.builtin import builtin_prompts, draw, fill, load_areas
from foundry.seeds.seed import Seed, read_seeds
from foundry.seeds.turns import iterate
from foundry.settings import SeedSettings
from smelter.base.errors import UserError
from smelter.base.record import Record, write_records

NUM_PROMPTS = 5_000


def write_jsonl(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def test_thousands_of_builtin_prompts_are_distinct_and_touch_every_area() -> None:
    items = list(itertools.islice(builtin_prompts(0), NUM_PROMPTS))
    assert len({item.prompt for item in items}) == NUM_PROMPTS
    areas, _ = load_areas()
    num_entries = sum(area.num_entries for area in areas)
    assert num_entries >= 250
    first_round = {item.source for item in items[:num_entries]}
    assert first_round == {f"builtin/{area.name}/{i}" for area in areas for i in range(area.num_entries)}


def test_builtin_prompts_follow_the_seed_alone() -> None:
    def first(seed: int) -> list[str]:
        return [item.prompt for item in itertools.islice(builtin_prompts(seed), 300)]

    assert first(7) == first(7)
    assert first(7) != first(8)


def test_every_template_fills() -> None:
    areas, words = load_areas()
    rng = random.Random(1)
    for area in areas:
        for index in range(area.num_entries):
            for _ in range(20):
                prompt = draw(area, index, words, rng)
                prose = re.sub(r"```.*?```", "", prompt, flags=re.DOTALL)
                # Braces that are left would be a choice not made; those of code stand in quotes.
                assert not re.search(r"\{[^{}]*[|][^{}]*\}|\{snippet\}", prose), prompt
                assert prompt.count("```") == (2 if area.snippets else 0), prompt
                assert prompt == prompt.strip()
                assert "  " not in prose, prompt


def test_every_alternative_and_word_of_the_templates_is_known() -> None:
    areas, words = load_areas()
    texts = [text for area in areas for group in (area.prompts, area.always, *area.extras) for text in group]
    for text in [*texts, *itertools.chain.from_iterable(words.values())]:
        while match := re.search(r"\{([^{}]+)\}", text):
            assert "|" in match[1] or match[1] in words or match[1] == "snippet", f"{match[1]!r} in {text!r}"
            text = text.replace(match[0], "x")
        assert not {"{", "}"} & set(text), text


@given(st.integers(0, 2**32))
def test_a_word_is_the_same_wherever_it_occurs_in_a_prompt(seed: int) -> None:
    words = {"n": ["1", "2", "3", "4"]}
    left, middle, right = fill("{n} {{n}|{n}} {n}", words, {}, random.Random(seed)).split()
    assert left == middle == right


def test_seeds_are_distinct_and_a_larger_count_begins_with_a_smaller_one() -> None:
    large = list(iterate(SeedSettings(count=2_000)))
    assert len(large) == 2_000
    assert len({seed.id for seed in large}) == 2_000
    assert all(re.fullmatch("[0-9a-f]{64}", seed.id) for seed in large)
    assert list(iterate(SeedSettings(count=150))) == large[:150]
    assert [seed.id for seed in iterate(SeedSettings(count=150, seed=1))] != [seed.id for seed in large[:150]]


def test_the_id_tells_system_prompt_and_material_apart() -> None:
    seeds = [
        Seed(prompt="a"),
        Seed(prompt="a", system="b"),
        Seed(prompt="b", system="a"),
        Seed(prompt="a", material={"x": 1}),
        Seed(prompt="a", material={"x": 2}),
    ]
    assert len({seed.id for seed in seeds}) == len(seeds)
    assert Seed(prompt="a", material={"x": 1, "y": 2}).id == Seed(prompt="a", material={"y": 2, "x": 1}).id


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffSort a list.\r\n\n  Write ‘naïve’ search.  \nlast".encode())
    seeds = list(read_seeds(path))
    assert [seed.prompt for seed in seeds] == ["Sort a list.", "Write ‘naïve’ search.", "last"]
    assert [seed.source for seed in seeds] == ["mine.txt:1", "mine.txt:3", "mine.txt:4"]
    assert {(seed.kind, seed.license, seed.language) for seed in seeds} == {("user", "unknown", "python")}


@pytest.mark.parametrize("name", ["mine.jsonl", "MINE.JSONL"])
def test_a_jsonl_file_holds_prompts_of_several_lines(tmp_path: Path, name: str) -> None:
    full = {"prompt": "a\nb", "system": "Be brief.", "language": "go", "id": "x", "source": "s/1", "license": "MIT"}
    path = write_jsonl(tmp_path / name, full, {"prompt": "c", "system": ""})
    first, second = read_seeds(path)
    assert (first.prompt, first.system, first.language) == ("a\nb", "Be brief.", "go")
    assert (first.source, first.license, first.kind) == ("s/1", "MIT", "user")
    assert (second.source, second.license, second.language) == (f"{name}:2", "unknown", "python")
    # An id of the user's stays when the words are changed.
    write_jsonl(path, full | {"prompt": "other words"})
    assert next(read_seeds(path)).id == first.id != second.id


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', r"not JSON .*: each line must be an object such as"),
        (b"", r"not JSON"),
        (b'{"prompt": ' + b"1" * 5_000 + b"}", r"not JSON"),
        (b"[" * 100_000, r"not JSON"),
        (b'["prompt"]', r'not an object: write \{"prompt": \.\.\.\}'),
        (b'{"promt": "a"}', r"unknown key 'promt': did you mean '?prompt"),
        (b'{"prompt": 3}', r'"prompt" = 3: must be a string'),
        (b'{"prompt": " "}', r'"prompt" is missing or empty: say what is asked'),
        (b'{"system": "a"}', r'"prompt" is missing or empty'),
        (b'{"prompt": "\\ud800"}', r'"prompt" has half a surrogate pair'),
        (b'{"prompt": "\xff"}', r"not UTF-8 at byte 12: convert the file with iconv"),
        (b'{"prompt": "b", "id": "one"}', r"\"id\" 'one' is that of .*mine.jsonl:1: give each its own"),
    ],
)
def test_a_bad_line_is_named_with_the_fix_before_anything_is_asked(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"prompt": "a", "id": "one"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}:2: {message}"):
        next(iterate(SeedSettings(files=(str(path),), count=1)))


def test_a_text_file_that_is_not_utf8_and_one_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b"good\nna\xefve\n")
    with pytest.raises(UserError, match=r"mine\.txt:2: not UTF-8 at byte 2: convert the file with iconv"):
        list(read_seeds(path))
    with pytest.raises(UserError, match=r"none\.txt: no such file: check files in \[seeds\]"):
        list(read_seeds(tmp_path / "none.txt"))


def test_two_files_cannot_lose_a_prompt_by_using_one_id(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{name}.jsonl", {"prompt": name, "id": "1"}) for name in "ab"]
    with pytest.raises(UserError, match=r"b\.jsonl:1: \"id\" '1' is that of .*a\.jsonl:1: give each its own"):
        list(iterate(SeedSettings(builtin=False, files=tuple(map(str, files)))))
    # The same file named twice is no conflict.
    assert len(list(iterate(SeedSettings(builtin=False, files=(str(files[0]),) * 2)))) == 1


def test_sources_take_turns_until_they_end(tmp_path: Path) -> None:
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("".join(f"short {i}\n" for i in range(5)), encoding="utf-8")
    long.write_text("".join(f"long {i}\n" for i in range(50)), encoding="utf-8")
    body = "\n".join(f"value_{i} = compute(value_{i - 1})" for i in range(1, 30))
    records = [
        Record(kind="text", text=f"# {n}\n{body}\n", language="python", source=f"t/{n}.py", license="MIT")
        for n in range(4)
    ]
    write_records(tmp_path / "code.jsonl", records)
    settings = SeedSettings(
        files=(str(short), str(long)), corpus=(str(tmp_path / "code.jsonl"),), kinds=("oss_instruct",), count=60
    )
    seeds = list(iterate(settings))

    def stream(seed: Seed) -> str:
        return seed.source.partition(".txt")[0] if seed.kind == "user" else seed.kind

    assert Counter(map(stream, seeds[:20])) == {"builtin": 5, "short": 5, "long": 5, "oss_instruct": 5}
    counts = Counter(map(stream, seeds))
    assert counts["short"] == 5
    assert counts["oss_instruct"] == 12  # three rounds through four files
    assert abs(counts["builtin"] - counts["long"]) <= 1
    assert len(seeds) == 60


def test_the_same_question_is_asked_once(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "mine.jsonl", {"prompt": "a"}, {"prompt": "a", "id": "2"}, {"prompt": "a", "system": "b"}
    )
    seeds = list(iterate(SeedSettings(builtin=False, files=(str(path),))))
    assert [(seed.prompt, seed.system) for seed in seeds] == [("a", ""), ("a", "b")]


def test_nothing_to_ask_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^\[seeds\]: nothing to ask: the files and the corpus hold no usable"):
        list(iterate(SeedSettings(builtin=False, files=(str(tmp_path / "empty.txt"),))))
