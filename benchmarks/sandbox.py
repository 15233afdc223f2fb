"""How many programs does the sandbox run, a second and core, with bubblewrap and without?

Each program prints one number and is checked for it. As many run at once as there are cores; the figure is their
number a second, divided by the cores. What any process costs here is measured beside them: the bare interpreter with
the same options, started by subprocess alone. Each is the best of five runs.

    python benchmarks/sandbox.py [--quick] [--json]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without an installation

from smelter.base import sandbox

CORES = len(os.sched_getaffinity(0))
LIMITS = sandbox.Limits(wall_seconds=60, cpu_seconds=60)


def per_second_and_core(program: Callable[[int], str], count: int) -> float:
    """Programs that printed their number, a second and core."""

    def work(number: int) -> bool:
        return program(number) == f"{number}\n"

    work(0)  # what is done once
    times = []
    for _ in range(5):
        start = time.perf_counter()
        with ThreadPoolExecutor(CORES) as pool:
            done = sum(pool.map(work, range(count)))
        times.append(time.perf_counter() - start)
        if done < count:
            raise SystemExit(f"{count - done} of {count} programs did not print their number: no figure counts")
    return count / min(times) / CORES


def in_sandbox(use_bubblewrap: bool) -> Callable[[int], str]:
    """A program in the sandbox."""
    return lambda number: sandbox.run_python(f"print({number})", limits=LIMITS, use_bubblewrap=use_bubblewrap).stdout


def bare(number: int) -> str:
    """The same program by the same interpreter, with nothing around it."""
    command = [*sandbox._interpreter(), f"print({number})"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Measure all three, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 programs a run instead of 400")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    count = 40 if options.quick else 400
    has_bubblewrap = bool(sandbox._bubblewrap(LIMITS.disk_bytes))
    isolated = per_second_and_core(in_sandbox(use_bubblewrap=True), count) if has_bubblewrap else None
    fallback = per_second_and_core(in_sandbox(use_bubblewrap=False), count)
    interpreter = per_second_and_core(bare, count)
    print(f"{CORES} cores, {count} programs a run; programs per s and core")
    print(f"{'bubblewrap':20} {f'{isolated:8.1f}' if isolated else 'not here':>8}")
    print(f"{'fallback (rlimits)':20} {fallback:8.1f}")
    print(f"{'bare interpreter':20} {interpreter:8.1f}")
    if options.json:
        result = {
            "benchmark": "sandbox",
            "cores": CORES,
            "programs_per_s_core": isolated,
            "fallback_programs_per_s_core": fallback,
            "bare_programs_per_s_core": interpreter,
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
