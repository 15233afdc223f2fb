"""The capability table, row by row, without a GPU; and that a machine without Triton needs none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smelter.kernels import capability, native
from smelter.kernels.capability import Capability, cpu_table, cuda_table

CUDA = [(7, 0), (7, 2), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
EVERY_ROW = [
    *(cpu_table(bf16, int8) for bf16 in (False, True) for int8 in (False, True)),
    cpu_table(True, True, has_tiles=True),
    *(cuda_table(*version, triton, works) for version in CUDA for triton in (False, True) for works in (False, True)),
]


@pytest.mark.parametrize(
    ("row", "dtype", "int8_product", "attention", "use_triton"),
    [
        (cpu_table(True, True), torch.bfloat16, "cpu", "blocked", False),
        (cpu_table(True, True, has_tiles=True), torch.bfloat16, "cpu", "tiled", False),
        (cpu_table(False, False), torch.float32, "none", "blocked", False),
        (cpu_table(False, True), torch.float32, "cpu", "blocked", False),
        (cuda_table(7, 0, True, True), torch.float16, "none", "blocked", False),
        (cuda_table(7, 5, True, True), torch.float16, "cublas", "blocked", True),
        (cuda_table(7, 5, True, False), torch.float16, "none", "blocked", True),
        (cuda_table(7, 5, False, True), torch.float16, "cublas", "blocked", False),
        (cuda_table(8, 0, True, True), torch.bfloat16, "triton", "flex", True),
        (cuda_table(8, 9, True, False), torch.bfloat16, "triton", "flex", True),
        (cuda_table(8, 6, False, True), torch.bfloat16, "cublas", "blocked", False),
        (cuda_table(9, 0, True, True), torch.bfloat16, "triton", "flex", True),
        (cuda_table(9, 0, False, False), torch.bfloat16, "none", "blocked", False),
        (cuda_table(12, 0, True, True), torch.bfloat16, "triton", "flex", True),
    ],
    ids=lambda value: value.name if isinstance(value, Capability) else "",
)
def test_the_table(row: Capability, dtype: torch.dtype, int8_product: str, attention: str, use_triton: bool) -> None:
    found = (row.dtype, row.int8_product, row.attention, row.use_triton)
    assert found == (dtype, int8_product, attention, use_triton)


@pytest.mark.parametrize("row", EVERY_ROW, ids=Capability.describe)
def test_every_row_is_one_line_that_names_its_path(row: Capability) -> None:
    line = row.describe()
    assert line.startswith(row.name)
    assert "\n" not in line
    assert ("Triton kernels" in line) == row.use_triton
    assert ("int8 products" in line) == (row.int8_product != "none")


def test_different_paths_are_described_differently() -> None:
    lines = {row.describe() for row in EVERY_ROW}
    assert len(lines) == len(set(EVERY_ROW))


def test_this_cpu_is_looked_up_once() -> None:
    cpu = capability.capability(torch.device("cpu"))
    assert cpu is capability.capability(torch.device("cpu"))
    assert cpu == cpu_table(capability.cpu_has_bf16(), capability.cpu_has_int8(), capability.cpu_has_tiles())


@pytest.mark.parametrize(
    ("features", "int8", "bf16", "tiles"),
    [
        ({}, False, False, False),
        ({"avx512_vnni": True}, True, False, False),
        ({"avx512_vnni": True, "avx512_bf16": True}, True, True, True),
        ({"avx512_vnni": True, "avx512_bf16": True, "amx_bf16": True, "amx_int8": True}, True, True, False),
    ],
)
def test_what_a_cpu_has(
    features: dict[str, bool], int8: bool, bf16: bool, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    monkeypatch.setattr(native, "library", lambda: object())
    assert (capability.cpu_has_int8(), capability.cpu_has_bf16(), capability.cpu_has_tiles()) == (int8, bf16, tiles)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not capability.cpu_has_tiles()


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="no kernels for device meta: use cpu or cuda"):
        capability.capability(torch.device("meta"))


def test_the_check_of_the_int8_product_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert capability.int8_mm_works(device)
    product = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: product(a, b) + 1)
    assert not capability.int8_mm_works(device)

    def absent(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(torch, "_int_mm", absent)
    assert not capability.int8_mm_works(device)


@pytest.mark.gpu
def test_the_gpu_at_hand() -> None:
    device = torch.device("cuda:0")
    row = capability.capability(device)
    assert row.name.startswith(f"CUDA sm_{''.join(map(str, torch.cuda.get_device_capability(device)))}")
    assert capability.int8_mm_works(device) or row.int8_product != "cublas"


def test_nothing_needs_triton_at_import() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import smelter.kernels.capability, smelter.train; "
        "print(smelter.kernels.capability.capability(__import__('torch').device('cpu')).use_triton)"
    )
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert run.stdout == "False\n", run.stderr
