"""Token healing: going on from where the cursor stands, and not only from where a token ends.

A tokenizer cuts text that ends at the cursor otherwise than the same text with its continuation: after eight
spaces of indentation comes `return` in the prompt, but training saw seven spaces and ` return`. Asked like that,
a model is asked something it has never seen. So the last token of the prompt is taken back, and the first new
tokens must spell its bytes again: any token is allowed that begins with them, or with which they begin. The model
then chooses the cut that it knows. (The remedy is that of the `guidance` library, there for its templates.)

Prefix-suffix-middle prompts need none of it: in training, too, the middle is encoded on its own.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from smelter.tokens import Tokenizer

MAX_TAKEN_BACK = 4
"""Tokens of trailing blanks that are taken back at most; of anything else it is one."""


def take_back(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[list[int], bytes]:
    """The prompt without its last token, and that token's bytes; blanks at its end go together.

    A prompt that ends in a special token or a line break comes back unchanged, with no bytes: there every
    tokenizer cuts alike.
    """
    kept, pending = list(ids), b""
    for count in range(MAX_TAKEN_BACK):
        last = tokenizer.decode_bytes(kept[-1:]) if kept else b""
        if not last or last.endswith(b"\n") or (count and last.strip(b" \t")):
            break
        kept.pop()
        pending = last + pending
        if last.strip(b" \t"):
            break
    return kept, pending


class Healing:
    """Which tokens spell what a row has yet to spell again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bytes_of = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        """What each token stands for."""
        self._allowed = lru_cache(maxsize=256)(self._make_allowed)

    def _make_allowed(self, pending: bytes) -> Tensor:
        # Special tokens have no bytes; they would spell nothing, for ever.
        spell = [bool(raw) and (raw.startswith(pending) or pending.startswith(raw)) for raw in self.bytes_of]
        return torch.tensor(spell if pending else [True] * len(spell))

    def restrict(self, logits: Tensor, pending: Sequence[bytes]) -> Tensor:
        """`logits` [B, V] with every token that does not spell what is `pending` in its row at -infinity."""
        if not any(pending):
            return logits
        allowed = torch.stack([self._allowed(raw) for raw in pending])
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))
