"""Does training by the fast path learn what training by the specification learns?

A small ternary model, 200 steps of Muon and AdamW on the bytes of Python's standard library: once with the model
written out by `kernels.reference` in float32 with a dense loss, once as `smelter train` runs it (compiled blocks, int8
products, attention in blocks, chunked loss, 16 bits where the device has them). Same weights and batches under each
seed; then other seeds, to see how much a curve may differ without meaning anything. Exit code 1 where the two paths lie
further apart than the seeds.

    python benchmarks/curves.py [--quick] [--json]
"""

import argparse
import json
import statistics
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agreement import specified_hidden

from smelter.config import ModelConfig
from smelter.loss import LossConfig, chunked_loss, dense_loss
from smelter.model import Model
from smelter.muon import MuonAdamW
from smelter.run import device as hardware

CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=128,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    intermediate_size=384,
    max_seq_len=128,
)
BATCH = 8
LAST = 20
"""Steps at the end whose mean loss is a run's result."""


def corpus() -> Tensor:
    """The bytes of the standard library's modules, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    return torch.tensor(list(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))), dtype=torch.uint8)


def run(seed: int, steps: int, text: Tensor, *, fast: bool) -> list[float]:
    """The loss of each step."""
    device = hardware.pick_device("auto")
    dtype = hardware.pick_dtype("auto", device, is_training=True) if fast else torch.float32
    torch.manual_seed(seed)
    model = Model(CONFIG, torch.float32)
    model.compute_dtype = dtype
    model.trit_dtype = torch.int8 if fast else torch.float32
    model.to(device).quantize_weights()
    if fast:
        for block in model.layers:
            block.compile()
    optimizer = MuonAdamW(model, newton_schulz_dtype=dtype if fast and dtype == torch.bfloat16 else torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    options = LossConfig(soft_cap=CONFIG.final_logit_soft_cap, z_loss=1e-4)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - CONFIG.max_seq_len - 1, (BATCH, 1), generator=generator)
        tokens = text[starts + torch.arange(CONFIG.max_seq_len + 1)].long().to(device)
        inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
        if fast:
            loss = chunked_loss(model(inputs).flatten(0, 1), model.head, targets, options, use_compile=True)
        else:
            loss = dense_loss(specified_hidden(model, inputs).flatten(0, 1), model.head, targets, options)
        scaler.scale(loss.total).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.quantize_weights()
        losses.append(float(loss.ce))
    return losses


def main() -> None:
    """Train every seed both ways, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 steps instead of 200")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--seeds", type=int, default=4, help="runs of each path")
    options = parser.parse_args()
    steps = 60 if options.quick else 200
    text = corpus()
    paths = {"specification": False, "fast": True}
    curves = {
        name: [run(seed, steps, text, fast=fast) for seed in range(options.seeds)] for name, fast in paths.items()
    }
    results = {name: [statistics.mean(curve[-LAST:]) for curve in found] for name, found in curves.items()}
    print(f"{steps} steps of {BATCH * CONFIG.max_seq_len:,} bytes; mean loss of the last {LAST}, nats a byte")
    for name, found in results.items():
        print(f"{name:16} {' '.join(f'{value:.4f}' for value in found)}   mean {statistics.mean(found):.4f}")
    exact, fast_results = results["specification"], results["fast"]
    spread = max(exact) - min(exact)
    difference = abs(statistics.mean(exact) - statistics.mean(fast_results))
    same_seed = max(abs(a - b) for a, b in zip(exact, fast_results, strict=True))
    print(f"between the paths: {difference:.4f} in the mean, {same_seed:.4f} at most under one seed")
    print(f"between seeds of the specification: {spread:.4f}")
    if options.json:
        values = {"steps": steps, "results": results, "difference": difference, "same_seed": same_seed}
        print(json.dumps({"benchmark": "curves", **values, "seed_spread": spread}))
    if difference > spread:
        raise SystemExit("curves: the fast path learns something else than the specification")


if __name__ == "__main__":
    main()
