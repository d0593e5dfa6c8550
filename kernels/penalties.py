"""Repetition, presence and frequency penalties in Triton, at the cost of a row's known tokens, not of its vocabulary.

A token in prompt or output has its logit x changed to (x / r if x > 0 else x * r) - f * n - p * [n > 0], where n counts
it in the output. One launch counts each token into a cell of its own; the next takes every cell back to zero, and
whoever finds it above changes the logit, once. The twin is workers/sampler/penalties.py, to the last bit.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 1024
_SEEN = tl.constexpr(1 << 30)  # beside the count, which stays below


@triton.jit
def _cells(
    tokens_ptr: tl.tensor,
    num_known: tl.tensor,
    width: tl.tensor,
    vocab_start: tl.tensor,
    size: tl.tensor,
    block: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of this program's tokens: index in the sequence, column in the slice, and whether both are within bounds."""
    index = tl.program_id(1) * block + tl.arange(0, block)
    known = (index < width) & (index < num_known)
    columns = tl.load(tokens_ptr + tl.program_id(0).to(tl.int64) * width + index, known, other=0) - vocab_start
    return index, columns, known & (columns >= 0) & (columns < size)


# The width grows with the sequences, and positions lie where the batch has them: neither must compile anything.
@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["positions_ptr"])
def _count_kernel(
    tokens_ptr: tl.tensor,  # [num_penalised, width] int32
    rows_ptr: tl.tensor,  # [num_penalised] int64
    positions_ptr: tl.tensor,  # [num_rows] int64
    num_prompt_ptr: tl.tensor,  # [num_penalised] int64
    counts_ptr: tl.tensor,  # [num_penalised, size] int32, zero
    width: tl.tensor,
    vocab_start: tl.tensor,
    size: tl.tensor,
    block: tl.constexpr,
) -> None:
    entry = tl.program_id(0).to(tl.int64)
    num_known = tl.load(positions_ptr + tl.load(rows_ptr + entry))
    index, columns, known = _cells(tokens_ptr, num_known, width, vocab_start, size, block)
    cells = counts_ptr + entry * size + columns
    is_output = index >= tl.load(num_prompt_ptr + entry)
    tl.atomic_or(cells, _SEEN, known, sem="relaxed")
    tl.atomic_add(cells, 1, known & is_output, sem="relaxed")


@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["positions_ptr"])
def _penalise_kernel(
    logits_ptr: tl.tensor,  # [num_rows, size] float32, rows `row_stride` apart
    tokens_ptr: tl.tensor,  # [num_penalised, width] int32
    rows_ptr: tl.tensor,  # [num_penalised] int64
    positions_ptr: tl.tensor,  # [num_rows] int64
    repetition_ptr: tl.tensor,  # [num_penalised] float32
    presence_ptr: tl.tensor,  # [num_penalised] float32
    frequency_ptr: tl.tensor,  # [num_penalised] float32
    counts_ptr: tl.tensor,  # [num_penalised, size] int32; zero afterwards
    row_stride: tl.tensor,
    width: tl.tensor,
    vocab_start: tl.tensor,
    size: tl.tensor,
    block: tl.constexpr,
) -> None:
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + entry)
    num_known = tl.load(positions_ptr + row)
    _, columns, known = _cells(tokens_ptr, num_known, width, vocab_start, size, block)
    taken = tl.atomic_xchg(counts_ptr + entry * size + columns, 0, known, sem="relaxed")
    is_mine = known & (taken != 0)
    num_output = (taken & (_SEEN - 1)).to(tl.float32)
    logits = tl.load(logits_ptr + row * row_stride + columns, is_mine, other=0.0)
    repetition = tl.load(repetition_ptr + entry)
    logits = tl.where(logits > 0, tl.div_rn(logits, repetition), logits * repetition)
    logits -= tl.load(frequency_ptr + entry) * num_output
    logits -= tl.where(num_output > 0, tl.load(presence_ptr + entry), 0.0)
    tl.store(logits_ptr + row * row_stride + columns, logits, is_mine)


def penalise(
    logits: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    num_prompt: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    vocab_start: int,
) -> None:
    """Penalises `rows` [m] int64, no two the same, of logits [num_rows, size] float32 in place.

    The logits are of the vocabulary's slice that begins at `vocab_start`. tokens: [m, width] int32, of which row i has
    positions[rows[i]] and its prompt the first num_prompt[i]; positions: [num_rows] int64; num_prompt: [m] int64;
    repetition, presence, frequency: m float32 values each.
    """
    assert logits.dtype == torch.float32, "penalties are of float32 logits"
    assert logits.stride(1) == 1, "each row is contiguous"
    assert tokens.is_contiguous(), "rows lie one behind the other"
    size, (num_entries, width) = logits.shape[1], tokens.shape
    grid = (num_entries, triton.cdiv(width, _BLOCK))
    counts = torch.zeros((num_entries, size), dtype=torch.int32, device=logits.device)
    _count_kernel[grid](tokens, rows, positions, num_prompt, counts, width, vocab_start, size, block=_BLOCK)
    _penalise_kernel[grid](
        logits,
        tokens,
        rows,
        positions,
        repetition,
        presence,
        frequency,
        counts,
        logits.stride(0),
        width,
        vocab_start,
        size,
        block=_BLOCK,
        # A product and a difference rounded as one would not be the twin's.
        enable_fp_fusion=False,
    )
