"""Forward kernels compiled for GPUs that are not there: no spills, and the instructions that make them fast."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import pytest
import triton
from hypothesis import settings

from tests.offline import Decode, Found, Job, compile_all

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = pytest.mark.skipif(
    not (TOOLS / "cuobjdump").exists() and shutil.which("cuobjdump") is None, reason="this triton has no cuobjdump"
)

STREAMING = "causal & (window(512) | sink(4))"
DOCUMENTS = "attention documents { input doc : int[b, k] sorted\n attend causal & document(doc) }"
SOFTCAP = "attention gemma2 { score softcap(s, 50.0)\n attend causal }"
SINK = "attention sinks { input sinks : float[h]\n softmax with sink sinks[h]\n attend causal & window(128) }"
SCATTERED = "causal & (window(64) | dilated(16))"
GRID = "attention grid { axes y, x[128]\n attend neighborhood(13) on (y, x) }"
RANDOM = "causal & (window(64) | random(3, of = blocks(64), per = rows(64), seed = h))"
BITS = "causal & { bit_length(q - k) % 2 == 0 or is_power_of_two(q) }"
DEVICES = (
    ("cuda:80", "pointer"), ("cuda:90", "pointer"), ("cuda:90", "descriptor"), ("cuda:100", "descriptor"),
    ("hip:gfx942", "pointer"),
)  # fmt: skip
QUICK = [
    Job(text, *device[:1], dim, device[1])
    for (text, dim), device in product(((STREAMING, 128), (SOFTCAP, 64)), DEVICES)
]
QUICK += [
    Job(BITS, "cuda:90", 64, "descriptor"),
    Job(RANDOM, "cuda:90", 64, "descriptor"),
    Job(RANDOM, "hip:gfx942", 64, "pointer"),
]
QUICK += [
    Job(STREAMING, "cuda:80", 80, "pointer", (32, 8), decode=Decode(1, 16)),
    Job(STREAMING, "cuda:90", 128, "pointer", (32, 8), decode=Decode(1, None)),
    Job(STREAMING, "cuda:90", 128, "pointer", (32, 8), decode=Decode(1, 64, fp8=True)),
    Job(SINK, "cuda:90", 128, "pointer", (32, 8), decode=Decode(16, 16)),
    Job(SOFTCAP, "hip:gfx942", 256, "pointer", (32, 8), decode=Decode(1, 16)),
]
QUICK.append(Job(DOCUMENTS, "cuda:90", 128, "descriptor", (8, 2)))
# The piece whose tokens lie apart, which loads through pointers.
QUICK += [Job(SCATTERED, target, dim, "pointer", piece=1) for target in ("cuda:80", "cuda:90") for dim in (64, 128)]
QUICK += [Job(GRID, target, 128, "pointer") for target in ("cuda:80", "cuda:90")]
QUICK += [
    Job(STREAMING, "cuda:80", 128, "pointer", observe=(64, 64)),
    Job(DOCUMENTS, "cuda:90", 64, "pointer", observe=(None, 1)),
]
QUICK += [Job(STREAMING, "hip:gfx942", 80, "pointer", observe=(4, 16))]
DECODES = [Decode(rows, page, fp8) for rows in (1, 16) for page in (None, 16) for fp8 in (False, True)]
PATTERNS = ("causal", STREAMING, DOCUMENTS, SOFTCAP, SINK, SCATTERED)
THOROUGH = [
    Job(text, target, dim, loads, heads)
    for text, dim, (target, loads), heads in product(PATTERNS, (64, 80, 96, 128, 192, 256), DEVICES, ((8, 8), (8, 2)))
]
THOROUGH += [
    Job(text, target, dim, "pointer", (8, 2), dtype, observe=observe)
    for text, target, dim, dtype, observe in product(
        (STREAMING, DOCUMENTS), ("cuda:80", "cuda:90", "hip:gfx942"), (64, 80, 128, 256), ("bfloat16", "float32"),
        ((64, 64), (None, 1), (4, 16)),
    )
]  # fmt: skip
THOROUGH += [
    Job(text, target, dim, "pointer", heads, dtype, decode=decode)
    for text, target, dim, heads, decode, dtype in product(
        (STREAMING, DOCUMENTS, SINK), ("cuda:80", "cuda:90", "hip:gfx942"), (64, 80, 96, 128, 192, 256),
        ((8, 8), (32, 8)), DECODES, ("bfloat16", "float32"),
    )
]  # fmt: skip


def verify(jobs: list[Job]) -> None:
    """Every kernel of the jobs is free of spills, and uses its device's matrix unit and tensor copies."""
    problems = [f"{job}: {found}" for job, found in zip(jobs, compile_all(jobs), strict=True) if not good(job, found)]
    assert not problems, "\n".join(problems)


