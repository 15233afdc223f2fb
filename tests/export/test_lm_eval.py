"""lm-evaluation-harness runs the exported folder as it is, and finds what we find on the same data."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from smelter.evaluation.gaps import choose_cases
from smelter.export.check import runtime_model
from smelter.export.hf import read_hf
from smelter.model import Model
from smelter.run.load import load_model
from smelter.tokens.shards import ShardSet
from smelter.tokens.tokenize import TokenizeOptions, tokenize
from smelter.tokens.tokenizer import Tokenizer
from tests.evaluation.bits import bits_of_split

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "runs" / "quickstart"
PYTHON = Path(os.environ.get("LM_EVAL_DIR") or Path.home() / ".cache/foundry-tests/lm-eval-0.4.13") / "bin" / "python"
pytestmark = pytest.mark.real

TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
task: {task}
"""
BITS = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
"""


class Case(NamedTuple):
    """Code, four lines of which one comes next, and which."""

    query: str
    choices: list[str]
    gold: int


def write_task(folder: Path, name: str, kind: str, rows: list[dict[str, Any]]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(TASK.format(data=data, task=name) + kind, encoding="utf-8")


def log_likelihoods(model: Model, tokenizer: Tokenizer, case: Case) -> list[float]:
    """Summed log-probability of each choice after the query."""
    scores = []
    for choice in case.choices:
        start, ids = len(tokenizer.encode(case.query)), tokenizer.encode(case.query + choice)
        with torch.no_grad():
            log_probs = model.logits(model(torch.tensor([ids[:-1]])))[0].log_softmax(-1)
        scores.append(float(log_probs[torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])].sum()))
    return scores


def short_texts(tokenizer: Tokenizer, documents: list[str], max_tokens: int) -> list[str]:
    """The first lines of each document, as many as fit: what one window holds, no program can divide otherwise."""
    found = []
    for document in documents:
        text = ""
        for line in document.splitlines(keepends=True):
            if len(tokenizer.encode(text + line)) >= max_tokens:
                break
            text += line
        if len(text) > 100:
            found.append(text)
    return found


def test_it_finds_what_we_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not PYTHON.exists():
        pytest.skip(f"no {PYTHON}: run scripts/install_lm_eval.sh first")
    if not (RUN / "export" / "hf" / "config.json").exists():
        pytest.skip("no runs/quickstart: run `make quickstart` first")
    model, tokenizer, checkpoint = load_model(RUN)
    context = model.config.max_seq_len
    held_out = ShardSet.open(ROOT / checkpoint.config.data.shards).split("val")
    documents = [tokenizer.decode(held_out.doc(i)) for i in range(held_out.num_docs)]

    texts = short_texts(tokenizer, documents, context - 1)[:24]
    write_task(tmp_path, "heldout_bits", BITS, [{"text": text} for text in texts])
    records = [{"kind": "text", "text": text, "split": "val"} for text in texts]
    records.append({"kind": "text", "text": "x = 1\n", "split": "train"})
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shards = tokenize(
        TokenizeOptions((tmp_path / "records.jsonl",), tmp_path / "shards", tokenizer=checkpoint.tokenizer_file)
    )
    split = ShardSet.open(shards).split("val")

    lines = [case for case in choose_cases(held_out.num_docs, documents.__getitem__, 200) if case.prefix.strip()]
    cases: list[Case] = []
    for i, line in enumerate(lines):
        query, indent = line.prefix[-300:].rstrip(), line.prefix[len(line.prefix.rstrip()) :]
        gold = len(cases) % 4
        choices = [indent + lines[(i + 5 * j) % len(lines)].middle for j in range(1, 4)]
        choices.insert(gold, indent + line.middle)
        ids = tokenizer.encode(query)
        # Where a token goes across the border, as ":\n" does, there is more than one way to count.
        if len(cases) < 40 and all(tokenizer.encode(query + choice)[: len(ids)] == ids for choice in choices):
            cases.append(Case(query, choices, gold))
    assert len(cases) == 40
    write_task(tmp_path, "next_line", CHOICE, [case._asdict() for case in cases])

    folder = RUN / "export" / "hf"
    command = [
        *(str(PYTHON), "-m", "lm_eval", "--model", "hf", "--tasks", "heldout_bits,next_line"),
        *("--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu", "--batch_size", "8"),
        *("--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf_home")}
    run = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr[-3_000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    theirs_bits, theirs_accuracy = results["heldout_bits"]["bits_per_byte,none"], results["next_line"]["acc,none"]

    stored = runtime_model(model, "none", read_hf(folder))
    ours_bits = bits_of_split(stored, split, stride=context)
    trained_bits = bits_of_split(model, split, stride=context)
    ours = [log_likelihoods(stored, tokenizer, case) for case in cases]
    ours_accuracy = sum(scores.index(max(scores)) == case.gold for scores, case in zip(ours, cases, strict=True)) / len(
        cases
    )
    (file,) = (tmp_path / "out").rglob("samples_next_line_*.jsonl")
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    with capsys.disabled():
        print(f"\nbits per byte: lm-eval {theirs_bits:.6f}, ours {ours_bits:.6f}, as trained {trained_bits:.6f}")
        print(f"next line: lm-eval {theirs_accuracy:.4f}, ours {ours_accuracy:.4f} of {len(cases)} cases")
    assert theirs_bits == pytest.approx(ours_bits, rel=1e-4)
    assert theirs_bits == pytest.approx(trained_bits, rel=1e-2)
    for sample in samples:
        theirs = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert theirs == pytest.approx(ours[sample["doc_id"]], rel=1e-3, abs=1e-2), cases[sample["doc_id"]]
    assert theirs_accuracy == pytest.approx(ours_accuracy)
