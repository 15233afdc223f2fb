"""How many tokens a second does one GPU train on, against other people's ternary training?

Whole training steps of the 100M default (forward and backward of every micro-batch, then the optimizer) at 2,048
tokens of context. Each contestant runs in a process of its own on the same card, all are stepped in turn, and the
median counts. Ours has both soft-caps, its peers have none. MFU is the model's FLOPs (`ModelConfig.flops_per_token`)
over the matrix-product peak measured on this card in the same run. Before anything is timed, the compiled step must
equal the specification on this device (benchmarks/agreement.py): where it does not, no figure counts. `ratio_*` is
ours over the fastest run of that peer; a peer whose package is absent is listed as not installed.

--parts chooses what is measured: `speed`; `fp16`, the peak memory of ours at 8 x 2,048 in fp16, which an 8 GB card
must hold; `growth`, time and memory as the tokens of a step and the context double.

    python benchmarks/train_gpu.py [--quick] [--json] [--batch 8] [--tokens-per-step 262144] [--trace FILE]
    python benchmarks/train_gpu.py --device cpu --preset tiny --quick       # exercises the code; no figure of a GPU
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from contestants import CONTESTANTS, Result, Setting, Worker, missing_package

from smelter.base.errors import UserError
from smelter.run import device as hardware

OURS = "smelter"
DEFAULT = (OURS, "smelter full precision", "transformers bitnet", "torchao bitnet", "onebitllms", "onebitllms eager")
PARTS = ("speed", "fp16", "growth")
AT_ONCE = 3
"""Contestants that warm up at the same time; all at once would not fit on an 80 GB card."""
WARM_UP = 2
"""Steps before the clock: the first compiles, the second still fills caches."""
SHORT = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_agreement(setting: Setting, *, quick: bool) -> dict[str, Any]:
    """Run benchmarks/agreement.py in a process of its own; SystemExit where our step is wrong."""
    script = Path(__file__).with_name("agreement.py")
    command = [sys.executable, str(script), "--json", "--device", setting.device, "--dtype", setting.dtype]
    # One sequence: the specification keeps every score and every logit.
    command += ["--quick"] if quick else ["--preset", setting.preset, "--seq-len", str(setting.seq_len)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    *shown, last = run.stdout.splitlines() or [""]
    print("\n".join(shown))
    if run.returncode:
        raise SystemExit("the compiled step is not the specification's: no figure counts")
    found: dict[str, Any] = json.loads(last)["results"]
    return found


class Field:
    """Workers by name on one device; one that fails (out of memory, say) drops out, and `failed` tells why."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.failed: dict[str, str] = {}

    def start(self, settings: dict[str, tuple[str, Setting]], micro_steps: int) -> None:
        """Start (contestant, setting) under each name and warm up, a few at once since most of it is compiling."""
        names = list(settings)
        for start in range(0, len(names), AT_ONCE):
            group = names[start : start + AT_ONCE]
            for name in group:
                self.workers[name] = Worker(*settings[name])
            for what in (f"train {micro_steps}",) * WARM_UP + ("release",):
                self.ask_all(group, what)

    def ask_all(self, names: list[str], what: str) -> dict[str, Result]:
        """The answers of those that still run, working at the same time."""
        running = [name for name in names if name not in self.failed]
        for name in running:
            self.workers[name].send(what)
        answers = {}
        for name in running:
            try:
                answers[name] = self.workers[name].receive()
            except SystemExit as error:
                self.failed[name] = str(error)
        return answers

    def ask(self, name: str, what: str) -> Result | None:
        """The answer of one, or None."""
        return self.ask_all([name], what).get(name)

    def close(self) -> None:
        """End all."""
        for worker in self.workers.values():
            worker.close()


