"""The tokenizer against Transformers, SentencePiece and hostile text: every byte back, no text a special token."""

import io
import json
import random
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import generate_merges
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from smelter.base.errors import ConfigError, DataError
from smelter.tokens.roles import SpecialTokens
from smelter.tokens.tokenizer import MAX_TOKEN_BYTES, Tokenizer

CODE = Path(textwrap.__file__).read_text(encoding="utf-8")
OURS = Tokenizer.train([CODE], 700)

TRICKY = [
    "def f(x):\n    return x  # it's\r\n\r\n\r\n\tWe'LL 'Re 12345 3.14e-10\n\n   \n",
    "   leading and trailing   ",
    "naïve café 漢字かな交じり Ωmega\u00a0nbsp\u2028line ﬁ",
    "e\u0301 decomposed, \u212b Ångström, \ufeff mark",
    "🙂👩‍👩‍👧 (emoji) \x00\x07\x1b[0m",
    "<|endoftext|><|fim_prefix|>x<|fim_suffix|>y<|fim_middle|><|pad|>",
    "a" * 300 + " " * 300 + "\n" * 50 + "+-" * 200,
    "x\n\n\n  y\r\rz \n w\t\t\n",
    "",
]
NAMES = SpecialTokens().names

# Words, signs and special tokens side by side find more than characters drawn alone.
text_strategy = st.lists(
    st.one_of(st.text(max_size=20), st.sampled_from([*TRICKY, *NAMES, "\u2581", " ", "\n", "'ll", "if ", "<s>"])),
    max_size=6,
).map("".join)


