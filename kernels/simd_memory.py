"""How kernels that numba compiles read and write memory (simd.py has their vectors).

Memory is addressed by numbers, as torch's data_ptr gives them, with indexes in elements. What lies there is told by the
type of a `like`: np.float32 for float32, np.uint16 for bfloat16, which becomes float32 when loaded.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .simd import F32, FLOAT, I32, INT32, INT64, LANES, call_llvm, splat_value

_INT16 = ir.IntType(16)
_LIKE = {types.float32: FLOAT, types.uint16: _INT16}


def _pointer(builder: Any, address: Any, index: Any, element: Any, target: Any) -> Any:
    place = builder.gep(builder.inttoptr(address, element.as_pointer()), [index])
    return builder.bitcast(place, target.as_pointer())


def _lane_mask(builder: Any, begin: Any, end: Any) -> Any:
    """Lanes [begin, end)."""
    lanes = ir.Constant(ir.VectorType(INT64, LANES), list(range(LANES)))
    return builder.and_(
        builder.icmp_signed(">=", lanes, splat_value(builder, lanes.type, begin)),
        builder.icmp_signed("<", lanes, splat_value(builder, lanes.type, end)),
    )


def _widened(builder: Any, value: Any) -> Any:
    """float32 of loaded float32 or bfloat16."""
    if value.type.element == FLOAT:
        return value
    bits = builder.shl(builder.zext(value, I32.llvm), ir.Constant(I32.llvm, [16] * LANES))
    return builder.bitcast(bits, F32.llvm)


def _narrowed(builder: Any, value: Any, element: Any) -> Any:
    """float32 as it is stored: bfloat16 is rounded to nearest, halves to even. NaNs stay NaNs."""
    if element == FLOAT:
        return value
    bits = builder.bitcast(value, I32.llvm)
    shift, one, half = (ir.Constant(I32.llvm, [number] * LANES) for number in (16, 1, 0x7FFF))
    is_odd = builder.and_(builder.lshr(bits, shift), one)
    rounded = builder.add(bits, builder.add(is_odd, half))
    nan = ir.Constant(I32.llvm, [0x7FC00000] * LANES)
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), nan, rounded)
    return builder.trunc(builder.lshr(rounded, shift), ir.VectorType(_INT16, LANES))


@intrinsic
def load(typing_context: Any, address: Any, index: Any, like: Any) -> Any:
    """Sixteen elements from `index` on, as float32."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = _LIKE[like]
        place = _pointer(builder, args[0], args[1], element, ir.VectorType(element, LANES))
        return _widened(builder, builder.load(place, align=1))

    return F32(types.int64, types.int64, like), generate


@intrinsic
def load_lanes(typing_context: Any, address: Any, index: Any, begin: Any, end: Any, other: Any, like: Any) -> Any:
    """As `load`, but reads lanes [begin, end) only; the others are those of `other`."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = _LIKE[like]
        vector = ir.VectorType(element, LANES)
        mask = _lane_mask(builder, args[2], args[3])
        place = _pointer(builder, args[0], args[1], element, vector)
        operands = [place, ir.Constant(INT32, 1), mask, ir.Constant(vector, None)]
        name = "v16f32.p0" if element == FLOAT else "v16i16.p0"
        read = _widened(builder, call_llvm(builder, "llvm.masked.load", vector, operands, name))
        return builder.select(mask, read, args[4])

    return F32(types.int64, types.int64, types.int64, types.int64, F32, like), generate


@intrinsic
def store(typing_context: Any, address: Any, index: Any, value: Any, like: Any) -> Any:
    """Sixteen elements from `index` on."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = _LIKE[like]
        place = _pointer(builder, args[0], args[1], element, ir.VectorType(element, LANES))
        builder.store(_narrowed(builder, args[2], element), place, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, F32, like), generate


@intrinsic
def store_lanes(typing_context: Any, address: Any, index: Any, value: Any, end: Any, like: Any) -> Any:
    """As `store`, but writes lanes [0, end) only."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = _LIKE[like]
        vector = ir.VectorType(element, LANES)
        place = _pointer(builder, args[0], args[1], element, vector)
        mask = _lane_mask(builder, ir.Constant(INT64, 0), args[3])
        operands = [_narrowed(builder, args[2], element), place, ir.Constant(INT32, 1), mask]
        name = "v16f32.p0" if element == FLOAT else "v16i16.p0"
        call_llvm(builder, "llvm.masked.store", ir.VoidType(), operands, name)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, F32, types.int64, like), generate


def _reader(kind: Any, element: Any) -> Callable[..., Any]:
    """Reads one number."""

    @intrinsic
    def read(typing_context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.load(_pointer(builder, args[0], args[1], element, element), align=1)

        return kind(types.int64, types.int64), generate

    return read


read_f32 = _reader(types.float32, FLOAT)
read_i32 = _reader(types.int32, INT32)
read_i64 = _reader(types.int64, INT64)


@intrinsic
def write_f32(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Writes one number."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(builder, args[0], args[1], FLOAT, FLOAT), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def store_sums(typing_context: Any, address: Any, index: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Stores the sums of four vectors, four float32 from `index` on: in a third of the steps that four sums take."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def added(x: Any, y: Any, *lanes: list[int]) -> Any:
            """The sum of two choices of `lanes` of x and y."""
            masks = (ir.Constant(ir.VectorType(INT32, len(chosen)), chosen) for chosen in lanes)
            return builder.fadd(*(builder.shuffle_vector(x, y, mask) for mask in masks))

        def in_quarters(*lanes: int) -> list[int]:
            return [quarter + lane for quarter in range(0, LANES, 4) for lane in lanes]

        # Of each four lanes, what is left of x and y side by side.
        low, high = in_quarters(0, 16, 1, 17), in_quarters(2, 18, 3, 19)
        ab, cd = added(args[2], args[3], low, high), added(args[4], args[5], low, high)
        low, high = in_quarters(0, 1, 16, 17), in_quarters(2, 3, 18, 19)
        sums = added(ab, cd, low, high)
        sums = added(sums, sums, list(range(8)), list(range(8, 16)))
        sums = added(sums, sums, list(range(4)), list(range(4, 8)))
        place = _pointer(builder, args[0], args[1], FLOAT, sums.type)
        builder.store(sums, place, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, F32, F32, F32, F32), generate


@intrinsic
def line_size(typing_context: Any, like: Any) -> Any:
    """Elements of a line of the core's cache, of 64 bytes."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(INT64, 16 if _LIKE[like] == FLOAT else 32)

    return types.int64(like), generate


@intrinsic
def prefetch(typing_context: Any, address: Any, index: Any, like: Any) -> Any:
    """Has the core begin to read the line of one element."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _pointer(builder, args[0], args[1], _LIKE[like], ir.IntType(8))
        # To be read, into the nearest cache, data.
        hints = [ir.Constant(INT32, hint) for hint in (0, 3, 1)]
        call_llvm(builder, "llvm.prefetch", ir.VoidType(), [place, *hints], "p0")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, like), generate
