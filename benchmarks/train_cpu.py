"""How fast does a ternary model train on a CPU, and in how much memory, beside what others offer?

The 100M default at a context of 2,048, batch 1: forward and backward, and whole steps of 32,768 tokens with Muon. Ours
has both soft-caps; Transformers' Qwen3 has none. All run in the same minutes, one micro-step each in turn, in processes
of their own under the same allocator settings; the median counts. Memory is a process's highest resident size in
forward and backward, after warming up. First our compiled step is held against the specification.

    python benchmarks/train_cpu.py [--quick] [--json]
    PYTHONPATH=FOLDER_WITH_TORCHAO python benchmarks/train_cpu.py        # torchao counts where it can be imported
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from contestants import Result, Setting, Worker, missing_package

OURS, PEER = "smelter", "transformers bitnet"
FULL_PRECISION = "smelter full precision"
SHORT = [FULL_PRECISION, "smelter int8 gradients", "transformers full precision", "torchao bitnet"]
"""Measured for a few micro-steps only: they have no figure for whole steps."""

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824"}
"""Freed memory is kept: what `smelter train` asks of the C library."""


def check(setting: Setting) -> None:
    """Run benchmarks/agreement.py in short; SystemExit where our step is wrong."""
    script = Path(__file__).with_name("agreement.py")
    command = [sys.executable, str(script), "--device", "cpu", "--dtype", setting.dtype, "--preset", setting.preset]
    run = subprocess.run([*command, "--seq-len", "64"], check=False)
    if run.returncode:
        raise SystemExit("the compiled step is not the specification's: no figure counts")


def start(names: list[str], setting: Setting) -> dict[str, Worker]:
    """Workers that have compiled; those whose package is missing, or that fail to start, are left out and named."""
    workers = {}
    for name in names:
        if package := missing_package(name):
            print(f"{name}: {package} is not installed")
            continue
        worker = Worker(name, setting, {**os.environ, **ALLOCATOR})
        try:
            for _ in range(2):
                worker.ask("micro_step")
            worker.ask("reset_peak")
        except SystemExit as error:
            if name in (OURS, PEER):
                raise
            print(error)
            continue
        workers[name] = worker
    return workers


def seconds(answers: list[Result]) -> float:
    return statistics.median(answer["seconds"] for answer in answers)


def measure(setting: Setting, micro_steps: int, short: int) -> dict[str, Any]:
    """Everything, in turn; the figures for JSON."""
    workers = start([OURS, PEER, *SHORT], setting)
    answers: dict[str, list[Result]] = {name: [] for name in workers}
    for index in range(micro_steps):
        for name, worker in workers.items():
            if name in (OURS, PEER) or index < short:
                answers[name].append(worker.ask("micro_step"))
    tokens = setting.batch_size * setting.seq_len
    speed = {name: tokens / seconds(found) for name, found in answers.items()}
    peak = {name: found[-1]["peak_mib"] for name, found in answers.items()}
    steps = {}
    for name in (OURS, PEER):
        workers[name].ask("optimizer_step")  # makes the optimizer's state
        workers[name].ask("micro_step")
        steps[name] = workers[name].ask("optimizer_step")  # what every later step costs
    whole = {name: sum(answer["seconds"] for answer in answers[name]) + steps[name]["seconds"] for name in steps}
    for worker in workers.values():
        worker.close()
    found = {
        "tok_per_sec": speed,
        "peak_mib": peak,
        "ratio": speed[OURS] / speed[PEER],
        "memory_ratio": peak[OURS] / peak[PEER],
        "tokens_per_step": micro_steps * tokens,
        "whole_tok_per_sec": {name: micro_steps * tokens / value for name, value in whole.items()},
        "whole_ratio": whole[PEER] / whole[OURS],
        "optimizer_seconds": {name: steps[name]["seconds"] for name in steps},
        "whole_peak_mib": {name: steps[name]["peak_mib"] for name in steps},
        "ternary_time": speed[FULL_PRECISION] / speed[OURS],
    }
    if "torchao bitnet" in speed:
        found["ratio_torchao"] = speed[OURS] / speed["torchao bitnet"]
    return found


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny preset at 128 tokens, two micro-steps a step")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    setting = Setting(preset="tiny", seq_len=128) if options.quick else Setting()
    check(setting)
    found = measure(setting, 2 if options.quick else 16, 2 if options.quick else 4)
    print(f"{setting.preset}, 1 x {setting.seq_len:,} tokens, bf16, forward and backward; soft-caps in ours alone")
    print(f"{'':30} {'tokens/s':>9} {'peak MiB':>9}")
    for name, speed in found["tok_per_sec"].items():
        print(f"{name:30} {speed:9,.0f} {found['peak_mib'][name]:9,.0f}")
    print(f"against Transformers BitNet: {found['ratio']:.2f} x the speed, {found['memory_ratio']:.2f} x the memory")
    print(
        f"whole steps of {found['tokens_per_step']:,} tokens with Muon: {found['whole_ratio']:.2f} x "
        f"({', '.join(f'{name} {speed:,.0f} tokens/s' for name, speed in found['whole_tok_per_sec'].items())})"
    )
    print(f"being ternary: {found['ternary_time']:.3f} x the time of our own full precision")
    if options.json:
        print(json.dumps({"benchmark": "train_cpu", "quick": options.quick, **found}))


if __name__ == "__main__":
    main()
