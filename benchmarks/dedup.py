"""How fast are signatures for near duplicates, and are the duplicates found that were planted?

The texts are functions of the running Python's own standard library, 300 to 500 characters each, as a record of
training data has them. A signature (128 values of shingles of five tokens) is timed from the text on: in one thread,
and in one thread a core, since numpy lets threads run beside each other. datasketch makes as many values of the same
shingles in the same run where it is installed. Best of five runs (datasketch: three).

The planted set: each function is kept, and then comes back renamed, laid out anew with comments, and with one token
in 50 and one in 8 replaced. Recall is of the copies whose Jaccard similarity, computed without hashing, is 0.87 or
more; precision counts what was found below 0.72 as wrong (the threshold is 0.8; an estimate of 128 values errs by
0.035).

    python benchmarks/dedup.py [--quick] [--json]
"""

import argparse
import ast
import importlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without an installation

from foundry.cleaning.dedup import NUM_PERM, SHINGLE, NearDuplicates, signatures

T = TypeVar("T")

CORES = len(os.sched_getaffinity(0))
THRESHOLD = 0.8
TOKENS = re.compile(r"\w+|[^\w\s]")


def best(work: Callable[[], T], runs: int = 5) -> tuple[float, T]:
    """Seconds of the fastest of some runs, and what the last one gave."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        found = work()
        times.append(time.perf_counter() - start)
    return min(times), found


def functions() -> list[str]:
    """Distinct functions of the standard library's modules, of 300 to 500 characters."""
    found: dict[str, None] = {}
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.split("\n")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                text = "\n".join(line[node.col_offset :] for line in lines[node.lineno - 1 : node.end_lineno])
                if 300 <= len(text) <= 500:
                    found[text] = None
    return list(found)


def shingles(text: str) -> set[str]:
    """The shingles of a text as strings, its end padded."""
    tokens = TOKENS.findall(text) + [""] * (SHINGLE - 1)
    return {"\n".join(tokens[i : i + SHINGLE]) for i in range(len(tokens) - SHINGLE + 1)}


def similarity(one: str, other: str) -> float:
    """Jaccard similarity, without any hashing."""
    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)


def copies(text: str, draw: random.Random) -> list[str]:
    """Four copies of a function, from the same but for its name to one that is no duplicate any more."""
    name = re.search(r"def (\w+)", text)
    renamed = re.sub(rf"\b{name[1]}\b", "another_name", text) if name else text
    lines = text.replace("    ", "\t").split("\n")
    lines[len(lines) // 2 : len(lines) // 2] = ["\t# as it was before"]
    replaced = [
        " ".join(f"{token}_x" if draw.random() < rate else token for token in TOKENS.findall(text))
        for rate in (1 / 50, 1 / 8)
    ]
    return [renamed, "\n".join(lines), *replaced]


def planted(texts: list[str]) -> tuple[float, float]:
    """(recall, precision) on the planted set."""
    near = NearDuplicates(THRESHOLD)
    kept = {}
    for i, (text, row) in enumerate(zip(texts, signatures(texts), strict=True)):
        if near.add(str(i), row) is None:
            kept[str(i)] = text
    draw = random.Random(0)
    pairs = [(copy, text) for text in kept.values() for copy in copies(text, draw)]
    true = false = missed = 0
    for i, ((copy, text), row) in enumerate(zip(pairs, signatures([copy for copy, _ in pairs]), strict=True)):
        name = f"copy {i}"
        found = near.add(name, row)
        is_near = similarity(copy, text) >= 0.87
        if found is None:
            kept[name] = copy
            missed += is_near
        elif similarity(copy, kept[found[0]]) < 0.72:
            false += 1
        else:
            true += is_near
    return true / (true + missed), true / (true + false)


def in_threads(texts: list[str]) -> int:
    """Signatures made by as many threads as cores, each with its share of the texts."""
    with ThreadPoolExecutor(CORES) as pool:
        return sum(len(rows) for rows in pool.map(signatures, [texts[i::CORES] for i in range(CORES)]))


def datasketch(texts: list[str]) -> int | None:
    """Signatures made by datasketch, as its documentation does it; None if it is not installed."""
    try:
        min_hash = importlib.import_module("datasketch").MinHash
    except ModuleNotFoundError:
        return None
    for text in texts:
        min_hash(num_perm=NUM_PERM).update_batch([one.encode() for one in shingles(text)])
    return len(texts)


def main() -> None:
    """Check that the planted copies are found, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the texts")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    distinct = functions()
    recall, precision = planted(distinct[: 200 if options.quick else None])
    if min(recall, precision) < 0.98:
        raise SystemExit(f"recall {recall:.1%}, precision {precision:.1%} on the planted set: no figure counts")
    num_texts = 10_000 if options.quick else 100_000
    texts = (distinct * (num_texts // len(distinct) + 1))[:num_texts]
    seconds, _ = best(lambda: signatures(texts))
    threads_seconds, _ = best(lambda: in_threads(texts))
    peer_texts = distinct[: 200 if options.quick else 1_000]
    peer_seconds, peer = best(lambda: datasketch(peer_texts), 3)
    peer_rate = peer / peer_seconds if peer else None

    print(
        f"{CORES} cores; {num_texts:,} functions of {sum(map(len, texts)) / num_texts:,.0f} characters on average, "
        f"{len(distinct):,} of them distinct"
    )
    print(f"{'signatures per s, one thread':36} {num_texts / seconds:10,.0f}")
    print(f"{f'signatures per s, {CORES} threads':36} {num_texts / threads_seconds:10,.0f}")
    print(f"{'signatures by datasketch per s':36} {f'{peer_rate:10,.0f}' if peer_rate else 'not installed':>10}")
    print(f"{'recall on the planted set':36} {recall:10.2%}")
    print(f"{'precision on the planted set':36} {precision:10.2%}")
    if options.json:
        result = {
            "benchmark": "dedup",
            "cores": CORES,
            "num_texts": num_texts,
            "signatures_per_s": num_texts / threads_seconds,
            "signatures_one_thread_per_s": num_texts / seconds,
            "datasketch_per_s": peer_rate,
            "recall": recall,
            "precision": precision,
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
