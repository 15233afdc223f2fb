"""Chunks lie between the bytes at which both tokenizers end a token, and nothing else is called one."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from smelter.base.errors import DataError
from smelter.tokens.alignment import (
    Chunks,
    TeacherTokenizer,
    chunk_log_probs,
    chunks_of_slice,
    read_as_written,
    student_ends,
)
from smelter.tokens.fim import Piece
from smelter.tokens.tokenizer import Tokenizer
from tests import tiny
from tests.distillation.chunking import other_tokenizer

TEXTS = st.one_of(
    st.text(max_size=40),
    st.text("aé漢🙂\u0301 \t\n\r_(\u2028)", max_size=40),
    st.integers(0, len(tiny.CODE) - 1).map(lambda start: tiny.CODE[start : start + 120]),
    st.sampled_from(["", " ", "\n\n\n    ", "e\u0301" * 3, "\ufeff\x00"]),
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherTokenizer:
    path = tmp_path_factory.mktemp("teacher") / "tokenizer.json"
    other_tokenizer().save(path)
    return TeacherTokenizer(path)


@cache
def numbers(size: int) -> Any:
    return -np.random.default_rng(size).exponential(size=size)


def boundaries(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Where each token ends, by decoding ever longer beginnings."""
    return [len(tokenizer.decode_bytes(ids[: i + 1])) for i in range(len(ids))]


@given(TEXTS)
def test_a_chunk_ends_where_both_tokenizers_end_a_token(teacher: TeacherTokenizer, text: str) -> None:
    ids, other = tiny.tokenizer().encode(text), other_tokenizer().encode(text)
    (spelling,) = teacher.spell([text.encode()])
    assert spelling is not None
    assert spelling.ids.tolist() == other
    theirs = boundaries(other_tokenizer(), other)
    assert spelling.ends.tolist() == theirs
    ends = student_ends(tiny.tokenizer(), np.array(ids, dtype=np.int64))
    assert ends is not None
    values = chunk_log_probs(ends, spelling.ends, numbers(len(other)))
    expected, before = [], 0
    for end in boundaries(tiny.tokenizer(), ids):
        if end not in theirs:
            expected.append(float("nan"))
            continue
        expected.append(sum(p for p, e in zip(numbers(len(other)), theirs, strict=True) if before < e <= end))
        before = end
    np.testing.assert_allclose(values, expected, rtol=1e-9)
    if ids:  # the end of the text is common, so no likelihood is lost
        assert np.nansum(values) == pytest.approx(numbers(len(other)).sum())


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 12), st.integers(0, 12))
def test_a_slice_has_the_chunks_that_lie_in_it_whole(is_end: list[bool], begin: int, size: int) -> None:
    begin, size = min(begin, len(is_end)), min(size, len(is_end) - min(begin, len(is_end)))
    values = np.where(is_end, -np.arange(1.0, len(is_end) + 1), np.nan)
    expected: list[tuple[int, int, float]] = [(-1, -1, 0.0)] * size
    first = 0
    for place, ends in enumerate(is_end):
        if ends:
            if first >= begin and place < begin + size:
                expected[first - begin : place - begin + 1] = [(first - begin, place - begin, float(values[place]))] * (
                    place - first + 1
                )
            first = place + 1
    chunks = chunks_of_slice(values, begin, size)
    assert list(zip(chunks.starts.tolist(), chunks.ends.tolist(), chunks.log_probs.tolist(), strict=True)) == expected


def test_chunks_in_a_row_and_as_targets() -> None:
    row = Chunks.empty(6)
    row.put(0, chunks_of_slice(np.array([-1.0, np.nan, -2.0]), 0, 3))
    row.put(3, chunks_of_slice(np.array([np.nan, -3.0, np.nan]), 0, 3))
    assert row.starts.tolist() == [0, 1, 1, 3, 3, -1]
    assert row.ends.tolist() == [0, 2, 2, 4, 4, -1]
    targets = row.as_targets()
    assert targets.starts.tolist() == [0, 0, 2, 2, -1]
    assert targets.ends.tolist() == [1, 1, 3, 3, -1]
    assert targets.log_probs.tolist() == [-2.0, -2.0, -3.0, -3.0, 0.0]
    # A chunk whose first token is the row's first has a token that is no target: it falls away.
    longer = Chunks.empty(4)
    longer.put(0, chunks_of_slice(np.array([np.nan, -1.0, -2.0]), 0, 3))
    assert longer.as_targets().starts.tolist() == [-1, 1, -1]
    assert longer.as_targets().ends.tolist() == [-1, 1, -1]
    assert longer.as_targets().log_probs.tolist() == [0.0, -2.0, 0.0]


