"""How good a model is on code it has not seen: bits per byte, and lines filled in exactly.

Bits per byte divides the model's total surprise by the bytes of the text, so models with different
tokenizers compare, and so do compressors: gzip and xz of the very same documents stand beside it. Each
held-out token is predicted once, left to right, in windows that overlap, so that a token deep inside a
long file is not judged as if the file began just before it; the overlap costs time and is the `stride`.
A conversation counts with its answer alone, tokens and bytes: its prompt is given to the model.
"""

import gzip
import json
import lzma
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from smelter.bitnet import bit_linears
from smelter.cli import parse
from smelter.data import eval_windows
from smelter.errors import CheckpointError, DataError, UserError
from smelter.generate import infill_lines, load_model, pick_device
from smelter.infill import InfillCase, choose_cases
from smelter.model import Model
from smelter.shards import ShardSet, Split
from smelter.tokenizer import Tokenizer

IGNORED = -100
LOGITS_AT_ONCE = 2**24
"""Logits that exist at a time: 64 MiB of float32."""

Window = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


@torch.no_grad()
def nll_sum(model: Model, inputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> float:
    """Total negative log-likelihood (nats) of targets [B, T] after inputs [B, T]; targets below 0 do not count."""
    device = model.embed_tokens.weight.device
    hidden = model(torch.from_numpy(inputs.astype(np.int64)).to(device)).flatten(0, 1)  # [B * T, C]
    flat = torch.from_numpy(targets.astype(np.int64)).to(device).flatten()
    scored = flat >= 0
    hidden, flat = hidden[scored], flat[scored]
    total = torch.zeros((), dtype=torch.float64)
    chunk = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for start in range(0, len(flat), chunk):
        logits = model.logits(hidden[start : start + chunk])
        total += F.cross_entropy(logits, flat[start : start + chunk], reduction="sum").double().cpu()
    return float(total)


def spread_windows(split: Split, seq_len: int, max_tokens: int, eos_id: int) -> Iterator[Window]:
    """About `max_tokens` held-out tokens as windows (inputs [T], targets [T]), spread evenly over the split.

    Each document, with eos before it, is cut every `seq_len` tokens without overlap; of all the windows that hold
    text to score every n-th is taken, so the same are taken each time and every part of the split has its share.
    """
    begins, ends = split.written
    skipped = begins // seq_len
    counts = np.where(begins < ends, -(-ends // seq_len) - skipped, 0)
    starts = np.concatenate(([0], np.cumsum(counts)))
    total = int(starts[-1])
    wanted = min(total, max(1, max_tokens // seq_len))
    for number in range(wanted):
        index = number * total // wanted
        doc = int(np.searchsorted(starts, index, side="right")) - 1
        ids = np.concatenate(([eos_id], split.doc(doc))).astype(np.int64)
        first = (index - int(starts[doc]) + int(skipped[doc])) * seq_len
        inputs, targets = np.full(seq_len, eos_id), np.full(seq_len, IGNORED)
        begin, end = max(first, int(begins[doc])), min(first + seq_len, int(ends[doc]))
        inputs[: end - first], targets[begin - first : end - first] = ids[first:end], ids[begin + 1 : end + 1]
        yield inputs, targets


def _batches(windows: Iterable[Window], batch_size: int) -> Iterator[Window]:
    """Windows stacked to [batch_size, T]; the last batch is filled with rows that do not count."""
    windows = iter(windows)
    while rows := list(islice(windows, batch_size)):
        missing = batch_size - len(rows)
        filler = np.full_like(rows[0][1], IGNORED)
        yield (
            np.stack([row[0] for row in rows] + [rows[0][0]] * missing),
            np.stack([row[1] for row in rows] + [filler] * missing),
        )


def validation_loss(
    model: Model, split: Split, max_tokens: int, *, tokenizer: Tokenizer, batch_size: int = 8
) -> tuple[float, float]:
    """A quick look while training: (nats per token, bits per byte) on about `max_tokens` held-out tokens.

    The windows (`spread_windows`, of the model's context) are the same at every call and for every batch
    size. Tokens at the start of a window have little context, so the figure lies a little above
    `bits_per_byte`'s. Every forward pass has the shape [batch_size, max_seq_len], so that compiled blocks
    stay compiled. Raises DataError for an empty split.
    """
    nats, num_tokens, num_bytes = 0.0, 0, 0
    lengths = tokenizer.token_num_bytes
    windows = spread_windows(split, model.config.max_seq_len, max_tokens, tokenizer.eos_id)
    for inputs, targets in _batches(windows, batch_size):
        nats += nll_sum(model, inputs, targets)
        scored = targets[targets >= 0]
        num_tokens += scored.size
        num_bytes += int(lengths[scored].sum())
    if not num_bytes:
        raise DataError("the held-out split is empty: tokenize again with a larger --val-fraction")
    return nats / num_tokens, nats / math.log(2) / num_bytes


def bits_per_byte(
    model: Model,
    split: Split,
    *,
    stride: int,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> float:
    """Bits per byte over every document of the split; each token scored once with max_seq_len - stride of context.

    `progress` is called with the tokens scored so far after each batch. Raises DataError for an empty split.
    """
    if not split.num_bytes:
        raise DataError("the held-out split is empty: tokenize again with a larger --val-fraction")
    nats, num_tokens = 0.0, 0
    for inputs, targets in _batches(eval_windows(split, model.config.max_seq_len, stride), batch_size):
        used = (
            int(np.flatnonzero((targets >= 0).any(axis=0)).max(initial=-1)) + 1
        )  # short documents leave columns empty
        nats += nll_sum(model, inputs[:, :used], targets[:, :used])
        num_tokens += int((targets >= 0).sum())
        if progress is not None:
            progress(num_tokens)
    return nats / math.log(2) / split.num_bytes


def _xz_size(data: bytes) -> int:
    """Bytes of `xz -9`. The dictionary is no longer than the data: the same file, without clearing 600 MB for it."""
    size = min(64 * 2**20, max(4096, 1 << max(len(data) - 1, 0).bit_length()))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": size}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))


def compressor_baselines(documents: Sequence[bytes]) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` of each document on its own, and of `xz -9` of all joined."""
    total = sum(map(len, documents))
    return {
        "gzip_bpb": 8 * sum(len(gzip.compress(data, 9, mtime=0)) for data in documents) / total,
        "xz_bpb": 8 * sum(map(_xz_size, documents)) / total,
        "xz_joined_bpb": 8 * _xz_size(b"".join(documents)) / total,
    }


def exact_match(lines: Sequence[str], cases: Sequence[InfillCase]) -> float | None:
    """Share of lines equal to the case's but for spaces at the end; None without cases."""
    if not cases:
        return None
    return sum(a.rstrip() == case.middle.rstrip() for a, case in zip(lines, cases, strict=True)) / len(cases)


def trit_counts(model: Model) -> dict[str, dict[str, int]]:
    """How many weights are -1, 0 and 1, by kind of layer (q_proj, ..., down_proj)."""
    counts: dict[str, Counter[str]] = {}
    for name, layer in bit_linears(model):
        kind = counts.setdefault(name.rsplit(".", 1)[-1], Counter())
        for trit in (-1, 0, 1):
            kind[str(trit)] += int((layer.trits == trit).sum())
    return {kind: {trit: count[trit] for trit in ("-1", "0", "1")} for kind, count in counts.items()}


def untrained(model: Model, seed: int) -> Model:
    """The same model with the initial weights of `seed`: what exact match is worth without training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = Model(model.config, model.compute_dtype)
    fresh = fresh.to(model.embed_tokens.weight.device).eval()
    fresh.quantize_weights()
    return fresh


class Progress:
    """A line on standard error at most every few seconds, for work that takes longer than that."""

    def __init__(self, what: str, total: int, seconds: float = 5.0) -> None:
        self.what, self.total, self.seconds = what, total, seconds
        self.start = self.last = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.last >= self.seconds and done:
            left = (now - self.start) * (self.total - done) / done
            print(f"{self.what}: {done:,}/{self.total:,}, {left:.0f} s to go", file=sys.stderr, flush=True)
            self.last = now


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a trained model on held-out documents; writes results.json into the run folder."""

    checkpoint: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN_OR_CKPT")]]
    """Run folder (its newest checkpoint) or checkpoint."""
    shards: Path | None = None
    """Folder that `smelter tokenize` wrote; by default the one the run was trained on."""
    max_infill: int = 200
    """Most lines to fill in; 0 leaves infilling out."""
    stride: int = 0
    """Tokens between overlapping windows, 1 to the context's length; 0 is half the context."""
    batch_size: int = 8
    """Windows per forward pass; changes memory and speed only."""
    num_samples: int = 8
    """Filled-in lines to keep in results.json."""
    seed: int = 0
    """Seed that chooses the lines to fill in."""
    out: Path | None = None
    """Result file; by default results.json in the run folder."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""


def run_folder(checkpoint: Path) -> Path:
    """The run folder of a checkpoint in its place, else the checkpoint's own folder."""
    checkpoint = checkpoint.resolve()
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def open_shards(path: Path, tokenizer: Tokenizer) -> ShardSet:
    """Shards made with this very tokenizer. Raises DataError that names the folder and the fix."""
    shards = ShardSet.open(path)
    if shards.tokenizer.hash != tokenizer.hash:
        raise DataError(f"{path}: made with another tokenizer than the model's: give the shards it was trained on")
    return shards


def evaluate(options: EvaluateOptions) -> tuple[dict[str, Any], Path]:
    """Measure everything; returns the results and the file they were written to."""
    model, tokenizer, checkpoint = load_model(options.checkpoint, device=pick_device(options.device), with_state=True)
    config = checkpoint.config
    context = config.model.max_seq_len
    stride = options.stride or max(1, context // 2)
    if not 1 <= stride <= context:
        raise UserError(f"--stride {options.stride}: must lie between 1 and the model's context of {context}")
    if options.batch_size < 1 or options.max_infill < 0 or options.num_samples < 0:
        raise UserError("--batch-size must be at least 1, --max-infill and --num-samples at least 0")
    split = open_shards(options.shards or Path(config.data.shards), tokenizer).split("val")
    say = Progress("evaluate: bits per byte, tokens", split.num_tokens)
    val_bpb = bits_per_byte(model, split, stride=stride, batch_size=options.batch_size, progress=say)
    if not math.isfinite(val_bpb):
        raise CheckpointError(
            f"{checkpoint.path}: the loss on held-out data is {val_bpb}: evaluate an earlier checkpoint"
        )
    places = zip(*split.written, strict=True)
    documents = [tokenizer.decode_bytes(split.doc(i)[begin:end]) for i, (begin, end) in enumerate(places)]

    def infillable(i: int) -> str:
        return "" if split.is_chat(i) else documents[i].decode(errors="replace")

    cases = choose_cases(split.num_docs, infillable, options.max_infill, options.seed)
    lines = infill_lines(model, tokenizer, cases, progress=Progress("evaluate: lines filled in", len(cases)))
    say = Progress("evaluate: lines filled in, prefix first", len(cases))
    psm_lines = infill_lines(model, tokenizer, cases, order="psm", progress=say)
    fresh = untrained(model, config.training.seed)
    say = Progress("evaluate: lines filled in by the untrained model", len(cases))
    fresh_lines = infill_lines(fresh, tokenizer, cases, progress=say)
    state = checkpoint.state or {}
    results: dict[str, Any] = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "num_params": sum(parameter.numel() for parameter in model.parameters()),
        "train_seconds": state.get("elapsed_seconds"),
        "train_tokens": state.get("tokens"),
        "val_bpb": val_bpb,
        **compressor_baselines(documents),
        "val_bytes": split.num_bytes,
        "val_files": split.num_docs,
        "context": context,
        "stride": stride,
        "infill_exact_match": exact_match(lines, cases),
        "infill_exact_match_psm": exact_match(psm_lines, cases),
        "infill_exact_match_untrained": exact_match(fresh_lines, cases),
        "infill_cases": len(cases),
        "infill_seed": options.seed,
        "activation_quant": config.model.activation_quant if config.model.use_ternary else "none",
        "trits": trit_counts(model),
        "samples": [
            {
                "prefix": case.prefix[-400:],
                "suffix": case.suffix[:400],
                "completion": line,
                "expected": case.middle,
            }
            for case, line in islice(zip(cases, lines, strict=True), options.num_samples)
        ],
    }
    out = options.out or run_folder(checkpoint.path) / "results.json"
    write_json(out, results)
    return results, out


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace a JSON file in one step, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp_{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _summary(results: dict[str, Any]) -> str:
    rows = [
        ("bits per byte", f"{results['val_bpb']:.3f}  (stride {results['stride']} of {results['context']})"),
        ("  gzip -9, each file", f"{results['gzip_bpb']:.3f}"),
        ("  xz -9, each file", f"{results['xz_bpb']:.3f}"),
        ("  xz -9, all joined", f"{results['xz_joined_bpb']:.3f}"),
        ("held-out", f"{results['val_files']:,} files, {results['val_bytes']:,} bytes"),
    ]
    if results["infill_cases"]:
        rows += [
            ("lines filled in exactly", f"{results['infill_exact_match']:.1%} of {results['infill_cases']}"),
            ("  prefix before suffix", f"{results['infill_exact_match_psm']:.1%}"),
            ("  untrained model", f"{results['infill_exact_match_untrained']:.1%}"),
        ]
    totals = Counter[str]()
    for counts in results["trits"].values():
        totals.update(counts)
    if totals:
        everything = sum(totals.values())
        shares = ", ".join(
            f"{totals[trit] / everything:.1%} {name}" for trit, name in (("-1", "-1"), ("0", "0"), ("1", "+1"))
        )
        rows.append(("weights", f"{everything:,} ternary: {shares}"))
    return table(rows)


def main(argv: list[str]) -> int:
    """`smelter evaluate`."""
    results, out = evaluate(parse(EvaluateOptions, argv, "smelter evaluate"))
    print(_summary(results))
    print(f"written to {out}")
    return 0
