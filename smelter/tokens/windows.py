"""Held-out documents as windows: every token of the text a target once, or an even share of them for a quick look."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from smelter.base import ConfigError
from smelter.tokens.shards import Split

IGNORED = -100
"""A target that does not count; PyTorch's own ignore_index."""


Window = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""Inputs and targets, [T] or stacked [B, T]."""


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


def eval_windows(split: Split, seq_len: int, stride: int) -> Iterator[Window]:
    """Windows (inputs [seq_len], targets [seq_len]) in which every token of the text is a target exactly once.

    A document is read from left to right with eos before it (its final eos is no target). Of a conversation only the
    answer counts, without the token that ends it: what the model has to know. Windows of long documents begin every
    `stride` tokens; what the window before has scored is context here, its targets are IGNORED, as are those of empty
    positions.
    """
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"stride = {stride}: must lie between 1 and the window's length, {seq_len}")
    for doc in range(split.num_docs):
        ids = np.concatenate(([split.eos_id], split.doc(doc))).astype(np.int64)
        written, written_end = (int(places[doc]) for places in split.written)
        size, done = len(ids) - 1, 0
        for start in range(0, size, stride):
            if done == size:
                break
            end = min(start + seq_len, size)
            first, last = max(done, written), min(end, written_end)
            done = end
            if first >= last:
                continue
            inputs, targets = np.full(seq_len, split.eos_id), np.full(seq_len, IGNORED)
            inputs[: end - start] = ids[start:end]
            targets[first - start : last - start] = ids[first + 1 : last + 1]
            yield inputs, targets


def batches(windows: Iterable[Window], batch_size: int) -> Iterator[Window]:
    """Windows stacked to [batch_size, T]; the last batch is filled with rows that do not count."""
    windows = iter(windows)
    while rows := list(islice(windows, batch_size)):
        missing = batch_size - len(rows)
        filler = np.full_like(rows[0][1], IGNORED)
        yield (
            np.stack([row[0] for row in rows] + [rows[0][0]] * missing),
            np.stack([row[1] for row in rows] + [filler] * missing),
        )
