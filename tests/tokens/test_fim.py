"""Fill-in-the-middle: every byte comes back, and the fast way gives the ids of the plain one, bit for bit."""

import json
from collections import Counter
from functools import cache
from itertools import combinations, combinations_with_replacement
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from smelter.tokens.cuts import at_cursor
from smelter.tokens.fim import (
    FIM_SLACK,
    MIN_FIM_CHARACTERS,
    NUM_SENTINELS,
    Ids,
    Piece,
    Seams,
    Shares,
    apply_fim,
    fit_fim,
)
from smelter.tokens.roles import SpecialTokens
from smelter.tokens.tokenizer import Tokenizer
from tests import tiny

TOKENS = tiny.tokenizer()
EOS = TOKENS.eos_id
SENTINELS = (TOKENS.fim_prefix_id, TOKENS.fim_suffix_id, TOKENS.fim_middle_id)

SNIPPETS = [
    *SpecialTokens().names,
    "def f(x):\n    return x.y  # it's 'RE\r\n\r\n\t",
    "漢字🙂",
    "e\u0301\n",
    "ſ's naïve",
    "   \n \r\n  ",
    "12a3.5b",
    "'ll've't",
    "<tool_call>",
    "xx|yy.k",
    "\u2581",
    "if(x)",
    "\x00\x7f\x85\u2028\ufeff",
]
text_strategy = st.lists(
    st.one_of(
        st.text(max_size=20), st.text("aZ'.(_\n\r\t 1é\u2028", max_size=8), st.sampled_from([*SNIPPETS, " ", "\n", "x"])
    ),
    max_size=10,
).map("".join)


def undo_fim(ids: list[int]) -> bytes:
    """The text, byte for byte, that `apply_fim` rearranged in the ids of TOKENS."""
    assert [i for i in ids if i in SENTINELS] == [*SENTINELS], "sentinels are missing or out of order"
    assert (ids[0], ids[-1]) == (SENTINELS[0], EOS), "not a fill-in-the-middle example"
    suffix_at, middle_at = ids.index(SENTINELS[1]), ids.index(SENTINELS[2])
    before, suffix, after = ids[1:suffix_at], ids[suffix_at + 1 : middle_at], ids[middle_at + 1 : -1]
    return TOKENS.decode_bytes(before + after + suffix)


def rng(seed: int) -> np.random.Generator:
    """Random numbers of a test."""
    return np.random.default_rng(seed)


def changed(**parts: object) -> Tokenizer:
    """Ours with parts of its file exchanged."""
    values = json.loads(json.dumps(TOKENS.values)) | parts
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(values)), TOKENS.special)


def with_added_tokens() -> Tokenizer:
    """As Qwen2.5's: some added tokens are not special, so text does become them; two of them overlap."""
    names = ["<tool_call>", "xx|", "|yy.k"]
    size = TOKENS.vocab_size
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    added = [{"id": size + i, "content": name} | flags for i, name in enumerate(names)]
    return changed(added_tokens=[*TOKENS.values["added_tokens"], *added])


def without_words() -> Tokenizer:
    """As Llama 2's: one word is the whole text, and tokens reach over letters and signs."""
    alphabet = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz(.):_\n"]
    merges = [("a", "x"), ("x", "."), ("x.", "y"), ("▁", "a"), ("f", "("), ("r", "e"), ("x", ")"), ("▁a", "x")]
    names = [*alphabet, *map("".join, merges)]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(list(SpecialTokens().names))
    return Tokenizer(backend, SpecialTokens())


def split_by(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A byte-level tokenizer of other words."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([tiny.CODE, "ax ax ax ax x.y x.y " * 40], trainer)
    backend.add_special_tokens(list(SpecialTokens().names))
    return Tokenizer(backend, SpecialTokens())


@cache
def tokenizer(name: str) -> Tokenizer:
    """One of several kinds."""
    if name == "ours":
        return TOKENS
    if name == "added tokens":
        return with_added_tokens()
    if name == "accents":
        return Tokenizer.train([tiny.CODE, "éx éx éx aé aé " * 40], 600)
    if name == "no words":
        return without_words()
    if name == "gpt2":
        return split_by(pre_tokenizers.ByteLevel(add_prefix_space=False))
    split = pre_tokenizers.Split(tokenizers.Regex(r"\s+|\S+"), "isolated")
    return split_by(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))


