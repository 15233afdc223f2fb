"""From a teacher to the student's loss, beside the training or through the disk."""

from smelter.distillation.cache import open_caches
from smelter.distillation.chunk_cache import ChunkTeacher
from smelter.distillation.objective import Objective
