"""What does learning from a teacher add to the time and memory of the loss?

`chunked_loss` with soft-cap and z-loss at a real vocabulary, forward and backward: plain cross-entropy, 0.9 of a
divergence to probabilities from a cache (`SparseTeacher`), and to a teacher that runs beside the student
(`TeacherHead`; its head is counted, its body's forward pass is not). Each runs in a process of its own; what the
inputs take is subtracted. The first call, which may compile, gives the memory and is not timed. On a CPU the time is
the processor's, summed over threads, so that what else runs there does not count. The last column is how far the
gradients are from those of the dense loss in float32 on 256 of the tokens, relative to their norm.

    python benchmarks/distillation_loss.py [--quick] [--compile] [--json]
"""

import argparse
import json
import time
from collections.abc import Sequence

import torch
from loss_memory import CHUNK, DTYPE, HIDDEN, VOCAB, Result, distance, measure_apart, peak_mib
from torch import Tensor

from smelter.loss import LossConfig, chunked_loss, dense_loss
from smelter.losses.divergence import Direction
from smelter.losses.targets import SparseTeacher, Teacher, TeacherHead
from smelter.run import device as hardware

DRAWS = 50
PLACES = 16
"""Places for the distinct ids among the draws, and the k of top-k."""
CHECKED = 256
"""Tokens whose gradients are compared with the dense loss."""
MAX_ERROR = 0.02

METHODS: dict[str, tuple[str, Direction]] = {
    "cross-entropy": ("", "forward"),
    "cached draws, forward": ("sampled", "forward"),
    "cached top-k, forward": ("top_k", "forward"),
    "cached top-k, reverse": ("top_k", "reverse"),
    "cached top-k, skew": ("top_k", "skew"),
    "cached top-k, js": ("top_k", "js"),
    "teacher beside, forward": ("head", "forward"),
    "teacher beside, reverse": ("head", "reverse"),
    "teacher beside, skew": ("head", "skew"),
    "teacher beside, js": ("head", "js"),
}


def teacher_of(kind: str, tokens: int, width: int, device: torch.device) -> list[Teacher]:
    """No teacher, or one of random but peaked predictions: 50 draws of it have about 10 distinct ids."""
    if not kind:
        return []
    if kind == "head":
        hidden = torch.randn(tokens, width, device=device).to(DTYPE)
        return [TeacherHead(hidden, (torch.randn(VOCAB, width, device=device) * width**-0.5).to(DTYPE), 30.0)]
    ids = torch.rand(tokens, 1_000, device=device).topk(PLACES).indices * (VOCAB // 1_000)
    probs = torch.full((PLACES,), 0.7, device=device).pow(torch.arange(PLACES, device=device))
    probs = (probs / probs.sum()).expand(tokens, PLACES)
    if kind == "top_k":
        return [SparseTeacher(ids, probs * 0.95, "top_k")]
    draws = torch.multinomial(probs, DRAWS, replacement=True)
    counts = torch.zeros_like(probs).scatter_add_(1, draws, torch.ones_like(draws, dtype=probs.dtype))
    entropy = -torch.xlogy(probs, probs).sum(-1)
    return [SparseTeacher(ids, counts / DRAWS, "sampled", entropy)]


def first_rows(teachers: Sequence[Teacher], count: int) -> list[Teacher]:
    """The teachers at the first `count` tokens."""
    cut: list[Teacher] = []
    for teacher in teachers:
        if isinstance(teacher, TeacherHead):
            cut.append(TeacherHead(teacher.hidden[:count].float(), teacher.head.float(), teacher.soft_cap))
        else:
            entropy = None if teacher.entropy is None else teacher.entropy[:count]
            cut.append(SparseTeacher(teacher.ids[:count], teacher.probs[:count], teacher.kind, entropy))
    return cut


def measure(name: str, tokens: int, width: int, use_compile: bool) -> Result:
    """Run one method in this process: peak MiB above the inputs, milliseconds, and the error of its gradients."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    kind, direction = METHODS[name]
    config = LossConfig(30.0, 1e-4, 0.9, direction=direction)
    hidden = torch.randn(tokens, width, device=device).to(DTYPE).requires_grad_()
    head = (torch.randn(VOCAB, width, device=device) * width**-0.5).to(DTYPE).requires_grad_()
    targets = torch.randint(0, VOCAB, (tokens,), device=device)
    teachers = teacher_of(kind, tokens, width, device)
    torch.randn(256, width, device=device).to(DTYPE) @ head.detach().T  # the libraries' own buffers

    def run(count: int) -> tuple[Tensor, Tensor]:
        hidden.grad = head.grad = None
        used = teachers if count == tokens else first_rows(teachers, count)
        loss = chunked_loss(
            hidden[:count], head, targets[:count], config, teachers=used, chunk_size=CHUNK, use_compile=use_compile
        )
        loss.total.backward()
        assert hidden.grad is not None
        assert head.grad is not None
        return hidden.grad[:count], head.grad

    before = peak_mib(device)
    run(tokens)
    peak = peak_mib(device) - before
    if device.type == "cpu":
        hardware.keep_freed_memory()  # as training does; the peak would then be that of an allocator with gaps
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times = []
    for _ in range(3):
        start = clock()
        run(tokens)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    result = {"peak_mib": peak, "milliseconds": min(times) * 1e3}
    exact = [tensor.detach().float().requires_grad_() for tensor in (hidden[:CHECKED], head)]
    dense_loss(exact[0], exact[1], targets[:CHECKED], config, teachers=first_rows(teachers, CHECKED)).total.backward()
    return {**result, "grad_error": distance(run(CHECKED), exact)}


def main() -> None:
    """Measure every method, check their gradients, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="128 tokens of width 64 instead of 16,384 of 768")
    parser.add_argument("--compile", action="store_true", help="as in a run with torch.compile")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--tokens", type=int, default=0, help="tokens per step (overrides --quick)")
    parser.add_argument(
        "--width", type=int, default=0, help="of the hidden states (overrides --quick); small: the products cost little"
    )
    parser.add_argument("--only", choices=list(METHODS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    tokens = options.tokens or (128 if options.quick else 16_384)
    width = options.width or (64 if options.quick else HIDDEN)
    if options.only:
        print(json.dumps(measure(options.only, tokens, width, options.compile)))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    way = "compiled" if options.compile else "eager"
    print(f"{tokens:,} tokens, hidden {width}, vocabulary {VOCAB:,}, {PLACES} entries, bf16, {way}, {device}")
    print(f"{'':26} {'peak MiB':>9} {'ms':>8} {'gradient error':>15}")
    words = ["--tokens", str(tokens), "--width", str(width), *["--compile"] * options.compile]
    results = {}
    for name in METHODS:
        result = results[name] = measure_apart(__file__, name, *words)
        print(f"{name:26} {result['peak_mib']:9,.0f} {result['milliseconds']:8,.0f} {result['grad_error']:15.2e}")
    worst = max(result["grad_error"] for result in results.values())
    if worst > MAX_ERROR:
        raise SystemExit(f"gradients are off by {worst:.1%}: no figure counts")
    if options.json:
        print(json.dumps({"benchmark": "distillation_loss", "device": device, "tokens": tokens, "results": results}))


if __name__ == "__main__":
    main()
