"""Compiles forward kernels for devices that are not there, and counts what the machine code shows.

Run as a module in a process of its own: the tests' own process interprets Triton, and compiles nothing. It reads
a JSON list of `Job`s from its input and writes one of `Found`s.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tests.machine_code import MachineCode

if TYPE_CHECKING:
    from attndsl.runtime.build import KernelSource

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Decode:
    """A decode of so many rows, over a cache in pages or contiguous, of 8-bit elements or the dtype's."""

    rows: int
    page: int | None
    fp8: bool = False


@dataclass(frozen=True)
class Job:
    """A piece's kernel at the default tiling, forward or `decode`. `tiling`: another one (block_q, block_k, warps,
    stages). `hopper`: the Hopper lowering, of the forward kernel or of the one of all gradients. `combine`: the kernel
    that combines the branches, or its gradients'. `observe`: the kernel that sums probabilities in blocks of rows
    (None: all) and keys. `listed`: a kernel of a program whose plan lists members, in a call that begins where tiles
    do; of one that skips, of the attention to the tiles that are left. `left`: the kernel that finds which these are.
    `select`: the fused kernel of the first selection. `v_dim`: of values, where it is not `dim`."""

    text: str
    target: str
    dim: int
    loads: str
    heads: tuple[int, int] = (8, 8)
    dtype: str = "bfloat16"
    tiling: tuple[int, int, int, int] | None = None
    piece: int = 0
    decode: Decode | None = None
    hopper: Literal["", "forward", "gradients"] = ""
    combine: Literal["", "forward", "gradients"] = ""
    observe: tuple[int | None, int] | None = None
    listed: Literal["", "forward", "dq", "dkdv"] = ""
    v_dim: int = 0
    select: bool = False
    left: bool = False


@dataclass(frozen=True)
class Found:
    """What a kernel came to. `spills`: bytes of stack, or registers spilled. `shared`: bytes of shared memory.

    Of the innermost loops around products in the Hopper lowering: `spilled`: accesses to spilled registers in the turn
    of one that has the fewest. `waits`: how often a turn waits for all products that are on their way: more than once
    where the assembler put one after the other. `rounded_late`: roundings that come after a wait for products.
    """

    spills: int
    registers: int
    shared: int
    wgmma: bool
    tensor_copies: bool
    triton: str
    spilled: int = 0
    waits: int = 0
    rounded_late: int = 0


def compile_all(jobs: Sequence[Job]) -> list[Found]:
    """The jobs compiled in one fresh process."""
    return _in_a_process([asdict(job) for job in jobs], "jobs")


def compile_hopper_sources(sources: Sequence[KernelSource]) -> list[Found]:
    """The same of kernels for Hopper that were printed here."""
    return _in_a_process([asdict(source) for source in sources], "sources")


def _in_a_process(asked: list[dict[str, Any]], kind: str) -> list[Found]:
    import os

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        environment |= {
            "ATTNDSL_CACHE_DIR": cache,
            "PYTHONPATH": os.pathsep.join([environment.get("PYTHONPATH", ""), str(ROOT)]),
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.offline", kind], input=json.dumps(asked), text=True, capture_output=True,
            cwd=ROOT, env=environment, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Found(**found) for found in json.loads(done.stdout)]


