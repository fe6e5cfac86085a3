"""What remembers by identity keeps the nodes: a scalar that is gone leaves its identity to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attndsl
from attndsl.oracle import Evaluator
from attndsl.program import Binary, CallShape, Compare, Const, Scalar, Var
from attndsl.runtime.combine import Combiner
from attndsl.runtime.reference_scalars import Pairs
from attndsl.runtime.values import Values

SHAPE = CallShape(1, 1, 1, 1, 1, 8, 8)
CPU = torch.device("cpu")


def evaluators() -> dict[str, Callable[[Scalar], Any]]:
    program = attndsl.compile("attention a { attend causal }").program
    evaluator = Evaluator.of_call(program, SHAPE, {}, {})
    return {
        "values": Values(program, SHAPE, CPU, {}, {}, {}, {"q": 0}).number,
        "evaluator": evaluator.scalar,
        "pairs": Pairs(evaluator, {}, torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.float64).scalar,
        "combiner": Combiner(program, SHAPE, CPU, {}, {}, {}).number,
    }


@pytest.mark.parametrize("name", ["values", "evaluator", "pairs", "combiner"])
def test_a_temporary_takes_no_place(name: str) -> None:
    """Each scalar is gone before the next is made, so that in its memory, where one was remembered, the next lies."""
    value = evaluators()[name]
    made: list[Callable[[int], Scalar]] = [Const, lambda n: Binary("+", Const(n), Const(1))]
    for plus, of in enumerate(made):
        found = [int(np.asarray(value(of(n))).reshape(())) for n in range(40)]
        assert found == [n + plus for n in range(40)]


def test_a_node_has_one_value() -> None:
    """A shared node is computed once: what is remembered is found again."""
    program = attndsl.compile("attention a { attend causal }").program
    values = Values(program, SHAPE, CPU, {}, {}, {}, {"q": torch.arange(3)})
    e = Compare("<", Var("q"), Const(2))
    assert values.tensor(e) is values.tensor(e)
