"""Trits are counted by kind of layer."""

import torch

from smelter.run.trits import trit_counts
from tests import tiny


def test_trits_are_counted_by_kind() -> None:
    model = tiny.model()
    counts = trit_counts(model)
    assert set(counts) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert sum(sum(count.values()) for count in counts.values()) == model.config.num_matrix_params
    trits = torch.cat([layer.mlp.up_proj.trits for layer in model.layers]).flatten()  # type: ignore[union-attr,misc]
    assert counts["up_proj"] == {trit: int((trits == trit).sum()) for trit in (-1, 0, 1)}
    assert trit_counts(tiny.model(use_ternary=False)) == {}