NAMES = ("ours", "accents", "added tokens", "no words", "gpt2", "lines")
any_tokenizer = pytest.mark.parametrize("name", NAMES)


@cache
def encode(name: str, text: str) -> list[int]:
    """Ids of encoding the whole text."""
    return tokenizer(name).encode(text)


def piece_of(text: str) -> Piece:
    """A whole document."""
    return Piece(TOKENS, np.array(TOKENS.encode(text), dtype=np.int64))


# ---------------------------------------------------------------- the plain way is the specification


def plain_apply(tokens: Tokenizer, text: str, generator: np.random.Generator, spm_rate: float) -> list[int]:
    """Cut the text, encode all of each part."""
    first, second = sorted(generator.integers(0, len(text) + 1, size=2).tolist())
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    if generator.random() < spm_rate:
        return [*tokens.fim_prompt("", suffix, use_spm=True), *tokens.encode(prefix + middle), tokens.eos_id]
    return [*tokens.fim_prompt(prefix, suffix), *tokens.encode(middle), tokens.eos_id]


def plain_fit(
    tokens: Tokenizer, ids: Ids, room: int, generator: np.random.Generator, spm_rate: float
) -> list[int] | None:
    """As `fit_fim`, from the text alone."""
    body = ids[:-1] if len(ids) and ids[-1] == tokens.eos_id else ids
    if len(body) > room - NUM_SENTINELS:
        body = body[: max(0, room - NUM_SENTINELS - FIM_SLACK)]
    while True:
        text = tokens.decode_bytes(body).decode("utf-8", "surrogateescape")
        if len(text) < MIN_FIM_CHARACTERS:
            return None
        arranged = plain_apply(tokens, text, generator, spm_rate)
        if len(arranged) <= room:
            return arranged
        body = body[: max(0, len(body) - (len(arranged) - room))]


@st.composite
def windows(draw: st.DrawFn, name: str) -> Ids:
    """Consecutive ids of an encoded text, cut anywhere: inside words and characters too."""
    ids = tokenizer(name).encode(draw(text_strategy))
    begin = draw(st.integers(0, min(len(ids), 12)))
    end = draw(st.one_of(st.just(len(ids)), st.integers(begin, len(ids))))
    return np.array(ids[begin:end], dtype=np.int64)


@any_tokenizer
@pytest.mark.parametrize("text", ["a.ax.y b.c.d", "a.b|xx|yy.k c.", "a.x漢 aéx.a b.", "ax's.'re x.\r\n  a.a"])
def test_every_part_of_every_window_has_the_ids_of_encoding_it_whole(name: str, text: str) -> None:
    """On texts where a token left of a cut decides what follows, if it may."""
    tokens = tokenizer(name)
    ids = np.array(tokens.encode(text), dtype=np.int64)
    for begin, end in combinations(range(len(ids) + 1), 2):
        piece = Piece(tokens, ids[begin:end])
        for first, second in combinations_with_replacement(range(len(piece.text) + 1), 2):
            assert piece.encode(first, second) == encode(name, piece.text[first:second])


@any_tokenizer
@given(data=st.data())
@settings(max_examples=150)
def test_a_part_has_the_ids_of_encoding_it_whole(name: str, data: st.DataObject) -> None:
    tokens, ids = tokenizer(name), data.draw(windows(name))
    piece = Piece(tokens, ids)
    assert piece.text == tokens.decode_bytes(ids).decode("utf-8", "surrogateescape")
    first = data.draw(st.integers(0, len(piece.text)))
    second = data.draw(st.integers(first, len(piece.text)))
    assert piece.encode(first, second) == tokens.encode(piece.text[first:second])
    assert piece.encode(0, second) == tokens.encode(piece.text[:second])
    assert piece.encode(first, len(piece.text)) == tokens.encode(piece.text[first:])


