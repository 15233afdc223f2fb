"""Does our training step on this device compute what the specification says?

The specification is the model written out with `kernels.reference` alone and a dense loss, differentiated by
autograd; nothing of it is fused, compiled or chunked. Against it stands the step as `smelter train` runs it:
compiled blocks, whatever kernels the device gets, chunked loss. Same weights, same tokens, three times:

* full precision in float32, with weights so strong that both soft-caps bend: every operation is smooth, so both must
  agree but for rounding;
* ternary in float32: a value that rounding pushes over an edge between two of the 255 levels moves a whole level, and
  twelve layers amplify it. What `NOISE` in the embedding does to the specification's own gradients is measured, and
  ours may be `SLACK` times that away;
* ternary in the compute dtype: ours may be `SLACK` times as far from float32 as the specification in that dtype is.

Every parameter is held to it, not only all together. Exit code 1 where one fails.

    python benchmarks/agreement.py [--quick] [--json] [--device cpu] [--dtype bf16] [--preset 100m] [--eager]
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smelter.bitnet import BitLinear
from smelter.config import ModelConfig, preset
from smelter.kernels import reference
from smelter.loss import LossConfig, chunked_loss, dense_loss
from smelter.model import Model, RMSNorm
from smelter.run import device as hardware

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE = 2.0**10
"""For fp16, whose smallest gradients would vanish."""
SLACK = 2.0
SMOOTH_TOLERANCE = 5e-4
"""Relative distance of a gradient where nothing is quantised, in float32."""

NOISE = 1e-5
"""Relative; rounding and approximations (of tanh, say) in a fast path in float32 stay below it."""

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Agreement:
    """Relative distances to the float32 specification: of the loss, of all gradients together, of the worst parameter.

    `reference_gradient` is the distance that the specification itself shows under rounding, over all gradients;
    `worst_parameter` is the one nearest to (or furthest beyond) the distance allowed to it.
    """

    what: str
    loss: float
    gradient: float
    reference_gradient: float
    worst_parameter: str
    worst_gradient: float
    worst_allowed: float

    @property
    def holds(self) -> bool:
        """Whether the step is right; NaN never is."""
        return self.worst_gradient <= self.worst_allowed and self.loss <= max(1e-5, self.worst_allowed)


def make_model(config: ModelConfig, dtype: torch.dtype, device: torch.device, *, strong: bool = False) -> Model:
    """The same initial weights for every dtype; `strong` ones reach both soft-caps, as a trained model's do."""
    torch.manual_seed(0)
    model = Model(config, dtype)
    model.trit_dtype = torch.int8  # as in training
    if strong:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.add_(0.2 * torch.randn_like(parameter))
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    parameter.mul_(2)
            model.embed_tokens.weight.mul_(10)
            model.norm.weight.mul_(4)
    model = model.to(device)
    model.quantize_weights()
    return model


