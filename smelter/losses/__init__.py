"""The parts of the loss, each with its gradient."""

from smelter.losses.chunks import ChunkBatch, chunk_loss, target_log_probs
from smelter.losses.cross_entropy import compiled, cross_entropy_and_grad, soft_cross_entropy_and_grad
from smelter.losses.divergence import Direction, Divergence, divergence, divergence_and_grad
from smelter.losses.targets import (
    Mixture,
    SparseTeacher,
    Teacher,
    TeacherHead,
    checked_teachers,
    mixture,
    needs_no_rows,
    sparse_target,
)
