"""Typed programs written back in the language, with as few parentheses as its precedence allows."""

from __future__ import annotations

from enum import IntEnum
from typing import assert_never

from attndsl.branches import (
    Attended,
    Factor,
    Given,
    Handed,
    Merged,
    Output,
    Part,
    Pick,
    Pool,
    Product,
    Queries,
    Sum,
    View,
    Visible,
)
from attndsl.derivation import Random, Segment
from attndsl.grid import Along
from attndsl.program import (
    Arg,
    Axis,
    Binary,
    Blocks,
    Call,
    Choose,
    Coarse,
    Coarsen,
    Compare,
    Complement,
    Const,
    Dim,
    If,
    InputDecl,
    Inter,
    Logic,
    Minus,
    On,
    Permuted,
    Place,
    Program,
    Read,
    Scalar,
    Selected,
    Set,
    Table,
    Unary,
    Union,
    Var,
    Where,
)  # fmt: skip


class Level(IntEnum):
    """Precedence, loosest first."""

    COND = 0
    OR = 1
    AND = 2
    NOT = 3
    COMPARE = 4
    UNION = 5
    INTER = 6
    SUM = 7
    TERM = 8
    UNARY = 9
    PLACED = 10
    ATOM = 11


_Written = tuple[str, Level]


def scalar_text(e: Scalar, level: Level = Level.COND) -> str:
    """A scalar as the language writes it, in parentheses if it binds more loosely than `level`.

    >>> scalar_text(Binary("*", Binary("-", Var("q"), Var("k")), Const(2)))
    '(q - k) * 2'
    """
    return _bracketed(_scalar(e), level)


def set_text(pattern: Set, level: Level = Level.COND) -> str:
    """A set as the language writes it, standard patterns spelled out.

    >>> causal = Where(Compare("<=", Var("k"), Var("q")))
    >>> set_text(Inter((causal, Union((causal, Complement(causal))))))
    '{ k <= q } & ({ k <= q } | ~{ k <= q })'
    """
    return _bracketed(_set(pattern), level)


def input_text(decl: InputDecl) -> str:
    """An input's declaration, as `doc : int[b, k] sorted`."""
    written, kind = decl.dims, decl.type.value
    if decl.members is not None:
        written, kind = decl.dims[:-1], "tokens" if decl.members == 1 else f"blocks({decl.members})"
    dims = f"[{', '.join(map(_dim, written))}]" if written else ""
    flags = " learnable" * decl.learnable + " sorted" * decl.sorted
    return f"{decl.name} : {kind}{dims}{flags}"


def view_text(view: View) -> str:
    """A view as the language writes it."""
    if isinstance(view, Given) and view.picked is not None:
        view = view.picked
    if isinstance(view, Pick):
        weight = "" if view.weight is None else f", weight = {scalar_text(view.weight)}"
        return f"pick({view.input}{weight})"
    stride = f", {view.stride}" if view.stride != view.size else ""
    size = str(view.size) if view.runs is None else f"segments({view.runs.input})"
    options = ", visible = any" * (view.visible is Visible.ANY) + ", counted" * view.counted
    what = f"pool({view.function.value}, " if isinstance(view, Pool) else f"given({view.keys}, {view.values}, "
    return f"{what}{size}{stride}{options})"


def part_text(part: Part, queries: Queries | None = None) -> str:
    """A part as the language writes it, of a branch with these queries."""
    over = "" if part.view is None else f" over {view_text(part.view)}"
    if part.within is not None:
        over = f" within blocks({part.within.keys}) with probs({part.within.branch})"
    if queries is not None:
        over += f" from pool({queries.function.value}, {queries.size})"
    return f"{set_text(part.pattern)}{over}"


def output_text(output: Output, level: Level = Level.COND) -> str:
    """How branches combine, as the language writes it."""
    match output:
        case Attended(branch=name):
            return name
        case Handed(out=out, lse=lse):
            return f"given({scalar_text(out)}, {scalar_text(lse)})"
        case Merged(operands=operands):
            return f"merge({', '.join(map(output_text, operands))})"
        case Factor(value=value):
            return scalar_text(value, level)
        case Sum(left=left, right=right):
            return _bracketed((f"{output_text(left, Level.SUM)} + {output_text(right, Level.TERM)}", Level.SUM), level)
        case Product(factor=factor, operand=operand):
            written = f"{scalar_text(factor, Level.TERM)} * {output_text(operand, Level.UNARY)}"
            return _bracketed((written, Level.TERM), level)
        case _:
            assert_never(output)


def program_text(program: Program) -> str:
    """The whole program of one part with every name resolved: one attention, its tables in comments."""
    branch = program.only
    (part,) = branch.parts
    lines = [f"input  {input_text(decl)}" for decl in program.inputs]
    lines += ["align  start"] * program.align_start
    lines += [f"scale  {scalar_text(branch.scale)}"] if branch.scale is not None else []
    lines += [f"score  {scalar_text(branch.score)}"] if branch.score is not None else []
    lines += [f"softmax with sink {scalar_text(branch.sink)}"] if branch.sink is not None else []
    lines += [f"weights {scalar_text(branch.weights)}"] if branch.weights is not None else []
    lines.append(f"attend {part_text(part, branch.queries)}")
    params = f"({', '.join(f'{name} : runtime int' for name in program.args)})" if program.args else ""
    tables = [
        f"# {table.name} = {list(table.values[:16])}{' …' if len(table.values) > 16 else ''}, shape {list(table.shape)}"
        for table in program.tables
    ]
    body = "\n".join(f"    {line}" for line in (*tables, *lines))
    # A bare expression is called `pattern`, which is no name.
    name = "unnamed" if program.name == "pattern" else program.name
    return f"attention {name}{params} {{\n{body}\n}}"


