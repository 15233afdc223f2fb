"""The transformer against Transformers' Qwen3, Llama, BitNet and Gemma 2, and what must not change its numbers."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.integrations.bitnet import ActQuant
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from smelter.bitnet import bit_linears
from smelter.decoding.kv_cache import KVCache
from smelter.kernels import attention, reference
from smelter.model import Model
from tests import tiny

TOKENS = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(1))
UNCAPPED: dict[str, Any] = {"attn_logit_soft_cap": 0.0, "final_logit_soft_cap": 0.0, "activation_quant": "none"}


def baked_weights(model: Model) -> dict[str, Tensor]:
    """Weights under Transformers' names, ternary values baked in."""
    ternary = {f"{name}.weight": layer.trits.float() * layer.scale for name, layer in bit_linears(model)}
    weights = {name: ternary.get(name, tensor) for name, tensor in model.state_dict().items()}
    return {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in weights.items()}


def transformers_model(model: Model, kind: str = "Qwen3", **options: Any) -> Any:
    """Transformers' model with the same weights."""
    config = model.config
    theirs = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(
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
            **options,
        )
    )
    weights = baked_weights(model)
    if kind == "BitNet":
        names = {"self_attn.sub_norm": "self_attn.attn_sub_norm", "mlp.sub_norm": "mlp.ffn_sub_norm"}
        for ours, other in names.items():
            weights = {name.replace(ours, other): tensor for name, tensor in weights.items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set())
    theirs.tie_weights()
    return theirs.eval()


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal but for `tolerance` of the largest value."""
    torch.testing.assert_close(ours, theirs, atol=tolerance * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("use_ternary", [True, False])
@pytest.mark.parametrize(("num_kv_heads", "tie", "rope_base"), [(2, True, 1e4), (4, False, 1e6), (1, True, 500.0)])
@torch.no_grad()
def test_logits_equal_qwen3(use_ternary: bool, num_kv_heads: int, tie: bool, rope_base: float) -> None:
    model = tiny.model(
        use_ternary=use_ternary, num_kv_heads=num_kv_heads, tie_embeddings=tie, rope_base=rope_base, **UNCAPPED
    )
    assert_near(model.logits(model(TOKENS)), transformers_model(model)(TOKENS).logits)


@torch.no_grad()
def test_logits_equal_llama_without_qk_norm() -> None:
    model = tiny.model(use_qk_norm=False, **UNCAPPED)
    assert_near(model.logits(model(TOKENS)), transformers_model(model, "Llama")(TOKENS).logits)


@torch.no_grad()
def test_logits_equal_bitnet_with_sub_norm() -> None:
    model = tiny.model(use_qk_norm=False, use_sub_norm=True, **UNCAPPED)
    assert_near(model.logits(model(TOKENS)), transformers_model(model, "BitNet", hidden_act="silu")(TOKENS).logits)


@torch.no_grad()
def test_logits_equal_qwen3_with_transformers_int8_activations() -> None:
    model = tiny.model(**{**UNCAPPED, "activation_quant": "token"})
    theirs = transformers_model(model)
    hooks = 0
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, inputs: (ActQuant.apply(inputs[0]), *inputs[1:]))
            hooks += 1
    assert hooks == len(list(bit_linears(model)))
    with torch.compiler.set_stance("force_eager"):
        expected = theirs(TOKENS).logits
    # An activation within rounding of two int8 values may take the other one, and what follows from it.
    error = (model.logits(model(TOKENS)) - expected).abs() / expected.abs().max()
    assert float(error.median()) < 1e-6
    assert float(error.max()) < 2e-2
    unquantised = (transformers_model(model)(TOKENS).logits - expected).abs() / expected.abs().max()
    assert float(unquantised.median()) > 1e-4


def test_gradients_equal_qwen3() -> None:
    model = tiny.model(use_ternary=False, **UNCAPPED)
    theirs = transformers_model(model)
    labels = torch.roll(TOKENS, -1, 1)
    for logits in (model.logits(model(TOKENS)), theirs(TOKENS).logits):
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        grad = expected[f"model.{name}"].grad
        assert parameter.grad is not None
        assert grad is not None
        assert_near(parameter.grad, grad)


@torch.no_grad()
def test_cached_logits_equal_cached_qwen3() -> None:
    model = tiny.model(**UNCAPPED)
    theirs = transformers_model(model)
    cache, past = KVCache(model.config, 2, 40, torch.float32, "cpu"), transformers.DynamicCache()
    for start, end in ((0, 17), (17, 18), (18, 40)):
        positions = torch.arange(start, end).expand(2, -1)
        mask = cache.advance(positions, end)
        ours = model.logits(model(TOKENS[:, start:end], positions=positions, cache=cache, mask=mask))
        assert_near(ours, theirs(TOKENS[:, start:end], past_key_values=past, use_cache=True).logits)


class ListCache:
    """The least that the model asks of a cache."""

    def __init__(self) -> None:
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.stored:
            earlier_k, earlier_v = self.stored[layer]
            k, v = torch.cat((earlier_k, k), dim=2), torch.cat((earlier_v, v), dim=2)
        self.stored[layer] = k, v
        return k, v


@torch.no_grad()
def test_any_cache_gives_the_uncached_states() -> None:
    model, cache = tiny.model(activation_quant="none"), ListCache()
    whole = model(TOKENS)
    for start, end in ((0, 11), (11, 12), (12, 40)):
        positions = torch.arange(start, end).expand(2, -1)
        mask = torch.arange(end) <= positions[:, None, :, None]
        assert_near(model(TOKENS[:, start:end], positions=positions, cache=cache, mask=mask), whole[:, start:end])


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


def test_attention_without_mask_is_causal() -> None:
    q, k, v = (torch.randn(1, heads, 9, 8) for heads in (2, 1, 1))
    mask = reference.causal_mask(None, 9, q.device)
    torch.testing.assert_close(
        attention(q, k, v, 50.0, mask=None, docs=None), attention(q, k, v, 50.0, mask=mask, docs=None)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.015)])
@torch.no_grad()
def test_half_precision_is_near_float32(dtype: torch.dtype, tolerance: float) -> None:
    model, half = tiny.model(activation_quant="none"), tiny.model(activation_quant="none", dtype=dtype)
    expected, hidden = model(TOKENS), half(TOKENS)
    assert hidden.dtype == dtype
    assert half.logits(hidden).dtype == torch.float32
    assert float((hidden.float() - expected).norm() / expected.norm()) < tolerance


@torch.no_grad()
def test_activations_in_blocks_of_256_are_nearer_than_whole_tokens() -> None:
    shape: dict[str, Any] = {"hidden_size": 512, "num_heads": 8, "head_dim": 64, "intermediate_size": 768}
    exact, block, token = (tiny.model(activation_quant=kind, **shape)(TOKENS) for kind in ("none", "block256", "token"))
    errors = [float((states - exact).norm() / exact.norm()) for states in (block, token)]
    assert 0 < errors[0] < errors[1] < 0.2


@torch.no_grad()
def test_positions_default_to_the_place_in_the_row() -> None:
    model = tiny.model()
    positions = torch.arange(40).expand(2, -1)
    assert_near(model(TOKENS, positions=positions), model(TOKENS))


@torch.no_grad()
def test_positions_may_lie_beyond_the_context_and_only_distances_count() -> None:
    model = tiny.model(activation_quant="none")  # where a hair may round a value to the next step
    positions = torch.arange(40).expand(2, -1)
    assert_near(model(TOKENS, positions=positions + 1_000), model(TOKENS), 1e-3)
    positions = positions + 200 * (positions >= 20)
    assert (model(TOKENS, positions=positions) - model(TOKENS))[:, 20:].abs().max() > 1e-2


def test_a_meta_model_takes_no_memory_and_has_every_name() -> None:
    with torch.device("meta"):
        meta = Model(tiny.TINY)
    assert {tensor.device.type for tensor in meta.state_dict().values()} == {"meta"}
    assert list(meta.state_dict()) == list(tiny.model().state_dict())


def test_initial_states_neither_vanish_nor_explode() -> None:
    torch.manual_seed(0)
    model = Model(replace(tiny.TINY, num_layers=8))
    logits = model.logits(model(TOKENS))
    loss = F.cross_entropy(logits.flatten(0, 1), TOKENS.roll(-1, 1).flatten())
    loss.backward()
    # Before training every token is about equally likely.
    assert float(loss.detach()) == pytest.approx(torch.tensor(512.0).log().item(), rel=0.05)
    norms = [float(layer.weight.grad.norm()) for _, layer in bit_linears(model) if layer.weight.grad is not None]
    assert len(norms) == 8 * 7
    assert max(norms) / min(norms) < 100


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("use_gradient_checkpointing", [False, True])
def test_compiled_blocks_equal_eager_ones(use_gradient_checkpointing: bool) -> None:
    def run(use_compile: bool) -> list[Tensor]:
        model = tiny.model(activation_quant="none")
        model.use_gradient_checkpointing = use_gradient_checkpointing
        if use_compile:
            for block in model.layers:
                block.compile()
        hidden = model(TOKENS)
        model.logits(hidden).logsumexp(-1).mean().backward()
        return [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    for got, want in zip(run(True), run(False), strict=True):
        assert_near(got, want, 1e-4)


def test_more_tokens_than_the_context_are_refused() -> None:
    made = tiny.model()
    with pytest.raises(ValueError, match="97 tokens: the model's context is 96"):
        made(torch.zeros(1, 97, dtype=torch.long))
