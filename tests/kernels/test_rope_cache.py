"""The kernel that rotates and writes to the cache against its torch twins, composed."""

from dataclasses import dataclass, replace

import pytest
import torch
from octavo.kernels import reference
from octavo.kernels.rope_cache import rope_and_cache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE, NUM_BLOCKS = 16, 5
# float32: two products and a sum; the twin on a CPU fuses another product with the sum, or none: 2**-24 of either.
CLOSE = {"rtol": 2e-6, "atol": 5e-7}
# (query heads, KV heads, head_dim): head counts that fill a program's eight, and that do not.
SHAPES = [(1, 1, 2), (8, 4, 20), (3, 1, 64), (32, 8, 64), (5, 5, 80), (6, 2, 96), (32, 8, 128), (16, 1, 256)]


@dataclass(frozen=True, slots=True)
class Inputs:
    qkv: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    kv_indices: torch.Tensor
    num_heads: int

    def run(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and caches afterwards; the inputs stay."""
        caches = self.k_cache.clone(), self.v_cache.clone()
        q = rope_and_cache(self.qkv, self.cos, self.sin, *caches, self.kv_indices, self.num_heads)
        return q, *caches

    def run_twins(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_kv_heads = self.k_cache.shape[2]
        q, k, v = self.qkv.split((self.num_heads, num_kv_heads, num_kv_heads), dim=1)
        q, k = (reference.apply_rope(heads, self.cos, self.sin) for heads in (q, k))
        caches = self.k_cache.clone(), self.v_cache.clone()
        kept = self.kv_indices >= 0
        reference.write_kv(k[kept], v[kept], *caches, self.kv_indices[kept])
        return q, *caches

    def to(self, dtype: torch.dtype) -> "Inputs":
        names = ("qkv", "cos", "sin", "k_cache", "v_cache")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})


def make_inputs(num_heads: int, num_kv_heads: int, head_dim: int, kv_indices: list[int]) -> Inputs:
    generator = torch.Generator().manual_seed(head_dim)
    num_tokens = len(kv_indices)
    angles = torch.rand(num_tokens, 1, head_dim // 2, generator=generator) * 6
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator)
    caches = torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim, generator=generator)
    tensors = (
        qkv,
        torch.cat([angles.cos(), angles.cos()], dim=-1),
        torch.cat([-angles.sin(), angles.sin()], dim=-1),
        caches[0],
        caches[1],
        torch.tensor(kv_indices, dtype=torch.int64),
    )
    return Inputs(*(tensor.to(DEVICE) for tensor in tensors), num_heads)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32(shape):
    inputs = make_inputs(*shape, kv_indices=[33, 0, 79, 15, 16])
    (q, k_cache, v_cache), expected = inputs.run(), inputs.run_twins()
    torch.testing.assert_close((q, k_cache), expected[:2], **CLOSE)
    assert q.is_contiguous()
    assert torch.equal(v_cache, expected[2])


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision(shape, dtype, unit):
    inputs = make_inputs(*shape, kv_indices=[33, 0, 79, 15, 16]).to(dtype)
    q, k_cache, v_cache = inputs.run()
    exact_q, exact_k, _ = inputs.to(torch.float32).run_twins()
    # Computed in float32, rounded once (cut off by the interpreter): one unit of the last place.
    torch.testing.assert_close((q, k_cache), (exact_q.to(dtype), exact_k.to(dtype)), rtol=unit, atol=1e-6)
    # The twin rounds x * cos too, which counts where the two products cancel: half a unit of x, at most 4.3 here.
    twin_q, twin_k, twin_v = inputs.run_twins()
    torch.testing.assert_close((q, k_cache), (twin_q, twin_k), rtol=unit, atol=2.2 * unit)
    assert torch.equal(v_cache, twin_v)


def test_a_padding_row_writes_nothing():
    inputs = make_inputs(4, 2, 20, kv_indices=[-1, 7, -1, -80])
    results, expected = inputs.run(), inputs.run_twins()
    torch.testing.assert_close(results, expected, **CLOSE)
    changed = (results[2] != inputs.v_cache).flatten(0, 1).flatten(1).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [7]


def test_many_tokens_each_find_their_place():
    places = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=torch.Generator().manual_seed(0)).tolist()
    inputs = make_inputs(7, 3, 64, kv_indices=places)
    torch.testing.assert_close(inputs.run(), inputs.run_twins(), **CLOSE)


def test_queries_go_where_they_are_wanted():
    inputs = make_inputs(4, 2, 20, kv_indices=[5, 6])
    wide = torch.full((3, 4, 20), 7.0, device=DEVICE)
    caches = inputs.k_cache.clone(), inputs.v_cache.clone()
    q = rope_and_cache(inputs.qkv, inputs.cos, inputs.sin, *caches, inputs.kv_indices, 4, wide[1:])
    assert torch.equal(q, inputs.run()[0])
    assert torch.equal(wide[1:], q)
    assert (wide[0] == 7).all()
    with pytest.raises(ValueError, match="out must be"):
        rope_and_cache(inputs.qkv, inputs.cos, inputs.sin, *caches, inputs.kv_indices, 4, wide)


def test_no_tokens():
    inputs = make_inputs(4, 2, 20, kv_indices=[])
    q, k_cache, v_cache = inputs.run()
    assert q.shape == (0, 4, 20)
    assert torch.equal(k_cache, inputs.k_cache)
    assert torch.equal(v_cache, inputs.v_cache)


def broken(**changes) -> Inputs:
    return replace(make_inputs(4, 2, 20, kv_indices=[1, 2]), **changes)


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        (broken(num_heads=5), "not 5 query heads"),
        (broken(qkv=torch.ones(2, 8, 20, dtype=torch.float64)), "float64"),
        (broken(qkv=torch.ones(8, 2, 20).transpose(0, 1)), "contiguous"),
        (broken(k_cache=torch.ones(5, 16, 2, 20, dtype=torch.bfloat16)), "bfloat16"),
        (broken(v_cache=torch.ones(4, 16, 2, 20)), r"\[4, 16, 2, 20\]"),
        (broken(cos=torch.ones(2, 1, 10)), "cos must be"),
        (broken(sin=torch.ones(1, 1, 20)), "sin must be"),
        (broken(kv_indices=torch.ones(2, dtype=torch.int32)), "kv_indices must be"),
        (make_inputs(4, 2, 258, kv_indices=[1]), "not 258"),
        (make_inputs(4, 2, 2, kv_indices=[1]).to(torch.float64), "float64"),
    ],
)
def test_what_the_kernel_cannot_take_is_named(inputs, problem):
    with pytest.raises(ValueError, match=problem):
        inputs.run()
