"""The kernels that combine branches, on random outputs, against the same expressions in torch and float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import attndsl
from attndsl.branches import Merged, combined
from attndsl.program import CallShape
from attndsl.runtime.combine_op import combined_by_kernel
from tests.gpu import interprets
from tests.offline import Job, compile_all

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")

PROGRAM = """attention a {{
    input gate : float[b, h, q, 3] learnable
    input wide : float[b, h, q, Dv] learnable
    input near : float[q] learnable
    input heads : float[h, 2] learnable
    input groups : float[g] learnable
    input channels : float[2, Dv] learnable
    input kind : int[b, q]
    input table : float[h, 4] learnable
    input fixed : float[b, h]
    a = attend causal
    b_input = attend causal
    c = attend causal
    output {}
}}"""
BRANCHES = ("a", "b_input", "c")


@dataclass
class Values:
    """What an expression is evaluated on. `steps`: how large what is added up may be, for the rounding to expect."""

    outs: dict[str, Tensor]
    lses: dict[str, Tensor]
    inputs: dict[str, Tensor]
    shape: CallShape
    largest: float = 1.0

    def seen(self, x: Tensor) -> Tensor:
        self.largest = max(self.largest, float(x.detach().abs().max())) if x.numel() else self.largest
        return x


Evaluate = Callable[[Values], Tensor]


@dataclass(frozen=True)
class Expression:
    """Text, and what it means: a value that broadcasts to [B, H, rows, Dv], and of a merge its lse too."""

    text: str
    value: Evaluate = field(compare=False)
    lse: Evaluate | None = field(default=None, compare=False)
    channels: bool = False

    def __repr__(self) -> str:
        return self.text


def _group(v: Values) -> Tensor:
    return v.inputs["groups"].repeat_interleave(v.shape.heads // v.shape.kv_heads)[None, :, None, None]


def _looked_up(v: Values) -> Tensor:
    at = v.inputs["kind"].clamp(0, 3).long()  # [B or 1, rows]
    return v.inputs["table"][:, at].transpose(0, 1)[..., None]


def _positions(v: Values) -> Tensor:
    return (torch.arange(v.shape.rows) + v.shape.k_len - v.shape.rows).double()[None, None, :, None] / 50


def _gate(i: int) -> Expression:
    return Expression(f"gate[{i}]", lambda v: v.inputs["gate"][..., i : i + 1])


LEAVES = [
    *map(_gate, range(3)),
    Expression("wide", lambda v: v.inputs["wide"], channels=True),
    Expression("channels[1]", lambda v: v.inputs["channels"][1], channels=True),
    Expression("near[q]", lambda v: v.inputs["near"][None, None, :, None]),
    Expression("heads[1]", lambda v: v.inputs["heads"][None, :, None, 1:]),
    Expression("groups", _group),
    Expression("table[clamp(kind[q], 0, 3)]", _looked_up),
    Expression("fixed", lambda v: v.inputs["fixed"][:, :, None, None]),
    Expression("(q / 50)", _positions),
    Expression("0.75", lambda v: torch.full((1, 1, 1, 1), 0.75, dtype=torch.float64)),
    Expression("2", lambda v: torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)),
]


def _joined(sign: str, x: Expression, y: Expression) -> Expression:
    def value(v: Values) -> Tensor:
        left, right = v.seen(x.value(v)), v.seen(y.value(v))
        return v.seen({"+": left + right, "-": left - right, "*": left * right}[sign])

    return Expression(f"({x.text} {sign} {y.text})", value, channels=x.channels or y.channels)


def _sigmoid(x: Expression) -> Expression:
    return Expression(f"sigmoid({x.text})", lambda v: torch.sigmoid(x.value(v)), channels=x.channels)


def _negative(x: Expression) -> Expression:
    return Expression(f"-{x.text}", lambda v: -x.value(v), channels=x.channels)


def _damped(x: Expression, y: Expression) -> Expression:
    return Expression(f"{x.text} / (2 + {y.text} * {y.text})", lambda v: x.value(v) / (2 + y.value(v) ** 2))


def _attended(name: str) -> Expression:
    return Expression(name, lambda v: v.outs[name], lambda v: v.lses[name])


def _handed(out: Expression, lse: Expression) -> Expression:
    return Expression(f"given({out.text}, {lse.text})", out.value, lambda v: lse.value(v)[..., 0])


def _merged(operands: list[Expression]) -> Expression:
    def shares(v: Values) -> tuple[list[Tensor], Tensor]:
        sizes = v.outs["a"].shape[:3]
        lses = [x.lse(v).expand(sizes) for x in operands if x.lse is not None]
        total = torch.logsumexp(torch.stack([torch.where(x == -torch.inf, -1e30, x) for x in lses]), 0)
        return [torch.exp(torch.where(x == -torch.inf, -1e31, x) - total)[..., None] for x in lses], total

    def value(v: Values) -> Tensor:
        found, _ = shares(v)
        return reduce(torch.add, (share * v.seen(x.value(v)) for share, x in zip(found, operands, strict=True)))

    def lse(v: Values) -> Tensor:
        _, total = shares(v)
        return torch.where(total < -1e29, -torch.inf, total)

    return Expression(f"merge({', '.join(x.text for x in operands)})", value, lse)


numbers = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        st.builds(_sigmoid, inner), st.builds(_joined, st.sampled_from("+-*"), inner, inner),
    ),
    max_leaves=3,
)  # fmt: skip
branches = st.sampled_from(BRANCHES).map(_attended)
handed = st.builds(_handed, numbers, numbers.filter(lambda x: not x.channels))
merged = st.recursive(
    st.lists(st.one_of(branches, handed), min_size=2, max_size=3).map(_merged),
    lambda inner: st.lists(st.one_of(branches, inner), min_size=2, max_size=3).map(_merged),
    max_leaves=2,
)
outputs = st.recursive(
    st.one_of(branches, merged),
    lambda inner: st.one_of(
        st.builds(_joined, st.just("*"), numbers, inner),
        st.builds(_joined, st.sampled_from("+-"), inner, inner),
        st.builds(_joined, st.just("+"), inner, numbers),
        st.builds(_negative, inner),
        st.builds(_damped, inner, numbers),
    ),
    max_leaves=4,
)
shapes = st.sampled_from([
    CallShape(2, 4, 2, 37, 40, 16, 24), CallShape(1, 1, 1, 1, 1, 16, 16), CallShape(1, 3, 1, 21, 21, 16, 256),
    CallShape(2, 2, 2, 5, 9, 16, 80),
])  # fmt: skip


def drawn(
    shape: CallShape, seed: int, broadcast: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and lse of branches, some rows of them empty, and inputs; float32."""
    generator = torch.Generator().manual_seed(seed)
    b, h, g, n, e = shape.batch, shape.heads, shape.kv_heads, shape.rows, shape.v_dim
    one = 1 if broadcast else b

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    outs = {"a": draw(b, h, n, e), "b_input": draw(b, n, h, e).transpose(1, 2), "c": draw(b, h, n, e)}
    lses = {name: 3 * draw(b, h, n) for name in BRANCHES}
    for i, name in enumerate(BRANCHES):
        empty = torch.arange(n) % 4 <= i  # Of every fourth row all are.
        outs[name] = torch.where(empty[:, None], 0.0, outs[name])
        lses[name] = torch.where(empty, -torch.inf, lses[name])
    inputs = {
        "gate": draw(one, h, n, 3), "wide": draw(b, 1 if broadcast else h, n, e), "near": draw(n), "heads": draw(h, 2),
        "groups": draw(g), "channels": draw(2, e), "kind": torch.randint(-1, 6, (one, n), generator=generator),
        "table": draw(h, 4), "fixed": draw(b, h),
    }  # fmt: skip
    return outs, lses, inputs


