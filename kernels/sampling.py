"""Gumbel-max sampling in Triton: argmax(logit / temperature + noise), or argmax(logit) for greedy rows.

noise = -log(-log(1 - u)) draws from softmax(logit / temperature) (Gumbel, 1954). u comes from Philox 4x32-10 (Salmon et
al., SC 2011) with the row's seed as key and (position, token_id // 4, 0, 0) as counter: word token_id % 4 is the
token's, so one call serves four tokens and a token's noise is the same in any batch and at any number of ranks. The
twin is workers/sampler/gumbel.py: the same words bit for bit, the logarithms to a few units in the last place.

A candidate travels as one int64 key, which the greatest of decides: the score's bits in an order that integers share
above 2**32 - 1 - token_id, so the lowest id wins among equals. One maximum over keys merges programs and ranks alike.

Two launches, both with a grid that only shapes determine: programs of some thousand tokens each leave their best
key, then one program a row finds the best of these and hands out its token.
"""

import torch
import triton
import triton.language as tl

from .pdl import starts_early, wait_for_earlier_kernels
from .scores import GROUP, Kept, ordered, temper

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 1024  # tokens that a program looks at together: 8 a thread at 4 warps
_NUM_WARPS = 4
TAKE_BLOCK = 128  # keys of a row that a program looks at together: 4 a thread
# Programs that fill an H200 about twice (132 multiprocessors of nine each, at 55 registers a thread).
_ENOUGH_PROGRAMS = 2048
_MAX_BLOCKS = 16
_MAX_VOCAB = 1 << 24


@triton.jit
def _gumbel(seed: tl.tensor, position: tl.tensor, groups: tl.tensor) -> tl.tensor:
    """Noise of the tokens [4 * g, 4 * g + 4) for each g of `groups`, in this order."""
    zero = groups * 0
    w0, w1, w2, w3 = tl.philox(seed, zero + position, groups, zero, zero)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    uniform = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32
    # The largest words round up to 1.0, whose noise would be infinite.
    uniform = tl.minimum(uniform, 0.99999994)  # 1 - 2**-24
    # log(1 - u) as accurate as for 1 - u before its rounding (Higham, "Accuracy and Stability", 1.14.1).
    rest = 1.0 - uniform
    log_rest = tl.where(rest == 1.0, -uniform, tl.log(rest) * (-uniform / (rest - 1.0)))
    return -tl.log(-log_rest)


@triton.jit
def _key(score: tl.tensor, token_id: tl.tensor) -> tl.tensor:
    return (ordered(score).to(tl.int64) << 32) | (0xFFFFFFFF - token_id.to(tl.int64))


