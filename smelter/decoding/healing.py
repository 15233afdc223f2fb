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
    """The bytes that each row of a batch has yet to spell again, and the tokens that do so."""

    def __init__(self, tokenizer: Tokenizer, pending: Sequence[bytes]) -> None:
        self._pending = list(pending)
        self._tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        self._allowed = lru_cache(maxsize=256)(self._make_allowed)

    def _make_allowed(self, pending: bytes) -> Tensor:
        # Special tokens have no bytes; they would spell nothing, for ever.
        return torch.tensor([bool(t) and (t.startswith(pending) or pending.startswith(t)) for t in self._tokens])

    def start(self, row: int, pending: bytes) -> None:
        """Row `row` begins anew and must spell `pending` first."""
        self._pending[row] = pending

    def is_pending(self, row: int) -> bool:
        """Whether the row has bytes left to spell; what ends a text does not end it before that."""
        return bool(self._pending[row])

    def restrict(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """`logits` [B, V] of the rows with every token that does not spell what is pending at -infinity."""
        if not any(self._pending[row] for row in rows):
            return logits
        allowed = torch.ones(logits.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            if self._pending[row]:
                known = self._allowed(self._pending[row])
                allowed[i] = False
                allowed[i, : len(known)] = known
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def advance(self, row: int, token: int) -> None:
        """Row `row` wrote `token`."""
        if self._pending[row]:
            self._pending[row] = self._pending[row][len(self._tokens[token]) :]
