"""Vectors for kernels that numba compiles: sixteen float32 or int32 side by side, eight uint64.

LLVM fits them to the CPU: one AVX-512 register, two of AVX2, four of SSE or NEON. Written out because LLVM finds
little of this by itself: not sums over a few numbers, and not loops as short as a head or a block.

simd_memory.py has what reads and writes them. Numba notes only the file of a kernel beside what it keeps on disk: after
a change here, in simd_memory.py or in cpu_math.py, remove kernels/__pycache__.
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

INT32, INT64, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()  # of LLVM


class Vector(types.Type):
    """`num_lanes` numbers of one LLVM type."""

    def __init__(self, name: str, lane: Any, num_lanes: int) -> None:
        super().__init__(name=name)
        self.llvm = ir.VectorType(lane, num_lanes)


class _VectorModel(PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


register_default(Vector)(_VectorModel)

F32 = Vector("float32x16", FLOAT, 16)
I32 = Vector("int32x16", INT32, 16)
U64 = Vector("uint64x8", INT64, 8)


def _operator(symbol: Any, vector: Vector, result: Vector, build: str, *fixed: str) -> None:
    """Defines `symbol` between two vectors as LLVM's instruction of the name `build`."""

    class Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            return result(vector, vector) if args == (vector, vector) and not kws else None

    infer_global(symbol)(Template)

    def lower(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
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


def splat_value(builder: Any, vector: Any, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(INT32, 0))
    lanes = ir.Constant(ir.VectorType(INT32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes)


def _splat(vector: Vector, scalar: Any) -> Callable[..., Any]:
    @intrinsic
    def splat(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            lane = context.cast(builder, args[0], sig.args[0], scalar)
            return splat_value(builder, vector.llvm, lane)

        return vector(value), generate

    return splat


splat_f32 = _splat(F32, types.float32)
splat_i32 = _splat(I32, types.int32)
splat_u64 = _splat(U64, types.uint64)


def _converter(source: Vector, target: Vector, build: str) -> Callable[..., Any]:
    @intrinsic
    def convert(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return getattr(builder, build)(args[0], target.llvm)

        return target(source), generate

    return convert


bits_of_f32 = _converter(F32, I32, "bitcast")
f32_of_bits = _converter(I32, F32, "bitcast")
f32_of_i32 = _converter(I32, F32, "sitofp")
f32_of_u32 = _converter(I32, F32, "uitofp")


def call_llvm(builder: Any, name: str, result: Any, args: Any, overloaded: str = "v16f32") -> Any:
    function = builder.module.globals.get(f"{name}.{overloaded}")
    if function is None:
        signature = ir.FunctionType(result, [arg.type for arg in args])
        function = ir.Function(builder.module, signature, f"{name}.{overloaded}")
    return builder.call(function, args)


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, in one rounding where the CPU has it."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call_llvm(builder, "llvm.fmuladd", F32.llvm, args)

    return F32(F32, F32, F32), generate


def _comparison(sign: str) -> Callable[..., Any]:
    """select_*(a, b, x, y): x where a compares with b as `sign` says, else y; y also where one is a NaN."""

    @intrinsic
    def select(typing_context: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.select(builder.fcmp_ordered(sign, args[0], args[1]), args[2], args[3])

        return x(F32, F32, x, x), generate

    return select


select_greater = _comparison(">")
select_less = _comparison("<")


def _reduction(name: str, has_start: bool) -> Callable[..., Any]:
    @intrinsic
    def reduce(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            start = [ir.Constant(FLOAT, -0.0)] if has_start else []
            call = call_llvm(builder, name, FLOAT, [*start, *args])
            call.fastmath.add("reassoc")  # halves onto halves, always in the same order
            return call

        return types.float32(F32), generate

    return reduce


sum_of = _reduction("llvm.vector.reduce.fadd", has_start=True)
max_of = _reduction("llvm.vector.reduce.fmax", has_start=False)


@intrinsic
def iota(typing_context: Any) -> Any:
    """0, 1, ... 15, int32."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(I32.llvm, list(range(LANES)))

    return I32(), generate


@intrinsic
def eight_from(typing_context: Any, start: Any) -> Any:
    """start, start + 1, ... start + 7, uint64."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.add(splat_value(builder, U64.llvm, args[0]), ir.Constant(U64.llvm, list(range(8))))

    return U64(types.int64), generate


def _interleave(first: int) -> Callable[..., Any]:
    """Words of four uint64 vectors, a0 b0 c0 d0 a1 ..., their low halves: the sixteen from `first` on."""

    @intrinsic
    def interleave(typing_context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            half = ir.VectorType(INT32, 8)
            a, b, c, d = (builder.trunc(arg, half) for arg in args)
            pairs = ir.Constant(I32.llvm, list(range(16)))
            ab, cd = builder.shuffle_vector(a, b, pairs), builder.shuffle_vector(c, d, pairs)
            order = [group + 8 * word for group in range(first // 4, first // 4 + 4) for word in range(4)]
            return builder.shuffle_vector(ab, cd, ir.Constant(I32.llvm, order))

        return I32(U64, U64, U64, U64), generate

    return interleave


interleave_low = _interleave(0)
interleave_high = _interleave(16)
