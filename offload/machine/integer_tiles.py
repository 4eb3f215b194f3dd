"""Loops in LLVM's own language, for numba's functions: vectors that its compiler would not find itself.

Knows addresses and counts, no arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
Work = Callable[[Any, Any, Sequence[Any]], Sequence[Any]]


def sums(rows: int, outputs: int, lanes: int, wide: bool) -> Any:
    """tile(a, a_B, b, b_B, count, out): int32 out[r, o] = sum of a[r, i] * b[o, i], over `count` i, whole `lanes`.

    a and b are addresses of matrices whose rows lie a_B and b_B bytes apart: int16, and int16 if `wide`, else int8.
    """
    narrow, pairs = ir.VectorType(i16, lanes), ir.VectorType(i32, lanes // 2)
    stored = narrow if wide else ir.VectorType(i8, lanes)

    @intrinsic
    def tile(_: Any, a: Any, a_B: Any, b: Any, b_B: Any, count: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            a, a_B, b, b_B, count, out = args
            multiply = _function(builder, pairs, [narrow, narrow], "llvm.x86.avx2.pmadd.wd")
            add_up = _function(builder, i32, [pairs], f"llvm.vector.reduce.add.v{lanes // 2}i32")

            def step(at: Any, totals: Sequence[Any]) -> list[Any]:
                a_at, b_at = builder.shl(at, i64(1)), builder.shl(at, i64(1)) if wide else at
                weights = [_load(builder, builder.add(b_at, _nth(builder, b, b_B, o)), stored) for o in range(outputs)]
                if not wide:
                    weights = [builder.sext(weight, narrow) for weight in weights]
                new = []
                for r in range(rows):
                    row = _load(builder, builder.add(a_at, _nth(builder, a, a_B, r)), narrow)
                    own = totals[r * outputs : (r + 1) * outputs]
                    products = [builder.call(multiply, [row, weight]) for weight in weights]
                    new += [builder.add(total, one) for total, one in zip(own, products, strict=True)]
                return new

            zero = ir.Constant(pairs, [0] * (lanes // 2))
            totals = _loop(builder, count, lanes, [zero] * (rows * outputs), step)
            for place, total in enumerate(totals):
                where = builder.inttoptr(builder.add(out, i64(4 * place)), i32.as_pointer())
                builder.store(builder.call(add_up, [total]), where)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return tile


def _pointer(_: Any, address: Any) -> Any:
    """The address as what `numba.carray` takes: an integer reaches a loop in a tenth of an array's time."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), generate


pointer: Any = intrinsic(_pointer)


def expansion(group: int) -> Any:
    """expand(codes, steps, origins, count, out): int16 out[g, j] = code * steps[g] + origins[g] of `count` groups.

    The result is that of int8, modulo 256: it is made in the upper half of its 16 bits.
    Addresses of uint8 codes, of each group those of its first half in the low bits; of uint8 steps and int8 origins.
    """
    half = group // 2
    packed, wide = ir.VectorType(i8, half), ir.VectorType(i16, half)

    @intrinsic
    def expand(_: Any, codes: Any, steps: Any, origins: Any, count: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            codes, steps, origins, count, out = args

            def everywhere(numbers: Any, at: Any) -> Any:
                number = builder.shl(builder.zext(_load(builder, builder.add(numbers, at), i8), i16), i16(8))
                first = builder.insert_element(ir.Constant(wide, ir.Undefined), number, i32(0))
                lanes = ir.Constant(ir.VectorType(i32, half), [0] * half)
                return builder.shuffle_vector(first, ir.Constant(wide, ir.Undefined), lanes)

            def step(at: Any, _: Sequence[Any]) -> list[Any]:
                scale = everywhere(steps, at)
                origin = everywhere(origins, at)
                both = builder.zext(_load(builder, builder.add(codes, builder.mul(at, i64(half))), packed), wide)
                low = builder.and_(both, ir.Constant(wide, [15] * half))
                high = builder.lshr(both, ir.Constant(wide, [4] * half))
                for place, code in enumerate((low, high)):
                    where = builder.add(out, builder.add(builder.mul(at, i64(2 * group)), i64(2 * half * place)))
                    value = builder.ashr(builder.add(builder.mul(code, scale), origin), ir.Constant(wide, [8] * half))
                    builder.store(value, builder.inttoptr(where, wide.as_pointer()), align=1)
                return []

            _loop(builder, count, 1, [], step)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), generate

    return expand


def _loop(
    builder: Any, count: Any, by: int, begin: Sequence[Any], step: Callable[[Any, Sequence[Any]], list[Any]]
) -> Any:
    """What is left of `begin` after a step at 0, at `by` and so on below `count`, which is above 0."""
    before, body, after = builder.block, builder.append_basic_block("body"), builder.append_basic_block("after")
    builder.branch(body)
    builder.position_at_end(body)
    at, held = builder.phi(i64), [builder.phi(one.type) for one in begin]
    new = step(at, held)
    following = builder.add(at, i64(by))
    for phi, first, then in zip((at, *held), (i64(0), *begin), (following, *new), strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(then, body)
    builder.cbranch(builder.icmp_signed("<", following, count), body, after)
    builder.position_at_end(after)
    return new


def _nth(builder: Any, start: Any, stride_B: Any, number: int) -> Any:
    return builder.add(start, builder.mul(stride_B, i64(number)))


def _load(builder: Any, where: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(where, kind.as_pointer()), align=1)


def _function(builder: Any, result: Any, arguments: Sequence[Any], name: str) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)
