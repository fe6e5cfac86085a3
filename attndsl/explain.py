"""What the compiler made of a program: understood, simplified, planned, and what a call should cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.around import amount, around
from attndsl.blockgraph import BlockGraph, block_graph
from attndsl.box_tiles import BoxRun
from attndsl.boxes import Boxes
from attndsl.derived_text import made_of
from attndsl.diagnostics import Diagnostic
from attndsl.effort import one_at_a_time
from attndsl.kernel_names import kernel_names
from attndsl.layout import Layout
from attndsl.listing import lists_tiles, reads_plans
from attndsl.lowerings import forward_lowering, gradients_lowering
from attndsl.mixing import mixes
from attndsl.notation import Level, input_text, program_text, scalar_text, set_text
from attndsl.pairs import count_pairs, seen, spans, spans_text, too_dense
from attndsl.parts import parts_of
from attndsl.permuting import PermutedPiece
from attndsl.piece_plans import forward_plans
from attndsl.piece_tiles import piece_tiles
from attndsl.pieces import choose_pieces, sorted_by_data
from attndsl.plan import ForwardPlan, Loads, Spec
from attndsl.program import (
    Binary,
    Call,
    CallShape,
    Const,
    If,
    Program,
    Read,
    Scalar,
    Selected,
    nodes,
    substitute,
    walk,
)
from attndsl.quasi_affine import condition
from attndsl.relation import Relation
from attndsl.runs import Run
from attndsl.simplify import fold
from attndsl.targets import BYTES, RATES
from attndsl.understood import understood
from attndsl.view_plans import part_relation

Array = NDArray[Any]
# Keys that a row is asked of one by one.
_LISTED = 1 << 24


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and the lines under it."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `Attention.explain` found. Prints as text; the sections may also be taken one by one."""

    sections: tuple[Section, ...]

    def section(self, title: str) -> Section:
        """The section of this title; KeyError if there is none."""
        for section in self.sections:
            if section.title == title:
                return section
        raise KeyError(title)

    def __str__(self) -> str:
        blocks = ["\n".join([s.title, *(f"  {line}".rstrip() for line in s.lines)]) for s in self.sections]
        return "\n\n".join(blocks)


@dataclass(frozen=True, slots=True)
class Question:
    """What to explain: a program, a kind of call, and what is known besides.

    text: the program in canonical layout. inputs: those that are known, as arrays; args: likewise.
    rates: operations and bytes a second; by default those of the target's data sheet.
    """

    program: Program
    spec: Spec
    shape: CallShape
    text: str
    warnings: tuple[Diagnostic, ...] = ()
    inputs: Mapping[str, Array] | None = None
    args: Mapping[str, int] | None = None
    row: int | None = None
    rates: tuple[float, float] | None = None


@one_at_a_time
def explain(question: Question) -> Explanation:
    """The explanation, section by section; those of a part have its name before theirs."""
    sections = [Section("understood", tuple(understood(question.program, question.text)))]
    for name, own in _parts(question):
        plans = forward_plans(own.program, own.spec)
        relation = part_relation(own.program, (own.spec.heads, own.spec.kv_heads))
        found = {
            "rows": _rows(own),
            "simplified": _simplified(relation),
            "pieces": _pieces(own),
            "planned": _planned(own, plans, Const(own.shape.first_position(own.program))),
            "cost": _cost(own, plans),
        }
        sections += [Section(f"{name}: {title}" if name else title, tuple(lines)) for title, lines in found.items()]
    sections.insert(3 if question.program.plain else 1, Section("warnings", tuple(_warnings(question.warnings))))
    sections += [
        Section("before and after", tuple(around(question.program, question.spec, question.shape))),
        Section("kernels", tuple(_kernels(question))),
    ]
    return Explanation(tuple(s for s in sections if s.lines))


def _parts(question: Question) -> list[tuple[str, Question]]:
    """The question of each part that is asked about. What it knows of plans is that they are lists."""
    found = []
    for name, program in parts_of(question.program).items():
        all_rows = question.shape.rows == question.shape.k_len and mixes(program)
        spec = replace(question.spec, even_start=lists_tiles(program), lists=reads_plans(program), all_rows=all_rows)
        found.append((name, replace(question, program=program, spec=spec)))
    return found


