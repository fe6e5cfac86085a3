"""Derivatives of scores against torch's, on chosen and on random expressions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any, assert_never

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from attndsl.grammar import load
from attndsl.notation import scalar_text
from attndsl.program import (
    COMPARISONS,
    Arg,
    Binary,
    Call,
    Compare,
    Const,
    If,
    Logic,
    Read,
    Scalar,
    Table,
    Type,
    Unary,
    Var,
    rebuild,
    substitute,
    walk,
)
from attndsl.score import derivative, derivatives, learnable_reads
from tests.accuracy import examples

S = Var("s")
INT = Binary("-", Var("q"), Var("k"))
A, B = (Read(name, (Var("h"),), Type.FLOAT) for name in "ac")
LEAVES: tuple[Scalar, ...] = (S, S, A, B, Var("q"), INT, Const(0.5), Const(-2.0), Const(3))


# ---------------------------------------------------------------------------------- evaluation


TORCH: dict[str, Any] = {
    "+": torch.add, "-": torch.sub, "*": torch.mul, "/": torch.div, "<": torch.lt, "<=": torch.le, ">": torch.gt,
    ">=": torch.ge, "==": torch.eq, "!=": torch.ne,
}  # fmt: skip


def value(e: Scalar, at: Mapping[Scalar, Tensor]) -> Tensor:
    """A scalar in float64, given its leaves."""
    match e:
        case Const(value=number):
            return torch.tensor(float(number), dtype=torch.float64)
        case Var() | Read() | Arg() | Table():
            return at[e]
        case Unary(operand=x):
            return -value(x, at)
        case Binary(op=op, left=a, right=b) | Compare(op=op, left=a, right=b):
            found: Tensor = TORCH[op](value(a, at), value(b, at))
            return found
        case If(cond=c, then=a, other=b):
            # As an `if`, so that the other side's derivative is never formed.
            return value(a if value(c, at) else b, at)
        case Call(function=name, args=xs):
            return call(name, [value(x, at) for x in xs])
        case Logic():
            raise AssertionError("not drawn")
        case _:
            assert_never(e)


def call(name: str, xs: list[Tensor]) -> Tensor:
    match name, xs:
        case "min", _:
            return reduce(torch.minimum, xs)
        case "max", _:
            return reduce(torch.maximum, xs)
        case "clamp", [x, low, high]:
            return torch.minimum(torch.maximum(x, low), high)
        case "softcap", [x, cap]:
            return cap * torch.tanh(x / cap)
        case "sigmoid", [x]:
            return torch.sigmoid(x)
        case _, [x]:
            found: Tensor = getattr(torch, name)(x)
            return found
        case _:
            raise AssertionError(name)


def check(e: Scalar, s: float, a: float, b: float, q: int, k: int) -> bool:
    """Compare the derivatives by s, a and b at a point with torch's; False if it has none there worth comparing."""
    variables: tuple[Var | Read, ...] = (S, A, B)
    at: dict[Scalar, Tensor] = {
        leaf: torch.tensor(float(x), dtype=torch.float64)
        for leaf, x in zip((*variables, Var("q"), Var("k")), (s, a, b, q, k), strict=True)
    }
    for variable in variables:
        at[variable].requires_grad_()
    found = value(e, at)
    if not abs(found.item()) < 1e6:
        return False
    slopes: tuple[Tensor | None, ...] = (None, None, None)
    if found.requires_grad:
        slopes = torch.autograd.grad(found, [at[x] for x in variables], allow_unused=True)
    for variable, slope in zip(variables, slopes, strict=True):
        expected = 0.0 if slope is None else float(slope)
        if not abs(expected) < 1e6:
            return False
        derived = derivative(e, variable)
        assert derived.type is not Type.BOOL
        assert math.isclose(value(derived, at).item(), expected, rel_tol=1e-6, abs_tol=1e-6), (variable, derived)
    return True


