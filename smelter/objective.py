"""What a training step minimises: the student's loss, with teachers that run beside it."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from smelter import distributed
from smelter.checkpoint import load_checkpoint
from smelter.config import Config, DistillationConfig
from smelter.distributed import print0
from smelter.errors import ConfigError
from smelter.evaluate import validation_loss
from smelter.loss import Loss, LossConfig, TeacherHead, chunked_loss
from smelter.model import Model
from smelter.shards import Split
from smelter.tokenizer import Tokenizer


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


def fixed_weights(config: DistillationConfig) -> tuple[float, ...]:
    """The teachers' weights as the recipe gives them: equal ones if it gives none."""
    return config.teacher_weights or (1.0,) * len(config.teachers)


def weights_by_loss(weights: tuple[float, ...], losses: list[float], tau: float) -> tuple[float, ...]:
    """Weights times exp(-loss / tau), summing to 1; losses in nats per token."""
    best = min(loss for weight, loss in zip(weights, losses, strict=True) if weight)
    # A teacher of weight 0 may be better than the best, by more than an exponential can hold.
    factors = [math.exp(min(0.0, (best - loss) / tau)) for loss in losses]
    scaled = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
    return tuple(value / sum(scaled) for value in scaled)


def validation_weights(teachers: list[Model], config: Config, split: Split, tokenizer: Tokenizer) -> tuple[float, ...]:
    """The teachers' weights after their losses on the held-out split, which are measured here and printed."""
    losses = []
    for path, teacher in zip(config.distillation.teachers, teachers, strict=True):
        nats, _ = validation_loss(
            teacher,
            split,
            config.training.eval_tokens,
            tokenizer=tokenizer,
            batch_size=config.training.device_batch_size,
        )
        losses.append(distributed.agree(nats))
        if not math.isfinite(losses[-1]):
            raise ConfigError(f"distillation.teachers: {path} has a held-out loss of {nats}: leave it out")
    weights = weights_by_loss(fixed_weights(config.distillation), losses, config.distillation.validation_tau)
    for path, loss, weight in zip(config.distillation.teachers, losses, weights, strict=True):
        print0(f"teacher {path}: held-out loss {loss:.4f}, weight {weight:.3f}")
    return weights


class Objective(nn.Module):
    """Student and loss as one module, so that DistributedDataParallel sees every gradient; teachers beside it.

    `teacher_weights` are the recipe's unless given. `kl_weight` is the divergence's share, which a schedule may change
    between steps.
    """

    def __init__(
        self,
        model: Model,
        config: Config,
        teachers: list[Model],
        use_compile: bool,
        teacher_weights: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.use_compile = use_compile
        self.chunk_size = config.training.loss_chunk_size
        # Kept out of the module tree: teachers are neither trained nor saved.
        self.teachers = (teachers, teacher_weights or fixed_weights(config.distillation))
        self.kl_weight = config.distillation.kl_weight
        self.loss_config = LossConfig(
            soft_cap=config.model.final_logit_soft_cap,
            z_loss=config.training.z_loss,
            temperature=config.distillation.temperature,
            direction=config.distillation.kl_direction,
            skew_alpha=config.distillation.skew_alpha,
            js_beta=config.distillation.js_beta,
            use_confidence=config.distillation.teacher_weighting == "confidence",
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
            replace(self.loss_config, kl_weight=self.kl_weight),
            weights=None if weights is None else weights.flatten(),
            normalizer=normalizer,
            teachers=heads,
            chunk_size=self.chunk_size,
            use_compile=self.use_compile,
        )
        return loss.total, loss.ce, loss.z, loss.kl
