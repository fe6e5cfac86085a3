"""`random`, `on segment(...)` and `coarsen` of data: what they mean, and how a call computes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from attndsl import effort
from attndsl.api import load_attention
from attndsl.derivation import Random
from attndsl.derive import derive
from attndsl.diagnostics import PatternError
from attndsl.grammar import load
from attndsl.oracle import mask, splitmix64
from attndsl.plan import Tiling, backward_plan, forward_plan
from attndsl.program import CallShape, Inter, Program, Set, Union
from attndsl.runtime import derive as runtime
from attndsl.runtime.derive import Deriver
from attndsl.runtime.strip_blocks import block_sums
from attndsl.runtime.values import mix64, ordered
from attndsl.targets import make_spec
from tests.accuracy import check
from tests.cases import CASES
from tests.derived import derived

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORD = (1 << 64) - 1


def call(n: int, rows: int | None = None, batch: int = 1, heads: int = 1) -> CallShape:
    return CallShape(batch, heads, heads, n if rows is None else rows, n, 8, 8)


# ---------------------------------------------------------------------------------------- meaning


def mixed(state: int) -> int:
    """SplitMix64's output in a state, in Python's own integers."""
    z = (state + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def test_the_hash_is_splitmix64() -> None:
    # The first outputs of the published generator from state 1234567.
    states = [(1234567 + i * 0x9E3779B97F4A7C15) & WORD for i in range(3)]
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mixed(s) for s in states] == published
    assert splitmix64(np.array(states, np.uint64)).tolist() == published
    as_bits = torch.from_numpy(np.array(states, np.uint64).view(np.int64))
    found = mix64(as_bits, torch.tensor(0))
    assert found.numpy().view(np.uint64).tolist() == published
    order = ordered(found).argsort().tolist()
    assert order == sorted(range(3), key=lambda i: published[i])


def drawn(n: int, keys: int, rows: int, seed: int, h: int, among: Any) -> Any:
    """`random` by its definition, with Python's own integers: bool like `among` [Nq, Nk]."""
    found = np.zeros_like(among)
    for r in range(-(-among.shape[0] // rows)):
        part = among[r * rows : (r + 1) * rows]
        members = [m for m in range(-(-among.shape[1] // keys)) if part[:, m * keys : (m + 1) * keys].any()]
        state = mixed(mixed(mixed(seed & WORD) ^ h) ^ r)
        for m in sorted(members, key=lambda m: (mixed(state ^ m), m))[:n]:
            found[r * rows : (r + 1) * rows, m * keys : (m + 1) * keys] = True
    return found & among


@pytest.mark.parametrize(("of", "keys"), [("tokens", 1), ("blocks(5)", 5)])
@pytest.mark.parametrize(("per", "rows"), [("query", 1), ("rows(4)", 4), ("head", 37)])
def test_random_is_its_definition(of: str, keys: int, per: str, rows: int) -> None:
    causal = np.tri(37, dtype=np.bool_)
    for n, seed in ((1, 0), (3, -7), (100, 5)):
        program = load(f"causal & random({n}, {of}, {per}, {seed} + h - h)".replace("+ -", "- ")).program
        found = mask(program, call(37, heads=2))[0]
        for h in range(2):
            np.testing.assert_array_equal(found[h], drawn(n, keys, rows, seed, h, causal))


def test_rows_of_a_call_are_the_same_rows_of_the_whole() -> None:
    for of in ("tokens", "blocks(6)"):
        # The row classes of a prefix are whole: later tokens change nothing.
        for per in ("query", "rows(6)"):
            program = load(f"causal & random(2, {of}, {per}, h)").program
            whole = mask(program, call(36, heads=2))
            np.testing.assert_array_equal(mask(program, call(36, 11, heads=2)), whole[:, :, -11:])
            np.testing.assert_array_equal(mask(program, call(24, heads=2)), whole[:, :, :24, :24])
            np.testing.assert_array_equal(mask(program, call(36, batch=2, heads=2))[1:], whole)


def test_segments_are_runs_of_equal_ids() -> None:
    program = load("attention a { input ids : int[b, k]\n attend { q == k } on segment(ids) & causal }").program
    ids = np.array([[4, 4, 4, 9, 4, 4, 4, 4]])
    distance = np.array([0, 1, 2, 0, 0, 1, 2, 3])
    expected = np.tri(8, dtype=np.bool_) & (distance[:, None] == distance)
    np.testing.assert_array_equal(mask(program, call(8), {"ids": ids})[0, 0], expected)
    # One id for all tokens: one segment.
    np.testing.assert_array_equal(mask(program, call(8), {"ids": ids[:, :1]})[0, 0], np.eye(8, dtype=np.bool_))


# ------------------------------------------------------------------------------------- candidates


def draws(pattern: Set) -> list[Random]:
    match pattern:
        case Random():
            return [pattern]
        case Union(parts=parts) | Inter(parts=parts):
            return [found for part in parts for found in draws(part)]
        case _:
            return [x for name in ("left", "operand") if hasattr(pattern, name) for x in draws(getattr(pattern, name))]


def among(text: str) -> list[Set]:
    return [found.among for found in draws(load(text).program.branch.pattern)]


def pattern(text: str) -> Set:
    return load(text).program.branch.pattern


def test_candidates_are_what_the_path_allows() -> None:
    r, other = "random(2, tokens, query, 1)", "random(3, tokens, query, 2)"
    everything = pattern("all")
    assert among(r) == [everything]
    assert among(f"causal & {r}") == [pattern("causal")]
    assert among(f"causal & (sink(1) | window(9) & {r})") == [Inter((pattern("causal"), pattern("window(9)")))]
    assert among(f"causal & {r} & {other}") == [pattern("causal")] * 2, "what draws is no candidate set"
    assert among(f"({r} | sink(1)) - window(3)") == [everything]
    assert among(f"causal & ({r} - window(3))") == [pattern("causal")]
    assert among(f"pattern both(p) = p & {r}\npattern a = sink(1) | both(causal)") == [pattern("causal")]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("~R", "`~`"), ("R on blocks(4)", "`on`"), ("causal - R", "the right of `-`"),
        ("coarsen(R, 4, any)", "`coarsen`"),
        ("if h < 2 then R else causal", "`if`"),
        ("pattern f(p) = causal & p\npattern a = f(R)", "an argument"),
    ],
)  # fmt: skip
def test_elsewhere_candidates_must_be_written(text: str, place: str) -> None:
    with pytest.raises(PatternError) as caught:
        load(text.replace("R", "random(2, tokens, query, 1)"))
    assert [d.code for d in caught.value.diagnostics] == ["A044"]
    assert place in str(caught.value)
    found = load(text.replace("R", "random(2, tokens, query, 1, among = causal)")).program
    assert mask(found, call(9, heads=4)).shape == (1, 4, 9, 9)


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("random(2, tokens, query)", ["A013"]),
        ("random(0, tokens, query, 1)", ["A012"]),
        ("random(2, diagonals(2), query, 1)", ["A043"]),
        ("random(2, words, query, 1)", ["A043"]),
        ("random(2, tokens, keys, 1)", ["A043"]),
        ("random(2, tokens, query, q)", ["A035"]),
        ("attention a { input r : int[q]\n attend random(2, tokens, query, r) }", ["A035"]),
        ("attention a { input r : int[q]\n attend { k < r[q] } & random(2, tokens, rows(4), 1) }", ["A031"]),
        ("attention a { input r : int[q]\n attend random(2, tokens, head, 1, among = { k < r[q] }) }", ["A031"]),
        ("attention a { align start\n input r : int[k]\n attend causal on segment(r) }", ["A034"]),
        ("attention a { align start\n input r : int[k]\n attend causal on r }", ["A034"]),
        ("coarsen(causal, 4, fraction(1.5))", ["A012"]),
    ],
)
def test_mistakes(text: str, codes: list[str]) -> None:
    with pytest.raises(PatternError) as caught:
        load(text)
    assert [d.code for d in caught.value.diagnostics] == codes


# ------------------------------------------------------------------------------------------ calls

NEW = ("coarsen_share", "coarsen_data", "random", "segment")
NESTED = {
    "placed": "random(2, blocks(2), rows(3), 4, among = causal) on blocks(3)",
    "per_query_of_blocks": "causal & random(2, tokens, query, h, among = causal) on blocks(4)",
    "twice": "causal & coarsen(coarsen(dilated(7), 3, fraction(0.3)), 4, fraction(0.5)) on blocks(2)",
    "drawn_among_drawn": """causal & random(3, blocks(4), rows(5), 1,
        among = random(6, tokens, query, 2, among = causal))""",
    "coarsened_draw": "causal & coarsen(random(1, tokens, head, 3, among = all), (6, 10), any)",
    "complement": "causal & ~random(9, tokens, query, 1, among = causal)",
}


def qkv(n: int, rows: int, heads: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, size, 16, generator=generator).to(dtype) for size in (rows, n, n)]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", NESTED)
@pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")
def test_nested(name: str, backend: str) -> None:
    attn = load_attention(NESTED[name])
    for n, rows in ((65, 65), (41, 3)):
        q, k, v = qkv(n, rows)
        given = (x.to(DEVICE if backend == "triton" else "cpu") for x in (q, k, v))
        out, lse = attn(*given, backend=backend, return_lse=True)
        check(attn.program, q, k, v, {}, {}, out.cpu(), lse.cpu())


