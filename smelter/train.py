"""The training loop: shards -> a trained model, resumable to the bit.

One optimizer step reads `micro_steps` batches on each rank, divides the loss by the number of valid
tokens of the whole step, clips, updates, and makes the trits anew. Everything that determines the next
step is a function of the configuration, the step and the checkpoint, so a killed run that resumes shows
the losses of one that was never killed.
"""

import contextlib
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smelter.base import ConfigError, UserError, cli, short_duration, short_number
from smelter.bitnet import bit_linears
from smelter.config import Config, config_to_toml, load_config, preset
from smelter.data import Batch, BatchStream, prefetch
from smelter.distillation import ChunkTeacher, Objective, load_teachers, open_caches, validation_weights
from smelter.evaluation import samples, validation_loss
from smelter.model import Model
from smelter.muon import MuonAdamW
from smelter.run import (
    MetricsLogger,
    RunLength,
    StopSignal,
    distributed,
    final_cap,
    kl_weight,
    latest_checkpoint,
    load_checkpoint,
    load_initial_weights,
    plan,
    prepare_run_dir,
    print0,
    progress_line,
    save_checkpoint,
    set_rates,
)
from smelter.run import device as hardware
from smelter.tokens import ShardSet

MAX_SKIPPED = 10
MIN_TIMED_STEPS = 10


