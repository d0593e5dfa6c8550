"""What the Triton products of a few rows (kernels/gemv.py, kernels/small_matmul.py) take, and what they refuse."""

import torch

DTYPES = (torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16  # of one load, and of the copy engine's rows


def takes_weight(in_size: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take weights [any, in_size] of `dtype`."""
    return dtype in DTYPES and in_size * dtype.itemsize % _ALIGNMENT_BYTES == 0


def check_linear(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, max_rows: int) -> None:
    """Raises ValueError if kernel `name` does not take them.

    x: [1 to max_rows, in_size]; weight: [out_size, in_size]; bias: [out_size] or None.
    """
    tensors = [x, weight] if bias is None else [x, weight, bias]
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
    if x.dtype not in DTYPES or any(tensor.dtype != x.dtype for tensor in tensors):
        dtypes = ", ".join(str(tensor.dtype) for tensor in tensors)
        raise ValueError(f"{name}: x, weight and bias of one of {DTYPES} are needed, not {dtypes}")
    if x.dim() != 2 or not 0 < len(x) <= max_rows or weight.dim() != 2 or not weight.numel():
        raise ValueError(f"{name}: 1 to {max_rows} rows and a weight are needed, not {shapes}")
    if weight.shape[1] != x.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"{name}: x, weight and bias do not fit each other: {shapes}")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"{name}: contiguous tensors are needed, not of strides {[t.stride() for t in tensors]}")
    aligned = all(tensor.data_ptr() % _ALIGNMENT_BYTES == 0 for tensor in (x, weight))
    if not (takes_weight(weight.shape[1], weight.dtype) and aligned):
        raise ValueError(f"{name}: rows of x and weight must start at whole {_ALIGNMENT_BYTES} bytes: {shapes}")


def num_pairs(name: str, gate_up_weight: torch.Tensor) -> int:
    """Gates (and as many ups) of a weight [2 * n, in_size]. Raises ValueError for an odd number of rows."""
    pairs, odd = divmod(len(gate_up_weight), 2)
    if odd:
        raise ValueError(f"{name}: gates and as many ups are needed, not {len(gate_up_weight)} rows of weight")
    return pairs
