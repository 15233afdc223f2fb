"""What a training step minimises: the student's loss, with teachers that run beside it or have spoken before."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from smelter.base import ConfigError, DataError
from smelter.config import Config, DistillationConfig
from smelter.data import Batch
from smelter.distillation.teacher import TeacherModel, load_teacher
from smelter.loss import Loss, LossConfig, chunked_loss
from smelter.losses import Teacher, TeacherHead, chunk_loss, target_log_probs
from smelter.model import Model
from smelter.run import Machine, distributed, print0
from smelter.tokens import ShardSet, Split, Tokenizer, spread_windows


def load_teachers(config: Config, tokenizer: Tokenizer, dtype: torch.dtype, device: torch.device) -> list[TeacherModel]:
    """The models that `distillation.teachers` names, frozen; ConfigError for one of another vocabulary."""
    teachers = []
    for path in config.distillation.teachers:
        teacher = load_teacher(
            Path(path),
            tokenizer,
            config.model.vocab_size,
            device=device,
            dtype=dtype,
            use_document_mask=config.data.use_document_mask,
        )
        if len(teacher.head) != config.model.vocab_size:
            raise ConfigError(
                f"distillation.teachers: {path} has a vocabulary of {len(teacher.head)}, the student "
                f"{config.model.vocab_size}: set model.vocab_size = {len(teacher.head)}, or store what the teacher "
                "says with `smelter teach` and set distillation.cached"
            )
        if teacher.max_seq_len < config.model.max_seq_len:
            raise ConfigError(
                f"distillation.teachers: {path} reads at most {teacher.max_seq_len} tokens, the student's rows have "
                f"{config.model.max_seq_len}: set model.max_seq_len = {teacher.max_seq_len}"
            )
        teachers.append(teacher)
    return teachers


def fixed_weights(config: DistillationConfig) -> tuple[float, ...]:
    """The teachers' weights as the recipe gives them: equal ones if it gives none."""
    return config.teacher_weights or (1.0,) * config.num_teachers


def weights_by_loss(weights: tuple[float, ...], losses: list[float], tau: float) -> tuple[float, ...]:
    """Weights times exp(-loss / tau), summing to 1; losses in nats per token."""
    best = min(loss for weight, loss in zip(weights, losses, strict=True) if weight)
    # A teacher of weight 0 may be better than the best, by more than an exponential can hold.
    factors = [math.exp(min(0.0, (best - loss) / tau)) for loss in losses]
    scaled = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
    return tuple(weight / sum(scaled) for weight in scaled)


def held_out_loss(teacher: TeacherModel, split: Split, config: Config, eos_id: int) -> float:
    """Nats per token of a teacher on the windows of `evaluate.validation_loss`. Raises DataError for an empty split."""
    seq_len, device = config.model.max_seq_len, teacher.head.device
    windows = spread_windows(split, seq_len, config.training.eval_tokens, eos_id)
    nats, num_tokens = 0.0, 0
    while rows := list(islice(windows, config.training.device_batch_size)):
        inputs, targets = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*rows, strict=True))
        loss = chunked_loss(
            teacher.hidden(inputs, None), teacher.head, targets.flatten(), LossConfig(teacher.soft_cap), normalizer=1.0
        )
        nats += float(loss.ce)
        num_tokens += int((targets >= 0).sum())
    if not num_tokens:
        raise DataError("the held-out split is empty: tokenize again with a larger --val-fraction")
    return nats / num_tokens


def validation_weights(
    teachers: Sequence[TeacherModel], config: Config, split: Split, tokenizer: Tokenizer
) -> tuple[float, ...]:
    """The teachers' weights after their losses on the held-out split, which are measured here and printed."""
    losses = []
    for path, teacher in zip(config.distillation.teachers, teachers, strict=True):
        nats = held_out_loss(teacher, split, config, tokenizer.eos_id)
        losses.append(distributed.agree(nats))
        if not math.isfinite(losses[-1]):
            raise ConfigError(f"distillation.teachers: {path} has a held-out loss of {nats}: leave it out")
    weights = weights_by_loss(fixed_weights(config.distillation), losses, config.distillation.validation_tau)
    for path, loss, weight in zip(config.distillation.teachers, losses, weights, strict=True):
        print0(f"teacher {path}: held-out loss {loss:.4f}, weight {weight:.3f}")
    return weights


