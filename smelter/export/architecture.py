"""Qwen3 written out from the tensors of an export: what every program computes that reads one.

Nothing of ours takes part in it. So a model that computes something else here, because its code was changed, is noticed
without any other program being installed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.config import ModelConfig


def qwen3_logits(config: ModelConfig, read: Callable[[str], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function from token ids [1, T] to logits [T, V], in float32; `read` gives tensors by Hugging Face's names."""
    eps, dim = config.rms_norm_eps, config.head_dim
    embedding = read("model.embed_tokens.weight").float()
    final_norm = read("model.norm.weight").float()
    head = embedding if config.tie_embeddings else read("lm_head.weight").float()
    of_layer = {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
        "": ("input_layernorm", "post_attention_layernorm"),
    }
    layers = [
        {
            name: read(".".join(filter(None, ("model.layers", str(number), part, name, "weight")))).float()
            for part, names in of_layer.items()
            for name in names
        }
        for number in range(config.num_layers)
    ]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight

    def rotated(x: Tensor, angles: Tensor) -> Tensor:
        """RoPE: the first half of each head's numbers goes with the second."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        frequencies = config.rope_base ** -(torch.arange(0, dim, 2).double() / dim)
        angles = torch.outer(torch.arange(length).double(), frequencies).float()  # [T, D / 2]
        x = embedding[tokens[0]]  # [T, C]
        for w in layers:
            h = norm(x, w["input_layernorm"])
            q, k, v = (
                (h @ w[f"{name}_proj"].T).unflatten(-1, (-1, dim)).transpose(0, 1) for name in "qkv"
            )  # [H or G, T, D]
            q, k = rotated(norm(q, w["q_norm"]), angles), rotated(norm(k, w["k_norm"]), angles)
            k, v = (y.repeat_interleave(len(q) // len(y), dim=0) for y in (k, v))
            scores = q @ k.mT / dim**0.5
            unseen = torch.ones(length, length, dtype=torch.bool).triu(1)
            out = scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v  # [H, T, D]
            x = x + out.transpose(0, 1).flatten(1) @ w["o_proj"].T
            h = norm(x, w["post_attention_layernorm"])
            x = x + (F.silu(h @ w["gate_proj"].T) * (h @ w["up_proj"].T)) @ w["down_proj"].T
        return norm(x, final_norm) @ head.T

    return logits
