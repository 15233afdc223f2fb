"""Near duplicates and benchmark contamination on planted sets: what must be found is, and what must not be is not."""

import ast
import inspect
import json
import random
import re
import sys
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundry.cleaning.decontaminate import MIN_FUNCTION, Benchmarks, function_keys, ngrams
from foundry.cleaning.dedup import (
    NUM_PERM,
    SHINGLE,
    NearDuplicates,
    exact_key,
    rows_per_band,
    shingle_hashes,
    signatures,
)
from smelter.base.errors import UserError

MODULES = (
    "argparse calendar configparser csv difflib fractions heapq inspect pathlib shutil statistics tarfile textwrap"
)


@cache
def functions(modules: str = MODULES) -> tuple[str, ...]:
    """Distinct functions of the standard library, 12 to 80 lines each; some 300 of all modules."""
    sources: dict[str, None] = {}
    for name in modules.split():
        source = inspect.getsource(import_module(name))
        lines = source.split("\n")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and 12 <= (node.end_lineno or 0) - node.lineno <= 80:
                text = "\n".join(line[node.col_offset :] for line in lines[node.lineno - 1 : node.end_lineno])
                sources[text] = None
    return tuple(sources)


def renamed(text: str) -> str:
    """The function under another name."""
    name = re.search(r"def (\w+)", text)
    assert name is not None
    return re.sub(rf"\b{name[1]}\b", "another_name", text)


def edited(text: str) -> str:
    """With a comment in its midst, another last line, and tabs."""
    lines = text.split("\n")
    lines[len(lines) // 2 : len(lines) // 2] = ["    # as it was before"]
    return "\n".join(lines).replace("    ", "\t") + "\n    # end\n"


def similarity(one: str, other: str) -> float:
    """Jaccard similarity, by the definition and without any hashing."""

    def shingles(text: str) -> set[tuple[str, ...]]:
        tokens = re.findall(r"\w+|[^\w\s]", text) + ["\0"] * SHINGLE
        return {tuple(tokens[i : i + SHINGLE]) for i in range(len(tokens) - SHINGLE)}

    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)


def test_signatures_estimate_the_similarity() -> None:
    texts = functions()
    pairs = [(text, change(text)) for text in texts for change in (renamed, edited)]
    pairs += list(pairwise(texts))
    ones, others = signatures([one for one, _ in pairs]), signatures([other for _, other in pairs])
    errors = (ones == others).mean(axis=1) - [similarity(*pair) for pair in pairs]
    assert len(errors) > 400
    assert np.std(errors) < 0.025  # 0.018 measured; at most (1 / (4 * 128)) ** 0.5 = 0.044 in theory
    assert np.abs(errors).max() < 0.2
    assert abs(np.mean(errors)) < 0.005


def test_planted_copies_are_found_and_distinct_functions_are_not() -> None:
    near = NearDuplicates(0.8)
    texts = functions()
    kept: dict[str, str] = {}
    for i, (text, row) in enumerate(zip(texts, signatures(texts), strict=True)):
        earlier = near.add(str(i), row)
        if earlier is None:
            kept[str(i)] = text
        else:  # the library has a few near duplicates of its own
            assert similarity(text, kept[earlier[0]]) > 0.7
    assert len(kept) > 0.95 * len(texts)
    copies = [(name, change(text)) for name, text in kept.items() for change in (renamed, edited)]
    random.Random(0).shuffle(copies)
    true = false = missed = 0
    for (name, copy), row in zip(copies, signatures([copy for _, copy in copies]), strict=True):
        earlier = near.add(copy, row)
        is_near = similarity(copy, kept[name]) >= 0.87  # two standard errors above the threshold
        true += earlier is not None and is_near
        missed += earlier is None and is_near
        false += earlier is not None and similarity(copy, kept.get(earlier[0], earlier[0])) < 0.72
    assert true > 250
    assert true / (true + missed) >= 0.98
    assert true / (true + false) >= 0.99


def test_a_signature_does_not_depend_on_its_batch() -> None:
    texts = ["", " \n", "x", "x = 1", "ä = 'ö'\n", "a\0b", *functions()[:50]]
    whole = signatures(texts)
    assert whole.shape == (len(texts), NUM_PERM)
    assert (whole == np.concatenate([signatures([text]) for text in texts])).all()
    assert (signatures(texts[::-1])[::-1] == whole).all()
    assert signatures([]).shape == (0, NUM_PERM)


def test_nor_on_how_long_its_neighbours_are() -> None:
    texts = ["", "ä = 1\n" * 60_000, "", *functions(), "x", "é" * 200_000, "y = 2", " " * 300_000]
    whole = signatures(texts)
    assert (whole == np.concatenate([signatures([text]) for text in texts])).all()
    assert (whole[-1] == whole[0]).all()


