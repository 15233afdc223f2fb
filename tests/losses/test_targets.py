"""Teachers in few entries, and mixtures: against formulas over explicit categories, dense autograd, and on average."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smelter.base.errors import ConfigError
from smelter.loss import Loss, LossConfig, chunked_loss, dense_loss
from smelter.losses.divergence import Direction
from smelter.losses.targets import SparseTeacher, Teacher, TeacherHead, mass_of_same_id
from tests.largest import Largest

N, C, V, K = 23, 12, 40, 6
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse", "skew", "js")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(seed: int = 0, tokens: int = N, vocab: int = V, dtype: torch.dtype = torch.float32) -> Inputs:
    """Hidden states, head, targets (some masked), weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, C, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(vocab, C, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[::7] = -100
    return hidden, head, targets, torch.rand(tokens, generator=generator)


def teacher_head(seed: int, tokens: int = N, vocab: int = V, weight: float = 1.0) -> TeacherHead:
    generator = torch.Generator().manual_seed(100 + seed)
    hidden, head = torch.randn(tokens, 8, generator=generator), torch.randn(vocab, 8, generator=generator)
    return TeacherHead(hidden, head, 0.0, weight)


def probabilities(teacher: TeacherHead, temperature: float = 1.0) -> Tensor:
    return (teacher.hidden @ teacher.head.T / temperature).softmax(-1)


def top_k(seed: int, k: int = K, weight: float = 1.0, temperature: float = 1.0, **shape: int) -> SparseTeacher:
    """The k likeliest of a teacher; every fifth token without teacher."""
    found = probabilities(teacher_head(seed, **shape), temperature).topk(k)
    probs = found.values.clone()
    probs[2::5] = 0
    return SparseTeacher(found.indices, probs, "top_k", weight=weight, temperature=temperature)


def draw(p: Tensor, draws: int, generator: torch.Generator, weight: float = 1.0) -> SparseTeacher:
    """Counts of `draws` draws of p [N, V] / draws, in as many places as there are draws: unused ones have id 0."""
    tokens, vocab = p.shape
    counts = torch.zeros(tokens, vocab).scatter_add_(
        1, torch.multinomial(p, draws, replacement=True, generator=generator), torch.ones(tokens, draws)
    )
    found = counts.topk(min(draws, vocab))
    ids = torch.where(found.values > 0, found.indices, 0)
    return SparseTeacher(ids, found.values / draws, "sampled", -torch.xlogy(p, p).sum(-1), weight)


def sampled(seed: int, draws: int = 9, weight: float = 1.0, temperature: float = 1.0, **shape: int) -> SparseTeacher:
    """Draws of a teacher; every fourth token without teacher."""
    p = probabilities(teacher_head(seed, **shape), temperature)
    made = draw(p, draws, torch.Generator().manual_seed(seed), weight)
    made.probs[1::4] = 0
    return replace(made, temperature=temperature)


MAKERS: dict[str, Callable[..., Teacher]] = {
    "head": lambda seed, weight=1.0, temperature=1.0, **shape: teacher_head(seed, weight=weight, **shape),
    "top_k": top_k,
    "sampled": sampled,
}
MIXTURES = ["top_k", "sampled", "top_k top_k", "sampled sampled", "head top_k", "head sampled", "head top_k sampled"]


def make(kinds: str, temperature: float = 1.0, **shape: int) -> list[Teacher]:
    return [
        MAKERS[kind](seed, weight=1.0 + seed, temperature=temperature, **shape)
        for seed, kind in enumerate(kinds.split())
    ]


def results(loss: Loss, hidden: Tensor, head: Tensor) -> list[Tensor]:
    return [loss.total.detach(), loss.ce, loss.z, loss.kl, *torch.autograd.grad(loss.total * 3, (hidden, head))]


def assert_chunked_is_dense(
    given_inputs: Inputs, config: LossConfig, teachers: Sequence[Teacher], chunk_size: int
) -> None:
    hidden, head, targets, weights = given_inputs
    chunked = chunked_loss(hidden, head, targets, config, weights=weights, teachers=teachers, chunk_size=chunk_size)
    dense = dense_loss(hidden, head, targets, config, weights=weights, teachers=teachers)
    for got, want in zip(results(chunked, hidden, head), results(dense, hidden, head), strict=True):
        assert bool(got.isfinite().all())
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


SERVED = [(kinds, d) for kinds in MIXTURES for d in DIRECTIONS if d == "forward" or "sampled" not in kinds]


@pytest.mark.parametrize(("kinds", "direction"), SERVED)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("soft_cap", [0.0, 4.0, 70.0])
def test_chunked_equals_dense(kinds: str, direction: Direction, temperature: float, soft_cap: float) -> None:
    config = LossConfig(soft_cap, 0.01, 0.7, temperature, direction, use_confidence=soft_cap == 4.0)
    assert_chunked_is_dense(inputs(), config, make(kinds, temperature), chunk_size=8)


@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 30), st.integers(1, 25)),
    seed=st.integers(0, 2**32 - 1),
    kinds=st.sampled_from(MIXTURES),
    direction=st.sampled_from(DIRECTIONS),
    soft_cap=st.sampled_from([0.0, 0.7, 30.0]),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    use_confidence=st.booleans(),
    k=st.integers(1, 30),
)
@settings(max_examples=60)
def test_any_shape_chunked_equals_dense(
    shape: tuple[int, int, int],
    seed: int,
    kinds: str,
    direction: Direction,
    soft_cap: float,
    temperature: float,
    use_confidence: bool,
    k: int,
) -> None:
    tokens, vocab, chunk_size = shape
    if "sampled" in kinds:
        direction = "forward"
    sizes = {"tokens": tokens, "vocab": vocab}
    teachers = []
    for i, kind in enumerate(kinds.split()):
        extra = {"top_k": {"k": min(k, vocab)}, "sampled": {"draws": k}}.get(kind, {})
        teachers.append(MAKERS[kind](seed + i, weight=0.5 + i, temperature=temperature, **sizes, **extra))
    config = LossConfig(soft_cap, 0.1, 0.4, temperature, direction, use_confidence=use_confidence)
    assert_chunked_is_dense(inputs(seed, tokens, vocab), config, teachers, chunk_size)