def sentencepiece_like_llama() -> str:
    """A tokenizer.json as Llama 2's: SentencePiece BPE with byte fallback and a space put before the text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE.splitlines()),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in range(processor.get_piece_size())}
    vocab = {piece: index for index, piece in enumerate(scores)}
    merges = generate_merges(vocab, scores)
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend.to_str()


def qwen2_like() -> tokenizers.Tokenizer:
    """Transformers' own construction of a Qwen2 tokenizer, over a vocabulary of ours."""
    model = json.loads(OURS._backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    qwen: Any = Qwen2Tokenizer(vocab=vocab, merges=merges)
    backend: tokenizers.Tokenizer = qwen.backend_tokenizer
    return backend


@pytest.fixture(scope="module", params=["ours", "llama", "qwen2"])
def any_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Ours, SentencePiece's and Qwen2's, as they come out of `load`."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    if request.param == "ours":
        OURS.save(path)
    else:
        path.write_text(sentencepiece_like_llama() if request.param == "llama" else qwen2_like().to_str())
    return Tokenizer.load(path)


# ---------------------------------------------------------------- every byte comes back


@given(text=text_strategy)
@settings(max_examples=150)
def test_text_comes_back_and_is_never_special(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)
    special = {any_tokenizer.token_to_id(name) for name in any_tokenizer.special.names}
    assert special.isdisjoint(ids)
    assert any_tokenizer.decode(ids) == text
    assert any_tokenizer.decode_bytes(ids) == text.encode()
    assert any_tokenizer.token_num_bytes[ids].sum() == len(text.encode())


@given(raw=st.one_of(st.binary(max_size=60), text_strategy.map(lambda text: text.encode()[1:-1])))
@settings(max_examples=150)
def test_any_bytes_come_back(any_tokenizer: Tokenizer, raw: bytes) -> None:
    assert any_tokenizer.decode_bytes(any_tokenizer.encode_bytes(raw)) == raw


@given(text=text_strategy, data=st.data())
def test_ids_cut_anywhere_hold_the_bytes_in_order(any_tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    ids = any_tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    assert any_tokenizer.decode_bytes(ids[:cut]) + any_tokenizer.decode_bytes(ids[cut:]) == text.encode()


@given(texts=st.lists(text_strategy, max_size=5))
def test_a_batch_is_its_texts(any_tokenizer: Tokenizer, texts: list[str]) -> None:
    assert any_tokenizer.encode_batch(texts) == [any_tokenizer.encode(text) for text in texts]


@given(text=st.text(max_size=30))
def test_decoding_with_special_tokens_names_them(text: str) -> None:
    ids = [OURS.fim_prefix_id, *OURS.encode(text), OURS.eos_id]
    assert OURS.decode(ids) == text
    assert OURS.decode(ids, skip_special_tokens=False) == f"<|fim_prefix|>{text}<|endoftext|>"


def test_a_cut_character_is_replaced_in_text_only() -> None:
    ids = OURS.encode_bytes("漢".encode()[:2])
    assert OURS.decode(ids) == "\ufffd"
    assert OURS.decode_bytes(ids) == "漢".encode()[:2]


def test_half_a_surrogate_pair_is_refused_in_words() -> None:
    with pytest.raises(DataError, match="surrogate"):
        OURS.encode("a\ud800b")
    with pytest.raises(DataError, match="surrogate"):
        OURS.encode_batch(["fine", "a\ud800b"])


@pytest.mark.parametrize("ids", [[0, 10**6], np.array([700])])
def test_an_unknown_id_is_refused(ids: Any) -> None:
    with pytest.raises(DataError, match="outside"):
        OURS.decode_bytes(ids)


# ---------------------------------------------------------------- against others


@given(text=text_strategy)
@settings(max_examples=200)
def test_splits_text_as_qwen2_does(text: str) -> None:
    """Same pieces as Transformers' Qwen2 tokenizer, after our (missing) and without its (NFC) normaliser."""
    assert OURS._backend.pre_tokenizer.pre_tokenize_str(text) == qwen2_like().pre_tokenizer.pre_tokenize_str(text)


@pytest.mark.parametrize("text", TRICKY)
def test_transformers_gives_the_same_ids(text: str, tmp_path: Path) -> None:
    OURS.save(tmp_path / "tokenizer.json")
    theirs: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs(text, split_special_tokens=True).input_ids == OURS.encode(text)
    assert theirs.decode(OURS.encode(text), clean_up_tokenization_spaces=False) == text
    assert len(theirs) == OURS.vocab_size


def test_transformers_sees_the_special_tokens(tmp_path: Path) -> None:
    OURS.save(tmp_path / "tokenizer.json")
    theirs: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    prompt = "<|fim_prefix|>def f(<|fim_suffix|>):\n<|fim_middle|>"
    assert theirs(prompt).input_ids == OURS.fim_prompt("def f(", "):\n")
    swapped = "<|fim_prefix|><|fim_suffix|>):\n<|fim_middle|>def f("
    assert theirs(swapped).input_ids == OURS.fim_prompt("def f(", "):\n", use_spm=True)


def test_a_loaded_llama_tokenizer_keeps_its_ids(tmp_path: Path) -> None:
    original = tokenizers.Tokenizer.from_str(sentencepiece_like_llama())
    (tmp_path / "tokenizer.json").write_text(original.to_str())
    loaded = Tokenizer.load(tmp_path)
    for text in ("def f(x):\n  return x", "naïve 漢字", "a  b\tc"):
        assert loaded.encode(" " + text) == original.encode(text, add_special_tokens=False).ids
    assert loaded.special.eos == "</s>"
    assert loaded.eos_id == 2
    assert any("no space" in notice for notice in loaded.notices)
    assert any("<|fim_prefix|>" in notice for notice in loaded.notices)
    loaded.save(tmp_path / "ours.json")
    theirs: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "ours.json"))
    assert theirs("  if x:\n").input_ids == loaded.encode("  if x:\n")
    assert theirs.decode(loaded.encode("  if x:\n"), clean_up_tokenization_spaces=False) == "  if x:\n"


def test_a_loaded_qwen2_tokenizer_keeps_its_ids_but_not_nfc(tmp_path: Path) -> None:
    original = qwen2_like()
    (tmp_path / "tokenizer.json").write_text(original.to_str())
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(CODE) == original.encode(CODE, add_special_tokens=False).ids
    assert any("NFC" in notice for notice in loaded.notices)
    assert loaded.decode(loaded.encode("e\u0301")) == "e\u0301"
    assert original.decode(original.encode("e\u0301").ids) == "\u00e9"


