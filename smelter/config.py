"""The whole configuration, frozen: four dataclasses, named presets and strict TOML.

Order of precedence: preset < recipe TOML < command line. An unknown key is an error that names the
nearest known one; the resolved whole is saved in the run folder. Figures that follow from others
(parameter count, KV-cache size, FLOPs) are properties, so nothing can drift apart.
"""

import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from smelter.base import ConfigError, nearest, require
from smelter.training_config import DistillationConfig, TrainingConfig, require_finite

__all__ = [  # the four tables are found here, wherever they are written
    "PRESETS",
    "ActivationQuant",
    "Config",
    "DataConfig",
    "DistillationConfig",
    "ModelConfig",
    "TrainingConfig",
    "config_from_dict",
    "config_to_dict",
    "config_to_toml",
    "load_config",
    "preset",
]

ActivationQuant = Literal["token", "block256", "none"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of the transformer (Qwen3's architecture plus logit soft-caps)."""

    vocab_size: int = 32_000
    """Rows of the embedding; at least the tokenizer's size, specials included."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_layers: int = 12
    """Number of transformer blocks."""
    num_heads: int = 12
    """Query heads."""
    num_kv_heads: int = 4
    """Key/value heads (grouped-query attention); must divide num_heads."""
    head_dim: int = 64
    """Width of one attention head."""
    intermediate_size: int = 2_048
    """Width of the SwiGLU."""
    max_seq_len: int = 2_048
    """Longest context in tokens, also the training sequence length."""
    rope_base: float = 1_000_000.0
    """Base of the rotary position embedding (theta)."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    use_qk_norm: bool = True
    """RMSNorm on each query and key head."""
    attn_logit_soft_cap: float = 50.0
    """Attention logits become cap * tanh(logits / cap); 0 turns the cap off."""
    final_logit_soft_cap: float = 30.0
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
        require_finite("model", self)
        for name in (
            *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
            *("intermediate_size", "max_seq_len"),
        ):
            value = getattr(self, name)
            require(value > 0, f"model.{name} = {value}: must be at least 1")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}: "
            f"choose one of {[n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]}",
        )
        require(self.head_dim % 2 == 0, f"model.head_dim = {self.head_dim}: must be even for rotary embedding")
        require(self.rms_norm_eps > 0, f"model.rms_norm_eps = {self.rms_norm_eps}: must be positive")
        require(self.rope_base > 1, f"model.rope_base = {self.rope_base}: must be above 1")
        for name in ("attn_logit_soft_cap", "final_logit_soft_cap"):
            value = getattr(self, name)
            require(value >= 0, f"model.{name} = {value}: must be positive, or 0 for no cap")
        if self.use_ternary and self.activation_quant == "block256":
            for name, value in (
                ("hidden_size", self.hidden_size),
                ("intermediate_size", self.intermediate_size),
                ("num_heads * head_dim", self.query_size),
            ):
                require(
                    value % 256 == 0,
                    f'model.{name} = {value}: must be a multiple of 256 for activation_quant = "block256"',
                )

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
    fim_rate: float = 0.5
    """Share of documents rearranged for fill-in-the-middle."""
    fim_spm_rate: float = 0.5
    """Of those, the share in suffix-prefix-middle order; the rest is prefix-suffix-middle."""
    fim_prefix_token: str = "<|fim_prefix|>"
    """Token before the prefix."""
    fim_middle_token: str = "<|fim_middle|>"
    """Token before the middle, which the model then writes."""
    fim_suffix_token: str = "<|fim_suffix|>"
    """Token before the suffix."""
    use_document_mask: bool = False
    """Attention does not cross from one packed document into another."""
    instruct_share: float = -1.0
    """Share of the rows drawn from conversations (records of kind "instruct"); negative: as they come."""
    instruct_weight: float = 1.0
    """Multiplies the loss weight of conversations."""

    def __post_init__(self) -> None:
        require_finite("data", self)
        for name in ("fim_rate", "fim_spm_rate"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name} = {value}: must lie between 0 and 1")
        share, weight = self.instruct_share, self.instruct_weight
        require(share <= 1, f"data.instruct_share = {share}: must lie between 0 and 1, or be negative for as they come")
        require(weight > 0, f"data.instruct_weight = {weight}: must be positive (instruct_share = 0 leaves them out)")
        tokens = {self.fim_prefix_token, self.fim_middle_token, self.fim_suffix_token}
        require(len(tokens) == 3 and all(tokens), "data.fim_*_token: the three must differ and not be empty")


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
    "50m": Config(
        model=ModelConfig(hidden_size=512, num_heads=8, num_kv_heads=4, intermediate_size=1_280),
    ),
    "100m": Config(),
    "125m": Config(model=ModelConfig(num_layers=16)),
    "300m": Config(model=ModelConfig(hidden_size=1_024, num_layers=24, num_heads=16, intermediate_size=2_816)),
}


def preset(name: str) -> Config:
    """The named preset; ConfigError with the nearest name where there is none."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: {nearest(name, list(PRESETS))}")
    return PRESETS[name]


def _checked(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type, without guessing: an int may stand for a float, a list for a tuple."""
    origin = get_origin(hint)
    if origin is Literal:
        require(value in get_args(hint), f"{where} = {value!r}: must be one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{where} = {value!r}: must be a list")
        return tuple(_checked(item, get_args(hint)[0], where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(type(value) is hint, f"{where} = {value!r}: must be of type {hint.__name__}")
    return value


def _apply(base: Any, values: dict[str, Any], where: str, table: str) -> Any:
    """`base` with the values of `[table]` laid over it, strictly."""
    hints = get_type_hints(type(base))
    known = [item.name for item in fields(base)]
    for key in values:
        require(key in known, f"{where}: [{table}]: unknown key {key!r}: {nearest(key, known)}")
    checked = {key: _checked(value, hints[key], f"{where}: [{table}]: {key}") for key, value in values.items()}
    try:
        return replace(base, **checked)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def config_from_dict(values: dict[str, Any], where: str, base: Config | None = None) -> Config:
    """Lay the tables of a recipe over `base` (or over the recipe's `preset`, or 100m).

    Raises ConfigError that names `where`, the key and the nearest known one.
    """
    values = dict(values)
    name = values.pop("preset", None)
    require(name is None or isinstance(name, str), f"{where}: preset = {name!r}: must be a name in quotes")
    if base is None:
        try:
            base = preset(name if name is not None else "100m")
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    sections = [item.name for item in fields(Config)]
    for key, table in values.items():
        require(key in sections, f"{where}: unknown table {key!r}: {nearest(key, sections)}")
        require(isinstance(table, dict), f"{where}: {key} must be a table ([{key}])")
    tables = {key: _apply(getattr(base, key), table, where, key) for key, table in values.items()}
    try:
        return replace(base, **tables)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def load_config(path: Path) -> Config:
    """Read a recipe. Raises ConfigError naming file, line (for syntax) or key, and the fix."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the recipe: {error.strerror}: check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return config_from_dict(values, str(path))


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain tables (tuples as lists), ready for TOML or JSON."""
    result: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if hasattr(value, "__dataclass_fields__"):
            value = config_to_dict(value)
        result[item.name] = list(value) if isinstance(value, tuple) else value
    return result


def config_to_toml(config: Config) -> str:
    """The resolved configuration as TOML; `load_config` gives it back unchanged."""
    import tomli_w  # only here: benchmarks run where it is not installed

    return tomli_w.dumps(config_to_dict(config))
