"""Where kernel tests run, on the GPU or in Triton's interpreter, and the cached rows that attention is tested on."""

from dataclasses import dataclass

import pytest
import torch
from octavo.kernels import reference
from octavo.kernels.batch import AttentionBatch


def _mend_the_interpreter() -> None:
    """Three holes in Triton 3.6's interpreter that no GPU has."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot
    create_fp_to_fp = interpreter.InterpreterBuilder.create_fp_to_fp

    def patch(tensor, scope):
        # It makes a loop bound an int by int(array of one element), which numpy 2.4 refuses.
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widen(x):
        """Bfloat16, which it holds as bit patterns and would multiply as such, in float32."""
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, widen(a), widen(b), *rest)

    def convert(self, src, dst_type, rounding):
        """To and from FP8 as torch does it; the interpreter drops what rounding carries, and knows no NaN in FP8."""
        dtypes = {tl.float8e4nv: torch.float8_e4m3fn, tl.float32: torch.float32, tl.float16: torch.float16}
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.float8e4nv not in (source, target):
            return create_fp_to_fp(self, src, dst_type, rounding)
        if target == tl.bfloat16:
            wide = convert(self, src, tl.float32, rounding)
            return self.create_fp_trunc(wide, dst_type)
        words = torch.from_numpy(src.data.copy()).view(dtypes[source])
        converted = words.float().to(dtypes[target])
        raw = converted.view(torch.uint8) if target == tl.float8e4nv else converted
        return interpreter.TensorHandle(raw.numpy(), target)

    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.create_fp_to_fp = convert
    interpreter.InterpreterBuilder.create_dot = dot


if not torch.cuda.is_available():
    _mend_the_interpreter()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Rows whose keys and values lie in shuffled blocks and shuffled slots; every other cell and entry is poison."""

    k_cache: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]: NaN where nothing was written
    v_cache: torch.Tensor
    block_tables: torch.Tensor  # [num_slots, max_blocks] int32: 2**31 - 1 where a row has no block
    slots: torch.Tensor  # [num_rows] int64
    seq_lens: torch.Tensor  # [num_rows] int32
    host_seq_lens: tuple[int, ...]

    def attend(self, q: torch.Tensor, query_lens: tuple[int, ...], scale: float) -> torch.Tensor:
        """What the reference makes of it, in float32: each row's last tokens, those of no key left out."""
        rows = [row for row, length in enumerate(self.host_seq_lens) if length and query_lens[row]]
        query_lens = tuple(query_lens[row] for row in rows)
        lens = tuple(self.host_seq_lens[row] for row in rows)
        starts = tuple(sum(query_lens[:row]) for row in range(len(rows) + 1))
        tables = self.block_tables[self.slots][rows]
        batch = AttentionBatch(
            num_decode_rows=next((i for i, n in enumerate(query_lens) if n > 1), len(rows)),
            positions=torch.cat([torch.arange(e - n, e) for n, e in zip(query_lens, lens, strict=True)]).to(q.device),
            kv_indices=torch.empty(0, dtype=torch.int64, device=q.device),
            block_tables=tables.where(tables < len(self.k_cache), 0),
            slots=torch.arange(len(tables), device=q.device),
            seq_lens=self.seq_lens[rows],
            query_starts=torch.tensor(starts, dtype=torch.int32, device=q.device),
            host_seq_lens=lens,
            host_query_starts=starts,
        )
        caches = (cache.float().nan_to_num(0.0) for cache in (self.k_cache, self.v_cache))
        return reference.paged_attention(q.float(), *caches, batch, scale)


@pytest.fixture
def make_rows(device):
    """make_rows(seq_lens, block_size, num_kv_heads, head_dim, dtype) -> PagedRows on the device."""

    def make(seq_lens, block_size, num_kv_heads, head_dim, dtype) -> PagedRows:
        num_blocks = [-(-length // block_size) for length in seq_lens]
        slots = torch.randperm(len(seq_lens) + 2)[: len(seq_lens)]
        tables = torch.full((len(seq_lens) + 2, max(num_blocks) + 1), 2**31 - 1, dtype=torch.int32)
        ids = torch.randperm(sum(num_blocks) + 2).int()
        caches = torch.full((2, len(ids), block_size, num_kv_heads, head_dim), torch.nan, dtype=dtype)
        for slot, length, blocks in zip(slots, seq_lens, ids.split([*num_blocks, 2]), strict=False):
            tables[slot, : len(blocks)] = blocks
            keys = torch.arange(length)
            cells = (2, length, num_kv_heads, head_dim)
            caches[:, blocks[keys // block_size].long(), keys % block_size] = torch.randn(cells).to(dtype)
        k_cache, v_cache = caches.to(device)
        lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
        return PagedRows(k_cache, v_cache, tables.to(device), slots.to(device), lens, tuple(seq_lens))

    return make