def measure(
    settings: dict[str, tuple[str, Setting]], *, micro_steps: int, rounds: int, trace: str | None = None
) -> tuple[dict[str, Result], dict[str, str]]:
    """Seconds of a step and peak MiB of each (contestant, setting), in turn; and those that failed, with the reason."""
    field = Field()
    field.start(settings, micro_steps)
    answers: dict[str, list[Result]] = {name: [] for name in settings}
    for _ in range(rounds):
        for name in settings:
            field.ask(name, "train 1")  # takes the memory again that `release` gave to the others
            field.ask(name, "reset_peak")
            answer = field.ask(name, f"train {micro_steps}")
            if answer is not None:
                answers[name].append(answer)
            field.ask(name, "release")
    if trace and OURS in settings:
        field.ask(OURS, f"trace {trace}")
    field.close()
    failed = field.failed
    results = {}
    for name, found in answers.items():
        if name in failed:
            continue
        if not all(abs(answer["loss"]) < float("inf") for answer in found):
            failed[name] = f"{name}: its loss is not finite"
            continue
        seconds = [answer["seconds"] for answer in found]
        results[name] = {
            "seconds": statistics.median(seconds),
            "spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
            "peak_mib": max(answer["peak_mib"] for answer in found),
            "loss": found[-1]["loss"],
        }
    return results, failed


def ratio(tok_per_sec: dict[str, float], peer: str) -> float | None:
    """Ours over the fastest of the peer's runs; None where either is missing."""
    theirs = [speed for name, speed in tok_per_sec.items() if name.startswith(peer)]
    return tok_per_sec[OURS] / max(theirs) if theirs and OURS in tok_per_sec else None


