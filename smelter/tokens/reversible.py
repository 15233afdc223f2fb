"""What lets text come back byte by byte: changes to a foreign tokenizer.json, or its refusal with the reason.

Libraries load files that lose bytes or give other ids than they state without a word. What can be put right here is:
the meaning of the vocabulary stays, text may be cut into other tokens of it than its maker's program would cut it
into. The rest is refused: normalisers that rewrite text, pieces thrown away between words, ids that differ.
"""

import re
from collections.abc import Sequence
from typing import Any

from smelter.base import DataError

SPACE_MARK = "▁"
"""SentencePiece's sign for a space (U+2581)."""

_KEEPS_TEXT = ("ByteLevel", "Digits", "FixedLength", "Metaspace", "Punctuation", "Split", "UnicodeScripts")
_NAME = re.compile(r"[<[]\S+[>\]]")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's (GPT-2's) printable stand-in for every byte, as {character: byte}."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()
_CHAR_OF_BYTE = {byte: char for char, byte in _BYTE_OF_CHAR.items()}


def is_byte_level(values: dict[str, Any]) -> bool:
    """Whether a file's tokens are spelled in stand-ins of bytes; otherwise they are characters, with byte fallback."""
    return any(part["type"] == "ByteLevel" for part in _parts(values.get("pre_tokenizer"), "pretokenizers"))


def byte_token(byte: int, byte_level: bool) -> str:
    """How a vocabulary spells a single byte."""
    return _CHAR_OF_BYTE[byte] if byte_level else f"<0x{byte:02X}>"


def piece_bytes(token: str, byte_level: bool) -> bytes:
    """What a piece of the vocabulary stands for."""
    if byte_level:
        try:
            return bytes([_BYTE_OF_CHAR[char] for char in token])
        except KeyError:
            return token.encode()
    byte = _BYTE.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace(SPACE_MARK, " ").encode()


def make_reversible(values: dict[str, Any]) -> list[str]:
    """Change a foreign file's tables where they would lose or add bytes; returns what was changed, in words.

    Raises DataError for what cannot be changed without changing the tokenizer's meaning.
    """
    values["truncation"] = values["padding"] = None
    return [*_normalizer(values), *_pieces(values), *_added_tokens(values)]


def check_ids(values: dict[str, Any], loaded: dict[str, int]) -> None:
    """Every token of a file was loaded with the id that it has there. Raises DataError.

    The library counts on from the number of tokens for those that are added, whatever the file says.
    """
    stated = [(token["content"], token["id"]) for token in values.get("added_tokens") or ()]
    for name, index in [*stated, *values["model"]["vocab"].items()]:
        if loaded.get(name) != index:
            raise DataError(
                f"token {name!r} has id {index} in the file, but is loaded as {loaded.get(name)} (ids with gaps, or "
                "a token twice): a model would be fed other tokens than its own; give the file ids without gaps"
            )


def check_distinct(vocab: dict[str, int]) -> None:
    """No id stands for two tokens. Raises DataError."""
    owners: dict[int, str] = {}
    for name, index in vocab.items():
        if (owner := owners.setdefault(index, name)) != name:
            first, second = sorted((owner, name))
            raise DataError(f"id {index} stands for {first!r} and {second!r}: give the file ids without gaps")


def _parts(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as the list of its parts, those within others included."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [part for inner in component[key] for part in _parts(inner, key)]


def _normalizer(values: dict[str, Any]) -> list[str]:
    notices = []
    normalizers = _parts(values.get("normalizer"), "normalizers")
    kept = [part for part in normalizers if part["type"] not in ("NFC", "Prepend")]
    for part in kept:
        if part["type"] != "Replace":
            raise DataError(f"normaliser {part['type']} changes text: a tokenizer that loses bytes")
        if part["pattern"] != {"String": " "} or part["content"] != SPACE_MARK:
            pattern, content = next(iter(part["pattern"].values())), part["content"]
            raise DataError(f"normaliser Replace makes {content!r} of {pattern!r}: a tokenizer that loses bytes")
    if any(part["type"] == "NFC" for part in normalizers):
        notices.append("NFC normalisation left out: it changes bytes")
    values["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    prepends = any(part["type"] == "Prepend" for part in normalizers)
    pre_tokenizers = _parts(values.get("pre_tokenizer"), "pretokenizers")
    for part in pre_tokenizers + _parts(values.get("decoder"), "decoders"):
        if part["type"] == "ByteLevel":
            prepends |= part["add_prefix_space"] and part in pre_tokenizers
            part["add_prefix_space"] = False
        elif part["type"] == "Metaspace":
            prepends |= part.pop("add_prefix_space", True) and part.get("prepend_scheme") != "never"
            part["prepend_scheme"] = "never"
    if prepends:
        notices.append("no space is put before the text: infilling joins pieces, and bytes must come back")
    decoder = values.get("decoder")
    if decoder and decoder.get("type") == "Sequence":
        decoder["decoders"] = [part for part in decoder["decoders"] if part["type"] != "Strip"]
    return notices


def _pieces(values: dict[str, Any]) -> list[str]:
    """What happens between the normaliser and the ids."""
    for part in _parts(values.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] not in _KEEPS_TEXT or part.get("behavior") == "Removed":
            raise DataError(f"pre-tokenizer {part['type']} throws text away: a tokenizer that loses bytes")
    model = values["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise DataError(f"{key} {model[key]!r} marks tokens: they would not spell the text's bytes")
    if not is_byte_level(values) and not model.get("byte_fallback"):
        raise DataError("neither byte-level nor with byte_fallback: what the vocabulary lacks is lost")
    if not model.get("dropout"):
        return []
    model["dropout"] = None
    return ["dropout of merges left out: a text has one encoding"]


def _added_tokens(values: dict[str, Any]) -> list[str]:
    """Added tokens are matched in text before all else, unless special: only those that stand for this text may be."""
    vocab, byte_level = values["model"]["vocab"], is_byte_level(values)
    kept, names, stripping = [], [], []
    for token in values.get("added_tokens") or ():
        content = token["content"]
        is_byte = bool(_BYTE.fullmatch(content)) if not byte_level else content in _BYTE_OF_CHAR
        if (
            not token["special"]
            and (is_byte or content in vocab)
            and piece_bytes(content, byte_level) != content.encode()
        ):
            # Spelled as pieces are: text that reads like it is other text, so it belongs among the pieces.
            if vocab.setdefault(content, token["id"]) != token["id"]:
                raise DataError(f"token {content!r} has two ids, {vocab[content]} and {token['id']}: keep one of them")
            continue
        kept.append(token)
        if not token["special"] and _NAME.fullmatch(content):
            token["special"] = True
            names.append(content)
        elif not token["special"] and (token["lstrip"] or token["rstrip"]):
            token["lstrip"] = token["rstrip"] = False
            stripping.append(content)
    values["added_tokens"] = kept
    notices = []
    if names:
        notices.append(f"names that no text becomes, as of special tokens: {_some(names)}")
    if stripping:
        notices.append(f"white space around a token stays: {_some([repr(name) for name in stripping])}")
    return notices


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
