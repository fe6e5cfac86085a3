"""Kernel plans of outputs: one kernel that reads what branches found, once each, and writes how they combine.

Its backward pass is another kernel, from the same expression: an output is a tree of sums, products and merges, whose
gradients are rules of their own, and the derivative of a factor by a learnable input is symbolic.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from attndsl.branches import Attended, Factor, Handed, Merged, Output, Product, Sum, combined, factors, rewritten
from attndsl.compose import reading
from attndsl.plan import Plan, Spec, Tiling
from attndsl.program import Axis, Const, Program, Read, Scalar, Type, Var, reads
from attndsl.runs import TileRuns
from attndsl.simplify import fold, specialise

# Elements of an output that a program writes: 16 a thread, and as many of each branch. With twice as many, gradients of
# three branches and a gate of channels took all registers.
_ELEMENTS = 2048
_OWN = {Axis.B: "b", Axis.H: "h", Axis.G: "g", Axis.Q: "q", Axis.DV: "d"}


@dataclass(frozen=True, slots=True)
class Learning:
    """A read of a learnable input in an output.

    `own`: every index of every read of the input is its dimension's own variable or a constant, so that the entries of
    a row are its own, and are summed over what the input does not follow. Else each row says which entry it reads.
    """

    read: Read
    own: bool

    @property
    def channels(self) -> bool:
        """Whether each channel reads an entry of its own."""
        return reads(self.read, "d")


@dataclass(frozen=True, slots=True)
class CombinePlan(Plan):
    """A kernel of an output, whose query tiles are of `block_q` rows and all channels; `gradients`: the backward one.

    `slopes`: each factor's derivatives by the learnable reads in it. The forward kernel has none.
    """

    output: Output
    gradients: bool
    learned: tuple[Learning, ...]
    slopes: tuple[tuple[Scalar, tuple[tuple[Read, Scalar], ...]], ...]

    def _further(self) -> tuple[Scalar, ...]:
        return (*factors(self.output), *(x for _, found in self.slopes for pair in found for x in pair))

    @property
    def width(self) -> int:
        """The channels, padded to a power of two."""
        return 1 << (self.spec.v_dim - 1).bit_length()

    @property
    def branches(self) -> tuple[str, ...]:
        return combined(self.output)

    @property
    def merges(self) -> tuple[str, ...]:
        """The branches whose lse it reads."""
        return tuple(name for name in self.branches if name in merges(self.output))

    @staticmethod
    def parameters(branches: Iterable[str]) -> list[str]:
        """What branches' parameters are named after: those of inputs may end in `_input`, these never do."""
        return [f"{name}_branch" if name.endswith("_input") else name for name in branches]

    @property
    def has_lse(self) -> bool:
        return isinstance(self.output, Merged)


@functools.lru_cache(maxsize=256)
def combine_plan(program: Program, spec: Spec, gradients: bool = False) -> CombinePlan:
    """A kernel of a program's output, which combines branches; the plan's inputs are those that it reads."""
    program = reading(program)
    assert program.output is not None and combined(program.output)
    output = rewritten(program.output, lambda e: fold(specialise(e, spec.sizes)))
    own = replace(program, output=output)
    slopes: tuple[tuple[Scalar, tuple[tuple[Read, Scalar], ...]], ...] = ()
    if gradients:
        slopes = tuple((e, pairs) for e in dict.fromkeys(factors(output)) if (pairs := _slopes(e, own)))
    found = dict.fromkeys(x for _, pairs in slopes for x, _ in pairs)
    learned = tuple(Learning(x, all(_is_own(y, own) for y in found if y.input == x.input)) for x in found)
    width = 1 << (spec.v_dim - 1).bit_length()
    tiling = Tiling(max(1, _ELEMENTS // width), 1, warps=4, stages=1)
    nothing = TileRuns((), ())
    return CombinePlan(own, spec, tiling, nothing, None, None, None, None, None, output, gradients, learned, slopes)


def merges(output: Output) -> frozenset[str]:
    """The branches whose lse an output reads."""
    match output:
        case Merged(operands=operands):
            named = frozenset(x.branch for x in operands if isinstance(x, Attended))
            return named.union(*map(merges, operands))
        case Sum(left=left, right=right):
            return merges(left) | merges(right)
        case Product(operand=operand):
            return merges(operand)
        case Attended() | Handed() | Factor():
            return frozenset()


def _slopes(e: Scalar, program: Program) -> tuple[tuple[Read, Scalar], ...]:
    if isinstance(e, Read) and not any(isinstance(x, Read) for x in e.index):
        # The usual gate: without sympy, which takes a while to import.
        return ((e, Const(1.0)),) if program.input(e.input).learnable else ()
    from attndsl.score import derivatives

    return derivatives(e, program) if e.type is Type.FLOAT else ()


def _is_own(read: Read, program: Program) -> bool:
    """Whether its indices are its dimensions' own variables, each once, and constants inside them."""
    dims = program.input(read.input).dims
    axes = [dim.axis for dim in dims if dim.axis is not Axis.CONST]
    return (
        len({*axes}) == len(axes)
        and not {Axis.H, Axis.G} <= {*axes}
        and all(
            (dim.axis is Axis.CONST and isinstance(e, Const) and 0 <= int(e.value) < dim.size)
            or (dim.block == 1 and dim.axis in _OWN and e == Var(_OWN[dim.axis]))
            for e, dim in zip(read.index, dims, strict=True)
        )
    )
