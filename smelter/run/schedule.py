"""How long a run is, and what the learning rates, momentum and weight decay are at each step.

A run lasts `num_steps`, or `train_minutes`. In the second case the number of steps is estimated for the first time
when the cool-down must begin, since warm-up-stable-decay needs to know no sooner, and corrected from there on, so
that a machine that turns slower meanwhile still ends in time.
"""

import math
from dataclasses import dataclass
from typing import Any

from smelter.config import DistillationConfig, Schedule, TrainingConfig


def lr_factor(schedule: Schedule, step: int, num_steps: int | None, config: TrainingConfig) -> float:
    """Share of the peak learning rate at `step` (from 0); num_steps None: the end is not known yet."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.ternary_warmup_steps and step >= config.ternary_start_step > 0:
        warmup = min(warmup, (step - config.ternary_start_step + 1) / config.ternary_warmup_steps)
    if schedule == "constant" or num_steps is None:
        return warmup
    floor = config.min_lr_ratio
    if schedule == "wsd":
        length = max(1.0, config.cooldown_fraction * num_steps)
        left = min(1.0, (num_steps - step) / length)
        return warmup * (floor + (1 - floor) * left)
    if step < config.warmup_steps:
        return warmup
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return warmup * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def muon_momentum(step: int, config: TrainingConfig) -> float:
    """Muon's momentum: rises linearly from 0.85, or from its own value where that is lower."""
    start = min(0.85, config.muon_momentum)
    rise = min(1.0, step / config.muon_momentum_warmup) if config.muon_momentum_warmup else 1.0
    return start + (config.muon_momentum - start) * rise


def final_cap(cap: float, step: int, num_steps: int | None, fraction: float) -> float:
    """The output logits' soft-cap at `step` (from 0); 0 means none.

    Its inverse falls linearly over the last `fraction` of the steps and is 0 at the last one.
    """
    if not cap or not fraction or num_steps is None:
        return cap
    left = (num_steps - 1 - step) / (fraction * num_steps)
    return 0.0 if left <= 0 else cap / min(1.0, left)


def set_rates(groups: list[dict[str, Any]], step: int, num_steps: int | None, config: TrainingConfig) -> None:
    """Write learning rate, momentum and decay for `step` into the optimizer's groups (by their names)."""
    peaks = {
        "muon": config.muon_lr,
        "matrices": config.adamw_lr,
        "embedding": config.embedding_lr,
        "vectors": config.adamw_lr,
    }
    for group in groups:
        is_muon = group["name"] == "muon"
        schedule = config.muon_schedule if is_muon else config.adamw_schedule
        group["lr"] = peaks[group["name"]] * lr_factor(schedule, step, num_steps, config)
        if is_muon:
            group["momentum"] = muon_momentum(step, config)
            group["weight_decay"] = config.muon_weight_decay * (1 - step / num_steps if num_steps else 1.0)


def kl_weight(progress: float, config: DistillationConfig) -> float:
    """The divergence's share in the loss when `progress` (0 to 1) of the run is over."""
    if config.kl_schedule == "constant":
        return config.kl_weight
    return config.kl_weight + (config.kl_weight_end - config.kl_weight) * progress


@dataclass
class RunLength:
    """The number of steps: given, or what the clock allows, known from the cool-down on."""

    config: TrainingConfig
    num_steps: int | None

    @classmethod
    def of(cls, config: TrainingConfig) -> "RunLength":
        """Known from the start unless the run is limited by time."""
        return cls(config, None if config.train_minutes else config.num_steps)

    def update(self, step: int, elapsed: float, seconds_per_step: float) -> None:
        """After `step` steps and `elapsed` seconds of a run limited by time: where it will end, once that matters."""
        if not self.config.train_minutes or step == 0:
            return
        left = max(0.0, self.config.train_minutes * 60 - elapsed)
        total = step + int(left / seconds_per_step)
        ending = max(self.config.cooldown_fraction, self.config.final_cap_anneal_fraction)
        if self.num_steps is not None or step >= (1 - ending) * total:
            self.num_steps = total

    def done(self, step: int) -> bool:
        """Whether `step` steps complete the run."""
        return self.num_steps is not None and step >= self.num_steps

    def progress(self, step: int, elapsed: float) -> float:
        """Share of the run that is over, 0 to 1: by steps, or by the clock where that limits the run."""
        if self.config.train_minutes:
            return min(1.0, elapsed / (self.config.train_minutes * 60))
        return min(1.0, step / self.config.num_steps)

    def eta(self, step: int, elapsed: float, seconds_per_step: float) -> float:
        """Seconds left."""
        if self.num_steps is None:
            return max(0.0, self.config.train_minutes * 60 - elapsed)
        return (self.num_steps - step) * seconds_per_step
