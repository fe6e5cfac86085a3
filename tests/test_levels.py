"""The view `levels`: each block token by token, by means of several tokens, or not at all, as its rank says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import attndsl
from attndsl.compose import compose
from attndsl.grammar import load
from attndsl.piece_plans import forward_plans
from attndsl.plan import DType, Spec
from attndsl.program import CallShape, Read, walk
from attndsl.runtime.derive import Deriver
from tests.accuracy import examples
from tests.covered import covers
from tests.test_routed import check, tensors
from tests.test_view_calls import judge
from tests.view_rules import Array, Rule, attended

PATTERNS = Path(__file__).parent.parent / "examples" / "patterns"
pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")


@covers("psa")
def test_psa_by_its_own_rule() -> None:
    """The published levels, from the blocks' ranks: scores, quantiles, forced blocks and logits written out."""
    size, stride, tokens = 8, 4, 45
    attn = attndsl.compile(PATTERNS / "psa.attn", block=size, stride=stride)
    q, k, v = (x[:1].numpy() for x in tensors(tokens, tokens, heads=2, kv_heads=1))
    blocks, groups = -(-tokens // size), -(-tokens // stride)
    padded = [np.pad(x[0], ((0, 0), (0, groups * stride - tokens), (0, 0))) for x in (q, k)]
    for h in range(2):
        logits = np.full((groups, groups), -np.inf)
        for i in range(groups):
            for j in range(i + 1):
                pairs = [(i * stride + t, j * stride + stride - 1 - t) for t in range(stride)]
                logits[i, j] = sum(padded[0][h, a] @ padded[1][0, b] for a, b in pairs) / stride / 4
        mass = np.exp(logits - logits.max(1, keepdims=True))
        mass /= mass.sum(1, keepdims=True)
        wide, level = size // stride, np.zeros((blocks, blocks), np.int64)
        for r in range(blocks):
            score = [mass[r * wide : (r + 1) * wide, m * wide : (m + 1) * wide].sum() for m in range(r + 1)]
            for rank, m in enumerate(np.argsort(-np.asarray(score), kind="stable")):
                ends = [int(np.floor(share * (r + 1) + 1e-9)) for share in (0.4, 0.5, 0.6, 0.8)]
                level[r, m] = next((f for f, end in zip((1, 2, 4, 8), ends, strict=True) if rank < end), 0)
            level[r, 0] = level[r, r] = 1
        expected, _ = attended([of_levels(level, size)], q[0, h], k[0, 0], v[0, 0])
        found = attn(*map(torch.from_numpy, (q, k, v)))[0, h]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def of_levels(level: NDArray[np.int64], size: int) -> Rule:
    """Of a row the tokens, or the means, of each block that it sees; an entry is seen as a whole."""

    def rule(q: int, k: Array, v: Array) -> Iterator[tuple[Array, Array, float]]:
        for m, factor in enumerate(level[q // size]):
            for first in range(m * size, min((m + 1) * size, len(k)), max(1, factor)):
                if factor and first + factor - 1 <= q:
                    present = slice(first, first + factor)
                    count = len(k[present])
                    yield k[present].mean(0), v[present].mean(0), float(np.log(count))

    return rule


# -------------------------------------------------------------------------------------- composed

RULES = (
    "levels((1, 2, 4), blocks(8), quantiles = (0.3, 0.5, 0.8), {})",
    "levels((1, 8), blocks(8), masses = (0.417, 0.913), {})",
    "levels((2, 4), blocks(4), quantiles = (0.5, 0.7), {})",
    "levels((1, 3, 1), blocks(6), quantiles = (0.2, 0.5, 1.0), {})",
    "levels((4, 2, 1), blocks(8), masses = (0.217, 0.413, 0.619), {})",
)
PATTERN = (
    "causal",
    "all",
    "causal & window(19)",
    "{ (q + k) % 3 > 0 }",
    "causal - same_block(4)",
    "causal & dilated(2)",
)
CLAUSES = ("", "softmax with sink 0.5", "score softcap(s, 2.0)", "scale 0.3")


@st.composite
def programs(draw: st.DrawFn) -> str:
    def pick(*words: str) -> str:
        return draw(st.sampled_from(words))

    per = pick("rows(4)", "rows(8)", "head")
    scores = ["dot(mean(Q), mean(K))", "bound(max(Q), min(K), max(K))", "0.125 * ((q * 7 + k * 13) % 11)"]
    options = [f"per = {per}", f"share = {pick('none', 'group', 'heads')}", f"by = {pick(*scores)}"]
    if always := pick("", "sink(2)", "same_block(4)", "sink(1) | same_block(8)"):
        options += [f"always = {always}", f"forced = {pick('counted', 'extra', 'overlay')}"]
    pattern, rule = pick(*PATTERN), pick(*RULES)
    clauses = pick(*CLAUSES)
    if draw(st.booleans()):
        made = rule.format(", ".join([*options, f"among = {pick(*PATTERN)}"]))
        return f"attention a {{ plan lv = {made} {clauses} attend {pattern} over lv }}"
    return f"attention a {{ {clauses} attend {pattern} over {rule.format(', '.join(options))} }}"


@examples(20)
@given(programs(), st.integers(1, 30), st.integers(0, 99))
def test_random_programs(text: str, k_len: int, seed: int) -> None:
    rows = seed % k_len + 1 if seed % 3 else k_len
    check(text, *tensors(rows, k_len, seed=seed))


SHARED = "per = rows(8), among = causal, by = dot(mean(Q), mean(K)), share = group"


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (f"plan lv = {RULES[0].format(SHARED)}\nattend causal over lv", (2, 4, 2, 37, 37, 16, 16)),
        (f"softmax with sink 0.5 attend all over {RULES[2].format(SHARED)}", (1, 2, 1, 5, 41, 80, 24)),
        (
            f"plan lv = {RULES[1].format(SHARED)}\nattend causal over lv, causal over pool(max, 8)",
            (1, 1, 1, 1, 1, 16, 16),
        ),
    ],
)
def test_triton(body: str, shape: tuple[int, ...]) -> None:
    judge(attndsl.compile(f"attention a {{ {body} }}"), shape, torch.float32, "triton")


@pytest.mark.parametrize(("rows", "k_len"), [(1, 1), (0, 5), (3, 0), (7, 3), (1, 65)])
def test_degenerate_calls(rows: int, k_len: int) -> None:
    check(f"attention a {{ plan lv = {RULES[0].format(SHARED)} attend causal over lv }}", *tensors(rows, k_len))


def test_left_out_among_is_what_is_attended() -> None:
    program = load(
        f"attention a {{ attend causal over {RULES[0].format('per = rows(8), by = dot(mean(Q), mean(K))')} }}"
    )
    assert program.program.selections[0].among == load("causal").program.branch.pattern


LARGE = (
    "plan lv = levels((1, 2, 4), blocks({n}), quantiles = (0.3, 0.5, 0.8), per = rows({n}), among = causal, "
    "by = dot(mean(Q), mean(K)), share = {share}, always = same_block({n})) attend causal over lv"
)


@pytest.mark.parametrize(
    ("n", "share", "shape", "backend"),
    [
        (32, "none", (1, 2, 1, 64, 100, 16, 16), "triton"),
        (64, "group", (1, 2, 1, 128, 192, 16, 16), "triton"),
        (64, "heads", (2, 2, 1, 50, 300, 16, 16), "cpu"),
        (128, "group", (1, 4, 2, 300, 300, 16, 16), "cpu"),
    ],
)
def test_tiles_of_entries_are_listed(n: int, share: str, shape: tuple[int, ...], backend: str) -> None:
    """Of each factor's entries the tiles are visited that the plan gives it: those of kernels lie inside blocks."""
    attn = attndsl.compile(f"attention a {{ {LARGE.format(n=n, share=share)} }}")
    judge(attn, shape, torch.float32 if backend == "triton" else torch.float64, backend)


def test_a_list_holds_what_the_plan_gives_its_factor() -> None:
    program = compose(load(f"attention a {{ {LARGE.format(n=64, share='none')} }}").program).programs[0]
    spec = Spec(2, 1, 16, 16, DType.FLOAT32, "cuda:90", even_start=True)
    plans = forward_plans(program, spec)
    assert [p.view.stride if p.view else 1 for p in plans] == [1, 2, 4]
    shape, draw = CallShape(1, 2, 1, 256, 256, 16, 16), np.random.default_rng(0)
    level = torch.from_numpy(draw.choice([0, 1, 2, 4], (1, 2, 4, 4)).astype(np.uint8))
    for factor, plan in zip((1, 2, 4), plans, strict=True):
        runs = (*plan.runs.full, *plan.runs.partial)
        assert runs and all(run.list is not None for run in runs)
        block = plan.tiling.block_k * factor
        given = [level if d.members else torch.empty(0) for d in plan.program.inputs if d.derivation is None]
        deriver = Deriver(plan.program, shape, torch.device("cpu"), given=given)
        found = dict(zip((d.name for d in plan.program.inputs if d.derivation), deriver(given, []), strict=True))
        (name,) = {x.input for run in runs if run.list is not None for x in walk(run.list) if isinstance(x, Read)}
        q_tiles = 256 // plan.tiling.block_q
        for h in range(2):
            listed = found[name][0, h]
            for q_tile, (begin, _, end) in enumerate(listed[: 3 * q_tiles].view(-1, 3).tolist()):
                row = q_tile * plan.tiling.block_q // 64
                visited = {t * block // 64 for t in listed[begin:end].tolist()}
                assert visited == {m for m in range(row + 1) if level[0, h, row, m] == factor}


def test_levels_are_injected_and_reused() -> None:
    text = f"attention a {{ plan lv = {RULES[0].format(SHARED)} attend causal over lv }}"
    attn = attndsl.compile(text)
    q, k, v = tensors(40, 40)
    plans = attn.plan(q, k)
    assert plans["lv"].dtype == torch.uint8
    assert plans["lv"].shape == (2, 2, 5, 5)
    assert torch.equal(attn(q, k, v, plans=plans), attn(q, k, v))
    # Token by token everywhere is dense; nothing is nothing; a factor of no level too.
    dense = attndsl.compile("causal").reference(q, k, v)
    torch.testing.assert_close(attn(q, k, v, plans={"lv": torch.ones_like(plans["lv"])}), dense, atol=1e-10, rtol=1e-10)
    for factor in (0, 3, 255):
        out, lse = attn(q, k, v, plans={"lv": torch.full((2, 1, 1, 5), factor, dtype=torch.uint8)}, return_lse=True)
        assert not out.any()
        assert bool((lse == -torch.inf).all())
    mixed = {"lv": torch.tensor([4, 2, 1, 0, 1], dtype=torch.uint8).expand(2, 2, 5, 5)}
    expected = attn.reference(q, k, v, plans=mixed)
    torch.testing.assert_close(attn(q, k, v, plans=mixed), expected, atol=1e-10, rtol=1e-10)


def test_a_plan_of_levels_is_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    attn = attndsl.compile(f"attention a {{ plan lv = {RULES[0].format(SHARED)} attend causal over lv }}")
    q, k, v = tensors(40, 40)
    with pytest.raises(attndsl.PatternError, match="A573"):
        attn(q, k, v, plans={"lv": torch.zeros(2, 2, 5, 2, dtype=torch.int32)})
    monkeypatch.setenv("ATTNDSL_DEBUG", "1")
    attn(q, k, v, plans={"lv": torch.full((2, 2, 5, 5), 4, dtype=torch.uint8)})
    with pytest.raises(attndsl.PatternError, match="A574"):
        attn(q, k, v, plans={"lv": torch.full((2, 2, 5, 5), 3, dtype=torch.uint8)})


@pytest.mark.parametrize(("backend", "given"), [("cpu", False), ("cpu", True), ("triton", True)])
def test_decode_gives_each_block_its_factor(backend: str, given: bool) -> None:
    """Sequences of their own lengths, choosing for themselves or within a plan that is handed in."""
    options = "per = head, among = causal, by = dot(mean(Q), mean(K)), share = group"
    attn = attndsl.compile(f"attention a {{ plan lv = {RULES[0].format(options)} attend causal over lv }}")
    q, k, v = (x.float() for x in tensors(1, 32, heads=2, kv_heads=1))
    plans = {"lv": torch.tensor([4, 2, 0, 1], dtype=torch.uint8).expand(2, 1, 1, 4).contiguous()}
    lengths = torch.tensor([27, 32], dtype=torch.int32)
    out = attn.decode(q, k, v, lengths, plans=plans if given else None, backend=backend)
    for b, n in enumerate(lengths.tolist()):
        own = {"lv": plans["lv"][b : b + 1, ..., : -(-n // 8)]} if given else None
        at = slice(b, b + 1)
        expected = attn.reference(q[at], k[at, :, :n], v[at, :, :n], plans=own)
        torch.testing.assert_close(out[at].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_compiled_step() -> None:
    attn = attndsl.compile(f"attention a {{ plan lv = {RULES[0].format(SHARED)} attend causal over lv }}")
    q, k, v = (x.float() for x in tensors(21, 21))
    compiled = torch.compile(lambda *x: attn(*x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attn(q, k, v))
