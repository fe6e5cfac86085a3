"""Compiling generated kernels: Triton ahead of time, for any target, through the cache.

Triton is imported where something is compiled, not before: a kernel from the cache needs nothing of it.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attndsl.runtime import passes
from attndsl.runtime.cache import KernelCache, cache_key
from attndsl.runtime.load import load_source
from attndsl.runtime.triton_version import installation, version

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, CompiledKernel

# Versions whose passes are run here, one after another. `triton.compile` does that too, after a digest of all of
# Triton's libraries for a cache of its own, which takes as long as a third of the compilation.
STAGED_VERSIONS = ("3.6.",)
# Triton's own settings are global: one compilation changes them at a time.
_SETTINGS = threading.Lock()
_BINARY = {"cuda": "cubin", "hip": "hsaco"}
_FACTS = "json"


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A generated kernel and how to compile it.

    `types`: Triton type of each parameter, in order. `aligned`: parameters that are multiples of so many
    (bytes for pointers, units for integers). `plain`: LLVM's optimisations are left out (`passes.py`).
    """

    text: str
    function: str
    types: tuple[tuple[str, str], ...]
    aligned: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    gluon: bool = False
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Kernel:
    """A compiled kernel. `files`: the machine code, what Triton says of it as JSON, and where they were asked for the
    forms in between, each under its usual suffix."""

    source: KernelSource
    target: str
    files: Mapping[str, bytes]
    metadata: Mapping[str, Any]

    @property
    def binary(self) -> bytes:
        """The machine code."""
        return self.files[_BINARY[self.target.partition(":")[0]]]

    def text(self, form: str) -> str:
        """One of the forms in between: "ttir", "ttgir", "llir", "ptx", "amdgcn"."""
        return self.files[form].decode()


