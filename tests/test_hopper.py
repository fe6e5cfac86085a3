"""The Hopper lowering compiled without a GPU: the instructions that make it fast, and none that make it slow."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import triton

import attndsl
from attndsl.codegen.gluon import by_place
from attndsl.codegen.gluon_forward import forward_source
from attndsl.codegen.prelude_helpers import prelude
from attndsl.codegen.scalars import GLUON
from attndsl.compose import compose
from attndsl.evaluate import evaluate
from attndsl.listing import lists_tiles, reads_plans
from attndsl.one_pass import prefers_two_passes
from attndsl.piece_plans import backward_plans, forward_plans
from attndsl.plan import Backend
from attndsl.program import Binary, CallShape, Compare, Const, Var, reads
from attndsl.runtime.gluon_backward import why_not
from attndsl.targets import (
    default_refusal,
    gradients_refusal,
    hopper_refusal,
    make_spec,
    pieces_refusal,
)
from tests.hopper_views import VIEWS, of_views
from tests.offline import ROOT, Found, Job, compile_all

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that a program may have on sm_90.
SHARED = 232448
offline = pytest.mark.skipif(
    not triton.__version__.startswith("3.6.")
    or (not (TOOLS / "cuobjdump").exists() and shutil.which("cuobjdump") is None),
    reason="the lowering is for triton 3.6, and read by its cuobjdump",
)


def good(found: Found) -> bool:
    """Products of the hardware's own kind, none waiting for the one before, and tiles copied by hardware; what is
    spilled is a few scalars of a block, and of the gradients what goes on while a tile is masked."""
    fits = found.shared <= SHARED and found.spills <= 1024
    return found.wgmma and found.tensor_copies and found.waits == 1 and fits


def verify(chosen: list[Job]) -> None:
    problems = [f"{x}: {found}" for x, found in zip(chosen, compile_all(chosen), strict=True) if not good(found)]
    assert not problems, "\n".join(problems)


@offline
def test_plain_patterns_spill_next_to_nothing() -> None:
    """Nor do gradients in a masked tile, whose places are compared with constants: none stands in a register."""
    plain = Job("causal", "cuda:90", 128, "descriptor")
    window = replace(plain, text="causal & window(1024)", hopper="gradients")
    forward, *gradients = compile_all([replace(plain, hopper="forward"), replace(plain, hopper="gradients"), window])
    for found in (forward, *gradients):
        assert good(found) and found.spills <= 80, found
    # Weights are rounded beside products, not before a turn's end, where once would do for the last tile too.
    assert forward.rounded_late == 0


def test_what_has_no_lowering_says_so() -> None:
    spec = make_spec("sm_90", "triton", 8, 8, 128)
    learned = attndsl.compile(
        "attention a { input t : float[h] learnable\n softmax with sink t[h]\n attend causal }"
    ).program
    assert not hopper_refusal(learned, spec)
    assert "learnable" in gradients_refusal(learned, spec)
    causal = attndsl.compile("causal").program
    assert not gradients_refusal(causal, spec)
    assert "64 or 128" in gradients_refusal(causal, make_spec("sm_90", "triton", 8, 8, 96))
    assert "sm_90" in gradients_refusal(causal, make_spec("sm_80", "triton", 8, 8, 128))


def test_gradients_in_one_pass_unless_all_are_to_repeat() -> None:
    """dk and dv repeat to the bit either way; dq does not in one pass."""
    spec, q = make_spec("sm_90", "triton", 16, 16, 128), torch.empty(1, 16, 64, 128, device="meta")
    attn = attndsl.compile("causal")
    assert not gradients_refusal(attn.program, spec)
    assert "asks for the portable kernels" in why_not(attn.program, spec, q, "triton")
    for backend in ("auto", "gluon"):
        said = why_not(attn.program, spec, q, backend)
        assert "deterministic" not in said and "asks" not in said
        torch.use_deterministic_algorithms(True)
        try:
            assert "deterministic" in why_not(attn.program, spec, q, backend)
        finally:
            torch.use_deterministic_algorithms(False)


def test_which_gradients_are_predicted_to_be_ahead() -> None:
    """One pass where enough tiles are visited, at the call's own lengths; where data decides that, in long calls."""

    def said(text: str, tokens: int) -> str:
        explained = str(attndsl.compile(text).explain(tokens, target="sm_90", heads=8, kv_heads=8, dim=128))
        (line,) = [line for line in explained.splitlines() if "its gradients:" in line]
        return line

    documents = "attention a { input d : int[b, k] sorted\n attend causal & document(d) }"
    for text in ("causal", "causal & window(4096)", documents):
        line = said(text, 16384)
        assert "in one pass" in line and "use_deterministic_algorithms(True)" in line and "64 MiB" in line, line
    for text, tokens in (("causal & window(256)", 16384), (documents, 2048)):
        assert "portable Triton, predicted to be ahead" in said(text, tokens)