@one_at_a_time
def stages(question: Question, syntax: str, source: Callable[[ForwardPlan], str]) -> Explanation:
    """Every stage's own result: syntax, typed program, relation, runs, plan, source text.

    source: prints a plan's kernel.
    """
    sections = [Section("syntax", tuple(syntax.splitlines()))]
    for name, own in _parts(question):
        plans = forward_plans(own.program, own.spec)
        relation = part_relation(own.program, (own.spec.heads, own.spec.kv_heads))
        found = {
            "typed program": program_text(own.program).splitlines(),
            "relation": [
                str(relation.pairs),
                *(f"{name} stands for {scalar_text(e)}" for name, e in (relation.uniform | relation.atoms).items()),
            ],
            "pieces": list(_pieces(own)),
            "runs": [line for plan in plans for line in _run_lines(plan)],
            "plan": list(_planned(own, plans, None)),
            "source": "\n".join(map(source, plans)).splitlines(),
        }
        sections += [Section(f"{name}: {title}" if name else title, tuple(lines)) for title, lines in found.items()]
    return Explanation(tuple(s for s in sections if s.lines))


# ------------------------------------------------------------------------------------- understood


def _kernels(question: Question) -> list[str]:
    """The kernels of a program of several, by the names that `source` takes."""
    spec, program = question.spec, question.program
    return [] if program.plain else [", ".join(kernel_names(program, spec.heads, spec.kv_heads))]


def _rows(question: Question) -> list[str]:
    """The exact keys that sample rows see."""
    program, shape = question.program, question.shape
    if missing := _missing(question):
        return [f"give {missing} to see the keys of sample rows"]
    if dense := too_dense(program, shape) or ("so many keys make" if shape.k_len > _LISTED else ""):
        return [f"{dense} single rows costly to list at this length: ask at a shorter one"]
    if shape.rows == 0 or shape.k_len == 0:
        return []
    start = shape.first_position(program)
    first, last = max(start, 0), start + shape.rows - 1
    asked = [question.row] if question.row is not None else sorted({first, min(last, max(first, 700)), last})
    found = seen(program, shape, np.asarray(asked), question.inputs or {}, question.args or {})
    lines = []
    for i, row in enumerate(asked):
        heads = [spans(found[0, h, i]) for h in range(shape.heads)]
        keys = int(found[0, 0, i].sum())
        which = "" if len(set(heads)) == 1 else " (head 0; other heads differ)"
        what = "keys" if program.plain else "entries"
        lines.append(f"row {row}: {what} {spans_text(heads[0])}  [{keys} of {found.shape[-1]}]{which}")
    return lines


def _missing(question: Question) -> str:
    """What the pattern reads and the question does not give."""
    given = {**(question.inputs or {}), **(question.args or {})}
    program = question.program
    wanted = [*_inputs_read(program), *program.args]
    return ", ".join(f"`{name}`" for name in wanted if name not in given)


def _inputs_read(program: Program) -> list[str]:
    """The inputs that the pattern reads; those of scores decide no pair."""
    written = set_text(program.only.pattern)
    found = re.findall(r"(\w+)\[| on (?!segment\()(\w+)|segment\((\w+)\)", written)
    plans = {node.plan for node in nodes(program.only.pattern) if isinstance(node, Selected)}
    return [decl.name for decl in program.inputs if decl.name in plans or any(decl.name in names for names in found)]


# ------------------------------------------------------------------------------------- simplified


def _simplified(relation: Relation) -> list[str]:
    lines = []
    if relation.atoms:
        lines.append(f"integer relation: {relation.pairs}")
    else:
        cond = fold(condition(relation.pairs, relation.context, relation.uniform))
        lines.append(f"0 <= k < Nk and {scalar_text(cond, Level.NOT)}")
    if relation.uniform:
        lines += [
            f"exact, decided once per head or call: {name} = {scalar_text(e)}" for name, e in relation.uniform.items()
        ]
    lines += [
        f"data, masked pair by pair: {name} = {scalar_text(e)} ({_reason(e)})" for name, e in relation.atoms.items()
    ]
    if not relation.atoms:
        lines.append("every condition is exact: tiles are decided in closed form, for every length")
    lines += [f"note: {note}" for note in relation.notes]
    return lines


def _reason(e: Scalar) -> str:
    """Why a condition is data and not part of the integer relation."""
    found = list(walk(e))
    if any(isinstance(x, Call) and x.function == "drawn" for x in found):
        return "drawn when the kernel runs"
    if names := [x.input for x in found if isinstance(x, Read)]:
        return f"reads the input `{names[0]}` at q or k"
    if any(isinstance(x, Call) and x.function == "bit_length" for x in found):
        return "a bit length"
    return "not affine in q and k"