def parse_target(target: str) -> GPUTarget:
    """`cuda:90` or `hip:gfx942` as Triton's target."""
    from triton.backends.compiler import GPUTarget

    backend, _, arch = target.partition(":")
    if backend == "cuda":
        return GPUTarget("cuda", int(arch), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


@functools.lru_cache(maxsize=1024)
def compile_kernel(source: KernelSource, target: str, cache: KernelCache | None = None, whole: bool = True) -> Kernel:
    """The kernel compiled for a target; no GPU is needed for that. New lengths find it here.

    whole: with the forms in between. A launch does without them.
    """

    def build() -> dict[str, bytes]:
        kept = None if whole else (_FACTS, _BINARY[target.partition(":")[0]])
        return {form: content() for form, content in _compiled(source, target) if kept is None or form in kept}

    own = passes.source() if source.plain else b""
    key = cache_key("triton kernel", source, target, installation(), own, _writes_lines(), whole)
    files = build() if cache is None else cache.fetch(key, build)
    return Kernel(source, target, files, json.loads(files[_FACTS]))


# Suffix of a form, and a function that writes it out before the next one is asked for.
_Form = tuple[str, Callable[[], bytes]]


def _compiled(source: KernelSource, target: str) -> Iterator[_Form]:
    """What Triton makes of a kernel, in order."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    fn = getattr(load_source(source.text, source.function), source.function)
    names = [name for name, _ in source.types]
    hints = {(names.index(name),): [["tt.divisibility", multiple]] for name, multiple in source.aligned}
    kind = GluonASTSource if source.gluon else ASTSource
    types = {name: _with_layout(type) if source.gluon else type for name, type in source.types}
    ast = kind(fn=fn, signature=types, constexprs={}, attrs=hints)
    options: dict[str, Any] = {"num_warps": source.warps, "num_stages": source.stages}
    if version().startswith(STAGED_VERSIONS):
        return _staged(ast, parse_target(target), options, source.plain)
    return _by_triton(ast, parse_target(target), options)


def _with_layout(type: str) -> str:
    """The type of a tensor descriptor as Gluon has it, which says how a tile lies in shared memory."""
    if not type.startswith("tensordesc"):
        return type
    from triton.experimental.gluon import language as gl

    element, _, rest = type.removeprefix("tensordesc<").partition("[")
    block = [int(size) for size in rest.removesuffix("]>").split(",")]
    kinds = {"bf16": gl.bfloat16, "fp16": gl.float16, "fp32": gl.float32, "fp8e4nv": gl.float8e4nv}
    kind = kinds[element]
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    if len(block) == 2:
        # A few numbers of a vector lie in a row.
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=kind.primitive_bitwidth, rank=2)
    return f"tensordesc<{element}{block},{layout!r}>"


def _staged(ast: ASTSource, target: GPUTarget, options: dict[str, Any], plain: bool) -> Iterator[_Form]:
    """The passes of the target's compiler, one after another. plain: without LLVM's optimisations."""
    import triton
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    backend = make_backend(target)
    parsed = backend.parse_options(options | _settings(target) | ast.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Callable[[Any, dict[str, Any]], Any]] = {}
    backend.add_stages(stages, parsed, ast.language)
    if plain and (own := passes.to_llvm(backend, parsed, _writes_lines())) is not None:
        stages["llir"] = own
    metadata = {"hash": "", "target": target, **parsed.__dict__, "triton_version": triton.__version__}
    form: Any = ast.make_ir(
        target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context
    )
    for suffix, stage in stages.items():
        form = stage(form, metadata)
        yield suffix, functools.partial(_written, form)
    yield _FACTS, lambda: json.dumps(metadata, default=vars).encode()


def _settings(target: GPUTarget) -> dict[str, Any]:
    """Options of every compilation for NVIDIA's GPUs: no checks of overflow, which are made and thrown away again, and
    no lines of the text, three quarters of the machine code's file, where no profiler could open it."""
    from triton import knobs

    if target.backend != "cuda":
        return {}
    given = knobs.nvidia.ptxas_options or ""
    return {
        "sanitize_overflow": False,
        "ptx_options": given if _writes_lines() else f"{given} --suppress-debug-info".strip(),
    }


def _writes_lines() -> bool:
    """Whether machine code says of which lines it was made: where texts are written out."""
    return bool(os.environ.get("ATTNDSL_DUMP"))


def _written(form: Any) -> bytes:
    """A module is changed in place by the stage after it, so it is written before."""
    return form if isinstance(form, bytes) else str(form).encode()


def _by_triton(ast: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Iterator[_Form]:
    """The same by Triton's public function, in a cache that is thrown away."""
    import triton

    with tempfile.TemporaryDirectory() as directory, _SETTINGS, triton.knobs.cache.scope():
        triton.knobs.cache.dir = directory
        compiled = triton.compile(ast, target=target, options=options)
        for name, path in compiled.metadata_group.items():
            yield name.rpartition(".")[2], Path(path).read_bytes


@dataclass(frozen=True, slots=True)
class _Signature:
    """What Triton's launcher reads of the source of a kernel that was compiled before."""

    signature: Mapping[str, str]
    constants: Mapping[Any, Any]


def triton_kernel(kernel: Kernel) -> CompiledKernel:
    """The kernel as Triton launches it: each has one device's handle once it has run."""
    from triton.compiler import CompiledKernel

    with tempfile.TemporaryDirectory(prefix="attndsl-") as directory:
        group = {}
        for form, content in kernel.files.items():
            path = Path(directory) / f"{kernel.source.function}.{form}"
            path.write_bytes(content)
            group[path.name] = str(path)
        return CompiledKernel(_Signature(dict(kernel.source.types), {}), group, kernel.metadata["hash"])


@functools.lru_cache(maxsize=1024)
def parameters(text: str, function: str) -> tuple[str, ...]:
    """Names of a generated kernel's parameters, in order: as printed, one a line."""
    _, _, signature = text.partition(f"\ndef {function}(\n")
    lines, _, _ = signature.partition("\n):")
    return tuple(line.strip().rstrip(",") for line in lines.splitlines())