def by_definition(p: Tensor, merged: Tensor, config: LossConfig) -> Tensor:
    """Divergence of one token's probabilities."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    if config.direction == "forward":
        return kl(p, merged)
    if config.direction == "reverse":
        return kl(merged, p)
    if config.direction == "skew":
        return kl(p, config.skew_alpha * p + (1 - config.skew_alpha) * merged)
    middle = config.js_beta * p + (1 - config.js_beta) * merged
    return config.js_beta * kl(p, middle) + (1 - config.js_beta) * kl(merged, middle)


def by_categories(logits: Tensor, teacher: SparseTeacher, token: int, config: LossConfig) -> Tensor:
    """Divergence of one token over K + 1 categories, in float64."""
    q = (logits / config.temperature).softmax(-1)
    ids, probs = teacher.ids[token].tolist(), teacher.probs[token].tolist()
    rest = [v for v in range(len(logits)) if v not in ids]
    p = torch.tensor([*probs, 1 - sum(probs)], dtype=torch.float64)
    return by_definition(p, torch.stack([*(q[i] for i in ids), q[rest].sum()]), config)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_is_the_divergence_over_k_plus_1_categories(direction: Direction, temperature: float) -> None:
    hidden, head, targets, weights = inputs()
    teacher = top_k(0, temperature=temperature)
    config = LossConfig(kl_weight=0.6, temperature=temperature, direction=direction, skew_alpha=0.3, js_beta=0.3)
    loss = chunked_loss(hidden, head, targets, config, weights=weights, teachers=[teacher], chunk_size=10)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    logits = exact[0] @ exact[1].T
    total = kl = torch.zeros((), dtype=torch.float64)
    for token in range(N):
        if targets[token] < 0:
            continue
        ce = -logits[token].log_softmax(-1)[targets[token]]
        if float(teacher.probs[token].sum()):
            row = by_categories(logits[token], teacher, token, config)
            kl = kl + weights[token] * temperature**2 * row
            total = total + weights[token] * (0.4 * ce + 0.6 * temperature**2 * row)
        else:
            total = total + weights[token] * ce
    divisor = weights[targets >= 0].sum()
    want = [total / divisor, kl / divisor, *torch.autograd.grad(total / divisor, exact)]
    got = [loss.total, loss.kl, *torch.autograd.grad(loss.total, (hidden, head))]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.detach(), other.detach().float(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_top_k_of_the_whole_vocabulary_is_the_full_divergence(direction: Direction, temperature: float) -> None:
    hidden, head, targets, _ = inputs()
    full = teacher_head(0)
    found = probabilities(full, temperature).topk(V)
    whole = SparseTeacher(found.indices, found.values, "top_k", temperature=temperature)
    config = LossConfig(kl_weight=0.9, temperature=temperature, direction=direction)
    sparse, dense = (chunked_loss(hidden, head, targets, config, teachers=[teacher]) for teacher in (whole, full))
    for got, want in zip(results(sparse, hidden, head), results(dense, hidden, head), strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kinds", ["sampled", "head sampled"])
def test_draws_give_the_full_kl_on_average(kinds: str) -> None:
    """Mean of value and gradient over many draws, within five standard errors of the full KL's, at every entry."""
    tokens, vocab, repeats = 4, 12, 400
    hidden, head, _, _ = inputs(5, tokens, vocab)
    targets = torch.arange(tokens)
    teachers = [teacher_head(0, tokens, vocab), teacher_head(1, tokens, vocab)]
    config = LossConfig(kl_weight=0.8)
    generator = torch.Generator().manual_seed(1)
    others = teachers[:1] if "head" in kinds else []
    p = probabilities(teachers[1])
    found = []
    for _ in range(repeats):
        loss = chunked_loss(hidden, head, targets, config, teachers=[*others, draw(p, 5, generator)])
        found.append(torch.cat([loss.kl.reshape(1), torch.autograd.grad(loss.total, hidden)[0].flatten()]))
    values = torch.stack(found).double()
    full = chunked_loss(hidden, head, targets, config, teachers=[*others, teachers[1]])
    # The mean of the KLs to each teacher; their mixture's is less by a constant of the teachers.
    kls = [dense_loss(hidden, head, targets, config, teachers=[teacher]).kl for teacher in (*others, teachers[1])]
    want = torch.cat([torch.stack(kls).mean().reshape(1), torch.autograd.grad(full.total, hidden)[0].flatten()])
    error = values.std(0) / math.sqrt(repeats)
    assert bool(((values.mean(0) - want).abs() < 5 * error + 1e-6).all())
    assert float((5 * error / want.abs().clamp_min(0.02)).median()) < 0.5  # a bound that a wrong gradient would break


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("kind", "direction"), [("sampled", "forward"), *(("top_k", d) for d in DIRECTIONS)])
def test_a_token_without_teacher_is_plain_cross_entropy(
    kind: Literal["sampled", "top_k"], direction: Direction, count: int
) -> None:
    hidden, head, targets, weights = inputs()
    nobody = SparseTeacher(torch.zeros(N, K, dtype=torch.long), torch.zeros(N, K), kind)
    plain = chunked_loss(hidden, head, targets, LossConfig(3.0, 0.1), weights=weights)
    config = LossConfig(3.0, 0.1, kl_weight=0.9, direction=direction)
    loss = chunked_loss(hidden, head, targets, config, weights=weights, teachers=[nobody] * count)
    assert float(loss.kl) == 0
    for got, want in zip(results(loss, hidden, head), results(plain, hidden, head), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_mixture_lays_each_tail_out_as_the_student_does(direction: Direction) -> None:
    """Two top-k teachers and one of the whole vocabulary, token by token in float64."""
    hidden, head, targets, _ = inputs()
    cut, whole = [top_k(0, weight=2.0), top_k(1, k=3, weight=0.5)], teacher_head(2)
    config = LossConfig(kl_weight=1.0, direction=direction)
    loss = chunked_loss(hidden, head, targets, config, teachers=[*cut, whole], chunk_size=9)
    exact = hidden.detach().double().requires_grad_()
    q = (exact @ head.detach().double().T).softmax(-1)
    full = probabilities(whole).double()
    total = torch.zeros((), dtype=torch.float64)
    for token in torch.nonzero(targets >= 0).flatten().tolist():
        rows, shares = [full[token]], [1.0]
        for teacher in cut:
            if float(teacher.probs[token].sum()):
                laid_out = q[token].detach().clone()
                laid_out[teacher.ids[token]] = 0
                laid_out *= (1 - teacher.probs[token].double().sum()) / laid_out.sum()
                laid_out[teacher.ids[token]] = teacher.probs[token].double()
                rows.append(laid_out)
                shares.append(teacher.weight)
        p = torch.stack([share * row for share, row in zip(shares, rows, strict=True)]).sum(0) / sum(shares)
        total = total + by_definition(p, q[token], config)
    total = total / (targets >= 0).sum()
    assert float(loss.kl) == pytest.approx(float(total.detach()), rel=1e-5)
    got, want = torch.autograd.grad(loss.total, hidden)[0], torch.autograd.grad(total, exact)[0]
    torch.testing.assert_close(got, want.float(), atol=1e-6, rtol=1e-4)


def test_a_teacher_absent_at_a_token_leaves_it_to_the_others() -> None:
    hidden, head, targets, _ = inputs()
    first, second = top_k(0), top_k(1, weight=3.0)
    first.probs[:] = 0
    config = LossConfig(kl_weight=0.9)
    alone, mixed = (chunked_loss(hidden, head, targets, config, teachers=t) for t in ([second], [first, second]))
    for got, want in zip(results(mixed, hidden, head), results(alone, hidden, head), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_confidence_weighs_each_teacher_by_its_entropy_at_the_token() -> None:
    hidden, head, targets, _ = inputs()
    a, b = teacher_head(0, weight=2.0), teacher_head(1)
    p, q = probabilities(a), probabilities(b)
    shares = torch.stack([t.weight * torch.xlogy(x, x).sum(-1).exp() for t, x in ((a, p), (b, q))])  # w exp(-H)
    shares = (shares / shares.sum(0)).unsqueeze(-1)
    assert float((shares[0] - 2 / 3).abs().max()) > 0.05
    blended = shares[0] * p + shares[1] * q
    loss = chunked_loss(hidden, head, targets, LossConfig(kl_weight=1.0, use_confidence=True), teachers=[a, b])
    token_kl = F.kl_div((hidden @ head.T).log_softmax(-1), blended, reduction="none").sum(-1)
    torch.testing.assert_close(loss.kl, token_kl[targets >= 0].mean().detach())


def test_confidence_of_a_sparse_teacher_is_its_stated_entropy() -> None:
    """Two teachers with the same draws: their stated entropies alone decide the weights, and so the KL's mean."""
    hidden, head, targets, _ = inputs()
    teacher = replace(sampled(0), entropy=torch.full((N,), 0.5))
    other = replace(sampled(1), entropy=torch.full((N,), 1.5), weight=2.0)
    other = replace(other, probs=torch.where(teacher.probs.sum(-1, keepdim=True) > 0, other.probs, 0.0))
    shares = [math.exp(-0.5), 2 * math.exp(-1.5)]
    config = LossConfig(kl_weight=1.0)
    alone = [chunked_loss(hidden, head, targets, config, teachers=[t]).kl for t in (teacher, other)]
    mixed = chunked_loss(hidden, head, targets, replace(config, use_confidence=True), teachers=[teacher, other])
    expected = (shares[0] * alone[0] + shares[1] * alone[1]) / sum(shares)
    torch.testing.assert_close(mixed.kl, expected)


def test_a_student_that_is_sure_beyond_float32_still_feels_the_tail() -> None:
    """The student leaves 1e-12 to the teacher's tail of 0.3: as a difference to 1 that would be 0."""
    head = torch.zeros(5, 5).fill_diagonal_(1.0).requires_grad_()
    hidden = torch.tensor([[30.0, 29.0, 2.0, 1.0, 0.0]]).requires_grad_()
    teacher = SparseTeacher(torch.tensor([[0, 1]]), torch.tensor([[0.4, 0.3]]), "top_k")
    loss = chunked_loss(hidden, head, torch.tensor([0]), LossConfig(kl_weight=1.0), teachers=[teacher])
    q = hidden.detach().double()[0].softmax(-1)
    tail = q[2:].sum()
    expected = 0.4 * (0.4 / q[0]).log() + 0.3 * (0.3 / q[1]).log() + 0.3 * (0.3 / tail).log()
    assert float(loss.kl) == pytest.approx(float(expected), rel=1e-5)
    (grad,) = torch.autograd.grad(loss.total, hidden)
    want = torch.cat((q[:2] - torch.tensor([0.4, 0.3]), q[2:] * (1 - 0.3 / tail)))
    torch.testing.assert_close(grad[0], want.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kinds", ["top_k", "sampled", "head", "top_k top_k"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.012), (torch.float16, 0.002)])
@pytest.mark.parametrize("soft_cap", [0.0, 30.0])
def test_half_precision_keeps_the_gradient(kinds: str, dtype: torch.dtype, tolerance: float, soft_cap: float) -> None:
    config = LossConfig(soft_cap, 1e-4, 0.9)
    hidden, head, targets, _ = inputs(dtype=dtype)
    exact = hidden.detach().float().requires_grad_()
    rounded = head.detach().to(dtype).float().requires_grad_()
    teachers = make(kinds)
    got = chunked_loss(hidden, head, targets, config, teachers=teachers, chunk_size=8)
    want = dense_loss(exact, rounded, targets, config, teachers=teachers)
    torch.testing.assert_close(got.kl, want.kl, atol=0, rtol=0.01)
    pairs = zip(
        torch.autograd.grad(got.total, (hidden, head)), torch.autograd.grad(want.total, (exact, rounded)), strict=True
    )
    for one, other in pairs:
        assert float((one.float() - other).norm() / other.norm()) < tolerance


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), places=st.integers(1, 12), vocab=st.integers(1, 8))
@settings(max_examples=40)
def test_mass_of_an_id_is_summed_over_its_places(seed: int, rows: int, places: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, places), generator=generator)
    mass = torch.rand(rows, places, generator=generator)
    expected = (mass[:, None, :] * (ids[:, None, :] == ids[:, :, None])).sum(-1)
    torch.testing.assert_close(mass_of_same_id(ids, mass), expected)


