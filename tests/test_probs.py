"""Selecting by the probabilities of a branch, and attending it beside that branch, against the oracle."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.choice import Data, choose
from attndsl.plans import own_program
from attndsl.program import CallShape
from attndsl.runtime.reference import probabilities
from attndsl.runtime.reference_plans import masses_of
from tests.test_routed import check, tensors
from tests.test_select import levels_of

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")

NSA = """
attention nsa(block = 8, n = 2, span = 6) {
    input gate : float[b, h, q, 3] learnable
    coarse = attend causal over pool(mean, block)
    routed = attend causal & top(n, blocks(block), by = probs(coarse), share = group, always = same_block(block))
    near   = attend causal & window(span)
    output gate[0] * coarse + gate[1] * routed + gate[2] * near
}
"""


def gates(rows: int) -> torch.Tensor:
    return torch.rand(2, 4, rows, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize(("rows", "k_len"), [(40, 40), (37, 37), (5, 37), (1, 1), (1, 64)])
def test_nsa(rows: int, k_len: int) -> None:
    attn = attndsl.compile(NSA)
    here, there = ([x.clone().requires_grad_() for x in (*tensors(rows, k_len), gates(rows))] for _ in range(2))
    out, wanted = attn(*here[:3], gate=here[3]), attn.reference(*there[:3], gate=there[3])
    torch.testing.assert_close(out, wanted, atol=1e-10, rtol=1e-10)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-9)


def test_nsa_by_its_own_rule() -> None:
    """Yuan et al. 2025: softmax over means of finished blocks, summed over a group, own block forced, the n best."""
    attn = attndsl.compile(NSA)
    q, k, _ = tensors(40, 40)
    plan = attn.plan(q, k, gate=gates(40))["top"]
    assert plan.shape == (2, 2, 40, 2)
    means = k.reshape(2, 2, 5, 8, 16).mean(3).numpy()
    for g in range(2):
        for t in range(40):
            finished = (t + 1) // 8
            mass = np.zeros(5)
            for h in (2 * g, 2 * g + 1):
                if finished:
                    logits = means[0, g, :finished] @ q[0, h, t].numpy() / 4
                    mass[:finished] += np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            own = t // 8
            rest = np.argsort(-mass[:own], kind="stable").tolist()[:1]
            assert set(plan[0, g, t][plan[0, g, t] >= 0].tolist()) == {own, *rest}


OF_BRANCHES = (
    ("causal over pool(mean, 4)", "top(2, blocks(8), among = causal, by = probs(x))"),
    ("causal over pool(mean, 8, 4)", "top(2, blocks(8), among = causal, by = probs(x), share = heads)"),
    ("causal over pool(max, 6, 4)", "top(2, blocks(4), among = causal, by = probs(x, max))"),
    ("causal over pool(mean, 12)", "top(3, blocks(4), among = causal, by = probs(x))"),
    ("causal over pool(mean, 8, counted, visible = any)",
     "top(2, blocks(4), per = rows(4), among = causal, by = probs(x))"),
    ("causal & window(9)", "top(5, tokens, per = head, among = causal, by = probs(x))"),
    ("causal & { q >= Nk - 4 }", "top(3, blocks(4), per = head, share = group, among = causal, by = probs(x, max))"),
    ("causal & window(9) { score softcap(s, 3.0)  softmax with sink 0.5 }",
     "cover(0.8, blocks(4), per = rows(8), among = causal, by = probs(x))"),
    ("causal { scale 0.1 }",
     "top(4, blocks(4), among = causal, by = probs(x), always = same_block(4), forced = extra)"),
)  # fmt: skip


@pytest.mark.parametrize(("coarse", "selection"), OF_BRANCHES)
def test_of_any_branch(coarse: str, selection: str) -> None:
    text = f"attention a {{ x = attend {coarse}  plan p = {selection}  y = attend causal & p  output x + y }}"
    check_output(text, *tensors(30, 30))
    check_output(text, *tensors(3, 29))


def check_output(text: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> None:
    attn = attndsl.compile(text)
    torch.testing.assert_close(attn(q, k, v, **given), attn.reference(q, k, v, **given), atol=1e-10, rtol=1e-10)


CHOOSING = (
    "top(2, blocks(4), among = causal, by = dot(Q, mean(K)), share = group)",
    "above(0.1, blocks(4), per = head, among = causal, by = dot(mean(Q), max(K)))",
    "cover(0.5, segments(runs), per = rows(4), among = causal, by = dot(mean(Q), mean(K)))",
)


@pytest.mark.parametrize(("first", "backend"), [*((first, "cpu") for first in CHOOSING), (CHOOSING[0], "triton")])
@pytest.mark.parametrize("per", ["share = group", "per = rows(4)", "per = head"])
def test_of_a_branch_that_chooses_itself(first: str, per: str, backend: str) -> None:
    """Its plan is made before, and says which keys it gives a mass."""
    text = f"""attention a {{ input runs : int[b, g, k]
        plan p = {first}
        x = attend causal & (p | same_block(4))
        y = attend causal & top(2, blocks(4), {per}, among = causal, by = probs(x))
        output x + y }}"""
    attn = attndsl.compile(text)
    q, k, v = (x if backend == "cpu" else x.float() for x in tensors(29, 29))
    given: dict[str, Any] = (
        {"runs": (torch.arange(29) // 5 % 3).expand(2, 2, 29).contiguous()} if "runs" in first else {}
    )
    if not given:
        attn = attndsl.compile(text.replace("input runs : int[b, g, k]", ""))
    out, allowed = attn(q, k, v, backend=backend, **given), 1e-10 if backend == "cpu" else 2e-5
    torch.testing.assert_close(out.double(), attn.reference(q, k, v, **given), atol=allowed, rtol=allowed)


def test_of_entries_whose_values_have_another_dimension() -> None:
    """Only what is handed in tells it, where a selection is made without values."""
    text = """attention a { input kc : float[b, g, k/4, D]  input vc : float[b, g, k/4, Dv]
        x = attend causal & window(5), causal over given(kc, vc, 4)
        y = attend causal & top(2, blocks(4), per = rows(4), by = probs(x))  output x + y }"""
    q, k, _ = tensors(21, 21)
    v, entries = torch.cat((k, k), -1), k[:, :, :6].sin()
    check_output(text, q, k, v, kc=entries, vc=torch.cat((entries, entries), -1))


def test_a_probe_that_only_ranks() -> None:
    """The branch is not in the output, and a plan that nothing attends to is made when asked for."""
    selection = "top(3, blocks(4), per = head, by = probs(x))"
    text = f"attention a {{ x = attend causal & {{ q >= Nk - 4 }}  y = attend causal & {selection}  output y }}"
    check_output(text, *tensors(30, 30))
    plan = "plan p = top(3, tokens, per = head, among = causal, by = probs(x))"
    plain = attndsl.compile(f"attention a {{ x = attend causal  {plan}  output x }}")
    q, k, v = tensors(30, 30)
    assert plain.plan(q, k)["p"].shape == (2, 4, 1, 3)
    check("causal", q, k, v)


def test_branches_that_have_no_probabilities_are_refused() -> None:
    q, k, v = tensors(8, 8)
    text = (
        "attention a { x = attend causal { weights s } y = attend causal & top(1, blocks(4), by = probs(x)) output y }"
    )
    with pytest.raises(attndsl.PatternError, match="A575"):
        attndsl.compile(text)(q, k, v)


# What a branch of several parts sees, or one over entries that data tells.
SEVERAL = (
    "causal & window(5), causal - window(5) over pool(mean, 4)",
    "causal over pool(mean, 6, 4), causal & window(7), causal over pool(max, 3)",
    "causal over pool(mean, segments(ids))",
    "causal over pool(mean, segments(own), counted), causal & window(3)",
    "causal over pick(idx)",
    "causal over pick(near, weight = w), causal over pool(mean, 5)",
    "causal over pool(mean, 4) from pool(mean, 8), causal from pool(mean, 8)",
)
MEMBERS = (
    "top(2, blocks(4), among = causal, by = probs(x), share = group)",
    "cover(0.6, blocks(8), per = rows(8), among = causal, by = probs(x, max))",
    "top(3, tokens, per = head, among = causal, by = probs(x))",
    "top(2, segments(other), per = rows(4), among = causal, by = probs(x, max))",
    "top(2, blocks(4) on permuted(po), per = head, among = causal, by = probs(x, max))",
    "top(2, diagonals(3), per = rows(8), among = causal, by = probs(x, max))",
    "top(4, diagonals(2), per = head, among = causal, by = probs(x))",
    "top(2, tiles(2, 3), per = tiles(2, 2), among = causal, by = probs(x))",
)
TOLD = {
    "ids": "int[b, g, k]", "own": "int[k]", "idx": "int[b, g, 6]", "near": "int[k/4]", "w": "float[b, k/4]",
    "other": "int[b, k]", "po": "int[k]", "left": "int[b]",
}  # fmt: skip


def told(text: str, k_len: int) -> dict[str, Any]:
    """What a text declares of inputs that tell entries and members."""
    draw = torch.Generator().manual_seed(k_len)

    def runs(*lead: int) -> torch.Tensor:
        return (torch.rand(*lead, k_len, generator=draw) < 0.3).cumsum(-1) % 3

    made = {
        "ids": runs(2, 2), "own": runs(), "other": runs(2), "po": torch.randperm(k_len, generator=draw),
        "idx": torch.randint(-2, k_len + 2, (2, 2, 6), generator=draw),
        "near": torch.randint(0, k_len, (-(-k_len // 4),), generator=draw),
        "w": torch.rand(2, -(-k_len // 4), generator=draw, dtype=torch.float64) - 0.2,
        "left": torch.tensor([k_len, max(0, k_len - 7)]),
    }  # fmt: skip
    return {name: x for name, x in made.items() if f"input {name} :" in text}


def declared(body: str) -> str:
    words = set(re.findall(r"\w+", body))
    return "\n".join(f"input {name} : {kind}" for name, kind in TOLD.items() if name in words)


def conforms(attn: attndsl.Attention, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> None:
    """The scores of what is chosen and of what the oracle chooses are the same, and so is the output with that plan."""
    program = attn.program
    (selection,) = program.selections
    plans = attn.plan(q, k, **given)
    shape = CallShape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], 16, 16)
    known = {name: x.numpy() for name, x in given.items()}
    branch = program.named("x")
    masses = masses_of(program, branch, probabilities(program, branch, q, k, given, {}), shape, known, {})
    data = Data(q.numpy(), k.numpy(), known, {}, shape.dim**-0.5, {"x": masses})
    wanted = choose(own_program(program), selection, shape, data)
    found = levels_of(plans["p"], wanted.level.shape[3], shape.heads)
    for place in zip(*np.nonzero((found != wanted.level).any(3)), strict=True):
        scores = [np.sort(wanted.score[place][level[place] > 0]) for level in (found, wanted.level)]
        np.testing.assert_allclose(scores[0], scores[1], atol=1e-12)
    out = attn(q, k, v, plans=plans, **given)
    torch.testing.assert_close(out, attn.reference(q, k, v, plans=plans, **given), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("seen", SEVERAL)
@pytest.mark.parametrize("chosen", MEMBERS)
def test_of_several_parts_and_of_entries_that_data_tells(seen: str, chosen: str) -> None:
    grid = "axes t, z[6]\n" if "tiles" in chosen else ""
    sink = "{ softmax with sink 0.5 }" if "max" in chosen else ""
    body = f"{grid}x = attend {seen} {sink}\nplan p = {chosen}\ny = attend causal & p\noutput x + y"
    attn = attndsl.compile(f"attention a {{\n{declared(body)}\n{body} }}")
    for rows, k_len in ((14, 14), (3, 17)):
        q, k, v = tensors(rows, k_len)
        conforms(attn, q, k, v, told(declared(body), k_len))


@pytest.mark.parametrize("seen", SEVERAL)
def test_of_several_parts_of_padded_sequences(seen: str) -> None:
    for chosen in (MEMBERS[0], MEMBERS[1], MEMBERS[3]):
        body = f"lengths left\nx = attend {seen}\nplan p = {chosen}\ny = attend causal & p\noutput x + y"
        attn = attndsl.compile(f"attention a {{\n{declared(body)}\n{body} }}")
        q, k, v = tensors(23, 23)
        given: dict[str, Any] = told(declared(body), 23)
        torch.testing.assert_close(attn(q, k, v, **given), attn.reference(q, k, v, **given), atol=1e-10, rtol=1e-10)


def test_injected_where_a_router_would_choose() -> None:
    attn = attndsl.compile(NSA)
    q, k, v = tensors(40, 40)
    other, *_ = tensors(40, 40, seed=3)
    plans = attn.plan(other, k, gate=gates(40))
    out = attn(q, k, v, gate=gates(40), plans=plans)
    torch.testing.assert_close(out, attn.reference(q, k, v, gate=gates(40), plans=plans), atol=1e-10, rtol=1e-10)
    assert (out != attn(q, k, v, gate=gates(40))).any()
