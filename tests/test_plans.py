"""Plans: inputs that say which members of the keys each row class attends to, against the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attndsl
from attndsl.api import measure
from attndsl.codegen.triton_forward import forward_source
from attndsl.diagnostics import PatternError
from attndsl.listing import even_start
from attndsl.plan import Backend, DType, ForwardPlan, Spec, Tiling, backward_plan, forward_plan
from attndsl.program import CallShape
from attndsl.runtime import triton_gathered
from attndsl.runtime.cache import KernelCache
from attndsl.runtime.printing import printed_forward
from attndsl.runtime.triton_launch import INTERPRETED
from attndsl.wiring import engine as _engine
from tests.gpu import interprets
from tests.gradients import TOLERANCE, expected_gradients, upstream

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")

SMALL = Tiling(16, 16)


def random_plan(rng: np.random.Generator, lead: tuple[int, ...], members: int, form: str) -> Tensor:
    """A plan that nobody checked: entries out of order and out of range, rows that choose nothing."""
    if form == "map":
        return torch.from_numpy((rng.random((*lead, members)) < 0.3).astype(np.uint8))
    plan = rng.integers(-2, members + 2, (*lead, 4)).astype(np.int32)
    if form == "sorted":
        plan = np.sort(plan, axis=-1)
    return torch.from_numpy(plan)


def attend(
    text: str, shape: CallShape, plan: Tensor, backend: str, inputs: Mapping[str, Tensor] = {},
    tiling: Tiling | None = SMALL,
) -> None:  # fmt: skip
    """Judge out, lse and gradients of a call against the oracle's. tiling: None lets the model choose."""
    attn = attndsl.compile(text)
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(shape.batch, shape.heads, shape.rows, shape.dim, generator=generator)
    k = torch.randn(shape.batch, shape.kv_heads, shape.k_len, shape.dim, generator=generator)
    v = torch.randn(shape.batch, shape.kv_heads, shape.k_len, shape.v_dim, generator=generator)
    given: dict[str, Any] = {"p": plan, **inputs}
    listed = [given[decl.name] for decl in attn.program.inputs]
    engine = _engine(attn.program)
    engine.tiling = tiling
    out, lse = engine.forward(q, k, v, listed, [], None, backend)
    normalised = attn.program.branch.weights is None
    expected = attn.reference(q, k, v, return_lse=normalised, **given)
    torch.testing.assert_close(out.double(), expected[0] if normalised else expected, atol=2e-6, rtol=2e-5)
    if normalised:
        torch.testing.assert_close(lse.double(), expected[1], atol=2e-6, rtol=2e-5)
    dout, upper = upstream(q, v)
    dlse = upper if normalised else None
    found = engine.backward(dout, dlse, q, k, v, out, lse, listed, [], None, backend)
    wanted, learned = expected_gradients(attn.program, q, k, v, given, {}, dout, dlse)
    for got, want in [*zip(found[:3], wanted, strict=True), *zip(found[3], learned, strict=True)]:
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert (got.double() - want).abs().max() <= TOLERANCE[torch.float32] * max(1.0, float(want.abs().max()))


