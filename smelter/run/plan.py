"""What a run will cost, before it starts: parameters, tokens, FLOPs, memory and time (`--dry-run`).

Memory is what the compiled training step keeps at its three highest moments: in the loss, where the last chunk of
logits stands beside everything saved for the backward pass; in the backward pass of the last block, which has freed
nothing yet; and in Muon's orthogonalisation of the most numerous shape. What the compiler saves was counted
(`tests/run/test_plan.py`); without it (eager blocks) a step saves about 1.7 times as much. On top come teachers, the
processor's libraries and what the allocator cannot reuse.
"""

from dataclasses import dataclass

from smelter.config import Config, ModelConfig

FLOAT = 4
"""Bytes of a float32: latent weights, gradients, optimizer state and statistics."""


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, `flops` for the whole run, `seconds` at the given speed (None without one)."""

    num_params: int
    tokens: int
    flops: float
    state_bytes: int
    """Weights, gradients, optimizer state and trits: there from the second micro-step on."""
    activations_bytes: int
    """Saved by the forward pass of one micro-batch for its backward pass."""
    loss_bytes: int
    """On top of the activations while the loss is computed."""
    backward_bytes: int
    """On top of the activations during the backward pass of one block."""
    optimizer_bytes: int
    """On top of the state during the optimizer's step; the activations are gone by then."""
    seconds: float | None

    @property
    def peak_bytes(self) -> int:
        """Predicted peak memory of one device."""
        micro_step = self.activations_bytes + max(self.loss_bytes, self.backward_bytes)
        return self.state_bytes + max(micro_step, self.optimizer_bytes)

    def table(self) -> str:
        """The figures for people."""

        def size(num_bytes: int) -> str:
            return f"{num_bytes / 1e9:.2f} GB"

        time = "-" if self.seconds is None else f"{self.seconds / 3600:.2f} h at 40% of the measured peak"
        rows = [
            ("parameters", f"{self.num_params:,}"),
            ("tokens", f"{self.tokens:,}" if self.tokens else "as many as the time allows"),
            ("FLOPs", f"{self.flops:.3g}" if self.tokens else "-"),
            ("weights, gradients, optimizer", size(self.state_bytes)),
            ("activations of one micro-batch", size(self.activations_bytes)),
            ("loss on top of them", size(self.loss_bytes)),
            ("or backward pass of a block", size(self.backward_bytes)),
            ("or, without them, Muon's step", size(self.optimizer_bytes)),
            ("predicted peak memory", f"{size(self.peak_bytes)} per device"),
            ("predicted time", time),
        ]
        return "\n".join(f"{name:32} {value}" for name, value in rows)


def block_bytes_per_token(model: ModelConfig, bytes_per_value: int, device_type: str) -> int:
    """Saved by one compiled block for each token.

    Query, key, value and gate, up come out of one product each and are saved as they are; the compiler makes their
    elementwise successors again. The int8 inputs of the four products it also makes again, unless Triton's
    kernels made them (CUDA): those it cannot see into.
    """
    hidden, query, kv, inner = model.hidden_size, model.query_size, model.kv_size, model.intermediate_size
    residual = 2 * hidden  # before attention and before the MLP
    attention = 2 * query + 2 * kv  # rotated queries and keys, values, output
    unnormed = query + 2 * kv if model.use_qk_norm else 0
    values = residual + attention + unnormed + 2 * inner  # gate, up
    head_statistics = model.num_heads + (model.num_heads + model.num_kv_heads) * model.use_qk_norm  # lse, 1 / rms
    if model.use_ternary and model.activation_quant == "token":
        int8_inputs = 2 * hidden + query + inner if device_type == "cuda" else 0
        return bytes_per_value * values + int8_inputs + FLOAT * (head_statistics + 6)  # 4 scales, 2 of 1 / rms
    # Layers with products of their own save their inputs in the compute dtype; values are then saved once only.
    values += 2 * hidden + query + inner - (kv if model.use_qk_norm else 0)
    return bytes_per_value * values + FLOAT * (head_statistics + 2)


def _activations(model: ModelConfig, tokens: int, block: int, bytes_per_value: int, use_recompute: bool) -> int:
    """Saved by the forward pass of `tokens` tokens, of which a block saves `block` bytes each."""
    # Each block's input alone where the rest is made again.
    blocks = model.num_layers * (bytes_per_value * model.hidden_size if use_recompute else block)
    # The last norm is not compiled: float32 input and normed values; its output, and that one's gradient; token ids.
    end = (2 * FLOAT + 2 * bytes_per_value) * model.hidden_size + 8
    casts = 0
    if not (model.use_ternary and model.activation_quant == "token") and not use_recompute:
        # Weights in the compute dtype, saved with the products.
        casts = bytes_per_value * model.num_matrix_params if bytes_per_value < FLOAT or model.use_ternary else 0
    return tokens * (blocks + end) + casts


