"""The integer relation of a pattern holds the oracle's pairs, and stays bounded where sets grow too hard."""

from __future__ import annotations

import islpy as isl
import numpy as np
import pytest
from hypothesis import assume, given

from attndsl.blockruns import Reader
from attndsl.derivation import Draw
from attndsl.derive import derive
from attndsl.effort import EFFORT, GRAIN, Budget, TooHard, bounded, compilation
from attndsl.grammar import load
from attndsl.mask import IN_RANGE, pair_mask, without_redundant
from attndsl.oracle import evaluate, mask
from attndsl.program import CallShape, Logic, Program, Type
from attndsl.relation import Lowering, Relation, build_relation
from attndsl.runs import Side
from attndsl.simplify import fold
from attndsl.tiles import tile_runs
from tests.accuracy import examples
from tests.derived import derived
from tests.strategies import Case, composed_programs
from tests.tiling import SIDES, Array, call, check_tiles, side_runs, visits

PATTERNS = [
    "all",
    "none",
    "causal & window(5)",
    "causal & (window(3) | sink(2) | strided(4, 3))",
    "~(causal & dilated(3))",
    "same_block(4, -3) - causal",
    "power_of_two",
    "neighborhood(4, 2, 3)",
    "window(2) on blocks(3)",
    "coarsen(band(1, 2), (3, 2), any) & causal",
    "coarsen(causal, 4, all) on blocks(2)",
    "{ bit_length(q - k) > 2 }",
    "{ clamp(q - k, -2, 3) % 3 == max(q, k) % 2 }",
    "if Nk % 3 == 0 then causal else { (-q) // 2 <= -k }",
    "{ (q >= Nk // 2) == (k >= Nk // 2) and q // 3 == k // 3 }",
    "causal & { (q % 3 == 0) != (k % 2 == 0 or k < 4) }",
]


def pairs_at(relation: Relation, shape: CallShape, values: dict[str, int], align_start: bool = False) -> Array:
    """bool [rows, k_len]: the pairs that the set has once its parameters are known."""
    pairs, ctx = relation.pairs, relation.pairs.get_ctx()
    known = {"Nk": shape.k_len, "Nq": shape.rows if align_start else shape.k_len, **values}
    for name, value in known.items():
        position = pairs.find_dim_by_name(isl.dim_type.param, name)
        if position >= 0:
            pairs = pairs.fix_val(isl.dim_type.param, position, isl.Val.int_from_si(ctx, value))
    first = 0 if align_start else shape.k_len - shape.rows
    grid = isl.Set.read_from_str(
        ctx, f"{{ [q, k] : {max(0, first)} <= q < {first + shape.rows} and 0 <= k < {shape.k_len} }}"
    )
    inside = np.zeros((shape.rows, shape.k_len), np.bool_)
    found: list[tuple[int, int]] = []

    def note(point: isl.Point) -> None:
        q, k = (int(point.get_coordinate_val(isl.dim_type.set, i).to_python()) for i in range(2))
        found.append((q - first, k))

    pairs.project_out_all_params().intersect(grid).foreach_point(note)
    for row, key in found:
        inside[row, key] = True
    return inside


@pytest.mark.parametrize("text", PATTERNS)
def test_pairs_equal_the_mask(text: str) -> None:
    program = load(text).program
    relation = build_relation(program, (1, 1))
    assert relation.notes == ()
    for rows, k_len in ((1, 1), (7, 7), (3, 8), (12, 12)):
        shape = call(rows, k_len)
        expected = mask(program, shape)[0, 0]
        np.testing.assert_array_equal(pairs_at(relation, shape, {}), expected)


@pytest.mark.parametrize("text", ["{ k <= 2 * q }", "{ q + k < Nq }", "{ q % 3 == k % 3 or k >= Nk - Nq }"])
def test_pairs_under_align_start(text: str) -> None:
    program = load(f"attention a {{ align start\n attend {text} }}").program
    relation = build_relation(program, (1, 1))
    for rows, k_len in ((1, 1), (3, 9), (9, 3)):
        shape = call(rows, k_len)
        np.testing.assert_array_equal(pairs_at(relation, shape, {}, align_start=True), mask(program, shape)[0, 0])


DATA = """attention mixed(n : runtime int) {
    input width : int[h]
    input dense : bool[g]
    input doc : int[b, k]
    input flag : bool[b, k]
    attend %s
}"""


