"""How a run goes: the tables [distillation] and [training] of a recipe."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from smelter.base import require

Schedule = Literal["constant", "wsd", "cosine"]


def require_finite(table: str, config: Any) -> None:
    """ConfigError that names the first value of a table which is infinite or not a number."""
    for item in fields(config):
        value = getattr(config, item.name)
        finite = not isinstance(value, float) or math.isfinite(value)
        require(finite, f"{table}.{item.name} = {value}: must be a finite number")


@dataclass(frozen=True)
class DistillationConfig:
    """Learning from teachers' probabilities; off while `teachers` and `cached` are empty."""

    teachers: tuple[str, ...] = ()
    """Teachers that run beside the student: run folders, checkpoints or Hugging Face folders, same tokenizer."""
    cached: tuple[str, ...] = ()
    """Folders that `smelter teach` wrote: teachers' probabilities from the disk. They decide the order of the data."""
    teacher_weights: tuple[float, ...] = ()
    """Weight of each in the mixture of probabilities, teachers first, then cached; empty means equal weights."""
    teacher_weighting: Literal["fixed", "validation", "confidence"] = "fixed"
    """fixed: teacher_weights. validation: times exp(-held-out loss / validation_tau). confidence: see docs."""
    validation_tau: float = 0.1
    """Nats per token by which a teacher must be worse on held-out code for its weight to fall by the factor e."""
    chunk_teachers: tuple[str, ...] = ()
    """Folders that `smelter teach --method chunks` wrote: teachers with other tokenizers, each of equal weight."""
    chunk_weight: float = 0.5
    """Share of the divergence to chunk_teachers in the loss, where they have a chunk."""
    chunk_temperature: float = 100.0
    """Chunks' likelihoods are compared to the power 1 / this (arXiv 2503.20083)."""
    kl_weight: float = 0.9
    """Share of the KL term in the loss; cross-entropy has the rest."""
    kl_schedule: Literal["constant", "linear"] = "constant"
    """linear: the share goes from kl_weight to kl_weight_end over the run."""
    kl_weight_end: float = 0.0
    """Share of the KL term at the end of a linear schedule."""
    kl_direction: Literal["forward", "reverse", "skew", "js"] = "forward"
    """forward: KL(teacher || student). reverse: KL(student || teacher). skew, js: to a blend of the two."""
    skew_alpha: float = 0.1
    """skew: the teacher's share in the blend; 0 is forward."""
    js_beta: float = 0.5
    """js: the teacher's share in the blend, and the weight of its side; near 0 like forward, near 1 like reverse."""
    temperature: float = 1.0
    """Softens both distributions; the term is multiplied by its square."""

    def __post_init__(self) -> None:
        require_finite("distillation", self)
        for name in ("kl_weight", "kl_weight_end"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"distillation.{name} = {value}: must lie between 0 and 1")
        for name in ("temperature", "validation_tau"):
            value = getattr(self, name)
            require(value > 0, f"distillation.{name} = {value}: must be positive")
        require(0 <= self.skew_alpha < 1, f"distillation.skew_alpha = {self.skew_alpha}: must lie in [0, 1)")
        require(0 < self.js_beta < 1, f"distillation.js_beta = {self.js_beta}: must lie between 0 and 1, both excluded")
        require(
            self.teacher_weighting != "validation" or not self.cached,
            'distillation.teacher_weighting = "validation" measures teachers that run here, which those of '
            'distillation.cached do not: give teacher_weights, and leave it "fixed"',
        )
        require(0 <= self.chunk_weight <= 1, f"distillation.chunk_weight = {self.chunk_weight}: must lie in [0, 1]")
        require(
            self.chunk_temperature > 0, f"distillation.chunk_temperature = {self.chunk_temperature}: must be positive"
        )
        if self.chunk_teachers and self.num_teachers:
            most = max(self.kl_weight, self.kl_weight_end if self.kl_schedule == "linear" else 0.0)
            require(
                most + self.chunk_weight <= 1,
                f"distillation.chunk_weight = {self.chunk_weight} and kl_weight up to {most}: together at most 1",
            )
        if self.teacher_weights:
            count = f"{len(self.teachers)} teachers" + (f" and {len(self.cached)} cached" if self.cached else "")
            require(
                len(self.teacher_weights) == self.num_teachers,
                f"distillation.teacher_weights has {len(self.teacher_weights)} entries for "
                f"{count}: give one weight per teacher or none",
            )
            require(
                min(self.teacher_weights) >= 0 and sum(self.teacher_weights) > 0,
                "distillation.teacher_weights: none may be negative and one must be positive",
            )

    @property
    def num_teachers(self) -> int:
        """Teachers of both kinds."""
        return len(self.teachers) + len(self.cached)


