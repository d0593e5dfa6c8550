"""Copies of tables' rows against the reference."""

import pytest
import torch
from octavo.kernels import reference
from octavo.kernels.lookup import embed, rope_rows
from octavo.kernels.triton_ops import TritonOperations


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", [48, 1024, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_another_rank_are_zeros(ids_dtype, width, dtype, device):
    table = torch.randn(10, width).to(device, dtype)
    token_ids = torch.tensor([20, 29, 19, 30, 0, 25, 25], dtype=ids_dtype, device=device)
    expected = torch.zeros(7, width, dtype=dtype, device=device)
    expected[[0, 1, 5, 6]] = table[[0, 9, 5, 5]]
    assert torch.equal(embed(token_ids, table, 20), expected)
    assert torch.equal(reference.embed(token_ids, table, 20), expected)


def test_embeddings_lie_where_they_are_asked_for(device):
    table, out = torch.randn(5, 64, device=device), torch.full((2, 64), torch.nan, device=device)
    token_ids = torch.tensor([4, 7], device=device)
    assert embed(token_ids, table, 0, out) is out
    assert torch.equal(out, reference.embed(token_ids, table, 0))


def test_no_tokens_are_none(device):
    ids, table = torch.empty(0, dtype=torch.int64, device=device), torch.ones(3, 8, device=device)
    assert embed(ids, table, 0).shape == (0, 8)
    assert [rows.shape for rows in rope_rows(ids, table, table)] == [(0, 1, 8)] * 2


@pytest.mark.parametrize("head_dim", [20, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_rows_are_those_of_the_positions(head_dim, dtype, device):
    cos, sin = torch.randn(2, 30, head_dim).to(device, dtype)
    positions = torch.tensor([0, 29, 7, 7, 1], device=device)
    found = rope_rows(positions, cos, sin)
    for rows, table, expected in zip(found, (cos, sin), reference.rope_rows(positions, cos, sin), strict=True):
        assert torch.equal(rows, table[positions][:, None])
        assert torch.equal(rows, expected)


IDS, TABLE = torch.zeros(2, dtype=torch.int64), torch.ones(3, 8)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: embed(IDS.float(), TABLE, 0), "float32"),
        (lambda: embed(IDS[:, None], TABLE, 0), r"\[2, 1\]"),
        (lambda: embed(IDS, TABLE.t(), 0), "contiguous table"),
        (lambda: embed(IDS, TABLE, 0, torch.ones(3, 8)), r"out must be \[2, 8\]"),
        (lambda: rope_rows(IDS.int()[::2].expand(2), TABLE, TABLE), "strides"),
        (lambda: rope_rows(IDS, TABLE, TABLE[:2]), "two like"),
        (lambda: rope_rows(IDS, TABLE.bfloat16(), TABLE), "two like"),
        (lambda: rope_rows(IDS, torch.ones(3, 512), torch.ones(3, 512)), "1 to 256"),
    ],
)
def test_what_the_kernels_cannot_take_is_named(call, problem):
    with pytest.raises(ValueError, match=problem):
        call()


def test_layers_get_what_the_kernels_make(device):
    ops, table = TritonOperations(device), torch.randn(5, 64, device=device)
    ids, out = torch.tensor([4, 7], device=device), torch.empty(2, 64, device=device)
    assert ops.embed(ids, table, 2, out) is out
    assert torch.equal(out, reference.embed(ids, table, 2))
    assert torch.equal(ops.embed(ids, table.t(), 0), reference.embed(ids, table.t(), 0))
    assert torch.equal(ops.rope_rows(ids[:1], table, table)[1], table[4:][:, None])
