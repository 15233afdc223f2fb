"""What the tests of teachers need: shards of tiny.tokenizer, a teacher for them, and caches."""

import json
from pathlib import Path
from typing import Any

from smelter.config import Config, DataConfig, DistillationConfig, ModelConfig, TrainingConfig
from smelter.data import BatchStream
from smelter.distillation.cache import TeacherCache
from smelter.distillation.teach import TeachOptions, teach
from smelter.tokens.shards import ShardSet
from smelter.tokens.tokenize import TokenizeOptions, tokenize
from tests import tiny

SEQ_LEN = 64
CUT: dict[str, Any] = {"seq_len": SEQ_LEN, "rows": 11, "device": "cpu", "batch_size": 3}
"""Eleven rows in batches of three: the last one is not full."""


def make_shards(folder: Path, *, seed: int = 0) -> Path:
    """About 60 documents, some of half the weight; another seed leaves some out."""
    pieces = [piece + "\n" for piece in tiny.CODE.split("\n\n")][seed:]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for number, piece in enumerate(pieces):
            record = {"kind": "text", "id": str(number), "text": piece, "split": "train" if number % 5 else "val"}
            file.write(json.dumps(record) + "\n")
    tiny.tokenizer().save(folder / "tokenizer.json")
    records, tokenizer = folder / "corpus.jsonl", folder / "tokenizer.json"
    return tokenize(TokenizeOptions(records=(records,), out=folder / "shards", tokenizer=tokenizer))


def make_cache(teacher: Path, shards: Path, out: Path, **options: Any) -> TeacherCache:
    """`smelter teach` in this process."""
    assert teach(TeachOptions(teacher=teacher, shards=shards, out=out, **{**CUT, **options})) == 0
    return TeacherCache.open(out, verify=True)


def student_config(shards: Path, *, cached: tuple[Path, ...] = (), teachers: tuple[Path, ...] = ()) -> Config:
    """A student of a quarter of the teacher's width."""
    return Config(
        model=ModelConfig(
            vocab_size=512,
            hidden_size=32,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            intermediate_size=48,
            max_seq_len=SEQ_LEN,
        ),
        data=DataConfig(shards=str(shards)),
        distillation=DistillationConfig(teachers=tuple(map(str, teachers)), cached=tuple(map(str, cached))),
        training=TrainingConfig(device_batch_size=3, total_batch_size=3 * SEQ_LEN, use_torch_compile=False),
    )


def stream_of(config: Config, shards: ShardSet, seed: int = 0, cached: tuple[TeacherCache, ...] = ()) -> BatchStream:
    """The stream that training with `config` reads, three rows a step."""
    return BatchStream(
        shards.split("train"),
        shards.tokenizer,
        config.data,
        seq_len=SEQ_LEN,
        seed=seed,
        device_batch_size=3,
        rows_per_step=3,
        cached=cached,
    )