def good(job: Job, found: Found) -> bool:
    # Few rows leave Hopper's products, of 64 rows, mostly empty.
    few = job.decode is not None and (job.decode.rows * job.heads[0] // job.heads[1] < 64 or job.dim > 128)
    wgmma = found.wgmma == (job.target == "cuda:90" and not few and job.dtype != "float32")
    return found.spills == 0 and wgmma and found.tensor_copies == (job.loads == "descriptor")


def test_default_tilings() -> None:
    verify(QUICK)


@pytest.mark.triton_newest
def test_compiles_and_uses_the_hardware() -> None:
    """One small job, with whichever triton is installed."""
    job = Job(STREAMING, "cuda:90", 64, "descriptor")
    (found,) = compile_all([job])
    assert good(job, found), found
    assert found.triton == triton.__version__


PLANNED = "attention planned {{ input p : {}[{}]\n attend causal & p }}"
BLOCKS, SMALL, TOKENS = (PLANNED.format(x, "b, g, q") for x in ("blocks(64)", "blocks(16)", "tokens"))
ROUTED, SHORT = PLANNED.format("blocks(128)", "b, h, q"), PLANNED.format("blocks(16)", "b, h, q/64")
CLUSTERS = (
    "attention clusters { input c : int[b, g, k]\n"
    "attend causal & top(64, segments(c), per = rows(128), among = all, by = dot(mean(Q), mean(K))) }"
)
LISTED = [
    Job(BLOCKS, "cuda:90", 128, "descriptor", (64, 4), listed="forward"),
    Job(TOKENS, "cuda:80", 128, "pointer", (64, 4), listed="forward"),
    Job(SMALL, "cuda:90", 128, "descriptor", (64, 4), listed="dq"),
    Job(TOKENS, "cuda:90", 128, "descriptor", (64, 4), listed="dkdv"),
    Job(ROUTED, "cuda:90", 128, "descriptor", (16, 16), listed="dkdv"),
    Job(SHORT, "cuda:90", 128, "descriptor", (8, 8), listed="forward"),
    Job(CLUSTERS, "cuda:90", 128, "descriptor", (8, 8), listed="forward"),
    Job(CLUSTERS, "cuda:90", 128, "descriptor", (8, 8), listed="dq"),
]


def test_kernels_over_lists() -> None:
    """Addresses of single keys and of single rows do not spill, at most two numbers where rows are read ahead, and the
    tiles leave room for two programs."""
    found = compile_all(LISTED)
    assert all(x.spills <= (8 if job.listed == "dkdv" else 0) for x, job in zip(found, LISTED, strict=True))
    assert all(2 * x.shared <= 227 << 10 for x, job in zip(found, LISTED, strict=True) if job.target == "cuda:90")


NSA = """attention nsa {
    coarse = attend causal over pool(mean, 64)
    top = attend causal & top(16, blocks(64), by = probs(coarse), share = group, always = same_block(64))
    output coarse + top
}"""
MOBA = "attention moba { attend causal & top(3, blocks(512), by = dot(Q, mean(K)), always = same_block(512)) }"
CHOICES = [
    Job(NSA, target, 128, "pointer", (64, 4), select=True)
    for target in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
]
CHOICES += [Job(MOBA, "cuda:90", 128, "pointer", (16, 16), select=True)]


def test_choices() -> None:
    """Lists of the best lie in registers, on every device; products are Hopper's where they have columns for it."""
    found = compile_all(CHOICES)
    assert [x.spills for x in found] == [0] * len(CHOICES)
    assert [x.wgmma for x in found] == [job.target == "cuda:90" for job in CHOICES]


SKIPPING = "attention skipping { attend causal skip below 0.001 }"
SKIPS = [Job(SKIPPING, target, 64, "pointer") for target in ("cuda:100", "hip:gfx942")]
SKIPS += [Job(SKIPPING, "cuda:80", 128, "pointer"), Job(SKIPPING, "cuda:90", 128, "descriptor")]
SKIPS += [Job(SKIPPING, target, 64, "pointer", decode=Decode(64, 16)) for target in ("cuda:90", "cuda:100")]
SKIPS += [Job(SKIPPING, target, 128, "descriptor", left=True) for target in ("cuda:90", "cuda:100")]
SKIPS += [Job(SKIPPING, "cuda:90", 64, "descriptor", listed="dkdv")]


def test_tiles_that_are_skipped() -> None:
    """What decides of a tile is a number that all its scores make, which not every layout gives."""
    assert [x.spills for x in compile_all(SKIPS)] == [0] * len(SKIPS)


def test_spills_are_seen() -> None:
    """What `verify` relies on: a kernel of tiles that are too large shows its spills."""
    (found,) = compile_all([Job("causal", "cuda:80", 128, "pointer", tiling=(128, 128, 4, 2))])
    assert found.spills > 0


@pytest.mark.skipif(settings().max_examples < 1000, reason="only with --hypothesis-profile=thorough: minutes")
@pytest.mark.parametrize("device", DEVICES, ids="-".join)
def test_all_default_tilings(device: tuple[str, str]) -> None:
    verify([job for job in THOROUGH if (job.target, job.loads) == device])
