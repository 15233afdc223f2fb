"""Teachers of a distillation, and their mixture of probabilities at every token.

A teacher is a model that runs beside the student (`TeacherHead`), or a table of few entries a token that one left
behind (`SparseTeacher`). Several are mixed as probabilities, each with a weight; `use_confidence` multiplies a
teacher's weight at each token by exp(-its entropy there), so that who is sure speaks louder.

A top-k teacher's tail, the mass beyond its k entries, is one category. Within the tail the teacher says nothing, so
its mass is laid out there as the student's own probabilities are: the ratio of the two is then one number over the
whole tail, and every divergence of divergence.py, with its gradient, equals that over k + 1 categories.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.base import ConfigError
from smelter.kernels import reference
from smelter.losses.divergence import Direction

MIN_TAIL = 1e-7
"""A tail's least mass: what float32 can tell of 1 - sum. A tail of 0 would make reverse KL infinite."""


@dataclass(frozen=True)
class TeacherHead:
    """A teacher's hidden states [N, C'], head [V, C'], soft-cap and weight in the mixture of probabilities."""

    hidden: Tensor
    head: Tensor
    soft_cap: float
    weight: float = 1.0

    def logits(self, rows: slice) -> Tensor:
        """Logits [n, V], float32, at the tokens `rows`."""
        return reference.soft_cap(F.linear(self.hidden[rows], self.head.to(self.hidden.dtype)).float(), self.soft_cap)

    def log_probs(self, rows: slice, temperature: float) -> Tensor:
        """Log-probabilities [n, V] at the tokens `rows`, softened."""
        return F.log_softmax(self.logits(rows) / temperature, dim=-1)


@dataclass(frozen=True)
class SparseTeacher:
    """A teacher's distribution at every token in few entries: ids [N, K] int64 and probs [N, K] float32.

    kind "sampled": counts of draws / draws, an unbiased estimate of the distribution (RS-KD, arXiv 2503.16870).
    `entropy` [N] float32 is the teacher's true entropy in nats: with it the KL that is reported is unbiased as well;
    without it the estimate's own entropy stands in.
    kind "top_k": the exact probabilities of the K likeliest, no id twice; the rest, 1 - sum, is one more category,
    the tail.

    Places of probability 0 are not used, whatever their id. A row without any has no teacher: its token gets plain
    cross-entropy and no KL. `temperature` is what the teacher's logits were divided by; it must be the loss's.
    `weight` is its weight in the mixture.
    """

    ids: Tensor
    probs: Tensor
    kind: Literal["sampled", "top_k"]
    entropy: Tensor | None = None
    weight: float = 1.0
    temperature: float = 1.0


Teacher = TeacherHead | SparseTeacher


@dataclass(frozen=True)
class Mixture:
    """The mixture at n tokens: log_probs [n, V], and where there is a teacher, present [n] bool.

    `entropy` [n] is set where a teacher is sampled: the weighted mean of the teachers' entropies. The forward KL is
    then the weighted mean of the teachers' KLs, which exceeds the KL to the mixture by a constant of the teachers:
    the mixture's own entropy cannot be had from draws.
    """

    log_probs: Tensor
    present: Tensor
    entropy: Tensor | None


@dataclass(frozen=True)
class SparseTarget:
    """A mixture at n tokens that needs no row over the vocabulary: ids and probs [n, K], present [n, 1] bool.

    tail [n, 1] is the mass of one more category, all other ids; None where there is none. entropy [n, 1].
    """

    ids: Tensor
    probs: Tensor
    tail: Tensor | None
    entropy: Tensor
    present: Tensor


def _is_sampled(teacher: Teacher) -> bool:
    return isinstance(teacher, SparseTeacher) and teacher.kind == "sampled"


