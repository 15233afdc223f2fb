"""Few entries of a distribution: unbiased by draws, exact where the likeliest are kept."""

import numpy as np
import torch

from smelter.distillation.sparse import count_draws, draw, entropy, likeliest


def uniforms(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def frequencies(probs: torch.Tensor, num_draws: int, repeats: int) -> torch.Tensor:
    """[repeats, V]: draws / their number, of one distribution drawn from again and again."""
    ids = draw(probs.expand(repeats, -1), uniforms(repeats, num_draws))
    return torch.zeros(repeats, len(probs), dtype=torch.float64).scatter_add_(
        1, ids, torch.full(ids.shape, 1 / num_draws, dtype=torch.float64)
    )


def test_draws_have_the_right_expectation_and_less_variance_than_independent_ones() -> None:
    probs = (2.5 * torch.randn(300, generator=torch.Generator().manual_seed(1))).softmax(0)
    probs[7] = 0.0
    probs = probs / probs.sum()
    repeats, num_draws = 20_000, 50
    found = frequencies(probs, num_draws, repeats)
    independent = (probs * (1 - probs) / num_draws).double()
    error = (found.mean(0) - probs) / (independent / repeats).sqrt().clamp_min(1e-12)
    assert float(error.abs().max()) < 5.0  # standard deviations, of 300 ids
    assert found[:, 7].sum() == 0
    is_common = probs > 1e-3  # the measured variance of rare ids is itself chance
    assert float((found.var(0) / independent)[is_common].max()) < 1.05
    assert float(found.var(0).sum() / independent.sum()) < 0.7


def test_every_nth_of_the_distribution_gives_one_draw() -> None:
    probs = torch.tensor([[0.25, 0.0, 0.5, 0.25]])
    assert draw(probs, torch.zeros(1, 4, dtype=torch.float64)).tolist() == [[0, 2, 2, 3]]
    assert draw(probs, torch.full((1, 4), 1 - 2.0**-32, dtype=torch.float64)).tolist() == [[0, 2, 2, 3]]
    last = torch.tensor([[1.0, 0.0, 0.0]])  # the largest number still falls on an id of probability above 0
    assert draw(last, torch.full((1, 255), 1 - 2.0**-32, dtype=torch.float64)).unique().tolist() == [0]


def test_a_large_vocabulary_keeps_its_tail() -> None:
    """A sum in float32 would give the ids at the end of 150,000 another probability."""
    probs = torch.full((1, 150_000), 1 / 150_000)
    ids = draw(probs.expand(100, -1), uniforms(100, 50)).double()
    expected = (torch.arange(50) + 0.5) * 3_000
    assert float((ids.mean(0) - expected).abs().max()) < 5 * 3_000 / (12 * 100) ** 0.5


def test_equal_draws_are_counted() -> None:
    entries = count_draws(np.array([[1, 1, 4, 9], [2, 2, 2, 2], [9, 10, 11, 11]]))
    assert entries.counts.tolist() == [3, 1, 3]
    assert entries.ids.tolist() == [1, 4, 9, 2, 9, 10, 11]
    assert entries.values.tolist() == [2, 1, 1, 4, 1, 1, 2]


def test_the_likeliest_and_the_entropy() -> None:
    log_probs = torch.tensor([[0.5, 0.125, 0.25, 0.125], [0.25, 0.25, 0.25, 0.25]]).log()
    entries = likeliest(log_probs, 2)
    assert entries.counts.tolist() == [2, 2]
    assert entries.ids[:2].tolist() == [0, 2]
    assert np.allclose(np.exp(entries.values), [0.5, 0.25, 0.25, 0.25])
    assert torch.allclose(entropy(log_probs.exp(), log_probs), torch.tensor([1.75, 2.0]) * np.log(2))
