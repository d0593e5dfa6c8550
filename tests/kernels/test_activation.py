"""The SwiGLU kernel against its torch twin."""

import pytest
import torch
from octavo.kernels import reference
from octavo.kernels.activation import silu_and_mul

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 2), (3, 10), (2, 2, 514), (5, 2 * 1023), (2, 2 * 1025), (1, 2 * 14336)]


def normal(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).mul_(4).to(DEVICE)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32(shape):
    gate_up = normal(shape)
    kept = gate_up.clone()
    # exp(x) is made of 2**(x * log2(e)), whose argument's rounding costs |x| * 2**-24 of the value, |x| up to 18 here;
    # a quotient and two products cost a few units of 2**-24 more.
    torch.testing.assert_close(silu_and_mul(gate_up), reference.silu_and_mul(kept), rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(gate_up, kept, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision(shape, dtype, unit):
    gate_up = normal(shape).to(dtype)
    out = silu_and_mul(gate_up)
    # Rounded once from float32: the same, but where that lies next to a rounding boundary. float16 has a least step.
    step = {"rtol": unit, "atol": 2**-24}
    torch.testing.assert_close(out, reference.silu_and_mul(gate_up.float()).to(dtype), **step)
    # The twin rounds silu(gate) before it multiplies: half a unit more on each side.
    torch.testing.assert_close(out, reference.silu_and_mul(gate_up), rtol=2 * unit, atol=2**-20)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter
def test_large_gates_neither_overflow_nor_turn_into_nan():
    gate_up = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    expected = torch.tensor([[0.0, 0.0, 200.0, 2e4]], device=DEVICE)
    torch.testing.assert_close(silu_and_mul(gate_up), expected, rtol=1e-6, atol=1e-37)


def test_no_rows():
    assert silu_and_mul(torch.empty(0, 8, device=DEVICE)).shape == (0, 4)


@pytest.mark.parametrize(
    ("gate_up", "problem"),
    [
        (torch.ones(2, 7), r"\[2, 7\]"),
        (torch.ones(2, 8, dtype=torch.float64), "float64"),
        (torch.ones(8, 2).t(), r"strides \(1, 2\)"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(gate_up, problem):
    with pytest.raises(ValueError, match=problem):
        silu_and_mul(gate_up)