def test_a_teachers_own_infilling_tokens_are_found(tmp_path: Path) -> None:
    values = json.loads(OURS._backend.to_str())
    text = json.dumps(values).replace("<|fim_prefix|>", "<fim_prefix>")
    text = text.replace("<|fim_middle|>", "<fim_middle>").replace("<|fim_suffix|>", "<fim_suffix>")
    values = json.loads(text)
    values["post_processor"] = None
    for token in values["added_tokens"]:
        token["special"] = False  # as in Qwen2.5-Coder's file
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.special.fim_middle == "<fim_middle>"
    assert (loaded.fim_middle_id, loaded.vocab_size) == (OURS.fim_middle_id, OURS.vocab_size)
    assert loaded.fim_middle_id not in loaded.encode("<fim_middle>")


# ---------------------------------------------------------------- training and files


def test_training_is_deterministic_and_reproduced_by_its_file(tmp_path: Path) -> None:
    again = Tokenizer.train([CODE], 700)
    again.save(tmp_path / "tokenizer.json")
    OURS.save(tmp_path / "first.json")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    loaded = Tokenizer.load(tmp_path)
    assert loaded.hash == OURS.hash
    assert loaded.notices == ()
    (tmp_path / "marked.json").write_text((tmp_path / "tokenizer.json").read_text("utf-8"), encoding="utf-8-sig")
    assert Tokenizer.load(tmp_path / "marked.json").hash == OURS.hash
    assert loaded.special == OURS.special
    assert Tokenizer.train([CODE], 699).hash != OURS.hash
    assert Tokenizer.train([CODE], 700, SpecialTokens(eos="<eos>")).hash != OURS.hash


def test_own_names_are_remembered_by_the_file(tmp_path: Path) -> None:
    names = SpecialTokens("<E>", "<P>", "<1>", "<2>", "<3>")
    trained = Tokenizer.train([CODE], 300, names)
    trained.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.special == names
    assert loaded.hash == trained.hash
    assert loaded.encode("<E><1>") == trained.encode("<E><1>")


def test_special_tokens_stand_behind_256_bytes_and_the_merges() -> None:
    ids = [OURS.eos_id, OURS.pad_id, OURS.fim_prefix_id, OURS.fim_middle_id, OURS.fim_suffix_id]
    assert [*ids, OURS.im_start_id, OURS.im_end_id] == list(range(693, 700))
    assert OURS.vocab_size == 700
    assert OURS.token_num_bytes.tolist()[:256] == [1] * 256
    assert OURS.token_num_bytes.tolist()[695:] == [0] * 5
    assert {OURS.decode_bytes([i]) for i in range(256)} == {bytes([i]) for i in range(256)}


def test_no_token_is_longer_than_the_limit() -> None:
    trained = Tokenizer.train(["licence" * 40 + "\n" + "=" * 400] * 50, 600)
    assert int(trained.token_num_bytes.max()) <= MAX_TOKEN_BYTES
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFG"
    longest = [Tokenizer.train([letters[:size]] * 20, 400).token_num_bytes.max() for size in (31, 32, 33)]
    assert longest == [31, 32, 17]
    assert any("supports only" in notice for notice in trained.notices)


def test_a_vocabulary_needs_room_for_bytes_and_special_tokens() -> None:
    with pytest.raises(ConfigError, match="263 or more"):
        Tokenizer.train([CODE], 260)
    assert Tokenizer.train([], 263).vocab_size == 263


def test_a_special_token_that_text_contains_is_refused() -> None:
    with pytest.raises(ConfigError, match="'self'"):
        Tokenizer.train(["self " * 100], 400, SpecialTokens(eos="self"))
    for names in ({"eos": "<a>", "pad": "<a>"}, {"pad": ""}, {"im_end": ""}, {"im_start": "<|pad|>"}):
        with pytest.raises(ConfigError, match="differ"):
            SpecialTokens(**names)


