"""Patterns as integer relations: the exact, static part of a program, with lengths still symbolic.

A pattern becomes an islpy set { [q, k] } whose parameters are

- `Nq`, `Nk`, and one parameter per *uniform* scalar: whatever does not read q or k and is not affine
  in them (the head, an input of b or h, a runtime argument, a product of two of these), and
- one 0/1 parameter per *data atom*: a condition on q or k that integer sets cannot hold (`ids[q] == ids[k]`).
  A data atom may differ from pair to pair, so before pairs are projected to tiles it is projected out:
  the tiles to visit are those where some value of it allows a pair, the full ones where every value does.

islpy is imported by the modules about integer sets (`tests/test_structure.py` names them) and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import assert_never

import islpy as isl

from attndsl import isl_sets
from attndsl.apart import coarse_apart, last_goes_on
from attndsl.derivation import Random
from attndsl.derive import derive
from attndsl.effort import EFFORT, Budget, TooHard, bounded, remembered
from attndsl.isl_sets import choose, compared, divided, fold, involves_param, parts_that_meet, project_param
from attndsl.parameters import bounds
from attndsl.placing import Coordinates, placed
from attndsl.program import (
    Arg,
    Binary,
    Call,
    Choose,
    Coarse,
    Coarsen,
    Compare,
    Complement,
    Const,
    If,
    Inter,
    Logic,
    Minus,
    On,
    Program,
    Read,
    Scalar,
    Selected,
    Set,
    Table,
    Type,
    Unary,
    Union,
    Var,
    Where,
    equal_quotients,
    reads,
    substitute,
)  # fmt: skip
from attndsl.quasi_affine import condition

# A table or a power is expanded into at most so many cases.
MAX_CASES = 256
# Positions are below 2**POSITION_BITS.
POSITION_BITS = 31
# Elementary isl operations allowed to all steps of a lowering; what is lowered after that is masked pair by pair.
RELATION_EFFORT = 2 * EFFORT
_TOO_HARD = "too hard for exact sets within the effort bound: masked pair by pair"


class NotAffine(Exception):
    """The scalar is not quasi-affine in q, k and the uniform scalars."""


@dataclass(frozen=True, slots=True, eq=False)
class Relation:
    """A pattern's pairs.

    `pairs`: { [q, k] } for 0 <= k < Nk and any q (rows that do not exist are of no interest). `uniform` and
    `atoms`: what each further parameter stands for. `context`: what is known of the parameters.
    `notes`: conditions that were made data because they were too hard to hold exactly.
    `stride`: keys are entries of a view, one every so many tokens.
    """

    pairs: isl.Set
    uniform: dict[str, Scalar]
    atoms: dict[str, Scalar]
    context: isl.Set
    notes: tuple[str, ...] = ()
    stride: int = 1

    def orders(self) -> frozenset[str]:
        """Of "k <= q" and "q <= k" those that hold of every pair, as far as that is decided within the effort bound."""
        ctx = self.pairs.get_ctx()

        def holds(order: str) -> bool:
            every = isl.Set.read_from_str(ctx, f"{{ [q, k] : {order} }}")
            with suppress(TooHard):
                return bounded(ctx, lambda: bool(self.pairs.is_subset(every)))
            return False

        return frozenset(filter(holds, ("k <= q", "q <= k")))

    def at(self, q_len: int, k_len: int, start: int) -> Relation:
        """The relation for one Nq and Nk, and one position of a call's first row."""
        known = f"[Nq, Nk, start] -> {{ : Nq = {q_len} and Nk = {k_len} and start = {start} }}"
        lengths = isl.Set.read_from_str(self.pairs.get_ctx(), known)
        return replace(self, pairs=self.pairs.intersect_params(lengths), context=self.context.intersect(lengths))

    def of_call(self) -> Relation:
        """The pairs of rows that a call holds: those from `start` on."""
        rows = isl.Set.read_from_str(self.pairs.get_ctx(), "[start] -> { [q, k] : q >= start }")
        return replace(self, pairs=self.pairs.intersect(rows))

    def project_atoms(self, pairs: isl.Set) -> isl.Set:
        """{ [q, k] } that are in `pairs` for some value of the data atoms."""
        for name in self.atoms:
            pairs = project_param(pairs, name)
        return pairs


def build_relation(program: Program, heads: tuple[int, int] | None = None) -> Relation:
    """The relation of a program's pattern; `heads` = (H, G) where they are known, else they stay symbolic."""
    return lowered(derive(program), heads)[1]


