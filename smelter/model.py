"""The transformer: Qwen3's architecture with ternary body linears and optional logit soft-caps.

Pre-norm blocks of grouped-query attention (RoPE, RMSNorm on each query and key head) and SwiGLU, no
biases, tied embedding. Parameter names are Hugging Face's, so export is a copy. Latent weights are
float32; activations run in `compute_dtype`. The head is applied by the loss, chunk by chunk, so
`forward` returns hidden states.

Shapes: B batch, T tokens, C hidden_size, H query heads, G key/value heads, D head_dim, S cached keys.
"""

import math
import sys
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smelter.bitnet import BitLinear, RMSNorm, apply_together, freeze, quantize_weights
from smelter.config import ModelConfig
from smelter.kernels import (
    Decoder,
    Documents,
    LayerWeights,
    Scratch,
    ScreenedHead,
    Stacked,
    decodes_natively,
    documents,
    int8_product,
    reference,
)
from smelter.kernels import attention as run_attention

MAX_DECODER_DISTANCE = 0.05
"""Relative, of hidden states. An activation that falls to the other side of a rounding edge makes up to 0.015 of it (24
layers), GELU in place of SiLU at least 0.1."""


class Cache(Protocol):
    """Keys and values [layers, B, G, S, D] of earlier tokens, kept by the decoder; `first` is a batch's first row."""

    keys: Tensor
    values: Tensor
    first: int

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, G, T, D] of the current tokens; return all of them [B, G, S, D]."""
        ...


def _linear(config: ModelConfig, in_features: int, out_features: int) -> BitLinear:
    return BitLinear(
        in_features, out_features, use_ternary=config.use_ternary, activation_quant=config.activation_quant
    )


def _frozen(first: BitLinear) -> Stacked:
    """What `freeze` made of the layers of which this is the first."""
    assert first.stacked is not None
    return first.stacked


class Attention(nn.Module):
    """Grouped-query attention with QK-norm, RoPE and logit soft-cap."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.q_proj = _linear(config, config.hidden_size, config.query_size)
        self.k_proj = _linear(config, config.hidden_size, config.kv_size)
        self.v_proj = _linear(config, config.hidden_size, config.kv_size)
        self.o_proj = _linear(config, config.query_size, config.hidden_size)
        if config.use_qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        if config.use_sub_norm:
            self.sub_norm = RMSNorm(config.query_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        docs: Documents,
        cache: Cache | None,
    ) -> Tensor:
        dim, cap = self.config.head_dim, self.config.attn_logit_soft_cap
        projected = apply_together(x, [self.q_proj, self.k_proj, self.v_proj], norm)
        q, k, v = (y.unflatten(-1, (-1, dim)) for y in projected)  # [B, T, H or G, D]
        if self.config.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H or G, T, D]
        q, k = reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # [B, G, S, D]
        out = run_attention(q, k, v, cap, mask=mask, docs=docs)  # [B, H, T, D]
        out = out.transpose(1, 2).flatten(-2)  # [B, T, H * D]
        if self.config.use_sub_norm:
            out = self.sub_norm(out)
        y: Tensor = self.o_proj(out)
        return y


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config, config.hidden_size, config.intermediate_size)
        self.up_proj = _linear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = _linear(config, config.intermediate_size, config.hidden_size)
        self.sub_norm = RMSNorm(config.intermediate_size, config.rms_norm_eps) if config.use_sub_norm else None

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        gate, up = apply_together(x, [self.gate_proj, self.up_proj], norm)
        hidden = F.silu(gate) * up
        if self.sub_norm is not None:
            hidden = self.sub_norm(hidden)
        y: Tensor = self.down_proj(hidden)
        return y


class Block(nn.Module):
    """One transformer block; the unit that is compiled and recomputed."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        docs: Documents,
        cache: Cache | None = None,
    ) -> Tensor:
        x = x + self.self_attn(x, self.input_layernorm, cos, sin, mask, docs, cache)
        y: Tensor = x + self.mlp(x, self.post_attention_layernorm)
        return y

    def weights(self) -> LayerWeights:
        """A frozen ternary block's weights."""
        attention, mlp = self.self_attn, self.mlp
        has_norms, has_sub_norms = attention.config.use_qk_norm, attention.config.use_sub_norm
        return LayerWeights(
            qkv=_frozen(attention.q_proj),
            out=_frozen(attention.o_proj),
            gate_up=_frozen(mlp.gate_proj),
            down=_frozen(mlp.down_proj),
            attention_norm=self.input_layernorm.weight,
            query_norm=attention.q_norm.weight if has_norms else None,
            key_norm=attention.k_norm.weight if has_norms else None,
            attention_sub_norm=attention.sub_norm.weight if has_sub_norms else None,
            mlp_norm=self.post_attention_layernorm.weight,
            mlp_sub_norm=None if mlp.sub_norm is None else mlp.sub_norm.weight,
        )


