"""The transformer against Transformers' Qwen3 and Gemma 2, and what must not change its numbers."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from smelter.cache import KVCache
from smelter.config import PRESETS, ModelConfig
from smelter.kernels import attention, blocked_attention, reference
from smelter.model import Model

TOKENS = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(1))


def as_qwen3(model: Model) -> transformers.Qwen3ForCausalLM:
    """Transformers' model with the same weights, ternary values baked in."""
    config = model.config
    qwen3 = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    weights = {}
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        layer = modules[name.rpartition(".")[0]]
        if hasattr(layer, "trits"):
            tensor = layer.trits.float() * layer.scale
        weights[name if name.startswith("lm_head") else f"model.{name}"] = tensor
    missing, unexpected = qwen3.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    qwen3.tie_weights()
    return qwen3.eval()


UNCAPPED: dict[str, Any] = {"attn_logit_soft_cap": 0.0, "final_logit_soft_cap": 0.0, "activation_quant": "none"}


@pytest.mark.parametrize("use_ternary", [True, False])
@pytest.mark.parametrize(("num_kv_heads", "tie"), [(2, True), (4, False)])
@torch.no_grad()
def test_logits_equal_qwen3(use_ternary: bool, num_kv_heads: int, tie: bool) -> None:
    model = tiny.model(use_ternary=use_ternary, num_kv_heads=num_kv_heads, tie_embeddings=tie, **UNCAPPED)
    expected = as_qwen3(model)(TOKENS).logits
    torch.testing.assert_close(model.logits(model(TOKENS)), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@torch.no_grad()
def test_cached_logits_equal_cached_qwen3() -> None:
    model = tiny.model(**UNCAPPED)
    qwen3 = as_qwen3(model)
    cache, past = KVCache(model.config, 2, 40, torch.float32, "cpu"), transformers.DynamicCache()
    for start, end in ((0, 17), (17, 18), (18, 40)):
        positions = torch.arange(start, end).expand(2, -1)
        mask = cache.advance(positions, end)
        ours = model.logits(model(TOKENS[:, start:end], positions=positions, cache=cache, mask=mask))
        theirs = qwen3(TOKENS[:, start:end], past_key_values=past, use_cache=True).logits
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("cap", [2.0, 50.0])
def test_attention_cap_equals_gemma2(cap: float) -> None:
    q, k, v = (torch.randn(2, heads, 12, 16) * 3 for heads in (4, 2, 2))
    mask = reference.causal_mask(None, 12, torch.device("cpu"))
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    additive = torch.zeros(12, 12).masked_fill(~mask, float("-inf"))[None, None]
    expected, _ = eager_attention_forward(module, q, k, v, additive, scaling=16**-0.5, softcap=cap)
    torch.testing.assert_close(reference.attention(q, k, v, mask, cap).transpose(1, 2), expected)


def test_final_cap_equals_gemma2() -> None:
    model = tiny.model(final_logit_soft_cap=3.0)
    logits = replace(model.config, final_logit_soft_cap=0.0)
    plain = Model(logits)
    plain.load_state_dict(model.state_dict())
    hidden = torch.randn(3, 64)
    torch.testing.assert_close(model.logits(hidden), torch.tanh(plain.logits(hidden) / 3.0) * 3.0)


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_blocked_attention_equals_the_reference(length: int, cap: float) -> None:
    q, k, v = (torch.randn(2, heads, length, 8, requires_grad=True) for heads in (4, 2, 2))
    dense = reference.attention(q, k, v, reference.causal_mask(None, length, q.device), cap)
    blocked = blocked_attention(q, k, v, cap)
    torch.testing.assert_close(blocked, dense)
    weight = torch.randn_like(dense)
    expected = torch.autograd.grad((dense * weight).sum(), (q, k, v))
    for got, want in zip(torch.autograd.grad((blocked * weight).sum(), (q, k, v)), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it() -> None:
    model = tiny.model()
    changed = TOKENS.clone()
    changed[:, 20:] = 7
    torch.testing.assert_close(model(TOKENS)[:, :20], model(changed)[:, :20], atol=0, rtol=0)


@torch.no_grad()
def test_document_mask_equals_documents_apart() -> None:
    model = tiny.model(activation_quant="none")
    docs = torch.tensor([[0] * 15 + [1] * 25] * 2)
    packed = model(TOKENS, docs)
    torch.testing.assert_close(packed[:, :15], model(TOKENS[:, :15]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed[:, 15:], model(TOKENS[:, 15:]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(packed[:, 15:], model(TOKENS)[:, 15:], atol=1e-2)


def test_gradient_checkpointing_changes_no_bit() -> None:
    def gradients(use_checkpointing: bool) -> list[Tensor]:
        model = tiny.model()
        model.use_gradient_checkpointing = use_checkpointing
        model.logits(model(TOKENS)).logsumexp(-1).mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, atol=0, rtol=0)


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 1}, {"tie_embeddings": False}, {"use_qk_norm": False}, {"use_sub_norm": True}]
)
def test_parameter_estimate_is_the_real_count(name: str, changes: dict[str, Any]) -> None:
    config = replace(PRESETS[name].model, **changes)
    with torch.device("meta"):
        model = Model(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_params_estimate


def test_presets_weigh_what_their_names_say() -> None:
    for name, millions in (("50m", 50), ("100m", 100), ("125m", 125), ("300m", 300)):
        assert PRESETS[name].model.num_params_estimate / 1e6 == pytest.approx(millions, rel=0.05)
    assert ModelConfig().kv_cache_size_per_token == 1_024
    assert ModelConfig(num_kv_heads=12).kv_cache_size_per_token == 3_072


def test_attention_without_mask_is_causal() -> None:
    q, k, v = (torch.randn(1, heads, 9, 8) for heads in (2, 1, 1))
    mask = reference.causal_mask(None, 9, q.device)
    torch.testing.assert_close(attention(q, k, v, None, 50.0), attention(q, k, v, mask, 50.0))
