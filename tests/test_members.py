"""Selections over members that are no blocks in a row: tiles of a grid, permuted blocks, segments, diagonals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attndsl
from attndsl.api import load_attention
from attndsl.capacity import lags_of
from attndsl.compose import compose
from attndsl.derive import derive, own_inputs
from attndsl.grammar import load
from attndsl.mapping import maps_call
from attndsl.plan import Tiling, forward_plan
from attndsl.program import CallShape, Program
from attndsl.runtime import select_op
from attndsl.runtime.derive import Deriver
from attndsl.runtime.groups import Groups
from attndsl.runtime.select import Selector
from attndsl.selection import Pool
from attndsl.targets import make_spec
from tests import test_routed, test_select
from tests.accuracy import examples
from tests.gpu import interprets
from tests.gradients import TOLERANCE
from tests.test_routed import tensors
from tests.test_select import CPU

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")

GRIDS = (
    "axes t, y[4], x[6]",
    "axes t[3], y[4], x[6] from 5",
    "axes t, y[4], x[6] in tiles(2, 2, 3)",
    "axes t[4], y[4], x[6] from 3 in tiles(2, 2, 3)",
)
TILES = ("tiles(1, 2, 3)", "tiles(2, 2, 3)", "tiles(2, 3, 4)", "tiles(1, 4, 6)")
DATA = {
    "blocks(4) on permuted(pi)": "input pi : int[b, h, k]",
    "blocks(3) on permuted(po)": "input po : int[k]",
    "tokens on permuted(po)": "input po : int[k]",
    "tiles(2, 2, 3) on permuted(pi)": f"input pi : int[b, h, k] {GRIDS[3]}",
    "tiles(1, 2, 3) on permuted(po)": f"input po : int[k] {GRIDS[0]}",
    "segments(c)": "input c : int[b, k]",
    "segments(cg)": "input cg : int[b, g, k] sorted",
    "segments(c) on permuted(pi)": "input c : int[b, k] input pi : int[b, h, k]",
    "segments(cg) on permuted(po)": "input cg : int[b, g, k] sorted input po : int[k]",
}


def data(text: str, shape: CallShape, seed: int, wild: bool = False) -> dict[str, Any]:
    """The inputs that a text declares: permutations (or anything), and ids in runs."""
    draw, n = np.random.default_rng(seed), shape.k_len
    sizes = {"pi": (shape.batch, shape.heads, n), "po": (n,), "c": (shape.batch, n),
             "cg": (shape.batch, shape.kv_heads, n)}  # fmt: skip
    found: dict[str, Any] = {}
    for name, size in sizes.items():
        if f"input {name} :" in text:
            if name.startswith("p"):
                values = np.argsort(draw.random(size), -1)
                values = draw.integers(-4, n + 4, size) if wild else values
            else:
                values = np.cumsum(draw.random(size) < 0.3, -1)
                values = values if name == "cg" else values % 3
            found[name] = torch.from_numpy(values)
    return found


@st.composite
def selections(draw: st.DrawFn) -> tuple[str, str]:
    """A selection over members of each kind, and what it stands with: a grid, or inputs."""

    def pick(*words: Any) -> Any:
        return draw(st.sampled_from(words))

    grid = draw(st.booleans())
    clauses = pick(*GRIDS) if grid else ""
    of = pick(*TILES, "blocks(4)") if grid else pick(*DATA)
    per = pick("query", "rows(8)", "head", *(("tiles(2, 2, 3)", "tiles(1, 3, 2)") if grid else ()))
    of = of if of != "blocks(4)" or per.startswith("tiles") else "tiles(2, 3, 4)"
    clauses = clauses if grid else DATA[of]
    x = "Q" if per == "query" else f"{pick('mean', 'max', 'min')}(Q)"
    y = pick("mean", "max", "min", "first", "last", "sum")
    score = pick(f"dot({x}, {y}(K))", f"bound({x}, min(K), max(K))", "0.125 * ((q * 7 + k * 13) % 11)")
    function = pick("top", "top", "cover", "above")
    first = {"top": pick("1", "3", "fraction(0.3)"), "cover": "0.617", "above": "0.2137"}[function]
    among = pick("causal", "all", "causal & window(17)", "{ (q + k) % 3 > 0 }")
    options = [f"of = {of}", f"per = {per}", f"share = {pick('none', 'group', 'heads')}", f"among = {among}"]
    options.append(f"by = {score}")
    if always := pick("", "sink(2)", "window(3)"):
        options += [f"always = {always}", f"forced = {pick('counted', 'extra', 'overlay')}"]
    if function != "top" and per == "query":
        options.append("at_most = 2")
    return f"{function}({first}, {', '.join(options)})", clauses


@st.composite
def shapes(draw: st.DrawFn) -> CallShape:
    kv_heads, k_len = draw(st.sampled_from([1, 2])), draw(st.integers(1, 55))
    rows = draw(st.one_of(st.just(k_len), st.integers(1, k_len)))
    return CallShape(
        draw(st.sampled_from([1, 2])), kv_heads * draw(st.sampled_from([1, 2])), kv_heads, rows, k_len, 8, 8
    )


@examples(60)
@given(selections(), shapes(), st.integers(0, 999), st.booleans())
def test_plans_are_the_oracles(made: tuple[str, str], shape: CallShape, seed: int, wild: bool) -> None:
    text, clauses = made
    program = test_select.program_of(text, clauses=clauses)
    test_select.check(program, shape, seed, **data(clauses, shape, seed, wild))


@examples(20)
@given(selections(), st.sampled_from(test_routed.PATTERNS), st.integers(1, 40), st.integers(0, 99))
def test_attended(made: tuple[str, str], pattern: str, k_len: int, seed: int) -> None:
    """Output, lse and gradients."""
    (text, clauses), rows = made, seed % k_len + 1 if seed % 3 else k_len
    q, k, v = tensors(rows, k_len, seed=seed)
    inputs = data(clauses, CallShape(2, 4, 2, rows, k_len, 16, 16), seed)
    test_routed.check(f"attention a {{ {clauses} attend {pattern.format(text)} }}", q, k, v, **inputs)


PROBE = "probe = attend causal & { q >= Nk - 8 }"
SLASH = f"""
attention vertical_slash(columns = 5, slashes = 6) {{
    {PROBE}
    out = attend causal & (top(columns, tokens, per = head, among = causal, by = probs(probe), always = sink(3))
                         | top(slashes, diagonals(1), per = head, among = causal, by = probs(probe),
                               always = window(2)))
    output out
}}
"""
SLASHES = f"attention a {{{{ {PROBE.replace('{', '{{').replace('}', '}}')} y = attend {{}} output y }}}}"
BY_PROBS = (
    f"{PROBE} y = attend causal & top(3, diagonals(4), per = head, among = causal, by = probs(probe, max)) output y",
    f"{PROBE} y = attend top(3, diagonals(2), per = head, among = all, share = group, by = probs(probe)) output y",
    f"axes t, x[6] {PROBE} y = attend causal & top(2, tiles(2, 3), per = rows(8), by = probs(probe)) output y",
    f"axes t, x[6] {PROBE} y = attend causal & top(2, tiles(2, 3), per = tiles(2, 2), by = probs(probe, max)) output y",
    "input c : int[b, k] x = attend causal over pool(mean, 4, 2) "
    "y = attend causal & cover(0.7, segments(c), per = head, by = probs(x)) output x + y",
    "input pi : int[b, h, k] x = attend causal over pool(mean, 8, counted) "
    "y = attend causal & top(2, blocks(4) on permuted(pi), per = rows(4), by = probs(x)) output x + y",
    "input c : int[b, k] x = attend causal over pool(mean, 4, 2) "
    "y = attend causal & top(2, segments(c), per = rows(4), by = probs(x, max)) output x + y",
    "input po : int[k] x = attend causal over pool(mean, 4, visible = any) "
    "y = attend causal & top(3, tokens on permuted(po), per = rows(8), by = probs(x, max)) output x + y",
    "axes t, x[6] p = attend causal over pool(mean, 5) "
    "y = attend causal & cover(0.6, tiles(2, 3), per = tiles(2, 2), by = probs(p, max)) output y",
    "x = attend causal over pool(mean, 4) "
    "y = attend causal & top(3, diagonals(3), per = head, among = causal, by = probs(x)) output x + y",
    *(
        f"x = attend causal over pool(mean, 6, 4) {{ softmax with sink 0.5 }} y = attend causal & {chosen} output x + y"
        for chosen in (
            "top(2, diagonals(3), per = head, among = causal, by = probs(x, max))",
            "top(2, diagonals(4), among = causal, by = probs(x, max))",
            "top(3, diagonals(1), per = rows(8), among = { (q + k) % 3 > 0 }, by = probs(x), always = window(2))",
            "cover(0.7, diagonals(2), per = rows(16), among = window(19), by = probs(x), share = group)",
            "above(0.1, diagonals(5), per = rows(3), among = all, by = probs(x), at_most = 2)",
        )
    ),
    f"axes t, x[6] {PROBE} y = attend causal & top(2, diagonals(3), per = tiles(2, 2), by = probs(probe)) output y",
    f"{PROBE} y = attend causal & top(4, diagonals(1), share = heads, by = probs(probe)) output y",
    "align start x = attend all y = attend top(2, diagonals(4), per = rows(8), among = all, by = probs(x)) output y",
    "align start x = attend all y = attend causal & top(3, diagonals(3), per = head, by = probs(x)) output x + y",
    "align start x = attend all over pool(mean, 4) y = attend top(2, diagonals(2), among = all, by = probs(x, max)) "
    "output x + y",
)


@pytest.mark.parametrize("body", BY_PROBS)
def test_by_the_probabilities_of_a_branch(body: str) -> None:
    attn = attndsl.compile(f"attention a {{ {body} }}")
    for rows, k_len in ((30, 30), (5, 29), (1, 1), *([(30, 11)] if "align start" in body else [])):
        q, k, v = tensors(rows, k_len)
        inputs = data(body, CallShape(2, 4, 2, rows, k_len, 16, 16), k_len)
        expected = attn.reference(q, k, v, **inputs)
        torch.testing.assert_close(attn(q, k, v, **inputs), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("rows", "k_len"), [(40, 40), (11, 40), (1, 1), (3, 9)])
def test_vertical_slash(rows: int, k_len: int) -> None:
    """MInference: columns and diagonals by what the last queries attend to, all rows alike."""
    attn = attndsl.compile(SLASH)
    q, k, v = tensors(rows, k_len)
    torch.testing.assert_close(attn(q, k, v), attn.reference(q, k, v), atol=1e-10, rtol=1e-10)
    plans, positions = attn.plan(q, k), np.arange(k_len - rows, k_len)
    for h in range(4):
        logits = q[0, h].numpy() @ k[0, h // 2].numpy().T / 4
        seen = (np.arange(k_len) <= positions[:, None]) & (positions[:, None] >= k_len - 8)
        mass = np.where(seen, np.exp(logits), 0)
        mass /= np.maximum(mass.sum(1, keepdims=True), 1e-300)
        lags = np.zeros(k_len)
        for i, j in zip(*np.nonzero(seen), strict=True):
            lags[positions[i] - j] += mass[i, j]
        for name, score, forced in (("top", mass.sum(0), range(3)), ("top_2", lags, range(2))):
            kept = [m for m in forced if m < k_len]
            rest = [m for m in np.argsort(-score, kind="stable") if m not in kept]
            wanted = sorted([*kept, *rest][: {"top": 5, "top_2": 6}[name]])
            plan = plans[name][0, h, 0]
            assert plan[plan >= 0].tolist() == wanted


def test_a_probe_looks_at_its_own_rows_alone() -> None:
    """Rows that the branch lets see nothing are not scored, however many there are."""
    program = load(SLASH).program
    shape = CallShape(1, 32, 8, 1 << 17, 1 << 17, 128, 128)
    for selection in program.selections:
        assert Selector(program, selection, shape, torch.device("meta")).seeing == ((1 << 17) - 8, 1 << 17)


@pytest.mark.parametrize(
    "among", ["causal", "all", "window(9)", "causal & dilated(3)", "sink(2) | band(3, 5)", "{ h < 2 and q - k > 4 }",
              "causal & { q < Nk // 2 }", "{ k > q }"],
)  # fmt: skip
@pytest.mark.parametrize("per", ["head", "query", "rows(4)"])
def test_diagonals_in_closed_form(among: str, per: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the integer sets say of them is what all pairs show."""
    text = f"{PROBE} plan p = top(99, diagonals(2), per = {per}, among = {among}, by = probs(probe)) output probe"
    program = load(f"attention a {{ {text} }}").program
    (of,) = program.selections
    assert lags_of(derive(Program.of("a", of.among)), (4, 2), 2, of.rows) is not None
    found = []
    for _ in range(2):
        attn = attndsl.compile(f"attention a {{ {text} }}")
        found.append([attn.plan(*tensors(rows, k_len)[:2])["p"] for rows, k_len in ((37, 37), (5, 30), (1, 1))])
        monkeypatch.setattr("attndsl.runtime.strips.lags_of", lambda *_: None)
        select_op._KEPT.clear()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("attention a { axes y, x[8] attend top(2, tiles(2, 4), per = tiles(2, 4), among = all, by = dot(mean(Q), "
         "mean(K))) }", (1, 2, 1, 44, 44, 16, 16)),
        ("attention a { input pi : int[b, h, k] attend causal & same_block(8) | causal & top(2, blocks(4) on "
         "permuted(pi), per = rows(16), among = causal - same_block(8), by = dot(mean(Q), mean(K))) }",
         (2, 4, 2, 20, 36, 16, 16)),
        ("attention a { input c : int[b, k] attend causal & cover(0.5, segments(c), per = rows(8), "
         "by = dot(mean(Q), max(K))) }", (1, 2, 2, 19, 19, 16, 16)),
        ("attention a { input c : int[b, k] input po : int[k] attend causal & top(2, segments(c) on permuted(po), "
         "per = rows(16), by = dot(mean(Q), mean(K))) }", (1, 2, 1, 20, 36, 16, 16)),
        (SLASH, (1, 2, 1, 33, 33, 16, 16)),
        (SLASHES.format("causal & top(3, diagonals(1), share = heads, by = probs(probe))"), (1, 2, 1, 33, 33, 16, 16)),
        (SLASHES.format("causal & top(3, diagonals(4), per = rows(16), by = probs(probe))"), (1, 2, 1, 20, 40, 16, 16)),
        (SLASHES.format("causal & top(2, diagonals(3), by = probs(probe))").replace("{", "{ align start", 1),
         (1, 2, 1, 40, 17, 16, 16)),
    ],
)  # fmt: skip
def test_triton(text: str, shape: tuple[int, ...]) -> None:
    batch, heads, kv_heads, rows, k_len, dim, _ = shape
    call = CallShape(batch, heads, kv_heads, rows, k_len, dim, dim)
    generator = torch.Generator().manual_seed(1)
    sizes = ((heads, rows), (kv_heads, k_len), (kv_heads, k_len))
    qkv = [torch.randn(batch, *n, dim, generator=generator) for n in sizes]
    attn, inputs = attndsl.compile(text), data(text, call, 3)
    here, right = [x.requires_grad_() for x in qkv], [x.detach().double().requires_grad_() for x in qkv]
    found, expected = attn(*here, backend="triton", **inputs), attn.reference(*right, **inputs)
    tolerance = TOLERANCE[torch.float32]
    torch.testing.assert_close(found.double(), expected, atol=10 * tolerance, rtol=10 * tolerance)
    found.sum().backward()
    expected.sum().backward()
    for x, y in zip(here, right, strict=True):
        assert x.grad is not None and y.grad is not None
        assert float((x.grad.double() - y.grad).abs().max()) <= 5 * tolerance * max(1.0, float(y.grad.abs().max()))


