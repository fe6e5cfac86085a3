"""A program of views and branches as programs that kernels know: one branch each, its views handed in as inputs.

A pool becomes two inputs, its keys and its values, that the runtime makes before the kernels run; gradients flow to
them as to any learnable input, and from there through the pooling. So do the probabilities by which a branch of two
levels weighs its members. The branches' outputs are combined afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from attndsl.branches import (
    Attended,
    Ballot,
    Branch,
    Given,
    Merged,
    Output,
    Part,
    Pick,
    Pool,
    Within,
    combined,
    factors,
)
from attndsl.diagnostics import error
from attndsl.plans import own_program
from attndsl.program import (
    Axis,
    Binary,
    Dim,
    InputDecl,
    Program,
    Read,
    Scalar,
    Selected,
    Type,
    Var,
    nodes,
    reads,
    walk,
)  # fmt: skip
from attndsl.selection import Probs
from attndsl.unpack import of_output


@dataclass(frozen=True, slots=True)
class Picked:
    """What tokens listed in documents are in positions of a call, as inputs that are made: `tokens` holds those
    of entries, and of `masses` each what an entry counts for, by the input that weighs it ("": none does)."""

    tokens: str
    masses: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Pooling:
    """Entries to make: what an input holds the keys and another the values of. `visible`, `counted`, `weight` play no
    part. picked: of tokens listed in documents."""

    pool: Pool | Pick
    keys: str
    values: str
    picked: Picked | None = None

    @property
    def made(self) -> tuple[str, ...]:
        """The inputs that are made."""
        told = () if self.picked is None else (self.picked.tokens, *(name for _, name in self.picked.masses))
        return (self.keys, self.values, *told)

    @property
    def name(self) -> str:
        """How the view is called: what the language writes, less what concerns who sees it."""
        pool = self.pool
        if isinstance(pool, Pick):
            return f"pick({pool.input})"
        if pool.runs is not None:
            return f"pool({pool.function.value}, segments({pool.runs.input}))"
        stride = f", {pool.stride}" if pool.stride != pool.size else ""
        return f"pool({pool.function.value}, {pool.size}{stride})"

    @property
    def told_by(self) -> tuple[str, ...]:
        """The inputs that tell its entries."""
        pool = self.pool
        runs = None if pool.runs is None else pool.runs.input
        own = pool.input if isinstance(pool, Pick) else runs
        return tuple(name for name in (own, pool.packed) if name is not None)


@dataclass(frozen=True, slots=True)
class Composition:
    """What a program consists of: entries to make, programs of one branch by name, and how their outputs combine.

    own: the program with the inputs that a call gives alone. reading: with those that its output reads, which stands in
    positions of a call (None: there is no output).
    """

    pools: tuple[Pooling, ...]
    branches: tuple[tuple[str, Program], ...]
    output: Output
    own: Program
    reading: Program | None

    @property
    def programs(self) -> tuple[Program, ...]:
        """The branches' own."""
        return tuple(program for _, program in self.branches)

    @property
    def pooled(self) -> tuple[Pool, ...]:
        """Those of its views that a kernel pools."""
        return tuple(pooling.pool for pooling in self.pools if isinstance(pooling.pool, Pool))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its views."""
        return tuple(pooling.name for pooling in self.pools)


def compose(program: Program) -> Composition:
    """The composition of a program; of its branches those that its output, a selection or `observe` reads."""
    output = program.output or Attended("")
    read = set(combined(output))
    read |= {x.score.branch for x in program.selections if isinstance(x.score, Probs)}
    read |= {x.branch for x in program.observations}
    read |= {x.within.branch for x in program.branches if x.within is not None and x.name in read}
    found: dict[Pool | Pick, Pooling] = {}
    branches = list[tuple[str, Branch]]()
    for branch in program.branches:
        if program.output is None or branch.name in read:
            name = "" if program.output is None else branch.name or ""
            before = dict(branches)
            parts = tuple(_handed_in(part, program, found, name, before, branch.scale) for part in branch.parts)
            branches.append((name, replace(branch, parts=parts)))
    pools = tuple(found.values())
    made = tuple(decl for pooling in pools for decl in _declared(pooling))
    made += tuple(_shares(x.within) for _, x in branches if x.within is not None)
    programs = tuple((name, _program(program, branch, made)) for name, branch in branches)
    read_by_output = None if program.output is None else reading(program)
    return Composition(pools, programs, output, own_program(program), read_by_output)


def _handed_in(
    part: Part, program: Program, found: dict[Pool | Pick, Pooling], branch: str, before: dict[str, Branch],
    scale: Scalar | None,
) -> Part:  # fmt: skip
    if part.within is not None:
        ballot, taken = (
            _ballot(part.within, program, before[part.within.branch], scale),
            {decl.name for decl in program.inputs},
        )
        word = "shares" if ballot is None else "lse"
        name = next(x for x in (f"{word}_{branch}{'_' * i}" for i in range(len(taken) + 1)) if x not in taken)
        if ballot is not None:
            return replace(part, within=replace(part.within, votes=replace(ballot, lse=name)))
        return replace(part, within=replace(part.within, weights=name, packed=program.packed))
    view = part.view
    if view is None or isinstance(view, Given):
        return part
    made: Pool | Pick
    if isinstance(view, Pick):
        made = replace(view, weight=None, packed=program.packed)
    else:
        made = Pool(view.function, view.size, view.stride, runs=view.runs, packed=program.packed)
    if made not in found:
        taken = _taken(program, found)
        suffixes = (f"_{i}" if i else "" for i in range(len(taken) + 1))
        word = "pooled" if isinstance(made, Pool) else "picked"
        suffix = next(x for x in suffixes if not {f"{word}_{y}{x}" for y in "kvt"} & taken)
        told = Picked(f"{word}_t{suffix}", ()) if isinstance(made, Pick) and made.packed is not None else None
        found[made] = Pooling(made, f"{word}_k{suffix}", f"{word}_v{suffix}", told)
    pooling = found[made]
    names = (pooling.keys, pooling.values)
    if isinstance(view, Pick) and pooling.picked is not None:
        return replace(part, view=_in_documents(view, pooling, pooling.picked, program, found))
    if isinstance(view, Pick):
        return replace(part, view=Given(*names, 1, 1, picked=view, room=view.room))
    entries = Given(*names, view.size, view.stride, view.visible, view.counted, runs=view.runs, packed=program.packed)
    return replace(part, view=entries)


def _taken(program: Program, found: dict[Pool | Pick, Pooling]) -> set[str]:
    return {decl.name for decl in program.inputs} | {name for pooling in found.values() for name in pooling.made}


def _in_documents(
    view: Pick, pooling: Pooling, picked: Picked, program: Program, found: dict[Pool | Pick, Pooling]
) -> Given:
    """Tokens listed in documents as ones listed in a call, of which one may stand for several of a list."""
    weight = view.weight
    by = weight.input if isinstance(weight, Read) and reads(weight, "k") else ""
    if by not in dict(picked.masses):
        taken, base = _taken(program, found), f"mass_{picked.tokens}"
        name = next(x for i in range(len(taken) + 1) if (x := f"{base}_{i}" if i else base) not in taken)
        picked = replace(picked, masses=(*picked.masses, (by, name)))
        found[pooling.pool] = replace(pooling, picked=picked)
    lead = (Var("b"), Var("g"))
    mass: Scalar = Read(dict(picked.masses)[by], (*lead, Var("k")), Type.FLOAT)
    if weight is not None and not by:
        mass = Binary("*", mass, weight)
    listed = Pick(picked.tokens, lead, Dim(Axis.K), mass)
    return Given(pooling.keys, pooling.values, 1, 1, picked=view, packed=program.packed, listed=listed)


def _ballot(within: Within, program: Program, by: Branch, scale: Scalar | None) -> Ballot | None:
    """What the branch that weighs members says of them, where it attends to an entry for each, none of which data
    tells, and its score learns nothing. scale: that of the members' branch: one that a call gives is that of both."""
    part, told = by.parts[0], program.packed is not None or program.lengths is not None
    view, said = part.view, [e for e in (by.scale, by.score) if e is not None]
    learnable = {decl.name for decl in program.inputs if decl.learnable}
    learns = any(isinstance(x, Read) and x.input in learnable for x in walk(*said))
    apart = len(by.parts) > 1 or by.queries is not None or (by.scale is None and scale is not None)
    if not isinstance(view, Given) or view.told or told or learns or apart:
        return None
    return Ballot(part, by.scale, by.score, "") if view.size == view.stride == within.keys else None


