"""The command: results are complete, hold what was promised before, and mistakes are one line."""

import json
import math
from pathlib import Path

import pytest
import torch

from smelter.__main__ import main
from smelter.evaluation.bpb import compressor_baselines
from smelter.evaluation.evaluate import untrained
from smelter.evaluation.problems import OWN_PROBLEMS
from smelter.model import Model
from smelter.run.checkpoint import run_folder
from smelter.run.results import DocumentCase, GapCase, ProblemCase, Solved, read_cases, read_results
from smelter.run.trits import trit_counts
from smelter.tokens.shards import open_shards
from tests import tiny
from tests.evaluation.bits import bits_of_split
from tests.shards_of_pieces import PIECES, make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


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
    results = read_results(run / "results.json")
    split = open_shards(shards, tiny.tokenizer()).split("val")
    assert results.val_bpb == pytest.approx(bits_of_split(model, split, stride=48), rel=1e-6)
    assert f"{results.val_bpb:.3f}" in out
    assert results.val_bytes == sum(len(text.encode()) for text in PIECES[:4])
    assert results.xz_bpb > results.xz_joined_bpb > 0
    assert results.gzip_bpb == compressor_baselines([text.encode() for text in PIECES[:4]]).gzip
    assert (results.val_files, results.context, results.stride) == (4, 96, 48)
    assert (results.train_seconds, results.train_tokens, results.step) == (12.5, 4_096, 7)
    assert results.num_params == model.config.num_params_estimate
    assert results.infill_cases == len(results.samples) == 6
    for share in (results.infill_exact_match, results.infill_exact_match_untrained, results.infill_exact_match_psm):
        assert share is not None
        assert 0 <= share <= 1
    assert results.trits == trit_counts(model)
    for sample in results.samples:
        assert any(sample.prefix + sample.expected + sample.suffix in text for text in PIECES[:4])
    assert "stride 48 of 96" in out


