"""Plans made on a device are the oracle's, over random selections, ragged and degenerate calls."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from attndsl.choice import Chosen, Data, choose
from attndsl.diagnostics import PatternError
from attndsl.grammar import load
from attndsl.plans import plan_heads
from attndsl.program import CallShape, Program
from attndsl.runtime.masses import sums_in_blocks
from attndsl.runtime.select import Selector
from attndsl.selection import Share

CPU = torch.device("cpu")


def program_of(selection: str, inputs: str = "", clauses: str = "") -> Program:
    return load(f"attention t {{ {inputs} {clauses} plan sel = {selection} attend all }}").program


def tensors(shape: CallShape, seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(shape.batch, shape.heads, shape.rows, shape.dim, generator=generator, dtype=torch.float64)
    k = torch.randn(shape.batch, shape.kv_heads, shape.k_len, shape.dim, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def by_oracle(program: Program, shape: CallShape, q: torch.Tensor, k: torch.Tensor, **inputs: torch.Tensor) -> Chosen:
    arrays = {name: x.numpy() for name, x in inputs.items()}
    data = Data(q.double().numpy(), k.double().numpy(), arrays, {}, shape.dim**-0.5, {})
    return choose(program, program.selections[0], shape, data)


def made(program: Program, shape: CallShape, q: torch.Tensor, k: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    selector = Selector(program, program.selections[0], shape, CPU)
    return selector(q, k, [inputs[decl.name] for decl in program.inputs], [], shape.dim**-0.5)


def levels_of(plan: torch.Tensor, members: int, heads: int) -> np.ndarray[Any, Any]:
    """A plan as levels [B, Hq, R, M]: lists are ascending and end in -1."""
    if plan.dtype == torch.uint8:
        found = plan
    else:
        found = torch.zeros(*plan.shape[:-1], members + 1, dtype=torch.uint8)
        found.scatter_(-1, torch.where(plan < 0, members, plan).long(), 1)
        found = found[..., :members]
        assert (((plan[..., 1:] > plan[..., :-1]) & (plan[..., :-1] >= 0)) | (plan[..., 1:] == -1)).all()
    return found.repeat_interleave(heads // plan.shape[1], 1).numpy()


def check(program: Program, shape: CallShape, seed: int = 0, **inputs: torch.Tensor) -> None:
    q, k = tensors(shape, seed)
    selection = program.selections[0]
    plan = made(program, shape, q, k, **inputs)
    wanted = by_oracle(program, shape, q, k, **inputs)
    heads = {Share.NONE: shape.heads, Share.GROUP: shape.kv_heads, Share.HEADS: 1}[plan_heads(selection)]
    assert plan.shape[:2] == (shape.batch, heads)
    assert plan.dtype == (torch.int32 if selection.bounded else torch.uint8)
    tokens, each = selection.extent
    members = -(-shape.k_len // tokens) * each
    np.testing.assert_array_equal(levels_of(plan, members, shape.heads), wanted.level)


@st.composite
def selections(draw: st.DrawFn) -> str:
    """A selection's text, one of all."""

    def pick(*words: Any) -> Any:
        return draw(st.sampled_from(words))

    per, keys = pick("query", "query", "rows(4)", "rows(8)", "head"), pick(1, 3, 4, 8)
    alone = per == "query"
    function = pick("top", "top", "cover", "above", *([] if alone else ["levels"]))
    x = "Q" if alone else f"{pick('mean', 'max', 'min')}(Q)"
    y = "K" if keys == 1 else f"{pick('mean', 'max', 'min', 'first', 'last')}(K)"
    scores = [f"dot({x}, {y})", f"dot({x}, {y})", f"bound({x}, min(K), max(K))", "0.125 * ((q * 7 + k * 13) % 11)"]
    if per in ("rows(4)", "rows(8)") and keys in (4, 8):
        scores += ["antidiagonal(Q, K, 2)", "antidiagonal(Q, K, 4)"]
    share = pick("group", "heads", *([] if alone and keys == 1 else ["none"]))
    among = pick("causal", "all", "causal & window(9)", "{ (q + k) % 3 == 0 }", "causal & { k % 2 == h % 2 }")
    of = "tokens" if keys == 1 else f"blocks({keys})"
    options = [f"of = {of}", f"per = {per}", f"share = {share}", f"among = {among}", f"by = {pick(*scores)}"]
    always = pick("", "same_block(4)", "sink(2)", "sink(1) | same_block(8)")
    if always:
        options += [f"always = {always}", f"forced = {pick('counted', 'extra', 'overlay')}"]
    first = pick("0.3", "0.5", "0.9")
    match function:
        case "top":
            first = pick("1", "2", "3", "fraction(0.3)", "min(2, h + 1)")
            options += [f"normalise = {pick('none', 'softmax', 'minmax')}"] if draw(st.booleans()) else []
        case "levels":
            first = "(1, 1)"
            options += [pick("quantiles = (0.3, 0.7)", "masses = (0.4, 0.8)")]
        case "cover":
            options += draw(st.lists(st.sampled_from(["exclusive = true", "at_least = 2"]), unique=True))
        case _:
            options += ["relative = true"] if draw(st.booleans()) else []
    if alone and function != "top":
        options += [f"at_most = {pick(1, 3)}"]
    return f"{function}({first}, {', '.join(options)})"


