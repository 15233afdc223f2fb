"""Other people's tokenizer.json files: what they would lose is kept, or the file is refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelter.base.errors import DataError
from smelter.tokens.alignment import TeacherTokenizer
from smelter.tokens.shards import SPLITS, ShardSet
from smelter.tokens.tokenize import TokenizeOptions, tokenize
from smelter.tokens.tokenizer import Tokenizer
from tests import tiny
from tests.tokens.test_tokenizer import sentencepiece_like_llama

FIRST = 512
"""The id behind those of `tiny.tokenizer()`."""


def our_values() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(tiny.tokenizer()._backend.to_str())
    assert max(token["id"] for token in values["added_tokens"]) == FIRST - 1
    return values


def added(content: str, index: int = FIRST, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": index, "content": content, **plain, **flags}


def load(folder: Path, values: dict[str, Any]) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return Tokenizer.load(folder)


def with_added(folder: Path, *tokens: dict[str, Any]) -> Tokenizer:
    values = our_values()
    values["added_tokens"] += tokens
    return load(folder, values)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
@pytest.mark.parametrize("content", ["<|turn|>", "</s>", "[INST]", "verbatim", "    "])
@pytest.mark.parametrize("special", [False, True])
def test_white_space_around_an_added_token_stays(flag: str, content: str, special: bool, tmp_path: Path) -> None:
    tokenizer = with_added(tmp_path, added(content, special=special, **{flag: True}))

    @given(text=st.lists(st.sampled_from([content, " ", "\n", "\t", "a", "é", "<", ">"]), max_size=12).map("".join))
    @settings(max_examples=40)
    def check(text: str) -> None:
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()
        assert tokenizer.decode_bytes(tokenizer.encode_batch([text])[0]) == text.encode()

    check()
    tokenizer.save(tmp_path / "again.json")
    again = Tokenizer.load(tmp_path / "again.json")
    assert (again.hash, again.notices) == (tokenizer.hash, ())


def test_names_in_text_are_text_whether_the_file_calls_them_special_or_not(tmp_path: Path) -> None:
    names = ["<|file_sep|>", "<tool_call>", "</s>", "[INST]"]
    tokenizer = with_added(tmp_path, *(added(name, FIRST + i) for i, name in enumerate(names)))
    ids = tokenizer.encode("".join(names))
    assert max(ids) < FIRST
    assert tokenizer.decode(ids) == "".join(names)
    assert tokenizer.notices == (f"names that no text becomes, as of special tokens: {', '.join(names)}",)
    assert tokenizer.parse("a<tool_call>") == [*tokenizer.encode("a"), FIRST + 1]


def test_added_words_and_blanks_are_matched_in_text(tmp_path: Path) -> None:
    tokenizer = with_added(tmp_path, added("verbatim"), added("\n\n\n\n", FIRST + 1, rstrip=True))
    assert tokenizer.encode("averbatim\n\n\n\n ") == [
        *tokenizer.encode("a"),
        FIRST,
        FIRST + 1,
        *tokenizer.encode(" "),
    ]
    assert tokenizer.token_num_bytes[FIRST:].tolist() == [8, 4]
    assert tokenizer.notices == (r"white space around a token stays: '\n\n\n\n'",)


def test_shards_hold_all_bytes_that_their_index_counts(tmp_path: Path) -> None:
    with_added(tmp_path, added("</s>", rstrip=True))
    lines = [{"kind": "text", "text": f"<s>a {i}</s>   \n\n  b" * 9, "source": f"{i}"} for i in range(40)]
    records = [json.dumps({"id": f"{i:064x}", **line}) for i, line in enumerate(lines)]
    (tmp_path / "in.jsonl").write_text("\n".join(records))
    file = tmp_path / "tokenizer.json"
    tokenize(TokenizeOptions((tmp_path / "in.jsonl",), tmp_path / "shards", tokenizer=file, val_fraction=0.3))
    shards = ShardSet.open(tmp_path / "shards")
    for split in map(shards.split, SPLITS):
        sizes = [len(shards.tokenizer.decode_bytes(split.doc(i))) for i in range(split.num_docs)]
        assert sizes == split.doc_num_bytes.tolist()


@pytest.mark.parametrize("char", ["À", "ÿ", "Ġ"])
def test_bytes_that_stand_among_the_added_tokens_are_bytes(char: str, tmp_path: Path) -> None:
    """Some makers add the stand-ins of bytes that UTF-8 never has, which then swallow the letters they look like."""
    values = our_values()
    index = values["model"]["vocab"].pop(char)
    values["model"]["merges"] = [pair for pair in values["model"]["merges"] if char not in "".join(pair)]
    vocab = [piece for piece in values["model"]["vocab"] if len(piece) == 1 or char not in piece]
    values["model"]["vocab"] = {piece: i for i, piece in enumerate(vocab)}
    values["added_tokens"] = [added(char, len(vocab)), added("</s>", len(vocab) + 1)]
    values["post_processor"] = None
    tokenizer = load(tmp_path, values)
    byte = tiny.tokenizer().decode_bytes([index])
    assert tokenizer.decode_bytes([len(vocab)]) == byte
    assert tokenizer.encode_bytes(byte) == [len(vocab)]
    assert tokenizer.decode_bytes(tokenizer.encode(f"a{char} b")) == f"a{char} b".encode()


def test_pieces_of_sentencepiece_among_the_added_tokens_stay_pieces(tmp_path: Path) -> None:
    values = json.loads(sentencepiece_like_llama())
    vocab = values["model"]["vocab"]
    word = next(piece for piece in vocab if piece[0] == "▁" and len(piece) > 3)
    values["added_tokens"] += [added("<0x41>", vocab["<0x41>"]), added(word, vocab[word], normalized=True)]
    tokenizer = load(tmp_path, values)
    assert tokenizer.decode_bytes([vocab[word]]) == word.replace("▁", " ").encode()
    for text in (f"a {word[1:]} b", word, "<0x41>A", "A"):
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def changed(**changes: Any) -> dict[str, Any]:
    return our_values() | changes


def of_model(**changes: Any) -> dict[str, Any]:
    values = our_values()
    return values | {"model": values["model"] | changes}


def replaces(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return changed(normalizer={"type": "Replace", "pattern": pattern, "content": content})


def split_first(**part: Any) -> dict[str, Any]:
    pre_tokenizer = our_values()["pre_tokenizer"]
    return changed(pre_tokenizer=pre_tokenizer | {"pretokenizers": [part, *pre_tokenizer["pretokenizers"]]})


def with_gap() -> dict[str, Any]:
    """As many pieces as before, the last of which lies further up: the next free id by count is that of another."""
    values = our_values()
    vocab = values["model"]["vocab"]
    piece = next(piece for piece, index in vocab.items() if index == 300)
    vocab[piece] = len(vocab)
    return values | {"added_tokens": [], "post_processor": None}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "quotes": (replaces({"String": "``"}, '"'), "Replace makes '\"' of '``'"),
    "tabs": (replaces({"String": "    "}, "\t"), r"Replace makes '\\t' of '    '"),
    "a pattern": (replaces({"Regex": " {2,}"}, " "), "Replace makes"),
    "nested": (
        changed(
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}],
            }
        ),
        "normaliser Lowercase",
    ),
    "removed": (split_first(type="Split", pattern={"String": "§"}, behavior="Removed", invert=False), "Split throws"),
    "delimiter": (split_first(type="CharDelimiterSplit", delimiter="§"), "CharDelimiterSplit throws"),
    "suffix": (of_model(end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
    "prefix": (of_model(continuing_subword_prefix="##"), "continuing_subword_prefix '##'"),
    "gap": (changed(added_tokens=[*our_values()["added_tokens"], added("<|x|>", 605)]), "id 605 .* loaded as 512"),
    "twice": (changed(added_tokens=[*our_values()["added_tokens"], added("def", 512)]), "id 512 .* loaded as"),
    "two bytes": (changed(added_tokens=[*our_values()["added_tokens"], added("é")]), "'é' has two ids"),
    "shared": (with_gap(), "stands for"),
    "a char vocabulary": (
        changed(pre_tokenizer=None) | {"model": our_values()["model"] | {"byte_fallback": False}},
        "neither byte-level nor",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_put_right_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    values, reason = REFUSED[name]
    with pytest.raises(DataError, match=reason) as caught:
        load(tmp_path, values)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=reason):
        TeacherTokenizer(tmp_path)


def test_a_text_has_one_encoding(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, of_model(dropout=0.5))
    assert tokenizer.encode(tiny.CODE) == tiny.tokenizer().encode(tiny.CODE)
    assert tokenizer.notices == ("dropout of merges left out: a text has one encoding",)


def test_a_teacher_reads_names_in_text_as_its_own_file_does(tmp_path: Path) -> None:
    with_added(tmp_path, added("<tool_call>"))
    (spelling,) = TeacherTokenizer(tmp_path).spell([b"a<tool_call>"])
    assert spelling is not None
    assert spelling.ids.tolist()[-1] == FIRST
    assert spelling.ends.tolist()[-1] == len("a<tool_call>")


def test_text_that_names_a_teachers_role_is_no_text_to_learn_from_it(tmp_path: Path) -> None:
    """Also where its file does not call the token special: it reads it as what the token does."""
    values = our_values()
    for token in values["added_tokens"]:
        token["special"] = False
    load(tmp_path, values)
    names = [token["content"].encode() for token in values["added_tokens"]]
    assert TeacherTokenizer(tmp_path).spell([b"x = '%s'" % name for name in names]) == [None] * len(names)


def without_byte(char: str) -> tuple[dict[str, Any], int]:
    """Our values without a stand-in of a byte among the pieces, and the first free id."""
    values = our_values()
    model = values["model"]
    model["merges"] = [pair for pair in model["merges"] if char not in "".join(pair)]
    vocab = [piece for piece in model["vocab"] if char not in piece]
    model["vocab"] = {piece: index for index, piece in enumerate(vocab)}
    return values | {"added_tokens": [], "post_processor": None}, len(vocab)


def test_a_teacher_whose_model_would_be_fed_other_ids_is_refused(tmp_path: Path) -> None:
    """Ours takes an added stand-in of a byte among the pieces, whatever its id; the file as it is counts on."""
    values, free = without_byte("ÿ")
    values["added_tokens"] = [added("ÿ", free + 9)]
    assert load(tmp_path, values).token_to_id("ÿ") == free + 9
    with pytest.raises(DataError, match=f"'ÿ' has id {free + 9} in the file, but is loaded as {free} "):
        TeacherTokenizer(tmp_path)


def test_a_teacher_reads_letters_as_the_bytes_that_it_added(tmp_path: Path) -> None:
    """What stands for a byte that UTF-8 never has is matched in text before all else, and so stands for the letter."""
    values, free = without_byte("ÿ")
    values["added_tokens"] = [added("ÿ", free)]
    load(tmp_path, values)
    (spelling,) = TeacherTokenizer(tmp_path).spell(["aÿ b".encode()])
    assert spelling is not None
    assert free in spelling.ids.tolist()


def test_a_piece_that_is_also_added_is_read_as_a_piece(tmp_path: Path) -> None:
    values = our_values()
    piece = next(piece for piece in values["model"]["vocab"] if piece.startswith("Ġre"))
    values["added_tokens"].append(added(piece, values["model"]["vocab"][piece]))
    load(tmp_path, values)
    text = piece.replace("Ġ", " ")
    (spelling,) = TeacherTokenizer(tmp_path).spell([text.encode()])
    assert spelling is not None
    assert spelling.ends.tolist()[-1] == len(text)
