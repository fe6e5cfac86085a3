"""Kernel plans of two levels: those of one level over the same pairs, with a member of the keys for each tile.

A tile of keys is a member: then the softmax inside it is done with once the tile is scored. One that products do not
take whole is gone over in strips. Where its keys are no power of two, a tile has columns to spare. What weighs the
members of a row is an input of the branch's program. Those of decode are made in `decode.py`, of the same read and
tiles.

Of a packed call the members are entries of documents, and so are tiles: which of them a row visits is what it would
see of a view of them, and which of a tile's pairs are allowed is asked of tokens. On the CPU a tile may be any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from attndsl.branches import Ballot, Given, Part, Pool, PoolFunction, Visible, Within
from attndsl.compose import of_one_level
from attndsl.derivation import Derivation, DocumentEnds, DocumentEntries, EntryPlace
from attndsl.derive import derive, with_needed
from attndsl.diagnostics import PatternError
from attndsl.entry_ends import terms
from attndsl.linear import normalise
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
    Logic,
    Program,
    Read,
    Scalar,
    Selected,
    Set,
    Type,
    Var,
    Where,
    nodes,
    rebuild,
    substitute,
)
from attndsl.quasi_affine import condition
from attndsl.relation import Lowering
from attndsl.runs import TileRuns
from attndsl.shares import Shares, Votes
from attndsl.simplify import fold, specialise
from attndsl.tile_sizes import backward_tilings, default_tiling
from attndsl.unpack import document_of
from attndsl.view_plans import counted, entries_of, view_backward, view_forward

P = TypeVar("P", bound=Plan)
# Rows that a tile has at least, and the keys of the largest that is scored at once.
_ROWS, _WHOLE = 16, 256


def within_forward(program: Program, spec: Spec) -> ForwardPlan:
    """The forward kernel of a program of one part, which has two levels."""
    tokens, entries = _derived(program, spec)
    # Of tiles that are members of documents no plan tells.
    spec = replace(_loading(program, spec), lists=spec.lists and entries is None)
    tiling = _fitted(default_tiling(spec), program, spec)
    shares = shares_of(tokens, (spec.heads, spec.kv_heads), spec.sizes)
    plan = replace(forward_plan(of_one_level(tokens), spec, tiling), shares=shares)
    if entries is None:
        return declaring(plan, tokens)
    declared, tiles_of = _tiles_of(_with_inputs(entries, plan.program), _within(program))
    found = view_forward(declared, spec, replace(tiling, block_k=1), follows=False)
    plan = replace(plan, runs=_masked(found.runs), tiles_of=tiles_of)
    return declaring(plan, tokens, entries, found.program)


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
    if _within(tokens).votes is not None:
        of_q, of_keys = _beside_votes(of_q), _beside_votes(replace(of_keys, warps=8), bool(of_keys.strip))
    plan = backward_plan(of_one_level(tokens), spec, of_q, of_keys, uses_lse)
    shares = shares_of(tokens, (spec.heads, spec.kv_heads), spec.sizes, gradients=True)
    plan = replace(plan, shares=shares)
    if entries is None:
        return declaring(plan, tokens)
    declared, tiles_of = _tiles_of(_with_inputs(entries, plan.program), _within(program))
    single = replace(of_q, block_k=1), replace(of_keys, block_k=1)
    found = view_backward(declared, spec, single, uses_lse=uses_lse, follows=False)
    runs, key_runs = _masked(found.runs), _masked(found.key_runs)
    plan = replace(plan, runs=runs, key_runs=key_runs, tiles_of=tiles_of)
    return declaring(plan, tokens, entries, found.program)


def _derived(program: Program, spec: Spec) -> tuple[Program, Program | None]:
    """The derived program, and where its members are of documents and a tile is one, that of the entries that are
    members, of which a row visits those of which it may see a token."""
    within = _within(program)
    if within.packed is None or spec.backend is Backend.CPU:
        return derived(program), None
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


def declaring(plan: P, *programs: Program) -> P:
    """The plan, its program declaring of what these declare what it needs. What it has as a list goes by the name of
    the map in whose place it stands."""
    own, planned = programs[0].with_branch(parts=plan.program.only.parts), plan.program
    inputs = {decl.name: decl for each in (own, planned, *programs) for decl in each.inputs}
    inputs |= {decl.name: decl for decl in planned.inputs}
    whole = replace(plan, program=replace(own, inputs=tuple(inputs.values())))
    return replace(whole, program=with_needed(whole.program, whole.inputs))


def _within(program: Program) -> Within:
    within = program.only.within
    assert within is not None
    return within


def derived(program: Program, ragged: bool = False) -> Program:
    """The derived program, in which the entries that weigh members are derived too. ragged: as in `derive`."""
    (part,), within = program.only.parts, _within(program)
    if within.votes is None:
        return derive(program, ragged)
    found = derive(program.with_branch(parts=(part, within.votes.entries)), ragged)
    tokens, entries = found.only.parts
    votes = replace(within.votes, entries=entries)
    return found.with_branch(parts=(replace(tokens, within=replace(within, votes=votes)),))


def shares_of(program: Program, heads: tuple[int, int], sizes: Mapping[str, int], gradients: bool = False) -> Shares:
    """What a pair's member weighs in a derived program of two levels. In a document members count from its first
    token."""
    within = _within(program)
    place: Scalar = Var("k")
    if within.packed is not None:
        place = Binary("-", place, document_of(program, within.packed, False, "k"))
    member = Binary("//", place, Const(within.keys))
    if within.votes is not None:
        return Shares(member, votes=_votes(program, within.votes, heads, sizes, gradients))
    assert within.weights, "the branch's program names what weighs its members"
    return Shares(member, Read(within.weights, (Var("b"), Var("h"), Var("q"), member), Type.FLOAT))


def _votes(
    program: Program, ballot: Ballot, heads: tuple[int, int], sizes: Mapping[str, int], gradients: bool
) -> Votes:
    view = ballot.entries.view
    assert isinstance(view, Given)
    relation = entries_of(program.with_branch(parts=(ballot.entries,)), heads)
    seen = fold(normalise(condition(relation.pairs, relation.context, relation.uniform | relation.atoms)))
    held = _held(program, view.stride, heads)
    seen = fold(rebuild(seen, lambda e: Const(True) if e.type is Type.BOOL and _plain(e) in held else e))
    logit = counted(ballot.score, view) if view.counted else ballot.score
    slope = None
    if gradients and logit is not None:
        from attndsl.score import derivative  # sympy takes half a second to import.

        slope = derivative(logit, Var("s"))

    def of_member(e: Scalar | None) -> Scalar | None:
        return None if e is None else specialise(substitute(e, {"k": Var("k_tile")}), sizes)

    return Votes(
        view.keys, program.input(view.keys).learnable, of_member(ballot.scale), of_member(logit),
        of_member(None if slope == Const(1.0) else slope), of_member(None if seen == Const(True) else seen),
        Read(ballot.lse, (Var("b"), Var("h"), Var("q")), Type.FLOAT),
    )  # fmt: skip


def _held(program: Program, keys: int, heads: tuple[int, int]) -> set[Scalar]:
    """What holds of a row and a member, said of its entry, wherever the row sees a token of the member."""
    (part,), lowering = program.only.parts, Lowering(program, heads)
    held = set[Scalar]()
    for term in terms(part.pattern):
        e = lowering.predicate(term)
        for x in e.operands if isinstance(e, Logic) and e.op == "and" else (e,):
            # The same for all tokens of a member, so that of its first tells.
            member = Binary("//", Var("k"), Const(keys))
            of_member = _plain(substitute(x, {"k": Binary("*", Const(keys), Var("k"))}))
            if x == substitute(of_member, {"k": member}):
                held.add(of_member)
    return held


def _plain(e: Scalar) -> Scalar:
    """The condition with its indices in normal form."""

    def step(x: Scalar) -> Scalar:
        return replace(x, index=tuple(map(normalise, x.index))) if isinstance(x, Read) else x

    return rebuild(e, step)


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


def _beside_votes(tiling: Tiling, strip: bool = False) -> Tiling:
    """A tiling of a backward kernel that leaves room for what entries give and take: a tile of eight warps that spills
    without it is made smaller."""
    fills = strip or (tiling.warps == 8 and tiling.block_q > 32)
    return replace(tiling, block_q=max(_ROWS, tiling.block_q // 2)) if fills else tiling


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
