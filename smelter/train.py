"""The training loop: shards -> a trained model, resumable to the bit.

One optimizer step reads its batches on each rank, divides the loss by the number of valid tokens of the whole step,
clips, updates, and makes the trits anew. Everything that determines the next step is a function of the configuration,
the step and the checkpoint, so a killed run that resumes shows the losses of one that was never killed.
"""

import signal
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro
from torch import nn

from smelter.base import ConfigError, UserError, cli, only_writer, short_duration, short_number
from smelter.config import Config, TrainingConfig, config_to_toml, load_config, preset
from smelter.data import Batch, BatchStream, prefetch
from smelter.distillation import ChunkTeacher, Objective, open_caches
from smelter.evaluation import samples, validation_loss
from smelter.loss import Loss
from smelter.model import Model
from smelter.muon import MuonAdamW
from smelter.run import (
    Machine,
    MetricsLogger,
    RunLength,
    StopSignal,
    TritWatch,
    distributed,
    final_cap,
    in_place,
    kl_weight,
    latest_checkpoint,
    load_checkpoint,
    load_initial_weights,
    pick_dtype,
    plan,
    prepare_run_dir,
    print0,
    progress_line,
    save_checkpoint,
    set_rates,
)
from smelter.tokens import ShardSet

MAX_SKIPPED = 10
MIN_TIMED_STEPS = 10


def open_shards(config: Config) -> ShardSet:
    """The run's shards. Raises DataError, and ConfigError where the model has fewer ids than they."""
    shards = ShardSet.open(Path(config.data.shards))
    if shards.tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the tokenizer of {config.data.shards} "
            f"({shards.tokenizer.vocab_size}): set vocab_size = {shards.tokenizer.vocab_size}"
        )
    return shards


def make_model(config: Config, machine: Machine) -> Model:
    """The model of step 0, with weights drawn from the recipe's seed."""
    torch.manual_seed(config.training.seed)
    model = Model(config.at_step(0).model, machine.dtype).to(machine.device)
    model.trit_dtype = torch.int8
    model.use_gradient_checkpointing = config.training.use_gradient_checkpointing
    model.use_int8_gradients(config.training.int8_gradients)
    return model


def make_optimizer(model: Model, training: TrainingConfig, dtype: torch.dtype) -> MuonAdamW:
    """The recipe's optimizer; Newton-Schulz runs in bf16 where training does, else in float32."""
    return MuonAdamW(
        model,
        use_muon=training.optimizer == "muon",
        muon_lr=training.muon_lr,
        muon_momentum=training.muon_momentum,
        muon_weight_decay=training.muon_weight_decay,
        adamw_lr=training.adamw_lr,
        embedding_lr=training.embedding_lr,
        betas=(training.adamw_beta1, training.adamw_beta2),
        adamw_weight_decay=training.adamw_weight_decay,
        num_newton_schulz_steps=training.muon_newton_schulz_steps,
        newton_schulz_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
    )


