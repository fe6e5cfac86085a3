"""What compiled kernels hold beside their instructions."""

from __future__ import annotations

import json
from pathlib import Path

from tests.caching import python

COMPILE = """
import json
import attndsl
from attndsl.runtime import assembly, build
kept = []
compile_kernel = build.compile_kernel
assembly.compile_kernel = lambda *given: kept.append(compile_kernel(*given)) or kept[-1]
attndsl.compile("causal").assembly("forward", "ptx", "sm_90", dim=64)
print(json.dumps([len(kept[0].binary), b"debug_line" in kept[0].binary, kept[0].metadata["sanitize_overflow"]]))
"""


def test_lines_are_for_who_can_open_the_text(tmp_path: Path) -> None:
    settings = {"TRITON_INTERPRET": "", "ATTNDSL_CACHE_DIR": str(tmp_path / "cache")}
    plain, named = (
        json.loads(python(COMPILE, **settings, ATTNDSL_DUMP=folder).stdout) for folder in ("", str(tmp_path / "texts"))
    )
    # They share a cache, and no entry.
    assert plain[1:] == [False, False]
    assert named[1:] == [True, False]
    assert 2 * plain[0] < named[0]
    assert len(list((tmp_path / "texts").glob("*.py"))) == 1
