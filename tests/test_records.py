"""Plans as text and back: equal, of the same types, sharing what they share; and nothing else is ever made."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from attndsl import records
from attndsl.derive import derive
from attndsl.diagnostics import PatternError
from attndsl.grammar import load
from attndsl.piece_plans import backward_plans
from attndsl.plan import BackwardPlan, Loads, Spec, Tiling
from attndsl.program import Binary, Const, Program, Scalar, Var, walk
from attndsl.runtime.printing import _LEFT_OUT, _recorded
from attndsl.targets import make_spec
from tests.accuracy import examples
from tests.strategies import Case, composed_programs


def again(value: Any, program: Program | None = None) -> Any:
    put_in = {"BackwardPlan": {"program": program}}
    return records.read(records.write(value, _LEFT_OUT if program else {}), _recorded(), put_in)


def check_plans(program: Program, spec: Spec) -> None:
    plans = backward_plans(program, spec, (Tiling(32, 32), Tiling(32, 32)))
    found = again(plans, plans[0].program)
    assert found == plans
    # Python takes 1 for equal to true: equality alone does not see the types of all fields.
    assert repr(found) == repr(plans)


@given(case=composed_programs(max_depth=2, lengths=(16,), dims=(64,)))
@examples(25)
def test_plans_of_composed_programs(case: Case) -> None:
    program = case.load()
    check_plans(program, make_spec("sm_80", "triton", case.shape.heads, case.shape.kv_heads, 64, dtype="fp16"))


def test_shared_parts_stay_shared() -> None:
    e: Scalar = Var("q")
    for _ in range(60):
        e = Binary("+", e, e)
    found = again((e, Const(True), Const(1), Const(1.0), Tiling(16, 32)))
    assert len(list(walk(found[0]))) == 61
    assert [type(x.value) for x in found[1:4]] == [bool, int, float]
    assert found[4] == Tiling(16, 32)
    assert again(Loads.DESCRIPTOR) is Loads.DESCRIPTOR


def test_literals_of_other_types_are_others() -> None:
    literals = [Const(1), Const(1.0), Const(True)]
    assert len({*literals}) == 3
    assert len({Binary("*", Var("s"), x) for x in literals[:2]}) == 2, "and so is what is made of them"


def test_only_known_classes_are_made() -> None:
    with pytest.raises(ValueError, match="no record"):
        records.read(json.dumps([[["PatternError", "x"]], [0]]), _recorded())
    with pytest.raises(TypeError):
        records.write((PatternError,))
    with pytest.raises(TypeError):
        records.write([1])
    assert not {"object", "Path", "CallShape"} & _recorded().keys()


def test_what_is_left_out_is_put_in() -> None:
    program = derive(load("causal").program)
    plans = backward_plans(program, make_spec("sm_80", "triton", 2, 2, 64), (Tiling(16, 16), Tiling(16, 16)))
    other = replace(program, name="other")
    (found,) = again(plans, other)
    assert isinstance(found, BackwardPlan)
    assert found == replace(plans[0], program=other)
