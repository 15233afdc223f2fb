"""Which tokens have a role, such as ending a document: their names, and where a foreign tokenizer.json has its own."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from smelter.base import ConfigError

CHAT_ROLES = ("im_start", "im_end")
"""Roles that a tokenizer may do without."""


@dataclass(frozen=True)
class SpecialTokens:
    """Names of the tokens that no text encodes to."""

    eos: str = "<|endoftext|>"
    """Ends every document, and so also separates and begins them."""
    pad: str = "<|pad|>"
    """Fills what is left of a row; never a target."""
    fim_prefix: str = "<|fim_prefix|>"
    """Stands before the prefix."""
    fim_middle: str = "<|fim_middle|>"
    """Stands before the middle."""
    fim_suffix: str = "<|fim_suffix|>"
    """Stands before the suffix."""
    im_start: str = "<|im_start|>"
    """Begins a message of a conversation (see `smelter.tokens.chat`); empty where a tokenizer has no conversations."""
    im_end: str = "<|im_end|>"
    """Ends a message; empty together with `im_start`."""

    def __post_init__(self) -> None:
        has_required = all(name for role, name in self.roles.items() if role not in CHAT_ROLES)
        if len(set(self.names)) < len(self.names) or not has_required or bool(self.im_start) != bool(self.im_end):
            raise ConfigError(f"special tokens {', '.join(self.roles.values())}: all must differ and none be empty")

    @property
    def roles(self) -> dict[str, str]:
        """The name of each role that there is, in the order in which training gives them ids."""
        roles = {item.name: str(getattr(self, item.name)) for item in fields(self)}
        return {role: name for role, name in roles.items() if name or role not in CHAT_ROLES}

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in that order."""
        return tuple(self.roles.values())


# What the known tokenizers call theirs. The three of FIM belong together: (prefix, middle, suffix).
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<\uff5cend▁of▁sentence\uff5c>", "</s>", "<eos>")
_PAD_NAMES = ("<|pad|>", "<|fim_pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>")
_FIM_NAMES = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("▁<PRE>", "▁<MID>", "▁<SUF>"),
    ("<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁end\uff5c>", "<\uff5cfim▁hole\uff5c>"),
)


def find_roles(values: dict[str, Any], preferred: SpecialTokens, add_chat: bool) -> tuple[SpecialTokens, list[str]]:
    """Which token has which role in a file, and in words what differs from `preferred`; marks them as special."""
    added = {token["content"]: token for token in values.get("added_tokens", [])}
    present = set(added) | set(values["model"]["vocab"])
    stored = (values.get("post_processor") or {}).get("special_tokens") or {}
    remembered = {role: entry["tokens"][0] for role, entry in stored.items() if entry.get("tokens")}
    wanted = {item.name: str(getattr(preferred, item.name)) for item in fields(preferred)}

    def first(role: str, names: Sequence[str]) -> str:
        candidates: list[str] = [wanted[role], remembered.get(role, wanted[role]), *names]
        return next((name for name in candidates if name in present), wanted[role])

    family = next((names for names in _FIM_NAMES if present.issuperset(names)), ())
    roles = {"eos": first("eos", _EOS_NAMES), "pad": first("pad", _PAD_NAMES)}
    for i, role in enumerate(("fim_prefix", "fim_middle", "fim_suffix")):
        roles[role] = first(role, family[i : i + 1])
    known = remembered if "eos" in remembered else {role: "" for role in CHAT_ROLES if wanted[role] in present}
    has_chat = add_chat or all(role in known for role in CHAT_ROLES)
    roles |= {role: wanted[role] if has_chat else "" for role in CHAT_ROLES}
    notices = [
        f"the {role} token is {name!r}" for role, name in roles.items() if name in present and name != wanted[role]
    ]
    missing = [name for name in roles.values() if name and name not in present]
    if missing:
        notices.append(f"added to the vocabulary: {', '.join(missing)}")
    for name in roles.values():
        if name in added:
            added[name] |= {"special": True, "normalized": False, "lstrip": False, "rstrip": False}
    return SpecialTokens(**roles), notices