def checked_teachers(teachers: Sequence[Teacher], direction: Direction, temperature: float) -> tuple[Teacher, ...]:
    """The teachers of positive weight; ConfigError for what a sparse one cannot serve."""
    for teacher in teachers:
        if not isinstance(teacher, SparseTeacher):
            continue
        if teacher.kind == "sampled" and direction != "forward":
            raise ConfigError(
                f'distillation.kl_direction = "{direction}": sampled probabilities give an unbiased gradient for '
                '"forward" only: use that, or a teacher of kind "top_k"'
            )
        if not math.isclose(teacher.temperature, temperature, rel_tol=1e-6):
            raise ConfigError(
                f"distillation.temperature = {temperature}, but the cached probabilities were made at "
                f"{teacher.temperature}: set temperature = {teacher.temperature}, or make them anew"
            )
    return tuple(teacher for teacher in teachers if teacher.weight > 0)


def needs_no_rows(teachers: Sequence[Teacher], direction: Direction, temperature: float) -> bool:
    """Whether `sparse_target` can stand for these teachers."""
    kinds = [teacher.kind if isinstance(teacher, SparseTeacher) else "head" for teacher in teachers]
    return direction == "forward" and temperature == 1 and (kinds == ["top_k"] or set(kinds) == {"sampled"})


def _negative_entropy(probs: Tensor) -> Tensor:
    """sum p log p [n, 1] of probabilities [n, K]."""
    return torch.xlogy(probs, probs).sum(-1, keepdim=True)


def _tail(probs: Tensor) -> Tensor:
    return (1 - probs.sum(-1, keepdim=True)).clamp_min(MIN_TAIL)


def _stated_entropy(teacher: SparseTeacher, rows: slice) -> Tensor:
    """The entropy [n, 1] that came with the teacher, or that of its entries (and tail)."""
    if teacher.entropy is not None:
        return teacher.entropy[rows].unsqueeze(-1)
    probs = teacher.probs[rows]
    tails = _negative_entropy(_tail(probs)) if teacher.kind == "top_k" else 0.0
    return -(_negative_entropy(probs) + tails)


def _log_weight(weight: float, entropy: Tensor | None, present: Tensor) -> Tensor:
    """Logarithm [n, 1] of a teacher's unnormalised weight; `entropy` where confidence counts."""
    log_weight = torch.full_like(present, math.log(weight), dtype=torch.float32)
    if entropy is not None:
        log_weight = log_weight - entropy
    return log_weight.masked_fill(~present, float("-inf"))