def _shares(within: Within) -> InputDecl:
    """What weighs the members of two levels, for each row; of votes what normalises them."""
    if within.votes is not None:
        return InputDecl(within.votes.lse, Type.FLOAT, (Dim(Axis.B), Dim(Axis.H), Dim(Axis.Q)), learnable=True)
    dims = (Dim(Axis.B), Dim(Axis.H), Dim(Axis.Q), Dim(Axis.K, within.keys))
    return InputDecl(within.weights, Type.FLOAT, dims, learnable=True)


def _declared(pooling: Pooling) -> tuple[InputDecl, ...]:
    pool, picked = pooling.pool, pooling.picked
    room = Dim(Axis.K, 1 if pool.told else pool.stride)
    if isinstance(pool, Pick) and picked is None:
        room = pool.room
    lead = (Dim(Axis.B), Dim(Axis.G), room)
    entries = (
        InputDecl(pooling.keys, Type.FLOAT, (*lead, Dim(Axis.D)), learnable=True),
        InputDecl(pooling.values, Type.FLOAT, (*lead, Dim(Axis.DV)), learnable=True),
    )
    if picked is None:
        return entries
    assert isinstance(pool, Pick)
    # What each document lists at the same places is told in the order of its tokens.
    tokens = InputDecl(picked.tokens, Type.INT, lead, sorted=pool.room.axis is Axis.CONST)
    return (*entries, tokens, *(InputDecl(name, Type.FLOAT, lead) for _, name in picked.masses))


