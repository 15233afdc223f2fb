"""What the tests of teachers with another tokenizer need: the tokenizer, the teacher, and what it stored."""

import argparse
import inspect
from functools import cache
from pathlib import Path
from typing import Any

from smelter.distillation.chunk_cache import ChunkTeacher
from smelter.distillation.teach_chunks import TeachChunksOptions, teach_chunks
from smelter.model import Model
from smelter.tokens.shards import ShardSet
from smelter.tokens.tokenizer import Tokenizer
from tests import tiny
from tests.distillation.teaching import make_shards as make_shards

OTHER_CODE = inspect.getsource(argparse)


@cache
def other_tokenizer(vocab_size: int = 700) -> Tokenizer:
    """Trained on another module than tiny.tokenizer: other merges, more ids."""
    return Tokenizer.train([OTHER_CODE], vocab_size)


def other_teacher(folder: Path, made: Model | None = None) -> Path:
    """A run folder with a model of another vocabulary."""
    return tiny.checkpoint(folder, made or tiny.model(vocab_size=700, max_seq_len=64), other_tokenizer())


def make_chunks(teacher: Path, shards: Path, out: Path, **options: Any) -> ChunkTeacher:
    """`smelter teach --method chunks` in this process."""
    assert teach_chunks(TeachChunksOptions(teacher=teacher, shards=shards, out=out, device="cpu", **options)) == 0
    return ChunkTeacher.open(out, ShardSet.open(shards), verify=True)
