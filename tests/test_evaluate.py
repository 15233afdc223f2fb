"""Evaluation: every held-out token counts once, baselines are those of the real programs, results are complete."""

import gzip
import json
import lzma
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from smelter import evaluate as module
from smelter.__main__ import main
from smelter.evaluate import (
    bits_per_byte,
    compressor_baselines,
    exact_match,
    nll_sum,
    open_shards,
    run_folder,
    spread_windows,
    trit_counts,
    untrained,
    validation_loss,
)
from smelter.infill import InfillCase
from smelter.model import Model
from smelter.shards import ShardSet

PIECES = [tiny.CODE[i : i + size] for i, size in ((0, 900), (4_000, 60), (5_000, 400), (6_000, 700), (9_000, 8_000))]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with four held-out documents, one shorter than a window, made with `tiny.tokenizer()`."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "corpus.jsonl").open("w") as file:
        for i, text in enumerate(PIECES):
            split = "train" if i == 4 else "val"
            file.write(json.dumps({"kind": "text", "text": text, "source": f"piece/{i}", "split": split}) + "\n")
    tiny.tokenizer().save(folder / "tokenizer.json")
    arguments = [str(folder / "corpus.jsonl"), "--out", str(folder / "shards")]
    assert main(["tokenize", *arguments, "--tokenizer", str(folder / "tokenizer.json")]) == 0
    return folder / "shards"


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


def test_bits_per_byte_scores_every_token_once(shards: Path) -> None:
    model = tiny.model(max_seq_len=32)
    split = ShardSet.open(shards).split("val")
    documents = [[int(i) for i in split.doc(i)] for i in range(split.num_docs)]
    assert sorted(tiny.tokenizer().decode(ids) for ids in documents) == sorted(PIECES[:4])
    expected = sum(token_by_token(model, ids, 16) for ids in documents) / math.log(2) / sum(map(len, PIECES[:4]))
    for batch_size in (1, 7):
        assert bits_per_byte(model, split, stride=16, batch_size=batch_size) == pytest.approx(expected, rel=1e-4)


def test_progress_counts_tokens(shards: Path) -> None:
    split = ShardSet.open(shards).split("val")
    done: list[int] = []
    bits_per_byte(tiny.model(), split, stride=48, progress=done.append)
    assert done == sorted(done)
    assert done[-1] == sum(len(split.doc(i)) for i in range(split.num_docs))


def test_overlap_gives_context(shards: Path) -> None:
    """A model that reads knows more with more of the text before it; one without attention does not care."""
    split = ShardSet.open(shards).split("val")
    model = tiny.model(max_seq_len=32)
    assert bits_per_byte(model, split, stride=4) != pytest.approx(bits_per_byte(model, split, stride=32), rel=1e-4)


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
    assert bpb == pytest.approx(bits_per_byte(model, split, stride=96), rel=1e-5)


def test_validation_keeps_one_shape(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def record(model: Model, inputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> float:
        shapes.append(inputs.shape)
        return nll_sum(model, inputs, targets)

    monkeypatch.setattr(module, "nll_sum", record)
    validation_loss(tiny.model(), ShardSet.open(shards).split("val"), 700, tokenizer=tiny.tokenizer(), batch_size=4)
    assert len(shapes) > 1
    assert set(shapes) == {(4, 96)}


def test_logits_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    ids = np.random.default_rng(0).integers(0, 512, (3, 40))
    whole = nll_sum(model, ids, ids)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 512 * 7)
    assert nll_sum(model, ids, ids) == pytest.approx(whole, rel=1e-6)
    assert nll_sum(model, ids, np.full_like(ids, -100)) == 0


def test_a_uniform_model_needs_log_vocabulary_bits(shards: Path) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.norm.weight.zero_()
    split = ShardSet.open(shards).split("val")
    num_tokens = sum(len(split.doc(i)) for i in range(split.num_docs))
    assert bits_per_byte(model, split, stride=48) == pytest.approx(num_tokens * 9 / split.num_bytes, rel=1e-6)
    assert validation_loss(model, split, 500, tokenizer=tiny.tokenizer())[0] == pytest.approx(math.log(512), rel=1e-6)


def test_baselines_are_the_libraries() -> None:
    documents = [text.encode() for text in PIECES] + [b""]
    total = sum(map(len, documents))
    assert compressor_baselines(documents) == {
        "gzip_bpb": 8 * sum(len(gzip.compress(data, 9)) for data in documents) / total,
        "xz_bpb": 8 * sum(len(lzma.compress(data, preset=9)) for data in documents) / total,
        "xz_joined_bpb": 8 * len(lzma.compress(b"".join(documents), preset=9)) / total,
    }


@pytest.mark.real
@pytest.mark.skipif(not (shutil.which("gzip") and shutil.which("xz")), reason="no gzip or xz program")
def test_baselines_are_the_programs() -> None:
    documents = [text.encode() for text in PIECES]
    total = sum(map(len, documents))

    def size(program: str, data: bytes) -> int:
        return len(subprocess.run([program, "-9", "-c"], input=data, capture_output=True, check=True).stdout)

    found = compressor_baselines(documents)
    # zlib's and gzip's own search differ by a few bytes.
    assert found["gzip_bpb"] == pytest.approx(8 * sum(size("gzip", data) for data in documents) / total, rel=2e-3)
    assert found["xz_bpb"] == pytest.approx(8 * sum(size("xz", data) for data in documents) / total, rel=1e-3)
    assert found["xz_joined_bpb"] == pytest.approx(8 * size("xz", b"".join(documents)) / total, rel=1e-3)


def test_exact_match_ignores_spaces_at_the_end_only() -> None:
    cases = [InfillCase(0, "", middle, "") for middle in ("x = 1", "y = 2  ", "z = 3", "w")]
    assert exact_match(["x = 1  ", "y = 2", " z = 3", "W"], cases) == 0.5
    assert exact_match([], []) is None


def test_trits_are_counted_by_kind() -> None:
    model = tiny.model()
    counts = trit_counts(model)
    assert set(counts) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert sum(sum(count.values()) for count in counts.values()) == model.config.num_matrix_params
    trits = torch.cat([layer.mlp.up_proj.trits for layer in model.layers]).flatten()  # type: ignore[union-attr,misc]
    assert counts["up_proj"] == {str(trit): int((trits == trit).sum()) for trit in (-1, 0, 1)}
    assert trit_counts(tiny.model(use_ternary=False)) == {}


def test_the_untrained_model_is_the_seeds() -> None:
    torch.manual_seed(9)
    expected = Model(tiny.TINY)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    fresh = untrained(tiny.model(), 9)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))