def _program(program: Program, branch: Branch, made: tuple[InputDecl, ...]) -> Program:
    """A branch's own program. Of the inputs it has those it may read: sets read no floats."""
    said = (branch.scale, branch.score, branch.sink, branch.weights)
    read = {x.input for e in said if e is not None for x in walk(e) if isinstance(x, Read)}
    for part in branch.parts:
        if isinstance(part.view, Given):
            read |= {part.view.keys, part.view.values}
            for pick in (part.view.picked, part.view.listed):
                read |= set[str]() if pick is None else {pick.input}
                if pick is not None and pick.weight is not None:
                    read |= {x.input for x in walk(pick.weight) if isinstance(x, Read)}
        if part.within is not None:
            votes = part.within.votes
            read.add(part.within.weights if votes is None else votes.lse)
            if votes is not None and isinstance(votes.entries.view, Given):
                scalars = (e for e in (votes.scale, votes.score) if e is not None)
                read |= {x.input for e in scalars for x in walk(e) if isinstance(x, Read)}
                read.add(votes.entries.view.keys)
    chosen = tuple(decl for decl in program.inputs if _may_read(decl, branch, read))
    inputs = (*chosen, *(decl for decl in made if decl.name in read))
    # What its selections choose comes in as plans.
    return replace(program, branches=(branch,), inputs=inputs, output=None, selections=(), observations=())


def _may_read(decl: InputDecl, branch: Branch, read: set[str]) -> bool:
    if decl.members:
        ballots = [part.within.votes for part in branch.parts if part.within is not None]
        parts = (*branch.parts, *(ballot.entries for ballot in ballots if ballot is not None))
        plans = (x.plan for part in parts for x in nodes(part.pattern) if isinstance(x, Selected))
        return decl.name in plans
    return decl.type is not Type.FLOAT or decl.name in read


def reading(program: Program) -> Program:
    """The program, its output in positions of the call, with the inputs that this reads."""
    program = of_output(program)
    assert program.output is not None
    read = {x.input for x in walk(*factors(program.output)) if isinstance(x, Read)}
    return replace(program, inputs=tuple(decl for decl in own_program(program).inputs if decl.name in read))


def of_one_level(program: Program) -> Program:
    """A program of one part with one softmax in the place of two levels: it allows the same pairs."""
    (part,) = program.only.parts
    return program if part.within is None else program.with_branch(parts=(replace(part, within=None),))


def has_lse(program: Program) -> bool:
    """Whether the output is that of one softmax."""
    match program.output:
        case None:
            return program.branches[0].weights is None
        case Attended(branch=name):
            # Of two levels it is that of the branch that weighs the members.
            return program.named(name).weights is None
        case output:
            return isinstance(output, Merged)


def check_lse(program: Program) -> None:
    """Raises `PatternError` (A521) where there is no lse to return."""
    if not has_lse(program):
        several = program.output is not None
        reason = "this is not the output of one softmax" if several else "`weights` replaces the softmax"
        raise error("A521", f"{reason}: there is no lse", program.span)


def raw_first(program: Program) -> tuple[Part, ...]:
    """The parts of a program's only branch in the order in which they run."""
    return tuple(sorted(program.only.parts, key=lambda part: part.view is not None))


def part_programs(program: Program) -> tuple[Program, ...]:
    """The parts of a program's only branch as programs of their own, that over raw tokens first. What they share, the
    sink, enters with the first."""
    parts = raw_first(program)
    return tuple(
        program.with_branch(parts=(part,), **({} if part is parts[0] else {"sink": None})) for part in parts
    )  # fmt: skip
