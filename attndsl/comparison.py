"""Comparison of two patterns, exact for every length: equal, contained, overlapping or disjoint, with witnesses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import combinations, permutations
from typing import TYPE_CHECKING

import islpy as isl

from attndsl.alone import together
from attndsl.canonical import canonical, map_scalars
from attndsl.derive import derive
from attndsl.effort import EFFORT, TooHard, bounded
from attndsl.isl_sets import involves_param
from attndsl.program import Compare, Const, Program, Scalar, Set, Table, Type, Union, Var, rebuild, substitute
from attndsl.relation import MAX_CASES, POSITION_BITS, Lowering
from attndsl.simplify import fold
from attndsl.witness import Witness

if TYPE_CHECKING:
    from attndsl.worlds import World

# Elementary isl operations allowed to each of the three questions that a comparison asks.
COMPARE_EFFORT = 5 * EFFORT
# Possible truths of data that are tried before a question is given up.
MAX_GUESSES = 8


class Verdict(Enum):
    """What the first pattern is to the second."""

    EQUAL = "equal"
    CONTAINS = "contains"
    CONTAINED = "contained"
    OVERLAPS = "overlaps"
    DISJOINT = "disjoint"


class Undecided(ValueError):
    """The comparison was given up: it passed its effort bound, or rests on data in a way that is not understood."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two patterns relate, over all lengths, heads, arguments and inputs.

    A pattern without any pair is equal to another such, and contained in every other pattern.

    `only_first`: a pair of the first pattern that is not in the second, where there is one; `only_second` the
    other way round; `both`: a pair in both.
    """

    verdict: Verdict
    first: str
    second: str
    only_first: Witness | None
    only_second: Witness | None
    both: Witness | None

    def __str__(self) -> str:
        a, b = (f"`{self.first}`", f"`{self.second}`") if self.first != self.second else ("the first", "the second")
        says = {
            Verdict.EQUAL: f"{a} and {b} allow the same pairs",
            Verdict.CONTAINS: f"{a} allows every pair that {b} allows, and more",
            Verdict.CONTAINED: f"{a} allows only pairs that {b} allows, and not all of them",
            Verdict.OVERLAPS: f"{a} and {b} share pairs, and each allows some that the other does not",
            Verdict.DISJOINT: f"{a} and {b} share no pair",
        }
        lines = [f"{self.verdict.value}: {says[self.verdict]}"]
        if self.only_first is not None:
            lines.append(f"  only in {a}: {self.only_first}")
        if self.only_second is not None:
            lines.append(f"  only in {b}: {self.only_second}")
        if self.both is not None:
            lines.append(f"  in both: {self.both}")
        return "\n".join(lines)


def compare(a: Program, b: Program) -> Comparison:
    """How the patterns of two programs relate; scores play no part.

    >>> from attndsl.program import Binary, Inter, Where
    >>> def window(n: int) -> Program:
    ...     distance = Binary("-", Var("q"), Var("k"))
    ...     parts = Where(Compare("<=", Var("k"), Var("q"))), Where(Compare("<", distance, Const(n)))
    ...     return Program.of(f"window{n}", Inter(parts))
    >>> print(compare(window(4), window(8)))
    contained: `window4` allows only pairs that `window8` allows, and not all of them
      only in `window8`: q = 4, k = 0 at Nk = 5
      in both: q = 0, k = 0 at Nk = 1

    Inputs and arguments of one name are the same in both programs, and may have any value.

    Raises:
        ValueError: one program has `align start`, `packed` or `lengths`, and the other has not.
        Undecided: the answer is not found within the effort bound.
    """
    if a.align_start != b.align_start:
        raise ValueError("one pattern has `align start` and the other has not: their positions do not compare")
    if (a.packed, a.lengths) != (b.packed, b.lengths):
        raise ValueError("the patterns are not of the same documents or lengths: they do not compare")
    a, b = together(a), together(b)
    program, *patterns = _joined(a, b)
    program = derive(program)
    # Derived inputs are taken for any values; a witness must hold of the sets as they are written.
    assert isinstance(program.branch.pattern, Union)
    first, second = program.branch.pattern.parts
    lowering = Lowering(program)

    def ask(find: Callable[[], isl.Set], in_first: bool, in_second: bool) -> Witness | None:
        def check(world: World, w: Witness) -> bool:
            inside = (world.member(pattern, w.q, w.k) for pattern in patterns)
            return tuple(inside) == (in_first, in_second)

        found: Witness | None = bounded(lowering.ctx, lambda: existing.witness(find(), check), COMPARE_EFFORT)
        return found

    try:
        existing = Existing(lowering, first, second)
        p, r = existing.of(first), existing.of(second)
        only_first = ask(lambda: p.subtract(r), True, False)
        only_second = ask(lambda: r.subtract(p), False, True)
        both = ask(lambda: p.intersect(r), True, True)
    except TooHard:
        raise Undecided(f"comparing `{a.name}` with `{b.name}` passes the effort bound") from None
    match only_first, only_second, both:
        case None, None, _:
            verdict = Verdict.EQUAL
        case _, None, _:
            verdict = Verdict.CONTAINS
        case None, _, _:
            verdict = Verdict.CONTAINED
        case _, _, None:
            verdict = Verdict.DISJOINT
        case _:
            verdict = Verdict.OVERLAPS
    return Comparison(verdict, a.name, b.name, only_first, only_second, both)


def _joined(a: Program, b: Program) -> tuple[Program, Set, Set]:
    """One program with the inputs, arguments and tables of both, and the two patterns in it."""
    known = {table.name: table for table in a.tables}
    renamed = {t.name: f"{t.name}'" for t in b.tables if known.get(t.name, t) != t}

    def rename(e: Scalar) -> Scalar:
        if isinstance(e, Table) and e.name in renamed:
            return replace(e, name=renamed[e.name])
        return e

    first = canonical(a.branch.pattern)
    second = canonical(map_scalars(b.branch.pattern, lambda e: rebuild(e, rename)))
    tables = {**known, **{t.name: t for t in (replace(t, name=renamed.get(t.name, t.name)) for t in b.tables)}}
    inputs = {decl.name: decl for decl in a.inputs}
    for decl in b.inputs:
        other = inputs.setdefault(decl.name, decl)
        if (other.type, other.dims) != (decl.type, decl.dims):
            raise ValueError(f"input `{decl.name}` is declared in two ways: the patterns do not compare")
        # What holds for any values holds for sorted ones, so a promise counts only where both make it.
        inputs[decl.name] = replace(other, sorted=other.sorted and decl.sorted)
    program = replace(
        a.with_branch(pattern=Union((first, second))),
        inputs=tuple(inputs.values()),
        args=tuple(dict.fromkeys((*a.args, *b.args))),
        tables=tuple(tables.values()),
    )
    return program, first, second


# ---------------------------------------------------------------------------------- existing pairs


class Existing:
    """The existing pairs of one program's sets, and what is known of the scalars they read.

    Beyond what `Lowering.context` says: heads are below their number, tables are read at one index at a time, and
    conditions on data that bear on the same scalars agree (`x < 3` implies `x < 5`; a token is in its own document).
    """

    def __init__(self, lowering: Lowering, *patterns: Set) -> None:
        self.lowering = lowering
        # Lowered first: their conditions on data, and other parameters, are what something is known of.
        self._lowered: dict[Set, isl.Set] = {p: lowering.lower(p, lowering.here) for p in patterns}
        self._existing: dict[Set, isl.Set] = {}
        same = "" if lowering.program.align_start else " and Nq = Nk"
        longest = 1 << POSITION_BITS
        ends = f"Nq <= {longest} and Nk <= {longest}{same}"
        self.domain = lowering.set(f"[Nq, Nk] -> {{ [q, k] : 0 <= q < Nq and 0 <= k < Nk and {ends} }}")
        self.domain = self.domain.intersect_params(lowering.context())
        for text in (*_head_axioms(lowering), *_table_axioms(lowering), *_data_axioms(lowering)):
            self.domain = self.domain.intersect(lowering.set(text))

    def of(self, pattern: Set) -> isl.Set:
        """The existing pairs of one of the sets, or of a part of one."""
        if pattern not in self._existing:
            self._lowered[pattern] = self.lowering.lower(pattern, self.lowering.here)
            self._existing[pattern] = self._lowered[pattern].intersect(self.domain)
        return self._existing[pattern]

    def witness(self, pairs: isl.Set, check: Callable[[World, Witness], bool], longer: int = 0) -> Witness | None:
        """A pair of a set for which `check` holds in some call; None where the set is empty.

        The call has `longer` more tokens than the witness says. Raises `Undecided` where the set has pairs, and none
        is found to be possible.
        """
        if pairs.is_empty():
            return None
        # Most questions have no witness, and the oracle's arrays take long to import.
        from attndsl.worlds import realise

        for _ in range(MAX_GUESSES):
            found = self.smallest(pairs)
            place = replace(found, q_len=found.q_len + longer, k_len=found.k_len + longer)
            if realise(self.lowering.program, place, check):
                return found
            pairs = pairs.subtract(self._alike(found, pairs))
            if pairs.is_empty():
                break
        raise Undecided(f"it rests on data: no inputs were found for {found}")

    def smallest(self, pairs: isl.Set) -> Witness:
        """The pair of a set at the least length, with the least values."""
        values: dict[str, int] = {}
        for name in ("Nk", "Nq", *self.lowering.uniform, *self.lowering.atoms):
            position = pairs.find_dim_by_name(isl.dim_type.param, name)
            if position >= 0:
                values[name] = _least(_only_param(pairs.params(), name))
                pairs = pairs.fix_val(
                    isl.dim_type.param, position, isl.Val.int_from_si(self.lowering.ctx, values[name])
                )
        # isl fails at some sets of equalities that it has not found yet ("affine expression involves some of the domain
        # dimensions").
        q, k = _coordinates(pairs.detect_equalities().lexmin())
        used = {name: values[name] for name in values if any(involves_param(p, name) for p in self._lowered.values())}
        numbers, truths = [], []
        for name, e in (*self.lowering.uniform.items(), *self.lowering.atoms.items()):
            if name in used and e.type is Type.BOOL:
                truths.append((e, used[name] == 1))
            elif name in used:
                numbers.append((e, used[name]))
        q_len = values["Nk" if "Nq" not in values else "Nq"]
        return Witness(q, k, q_len, values["Nk"], tuple(numbers), tuple(truths))

    def _alike(self, witness: Witness, pairs: isl.Set) -> isl.Set:
        """The pairs on the same side of q = k with the same truth of the same conditions, and the same values."""
        order = "<" if witness.q < witness.k else ">" if witness.q > witness.k else "="
        pairs = pairs.intersect(self.lowering.set(f"{{ [q, k] : q {order} k }}"))
        known = {**dict(witness.values), **{e: int(truth) for e, truth in witness.conditions}}
        for name, e in (*self.lowering.atoms.items(), *self.lowering.uniform.items()):
            if e in known:
                pairs = pairs.intersect_params(self.lowering.set(f"[{name}] -> {{ : {name} = {known[e]} }}").params())
        return pairs


def _only_param(params: isl.Set, name: str) -> isl.Set:
    """The values of one parameter, as a set of one dimension."""
    for position in reversed(range(params.dim(isl.dim_type.param))):
        if params.get_dim_name(isl.dim_type.param, position) != name:
            params = params.project_out(isl.dim_type.param, position, 1)
    return isl.Set.from_params(params).move_dims(isl.dim_type.set, 0, isl.dim_type.param, 0, 1)


def _least(values: isl.Set) -> int:
    """The least value that is not negative, else the greatest."""
    natural = values.intersect(isl.Set.read_from_str(values.get_ctx(), "{ [x] : x >= 0 }"))
    (value,) = _coordinates(values.lexmax() if natural.is_empty() else natural.lexmin())
    return value


def _coordinates(single: isl.Set) -> tuple[int, ...]:
    """The coordinates of the one point of a set."""
    # `dim_min_val` would be shorter, and is wrong for some unions.
    point = single.sample_point()
    vals = (point.get_coordinate_val(isl.dim_type.set, i) for i in range(single.dim(isl.dim_type.set)))
    return tuple(int(val.to_python()) for val in vals)


def _head_axioms(lowering: Lowering) -> Iterator[str]:
    names = {e.name: name for name, e in lowering.uniform.items() if isinstance(e, Var)}
    for low, high, relation in (("h", "H", "<"), ("g", "G", "<"), ("g", "h", "<="), ("G", "H", "<=")):
        if low in names and high in names:
            x, y = names[low], names[high]
            yield f"[{x}, {y}] -> {{ [q, k] : {x} {relation} {y} }}"


def _table_axioms(lowering: Lowering) -> Iterator[str]:
    """Which values tables read at one index have together."""
    groups: dict[Scalar, dict[str, Table]] = {}
    for name, e in lowering.uniform.items():
        if isinstance(e, Table) and len(e.index) == 1:
            groups.setdefault(e.index[0], {})[name] = e
    for index, tables in groups.items():
        values = {name: [int(v) for v in lowering.program.table(e.name).values] for name, e in tables.items()}
        size = max(map(len, values.values()))
        if size > MAX_CASES or not all(values.values()):
            continue
        known = [name for name, e in lowering.uniform.items() if e == index]
        cases = set()
        for i in range(size):
            facts = [f"{name} = {entries[min(i, len(entries) - 1)]}" for name, entries in values.items()]
            # An index beyond an end is the end's.
            facts += [
                f"{name} {'<=' if i == 0 else '='} {i}" if i < size - 1 else f"{name} >= {i}"
                for name in known
                if size > 1
            ]
            cases.add(" and ".join(facts))
        yield f"[{', '.join([*values, *known])}] -> {{ [q, k] : {' or '.join(sorted(cases))} }}"


def _data_axioms(lowering: Lowering) -> Iterator[str]:
    """What is true of canonical comparisons: of a number or a token with itself, and of those with one left side."""
    atoms = [(name, e) for name, e in (*lowering.atoms.items(), *lowering.uniform.items()) if isinstance(e, Compare)]
    by_sides = {(e.op, e.left, e.right): name for name, e in atoms}
    for name, e in atoms:
        if e.left == e.right:
            yield f"[{name}] -> {{ [q, k] : {name} = {int(e.op == '==')} }}"
            continue
        left, right = (fold(substitute(x, {"k": Var("q")})) for x in (e.left, e.right))
        if left == right:
            yield f"[{name}] -> {{ [q, k] : q != k or {name} = {int(e.op == '==')} }}"
        if e.op == "==":
            less, more = (by_sides.get(("<", *sides)) for sides in ((e.left, e.right), (e.right, e.left)))
            if less and more:
                yield f"[{name}, {less}, {more}] -> {{ [q, k] : {name} + {less} + {more} = 1 }}"
            elif other := less or more:
                yield f"[{name}, {other}] -> {{ [q, k] : {name} + {other} <= 1 }}"
        elif other := by_sides.get(("<", e.right, e.left)):
            yield f"[{name}, {other}] -> {{ [q, k] : {name} + {other} <= 1 }}"
    booleans = [(name, fold(substitute(e, {"k": Var("q")}))) for name, e in lowering.atoms.items()]
    for (name, x), (other, y) in combinations(booleans, 2):
        if x == y:
            yield f"[{name}, {other}] -> {{ [q, k] : q != k or {name} = {other} }}"
    for (name, e), (other, f) in permutations(atoms, 2):
        match e, f:
            case Compare(left=x, right=Const(value=c)), Compare(left=y, right=Const(value=d), op="<") if x == y:
                # e says x = c or x < c; f says x < d.
                if (c < d) if e.op == "==" else (c <= d):
                    yield f"[{name}, {other}] -> {{ [q, k] : {name} <= {other} }}"
                elif e.op == "==":
                    yield f"[{name}, {other}] -> {{ [q, k] : {name} + {other} <= 1 }}"
            case Compare(op="==", left=x, right=Const()), Compare(op="==", left=y, right=Const()) if x == y:
                yield f"[{name}, {other}] -> {{ [q, k] : {name} + {other} <= 1 }}"
            case _:
                pass
