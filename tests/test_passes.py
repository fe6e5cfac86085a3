"""Our passes to LLVM beside Triton's own: what a launch is told is the same, and what they leave out is left out."""

from __future__ import annotations

import json
from typing import Any

from tests.caching import python

COMPILE = """
import json
from dataclasses import replace
import attndsl
from attndsl.runtime import assembly, build, passes
taken = []
def take(source, target, *rest):
    taken.append((source, target))
    raise KeyboardInterrupt
assembly.compile_kernel = take
def source(backend="gluon"):
    try:
        attndsl.compile("causal").assembly("forward", "llir", "sm_90", backend, dim=64)
    except KeyboardInterrupt:
        return taken.pop()
"""


def run(text: str, **settings: str) -> Any:
    return json.loads(python(COMPILE + text, TRITON_INTERPRET="", **settings).stdout.splitlines()[-1])


def test_launches_are_told_the_same() -> None:
    ours, theirs, names = run("""
kernel, target = source()
def told(kernel):
    made = {form: content() for form, content in build._compiled(kernel, target)}
    return json.loads(made["json"])
print(json.dumps([told(kernel), told(replace(kernel, plain=False)), [kernel.plain, source("triton")[0].plain]]))
""")
    assert ours == theirs
    assert ours["num_warps"] == 12
    assert names == [True, False]


def test_who_debugs_triton_gets_its_passes() -> None:
    found = run("""
import triton
from triton.compiler.compiler import make_backend
def own(**options):
    backend = make_backend(build.parse_target("cuda:90"))
    return passes.to_llvm(backend, backend.parse_options(options), lines=False) is not None
answers = [own(), own(instrumentation_mode="consan")]
debugging = {"enable_asan": True, "dump_ir_extract_di_local_variables": True, "instrumentation_mode": "consan"}
for setting, value in debugging.items():
    with triton.knobs.compilation.scope():
        setattr(triton.knobs.compilation, setting, value)
        answers.append(own())
print(json.dumps([answers, own()]))
""")
    assert found == [[True, False, False, False, False], True]


def test_a_kernel_of_other_passes_is_another_entry() -> None:
    found = run("""
from attndsl.runtime.cache import KernelCache
import tempfile
from pathlib import Path
build._compiled = lambda *given: iter([("json", lambda: b"{}"), ("cubin", lambda: b"")])
def counts(kernel, target):
    cache = KernelCache(Path(tempfile.mkdtemp()))
    for content in (b"one", b"one", b"another"):
        passes.source = lambda: content
        build.compile_kernel.cache_clear()
        build.compile_kernel(kernel, target, cache, whole=False)
        yield cache.info().entries
print(json.dumps([list(counts(*source())), list(counts(*source("triton")))]))
""")
    assert found == [[1, 1, 2], [1, 1, 1]]
