"""Contiguous attention against plain float32 attention: odd chunks, views of a product, rows between poison."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from octavo.kernels.contiguous_attention import (
    Chunk,
    QueryTiles,
    TileConfig,
    contiguous_attention,
    cut,
    query_tiles,
)

# The output is rounded once (a unit of its last place), and so are the weights of the values (half a unit, of about the
# values' mean size, 0.8). Triton's interpreter truncates to bfloat16, which is twice as much.
TOLERANCES = {
    torch.float16: {"rtol": 2**-10, "atol": 2**-11},
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-7},
}

SMALL, LARGE = TileConfig(64, 64, 4, 2, None), TileConfig(128, 64, 8, 2, 128)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_chunks(lengths, first_query=0) -> list[Chunk]:
    """Chunks of (keys before, queries), queries side by side, their keys in rows of whole blocks of 16."""
    chunks, key_start = [], 16
    for before, new in lengths:
        chunks.append(Chunk(first_query, new, key_start, before + new))
        first_query += new
        key_start += -(-(before + new) // 16) * 16
    return chunks


def attend(q, k, v, scale):
    """Of the last len(q) of the keys, in float32. [tokens, heads, head_dim] each."""
    k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    hidden = torch.ones(len(q), len(k), device=q.device).triu(len(k) - len(q) + 1).bool()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def on(device, tiles: QueryTiles) -> QueryTiles:
    return replace(tiles, table=tiles.table.to(device))


def check(chunks, num_heads, num_kv_heads, head_dim, dtype, device, config=SMALL):
    last = chunks[-1]
    num_tokens, num_keys = last.query_start + last.query_len + 3, last.key_start + last.num_keys + 1
    # Keys of no row are poison, and other heads lie between a token's and the next one's.
    q = torch.full((num_tokens, num_heads + 2, head_dim), 9.0, dtype=dtype)[:, :num_heads]
    kv = torch.full((num_keys, 2 * num_kv_heads, head_dim), torch.nan, dtype=dtype)
    for chunk in chunks:
        q[chunk.query_start :][: chunk.query_len] = torch.randn(chunk.query_len, num_heads, head_dim)
        kv[chunk.key_start :][: chunk.num_keys] = torch.randn(chunk.num_keys, 2 * num_kv_heads, head_dim)
    q, kv = q.to(device), kv.to(device)
    k, v = kv.split(num_kv_heads, 1)
    out = torch.full((num_tokens, num_heads, head_dim), 7.0, dtype=dtype, device=device)
    expected = out.float()
    for chunk in chunks:
        queries, keys = (
            slice(start, start + length)
            for start, length in ((chunk.query_start, chunk.query_len), (chunk.key_start, chunk.num_keys))
        )
        expected[queries] = attend(q[queries], k[keys], v[keys], 0.1)
    assert contiguous_attention(q, k, v, on(device, cut(chunks, config)), 0.1, out) is out
    torch.testing.assert_close(out.float(), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    "lengths",
    [
        ((0, 1),),
        ((0, 64), (0, 65), (0, 1), (0, 130)),
        ((63, 1), (64, 1), (62, 2), (31, 33), (128, 5)),
        ((300, 140), (0, 20), (17, 128)),
    ],
    ids=["one token", "whole prompts", "around tiles of keys", "several tiles behind a prefix"],
)
def test_equals_plain_attention(lengths, config, device):
    check(make_chunks(lengths), 2, 1, 64, torch.float16, device, config)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "dtype"),
    [(3, 3, 64, torch.float16), (8, 2, 128, torch.bfloat16), (4, 1, 128, torch.float16)],
)
def test_heads_and_dtypes(num_heads, num_kv_heads, head_dim, dtype, device):
    check(make_chunks(((0, 40), (60, 20)), first_query=5), num_heads, num_kv_heads, head_dim, dtype, device)


@pytest.mark.parametrize("num_heads", [1, 128])
def test_tiles_cover_each_query_once_and_the_longest_come_first(num_heads):
    chunks = make_chunks(((0, 300), (1000, 129), (0, 1), (5, 128)), first_query=2)
    tiles = query_tiles(chunks, num_heads).table.tolist()
    assert all(left[3] >= right[3] for left, right in pairwise(tiles))
    row_of = {chunk.key_start: chunk for chunk in chunks}
    seen = []
    for first_token, num_queries, key_start, first_position, num_keys in tiles:
        chunk = row_of[key_start]
        assert num_keys == chunk.num_keys
        assert first_position - (first_token - chunk.query_start) == chunk.num_keys - chunk.query_len
        seen += range(first_token, first_token + num_queries)
    assert sorted(seen) == list(range(2, 2 + 300 + 129 + 1 + 128))


def test_few_programs_are_cut_smaller():
    chunks = make_chunks(((0, 2048),))
    assert query_tiles(chunks, 32).config == LARGE
    assert query_tiles(chunks, 8).config == SMALL


def test_no_chunks_do_nothing(device):
    out = torch.ones(2, 2, 64, dtype=torch.bfloat16, device=device)
    contiguous_attention(out, out, out, on(device, query_tiles((), 2)), 0.1, out)
    assert (out == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 4, 64)}, "dtypes"),
        ({name: torch.zeros(4, 4, 80, dtype=torch.bfloat16) for name in "qkv"}, "head_dim 80"),
        ({"v": torch.zeros(3, 2, 64, dtype=torch.bfloat16)}, "shapes"),
        ({"q": torch.zeros(4, 64, 4, dtype=torch.bfloat16).mT}, "heads of a token lie apart"),
        ({"k": torch.zeros(4 * 129, dtype=torch.bfloat16).as_strided((4, 2, 64), (129, 64, 1))}, "k with strides"),
        ({"table": torch.zeros(1, 5)}, "query_tiles"),
        ({"table": torch.zeros(1, 4, dtype=torch.int32)}, "query_tiles"),
    ],
)
def test_refuses_what_it_does_not_take(changes, message, device):
    half = {"dtype": torch.bfloat16}
    given = {
        "q": torch.zeros(4, 4, 64, **half),
        "k": torch.zeros(4, 2, 64, **half),
        "v": torch.zeros(4, 2, 64, **half),
        "table": torch.zeros(1, 5, dtype=torch.int32),
    } | changes
    given = {name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for name, x in given.items()}
    tiles = QueryTiles(given.pop("table"), SMALL)
    with pytest.raises(ValueError, match=message):
        contiguous_attention(**given, tiles=tiles, scale=0.1, out=torch.zeros_like(given["q"]).contiguous())