@pytest.mark.parametrize(
    "text",
    [
        "causal & window(width[h] + n)",
        "if dense[g] then causal else window(n * width[h])",
        "causal & document(doc)",
        "(document(doc) | global_tokens(flag)) - window(n)",
        "{ doc[q] <= doc[k] and (flag[k] or q - k < width[h]) }",
        "causal & { flag[k] == dense[g] or flag[q] != (q % 2 == 0) }",
    ],
)
def test_pairs_with_known_scalars_and_conditions(text: str) -> None:
    program = load(DATA % text).program
    relation = build_relation(program, (2, 1))
    shape = call(6, 9, heads=2, kv_heads=1)
    rng = np.random.default_rng(3)
    inputs = {
        "width": np.array([2, 5]), "dense": np.array([False]),
        "doc": rng.integers(0, 3, (1, 9)), "flag": rng.random((1, 9)) < 0.3,
    }  # fmt: skip
    args = {"n": 2}
    expected = mask(program, shape, inputs, args)[0]
    for h in range(2):
        at = {
            name: np.broadcast_to(evaluate(e, program, shape, inputs, args), (1, 2, 6, 9))[0, h]
            for name, e in (relation.uniform | relation.atoms).items()
        }
        for row, key in np.ndindex(6, 9):
            # A condition on data is a parameter: it has one value, that of the pair in question.
            values = {name: int(value[row, key]) for name, value in at.items()}
            assert pairs_at(relation, shape, values)[row, key] == expected[h, row, key]


def masks(program: Program, shape: CallShape) -> dict[str, object]:
    """The pattern as the conditions that a kernel may use for its pairs."""
    program = derive(program)
    lowering = Lowering(program, (shape.heads, shape.kv_heads))
    relation = lowering.relation(program.branch.pattern)
    written = fold(lowering.predicate(program.branch.pattern))
    least = without_redundant(lowering, written)
    return {"written": written, "least": least, "chosen": pair_mask(relation, least)}


@pytest.mark.parametrize("text", PATTERNS)
def test_conditions_equal_the_mask(text: str) -> None:
    program = load(text).program
    for rows, k_len in ((1, 1), (7, 7), (3, 8), (12, 12)):
        shape = call(rows, k_len)
        expected = mask(program, shape)
        for name, e in masks(program, shape).items():
            if e is not None:
                value = np.broadcast_to(evaluate(e, program, shape), expected.shape)  # type: ignore[arg-type]
                np.testing.assert_array_equal(value, expected, err_msg=name)
            else:
                assert name == "chosen" and expected.all()


# Conditions of the author's own that bound keys, or seem to.
BOUNDING = [
    "{ k < Nk and k % 3 == 0 }",
    "{ k <= Nk - 1 and k // 3 <= q }",
    "{ k < Nq }",
    "{ q + k < Nk }",
    "~{ k >= Nk }",
]


@pytest.mark.parametrize(
    "text", [*PATTERNS, *BOUNDING, *(f"attention a {{ align start\n attend {x} }}" for x in BOUNDING)]
)
def test_keys_past_the_last_one_are_masked(text: str) -> None:
    """The last tile reaches past the keys, and what lies there has a score of 0, not of minus infinity."""
    program = load(text).program
    for rows, k_len in ((1, 1), (3, 8), (12, 12), (9, 12)):
        shape = call(rows, k_len)
        for name, e in masks(program, shape).items():
            if name != "written" and e is not None:
                reader = Reader(program, shape, {}, {})
                q, k = np.arange(rows)[:, None] + shape.first_position(program), np.arange(k_len, k_len + 9)
                value = reader.value(e, reader.variables(np.array(0), np.array(0)) | {"q": q, "k": k})  # type: ignore[arg-type]
                assert not value.any(), name


def test_a_map_of_single_keys_is_masked_past_the_last_one() -> None:
    program = load("attention a { input d : int[b, k]  attend coarsen({ d[k] == 1 }, 1, any) }").program
    least = masks(program, call(7, 7))["least"]
    assert isinstance(least, Logic)
    assert IN_RANGE in least.operands


@given(case=composed_programs(max_depth=2, lengths=(1, 7, 16, 33), scores=False))
@examples(200)
def test_conditions_of_composed_programs(case: Case) -> None:
    program, shape = case.load(), case.shape
    try:
        found = masks(program, shape)
    except TooHard:
        assume(False)
    expected = mask(program, shape, case.inputs, case.args)
    program, inputs = derived(program, shape, case.inputs, case.args)
    # Only kernels hash: what is drawn is tested with them.
    assume(not any(isinstance(decl.derivation, Draw) for decl in program.inputs))
    exists = np.arange(shape.rows).reshape(1, 1, -1, 1) + shape.first_position(program) >= 0
    for name, e in found.items():
        value = True if e is None else evaluate(e, program, shape, inputs, case.args)  # type: ignore[arg-type]
        np.testing.assert_array_equal(np.broadcast_to(value, expected.shape) & exists, expected, err_msg=name)