def _normalised(log_weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Weights [n, M] that sum to 1 where any teacher is present, else 0; and that presence [n, 1]."""
    stacked = torch.cat(log_weights, dim=-1)
    total = torch.logsumexp(stacked, dim=-1, keepdim=True)
    present = total > float("-inf")
    return (stacked - torch.where(present, total, 0.0)).exp(), present


def sparse_target(teachers: Sequence[Teacher], rows: slice, use_confidence: bool) -> SparseTarget:
    """The mixture of teachers for which `needs_no_rows`, at the tokens `rows`."""
    ids, probs, entropies, log_weights, tail = [], [], [], [], None
    for teacher in teachers:
        assert isinstance(teacher, SparseTeacher)
        own = teacher.probs[rows]
        present = own.sum(-1, keepdim=True) > 0
        stated = _stated_entropy(teacher, rows)
        if teacher.kind == "top_k":
            tail = _tail(own)
            # Of the k + 1 categories that are compared, whatever the whole distribution's is.
            entropies.append(-(_negative_entropy(own) + _negative_entropy(tail)))
        else:
            entropies.append(stated)
        ids.append(teacher.ids[rows])
        probs.append(own)
        log_weights.append(_log_weight(teacher.weight, stated if use_confidence else None, present))
    weights, present = _normalised(log_weights)
    if len(teachers) > 1:
        probs = [own * weights[:, i : i + 1] for i, own in enumerate(probs)]
    entropy = (torch.cat(entropies, dim=-1) * weights).sum(-1, keepdim=True)
    return SparseTarget(torch.cat(ids, dim=-1), torch.cat(probs, dim=-1), tail, entropy, present)


def mass_of_same_id(ids: Tensor, mass: Tensor) -> Tensor:
    """For ids [n, L] and mass [n, L]: at each place the sum of the mass of all places of its row with its id."""
    ordered, order = ids.sort(dim=-1)
    segment = F.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(-1), (1, 0))
    totals = torch.zeros_like(mass).scatter_add_(-1, segment, mass.gather(-1, order))
    return torch.empty_like(mass).scatter_(-1, order, totals.gather(-1, segment))


def places(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the entries `ids` [n, K] of each row, for index_put_: scatter_ copies the whole tensor on a CPU."""
    return torch.arange(len(ids), device=ids.device).unsqueeze(-1), ids


def _sampled_row(ids: Tensor, probs: Tensor, log_q: Tensor) -> Tensor:
    """Log-probabilities [n, V] of draws: -inf where none fell."""
    row = torch.zeros_like(log_q)
    return row.index_put_(places(ids), probs, accumulate=True).log_()


def _top_k_row(ids: Tensor, probs: Tensor, log_q: Tensor) -> Tensor:
    """Log-probabilities [n, V] of the k likeliest, the tail's mass laid out as the student's log_q [n, V] is."""
    of_id = mass_of_same_id(ids, probs)  # so that unused places write what the used ones do
    row = log_q.detach().clone()
    at_ids = row.gather(-1, ids)
    row.index_put_(places(ids), at_ids.masked_fill(of_id > 0, float("-inf")))
    rest = torch.logsumexp(row, dim=-1, keepdim=True)
    row += torch.where(rest > float("-inf"), _tail(probs).log() - rest, 0.0)
    return row.index_put_(places(ids), torch.where(of_id > 0, of_id.log(), row.gather(-1, ids)))


def _row(teacher: Teacher, rows: slice, temperature: float, log_q: Tensor | None) -> tuple[Tensor, Tensor]:
    """A teacher's log-probabilities [n, V], and at which tokens it is present [n, 1]."""
    if isinstance(teacher, TeacherHead):
        row = teacher.log_probs(rows, temperature)
        return row, torch.ones(len(row), 1, dtype=torch.bool, device=row.device)
    assert log_q is not None
    ids, probs = teacher.ids[rows], teacher.probs[rows]
    row = (_sampled_row if _is_sampled(teacher) else _top_k_row)(ids, probs, log_q)
    return row, probs.sum(-1, keepdim=True) > 0


def _row_entropy(row: Tensor) -> Tensor:
    """Entropy [n, 1] of log-probabilities [n, V]."""
    return -(row.exp() * row.clamp_min(torch.finfo(row.dtype).min)).sum(-1, keepdim=True)


def _entropy(teacher: Teacher, rows: slice, row: Tensor) -> Tensor:
    """Entropy [n, 1] of a teacher, which does not depend on the student."""
    return _stated_entropy(teacher, rows) if isinstance(teacher, SparseTeacher) else _row_entropy(row)


@torch.no_grad()
def mixture(
    teachers: Sequence[Teacher], rows: slice, temperature: float, log_q: Tensor | None, use_confidence: bool
) -> Mixture:
    """The mixture at the tokens `rows`; log_q [n, V], the student's at that temperature, for sparse teachers."""
    is_sampled = any(_is_sampled(teacher) for teacher in teachers)
    mixed: Tensor | None = None
    log_weights, entropies = [], []
    for teacher in teachers:
        row, present = _row(teacher, rows, temperature, log_q)
        if len(teachers) == 1 and isinstance(teacher, TeacherHead):
            return Mixture(row, present.squeeze(-1), None)
        if is_sampled:
            entropies.append(_entropy(teacher, rows, row) if _is_sampled(teacher) else _row_entropy(row))
        confidence = _entropy(teacher, rows, row) if use_confidence else None
        log_weight = _log_weight(teacher.weight, confidence, present)
        log_weights.append(log_weight)
        row += log_weight
        mixed = row if mixed is None else torch.logaddexp(mixed, row, out=mixed)
        del row
    assert mixed is not None
    weights, present = _normalised(log_weights)
    total = torch.logsumexp(torch.cat(log_weights, dim=-1), dim=-1, keepdim=True)
    mixed -= torch.where(present, total, 0.0)
    mixed.masked_fill_(~present, 0.0)  # any finite number: such tokens have no share in the divergence
    entropy = (torch.cat(entropies, dim=-1) * weights).sum(-1) if is_sampled else None
    return Mixture(mixed, present.squeeze(-1), entropy)
