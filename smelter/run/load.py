"""From a folder to a model: ready to use, or as the start of another run (`training.init_from`).

The second is the usual way from a full-precision model to a ternary one: its weights become latent weights, and
training goes on with a new optimizer from step 0. Full precision first and ternary after it costs fewer tokens than
ternary alone (arXiv 2502.11895); `training.ternary_start_step` does both within one run and keeps the optimizer.
"""

from dataclasses import fields
from pathlib import Path

import torch

from smelter.base import CheckpointError, ConfigError
from smelter.config import Config, ModelConfig
from smelter.model import Model
from smelter.run.checkpoint import Checkpoint, load_checkpoint
from smelter.run.device import pick_dtype
from smelter.run.distributed import print0
from smelter.run.packed import is_packed, load_packed
from smelter.tokens import Tokenizer

SHAPES = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"),
    *("use_qk_norm", "tie_embeddings", "use_sub_norm"),
)
"""Keys of [model] that decide which weights there are and how they are read."""


def load_initial_weights(model: Model, config: Config, tokenizer: Tokenizer) -> Path:
    """Put the weights of the checkpoint that `training.init_from` names into `model`; returns its path.

    Its step, optimizer and data are left behind. What shapes no weight (ternary or not, activations, rotary base,
    soft-caps, context length) may differ, and is said where it does. Raises ConfigError that names the first
    difference in shape, or another tokenizer than that of the run's shards; CheckpointError for a damaged one.
    """
    loaded = load_checkpoint(Path(config.training.init_from), with_state=False)
    where = f"training.init_from: {loaded.path}"
    changes = []
    for key in (item.name for item in fields(ModelConfig)):
        old, new = getattr(loaded.config.model, key), getattr(model.config, key)
        if old != new and key in SHAPES:
            raise ConfigError(f"{where} has model.{key} = {old}, this run {new}: set model.{key} = {old}")
        if old != new:
            changes.append(f"{key} {old} -> {new}")
    if Tokenizer.load(loaded.tokenizer_file).hash != tokenizer.hash:
        raise ConfigError(
            f"{where} has another tokenizer than the shards {config.data.shards}: tokenize the data with "
            f"`smelter tokenize --tokenizer {loaded.tokenizer_file}`"
        )
    model.load_state_dict(loaded.tensors)
    print0(f"weights from {loaded.path}" + (f" ({', '.join(changes)})" if changes else ""))
    return loaded.path


def load_model(
    path: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, with_state: bool = False
) -> tuple[Model, Tokenizer, Checkpoint]:
    """A run folder's newest checkpoint, a checkpoint or a packed model, ready to use: trits made, in evaluation mode.

    `dtype` is the compute dtype, by default `pick_dtype`'s for reading. Raises CheckpointError or DataError.
    """
    checkpoint = load_packed(path) if is_packed(path) else load_checkpoint(path, with_state=with_state)
    where = torch.device(device)
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: leave the caller's numbers alone
        model = Model(checkpoint.config.model, dtype or pick_dtype("auto", where))
    try:
        model.load_state_dict(checkpoint.tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{checkpoint.path}: the weights are of another model: {reason}") from None
    model = model.to(where).eval()
    model.quantize_weights()
    model.freeze()
    tokenizer = Tokenizer.load(checkpoint.tokenizer_file)
    if tokenizer.vocab_size > checkpoint.config.model.vocab_size:
        raise CheckpointError(
            f"{checkpoint.tokenizer_file}: has {tokenizer.vocab_size} tokens, the model's embedding "
            f"{checkpoint.config.model.vocab_size}: copy the checkpoint again, with its own tokenizer"
        )
    return model, tokenizer, checkpoint
