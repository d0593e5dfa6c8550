"""The products of one row against their torch twins in float32."""

import pytest
import torch
from octavo.kernels import reference
from octavo.kernels.gemv import GemvConfig, add_norm_gemv, gemv, gemv_silu_and_mul

DTYPES = (torch.bfloat16, torch.float16)
# Rounded once from a float32 sum whose terms are exact: one unit of the last place (the interpreter cuts bfloat16 off),
# and, where terms cancel, float32's own error in up to 1,000 of them that make a sum of about 1.
CLOSE = {torch.bfloat16: {"rtol": 2**-7, "atol": 2e-6}, torch.float16: {"rtol": 2**-10, "atol": 2e-6}}
# [out_size, in_size]: less than a program, ragged on both sides, more than one tile of a row, several programs.
SHAPES = [(2, 8), (6, 256), (10, 1000), (34, 264)]
SMALL_TILES = GemvConfig(block_rows=8, block_k=256, num_warps=1)


@pytest.fixture
def make_operands(device):
    """make_operands(out_size, in_size, dtype) -> x, weight, bias, residual, norm weight; products of about 1"""

    def make(out_size: int, in_size: int, dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(out_size + in_size)
        shapes = ((1, in_size), (out_size, in_size), (out_size,), (1, in_size), (in_size,))
        x, weight, *others = (torch.randn(shape, generator=generator) for shape in shapes)
        return [tensor.to(device, dtype) for tensor in (x, weight * in_size**-0.5, *others)]

    return make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [None, SMALL_TILES])
@pytest.mark.parametrize("shape", SHAPES)
def test_gemv(make_operands, shape, config, dtype):
    x, weight, bias, *_ = make_operands(*shape, dtype)
    expected = reference.linear(x.float(), weight.float(), None)
    torch.testing.assert_close(gemv(x, weight, None, config=config), expected.to(dtype), **CLOSE[dtype])
    expected = reference.linear(x.float(), weight.float(), bias.float())
    torch.testing.assert_close(gemv(x, weight, bias, config=config), expected.to(dtype), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [None, SMALL_TILES])
@pytest.mark.parametrize("shape", SHAPES)
def test_gemv_silu_and_mul(make_operands, shape, config, dtype):
    x, weight, bias, *_ = make_operands(*shape, dtype)
    # The activation is of the rounded product: of exactly the other kernel's.
    expected = reference.silu_and_mul(gemv(x, weight, bias, config=config).float())
    out = gemv_silu_and_mul(x, weight, bias, config=config)
    torch.testing.assert_close(out, expected.to(dtype), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_norm_gemv(make_operands, shape, silu, dtype):
    x, weight, bias, residual, norm_weight = make_operands(*shape, dtype)
    out, total = add_norm_gemv(x, residual, norm_weight, 1e-5, weight, bias, silu)
    torch.testing.assert_close(total, (x.float() + residual.float()).to(dtype), **CLOSE[dtype])
    normed = reference.rms_norm(total.float(), norm_weight.float(), 1e-5).to(dtype)
    expected = reference.linear(normed.float(), weight.float(), bias.float())
    if silu:
        expected = reference.silu_and_mul(expected)
    # A normed value may round to the other side: a unit of its last place in one of the terms. Relative to the whole.
    error = (out.float() - expected).norm() / expected.norm()
    assert error < 4 * CLOSE[dtype]["rtol"]


def test_the_norm_is_of_the_rounded_sum(device):
    # 256 + 1 is 256 in bfloat16: what was lost is not normed.
    x, residual = (torch.full((1, 16), value, dtype=torch.bfloat16, device=device) for value in (1.0, 256.0))
    ones = torch.ones(16, dtype=torch.bfloat16, device=device)
    weight = torch.eye(16, dtype=torch.bfloat16, device=device)
    out, total = add_norm_gemv(x, residual, ones, 0.0, weight, None, False)
    assert torch.equal(total, residual)
    assert torch.equal(out, ones[None])


@pytest.mark.parametrize(
    ("shapes", "dtype", "problem"),
    [
        (((1, 16), (4, 16), (4,)), torch.float32, "float32"),
        (((2, 16), (4, 16), (4,)), torch.bfloat16, "1 to 1 rows"),
        (((1, 16), (4, 24), (4,)), torch.bfloat16, "do not fit"),
        (((1, 16), (4, 16), (5,)), torch.bfloat16, "do not fit"),
        (((1, 12), (4, 12), (4,)), torch.bfloat16, "whole 16 bytes"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(shapes, dtype, problem):
    x, weight, bias = (torch.ones(shape, dtype=dtype) for shape in shapes)
    with pytest.raises(ValueError, match=problem):
        gemv(x, weight, bias)


def test_other_wrong_tensors_are_named():
    x, weight = torch.ones(1, 16, dtype=torch.bfloat16), torch.ones(3, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="not 3 rows"):
        gemv_silu_and_mul(x, weight, None)
    with pytest.raises(ValueError, match="contiguous"):
        gemv(x, torch.ones(16, 16, dtype=torch.bfloat16).t(), None)
    with pytest.raises(ValueError, match="one size up to"):
        add_norm_gemv(x, weight, weight[0], 1e-5, weight, None, False)
    with pytest.raises(ValueError, match="of x's dtype"):
        add_norm_gemv(x, x.half(), weight[0], 1e-5, weight, None, False)
