"""Calls in which a witness is looked at: inputs that make it true, by the oracle's own evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.canonical import has_coarsen
from attndsl.oracle import Evaluator, dim_size
from attndsl.program import (
    Arg,
    Axis,
    CallShape,
    Const,
    InputDecl,
    Program,
    Read,
    Scalar,
    Set,
    Type,
    Var,
    scalars,
    walk,
)  # fmt: skip
from attndsl.witness import Witness

Array = NDArray[Any]

# Random inputs tried for one witness.
TRIES = 200
# Inputs of a witness at a greater length are not made; at great lengths fewer are tried.
MAX_LENGTH = 1 << 20
# … nor the dense masks that `coarsen` needs.
MAX_COARSE = 256


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
            decl = self.program.input(name)
            sizes = [dim_size(dim, self.program, shape) for dim in decl.dims]
            if decl.members is not None:
                sizes[-1] = shape.members(decl, self.program)
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
    # Made when first asked: importing numpy's generators takes longer than most searches, and not all of them draw.
    search = _Search(program, witness, functools.cache(lambda: np.random.default_rng(0)))
    return any(check(world, witness) for world in search.worlds())


def _reads_data(program: Program) -> bool:
    return bool(program.inputs) or bool(program.args)


@dataclass(frozen=True, slots=True)
class _Search:
    """Random calls that agree with the known values of a witness."""

    program: Program
    witness: Witness
    rng: Callable[[], np.random.Generator]
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
        args = {name: known.get(Arg(name), int(self.rng().choice(self.pool))) for name in self.program.args}
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
            sizes[-1] = shape.members(decl, self.program)
            return (self.rng().random(sizes) < 0.5).astype(np.uint8)
        if decl.type is Type.BOOL:
            return self.rng().random(sizes) < 0.5
        # A few values at a time, so that entries are equal often.
        few = self.rng().choice(self.pool, size=int(self.rng().integers(1, 5)))
        values = self.rng().choice(few, size=sizes)
        return np.sort(values, axis=-1) if decl.sorted else values