class Trainer:
    """One run: built from a configuration, `run` trains to the end and returns the exit code.

    Nobody else may write the run folder meanwhile, which `train` sees to.
    """

    def __init__(self, config: Config, machine: Machine) -> None:
        training = config.training
        self.config, self.training, self.machine = config, training, machine
        self.run_dir = Path(training.run_dir)
        config.micro_steps(self.machine.world_size)  # an error where the batch does not divide
        self.shards = open_shards(config)
        self.tokenizer = self.shards.tokenizer
        self.caches = open_caches(config, self.shards)
        self.chunk_teachers = [ChunkTeacher.open(Path(p), self.shards) for p in config.distillation.chunk_teachers]
        checkpoint = prepare_run_dir(self.run_dir, config, training.resume)
        self.model = make_model(config, self.machine)
        self.optimizer = make_optimizer(self.model, training, self.machine.dtype)
        self.scaler = torch.amp.GradScaler(self.machine.device.type, enabled=self.machine.dtype == torch.float16)
        self.length = RunLength.of(training)
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.elapsed = 0.0
        if checkpoint is not None:
            self._load(checkpoint)
        elif training.init_from:
            load_initial_weights(self.model, config, self.tokenizer)
        if config.at_step(self.step).model.use_ternary and not self.model.config.use_ternary:
            self.model.make_ternary()
        self._set_final_cap()
        self.model.quantize_weights()
        if self.machine.use_compile:
            for block in self.model.layers:
                block.compile()
        self.objective = Objective.of(self.model, config, self.shards, self.machine)
        self.averaging_objective = distributed.averaging(self.objective, self.machine.device)
        self.metrics = MetricsLogger(self.run_dir, config, training.trackers, None if checkpoint is None else self.step)
        self.trits = TritWatch(self.model)

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.step * self.training.total_batch_size

    def _load(self, path: Path) -> None:
        loaded = load_checkpoint(path, with_state=True)
        assert loaded.state is not None
        self.model.load_state_dict(loaded.tensors)
        self.optimizer.load_state_dict(loaded.state["optimizer"])
        self.scaler.load_state_dict(loaded.state["scaler"])
        self.step, self.skipped, self.elapsed = loaded.step, loaded.state["skipped"], loaded.state["elapsed_seconds"]
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
        self.metrics.sync()
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

    def _begin_step(self) -> dict[str, float]:
        """Make what a schedule decides that of the coming step; returns it by its metrics' names."""
        if self.config.at_step(self.step + 1).model.use_ternary and not self.model.config.use_ternary:
            # Weights and optimizer go on, compiled blocks are compiled once more.
            self.model.make_ternary()
            self.trits = TritWatch(self.model)
            print0(f"ternary from step {self.step + 1} on")
        groups, distillation = self.optimizer.param_groups, self.config.distillation
        set_rates(groups, self.step, self.length.num_steps, self.training)
        rates = {f"lr_{'adamw' if group['name'] == 'vectors' else group['name']}": group["lr"] for group in groups}
        self.objective.kl_weight = kl_weight(self.length.progress(self.step, self.elapsed), distillation)
        if distillation.kl_schedule != "constant":
            rates["kl_weight"] = self.objective.kl_weight
        if self.training.final_cap_anneal_fraction:
            rates["final_logit_soft_cap"] = self.model.config.final_logit_soft_cap
        return rates

    def _train_step(self, batches: list[Batch]) -> dict[str, float]:
        """One optimizer step; returns its losses, gradient norm and loss scale."""
        device, objective = self.machine.device, self.averaging_objective
        weight = torch.tensor(sum(batch.total_weight for batch in batches), dtype=torch.float64, device=device)
        normalizer = distributed.sum_over_ranks(weight).clamp_min(1e-8).float()
        sums = torch.zeros(len(Loss._fields), device=device)
        for number, batch in enumerate(batches, 1):
            with distributed.micro_step(objective, is_last=number == len(batches)):
                loss: Loss = objective(batch.to(device), normalizer)
                # The mean of the ranks' gradients is taken; the normalizer already counts all of them.
                self.scaler.scale(loss.total * self.machine.world_size).backward()
            sums += torch.stack(loss).detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.training.grad_clip or float("inf"))
        loss = Loss(*distributed.sum_over_ranks(sums).cpu())
        is_finite = bool(torch.isfinite(loss.total))
        if is_finite and torch.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            # A loss scale that is still too high overflows gradients, not the loss: it halves, and that is all.
            is_overflow = self.scaler.is_enabled() and is_finite and self.scaler.get_scale() > 1
            self.skipped_in_a_row += not is_overflow
        loss_scale = self.scaler.get_scale()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.quantize_weights()
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise UserError(
                f"loss or gradient not finite {MAX_SKIPPED} steps in a row, at step {self.step}: lower the "
                f"learning rates; last good checkpoint: {latest_checkpoint(self.run_dir) or 'none yet'}"
            )
        metrics = {"loss": loss.total, "ce_loss": loss.ce, "z_loss": loss.z, "grad_norm": norm}
        if self.config.distillation.num_teachers:
            metrics["kl_loss"] = loss.kl
        if self.chunk_teachers:
            metrics["chunk_loss"] = loss.chunk
        return {name: float(number) for name, number in metrics.items()} | {"loss_scale": loss_scale}

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
        written = samples(self.model, self.tokenizer, len(documents), lambda i: split.doc(documents[i]).tolist())
        self.metrics.samples(self.step, written)
        self.model.train()

    def _due(self, every: int) -> bool:
        return self.length.done(self.step) or bool(every and self.step % every == 0)

    def run(self) -> int:
        """Train to the end, or until a signal. Returns 0, or 128 + the signal's number."""
        training, machine = self.training, self.machine
        allocator = "freed memory is kept" if machine.keeps_freed_memory else "memory as the system manages it"
        print0(f"{machine.describe()} | {allocator} | {self.config.model.num_params_estimate:,} parameters")
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
        batches = prefetch(stream, self.step, machine.rank, machine.world_size)
        try:
            with StopSignal("finishing this step, then saving a checkpoint") as stop:
                return self._loop(batches, stop)
        finally:
            batches.close()
            self.metrics.close()

    def _loop(self, batches: Iterator[list[Batch]], stop: StopSignal) -> int:
        training, length = self.training, self.length
        logged_step, logged_at = self.step, self.elapsed
        recent: deque[float] = deque(maxlen=50)
        while not length.done(self.step):
            start = time.perf_counter()
            rates = self._begin_step()
            losses = self._train_step(next(batches))
            recent.append(time.perf_counter() - start)
            self.step += 1
            self.elapsed = distributed.agree(self.elapsed + recent[-1])
            # The median: steps that compile would make the rest look slow.
            step_seconds = distributed.agree(statistics.median(recent))
            if len(recent) >= MIN_TIMED_STEPS:
                length.update(self.step, self.elapsed, step_seconds)
            self._set_final_cap()
            stopping = distributed.any_rank(stop.number != 0)
            if self._due(training.log_every) or self._due(training.eval_every) or stopping:
                speed = (self.step - logged_step) * training.total_batch_size / (self.elapsed - logged_at)
                self._log(losses | rates, speed, length.eta(self.step, self.elapsed, step_seconds))
                logged_step, logged_at = self.step, self.elapsed
            if training.sample_every and self._due(training.sample_every) and distributed.is_main():
                self._sample()
            # A checkpoint from the middle of a divergence would pass for the last good one.
            in_time = self._due(training.checkpoint_every) and (not self.skipped_in_a_row or length.done(self.step))
            if in_time or stopping:
                path = self.save()
                if stopping:
                    print0(f"saved {path}; the same command goes on from here")
                    return 128 + (stop.number or signal.SIGTERM)
        print0(f"trained {short_number(self.tokens)} tokens in {short_duration(self.elapsed)} -> {self.run_dir}")
        return 0

    def _log(self, of_step: dict[str, float], tokens_per_second: float, eta_seconds: float) -> None:
        """Write a line of metrics, and show it."""
        training, machine = self.training, self.machine
        line: dict[str, float] = {"tokens": self.tokens, **of_step, "tok_per_sec": tokens_per_second}
        peak_flops = machine.peak_flops * machine.world_size
        line["mfu"] = self.config.model.flops_per_token() * tokens_per_second / peak_flops
        line["peak_memory_mib"] = machine.peak_memory_mib()
        line["elapsed_seconds"] = self.elapsed
        line["skipped_steps"] = self.skipped
        if training.ternary_start_step:
            line["is_ternary"] = self.model.config.use_ternary
        line |= self.trits.metrics()
        if self._due(training.eval_every) and distributed.is_main():
            line |= self._evaluate()
        self.metrics.log(self.step, line)
        line |= {"step": self.step, "eta_seconds": eta_seconds}
        if self.length.num_steps is not None:
            line["num_steps"] = self.length.num_steps
        print0(progress_line(line))


