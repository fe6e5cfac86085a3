"""Compiling generated kernels: Triton ahead of time, for any target, through the cache."""

from __future__ import annotations

import functools
import json
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource

from attndsl.runtime.cache import KernelCache, cache_key
from attndsl.runtime.head_start import launcher_beside
from attndsl.runtime.load import load_source

# Triton's own settings are global: one compilation changes them at a time.
_SETTINGS = threading.Lock()


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A generated kernel and how to compile it.

    `types`: Triton type of each parameter, in order. `aligned`: parameters that are multiples of so many
    (bytes for pointers, units for integers).
    """

    text: str
    function: str
    types: tuple[tuple[str, str], ...]
    aligned: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    gluon: bool = False


def parse_target(target: str) -> GPUTarget:
    """`cuda:90` or `hip:gfx942` as Triton's target."""
    backend, _, arch = target.partition(":")
    if backend == "cuda":
        return GPUTarget("cuda", int(arch), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


@functools.lru_cache(maxsize=1024)
def compile_kernel(
    source: KernelSource, target: str, cache: KernelCache | None = None, device: int | None = None
) -> CompiledKernel:
    """The kernel compiled for a target; no GPU is needed for that. New lengths find it here.

    device: the index of the device that will run it. A compiled kernel holds one device's handle once it has run, so
    each device has its own.
    """

    def build() -> Mapping[str, bytes]:
        with launcher_beside(source.types if device is not None else ()):
            fn = getattr(load_source(source.text, source.function), source.function)
            names = [name for name, _ in source.types]
            hints = {(names.index(name),): [["tt.divisibility", multiple]] for name, multiple in source.aligned}
            kind = GluonASTSource if source.gluon else ASTSource
            ast = kind(fn=fn, signature=dict(source.types), constexprs={}, attrs=hints)
            options = {"num_warps": source.warps, "num_stages": source.stages}
            with tempfile.TemporaryDirectory() as directory, _SETTINGS, triton.knobs.cache.scope():
                triton.knobs.cache.dir = directory
                compiled = triton.compile(ast, target=parse_target(target), options=options)
                return {name: Path(path).read_bytes() for name, path in compiled.metadata_group.items()}

    if cache is None:
        return _restore(source, build())
    return _restore(source, cache.fetch(cache_key("triton kernel", source, target, triton.__version__), build))


@dataclass(frozen=True, slots=True)
class _Signature:
    """What Triton's launcher reads of the source of a kernel that was compiled before."""

    signature: Mapping[str, str]
    constants: Mapping[Any, Any]


def _restore(source: KernelSource, files: Mapping[str, bytes]) -> CompiledKernel:
    """A compiled kernel from the files Triton made of it."""
    with tempfile.TemporaryDirectory(prefix="attndsl-") as directory:
        group = {}
        for name, content in files.items():
            path = Path(directory) / Path(name).name
            path.write_bytes(content)
            group[name] = str(path)
        metadata = next(json.loads(content) for name, content in files.items() if name.endswith(".json"))
        return CompiledKernel(_Signature(dict(source.types), {}), group, metadata["hash"])


@functools.lru_cache(maxsize=1024)
def parameters(text: str, function: str) -> tuple[str, ...]:
    """Names of a generated kernel's parameters, in order: as printed, one a line."""
    _, _, signature = text.partition(f"\ndef {function}(\n")
    lines, _, _ = signature.partition("\n):")
    return tuple(line.strip().rstrip(",") for line in lines.splitlines())