def test_run_folder_of_a_checkpoint() -> None:
    assert run_folder(Path("/a/run/checkpoints/step_0000001")) == Path("/a/run")
    assert run_folder(Path("/a/copied")) == Path("/a/copied")


def test_command_writes_everything_promised(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.model()
    run = tiny.checkpoint(tmp_path / "run", model, shards=str(shards))
    assert main(["evaluate", str(run), "--max-infill", "6", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    split = open_shards(shards, tiny.tokenizer()).split("val")
    assert results["val_bpb"] == pytest.approx(bits_per_byte(model, split, stride=48), rel=1e-6)
    assert f"{results['val_bpb']:.3f}" in out
    assert results["val_bytes"] == sum(len(text.encode()) for text in PIECES[:4])
    assert results["xz_bpb"] > results["xz_joined_bpb"] > 0
    assert results["gzip_bpb"] == compressor_baselines([text.encode() for text in PIECES[:4]])["gzip_bpb"]
    assert (results["val_files"], results["context"], results["stride"]) == (4, 96, 48)
    assert (results["train_seconds"], results["train_tokens"], results["step"]) == (12.5, 4_096, 7)
    assert results["num_params"] == model.config.num_params_estimate
    assert results["infill_cases"] == len(results["samples"]) == 6
    assert 0 <= results["infill_exact_match"] <= 1
    assert 0 <= results["infill_exact_match_untrained"] <= 1
    assert 0 <= results["infill_exact_match_psm"] <= 1
    assert results["trits"] == trit_counts(model)
    for row in results["samples"]:
        assert any(row["prefix"] + row["expected"] + row["suffix"] in text for text in PIECES[:4])
    assert "stride 48 of 96" in out


def test_infilling_can_be_left_out_and_results_put_elsewhere(tmp_path: Path, shards: Path) -> None:
    run = tiny.checkpoint(tmp_path / "run", tiny.model())
    options = ["--shards", str(shards), "--max-infill", "0", "--stride", "96", "--out", str(tmp_path / "r.json")]
    assert main(["evaluate", str(run / "checkpoints" / "step_0000007"), *options, "--device", "cpu"]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert (results["infill_cases"], results["infill_exact_match"], results["stride"]) == (0, None, 96)
    assert not (run / "results.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shards", "nowhere"], "nowhere"),
        (["--stride", "97"], "--stride 97"),
        (["--stride", "-1"], "--stride -1"),
        (["--batch-size", "0"], "--batch-size"),
        (["--max-infill", "-1"], "--max-infill"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    run = tiny.checkpoint(tmp_path / "run", tiny.model(), shards=str(shards))
    assert main(["evaluate", str(run), "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (run / "results.json").exists()


def test_shards_of_another_tokenizer_and_broken_models_are_refused(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.checkpoint(tmp_path / "other", tiny.model(), tiny.tokenizer(500), shards=str(shards))
    assert main(["evaluate", str(other), "--device", "cpu"]) == 2
    assert "another tokenizer" in capsys.readouterr().err
    broken = tiny.model()
    with torch.no_grad():
        broken.norm.weight[0] = math.nan
    run = tiny.checkpoint(tmp_path / "run", broken, shards=str(shards))
    assert main(["evaluate", str(run), "--device", "cpu"]) == 2
    assert "earlier checkpoint" in capsys.readouterr().err


def test_progress_speaks_rarely_and_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    quiet, chatty = module.Progress("work", 10), module.Progress("work", 10, seconds=0)
    for done in range(11):
        quiet(done)
        chatty(done)
    out = capsys.readouterr()
    assert not out.out
    assert out.err.count("work: ") == 10
    assert "work: 10/10, 0 s to go" in out.err
