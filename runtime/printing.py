"""Forward kernels printed once for all processes: planning and printing take longer than loading what they make.

An entry of the kernel cache holds the texts of a program's pieces, their tilings and layouts, under a key of everything
that decides them: the program and how it was written (comments of a text quote it), the kind of call, and the
compiler's own sources. What it takes to make them, the search for layouts too, is spared where an entry is found.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import attndsl
from attndsl.derive import derive
from attndsl.diagnostics import error
from attndsl.layout import Comb, Layout
from attndsl.piece_plans import forward_plans
from attndsl.plan import Backend, ForwardPlan, Loads, Printed, Spec, Tiling
from attndsl.program import Program
from attndsl.runtime.cache import KernelCache, cache_key
from attndsl.targets import layout_refusal
from attndsl.tiling import prefers_portable

_TEXT, _CHOICES = "kernel_{}.py", "choices.json"
Printers = Mapping[Backend, Callable[[ForwardPlan], str]]


def printed_forward(
    program: Program, spec: Spec, backends: tuple[Backend, ...], tiling: Tiling | None, printers: Printers,
    cache: KernelCache | None,
) -> tuple[Printed, ...]:  # fmt: skip
    """The forward kernels of a kind of call, one for each piece of the program; their program is the derived one.

    backends: those to choose from, Gluon or Triton or both. tiling: None lets the cost model choose. cache: where the
    texts are kept; None plans and prints.

    Raises `PatternError` (A510) where there is Gluon alone, which does not visit tokens in the program's order.
    """

    def make() -> dict[str, bytes]:
        backend = _choice(program, spec, backends)
        plans = forward_plans(program, replace(spec, backend=backend), tiling)
        derived = [decl.name for decl in plans[0].program.inputs if decl.derivation is not None]
        pieces = [
            {"tiling": asdict(plan.tiling), "loads": plan.spec.loads.value, "layout": asdict(plan.layout)}
            for plan in plans
        ]
        choices = {"backend": backend.value, "derived": derived, "pieces": pieces}
        texts = {_TEXT.format(n): printers[backend](plan).encode() for n, plan in enumerate(plans, 1)}
        return texts | {_CHOICES: json.dumps(choices).encode()}

    if cache is None:
        files: Mapping[str, bytes] = make()
    else:
        written = None if program.source is None else (program.source.name, program.source.text)
        place = None if program.span is None else str(program.span)
        key = cache_key("printed forward", compiler_digest(), program, written, place, spec, backends, tiling)
        files = cache.fetch(key, make)
    choices = json.loads(files[_CHOICES])
    inputs = (d for d in derive(program).inputs if d.derivation is None or d.name in choices["derived"])
    program = replace(derive(program), inputs=tuple(inputs))
    found = []
    for n, piece in enumerate(choices["pieces"], 1):
        made = replace(spec, backend=Backend(choices["backend"]), loads=Loads(piece["loads"]))
        text = files[_TEXT.format(n)].decode()
        found.append(Printed(program, made, Tiling(**piece["tiling"]), text, _layout(piece["layout"]), n > 1))
    return tuple(found)


def _layout(said: dict[str, Any]) -> Layout:
    return Layout(Comb(**said["q"]), Comb(**said["k"]), said["classes"])


def _choice(program: Program, spec: Spec, backends: tuple[Backend, ...]) -> Backend:
    if Backend.GLUON not in backends:
        return Backend.TRITON
    if reason := layout_refusal(program, spec):
        if Backend.TRITON not in backends:
            raise error("A510", reason, help="leave `backend` out to get the portable kernel")
        return Backend.TRITON
    return Backend.TRITON if len(backends) > 1 and prefers_portable(program, spec) else Backend.GLUON


@functools.cache
def compiler_digest() -> str:
    """Digest of the sources from which plans and texts come: another version prints anew."""
    package = Path(attndsl.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*package.glob("*.py"), *(package / "codegen").glob("*.py")]):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
