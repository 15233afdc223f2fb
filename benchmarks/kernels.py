"""How fast is each kernel next to what PyTorch has for the same job?

The kernels of the path that this device takes (`smelter.kernels.capability`), each against plain PyTorch and
against the compiler on the same numbers, at the shapes of the 100M model. On a GPU: quantisation of activations,
RMSNorm with quantisation, quantisation of all weights, the integer product, and soft-capped attention forward and
backward. On a CPU: the integer product and attention. SDPA has no soft-cap: it shows what the cap costs.

Every result is first compared with the specification in float32; a contestant that is off stops the run. Then
all of a contest take turns, and each keeps its best time. On a GPU its caches are flushed before each turn.

    python benchmarks/kernels.py [--quick] [--json]
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.kernels import attention, reference
from smelter.kernels.capability import capability

LINEARS = {"qkv": (1_280, 768), "o": (768, 768), "gate + up": (4_096, 768), "down": (768, 2_048)}
"""Output and input features of one layer's products."""
LAYERS = [(768, 768), (256, 768), (256, 768), (768, 768), (2_048, 768), (2_048, 768), (768, 2_048)]
NUM_LAYERS = 12
HEADS, KV_HEADS, HEAD_DIM = 12, 4, 64
CAP = 50.0
EPS = 1e-6
TOLERANCE = 0.01

Tensors = tuple[Tensor, ...]


class Contestant(NamedTuple):
    """Something that is timed, and what it should give."""

    run: Callable[[], Tensors]
    expected: Tensors


@dataclass(frozen=True)
class Contest:
    """One job; `work` is in operations or bytes."""

    name: str
    work: float
    unit: str
    contestants: dict[str, Contestant]


def relative_error(got: Tensors, expected: Tensors) -> float:
    """Distance of the results relative to their norm; the worst of all tensors."""
    worst = 0.0
    for ours, theirs in zip(got, expected, strict=True):
        exact = theirs.detach().float()
        norm = exact.norm().clamp_min(1e-30)
        worst = max(worst, float((ours.detach().float() - exact).norm() / norm))
    return worst


def compiled(function: Callable[..., Tensors]) -> Callable[..., Tensors]:
    return torch.compile(function, dynamic=False)


# --- the jobs --------------------------------------------------------------------------------------


