"""What does one optimizer step cost, and does the orthogonalisation hold on bad spectra?

One step for the parameters of the 100M default with random gradients. Before anything is timed, our Muon must equal
`torch.optim.Muon` to one bf16 unit (relative, over all matrices) after three steps. All are then stepped in turn in
this process, and the median counts:

* Newton-Schulz alone: matrices of one shape as one batched product, or one by one as `torch.optim.Muon` has it; in
  bf16 and in float32 (which a GPU without bf16 needs);
* whole steps: our Muon, `torch.optim.Muon`, our MuonAdamW for every parameter, AdamW fused, foreach, and as a loop.

A step is also given as the tokens that could be trained meanwhile, and as its share of the time when one step covers
32k or 512k tokens. Both need a speed of training: --tok-per-sec, or else the peak of matrix products measured here
over 6 FLOPs per parameter and token, which no training reaches, so that the shares are upper bounds.

The second table orthogonalises matrices with singular values spread evenly (in the logarithm) from 1 down to 1e-2 and
to 1e-4: the smallest and the largest singular value that come out, and the relative distance to the same polynomial in
exact arithmetic. A variant that is fast and wrong (Gram matrices in bf16) shows only here, never on random matrices.

    python benchmarks/optimizers.py [--quick] [--json] [--device cpu] [--tok-per-sec 600000]
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smelter.config import ModelConfig, preset
from smelter.model import Model
from smelter.muon import COEFFICIENTS, Muon, MuonAdamW, is_matrix, newton_schulz
from smelter.run import device as hardware

STEP_TOKENS = (32_768, 524_288)
BF16_UNIT = torch.finfo(torch.bfloat16).eps
MAX_SINGULAR = 1.3
"""What the polynomial's own maximum, 1.2, may become by rounding."""


def matrices_of(model: Model) -> list[nn.Parameter]:
    """The parameters that Muon takes."""
    return [parameter for name, parameter in model.named_parameters() if is_matrix(name, parameter)]


def relative_distance(got: list[Tensor], want: list[Tensor]) -> float:
    """Of two lists of tensors, each as one long vector."""
    difference = sum(float((a - b).float().square().sum()) for a, b in zip(got, want, strict=True))
    return float((difference / sum(float(b.float().square().sum()) for b in want)) ** 0.5)


def muon_difference(model: Model, device: torch.device) -> float:
    """How far our Muon's updates of one block are from torch.optim.Muon's after three steps, relative."""
    block = [parameter for parameter in model.layers[0].parameters() if parameter.ndim == 2]
    start = [parameter.detach().clone() for parameter in block]
    ours, theirs = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    optimizers = Muon(ours, lr=0.02, momentum=0.95), torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator).to(device)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    updates = [
        [(after.detach() - before) for after, before in zip(moved, start, strict=True)] for moved in (ours, theirs)
    ]
    return relative_distance(*updates)


def contestants(model: Model, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name; all share the model's parameters and gradients and have states of their own."""
    matrices = matrices_of(model)
    by_shape: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
    for parameter in matrices:
        assert parameter.grad is not None
        by_shape[parameter.shape].append(parameter.grad)
    stacks = [torch.stack(group) for group in by_shape.values()]

    def batched(dtype: torch.dtype) -> None:
        for stack in stacks:
            newton_schulz(stack, dtype=dtype)

    def one_by_one(dtype: torch.dtype) -> None:
        for stack in stacks:
            for matrix in stack.split(1):
                newton_schulz(matrix, dtype=dtype)

    def adamw(fused: bool, foreach: bool) -> Callable[[], object]:
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused, foreach=foreach).step

    return {
        "Newton-Schulz batched, bf16": lambda: batched(torch.bfloat16),
        "Newton-Schulz one by one, bf16": lambda: one_by_one(torch.bfloat16),
        "Newton-Schulz batched, fp32": lambda: batched(torch.float32),
        "Newton-Schulz one by one, fp32": lambda: one_by_one(torch.float32),
        "smelter Muon": Muon(matrices, lr=1e-4).step,
        "torch Muon": torch.optim.Muon(matrices, lr=1e-4, weight_decay=0.0).step,
        "smelter MuonAdamW": MuonAdamW(model, muon_lr=1e-4, adamw_lr=1e-4, embedding_lr=1e-4).step,
        "torch AdamW fused": adamw(fused=True, foreach=False),
        "torch AdamW foreach": adamw(fused=False, foreach=True),
        "torch AdamW loop": adamw(fused=False, foreach=False),
    }


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_in_turn(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round; the round that makes the states does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            taken = seconds_of(call, device)
            if number:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def exact_polynomial(singular: Tensor, steps: int = 5) -> Tensor:
    """What the iteration makes of singular values [n] of a matrix, in exact arithmetic (float64)."""
    a, b, c = COEFFICIENTS
    values: Tensor = singular / singular.norm()
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return values


def orthogonality(size: int, device: torch.device) -> list[dict[str, float | str]]:
    """Newton-Schulz on matrices [size, size] and [size, 2 size] of known bad spectra, in bf16 and float32."""
    generator = torch.Generator().manual_seed(0)

    def orthogonal(rows: int) -> Tensor:  # float64 [rows, size], orthonormal columns
        q: Tensor = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64)).Q
        return q

    rows: list[dict[str, float | str]] = []
    for columns in (size, 2 * size):
        u, v = orthogonal(size), orthogonal(columns)
        for smallest in (1e-2, 1e-4):
            spectrum = torch.logspace(0, torch.tensor(smallest).log10().item(), size, dtype=torch.float64)
            target = exact_polynomial(spectrum)
            matrix = (u * spectrum) @ v.T
            want = (u * target) @ v.T
            shape = f"{size} x {columns}"
            row: dict[str, float | str] = {"shape": shape, "smallest_in": smallest, "how": "exact arithmetic"}
            rows.append(row | {"smallest": float(target.min()), "largest": float(target.max()), "distance": 0.0})
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
                got = newton_schulz(matrix.float().to(device)[None], dtype=dtype)[0].double().cpu()
                found = torch.linalg.svdvals(got)
                distance = float((got - want).norm() / want.norm())
                figures: dict[str, float | str] = {"smallest": float(found.min()), "largest": float(found.max())}
                rows.append(row | figures | {"how": name, "distance": distance})
    return rows


