"""One GGUF file for llama.cpp and what is built on it: architecture `qwen3`, two bits a weight.

The matrices are quantised from their baked ternary values, for which TQ2_0 and TQ1_0 are exact (from the
latent weights they would take the largest of each 256 as the scale and lose nearly everything). Their
16-bit scales hold ours without rounding: from 1e-5 to 65,504 every bf16 number is a 16-bit float. The
embedding, which is the output head too, is Q8_0; norms stay float32. llama.cpp rounds activations to 8
bits in blocks of 256 by itself.
"""

import importlib.util
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smelter.base import UserError
from smelter.export.hf import baked_tensors
from smelter.model import Model
from smelter.tokens import QWEN2_SPLIT_PATTERN, TEMPLATE, Tokenizer

BLOCK = 256
"""Weights that TQ1_0 and TQ2_0 store together."""


def check_gguf(model: Model, tokenizer: Tokenizer, gguf_type: str) -> None:
    """UserError that names what keeps this model out of a GGUF file of this type, and what to do."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("GGUF files need the gguf package: pip install 'smelter-foundry[gguf]'")
    config = model.config
    if gguf_type != "F16":
        if not config.use_ternary:
            raise UserError(
                f"{gguf_type} holds ternary weights and model.use_ternary is off in this checkpoint (so are those up "
                "to a run's training.ternary_start_step): use --gguf-type F16"
            )
        for name, value in (
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("num_heads * head_dim", config.query_size),
        ):
            if value % BLOCK:
                raise UserError(
                    f"model.{name} = {value}: {gguf_type} stores blocks of {BLOCK}, so it must be a multiple of "
                    f"{BLOCK}: use --gguf-type F16 or --format hf, or train another size"
                )
    _check_pre_tokenizer(tokenizer)


def _check_pre_tokenizer(tokenizer: Tokenizer) -> None:
    """UserError unless text is split as llama.cpp's `qwen2` does it: another split gives other tokens, silently."""
    values = tokenizer.values
    parts = (values["pre_tokenizer"] or {}).get("pretokenizers", [])
    kinds = [part["type"] for part in parts]
    split = parts[0] if kinds == ["Split", "ByteLevel"] else {}
    if split.get("pattern") != {"Regex": QWEN2_SPLIT_PATTERN} or parts[1]["use_regex"] or values["normalizer"]:
        raise UserError(
            "the tokenizer does not split text as Qwen2's does, the only one GGUF export knows: use --format hf and "
            "llama.cpp's own converter, or train with a tokenizer made by `smelter tokenize`"
        )


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """The vocabulary in id order, padded to the embedding's rows, with merges and special tokens."""
    import gguf

    values = tokenizer.values
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, index in values["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in values["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]]
    keys = gguf.Keys.Tokenizer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:  # a vocabulary of bytes alone has none, and an empty array has no type
        writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    if tokenizer.im_end_id is not None:
        writer.add_eot_token_id(tokenizer.im_end_id)
        writer.add_chat_template(TEMPLATE)
    writer.add_add_bos_token(False)
    # No ids for repository or file separators: llama-server would then send those around the code.
    for key, token_id in (
        (keys.FIM_PRE_ID, tokenizer.fim_prefix_id),
        (keys.FIM_SUF_ID, tokenizer.fim_suffix_id),
        (keys.FIM_MID_ID, tokenizer.fim_middle_id),
    ):
        writer.add_uint32(key, token_id)


def write_gguf(
    file: Path, model: Model, tokenizer: Tokenizer, *, name: str, gguf_type: str, embedding_type: str = "Q8_0"
) -> None:
    """Write the whole model into one file; call `check_gguf` first. The embedding is the output head too."""
    import gguf

    config, kinds = model.config, gguf.GGMLQuantizationType
    body = kinds[gguf_type]
    is_q8_0 = embedding_type == "Q8_0" and gguf_type != "F16" and config.hidden_size % 32 == 0
    table = kinds.Q8_0 if is_q8_0 else kinds.F16 if embedding_type == "Q8_0" else kinds[embedding_type]
    writer = gguf.GGUFWriter(str(file), "qwen3")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{gguf_type}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for tensor_name, tensor in baked_tensors(model).items():
        if tensor.ndim == 1:
            kind = kinds.F32
        else:
            kind = table if tensor_name in ("model.embed_tokens.weight", "lm_head.weight") else body
        data = gguf.quants.quantize(tensor.numpy(), kind)
        writer.add_tensor(gguf_name(tensor_name, config.num_layers), data, raw_dtype=kind)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def gguf_name(hf_name: str, num_layers: int) -> str:
    """GGUF's name of a tensor that Hugging Face calls `hf_name`."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, num_layers)
    name: str | None = names.get_name(hf_name, try_suffixes=(".weight",))
    if name is None:
        raise KeyError(f"{hf_name} has no name in GGUF's qwen3")
    return name


def read_gguf(file: Path, num_layers: int) -> Callable[[str], Tensor]:
    """The dequantised tensors of a file by Hugging Face's name, float32."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}

    def read(name: str) -> Tensor:
        tensor = tensors[gguf_name(name, num_layers)]
        return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))

    return read
