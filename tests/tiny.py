"""Small things that several tests need: a corpus, a tokenizer, a model, a checkpoint of it."""

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from smelter.config import Config, DataConfig, ModelConfig, TrainingConfig
from smelter.decoding.batch import Row
from smelter.decoding.generate import Prompt, complete_many, generate
from smelter.decoding.request import Request
from smelter.model import Model
from smelter.run.checkpoint import save_checkpoint
from smelter.run.results import Results
from smelter.tokens.tokenizer import Tokenizer

CODE = Path(textwrap.__file__).read_text(encoding="utf-8")

TINY = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    max_seq_len=96,
    rope_base=10_000.0,
)


@cache
def tokenizer(vocab_size: int = 512) -> Tokenizer:
    """Trained on a module of the standard library."""
    return Tokenizer.train([CODE], vocab_size)


def model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Model:
    """A small model of strong layers, so that it does not only repeat its last token; its logits reach about 30."""
    torch.manual_seed(seed)
    made = Model(replace(TINY, **changes), dtype)
    with torch.no_grad():
        made.embed_tokens.weight.mul_(10)
        for name, parameter in made.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(12)
        made.norm.weight.mul_(4)
    made.quantize_weights()
    return made.eval()


def checkpoint(folder: Path, made: Model, tokens: Tokenizer | None = None, shards: str = "shards") -> Path:
    """A run folder `folder` with one checkpoint of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    (tokens or tokenizer()).save(folder / "made_tokenizer.json")
    save_checkpoint(
        folder,
        7,
        config=Config(model=made.config, data=DataConfig(shards=shards), training=TrainingConfig(run_dir=str(folder))),
        tensors=dict(made.state_dict()),
        tokenizer_file=folder / "made_tokenizer.json",
        state={"elapsed_seconds": 12.5, "tokens": 4_096},
        keep=1,
    )
    return folder


def write(
    made: Model, prompts: Sequence[Sequence[int]], *, pending: Sequence[bytes] = (), seed: int = 0, **options: Any
) -> list[Row]:
    """What `generate` makes of prompts with the tiny tokenizer; row i has seed `seed + i`, and log-probabilities."""
    pending = pending or [b""] * len(prompts)
    requests = [
        Request(ids, raw, seed=seed + i, **{"num_top": 0} | options)
        for i, (ids, raw) in enumerate(zip(prompts, pending, strict=True))
    ]
    return generate(made, tokenizer(), requests)


def complete(prefix: str, suffix: str | None = None, made: Model | None = None, **options: Any) -> str:
    """What a model, the tiny one if none is given, writes after `prefix`, or between it and `suffix`."""
    prompts = [Prompt(prefix, suffix)]
    (text,) = complete_many(made or model(), tokenizer(), prompts, **{"max_tokens": 64} | options)
    return text


def results(**changes: Any) -> Results:
    """What an evaluation might have found."""
    values: dict[str, Any] = {
        "checkpoint": "run/checkpoints/step_0000007",
        "step": 7,
        "num_params": 2_622_976,
        "train_seconds": 840.2,
        "train_tokens": 8_192_000,
        "val_bpb": 0.897,
        "gzip_bpb": 2.314,
        "xz_bpb": 2.287,
        "xz_joined_bpb": 1.702,
        "val_bytes": 1_210_221,
        "val_files": 63,
        "bpb_by_language": {},
        "context": 512,
        "stride": 256,
        "infill_exact_match": 0.285,
        "infill_exact_match_psm": 0.25,
        "infill_exact_match_untrained": 0.0,
        "infill_cases": 400,
        "infill_seed": 0,
        "infill": {},
        "activation_quant": "token",
        "trits": {},
        "samples": (),
    }
    return Results(**values | changes)