def changed(folder: Path, **changes: Any) -> Path:
    """The other tokenizer's file with another normaliser and the like."""
    folder.mkdir(exist_ok=True)
    other_tokenizer().save(folder / "tokenizer.json")
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(values | changes))
    return folder


def test_text_that_names_a_special_token_is_not_what_the_teacher_reads(tmp_path: Path) -> None:
    values = json.loads(changed(tmp_path / "plain").joinpath("tokenizer.json").read_text())
    named = {"id": 700, "content": "<|turn|>", "special": True}
    named |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    teacher = TeacherTokenizer(changed(tmp_path / "turns", added_tokens=[*values["added_tokens"], named]))
    assert [spelling is None for spelling in teacher.spell([b"a <|turn|> b", b"a <|turn> b"])] == [True, False]


def test_what_the_tokens_do_not_spell_is_passed_over(tmp_path: Path) -> None:
    composes = TeacherTokenizer(changed(tmp_path / "nfc", normalizer={"type": "NFC"}))
    documents = [b"caf\xc3\xa9", "cafe\u0301".encode(), b"def f():", b"\xff\xfe", b"", b"a <|endoftext|> b"]
    spelt = [spelling is not None for spelling in composes.spell(documents)]
    assert spelt == [True, False, True, False, True, False]


def test_a_space_put_before_the_text_is_no_part_of_it(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    merges = [("▁", "d"), ("▁d", "e"), ("▁de", "f")]
    for token in ("▁", "d", "e", "f", "(", ")", "\n", *("".join(pair) for pair in merges)):
        vocab[token] = len(vocab)
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    teacher = TeacherTokenizer(tmp_path)
    merged, alone = teacher.spell([b"def f()", b"(def"])
    assert merged is not None
    assert alone is not None
    assert merged.ends.tolist() == [3, 4, 5, 6, 7]  # "▁def", "▁", "f", "(", ")"
    assert alone.ends.tolist() == [0, 1, 2, 3, 4]  # "▁" stands before the text
    values = chunk_log_probs(np.array([1, 4]), alone.ends, np.array([-8.0, -1.0, -2.0, -3.0, -4.0]))
    assert values.tolist() == [-1.0, -9.0]


def test_the_token_before_every_text(tmp_path: Path) -> None:
    before: dict[str, Any] = {"type": "TemplateProcessing", "pair": []}
    before["single"] = [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    eos = other_tokenizer().eos_id
    before["special_tokens"] = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [eos], "tokens": ["<|endoftext|>"]}}
    before["pair"] = [*before["single"], {"Sequence": {"id": "B", "type_id": 1}}]
    assert TeacherTokenizer(changed(tmp_path / "bos", post_processor=before)).first_id == eos
    assert TeacherTokenizer(changed(tmp_path / "none", post_processor=None)).first_id is None
    values = {"type": "WordPiece", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    folder = changed(tmp_path / "bert", model=values)
    with pytest.raises(DataError, match="WordPiece"):
        TeacherTokenizer(folder)


def test_of_a_rearranged_piece_the_prefix_is_read_as_it_was_written() -> None:
    tokenizer = tiny.tokenizer()
    ids = np.array(tokenizer.encode(tiny.CODE[:200]), dtype=np.int64)
    piece = Piece(tokenizer, ids)
    assert read_as_written(ids, ids[:10], tokenizer) == (0, 10)
    prefix, middle, suffix = piece.encode(0, 60), piece.encode(60, 90), piece.encode(90, len(piece.text))
    psm = [*tokenizer.join_fim_prompt(prefix, suffix), *middle]
    shift, size = read_as_written(ids, psm, tokenizer)
    assert shift == 1
    assert psm[1 : 1 + size] == ids[:size].tolist()
    assert len(prefix) - 3 <= size <= len(prefix)  # the word that the cut divides has other tokens
    assert read_as_written(ids, tokenizer.join_fim_prompt(prefix, suffix, use_spm=True), tokenizer) == (0, 0)


def test_tokens_that_stand_for_no_text_have_no_place_in_it() -> None:
    tokenizer = tiny.tokenizer()
    assert student_ends(tokenizer, np.array([*tokenizer.encode("a"), tokenizer.eos_id])) is None
    assert student_ends(tokenizer, np.empty(0, dtype=np.int64)) is not None
