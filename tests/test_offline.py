"""Forward kernels compiled for GPUs that are not there: no spills, and the instructions that make them fast."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import pytest
import triton
from hypothesis import settings

from tests.offline import Found, Job, compile_all

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = pytest.mark.skipif(
    not (TOOLS / "cuobjdump").exists() and shutil.which("cuobjdump") is None, reason="this triton has no cuobjdump"
)

STREAMING = "causal & (window(512) | sink(4))"
DOCUMENTS = "attention documents { input doc : int[b, k] sorted\n attend causal & document(doc) }"
SOFTCAP = "attention gemma2 { score softcap(s, 50.0)\n attend causal }"
SINK = "attention sinks { input sinks : float[h]\n softmax with sink sinks[h]\n attend causal & window(128) }"
SCATTERED = "causal & (window(64) | dilated(16))"
DEVICES = (
    ("cuda:80", "pointer"), ("cuda:90", "pointer"), ("cuda:90", "descriptor"), ("cuda:100", "descriptor"),
    ("hip:gfx942", "pointer"),
)  # fmt: skip
QUICK = [
    Job(text, *device[:1], dim, device[1])
    for (text, dim), device in product(((STREAMING, 128), (SOFTCAP, 64)), DEVICES)
]
QUICK.append(Job(DOCUMENTS, "cuda:90", 128, "descriptor", (8, 2)))
# The piece whose tokens lie apart, which loads through pointers.
QUICK += [Job(SCATTERED, target, dim, "pointer", piece=1) for target in ("cuda:80", "cuda:90") for dim in (64, 128)]
PATTERNS = ("causal", STREAMING, DOCUMENTS, SOFTCAP, SINK, SCATTERED)
THOROUGH = [
    Job(text, target, dim, loads, heads)
    for text, dim, (target, loads), heads in product(PATTERNS, (64, 80, 96, 128, 192, 256), DEVICES, ((8, 8), (8, 2)))
]


def verify(jobs: list[Job]) -> None:
    """Every kernel of the jobs is free of spills, and uses its device's matrix unit and tensor copies."""
    problems = [f"{job}: {found}" for job, found in zip(jobs, compile_all(jobs), strict=True) if not good(job, found)]
    assert not problems, "\n".join(problems)


def good(job: Job, found: Found) -> bool:
    wgmma = found.wgmma == (job.target == "cuda:90")
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


def test_spills_are_seen() -> None:
    """What `verify` relies on: a kernel of tiles that are too large shows its spills."""
    (found,) = compile_all([Job("causal", "cuda:80", 128, "pointer", tiling=(128, 128, 4, 2))])
    assert found.spills > 0


@pytest.mark.skipif(settings().max_examples < 1000, reason="only with --hypothesis-profile=thorough: minutes")
@pytest.mark.parametrize("device", DEVICES, ids="-".join)
def test_all_default_tilings(device: tuple[str, str]) -> None:
    verify([job for job in THOROUGH if (job.target, job.loads) == device])
