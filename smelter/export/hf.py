"""A folder that Transformers loads as `Qwen3ForCausalLM`, without code of ours beside it.

The ternary values are baked into plain bf16 matrices: scales are rounded to bf16 in training already, so
not one of them changes. A packed two-bit format exists too, but its readers are many times slower and
disagree about which way the scale goes; plain tensors are read alike by everyone. Names inside the model
are Hugging Face's, so export is a copy.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from smelter.base import UserError, write_json
from smelter.bitnet import bit_linears
from smelter.config import ModelConfig
from smelter.model import Model
from smelter.run import write_tensors
from smelter.tokens import TEMPLATE, Tokenizer, stop_ids

WEIGHTS = "model.safetensors"


def check_expressible(config: ModelConfig) -> None:
    """UserError naming the options that no stock architecture (here: Qwen3) has."""
    problems = []
    if config.use_sub_norm:
        problems.append("model.use_sub_norm = true (train with use_sub_norm = false)")
    if not config.use_qk_norm:
        problems.append("model.use_qk_norm = false (train with use_qk_norm = true)")
    if problems:
        raise UserError(f"Qwen3, the architecture that other tools run, cannot express {' and '.join(problems)}")


def hf_name(name: str) -> str:
    """Hugging Face's name of one of our parameters."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def baked_tensors(model: Model) -> dict[str, Tensor]:
    """Every parameter under Hugging Face's name, float32 on the CPU, ternary layers as scale * trit."""
    ternary = {f"{name}.weight": layer for name, layer in bit_linears(model)}
    return {
        hf_name(name): (
            ternary[name].trits.float() * ternary[name].scale if name in ternary else parameter.detach().float()
        ).cpu()
        for name, parameter in model.named_parameters()
    }


def compare_trits(model: Model, read: Callable[[str], Tensor]) -> dict[str, int]:
    """How the ternary layers of a file differ from the model's; `read(name)` is a tensor by Hugging Face's name.

    weights_changed counts values that are not exactly scale * trit, trits_changed those of another sign, and
    scales_changed the layers whose magnitudes are not all the scale. All must be 0.
    """
    counts = {"trits": 0, "trits_changed": 0, "weights_changed": 0, "scales_changed": 0, "layers": 0}
    for name, layer in bit_linears(model):
        weight, trits = read(hf_name(f"{name}.weight")).float(), layer.trits.float().cpu()
        scale = layer.scale.cpu()
        counts["layers"] += 1
        counts["trits"] += trits.numel()
        counts["trits_changed"] += int((weight.sign() != trits).sum())
        counts["weights_changed"] += int((weight != scale * trits).sum())
        counts["scales_changed"] += int(not bool((weight[weight != 0].abs() == scale).all()))
    return counts


def qwen3_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json. `rope_theta` stands at the top too, where Transformers 4 looks for it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": tokenizer.eos_id,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_seq_len,
        "max_window_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": tokenizer.pad_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_base, "rope_type": "default"},
        "rope_theta": config.rope_base,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def write_hf(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """Write weights, configuration and tokenizer into `folder`."""
    config, special = model.config, tokenizer.special
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in baked_tensors(model).items()}
    write_tensors(folder / WEIGHTS, tensors)
    tokenizer.save(folder / "tokenizer.json")
    others = [name for role, name in special.roles.items() if role not in ("eos", "pad")]
    named = {"eos_token": special.eos, "pad_token": special.pad, "additional_special_tokens": others}
    files: dict[str, dict[str, Any]] = {
        "config.json": qwen3_config(config, tokenizer),
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": stop_ids(tokenizer),
            "pad_token_id": tokenizer.pad_id,
        },
        "tokenizer_config.json": {
            **named,
            # Transformers 4 guesses a slow tokenizer class of the architecture otherwise.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_seq_len,
            "padding_side": "left",  # what is generated stands at the right
            **({} if tokenizer.im_end_id is None else {"chat_template": TEMPLATE}),
        },
        "special_tokens_map.json": named,
    }
    for file, values in files.items():
        write_json(folder / file, values)


def read_hf(folder: Path) -> Callable[[str], Tensor]:
    """The tensors of a written folder by name."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    return tensors.__getitem__
