"""Forward kernels printed once for all processes: planning and printing take longer than loading what they make.

An entry of the kernel cache holds the text and the tiling, under a key of everything that decides them: the program
and how it was written (comments of the text quote it), the kind of call, and the compiler's own sources.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import attndsl
from attndsl.derive import derive
from attndsl.plan import Backend, ForwardPlan, Printed, Spec, Tiling, forward_plan
from attndsl.program import Program
from attndsl.runtime.cache import KernelCache, cache_key
from attndsl.tiling import choose_tiling, prefers_portable

_TEXT, _CHOICES = "kernel.py", "choices.json"
Printers = Mapping[Backend, Callable[[ForwardPlan], str]]


def printed_forward(
    program: Program, spec: Spec, backends: tuple[Backend, ...], tiling: Tiling | None, printers: Printers,
    cache: KernelCache | None,
) -> Printed:  # fmt: skip
    """The forward kernel of a kind of call; its program is the derived one.

    backends: those to choose from, Gluon or Triton or both. tiling: None lets the cost model choose. cache: where the
    text is kept; None plans and prints.
    """

    def make() -> dict[str, bytes]:
        backend = _choice(program, spec, backends)
        made = replace(spec, backend=backend)
        plan = forward_plan(program, made, tiling or choose_tiling(program, made))
        derived = [decl.name for decl in plan.program.inputs if decl.derivation is not None]
        choices = {"backend": backend.value, "tiling": asdict(plan.tiling), "derived": derived}
        return {_TEXT: printers[backend](plan).encode(), _CHOICES: json.dumps(choices).encode()}

    if cache is None:
        files: Mapping[str, bytes] = make()
    else:
        written = None if program.source is None else (program.source.name, program.source.text)
        place = None if program.branch.span is None else str(program.branch.span)
        key = cache_key("printed forward", compiler_digest(), program, written, place, spec, backends, tiling)
        files = cache.fetch(key, lambda: _compiled_next(make))
    choices = json.loads(files[_CHOICES])
    spec = replace(spec, backend=Backend(choices["backend"]))
    inputs = (d for d in derive(program).inputs if d.derivation is None or d.name in choices["derived"])
    program = replace(derive(program), inputs=tuple(inputs))
    return Printed(program, spec, Tiling(**choices["tiling"]), files[_TEXT].decode())


def _compiled_next(make: Callable[[], dict[str, bytes]]) -> dict[str, bytes]:
    """A kernel that was never printed will have to be compiled: what that waits for begins now."""
    from attndsl.runtime.head_start import begin

    begin()
    return make()


def _choice(program: Program, spec: Spec, backends: tuple[Backend, ...]) -> Backend:
    if len(backends) > 1 and prefers_portable(program, spec):
        return Backend.TRITON
    return backends[0]


@functools.cache
def compiler_digest() -> str:
    """Digest of the sources from which plans and texts come: another version prints anew."""
    package = Path(attndsl.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*package.glob("*.py"), *(package / "codegen").glob("*.py")]):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