@dataclass(frozen=True)
class TrainingConfig:
    """The loop: batch, length, optimizer, precision, and what is written down when."""

    run_dir: str = "runs/default"
    """Run folder: configuration, metrics, checkpoints, report."""
    seed: int = 0
    """Seed of the initial weights and, without distillation.cached, of the order of the data."""
    init_from: str = ""
    """Start from the weights of this run folder or checkpoint, with a new optimizer; a resumed run has its own."""
    ternary_start_step: int = 0
    """Full precision up to this step, ternary from there on; 0: ternary from the start (model.use_ternary)."""
    ternary_warmup_steps: int = 0
    """Linear warm-up of every learning rate after ternary_start_step; 0: the schedules go on as they are."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Matrix products' precision. auto: bf16 where the hardware multiplies it, else fp16 on CUDA, fp32 on CPU."""
    num_steps: int = 20_000
    """Optimizer steps."""
    train_minutes: float = 0.0
    """If positive, train for this long instead: num_steps is set when the cool-down must begin. Not with cosine."""
    device_batch_size: int = 8
    """Sequences per forward pass on one device."""
    total_batch_size: int = 262_144
    """Tokens per optimizer step over all devices; a multiple of sequence length x device_batch_size x devices."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the body's matrices, AdamW for the rest. adamw: AdamW for all."""
    muon_lr: float = 0.02
    """Muon's learning rate."""
    muon_momentum: float = 0.95
    """Muon's (Nesterov) momentum, reached after muon_momentum_warmup steps from 0.85."""
    muon_momentum_warmup: int = 300
    """Steps over which Muon's momentum rises to its value."""
    muon_newton_schulz_steps: int = 5
    """Newton-Schulz steps of Muon's orthogonalisation; fewer are cheaper where batches are small."""
    muon_weight_decay: float = 0.0
    """Muon's decoupled weight decay, falling linearly to 0 over the run."""
    muon_schedule: Schedule = "constant"
    """Muon's learning-rate schedule."""
    adamw_lr: float = 3e-3
    """AdamW's learning rate for norms, and for matrices with optimizer = "adamw"."""
    embedding_lr: float = 6e-3
    """AdamW's learning rate for the embedding and the output head."""
    adamw_beta1: float = 0.9
    """AdamW's first-moment decay."""
    adamw_beta2: float = 0.95
    """AdamW's second-moment decay."""
    adamw_weight_decay: float = 0.0
    """AdamW's decoupled weight decay on matrices (never on norms)."""
    adamw_schedule: Schedule = "wsd"
    """AdamW's learning-rate schedule: constant, warm-up-stable-decay, or cosine."""
    warmup_steps: int = 100
    """Linear warm-up of every scheduled learning rate."""
    cooldown_fraction: float = 0.25
    """wsd: share of the steps over which the rate falls linearly to min_lr_ratio."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end, as a share of its peak."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    z_loss: float = 1e-4
    """Weight of the squared log-partition term that keeps logits small."""
    final_cap_anneal_fraction: float = 0.0
    """Share of the steps, at the end, over which 1 / model.final_logit_soft_cap falls linearly to 0: the model then
    ends without that cap, as exports need it. 0 keeps the cap."""
    loss_chunk_size: int = 1_024
    """Tokens whose logits exist at once in the loss."""
    use_torch_compile: bool = True
    """Compile each block with torch.compile (needs a C++ compiler on CPU, Triton on CUDA)."""
    use_gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    int8_gradients: bool = False
    """Round what the backward pass multiplies with ternary weights to int8, per token (SwitchBack, arXiv 2304.13013).
    Faster where int8 products are; the weights' own gradients stay as they are."""
    log_every: int = 10
    """Steps between progress lines and metrics."""
    eval_every: int = 250
    """Steps between evaluations on held-out data; 0 for the end only."""
    eval_tokens: int = 131_072
    """Held-out tokens per evaluation."""
    sample_every: int = 1_000
    """Steps between written samples; 0 for none."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints; 0 for the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on from the run folder's last checkpoint if there is one. must: fail without. never: start anew."""
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Also send metrics to these; metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        require_finite("training", self)
        for name in (
            *("num_steps", "device_batch_size", "total_batch_size", "muon_lr", "adamw_lr", "embedding_lr"),
            *("loss_chunk_size", "log_every", "eval_tokens", "muon_newton_schulz_steps"),
        ):
            value = getattr(self, name)
            require(value > 0, f"training.{name} = {value}: must be positive")
        for name in (
            *("muon_weight_decay", "adamw_weight_decay", "warmup_steps", "grad_clip", "z_loss", "train_minutes"),
            *("eval_every", "sample_every", "checkpoint_every", "keep_checkpoints", "muon_momentum_warmup"),
            *("ternary_start_step", "ternary_warmup_steps"),
        ):
            value = getattr(self, name)
            require(value >= 0, f"training.{name} = {value}: must not be negative")
        for name in ("muon_momentum", "adamw_beta1", "adamw_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"training.{name} = {value}: must lie in [0, 1)")
        for name in ("cooldown_fraction", "min_lr_ratio", "final_cap_anneal_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"training.{name} = {value}: must lie between 0 and 1")
        require(0 <= self.seed < 2**63, f"training.seed = {self.seed}: must lie in [0, 2**63)")
        require(
            self.ternary_start_step < self.num_steps or bool(self.train_minutes),
            f"training.ternary_start_step = {self.ternary_start_step}: the run ends at num_steps = {self.num_steps} "
            "and would never be ternary: start earlier, or train a full-precision model with model.use_ternary = false",
        )
        if self.train_minutes:
            schedules = {self.adamw_schedule} | ({self.muon_schedule} if self.optimizer == "muon" else set())
            require(
                "cosine" not in schedules,
                "training.train_minutes needs a schedule that does not depend on the number of steps from the "
                'start: use "wsd" or "constant" instead of "cosine", or set num_steps',
            )