@any_tokenizer
@given(
    data=st.data(),
    seed=st.integers(0, 2**32),
    room=st.integers(0, 120),
    spm_rate=st.sampled_from([0.0, 0.5, 1.0]),
    has_eos=st.booleans(),
)
@settings(max_examples=150)
def test_rearranging_equals_the_plain_way(
    name: str, data: st.DataObject, seed: int, room: int, spm_rate: float, has_eos: bool
) -> None:
    tokens = tokenizer(name)
    ids = np.append(data.draw(windows(name)), [tokens.eos_id] * has_eos).astype(np.int64)
    fast, plain = rng(seed), rng(seed)
    assert fit_fim(tokens, ids, room, fast, Shares(spm_rate)) == plain_fit(tokens, ids, room, plain, spm_rate)
    assert fast.random() == plain.random()  # what follows is drawn alike


@any_tokenizer
def test_windows_of_code_equal_the_plain_way(name: str) -> None:
    """Long pieces, as training has them; ids in the shards' type."""
    tokens = tokenizer(name)
    ids: Any = np.array(tokens.encode(tiny.CODE), dtype=np.uint16)
    for seed in range(40):
        begin = int(rng(seed).integers(len(ids) - 700))
        window = ids[begin : begin + 700]
        assert fit_fim(tokens, window, 705, rng(seed), Shares()) == plain_fit(tokens, window, 705, rng(seed), 0.5)


@given(
    before=text_strategy, letter=st.sampled_from("azAZs"), sign=st.sampled_from("'.(_ \n\r\t1\x00\x7f"), data=st.data()
)
@settings(max_examples=300)
def test_a_seam_divides_ids(before: str, letter: str, sign: str, data: st.DataObject) -> None:
    """The theorem that the fast way rests on."""
    before, after = before + letter, sign + data.draw(text_strategy)
    both = TOKENS.encode(before + after)
    assert both == TOKENS.encode(before) + TOKENS.encode(after)
    seams = Seams(TOKENS).find(np.array(both), before + after)
    assert len(TOKENS.encode(before)) in seams