def test_conversations_tokens_are_optional_and_added_on_demand(tmp_path: Path) -> None:
    """A file without them keeps its ids and its hash; one of another maker has them if it has their names."""
    old = Tokenizer.train([CODE], 400, SpecialTokens(im_start="", im_end=""))
    old.save(tmp_path / "old.json")
    loaded = Tokenizer.load(tmp_path / "old.json")
    assert (loaded.im_start_id, loaded.im_end_id) == (None, None)
    assert (loaded.hash, loaded.vocab_size, loaded.eos_id, loaded.notices) == (old.hash, 400, 395, ())
    added = Tokenizer.load(tmp_path / "old.json", add_chat=True)
    assert (added.im_start_id, added.im_end_id, added.eos_id) == (400, 401, 395)
    assert added.notices == ("added to the vocabulary: <|im_start|>, <|im_end|>",)
    assert added.hash != old.hash
    added.save(tmp_path / "added.json")
    assert Tokenizer.load(tmp_path / "added.json").hash == added.hash
    values = json.loads((tmp_path / "added.json").read_text()) | {"post_processor": None}
    (tmp_path / "other.json").write_text(json.dumps(values))
    assert Tokenizer.load(tmp_path / "other.json").im_end_id == 401
    # What the file remembers goes before names that are known: its maker used it without conversations.
    values["post_processor"] = json.loads((tmp_path / "old.json").read_text())["post_processor"]
    (tmp_path / "other.json").write_text(json.dumps(values))
    assert Tokenizer.load(tmp_path / "other.json").im_end_id is None


def test_training_on_one_endless_word_is_not_quadratic() -> None:
    """300,000 letters without a space took 20 s when they were one word; cut, they are an instant."""
    word = "".join(random.Random(0).choices("abcdefghij", k=300_000))
    start = time.process_time()
    assert Tokenizer.train([word], 400).vocab_size == 400
    assert time.process_time() - start < 5


# ---------------------------------------------------------------- files that cannot be used


def damaged_files() -> dict[str, tuple[bytes, str]]:
    """Contents of a tokenizer.json, and what the error says."""
    good = json.loads(OURS._backend.to_str())
    no_byte = json.loads(json.dumps(good))
    letter = no_byte["model"]["vocab"].pop("Ā")
    no_byte["model"]["vocab"]["<hole>"] = letter
    lossy = json.loads(json.dumps(good)) | {"normalizer": {"type": "Lowercase"}}
    return {
        "empty": (b"", "not a tokenizer.json"),
        "cut": (json.dumps(good).encode()[:5_000], "not a tokenizer.json"),
        "not text": (b"\xff\xfe\x00", "not a tokenizer.json"),
        "a list": (b"[]", "only BPE"),
        "WordPiece": (json.dumps(good | {"model": {"type": "WordPiece", "vocab": {}}}).encode(), "only BPE"),
        "no vocabulary": (json.dumps(good | {"model": {"type": "BPE"}}).encode(), "not a usable"),
        "null model": (json.dumps(good | {"model": None}).encode(), "only BPE"),
        "odd part": (json.dumps(good | {"normalizer": {"type": "Nonsense"}}).encode(), "normaliser Nonsense"),
        "untyped part": (json.dumps(good | {"pre_tokenizer": {"x": 1}}).encode(), "not a usable"),
        "a byte is missing": (json.dumps(no_byte).encode(), "no token for byte 0x00"),
        "loses bytes": (json.dumps(lossy).encode(), "loses bytes"),
    }


@pytest.mark.parametrize("name", damaged_files())
def test_a_file_that_cannot_be_used_is_named(name: str, tmp_path: Path) -> None:
    content, message = damaged_files()[name]
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="check the path"):
        Tokenizer.load(tmp_path / "none.json")


def test_wordlevel_training_is_not_what_we_load(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator([CODE], trainers.WordLevelTrainer(vocab_size=50, show_progress=False))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="WordLevel"):
        Tokenizer.load(tmp_path)