def lowered(program: Program, heads: tuple[int, int] | None = None) -> tuple[Lowering, Relation]:
    """The relation of a derived program's pattern, as `build_relation` has it, and the lowering that made it: one for
    all tilings and kernels that ask."""
    return _lowered(program, heads)


@remembered(64)
def _lowered(program: Program, heads: tuple[int, int] | None) -> tuple[Lowering, Relation]:
    lowering = Lowering(program, heads)
    return lowering, lowering.relation(program.branch.pattern)


class Lowering:
    """Lowers the sets of one derived program. One isl context, one table of uniform scalars and data atoms.

    effort: allowed in the place of RELATION_EFFORT, half of it to one step.
    """

    def __init__(
        self, program: Program, heads: tuple[int, int] | None = None, length: int | None = None, effort: int = 0
    ) -> None:
        self.program, self.heads = program, heads
        self.ctx = isl.Context()
        self.uniform: dict[str, Scalar] = {}
        self.atoms: dict[str, Scalar] = {}
        self.notes: list[str] = []
        self._names: dict[Scalar, str] = {}
        self._too_hard: set[Coarsen] = set()
        self._lowered: dict[Set, isl.Set] = {}
        self._held: dict[Scalar, isl.Set] = {}
        self._affines: dict[Scalar, isl.PwAff] = {}
        self._parameters: dict[str, isl.PwAff] = {}
        self._contexts: dict[int, isl.Set] = {}
        self._budget = Budget(effort or RELATION_EFFORT)
        self._step_effort = self._budget.left // 2
        self.space = isl_sets.named_space(self.ctx, (), ("q", "k"))
        q, k = (isl.PwAff.var_on_domain(isl.LocalSpace.from_space(self.space), isl.dim_type.set, i) for i in (0, 1))
        q_len, k_len = (self.number(length) if length is not None else self.parameter(name) for name in ("Nq", "Nk"))
        self.here = Coordinates(q, k, q_len, k_len)

    def set(self, text: str) -> isl.Set:
        return isl.Set.read_from_str(self.ctx, text)

    def map(self, text: str) -> isl.Map:
        return isl.Map.read_from_str(self.ctx, text)

    def number(self, value: int) -> isl.PwAff:
        """A number as a function of the pairs."""
        return isl.PwAff.val_on_domain(isl.Set.universe(self.space), isl.Val.int_from_si(self.ctx, value))

    def parameter(self, name: str) -> isl.PwAff:
        """A parameter as such a function."""
        space = isl.LocalSpace.from_space(isl_sets.named_space(self.ctx, (name,), ("q", "k")))
        return isl.PwAff.var_on_domain(space, isl.dim_type.param, 0)

    def relation(self, pattern: Set) -> Relation:
        written = self.lower(pattern, self.here)
        try:
            pairs = self._budget.bounded(self.ctx, lambda: self.existing(written, 1), EFFORT // 2)
        except TooHard:
            self.notes.append(_TOO_HARD)
            pairs = self.existing(self._atom(self.predicate(pattern), self.here), 1)
        return self.of_pairs(pairs, 1)

    def existing(self, written: isl.Set, stride: int) -> isl.Set:
        """The pairs of existing keys, tokens or one every `stride` tokens, that `written` allows, put plainly."""
        pairs = written.intersect(self.set(f"[Nk] -> {{ [q, k] : 0 <= k and {stride} k < Nk }}"))
        context = self._lengths()
        if not self.program.align_start:
            pairs = project_param(pairs.intersect_params(context), "Nq")
        # Rows end with the keys or, under `align start`, with Nq: what only longer sequences could hold goes.
        longest = self.set(f"{{ [q, k] : q < {1 << POSITION_BITS} }}")
        return parts_that_meet(pairs, longest).gist_params(context).coalesce()

    def of_pairs(self, pairs: isl.Set, stride: int) -> Relation:
        uniform = {name: e for name, e in self.uniform.items() if involves_param(pairs, name)}
        atoms = {name: e for name, e in self.atoms.items() if involves_param(pairs, name)}
        return Relation(pairs, uniform, atoms, self._lengths(), tuple(self.notes), stride)

    def _lengths(self) -> isl.Set:
        """What is known of the parameters. Without `align start` there is one length: queries end where keys do."""
        one = self.set("[Nq, Nk] -> { : Nq = Nk }")
        return self.context() if self.program.align_start else self.context().intersect(one)

    def context(self) -> isl.Set:
        """What is known of the parameters: lengths are positive, others as `parameters.bounds` says.

        That lengths end somewhere decides nothing about tiles, and would take a third of the time.
        """
        # Parameters only come in.
        number = len(self.uniform) + len(self.atoms)
        if number not in self._contexts:
            context = self.set("[Nq, Nk] -> { : 1 <= Nq and 1 <= Nk }")
            for name, scalar in [*self.uniform.items(), *self.atoms.items()]:
                context = context.intersect(self.set(bounds(name, scalar, self.program, self.heads)))
            self._contexts[number] = context
        return self._contexts[number]

    # ------------------------------------------------------------------------------------- sets

    def lower(self, pattern: Set, place: Coordinates) -> isl.Set:
        """The pairs of a set read at a place (at q and k once); a part that is too hard becomes a data atom."""
        if place is not self.here:
            return self._lower(pattern, place)
        if pattern not in self._lowered:
            self._lowered[pattern] = self._lower(pattern, place)
        return self._lowered[pattern]

    def _lower(self, pattern: Set, place: Coordinates) -> isl.Set:
        step: Callable[[], isl.Set]
        match pattern:
            case Where(cond=cond):
                step = lambda: self.holds(cond, place)  # noqa: E731
            case Union(parts=parts):
                lowered = [self.lower(p, place) for p in parts]
                step = lambda: fold(lowered, isl.Set.union)  # noqa: E731
            case Inter(parts=parts):
                lowered = [self.lower(p, place) for p in parts]
                step = lambda: fold(lowered, isl.Set.intersect)  # noqa: E731
            case Minus(left=left, right=right):
                a, b = self.lower(left, place), self.lower(right, place)
                step = lambda: a.subtract(b)  # noqa: E731
            case Complement(operand=operand):
                a = self.lower(operand, place)
                step = lambda: a.complement()  # noqa: E731
            case Choose(cond=cond, then=then, other=other):
                a, b = self.lower(then, place), self.lower(other, place)
                step = lambda: choose(self.holds(cond, place), a, b)  # noqa: E731
            case On(operand=operand, place=inner_place):
                inner = placed(place, inner_place, self.affine)
                if inner.affine:
                    return self.lower(operand, inner)
                return self._atom(self.predicate(operand, inner), self.here)
            case Coarsen():
                inner = self.lower(pattern.operand, self.here)
                step = lambda: self._coarsen(pattern, inner, place)  # noqa: E731
            case Random() | Selected():
                raise AssertionError("the program is derived before it is lowered")
            case _:
                assert_never(pattern)
        try:
            return self._budget.bounded(self.ctx, lambda: step().coalesce(), self._step_effort)
        except TooHard:
            self.notes.append(_TOO_HARD)
            if isinstance(pattern, Coarsen):
                self._too_hard.add(pattern)
            return self._atom(self.predicate(pattern, place), self.here)

    def _coarsen(self, pattern: Coarsen, inner: isl.Set, place: Coordinates) -> isl.Set:
        """The pairs of a coarsened set, `inner` being its operand's.

        Where these depend on data the map decides, within the blocks that some truth of the data allows.
        """
        data = self._is_data(pattern, inner)
        if pattern.document is not None:
            return self.holds(_map(pattern) if data else self._coarse_condition(pattern, inner), place)
        for name in self.atoms:
            inner = project_param(inner, name)
        coarse = isl_sets.coarse_pairs(inner, pattern.block_q, pattern.block_k, every=pattern.mode is Coarse.ALL)
        coarse = isl_sets.last_goes_on(coarse) if self.program.past_the_ends else coarse
        if place.names:
            coarse = isl_sets.place_pairs(coarse, place.q, place.k, place.q_len, place.k_len)
        return coarse.intersect(self._atom(_map(pattern), place)) if data else coarse

    def _coarse_condition(self, pattern: Coarsen, inner: isl.Set) -> Scalar:
        if pattern.document is not None:
            return coarse_apart(pattern, inner, self.context(), self.uniform, self.program.past_the_ends)
        own = condition(self._coarsen(pattern, inner, self.here), self.context(), self.uniform)
        return last_goes_on(own) if self.program.past_the_ends else own

    def _is_data(self, pattern: Coarsen, inner: isl.Set) -> bool:
        """Whether only the runtime's map says which block pairs are in a coarsened set."""
        known = pattern.mode is not Coarse.FRACTION and pattern not in self._too_hard
        return not known or any(involves_param(inner, name) for name in self.atoms)

    # ------------------------------------------------------------------------------- conditions

    def holds(self, cond: Scalar, place: Coordinates) -> isl.Set:
        """The pairs for which a boolean holds: at q and k themselves, once for the relation and its mask."""
        if place is not self.here:
            return self._holds(cond, place)
        if cond not in self._held:
            self._held[cond] = self._holds(cond, place)
        return self._held[cond]

    def _holds(self, cond: Scalar, place: Coordinates) -> isl.Set:
        """What is not affine becomes an atom, as small as possible."""
        match cond:
            case Const(value=value):
                return isl.Set.universe(self.space) if value else isl.Set.empty(self.space)
            case Unary(operand=operand):
                return self.holds(operand, place).complement()
            case Logic(op="and", operands=operands):
                return fold([self.holds(x, place) for x in operands], isl.Set.intersect)
            case Logic(operands=operands):
                return fold([self.holds(x, place) for x in operands], isl.Set.union)
            case If(cond=c, then=then, other=other):
                return choose(self.holds(c, place), self.holds(then, place), self.holds(other, place))
            case Compare(op="==" | "!=" as op, left=left, right=right) if left.type is right.type is Type.BOOL:
                a, b = self.holds(left, place), self.holds(right, place)
                return choose(a, b, b.complement()) if op == "==" else choose(a, b.complement(), b)
            case Compare():
                try:
                    return self._compare(cond, place)
                except NotAffine:
                    return self._atom(cond, place)
            case Call(function="is_power_of_two", args=(x,)):
                try:
                    number = self.affine(x, place)
                except NotAffine:
                    return self._atom(cond, place)
                return isl_sets.powers_of_two(number, POSITION_BITS)
            case Read() | Table() | Call(function="drawn"):
                return self._atom(cond, place)
            case Var() | Arg() | Binary() | Call():
                raise AssertionError(f"not a boolean: {cond}")
            case _:
                assert_never(cond)

    def _compare(self, cond: Compare, place: Coordinates) -> isl.Set:
        left, right = cond.left, cond.right
        if equal_quotients(cond):
            # x // m == y // m as m * (x // m) <= y < m * (x // m) + m, so that the other position's values are an
            # interval. Whichever quotient stands there, isl keeps the same one.
            quotient, other = (left, right) if reads(left, "q") else (right, left)
            assert isinstance(quotient, Binary) and isinstance(other, Binary) and isinstance(quotient.right, Const)
            divisor = isl.Val.int_from_si(self.ctx, quotient.right.value)
            base, value = self.affine(quotient, place).scale_val(divisor), self.affine(other.left, place)
            return base.le_set(value).intersect(value.lt_set(base.add_constant_val(divisor)))
        return compared(cond.op, self.affine(left, place), self.affine(right, place))

    # ---------------------------------------------------------------------------------- numbers

    def affine(self, e: Scalar, place: Coordinates) -> isl.PwAff:
        """The integer scalar as a piecewise quasi-affine function of q, k and the parameters: at q and k themselves,
        once."""
        if place is not self.here:
            return self._affine_or_parameter(e, place)
        if e not in self._affines:
            self._affines[e] = self._affine_or_parameter(e, place)
        return self._affines[e]

    def _affine_or_parameter(self, e: Scalar, place: Coordinates) -> isl.PwAff:
        try:
            return self._affine(e, place)
        except NotAffine:
            placed = substitute(e, place.names)
            if e.type is Type.FLOAT or reads(placed, "q", "k"):
                raise
            return self._parameter(placed)

    def _affine(self, e: Scalar, place: Coordinates) -> isl.PwAff:
        match e:
            case Const(value=bool()):
                raise AssertionError("a boolean is no number")
            case Const(value=int(value)):
                return self.number(value)
            case Var(name="q" | "k") if isinstance(place.name(e.name), Read):
                raise NotAffine("a position read from an input")
            case Var(name="q"):
                return place.q
            case Var(name="k"):
                return place.k
            case Var(name="Nq"):
                return place.q_len
            case Var(name="Nk"):
                return place.k_len
            case Var(name="H" | "G") if self.heads:
                return self._affine(Const(self.heads[e.name == "G"]), place)
            case Var(name="g") if self.heads:
                ratio = Const(self.heads[0] // self.heads[1])
                return self._affine(Binary("//", Var("h"), ratio), place)
            case Var() | Arg():
                return self._parameter(e)
            case Unary(operand=x):
                return self.affine(x, place).neg()
            case Binary(op="+", left=a, right=b):
                return self.affine(a, place).add(self.affine(b, place))
            case Binary(op="-", left=a, right=b):
                return self.affine(a, place).sub(self.affine(b, place))
            case Binary(op="*", left=a, right=b):
                factor, other = self.affine(a, place), self.affine(b, place)
                if not (factor.is_cst() or other.is_cst()):
                    raise NotAffine("a product of two variables")
                return factor.mul(other)
            case Binary(op="//" | "%", left=a, right=b):
                divisor = self.affine(b, place)
                if not divisor.is_cst():
                    raise NotAffine("a divisor that is not constant")
                return divided(self.affine(a, place), divisor, rest=e.op == "%")
            case If(cond=c, then=a, other=b):
                chosen = self.holds(c, place)
                return (
                    self.affine(a, place).intersect_domain(chosen)
                    .union_add(self.affine(b, place).intersect_domain(chosen.complement()))
                )  # fmt: skip
            case Call(function="min", args=args):
                return fold([self.affine(x, place) for x in args], isl.PwAff.min)
            case Call(function="max", args=args):
                return fold([self.affine(x, place) for x in args], isl.PwAff.max)
            case Call(function="abs", args=(x,)):
                magnitude = self.affine(x, place)
                return magnitude.max(magnitude.neg())
            case Call(function="clamp", args=(x, low, high)):
                return self.affine(x, place).max(self.affine(low, place)).min(self.affine(high, place))
            case Call(function="bit_length", args=(x,)):
                return isl_sets.bit_length(self.affine(x, place), POSITION_BITS)
            case Table(name=name, index=(index,)) if reads(substitute(index, place.names), "q", "k"):
                values = self.program.table(name).values
                if len(values) > MAX_CASES:
                    raise NotAffine(f"more than {MAX_CASES} entries")
                return isl_sets.entry([int(v) for v in values], self.affine(index, place))
            case _:
                raise NotAffine(type(e).__name__)

    def _parameter(self, scalar: Scalar) -> isl.PwAff:
        name = self._name(scalar, self.uniform, "u")
        if name not in self._parameters:
            self._parameters[name] = self.parameter(name)
        return self._parameters[name]

    # ------------------------------------------------------------------------------------ atoms

    def _atom(self, cond: Scalar, place: Coordinates) -> isl.Set:
        """The pairs where a boolean parameter, standing for a condition, is true."""
        placed = substitute(cond, place.names)
        table, prefix = (self.atoms, "d") if reads(placed, "q", "k") else (self.uniform, "u")
        name = self._name(placed, table, prefix)
        return self.set(f"[{name}] -> {{ [q, k] : {name} = 1 }}")

    def predicate(self, pattern: Set, place: Coordinates | None = None) -> Scalar:
        """The pattern as one condition on q and k, written as its author wrote it."""
        place = place or self.here
        match pattern:
            case Where(cond=cond):
                return substitute(cond, place.names)
            case Union(parts=parts):
                return Logic("or", tuple(self.predicate(p, place) for p in parts))
            case Inter(parts=parts):
                return Logic("and", tuple(self.predicate(p, place) for p in parts))
            case Minus(left=left, right=right):
                return Logic("and", (self.predicate(left, place), Unary("not", self.predicate(right, place))))
            case Complement(operand=operand):
                return Unary("not", self.predicate(operand, place))
            case Choose(cond=cond, then=then, other=other):
                chosen = substitute(cond, place.names)
                return If(chosen, self.predicate(then, place), self.predicate(other, place))
            case On(operand=operand, place=inner_place):
                return self.predicate(operand, placed(place, inner_place, self.affine))
            case Coarsen():
                inner = self.lower(pattern.operand, self.here)
                coarse = _map(pattern) if self._is_data(pattern, inner) else None
                if coarse is None:
                    try:
                        coarse = bounded(self.ctx, lambda: self._coarse_condition(pattern, inner))
                    except TooHard:
                        coarse = _map(pattern)
                return substitute(coarse, place.names)
            case Random() | Selected():
                raise AssertionError("the program is derived before it is lowered")
            case _:
                assert_never(pattern)

    def _name(self, scalar: Scalar, table: dict[str, Scalar], prefix: str) -> str:
        if scalar not in self._names:
            self._names[scalar] = f"{prefix}{len(table)}"
            table[self._names[scalar]] = scalar
        return self._names[scalar]


def _map(pattern: Coarsen) -> Scalar:
    assert pattern.map is not None, "the program is derived before it is lowered"
    return pattern.map
