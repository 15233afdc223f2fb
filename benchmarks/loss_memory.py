"""How much memory does the loss take at a real vocabulary, and how long?

Cross-entropy from hidden states, forward and backward, three ways on the same numbers: our chunked loss, PyTorch's
own chunked `linear_cross_entropy` (torch 2.13 and later), and `linear` + `cross_entropy` with all logits at once.
Each runs in a process of its own, since peak memory is a property of a process; what the inputs take is
subtracted. The last column is how far the gradients are from those of the dense loss in float32, relative to
their norm.

    python benchmarks/loss_memory.py [--quick] [--json]
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.loss import LossConfig, chunked_loss, dense_loss

HIDDEN = 768
VOCAB = 32_000
CHUNK = 512
DTYPE = torch.bfloat16
CAP_AND_Z = LossConfig(soft_cap=30.0, z_loss=1e-4)

Result = dict[str, float]


def ours(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """`chunked_loss`, eager, as in a run without torch.compile."""
    return chunked_loss(hidden, head, targets, LossConfig(), chunk_size=CHUNK).total


def ours_with_everything(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The same with soft-cap and z-loss, which the peers do not have."""
    return chunked_loss(hidden, head, targets, CAP_AND_Z, chunk_size=CHUNK).total


def torch_chunked(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's fused layer in its own default chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, head, targets, options=options)


def torch_dense(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """All logits at once, in float32 for the softmax as every training code has it."""
    return F.cross_entropy(F.linear(hidden, head).float(), targets)


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "smelter chunked": ours,
    "smelter chunked, cap and z-loss": ours_with_everything,
    "torch linear_cross_entropy": torch_chunked,
    "torch linear + cross_entropy": torch_dense,
}


def peak_mib(device: torch.device) -> float:
    """Most memory so far: of this process (VmHWM, which a parent does not leave behind), or on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def measure(name: str, tokens: int, repeats: int = 3) -> Result:
    """Run one method in this process: peak MiB above the inputs, milliseconds, and the error of its gradients."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, device=device).to(DTYPE).requires_grad_()
    head = (torch.randn(VOCAB, HIDDEN, device=device) * HIDDEN**-0.5).to(DTYPE).requires_grad_()
    targets = torch.randint(0, VOCAB, (tokens,), device=device)
    torch.randn(256, HIDDEN, device=device).to(DTYPE) @ head.detach().T  # the libraries' own buffers
    before = peak_mib(device)
    times = []
    for _ in range(repeats):
        hidden.grad = head.grad = None
        start = time.perf_counter()
        loss = METHODS[name](hidden, head, targets)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = peak_mib(device) - before
    return {"peak_mib": peak, "milliseconds": min(times) * 1e3, "grad_error": grad_error(name, hidden, head, targets)}


def grad_error(name: str, hidden: Tensor, head: Tensor, targets: Tensor) -> float:
    """Distance of the gradients to those of the dense loss in float32, relative to the norm of the latter."""
    exact = [tensor.detach().float().requires_grad_() for tensor in (hidden, head)]
    method = METHODS[name]
    if method is ours_with_everything:
        dense_loss(exact[0], exact[1], targets, CAP_AND_Z).total.backward()
    else:
        torch_dense(exact[0], exact[1], targets).backward()
    return distance([tensor.grad for tensor in (hidden, head)], exact)


def distance(found: Sequence[Tensor | None], exact: Sequence[Tensor]) -> float:
    """Of gradients to those of `exact`, relative to the norm of the latter."""
    differences, norms = 0.0, 0.0
    for got, tensor in zip(found, exact, strict=True):
        assert got is not None
        assert tensor.grad is not None
        differences += float((got.float() - tensor.grad).square().sum())
        norms += float(tensor.grad.square().sum())
    return (differences / norms) ** 0.5


def measure_apart(file: str, name: str, *options: str) -> Result:
    """`measure` of a benchmark's file in a new process."""
    command = [sys.executable, file, "--only", name, *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{name}: {run.stderr.strip().splitlines()[-1]}")
    found: Result = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure every method, check that they agree, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="128 tokens instead of 16,384, once")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--tokens", type=int, default=0, help="tokens per step (overrides --quick)")
    parser.add_argument("--only", choices=list(METHODS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    tokens = options.tokens or (128 if options.quick else 16_384)
    if options.only:
        print(json.dumps(measure(options.only, tokens, 1 if options.quick else 3)))
        return
    names = [name for name in METHODS if name != "torch linear_cross_entropy" or hasattr(F, "linear_cross_entropy")]
    given = ["--tokens", str(tokens), *(["--quick"] if options.quick else [])]
    results = {name: measure_apart(__file__, name, *given) for name in names}
    worst = max(result["grad_error"] for name, result in results.items() if "smelter" in name)
    if worst > 0.01:
        raise SystemExit(f"our gradients are off by {worst:.1%}: no figure counts")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{tokens:,} tokens, hidden {HIDDEN}, vocabulary {VOCAB:,}, bf16, forward and backward, {device}")
    print(f"{'':34} {'peak MiB':>9} {'ms':>8} {'gradient error':>15}")
    for name, result in results.items():
        print(f"{name:34} {result['peak_mib']:9,.0f} {result['milliseconds']:8,.0f} {result['grad_error']:15.2e}")
    if options.json:
        print(json.dumps({"benchmark": "loss_memory", "device": device, "tokens": tokens, "results": results}))


if __name__ == "__main__":
    main()
