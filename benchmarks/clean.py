"""How fast are records cleaned: programs run in the sandbox, signatures for near duplicates, and the whole command?

Three figures on the running Python's own standard library:

- programs_per_s_core: programs that print one number, each in a new sandbox, on all cores at once; divided by cores.
- signatures_per_s: MinHash signatures (128 values, shingles of five tokens) of its files and functions, on one core,
  from the text on. datasketch makes the same number of values from the same shingles where it is installed.
- mb_per_s: `foundry clean` with its defaults from file to file: checks, secrets, exact and near duplicates.

Each is the best of three runs, and counts only if what came out is right.

    python benchmarks/clean.py [--quick] [--json]
"""

import argparse
import ast
import contextlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without an installation

from foundry import corpus
from foundry.clean import main as clean
from foundry.dedup import NUM_PERM, SHINGLE, signatures
from foundry.record import Record, write_records
from smelter import sandbox

T = TypeVar("T")

CORES = len(os.sched_getaffinity(0))
BATCH = 128


def best_of_three(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of the fastest of three runs, and what the last one gave."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        found = work()
        times.append(time.perf_counter() - start)
    return min(times), found


def programs_per_second_and_core(count: int) -> float:
    """Programs that ended well, a second and core."""
    limits = sandbox.Limits(wall_seconds=60, cpu_seconds=60)

    def program(number: int) -> bool:
        return sandbox.run_python(f"print({number})", limits=limits).stdout == f"{number}\n"

    def work() -> int:
        with ThreadPoolExecutor(CORES) as pool:
            return sum(pool.map(program, range(count)))

    program(0)  # finds out once whether bubblewrap works
    seconds, done = best_of_three(work)
    if done < count:
        raise SystemExit(f"{count - done} of {count} programs did not print their number: no figure counts")
    return count / seconds / CORES


def functions(records: Iterable[Record]) -> list[str]:
    """The functions of Python files, methods and nested ones too."""
    found = []
    for record in records:
        lines = record.text.split("\n")
        for node in ast.walk(ast.parse(record.text)):
            if isinstance(node, ast.FunctionDef):
                found.append("\n".join(lines[node.lineno - 1 : node.end_lineno]))
    return found


def ours(texts: list[str]) -> list[Any]:
    """Signatures in the batches that `foundry clean` makes."""
    return [row for start in range(0, len(texts), BATCH) for row in signatures(texts[start : start + BATCH])]


def datasketch(texts: list[str]) -> list[Any] | None:
    """The same by datasketch, as its documentation does it; None if it is not installed."""
    try:
        min_hash = importlib.import_module("datasketch").MinHash
    except ModuleNotFoundError:
        return None
    rows = []
    for text in texts:
        tokens = re.findall(r"\w+|[^\w\s]", text) + [""] * (SHINGLE - 1)
        one = min_hash(num_perm=NUM_PERM)
        one.update_batch(["\n".join(tokens[i : i + SHINGLE]).encode() for i in range(len(tokens) - SHINGLE + 1)])
        rows.append(one.hashvalues)
    return rows


def whole_command(records: list[Record], folder: Path) -> tuple[float, int]:
    """Megabytes of records that `foundry clean` reads a second, and how many records it keeps."""
    source = folder / "records.jsonl"
    write_records(source, records)
    out = folder / "clean.jsonl"

    def work() -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            clean([str(source), "--out", str(out)])
        return out.read_bytes().count(b"\n")

    seconds, kept = best_of_three(work)
    dropped = (folder / "clean.rejects.jsonl").read_bytes().count(b"\n")
    if kept + dropped != len(records):
        raise SystemExit(f"{len(records)} records in, {kept} and {dropped} out: no figure counts")
    return source.stat().st_size / 1e6 / seconds, kept


def main() -> None:
    """Measure all three, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    num_files, num_programs = (60, 40) if options.quick else (None, 400)
    settings = corpus.Options(source=("stdlib",))
    records = list(islice(corpus.corpus_records(corpus.find_trees(settings), settings, corpus.Summary()), num_files))
    texts = functions(records) + [record.text for record in records]
    num_bytes = sum(len(text.encode()) for text in texts)

    programs = programs_per_second_and_core(num_programs)
    seconds, rows = best_of_three(lambda: ours(texts))
    peer_seconds, peer = best_of_three(lambda: datasketch(texts))
    peer_rate = len(texts) / peer_seconds if peer is not None else None
    with tempfile.TemporaryDirectory() as folder:
        mb_per_s, kept = whole_command(records, Path(folder))

    isolation = "bubblewrap" if sandbox._bubblewrap(sandbox.Limits().disk_bytes) else "rlimits only"
    print(
        f"{CORES} cores; {len(records):,} files, {len(texts):,} texts of {num_bytes / len(texts):,.0f} bytes on average"
    )
    print(f"{'programs in the sandbox, per s and core':44} {programs:10,.1f}  ({isolation})")
    print(f"{'signatures, per s':44} {len(rows) / seconds:10,.0f}")
    peer_text = f"{peer_rate:10,.0f}" if peer_rate else "not installed"
    print(f"{'signatures by datasketch, per s':44} {peer_text}")
    print(f"{'foundry clean, MB of records per s':44} {mb_per_s:10,.2f}  ({kept:,} of {len(records):,} kept)")
    if options.json:
        result = {
            "benchmark": "clean",
            "cores": CORES,
            "isolation": isolation,
            "programs_per_s_core": programs,
            "signatures_per_s": len(rows) / seconds,
            "datasketch_signatures_per_s": peer_rate,
            "mb_per_s": mb_per_s,
            "num_records": len(records),
            "num_kept": kept,
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