# Both depend on the batch, which must not compile anything.
@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["positions_ptr"])
def _candidates_kernel(
    logits_ptr: tl.tensor,  # [num_rows, size], rows `row_stride` apart
    temperature_ptr: tl.tensor,  # [num_rows] float32
    seeds_ptr: tl.tensor,  # [num_rows, 2] int64: low and high 32 bits
    positions_ptr: tl.tensor,  # [num_rows] int64
    thresholds_ptr: tl.tensor,  # [num_rows] float32, if rows are truncated
    maxima_ptr: tl.tensor,  # [num_rows, num_groups] float32: the greatest scores of every `group` columns
    keys_ptr: tl.tensor,  # [num_rows, num_programs] int64
    row_stride: tl.tensor,
    size: tl.tensor,
    lead: tl.tensor,  # tokens of the first group of four that are before the slice
    first_four: tl.tensor,  # the slice's first token // 4
    num_blocks: tl.tensor,
    num_groups: tl.tensor,
    is_truncated: tl.constexpr,
    group: tl.constexpr,
    block: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    wait_for_earlier_kernels(pdl)
    temperature = tl.load(temperature_ptr + row)
    inverse_temperature = tl.div_rn(1.0, tl.where(temperature > 0, temperature, 1.0))
    seed = (tl.load(seeds_ptr + 2 * row + 1) << 32) | tl.load(seeds_ptr + 2 * row)
    position = tl.load(positions_ptr + row).to(tl.int32)
    threshold = tl.load(thresholds_ptr + row)
    first_block = tl.program_id(1) * num_blocks
    # Where no score is above -inf or all are NaN, the program's first column stands.
    best_column = tl.zeros([block], tl.int32) + tl.maximum(first_block * block - lead, 0)
    best = tl.full([block], -float("inf"), tl.float32)
    for index in range(num_blocks):
        start = (first_block + index) * block
        is_needed = True
        if is_truncated:
            # The block is not aligned to groups: it reaches into one more than it has room for.
            groups = tl.maximum(start - lead, 0) // group + tl.arange(0, 2 * block // group)
            maxima = tl.load(maxima_ptr + row * num_groups + groups, groups < num_groups, other=-float("inf"))
            is_needed = (temperature <= 0) | (tl.max(maxima, axis=0) >= threshold)
        if is_needed:
            columns = start - lead + tl.arange(0, block)
            mask = (columns >= 0) & (columns < size)
            score = tl.load(logits_ptr + row * row_stride + columns, mask, other=-float("inf")).to(tl.float32)
            if temperature > 0:
                fours = first_four + start // 4 + tl.arange(0, block // 4)
                score = temper(score, inverse_temperature)
                if is_truncated:
                    score = tl.where(score >= threshold, score, -float("inf"))
                score += _gumbel(seed, position, fours)
            better = score > best  # a NaN never is; among equals the first stays
            best = tl.where(better, score, best)
            best_column = tl.where(better, columns, best_column)
    highest = tl.max(best, axis=0)
    lowest_column = tl.min(tl.where(best == highest, best_column, 0x7FFFFFFF), axis=0)
    token_id = 4 * first_four + lead + lowest_column
    tl.store(keys_ptr + row * tl.num_programs(1) + tl.program_id(1), _key(highest, token_id))


@triton.jit
def greatest_key(keys_ptr: tl.tensor, num_parts: tl.tensor, block: tl.constexpr) -> tl.tensor:
    """Of the `num_parts` int64 keys of a row, read `block` at a time."""
    best = tl.full([block], -0x8000000000000000, tl.int64)
    for start in range(0, num_parts, block):
        parts = start + tl.arange(0, block)
        best = tl.maximum(best, tl.load(keys_ptr + parts, parts < num_parts, other=-0x8000000000000000))
    return tl.max(best, axis=0)


@triton.jit
def hand_out_token(
    key: tl.tensor,
    row: tl.tensor,
    token_ids_ptr: tl.tensor,  # [num_rows] int32 or int64
    token_table_ptr: tl.tensor,  # [num_cells] int32, if there is one
    cells_ptr: tl.tensor,  # [num_rows] int64
    vocab_size: tl.tensor,
    has_table: tl.constexpr,
) -> None:
    """Writes the key's token to where the row's goes: -1 instead if its score is not finite, but never to the table."""
    token_id = tl.minimum(0xFFFFFFFF - (key & 0xFFFFFFFF), vocab_size - 1)
    score = key >> 32  # as scores.ordered: between those of -inf and of the largest float, which stands for infinity
    is_finite = (score > -0x7F800001) & (score < 0x7F7FFFFF)
    tl.store(token_ids_ptr + row, tl.where(is_finite, token_id, -1))
    if has_table:
        tl.store(token_table_ptr + tl.load(cells_ptr + row), token_id)


@triton.jit(do_not_specialize=["num_parts"])
def _take_kernel(
    keys_ptr: tl.tensor,  # [num_rows, num_parts] int64
    token_ids_ptr: tl.tensor,  # [num_rows] int32 or int64
    token_table_ptr: tl.tensor,  # [num_cells] int32, if there is one
    cells_ptr: tl.tensor,  # [num_rows] int64
    vocab_size: tl.tensor,
    num_parts: tl.tensor,
    has_table: tl.constexpr,
    block: tl.constexpr,
    pdl: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    wait_for_earlier_kernels(pdl)
    best = greatest_key(keys_ptr + row * num_parts, num_parts, block)
    hand_out_token(best, row, token_ids_ptr, token_table_ptr, cells_ptr, vocab_size, has_table)


def candidate_keys(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    vocab_start: int,
    kept: Kept | None = None,
    *,
    enough_programs: int = _ENOUGH_PROGRAMS,
) -> torch.Tensor:
    """Each row's best candidates of the vocabulary's slice that begins at `vocab_start`, as keys.

    logits: [num_rows, size] float32 or a half precision, each row contiguous, -inf for columns that are no tokens;
    temperature: [num_rows] float32, 0 for greedy; seeds: [num_rows, 2] int64, the low and the high 32 bits; positions:
    [num_rows] int64 below 2**32, of the token to be sampled; kept: what kernels/truncation.py found for the same logits
    and temperature, for the rows that are not greedy. Returns [num_rows, num_parts] int64 for `take_tokens`; a row's
    greatest counts. NaN counts as -inf; where nothing is above -inf, it is the slice's first token. With more than
    `enough_programs` programs each takes several blocks and reduces once; results are equal.

    Raises ValueError for tensors that the kernel does not take.
    """
    _check(logits, temperature, seeds, positions, vocab_start, kept)
    num_rows, size = logits.shape
    first_four, lead = divmod(vocab_start, 4)
    num_blocks, num_parts = _split(num_rows, lead + size, enough_programs)
    keys = torch.empty((num_rows, num_parts), dtype=torch.int64, device=logits.device)
    if num_rows:
        pdl = starts_early(logits.device, num_rows)
        _candidates_kernel[(num_rows, num_parts)](
            logits,
            temperature,
            seeds,
            positions,
            temperature if kept is None else kept.thresholds,
            temperature if kept is None else kept.maxima,
            keys,
            logits.stride(0),
            size,
            lead,
            first_four,
            num_blocks,
            triton.cdiv(size, GROUP),
            is_truncated=kept is not None,
            group=GROUP,
            block=_BLOCK,
            pdl=pdl,
            num_warps=_NUM_WARPS,
            launch_pdl=pdl,
        )
    return keys


def take_tokens(
    keys: torch.Tensor,
    vocab_size: int,
    out: torch.Tensor,
    token_table: torch.Tensor | None = None,
    cells: torch.Tensor | None = None,
) -> None:
    """Writes the token of each row's greatest key to `out`, and to `token_table` where one is given.

    keys: [num_rows, num_parts] int64, contiguous; out: [num_rows] int32 or int64; token_table: [num_cells] int32, of
    which row i's token goes to cells[i], int64. Ids stay below vocab_size, whatever the logits were; where the greatest
    score is not finite, `out` gets -1, and the table a token that exists, so that the next step can be run.
    """
    num_rows, num_parts = keys.shape
    if num_rows:
        pdl = starts_early(keys.device, num_rows)
        _take_kernel[(num_rows,)](
            keys,
            out,
            out if token_table is None else token_table,
            keys if cells is None else cells,
            vocab_size,
            num_parts,
            has_table=token_table is not None,
            block=TAKE_BLOCK,
            pdl=pdl,
            num_warps=1,
            launch_pdl=pdl,
        )


def _split(num_rows: int, num_tokens: int, enough_programs: int) -> tuple[int, int]:
    """Blocks of one program, and programs of a row."""
    all_blocks = triton.cdiv(num_tokens, _BLOCK)
    num_blocks = min(max(num_rows * all_blocks // enough_programs, 1), _MAX_BLOCKS)
    return num_blocks, triton.cdiv(all_blocks, num_blocks)


def _check(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    vocab_start: int,
    kept: Kept | None,
) -> None:
    if logits.dtype not in _DTYPES or logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(
            f"candidate_keys: logits must be [num_rows, size] of one of {_DTYPES}, each row contiguous, "
            f"not {list(logits.shape)}, {logits.dtype}, strides {logits.stride()}"
        )
    num_rows, size = logits.shape
    if not (size > 0 and vocab_start >= 0 and vocab_start + size <= _MAX_VOCAB):
        raise ValueError(f"candidate_keys: tokens up to {_MAX_VOCAB} are supported, not {size} from {vocab_start}")
    columns = [
        ("temperature", temperature, (num_rows,), torch.float32),
        ("seeds", seeds, (num_rows, 2), torch.int64),
        ("positions", positions, (num_rows,), torch.int64),
    ]
    if kept is not None:
        columns.append(("thresholds", kept.thresholds, (num_rows,), torch.float32))
        columns.append(("maxima", kept.maxima, (num_rows, triton.cdiv(size, GROUP)), torch.float32))
    for name, tensor, shape, dtype in columns:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"candidate_keys: {name} must be {list(shape)}, {dtype} and contiguous, "
                f"not {list(tensor.shape)}, {tensor.dtype}, strides {tensor.stride()}"
            )
