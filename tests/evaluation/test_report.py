"""The report shows what the run folder holds, says what it lacks, escapes code, and needs no other file."""

import html
import json
import math
import random
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from smelter.__main__ import main as smelter
from smelter.base.errors import DataError
from smelter.config import config_to_toml, preset
from smelter.evaluation.charts import LAYER_KINDS
from smelter.evaluation.report import TritShares, lines, trit_shares, write_report
from smelter.run.metrics import Sample
from smelter.run.results import GapsFilled, LanguageBits, LevelSolved, Solved, write_results
from tests import tiny

CONFIG = preset("tiny")
HOSTILE = "if a < b and c > d & e: s = '</script><script>document.title=\"owned\"</script>' # \u2028 {{ 7 * 6 }}"

PARTS: dict[str, Any] = {
    "bpb_by_language": {"python": LanguageBits(0.871, 1_200_345, 61), "unknown": LanguageBits(1.213, 9_876, 2)},
    "infill": {
        "single_line": GapsFilled(0.285, 0.612, 400, 64),
        "multi_line": GapsFilled(0.05, 0.431, 40, 128),
        "random_span": GapsFilled(0.125, 0.502, 40, 48),
    },
    "pass_at_k": {
        "smelter_problems": Solved(
            pass_at={1: 0.2125, 10: 0.4},
            num_problems=80,
            num_completions=10,
            verdicts={},
            by_difficulty={"1": LevelSolved({1: 0.5, 10: 0.8}, 26), "4": LevelSolved({1: 0.0, 10: 0.0}, 14)},
            temperature=0.8,
            max_tokens=256,
        )
    },
    "infill_files": {
        "smelter_lines": Solved(
            pass_at={1: 0.31},
            num_problems=357,
            num_completions=1,
            verdicts={},
            exact_match=0.22,
            edit_similarity=0.55,
            temperature=0.0,
            max_tokens=256,
        )
    },
}


def fake_run(run: Path, num_steps: int = 2_000, log_every: int = 10, results: bool = True) -> Path:
    """A run folder as training and evaluation leave it, with plausible curves."""
    run.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    model = CONFIG.model
    (run / "config.toml").write_text(
        config_to_toml(replace(CONFIG, training=replace(CONFIG.training, num_steps=num_steps, run_dir=str(run))))
    )
    rows: list[dict[str, Any]] = []
    for step in range(log_every, num_steps + 1, log_every):
        share = step / 2_000
        rate = min(step / 100, 1.0) * min(1.0, (1 - share) / 0.25)
        loss = 1.9 + 6.4 * math.exp(-step / 90) + 1.1 * math.exp(-step / 700) + rng.gauss(0, 0.05)
        row = {
            "step": step,
            "tokens": step * 4_096,
            "loss": None if step == 770 else loss,
            "ce_loss": loss - 0.01,
            "z_loss": 0.01,
            "lr_muon": 0.02 * rate,
            "lr_adamw": 0.003 * rate,
            "lr_embedding": 0.006 * rate,
            "grad_norm": 0.3 + 4 * math.exp(-step / 60) + abs(rng.gauss(0, 0.06)),
            "tok_per_sec": 9_800 + rng.gauss(0, 180) - (4_000 if step % 500 == 0 else 0),
            "mfu": 0.31,
            "peak_memory_mib": 812.5,
            "trit_flips": 0.004 * rate * math.exp(-step / 900) + 1e-6,
            "elapsed_seconds": step * 0.42,
            "skipped_steps": int(step >= 770),
        }
        for i, kind in enumerate(LAYER_KINDS):
            row[f"sparsity/{kind}"] = 0.31 + 0.012 * i + 0.05 * (1 - math.exp(-step / (300 + 80 * i)))
        rows.append(row)
        if step % 250 == 0:
            rows.append({"step": step, "val_loss": loss + 0.12, "val_bpb": (loss + 0.12) / math.log(2) / 3.6})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {
        "prefix": "def mean(values: list[float]) -> float:\n    if not values:\n        raise ValueError\n    ",
        "suffix": "\n\n\ndef median(values):\n    ordered = sorted(values)\n",
        "completion": "return sum(values) / len(values)",
        "expected": "return sum(values) / len(values)",
    }
    other = {"prefix": f"{HOSTILE}\n", "suffix": "\n    return x", "completion": "    x = <&>", "expected": "    x = 1"}
    plain = {"prefix": "import os\n\n\ndef ", "suffix": "", "completion": "read(path):\n    with open(path) as f:\n"}
    with (run / "samples.jsonl").open("w") as file:
        for step in (1_000, 2_000):
            for item in (sample, other, plain):
                file.write(json.dumps({"step": step, **item}) + "\n")
    if results:
        hidden, inner, layers = model.hidden_size, model.intermediate_size, model.num_layers
        sizes = dict.fromkeys(LAYER_KINDS, layers * hidden * inner)
        sizes |= {"q_proj": layers * hidden * model.query_size, "o_proj": layers * hidden * model.query_size}
        sizes |= {"k_proj": layers * hidden * model.kv_size, "v_proj": layers * hidden * model.kv_size}
        trits = {}
        for i, (kind, size) in enumerate(sizes.items()):
            minus, zero = int(size * (0.33 - 0.01 * i)), int(size * (0.34 + 0.02 * i))
            trits[kind] = {-1: minus, 0: zero, 1: size - minus - zero}
        held_out = (Sample(**sample), Sample(**other))
        figures = {"num_params": model.num_params_estimate, "trits": trits, "samples": held_out, **PARTS}
        write_results(run / "results.json", tiny.results(**figures), [])
        (run / "export" / "gguf").mkdir(parents=True)
        (run / "export" / "gguf" / "model-TQ2_0.gguf").write_bytes(bytes(3_456_789))
        (run / "export" / "gguf" / "export.json").write_text(json.dumps({"same_tokens": True, "max_difference": 1e-4}))
    return run


