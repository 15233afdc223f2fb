"""A trained model at a quarter of a byte a weight: a folder that `smelter` itself loads again.

    config.json        {"format": "smelter-packed", "format_version": 1, "step": ..., "config": the resolved recipe}
    tokenizer.json
    model.safetensors  ternary matrix [N, K]: NAME.weight uint8 [N, ceil(K / 4)] (see `bitnet.pack_trits`) and
                       NAME.scale, float32 []; embedding and head bfloat16; the rest float32

Loading makes latent weights that quantise to the stored trits and scale: `trit * scale / share of non-zero trits`,
whose mean magnitude is the scale. So a packed model is a model like any other from there on: it completes, is
evaluated and exported. What is lost is what only training needs.
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from smelter import __version__
from smelter.base import CheckpointError, UserError, is_intact, sealed, write_json
from smelter.bitnet import bit_linears, pack_trits, unpack_trits
from smelter.config import Config, config_from_dict, config_to_dict
from smelter.model import Model
from smelter.run.checkpoint import CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE, Checkpoint, write_tensors
from smelter.tokens import Tokenizer

FORMAT = "smelter-packed"
FORMAT_VERSION = 1


def write_packed(folder: Path, model: Model, tokenizer: Tokenizer, config: Config, step: int) -> None:
    """Write the three files into `folder`. UserError for a model that is not ternary."""
    if not config.model.use_ternary:
        raise UserError("packed files hold ternary weights and model.use_ternary is off: use --format hf")
    ternary = {f"{name}.weight": (name, layer) for name, layer in bit_linears(model)}
    tensors: dict[str, Tensor] = {}
    for key, parameter in model.named_parameters():
        if key in ternary:
            name, layer = ternary[key]
            tensors[key] = pack_trits(layer.trits).cpu()
            tensors[f"{name}.scale"] = layer.scale.float().cpu()
        else:
            dtype = torch.float32 if parameter.ndim == 1 else torch.bfloat16
            tensors[key] = parameter.detach().to("cpu", dtype).contiguous()
    write_tensors(folder / MODEL_FILE, tensors)
    tokenizer.save(folder / TOKENIZER_FILE)
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "smelter_version": __version__,
        "step": step,
        "config": config_to_dict(config),
    }
    write_json(folder / CONFIG_FILE, sealed(values), ensure_ascii=True)


def is_packed(path: Path) -> bool:
    """Whether `path` is a folder that `write_packed` made."""
    try:
        return bool(json.loads((path / CONFIG_FILE).read_text(encoding="utf-8")).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


def load_packed(path: Path) -> Checkpoint:
    """The folder as a checkpoint without state. Raises CheckpointError that names what is wrong with it."""
    manifest: dict[str, Any] = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / CONFIG_FILE}: format version {manifest.get('format_version')!r}, this Smelter reads "
            f"{FORMAT_VERSION}: install the one that wrote it ({manifest.get('smelter_version')})"
        )
    if not is_intact(manifest):
        raise CheckpointError(
            f"{path / CONFIG_FILE}: damaged (its SHA-256 is not the one that it names): copy the folder again from its "
            f"source"
        )
    try:
        config = config_from_dict(manifest["config"], str(path / CONFIG_FILE))
        stored = safetensors.torch.load_file(path / MODEL_FILE)
        step = int(manifest["step"])
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: not readable ({error}): copy the folder again from its source") from None
    with torch.device("meta"):
        widths = {key: parameter.shape[-1] for key, parameter in Model(config.model).named_parameters()}
    tensors: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        if tensor.dtype == torch.uint8:
            scale = stored[key.removesuffix("weight") + "scale"]
            trits = unpack_trits(tensor, widths.get(key, 4 * tensor.shape[-1])).float()
            tensors[key] = trits * (scale / trits.abs().mean(dtype=torch.float64).clamp_min(1e-9)).float()
        elif not key.endswith(".scale"):
            tensors[key] = tensor.float()
    return Checkpoint(path, step, config, tensors, None)
