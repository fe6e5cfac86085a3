"""What the kernels for Hopper in Gluon have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from attndsl.codegen.kernel_loops import Visits
from attndsl.codegen.lines import Lines
from attndsl.codegen.prelude_helpers import prelude
from attndsl.linear import terms, total
from attndsl.program import Binary, Compare, Const, Logic, Scalar, Type, Unary, Var, reads

# Registers of a thread of a consumer and of the producer; 256 of the former and a warp of the latter fill the file.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24
PART = "part: gl.constexpr"

IMPORTS = """\
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


"""


def helper_functions(needed: Iterable[str]) -> str:
    """The prelude's functions of these names, as Gluon has them, each followed by two empty lines."""
    text = prelude("prelude.py", needed).replace("@triton.jit", "@gluon.jit").replace("tl.", "gl.")
    return text + "\n\n\n" if text else ""


def device_function(name: str, parameters: Sequence[str], body: str) -> str:
    lines = Lines()
    lines.add("@gluon.jit")
    with lines.block(f"def {name}("):
        lines.add(*(f"{p}," for p in parameters))
    return lines.text() + "):\n" + body


def specialized(
    consumer: str, consumer_takes: Sequence[str], producer: str, producer_takes: Sequence[str],
    *others: tuple[str, Sequence[str]],
) -> list[str]:  # fmt: skip
    """The lines that give two warpgroups a consumer each, which part of the work is theirs first, and a warp the
    producer; and a warp each to others."""
    given = ", ".join(consumer_takes)
    single = ((producer, producer_takes), *others)
    return [
        "fence_async_shared()",
        "gl.warp_specialize(",
        "    [",
        f"        ({consumer}, (0, {given})),",
        f"        ({consumer}, (1, {given})),",
        *(f"        ({name}, ({', '.join(takes)}))," for name, takes in single),
        "    ],",
        f"    {[4, *(1 for _ in single)]},",
        f"    {[CONSUMER_REGISTERS, *(PRODUCER_REGISTERS for _ in single)]},",
        ")",
    ]


def barriers(names: Iterable[str], stages: bool) -> list[str]:
    """The lines that allocate barriers, one of each name or one a stage."""
    size = "[STAGES, 1]" if stages else "[1]"
    return [f"{x} = gl.allocate_shared_memory(gl.int64, {size}, mbarrier.MBarrierLayout())" for x in names]


def count_of(visits: Visits | None) -> str:
    """How many tiles are visited: a count of a run that is not positive means none."""
    return f"gl.maximum({visits.total}, 0)" if visits is not None else "0"


# A token's place in its tile, and the first token of the tile.
IN_TILE, TILE_FIRST = Var("in_tile"), Var("tile_first")
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}


def by_place(cond: Scalar, axis: str) -> Scalar:
    """The condition, its comparisons solved for the place in a tile of the token of an axis, q or k, where they can be.

    What a place is compared with is one number a row or key and tile, where else each pair has its sum.
    """
    match cond:
        case Logic(operands=xs):
            return replace(cond, operands=tuple(by_place(x, axis) for x in xs))
        case Unary(op="not", operand=x):
            return Unary("not", by_place(x, axis))
        case Compare(op=op, left=a, right=b) if a.type is b.type is Type.INT:
            constant, rest = terms(Binary("-", a, b))
            times = rest.pop(Var(axis), 0)
            if not times or (abs(times) > 1 and op in ("==", "!=")) or any(reads(x, axis) for x in rest):
                return cond
            op, sign = (op, -1) if times > 0 else (_FLIPPED[op], 1)
            # x < b / t is x < ceil(b / t), and x <= b / t is x <= floor(b / t).
            up = abs(times) - 1 if op in ("<", ">=") else 0
            other = total(sign * constant + up, {x: sign * c for x, c in rest.items()})
            if abs(times) > 1:
                other = Binary("//", other, Const(abs(times)))
            return Compare(op, IN_TILE, Binary("-", other, TILE_FIRST))
        case _:
            return cond
