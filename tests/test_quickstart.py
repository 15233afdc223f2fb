"""What `make quickstart` left behind is what the README promises. `make test-real` runs it first."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from smelter.config import load_config

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "runs" / "quickstart"
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    if not (RUN / "results.json").exists():
        pytest.skip("no runs/quickstart: run `make quickstart` first")
    values: dict[str, Any] = json.loads((RUN / "results.json").read_text(encoding="utf-8"))
    return values


def test_it_beats_every_compressor_and_the_untrained_model(results: dict[str, Any]) -> None:
    # Well above the 1.26 that a quiet machine gives: what a machine reaches depends on its speed.
    assert results["val_bpb"] < 0.85 * results["xz_joined_bpb"]
    assert results["xz_joined_bpb"] < min(results["xz_bpb"], results["gzip_bpb"])
    assert results["infill_cases"] >= 200
    assert results["infill_exact_match"] > results["infill_exact_match_untrained"]
    assert results["train_seconds"] <= 480
    assert results["train_tokens"] > 1_000_000
    assert results["num_params"] == load_config(ROOT / "recipes" / "quickstart.toml").model.num_params_estimate


def test_the_exports_are_ternary(results: dict[str, Any]) -> None:
    tensors = load_file(RUN / "export" / "hf" / "model.safetensors")
    trits: Counter[int] = Counter()
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            weights = tensor.float()
            scale = weights.abs().max()
            assert set((weights / scale).unique().tolist()) == {-1.0, 0.0, 1.0}
            trits.update((weights / scale).to(torch.int8).flatten().tolist())
    assert trits.total() == sum(sum(counts.values()) for counts in results["trits"].values())
    (file,) = (RUN / "export" / "gguf").glob("*.gguf")
    packed: Counter[float] = Counter()
    for stored in gguf.GGUFReader(file).tensors:
        if stored.tensor_type.name == "TQ2_0":
            values = gguf.quants.dequantize(stored.data, stored.tensor_type)
            packed.update(np.sign(values).flatten().tolist())
            assert len(np.unique(np.abs(values))) == 2
    assert dict(packed) == {float(trit): count for trit, count in trits.items()}


def test_transformers_writes_code_with_it(results: dict[str, Any]) -> None:
    folder = str(RUN / "export" / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("import os\nimport ", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert len(tokenizer.decode(written[0])) > len("import os\nimport ")


def test_the_report_shows_it(results: dict[str, Any]) -> None:
    page = (RUN / "report.html").read_text(encoding="utf-8")
    assert "Ternary for certain" in page
    assert f"{results['val_bpb']:.3f}" in page
