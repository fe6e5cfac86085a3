"""Witnesses: a pair of positions, with values of what a pattern reads, that shows what a claim about it says.

Integer sets take conditions on data for free booleans, so what they find may be impossible: `ids[k] < 3` and
`ids[k] > 5` of one pair. `realise` looks for inputs that make a witness true, by the oracle's own evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from attndsl.derivation import Random, Segment
from attndsl.members import Placed, Runs
from attndsl.oracle import Evaluator, dim_size
from attndsl.program import (
    Arg,
    Axis,
    Binary,
    Call,
    CallShape,
    Choose,
    Coarsen,
    Compare,
    Complement,
    Const,
    If,
    InputDecl,
    Inter,
    Logic,
    Minus,
    On,
    Permuted,
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
    rebuild,
    scalars,
    walk,
)  # fmt: skip
from attndsl.simplify import fold

Array = NDArray[Any]

# Random inputs tried for one witness.
TRIES = 200
# Inputs of a witness at a greater length are not made; at great lengths fewer are tried.
MAX_LENGTH = 1 << 20
# … nor the dense masks that `coarsen` needs.
MAX_COARSE = 256


@dataclass(frozen=True, slots=True)
class Witness:
    """A pair (q, k) of a call, and what must hold of other scalars there.

    `values`: of the scalars that do not read q or k (heads, arguments, inputs of b or h). `conditions`: on data,
    each with its truth.
    """

    q: int
    k: int
    q_len: int
    k_len: int
    values: tuple[tuple[Scalar, int], ...] = ()
    conditions: tuple[tuple[Scalar, bool], ...] = ()

    def __str__(self) -> str:
        lengths = f"Nk = {self.k_len}" if self.q_len == self.k_len else f"Nq = {self.q_len}, Nk = {self.k_len}"
        facts = [f"{show(e)} = {value}" for e, value in self.values]
        facts += [show(e) if truth else f"not {show(e)}" for e, truth in self.conditions]
        return f"q = {self.q}, k = {self.k} at {lengths}" + (f", with {', '.join(facts)}" if facts else "")


def show(e: Scalar) -> str:
    """The scalar as the language writes it."""
    match e:
        case Const(value=bool(value)):
            return "true" if value else "false"
        case Const(value=value):
            return str(value)
        case Var(name=name) | Arg(name=name):
            return name
        case Table(name=name, index=index) | Read(input=name, index=index):
            return f"{name}[{', '.join(map(show, index))}]"
        case Unary(op=op, operand=x):
            return f"{op} {_inner(x)}" if op == "not" else f"-{_inner(x)}"
        case Binary(op=op, left=a, right=b) | Compare(op=op, left=a, right=b):
            return f"{_inner(a)} {op} {_inner(b)}"
        case Logic(op=op, operands=xs):
            return f" {op} ".join(map(_inner, xs))
        case If(cond=c, then=a, other=b):
            return f"if {show(c)} then {show(a)} else {show(b)}"
        case Call(function=name, args=xs):
            return f"{name}({', '.join(map(show, xs))})"
        case _:
            assert_never(e)


def _inner(e: Scalar) -> str:
    return f"({show(e)})" if isinstance(e, Unary | Binary | Compare | Logic | If) else show(e)


# ------------------------------------------------------------------------------------ canonical form


def canonical(pattern: Set) -> Set:
    """The same set, its integer comparisons written with `==` and `<` alone, constants on the right.

    So conditions on data that mean the same, or the opposite, become one scalar. Constants are folded first, which
    parameters leave many of; a condition that is one only then stays what its author wrote.
    """
    return map_scalars(pattern, _put_canonically)


def _put_canonically(e: Scalar) -> Scalar:
    folded = fold(e)
    return rebuild(e if isinstance(folded, Const) else folded, _canonical)


def _canonical(e: Scalar) -> Scalar:
    match e:
        case Compare(left=a, right=b) if Type.FLOAT in (a.type, b.type):
            return e
        case Compare(op="!=", left=a, right=b):
            return Unary("not", _equal(a, b))
        case Compare(op="==", left=a, right=b):
            return _equal(a, b)
        case Compare(op="<", left=a, right=b):
            return _less(a, b)
        case Compare(op=">", left=a, right=b):
            return _less(b, a)
        case Compare(op="<=", left=a, right=b):
            return Unary("not", _less(b, a))
        case Compare(op=">=", left=a, right=b):
            return Unary("not", _less(a, b))
        case _:
            return e


def _equal(a: Scalar, b: Scalar) -> Scalar:
    match a, b:
        case Unary(op="not", operand=x), Unary(op="not", operand=y):
            a, b = x, y
        case _:
            pass
    if isinstance(a, Const) or (not isinstance(b, Const) and repr(b) < repr(a)):
        a, b = b, a
    return Compare("==", a, b)


def _less(a: Scalar, b: Scalar) -> Scalar:
    if isinstance(a, Const) and a.type is Type.INT:
        return Unary("not", Compare("<", b, Const(int(a.value) + 1)))
    return Compare("<", a, b)


def map_scalars(pattern: Set, change: Callable[[Scalar], Scalar]) -> Set:
    """The set with `change` applied to every scalar written in it."""

    def inner(p: Set) -> Set:
        return map_scalars(p, change)

    match pattern:
        case Where(cond=cond):
            return replace(pattern, cond=change(cond))
        case Union(parts=parts) | Inter(parts=parts):
            return replace(pattern, parts=tuple(map(inner, parts)))
        case Minus(left=left, right=right):
            return replace(pattern, left=inner(left), right=inner(right))
        case Complement(operand=operand) | Coarsen(operand=operand):
            return replace(pattern, operand=inner(operand))
        case Choose(cond=cond, then=then, other=other):
            return replace(pattern, cond=change(cond), then=inner(then), other=inner(other))
        case On(operand=operand, place=place):
            if isinstance(place, Permuted | Segment):
                place = replace(place, lead=tuple(map(change, place.lead)))
            return replace(pattern, operand=inner(operand), place=place)
        case Random(seed=seed, among=among):
            return replace(pattern, seed=change(seed), among=inner(among))
        case Selected(index=index, members=members):
            if isinstance(members, Placed | Runs):
                members = replace(members, lead=tuple(map(change, members.lead)))
            return replace(pattern, index=tuple(map(change, index)), members=members)
        case _:
            assert_never(pattern)


def has_coarsen(pattern: Set) -> bool:
    """Whether somewhere in it a set is coarsened, or drawn from: a pair then depends on others."""
    match pattern:
        case Coarsen() | Random():
            return True
        case Where() | Selected():
            return False
        case Union(parts=parts) | Inter(parts=parts):
            return any(map(has_coarsen, parts))
        case Minus(left=a, right=b) | Choose(then=a, other=b):
            return has_coarsen(a) or has_coarsen(b)
        case Complement(operand=operand) | On(operand=operand):
            return has_coarsen(operand)
        case _:
            assert_never(pattern)


# --------------------------------------------------------------------------------------- realisation


@dataclass(frozen=True, slots=True)
class World:
    """One call in which a witness is looked at: shape, inputs and arguments, and the place of its pair."""

    program: Program
    shape: CallShape
    inputs: Mapping[str, Array]
    args: Mapping[str, int]
    b: int
    h: int

    def shortened(self, k_len: int) -> World:
        """The call of the first `k_len` tokens."""
        shape = replace(self.shape, rows=k_len, k_len=k_len)
        inputs = {}
        for name, values in self.inputs.items():
            dims = self.program.input(name).dims
            sizes = [dim_size(dim, self.program, shape) for dim in dims]
            if (members := self.program.input(name).members) is not None:
                sizes[-1] = -(-k_len // members) * self.program.input(name).each
            inputs[name] = values[tuple(slice(0, size) for size in sizes)]
        return replace(self, shape=shape, inputs=inputs)

    def member(self, pattern: Set, q: int, k: int) -> bool:
        """Whether the oracle finds the pair in a set of the program."""
        at = Evaluator.of_call(self.program, self.shape, self.inputs, self.args)
        group = self.h // (self.shape.heads // self.shape.kv_heads)
        place = {"b": self.b, "h": self.h, "g": group, "q": q, "k": k}
        fixed = {name: np.full((1, 1, 1, 1), value, np.int64) for name, value in place.items()}
        return bool(np.all(replace(at, variables={**at.variables, **fixed}, memo={}).members(pattern)))


def realise(program: Program, witness: Witness, check: Callable[[World, Witness], bool]) -> bool:
    """Whether a call is found that agrees with the witness's values and in which `check` holds."""
    length = max(witness.q_len, witness.k_len)
    dense = has_coarsen(program.branch.pattern) or any(decl.derivation is not None for decl in program.inputs)
    if length > (MAX_COARSE if dense else MAX_LENGTH):
        return False
    search = _Search(program, witness, np.random.default_rng(0))
    return any(check(world, witness) for world in search.worlds())