def compile_one(job: Job) -> Found:
    import triton

    import attndsl
    from attndsl.codegen import triton_left
    from attndsl.codegen.triton_decode import decode_source
    from attndsl.codegen.triton_forward import forward_source
    from attndsl.codegen.triton_observe import KERNEL, observe_source
    from attndsl.decode import Cache, decode_plan
    from attndsl.left_tiles import of_left_tiles
    from attndsl.observing import Cells, observe_plan
    from attndsl.piece_plans import forward_plans
    from attndsl.plan import Backend, DType, Loads, Spec, Tiling
    from attndsl.runtime.assembly import meta_tensors, offline_source
    from attndsl.runtime.build import compile_kernel, parameters
    from attndsl.runtime.observing import observe_sources
    from attndsl.runtime.triton_launch import kernel_source

    spec = Spec(*job.heads, job.dim, job.v_dim or job.dim, DType(job.dtype), job.target, Loads(job.loads))
    tiling = Tiling(*job.tiling) if job.tiling else None
    program = attndsl.compile(job.text).program
    if job.hopper:
        return compile_hopper(job, program, replace(spec, backend=Backend.GLUON))
    if job.combine:
        from attndsl.codegen.triton_combine import combine_source
        from attndsl.combining import combine_plan

        combined = combine_plan(program, spec, job.combine == "gradients")
        source = offline_source(combined, combine_source(combined))
    elif job.observe is not None:
        observing = observe_plan(program, spec, Cells(*job.observe, largest=False))
        text = observe_source(observing)
        given = observe_sources(observing, *meta_tensors(observing))
        source = kernel_source(observing, text, parameters(text, KERNEL), given, aligned=True, function=KERNEL)
    elif job.select:
        from attndsl.codegen.triton_select import select_source
        from attndsl.plans import of_selection
        from attndsl.select_plan import select_plan

        selection = program.selections[0]
        choice = select_plan(of_selection(program, selection), selection, spec)
        source = offline_source(choice, select_source(choice))
    elif job.left:
        from attndsl.skipping import left_plans

        (left,) = left_plans(program, spec)
        source = offline_source(left, triton_left.left_source(left))
    elif job.listed in ("dq", "dkdv"):
        program = program if program.only.skip is None else of_left_tiles(program)
        from attndsl.codegen.triton_backward import backward_sources
        from attndsl.piece_plans import backward_plans

        (backward,) = backward_plans(program, replace(spec, lists=True, even_start=True))
        of_q, of_keys = backward_sources(backward)
        own = (backward, of_q) if job.listed == "dq" else (backward.of_keys(), of_keys)
        source = offline_source(*own)
    elif job.decode is None:
        lists = job.listed == "forward"
        plan = forward_plans(program, replace(spec, lists=lists, even_start=lists), tiling)[job.piece]
        source = offline_source(plan, forward_source(plan))
    else:
        cache = Cache(job.decode.page, job.decode.fp8, job.decode.fp8, job.decode.fp8)
        decode = decode_plan(program, spec, job.decode.rows, cache, tiling=Tiling(*job.tiling) if job.tiling else None)
        source = offline_source(decode, decode_source(decode))
    kernel = compile_kernel(source, job.target)
    shared = int(kernel.metadata["shared"])
    if job.target.startswith("hip"):
        text = kernel.text("amdgcn")

        def counted(name: str) -> int:
            return max(int(x) for x in re.findall(rf"\.{name}:\s+(\d+)", text))

        # Scalar registers spill into lanes of vector registers, not into memory.
        spills = counted("vgpr_spill_count") + counted("private_segment_fixed_size")
        return Found(spills, counted("vgpr_count"), shared, False, False, triton.__version__)
    ptx, used = kernel.text("ptx"), _resources(kernel.binary)
    spills = int(used["STACK"]) + int(used["LOCAL"])
    copies = "cp.async.bulk.tensor" in ptx
    return Found(spills, int(used["REG"]), shared, "wgmma.mma_async" in ptx, copies, triton.__version__)


def compile_hopper(job: Job, program: Any, spec: Any) -> Found:
    from attndsl.codegen.gluon_backward import gradients_source
    from attndsl.codegen.gluon_forward import forward_source
    from attndsl.piece_plans import backward_plans, forward_plans
    from attndsl.runtime.assembly import offline_source

    if job.hopper == "forward":
        lists = job.listed == "forward"
        plan: Any = forward_plans(program, replace(spec, lists=lists, even_start=lists))[0]
        text = forward_source(plan)
    else:
        plan = backward_plans(program, spec)[0].of_keys()
        text = gradients_source(plan)
    return of_hopper(offline_source(plan, text))


def of_hopper(source: KernelSource) -> Found:
    """What a kernel of the Hopper lowering comes to."""
    import triton

    from attndsl.runtime.build import compile_kernel

    kernel = compile_kernel(source, "cuda:90")
    code = MachineCode(_disassembled(kernel.binary))
    ptx, used = kernel.text("ptx"), _resources(kernel.binary)
    turns = [code.lines(loop) for loop in code.loops]
    return Found(
        int(used["STACK"]) + int(used["LOCAL"]), int(used["REG"]), int(kernel.metadata["shared"]),
        "wgmma.mma_async" in ptx, "cp.async.bulk.tensor" in ptx, triton.__version__,
        max(map(code.spilled, code.loops), default=0),
        max((sum("WARPGROUP.DEPBAR.LE gsb0, 0x0" in line for line in turn) for turn in turns), default=0),
        rounded_late(turns),
    )  # fmt: skip


def rounded_late(turns: list[list[str]]) -> int:
    """Roundings to 16 bits that come after a wait for products, in those turns that hold the most of them."""
    counted = [sum("GMMA" in line for line in turn) for turn in turns]
    found = 0
    for products, turn in zip(counted, turns, strict=True):
        waits = [n for n, line in enumerate(turn) if "WARPGROUP.DEPBAR" in line]
        found += sum("F2FP" in line for line in turn[waits[0] :]) if waits and products == max(counted) else 0
    return found


def _disassembled(cubin: bytes) -> str:
    return _by_tool("nvdisasm", "--print-code", cubin)


def _by_tool(name: str, option: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> dict[str, str]:
    """REG, STACK, SHARED, LOCAL … of the one kernel in a cubin."""
    line = next(line for line in _by_tool("cuobjdump", "-res-usage", cubin).splitlines() if "REG:" in line)
    return dict(re.findall(r"(\w+(?:\[\d+\])?):(\d+)", line))


if __name__ == "__main__":
    from attndsl.runtime.build import KernelSource

    asked = json.load(sys.stdin)
    if sys.argv[1] == "sources":
        pairs = [{name: tuple(map(tuple, source[name])) for name in ("types", "aligned")} for source in asked]
        made = [of_hopper(KernelSource(**source | own)) for source, own in zip(asked, pairs, strict=True)]
    else:
        made = [compile_one(Job(**job | {"decode": job["decode"] and Decode(**job["decode"])})) for job in asked]
    json.dump([asdict(found) for found in made], sys.stdout)