def sizes(dims: str, shape: CallShape) -> tuple[int, ...]:
    """The row classes of a plan declared with these dimensions."""
    found = {"b": shape.batch, "h": shape.heads, "g": shape.kv_heads, "q": shape.rows}
    return tuple(found[d] if d in found else -(-shape.k_len // int(d[2:])) for d in dims.split(", ") if d)


DIMS = ("b, g, q/16", "b, h, q/32", "g, q/16", "q/48", "b, g", "h", "b, g, q", "b, q/20")
PATTERNS = (
    "causal & p", "p", "causal & p - window(7)", "causal & (p | window(7))", "causal - p", "causal & p & document(doc)",
    "p & { h == 0 or q - k < 50 }", "p & { q - k < reach[b] }", "if h == 0 then causal & p else window(9)",
)  # fmt: skip


@given(
    st.sampled_from(DIMS), st.sampled_from(PATTERNS), st.sampled_from((1, 8, 16, 32)),
    st.sampled_from(((70, 70), (33, 97), (1, 40), (1, 1), (16, 144))), st.sampled_from(((2, 1), (4, 2), (2, 2))),
    st.sampled_from(("map", "list", "sorted")), st.sampled_from((8, 80)), st.integers(0, 9),
)  # fmt: skip
def test_random_plans(
    dims: str, pattern: str, keys: int, lengths: tuple[int, int], heads: tuple[int, int], form: str, dim: int, seed: int
) -> None:
    shape = CallShape(2, *heads, *lengths, dim, 16)
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, sizes(dims, shape), -(-shape.k_len // keys), form)
    declared = f"input p : {'tokens' if keys == 1 else f'blocks({keys})'}[{dims}]\n"
    inputs = {}
    if "doc" in pattern:
        declared += "input doc : int[b, k] sorted\n"
        inputs["doc"] = torch.from_numpy(np.cumsum(rng.random((2, shape.k_len)) < 0.05, axis=1).astype(np.int32))
    if "reach" in pattern:
        declared += "input reach : int[b]\n"
        inputs["reach"] = torch.from_numpy(rng.integers(0, 60, 2).astype(np.int32))
    attend(f"attention planned {{ {declared} attend {pattern} }}", shape, plan, "cpu", inputs)


@pytest.mark.parametrize("together", [1, 5, 64])
def test_query_tiles_together_on_the_cpu(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """Lists longer than what is attended at once, of tiles whose lists differ in length and of a last one with fewer
    rows, for heads that choose for themselves; the plan of one batch entry, and of each."""
    monkeypatch.setattr("attndsl.codegen.cpu_lists.TOGETHER", together)
    rng = np.random.default_rng(together)
    for batches, lengths in (("b, ", (150, 150)), ("", (150, 150)), ("", (70, 131))):
        shape = CallShape(2, 4, 2, *lengths, 8, 16)
        dims = f"{batches}h, q/16"
        plan = random_plan(rng, sizes(dims, shape), -(-shape.k_len // 16), "map")
        plan[..., 1::3, :] = 0
        plan[..., -2, :] = 1
        # A name of its own: nothing printed before is taken again.
        text = f"attention together_{together} {{ input p : blocks(16)[{dims}]\n attend causal & p }}"
        attend(text, shape, plan, "cpu")
        source = attndsl.compile(text).source(backend="cpu", heads=4, kv_heads=2, dim=8, v_dim=16, dtype="float32")
        assert f", {together})" in source and "groups(" in source


FIXED = {
    "listed": ("b, g, q/16", "causal & p", 16, (50, 50), "list"),
    "map": ("b, h, q/32", "causal & p", 32, (50, 50), "map"),
    "chunk": ("b, g, q/16", "causal & p - window(7)", 16, (20, 57), "sorted"),
    "even_chunk": ("b, g, q/16", "causal & p", 32, (16, 144), "sorted"),
    "head": ("b, g", "causal & p", 32, (40, 40), "sorted"),
    "head_of_tile": ("q/16", "p & { h == 0 or q - k < 30 }", 16, (40, 40), "list"),
    "query": ("b, g, q", "causal & p", 16, (20, 40), "list"),
    "query_of_head": ("b, h, q", "causal & p - window(5)", 32, (40, 40), "sorted"),
    "query_by_head": ("q", "p & { h == 0 or q - k < 50 }", 16, (1, 60), "sorted"),
    "query_map": ("b, g, q", "causal & p", 16, (20, 33), "map"),
    "tokens": ("b, q", "causal & p", 1, (20, 33), "sorted"),
    "one": ("b, g, q/16", "causal & p", 16, (1, 1), "list"),
    "complement": ("b, g, q/16", "causal - p", 16, (50, 50), "sorted"),
}


@interprets
@pytest.mark.parametrize("name", FIXED)
def test_triton(name: str) -> None:
    dims, pattern, keys, lengths, form = FIXED[name]
    shape = CallShape(1, 2 if name == "map" else 4, 2, *lengths, 80 if name == "listed" else 16, 16)
    plan = random_plan(np.random.default_rng(5), sizes(dims, shape), -(-shape.k_len // keys), form)
    kind = "tokens" if keys == 1 else f"blocks({keys})"
    attend(f"attention planned {{ input p : {kind}[{dims}]\n attend {pattern} }}", shape, plan, "triton")


def test_scores_and_sinks() -> None:
    text = """attention planned { input p : blocks(16)[b, g, q/16]
    input sinks : float[h] learnable
    score s - 0.1 * (q - k)
    softmax with sink sinks[h]
    attend causal & p }"""
    shape = CallShape(1, 2, 1, 60, 60, 16, 16)
    plan = random_plan(np.random.default_rng(5), (1, 1, 4), 4, "sorted")
    for backend in ["cpu", *(["triton"] if INTERPRETED else [])]:
        attend(text, shape, plan, backend, {"sinks": torch.tensor([0.3, -1.0])})


GATHERED = {
    "sink": "input sinks : float[h]\n softmax with sink sinks[h]\n attend causal & p",
    "score": "input lift : float[b, h, q]\n score s - 0.1 * (q - k) + lift[q]\n attend causal & p",
    "weights": "weights sigmoid(s - 1)\n attend causal & p",
    "counted": "weights 1\n attend causal & p",
    "learned": "input sinks : float[h] learnable\n score s * sinks[h]\n attend causal & p",
}


@interprets
@pytest.mark.parametrize("name", GATHERED)
def test_gathered_rows(name: str) -> None:
    """What is merged from slots: sinks enter once, weights add up, and what is learned is summed in order."""
    shape = CallShape(1, 4, 2, 20, 40, 16, 8)
    generator = torch.Generator().manual_seed(1)
    inputs = {"sinks": torch.randn(4, generator=generator), "lift": torch.randn(1, 4, 20, generator=generator)}
    given = {n: x for n, x in inputs.items() if f"input {n}" in GATHERED[name]}
    plan = random_plan(np.random.default_rng(2), (1, 2, 20), 3, "sorted")
    text = f"attention planned {{ input p : blocks(16)[b, g, q]\n {GATHERED[name]} }}"
    attend(text, shape, plan, "triton", given)


@interprets
@pytest.mark.parametrize("name", ["score", "weights"])
def test_heads_take_turns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the slots of all heads are too many, those of a few are there at once."""
    for bound in ("_LEAST_BYTES", "_OUTPUTS"):
        monkeypatch.setattr(triton_gathered, bound, 0)
    test_gathered_rows(name)


def test_slots_are_bounded() -> None:
    """Slots take as much as two outputs, or as one head's: of 12 heads by turns a divisor."""
    few, many = (CallShape(2, 6, 6, rows, rows, 128, 128) for rows in (1024, 1 << 18))
    assert triton_gathered.heads_at_once(few, 8, 128, 2) == 12
    assert triton_gathered.heads_at_once(many, 3, 128, 2) == 4  # Room for 4 of 12 is two outputs, of bfloat16.
    assert triton_gathered.heads_at_once(many, 16, 128, 2) == 1
    assert triton_gathered.heads_at_once(CallShape(1, 4, 4, 0, 8, 16, 16), 3, 16, 2) == 0


@interprets
def test_parts_after_gathered_rows() -> None:
    """What rows did not choose, approximated, in one softmax with what they chose."""
    text = """attention a { input p : blocks(16)[b, DIM, q]
    attend causal & p, causal - p over pool(mean, 16, counted) }"""
    plan = random_plan(np.random.default_rng(2), (1, 8, 40), 3, "sorted")
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(1, heads, 40, 16, generator=generator) for heads in (8, 1, 1, 8))
    for dim, chosen in (("h", plan), ("g", plan[:, :1])):
        attn = attndsl.compile(text.replace("DIM", dim))
        here = [x.clone().requires_grad_() for x in (q, k, v)]
        there = [x.double().requires_grad_() for x in (q, k, v)]
        out, expected = attn(*here, p=chosen, backend="triton"), attn.reference(*there, p=chosen)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-5)
        found = torch.autograd.grad(out, here, dout)
        for got, want in zip(found, torch.autograd.grad(expected, there, dout.double()), strict=True):
            torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)


@interprets
def test_gathered_dropout() -> None:
    attn = attndsl.compile("attention planned { input p : blocks(16)[b, h, q]\n attend causal & p }")
    plan = random_plan(np.random.default_rng(2), (1, 2, 40), 3, "sorted")
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    out = attn(q, k, v, p=plan, dropout=0.4, seed=5, backend="triton")
    expected = attn.reference(q, k, v, p=plan, dropout=0.4, seed=5)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-5)
    dout = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(o, (q, k, v), d) for o, d in ((out, dout), (expected, dout.double())))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_rows_are_gathered() -> None:
    """Rows that choose for themselves by a list of blocks; where tiles do not fit, or it is a map, they are not."""
    program = attndsl.compile("attention planned { input p : blocks(64)[b, h, q]\n attend causal & p }").program
    spec = Spec(4, 2, 64, 64, DType.BFLOAT16, "cuda:90", lists=True)
    assert forward_plan(program, spec, Tiling(64, 64)).gathered is not None
    assert backward_plan(program, spec, Tiling(64, 64), Tiling(64, 32)).gathered is not None
    assert forward_plan(program, spec, Tiling(64, 128)).gathered is None
    assert forward_plan(program, Spec(4, 2, 64, 64, DType.BFLOAT16, "cuda:90"), Tiling(64, 64)).gathered is None


def test_inputs_that_both_read() -> None:
    """Their kernels go over the whole pattern, of which the others read lists alone."""
    text = """attention planned { input p : blocks(16)[b, g, q/16]
    input near : float[h, 9] learnable
    input kinds : float[3, 3] learnable
    score s + near[h, clamp(q - k, -4, 4) + 4] + kinds[q % 3, k % 3]
    attend causal & p }"""
    shape = CallShape(1, 2, 1, 40, 40, 16, 16)
    plan = random_plan(np.random.default_rng(5), (1, 1, 3), 3, "sorted")
    generator = torch.Generator().manual_seed(1)
    given = {"near": torch.randn(2, 9, generator=generator), "kinds": torch.randn(3, 3, generator=generator)}
    for backend in ["cpu", *(["triton"] if INTERPRETED else [])]:
        attend(text, shape, plan, backend, given)


def test_kept_kernels_know_their_lists(tmp_path: Path) -> None:
    """What is read back from the cache of printed kernels declares the same inputs."""
    program = attndsl.compile("attention planned { input p : blocks(64)[b, g, q/64]\n attend causal & p }").program
    spec = Spec(4, 2, 64, 64, DType.BFLOAT16, "cuda:90", even_start=True)
    cache = KernelCache(tmp_path)
    printers = {Backend.TRITON: forward_source}
    first, again = (printed_forward(program, spec, (Backend.TRITON,), None, printers, cache) for _ in range(2))
    assert first == again
    assert [decl.name for decl in first[0].program.inputs] == ["p", "k_tiles_p"]


def test_broadcast_plan() -> None:
    """Dimensions of size 1 stand for all heads and all rows."""
    shape = CallShape(2, 4, 2, 70, 70, 16, 16)
    for lead in ((1, 1, 5), (2, 1, 1), (1, 2, 1)):
        plan = random_plan(np.random.default_rng(1), lead, 5, "sorted")
        attend("attention planned { input p : blocks(16)[b, g, q/16]\n attend causal & p }", shape, plan, "cpu")


def test_looking_inside() -> None:
    """What is asked without a plan, with one, and on random ones."""
    attn = attndsl.compile("attention planned { input p : blocks(16)[b, g, q/16]\n attend causal & p }")
    assert "give `p`" in str(attn.explain(64))
    plan = torch.tensor([[[[0], [0], [1], [3]]]], dtype=torch.int32)
    assert "row 63: keys 48..63" in str(attn.explain(64, p=plan))
    blocks = attndsl.compile("attention planned { input p : blocks(64)[b, g, q/64]\n attend causal & p }")
    assert "the key tiles of each query tile by `p`" in str(blocks.explain(4096))
    assert "input p : blocks(64)[b, g, q/64]" in str(blocks.explain(4096))
    assert "_next = tl.load(k_tiles_p_ptr" in blocks.source()
    assert "listed_by_tile(k_tiles_p_input" in blocks.source(backend="cpu")
    assert attn.evictable(1000) == []
    trial = measure(attn, n=40, heads=2, dim=16)
    assert trial.passed


def test_nothing_chosen() -> None:
    attn = attndsl.compile("attention planned { input p : blocks(16)[b, g, q/16]\n attend causal & p }")
    q = torch.randn(1, 2, 40, 16)
    assert attn(q[:, :, :0], q, q, p=torch.zeros(1, 2, 3, 4, dtype=torch.int32)).shape == (1, 2, 0, 16)
    for plan in (torch.full((1, 2, 3, 5), -1, dtype=torch.int32), torch.zeros(1, 2, 3, 0, dtype=torch.int32)):
        out, lse = attn(q, q, q, p=plan, return_lse=True)
        assert (out == 0).all() and (lse == -torch.inf).all()


def test_entries_that_do_not_count() -> None:
    """Out of range, repeated, or not above all before them."""
    attn = attndsl.compile("attention planned { input p : blocks(2)[q/2]\n attend p }")
    plan = torch.tensor([[3, 1, 9, 2], [0, 0, 1, -1], [-5, 2, 2, 3], [9, 1, 2, 3]], dtype=torch.int32)
    chosen = [[3], [0, 1], [2, 3], []]
    mask = attn.mask(8, 8, p=plan)[0]
    expected = np.zeros((8, 8), np.bool_)
    for row, members in enumerate(chosen):
        for member in members:
            expected[2 * row : 2 * row + 2, 2 * member : 2 * member + 2] = True
    assert (mask == expected).all()


def test_tiles_are_listed() -> None:
    """A plan of blocks that tiles fit in is followed by both kernels; a chunk that starts elsewhere is masked."""
    program = attndsl.compile("attention planned { input p : blocks(64)[b, g, q/64]\n attend causal & p }").program
    spec = Spec(4, 2, 64, 64, DType.BFLOAT16, "cuda:90", even_start=True)
    plan = backward_plan(program, spec, Tiling(64, 32), Tiling(32, 64))
    assert all(run.list is not None for run in (*plan.runs.full, *plan.runs.partial, *plan.key_runs.full))
    assert plan.mask is not None and not any("chosen" in decl.name for decl in plan.inputs)
    for unlisted in (
        forward_plan(program, Spec(4, 2, 64, 64, DType.BFLOAT16, "cuda:90"), Tiling(64, 64)),
        forward_plan(program, spec, Tiling(128, 64)),
    ):
        assert all(run.list is None for run in (*unlisted.runs.full, *unlisted.runs.partial))
    assert even_start(program, CallShape(1, 1, 1, 128, 256, 8, 8))
    assert not even_start(program, CallShape(1, 1, 1, 128, 200, 8, 8))


def test_complements_are_listed() -> None:
    """Of what a plan does not choose tiles are listed too, full ones told from others; not where rows choose singly."""
    spec = Spec(4, 2, 64, 64, DType.BFLOAT16, "cuda:90", even_start=True, lists=True)

    def plan_of(dims: str) -> ForwardPlan:
        program = attndsl.compile(f"attention planned {{ input p : blocks(64)[{dims}]\n attend causal - p }}").program
        return forward_plan(program, spec, Tiling(64, 64))

    for dims in ("b, g, q/64", "b, h", "q/128"):
        plan = plan_of(dims)
        assert all(run.list is not None for run in (*plan.runs.full, *plan.runs.partial))
        assert not any("chosen" in decl.name for decl in plan.inputs)
    assert all(run.list is None for run in plan_of("b, g, q").runs.partial)


COMPLEMENTS = {
    "rows": ("b, g, q/16", 16, (50, 50), "sorted"),
    "map": ("b, h, q/32", 32, (40, 168), "map"),
    "call": ("b, g", 16, (40, 40), "list"),
    "uneven": ("q/48", 48, (100, 100), "list"),
    "far_chunk": ("b, g, q/16", 16, (20, 57), "sorted"),
}


@pytest.mark.parametrize("name", COMPLEMENTS)
def test_complements(name: str) -> None:
    dims, keys, lengths, form = COMPLEMENTS[name]
    shape = CallShape(1, 4, 2, *lengths, 16, 16)
    plan = random_plan(np.random.default_rng(5), sizes(dims, shape), -(-shape.k_len // keys), form)
    text = f"attention planned {{ input p : blocks({keys})[{dims}]\n attend causal - p }}"
    for backend in ["cpu", *(["triton"] if INTERPRETED else [])]:
        attend(text, shape, plan, backend, tiling=None)


def test_a_complement_is_masked_in_decode() -> None:
    """The list of a decode is of what is attended to."""
    attn = attndsl.compile("attention planned { input p : blocks(16)[b, g]\n attend causal - p }")
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, *size, 16, generator=generator) for size in ((4, 1), (2, 60), (2, 60)))
    plan = torch.tensor([[[0, 2], [1, -1]]], dtype=torch.int32)
    lengths = torch.tensor([60], dtype=torch.int32)
    found = attn.decode(q, k, v, lengths, p=plan)
    torch.testing.assert_close(found.double(), attn.reference(q, k, v, p=plan), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(
    "text, code",
    [
        ("input p : blocks(16)[b, k]\n attend causal & p", "A030"),
        ("input p : blocks(16)[b, 3]\n attend causal & p", "A030"),
        ("input p : tokens(4)[b]\n attend causal & p", "A030"),
        ("input p : blocks[b]\n attend causal & p", "A030"),
        ("input p : blocks(16)[b, h, g]\n attend causal & p", "A030"),
        ("input p : blocks(16)[b, q] sorted\n attend causal & p", "A030"),
        ("input p : blocks(0)[b, q]\n attend causal & p", "A012"),
        ("input p : blocks(16)[b, q]\n attend causal & p on blocks(4)", "A031"),
        ("input p : blocks(16)[b, q]\n attend causal & coarsen(p, 16, any)", "A031"),
        ("input p : blocks(16)[b, q]\n attend causal & random(2, tokens, per = rows(4), seed = 1, among = p)", "A031"),
        ("input p : blocks(16)[b, q]\n attend causal & { p == k }", "A023"),
        ("input p : blocks(16)[b, q]\n attend causal & { p[q] == k }", "A023"),
    ],
)
def test_bad_declarations(text: str, code: str) -> None:
    with pytest.raises(PatternError) as caught:
        attndsl.compile(f"attention bad {{ {text} }}")
    assert code in {d.code for d in caught.value.diagnostics}


def test_bad_plans() -> None:
    attn = attndsl.compile("attention planned { input p : blocks(16)[b, g, q/16]\n attend causal & p }")
    q = torch.randn(1, 2, 40, 16)
    for plan, code in (
        (torch.zeros(1, 2, 3, 4), "A511"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.bool), "A511"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.int32), "A513"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.uint8), "A513"),
        (torch.zeros(2, 3, 4, dtype=torch.int32), "A513"),
    ):
        with pytest.raises(PatternError) as caught:
            attn(q, q, q, p=plan)
        assert caught.value.diagnostics[0].code == code