def test_only_words_that_a_cut_touches_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ids would also come, slowly, if seams were never found."""
    encoded: list[str] = []
    encode = Tokenizer.encode

    def counted(self: Tokenizer, text: str) -> list[int]:
        encoded.append(text)
        return encode(self, text)

    piece = piece_of(tiny.CODE[:6_000])
    monkeypatch.setattr(Tokenizer, "encode", counted)
    for seed in range(20):
        encoded.clear()
        assert undo_fim(apply_fim(TOKENS, piece, rng(seed), Shares())) == piece.text.encode()
        assert sum(map(len, encoded)) < 600


def test_which_tokenizers_have_seams() -> None:
    text = "return x.y(z) + 1"
    num_seams = {}
    for name in NAMES:
        ids = np.array(tokenizer(name).encode(text), dtype=np.int64)
        num_seams[name] = len(Seams(tokenizer(name)).find(ids, text))
    assert num_seams == {"ours": 4, "accents": 4, "added tokens": 4, "no words": 0, "gpt2": 0, "lines": 0}
    normalized = changed(normalizer={"type": "Replace", "pattern": {"String": "~~~"}, "content": "~~~"})
    assert len(Seams(normalized).find(np.array(TOKENS.encode(text)), text)) == 0
    tagged = tokenizer("added tokens").encode("a.b <tool_call> c.d")
    assert len(Seams(tokenizer("added tokens")).find(np.array(tagged), "a.b <tool_call> c.d")) == 0


# ---------------------------------------------------------------- what rearranging promises


@given(text=text_strategy, seed=st.integers(0, 2**32), spm_rate=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=200)
def test_undoing_fim_gives_every_byte_back(text: str, seed: int, spm_rate: float) -> None:
    ids = apply_fim(TOKENS, piece_of(text), rng(seed), Shares(spm_rate))
    assert undo_fim(ids) == text.encode()
    assert Counter(ids)[EOS] == 1
    assert ids[-1] == EOS


@given(text=text_strategy, seed=st.integers(0, 2**32))
def test_both_orders_cut_at_the_same_characters(text: str, seed: int) -> None:
    psm, spm = (apply_fim(TOKENS, piece_of(text), rng(seed), Shares(rate)) for rate in (0.0, 1.0))
    first, second = sorted(rng(seed).integers(0, len(text) + 1, size=2).tolist())
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    assert psm == [*TOKENS.fim_prompt(prefix, suffix), *TOKENS.encode(middle), EOS]
    assert spm[:2] == [SENTINELS[0], SENTINELS[1]]
    at = spm.index(SENTINELS[2])
    assert spm[2:at] == TOKENS.encode(suffix)
    assert spm[at + 1 : -1] == TOKENS.encode(prefix + middle)


def test_split_pieces_are_encoded_in_parts_and_cursors_are_where_they_stand() -> None:
    text, orders = tiny.CODE[:2_000], Counter[str]()
    for seed in range(400):
        ids = apply_fim(TOKENS, piece_of(text), rng(seed), Shares(0.5, split=0.5, cursor=1.0))
        assert undo_fim(ids) == text.encode()
        generator = rng(seed)
        assert generator.random() < 1.0  # the draw of `cursor`
        first, second = at_cursor(text, generator, "near the end")
        prefix, middle, suffix = (TOKENS.encode(part) for part in (text[:first], text[first:second], text[second:]))
        whole = TOKENS.encode(text[:second])
        spm = [*TOKENS.join_fim_prompt([], suffix, use_spm=True)]
        forms = {
            "psm": [*TOKENS.join_fim_prompt(prefix, suffix), *middle, EOS],
            "split": [*spm, *prefix, *middle, EOS],
            "spm": [*spm, *whole, EOS],
        }
        names = [name for name, form in forms.items() if form == ids]
        assert names
        orders[names[0] if len(names) == 1 else "alike"] += 1
    assert orders["psm"] / 400 == pytest.approx(0.5, abs=0.08)
    assert orders["split"] > 40  # half of SPM's, but for cuts where both ways give the same ids
    assert orders["spm"] > 40


def test_cuts_are_uniform_over_characters_and_reach_the_ends() -> None:
    piece, generator = piece_of("abcdefghij"), rng(0)
    lengths = Counter[int]()
    for _ in range(3_000):
        ids = apply_fim(TOKENS, piece, generator, Shares(0.0))
        lengths[len(TOKENS.decode(ids[: ids.index(SENTINELS[1])]))] += 1
    assert set(lengths) == set(range(11))
    # The smaller of two uniform positions among 11 is k with chance (2 * (10 - k) + 1) / 121.
    for k, count in lengths.items():
        assert abs(count / 3_000 - (2 * (10 - k) + 1) / 121) < 0.03


@given(
    text=text_strategy,
    seed=st.integers(0, 2**32),
    room=st.integers(0, 80),
    begin=st.integers(0, 10),
    has_eos=st.booleans(),
)
@settings(max_examples=200)
def test_what_fits_is_whole(text: str, seed: int, room: int, begin: int, has_eos: bool) -> None:
    """Also for pieces that begin and end inside a character: a prefix of the piece's bytes, in at most `room` ids."""
    ids = np.array(TOKENS.encode(text)[begin:] + [EOS] * has_eos, dtype=np.int64)
    arranged = fit_fim(TOKENS, ids, room, rng(seed), Shares())
    raw = TOKENS.decode_bytes(ids)
    if arranged is None:
        assert len(raw.decode("utf-8", "surrogateescape")) < 8 or room < 4 + 3 + len(ids)
        return
    assert len(arranged) <= room
    assert raw.startswith(undo_fim(arranged))
    if len(ids) - has_eos <= room - 20:
        assert undo_fim(arranged) == raw


@pytest.mark.parametrize(
    "ids", [[], [EOS], [1, 2, 3], [*SENTINELS, 5], [SENTINELS[0], SENTINELS[2], SENTINELS[1], EOS]]
)
def test_other_ids_are_not_undone(ids: list[int]) -> None:
    with pytest.raises(AssertionError, match=r"sentinels are missing|not a fill-in-the-middle"):
        undo_fim(ids)
