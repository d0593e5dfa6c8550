"""The CPU's own operations against the reference's."""

import pytest
import torch
from octavo.kernels import cpu, reference


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_tokens", "in_size", "out_size"), [(1, 1, 1), (3, 20, 7), (33, 65, 130), (2, 64, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_equals_the_reference(dtype, num_tokens, in_size, out_size, has_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(num_tokens, in_size).to(dtype), torch.randn(out_size, in_size).to(dtype)
    bias = torch.randn(out_size).to(dtype) if has_bias else None
    expected = reference.linear(x.float(), weight.float(), None if bias is None else bias.float())
    product = cpu.linear(x, cpu.pack_weight(weight.clone()), bias)
    assert product.dtype == dtype
    # One rounding of the result, and sums of up to 65 terms in another order.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(product.float(), expected, rtol=eps, atol=64 * torch.finfo(torch.float32).eps)


def test_linear_takes_a_view_of_tokens_and_an_unpacked_weight():
    torch.manual_seed(0)
    wide, weight = torch.randn(5, 48), torch.randn(16, 24)
    x = wide[:, ::2]
    torch.testing.assert_close(cpu.linear(x, cpu.pack_weight(weight), None), reference.linear(x, weight, None))
    torch.testing.assert_close(cpu.linear(x, weight, None), reference.linear(x, weight, None), rtol=0, atol=0)


def test_float32_is_packed_where_onednn_is_there():
    packed = cpu.pack_weight(torch.randn(16, 24))
    assert packed.is_mkldnn == torch.backends.mkldnn.is_available()


def test_products_have_few_sizes_with_little_padding():
    sizes = [cpu.padded_size(num_tokens) for num_tokens in range(1, 8193)]
    assert all(n <= size <= n * 17 / 16 for n, size in enumerate(sizes, start=1))
    assert sizes[:32] == list(range(1, 33))
    assert len(set(sizes)) == 32 + 16 * 8
