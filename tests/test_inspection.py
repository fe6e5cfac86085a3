"""Looking inside: source for every target and backend, and kernels compiled for devices that are not here."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import attndsl
from attndsl.plan import Loads, forward_plan
from attndsl.runtime.assembly import meta_tensors
from attndsl.runtime.triton_launch import loads_for, parameter_sources
from attndsl.targets import TARGETS, make_spec
from attndsl.tile_sizes import default_tiling

ROOT = Path(__file__).parent.parent
PATTERN = "attention small { input doc : int[b, k] sorted  attend causal & window(40) & document(doc) }"

# One process compiles everything: the suite itself runs under Triton's interpreter, which compiles nothing.
COMPILES = """
import json, sys
import attndsl
attn = attndsl.compile(sys.argv[1])
wanted = {"sm_80": ["ptx"], "sm_90": ["ttir", "ttgir", "llir", "ptx", "sass"], "sm_100": ["ptx"], "gfx942": ["amdgcn"]}
print(json.dumps({
    f"{target} {format}": attn.assembly("forward", format, target=target, heads=2, kv_heads=1, dim=32)
    for target, formats in wanted.items() for format in formats
} | {
    f"chosen {kernel}": attndsl.compile(sys.argv[2]).assembly(kernel, "ptx", heads=2, kv_heads=1, dim=32)
    for kernel in ("forward", "dq", "dkdv")
} | {
    f"routed {kernel}": attndsl.compile("examples/patterns/nsa.attn").assembly(kernel, "ptx", heads=4, dim=32)
    for kernel in ("pool", "top.select", "summary.forward", "combine", "combine_gradients")
} | {
    "observed": attndsl.compile("examples/patterns/snapkv.attn").assembly(sys.argv[3], "ptx", heads=4, dim=32)
}))
"""
# Of the example of SnapKV.
OBSERVED = "votes.observe"
# Each row chooses for itself, so rows are gathered.
CHOSEN = "attention chosen { input p : blocks(64)[b, h, q]  attend causal & p }"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["ATTNDSL_CACHE_DIR"] = str(tmp_path_factory.mktemp("kernels"))
    done = subprocess.run(
        [sys.executable, "-c", COMPILES, PATTERN, CHOSEN, OBSERVED],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("sm_80 ptx", ".target sm_80"),
        ("sm_80 ptx", "mma.sync"),
        ("sm_90 ttir", "tt.descriptor_load"),
        ("sm_90 ttgir", "ttng.warp_group_dot"),
        ("sm_90 llir", "define"),
        ("sm_90 ptx", "cp.async.bulk.tensor"),
        ("sm_90 sass", "HGMMA"),
        ("sm_100 ptx", ".target sm_100"),
        ("gfx942 amdgcn", "v_mfma"),
    ],
)
def test_kernels_compile_without_their_device(compiled: dict[str, str], which: str, says: str) -> None:
    assert says in compiled[which]
    assert "attention_forward" in compiled[which]


def test_kernels_of_plans_are_those_of_lists(compiled: dict[str, str]) -> None:
    chosen = attndsl.compile(CHOSEN)
    for kernel, name in (("forward", "attention_forward"), ("dq", "attention_dq"), ("dkdv", "attention_dkdv")):
        assert "chose_p_ptr" in chosen.source(kernel) and name in compiled[f"chosen {kernel}"]
    blocks = attndsl.compile("attention blocks { input p : blocks(64)[h, q/64]  attend causal & p }")
    assert "k_tiles_p_ptr" in blocks.source("forward") and "q_tiles_p_ptr" in blocks.source("dkdv")


def test_what_stands_around_the_kernels_that_attend_compiles(compiled: dict[str, str]) -> None:
    for kernel, name in (
        ("pool", "pool_tokens"), ("top.select", "attention_select"), ("summary.forward", "attention_forward"),
        ("combine", "combine_branches"), ("combine_gradients", "combine_gradients"),
    ):  # fmt: skip
        assert f".entry {name}(" in compiled[f"routed {kernel}"]
    assert ".entry attention_observe(" in compiled["observed"]


@pytest.mark.parametrize("target", TARGETS)
def test_source_is_made_for_every_target(target: str) -> None:
    text = attndsl.compile(PATTERN).source(target=target, heads=4, kv_heads=2, dim=64)
    assert "attention_forward" in {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert TARGETS[target] in text
    # Hopper and later copy tiles by hardware.
    assert ("k_desc" in text) == (target in ("sm_90", "sm_100"))


def test_source_for_the_cpu_is_pytorch() -> None:
    text = attndsl.compile(PATTERN).source(backend="cpu", dtype="float64")
    assert "import torch" in text
    assert "triton" not in text


def test_kernels_lists_what_source_shows() -> None:
    attn = attndsl.compile("causal")
    for kernel in attn.kernels():
        assert "def " in attn.source(kernel)


def test_source_needs_no_torch() -> None:
    program = "import sys, attndsl; attndsl.compile('causal').source(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_what_is_shown_is_what_a_launch_on_dense_tensors_runs() -> None:
    """The spec of `source` loads tiles as the launch does, and a launch's parameters are typed as offline."""
    program = attndsl.compile(PATTERN).program
    for target in TARGETS:
        spec = make_spec(target, "triton", 2, 1, 64)
        plan = forward_plan(program, spec, default_tiling(spec))
        q, k, v, inputs = meta_tensors(plan)
        assert spec.loads is loads_for(spec, True, k, v)
        assert inputs[0].dtype == torch.int32
        assert "doc_ptr" in parameter_sources(plan, q, k, v, inputs)
    strided = torch.empty(1, 1, 64, 72, dtype=torch.bfloat16)[..., 1:65]
    assert loads_for(make_spec("sm_90", "triton", 1, 1, 64), False, strided, strided) is Loads.POINTER


