"""Ternary weights, counted; and how they move: the share that flipped between two looks, and the share of zeros."""

from smelter.bitnet import bit_linears
from smelter.model import Model


def trit_counts(model: Model) -> dict[str, dict[int, int]]:
    """How many weights are -1, 0 and 1, by kind of layer (q_proj, ..., down_proj)."""
    counts: dict[str, dict[int, int]] = {}
    for name, layer in bit_linears(model):
        of_kind = counts.setdefault(name.rsplit(".", 1)[-1], {-1: 0, 0: 0, 1: 0})
        for trit in of_kind:
            of_kind[trit] += int((layer.trits == trit).sum())
    return counts


class TritWatch:
    """Looks at a model's trits, and remembers them until the next look."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._last = {name: layer.trits.clone() for name, layer in bit_linears(model)}

    def metrics(self) -> dict[str, float]:
        """Share of trits that flipped since the last look, and of zeros per kind of layer; {} without any."""
        flips, count = 0, 0
        zeros: dict[str, list[float]] = {}
        for name, layer in bit_linears(self._model):
            flips += int((layer.trits != self._last[name]).sum())
            count += layer.trits.numel()
            self._last[name].copy_(layer.trits)
            zeros.setdefault(name.rsplit(".", 1)[-1], []).append(float((layer.trits == 0).float().mean()))
        sparsity = {f"sparsity/{kind}": sum(shares) / len(shares) for kind, shares in zeros.items()}
        return {"trit_flips": flips / count, **sparsity} if count else {}