def scaled(product: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The epilogue in plain PyTorch."""
    return (product.float() * (row_scale * column_scale)).to(dtype)


def product(device: torch.device, tokens: int, name: str) -> Contest:
    """int8 activations x trits with both scales, against products of the same size in floats."""
    columns, inner = LINEARS[name]
    path = capability(device)
    dtype = path.dtype
    q = torch.randint(-127, 128, (tokens, inner), device=device, dtype=torch.int8)
    trits = torch.randint(-1, 2, (columns, inner), device=device, dtype=torch.int8)
    row_scale, column_scale = torch.rand(tokens, 1, device=device) + 0.5, torch.rand(columns, device=device) + 0.5
    row_scale /= inner  # so that fp16 holds the results
    integers, narrow_trits = (q.float(), trits.float()), trits.to(dtype)
    plain = F.linear(*integers)
    want = (scaled(plain, row_scale, column_scale, torch.float32),)
    small = 1 / 128 if dtype == torch.float16 else 1.0  # fp16 sums would overflow
    narrow, narrow_want = q.to(dtype) * small, (plain * small,)

    def int_mm(q: Tensor, trits: Tensor, row_scale: Tensor, column_scale: Tensor) -> Tensors:
        return (scaled(torch._int_mm(q, trits.T), row_scale, column_scale, dtype),)

    arguments = (q, trits, row_scale, column_scale)
    contestants = {
        f"{str(dtype).removeprefix('torch.')} product": Contestant(
            lambda: (F.linear(narrow, narrow_trits),), narrow_want
        ),
        "float32 product": Contestant(lambda: (F.linear(*integers),), (plain,)),
    }
    if path.int8_product != "none":
        fused = compiled(int_mm)
        contestants["torch._int_mm and scales"] = Contestant(lambda: int_mm(*arguments), want)
        contestants["torch._int_mm and scales, compiled"] = Contestant(lambda: fused(*arguments), want)
    if path.int8_product == "triton":
        from smelter.kernels.linear_triton import int8_matmul

        contestants["smelter int8_matmul"] = Contestant(lambda: (int8_matmul(*arguments, dtype),), want)
    return Contest(f"product {name}, {inner} -> {columns}", 2.0 * tokens * inner * columns, "GOP/s", contestants)


def rows(device: torch.device, tokens: int, columns: int) -> Contest:
    """Absmax int8 quantisation per token."""
    from smelter.kernels.linear_triton import quantize_rows

    x = torch.randn(tokens, columns, device=device).to(capability(device).dtype)

    def plain(x: Tensor) -> Tensors:
        q, scale = reference.quantize_activations(x)
        return q.to(torch.int8), scale

    want, fused = plain(x), compiled(plain)
    contestants = {
        "plain PyTorch": Contestant(lambda: plain(x), want),
        "compiled": Contestant(lambda: fused(x), want),
        "smelter quantize_rows": Contestant(lambda: quantize_rows(x), want),
    }
    return Contest(f"quantise rows of {columns}", tokens * (columns * 3.0 + 4), "GB/s", contestants)


def norms(device: torch.device, tokens: int, columns: int) -> Contest:
    """RMSNorm, then the same quantisation."""
    from smelter.kernels.linear_triton import rms_norm_quantize

    x = torch.randn(tokens, columns, device=device).to(capability(device).dtype)
    gain = 1 + 0.1 * torch.randn(columns, device=device)

    def plain(x: Tensor, gain: Tensor) -> Tensors:
        q, scale = reference.quantize_activations(reference.rms_norm(x, gain, EPS))
        return q.to(torch.int8), scale

    want, fused = plain(x, gain), compiled(plain)
    contestants = {
        "plain PyTorch": Contestant(lambda: plain(x, gain), want),
        "compiled": Contestant(lambda: fused(x, gain), want),
        "smelter rms_norm_quantize": Contestant(lambda: rms_norm_quantize(x, gain, EPS)[:2], want),
    }
    return Contest(f"RMSNorm + quantise rows of {columns}", tokens * (columns * 3.0 + 8), "GB/s", contestants)


def weights(device: torch.device) -> Contest:
    """All weights of the model into int8 trits."""
    from smelter.kernels.weights_triton import quantize_weights

    latent = [torch.randn(shape, device=device) * 0.03 for _ in range(NUM_LAYERS) for shape in LAYERS]
    trits = [torch.zeros_like(weight, dtype=torch.int8) for weight in latent]
    scales = [torch.zeros((), device=device) for _ in latent]

    def plain_one(weight: Tensor) -> Tensors:
        found, scale = reference.quantize_weight(weight)
        return found.to(torch.int8), scale

    fused_one = compiled(plain_one)

    def each(quantise: Callable[..., Tensors]) -> Tensors:
        pairs = [quantise(weight) for weight in latent]
        return tuple(tensor for pair in pairs for tensor in pair)

    def together() -> Tensors:
        quantize_weights(latent, trits, scales)
        return tuple(tensor for pair in zip(trits, scales, strict=True) for tensor in pair)

    want = each(plain_one)
    contestants = {
        "plain PyTorch": Contestant(lambda: each(plain_one), want),
        "compiled": Contestant(lambda: each(fused_one), want),
        "smelter quantize_weights": Contestant(together, want),
    }
    # The latent weights are read twice: once for the scale, once for the trits.
    return Contest(f"quantise {len(latent)} weights", sum(w.numel() for w in latent) * 9.0, "GB/s", contestants)


def attend(device: torch.device, batch: int, length: int) -> Contest:
    """Causal soft-capped attention, forward and backward."""
    dtype = capability(device).dtype
    shapes = [(batch, heads, length, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    *inputs, grad = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    for tensor in inputs:
        tensor.requires_grad_()

    def both_ways(function: Callable[..., Tensor], *tensors: Tensor) -> Tensors:
        out = function(*tensors)
        return (out, *torch.autograd.grad(out, tensors, grad.to(out.dtype)))

    def specified(cap: float) -> Callable[..., Tensor]:
        mask = reference.causal_mask(None, length, device)
        return lambda q, k, v: reference.attention(q, k, v, mask, cap)

    def one_by_one(cap: float) -> Tensors:
        """The specification in float32, a sequence at a time: its scores take memory."""
        exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
        parts = []
        for i in range(batch):
            sequence = [tensor[i : i + 1] for tensor in exact]
            out = specified(cap)(*sequence)
            parts.append((out, *torch.autograd.grad(out, sequence, grad[i : i + 1].float())))
        return tuple(torch.cat(part).detach() for part in zip(*parts, strict=True))

    capped, uncapped = one_by_one(CAP), one_by_one(0.0)

    def house(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, CAP, mask=None, docs=None)

    fused_house: Callable[..., Tensor] = torch.compile(house, dynamic=False)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    contestants = {
        "SDPA, no cap": Contestant(lambda: both_ways(sdpa, *inputs), uncapped),
        "smelter attention": Contestant(lambda: both_ways(house, *inputs), capped),
        "smelter attention, compiled": Contestant(lambda: both_ways(fused_house, *inputs), capped),
    }
    if device.type == "cpu":
        contestants["plain PyTorch"] = Contestant(lambda: both_ways(specified(CAP), *inputs), capped)
    if capability(device).attention == "flex":
        from smelter.kernels.attention_flex import block_mask, flex_attention

        mask = block_mask(None, length, device)
        contestants["smelter flex_attention"] = Contestant(
            lambda: both_ways(lambda q, k, v: flex_attention(q, k, v, mask, CAP), *inputs), capped
        )
    # Two products forward and five backward, half of each above the diagonal.
    work = 7.0 * batch * HEADS * length**2 * HEAD_DIM
    return Contest(f"attention, {batch} x {length:,}, forward and backward", work, "GOP/s", contestants)


def contests(device: torch.device, quick: bool) -> Iterator[Contest]:
    """Every job of this device's path, made when its turn comes: they need not fit in memory together."""
    if device.type == "cuda":
        tokens = 4_096 if quick else 16_384
        if capability(device).use_triton:
            for columns in (768, 2_048):
                yield rows(device, tokens, columns)
            yield norms(device, tokens, 768)
            yield weights(device)
        for name in LINEARS:
            yield product(device, tokens, name)
        yield attend(device, 2 if quick else 8, 2_048)
    else:
        for name in ("qkv",) if quick else LINEARS:
            yield product(device, 512 if quick else 2_048, name)
        yield attend(device, 1, 512 if quick else 2_048)


# --- the clock -------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], Tensors], flush: Tensor | None) -> float:
    """Time of one call; on a GPU, which `flush` lies on, the time that the GPU worked."""
    if flush is None:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    elapsed: float = start.elapsed_time(end)
    return elapsed


def hold(contest: Contest, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Check every contestant, then let them take turns. SystemExit if one is off."""
    errors = {}
    for name, contestant in contest.contestants.items():
        errors[name] = relative_error(contestant.run(), contestant.expected)
        if not errors[name] < TOLERANCE:
            raise SystemExit(f"{contest.name}, {name}: off by {errors[name]:.1%}: no figure counts")
    flush = torch.empty(2**28, dtype=torch.int8, device=device) if device.type == "cuda" else None
    best = dict.fromkeys(contest.contestants, float("inf"))
    for _ in range(rounds):
        for name, contestant in contest.contestants.items():
            best[name] = min(best[name], milliseconds(contestant.run, flush))
    return {
        name: {"milliseconds": best[name], contest.unit: contest.work / best[name] / 1e6, "error": errors[name]}
        for name in best
    }


def main() -> None:
    """Hold every contest and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller shapes and fewer rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name} | {capability(device).describe()}")
    results = {}
    for contest in contests(device, options.quick):
        results[contest.name] = hold(contest, device, rounds=3 if options.quick else 20)
        print(f"\n{contest.name:48} {'ms':>10} {contest.unit:>9} {'error':>9}")
        for who, found in results[contest.name].items():
            print(f"  {who:46} {found['milliseconds']:10.3f} {found[contest.unit]:9,.0f} {found['error']:9.1e}")
    if options.json:
        path = capability(device).describe()
        print(json.dumps({"benchmark": "kernels", "device": name, "path": path, "results": results}))


if __name__ == "__main__":
    main()
