"""Small checkpoints for tests of what becomes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

from smelter.config import preset
from smelter.run.checkpoint import save_checkpoint

CONFIG = preset("tiny")


def write_tokenizer(path: Path) -> Path:
    Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).save(str(path))
    return path


def some_tensors(seed: int = 0, size: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator)
    return {
        "embed_tokens.weight": weight,
        "transposed": weight.t(),
        "half": weight.half(),
        "bf16": weight.bfloat16(),
        "trits": torch.randint(-1, 2, (size,), dtype=torch.int8, generator=generator),
    }


def save(run: Path, step: int, tokenizer_file: Path, **changes: Any) -> Path:
    given: dict[str, Any] = {
        "config": CONFIG,
        "tensors": some_tensors(step),
        "tokenizer_file": tokenizer_file,
        "state": {"step": step, "rng": torch.get_rng_state()},
        "keep": 0,
    }
    return save_checkpoint(run, step, **(given | changes))


def rewrite(file: Path, manifest: dict[str, Any]) -> None:
    """Another content of a config.json, without a digest of its own, as older versions wrote it."""
    file.write_text(json.dumps({key: value for key, value in manifest.items() if key != "sha256"}))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message