@st.composite
def shapes(draw: st.DrawFn) -> CallShape:
    kv_heads = draw(st.sampled_from([1, 2]))
    k_len = draw(st.integers(1, 26))
    rows = draw(st.one_of(st.just(k_len), st.integers(1, k_len)))
    return CallShape(
        draw(st.sampled_from([1, 2])), kv_heads * draw(st.sampled_from([1, 2])), kv_heads, rows, k_len, 8, 8
    )


@settings(max_examples=150, deadline=None)
@given(selections(), shapes(), st.integers(0, 1000))
def test_plans_are_the_oracles(selection: str, shape: CallShape, seed: int) -> None:
    check(program_of(selection), shape, seed)


@pytest.mark.parametrize("rows,k_len", [(1, 1), (0, 5), (5, 0), (7, 4), (1, 130)])
def test_degenerate_calls(rows: int, k_len: int) -> None:
    shape = CallShape(1, 2, 1, rows, k_len, 8, 8)
    for per in ("query", "rows(4)", "head"):
        x = "Q" if per == "query" else "mean(Q)"
        text = f"top(2, blocks(4), per = {per}, among = causal, by = dot({x}, mean(K)), always = same_block(4))"
        check(program_of(text), shape)


def test_an_expression_is_read_at_the_first_row_of_a_class_whatever_rows_a_call_holds() -> None:
    shape = CallShape(1, 2, 1, 2, 14, 8, 8)
    for per in ("head", "rows(4)", "query"):
        check(program_of(f"top(1, blocks(4), per = {per}, among = causal, by = (q * 7 + k * 13) % 11)"), shape)