def train(config: Config) -> int:
    """Train a run to its end, or until a signal; 0, or 128 + the signal's number. Raises UserError."""
    machine = Machine.of(config.training)  # joins the other processes: who writes is known from here on
    folder = Path(config.training.run_dir)
    with only_writer(folder, "--run-dir") if distributed.is_main() else nullcontext():
        return Trainer(config, machine).run()


@dataclass(frozen=True)
class TrainOptions:
    """Train a model: smelter train [RECIPE.toml] [OPTIONS]. Defaults come from the recipe, or the preset.

    Under `torchrun --nproc-per-node N -m smelter train ...` the batch is shared among N processes.
    """

    recipe: tyro.conf.Positional[Path | None] = None
    """Recipe (TOML) whose values replace the defaults; it must come first. A run's own config.toml goes on in the
    folder where it lies."""
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
    config = in_place(load_config(recipe), recipe) if recipe else preset(name or "100m")
    default = replace(TrainOptions(), recipe=recipe, preset=name or "100m", config=config)
    return cli.parse(TrainOptions, argv, "smelter train", default)


def _dry_run(config: Config) -> int:
    """Print the resolved configuration and its cost; a GPU that is not here is planned for without a time."""
    training = config.training
    if training.device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        device, peak = torch.device("cuda"), None
        dtype = pick_dtype("bf16" if training.precision == "auto" else training.precision, device)
        where = f"for {training.device}, which is not here | computing in {str(dtype).removeprefix('torch.')}"
    else:
        machine = Machine.of(training)
        device, dtype, peak, where = machine.device, machine.dtype, machine.peak_flops, machine.describe()
    world_size = distributed.world_size()
    config.micro_steps(world_size)
    print0(config_to_toml(config))
    print0(where)
    # Newton-Schulz runs in float32 where there is no bf16.
    sizes = {"bytes_per_value": dtype.itemsize, "newton_schulz_bytes": 2 if dtype == torch.bfloat16 else 4}
    print0(plan(config, **sizes, device_type=device.type, world_size=world_size, peak_flops=peak).table())
    return 0


def main(argv: list[str]) -> int:
    """`smelter train`."""
    options = parse_options(argv)
    try:
        return _dry_run(options.config) if options.dry_run else train(options.config)
    finally:
        distributed.stop()