class Model(nn.Module):
    """Token ids in, normalised hidden states out; `logits` applies the head."""

    inverse: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.trit_dtype = compute_dtype
        """What trits are kept in: the compute dtype, ready for single tokens, or int8, half the size, for training."""
        self.use_gradient_checkpointing = False
        self.screened: ScreenedHead | None = None
        self.decoder: Decoder | None = None
        """Both made by `freeze`, where they pay."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        inverse = config.rope_base ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
        self.register_buffer("inverse", inverse, persistent=False)  # [D / 2]
        cos, sin = self.rotation(torch.arange(config.max_seq_len))
        self.register_buffer("cos", cos, persistent=False)  # [max_seq_len, D]
        self.register_buffer("sin", sin, persistent=False)
        if self.embed_tokens.weight.device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal initial weights of variance 1/fan_in; layers that write to the residual start smaller."""
        residual_scale = 1 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name in ("embed_tokens.weight", "lm_head.weight"):
                parameter.normal_(std=0.02)
            else:
                scale = residual_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                parameter.normal_(std=scale / math.sqrt(parameter.shape[1]))
        self.quantize_weights()

    def quantize_weights(self) -> None:
        """Make every trit from its latent weight; call after each change of the weights."""
        quantize_weights(self, self.trit_dtype)

    def use_int8_gradients(self, use: bool) -> None:
        """Whether the ternary layers' gradients to their inputs are rounded to int8, per token."""
        for module in self.modules():
            if isinstance(module, BitLinear):
                module.int8_gradients = use

    def make_ternary(self) -> None:
        """Turn a full-precision model into the ternary model of the same latent weights."""
        self.config = replace(self.config, use_ternary=True)
        for module in self.modules():
            if isinstance(module, BitLinear) and not module.use_ternary:
                module.make_ternary()
        self.quantize_weights()

    def freeze(self) -> None:
        """Make a trained model quick (see `bitnet.freeze`); its weights may not change after this."""
        for block in self.layers:
            assert isinstance(block, Block)
            attention, mlp = block.self_attn, block.mlp
            freeze(
                [
                    [attention.q_proj, attention.k_proj, attention.v_proj],
                    [attention.o_proj],
                    [mlp.gate_proj, mlp.up_proj],
                    [mlp.down_proj],
                ],
                self.compute_dtype,
            )
        if self.compute_dtype == torch.float32 and int8_product(self.head.device) == "cpu":
            self.screened = ScreenedHead.of(self.head)
        config, device = self.config, self.head.device
        can_decode = config.use_ternary and config.activation_quant != "none" and self.compute_dtype == torch.float32
        if can_decode and decodes_natively(device, config.hidden_size, config.intermediate_size, config.head_dim):
            decoder = Decoder(
                [block.weights() for block in self.layers if isinstance(block, Block)],
                embedding=self.embed_tokens.weight,
                norm=self.norm.weight,
                cos=self.cos,
                sin=self.sin,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                eps=config.rms_norm_eps,
                cap=config.attn_logit_soft_cap,
            )
            self.decoder = decoder if self._computes_as(decoder) else None

    @torch.no_grad()
    def _computes_as(self, decoder: Decoder) -> bool:
        """Whether the decoder's hidden states of some tokens are ours; said where they are not."""
        config, length = self.config, min(16, self.config.max_seq_len)
        tokens = torch.linspace(0, config.vocab_size - 1, length).long().unsqueeze(0)
        positions = torch.arange(length).unsqueeze(0)
        cache = Scratch.of(config.num_layers, config.num_kv_heads, length, config.head_dim)
        # With a mask, as PyTorch decodes too: attention without one would load the compiler, a second.
        mask = reference.causal_mask(None, length, tokens.device)
        ours, theirs = self(tokens, positions=positions, mask=mask), decoder(tokens, positions, cache)
        distance = ((theirs - ours).norm(dim=-1) / ours.norm(dim=-1)).median()
        if distance <= MAX_DECODER_DISTANCE or not ours.isfinite().all():  # a broken model is for others to notice
            return True
        print(
            "the C++ decoder computes another model than smelter/model.py: PyTorch writes instead, which is slower",
            file=sys.stderr,
        )
        return False

    @property
    def head(self) -> Tensor:
        """Output head [vocab_size, C]: the embedding itself when tied."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., D] of RoPE's angles at any positions [...], float32."""
        angles = positions.unsqueeze(-1).float() * self.inverse
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def forward(
        self,
        tokens: Tensor,
        doc_ids: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, C] of tokens [B, T].

        doc_ids [B, T] keeps attention inside each packed document. Training may pass `positions` [B, T] of any size;
        a decoder passes its `cache`, the tokens' `positions` in it and the `mask` [B, 1, T, S] of keys each may see.
        Without a mask attention is causal. ValueError for more tokens than max_seq_len without positions.
        """
        if positions is None and tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(f"{tokens.shape[1]} tokens: the model's context is {self.config.max_seq_len}")
        if self.decoder is not None and cache is not None and positions is not None and not torch.is_grad_enabled():
            return self.decoder(tokens, positions, cache)
        x = F.embedding(tokens, self.embed_tokens.weight).to(self.compute_dtype)
        if positions is None:
            cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]  # [T, D]
        elif cache is None:
            cos, sin = (part.unsqueeze(1) for part in self.rotation(positions))  # [B, 1, T, D]
        else:
            cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        docs = documents(doc_ids, tokens.shape[1], tokens.device) if mask is None else None
        for block in self.layers:
            if self.use_gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, docs, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, docs, cache)
        y: Tensor = self.norm(x)
        return y

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped float32 logits [..., vocab_size] of hidden states [..., C]."""
        logits = F.linear(hidden, self.head.to(hidden.dtype)).float()
        return reference.soft_cap(logits, self.config.final_logit_soft_cap)

    def likeliest(self, hidden: Tensor, count: int) -> Tensor:
        """The token [B] of the largest logit for hidden states [B, C], of the first `count` tokens."""
        if self.screened is None or torch.is_grad_enabled():
            return self.logits(hidden)[:, :count].argmax(dim=-1)
        return self.screened.argmax(hidden, count)  # the soft-cap changes no order