# ---------------------------------------------------------------------------------- expressions


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> Scalar:
    if depth == 0:
        return draw(st.sampled_from(LEAVES))
    inner = expressions(depth - 1)
    kind = draw(st.sampled_from(("leaf", "binary", "binary", "binary", "unary", "call", "call", "choice", "if")))
    match kind:
        case "leaf":
            return draw(st.sampled_from(LEAVES))
        case "binary":
            return Binary(draw(st.sampled_from("+-*/")), draw(inner), draw(inner))
        case "unary":
            return Unary("-", draw(inner))
        case "call":
            name = draw(st.sampled_from(("exp", "exp2", "log", "sqrt", "tanh", "sigmoid", "softcap")))
            args = (draw(inner), Const(2.5)) if name == "softcap" else (draw(inner),)
            return Call(name, args)
        case "choice":
            name, count = draw(st.sampled_from((("min", 2), ("max", 3), ("abs", 1))))
            return Call(name, tuple(draw(inner) for _ in range(count)))
        case _:
            return If(
                Compare(draw(st.sampled_from(sorted(COMPARISONS))), draw(inner), draw(inner)), draw(inner), draw(inner)
            )


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers at which no two expressions are equal by accident."""
    return st.integers(0, 10**6).map(lambda n: low + (high - low) * math.fmod(n * 0.6180339887498949 + 0.1234567, 1.0))


@given(e=expressions(), s=floats(-2, 2), a=floats(0.3, 3), b=floats(-3, -0.3), q=st.integers(1, 9), k=st.integers(0, 9))
@examples(400)
def test_random(e: Scalar, s: float, a: float, b: float, q: int, k: int) -> None:
    # Where the operands of a choice are one expression twice, torch gives half a derivative to each.
    for node in walk(e):
        if isinstance(node, Call) and node.function in ("min", "max"):
            assume(len(set(node.args)) == len(node.args))
    assume(check(e, s, a, b, q, k))


CHOSEN = [
    "softcap(s, 5.0)",
    "s - a[h] * (q - k)",
    "a[h] * (q - k) * (q - k) * s / c[h]",
    "s * sigmoid(a[h] * s) + c[h] * c[h]",
    "clamp(s * a[h], -1.0, 1.5) * exp(s)",
    "if s > a[h] then log(s) else tanh(s) * c[h]",
    "abs(s - a[h]) + min(s, c[h], a[h])",
    "exp2(-8 * (h + 1) / 4) * sqrt(s * s + 1)",
    "exp(s) * exp(a[h]) / exp(c[h])",
    "softcap(a[h], a[h] + 2)",
]


def score(text: str) -> tuple[Any, Scalar]:
    program = load(
        f"attention x {{ input a : float[h] learnable\n input c : float[h] learnable\n input d : float[h]\n"
        f"score {text}\n attend causal }}"
    ).program
    assert program.branch.score is not None
    return program, program.branch.score


@pytest.mark.parametrize("text", CHOSEN)
@pytest.mark.parametrize("s", [-1.7, -0.2, 0.4, 1.9])
def test_chosen(text: str, s: float) -> None:
    _, e = score(text)
    e = substitute(e, {"h": Const(0)})
    e = rebuild(e, lambda x: {"a": A, "c": B}[x.input] if isinstance(x, Read) else x)
    assert check(e, s, 0.7, -1.3, 9, 4)


@pytest.mark.parametrize(
    ("text", "slope"),
    [
        ("s", "s => 1.0"),
        ("s + a[h] * k", "s => 1.0"),
        ("2 * s", "s => 2.0"),
        ("s * d[h]", "s => d[h]"),
        ("softcap(s, 50.0)", "s => 1.0 - 0.0004 * (softcap(s, 50.0) * softcap(s, 50.0))"),
        ("if q > k then s - log(q - k) else s", "s => 1.0"),
        ("if q > k then s else 2.0", "s => if q > k then 1.0 else 0.0"),
        ("a[h] * (q - k) + s", "a => q - k"),
        ("a[h] * (q - k) * (q - k) + s", "a => 1.0 * (q - k) * (q - k)"),
    ],
)
def test_written(text: str, slope: str) -> None:
    """As cheap as they can be: what does not change stays as it was written, and functions are those of the score."""
    variable, _, expected = slope.partition(" => ")
    program, e = score(text)
    at: Var | Read = S if variable == "s" else next(x for x in learnable_reads(e, program) if x.input == variable)
    assert scalar_text(derivative(e, at)).replace("b, ", "") == expected


def test_kinks() -> None:
    """At a kink the derivative is that of the side taken, the first among equals; at 0 that of `abs` is 0."""
    zero: dict[Scalar, Tensor] = {
        S: torch.tensor(0.0).double(),
        A: torch.tensor(0.0).double(),
        B: torch.tensor(2.0).double(),
    }
    assert float(value(derivative(Call("abs", (S,)), S), zero)) == 0
    assert float(value(derivative(Call("max", (S, A)), S), zero)) == 1
    assert float(value(derivative(Call("max", (S, A)), A), zero)) == 0
    assert float(value(derivative(Call("clamp", (S, Const(0.0), Const(1.0))), S), zero)) == 1


def test_learnable_reads() -> None:
    program, e = score("s * c[h] + a[h] * a[0] + d[h] + a[h] + (if c[0] > 0 then s else 0)")
    found = learnable_reads(e, program)
    assert sorted(x.input for x in found) == ["a", "a", "c", "c"]
    # c[0] decides, which has no derivative.
    assert sorted(read.input for read, _ in derivatives(e, program)) == ["a", "a", "c"]
    assert derivatives(None, program) == ()
