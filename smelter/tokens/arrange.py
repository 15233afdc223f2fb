"""What becomes of the pieces of documents that a row holds: cut shorter, rearranged, with peeks, or left as they are.

And what training makes of the arrangement: which targets the positions before a suffix have, which weigh more, and
how far the positions behind it are. Every choice is drawn from generators that depend on the row alone.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from smelter.base import DataError
from smelter.config import DataConfig
from smelter.tokens.fim import Ids, Shares, fit_fim
from smelter.tokens.peeks import with_peeks
from smelter.tokens.tokenizer import Tokenizer

Arranged = Ids | list[int]
Draw = Callable[..., np.random.Generator]
"""(purpose, *counter) -> random numbers that depend on these alone."""


class Arranger:
    """Arranges the pieces of documents that are no conversations, as `[data]` of the recipe says."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, draw: Draw) -> None:
        """Raises DataError if the tokenizer has other fill-in-the-middle tokens than `config`, and they are needed."""
        self._tokenizer = tokenizer
        self._config = config
        self._draw = draw
        if config.fim_rate > 0 or config.fim_peek_tokens:
            _check_fim_tokens(config, tokenizer)
        self._shares = Shares(config.fim_spm_rate, config.fim_split_rate, config.fim_cursor_rate, config.fim_cut_rate)

    def lengths(self, size: int, rng: np.random.Generator) -> Iterator[int]:
        """Lengths from half to one and a half `fim_piece_tokens` that sum up to `size`, or `size` alone."""
        mean = self._config.fim_piece_tokens
        while mean and size > mean // 2:
            length = max(1, int(rng.integers(mean // 2, mean + mean // 2 + 1)))
            if size - length < mean // 4:
                break
            yield length
            size -= length
        yield size

    def arrange(self, ids: Ids, room: int, key: tuple[int, int, int]) -> Arranged:
        """A piece, rearranged, with peeks, or as it is, in at most `room` tokens."""
        data = self._config
        if data.fim_rate > 0:
            rng = self._draw("fim", *key)
            if rng.random() < data.fim_rate:
                rearranged = fit_fim(self._tokenizer, ids, room, rng, self._shares)
                if rearranged is not None:
                    return rearranged
        if data.fim_peek_tokens or data.fim_cut_rate:
            rng = self._draw("peeks", *key)
            return with_peeks(self._tokenizer, ids, room, rng, data.fim_peek_tokens, data.fim_cut_rate)
        return ids[:room]

    def middle_in_psm(self, piece: Arranged) -> int:
        """Where the middle begins in a piece in prefix-suffix-middle order, at the end of any other."""
        tokenizer = self._tokenizer
        if len(piece) < 2 or piece[0] != tokenizer.fim_prefix_id or piece[1] == tokenizer.fim_suffix_id:
            return len(piece)
        return list(piece).index(tokenizer.fim_middle_id) + 1

    def bridge(self, tokens: Ids, targets: NDArray[np.int64]) -> None:
        """With `fim_bridge`, change `targets`: [fim_suffix] and the token before it say what the middle begins with.

        Nobody asks them for what follows; and they stand near what the middle goes on from: [fim_middle] has only to
        fetch it. `targets[i]` is what position i of `tokens` predicts.
        """
        if not self._config.fim_bridge:
            return
        suffixes = np.flatnonzero(tokens == self._tokenizer.fim_suffix_id)
        middles = np.flatnonzero(tokens[:-1] == self._tokenizer.fim_middle_id)
        after = np.searchsorted(middles, suffixes)
        for suffix, number in zip(suffixes.tolist(), after.tolist(), strict=True):
            if number < len(middles) and suffix > 0 and tokens[suffix - 1] != self._tokenizer.fim_prefix_id:
                targets[suffix - 1 : suffix + 1] = tokens[middles[number] + 1]

    def positions(self, inputs: Ids, index: int) -> NDArray[np.int64] | None:
        """[T]: positions of row `index`, which skip up to `fim_position_skip` at each [fim_middle]; None without that.

        What stands before a suffix is to be found across any distance. A skip teaches that at the price of no token,
        as in Zhu et al. (PoSE, arXiv 2309.10400). Rotary embeddings see distances only, so a row may end beyond
        the model's context.
        """
        most = self._config.fim_position_skip
        if not most:
            return None
        steps = np.ones(len(inputs), dtype=np.int64)
        steps[0] = 0
        middles = np.flatnonzero(inputs[1:] == self._tokenizer.fim_middle_id) + 1
        rng = self._draw("skips", index)
        steps[middles] += rng.integers(0, most + 1, size=len(middles)) * (rng.random(len(middles)) < SKIPPING)
        return np.cumsum(steps)


SKIPPING = 0.7
"""Share of the middles where positions skip; at the others they go on as they will when the model is used."""


def _check_fim_tokens(config: DataConfig, tokenizer: Tokenizer) -> None:
    for role in ("prefix", "middle", "suffix"):
        token, own = getattr(config, f"fim_{role}_token"), getattr(tokenizer.special, f"fim_{role}")
        if token != own:
            raise DataError(
                f"data.fim_{role}_token = {token!r}, but the shards' tokenizer has {own!r}: set it to that, or "
                f"tokenize again with --fim-{role}-token"
            )