@interprets
@settings(max_examples=25)
@given(outputs, shapes, st.integers(0, 99), st.booleans(), st.booleans())
def test_the_kernels_are_the_expression(
    output: Expression, shape: CallShape, seed: int, broadcast: bool, tokens_first: bool
) -> None:
    text = output.text
    attn = attndsl.compile(PROGRAM.format(text if "(" in text or " " in text else f"1.0 * {text}"))
    program = attn.program
    assert program.output is not None
    assume(combined(program.output))  # Else torch makes it.
    outs, lses, inputs = drawn(shape, seed, broadcast)
    if tokens_first:
        outs = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in outs.items()}
    learnable = [decl.name for decl in program.inputs if decl.learnable]
    of_branches = [*outs.values(), *lses.values()]
    leaves = [x.requires_grad_() for x in (*of_branches, *(inputs[name] for name in learnable))]
    right = {id(x): x.detach().double().requires_grad_() for x in leaves}

    def exact(xs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: right.get(id(x), x.double() if x.is_floating_point() else x) for k, x in xs.items()}

    attended = {name: (outs[name], lses[name]) for name in combined(program.output)}
    found, lse = combined_by_kernel(attn._key, program, shape, attended, inputs, [])
    values = Values(exact(outs), exact(lses), exact(inputs), shape)
    sizes = (shape.batch, shape.heads, shape.rows, shape.v_dim)
    expected = values.seen(output.value(values)).expand(sizes)
    # Sums of a few terms, of products of a few factors: so many roundings of what is largest on the way.
    rounding = 64 * 2.0**-24 * values.largest
    assert found.stride() == outs[combined(program.output)[0]].stride()
    assert float((found.detach().double() - expected.detach()).abs().max()) <= rounding
    weight = torch.randn(sizes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss, right_loss = (found.double() * weight).sum(), (expected * weight).sum()
    assert (lse is not None) == isinstance(program.output, Merged)
    if lse is not None:
        assert output.lse is not None
        expected_lse = output.lse(values).expand(sizes[:3])
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-5)
        reached = expected_lse > -torch.inf
        loss = loss + (torch.where(reached, lse.double(), 0) * weight[..., 0]).sum()
        right_loss = right_loss + (torch.where(reached, expected_lse, 0) * weight[..., 0]).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    exacts = torch.autograd.grad(right_loss, [right[id(x)] for x in leaves], allow_unused=True, materialize_grads=True)
    for x, y in zip(gradients, exacts, strict=True):
        # A gate's gradient is a sum over what it does not follow, of channels and rows.
        summed = max(1.0, found.numel() / max(1, y.numel()))
        allowed = rounding * (values.largest + 1) * 4 * (summed**0.5 + 3)
        assert torch.isfinite(x).all()
        assert float((x.double() - y).abs().max()) <= allowed


