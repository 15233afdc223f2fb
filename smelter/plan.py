"""What a run will cost, before it starts: parameters, tokens, FLOPs, memory and time (`--dry-run`).

Memory is counted from what training keeps: weights, gradients, optimizer state, trits, activations saved
for the backward pass, and the loss's chunk of logits. It is an estimate of the allocator's peak; the
processor's own libraries come on top.
"""

from dataclasses import dataclass

from smelter.config import Config


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, `flops` for the whole run, `seconds` at the given speed (None without one)."""

    num_params: int
    tokens: int
    flops: float
    weights_bytes: int
    activations_bytes: int
    loss_bytes: int
    seconds: float | None

    @property
    def peak_bytes(self) -> int:
        """Predicted peak memory of one device."""
        return self.weights_bytes + self.activations_bytes + self.loss_bytes

    def table(self) -> str:
        """The figures for people."""
        gib = 2**30
        rows = [
            ("parameters", f"{self.num_params:,}"),
            ("tokens", f"{self.tokens:,}" if self.tokens else "as many as the time allows"),
            ("FLOPs", f"{self.flops:.3g}" if self.tokens else "-"),
            ("weights, gradients, optimizer", f"{self.weights_bytes / gib:.2f} GiB"),
            ("activations of one micro-batch", f"{self.activations_bytes / gib:.2f} GiB"),
            ("logits chunk and head gradient", f"{self.loss_bytes / gib:.2f} GiB"),
            ("predicted peak memory", f"{self.peak_bytes / gib:.2f} GiB per device"),
            (
                "predicted time",
                "-" if self.seconds is None else f"{self.seconds / 3600:.2f} h at 40% of the measured peak",
            ),
        ]
        return "\n".join(f"{name:32} {value}" for name, value in rows)


def plan(config: Config, *, bytes_per_value: int, world_size: int = 1, peak_flops: float | None = None) -> Plan:
    """Count the cost of `config` with activations of `bytes_per_value` bytes; time at 40% of `peak_flops`."""
    model, training = config.model, config.training
    tokens = 0 if training.train_minutes else training.num_steps * training.total_batch_size
    flops = float(model.flops_per_token()) * tokens
    params, matrices = model.num_params_estimate, model.num_matrix_params
    # float32: weight and gradient; AdamW two moments, Muon one; trits in the compute dtype.
    moments = 2 * (params - matrices) + (1 if training.optimizer == "muon" else 2) * matrices
    weights = 4 * (2 * params + moments) + (bytes_per_value * matrices if model.use_ternary else 0)
    batch = training.device_batch_size * model.max_seq_len
    # Saved per token and layer: residual twice, quantised inputs (int8) of the projections, q, k, v, attention
    # output, gate, up and their product.
    layer = bytes_per_value * (4 * model.hidden_size + 3 * model.query_size + 2 * model.kv_size)
    layer += bytes_per_value * 3 * model.intermediate_size
    layer += 4 * model.hidden_size + model.query_size + model.intermediate_size
    scores = 4 * 2 * training.device_batch_size * model.num_heads * model.max_seq_len**2
    if training.use_gradient_checkpointing:
        activations = batch * (model.num_layers * bytes_per_value * model.hidden_size + layer) + scores
    else:
        activations = model.num_layers * (batch * layer + scores)
    chunk = min(training.loss_chunk_size, batch)
    loss = 3 * 4 * chunk * model.vocab_size + (4 + bytes_per_value) * model.vocab_size * model.hidden_size
    seconds = None
    if training.train_minutes:
        seconds = training.train_minutes * 60
    elif peak_flops:
        seconds = flops / (0.4 * peak_flops * world_size)
    return Plan(params, tokens, flops, weights, activations, loss, seconds)