def _loss(config: Config, tokens: int, bytes_per_value: int) -> int:
    """A chunk of logits; the head, its gradient in float32 and a chunk's share of it."""
    model, training = config.model, config.training
    head = model.vocab_size * model.hidden_size
    logits = min(training.loss_chunk_size, tokens) * model.vocab_size
    cast = bytes_per_value if bytes_per_value < FLOAT else 0
    # Compiled, the gradient takes the logits' place; eager, or with a teacher, five float32 temporaries of their size.
    temporaries = 0 if training.use_torch_compile and not config.distillation.num_teachers else 5 * FLOAT
    return (bytes_per_value + temporaries) * logits + (cast + FLOAT + bytes_per_value) * head


def _backward(model: ModelConfig, tokens: int, recomputed: int, bytes_per_value: int) -> int:
    """Temporaries of a block's backward pass, the `recomputed` bytes a token, and the head's gradient.

    With tied embeddings the head's gradient waits for the embedding's.
    """
    # Gradients of the MLP's product, of gate and up, of the residual stream and of the MLP's input.
    mlp = bytes_per_value * (3 * model.intermediate_size + 2 * model.hidden_size)
    # Output, its gradient and their product in float32, beside the gradient itself.
    attention = 3 * FLOAT * model.query_size + bytes_per_value * (model.query_size + model.hidden_size)
    weights = FLOAT * model.num_matrix_params // model.num_layers  # before they are added to the others
    head = FLOAT * model.vocab_size * model.hidden_size
    return tokens * (max(mlp, attention) + recomputed) + weights + head


def _optimizer(model: ModelConfig, newton_schulz_bytes: int, device_type: str) -> int:
    """Muon's temporaries for the shape with most values: all of its matrices at once, on a CPU one by one."""
    by_shape: dict[tuple[int, int], int] = {}
    hidden, query, kv, inner = model.hidden_size, model.query_size, model.kv_size, model.intermediate_size
    for shape in [(query, hidden), (hidden, query), *[(kv, hidden), (inner, hidden)] * 2, (hidden, inner)]:
        by_shape[shape] = by_shape.get(shape, 0) + model.num_layers
    largest = 0
    for (rows, columns), count in by_shape.items():
        # float32 updates and directions (or the stack); two iterates, the Gram matrix and its polynomial.
        iterates = 2 * newton_schulz_bytes * rows * columns
        squares = 2 * newton_schulz_bytes * min(rows, columns) ** 2
        at_once = count if device_type == "cuda" else 1
        largest = max(largest, count * 2 * FLOAT * rows * columns + at_once * (iterates + squares))
    return largest


def plan(
    config: Config,
    *,
    bytes_per_value: int,
    newton_schulz_bytes: int = 4,
    device_type: str = "cuda",
    world_size: int = 1,
    peak_flops: float | None = None,
) -> Plan:
    """Count the cost of `config` with activations of `bytes_per_value` bytes; time at 40% of `peak_flops`.

    Muon orthogonalises in values of `newton_schulz_bytes`: 2 when training in bf16, else 4.
    """
    model, training = config.model, config.training
    num_tokens = 0 if training.train_minutes else training.num_steps * training.total_batch_size
    flops = float(model.flops_per_token()) * num_tokens
    params, matrices = model.num_params_estimate, model.num_matrix_params
    is_muon = training.optimizer == "muon"
    moments = 2 * params - (matrices if is_muon else 0)  # AdamW keeps two a parameter, Muon one
    trits = 2 * matrices if model.use_ternary else 0  # int8, and those of the last log line, to count flips
    tokens = training.device_batch_size * model.max_seq_len  # of a micro-batch
    block = block_bytes_per_token(model, bytes_per_value, device_type)
    recomputed = block if training.use_gradient_checkpointing else 0
    seconds = None
    if training.train_minutes:
        seconds = training.train_minutes * 60
    elif peak_flops:
        seconds = flops / (0.4 * peak_flops * world_size)
    return Plan(
        num_params=params,
        tokens=num_tokens,
        flops=flops,
        state_bytes=FLOAT * (2 * params + moments) + trits,
        activations_bytes=_activations(model, tokens, block, bytes_per_value, training.use_gradient_checkpointing),
        loss_bytes=_loss(config, tokens, bytes_per_value),
        backward_bytes=_backward(model, tokens, recomputed, bytes_per_value),
        optimizer_bytes=_optimizer(model, newton_schulz_bytes, device_type) if is_muon else 0,
        seconds=seconds,
    )