# Whole calls in milliseconds on an H100, in one pass and by the portable kernels: pattern, head dimension, query and
# key heads, batch and tokens (benchmarks/RESULTS.md).
TIMED = [
    ("causal", 128, (16, 16), 1, 16384, 4.610, 6.227),
    ("causal", 128, (32, 8), 4, 1024, 0.368, 0.331),
    ("causal", 128, (16, 1), 1, 4096, 2.146, 1.379),
    ("causal & window(1024)", 128, (16, 16), 1, 16384, 0.859, 0.909),
    ("causal & window(1024)", 128, (16, 16), 1, 1024, 0.0587, 0.0601),
    ("causal & window(1024)", 128, (32, 8), 1, 16384, 1.941, 1.704),
    ("causal & window(256)", 128, (16, 16), 1, 4096, 0.136, 0.126),
    ("causal & (sink(64) | window(1024))", 128, (16, 16), 1, 16384, 0.941, 0.962),
    ("causal & (sink(64) | window(1024))", 128, (32, 8), 1, 16384, 3.746, 2.545),
    ("causal", 64, (16, 16), 1, 16384, 2.895, 3.467),
    ("causal", 64, (16, 1), 1, 4096, 1.286, 0.946),
    ("causal & window(1024)", 64, (32, 8), 1, 16384, 0.934, 1.008),
    ("causal & window(256)", 64, (16, 16), 1, 16384, 0.301, 0.255),
    ("causal & (sink(64) | window(1024))", 64, (16, 16), 1, 16384, 0.584, 0.556),
]


@pytest.mark.parametrize(("text", "dim", "heads", "batch", "tokens", "one", "two"), TIMED)
def test_predictions_choose_what_was_ahead(
    text: str, dim: int, heads: tuple[int, int], batch: int, tokens: int, one: float, two: float
) -> None:
    spec = replace(make_spec("sm_90", "triton", *heads, dim), backend=Backend.GLUON)
    (plan,) = backward_plans(attndsl.compile(text).program, spec)
    assert prefers_two_passes(plan, CallShape(batch, *heads, tokens, tokens, dim, dim)) == (two < one)


@pytest.mark.parametrize(("rows", "k_len"), [(0, 0), (3, 0), (0, 3)])
def test_calls_without_rows_or_keys_are_predicted(rows: int, k_len: int) -> None:
    spec = replace(make_spec("sm_90", "triton", 8, 2, 128), backend=Backend.GLUON)
    (plan,) = backward_plans(attndsl.compile("causal").program, spec)
    assert isinstance(prefers_two_passes(plan, CallShape(1, 8, 2, rows, k_len, 128, 128)), bool)


@pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
def test_gradients_have_as_many_stages_as_were_ahead() -> None:
    """Two where many tiles of rows visit a key tile or a mask compares much, three elsewhere, where these fit into
    shared memory."""
    documents = "attention a { input d : int[b, k] sorted\n attend causal & document(d) }"
    diffusion = (ROOT / "examples" / "patterns" / "block_diffusion.attn").read_text(encoding="utf-8")
    for text, dim, stages in (
        ("causal", 128, 2),
        ("causal & window(1024)", 128, 3),
        (documents, 128, 3),
        (diffusion, 128, 2),
        ("causal", 64, 2),
    ):
        spec = replace(make_spec("sm_90", "triton", 8, 2, dim), backend=Backend.GLUON)
        assert backward_plans(attndsl.compile(text).program, spec)[0].key_tiling.stages == stages, text


