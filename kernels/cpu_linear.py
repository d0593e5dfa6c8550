"""Products of a CPU in float32: x @ weight.T + bias, with weights packed into panels of 32 outputs.

A tile of eight rows and one panel is summed in registers over the whole of the inputs (Goto and van de Geijn, "Anatomy
of High-Performance Matrix Multiplication", 2008); the weights of a panel stay in the nearest cache for all tiles of a
block of rows. No size needs code of its own, so there is none to be generated while serving.
Twin: reference.linear.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .cpu_launch import KernelThreads, address
from .simd import F32, FLOAT, INT64, call_llvm, splat_value

Tensor = torch.Tensor

PANEL = 32  # outputs, two vectors
_BLOCK_ROWS = 64  # whose inputs stay in a core's second cache
_FMA_NS = 1 / 64  # for each multiplication, about


def _tile(num_rows: int) -> Callable[..., Any]:
    """The intrinsic that writes `num_rows` rows of one panel's outputs."""

    @intrinsic
    def tile(
        typing_context: Any, x: Any, x_stride: Any, panel: Any, size: Any, bias: Any, out: Any, out_stride: Any
    ) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            x, x_stride, panel, size, bias, out, out_stride = args
            floats, vectors = FLOAT.as_pointer(), F32.llvm.as_pointer()
            halves = [ir.Constant(INT64, 0), ir.Constant(INT64, 16)]

            def vector_at(place: Any) -> Any:
                return builder.bitcast(place, vectors)

            def row_of(first: Any, stride: Any, row: int) -> Any:
                return builder.gep(first, [builder.mul(stride, ir.Constant(INT64, row))])

            x, panel, bias, out = (builder.inttoptr(place, floats) for place in (x, panel, bias, out))
            rows = [row_of(x, x_stride, row) for row in range(num_rows)]
            starts = [builder.load(vector_at(builder.gep(bias, [half])), align=4) for half in halves]
            before = builder.block
            loop, behind = builder.append_basic_block("inputs"), builder.append_basic_block("outputs")
            builder.branch(loop)
            builder.position_at_end(loop)
            index = builder.phi(INT64)
            index.add_incoming(ir.Constant(INT64, 0), before)
            sums = [[builder.phi(F32.llvm) for _ in halves] for _ in rows]
            at = builder.gep(panel, [builder.mul(index, ir.Constant(INT64, PANEL))])
            weights = [builder.load(vector_at(builder.gep(at, [half])), align=4) for half in halves]
            for row, own in zip(rows, sums, strict=True):
                number = splat_value(builder, F32.llvm, builder.load(builder.gep(row, [index]), align=4))
                for total, start, weight in zip(own, starts, weights, strict=True):
                    total.add_incoming(start, before)
                    total.add_incoming(call_llvm(builder, "llvm.fmuladd", F32.llvm, [number, weight, total]), loop)
            following = builder.add(index, ir.Constant(INT64, 1))
            index.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, size), loop, behind)
            builder.position_at_end(behind)
            for row, own in enumerate(sums):
                for half, total in zip(halves, own, strict=True):
                    place = vector_at(builder.gep(row_of(out, out_stride, row), [half]))
                    builder.store(total.incomings[1][0], place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return tile


_tile_8, _tile_4, _tile_2, _tile_1 = (_tile(num_rows) for num_rows in (8, 4, 2, 1))


@njit(cache=True, nogil=True)
def _linear(x, panels, bias, out, num_rows, in_size, out_size, start, end):
    """Panels [start, end). A `bias` of 0: there is none."""
    zeros = np.zeros(PANEL, dtype=np.float32)
    x_stride, out_stride = 4 * in_size, 4 * out_size
    for first in range(0, num_rows, _BLOCK_ROWS):
        last = min(first + _BLOCK_ROWS, num_rows)
        for index in range(start, end):
            panel, column = panels + x_stride * index * PANEL, 4 * index * PANEL
            added = bias + column if bias != 0 else zeros.ctypes.data
            source, target, left = x + x_stride * first, out + out_stride * first + column, last - first
            while left >= 8:
                _tile_8(source, in_size, panel, in_size, added, target, out_size)
                source, target, left = source + 8 * x_stride, target + 8 * out_stride, left - 8
            if left >= 4:
                _tile_4(source, in_size, panel, in_size, added, target, out_size)
                source, target, left = source + 4 * x_stride, target + 4 * out_stride, left - 4
            if left >= 2:
                _tile_2(source, in_size, panel, in_size, added, target, out_size)
                source, target, left = source + 2 * x_stride, target + 2 * out_stride, left - 2
            if left:
                _tile_1(source, in_size, panel, in_size, added, target, out_size)


def takes(weight: Tensor) -> bool:
    """Whether this is how a weight [out_size, in_size] is multiplied: whole panels, and registers for a tile."""
    has_registers = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_registers and weight.dtype == torch.float32 and weight.shape[0] % PANEL == 0


def pack(weight: Tensor) -> Tensor:
    """[out_size, in_size] to panels [out_size / 32, in_size, 32]."""
    return weight.view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous()


def unpack(panels: Tensor) -> Tensor:
    """What `pack` was given."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])


def linear(threads: KernelThreads, x: Tensor, panels: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference, of float32 x [num_tokens, in_size] and what `pack` made of the weight."""
    (num_tokens, in_size), num_panels = x.shape, panels.shape[0]
    assert panels.shape[1:] == (in_size, PANEL), f"x {tuple(x.shape)} does not fit panels {tuple(panels.shape)}"
    out, x = x.new_empty((num_tokens, num_panels * PANEL)), x.contiguous()
    places = address(x), address(panels), 0 if bias is None else address(bias), out.data_ptr()
    args = (*places, num_tokens, in_size, num_panels * PANEL)
    threads.run(_linear, args, num_panels, out.numel() * in_size * _FMA_NS)
    return out