def speed(
    names: list[str], setting: Setting, *, micro_steps: int, rounds: int, peak_flops: float, trace: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The main table; returns its figures for JSON, and the failures."""
    absent = {name: missing_package(name) for name in names}
    present = [name for name in names if absent[name] is None]
    entries = {name: (name, setting) for name in present}
    results, failed = measure(entries, micro_steps=micro_steps, rounds=rounds, trace=trace)
    tokens = micro_steps * setting.batch_size * setting.seq_len
    flops = setting.model.flops_per_token()
    tok_per_sec = {name: tokens / result["seconds"] for name, result in results.items()}
    print(f"{'':26} {'tok/s':>9} {'MFU':>6} {'ours is':>8} {'peak MiB':>9} {'spread':>7} {'loss':>6}")
    for name in names:
        if name not in results:
            print(f"{name:26} {f'{absent[name]} is not installed' if absent[name] else 'failed'}")
            continue
        rate, result = tok_per_sec[name], results[name]
        faster = f"{tok_per_sec[OURS] / rate:7.2f}x" if OURS in tok_per_sec else f"{'-':>8}"
        print(
            f"{name:26} {rate:9,.0f} {rate * flops / peak_flops:6.1%} {faster} {result['peak_mib']:9,.0f} "
            f"{result['spread']:7.1%} {result['loss']:6.2f}"
        )
    values = {
        "tok_per_sec": tok_per_sec,
        "mfu": tok_per_sec[OURS] * flops / peak_flops if OURS in tok_per_sec else None,
        "ratio_onebitllms": ratio(tok_per_sec, "onebitllms"),
        "ratio_torchao": ratio(tok_per_sec, "torchao"),
        "ratio_transformers": ratio(tok_per_sec, "transformers bitnet"),
        "ratio_full_precision": ratio(tok_per_sec, "smelter full precision"),
        "peak_mib": {name: result["peak_mib"] for name, result in results.items()},
        "spread": {name: result["spread"] for name, result in results.items()},
        "not_installed": {name: package for name, package in absent.items() if package},
    }
    return values, failed


def growth(setting: Setting, *, rounds: int) -> tuple[list[dict[str, float]], dict[str, str]]:
    """Time and memory of ours as the batch doubles, then the context; a step here is one micro-step and optimizer."""
    batch, length = setting.batch_size, setting.seq_len
    sizes = [
        (max(1, batch // 2), length),
        (batch, length),
        (2 * batch, length),
        (batch, length // 2),
        (batch, 2 * length),
    ]
    settings = {
        f"{size} x {context:,}": (OURS, replace(setting, batch_size=size, seq_len=context)) for size, context in sizes
    }
    results, failed = measure(settings, micro_steps=1, rounds=rounds)
    rows = []
    print(f"{'batch x context':>18} {'ms a step':>10} {'tok/s':>9} {'peak MiB':>9}")
    for name, (_, one) in settings.items():
        if name not in results:
            print(f"{name:>18} failed")
            continue
        seconds, peak = results[name]["seconds"], results[name]["peak_mib"]
        size, context = one.batch_size, one.seq_len
        rate = size * context / seconds
        rows.append({"batch_size": size, "seq_len": context, "seconds": seconds, "tok_per_sec": rate, "peak_mib": peak})
        print(f"{name:>18} {seconds * 1e3:10,.1f} {rate:9,.0f} {peak:9,.0f}")
    return rows, {f"growth {name}": reason for name, reason in failed.items()}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, small steps; the check at 128 tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to exercise the code")
    parser.add_argument("--dtype", choices=["auto", *SHORT], default="auto", help="compute dtype")
    parser.add_argument("--preset", default="100m", help="sizes of the model")
    parser.add_argument("--seq-len", type=int, default=0, help="context (2,048; 128 on a CPU)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a micro-batch")
    parser.add_argument("--tokens-per-step", type=int, default=0, help="262,144; 32,768 with --quick")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(DEFAULT), metavar="NAME")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--trace", metavar="FILE", help="write the profiler's record of one of our steps (Perfetto)")
    return parser.parse_args()


def main() -> None:
    """Check, measure, print."""
    options = parse()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "train_gpu: this PyTorch sees no CUDA GPU: run it where one is, or exercise the code with "
            "--device cpu --preset tiny",
            file=sys.stderr,
        )
        raise SystemExit(2)
    try:
        device = hardware.pick_device(options.device)
        dtype = hardware.pick_dtype("auto" if options.dtype == "auto" else options.dtype, device, is_training=True)
    except UserError as error:
        print(f"train_gpu: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    is_cuda = device.type == "cuda"
    setting = Setting(
        preset=options.preset,
        seq_len=options.seq_len or (2_048 if is_cuda else 128),
        batch_size=options.batch,
        device=device.type,
        dtype=next(name for name, value in SHORT.items() if value == dtype),
    )
    batch_tokens = setting.batch_size * setting.seq_len
    tokens_per_step = options.tokens_per_step or (32_768 if options.quick else 262_144)
    micro_steps = max(1, tokens_per_step // batch_tokens)
    rounds = 2 if options.quick else 7
    agreement = check_agreement(setting, quick=options.quick and not is_cuda)
    peak_flops = hardware.measure_peak_flops(device, dtype)
    where = torch.cuda.get_device_name(device) if is_cuda else "CPU"
    print(
        f"{setting.preset}, {setting.batch_size} x {setting.seq_len:,} tokens a micro-step, {micro_steps} a step, "
        f"{setting.dtype}, {where}, measured peak {peak_flops / 1e12:,.1f} TFLOP/s"
    )
    values: dict[str, Any] = {
        "benchmark": "train_gpu",
        "device": where,
        "torch": torch.__version__,
        "setting": asdict(setting),
        "tokens_per_step": micro_steps * batch_tokens,
        "peak_flops": peak_flops,
        "agreement": agreement,
    }
    failed: dict[str, str] = {}
    if "speed" in options.parts:
        found, failures = speed(
            options.contestants,
            setting,
            micro_steps=micro_steps,
            rounds=rounds,
            peak_flops=peak_flops,
            trace=options.trace,
        )
        values |= found
        failed |= failures
    if "fp16" in options.parts and is_cuda:
        one = replace(setting, dtype="fp16", batch_size=8, seq_len=2_048)
        results, failures = measure({OURS: (OURS, one)}, micro_steps=2, rounds=2)
        peak = results[OURS]["peak_mib"] if OURS in results else None
        values["peak_mib_fp16_8x2048"] = peak
        failed |= {f"fp16 {name}": reason for name, reason in failures.items()}
        print(f"ours in fp16 at 8 x 2,048: {'failed' if peak is None else f'peak {peak:,.0f} MiB'}")
    if "growth" in options.parts:
        values["growth"], failures = growth(setting, rounds=rounds)
        failed |= failures
    values["failed"] = failed
    if options.json:
        print(json.dumps(values))
    if failed:
        raise SystemExit("\n".join(failed.values()))


if __name__ == "__main__":
    main()
