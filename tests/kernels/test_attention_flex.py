"""FlexAttention with our cap and mask is the specification: forward on a CPU, forward and backward on a GPU."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as flex

from smelter.kernels import reference
from smelter.kernels.attention_flex import block_mask, flex_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    # What PyTorch's compiler does with an index inside a mask.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def case(
    batch: int, heads: int, groups: int, length: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, h, length, dim, generator=generator).mul(3).to(dtype) for h in (heads, groups, groups, heads)
    ]


def documents(batch: int, length: int, seed: int = 0) -> Tensor:
    """Ids that grow along each row, as packing gives them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, length, generator=generator) < 5 / length).long().cumsum(-1)


def specified(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, cap: float) -> Tensor:
    return reference.attention(q, k, v, reference.causal_mask(doc_ids, q.shape[2], q.device), cap)


@pytest.mark.parametrize(
    ("length", "heads", "groups", "cap", "packed"),
    [
        (1, 4, 4, 0.0, False),
        (37, 6, 2, 5.0, True),
        (128, 6, 2, 50.0, False),
        (300, 3, 1, 5.0, True),
        (300, 4, 4, 5.0, False),
        (300, 6, 2, 0.0, True),
    ],
)
def test_forward(length: int, heads: int, groups: int, cap: float, packed: bool) -> None:
    q, k, v, _ = case(2, heads, groups, length, 16)
    doc_ids = documents(2, length) if packed else None
    got = flex_attention(q, k, v, block_mask(doc_ids, length, q.device), cap)
    torch.testing.assert_close(got, specified(q, k, v, doc_ids, cap), rtol=1e-4, atol=1e-5)


def test_the_map_of_blocks_leaves_out_what_nobody_may_see() -> None:
    length = 1_024
    causal = block_mask(None, length, torch.device("cpu"))
    assert causal is block_mask(None, length, torch.device("cpu"))
    assert causal.sparsity() == pytest.approx(100 * 28 / 64)  # of 8 x 8 blocks those above the diagonal
    doc_ids = torch.arange(length).div(256, rounding_mode="floor")[None]
    packed = block_mask(doc_ids, length, torch.device("cpu"))
    assert packed.sparsity() == pytest.approx(100 * (64 - 12) / 64)  # four documents of two blocks each
    positions = torch.arange(length)
    dense = packed.mask_mod(torch.tensor(0), torch.tensor(0), positions[:, None], positions[None, :])
    assert torch.equal(dense, reference.causal_mask(doc_ids, length, torch.device("cpu"))[0, 0])


def test_other_documents_are_the_same_program() -> None:
    """Compiled once, not again for each micro-step's documents: seen on the CPU, whatever runs the program."""
    counter = CompileCounter()
    create = torch.compile(flex.create_block_mask, dynamic=False, backend=counter)
    attend = torch.compile(flex_attention, dynamic=False, backend=counter)
    q, k, v, _ = case(2, 4, 2, 130, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "create_block_mask", create)
        for seed in range(3):
            doc_ids = documents(2, 130, seed)
            got = attend(q, k, v, block_mask(doc_ids, 130, q.device), 5.0)
            torch.testing.assert_close(got, specified(q, k, v, doc_ids, 5.0), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("cap", [0.0, 50.0])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [128, 300])
def test_compiled_forward_and_backward(cap: float, packed: bool, length: int) -> None:
    device = torch.device("cuda")
    q, k, v, grad = (tensor.to(device) for tensor in case(2, 6, 2, length, 64))
    doc_ids = documents(2, length).to(device) if packed else None
    mask = block_mask(doc_ids, length, device)
    q, k, v = inputs = [tensor.bfloat16().requires_grad_() for tensor in (q, k, v)]
    out = flex_attention(q, k, v, mask, cap)
    q, k, v = exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    want = specified(q, k, v, doc_ids, cap)
    for got, expected in zip(
        [out, *torch.autograd.grad(out, inputs, grad.bfloat16())],
        [want, *torch.autograd.grad(want, exact, grad.bfloat16().float())],
        strict=True,
    ):
        error = (got.float() - expected).norm() / expected.norm()
        assert float(error) < 0.02
