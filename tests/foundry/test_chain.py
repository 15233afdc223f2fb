"""From teachers to a model: generate, clean, stats, tokenize, train, each reading what the one before it wrote."""

import json
from pathlib import Path

import pytest

from foundry.__main__ import main as foundry
from foundry.settings import load_settings
from smelter.__main__ import main as smelter
from smelter.run.metrics import read_metrics
from tests.foundry.stub_teacher import StubTeacher

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("foundry*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_load(recipe: Path) -> None:
    assert load_settings(recipe).teachers


@pytest.mark.slow
def test_from_a_teacher_over_http_to_fifty_training_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers, kept, shards, run = (str(tmp_path / name) for name in ("raw.jsonl", "clean.jsonl", "shards", "run"))
    with StubTeacher() as teacher:
        recipe = tmp_path / "foundry.toml"
        recipe.write_text(
            f'[seeds]\ncount = 120\n[[teacher]]\nname = "stub/1"\nmodel = "m"\nbase_url = "{teacher.url}"\n'
        )
        assert foundry(["generate", str(recipe), "--out", answers]) == 0
    assert teacher.prompts.total() == 120
    assert foundry(["clean", answers, "--out", kept, "--near-duplicates", "0"]) == 0
    records = [json.loads(line) for line in Path(kept).read_text(encoding="utf-8").splitlines()]
    assert len(records) >= 100
    assert {response["teacher"] for record in records for response in record["responses"]} == {"stub/1"}
    capsys.readouterr()
    assert foundry(["stats", kept]) == 0
    assert "stub/1" in capsys.readouterr().out
    assert smelter(["tokenize", kept, "--out", shards, "--vocab-size", "512", "--val-fraction", "0.1"]) == 0
    shape = "--hidden-size=32 --num-layers=2 --num-heads=2 --num-kv-heads=1 --head-dim=16 --intermediate-size=64"
    rest = "--vocab-size=512 --max-seq-len=64 --total-batch-size=512 --num-steps=50 --warmup-steps=5 --log-every=1"
    plain = ["--no-use-torch-compile", "--precision=fp32", "--device=cpu", "--eval-every=0", "--eval-tokens=256"]
    assert smelter(["train", *shape.split(), *rest.split(), *plain, "--shards", shards, "--run-dir", run]) == 0
    losses = [row["loss"] for row in read_metrics(Path(run) / "metrics.jsonl")]
    assert len(losses) == 50
    assert losses[-1] < losses[0] - 0.5