def _warnings(warnings: tuple[Diagnostic, ...]) -> list[str]:
    return [line for warning in warnings for line in warning.render().splitlines()] if warnings else []


# ----------------------------------------------------------------------------------------- pieces


def _pieces(question: Question) -> list[str]:
    """What was compared, kind of layout by kind, and what came of it."""
    spec = question.spec
    if not question.program.plain:
        return []
    heads = (spec.heads, spec.kv_heads)
    choice = choose_pieces(question.program, heads)
    considered = choice.considered
    if any(isinstance(piece, PermutedPiece) for piece in choice.pieces):
        by_data = sorted_by_data(question.program, heads)
        considered += () if by_data is None else (by_data,)
    return [*([choice.note] if choice.note else []), *(line for found in considered for line in found.lines())]


# ---------------------------------------------------------------------------------------- planned


def _planned(question: Question, plans: tuple[ForwardPlan, ...], start: Scalar | None) -> list[str]:
    plan = plans[0]
    spec = plan.spec
    if spec.target == "cpu":
        backend = "blocked PyTorch, since there is no GPU to compile for"
    elif spec.loads is Loads.DESCRIPTOR:
        backend = f"portable Triton for {spec.target}, with hardware tensor copies (TMA) of k and v"
    else:
        backend = f"portable Triton for {spec.target}, loading k and v through pointers"
    lines = [
        f"backend: {backend}",
        f"{_tiles_text(plan)} (the default for {spec.dtype.value}, D = {spec.dim}, on this target)",
        f"on a call: {forward_lowering(question.program, question.spec, question.shape)}",
        f"its gradients: {gradients_lowering(question.program, question.spec, question.shape)}",
        *(f"computed before the kernel: {input_text(d)}, {made_of(d)}" for d in plan.program.inputs if d.derivation),
    ]
    for number, piece in enumerate(plans, 1):
        if len(plans) > 1 or not piece.layout.plain:
            tiles = "" if piece.tiling == plan.tiling else f", in {_tiles_text(piece)}"
            copied = "by tensor copies" if piece.spec.loads is Loads.DESCRIPTOR else "through pointers"
            loads = "" if piece.spec.loads is spec.loads else f", k and v {copied}"
            lines.append(f"piece {number} of {len(plans)}: {piece.layout}{tiles}{loads}")
        lines += _run_lines(piece, start)
        if piece.masks:
            mask = "none: nothing but the ends of the keys" if piece.mask is None else scalar_text(piece.mask)
            lines.append(f"mask of partial tiles: {mask}")
    return lines


def _tiles_text(plan: ForwardPlan) -> str:
    tiling = plan.tiling
    warps = "" if plan.spec.target == "cpu" else f", {tiling.warps} warps, {tiling.stages} stages"
    return f"tiles of {tiling.block_q} rows x {tiling.block_k} keys{warps}"


def _run_lines(plan: ForwardPlan, start: Scalar | None = None) -> list[str]:
    """The runs of a query tile; with `start` put in where the position of row 0 is known."""
    known = {} if start is None else {"start": start}
    if isinstance(plan.layout, Boxes):
        return [
            line for run in plan.box_runs.full + plan.box_runs.partial for line in _box_lines(plan.layout, run, known)
        ]
    if plan.gathered is not None:
        return [
            f"each {plan.gathered.keys} keys are visited by the rows that chose them in `{plan.gathered.plan}`, "
            f"{plan.tiling.block_q} of them a tile; what a row gets of each it chose is merged after"
        ]
    if not (plan.runs.full or plan.runs.partial):
        return ["no tile is visited"]
    first = "start" if start is None else scalar_text(start)
    where = f"stands at {first} + {plan.tiling.block_q} * q_tile"
    if isinstance(plan.layout, Layout) and not plan.layout.q.every:
        where = f"is the residue's number i_start + {plan.tiling.block_q} * q_tile"
    lines = [f"query tile q_tile, whose first row {where}, visits"]
    return lines + [f"  {_run_text(run, known)}" for run in (*plan.runs.full, *plan.runs.partial)]


def _box_lines(boxes: Boxes, run: BoxRun, known: Mapping[str, Scalar]) -> list[str]:
    """The boxes of one run, axis by axis."""
    lines = [f"a box of queries visits the {run.kind.value} boxes that have"]
    for axis, runs in zip(boxes.grid.axes, run.axes, strict=True):
        lines += [f"  along {axis}: {_run_text(x, known)}" for x in runs]
    return lines