def _reads_data(program: Program) -> bool:
    return bool(program.inputs) or bool(program.args)


@dataclass(frozen=True, slots=True)
class _Search:
    """Random calls that agree with the known values of a witness."""

    program: Program
    witness: Witness
    rng: np.random.Generator
    pool: list[int] = field(default_factory=list)

    def worlds(self) -> Iterator[World]:
        known = dict(self.witness.values)
        nodes = [x for e in scalars(self.program.branch.pattern) for x in walk(e)]
        constants = {int(x.value) for x in nodes if isinstance(x, Const) and x.type is Type.INT}
        lengths = {self.witness.k_len, self.witness.k_len - 1, self.witness.q, self.witness.k}
        near = {c + d for c in constants | lengths for d in (-1, 0, 1)} | {-1, 0, 1, 2} | set(known.values())
        self.pool.extend(sorted(x for x in near if abs(x) < 1 << 31))
        sizes = list(self._heads(known))
        if not sizes:
            return
        single = not _reads_data(self.program)
        length = max(self.witness.q_len, self.witness.k_len)
        for i in range(len(sizes) if single else max(4, min(TRIES, MAX_LENGTH // length))):
            yield self._world(sizes[i % len(sizes)], known)

    def _heads(self, known: Mapping[Scalar, int]) -> Iterator[tuple[int, int, int]]:
        """(H, G, h) that agree with the witness, the smallest first."""
        wanted = {name: known.get(Var(name)) for name in ("H", "G", "h", "g")}
        for table in self.program.tables:
            for dim, size in zip(table.dims, table.shape, strict=True):
                if dim.axis in (Axis.H, Axis.G) and size > 1:
                    wanted["H" if dim.axis is Axis.H else "G"] = size
        most = max([4, *(2 * value + 2 for value in wanted.values() if value is not None and value < 64)])
        for heads, groups in product(range(1, most + 1), repeat=2):
            if heads % groups or wanted["H"] not in (None, heads) or wanted["G"] not in (None, groups):
                continue
            for h in range(heads):
                if wanted["h"] in (None, h) and wanted["g"] in (None, h // (heads // groups)):
                    yield heads, groups, h

    def _world(self, sizes: tuple[int, int, int], known: Mapping[Scalar, int]) -> World:
        heads, groups, h = sizes
        b = known.get(Var("b"), 0)
        shape = CallShape(
            batch=b + 1, heads=heads, kv_heads=groups, rows=self.witness.q_len, k_len=self.witness.k_len,
            dim=known.get(Var("D"), 64), v_dim=known.get(Var("Dv"), 64),
        )  # fmt: skip
        inputs = {decl.name: self._values(decl, shape) for decl in self.program.inputs if decl.type is not Type.FLOAT}
        args = {name: known.get(Arg(name), int(self.rng.choice(self.pool))) for name in self.program.args}
        at = Evaluator.of_call(self.program, shape, inputs, args)
        group = h // (heads // groups)
        place = {name: np.full((1, 1, 1, 1), x, np.int64) for name, x in (("b", b), ("h", h), ("g", group))}
        here = replace(at, variables={**at.variables, **place}, memo={})
        for e, value in known.items():
            if isinstance(e, Read) and not self.program.input(e.input).sorted:
                values = inputs[e.input]
                index = [
                    np.clip(int(here.scalar(x).flat[0]), 0, n - 1) for x, n in zip(e.index, values.shape, strict=True)
                ]
                values[tuple(index)] = value
        return World(self.program, shape, inputs, args, b, h)

    def _values(self, decl: InputDecl, shape: CallShape) -> Array:
        sizes = [dim_size(dim, self.program, shape) for dim in decl.dims]
        if decl.members is not None:
            sizes[-1] = -(-shape.k_len // decl.members) * decl.each
            return (self.rng.random(sizes) < 0.5).astype(np.uint8)
        if decl.type is Type.BOOL:
            return self.rng.random(sizes) < 0.5
        # A few values at a time, so that entries are equal often.
        few = self.rng.choice(self.pool, size=int(self.rng.integers(1, 5)))
        values = self.rng.choice(few, size=sizes)
        return np.sort(values, axis=-1) if decl.sorted else values