def speed_of_training(config: ModelConfig, device: torch.device) -> tuple[float, str]:
    """Tokens a second at the measured peak of matrix products, and how that was got."""
    dtype = hardware.pick_dtype("auto", device, is_training=True)
    peak = hardware.measure_peak_flops(device, dtype)
    source = f"measured peak {peak / 1e12:,.2f} TFLOP/s ({str(dtype).removeprefix('torch.')}) over 6 FLOPs x parameters"
    return peak / (6 * config.num_params_estimate), source


def main() -> None:
    """Check, time, print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 layer of 256 instead of 12 of 768, one round")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--tok-per-sec", type=float, help="tokens a second of training, for the last columns")
    options = parser.parse_args()
    device = hardware.pick_device(options.device)
    config = preset("100m").model
    if options.quick:
        config = replace(config, num_layers=1, hidden_size=256, intermediate_size=768, num_heads=4, num_kv_heads=2)
    torch.manual_seed(0)
    model = Model(config).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)

    difference = muon_difference(model, device)
    if not difference <= BF16_UNIT:
        raise SystemExit(f"our Muon is {difference:.2%} from torch.optim.Muon: no figure counts")
    seconds = time_in_turn(contestants(model, device), device, 1 if options.quick else 5)
    tok_per_sec, source = options.tok_per_sec, "given"
    if tok_per_sec is None:
        tok_per_sec, source = speed_of_training(config, device)

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    total, count = config.num_params_estimate, config.num_matrix_params
    print(f"{total / 1e6:.1f}M parameters, {count / 1e6:.1f}M of them in matrices, {where}")
    print(f"our Muon's updates are {difference:.1e} from torch.optim.Muon's (one bf16 unit: {BF16_UNIT:.1e})")
    print(f"speed of training: {tok_per_sec:,.0f} tok/s, {source}")
    shares = {
        name: [taken / (taken + tokens / tok_per_sec) for tokens in STEP_TOKENS] for name, taken in seconds.items()
    }
    print(f"{'':32} {'ms':>9} {'tokens':>9} {'of 32k':>7} {'of 512k':>8}")
    for name, taken in seconds.items():
        print(
            f"{name:32} {taken * 1e3:9,.2f} {taken * tok_per_sec:9,.0f} {shares[name][0]:7.1%} {shares[name][1]:8.2%}"
        )

    spectra = orthogonality(256 if options.quick else 768, device)
    print(f"\n{'singular values 1 down to':32} {'':18} {'smallest':>9} {'largest':>9} {'distance':>9}")
    for row in spectra:
        name = f"{row['smallest_in']:.0e}, {row['shape']}"
        print(f"{name:32} {row['how']:18} {row['smallest']:9.2e} {row['largest']:9.3f} {row['distance']:9.1e}")
    if options.json:
        values = {
            "benchmark": "optimizers",
            "device": where,
            "num_params": total,
            "num_matrix_params": count,
            "muon_difference": difference,
            "tok_per_sec": tok_per_sec,
            "tok_per_sec_source": source,
            "milliseconds": {name: taken * 1e3 for name, taken in seconds.items()},
            "tokens": {name: taken * tok_per_sec for name, taken in seconds.items()},
            "share_32k": {name: share[0] for name, share in shares.items()},
            "share_512k": {name: share[1] for name, share in shares.items()},
            "spectra": spectra,
        }
        print(json.dumps(values))
    if not all(float(row["largest"]) <= MAX_SINGULAR for row in spectra):
        raise SystemExit("Newton-Schulz leaves singular values far above 1: it would break training")


if __name__ == "__main__":
    main()
