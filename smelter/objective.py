"""What a training step minimises: the student's loss, with teachers that run beside it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from smelter.checkpoint import load_checkpoint
from smelter.config import Config
from smelter.errors import ConfigError
from smelter.loss import Loss, LossConfig, TeacherHead, chunked_loss
from smelter.model import Model


def load_teachers(config: Config, dtype: torch.dtype, device: torch.device) -> list[Model]:
    """The models that `distillation.teachers` names, frozen; ConfigError for one of another vocabulary."""
    teachers = []
    for path in config.distillation.teachers:
        loaded = load_checkpoint(Path(path), with_state=False)
        if loaded.config.model.vocab_size != config.model.vocab_size:
            raise ConfigError(
                f"distillation.teachers: {path} has a vocabulary of {loaded.config.model.vocab_size}, the student "
                f"{config.model.vocab_size}: use a teacher trained on the same shards"
            )
        teacher = Model(loaded.config.model, dtype)
        teacher.load_state_dict(loaded.tensors)
        teacher.to(device).quantize_weights()
        teachers.append(teacher.requires_grad_(False).eval())
    return teachers


class Objective(nn.Module):
    """Student and loss as one module, so that DistributedDataParallel sees every gradient; teachers beside it."""

    def __init__(self, model: Model, config: Config, teachers: list[Model], use_compile: bool) -> None:
        super().__init__()
        self.model = model
        self.use_compile = use_compile
        self.chunk_size = config.training.loss_chunk_size
        # Kept out of the module tree: teachers are neither trained nor saved.
        self.teachers = (teachers, config.distillation.teacher_weights or (1.0,) * len(teachers))
        self.loss_config = LossConfig(
            soft_cap=config.model.final_logit_soft_cap,
            z_loss=config.training.z_loss,
            kl_weight=config.distillation.kl_weight if teachers else 0.0,
            temperature=config.distillation.temperature,
            direction=config.distillation.kl_direction,
        )

    def forward(
        self, inputs: Tensor, targets: Tensor, weights: Tensor | None, doc_ids: Tensor | None, normalizer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Total, CE, z and KL of one micro-batch [B, T], each divided by `normalizer`."""
        hidden = self.model(inputs, doc_ids)
        heads = []
        for teacher, weight in zip(*self.teachers, strict=True):
            with torch.no_grad():
                states = teacher(inputs, doc_ids).flatten(0, 1)
            heads.append(TeacherHead(states, teacher.head, teacher.config.final_logit_soft_cap, weight))
        loss: Loss = chunked_loss(
            hidden.flatten(0, 1),
            self.model.head,
            targets.flatten(),
            self.loss_config,
            weights=None if weights is None else weights.flatten(),
            normalizer=normalizer,
            teachers=heads,
            chunk_size=self.chunk_size,
            use_compile=self.use_compile,
        )
        return loss.total, loss.ce, loss.z, loss.kl