# ------------------------------------------------------------------------------------------- effort


@pytest.mark.parametrize("text", ["causal & (window(5) | strided(4, 3))", "neighborhood(5)", "same_block(6, 3)"])
def test_past_the_effort_tiles_are_a_superset(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, shape = load(text).program, call(16, 16)
    exact = {
        side: visits(program, shape, side_runs(program, shape, 4, 4, side)[1], 4, 4, side, {}, {}) for side in Side
    }
    monkeypatch.setattr("attndsl.tiles.SCAN_EFFORT", 1)
    relation = build_relation(program, (1, 1))
    for side in SIDES:
        runs = tile_runs(relation, 4, 4, side)
        visited, full = visits(program, shape, runs, 4, 4, side, {}, {})
        assert full.sum() == 0
        assert np.all(visited >= exact[side][0])
    check_tiles(program, shape, 4, 4)


def test_a_condition_past_the_effort_becomes_data(monkeypatch: pytest.MonkeyPatch) -> None:
    program, shape = load("causal & neighborhood(4, 2, 3)").program, call(16, 16)
    monkeypatch.setattr("attndsl.relation.RELATION_EFFORT", 20)
    lowering = Lowering(program, (1, 1))
    relation = lowering.relation(program.branch.pattern)
    assert relation.notes
    assert relation.atoms
    assert all(atom.type is Type.BOOL for atom in relation.atoms.values())
    written = fold(lowering.predicate(program.branch.pattern))
    chosen = pair_mask(relation, written)
    assert chosen is not None
    np.testing.assert_array_equal(
        np.broadcast_to(evaluate(chosen, program, shape), (1, 1, 16, 16)), mask(program, shape)
    )
    check_tiles(program, shape, 4, 4)


def test_a_bound_inside_a_bound_leaves_the_outer_one() -> None:
    ctx = isl.Context()
    a = isl.Set.read_from_str(ctx, "{ [x, y] : x % 7 = 1 or y % 11 = 2 or x + y > 5 }")

    def outer() -> None:
        bounded(ctx, lambda: a.is_empty(), 100_000)
        for _ in range(1000):
            a.complement().complement()

    with pytest.raises(TooHard):
        bounded(ctx, outer, 2000)
    # What was refused is allowed again.
    assert not a.complement().is_empty()


def test_steps_inside_a_bound_share_it() -> None:
    ctx, done = isl.Context(), []
    a = isl.Set.read_from_str(ctx, "{ [x, y] : x % 7 = 1 or y % 11 = 2 or x + y > 5 }")

    def outer() -> None:
        for _ in range(1000):
            done.append(bounded(ctx, a.complement, 10_000))

    with pytest.raises(TooHard):
        bounded(ctx, outer, 40_000)
    assert 0 < len(done) < 1000
    assert ctx.get_max_operations() == 0


def test_steps_of_a_budget_share_it() -> None:
    ctx, budget, done = isl.Context(), Budget(40_000), 0
    a = isl.Set.read_from_str(ctx, "{ [x, y] : x % 7 = 1 or y % 11 = 2 or x + y > 5 }")
    with pytest.raises(TooHard):
        for _ in range(1000):
            before = budget.left
            budget.bounded(ctx, a.complement)
            assert budget.left <= before - GRAIN
            done += 1
    assert 0 < done <= 40_000 // GRAIN + 1


@pytest.mark.parametrize(
    "text",
    [
        " | ".join(f"dilated({m})" for m in (7, 11, 13, 17, 19, 23, 29, 31, 37)),
        " & ".join(f"~strided({m}, {m // 2})" for m in (7, 11, 13, 17, 19, 23)),
        "neighborhood(48, 5, 7) & neighborhood(31, 3, 11)",
    ],
)
def test_hostile_patterns_take_bounded_effort(text: str) -> None:
    """In operations: what they take of a clock is the machine's."""
    with compilation() as taking:
        runs = tile_runs(build_relation(load(text).program, (1, 1)), 128, 128, Side.QUERY)
    assert runs.full or runs.partial
    assert 0 < taking.taken < 2 * EFFORT


def test_the_bound_may_be_passed_while_reading() -> None:
    """isl's reader may report it as a syntax error."""
    cases = "; ".join(f"[x] -> [{i}] : {1 << i} <= x < {2 << i}" for i in range(31))
    causes = set()
    for effort in range(1, 6000, 7):
        ctx = isl.Context()
        try:
            bounded(ctx, lambda ctx=ctx: isl.PwAff.read_from_str(ctx, f"{{ {cases} }}"), effort)  # type: ignore[misc]
        except TooHard as passed:
            causes.add("syntax error" in str(passed.__cause__))
    assert causes == {True, False}