class Page(HTMLParser):
    """Text by element, every src and href, and the nesting."""

    VOID = ("meta", "path", "input", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def report_of(run: Path) -> tuple[str, Page]:
    text = write_report(run).read_text(encoding="utf-8")
    return text, Page(text)


def test_a_whole_run(tmp_path: Path) -> None:
    text, page = report_of(fake_run(tmp_path / "quickstart"))
    assert len(text) < 500_000
    for expected in (
        "Ternary code model: 6 layers, width 256",
        "Bits per byte 0.897 47% below the best compressor",
        "gzip 2.314",
        "Infilled exactly 28.5% of 400 held-out lines",
        "95% interval of the trained model: 24.3% to 33.1%",
        "untrained 0.0%",
        "unknown 1.213 2 9,876",
        "a line 28.5% 24.3% to 33.1% 0.612 400",
        "prefix before suffix 25.0%",
        "2 to 8 lines 5.0% 1.4% to 16.5% 0.431 40",
        "smelter_problems 21.2% 40.0% 80 x 10",
        "difficulty 1 50.0% 80.0% 26",
        "smelter_lines 31.0% 22.0% 0.550 357",
        f"Every one of the {CONFIG.model.num_matrix_params:,} weights",
        "Training time 14m00s",
        "Skipped steps: 1.",
        "1 of 200 values were not finite",
        "Step 2,000 (3)",
        "exactly as expected",
        "other than expected",
        "export/gguf/model-TQ2_0.gguf",
        "[training]",
    ):
        assert expected in page.words, expected
    assert "Not in this report" not in page.words
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert [title for title in titles if title != "From the evaluation"] == [
        "Bits per byte against compressors",
        "Infilling, exact match",
        "Loss",
        "Bits per byte",
        "Learning rates",
        "Throughput",
        "Gradient norm",
        "Zeros among the ternary weights",
        "Ternary weights that changed",
    ]
    assert "nan" not in re.sub(r"<script.*?</script>", "", text, flags=re.S).lower().split()


def test_nothing_is_fetched_from_anywhere(tmp_path: Path) -> None:
    text, page = report_of(fake_run(tmp_path / "run"))
    assert page.links == []
    assert "link" not in page.tags
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text


def test_code_is_shown_and_not_run(tmp_path: Path) -> None:
    text, page = report_of(fake_run(tmp_path / "run <b>&"))
    assert HOSTILE in "".join(page.text)
    assert text.count("<script") == 2
    assert text.count("</script>") == 2
    assert html.escape("run <b>&") in text
    assert "<b>" not in text


def test_a_run_of_three_lines(tmp_path: Path) -> None:
    run = tmp_path / "young"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 8.3, "loss_scale": 65536, "trit_flips": 0.0}\n'
        '{"step": 2, "loss": null, "loss_scale": 32768, "trit_flips": 0.0}\n'
        '{"step": 3, "loss": 8.1, "kl_loss": 2.0, "ce_loss": 7.5}\n'
    )
    _, page = report_of(run)
    for expected in (
        "Training loss 8.100 nats per token, step 3",
        "Loss scale",
        "Terms of the loss",
        "Not in this report",
        f"Results: smelter evaluate {run}",
        "training.eval_every",
        "training.sample_every",
        "config.toml: cannot read the recipe",
    ):
        assert expected in page.words, expected