def test_short_texts_are_estimated_without_bias() -> None:
    """Where shingles are fewer than values, each still counts alike."""
    draw = random.Random(0)
    pairs, names = [], [f"name_{i}" for i in range(5_000)]
    for _ in range(4_000):
        tokens = draw.sample(names, draw.randint(1, 40))
        end = draw.randint(0, len(tokens))
        pairs.append((" ".join(tokens), " ".join([*tokens[:end], *draw.sample(names, draw.randint(0, 3))])))
    ones, others = signatures([one for one, _ in pairs]), signatures([other for _, other in pairs])
    errors = (ones == others).mean(axis=1) - [similarity(*pair) for pair in pairs]
    assert abs(np.mean(errors)) < 0.002
    assert np.std(errors) < 0.04
    assert np.abs(errors).max() < 0.25


words = st.text(st.sampled_from("ab_1(=.é\0 \n"), max_size=30)


@given(st.lists(words, min_size=1, max_size=5))
def test_equal_tokens_have_equal_shingles_wherever_they_stand(texts: list[str]) -> None:
    hashes, firsts = shingle_hashes(texts)
    assert len(firsts) == len(texts) + 1
    assert firsts[-1] == len(hashes)
    for i, text in enumerate(texts):
        own = hashes[int(firsts[i]) : int(firsts[i + 1])]
        tokens = re.findall(r"\w+|[^\w\s]", text.replace("\0", " "))
        assert len(own) == max(1, len(tokens))
        assert (own == shingle_hashes(["  " + " \n ".join(tokens)])[0]).all()


@given(words, words)
def test_exact_keys_ignore_white_space_alone(one: str, other: str) -> None:
    is_same = re.findall(r"\w+|[^\w\s]", one) == re.findall(r"\w+|[^\w\s]", other)
    assert (exact_key(one) == exact_key(other)) == is_same
    assert exact_key(one) == exact_key(f"\n{one}\t")


@settings(max_examples=30)
@given(st.floats(0.05, 1.0))
def test_bands_find_what_is_at_the_threshold(threshold: float) -> None:
    rows = rows_per_band(threshold)
    assert 1 - (1 - threshold**rows) ** (NUM_PERM // rows) >= 0.99
    assert rows == NUM_PERM or 1 - (1 - threshold ** (rows + 1)) ** (NUM_PERM // (rows + 1)) < 0.99


def test_many_are_kept_and_each_is_found_again() -> None:
    near = NearDuplicates(1.0)
    rows = np.random.default_rng(0).integers(0, 2**32, (1_500, NUM_PERM), dtype=np.uint32)
    assert all(near.add(str(i), row) is None for i, row in enumerate(rows))
    assert [near.add("again", row) for row in rows] == [(str(i), 1.0) for i in range(1_500)]


def write_tasks(path: Path, tasks: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return path


def test_planted_benchmark_tasks_are_found_and_others_are_not(tmp_path: Path) -> None:
    # Functions of one module quote each other; those of different ones do not.
    tasks, others = functions("calendar csv fractions heapq pathlib statistics"), functions("difflib shutil tarfile")
    assert min(len(tasks), len(others)) > 50
    benchmarks = Benchmarks([write_tasks(tmp_path / "tasks.jsonl", [{"code": [text]} for text in tasks])])
    assert benchmarks.num_tasks == len(tasks)
    laid_out = [ast.unparse(ast.parse(renamed(text))) for text in tasks]  # no comments, another layout
    quoted = [f"Consider this:\n\n> {text[: len(text) // 2]}".upper() for text in tasks]
    for copies in (laid_out, quoted):
        num_found = sum(bool(benchmarks.find(copy, copy)) for copy in copies)
        assert num_found / len(copies) >= 0.98
    assert sum(bool(benchmarks.find(text, text)) for text in others) / len(others) <= 0.02


def test_a_row_of_numbers_or_a_short_function_proves_nothing() -> None:
    assert not list(ngrams("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 a b c d e"))
    assert not list(ngrams("one two three four five six seven eight nine ten eleven twelve"))
    assert len(list(ngrams("One, two; three four five six seven eight nine ten eleven twelve thirteen!"))) == 1
    assert not list(function_keys("def add(x, y):\n    return x + y\n"))
    body = "    total = 0\n    for value in values:\n        total += value\n    return total / len(values)\n"
    assert len(body) < MIN_FUNCTION
    keys = {key for name in "fg" for key in function_keys(f"def {name}(values):\n    '''Of {name}.'''\n{body}")}
    assert len(keys) == 1
    assert not list(function_keys("def broken(:\n" + body))


def test_code_nested_too_deeply_is_passed_over() -> None:
    deep = "def deep(x):\n    return " + "1 + " * 1_500 + "x\n"
    plain = functions()[0]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000)  # Python's own: torch's compiler raises it where another test of this process used it
    try:
        assert list(function_keys(f"{deep}\n{plain}")) == list(function_keys(plain))
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{\n", ":1: not JSON"),
        (b"[1]\n", ":1: no JSON object with a text"),
        (b'{"a": 1}\n', ":1: no JSON object with a text"),
        (b"\xff\n", ":1: not JSON"),
        (b"[" * 100_000, ":1: not JSON"),
        (b'{"a": ' + b"1" * 5_000 + b"}", ":1: not JSON"),
        (b"\n\n", ": no task of 13 words or more"),
        (b'{"a": "too short"}', ": no task of 13 words or more"),
    ],
)
def test_a_bad_benchmark_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(f"{path}{message}")):
        Benchmarks([path])
