"""The RMSNorm kernels against their torch twins."""

import pytest
import torch
from octavo.kernels import reference
from octavo.kernels.norm import add_rms_norm, rms_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# float32: a mean summed in another order, a few units of 2**-24 each. Half precisions are computed in float32 too, so
# that difference moves a value over a rounding boundary at most: one unit of the last place.
CLOSE = {
    torch.float32: {"rtol": 2e-6, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
}
# One sum of two numbers, rounded once, leaves no freedom, but Triton's interpreter cuts bfloat16 off instead.
EXACT = {"rtol": 0, "atol": 0}
SUM = {
    torch.float32: EXACT,
    torch.float16: EXACT,
    torch.bfloat16: EXACT if torch.cuda.is_available() else CLOSE[torch.bfloat16],
}
SHAPES = [(1, 1), (3, 7), (2, 3, 64), (5, 257), (1, 4096), (2, 5120), (2, 8192)]


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, dtype):
    x, weight = normal(*shape, dtype=dtype, scale=3), normal(shape[-1], dtype=dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape, dtype):
    x, residual = normal(*shape, dtype=dtype), normal(1, *shape, dtype=dtype, scale=3)[0]
    weight = normal(shape[-1], dtype=dtype)
    kept = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    _, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(total, expected_total, **SUM[dtype])
    torch.testing.assert_close(normed, reference.rms_norm(total, weight, 1e-5), **CLOSE[dtype])
    torch.testing.assert_close((x, residual), kept, **EXACT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (1, 4096)])
def test_add_rms_norm_of_a_sum_in_two_parts_rounds_once(shape, dtype):
    x, other, residual = normal(3, *shape, dtype=dtype, scale=3)
    weight = normal(shape[-1], dtype=dtype)
    normed, total = add_rms_norm(x, residual, weight, 1e-5, other)
    torch.testing.assert_close(total, (x.double() + other + residual).to(dtype), **CLOSE[dtype])
    torch.testing.assert_close(total, reference.add_rms_norm(x, residual, weight, 1e-5, other)[1], **SUM[dtype])
    torch.testing.assert_close(normed, reference.rms_norm(total, weight, 1e-5), **CLOSE[dtype])


def test_the_norm_is_of_the_rounded_sum():
    # 256 + 1 is 256 in bfloat16: the sum's last bit is lost before the norm.
    x, residual = (torch.full((1, 16), value, dtype=torch.bfloat16, device=DEVICE) for value in (1.0, 256.0))
    x[0, 0] = 64
    weight = normal(16, dtype=torch.bfloat16)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert total[0, 1] == 256
    assert torch.equal(normed, rms_norm(total, weight, 1e-5))


def test_eps_is_added_to_the_mean():
    x, weight = torch.full((1, 8), 1e-3, device=DEVICE), torch.ones(8, device=DEVICE)
    expected = torch.full_like(x, 1e-3 / (1e-6 + 3e-6) ** 0.5)
    torch.testing.assert_close(rms_norm(x, weight, 3e-6), expected, **CLOSE[torch.float32])


def test_half_precision_does_not_overflow():
    x, weight = (torch.full(shape, 300.0, dtype=torch.float16, device=DEVICE) for shape in ((1, 512), (512,)))
    torch.testing.assert_close(rms_norm(x, weight / 300, 1e-5), torch.ones_like(x), **CLOSE[torch.float16])


def test_no_rows():
    x, weight = torch.empty(0, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    assert rms_norm(x, weight, 1e-5).shape == (0, 8)
    assert [tensor.shape for tensor in add_rms_norm(x, x, weight, 1e-5)] == [(0, 8)] * 2


@pytest.mark.parametrize(
    ("x", "weight", "problem"),
    [
        (torch.ones(2, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64), "float64"),
        (torch.ones(2, 8), torch.ones(8, dtype=torch.bfloat16), "bfloat16"),
        (torch.ones(2, 8), torch.ones(7), r"\[7\] does not fit x \[2, 8\]"),
        (torch.ones(1, 20000), torch.ones(20000), "not 20000"),
        (torch.ones(8, 2).t(), torch.ones(8), r"strides are \(1, 2\)"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(x, weight, problem):
    with pytest.raises(ValueError, match=problem):
        rms_norm(x, weight, 1e-5)


def test_what_is_added_is_named_if_it_is_unlike_x():
    x, unlike, weight = torch.ones(2, 8), torch.ones(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"a residual like x .* not \[3, 8\]"):
        add_rms_norm(x, unlike, weight, 1e-5)
    with pytest.raises(ValueError, match=r"a second part like x .* not \[3, 8\]"):
        add_rms_norm(x, x, weight, 1e-5, unlike)