def _dim(dim: Dim) -> str:
    if dim.axis is Axis.CONST:
        return str(dim.size)
    return f"{dim.axis.value}/{dim.block}" if dim.block > 1 else str(dim.axis.value)


def _bracketed(written: _Written, level: Level) -> str:
    text, own = written
    return text if own >= level else f"({text})"


def _scalar(e: Scalar) -> _Written:
    match e:
        case Const(value=bool(value)):
            return ("true" if value else "false"), Level.ATOM
        case Const(value=value):
            return str(value), Level.ATOM if value >= 0 else Level.UNARY
        case Var(name=name) | Arg(name=name):
            return name, Level.ATOM
        case Table(name=name, index=index) | Read(input=name, index=index):
            return (f"{name}[{', '.join(map(scalar_text, index))}]" if index else name), Level.ATOM
        case Unary(op="not", operand=x):
            return f"not {scalar_text(x, Level.NOT)}", Level.NOT
        case Unary(op=op, operand=x):
            return f"{op}{scalar_text(x, Level.UNARY)}", Level.UNARY
        case Binary(op=op, left=a, right=b):
            own = Level.SUM if op in "+-" else Level.TERM
            return f"{scalar_text(a, own)} {op} {scalar_text(b, Level(own + 1))}", own
        case Compare(op=op, left=a, right=b):
            return f"{scalar_text(a, Level.UNION)} {op} {scalar_text(b, Level.UNION)}", Level.COMPARE
        case Logic(op="and", operands=xs):
            return " and ".join(_chained(xs)), Level.AND
        case Logic(op=op, operands=xs):
            return f" {op} ".join(scalar_text(x, Level.AND) for x in xs), Level.OR
        case If(cond=c, then=a, other=b):
            then = scalar_text(a, Level.OR)
            return f"if {scalar_text(c, Level.OR)} then {then} else {scalar_text(b)}", Level.COND
        case Call(function=name, args=xs):
            return f"{name}({', '.join(map(scalar_text, xs))})", Level.ATOM
        case _:
            assert_never(e)


def _chained(operands: tuple[Scalar, ...]) -> list[str]:
    """Conjuncts; `a <= b` and `b < c` one after the other as `a <= b < c`."""
    found: list[str] = []
    before: Scalar | None = None
    for e in operands:
        follows = (
            isinstance(e, Compare)
            and isinstance(before, Compare)
            and e.op in ("<", "<=")
            and before.op in ("<", "<=")
            and before.right == e.left
        )
        if follows and isinstance(e, Compare):
            found[-1] += f" {e.op} {scalar_text(e.right, Level.UNION)}"
        else:
            found.append(scalar_text(e, Level.NOT))
        before = e
    return found


def _set(pattern: Set) -> _Written:
    match pattern:
        case Where(cond=cond):
            return f"{{ {scalar_text(cond)} }}", Level.ATOM
        case Union(parts=parts):
            return " | ".join(set_text(p, Level.INTER) for p in parts), Level.UNION
        case Inter(parts=parts):
            return " & ".join(set_text(p, Level.SUM) for p in parts), Level.INTER
        case Minus(left=a, right=b):
            return f"{set_text(a, Level.SUM)} - {set_text(b, Level.TERM)}", Level.SUM
        case Complement(operand=p):
            return f"~{set_text(p, Level.UNARY)}", Level.UNARY
        case Choose(cond=c, then=a, other=b):
            then = set_text(a, Level.OR)
            return f"if {scalar_text(c, Level.OR)} then {then} else {set_text(b)}", Level.COND
        case On(operand=p, place=place):
            return f"{set_text(p, Level.PLACED)} on {_place(place)}", Level.PLACED
        case Coarsen(operand=p, block_q=rows, block_k=keys, mode=mode, fraction=share):
            how = f"fraction({share})" if mode is Coarse.FRACTION else mode.value
            blocks = str(rows) if rows == keys else f"({rows}, {keys})"
            return f"coarsen({set_text(p)}, {blocks}, {how})", Level.ATOM
        case Random(count=n, keys=keys, rows=rows, seed=seed, among=p, written=written):
            of = "tokens" if keys == 1 else f"blocks({keys})"
            per = "head" if rows is None else "query" if rows == 1 else f"rows({rows})"
            among = f", among = {set_text(p)}" if written else ""
            return f"random({n}, of = {of}, per = {per}, seed = {scalar_text(seed)}{among})", Level.ATOM
        case Selected(plan=plan, level=level):
            return plan if level is None else f"{plan}[{level}]", Level.ATOM
        case _:
            assert_never(pattern)


def _place(place: Place) -> str:
    match place:
        case Blocks(size=size):
            return f"blocks({size})"
        case Permuted(input=name, lead=lead):
            return f"{name}[{', '.join(map(scalar_text, lead))}]" if lead else name
        case Segment(input=name):
            return f"segment({name})"
        case Along(grid=grid, axis=axis):
            return grid.axes[axis]
        case _:
            assert_never(place)
