"""The command: results are complete, hold what was promised before, and mistakes are one line."""

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from shards_of_pieces import PIECES, make_shards

from smelter import evaluate as module
from smelter.__main__ import main
from smelter.bpb import compressor_baselines
from smelter.evaluate import bits_per_byte, open_shards, run_folder, trit_counts, untrained
from smelter.model import Model


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


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
