"""Comparison of patterns: verdicts and witnesses against brute force over small lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from attndsl.canonical import canonical
from attndsl.comparison import COMPARE_EFFORT, Comparison, Undecided, Verdict, compare
from attndsl.effort import compilation
from attndsl.grammar import load
from attndsl.oracle import mask
from attndsl.program import Arg, Program, Read, Type, Var
from attndsl.witness import Witness
from tests.accuracy import examples
from tests.strategies import Case, composed_programs
from tests.tiling import call

STATIC = [
    "all", "none", "causal", "causal & window(3)", "window(4)", "causal & dilated(2)", "strided(4)", "strided(4, 1)",
    "causal & window(3) | strided(4)", "same_block(4)", "same_block(8)", "causal & ~causal", "neighborhood(3)",
    "coarsen(causal & window(2), 4, any)", "causal - window(3)", "window(1) on blocks(4)",
]  # fmt: skip


def program(text: str) -> Program:
    return load(text).program


def by_force(a: Program, b: Program) -> Verdict:
    """The verdict over lengths up to 18."""
    first, second = (np.concatenate([mask(p, call(n, n)).ravel() for n in range(1, 19)]) for p in (a, b))
    more, less = bool(np.any(first & ~second)), bool(np.any(second & ~first))
    match more, less:
        case False, False:
            return Verdict.EQUAL
        case True, False:
            return Verdict.CONTAINS
        case False, True:
            return Verdict.CONTAINED
        case _:
            return Verdict.OVERLAPS if np.any(first & second) else Verdict.DISJOINT


def check_witnesses(found: Comparison, a: Program, b: Program) -> None:
    for witness, expected in ((found.only_first, (1, 0)), (found.only_second, (0, 1)), (found.both, (1, 1))):
        if witness is not None:
            shape = call(witness.q_len, witness.k_len)
            at = (0, 0, witness.q, witness.k)
            assert (mask(a, shape)[at], mask(b, shape)[at]) == expected


@pytest.mark.parametrize("first", STATIC)
def test_static_patterns(first: str) -> None:
    for second in STATIC:
        a, b = program(first), program(second)
        found = compare(a, b)
        assert found.verdict is by_force(a, b), (first, second)
        check_witnesses(found, a, b)
        has = (found.only_first is not None, found.only_second is not None)
        assert has == {
            Verdict.EQUAL: (False, False), Verdict.CONTAINS: (True, False), Verdict.CONTAINED: (False, True),
            Verdict.OVERLAPS: (True, True), Verdict.DISJOINT: (True, True),
        }[found.verdict]  # fmt: skip


def test_equal_patterns_of_different_shape() -> None:
    for first, second in (
        ("causal & window(512)", "window(512)"),
        ("~(causal | sink(4))", "~causal & ~sink(4)"),
        ("all", "causal | { k > q }"),
        ("same_block(64)", "window(1) on blocks(64) | { q // 64 == k // 64 }"),
        ("causal & coarsen(causal, 64, any)", "causal"),
        ("neighborhood(1)", "{ q == k }"),
        ("if Nk > 100 then causal else causal", "causal"),
    ):
        found = compare(program(first), program(second))
        assert found.verdict is Verdict.EQUAL, (first, second, found)
        assert found.both is not None


def test_differences_at_great_lengths_are_found() -> None:
    found = compare(program("causal & window(100_000)"), program("causal"))
    assert found.verdict is Verdict.CONTAINED
    assert found.only_second == Witness(100_000, 0, 100_001, 100_001)
    found = compare(program("{ k <= q and q < 1_000_000 }"), program("causal"))
    assert found.only_second == Witness(1_000_000, 0, 1_000_001, 1_000_001)


def test_cross_attention_has_two_lengths() -> None:
    a, b = (program(f"attention a {{ align start\n attend {text} }}") for text in ("causal", "{ k < Nq }"))
    found = compare(a, b)
    assert found.verdict is Verdict.CONTAINED
    assert found.only_second == Witness(0, 1, 2, 2)
    with pytest.raises(ValueError, match="align start"):
        compare(a, program("causal"))


DATA = """attention x(n : runtime int, m : runtime int) {
    input doc : int[b, k] sorted
    input ids : int[b, k]
    input flag : bool[b, k]
    input width : int[h]
    attend %s
}"""


def data(text: str) -> Program:
    return load(DATA % text).program


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("causal & document(doc)", "causal", Verdict.CONTAINED),
        ("document(doc)", "document(ids)", Verdict.OVERLAPS),
        ("document(doc) & causal", "document(doc) & ~causal", Verdict.DISJOINT),
        # One meaning in two spellings.
        ("{ ids[q] == ids[k] }", "{ ids[k] == ids[q] }", Verdict.EQUAL),
        ("{ ids[q] != ids[k] }", "~document(ids)", Verdict.EQUAL),
        ("{ ids[q] < ids[k] or ids[q] == ids[k] }", "{ ids[k] >= ids[q] }", Verdict.EQUAL),
        ("{ ids[q] < ids[k] }", "{ ids[q] > ids[k] }", Verdict.DISJOINT),
        ("{ not (flag[k] == flag[q]) }", "{ (not flag[k]) != (not flag[q]) }", Verdict.EQUAL),
        # A token agrees with itself.
        ("document(ids) & { q == k }", "{ q == k }", Verdict.EQUAL),
        ("{ flag[k] and q == k }", "{ flag[q] and q == k }", Verdict.EQUAL),
        # Bounds on one value.
        ("{ ids[k] < 3 }", "{ ids[k] <= 5 }", Verdict.CONTAINED),
        ("{ ids[k] == 3 }", "{ ids[k] == 4 }", Verdict.DISJOINT),
        ("{ ids[k] == 3 }", "{ ids[k] > 3 }", Verdict.DISJOINT),
        ("{ 2 < ids[k] < 4 }", "{ ids[k] >= 3 }", Verdict.CONTAINED),
        # Arguments, heads and inputs of heads.
        ("window(n)", "window(n + 1)", Verdict.CONTAINED),
        ("window(n)", "window(m)", Verdict.OVERLAPS),
        ("window(width[h])", "window(n)", Verdict.OVERLAPS),
        ("{ h < H }", "all", Verdict.EQUAL),
        ("{ g <= h }", "all", Verdict.EQUAL),
        ("if h % 2 == 0 then causal else window(4)", "causal", Verdict.CONTAINED),
        ("{ flag[k] or k < n }", "global_tokens(flag) | sink(n)", Verdict.CONTAINED),
    ],
)
def test_data(first: str, second: str, verdict: Verdict) -> None:
    mirrored = {Verdict.CONTAINS: Verdict.CONTAINED, Verdict.CONTAINED: Verdict.CONTAINS}
    assert compare(data(first), data(second)).verdict is verdict
    assert compare(data(second), data(first)).verdict is mirrored.get(verdict, verdict)


def test_witnesses_name_what_they_need() -> None:
    found = compare(data("causal & document(ids) & window(n)"), data("causal & document(ids)"))
    assert found.only_second is not None
    assert (Arg("n"), 0) in found.only_second.values
    ((condition, truth),) = found.only_second.conditions
    assert {x.input for x in (condition.left, condition.right) if isinstance(x, Read)} == {"ids"}  # type: ignore[union-attr]
    assert truth
    assert "ids[b, k] == ids[b, q]" in str(found)
    found = compare(data("{ h < 3 }"), data("{ h < H }"))
    assert found.only_second is not None
    assert dict(found.only_second.values) == {Var("h"): 3, Var("H"): 4}


def test_what_rests_on_unknown_arithmetic_is_undecided() -> None:
    # Equal, as only arithmetic on the data could tell.
    with pytest.raises(Undecided, match="no inputs were found"):
        compare(data("{ ids[k] + 1 < 3 }"), data("{ ids[k] < 2 }"))
    # Different, and inputs that show it are found.
    found = compare(data("{ ids[k] + 1 < 3 }"), data("{ ids[k] > 0 }"))
    assert found.verdict is Verdict.OVERLAPS


def test_tables_of_one_name_may_differ() -> None:
    text = "attention t(span : int[h]) { attend causal & window(span[h]) }"
    a, b, same = (load(text, params={"span": spans}).program for spans in ([4, 8], [4, 16], [4, 8]))
    assert compare(a, same).verdict is Verdict.EQUAL
    found = compare(a, b)
    # Head 0 is the same in both.
    assert found.verdict is Verdict.CONTAINED
    assert found.only_second is not None
    assert [value for _, value in found.only_second.values] == [8, 16]


def test_inputs_of_one_name_must_agree() -> None:
    a = load("attention a { input x : int[b]\n attend window(x[b]) }").program
    b = load("attention a { input x : int[h]\n attend window(x[h]) }").program
    with pytest.raises(ValueError, match="`x` is declared in two ways"):
        compare(a, b)


def test_effort_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = program(" | ".join(f"dilated({m})" for m in (7, 11, 13, 17, 19, 23, 29)))
    other = program(" & ".join(f"~dilated({m})" for m in (5, 8, 9, 31)))
    with compilation() as taking:
        try:
            compare(hostile, other)
        except Undecided as e:
            assert "effort" in str(e)
    # The last operation may be a large one, and what is spent is told to an eighth.
    assert 0 < taking.taken < 1.2 * COMPARE_EFFORT
    monkeypatch.setattr("attndsl.comparison.COMPARE_EFFORT", 10)
    with pytest.raises(Undecided, match="passes the effort bound"):
        compare(hostile, other)


def test_text_of_a_comparison() -> None:
    named = "pattern near = causal & window(4)\npattern far = causal & window(8)"
    a, b = (load(named, select=name).program for name in ("near", "far"))
    assert str(compare(a, b)).splitlines() == [
        "contained: `near` allows only pairs that `far` allows, and not all of them",
        "  only in `far`: q = 4, k = 0 at Nk = 5",
        "  in both: q = 0, k = 0 at Nk = 1",
    ]
    assert str(compare(program("causal"), program("causal"))).startswith("equal: the first and the second allow")


@given(case=composed_programs(max_depth=2, lengths=(7, 16), scores=False))
@examples(60)
def test_canonical_form_keeps_the_mask(case: Case) -> None:
    whole = case.load()
    changed = whole.with_branch(pattern=canonical(whole.branch.pattern))
    expected = mask(whole, case.shape, case.inputs, case.args)
    np.testing.assert_array_equal(mask(changed, case.shape, case.inputs, case.args), expected)


@given(case=composed_programs(max_depth=2, lengths=(7, 16), scores=False))
@examples(40)
def test_a_pattern_within_itself(case: Case) -> None:
    whole = case.load()
    reads_floats = any(decl.type is Type.FLOAT for decl in whole.inputs)
    assert not reads_floats
    try:
        found = compare(whole, whole)
    except Undecided:
        return
    assert found.verdict is Verdict.EQUAL
