"""From a teacher to the student's loss, beside the training or through the disk."""

from smelter.distillation.cache import open_caches
from smelter.distillation.chunk_cache import ChunkTeacher
from smelter.distillation.objective import Objective, load_teachers, validation_weights

__all__ = [
    "ChunkTeacher",
    "Objective",
    "load_teachers",
    "open_caches",
    "validation_weights",
]