def test_every_part_is_in_the_results_and_every_case_beside_them(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.checkpoint(tmp_path / "run", tiny.model(), shards=str(shards))
    assert main(["evaluate", str(run), "--max-infill", "6", "--max-spans", "3", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    results, cases = read_results(run / "results.json"), read_cases(run / "results.json")
    assert set(results.bpb_by_language) == {"python", "c++", "unknown"}
    bits = sum(part.bpb * part.num_bytes for part in results.bpb_by_language.values())
    assert bits / results.val_bytes == pytest.approx(results.val_bpb)
    counts = {kind: gaps.cases for kind, gaps in results.infill.items()}
    assert counts == {"single_line": 6, "multi_line": 3, "random_span": 3}
    assert results.infill["single_line"].exact_match == results.infill_exact_match
    assert "pass_at_k" not in json.loads((run / "results.json").read_text())
    for kind, count in counts.items():
        gaps = [case for case in cases if isinstance(case, GapCase) and case.measure == f"infill/{kind}"]
        assert len(gaps) == len({gap.case for gap in gaps}) == count
        mean = sum(gap.edit_similarity for gap in gaps) / count
        assert results.infill[kind].edit_similarity == pytest.approx(mean)
        assert all(any(gap.expected in text for text in PIECES) for gap in gaps)
    files = [case for case in cases if isinstance(case, DocumentCase)]
    nats = sum(case.nats for case in files)
    assert nats / math.log(2) / sum(case.num_bytes for case in files) == pytest.approx(results.val_bpb)
    for words in ("a span of characters", "2 to 8 lines", "edit similarity", "unknown"):
        assert words in out


PROBLEM = {
    "prompt": "def one():\n    ",
    "entry_point": "one",
    "canonical_solution": "return 1\n",
    "test": "def check(f):\n    assert f() == 1\n",
}


def test_problems_and_gaps_of_files(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.checkpoint(tmp_path / "run", tiny.model(), shards=str(shards))
    rows = [{**PROBLEM, "task_id": i} for i in range(3)]
    (tmp_path / "easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # A gap that is right whatever is written there: in a comment.
    gap = {**PROBLEM, "task_id": "SingleLine/0", "prompt": "def one():\n    return 1  # ", "suffix": "\n"}
    (tmp_path / "gaps.jsonl").write_text(json.dumps(gap) + "\n")
    options = ["--problems", str(tmp_path / "easy.jsonl"), "--infill-file", str(tmp_path / "gaps.jsonl")]
    options += ["--num-completions", "2", "--k", "2,1", "--max-tokens", "6", "--max-infill", "0", "--device", "cpu"]
    assert main(["evaluate", str(run), *options]) == 0
    results = read_results(run / "results.json")
    assert results.pass_at_k["easy"] == Solved(
        pass_at={1: 0.0, 2: 0.0},
        num_problems=3,
        num_completions=2,
        verdicts={"failed": 6},
        temperature=0.8,
        max_tokens=6,
    )
    gaps = results.infill_files["gaps"]
    assert (gaps.pass_at, gaps.exact_match, gaps.temperature, gaps.num_completions) == ({1: 1.0}, 0.0, 0.0, 1)
    solved = [case for case in read_cases(run / "results.json") if isinstance(case, ProblemCase)]
    assert [(case.measure, case.case, len(case.completions)) for case in solved] == [
        *(("pass_at_k/easy", str(i), 2) for i in range(3)),
        ("infill_files/gaps", "SingleLine/0", 1),
    ]
    assert "pass@2" in capsys.readouterr().out


def test_infilling_can_be_left_out_and_results_put_elsewhere(tmp_path: Path, shards: Path) -> None:
    run = tiny.checkpoint(tmp_path / "run", tiny.model())
    options = ["--shards", str(shards), "--max-infill", "0", "--stride", "96", "--out", str(tmp_path / "r.json")]
    assert main(["evaluate", str(run / "checkpoints" / "step_0000007"), *options, "--device", "cpu"]) == 0
    results = read_results(tmp_path / "r.json")
    assert (results.infill_cases, results.infill_exact_match, results.stride) == (0, None, 96)
    assert not (run / "results.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shards", "nowhere"], "nowhere"),
        (["--stride", "97"], "--stride 97"),
        (["--stride", "-1"], "--stride -1"),
        (["--batch-size", "0"], "--batch-size"),
        (["--max-infill", "-1"], "--max-infill"),
        (["--max-spans", "-1"], "--max-spans"),
        (["--k", "1,2"], "--num-completions, which is 1"),
        (["--k", "one"], "--k one"),
        (["--num-completions", "0"], "--num-completions"),
        (["--num-completions", "2", "--temperature", "0"], "--temperature 0"),
        (["--problems", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--infill-file", str(OWN_PROBLEMS)], "give it as --problems"),
        (["--problems", str(OWN_PROBLEMS), "--problems", str(OWN_PROBLEMS)], "another file is called problems too"),
        (["--compare", "a", "b"], "--compare takes two"),
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


@pytest.mark.parametrize("name", ["results.json", "results_cases.jsonl"])
def test_a_file_that_evaluate_did_not_write_is_not_replaced(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = tiny.checkpoint(tmp_path / "run", tiny.model(), shards=str(shards))
    (run / name).write_text('{"mine": 1}\n')
    command = ["evaluate", str(run), "--device", "cpu", "--max-infill", "0"]
    assert main(command) == 2
    assert f"{run / name}: `smelter evaluate` did not write this" in capsys.readouterr().err
    assert (run / name).read_text() == '{"mine": 1}\n'
    (run / name).unlink()
    assert main(command) == main(command) == 0


@pytest.mark.parametrize("free", [0, 2**12])
def test_on_a_full_disk_the_table_is_printed_and_nothing_is_left(
    tmp_path: Path, shards: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], free: int
) -> None:
    """Whether there is room for nothing, or for one of the two files."""
    run, out = tiny.checkpoint(tmp_path / "run", tiny.model(), shards=str(shards)), small_disk / "results.json"
    (small_disk / "others").write_bytes(bytes(2**21 - free))
    assert main(["evaluate", str(run), "--device", "cpu", "--max-infill", "0", "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert "bits per byte" in said.out
    assert f"error: {small_disk}/results" in said.err
    assert "No space left on device" in said.err
    assert said.err.count("\n") == 1
    assert [path.name for path in small_disk.iterdir()] == ["others"]


def test_a_model_or_a_comparison_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate"]) == 2
    assert "give a run or a checkpoint" in capsys.readouterr().err


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
