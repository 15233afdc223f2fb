"""Bits per byte: the model's total surprise over a text, divided by the text's bytes.

Models with different tokenizers compare this way, and so do compressors: gzip and xz of the very same documents
stand beside it. Each held-out token is predicted once, left to right, in windows that overlap, so that a token
deep inside a long file is not judged as if the file began just before it; the overlap costs time and is the
`stride`. A conversation counts with its answer alone, tokens and bytes: its prompt is given to the model.
The sum is kept for each document, so it can be told apart by language, and two models be compared
document by document.
"""

import gzip
import lzma
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from smelter.base import DataError
from smelter.model import Model
from smelter.run import DocumentCase, LanguageBits
from smelter.tokens import Split, Tokenizer, batches, eval_windows, spread_windows

LOGITS_AT_ONCE = 2**24
"""Logits that exist at a time: 64 MiB of float32."""

UNKNOWN = "unknown"
"""Language of a document whose record named none."""


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """The surprise over a text in bits, by its bytes."""
    return nats / math.log(2) / num_bytes


@torch.no_grad()
def nll_rows(model: Model, inputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Negative log-likelihood (nats, [B]) of each row's targets [B, T] after inputs [B, T]; below 0 do not count."""
    device = model.embed_tokens.weight.device
    hidden = model(torch.from_numpy(inputs.astype(np.int64)).to(device)).flatten(0, 1)  # [B * T, C]
    flat = torch.from_numpy(targets.astype(np.int64)).to(device).flatten()
    rows = torch.arange(len(targets), device=device).repeat_interleave(targets.shape[1])
    scored = flat >= 0
    hidden, flat, rows = hidden[scored], flat[scored], rows[scored].cpu()
    totals = torch.zeros(len(targets), dtype=torch.float64)
    chunk = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for start in range(0, len(flat), chunk):
        logits = model.logits(hidden[start : start + chunk])
        nats = F.cross_entropy(logits, flat[start : start + chunk], reduction="none").double().cpu()
        totals.index_add_(0, rows[start : start + chunk], nats)
    return totals.numpy()


def validation_loss(
    model: Model, split: Split, max_tokens: int, *, tokenizer: Tokenizer, batch_size: int = 8
) -> tuple[float, float]:
    """A quick look while training: (nats per token, bits per byte) on about `max_tokens` held-out tokens.

    The windows (`spread_windows`, of the model's context) are the same at every call and for every batch
    size. Tokens at the start of a window have little context, so the figure lies a little above
    that of `document_nats`. Every forward pass has the shape [batch_size, max_seq_len], so that compiled blocks
    stay compiled. Raises DataError for an empty split.
    """
    nats, num_tokens, num_bytes = 0.0, 0, 0
    lengths = tokenizer.token_num_bytes
    windows = spread_windows(split, model.config.max_seq_len, max_tokens, tokenizer.eos_id)
    for inputs, targets in batches(windows, batch_size):
        nats += float(nll_rows(model, inputs, targets).sum())
        scored = targets[targets >= 0]
        num_tokens += scored.size
        num_bytes += int(lengths[scored].sum())
    if not num_bytes:
        raise DataError("the held-out split is empty: tokenize again with a larger --val-fraction")
    return nats / num_tokens, bits_per_byte(nats, num_bytes)


def document_nats(
    model: Model,
    split: Split,
    *,
    stride: int,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray[Any, Any]:
    """Nats of every document of the split, [num_docs]; each token scored once with max_seq_len - stride of context.

    `progress` is called with the tokens scored so far after each batch. Raises DataError for an empty split.
    """
    if not split.num_bytes:
        raise DataError("the held-out split is empty: tokenize again with a larger --val-fraction")
    ends = np.cumsum(split.written[1] - split.written[0])  # scored tokens up to the end of each document
    totals, num_tokens = np.zeros(split.num_docs), 0
    for inputs, targets in batches(eval_windows(split, model.config.max_seq_len, stride), batch_size):
        scored = (targets >= 0).sum(axis=1)
        used = int(np.flatnonzero((targets >= 0).any(axis=0)).max(initial=-1)) + 1  # short documents: empty columns
        nats = nll_rows(model, inputs[:, :used], targets[:, :used])
        # Windows come document by document, so the tokens scored before a window say whose it is.
        before = num_tokens + np.cumsum(scored) - scored
        real = scored > 0
        np.add.at(totals, np.searchsorted(ends, before[real], side="right"), nats[real])
        num_tokens += int(scored.sum())
        if progress is not None:
            progress(num_tokens)
    return totals


def document_cases(nats: np.ndarray[Any, Any], split: Split) -> list[DocumentCase]:
    """`document_nats` as cases; a document is called by its number and hash."""
    return [
        DocumentCase(
            measure="bits_per_byte",
            case=f"{i}/{split.doc_hash(i)[:16]}",
            language=split.languages[i] or UNKNOWN,
            nats=float(nats[i]),
            num_bytes=int(split.doc_num_bytes[i]),
        )
        for i in range(split.num_docs)
    ]


def bits_of(cases: Sequence[DocumentCase]) -> LanguageBits:
    """Bits per byte over all these documents."""
    num_bytes = sum(case.num_bytes for case in cases)
    return LanguageBits(bits_per_byte(float(np.sum([case.nats for case in cases])), num_bytes), num_bytes, len(cases))


def by_language(cases: Sequence[DocumentCase]) -> dict[str, LanguageBits]:
    """{language: its bits per byte}, the language with most bytes first; one without any is left out."""
    groups = {name: [case for case in cases if case.language == name] for name in {case.language for case in cases}}
    bits = {name: bits_of(groups[name]) for name in sorted(groups) if any(case.num_bytes for case in groups[name])}
    return dict(sorted(bits.items(), key=lambda item: -item[1].num_bytes))


def _xz_size(data: bytes) -> int:
    """Bytes of `xz -9`. The dictionary is no longer than the data: the same file, without clearing 600 MB for it."""
    size = min(64 * 2**20, max(4096, 1 << max(len(data) - 1, 0).bit_length()))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": size}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))


class Compressed(NamedTuple):
    """Bits per byte of `gzip -9` and `xz -9` of each document on its own, and of `xz -9` of all joined."""

    gzip: float
    xz: float
    xz_joined: float


def compressor_baselines(documents: Sequence[bytes]) -> Compressed:
    """What compressors make of the documents."""
    total = sum(map(len, documents))
    return Compressed(
        gzip=8 * sum(len(gzip.compress(data, 9, mtime=0)) for data in documents) / total,
        xz=8 * sum(map(_xz_size, documents)) / total,
        xz_joined=8 * _xz_size(b"".join(documents)) / total,
    )