def test_the_kernel_of_all_gradients_is_for_hopper_alone() -> None:
    attn = attndsl.compile("causal & window(64)")
    text = attn.source("gradients", backend="gluon", target="sm_90", heads=8, kv_heads=2, dim=128)
    assert "add_shared_to_global(dq_desc" in text and "for member in range(4):" in text
    with pytest.raises(attndsl.PatternError, match="for Hopper alone"):
        attn.source("gradients", target="sm_90")


LISTED = {
    "attention a { input p : blocks(128)[b, g, q/128]\n attend causal & p }": "",
    "attention a { input p : blocks(64)[b, h]\n attend causal & p }": "",
    "attention a { input p : blocks(64)[b, g, q/64]\n attend causal & p }": "tiles of 64 rows and 64 keys are listed",
    "attention a { input p : blocks(64)[b, g, q]\n attend causal & p }": "gathered",
    "attention a { input p : blocks(16)[b, g, q/128]\n attend causal & p }": "several members",
    "causal & random(2, blocks(128), rows(128), 5)": "",
}


@pytest.mark.parametrize("text", LISTED)
def test_lists_of_tiles(text: str) -> None:
    """Those of the kernel's own tiles it goes over; why it does not over others is said."""
    spec = replace(make_spec("sm_90", "triton", 8, 2, 128), even_start=True, lists=True)
    program = attndsl.compile(text).program
    assert LISTED[text] in hopper_refusal(program, spec) if LISTED[text] else not hopper_refusal(program, spec)
    if not LISTED[text]:
        (plan,) = forward_plans(program, replace(spec, backend=Backend.GLUON))
        assert all(run.list is not None for run in plan.runs.full + plan.runs.partial)
        source = forward_source(plan)
        # A list that is empty has nothing to read.
        assert "gl.where(nothing, 0, gl.load(k_tiles_" in source and "scores = gl.where(nothing, " in source


def test_gradients_of_listed_tiles() -> None:
    """A program of gradients owns 128 keys, so that smaller members are the portable kernels' to go over."""
    spec = replace(make_spec("sm_90", "triton", 8, 2, 128), even_start=True, lists=True)
    of_64, of_128 = (
        attndsl.compile(f"attention a {{ input p : blocks({n})[b, g, q/128]\n attend causal & p }}").program
        for n in (64, 128)
    )
    assert not hopper_refusal(of_64, spec) and "tiles of 64 keys are listed" in gradients_refusal(of_64, spec)
    assert not gradients_refusal(of_128, spec)
    (plan,) = backward_plans(of_128, replace(spec, backend=Backend.GLUON))
    assert all(run.list is not None for run in plan.key_runs.full + plan.key_runs.partial)


def test_query_tiles_are_handed_out_where_two_have_room() -> None:
    """Which they are and where their runs end is said once, by a warp of its own, which waits for the program's last
    tiles before it takes another."""
    attn = attndsl.compile("causal & window(1024)")
    wide, narrow = (attn.source(backend="gluon", target="sm_90", dim=dim) for dim in (256, 128))
    assert "hand_out" not in wide and "atomic" not in wide
    assert narrow.count("full_count = gl.maximum") == 1 and narrow.count("full_count = handed(") == 2
    assert narrow.count("gl.atomic_add(counter_ptr") == 1
    # Long ones do not gain by it.
    assert "hand_out" not in attndsl.compile("causal").source(backend="gluon", target="sm_90", dim=128)


