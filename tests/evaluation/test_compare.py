"""Two evaluations beside each other: pair by pair where the cases are the same, and never certain of nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from smelter.__main__ import main
from smelter.evaluation.compare import Measured, Row, comparison, rows
from smelter.evaluation.intervals import share_difference
from smelter.run.results import (
    Case,
    DocumentCase,
    GapCase,
    GapsFilled,
    LanguageBits,
    ProblemCase,
    Solved,
    read_results,
    write_results,
)
from tests import tiny
from tests.shards_of_pieces import make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


def measured(name: str, exact: list[bool], bpb: float = 1.0, passed: tuple[int, ...] = (1, 0), n: int = 2) -> Measured:
    """An evaluation of as many files and gaps as `exact` has, and of as many problems as `passed`."""
    share = sum(exact) / len(exact)
    sizes = [100 * (i + 1) for i in range(len(exact))]
    cases: list[Case] = []
    for i, is_exact in enumerate(exact):
        nats = bpb * sizes[i] * 0.6931471805599453
        cases.append(DocumentCase("bits_per_byte", f"{i}/h", language="c", nats=nats, num_bytes=sizes[i]))
        cases.append(GapCase("infill/single_line", f"{i}", is_exact, edit_similarity=share, completion="", expected=""))
    for i, count in enumerate(passed):
        cases.append(ProblemCase("pass_at_k/p", f"{i}", n, count, verdicts=(), completions=()))
    share_passed = sum(passed) / n / len(passed)
    results = tiny.results(
        val_bpb=bpb,
        bpb_by_language={"c": LanguageBits(bpb, sum(sizes), len(sizes))},
        infill={"single_line": GapsFilled(share, share, len(exact), 64)},
        pass_at_k={
            "p": Solved(
                pass_at={1: share_passed},
                num_problems=2,
                num_completions=n,
                verdicts={},
                temperature=0.8,
                max_tokens=9,
            )
        },
    )
    return Measured(name, results, cases)


def row(first: Measured, second: Measured, name: str) -> Row:
    (named,) = [row for row in rows(first, second) if row.name == name]
    return named


def test_the_same_cases_are_compared_pair_by_pair() -> None:
    """40 of 100 and 52 of 100, of which 40 are the same: certain in pairs, not so as independent samples."""
    first, second = measured("A", [True] * 40 + [False] * 60), measured("B", [True] * 52 + [False] * 48)
    found = row(first, second, "a line, exactly")
    assert (found.first, found.second, found.basis) == (0.40, 0.52, "100 gaps, paired")
    assert found.is_certain
    other = Measured("B", second.results, second.cases[:-3])
    apart = row(first, other, "a line, exactly")
    assert apart.basis == "100 and 100 gaps"
    assert apart.interval == share_difference(0.40, 100, 0.52, 100)
    assert not apart.is_certain
    assert row(first, other, "  edit similarity").interval is None


def test_bits_per_byte_are_weighed_by_the_files_bytes() -> None:
    found = row(measured("A", [True] * 9), measured("B", [True] * 9, bpb=0.9), "bits per byte")
    assert found.interval == pytest.approx((-0.1, -0.1))
    assert found.is_certain
    assert found.cells() == ["bits per byte", "1.000", "0.900", "-0.100", "-0.100 to -0.100 *", "9 files, paired"]


def test_pass_at_k_by_problem() -> None:
    found = row(measured("A", [True], passed=(1, 0)), measured("B", [True], passed=(2, 1)), "p, pass@1")
    assert (found.first, found.second) == (0.25, 0.75)
    assert found.interval == pytest.approx((0.5, 0.5))
    single = row(measured("A", [True], passed=(1, 0), n=1), measured("B", [True], passed=(1, 1), n=1), "p, pass@1")
    assert single.interval is not None
    assert single.interval[0] < 0 < single.interval[1], "two problems prove nothing"


def test_equal_models_differ_in_nothing() -> None:
    same = measured("A", [True, False] * 10)
    assert not any(row.is_certain for row in rows(same, same))
    assert all(row.first == row.second for row in rows(same, same))
    text = comparison(same, same)
    assert "+0.0" in text
    assert "20 gaps, paired" in text


def test_what_was_measured_otherwise_is_said() -> None:
    first, second = measured("A", [True]), measured("B", [True])
    other = Measured("C", replace(second.results, stride=8, pass_at_k={}, infill={}), [])
    assert "stride: 256 in A, 8 in B" in comparison(first, other)
    assert [row.name for row in rows(first, other)] == ["bits per byte"]
    assert rows(first, other)[0].basis == "other files"


def test_command_on_runs_and_files(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = tiny.checkpoint(tmp_path / "first", tiny.model(0), shards=str(shards))
    second = tiny.checkpoint(tmp_path / "second", tiny.model(1), shards=str(shards))
    options = ["--max-infill", "4", "--max-spans", "2", "--device", "cpu"]
    assert main(["evaluate", "--compare", str(first), str(second), *options]) == 0
    out = capsys.readouterr().out
    assert "4 files, paired" in out
    assert "4 gaps, paired" in out
    assert "step 7" in out
    assert (first / "results.json").exists()
    # Now both are known, by whatever name, and nothing is measured again: the shards may be gone.
    before = (first / "results.json").stat().st_mtime_ns
    names = [str(first / "results.json"), str(second / "checkpoints" / "step_0000007"), "--shards", "nowhere"]
    assert main(["evaluate", "--compare", *names]) == 0
    assert capsys.readouterr().out.split("\n\n")[1] == out.split("\n\n")[1]
    assert (first / "results.json").stat().st_mtime_ns == before


def test_a_checkpoint_of_another_step_has_results_of_its_own(tmp_path: Path, shards: Path) -> None:
    run = tiny.checkpoint(tmp_path / "run", tiny.model(), shards=str(shards))
    write_results(run / "results.json", tiny.results(step=9), [])
    names = [str(run), str(run / "checkpoints" / "step_0000007")]
    assert main(["evaluate", "--compare", *names, "--max-infill", "0", "--device", "cpu"]) == 0
    assert read_results(run / "results.json").step == 9
    assert read_results(run / "results_step_0000007.json").step == 7
