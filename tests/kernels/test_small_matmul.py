"""The products of a few rows against their torch twins in float32, and which kernel a product takes."""

import pytest
import torch
from octavo.kernels import reference
from octavo.kernels.linear_config import LinearKernel, linear_kernel
from octavo.kernels.small_matmul import (
    MatmulConfig,
    SplitWorkspace,
    matmul_config,
    small_matmul,
    small_matmul_silu_and_mul,
)

DTYPES = (torch.bfloat16, torch.float16)
# As in test_gemv.py.
CLOSE = {torch.bfloat16: {"rtol": 2**-7, "atol": 2e-6}, torch.float16: {"rtol": 2**-10, "atol": 2e-6}}
# num_rows, out_size, in_size: ragged on all sides, one tile and several.
SHAPES = [(2, 6, 8), (1, 64, 128), (5, 130, 264), (33, 66, 520), (64, 64, 256)]
CONFIGS = [None, MatmulConfig(1, 64, 4), MatmulConfig(3, 64, 2)]


@pytest.fixture
def workspace(device):
    return SplitWorkspace(device)


@pytest.fixture
def make_operands(device):
    """make_operands(num_rows, out_size, in_size, dtype) -> x, weight, bias"""

    def make(num_rows: int, out_size: int, in_size: int, dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(num_rows + out_size + in_size)
        shapes = ((num_rows, in_size), (out_size, in_size), (out_size,))
        x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
        return [tensor.to(device, dtype) for tensor in (x, weight * in_size**-0.5, bias)]

    return make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_small_matmul(make_operands, workspace, shape, config, dtype):
    x, weight, bias = make_operands(*shape, dtype)
    expected = reference.linear(x.float(), weight.float(), None)
    out = small_matmul(x, weight, None, workspace, config)
    torch.testing.assert_close(out, expected.to(dtype), **CLOSE[dtype])
    expected = reference.linear(x.float(), weight.float(), bias.float())
    out = small_matmul(x, weight, bias, workspace, config)
    torch.testing.assert_close(out, expected.to(dtype), **CLOSE[dtype])
    assert not workspace.counters.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_small_matmul_silu_and_mul(make_operands, workspace, shape, config, dtype):
    x, weight, bias = make_operands(*shape, dtype)
    # Sums of the same products in another order may round to the other side before the activation: one unit more.
    expected = reference.silu_and_mul(small_matmul(x, weight, bias, workspace, config).float())
    out = small_matmul_silu_and_mul(x, weight, bias, workspace, config)
    torch.testing.assert_close(out, expected.to(dtype), rtol=2 * CLOSE[dtype]["rtol"], atol=CLOSE[dtype]["atol"])
    assert not workspace.counters.any()


def test_a_used_workspace_does_not_matter(make_operands, workspace):
    x, weight, bias = make_operands(5, 130, 264, torch.bfloat16)
    config = MatmulConfig(3, 64, 4)
    first = small_matmul(x, weight, bias, workspace, config)
    workspace.partials.fill_(torch.nan)
    assert torch.equal(small_matmul(x, weight, bias, workspace, config), first)


def test_more_parts_than_the_workspace_holds_are_refused(make_operands, workspace):
    x, weight, _ = make_operands(2, 64 * 257, 128, torch.bfloat16)
    with pytest.raises(ValueError, match="514 parts"):
        small_matmul(x, weight, None, workspace, MatmulConfig(2, 64, 4))


@pytest.mark.parametrize(
    ("shapes", "dtype", "problem"),
    [
        (((2, 16), (4, 16), (4,)), torch.float32, "float32"),
        (((65, 16), (4, 16), (4,)), torch.bfloat16, "1 to 64 rows"),
        (((2, 16), (4, 24), (4,)), torch.bfloat16, "do not fit"),
        (((2, 12), (4, 12), (4,)), torch.bfloat16, "whole 16 bytes"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(workspace, shapes, dtype, problem):
    x, weight, bias = (torch.ones(shape, dtype=dtype) for shape in shapes)
    with pytest.raises(ValueError, match=problem):
        small_matmul(x, weight, bias, workspace)


def test_gates_without_ups_are_named(workspace):
    x, weight = torch.ones(2, 16, dtype=torch.bfloat16), torch.ones(3, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="not 3 rows"):
        small_matmul_silu_and_mul(x, weight, None, workspace)


@pytest.mark.parametrize(
    ("num_rows", "out_size", "silu", "config"),
    [
        (8, 6144, False, MatmulConfig(1, 256, 3)),
        (8, 4096, False, MatmulConfig(2, 256, 3)),
        (64, 4096, False, MatmulConfig(2, 128, 6)),
        (32, 14336, True, MatmulConfig(1, 128, 3)),
        (33, 3584, True, MatmulConfig(2, 64, 5)),
        (2, 1536, False, MatmulConfig(4, 256, 3)),
        (2, 128256, False, MatmulConfig(1, 128, 4)),
        (2, 64, False, MatmulConfig(96, 256, 3)),
    ],
)
def test_a_product_is_split_until_enough_programs_read(num_rows, out_size, silu, config):
    assert matmul_config(num_rows, out_size, silu) == config


@pytest.mark.parametrize(
    ("num_rows", "out_size", "in_size", "dtype", "kernel"),
    [
        (1, 4096, 4096, torch.bfloat16, LinearKernel.GEMV),
        (2, 4096, 4096, torch.float16, LinearKernel.SMALL_MATMUL),
        (32, 4096, 4096, torch.bfloat16, LinearKernel.SMALL_MATMUL),
        (33, 4096, 4096, torch.bfloat16, LinearKernel.CUBLAS_LT),
        (64, 28672, 4096, torch.bfloat16, LinearKernel.SMALL_MATMUL),
        (65, 28672, 4096, torch.bfloat16, LinearKernel.CUBLAS_LT),
        (1024, 4096, 4096, torch.bfloat16, LinearKernel.CUBLAS_LT),
        (1025, 4096, 4096, torch.bfloat16, LinearKernel.CUBLAS),
        (65, 4096, 4096, torch.float32, LinearKernel.CUBLAS),
        (1, 4096, 4096, torch.float32, LinearKernel.CUBLAS),
        (1, 4096, 4100, torch.bfloat16, LinearKernel.CUBLAS_LT),
        (0, 4096, 4096, torch.bfloat16, LinearKernel.CUBLAS),
    ],
)
def test_the_kernel_of_a_product(num_rows, out_size, in_size, dtype, kernel):
    assert linear_kernel(num_rows, torch.empty(out_size, in_size, dtype=dtype, device="meta")) is kernel
