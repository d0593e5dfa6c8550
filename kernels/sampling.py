"""Gumbel-max sampling in Triton: argmax(logit / temperature + noise), or argmax(logit) for greedy rows.

noise = -log(-log(1 - u)) draws from softmax(logit / temperature) (Gumbel, 1954). u comes from Philox 4x32-10 (Salmon et
al., SC 2011) with the row's seed as key and (position, token_id // 4, 0, 0) as counter: word token_id % 4 is the
token's, so one call serves four tokens and a token's noise is the same in any batch and at any number of ranks. The
twin is workers/sampler/gumbel.py: the same words bit for bit, the logarithms to a few units in the last place.

Two launches, both with a grid that only shapes determine: programs of some thousand tokens each leave their best
score and token, then one program a row finds the best of these.
"""

import torch
import triton
import triton.language as tl

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 1024  # tokens that a program looks at together: 8 a thread at 4 warps
_NUM_WARPS = 4
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
def _partial_kernel(
    logits_ptr: tl.tensor,  # [num_rows, size], rows `row_stride` apart
    temperature_ptr: tl.tensor,  # [num_rows] float32
    seeds_ptr: tl.tensor,  # [num_rows, 2] int64: low and high 32 bits
    positions_ptr: tl.tensor,  # [num_rows] int64
    scores_ptr: tl.tensor,  # [num_rows, num_programs] float32
    columns_ptr: tl.tensor,  # [num_rows, num_programs] int32
    row_stride: tl.tensor,
    size: tl.tensor,
    lead: tl.tensor,  # tokens of the first group of four that are before the slice
    first_group: tl.tensor,  # the slice's first token // 4
    num_blocks: tl.tensor,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    seed = (tl.load(seeds_ptr + 2 * row + 1) << 32) | tl.load(seeds_ptr + 2 * row)
    position = tl.load(positions_ptr + row).to(tl.int32)
    first_block = tl.program_id(1) * num_blocks
    # Where no score is above -inf or all are NaN, the program's first column stands.
    best_column = tl.zeros([block], tl.int32) + tl.maximum(first_block * block - lead, 0)
    best = tl.full([block], -float("inf"), tl.float32)
    for index in range(num_blocks):
        start = (first_block + index) * block
        columns = start - lead + tl.arange(0, block)
        mask = (columns >= 0) & (columns < size)
        score = tl.load(logits_ptr + row * row_stride + columns, mask, other=-float("inf")).to(tl.float32)
        if temperature > 0:
            groups = first_group + start // 4 + tl.arange(0, block // 4)
            score = score / temperature
            # Above the largest float all are equal; the noise is too small to tell them apart.
            score = tl.where(score == float("inf"), 3.4028234663852886e38, score)
            score += _gumbel(seed, position, groups)
        better = score > best  # a NaN never is; among equals the first stays
        best = tl.where(better, score, best)
        best_column = tl.where(better, columns, best_column)
    highest = tl.max(best, axis=0)
    lowest_column = tl.min(tl.where(best == highest, best_column, 0x7FFFFFFF), axis=0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(scores_ptr + place, highest)
    tl.store(columns_ptr + place, lowest_column)


@triton.jit
def _reduce_kernel(
    scores_ptr: tl.tensor,  # [num_rows, num_parts] float32
    columns_ptr: tl.tensor,  # [num_rows, num_parts] int32
    best_scores_ptr: tl.tensor,  # [num_rows] float32
    best_ids_ptr: tl.tensor,  # [num_rows] int64
    vocab_start: tl.tensor,
    num_parts: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, block)
    mask = parts < num_parts
    scores = tl.load(scores_ptr + row * num_parts + parts, mask, other=-float("inf"))
    columns = tl.load(columns_ptr + row * num_parts + parts, mask, other=0x7FFFFFFF)
    highest = tl.max(scores, axis=0)
    column = tl.min(tl.where(scores == highest, columns, 0x7FFFFFFF), axis=0)
    tl.store(best_scores_ptr + row, highest)
    tl.store(best_ids_ptr + row, column.to(tl.int64) + vocab_start)


def sample_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    vocab_start: int,
    *,
    enough_programs: int = _ENOUGH_PROGRAMS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's best score and its token, of the vocabulary's slice that begins at `vocab_start`.

    logits: [num_rows, size] float32 or a half precision, each row contiguous, -inf for columns that are no tokens;
    temperature: [num_rows] float32, 0 for greedy; seeds: [num_rows, 2] int64, the low and the high 32 bits; positions:
    [num_rows] int64 below 2**32, of the token to be sampled. Returns scores [num_rows] float32 and token ids [num_rows]
    int64: the lowest id among equal scores. NaN counts as -inf; where nothing is above -inf the id is `vocab_start`.
    With more than `enough_programs` programs each takes several blocks and reduces once, at its end; results are equal.

    Raises ValueError for tensors that the kernel does not take.
    """
    _check(logits, temperature, seeds, positions, vocab_start)
    num_rows, size = logits.shape
    first_group, lead = divmod(vocab_start, 4)
    num_blocks, num_parts = _split(num_rows, lead + size, enough_programs)
    scores = torch.empty((num_rows, num_parts), dtype=torch.float32, device=logits.device)
    columns = torch.empty((num_rows, num_parts), dtype=torch.int32, device=logits.device)
    best_scores = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    best_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        _partial_kernel[(num_rows, num_parts)](
            logits,
            temperature,
            seeds,
            positions,
            scores,
            columns,
            logits.stride(0),
            size,
            lead,
            first_group,
            num_blocks,
            block=_BLOCK,
            num_warps=_NUM_WARPS,
        )
        block = triton.next_power_of_2(num_parts)
        _reduce_kernel[(num_rows,)](
            scores,
            columns,
            best_scores,
            best_ids,
            vocab_start,
            num_parts=num_parts,
            block=block,
            num_warps=min(max(block // 128, 1), 8),
        )
    return best_scores, best_ids


def _split(num_rows: int, num_tokens: int, enough_programs: int) -> tuple[int, int]:
    """Blocks of one program, and programs of a row."""
    all_blocks = triton.cdiv(num_tokens, _BLOCK)
    num_blocks = min(max(num_rows * all_blocks // enough_programs, 1), _MAX_BLOCKS)
    return num_blocks, triton.cdiv(all_blocks, num_blocks)


def _check(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, vocab_start: int
) -> None:
    if logits.dtype not in _DTYPES or logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(
            f"sample_tokens: logits must be [num_rows, size] of one of {_DTYPES}, each row contiguous, "
            f"not {list(logits.shape)}, {logits.dtype}, strides {logits.stride()}"
        )
    num_rows, size = logits.shape
    if not (size > 0 and vocab_start >= 0 and vocab_start + size <= _MAX_VOCAB):
        raise ValueError(f"sample_tokens: tokens up to {_MAX_VOCAB} are supported, not {size} from {vocab_start}")
    for name, tensor, shape, dtype in (
        ("temperature", temperature, (num_rows,), torch.float32),
        ("seeds", seeds, (num_rows, 2), torch.int64),
        ("positions", positions, (num_rows,), torch.int64),
    ):
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"sample_tokens: {name} must be {list(shape)}, {dtype} and contiguous, "
                f"not {list(tensor.shape)}, {tensor.dtype}, strides {tensor.stride()}"
            )