@interprets
@pytest.mark.parametrize("pool", [Pool.MEAN, Pool.SUM, Pool.MAX, Pool.MIN])
@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (70, 9), (70, 70), (5, 9)])
def test_members_pooled_by_the_kernel_of_views(pool: Pool, tokens: int, count: int) -> None:
    """As torch pools them; members without keys, and keys without a member, among them."""
    key = load_attention("attention a { attend causal over pool(mean, 4) }")._key
    x = torch.randn(2, 3, tokens, 10)
    groups = Groups.labelled(torch.randint(0, count + 1, (2, 1, tokens)), count)
    found, wanted = groups.pooled(x, pool, key, "triton"), groups.pooled(x, pool)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5, equal_nan=True)
    assert found.isnan().any() == (groups.sizes == 0).any()


def test_tiles_in_whose_order_tokens_run_are_blocks() -> None:
    """Their plans list blocks, whose tiles kernels visit."""
    text = (
        "attention a {{ axes t, y[8], x[8] in tiles(4, 4, 4) attend top(2, {}, per = {}, by = dot(mean(Q), mean(K))) }}"
    )
    tiled, blocks = (load(text.format(*x)).program for x in (("tiles(4, 4, 4)",) * 2, ("blocks(64)", "rows(64)")))
    assert tiled.branch.pattern == blocks.branch.pattern
    assert tiled.selections[0].members is None


