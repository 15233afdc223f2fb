"""Muon, and Muon with AdamW beside it.

Muon (Keller Jordan, kellerjordan.github.io/posts/muon) replaces each matrix's momentum by the nearest
orthogonal matrix, found by five Newton-Schulz steps. Matrices of one shape are stacked and run as one
batched product. `MuonAdamW` sends the body's 2-D matrices to Muon and embeddings, head and norms to
AdamW; it is one `Optimizer`, so loss scalers, schedulers and checkpoints see ordinary groups.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7
AdjustLr = Literal["original", "match_rms_adamw"]


def newton_schulz(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximate orthogonalisation U S' V^T, S' about 1, of matrices [n, A, B]; returned in `dtype`.

    bf16 is enough where the hardware multiplies it; elsewhere (Turing) pass float32. The Gram-matrix
    variant is faster and breaks on ill-conditioned gradients, so the plain iteration stays.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(EPSILON)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def lr_ratio(rows: int, columns: int, adjust_lr: AdjustLr) -> float:
    """Factor on the learning rate that evens out the update's size over shapes."""
    if adjust_lr == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


class Muon(torch.optim.Optimizer):
    """Muon for 2-D parameters; equal step for step to torch.optim.Muon where their options coincide.

    `weight_decay` is decoupled; with `use_cautious_decay` it acts only where the update also shrinks the
    weight. ValueError for parameters that are not 2-D.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        use_nesterov: bool = True,
        use_cautious_decay: bool = False,
        num_newton_schulz_steps: int = 5,
        adjust_lr: AdjustLr = "original",
        newton_schulz_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._dtype = newton_schulz_dtype
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "use_nesterov": use_nesterov,
            "use_cautious_decay": use_cautious_decay,
            "num_newton_schulz_steps": num_newton_schulz_steps,
            "adjust_lr": adjust_lr,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes 2-D parameters only; one has shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._step_shape(group, shape, parameters)
        return loss

    def _step_shape(self, group: dict[str, Any], shape: torch.Size, parameters: list[Tensor]) -> None:
        """Update all matrices of one shape; lists of tensors go through one call where PyTorch has one."""
        momentum = group["momentum"]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum) if group["use_nesterov"] else buffers
        # A stack runs as one product, which a GPU needs; a CPU is as fast with one matrix at a time, in less memory.
        stacks = [torch.stack(list(updates))] if parameters[0].is_cuda else [update.unsqueeze(0) for update in updates]
        steps = group["num_newton_schulz_steps"]
        directions = [d.to(parameters[0].dtype) for stack in stacks for d in newton_schulz(stack, steps, self._dtype)]
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        step_size = lr * lr_ratio(shape[0], shape[1], group["adjust_lr"])
        if decay and group["use_cautious_decay"]:
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.mul_(1 - decay * (direction * parameter > 0))
        elif decay:
            torch._foreach_mul_(parameters, 1 - decay)
        torch._foreach_add_(parameters, directions, alpha=-step_size)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes this parameter: 2-D and hidden, so neither embedding nor output head."""
    return parameter.ndim == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight"))


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the hidden matrices, fused AdamW for embeddings, head and vectors, as one optimizer.

    Every group is an ordinary entry of `param_groups` with a `name` (`muon`, `matrices`, `embedding`,
    `vectors`) and its own `lr`, so each follows its own schedule, and a loss scaler unscales all of them in
    one call. `use_muon=False` gives the hidden matrices to AdamW at `adamw_lr`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        use_muon: bool = True,
        muon_lr: float = 0.02,
        muon_momentum: float = 0.95,
        muon_weight_decay: float = 0.0,
        adamw_lr: float = 3e-3,
        embedding_lr: float = 6e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_weight_decay: float = 0.0,
        num_newton_schulz_steps: int = 5,
        newton_schulz_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        matrices: list[nn.Parameter] = []
        embedding: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if is_matrix(name, parameter):
                matrices.append(parameter)
            else:
                (embedding if parameter.ndim == 2 else vectors).append(parameter)
        groups: list[dict[str, Any]] = [
            {"name": "embedding", "params": embedding, "lr": embedding_lr, "weight_decay": adamw_weight_decay},
            {"name": "vectors", "params": vectors, "lr": adamw_lr, "weight_decay": 0.0},
        ]
        self._muon: Muon | None = None
        if use_muon:
            self._muon = Muon(
                [{"name": "muon", "params": matrices}],
                lr=muon_lr,
                momentum=muon_momentum,
                weight_decay=muon_weight_decay,
                use_cautious_decay=True,
                num_newton_schulz_steps=num_newton_schulz_steps,
                newton_schulz_dtype=newton_schulz_dtype,
            )
        else:
            groups.insert(
                0, {"name": "matrices", "params": matrices, "lr": adamw_lr, "weight_decay": adamw_weight_decay}
            )
        self._adamw = torch.optim.AdamW(groups, lr=adamw_lr, betas=betas, eps=1e-10, fused=True)
        self._parts: list[torch.optim.Optimizer] = [part for part in (self._muon, self._adamw) if part is not None]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        # The parts' own group dictionaries, so that a learning rate set here is the one they use.
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of Muon, then of AdamW."""
        loss = closure() if closure is not None else None
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The parts' states, in order."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; ValueError where the optimizers or groups differ."""
        parts = state_dict["parts"]
        if len(parts) != len(self._parts):
            raise ValueError("the saved optimizer is of another kind (muon or adamw)")
        for part, saved in zip(self._parts, parts, strict=True):
            part.load_state_dict(saved)
        self.param_groups = [group for part in self._parts for group in part.param_groups]
