"""Kernel plans of two levels: those of one level over the same pairs, with a member of the keys for each tile.

A tile of keys is a member: then the softmax inside it is done with once the tile is scored. One that products do not
take whole is gone over in strips. Where its keys are no power of two, a tile has columns to spare. What weighs the
members of a row is an input of the branch's program. Those of decode are made in `decode.py`, of the same read and
tiles.

Of a packed call the members are entries of documents, and so are tiles: which of them a row visits is what it would
see of a view of them, and which of a tile's pairs are allowed is asked of tokens. On the CPU a tile may be any.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from attndsl.branches import Part, Pool, PoolFunction, Visible, Within
from attndsl.compose import of_one_level
from attndsl.derivation import Derivation, DocumentEnds, DocumentEntries, EntryPlace
from attndsl.derive import derive, with_needed
from attndsl.diagnostics import PatternError
from attndsl.entry_ends import terms
from attndsl.listing import EntryTiles
from attndsl.plan import (
    Backend,
    BackwardPlan,
    ForwardPlan,
    Loads,
    Plan,
    Spec,
    Tiling,
    backward_plan,
    forward_plan,
)  # fmt: skip
from attndsl.program import (
    Binary,
    Const,
    InputDecl,
    Inter,
    Program,
    Read,
    Scalar,
    Selected,
    Set,
    Type,
    Var,
    Where,
    nodes,
)
from attndsl.runs import TileRuns
from attndsl.tile_sizes import backward_tilings, default_tiling
from attndsl.unpack import document_of
from attndsl.view_plans import view_backward, view_forward

P = TypeVar("P", bound=Plan)
# Rows that a tile has at least, and the keys of the largest that is scored at once.
_ROWS, _WHOLE = 16, 256


def within_forward(program: Program, spec: Spec) -> ForwardPlan:
    """The forward kernel of a program of one part, which has two levels."""
    tokens, entries = _derived(program, spec)
    # Of tiles that are members of documents no plan tells.
    spec = replace(_loading(program, spec), lists=spec.lists and entries is None)
    tiling = _fitted(default_tiling(spec), program, spec)
    plan = replace(forward_plan(of_one_level(tokens), spec, tiling), shares=shares_read(tokens))
    if entries is None:
        return _declaring(plan, tokens)
    declared, tiles_of = _tiles_of(_with_inputs(entries, plan.program), _within(program))
    found = view_forward(declared, spec, replace(tiling, block_k=1), follows=False)
    plan = replace(plan, runs=_masked(found.runs), tiles_of=tiles_of)
    return _declaring(plan, tokens, entries, found.program)


def within_backward(program: Program, spec: Spec, uses_lse: bool) -> BackwardPlan:
    """The backward kernels of such a program."""
    tokens, entries = _derived(program, spec)
    # Of tiles that are members of documents no plan tells.
    spec = replace(_loading(program, spec), lists=spec.lists and entries is None)
    of_q, of_keys = (_fitted(tiling, program, spec) for tiling in backward_tilings(spec))
    if of_keys.strip:
        of_keys = replace(of_keys, block_q=of_q.block_q, stages=1)
    else:
        # Beside its accumulators it holds a tile's probabilities twice: of as many rows they spill.
        of_keys = replace(of_keys, block_q=max(_ROWS, of_keys.block_q // 2))
    plan = backward_plan(of_one_level(tokens), spec, of_q, of_keys, uses_lse)
    plan = replace(plan, shares=shares_read(tokens))
    if entries is None:
        return _declaring(plan, tokens)
    declared, tiles_of = _tiles_of(_with_inputs(entries, plan.program), _within(program))
    single = replace(of_q, block_k=1), replace(of_keys, block_k=1)
    found = view_backward(declared, spec, single, uses_lse=uses_lse, follows=False)
    runs, key_runs = _masked(found.runs), _masked(found.key_runs)
    plan = replace(plan, runs=runs, key_runs=key_runs, tiles_of=tiles_of)
    return _declaring(plan, tokens, entries, found.program)


def _derived(program: Program, spec: Spec) -> tuple[Program, Program | None]:
    """The derived program, and where its members are of documents and a tile is one, that of the entries that are
    members, of which a row visits those of which it may see a token."""
    within = _within(program)
    if within.packed is None or spec.backend is Backend.CPU:
        return derive(program), None
    (part,) = program.only.parts
    entries = Pool(PoolFunction.MEAN, within.keys, within.keys, Visible.ANY)

    def over(*patterns: Set) -> Program:
        of_entries = Part(Inter((Where(Const(True)), *patterns), part.span), entries)
        return derive(program.with_branch(parts=(part, of_entries)))

    def tells(pattern: Set) -> bool:
        if any(isinstance(x, Selected) for x in nodes(pattern)):
            return False
        try:
            over(pattern)
        except PatternError:
            return False
        return True

    found = over(*filter(tells, terms(part.pattern)))
    tokens, of_entries = found.only.parts
    return found.with_branch(parts=(tokens,)), found.with_branch(parts=(of_entries,))


def _tiles_of(program: Program, within: Within) -> tuple[Program, EntryTiles]:
    """Where tiles that are members lie, and the program of these entries, declaring what tells."""
    assert within.packed is not None
    ids = program.input(within.packed)
    lead, inputs = tuple(Var("b") for _ in ids.dims[:-1]), list(program.inputs)

    def read(made: Derivation, name: str, at: Scalar) -> Read:
        decl = next((x for x in inputs if x.derivation == made), None)
        if decl is None:
            while any(x.name == name for x in inputs):
                name += "_"
            decl = InputDecl(name, Type.INT, ids.dims, sorted=True, derivation=made)
            inputs.append(decl)
        return Read(decl.name, (*lead, at), Type.INT)

    size, name = within.keys, ids.name
    first, end, document = (
        read(DocumentEntries(name, size, size, place), f"entry_{place.value}_{name}", Var("k_tile"))
        for place in EntryPlace
    )
    stop = read(DocumentEnds(name, True), f"end_{name}", first)
    return replace(program, inputs=tuple(inputs)), EntryTiles(first, end, document, stop)


def _with_inputs(program: Program, *others: Program) -> Program:
    """A program that declares what others do, too."""
    inputs = dict.fromkeys(decl for each in (program, *others) for decl in each.inputs)
    return replace(program, inputs=tuple(inputs))


def _masked(runs: TileRuns) -> TileRuns:
    """The runs as such of partial tiles: a member need not have all the keys of its tile."""
    return TileRuns((), (*runs.full, *runs.partial))


def _declaring(plan: P, *programs: Program) -> P:
    """The plan, its program declaring of what these declare what it needs."""
    own = programs[0].with_branch(parts=plan.program.only.parts)
    whole = replace(plan, program=_with_inputs(own, plan.program, *programs))
    return replace(whole, program=with_needed(whole.program, whole.inputs))


def _within(program: Program) -> Within:
    within = program.only.within
    assert within is not None
    return within


def shares_read(program: Program) -> Read:
    """What a pair's member weighs in a derived program of two levels. In a document members count from its first
    token."""
    within = program.only.within
    assert within is not None and within.weights, "the branch's program names what weighs its members"
    place: Scalar = Var("k")
    if within.packed is not None:
        place = Binary("-", place, document_of(program, within.packed, False, "k"))
    member = Binary("//", place, Const(within.keys))
    return Read(within.weights, (Var("b"), Var("h"), Var("q"), member), Type.FLOAT)


def _fitted(tiling: Tiling, program: Program, spec: Spec) -> Tiling:
    """A tiling with a member's keys a tile, and as many rows as leave it about as many pairs."""
    within = _within(program)
    if spec.backend is Backend.CPU:
        return Tiling(128, within.keys)
    member = replace(tiling, block_k=within.keys)
    if within.keys > _WHOLE:
        # Beside the output it holds what the member at hand adds to it.
        return replace(member, block_q=max(_ROWS, tiling.block_q // 2), strip=tiling.block_k)
    rows = max(_ROWS, min(128, tiling.block_q * tiling.block_k // member.columns))
    if within.keys <= tiling.block_k:
        return replace(member, block_q=rows)
    # A large tile of keys leaves no room for the next.
    return Tiling(rows, within.keys, warps=8, stages=1)


def _loading(program: Program, spec: Spec) -> Spec:
    """Portable Triton; hardware copies tiles of a power of two that lie one after another."""
    within = _within(program)
    if spec.backend is Backend.GLUON:
        spec = replace(spec, backend=Backend.TRITON)
    if within.packed is not None:
        # Where its tiles lie is data already: no tiles of the call are listed.
        spec = replace(spec, even_start=False, lists=False, maps=False)
    whole = Tiling(_ROWS, within.keys).columns == within.keys <= _WHOLE and within.packed is None
    return spec if whole else replace(spec, loads=Loads.POINTER)
