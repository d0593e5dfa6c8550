"""Vectors for kernels that numba compiles: sixteen float32 or int32 side by side, eight uint64.

LLVM fits them to the CPU: one AVX-512 register, two of AVX2, four of SSE or NEON. Written out because LLVM finds
little of this by itself: not sums over a few numbers, and not loops as short as a head or a block.

Memory is addressed by numbers, as torch's data_ptr gives them, with indexes in elements. What lies there is told by the
type of a `like`: np.float32 for float32, np.uint16 for bfloat16, which becomes float32 when loaded.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.datamodel.registry import register_default
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin

LANES = 16  # of float32 and int32

_I1, _I16, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


class Vector(types.Type):
    """`num_lanes` numbers of one LLVM type."""

    def __init__(self, name: str, lane: Any, num_lanes: int) -> None:  # noqa: ANN401 (llvmlite has no types)
        super().__init__(name=name)
        self.llvm = ir.VectorType(lane, num_lanes)


class _VectorModel(PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:  # noqa: ANN401
        super().__init__(manager, vector, vector.llvm)


register_default(Vector)(_VectorModel)

F32 = Vector("float32x16", _F32, 16)
I32 = Vector("int32x16", _I32, 16)
U64 = Vector("uint64x8", _I64, 8)
_LIKE = {types.float32: _F32, types.uint16: _I16}


def _operator(symbol: Any, vector: Vector, result: Vector, build: str, *fixed: str) -> None:  # noqa: ANN401
    """Defines `symbol` between two vectors as LLVM's instruction of the name `build`."""

    class Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:  # noqa: ANN401
            return result(vector, vector) if args == (vector, vector) and not kws else None

    infer_global(symbol)(Template)

    def lower(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:  # noqa: ANN401
        return getattr(builder, build)(*fixed, *args)

    lower_builtin(symbol, vector, vector)(lower)


for _symbol, _float, _int in (
    (operator.add, "fadd", "add"),
    (operator.sub, "fsub", "sub"),
    (operator.mul, "fmul", "mul"),
    (operator.truediv, "fdiv", None),
    (operator.and_, None, "and_"),
    (operator.xor, None, "xor"),
    (operator.lshift, None, "shl"),
):
    if _float:
        _operator(_symbol, F32, F32, _float)
    if _int:
        _operator(_symbol, I32, I32, _int)
        _operator(_symbol, U64, U64, _int)
_operator(operator.rshift, I32, I32, "ashr")
_operator(operator.rshift, U64, U64, "lshr")


def _splat_value(builder: Any, vector: Any, scalar: Any) -> Any:  # noqa: ANN401
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    lanes = ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes)


