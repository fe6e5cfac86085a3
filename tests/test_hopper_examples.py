"""Every example compiled for Hopper, whose GPUs need not be there; and which have no kernel for it, and why."""

from __future__ import annotations

import functools
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import triton

from attndsl.runtime.build import KernelSource
from tests.hopper_kernels import Lowered, Portable, hopper_kernels
from tests.offline import Found, compile_hopper_sources

FOLDER = Path(__file__).parent
EXAMPLES = sorted((FOLDER.parent / "examples" / "patterns").glob("*.attn"))
PORTABLE = FOLDER / "hopper_portable.txt"
# Compile-time tables that have no default.
PARAMS: dict[str, dict[str, Any]] = {
    "moa": {"alpha": [64, -8, 0, 16, 128, 4, 9, 1], "beta": [512, 256, 1024, 640, 0, 128, 100, 2048]},
    "radial": {"width": [64] * 21, "every": [1, 2, 4] * 7},
    "proxy": {"n": [4, 8, 2, 6]},
}
WEIGHTS = "attention a { weights sigmoid(-abs(s))\n attend causal & window(1024) }"
DIMS = [(64, 64), (8, 8), (40, 72), (80, 80), (96, 96), (64, 128), (192, 128), (192, 192), (256, 64), (256, 256)]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")


@functools.cache
def kernels_of(path: Path) -> tuple[Lowered | Portable, ...]:
    return tuple(hopper_kernels(path.read_text(encoding="utf-8"), **PARAMS.get(path.stem, {})))


def test_what_has_no_kernel_for_hopper(update_golden: bool) -> None:
    """Each part that has none, and what `explain` says of it: none is lost unseen."""
    found = [(path.stem, x) for path in EXAMPLES for x in kernels_of(path)]
    text = "".join(f"{name}: {x.name}: {x.reason}\n" for name, x in found if isinstance(x, Portable))
    if update_golden:
        PORTABLE.write_text(text, "utf-8")
    assert text == PORTABLE.read_text("utf-8")


# Bytes of shared memory that a program may have on sm_90, and of local memory that any thread has.
SHARED, STACK = 232448, 1024
# Accesses to spilled registers in the turn of a loop that has the fewest, that of a tile that nothing masks where there
# is one: forward some addresses, where uniform registers run out; of gradients, which hold two outputs, what goes on.
SPILLED = {"forward": 8, "gradients": 80}
# More have those that read data for each pair or key of every tile, and of gradients scores with many operations.
MORE = {
    "hsa.votes.forward": 48, "hyper.rest.forward": 32, "power.forward": 48,
    "pyramid.2.forward": 16, "tidal_reuse.forward": 40, "vmoba_video.forward": 100,
    "power.gradients": 140, "softcap.gradients": 110,
}  # fmt: skip


def wrong(name: str, found: Found) -> str:
    """What a kernel should not come to; empty where all is as it should be."""
    kind = "gradients" if "gradients" in name else "forward"
    if not found.wgmma or not found.tensor_copies:
        return "it has no products or no copies of Hopper's"
    if found.waits != 1:
        return "products one after another"
    if found.shared > SHARED or found.spills > STACK:
        return "more memory than a program has"
    return "spilled registers in a loop" if found.spilled > MORE.get(name, SPILLED[kind]) else ""


@functools.cache
def all_kernels() -> dict[KernelSource, list[str]]:
    """The kernels of all examples, and of all head dimensions, each once, and what each is of."""
    found = defaultdict(list)
    for path in EXAMPLES:
        for x in kernels_of(path):
            if isinstance(x, Lowered):
                found[x.source].append(f"{path.stem}.{x.name}")
    for what, text in (("causal", "causal"), ("weights", WEIGHTS)):
        for dim, v_dim in DIMS:
            for x in hopper_kernels(text, dim, v_dim):
                if isinstance(x, Lowered):
                    found[x.source].append(f"{what}.{x.name} at {dim}, {v_dim}")
    return found


# Compiled in so many processes, one after another.
SHARES = 4


@pytest.mark.every_example
@pytest.mark.skipif(
    not triton.__version__.startswith("3.6.")
    or (not (TOOLS / "cuobjdump").exists() and shutil.which("cuobjdump") is None),
    reason="the lowering is for triton 3.6, and read by its cuobjdump",
)
@pytest.mark.parametrize("share", range(SHARES))
def test_every_example(share: int) -> None:
    mine = dict(list(all_kernels().items())[share::SHARES])
    found = zip(mine.values(), compile_hopper_sources(list(mine)), strict=True)
    problems = [f"{', '.join(names)}: {what}: {x}" for names, x in found if (what := wrong(names[0], x))]
    assert not problems, "\n".join(problems)


def test_none_is_lost() -> None:
    """What `test_every_example` goes over; and bounds of its own are those of kernels that there are."""
    names = {name for of in all_kernels().values() for name in of}
    assert len(all_kernels()) >= 140 and set(MORE) <= names
