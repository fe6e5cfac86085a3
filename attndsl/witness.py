"""Witnesses: a pair of positions, with values of what a pattern reads, that shows what a claim about it says.

Integer sets take conditions on data for free booleans, so what they find may be impossible: `ids[k] < 3` and
`ids[k] > 5` of one pair. `attndsl/worlds.py` looks for inputs that make a witness true.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from attndsl.program import Arg, Binary, Call, Compare, Const, If, Logic, Read, Scalar, Table, Unary, Var


@dataclass(frozen=True, slots=True)
class Witness:
    """A pair (q, k) of a call, and what must hold of other scalars there.

    `values`: of the scalars that do not read q or k (heads, arguments, inputs of b or h). `conditions`: on data,
    each with its truth.
    """

    q: int
    k: int
    q_len: int
    k_len: int
    values: tuple[tuple[Scalar, int], ...] = ()
    conditions: tuple[tuple[Scalar, bool], ...] = ()

    def __str__(self) -> str:
        lengths = f"Nk = {self.k_len}" if self.q_len == self.k_len else f"Nq = {self.q_len}, Nk = {self.k_len}"
        facts = [f"{show(e)} = {value}" for e, value in self.values]
        facts += [show(e) if truth else f"not {show(e)}" for e, truth in self.conditions]
        return f"q = {self.q}, k = {self.k} at {lengths}" + (f", with {', '.join(facts)}" if facts else "")


def show(e: Scalar) -> str:
    """The scalar as the language writes it."""
    match e:
        case Const(value=bool(value)):
            return "true" if value else "false"
        case Const(value=value):
            return str(value)
        case Var(name=name) | Arg(name=name):
            return name
        case Table(name=name, index=index) | Read(input=name, index=index):
            return f"{name}[{', '.join(map(show, index))}]"
        case Unary(op=op, operand=x):
            return f"{op} {_inner(x)}" if op == "not" else f"-{_inner(x)}"
        case Binary(op=op, left=a, right=b) | Compare(op=op, left=a, right=b):
            return f"{_inner(a)} {op} {_inner(b)}"
        case Logic(op=op, operands=xs):
            return f" {op} ".join(map(_inner, xs))
        case If(cond=c, then=a, other=b):
            return f"if {show(c)} then {show(a)} else {show(b)}"
        case Call(function=name, args=xs):
            return f"{name}({', '.join(map(show, xs))})"
        case _:
            assert_never(e)


def _inner(e: Scalar) -> str:
    return f"({show(e)})" if isinstance(e, Unary | Binary | Compare | Logic | If) else show(e)