def test_compiled_kernels_keep_what_they_read_in_registers() -> None:
    """On devices that are not there: nothing spills, of gates and of merges, at the largest head dimension too."""
    gated = PROGRAM.format("gate[0] * a + gate[1] * b_input + sigmoid(gate[2]) * wide * c")
    joined = PROGRAM.format(
        "wide * merge(a, merge(b_input, c), given(channels[1], near[q])) - a / (2 + gate[0] * gate[0])"
    )
    jobs = [Job(text, "cuda:90", dim, "pointer", combine="gradients") for text in (gated, joined) for dim in (128, 256)]
    jobs.append(Job(joined, "cuda:90", 256, "pointer", combine="forward"))
    for job, found in zip(jobs, compile_all(jobs), strict=True):
        assert found.spills == 0, (job, found)


@interprets
def test_in_a_compiled_graph() -> None:
    attn = attndsl.compile(PROGRAM.format("gate[0] * merge(a, c) + gate[1] * c"))

    def call(shape: CallShape, *tensors: Tensor) -> Tensor:
        a, c, lse_a, lse_c, gate = tensors
        attended: dict[str, tuple[Tensor, Tensor | None]] = {"a": (a, lse_a), "c": (c, lse_c)}
        return combined_by_kernel(attn._key, attn.program, shape, attended, {"gate": gate}, [])[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for rows in (21, 30):
        shape = CallShape(1, 2, 1, rows, rows, 16, 16)
        outs, lses, inputs = drawn(shape, rows, False)
        given = [x.requires_grad_() for x in (outs["a"], outs["c"], lses["a"], lses["c"], inputs["gate"])]
        found, expected = compiled(shape, *given), call(shape, *given)
        torch.testing.assert_close(found, expected)
        gradients = (torch.autograd.grad(x.sum(), given) for x in (found, expected))
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y)


@interprets
def test_what_requires_a_gradient_is_declared_learnable() -> None:
    attn = attndsl.compile(PROGRAM.format("fixed * a"))
    outs, lses, inputs = drawn(shape := CallShape(1, 1, 1, 3, 3, 16, 16), 0, False)
    inputs["fixed"].requires_grad_()
    with pytest.raises(attndsl.PatternError, match="A526"):
        combined_by_kernel(attn._key, attn.program, shape, {"a": (outs["a"], lses["a"])}, inputs, [])
    with pytest.raises(attndsl.PatternError, match="A046"):
        attndsl.compile(PROGRAM.format("merge(a, given(wide, wide))"))
