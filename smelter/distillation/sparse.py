"""A teacher's distribution in few entries: by draws, which keep the gradient unbiased, or the k likeliest.

All probabilities of a token are V floats; what training needs of them is their mean in the gradient of the KL. Counts
of draws from the distribution, divided by their number, have the right expectation for every token id, so the
gradient of the forward KL is right on average (Anshumann et al., "Sparse Logit Sampling", 2503.16870: 50 draws keep
about 12 ids). The k likeliest are exact where they are, and silent about how the rest is divided.

The draws are stratified: one out of each n-th of the cumulative distribution instead of n from the whole. Every
count keeps its expectation, its variance is never larger than that of independent draws (Neyman 1934), and the draws
come in order, so equal ones stand together and nothing is sorted.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Entries:
    """What is kept of N distributions: a different number of entries for each, one after the other."""

    counts: NDArray[np.int64]
    """[N]: entries of each."""
    ids: NDArray[np.int64]
    """[sum of counts]: token ids."""
    values: NDArray[Any]
    """[sum of counts]: draws that fell on each id (int64), or log-probabilities (float32)."""


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Ids [N, n] in ascending order, one drawn from each n-th of the distributions probs [N, V].

    uniforms [N, n] float64 in [0, 1) say where inside its n-th each draw falls. An id of probability 0 is never drawn.
    """
    num_draws = uniforms.shape[1]
    cumulative = probs.cumsum(-1, dtype=torch.float64)  # float32 would lose 1e-5 over a large vocabulary
    places = (torch.arange(num_draws, device=probs.device) + uniforms) / num_draws
    return torch.searchsorted(cumulative, places * cumulative[:, -1:], right=True)


def count_draws(ids: NDArray[np.int64]) -> Entries:
    """Ids [N, n], ascending in each row, as distinct ids and how often each was drawn."""
    is_first = np.ones(ids.shape, dtype=bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    begins = np.flatnonzero(is_first)
    return Entries(is_first.sum(1), ids[is_first], np.diff(begins, append=ids.size))


def likeliest(log_probs: Tensor, k: int) -> Entries:
    """The k likeliest ids of log_probs [N, V] with their log-probabilities, likeliest first."""
    top, ids = log_probs.topk(k, dim=-1)
    return Entries(np.full(len(ids), k), ids.flatten().cpu().numpy(), top.float().flatten().cpu().numpy())


def entropy(probs: Tensor, log_probs: Tensor) -> Tensor:
    """Entropy [N] in nats of probs [N, V] with their logarithms, which must be finite."""
    nats: Tensor = -torch.linalg.vecdot(probs, log_probs)
    return nats