def _splat(vector: Vector, scalar: Any) -> Callable[..., Any]:  # noqa: ANN401
    @intrinsic
    def splat(typing_context: Any, value: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
            lane = context.cast(builder, args[0], sig.args[0], scalar)
            return _splat_value(builder, vector.llvm, lane)

        return vector(value), generate

    return splat


splat_f32 = _splat(F32, types.float32)
splat_i32 = _splat(I32, types.int32)
splat_u64 = _splat(U64, types.uint64)


def _converter(source: Vector, target: Vector, build: str) -> Callable[..., Any]:
    @intrinsic
    def convert(typing_context: Any, value: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
            return getattr(builder, build)(args[0], target.llvm)

        return target(source), generate

    return convert


bits_of_f32 = _converter(F32, I32, "bitcast")
f32_of_bits = _converter(I32, F32, "bitcast")
f32_of_i32 = _converter(I32, F32, "sitofp")
f32_of_u32 = _converter(I32, F32, "uitofp")


def _call(builder: Any, name: str, result: Any, args: Any, overloaded: str = "v16f32") -> Any:  # noqa: ANN401
    function = builder.module.globals.get(f"{name}.{overloaded}")
    if function is None:
        signature = ir.FunctionType(result, [arg.type for arg in args])
        function = ir.Function(builder.module, signature, f"{name}.{overloaded}")
    return builder.call(function, args)


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:  # noqa: ANN401
    """a * b + c, in one rounding where the CPU has it."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        return _call(builder, "llvm.fmuladd", F32.llvm, args)

    return F32(F32, F32, F32), generate


def _comparison(sign: str) -> Callable[..., Any]:
    """select_*(a, b, x, y): x where a compares with b as `sign` says, else y; y also where one is a NaN."""

    @intrinsic
    def select(typing_context: Any, a: Any, b: Any, x: Any, y: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
            return builder.select(builder.fcmp_ordered(sign, args[0], args[1]), args[2], args[3])

        return x(F32, F32, x, x), generate

    return select


select_greater = _comparison(">")
select_less = _comparison("<")


def _reduction(name: str, has_start: bool) -> Callable[..., Any]:
    @intrinsic
    def reduce(typing_context: Any, value: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
            start = [ir.Constant(_F32, -0.0)] if has_start else []
            call = _call(builder, name, _F32, [*start, *args])
            call.fastmath.add("reassoc")  # halves onto halves, always in the same order
            return call

        return types.float32(F32), generate

    return reduce


sum_of = _reduction("llvm.vector.reduce.fadd", has_start=True)
max_of = _reduction("llvm.vector.reduce.fmax", has_start=False)


@intrinsic
def iota(typing_context: Any) -> Any:  # noqa: ANN401
    """0, 1, ... 15, int32."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        return ir.Constant(I32.llvm, list(range(LANES)))

    return I32(), generate


@intrinsic
def eight_from(typing_context: Any, start: Any) -> Any:  # noqa: ANN401
    """start, start + 1, ... start + 7, uint64."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        return builder.add(_splat_value(builder, U64.llvm, args[0]), ir.Constant(U64.llvm, list(range(8))))

    return U64(types.int64), generate


def _pointer(builder: Any, address: Any, index: Any, element: Any, target: Any) -> Any:  # noqa: ANN401
    place = builder.gep(builder.inttoptr(address, element.as_pointer()), [index])
    return builder.bitcast(place, target.as_pointer())


def _lane_mask(builder: Any, begin: Any, end: Any) -> Any:  # noqa: ANN401
    """Lanes [begin, end)."""
    lanes = ir.Constant(ir.VectorType(_I64, LANES), list(range(LANES)))
    return builder.and_(
        builder.icmp_signed(">=", lanes, _splat_value(builder, lanes.type, begin)),
        builder.icmp_signed("<", lanes, _splat_value(builder, lanes.type, end)),
    )


def _widened(builder: Any, value: Any) -> Any:  # noqa: ANN401
    """float32 of loaded float32 or bfloat16."""
    if value.type.element == _F32:
        return value
    bits = builder.shl(builder.zext(value, I32.llvm), ir.Constant(I32.llvm, [16] * LANES))
    return builder.bitcast(bits, F32.llvm)


def _narrowed(builder: Any, value: Any, element: Any) -> Any:  # noqa: ANN401
    """float32 as it is stored: bfloat16 is rounded to nearest, halves to even. NaNs stay NaNs."""
    if element == _F32:
        return value
    bits = builder.bitcast(value, I32.llvm)
    shift, one, half = (ir.Constant(I32.llvm, [number] * LANES) for number in (16, 1, 0x7FFF))
    is_odd = builder.and_(builder.lshr(bits, shift), one)
    rounded = builder.add(bits, builder.add(is_odd, half))
    nan = ir.Constant(I32.llvm, [0x7FC00000] * LANES)
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), nan, rounded)
    return builder.trunc(builder.lshr(rounded, shift), ir.VectorType(_I16, LANES))


@intrinsic
def load(typing_context: Any, address: Any, index: Any, like: Any) -> Any:  # noqa: ANN401
    """Sixteen elements from `index` on, as float32."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        element = _LIKE[like]
        place = _pointer(builder, args[0], args[1], element, ir.VectorType(element, LANES))
        return _widened(builder, builder.load(place, align=1))

    return F32(types.int64, types.int64, like), generate


@intrinsic
def load_lanes(typing_context: Any, address: Any, index: Any, begin: Any, end: Any, other: Any, like: Any) -> Any:  # noqa: ANN401
    """As `load`, but reads lanes [begin, end) only; the others are those of `other`."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        element = _LIKE[like]
        vector = ir.VectorType(element, LANES)
        mask = _lane_mask(builder, args[2], args[3])
        place = _pointer(builder, args[0], args[1], element, vector)
        operands = [place, ir.Constant(_I32, 1), mask, ir.Constant(vector, None)]
        name = "v16f32.p0" if element == _F32 else "v16i16.p0"
        read = _widened(builder, _call(builder, "llvm.masked.load", vector, operands, name))
        return builder.select(mask, read, args[4])

    return F32(types.int64, types.int64, types.int64, types.int64, F32, like), generate


@intrinsic
def store(typing_context: Any, address: Any, index: Any, value: Any, like: Any) -> Any:  # noqa: ANN401
    """Sixteen elements from `index` on."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        element = _LIKE[like]
        place = _pointer(builder, args[0], args[1], element, ir.VectorType(element, LANES))
        builder.store(_narrowed(builder, args[2], element), place, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, F32, like), generate


@intrinsic
def store_lanes(typing_context: Any, address: Any, index: Any, value: Any, end: Any, like: Any) -> Any:  # noqa: ANN401
    """As `store`, but writes lanes [0, end) only."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        element = _LIKE[like]
        vector = ir.VectorType(element, LANES)
        place = _pointer(builder, args[0], args[1], element, vector)
        mask = _lane_mask(builder, ir.Constant(_I64, 0), args[3])
        operands = [_narrowed(builder, args[2], element), place, ir.Constant(_I32, 1), mask]
        name = "v16f32.p0" if element == _F32 else "v16i16.p0"
        _call(builder, "llvm.masked.store", ir.VoidType(), operands, name)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, F32, types.int64, like), generate


def _interleave(first: int) -> Callable[..., Any]:
    """Words of four uint64 vectors, a0 b0 c0 d0 a1 ..., their low halves: the sixteen from `first` on."""

    @intrinsic
    def interleave(typing_context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
            half = ir.VectorType(_I32, 8)
            a, b, c, d = (builder.trunc(arg, half) for arg in args)
            pairs = ir.Constant(I32.llvm, list(range(16)))
            ab, cd = builder.shuffle_vector(a, b, pairs), builder.shuffle_vector(c, d, pairs)
            order = [group + 8 * word for group in range(first // 4, first // 4 + 4) for word in range(4)]
            return builder.shuffle_vector(ab, cd, ir.Constant(I32.llvm, order))

        return I32(U64, U64, U64, U64), generate

    return interleave


interleave_low = _interleave(0)
interleave_high = _interleave(16)


def _reader(kind: Any, element: Any) -> Callable[..., Any]:  # noqa: ANN401
    """Reads one number."""

    @intrinsic
    def read(typing_context: Any, address: Any, index: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
            return builder.load(_pointer(builder, args[0], args[1], element, element), align=1)

        return kind(types.int64, types.int64), generate

    return read


read_f32 = _reader(types.float32, _F32)
read_i32 = _reader(types.int32, _I32)
read_i64 = _reader(types.int64, _I64)


@intrinsic
def write_f32(typing_context: Any, address: Any, index: Any, value: Any) -> Any:  # noqa: ANN401
    """Writes one number."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        builder.store(args[2], _pointer(builder, args[0], args[1], _F32, _F32), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def store_sums(typing_context: Any, address: Any, index: Any, a: Any, b: Any, c: Any, d: Any) -> Any:  # noqa: ANN401
    """Stores the sums of four vectors, four float32 from `index` on: in a third of the steps that four sums take."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        def added(x: Any, y: Any, *lanes: list[int]) -> Any:  # noqa: ANN401
            """The sum of two choices of `lanes` of x and y."""
            masks = (ir.Constant(ir.VectorType(_I32, len(chosen)), chosen) for chosen in lanes)
            return builder.fadd(*(builder.shuffle_vector(x, y, mask) for mask in masks))

        quarters = range(0, LANES, 4)
        # Of each four lanes, what is left of x and y side by side.
        low, high = (sum(([q + i, q + 16 + i, q + i + 1, q + 17 + i] for q in quarters), []) for i in (0, 2))
        ab, cd = added(args[2], args[3], low, high), added(args[4], args[5], low, high)
        low, high = (sum(([q + i, q + i + 1, q + 16 + i, q + 17 + i] for q in quarters), []) for i in (0, 2))
        sums = added(ab, cd, low, high)
        sums = added(sums, sums, list(range(8)), list(range(8, 16)))
        sums = added(sums, sums, list(range(4)), list(range(4, 8)))
        place = _pointer(builder, args[0], args[1], _F32, sums.type)
        builder.store(sums, place, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, F32, F32, F32, F32), generate


@intrinsic
def line_size(typing_context: Any, like: Any) -> Any:  # noqa: ANN401
    """Elements of a line of the core's cache, of 64 bytes."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        return ir.Constant(_I64, 16 if _LIKE[like] == _F32 else 32)

    return types.int64(like), generate


@intrinsic
def prefetch(typing_context: Any, address: Any, index: Any, like: Any) -> Any:  # noqa: ANN401
    """Has the core begin to read the line of one element."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ANN401
        place = _pointer(builder, args[0], args[1], _LIKE[like], ir.IntType(8))
        # To be read, into the nearest cache, data.
        hints = [ir.Constant(_I32, hint) for hint in (0, 3, 1)]
        _call(builder, "llvm.prefetch", ir.VoidType(), [place, *hints], "p0")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, like), generate
