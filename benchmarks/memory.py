"""Does training take as much memory as `--dry-run` predicts, and how does it grow with batch and context?

Whole training steps (two micro-batches, the optimizer, trits anew) of the recipe's model, with and without recompute,
each in a process of its own. On a GPU the peak is what PyTorch allocated, within 8 GB of it. On a CPU it is the
process's highest resident memory (VmHWM); what Python, PyTorch and the compiled code take of it, the base, is
measured once, at rest in the smallest setting, and subtracted everywhere. Times are of the same steps. No figure
counts where prediction and measurement are more than 20% apart.

    python benchmarks/memory.py [--quick] [--json]
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import contestants
from contestants import Setting

from smelter.bitnet import bit_linears
from smelter.config import Config, TrainingConfig
from smelter.run.device import pick_device, pick_dtype
from smelter.run.plan import Plan, plan

QUICK = ((4, 256), (4, 512))
FULL = ((1, 1_024), (1, 2_048), (2, 1_024), (1, 4_096))
"""Batch sizes and contexts: the smallest, twice the context, and in full twice the batch, four times the context."""
CARD = 8e9
TOLERANCE = 0.2

Result = dict[str, float]


def predict(setting: Setting) -> Plan:
    """What `smelter train --dry-run` says of this setting."""
    training = replace(
        TrainingConfig(), device_batch_size=setting.batch_size, use_gradient_checkpointing=setting.recompute
    )
    return plan(
        Config(model=setting.model, training=training),
        bytes_per_value=setting.torch_dtype.itemsize,
        newton_schulz_bytes=2 if setting.dtype == "bf16" else 4,
        device_type=setting.device,
    )


def return_freed_memory() -> None:
    """Make glibc give freed tensors back at once, so that resident memory is what is in use."""
    mmap_threshold = -3
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 1 << 16)
    libc.malloc_trim(0)


def measure(setting: Setting) -> Result:
    """In this process: seconds a token, and MiB at rest (between steps) and at the peak of a step."""
    device = torch.device(setting.device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / total))
    torch.manual_seed(0)
    trained = contestants.Smelter(setting)
    # As the trainer keeps them, to count the trits that flip.
    last_trits = [layer.trits.clone() for _, layer in bit_linears(trained.model)]
    tokens = torch.randint(0, setting.model.vocab_size, (2, setting.batch_size, setting.seq_len + 1)).to(device)

    def step() -> float:
        start = time.perf_counter()
        for micro_batch in tokens:
            trained.micro_step(micro_batch)
        trained.optimizer_step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / (2 * setting.batch_size * setting.seq_len)

    step()  # compiles
    seconds = min(step() for _ in range(2))
    if device.type == "cpu":
        return_freed_memory()
        step()  # what the allocator had kept goes as it is used again
        ctypes.CDLL(None).malloc_trim(0)
    contestants.reset_peak(device)
    rest = contestants.peak_mib(device)
    step()
    del last_trits
    return {"seconds_per_token": seconds, "rest_mib": rest, "peak_mib": contestants.peak_mib(device)}


def measure_apart(setting: Setting) -> Result:
    """`measure` in a new process."""
    command = [sys.executable, __file__, "--only", json.dumps(asdict(setting))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{name(setting)}: {run.stderr.strip().splitlines()[-1]}")
    found: Result = json.loads(run.stdout.splitlines()[-1])
    return found


def name(setting: Setting) -> str:
    """Batch x context, and how."""
    return f"{setting.batch_size} x {setting.seq_len}{', recompute' if setting.recompute else ''}"


def base_mib(setting: Setting, result: Result) -> float:
    """What the process holds at rest beyond the model's state, whose gradients are gone then."""
    if setting.device != "cpu":
        return 0.0
    predicted = predict(setting)
    return result["rest_mib"] - (predicted.state_bytes - 4 * predicted.num_params) / 2**20


def main() -> None:
    """Measure every setting, check the predictions, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny preset instead of the 100M one")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--preset", default="", help="model to train (overrides --quick's choice)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(Setting(**json.loads(options.only)))))
        return
    device = pick_device("auto")
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    dtype = names[pick_dtype("auto", device, is_training=True)]
    preset = options.preset or ("tiny" if options.quick else "100m")
    settings = [
        Setting(preset, length, batch, device.type, dtype, recompute)
        for recompute in (False, True)
        for batch, length in (QUICK if options.quick else FULL)
    ]
    results = []
    for setting in settings:
        results.append(measure_apart(setting))
        said = ", ".join(f"{key} {value:.4g}" for key, value in results[-1].items())
        print(f"{name(setting)}: {said}", file=sys.stderr, flush=True)  # a setting takes two minutes
    base = base_mib(settings[0], results[0])
    rows: dict[str, dict[str, Any]] = {}
    for setting, result in zip(settings, results, strict=True):
        predicted, measured = predict(setting).peak_bytes / 2**20, result["peak_mib"] - base
        rows[name(setting)] = {
            "predicted_mib": predicted,
            "measured_mib": measured,
            "error": predicted / measured - 1,
            "us_per_token": result["seconds_per_token"] * 1e6,
        }
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{preset}, {dtype}, two micro-batches a step, {where}; base {base:,.0f} MiB (subtracted)")
    print(f"{'batch x context':22} {'predicted MiB':>14} {'measured MiB':>13} {'error':>7} {'us/token':>9}")
    for label, row in rows.items():
        print(
            f"{label:22} {row['predicted_mib']:14,.0f} {row['measured_mib']:13,.0f} "
            f"{row['error']:7.1%} {row['us_per_token']:9,.0f}"
        )
    growth = {}
    for setting in settings:
        first = replace(setting, batch_size=settings[0].batch_size, seq_len=settings[0].seq_len)
        if setting != first:
            less, more = rows[name(first)], rows[name(setting)]
            growth[name(setting)] = {key: more[key] / less[key] for key in ("measured_mib", "us_per_token")}
            print(
                f"{name(first)} -> {name(setting)}: memory x {growth[name(setting)]['measured_mib']:.2f}, "
                f"time a token x {growth[name(setting)]['us_per_token']:.2f}"
            )
    worst = max(rows, key=lambda label: abs(rows[label]["error"]))
    if abs(rows[worst]["error"]) > TOLERANCE:
        raise SystemExit(f"{worst}: the prediction is off by {rows[worst]['error']:.1%}: no figure counts")
    if options.json:
        values = {"benchmark": "memory", "device": where, "preset": preset, "dtype": dtype, "base_mib": base}
        print(json.dumps(values | {"settings": rows, "growth": growth}))


if __name__ == "__main__":
    main()