@pytest.mark.parametrize("strip", [1, 7, 200])
@pytest.mark.parametrize("name", NEW)
def test_strips_of_any_size(name: str, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that are several blocks, one block, or less."""
    case = CASES[name]
    program = case.load()
    _, expected = derived(program, case.shape, case.inputs, case.args)
    monkeypatch.setitem(runtime.STRIP, "cpu", strip)
    _, found = derived(program, case.shape, case.inputs, case.args)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)


def test_what_lengths_decide_is_kept_and_data_is_not() -> None:
    fixed, moving = load(NESTED["twice"]).program, CASES["coarsen_data"].load()
    kept: runtime.Kept = {}
    first, again = (Deriver(derive(fixed), call(40), CPU, kept)([], []) for _ in range(2))
    assert all(x is y for x, y in zip(first, again, strict=True))
    deriver = Deriver(derive(moving), call(40, heads=2), CPU)
    flag = torch.zeros(1, 40, dtype=torch.bool)
    (before,) = (x.clone() for x in deriver([flag], []))
    flag[0, 5] = True
    (after,) = deriver([flag], [])
    assert not before.any()
    assert after.any()


def test_kept_lengths_are_bounded() -> None:
    kept: runtime.Kept = {}
    for n in range(1, 3 * runtime.MAX_KEPT):
        Deriver(derive(load(NESTED["twice"]).program), call(n), CPU, kept)([], [])
    assert len(kept) <= runtime.MAX_KEPT


def test_a_decode_step_looks_at_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = list[int]()
    sums = block_sums

    def noted(inside: Tensor, *blocks: int) -> Tensor:
        looked_at.append(inside.numel())
        return sums(inside, *blocks)

    monkeypatch.setattr(runtime, "block_sums", noted)
    for text, rows in (
        ("causal & random(2, tokens, query, 1)", 1),
        ("causal & coarsen(dilated(7), 8, fraction(0.2))", 7),
    ):
        looked_at.clear()
        Deriver(derive(load(text).program), call(4095, 1), CPU)([], [])
        assert sum(looked_at) == rows * 4095


def test_derived_inputs_stay_below_their_bounds() -> None:
    program = derive(load("causal & random(2, tokens, query, 1)").program)
    Deriver(program, call(1 << 16), CPU)
    for shape in (call(1 << 17), call(1 << 15, heads=8), call(1 << 20)):
        with pytest.raises(PatternError, match="A519"):
            Deriver(program, shape, CPU)


def test_only_what_kernels_read_is_derived() -> None:
    spec = make_spec("sm_90", "triton", 2, 2, 64)
    static = forward_plan(load("causal & coarsen(dilated(9), 4, any)").program, spec, Tiling(64, 64))
    assert static.program.inputs == ()
    for name, derivations in (("coarsen_data", 1), ("random", 2), ("segment", 1)):
        program = CASES[name].load()
        plan = forward_plan(program, spec, Tiling(64, 64))
        assert len(plan.program.inputs) - len(program.inputs) == derivations
        assert backward_plan(program, spec, Tiling(64, 64)).program.inputs == plan.program.inputs


def visited(text: str, n: int = 512) -> int:
    return load_attention(text).blocks(n, n, 64, 64).tiles


def test_tiles_that_no_data_allows_are_not_visited() -> None:
    near = "attention a { input f : bool[b, k]\n attend coarsen({ f[k] and f[q] } & window(64) & causal, 64, %s) }"
    for mode in ("any", "all", "fraction(0.5)"):
        assert visited(near % mode) <= visited("coarsen(window(64) & causal, 64, any)") == 15
    assert visited("causal & window(64) & random(2, blocks(64), rows(64), 1)") == 15
    assert visited("coarsen(causal & window(64), 64, fraction(0.9))") == 15


# ------------------------------------------------------------------------------- looking inside


def test_explanation_and_sources() -> None:
    attn = load_attention("causal & (window(8) | random(2, blocks(8), rows(8), h))")
    text = str(attn.explain(256))
    assert "random(2, of = blocks(8), per = rows(8), seed = h)" in text
    assert "drawn when the kernel runs" in text
    assert "computed before the kernel: drawn : int[h, k/8, 2], the last hash" in text
    assert "row 255: keys" in text
    again = load_attention(f"attention a {{ attend {attn_text(attn.program)} }}")
    assert again.program.branch == attn.program.branch
    for backend in ("triton", "gluon", "cpu"):
        assert "drawn(mix64(" in attn.source(backend=backend, heads=2)
    long = str(load_attention("attention a { input i : int[b, k]\n attend causal on segment(i) }").explain(64))
    assert "give `i` to see the keys" in long
    assert "reads the input `offset_i` at q or k" in long
    assert "offset_i : int[b, k], distances in the segments of `i`" in long


def attn_text(program: Program) -> str:
    from attndsl.notation import set_text

    return set_text(program.branch.pattern)


def test_comparison() -> None:
    draw = "causal & random(2, tokens, query, 1)"
    assert attndsl.compare(draw, draw).verdict.value == "equal"
    assert attndsl.compare(draw, "{ k > q }").verdict.value == "disjoint"
    for a, b in ((draw, "causal"), ("coarsen(causal, 8, fraction(0.5))", "coarsen(causal, 8, any)")):
        with pytest.raises(PatternError, match="A540"):
            attndsl.compare(a, b)


def test_findings_of_draws() -> None:
    for text in ("causal & random(2, tokens, query, 1)", "causal & ~random(2, tokens, query, 1, among = causal)"):
        assert load_attention(text).warnings == ()
    never = load_attention("causal & { k > q } & random(2, tokens, query, 1)")
    assert [w.code for w in never.warnings] == ["W302"]


def test_more_rows_than_keys() -> None:
    q, k, v = qkv(9, 20)
    attn = load_attention("causal & random(2, tokens, rows(4), 1)")
    out = attn(q, k, v)
    torch.testing.assert_close(out.double(), attn.reference(q, k, v), atol=1e-5, rtol=0)
    with pytest.raises(PatternError, match="A507"):
        load_attention("random(2, tokens, rows(4), 1)")(q, k, v)


def test_torch_compile() -> None:
    attn = load_attention("attention a { input d : int[b, k]\n attend causal & (sink(1) on segment(d)) }")
    q, k, v = qkv(20, 20)
    d = torch.arange(20).div(6, rounding_mode="floor")[None]
    compiled = torch.compile(lambda *x, d: attn(*x, d=d), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, d=d), attn(q, k, v, d=d))


def test_a_coarsening_past_the_effort_is_read_from_its_map(monkeypatch: pytest.MonkeyPatch) -> None:
    attn = load_attention("causal & coarsen(causal & dilated(5), (6, 4), any)")

    def too_hard(*_: object, **__: object) -> None:
        raise effort.TooHard

    monkeypatch.setattr("attndsl.isl_sets.coarse_pairs", too_hard)
    plan = forward_plan(attn.program, make_spec("sm_90", "triton", 2, 2, 64), Tiling(32, 32))
    assert [decl.name for decl in plan.program.inputs] == ["blocks"]
    q, k, v = qkv(50, 50)
    torch.testing.assert_close(attn(q, k, v).double(), attn.reference(q, k, v), atol=1e-5, rtol=0)
