"""How fast does `foundry clean` read records, with its defaults, from file to file?

The running Python's own standard library: checks, secrets, exact and near duplicates. Best of three runs, and it counts
only if every record came out, kept or dropped. What its parts take alone: dedup.py and sandbox.py.

    python benchmarks/clean.py [--quick] [--json]
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without an installation

from foundry import corpus
from foundry.cleaning.clean import main as clean
from smelter.base.record import Record, write_records


def whole_command(records: list[Record], folder: Path) -> tuple[float, int]:
    """Megabytes of records that `foundry clean` reads a second, and how many records it keeps."""
    source, out = folder / "records.jsonl", folder / "clean.jsonl"
    write_records(source, records)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            clean([str(source), "--out", str(out)])
        times.append(time.perf_counter() - start)
    kept = out.read_bytes().count(b"\n")
    dropped = (folder / "clean.rejects.jsonl").read_bytes().count(b"\n")
    if kept + dropped != len(records):
        raise SystemExit(f"{len(records)} records in, {kept} and {dropped} out: no figure counts")
    return source.stat().st_size / 1e6 / min(times), kept


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 files instead of all")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    settings = corpus.Options(source=("stdlib",))
    found = corpus.corpus_records(corpus.find_trees(settings), settings, corpus.Summary())
    records = list(islice(found, 60 if options.quick else None))
    with tempfile.TemporaryDirectory() as folder:
        mb_per_s, kept = whole_command(records, Path(folder))
    print(f"foundry clean, MB of records per s: {mb_per_s:.2f}  ({kept:,} of {len(records):,} kept)")
    if options.json:
        result = {"benchmark": "clean", "mb_per_s": mb_per_s, "num_records": len(records), "num_kept": kept}
        print(json.dumps(result))


if __name__ == "__main__":
    main()
