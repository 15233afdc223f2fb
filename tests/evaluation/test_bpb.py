"""Bits per byte: every held-out token counts once, for its own document; baselines are those of the real programs."""

import gzip
import lzma
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smelter.evaluation import bpb as module
from smelter.evaluation.bpb import (
    Compressed,
    by_language,
    compressor_baselines,
    document_cases,
    document_nats,
    nll_rows,
    validation_loss,
)
from smelter.model import Model
from smelter.tokens.shards import ShardSet
from smelter.tokens.windows import spread_windows
from tests import tiny
from tests.evaluation.bits import bits_of_split
from tests.shards_of_pieces import PIECES, make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


def token_by_token(model: Model, ids: list[int], stride: int) -> float:
    """Nats of a document after eos, each token from the window that scores it, by one forward pass each."""
    context, eos = model.config.max_seq_len, tiny.tokenizer().eos_id
    whole, total = [eos, *ids], 0.0
    with torch.no_grad():
        for position in range(1, len(whole)):
            # The first window scores its whole length, each later one its last `stride` tokens.
            last = max(context, context + math.ceil((position - context) / stride) * stride)
            window = whole[last - context : position]
            logits = model.logits(model(torch.tensor([window])))[0, -1]
            total -= float(logits.log_softmax(-1)[whole[position]])
    return total


@pytest.fixture(scope="module")
def one_by_one(shards: Path) -> list[float]:
    """Each held-out document's nats, token by token, at stride 16."""
    split = ShardSet.open(shards).split("val")
    documents = [[int(i) for i in split.doc(i)] for i in range(split.num_docs)]
    assert sorted(tiny.tokenizer().decode(ids) for ids in documents) == sorted(PIECES[:4])
    return [token_by_token(tiny.model(max_seq_len=32), ids, 16) for ids in documents]


def test_bits_per_byte_scores_every_token_once(shards: Path, one_by_one: list[float]) -> None:
    model = tiny.model(max_seq_len=32)
    split = ShardSet.open(shards).split("val")
    expected = sum(one_by_one) / math.log(2) / sum(map(len, PIECES[:4]))
    for batch_size in (1, 7):
        assert bits_of_split(model, split, stride=16, batch_size=batch_size) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_every_document_has_its_own_nats(shards: Path, batch_size: int, one_by_one: list[float]) -> None:
    model = tiny.model(max_seq_len=32)
    split = ShardSet.open(shards).split("val")
    nats = document_nats(model, split, stride=16, batch_size=batch_size)
    assert nats == pytest.approx(np.array(one_by_one), rel=1e-4)


def test_languages_add_up(shards: Path) -> None:
    """Of four documents two have a record that names their language."""
    model, split = tiny.model(max_seq_len=32), ShardSet.open(shards).split("val")
    nats = document_nats(model, split, stride=32)
    parts = by_language(document_cases(nats, split))
    assert {name: part.num_files for name, part in parts.items()} == {"python": 1, "c++": 1, "unknown": 2}
    assert sum(part.num_bytes for part in parts.values()) == split.num_bytes
    bits = sum(part.bpb * part.num_bytes for part in parts.values())
    assert bits / split.num_bytes == pytest.approx(bits_of_split(model, split, stride=32))
    (number,) = [i for i, language in enumerate(split.languages) if language == "python"]
    assert parts["python"].bpb == pytest.approx(nats[number] / math.log(2) / split.doc_num_bytes[number])
    sizes = [part.num_bytes for part in parts.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_progress_counts_tokens(shards: Path) -> None:
    split = ShardSet.open(shards).split("val")
    done: list[int] = []
    bits_of_split(tiny.model(), split, stride=48, progress=done.append)
    assert done == sorted(done)
    assert done[-1] == sum(len(split.doc(i)) for i in range(split.num_docs))


def test_overlap_gives_context(shards: Path) -> None:
    """A model that reads knows more with more of the text before it; one without attention does not care."""
    split = ShardSet.open(shards).split("val")
    model = tiny.model(max_seq_len=32)
    assert bits_of_split(model, split, stride=4) != pytest.approx(bits_of_split(model, split, stride=32), rel=1e-4)


@pytest.mark.parametrize(("seq_len", "max_tokens"), [(32, 10**9), (32, 200), (1, 50), (500, 1)])
def test_spread_windows_are_slices_of_the_documents(shards: Path, seq_len: int, max_tokens: int) -> None:
    split = ShardSet.open(shards).split("val")
    eos = tiny.tokenizer().eos_id
    documents = [[eos, *map(int, split.doc(i))] for i in range(split.num_docs)]
    windows = list(spread_windows(split, seq_len, max_tokens, eos))
    total = 0
    for inputs, targets in windows:
        assert inputs.shape == targets.shape == (seq_len,)
        length = int((targets >= 0).sum())
        assert (targets[length:] == -100).all()
        total += length
        start_of = [
            (doc, start)
            for doc, ids in enumerate(documents)
            for start in range(0, len(ids) - 1, seq_len)
            if ids[start : start + length] == inputs[:length].tolist()
            and ids[start + 1 : start + length + 1] == targets[:length].tolist()
        ]
        assert start_of
    if max_tokens == 10**9:
        assert total == sum(len(ids) - 1 for ids in documents)
    else:
        assert 0 < total <= max(max_tokens, seq_len)
    if max_tokens == 200:
        places = [inputs.tolist() for inputs, _ in windows]
        assert len({tuple(place) for place in places}) == 6
        assert any(place[0] == eos for place in places), "the first document's beginning is always there"
        assert any(place[0] != eos for place in places), "not only beginnings"


def test_validation_loss_is_the_same_for_every_batch_size(shards: Path) -> None:
    split, model, tokens = ShardSet.open(shards).split("val"), tiny.model(), tiny.tokenizer()
    windows = list(spread_windows(split, 96, 1_000, tokens.eos_id))
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for inputs, targets in windows:
        scored = targets >= 0
        with torch.no_grad():
            logits = model.logits(model(torch.from_numpy(inputs)[None]))[0, torch.from_numpy(scored)]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets[scored]), reduction="sum"))
        num_tokens += int(scored.sum())
        num_bytes += len(tokens.decode_bytes(targets[scored]))
    expected = (nats / num_tokens, nats / math.log(2) / num_bytes)
    for batch_size in (1, 4, 100):
        found = validation_loss(model, split, 1_000, tokenizer=tokens, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-5)