class Trainer:
    """One run: built from a configuration, `run` trains to the end and returns the exit code."""

    def __init__(self, config: Config) -> None:
        training = config.training
        self.config, self.training = config, training
        self.run_dir = Path(training.run_dir)
        self.device = hardware.pick_device(training.device)
        distributed.start(self.device)
        keeps_memory = self.device.type == "cpu" and hardware.keep_freed_memory()
        self.allocator = "freed memory is kept" if keeps_memory else "memory as the system manages it"
        self.dtype = hardware.pick_dtype(training.precision, self.device, is_training=True)
        self.use_compile = hardware.can_compile(training, self.device)
        self.micro_steps = config.micro_steps(distributed.world_size())
        self.shards = ShardSet.open(Path(config.data.shards))
        self.tokenizer = self.shards.tokenizer
        if self.tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size = {config.model.vocab_size} is smaller than the tokenizer of {config.data.shards} "
                f"({self.tokenizer.vocab_size}): set vocab_size = {self.tokenizer.vocab_size}"
            )
        self.caches = open_caches(config, self.shards)
        self.chunk_teachers = [ChunkTeacher.open(Path(p), self.shards) for p in config.distillation.chunk_teachers]
        found = prepare_run_dir(self.run_dir, config, training.resume)
        torch.manual_seed(training.seed)
        self.model = Model(config.at_step(0).model, self.dtype).to(self.device)
        self.model.trit_dtype = torch.int8
        self.model.use_gradient_checkpointing = training.use_gradient_checkpointing
        self.model.use_int8_gradients(training.int8_gradients)
        self.optimizer = MuonAdamW(
            self.model,
            use_muon=training.optimizer == "muon",
            muon_lr=training.muon_lr,
            muon_momentum=training.muon_momentum,
            muon_weight_decay=training.muon_weight_decay,
            adamw_lr=training.adamw_lr,
            embedding_lr=training.embedding_lr,
            betas=(training.adamw_beta1, training.adamw_beta2),
            adamw_weight_decay=training.adamw_weight_decay,
            num_newton_schulz_steps=training.muon_newton_schulz_steps,
            newton_schulz_dtype=torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.length = RunLength.of(training)
        self.step = self.tokens = self.skipped = self.skipped_in_a_row = 0
        self.elapsed = 0.0
        if found is not None:
            self._load(found)
        elif training.init_from:
            load_initial_weights(self.model, config, self.tokenizer)
        if config.at_step(self.step).model.use_ternary and not self.model.config.use_ternary:
            self.model.make_ternary()
        self._set_final_cap()
        self.model.quantize_weights()
        if self.use_compile:
            for block in self.model.layers:
                block.compile()
        teachers = load_teachers(config, self.tokenizer, self.dtype, self.device)
        weights = None
        if config.distillation.teacher_weighting == "validation" and teachers:
            weights = validation_weights(teachers, config, self.shards.split("val"), self.tokenizer)
        self.loss = Objective(self.model, config, teachers, self.use_compile, weights, self.caches)
        self.objective: nn.Module = self.loss
        if distributed.world_size() > 1:
            self.objective = DistributedDataParallel(
                self.objective, device_ids=[self.device.index] if self.device.type == "cuda" else None
            )
        self.metrics = MetricsLogger(self.run_dir, config, training.trackers, self.step if found is not None else None)
        self.peak_flops = hardware.measure_peak_flops(self.device, self.dtype)
        self._last_trits = {name: layer.trits.clone() for name, layer in bit_linears(self.model)}

    def _turn_ternary(self) -> None:
        """End the full-precision phase: weights and optimizer go on, compiled blocks are compiled once more."""
        self.model.make_ternary()
        self._last_trits = {name: layer.trits.clone() for name, layer in bit_linears(self.model)}
        print0(f"ternary from step {self.step + 1} on")

    def _load(self, path: Path) -> None:
        loaded = load_checkpoint(path, with_state=True)
        assert loaded.state is not None
        self.model.load_state_dict(loaded.tensors)
        self.optimizer.load_state_dict(loaded.state["optimizer"])
        self.scaler.load_state_dict(loaded.state["scaler"])
        self.step, self.tokens = loaded.step, loaded.state["tokens"]
        self.skipped, self.elapsed = loaded.state["skipped"], loaded.state["elapsed_seconds"]
        if self.training.train_minutes:
            self.length.num_steps = loaded.state["num_steps"]
        print0(f"resuming from {path}")

    def _set_final_cap(self) -> None:
        """Give the model the cap of the present step; a checkpoint says the one that its model has."""
        cap, fraction = self.config.model.final_logit_soft_cap, self.training.final_cap_anneal_fraction
        cap = final_cap(cap, self.step, self.length.num_steps, fraction)
        self.model.config = replace(self.model.config, final_logit_soft_cap=cap)

    def save(self) -> Path:
        """Write a checkpoint of the current step; returns its path."""
        path = self.run_dir / "checkpoints" / f"step_{self.step:07d}"
        if distributed.is_main():
            save_checkpoint(
                self.run_dir,
                self.step,
                config=replace(self.config.at_step(self.step), model=self.model.config),
                tensors=dict(self.model.state_dict()),
                tokenizer_file=Path(self.config.data.shards) / "tokenizer.json",
                state={
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "tokens": self.tokens,
                    "skipped": self.skipped,
                    "elapsed_seconds": self.elapsed,
                    "num_steps": self.length.num_steps,
                },
                keep=self.training.keep_checkpoints,
            )
        distributed.barrier()
        return path

    def _tensor(self, values: Any) -> Tensor | None:
        return None if values is None else torch.from_numpy(values).to(self.device, non_blocking=True)

    def _train_step(self, batches: list[Batch]) -> dict[str, float]:
        """One optimizer step; returns its losses and gradient norm."""
        valid = torch.tensor(0.0, dtype=torch.float64)
        for batch in batches:
            mask = batch.targets >= 0
            valid += float(mask.sum() if batch.weights is None else (mask * batch.weights).sum())
        normalizer = distributed.sum_over_ranks(valid.to(self.device)).clamp_min(1e-8).float()
        sums = torch.zeros(5, device=self.device)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            parallel = self.objective if isinstance(self.objective, DistributedDataParallel) else None
            with parallel.no_sync() if parallel and not is_last else contextlib.nullcontext():
                parts = self.objective(
                    self._tensor(batch.inputs),
                    self._tensor(batch.targets),
                    self._tensor(batch.weights),
                    self._tensor(batch.doc_ids) if self.config.data.use_document_mask else None,
                    normalizer,
                    tuple(tuple(map(self._tensor, (rows.ids, rows.probs, rows.entropy))) for rows in batch.teachers),
                    tuple(tuple(map(self._tensor, (c.starts, c.ends, c.log_probs))) for c in batch.chunks),
                )
                # DistributedDataParallel averages over ranks; the normalizer already counts all of them.
                self.scaler.scale(parts[0] * distributed.world_size()).backward()
            sums += torch.stack([part.detach() for part in parts])
        self.scaler.unscale_(self.optimizer)
        max_norm = self.training.grad_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        loss, ce, z, kl, chunk = distributed.sum_over_ranks(sums).tolist()
        values = {"loss": loss, "ce_loss": ce, "z_loss": z, "grad_norm": float(norm)}
        if self.config.distillation.num_teachers:
            values["kl_loss"] = kl
        if self.chunk_teachers:
            values["chunk_loss"] = chunk
        if torch.isfinite(norm) and abs(loss) < float("inf"):
            self.scaler.step(self.optimizer)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            # A loss scale that is still too high overflows gradients, not the loss: it halves, and that is all.
            is_overflow = self.scaler.is_enabled() and abs(loss) < float("inf") and self.scaler.get_scale() > 1
            self.skipped_in_a_row += not is_overflow
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.quantize_weights()
        return values

    def _weights_metrics(self) -> dict[str, float]:
        """Share of trits that flipped since the last line, and of zeros per layer kind."""
        flips, count = 0, 0
        zeros: dict[str, list[float]] = {}
        for name, layer in bit_linears(self.model):
            flips += int((layer.trits != self._last_trits[name]).sum())
            count += layer.trits.numel()
            self._last_trits[name].copy_(layer.trits)
            zeros.setdefault(name.rsplit(".", 1)[-1], []).append(float((layer.trits == 0).float().mean()))
        values = {f"sparsity/{kind}": sum(shares) / len(shares) for kind, shares in zeros.items()}
        return {"trit_flips": flips / count, **values} if count else {}

    def _evaluate(self) -> dict[str, float]:
        self.model.eval()
        val_loss, val_bpb = validation_loss(
            self.model,
            self.shards.split("val"),
            self.training.eval_tokens,
            tokenizer=self.tokenizer,
            batch_size=self.training.device_batch_size,
        )
        self.model.train()
        return {"val_loss": val_loss, "val_bpb": val_bpb}

    def _sample(self) -> None:
        split = self.shards.split("val")
        self.model.eval()
        documents = [i for i in range(split.num_docs) if not split.is_chat(i)]
        made = samples(self.model, self.tokenizer, len(documents), lambda i: split.doc(documents[i]).tolist())
        self.metrics.samples(self.step, made)
        self.model.train()

    def _due(self, every: int) -> bool:
        return self.length.done(self.step) or bool(every and self.step % every == 0)

    def run(self) -> int:
        """Train to the end, or until a signal. Returns 0, or 128 + the signal's number."""
        training = self.training
        peak = hardware.describe(self.device, self.dtype, self.use_compile, self.peak_flops)
        print0(f"{peak} | {self.allocator} | {self.config.model.num_params_estimate:,} parameters")
        stream = BatchStream(
            self.shards.split("train"),
            self.tokenizer,
            self.config.data,
            seq_len=self.config.model.max_seq_len,
            seed=self.caches[0].arrangement.seed if self.caches else training.seed,
            device_batch_size=training.device_batch_size,
            rows_per_step=training.total_batch_size // self.config.model.max_seq_len,
            cached=self.caches,
            chunk_teachers=self.chunk_teachers,
        )
        batches = prefetch(stream, self.step, distributed.rank(), distributed.world_size())
        try:
            with StopSignal("finishing this step, then saving a checkpoint") as stop:
                return self._loop(batches, stop)
        finally:
            batches.close()
            self.metrics.close()

    def _loop(self, batches: Iterator[list[Batch]], stop: StopSignal) -> int:
        training, length = self.training, self.length
        flops_per_step = self.config.model.flops_per_token() * training.total_batch_size
        log_step, log_elapsed = self.step, self.elapsed
        recent: deque[float] = deque(maxlen=50)
        previous = time.perf_counter()
        while not length.done(self.step):
            if self.config.at_step(self.step + 1).model.use_ternary and not self.model.config.use_ternary:
                self._turn_ternary()
            set_rates(self.optimizer.param_groups, self.step, length.num_steps, training)
            rates = {f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups}
            rates["lr_adamw"] = rates.pop("lr_vectors")
            self.loss.kl_weight = kl_weight(length.progress(self.step, self.elapsed), self.config.distillation)
            if self.config.distillation.kl_schedule != "constant":
                rates["kl_weight"] = self.loss.kl_weight
            values = self._train_step(next(batches))
            if self.skipped_in_a_row == MAX_SKIPPED:
                raise UserError(
                    f"loss or gradient not finite {MAX_SKIPPED} steps in a row, at step {self.step}: lower the "
                    f"learning rates; last good checkpoint: {latest_checkpoint(self.run_dir) or 'none yet'}"
                )
            now = time.perf_counter()
            seconds, previous = now - previous, now
            # The median: steps that compile would make the rest look slow.
            recent.append(seconds)
            step_seconds = statistics.median(recent)
            self.elapsed += seconds
            self.step += 1
            self.tokens += training.total_batch_size
            self.elapsed, step_seconds = distributed.agree(self.elapsed), distributed.agree(step_seconds)
            if len(recent) >= MIN_TIMED_STEPS:
                length.update(self.step, self.elapsed, step_seconds)
            self._set_final_cap()
            stopping = distributed.any_rank(stop.number != 0)
            if self._due(training.log_every) or self._due(training.eval_every) or stopping:
                span = self.elapsed - log_elapsed
                steps = self.step - log_step
                line: dict[str, float] = {"tokens": self.tokens, **values, **rates}
                if steps:
                    line["tok_per_sec"] = steps * training.total_batch_size / span
                    line["mfu"] = flops_per_step * steps / span / (self.peak_flops * distributed.world_size())
                line["loss_scale"] = self.scaler.get_scale()
                line["peak_memory_mib"] = hardware.peak_memory_mib(self.device)
                line["elapsed_seconds"] = self.elapsed
                line["skipped_steps"] = self.skipped
                if training.ternary_start_step:
                    line["is_ternary"] = self.model.config.use_ternary
                if training.final_cap_anneal_fraction:
                    line["final_logit_soft_cap"] = self.model.config.final_logit_soft_cap
                line |= self._weights_metrics()
                if self._due(training.eval_every) and distributed.is_main():
                    line |= self._evaluate()
                self.metrics.log(self.step, line)
                shown = {**line, "step": self.step, "eta_seconds": length.eta(self.step, self.elapsed, step_seconds)}
                if length.num_steps is not None:
                    shown["num_steps"] = length.num_steps
                print0(progress_line(shown))
                log_step, log_elapsed = self.step, self.elapsed
            if training.sample_every and self._due(training.sample_every) and distributed.is_main():
                self._sample()
            # A checkpoint from the middle of a divergence would pass for the last good one.
            in_time = self._due(training.checkpoint_every) and (not self.skipped_in_a_row or length.done(self.step))
            if in_time or stopping:
                path = self.save()
                if stopping:
                    print0(f"saved {path}; the same command goes on from here")
                    return 128 + (stop.number or signal.SIGTERM)
            previous = time.perf_counter()
        print0(f"trained {short_number(self.tokens)} tokens in {short_duration(self.elapsed)} -> {self.run_dir}")
        return 0


def train(config: Config) -> int:
    """Train as `config` says; returns the exit code. Raises UserError for what cannot be used."""
    try:
        return Trainer(config).run()
    finally:
        distributed.stop()


@dataclass(frozen=True)
class TrainOptions:
    """Train a model: smelter train [RECIPE.toml] [OPTIONS]. Defaults come from the recipe, or the preset.

    Under `torchrun --nproc-per-node N -m smelter train ...` the batch is shared among N processes.
    """

    recipe: tyro.conf.Positional[Path | None] = None
    """Recipe (TOML) whose values replace the defaults; it must come first."""
    preset: str = "100m"
    """Without a recipe: tiny, 50m, 100m, 125m or 300m."""
    dry_run: bool = False
    """Print the resolved configuration and what the run would cost; train nothing."""
    config: Config = field(default_factory=Config)


def parse_options(argv: list[str]) -> TrainOptions:
    """Preset or recipe first, then the command line over it."""
    recipe = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    name = next((argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--preset"), None)
    name = name or next((word.split("=", 1)[1] for word in argv if word.startswith("--preset=")), None)
    if recipe and name:
        raise ConfigError(f'give a recipe or --preset, not both (a recipe may say preset = "{name}" itself)')
    config = load_config(recipe) if recipe else preset(name or "100m")
    default = replace(TrainOptions(), recipe=recipe, preset=name or "100m", config=config)
    return cli.parse(TrainOptions, argv, "smelter train", default)


def _dry_run(config: Config) -> int:
    """Print the resolved configuration and its cost; a GPU that is not here is planned for without a time."""
    training = config.training
    config.micro_steps(distributed.world_size())
    print(config_to_toml(config))
    is_elsewhere = training.device.partition(":")[0] == "cuda" and not torch.cuda.is_available()
    if is_elsewhere:
        kind, peak = "cuda", None
        dtype = hardware.pick_dtype("bf16" if training.precision == "auto" else training.precision, torch.device(kind))
        print(f"for {training.device}, which is not here | computing in {str(dtype).removeprefix('torch.')}")
    else:
        device = hardware.pick_device(training.device)
        kind = device.type
        dtype = hardware.pick_dtype(training.precision, device, is_training=True)
        peak = hardware.measure_peak_flops(device, dtype)
        print(hardware.describe(device, dtype, training.use_torch_compile, peak))
    # Newton-Schulz runs in float32 where there is no bf16.
    sizes = {"bytes_per_value": dtype.itemsize, "newton_schulz_bytes": 2 if dtype == torch.bfloat16 else 4}
    print(plan(config, **sizes, device_type=kind, world_size=distributed.world_size(), peak_flops=peak).table())
    return 0


def main(argv: list[str]) -> int:
    """`smelter train`."""
    options = parse_options(argv)
    if options.dry_run:
        return _dry_run(options.config)
    code = train(options.config)
    sys.stdout.flush()
    return code
