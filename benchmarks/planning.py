"""Time from a program's text to its plans and the text of its kernel: what precedes every first compilation.

Milliseconds of processor time, file by file, each in a process of its own that has imported everything and planned
one other program. A program of several branches is planned branch by branch, as a call would.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from attndsl.api import load_attention
from attndsl.codegen.triton_forward import forward_source
from attndsl.compose import compose
from attndsl.grammar import load
from attndsl.left_tiles import of_left_tiles
from attndsl.listing import reads_plans
from attndsl.piece_plans import backward_plans, forward_plans
from attndsl.plan import Spec
from attndsl.program import Axis, Program
from attndsl.targets import make_spec

PATTERNS = Path(__file__).resolve().parent.parent / "examples" / "patterns"
# Tables that have no default.
TABLES: dict[str, dict[str, Any]] = {
    "moa": {"alpha": [64, 128, 0, 256] * 2, "beta": [100, 0, 512, 250] * 2},
    "proxy": {"n": [2, 4, 8, 16] * 2},
    "radial": {"width": [1350 >> (d // 4) for d in range(21)], "every": [1 + d // 8 for d in range(21)]},
}
STAGES = ("parse, type", "findings", "forward plan", "backward plan", "kernel text")


def run_planning(names: list[str] | None = None) -> Iterator[list[str]]:
    """A table in ms, a row for each file (`names`: those alone): its stages, and all of them a second time."""
    yield ["ms", *STAGES, "again, all"]
    for path in sorted(PATTERNS.glob("*.attn")):
        if names is None or path.stem in names:
            yield [path.stem, *(f"{ms:.1f}" for ms in apart(path))]


def apart(path: Path) -> list[float]:
    """The stages of one file in a forked process, and their sum the second time."""
    # What was imported and built once is there already, and not looked at by the child's garbage collector.
    for module in ("codegen.triton_gathered", "part_findings", "runtime.ops", "stability", "worlds"):
        importlib.import_module(f"attndsl.{module}")
    warm_up()
    gc.freeze()
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe(duplex=False)

    def child() -> None:
        # What a process shares with its parent is copied when it is first touched.
        warm_up(window=10)
        its.send([*stages(path), sum(stages(path))])

    process = context.Process(target=child)
    process.start()
    its.close()
    try:
        found: list[float] = ours.recv()
    except EOFError:
        raise RuntimeError(f"{path.name} was not planned") from None
    finally:
        process.join()
    return found


def warm_up(window: int = 9) -> None:
    """Imports, and what the front end, warnings and printers build once."""
    load_attention("causal & (window(4) | sink(1))")
    text = f"attention a {{ input bias : float[h] learnable  score s + bias[h]  attend window({window}) }}"
    program = load(text).program
    forward_source(forward_plans(program, spec_of(program))[0])
    backward_plans(program, spec_of(program))


def differentiated(program: Program) -> Program:
    """What a branch's gradients are those of: one that skips, of the tiles that are left."""
    return program if program.only.skip is None else of_left_tiles(program)


def stages(path: Path) -> list[float]:
    """Milliseconds of each stage in this process."""
    clock = Clock()
    text, tables = path.read_text(), TABLES.get(path.stem, {})
    loaded = clock.lap(partial(load, text, name=path.name, params=tables))
    clock.lap(partial(load_attention, path, **tables))
    # The text is read and typed there once more.
    clock.laps[-1] = max(0.0, clock.laps[-1] - clock.laps[-2])
    programs = compose(loaded.program).programs
    forward = clock.lap(lambda: [plan for p in programs for plan in forward_plans(p, spec_of(p))])
    clock.lap(lambda: [plan for p in programs for plan in backward_plans(differentiated(p), spec_of(p))])
    clock.lap(lambda: [forward_source(plan) for plan in forward])
    return clock.laps


def spec_of(program: Program) -> Spec:
    """What a first call on a Hopper GPU is planned for, in portable Triton: 8 heads, or as many as its tables have."""
    sizes = dict.fromkeys((Axis.H, Axis.G), 8)
    for table in program.tables:
        sizes |= {dim.axis: n for dim, n in zip(table.dims, table.shape, strict=True) if dim.axis in sizes}
    spec = make_spec("sm_90", "triton", sizes[Axis.H], sizes[Axis.G], 128)
    reads = reads_plans(program)
    return replace(spec, lists=reads, even_start=reads)


class Clock:
    """Milliseconds of processor time, lap by lap."""

    def __init__(self) -> None:
        self.laps: list[float] = []

    def lap(self, step: Callable[[], Any]) -> Any:
        begun = time.process_time()
        made = step()
        self.laps.append(1e3 * (time.process_time() - begun))
        return made