@pytest.mark.parametrize("content", ["", '{"step": 1}\n', '{"step": 1, "loss": null}\n', '{"step": 0, "loss": 5}\n'])
def test_a_run_of_almost_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    _, page = report_of(tmp_path)
    assert "Not in this report" in page.words
    assert ("Curves" in page.words) == ("5" in content)


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "samples.jsonl", "export/gguf/export.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_run(tmp_path / "run")
    (run / name).write_text('{"step": 1\n{}\n')
    assert smelter(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert str(run / name) in error
    assert error.count("\n") == 1
    assert not (run / "report.html").exists()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: no such file: give a run folder"):
        write_report(tmp_path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    run = fake_run(tmp_path / "run", results=False)
    assert smelter(["report", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run / 'report.html'} (")
    assert opened == []
    out = tmp_path / "new folder" / "page.html"
    assert smelter(["report", str(run), "--out", str(out), "--open"]) == 0
    assert out.stat().st_size > 10_000
    assert opened == [out.as_uri()]


def test_a_page_that_report_did_not_write_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_run(tmp_path / "run", results=False)
    (run / "report.html").write_text("<title>My report</title>")
    assert smelter(["report", str(run)]) == 2
    assert f"{run / 'report.html'}: `smelter report` did not write this" in capsys.readouterr().err
    assert (run / "report.html").read_text() == "<title>My report</title>"
    (run / "report.html").unlink()
    assert smelter(["report", str(run)]) == smelter(["report", str(run)]) == 0


def test_trit_shares_and_information() -> None:
    rows = trit_shares({"down_proj": {-1: 1, 0: 1, 1: 1}, "q_proj": {-1: 0, 0: 2, 1: 2}})
    assert rows[0] == TritShares("q_proj", 4, [0.0, 0.5, 0.5], 1.0)
    assert [row.kind for row in rows] == ["q_proj", "down_proj", "all"]
    assert rows[1].bits == pytest.approx(math.log2(3))
    assert rows[2].shares == pytest.approx([1 / 7, 3 / 7, 3 / 7])
    assert rows[2].count == 7
    assert trit_shares({}) == []


@pytest.mark.real
@pytest.mark.slow
def test_chromium_shows_it(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on PATH")
    page = write_report(fake_run(tmp_path / "run"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    flags += ["--disable-component-update", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # what the browser itself would ask for goes nowhere
    # The pointer over a chart shows values: driven from inside, in a copy, since headless dumps take no input.
    moved = page.with_name("moved.html")
    drive = (
        "<script>document.querySelectorAll('.plot').forEach((plot) => { const box = plot.getBoundingClientRect();"
        "plot.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2})); });"
        "document.body.dataset.requests = performance.getEntriesByType('resource').length;</script></body>"
    )
    moved.write_text(page.read_text().replace("</body>", drive))
    command = [browser, *flags, "--window-size=1280,900", "--dump-dom", moved.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "owned" not in re.findall(r"<title>(.*?)</title>", done.stdout)[0]
    tips = re.findall(r'<div class="values" role="status" style="[^"]*">(.*?)</div></div>', done.stdout)
    assert len(tips) == 7
    # The middle of 10 to 2,000 steps, and a value of the curve
    assert "step <b>1,0" in tips[0]
    assert re.search(r"training, each <b>2\.\d+</b>", tips[0])
    assert 'data-requests="0"' in done.stdout


def test_samples_show_the_lines_around_the_cursor() -> None:
    text = "".join(f"line {i}\n" for i in range(20)) + "    "
    assert lines(text, -3, 0) == "line 18\nline 19\n    "
    assert lines("\n" + text, 0, 2) == "\nline 0\n"
    assert lines("", -3, 0) == ""