def specified_hidden(model: Model, tokens: Tensor) -> Tensor:
    """Normalised hidden states [B, T, C] of tokens [B, T] by `kernels.reference` alone, in the model's dtype."""
    config = model.config

    def norm(x: Tensor, layer: RMSNorm) -> Tensor:
        return reference.rms_norm(x, layer.weight, layer.eps)

    def linear(x: Tensor, layer: BitLinear) -> Tensor:
        if not layer.use_ternary:
            return F.linear(x, layer.weight.to(x.dtype))
        trits, scale = reference.quantize_weight(layer.weight.detach())
        return reference.ternary_linear(x, layer.weight, trits.to(x.dtype), scale, layer.activation_quant)

    def heads(x: Tensor) -> Tensor:  # [B, T, heads * D] -> [B, T, heads, D]
        return x.view(*x.shape[:-1], -1, config.head_dim)

    length = tokens.shape[1]
    cos, sin = model.cos[:length], model.sin[:length]
    mask = reference.causal_mask(None, length, tokens.device)
    x = F.embedding(tokens, model.embed_tokens.weight).to(model.compute_dtype)
    block: Any
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        inputs = norm(x, block.input_layernorm)
        q, k, v = (heads(linear(inputs, layer)) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
        if config.use_qk_norm:
            q, k = norm(q, attention.q_norm), norm(k, attention.k_norm)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
        out = reference.attention(q, k, v, mask, config.attn_logit_soft_cap).transpose(1, 2).flatten(-2)
        if config.use_sub_norm:
            out = norm(out, attention.sub_norm)
        x = x + linear(out, attention.o_proj)
        inputs = norm(x, block.post_attention_layernorm)
        hidden = F.silu(linear(inputs, mlp.gate_proj)) * linear(inputs, mlp.up_proj)
        if config.use_sub_norm:
            hidden = norm(hidden, mlp.sub_norm)
        x = x + linear(hidden, mlp.down_proj)
    return norm(x, model.norm)


def _backward(model: Model, total: Tensor) -> Gradients:
    scale = LOSS_SCALE if model.compute_dtype == torch.float16 else 1.0
    (total * scale).backward()
    gradients: Gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad / scale
        parameter.grad = None
    return gradients


def _loss_config(model: Model) -> LossConfig:
    return LossConfig(soft_cap=model.config.final_logit_soft_cap, z_loss=1e-4)


def specified_step(model: Model, tokens: Tensor) -> tuple[float, Gradients]:
    """Loss and gradients of tokens [B, T + 1] by the specification."""
    hidden = specified_hidden(model, tokens[:, :-1]).flatten(0, 1)
    loss = dense_loss(hidden, model.head, tokens[:, 1:].flatten(), _loss_config(model))
    return float(loss.total.detach()), _backward(model, loss.total)


def our_step(model: Model, tokens: Tensor, use_compile: bool) -> tuple[float, Gradients]:
    """Loss and gradients of tokens [B, T + 1] as in training; compiles the model's blocks."""
    if use_compile:
        for block in model.layers:
            block.compile()
    hidden = model(tokens[:, :-1]).flatten(0, 1)
    loss = chunked_loss(
        hidden, model.head, tokens[:, 1:].flatten(), _loss_config(model), use_compile=use_compile, chunk_size=512
    )
    return float(loss.total.detach()), _backward(model, loss.total)


def _distance(got: Gradients, want: Gradients) -> float:
    """Relative distance of all gradients as one vector."""
    difference = sum(float((got[name] - want[name]).square().sum()) for name in want)
    return float((difference / sum(float(grad.square().sum()) for grad in want.values())) ** 0.5)


def _judge(what: str, losses: tuple[float, float], ours: Gradients, exact: Gradients, rounded: Gradients) -> Agreement:
    """`rounded` are the specification's gradients under rounding; `exact` themselves where none is allowed for."""
    worst, worst_distance, worst_allowed = "", 0.0, 1.0
    for name in exact:
        one = {name: exact[name]}
        allowed = SLACK * _distance({name: rounded[name]}, one) + SMOOTH_TOLERANCE
        distance = _distance({name: ours[name]}, one)
        if not distance / allowed <= worst_distance / worst_allowed:
            worst, worst_distance, worst_allowed = name, distance, allowed
    return Agreement(
        what=what,
        loss=abs(losses[0] - losses[1]) / abs(losses[1]),
        gradient=_distance(ours, exact),
        reference_gradient=_distance(rounded, exact),
        worst_parameter=worst,
        worst_gradient=worst_distance,
        worst_allowed=worst_allowed,
    )


def compare(
    config: ModelConfig, dtype: str, device: torch.device, *, batch_size: int = 1, use_compile: bool = True
) -> list[Agreement]:
    """Compare a step of `batch_size` sequences of the model's whole context in the three ways named above."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch_size, config.max_seq_len + 1)
    tokens = torch.randint(0, config.vocab_size, shape, generator=generator).to(device)
    found = []

    smooth = replace(config, use_ternary=False)
    model = make_model(smooth, torch.float32, device, strong=True)
    loss, exact = specified_step(model, tokens)
    our_loss, ours = our_step(model, tokens, use_compile)
    found.append(_judge("fp32, full precision", (our_loss, loss), ours, exact, exact))

    model = make_model(config, torch.float32, device)
    loss, exact = specified_step(model, tokens)
    our_loss, ours = our_step(model, tokens, use_compile)
    model = make_model(config, torch.float32, device)
    with torch.no_grad():
        noise = torch.randn(model.embed_tokens.weight.shape, generator=generator).to(device)
        model.embed_tokens.weight.mul_(1 + NOISE * noise)
    rounded = specified_step(model, tokens)[1]
    found.append(_judge("fp32, ternary", (our_loss, loss), ours, exact, rounded))

    if dtype != "fp32":
        model = make_model(config, DTYPES[dtype], device)
        rounded = specified_step(model, tokens)[1]
        our_loss, ours = our_step(model, tokens, use_compile)
        found.append(_judge(f"{dtype}, ternary", (our_loss, loss), ours, exact, rounded))
    return found


def affordable_length(device: torch.device, length: int) -> int:
    """`length`, or 512 on a small card: the specification keeps every score, some 12 GiB of the 100M at 2,048."""
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 24 * 2**30:
        return min(length, 512)
    return length


def table(found: list[Agreement]) -> str:
    """The figures for people."""
    lines = [f"{'':22} {'loss':>9} {'gradients':>10} {'rounding alone':>15}  worst parameter (allowed)"]
    for each in found:
        lines.append(
            f"{each.what:22} {each.loss:9.1e} {each.gradient:10.1e} {each.reference_gradient:15.1e}  "
            f"{each.worst_parameter} {each.worst_gradient:.1e} ({each.worst_allowed:.1e})"
            f"{'' if each.holds else '  WRONG'}"
        )
    return "\n".join(lines)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="preset tiny at 128 tokens, without the compiler")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="compute dtype")
    parser.add_argument("--preset", default="100m", help="sizes of the model")
    parser.add_argument("--seq-len", type=int, default=2_048, help="tokens of each sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    device = hardware.pick_device(options.device)
    dtypes = {value: name for name, value in DTYPES.items()}
    dtype = options.dtype if options.dtype != "auto" else dtypes[hardware.pick_dtype("auto", device, is_training=True)]
    name, seq_len = ("tiny", 128) if options.quick else (options.preset, affordable_length(device, options.seq_len))
    config = replace(preset(name).model, max_seq_len=seq_len)
    use_compile = not (options.eager or options.quick)
    found = compare(config, dtype, device, batch_size=options.batch, use_compile=use_compile)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {options.batch} x {seq_len} tokens, {where}: relative distances to the float32 specification")
    print(table(found))
    if options.json:
        values = {each.what: asdict(each) | {"holds": each.holds} for each in found}
        print(json.dumps({"benchmark": "agreement", "device": where, "preset": name, "results": values}))
    if not all(each.holds for each in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
