"""Byte-level BPE whose every encoding gives back every byte.

The vocabulary is trained with Hugging Face's `tokenizers` and saved in its `tokenizer.json`, so Transformers,
llama.cpp's converter and others read it as it is. Text is first split by Qwen2's pattern, since each llama.cpp
knows that one by name (`qwen2`). Qwen2 also normalises to NFC; we do not: NFC changes bytes (a file would
not come back as it was, and bits per byte would count another text), and llama.cpp does not do it either.

Two promises hold for every tokenizer that loads, also a foreign one: `decode_bytes(encode_bytes(b)) == b`,
and no text of any kind becomes a special token (source code *about* special tokens is just source code; only `parse`,
which is for prompts that somebody lays out, takes names for tokens). Foreign
files are changed where they would break these (NFC, a space put before the text, names matched in text), and `notices`
says so; where that is not possible they are refused (see `smelter.tokens.reversible`).

Trade-off: invalid UTF-8 costs a token per byte. It occurs only where a window cuts a character.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from smelter.base import ConfigError, DataError
from smelter.tokens.reversible import (
    SPACE_MARK,
    byte_token,
    check_distinct,
    check_ids,
    is_byte_level,
    make_reversible,
    piece_bytes,
)
from smelter.tokens.roles import SpecialTokens, find_roles

QWEN2_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenisation: words take one leading sign or space, every digit stands alone."""

MAX_TOKEN_BYTES = 32
"""Longest token that training makes: longer ones are lines that a corpus repeats, such as licence headers."""

_ESCAPED = re.compile("[\udc80-\udcff]+")
_ESCAPED_OR_MARK = re.compile(f"[\udc80-\udcff{SPACE_MARK}]+")
_LONG_RUN = re.compile(r"\S{512}|\s{512}")
_PROBES = (
    "  def f(x):\n\treturn 'é' + 'ﬁ' \r\n\r\n",
    " e\u0301 漢字🙂 ",
    "\x00\x7f\u2028\u212b\ufeff",
    f" {SPACE_MARK}  a",
    "<0x41> <0x0A>",
)