def test_inputs_rank_and_hold_vectors() -> None:
    shape = CallShape(2, 4, 2, 10, 22, 8, 8)
    generator = torch.Generator().manual_seed(0)

    def made_input(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    gate = program_of(
        "top(2, blocks(4), per = rows(4), among = causal, by = gate)", "input gate : float[b, h, q/4, k/4]"
    )
    check(gate, shape, gate=made_input(2, 4, 6, 6))
    bias = program_of("top(3, tokens, among = causal, by = bias, share = heads)", "input bias : float[b, g, k]")
    check(bias, shape, bias=made_input(2, 2, 22))
    table = program_of(
        "top(3, tokens, among = causal, by = x[q, chunk[k]], share = group)",
        "input chunk : int[b, k] input x : float[b, h, q, 3]",
    )
    check(table, shape, chunk=torch.arange(22).expand(2, 22) % 3, x=made_input(2, 4, 10, 3))
    pooled = program_of("top(2, blocks(4), among = causal, by = dot(Q, ck))", "input ck : float[b, g, k/4, D]")
    check(pooled, shape, ck=made_input(2, 2, 6, 8))
    rotated = program_of("top(2, blocks(4), among = causal, by = dot(Q, mean(kr)))", "input kr : float[k, D]")
    check(rotated, shape, kr=made_input(22, 8))
    learned = program_of("top(2, blocks(4), among = causal, by = dot(qr, mean(K)))", "input qr : float[b, h, q, D]")
    check(learned, shape, qr=made_input(2, 4, 10, 8))


def test_candidates_that_depend_on_data() -> None:
    shape = CallShape(2, 2, 1, 17, 17, 8, 8)
    text = "top(2, blocks(4), among = causal & document(doc), by = dot(Q, mean(K)), always = same_block(4))"
    doc = torch.tensor([[0] * 6 + [1] * 11, [0] * 9 + [1] * 2 + [2] * 6])
    check(program_of(text, "input doc : int[b, k]"), shape, doc=doc)
    per_rows = text.replace("blocks(4),", "blocks(4), per = rows(4),").replace("dot(Q", "dot(mean(Q)")
    check(program_of(per_rows, "input doc : int[b, k]"), shape, doc=doc)


def test_choices_are_those_of_float32() -> None:
    """In bfloat16 the vectors are rounded, and nothing after them is: chosen and rejected overlap by an eps."""
    program = program_of("top(4, blocks(16), among = causal, by = dot(Q, mean(K)), always = same_block(16))")
    shape = CallShape(1, 2, 1, 300, 300, 64, 64)
    q, k = tensors(shape, 3, torch.bfloat16)
    wanted = by_oracle(program, shape, q, k)
    level = levels_of(made(program, shape, q, k), 19, 2)
    lowest = np.where((level > 0) & wanted.free, wanted.score, np.inf).min(-1)
    highest = np.where((level == 0) & wanted.free, wanted.score, -np.inf).max(-1)
    assert (highest - lowest).max() <= 2e-6 * np.abs(wanted.score[wanted.free]).max()
    assert (level.sum(-1) == wanted.level.sum(-1)).all()


def test_capacity_is_the_budget_and_what_is_forced() -> None:
    def capacity(options: str, n: str = "top(3") -> int:
        shape = CallShape(1, 1, 1, 640, 640, 8, 8)
        program = program_of(f"{n}, blocks(16), among = causal, by = dot(Q, mean(K)){options})")
        return Selector(program, program.selections[0], shape, CPU).capacity

    assert capacity("") == 3
    assert capacity(", always = same_block(16)") == 3
    assert capacity(", always = same_block(16), forced = extra") == 4
    assert capacity(", always = sink(40) | same_block(16), forced = overlay") == 3 + 4
    assert capacity(", always = window(33), forced = extra") == 3 + 3
    assert capacity("", "top(fraction(0.25)") == 10


def test_what_would_be_slow_is_refused() -> None:
    tokens = program_of("top(4, tokens, among = causal, by = dot(Q, K))")
    with pytest.raises(PatternError, match="A570"):
        Selector(tokens, tokens.selections[0], CallShape(1, 2, 2, 17, 64, 8, 8), CPU)
    Selector(tokens, tokens.selections[0], CallShape(1, 2, 2, 16, 64, 8, 8), CPU)
    forced = program_of("top(4, blocks(4), among = causal, by = dot(Q, mean(K)), always = { k % 2 == 0 })")
    with pytest.raises(PatternError, match="A571"):
        Selector(forced, forced.selections[0], CallShape(1, 2, 2, 17, 64, 8, 8), CPU)


def test_candidates_in_closed_form_make_no_maps() -> None:
    """A map of blocks would be as large as a decode's cache, and made at each of its steps."""
    program = program_of("top(16, blocks(64), among = causal, by = dot(Q, mean(K)), always = same_block(64))")
    shape = CallShape(8, 32, 8, 1, 1 << 17, 128, 128)
    for ragged in (False, True):
        selector = Selector(program, program.selections[0], shape, CPU, ragged=ragged)
        for touched in (selector.among, selector.always):
            assert touched is not None
            assert not touched.program.inputs


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 1024, 1025, 3000])
def test_running_sums_in_one_order(n: int) -> None:
    """In blocks, as a GPU is given them: as accurate as torch's, and integers exactly."""
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(n))
    exact = x.double().cumsum(-1)
    # A sum is rounded once a step: of a block five times, for each of at most three levels of blocks twice more.
    allowed = 21 * 2**-24 * x.double().abs().cumsum(-1)
    assert bool(((sums_in_blocks(x).double() - exact).abs() <= allowed).all())
    whole = (8 * x).round()
    assert bool((sums_in_blocks(whole) == whole.cumsum(-1)).all())
