"""How many tokens a second does one core prepare for training, and how fast does it tokenise?

Real code: the running Python's standard library, tokenised with a vocabulary trained on it. Three figures of one
thread: batches as training takes them (random windows, half of the documents rearranged for fill-in-the-middle,
packed), the same without rearranging, and tokenising as `smelter tokenize` does it. Beside them in the same run:
random windows out of one flat array of ids, as nanoGPT's loader reads them, which neither rearranges nor knows
documents: numpy's ceiling. A second is one of CPU time, so other work on the machine counts little.

    python benchmarks/data.py [--quick] [--json]
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # the tokenizer's threads: figures are of one core
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without an installation

import numpy as np

from foundry.corpus import main as corpus
from smelter.config import DataConfig
from smelter.data import BatchStream
from smelter.tokens.shards import ShardSet
from smelter.tokens.tokenize import main as tokenize

SEQ_LEN = 2_048
ROWS = 16


def rate(work: Callable[[int], int], seconds: float) -> float:
    """What `work(0), work(1) ...` return in all, a CPU second, for so many of them and after one call to warm up."""
    work(0)
    start, done, step = time.process_time(), 0, 1
    while time.process_time() - start < seconds:
        done += work(step)
        step += 1
    return done / (time.process_time() - start)


def batches(shards: ShardSet, fim_rate: float) -> Callable[[int], int]:
    """Makes the batches of a step; returns the number of tokens."""
    stream = BatchStream(
        shards.split("train"),
        shards.tokenizer,
        DataConfig(fim_rate=fim_rate),
        seq_len=SEQ_LEN,
        seed=0,
        device_batch_size=ROWS,
        rows_per_step=ROWS,
    )
    return lambda step: sum(batch.inputs.numel() for batch in stream.step(step, 0, 1))


def windows(num_tokens: int) -> Callable[[int], int]:
    """Random windows of a flat array; returns the number of tokens."""
    ids = np.random.default_rng(0).integers(0, 4_096, num_tokens).astype(np.uint16)

    def work(step: int) -> int:
        begins = np.random.default_rng(step).integers(0, num_tokens - SEQ_LEN - 1, ROWS)
        rows = np.stack([ids[begin : begin + SEQ_LEN + 1].astype(np.int64) for begin in begins])
        return np.ascontiguousarray(rows[:, :-1]).size

    return work


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the text and of the time")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    seconds = 1.0 if options.quick else 10.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, shards = folder / "corpus.jsonl", folder / "shards"
        with contextlib.redirect_stdout(io.StringIO()):
            corpus(["--source", "stdlib", "--out", str(raw)])
            if options.quick:
                lines = raw.read_bytes().splitlines(keepends=True)
                raw.write_bytes(b"".join(lines[::10]))
            tokenize([str(raw), "--out", str(shards), "--vocab-size", "4096"])
        opened = ShardSet.open(shards)
        texts = [json.loads(line)["text"] for line in raw.read_text(encoding="utf-8").splitlines()]
        num_bytes = [len(text.encode()) for text in texts]

        fresh = ShardSet.open(shards).tokenizer  # its cache of words holds nothing of the batches

        def encode(step: int) -> int:
            some = range(step % 8, len(texts), 8)
            fresh.encode_batch([texts[i] for i in some])
            return sum(num_bytes[i] for i in some)

        figures = {
            "fim_tokens_per_s": rate(batches(opened, 0.5), seconds),
            "plain_tokens_per_s": rate(batches(opened, 0.0), seconds),
            "flat_windows_tokens_per_s": rate(windows(opened.split("train").num_tokens), seconds),
            "tokenize_mb_per_s": rate(encode, seconds) / 1e6,
        }
    names = ("batches, half rearranged, tokens/s", "batches as they are, tokens/s", "flat windows, tokens/s")
    for text, figure in zip((*names, "tokenising, MB/s"), figures.values(), strict=True):
        print(f"{text:40} {figure:14,.1f}")
    if options.json:
        print(json.dumps({"benchmark": "data", "quick": options.quick, **figures}))


if __name__ == "__main__":
    main()