class Tokenizer:
    """Text to ids and back. Made by `train` or `load`."""

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens, notices: Sequence[str] = ()) -> None:
        """Wrap `backend`, which must be byte-level or have byte fallback; DataError where it loses bytes."""
        self.special = special
        self.notices = tuple(notices)
        backend.encode_special_tokens = True
        # Sentinels are ours to place, so no beginning-of-text is added; the unused entries of the
        # template remember which token has which role, in a place every reader of the file accepts.
        ids = {role: _id(backend, name) for role, name in special.roles.items()}
        backend.post_processor = processors.TemplateProcessing(
            single="$A",
            pair="$A $B",
            special_tokens=[{"id": role, "ids": [ids[role]], "tokens": [name]} for role, name in special.roles.items()],
        )
        self._backend = backend
        self._values: dict[str, Any] = json.loads(backend.to_str())
        self._is_byte_level = is_byte_level(self._values)
        self.eos_id: int = ids["eos"]
        self.pad_id: int = ids["pad"]
        self.fim_prefix_id: int = ids["fim_prefix"]
        self.fim_middle_id: int = ids["fim_middle"]
        self.fim_suffix_id: int = ids["fim_suffix"]
        self.im_start_id: int | None = ids.get("im_start")
        self.im_end_id: int | None = ids.get("im_end")
        self._special_names: dict[int, bytes] = {
            token["id"]: token["content"].encode() for token in self._values["added_tokens"] if token["special"]
        }
        self._token_bytes = self._bytes_of_tokens()
        self._byte_ids = self._ids_of_bytes()
        self._escape = _ESCAPED if self._is_byte_level else _ESCAPED_OR_MARK
        self._check()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special: SpecialTokens | None = None) -> "Tokenizer":
        """Learn `vocab_size` tokens: 256 bytes, then merges, then the special tokens at the end.

        The same texts in the same order give the same tokenizer. Few or small texts may support fewer tokens than
        asked for; `notices` says so. Raises ConfigError if `vocab_size` cannot hold the bytes and the special tokens.
        """
        special = special or SpecialTokens()
        minimum = 256 + len(special.names)
        if vocab_size < minimum:
            raise ConfigError(f"vocab_size = {vocab_size}: bytes and special tokens alone need {minimum} or more")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(special.names),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            max_token_length=MAX_TOKEN_BYTES + 1,  # exclusive
            show_progress=False,
        )
        backend.train_from_iterator(_without_long_runs(texts), trainer)
        for name in special.names:
            if backend.token_to_id(name) is not None:
                raise ConfigError(f"special token {name!r} is also a piece of ordinary text: choose a rarer name")
        backend.add_special_tokens(list(special.names))
        size = backend.get_vocab_size(with_added_tokens=True)
        few = f"the text supports only {size:,} of the {vocab_size:,} tokens asked for"
        return cls(backend, special, [few] if size < vocab_size else [])

    @classmethod
    def load(cls, path: Path | str, special: SpecialTokens | None = None, *, add_chat: bool = False) -> "Tokenizer":
        """Read our own file or another BPE `tokenizer.json` (byte-level, or SentencePiece's with byte fallback).

        `special` are the names to prefer; then come the roles that the file remembers and the names that known
        tokenizers use, and what is still missing is added behind the vocabulary (see `notices`): the tokens of
        conversations only with `add_chat`, since a model's embedding may have no row for them. `path` may be the
        folder that holds `tokenizer.json`. Raises DataError for a file that cannot be used.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise DataError(f"{path}: cannot read the tokenizer: {error.strerror}: check the path") from None
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}: not a tokenizer.json: {error}: the file is damaged or of another kind") from None
        model = values.get("model") if isinstance(values, dict) else None
        kind = model.get("type") if isinstance(model, dict) else None
        if kind != "BPE":
            raise DataError(f"{path}: model type is {kind!r}: only BPE tokenizers (tokenizer.json) can be used")
        try:
            names, changes = find_roles(values, special or SpecialTokens(), add_chat)
            notices = [*make_reversible(values), *changes]
            backend = tokenizers.Tokenizer.from_str(json.dumps(values))
            check_ids(values, backend.get_vocab(with_added_tokens=True))
            backend.add_special_tokens(list(names.names))
            return cls(backend, names, notices)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        except Exception as error:  # the Rust library raises nothing more specific; ours may miss any key
            raise DataError(f"{path}: not a usable tokenizer.json: {error}: fetch it anew") from None

    def save(self, path: Path | str) -> None:
        """Write `tokenizer.json`; `load` and Transformers' `PreTrainedTokenizerFast` read it."""
        self._backend.save(str(path), pretty=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special token; half surrogate pairs of `surrogateescape` become their bytes."""
        if self._is_byte_level or SPACE_MARK not in text:
            with contextlib.suppress(TypeError):  # not representable in UTF-8
                ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
                return ids
        return self._encode_escaped(text)

    def parse(self, text: str) -> list[int]:
        """Ids of a prompt that somebody lays out: the name of a special token is that token, as llama.cpp reads it."""
        parts = enumerate(self._special_pattern.split(text))  # every second part is a name
        return [index for i, part in parts for index in ([_id(self._backend, part)] if i % 2 else self.encode(part))]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        if self._is_byte_level or not any(SPACE_MARK in text for text in texts):
            with contextlib.suppress(TypeError):
                encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
                return [encoding.ids for encoding in encodings]
        return [self.encode(text) for text in texts]

    def encode_bytes(self, raw: bytes) -> list[int]:
        """Ids that `decode_bytes` turns into `raw` again; what is not UTF-8 takes a token per byte."""
        return self.encode(raw.decode("utf-8", "surrogateescape"))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Exactly the bytes that `ids` stand for; special tokens stand for none. DataError for an unknown id."""
        table = self._token_bytes
        try:
            return b"".join([table[i] for i in (ids.tolist() if isinstance(ids, np.ndarray) else ids)])
        except IndexError:
            raise DataError(f"a token id lies outside the tokenizer's 0..{self.vocab_size - 1}") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; a cut-off character becomes U+FFFD. Special tokens appear by name if not skipped."""
        if skip_special_tokens:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        names = self._special_names
        return b"".join(names.get(i) or self.decode_bytes([i]) for i in ids).decode("utf-8", "replace")

    def token_to_id(self, token: str) -> int | None:
        """Id of a token by its name in the file, None if there is none."""
        return self._backend.token_to_id(token)

    def fim_prompt(self, prefix: str, suffix: str, use_spm: bool = False) -> list[int]:
        """Ids after which the model writes the middle, the prefix and the suffix being encoded each on its own."""
        return self.join_fim_prompt(self.encode(prefix), self.encode(suffix), use_spm)

    def join_fim_prompt(self, prefix: list[int], suffix: list[int], use_spm: bool = False) -> list[int]:
        """The one place that knows the layout; the same in training and at inference (see `smelter.tokens.fim`).

        prefix-suffix-middle: [fim_prefix] prefix [fim_suffix] suffix [fim_middle]
        suffix-prefix-middle: [fim_prefix][fim_suffix] suffix [fim_middle] prefix
        """
        if use_spm:
            return [self.fim_prefix_id, self.fim_suffix_id, *suffix, self.fim_middle_id, *prefix]
        return [self.fim_prefix_id, *prefix, self.fim_suffix_id, *suffix, self.fim_middle_id]

    @property
    def values(self) -> dict[str, Any]:
        """What `tokenizer.json` holds; to be read only."""
        return self._values

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: the highest id plus one."""
        return len(self._token_bytes)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """Finds the names of special tokens; of two that begin alike the longer."""
        names = sorted((name.decode() for name in self._special_names.values()), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})")

    @cached_property
    def hash(self) -> str:
        """sha256 of all that decides which ids a text gets: equal hashes, exchangeable tokenizers."""
        model, added = self._values["model"], self._values["added_tokens"]
        parts = [
            sorted(self._backend.get_vocab(with_added_tokens=True).items()),
            model["merges"],
            [model.get("byte_fallback"), model.get("ignore_merges")],
            [self._values["normalizer"], self._values["pre_tokenizer"]],
            sorted([token["id"], token["content"], token["special"]] for token in added),
            list(self.special.names),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def token_num_bytes(self) -> NDArray[np.int64]:
        """[vocab_size]: bytes each token stands for, 0 for special tokens."""
        return np.array([len(raw) for raw in self._token_bytes], dtype=np.int64)

    def _encode_escaped(self, text: str) -> list[int]:
        """Encode between what the backend cannot represent, and put byte tokens there."""
        ids: list[int] = []
        start = 0
        try:
            for match in self._escape.finditer(text):
                ids += self._backend.encode(text[start : match.start()], add_special_tokens=False).ids
                ids += [self._byte_ids[byte] for byte in match.group().encode("utf-8", "surrogateescape")]
                start = match.end()
            ids += self._backend.encode(text[start:], add_special_tokens=False).ids
        except TypeError:
            raise DataError("text with half a surrogate pair cannot be encoded: it is not Unicode text") from None
        return ids

    def _bytes_of_tokens(self) -> list[bytes]:
        """[vocab_size] bytes of every id; none for special ones and ids without a token. DataError for a shared id."""
        vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        check_distinct(vocab)
        table = [b""] * (max(vocab.values()) + 1)
        for token, index in vocab.items():
            if index not in self._special_names:
                table[index] = piece_bytes(token, self._is_byte_level)
        for added in self._values["added_tokens"]:
            if self._is_byte_level and not added["special"]:
                table[added["id"]] = added["content"].encode()  # as it stands in the text
        return table

    def _ids_of_bytes(self) -> list[int]:
        """[256] id of every single byte; DataError if one has none."""
        ids = [self.token_to_id(byte_token(byte, self._is_byte_level)) for byte in range(256)]
        known = [index for index in ids if index is not None]
        if len(known) < 256:
            raise DataError(
                f"no token for byte 0x{ids.index(None):02X}: choose a byte-level tokenizer or one with byte fallback"
            )
        return known

    def _check(self) -> None:
        """Hold the promises of the module on texts that break careless tokenizers, around each added token, too."""
        names = [token["content"] for token in self._values["added_tokens"]]
        texts = [*_PROBES, *(f"{name}  a{name}b \t{name}\n" for name in names)]
        for text, ids in zip(texts, self.encode_batch(texts), strict=True):
            if not self._special_names.keys().isdisjoint(ids):
                raise DataError(f"ordinary text {text!r} encodes to a special token: choose another name for it")
            if self.decode_bytes(ids) != text.encode():
                raise DataError(f"{text!r} comes back as {self.decode(ids)!r}: a tokenizer that loses bytes")
        raw = bytes(range(256))
        if self.decode_bytes(self._byte_ids) != raw:
            raise DataError("single bytes come back as others: a tokenizer that loses bytes")


def _id(backend: tokenizers.Tokenizer, name: str) -> int:
    index = backend.token_to_id(name)
    assert index is not None, f"{name} was added before"
    return index


def _without_long_runs(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut inside runs (base64, tables) of which BPE training would be quadratic in the length."""
    for text in texts:
        start = 0
        for match in _LONG_RUN.finditer(text):
            yield text[start : match.end()]
            start = match.end()
        yield text[start:]