def _run_text(run: Run, known: Mapping[str, Scalar]) -> str:
    def text(e: Scalar, level: Level = Level.SUM) -> str:
        return scalar_text(fold(substitute(e, known)), level)

    if run.spans:
        return f"tokens of listed segments, one after another, {text(run.count)} of them"
    where, count = "", run.count
    if isinstance(count, If) and count.other == Const(0):
        where, count = f", where {text(count.cond, Level.COND)}", count.then
    step = f", every {run.step}th" if run.step > 1 else ""
    match count:
        case Binary(op="+", left=Binary(op="-", left=last, right=first), right=Const(value=1)) if first == run.first:
            tiles = f"{text(first)} .. {text(last)}"
        case _:
            tiles = f"from {text(run.first)}, {text(count)} of them"
    return f"{run.kind.value:<7} key tiles {tiles}{step}{where}"


# ------------------------------------------------------------------------------------------- cost


def _cost(question: Question, plans: tuple[ForwardPlan, ...]) -> list[str]:
    shape, spec, tiling = question.shape, question.spec, plans[0].tiling
    inputs, args = question.inputs or {}, question.args or {}
    lines = [
        f"call: batch {shape.batch}, {shape.heads} query and {shape.kv_heads} key heads, {shape.rows:,} rows, "
        f"{shape.k_len:,} keys, D = {shape.dim}"
    ]
    try:
        graph = block_graph(question.program, shape, tiling.block_q, tiling.block_k, inputs, args)
    except ValueError as missing:
        return [*lines, f"tiles: {missing}"]
    flops_of_pair = 2 * (spec.dim + spec.v_dim)
    area = graph.tiles * tiling.block_q * tiling.block_k
    every = graph.classes.size * graph.q_tiles * graph.k_tiles
    share = f"({100 * graph.density:.2f} %)"
    # Which of them a plan chooses is not known here.
    most = "at most " if spec.lists else ""
    if len(plans) == 1 and plans[0].layout.plain:
        kinds = f"{graph.full:,} full and {graph.partial:,} partial"
        lines.append(f"tiles: {most}{graph.tiles:,} of {every:,} visited {share}, {kinds}")
    else:
        try:
            pieces = [piece_tiles(plan, shape, inputs, args) for plan in plans]
        except ValueError as missing:
            return [*lines, f"tiles: {missing}"]
        tiles = sum(piece.tiles for piece in pieces)
        area = sum(x.tiles * plan.tiling.block_q * plan.tiling.block_k for x, plan in zip(pieces, plans, strict=True))
        found = " + ".join(f"{piece.full:,} full and {piece.partial:,} partial" for piece in pieces)
        lines.append(f"tiles: {tiles:,} visited in {len(plans)} piece{'s' * (len(plans) > 1)}, {found}")
        lines.append(f"tokens in order: {graph.tiles:,} of {every:,} tiles {share}")
    lines.append(_pairs_line(question, graph, flops_of_pair))
    flops = area * flops_of_pair
    vectors = shape.batch * (shape.rows * shape.heads + graph.shape.k_len * shape.kv_heads)
    moved = BYTES[spec.dtype] * vectors * (spec.dim + spec.v_dim)
    lines.append(f"work: {most}{amount(flops)}FLOP in visited tiles; {amount(moved)}B of q, k, v and output")
    rates = question.rates or RATES.get(spec.target)
    if rates is not None and not spec.lists:
        compute, memory = flops / rates[0], moved / rates[1]
        bound = "computing" if compute >= memory else "memory"
        lines.append(
            f"floor: {1e6 * max(compute, memory):,.1f} µs at {rates[0] / 1e12:g} TFLOP/s and {rates[1] / 1e12:g} TB/s "
            f"({bound} bounds it)"
        )
    return lines


def _pairs_line(question: Question, graph: BlockGraph, flops_of_pair: int) -> str:
    shape = question.shape
    if missing := _missing(question):
        return f"pairs: depend on {missing}"
    if dense := too_dense(question.program, shape):
        return f"pairs: not counted ({dense} that costly at this length)"
    count = count_pairs(graph, question.program, shape, question.inputs or {}, question.args or {})
    everything = shape.batch * shape.heads * shape.rows * graph.shape.k_len
    share = 100 * count.pairs / max(1, everything)
    about = "" if count.exact else "about "
    return (
        f"pairs: {about}{count.pairs:,} of {everything:,} allowed ({share:.2f} %), "
        f"{amount(count.pairs * flops_of_pair)}FLOP"
    )