def test_validation_on_everything_without_overlap_is_bits_per_byte(shards: Path) -> None:
    split, model = ShardSet.open(shards).split("val"), tiny.model()
    _, bpb = validation_loss(model, split, 10**9, tokenizer=tiny.tokenizer())
    assert bpb == pytest.approx(bits_of_split(model, split, stride=96), rel=1e-5)


def test_validation_keeps_one_shape(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def record(model: Model, inputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        shapes.append(inputs.shape)
        return nll_rows(model, inputs, targets)

    monkeypatch.setattr(module, "nll_rows", record)
    validation_loss(tiny.model(), ShardSet.open(shards).split("val"), 700, tokenizer=tiny.tokenizer(), batch_size=4)
    assert len(shapes) > 1
    assert set(shapes) == {(4, 96)}


def test_logits_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    ids = np.random.default_rng(0).integers(0, 512, (3, 40))
    whole = nll_rows(model, ids, ids)
    with torch.no_grad():
        logits = model.logits(model(torch.from_numpy(ids))).log_softmax(-1)
    expected = -logits.gather(-1, torch.from_numpy(ids)[..., None]).sum(dim=(1, 2))
    assert whole == pytest.approx(expected.numpy(), rel=1e-5)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 512 * 7)
    assert nll_rows(model, ids, ids) == pytest.approx(whole, rel=1e-6)
    assert nll_rows(model, ids, np.full_like(ids, -100)).tolist() == [0, 0, 0]


def test_a_uniform_model_needs_log_vocabulary_bits(shards: Path) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.norm.weight.zero_()
    split = ShardSet.open(shards).split("val")
    num_tokens = sum(len(split.doc(i)) for i in range(split.num_docs))
    assert bits_of_split(model, split, stride=48) == pytest.approx(num_tokens * 9 / split.num_bytes, rel=1e-6)
    assert validation_loss(model, split, 500, tokenizer=tiny.tokenizer())[0] == pytest.approx(math.log(512), rel=1e-6)


def test_baselines_are_the_libraries() -> None:
    documents = [text.encode() for text in PIECES] + [b""]
    total = sum(map(len, documents))
    assert compressor_baselines(documents) == Compressed(
        gzip=8 * sum(len(gzip.compress(data, 9)) for data in documents) / total,
        xz=8 * sum(len(lzma.compress(data, preset=9)) for data in documents) / total,
        xz_joined=8 * len(lzma.compress(b"".join(documents), preset=9)) / total,
    )


@pytest.mark.real
@pytest.mark.skipif(not (shutil.which("gzip") and shutil.which("xz")), reason="no gzip or xz program")
def test_baselines_are_the_programs() -> None:
    documents = [text.encode() for text in PIECES]
    total = sum(map(len, documents))

    def size(program: str, data: bytes) -> int:
        return len(subprocess.run([program, "-9", "-c"], input=data, capture_output=True, check=True).stdout)

    ours = compressor_baselines(documents)
    # zlib's and gzip's own search differ by a few bytes.
    assert ours.gzip == pytest.approx(8 * sum(size("gzip", data) for data in documents) / total, rel=2e-3)
    assert ours.xz == pytest.approx(8 * sum(size("xz", data) for data in documents) / total, rel=1e-3)
    assert ours.xz_joined == pytest.approx(8 * size("xz", b"".join(documents)) / total, rel=1e-3)
