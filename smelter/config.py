"""The whole configuration, frozen: four dataclasses, their ranges beside the fields, and named presets.

Order of precedence: preset < recipe TOML < command line. An unknown key is an error that names the
nearest known one; the resolved whole is saved in the run folder. Figures that follow from others
(parameter count, KV-cache size, FLOPs) are properties, so nothing can drift apart.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, Le

from smelter.base import ConfigError, check_ranges, from_table, nearest, read_toml, require

ActivationQuant = Literal["token", "block256", "none"]
Schedule = Literal["constant", "wsd", "cosine"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of the transformer (Qwen3's architecture plus logit soft-caps)."""

    vocab_size: Annotated[int, Ge(1)] = 32_000
    """Rows of the embedding; at least the tokenizer's size, specials included."""
    hidden_size: Annotated[int, Ge(1)] = 768
    """Width of the residual stream."""
    num_layers: Annotated[int, Ge(1)] = 12
    """Number of transformer blocks."""
    num_heads: Annotated[int, Ge(1)] = 12
    """Query heads."""
    num_kv_heads: Annotated[int, Ge(1)] = 4
    """Key/value heads (grouped-query attention); must divide num_heads."""
    head_dim: Annotated[int, Ge(1)] = 64
    """Width of one attention head."""
    intermediate_size: Annotated[int, Ge(1)] = 2_048
    """Width of the SwiGLU."""
    max_seq_len: Annotated[int, Ge(1)] = 2_048
    """Longest context in tokens, also the training sequence length."""
    rope_base: Annotated[float, Gt(1)] = 1_000_000.0
    """Base of the rotary position embedding (theta)."""
    rms_norm_eps: Annotated[float, Gt(0)] = 1e-6
    """Epsilon of every RMSNorm."""
    use_qk_norm: bool = True
    """RMSNorm on each query and key head."""
    attn_logit_soft_cap: Annotated[float, Ge(0), "must be positive, or 0 for no cap"] = 50.0
    """Attention logits become cap * tanh(logits / cap); 0 turns the cap off."""
    final_logit_soft_cap: Annotated[float, Ge(0), "must be positive, or 0 for no cap"] = 30.0
    """The same for the output logits; 0 turns the cap off."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output head."""
    use_sub_norm: bool = False
    """Extra RMSNorm before o_proj and down_proj (BitNet's SubLN). Not exportable as Qwen3."""
    use_ternary: bool = True
    """Ternary body linears. Off: the same model in full precision, for controls."""
    activation_quant: ActivationQuant = "token"
    """int8 activations per token, per block of 256 (as llama.cpp's Q8_K does), or none."""

    def __post_init__(self) -> None:
        check_ranges(self)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}: "
            f"choose one of {[n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]}",
        )
        require(self.head_dim % 2 == 0, f"head_dim = {self.head_dim}: must be even for rotary embedding")
        if self.use_ternary and self.activation_quant == "block256":
            for name, value in (
                ("hidden_size", self.hidden_size),
                ("intermediate_size", self.intermediate_size),
                ("num_heads * head_dim", self.query_size),
            ):
                needs = 'must be a multiple of 256 for activation_quant = "block256"'
                require(value % 256 == 0, f"{name} = {value}: {needs}")

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_matrix_params(self) -> int:
        """Parameters in the body's 2-D matrices: those that become ternary."""
        attention = self.hidden_size * (2 * self.query_size + 2 * self.kv_size)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def num_embedding_params(self) -> int:
        """Parameters of the embedding, and of the head where it is not tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)

    @property
    def num_params_estimate(self) -> int:
        """Every parameter of the model; equal to the real count."""
        norms = 2 * self.hidden_size
        if self.use_qk_norm:
            norms += 2 * self.head_dim
        if self.use_sub_norm:
            norms += self.query_size + self.intermediate_size
        return self.num_matrix_params + self.num_embedding_params + self.num_layers * norms + self.hidden_size

    @property
    def kv_cache_size_per_token(self) -> int:
        """Bytes of KV cache per token and layer at 16 bits."""
        return 2 * self.kv_size * 2

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Training FLOPs per token: 6 per matrix and head parameter, plus causal attention.

        Causal attention costs 2 products of seq_len / 2 x query_size multiply-adds per layer forward and
        twice that backward: 6 * seq_len * query_size FLOPs a layer.
        """
        seq_len = seq_len or self.max_seq_len
        head = self.vocab_size * self.hidden_size
        return 6 * (self.num_matrix_params + head) + 6 * self.num_layers * seq_len * self.query_size


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they are arranged."""

    shards: str = "shards"
    """Folder that `smelter tokenize` wrote."""
    fim_rate: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Share of documents rearranged for fill-in-the-middle."""
    fim_spm_rate: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Of those, the share in suffix-prefix-middle order; the rest is prefix-suffix-middle."""
    fim_split_rate: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Of those in suffix-prefix-middle order, the share whose prefix and middle are encoded each on its own."""
    fim_cursor_rate: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Of the rearranged, the share cut where a cursor stands, up to a line's or block's end; the rest anywhere."""
    fim_piece_tokens: Annotated[int, Ge(0)] = 0
    """Mean length of the pieces that documents are cut into before they are rearranged; 0: what a row has room for."""
    fim_peek_tokens: Annotated[int, Ge(0)] = 0
    """Mean distance of peeks, text shown ahead of its place, in what is not rearranged; 0: none."""
    fim_cut_rate: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Words cut in two for each token, the parts encoded each on its own, as prompts are that end inside a word."""
    fim_position_skip: Annotated[int, Ge(0)] = 0
    """At the token before a middle, positions skip up to so many: distances of suffixes that cost no tokens."""
    fim_bridge: bool = False
    """Before the suffix and at its token, predict what the middle begins with, and not the suffix."""
    fim_middle_weight: Annotated[float, Gt(0), "must be positive"] = 1.0
    """Multiplies the loss weight of middles in prefix-suffix-middle order."""
    fim_prefix_token: str = "<|fim_prefix|>"
    """Token before the prefix."""
    fim_middle_token: str = "<|fim_middle|>"
    """Token before the middle, which the model then writes."""
    fim_suffix_token: str = "<|fim_suffix|>"
    """Token before the suffix."""
    use_document_mask: bool = False
    """Attention does not cross from one packed document into another."""
    instruct_share: Annotated[float, Le(1), "must lie between 0 and 1, or be negative for as they come"] = -1.0
    """Share of the rows drawn from conversations (records of kind "instruct"); negative: as they come."""
    instruct_weight: Annotated[float, Gt(0), "must be positive (instruct_share = 0 leaves them out)"] = 1.0
    """Multiplies the loss weight of conversations."""

    def __post_init__(self) -> None:
        check_ranges(self)
        tokens = {self.fim_prefix_token, self.fim_middle_token, self.fim_suffix_token} - {""}
        require(len(tokens) == 3, "fim_*_token: the three must differ and not be empty")


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
    validation_tau: Annotated[float, Gt(0)] = 0.1
    """Nats per token by which a teacher must be worse on held-out code for its weight to fall by the factor e."""
    chunk_teachers: tuple[str, ...] = ()
    """Folders that `smelter teach --method chunks` wrote: teachers with other tokenizers, each of equal weight."""
    chunk_weight: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Share of the divergence to chunk_teachers in the loss, where they have a chunk."""
    chunk_temperature: Annotated[float, Gt(0)] = 100.0
    """Chunks' likelihoods are compared to the power 1 / this (arXiv 2503.20083)."""
    kl_weight: Annotated[float, Interval(ge=0, le=1)] = 0.9
    """Share of the KL term in the loss; cross-entropy has the rest."""
    kl_schedule: Literal["constant", "linear"] = "constant"
    """linear: the share goes from kl_weight to kl_weight_end over the run."""
    kl_weight_end: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Share of the KL term at the end of a linear schedule."""
    kl_direction: Literal["forward", "reverse", "skew", "js"] = "forward"
    """forward: KL(teacher || student). reverse: KL(student || teacher). skew, js: to a blend of the two."""
    skew_alpha: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    """skew: the teacher's share in the blend; 0 is forward."""
    js_beta: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    """js: the teacher's share in the blend, and the weight of its side; near 0 like forward, near 1 like reverse."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Softens both distributions; the term is multiplied by its square."""

    def __post_init__(self) -> None:
        check_ranges(self)
        require(
            self.teacher_weighting != "validation" or not self.cached,
            'teacher_weighting = "validation" measures teachers that run here, which those of cached do not: '
            'give teacher_weights, and leave it "fixed"',
        )
        if self.chunk_teachers and self.num_teachers:
            most = max(self.kl_weight, self.kl_weight_end if self.kl_schedule == "linear" else 0.0)
            require(
                most + self.chunk_weight <= 1,
                f"chunk_weight = {self.chunk_weight} and kl_weight up to {most}: together at most 1",
            )
        if self.teacher_weights:
            count = f"{len(self.teachers)} teachers" + (f" and {len(self.cached)} cached" if self.cached else "")
            require(
                len(self.teacher_weights) == self.num_teachers,
                f"teacher_weights has {len(self.teacher_weights)} entries for "
                f"{count}: give one weight per teacher or none",
            )
            require(
                min(self.teacher_weights) >= 0 and sum(self.teacher_weights) > 0,
                "teacher_weights: none may be negative and one must be positive",
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
    seed: Annotated[int, Interval(ge=0, lt=2**63), "must lie in [0, 2**63)"] = 0
    """Seed of the initial weights and, without distillation.cached, of the order of the data."""
    init_from: str = ""
    """Start from the weights of this run folder or checkpoint, with a new optimizer; a resumed run has its own."""
    ternary_start_step: Annotated[int, Ge(0)] = 0
    """Full precision up to this step, ternary from there on; 0: ternary from the start (model.use_ternary)."""
    ternary_warmup_steps: Annotated[int, Ge(0)] = 0
    """Linear warm-up of every learning rate after ternary_start_step; 0: the schedules go on as they are."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Matrix products' precision. auto: bf16 where the hardware multiplies it, else fp16 on CUDA, fp32 on CPU."""
    num_steps: Annotated[int, Gt(0)] = 20_000
    """Optimizer steps."""
    train_minutes: Annotated[float, Ge(0)] = 0.0
    """If positive, train for this long instead: num_steps is set when the cool-down must begin. Not with cosine."""
    device_batch_size: Annotated[int, Gt(0)] = 8
    """Sequences per forward pass on one device."""
    total_batch_size: Annotated[int, Gt(0)] = 262_144
    """Tokens per optimizer step over all devices; a multiple of sequence length x device_batch_size x devices."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the body's matrices, AdamW for the rest. adamw: AdamW for all."""
    muon_lr: Annotated[float, Gt(0)] = 0.02
    """Muon's learning rate."""
    muon_momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.95
    """Muon's (Nesterov) momentum, reached after muon_momentum_warmup steps from 0.85."""
    muon_momentum_warmup: Annotated[int, Ge(0)] = 300
    """Steps over which Muon's momentum rises to its value."""
    muon_newton_schulz_steps: Annotated[int, Gt(0)] = 5
    """Newton-Schulz steps of Muon's orthogonalisation; fewer are cheaper where batches are small."""
    muon_weight_decay: Annotated[float, Ge(0)] = 0.0
    """Muon's decoupled weight decay, falling linearly to 0 over the run."""
    muon_schedule: Schedule = "constant"
    """Muon's learning-rate schedule."""
    adamw_lr: Annotated[float, Gt(0)] = 3e-3
    """AdamW's learning rate for norms, and for matrices with optimizer = "adamw"."""
    embedding_lr: Annotated[float, Gt(0)] = 6e-3
    """AdamW's learning rate for the embedding and the output head."""
    adamw_beta1: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """AdamW's first-moment decay."""
    adamw_beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.95
    """AdamW's second-moment decay."""
    adamw_weight_decay: Annotated[float, Ge(0)] = 0.0
    """AdamW's decoupled weight decay on matrices (never on norms)."""
    adamw_schedule: Schedule = "wsd"
    """AdamW's learning-rate schedule: constant, warm-up-stable-decay, or cosine."""
    warmup_steps: Annotated[int, Ge(0)] = 100
    """Linear warm-up of every scheduled learning rate."""
    cooldown_fraction: Annotated[float, Interval(ge=0, le=1)] = 0.25
    """wsd: share of the steps over which the rate falls linearly to min_lr_ratio."""
    min_lr_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Learning rate at the end, as a share of its peak."""
    grad_clip: Annotated[float, Ge(0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    z_loss: Annotated[float, Ge(0)] = 1e-4
    """Weight of the squared log-partition term that keeps logits small."""
    final_cap_anneal_fraction: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Share of the steps, at the end, over which 1 / model.final_logit_soft_cap falls linearly to 0: the model then
    ends without that cap, as exports need it. 0 keeps the cap."""
    loss_chunk_size: Annotated[int, Gt(0)] = 1_024
    """Tokens whose logits exist at once in the loss."""
    use_torch_compile: bool = True
    """Compile each block with torch.compile (needs a C++ compiler on CPU, Triton on CUDA)."""
    use_gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    int8_gradients: bool = False
    """Round what the backward pass multiplies with ternary weights to int8, per token (SwitchBack, arXiv 2304.13013).
    Faster where int8 products are; the weights' own gradients stay as they are."""
    log_every: Annotated[int, Gt(0)] = 10
    """Steps between progress lines and metrics."""
    eval_every: Annotated[int, Ge(0)] = 250
    """Steps between evaluations on held-out data; 0 for the end only."""
    eval_tokens: Annotated[int, Gt(0)] = 131_072
    """Held-out tokens per evaluation."""
    sample_every: Annotated[int, Ge(0)] = 1_000
    """Steps between written samples; 0 for none."""
    checkpoint_every: Annotated[int, Ge(0)] = 1_000
    """Steps between checkpoints; 0 for the end only."""
    keep_checkpoints: Annotated[int, Ge(0)] = 2
    """Newest checkpoints kept; 0 keeps all."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on from the run folder's last checkpoint if there is one. must: fail without. never: start anew."""
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Also send metrics to these; metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        check_ranges(self)
        require(
            self.ternary_start_step < self.num_steps or bool(self.train_minutes),
            f"ternary_start_step = {self.ternary_start_step}: the run ends at num_steps = {self.num_steps} "
            "and would never be ternary: start earlier, or train a full-precision model with model.use_ternary = false",
        )
        if self.train_minutes:
            schedules = {self.adamw_schedule} | ({self.muon_schedule} if self.optimizer == "muon" else set())
            require(
                "cosine" not in schedules,
                "train_minutes needs a schedule that does not depend on the number of steps from the "
                'start: use "wsd" or "constant" instead of "cosine", or set num_steps',
            )


@dataclass(frozen=True)
class Config:
    """A whole recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        start = self.training.ternary_start_step
        require(
            self.model.use_ternary or not start,
            f"training.ternary_start_step = {start} needs model.use_ternary = true: the model would stay in full "
            "precision",
        )
        require(
            not self.training.int8_gradients or (self.model.use_ternary and self.model.activation_quant == "token"),
            "training.int8_gradients needs ternary weights and activations quantised per token: set "
            'model.use_ternary = true and model.activation_quant = "token", or leave it off',
        )

    def at_step(self, step: int) -> "Config":
        """What the model is after `step` steps: before ternary_start_step a full-precision one that knows no other.

        The step at which the model turns ternary still ends the first phase; the next one is the first of the second.
        """
        start = self.training.ternary_start_step
        if not start or step > start:
            return self
        return replace(
            self,
            model=replace(self.model, use_ternary=False),
            training=replace(self.training, ternary_start_step=0, ternary_warmup_steps=0, int8_gradients=False),
        )

    def micro_steps(self, world_size: int = 1) -> int:
        """Forward passes per optimizer step on each device; ConfigError where the batch does not divide."""
        training, seq_len = self.training, self.model.max_seq_len
        tokens = training.device_batch_size * seq_len * world_size
        require(
            training.total_batch_size % tokens == 0,
            f"training.total_batch_size = {training.total_batch_size} is not a multiple of device_batch_size x "
            f"max_seq_len x devices = {training.device_batch_size} x {seq_len} x {world_size} = {tokens}: "
            f"try {max(1, round(training.total_batch_size / tokens)) * tokens}",
        )
        return training.total_batch_size // tokens


PRESETS: dict[str, Config] = {
    "tiny": Config(
        model=ModelConfig(
            vocab_size=4_096,
            hidden_size=256,
            num_layers=6,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=768,
            max_seq_len=512,
        ),
        training=TrainingConfig(total_batch_size=4_096, num_steps=2_000, eval_every=500, muon_schedule="wsd"),
    ),
    "50m": Config(model=ModelConfig(hidden_size=512, num_heads=8, num_kv_heads=4, intermediate_size=1_280)),
    "100m": Config(),
    "125m": Config(model=ModelConfig(num_layers=16)),
    "300m": Config(model=ModelConfig(hidden_size=1_024, num_layers=24, num_heads=16, intermediate_size=2_816)),
}


def preset(name: str) -> Config:
    """The named preset; ConfigError with the nearest name where there is none."""
    require(name in PRESETS, f"unknown preset {name!r}: {nearest(name, PRESETS)}")
    return PRESETS[name]


def config_from_dict(values: dict[str, Any], where: str, base: Config | None = None) -> Config:
    """Lay the tables of a recipe over `base` (or over the recipe's `preset`, or 100m).

    Raises ConfigError that names `where`, the key and the nearest known one.
    """
    tables = dict(values)
    name = tables.pop("preset", "100m")
    require(isinstance(name, str), f"{where}: preset = {name!r}: must be a name in quotes")
    try:
        base = preset(name) if base is None else base
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return from_table(Config, tables, where, base)


def load_config(path: Path) -> Config:
    """Read a recipe. Raises ConfigError naming file, line (for syntax) or key, and the fix."""
    return config_from_dict(read_toml(path, "recipe"), str(path))


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain tables (tuples as lists), ready for TOML or JSON."""

    def table(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in items}

    return asdict(config, dict_factory=table)


def config_to_toml(config: Config) -> str:
    """The resolved configuration as TOML; `load_config` gives it back unchanged."""
    import tomli_w  # only here: benchmarks run where it is not installed

    return tomli_w.dumps(config_to_dict(config))