def test_pieces_and_small_heads_by_default() -> None:
    spec = replace(make_spec("sm_90", "triton", 8, 2, 128), whole=True)
    small = replace(spec, dim=64, v_dim=64)
    apart, window = (attndsl.compile(x).program for x in ("causal & window(4096) & dilated(16)", "causal & window(64)"))
    assert not default_refusal(apart, spec) and not default_refusal(window, spec)
    assert "as fast" in default_refusal(apart, small) and "few tiles" in default_refusal(window, small)
    assert not default_refusal(attndsl.compile("causal & window(256)").program, small)


WEIGHTS = "attention a { weights sigmoid(-abs(s))\n attend causal & window(1024) }"


@offline
def test_head_dimensions_weights_and_lists_compile() -> None:
    """One of each here, all where the examples are."""
    jobs = [Job("causal", "cuda:90", 96, "descriptor", hopper="forward", v_dim=72)]
    jobs += [Job(WEIGHTS, "cuda:90", 128, "descriptor", hopper="forward")]
    jobs += [Job(next(iter(LISTED)), "cuda:90", 128, "descriptor", hopper="forward", listed="forward")]
    verify(jobs)


def test_gluon_has_every_function() -> None:
    """Of what expressions and the prelude call; what it lacks, the prelude brings."""
    from triton.experimental.gluon import language as gl

    spelled = " ".join(GLUON.functions.values()) + prelude("prelude.py", GLUON.functions.values()).replace("tl.", "gl.")
    assert "sigmoid" in spelled
    assert [name for name in re.findall(r"gl\.(\w+)", spelled) if not hasattr(gl, name)] == []


def backends(text: str, whole: bool = True) -> list[str]:
    """Which lowering each piece of a program gets where Hopper's is chosen; none where it is not to be had."""
    spec = replace(make_spec("sm_90", "triton", 4, 2, 128), whole=whole)
    program = attndsl.compile(text).program
    if pieces_refusal(program, spec):
        return []
    return [plan.spec.backend.value for plan in forward_plans(program, replace(spec, backend=Backend.GLUON))]


@pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
def test_pieces_that_hardware_copies() -> None:
    """Every m-th token is copied as all are where a call has as many of each remainder; else the kernel is portable."""
    assert backends("causal & window(4096) & dilated(16)") == ["gluon"]
    assert backends("causal & window(4096) & dilated(16)", whole=False) == []
    assert backends("causal & (window(128) | dilated(128))") == ["gluon", "gluon"]
    assert backends("causal & (window(128) | dilated(128))", whole=False) == ["gluon", "triton"]
    assert backends("causal & strided(7, 3)") == []
    assert backends("causal") == ["gluon"]


@pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
def test_views_have_kernels_of_their_own() -> None:
    """Each part of a softmax the one that suits it."""
    spec = make_spec("sm_90", "triton", 4, 2, 128)
    for body, expected in VIEWS.items():
        ((_, program),) = compose(attndsl.compile(of_views(body)).program).branches
        spec = replace(spec, even_start=lists_tiles(program), lists=reads_plans(program))
        assert not hopper_refusal(program, spec)
        plans = forward_plans(program, replace(spec, backend=Backend.GLUON))
        assert "".join(plan.spec.backend.value[0] for plan in plans) == expected, body


@pytest.mark.parametrize("times", [1, -1, 2, -3, 64])
@pytest.mark.parametrize("op", ["<", "<=", ">", ">=", "==", "!="])
def test_comparisons_are_solved_for_places(op: str, times: int) -> None:
    """For every token, whatever multiple of it is compared: entries of views are counted in tokens."""
    left = Binary("+", Binary("*", Const(times), Var("k")), Const(5))
    cond = Compare(op, left, Binary("-", Var("q"), Var("Nk")))
    solved = by_place(cond, "k")
    assert reads(solved, "k") is (abs(times) > 1 and op in ("==", "!="))
    k, q = np.arange(-40, 40), np.arange(-200, 200)[:, None]
    known = {"k": k, "q": q, "Nk": np.asarray(7), "in_tile": k + 16, "tile_first": np.asarray(-16)}
    assert np.array_equal(evaluate(cond, known, {}), np.broadcast_to(evaluate(solved, known, {}), (400, 80)))