def test_tiles_are_a_place() -> None:
    """`P on tiles(a, b)` is P of the tiles along each axis."""
    grid = "axes t, y[8], x[8] from 2"
    whole = f"attention a {{ {grid} attend neighborhood(3) on tiles(1, 2, 4) }}"
    axes = "neighborhood(3) on t & neighborhood(3) on blocks(2) on y & neighborhood(3) on blocks(4) on x"
    q, k, v = tensors(150, 150)
    expected = attndsl.compile(f"attention a {{ {grid} attend {axes} }}").reference(q, k, v)
    torch.testing.assert_close(attndsl.compile(whole)(q, k, v), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(attndsl.compile(whole).reference(q, k, v), expected, atol=1e-10, rtol=1e-10)


def test_what_lies_off_the_grid_is_of_no_tile() -> None:
    chosen = "top(9, tiles(2, 2), among = all, by = dot(Q, mean(K)))"
    text = f"attention a {{ axes y[4], x[4] from 3 attend {chosen} | off_grid }}"
    q, k, v = tensors(30, 30)
    attn = attndsl.compile(text)
    assert attn.plan(q, k)["top"].shape == (2, 4, 30, 9)
    torch.testing.assert_close(attn(q, k, v), attn.reference(q, k, v), atol=1e-10, rtol=1e-10)
    # All four tiles are chosen by rows on the grid, whatever is asked for; off it, all keys are seen.
    dense = attndsl.compile("all").reference(q, k, v)
    torch.testing.assert_close(attn(q, k, v)[:, :, :3], dense[:, :, :3], atol=1e-10, rtol=1e-10)
    assert attn.plan(q, k)["top"][0, 0, 5].tolist() == [0, 1, 2, 3] + [-1] * 5
    assert attn.plan(q, k)["top"][0, 0, 2].tolist() == [-1] * 9


@pytest.mark.parametrize(
    "body", [SLASH, "attention a { axes y, x[8] attend top(2, tiles(2, 4), by = dot(Q, mean(K))) }"]
)
def test_a_compiled_step(body: str) -> None:
    attn = attndsl.compile(body)
    q, k, v = (x.float() for x in tensors(21, 21))
    compiled = torch.compile(lambda *x: attn(*x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attn(q, k, v))


SEGMENT = "input c : int[b, k] attend causal & top(2, segments(c), by = dot(Q, mean(K)){})"
TILE = "axes t, x[4] attend causal & top(2, tiles(2, 2), by = dot(Q, mean(K)){})"
STABLE = (
    SEGMENT.format(", always = {{ q == k }}"),
    SEGMENT.format(", always = window(3), forced = extra"),
    TILE.format(", always = { q // 8 == k // 8 }"),
    "axes t, x[4] attend causal & top(2, tiles(1, 1), by = dot(Q, mean(K)), share = heads)",
    "input pi : int[k] attend top(2, blocks(4) on permuted(pi), by = dot(Q, mean(K)))",
)
UNSTABLE = (
    SEGMENT.format(""),
    SEGMENT.format(", always = sink(2)"),
    TILE.format(""),
    TILE.format(", always = { q == k }"),
    "input pi : int[k] attend causal & top(2, blocks(4) on permuted(pi), by = dot(Q, mean(K)), always = { q == k })",
)


@pytest.mark.parametrize(("body", "stable"), [*((x, True) for x in STABLE), *((x, False) for x in UNSTABLE)])
def test_the_stability_warning(body: str, stable: bool) -> None:
    """By the definition: with the warning some row's choice changes with keys after it, without it none does."""
    attn = load_attention(f"attention a {{ {body.replace('{{', '{').replace('}}', '}')} }}")
    assert [w.code for w in attn.warnings if w.code == "W305"] == ([] if stable else ["W305"])
    if "causal" not in body:
        return
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {}
    if "input c" in body:
        inputs["c"] = torch.arange(24).expand(1, -1) // 5
    if "input pi" in body:
        inputs["pi"] = torch.randperm(24, generator=generator)
    moved = False
    for _ in range(40):
        q, k = 3 * torch.randn(1, 4, 24, 8, generator=generator), torch.randn(1, 1, 24, 8, generator=generator)
        other = torch.cat((k[:, :, :14], 3 * torch.randn(1, 1, 10, 8, generator=generator)), 2)
        before, after = (next(iter(attn.plan(q, x, **inputs).values()))[:, :, :14] for x in (k, other))
        moved = moved or bool((before != after).any())
    assert moved != stable


@pytest.mark.parametrize(
    ("text", "inputs"),
    [
        ("attention a { input c : int[b, k]\n plan p = top(1, segments(c), per = rows(64), by = dot(mean(Q), mean(K)), "
         "among = all)\n attend p }", {"c": torch.arange(500)[None] // 128}),
        ("attention a { input pi : int[k]\n plan p = top(1, blocks(64) on permuted(pi), per = rows(64), by = "
         "dot(mean(Q), mean(K)), among = all)\n attend p }", {"pi": torch.arange(500).flip(0)}),
        ("attention a { axes t, y[8], x[16]\n plan p = top(1, tiles(1, 4, 16), per = tiles(1, 4, 16), by = "
         "dot(mean(Q), mean(K)), among = all)\n attend p }", {}),
        ("attention a { plan p = top(1, blocks(64), per = rows(64), by = dot(mean(Q), mean(K)), among = all)\n"
         " attend p | window(9) & causal }", {}),
        ("attention a { input near : bool[k]\n attend causal & { near[q - k] } }", {"near": torch.arange(500) < 130}),
    ],
    ids=["segments", "permuted", "tiles", "blocks or a window", "diagonals"],
)  # fmt: skip
def test_only_tiles_that_hold_something_are_visited(text: str, inputs: dict[str, Any]) -> None:
    """Where members are whole in tiles, the map of tiles is exact; the last tile of keys is never called full here."""
    attn = attndsl.compile(text)
    q, k, _ = tensors(500, 500, 2, 1)
    given = inputs | attn.plan(q[:1], k[:1], **inputs)
    allowed = attn.mask(500, 500, heads=2, kv_heads=1, **{name: x.numpy() for name, x in given.items()})
    shape = CallShape(1, 2, 1, 500, 500, 16, 16)
    ((_, own),) = compose(attn.program).branches
    assert maps_call(own, shape)
    plan = forward_plan(derive(own), replace(make_spec("sm_90", "triton", 2, 1, 16), maps=True), Tiling(64, 64))
    values = [given[decl.name] for decl in own_inputs(plan.program)]
    made = Deriver(plan.program, shape, CPU, given=values)(values, [])
    names = [decl.name for decl in plan.program.inputs if decl.derivation is not None]
    tiles = next(x for name, x in zip(names, made, strict=True) if name.startswith("map_")).view(-1, 8, 8)
    ragged = np.pad(allowed, ((0, 0), (0, 12), (0, 12))).reshape(2, 8, 64, 8, 64)
    whole = np.pad(allowed, ((0, 0), (0, 12), (0, 0)), constant_values=True)
    whole = np.pad(whole, ((0, 0), (0, 0), (0, 12))).reshape(2, 8, 64, 8, 64)
    exact = ragged.any(axis=(2, 4)).astype(int) + whole.all(axis=(2, 4))
    assert (tiles.numpy() == exact).all()
    assert 0 < (exact > 0).sum() < exact.size