class Objective(nn.Module):
    """Student and loss as one module, so that DistributedDataParallel sees every gradient; teachers beside it.

    `teacher_weights` are the recipe's unless given: of those that run here, then of the stored ones. `kl_weight` is the
    divergence's share, which a schedule may change between steps.
    """

    def __init__(
        self,
        model: Model,
        config: Config,
        teachers: Sequence[TeacherModel] = (),
        teacher_weights: tuple[float, ...] | None = None,
        *,
        use_compile: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.use_compile = use_compile
        self.soft_cap = config.model.final_logit_soft_cap
        self.chunk_size = config.training.loss_chunk_size
        # A list is no part of the module tree: teachers are neither trained nor saved.
        self.teachers = teachers
        self.teacher_weights = teacher_weights or fixed_weights(config.distillation)
        self.kl_weight = config.distillation.kl_weight
        self.chunk_weight = config.distillation.chunk_weight
        self.chunk_temperature = config.distillation.chunk_temperature
        self.loss_config = LossConfig(
            z_loss=config.training.z_loss,
            temperature=config.distillation.temperature,
            direction=config.distillation.kl_direction,
            skew_alpha=config.distillation.skew_alpha,
            js_beta=config.distillation.js_beta,
            use_confidence=config.distillation.teacher_weighting == "confidence",
        )

    @classmethod
    def of(cls, model: Model, config: Config, shards: ShardSet, machine: Machine) -> "Objective":
        """With the teachers that the recipe names. Raises UserError for one that does not fit."""
        teachers = load_teachers(config, shards.tokenizer, machine.dtype, machine.device)
        weights = None
        if config.distillation.teacher_weighting == "validation" and teachers:
            weights = validation_weights(teachers, config, shards.split("val"), shards.tokenizer)
        return cls(model, config, teachers, weights, use_compile=machine.use_compile)

    def forward(self, batch: Batch, normalizer: Tensor) -> Loss:
        """The loss of a micro-batch, divided by `normalizer`."""
        hidden = self.model(batch.inputs, batch.doc_ids, positions=batch.positions).flatten(0, 1)
        head, soft_cap = self.model.head, self.model.config.final_logit_soft_cap
        # A cap on its way out is another number each step, which would be compiled anew each step.
        use_compile = self.use_compile and soft_cap == self.soft_cap
        targets, ce_scale, chunks = batch.targets.flatten(), None, None
        if batch.chunks:
            # A first pass over the head: the student's likelihoods of the chunks, and what follows from them.
            log_probs = target_log_probs(hidden, head, targets, soft_cap, self.chunk_size, use_compile)
            log_probs = log_probs.view(batch.targets.shape)
            chunks = chunk_loss(log_probs, batch.targets, batch.weights, batch.chunks, self.chunk_temperature)
            ce_scale = 1 + self.chunk_weight * (chunks.factors - chunks.present).flatten()
        loss = chunked_loss(
            hidden,
            head,
            targets,
            replace(self.loss_config, kl_weight=self.kl_weight, soft_cap=soft_cap),
            weights=None if batch.weights is None else batch.weights.flatten(),
            ce_scale=ce_scale,
            normalizer=normalizer,
            teachers=self._weighted_teachers(batch),
            chunk_size=self.chunk_size,
            use_compile=use_compile,
        )
        if chunks is None:
            return loss
        total = loss.total + self.chunk_weight * chunks.correction / normalizer
        return loss._replace(total=total, chunk=chunks.total / normalizer)

    def _weighted_teachers(self, batch: Batch) -> list[Teacher]:
        """What the teachers here and the stored ones say about the batch, with their weights in the mixture."""
        teachers: list[Teacher] = [
            *(TeacherHead(t.hidden(batch.inputs, batch.doc_ids), t.head, t.soft_cap) for t in self.teachers),
            *batch.teachers,
        ]
        return [replace(t, weight=weight) for t, weight in zip(teachers, self.teacher_weights, strict=True)]