def test_nothing_is_compiled_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attndsl.runtime.assembly.INTERPRETED", True)
    with pytest.raises(attndsl.PatternError, match="A533"):
        attndsl.compile("causal").assembly("forward", "ptx")


def test_kernels_for_hopper_compile_with_tested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attndsl.runtime.assembly.INTERPRETED", False)
    monkeypatch.setattr("attndsl.runtime.assembly.version", lambda: "3.9.0")
    attn = attndsl.compile("causal")
    for kernel in ("forward", "gradients"):
        with pytest.raises(attndsl.PatternError, match=r"A510.*Triton 3\.6\.x, not with 3\.9\.0"):
            attn.assembly(kernel, "ptx", target="sm_90", backend="gluon")


def test_without_a_disassembler_sass_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("attndsl.runtime.assembly.INTERPRETED", False)
    monkeypatch.setattr("attndsl.runtime.assembly.triton.__file__", str(tmp_path / "triton.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(attndsl.PatternError, match="A534"):
        attndsl.compile("causal").assembly("forward", "sass")


def test_entries_of_any_number_of_tokens_are_asked() -> None:
    """Of tokens past the last until no row can see them, and at once where no token is asked."""
    huge, all_of_it = (
        attndsl.compile(f"attention a {{ attend {x} over pool(mean, 2147483647) }}") for x in ("causal", "all")
    )
    assert not huge.mask(70, 70).any() and all_of_it.mask(70, 70).all()
    assert "costly to list" in str(huge.explain(4096))
    some = attndsl.compile("attention a { attend causal & { q % 2 == 0 } over pool(mean, 1000, 3, visible = any) }")
    q, j = np.arange(70)[:, None], np.arange(24)
    assert (some.mask(70, 70)[0] == ((3 * j <= q) & (q % 2 == 0))).all()


def test_the_header_counts_the_runs_of_boxes() -> None:
    source = attndsl.compile("attention g { axes t, y[48], x[80]  attend neighborhood(7) on (y, x) }").source()
    (said,) = re.findall(r"^# query tiles .*, (\d+) full and (\d+) partial runs of boxes$", source, re.MULTILINE)
    loops = (re.findall(rf"^    for i in range\({kind}", source, re.MULTILINE) for kind in ("full", "partial"))
    assert [int(x) for x in said] == [len(x) for x in loops]


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
def test_the_header_of_gathered_rows_counts_no_runs(kernel: str) -> None:
    """Their loops go over the tiles of a member, whatever runs the pattern beside it has."""
    text = "causal & top(4, blocks(64), by = dot(Q, mean(K)), share = group, always = same_block(64))"
    (said,) = re.findall(r"^# query tiles .*$", attndsl.compile(text).source(kernel), re.MULTILINE)
    assert said.endswith(", the tiles of chosen members")