@pytest.mark.parametrize("direction", ["reverse", "skew", "js"])
@pytest.mark.parametrize("function", [chunked_loss, dense_loss])
def test_sampled_serves_forward_only(direction: Direction, function: Callable[..., Loss]) -> None:
    hidden, head, targets, _ = inputs()
    with pytest.raises(ConfigError, match=f'kl_direction = "{direction}": sampled .*"forward" only'):
        function(hidden, head, targets, LossConfig(kl_weight=1.0, direction=direction), teachers=[sampled(0)])


@pytest.mark.parametrize("function", [chunked_loss, dense_loss])
def test_another_temperature_is_refused(function: Callable[..., Loss]) -> None:
    hidden, head, targets, _ = inputs()
    with pytest.raises(ConfigError, match=r"temperature = 1.0, but .* made at 2.0: set temperature = 2.0"):
        function(hidden, head, targets, LossConfig(kl_weight=1.0), teachers=[top_k(0, temperature=2.0)])


@pytest.mark.parametrize("kinds", ["", "head head head", *MIXTURES])
def test_nothing_is_larger_than_a_chunk_of_logits(kinds: str) -> None:
    """Also not with three teachers; and the whole memory does not grow with the number of tokens."""
    tokens, vocab, chunk = 1_024, 500, 64
    hidden, head, targets, _ = inputs(0, tokens, vocab)
    teachers = make(kinds, tokens=tokens, vocab=vocab)
    config = LossConfig(kl_weight=0.5, use_confidence=True)
    with Largest() as seen:  # type: ignore[no-untyped-call]
        chunked_loss(hidden, head, targets, config, teachers=teachers, chunk_size=chunk).total.backward()
    assert seen.numel <= chunk * vocab


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    ("kinds", "direction"),
    [
        *((kinds, "forward") for kinds in ("top_k", "sampled", "head sampled")),
        *(("head top_k", d) for d in ("reverse", "skew", "js")),
    ],
)
def test_compiled_equals_eager(kinds: str, direction: Direction) -> None:
    config = LossConfig(4.0, 0.01, 0.7, 1.0, direction)
    hidden, head, targets, weights = inputs()
    found = []
    for use_compile in (True, False):
        loss = chunked_loss(
            hidden, head, targets, config, weights=weights, teachers=make(kinds), chunk_size=16,
            use_compile=use_compile,
        )  # fmt: skip
        found.append(results(loss, hidden, head))
    torch.compiler.reset()
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=5e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("kinds", ["head", "sampled", "top_k", "head top_k"])
def test_a_weight_that_changes_compiles_nothing_anew(kinds: str) -> None:
    from torch._dynamo.utils import counters

    hidden, head, targets, _ = inputs()
    teachers, compiles, kls = make(kinds), [], []
    for kl_weight in (0.9, 0.7, 0.4, 0.0):
        config = LossConfig(z_loss=0.01, kl_weight=kl_weight)
        loss = chunked_loss(hidden, head, targets, config, teachers=teachers, chunk_size=N, use_compile=True)
        expected = dense_loss(hidden, head, targets, config, teachers=teachers)
        torch.testing.assert_close(loss.total, expected.total, atol=1e-5, rtol=1e-4)
        compiles.append(counters["stats"]["unique_graphs"])
        kls.append(float(loss.kl))
    torch.compiler.reset()
    assert compiles[0] > 0
    assert len(set(compiles)) == 1
    assert len(set(kls)) == 1
