"""What was understood of a program, in words: what it reads, where its rows stand, what its branches attend to."""

from __future__ import annotations

from attndsl.branches import Branch
from attndsl.notation import input_text, output_text, part_text, scalar_text
from attndsl.observation import Observation
from attndsl.plans import own_program
from attndsl.program import Program
from attndsl.selection_text import members_text, selection_text
from attndsl.skipping import TILE


def understood(program: Program, text: str) -> list[str]:
    """A line for each thing that the program says. text: the program in canonical layout."""
    lines = [*text.strip().splitlines(), ""]
    for decl in own_program(program).inputs:
        lines.append(f"input {input_text(decl)}")
    lines += [f"runtime argument {name}" for name in program.args]
    lines += [f"table {table.name}, shape {list(table.shape)}" for table in program.tables]
    for selection in program.selections:
        later = "" if selection.rows == 1 else "; what a row chooses may depend on tokens after it"
        lines.append(f"{selection.name} = {selection_text(selection)}, made in each call{later}")
    lines += map(_observed, program.observations)
    start = "at position i (align start)" if program.align_start else "of a call stands at position i + Nk − rows"
    place = f"row i {'stands ' * program.align_start}{start}"
    if program.plain:
        pairs, *rest = _branch_lines(program.branch)
        return [*lines, pairs, place, *rest]
    lines.append(place)
    for branch in program.branches:
        first, *rest = _branch_lines(branch)
        lines += [f"{branch.name}: {first}" if branch.name else first, *(f"  {line}" for line in rest)]
    return lines if program.output is None else [*lines, f"output {output_text(program.output)}"]


def _branch_lines(branch: Branch) -> list[str]:
    """Which pairs a branch has, and what it makes of them."""
    pairs = [
        f"pairs (q, {'k' if part.view is None else 'entry'}) in {part_text(part, branch.queries)}"
        for part in branch.parts
    ]
    scale = "1/√D" if branch.scale is None else scalar_text(branch.scale)
    lines = ["; and ".join(pairs), f"s = {scale} · (q · k)"]
    if branch.weights is not None:
        return [*lines, f"a pair weighs {scalar_text(branch.weights)}; rows are not normalised"]
    if branch.score is not None:
        lines.append(f"logit {scalar_text(branch.score)}")
    if branch.within is not None:
        inside, by = f"softmax over each row inside each block of {branch.within.keys} keys", branch.within.branch
        return [*lines, f"{inside}; of what a block gives, the probability that {by} gives it"]
    sink = "" if branch.sink is None else f", with e^({scalar_text(branch.sink)}) added to the denominator"
    lines.append(f"{'one ' * (len(pairs) > 1)}softmax over each row{sink}")
    if branch.skip is not None:
        tiles = f"tiles of {TILE} rows and {TILE} keys, in the order of keys"
        lines.append(f"approximate: {tiles}, are dropped below {branch.skip}")
    return lines


def _observed(each: Observation) -> str:
    """What an observation is."""
    rows = {None: "all rows", 1: "a row"}.get(each.rows, f"{each.rows} rows")
    rows = rows if each.row_tiles is None else f"one of {members_text(1, each.row_tiles)}"
    keys = "a token" if each.keys == 1 else f"{each.keys} tokens"
    keys = keys if each.members is None else f"one of {members_text(1, each.members)}"
    reduced = "the largest" if each.largest else "the sum"
    return f"{each.name}: {reduced} of the probabilities of {each.branch}, for {rows} and {keys} at a time"
