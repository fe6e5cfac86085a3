"""Conditions on sorted data as intervals: what is recognised, which tiles it spares, and what unsorted data does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attndsl
from attndsl.blockruns import Reader
from attndsl.cut_values import cut_values
from attndsl.cuts import Interval, entry, interval, with_cuts
from attndsl.derive import derive
from attndsl.grammar import load
from attndsl.oracle import mask
from attndsl.plan import Tiling, backward_plan, forward_plan
from attndsl.program import CallShape, Compare, Program, Scalar, Var, Where, scalars, walk
from attndsl.runs import Side
from attndsl.runtime.cuts import searched
from attndsl.runtime.derive import Deriver
from attndsl.targets import make_spec
from tests.gpu import interprets
from tests.tiling import call, check_tiles, side_runs, visits

CPU = torch.device("cpu")
RNG = np.random.default_rng(5)

DECLARED = """
    input doc : int[b, k] sorted
    input part : int[h, k/8] sorted
    input limit : int[b, q] sorted
    input pivot : int[b]
    input loose : int[b, k]
"""
# Sets whose conditions on data are all intervals.
SORTED = {
    "documents": "causal & document(doc)",
    "both ways": "document(doc)",
    "other documents": "window(40) - document(doc)",
    "sink of the sequence": "causal & (document(doc) | sink(4))",
    "near documents": "causal & { doc[q] - doc[k] < 2 }",
    "later documents": "{ doc[k] > doc[q] + 1 }",
    "before and after": "{ doc[q] <= doc[k] <= doc[q] + 1 } | window(9)",
    "one document": "causal & { doc[k] == 1 }",
    "rows of a document": "causal & { doc[q] == pivot }",
    "roles": "causal & { doc[q] == doc[k] or doc[k] == 0 or doc[q] == pivot }",
    "blocks of tokens": "causal & { part[q // 8] == part[k // 8] }",
    "scaled": "causal & { 2 * doc[q] - 3 < min(doc[k], 4) + doc[k] }",
    "limits": "{ k < limit[q] }",
    "limits of both": "{ k < limit[q] + 9 and doc[k] != pivot }",
    "scattered": "causal & dilated(4) & document(doc)",
}
# Comparisons that are none.
OTHERS = (
    "{ loose[q] == loose[k] }",
    "{ doc[q] + doc[k] < 5 }",
    "{ doc[q] * doc[k] < 5 }",
    "{ doc[q] - doc[k] == k - q + doc[q - k] }",
    "{ doc[q] % 2 == doc[k] % 2 }",
)
# Comparisons whose data cancels: what is left compares positions.
CANCELLED = (
    "{ doc[q] + k <= doc[q] + q }",
    "{ 3 <= 0 * doc[q] + k }",
    "{ min(doc[k] - doc[k], 4) + 9 <= q }",
    "{ 2 * doc[q] != doc[q] + doc[q] + k }",
)


def program_of(pattern: str) -> Program:
    return load(f"attention a {{ {DECLARED} attend {pattern} }}").program


def data(shape: CallShape, ordered: bool = True) -> dict[str, Any]:
    blocks, h = -(-shape.k_len // 8), shape.heads
    sizes = {"doc": (shape.batch, shape.k_len), "part": (h, blocks), "limit": (shape.batch, shape.rows)}
    most = {"doc": 5, "part": 4, "limit": shape.k_len + 9}
    found = {name: RNG.integers(-1, most[name], size) for name, size in sizes.items()}
    if ordered:
        found = {name: np.sort(x, axis=-1) for name, x in found.items()}
    return found | {
        "pivot": RNG.integers(0, 4, shape.batch),
        "loose": RNG.integers(0, 3, (shape.batch, shape.k_len)),
    }


def conditions(program: Program) -> list[Scalar]:
    return [x for e in scalars(program.branch.pattern) for x in walk(e) if isinstance(x, Compare)]


def intervals(program: Program, owner: str) -> list[Interval | None]:
    return [interval(cond, program, owner) for cond in conditions(program)]


# ------------------------------------------------------------------------------------ recognition


@pytest.mark.parametrize("pattern", (*OTHERS, *CANCELLED))
def test_what_is_no_interval_declares_no_cut(pattern: str) -> None:
    program = program_of(pattern)
    assert intervals(program, "q") == intervals(program, "k") == [None]
    assert with_cuts(program) is program


@pytest.mark.parametrize("pattern", CANCELLED)
def test_data_that_cancels_compares_positions(pattern: str) -> None:
    attn = attndsl.compile(f"attention a {{ {DECLARED} attend {pattern} }}")
    shape = CallShape(1, 2, 1, 37, 37, 16, 16)
    q, k, v = (torch.randn(1, n, 37, 16, dtype=torch.float64) for n in (2, 1, 1))
    values = data(shape)
    given: dict[str, Any] = {decl.name: torch.as_tensor(values[decl.name]) for decl in attn.program.inputs}
    torch.testing.assert_close(attn(q, k, v, **given), attn.reference(q, k, v, **given))


@pytest.mark.parametrize("name", SORTED)
@pytest.mark.parametrize("owner", ["q", "k"])
def test_an_interval_holds_exactly_what_its_condition_holds(name: str, owner: str) -> None:
    program = with_cuts(program_of(SORTED[name]))
    shape = call(40, 53, heads=2, batch=2)
    inputs = data(shape)
    cuts = cut_values(program, shape, inputs, {})
    declared = {decl.derivation: decl for decl in program.inputs}
    reader = Reader(program, shape, {**inputs, **cuts}, {})
    b, h = np.arange(2).reshape(-1, 1, 1, 1), np.arange(2).reshape(1, -1, 1, 1)
    variables = reader.variables(b, h) | {"q": np.arange(13, 53)[:, None], "k": np.arange(53)}
    known = 0
    for cond in conditions(program):
        allowed = interval(cond, program, owner)
        if allowed is None or any(end not in declared for end in allowed.ends):
            continue
        known += 1
        inside = np.ones((2, 2, 40, 53), bool)
        for end, above in ((allowed.low, True), (allowed.high, False)):
            if end is not None:
                values = reader.value(entry(declared[end], Var(end.owner or "q")), variables)
                position = variables[allowed.variable]
                inside = inside & ((position >= values) if above else (position < values))
        alone = program.with_branch(pattern=Where(cond))
        np.testing.assert_array_equal(inside == allowed.inside, mask(alone, shape, inputs))
    assert known


# ------------------------------------------------------------------------------------------ tiles


@pytest.mark.parametrize("name", SORTED)
def test_tiles_of_every_call(name: str) -> None:
    """Sorted data: every tile that counts, once. Unsorted: whatever tiles, but none outside the grid."""
    program = program_of(SORTED[name])
    whole = call(53, 53, heads=2, batch=2)
    runs = {side: side_runs(program, whole, 8, 4, side)[1] for side in (Side.QUERY, Side.KEY)}
    for rows, k_len in ((53, 53), (1, 1), (17, 60), (1, 40), (40, 23)):
        if rows > k_len and name not in ("documents", "sink of the sequence", "roles"):
            continue
        shape = call(rows, k_len, heads=2, batch=2)
        check_tiles(program, shape, 8, 4, data(shape), runs=runs)
        for side in (Side.QUERY, Side.KEY):
            visited, _ = visits(program, shape, runs[side], 8, 4, side, data(shape, ordered=False), {})
            assert visited.max() <= 1


def test_documents_visit_the_tiles_that_they_touch() -> None:
    """As many as there are tiles with an allowed pair, and full ones wherever a tile has all its pairs."""
    shape = call(96, 96, batch=3)
    for pattern in ("causal & document(doc)", "document(doc)"):
        program, inputs = program_of(pattern), data(shape)
        allowed = mask(program, shape, inputs).reshape(3, 1, 12, 8, 12, 8)
        for side in (Side.QUERY, Side.KEY):
            _, runs = side_runs(program, shape, 8, 8, side)
            visited, full = visits(program, shape, runs, 8, 8, side, inputs, {})
            np.testing.assert_array_equal(visited > 0, allowed.any(axis=(3, 5)))
            np.testing.assert_array_equal(full > 0, allowed.all(axis=(3, 5)))


def test_documents_are_three_runs() -> None:
    plan = backward_plan(program_of("causal & document(doc)"), make_spec("sm_90", "triton", 4, 4, 64), Tiling(64, 64))
    assert [(len(runs.full), len(runs.partial)) for runs in (plan.runs, plan.key_runs)] == [(1, 2), (1, 2)]
    # One cut a kernel: causality gives the other end.
    assert [decl.name for decl in plan.program.inputs if decl.derivation] == ["doc_k_first", "doc_q_end"]


# ---------------------------------------------------------------------------------------- runtime


@pytest.mark.parametrize("name", SORTED)
def test_the_runtime_finds_the_same_cuts(name: str) -> None:
    program = with_cuts(derive(program_of(SORTED[name])))
    for rows, k_len in ((53, 53), (17, 60), (1, 1)):
        shape = call(rows, k_len, heads=2, batch=2)
        inputs = data(shape)
        given = [torch.from_numpy(np.asarray(inputs[d.name])) for d in program.inputs if d.derivation is None]
        given = [x.to(torch.int16) if i % 2 else x.to(torch.int32) for i, x in enumerate(given)]
        expected = cut_values(program, shape, inputs, {})
        found = Deriver(program, shape, CPU)(given, [])
        names = [d.name for d in program.inputs if d.derivation]
        assert len(names) == len(found) == len(expected) > 0
        for key, x in zip(names, found, strict=True):
            assert x.dtype == torch.int32
            np.testing.assert_array_equal(x.numpy(), expected[key])


def test_cuts_of_unsorted_data_lie_among_the_positions() -> None:
    for pattern in SORTED.values():
        program, shape = with_cuts(derive(program_of(pattern))), call(17, 60, heads=2, batch=2)
        inputs = data(shape, ordered=False)
        given = [torch.from_numpy(np.asarray(inputs[d.name])) for d in program.inputs if d.derivation is None]
        for x in Deriver(program, shape, CPU)(given, []):
            assert x.min() >= 0
            assert x.max() <= 60


def test_a_decode_masks_documents() -> None:
    attn = attndsl.compile("attention d { input doc : int[b, k] sorted\n attend causal & document(doc) }")
    doc = torch.arange(64)[None] // 20
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    found = attn.decode(q, k, v, torch.tensor([50], dtype=torch.int32), doc=doc)
    expected = attn.reference(q, k[:, :, :50], v[:, :, :50], doc=doc[:, :50])
    torch.testing.assert_close(found, expected.float())


def test_a_graph_knows_what_it_is_given() -> None:
    attn = attndsl.compile("attention d { input doc : int[b, k] sorted\n attend causal & document(doc) }")
    doc = np.arange(1024)[None] // 256
    assert attn.blocks(1024, 1024, doc=doc).tiles == 4 * 3
    # Without the ids every tile that they may leave counts.
    assert attn.blocks(1024, 1024).tiles == 36


def test_roles_keep_full_tiles() -> None:
    """Two conditions on sorted data: tiles that one of them fills need no mask."""
    program = program_of("causal & { doc[q] == doc[k] or doc[q] == pivot }")
    plan = backward_plan(program, make_spec("sm_90", "triton", 4, 4, 64), Tiling(64, 64))
    assert len(plan.runs.full) == len(plan.key_runs.full) == 2


def test_the_published_pattern_of_powers_is_exact() -> None:
    """Its relation is near the effort bound: past it, every tile would be visited."""
    path = Path(__file__).parent.parent / "examples" / "patterns" / "power.attn"
    plan = forward_plan(attndsl.compile(path).program, make_spec("sm_90", "triton", 4, 4, 64), Tiling(64, 64))
    assert len(plan.runs.partial) > 1


def test_plans_without_data_have_no_cuts() -> None:
    plan = forward_plan(load("causal & window(9)").program, make_spec("sm_90", "triton", 4, 4, 64), Tiling(64, 64))
    assert not plan.program.inputs


@pytest.mark.parametrize("rows", [1, 200])
def test_rows_of_a_chunk_read_their_own_entries(rows: int) -> None:
    """On the CPU runs of an input over the rows of a call were read at positions of the whole sequence."""
    attn = attndsl.compile("attention a { input limit : int[b, q] sorted  attend causal & { k < limit[q] } }")
    q, k = torch.randn(1, 1, rows, 16, dtype=torch.float64), torch.randn(1, 1, 600, 16, dtype=torch.float64)
    limit = torch.linspace(10, 580, rows).long()[None]
    torch.testing.assert_close(attn(q, k, k, limit=limit), attn.reference(q, k, k, limit=limit))


# ------------------------------------------------------------------------------- the kernel that searches

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")
@interprets
@pytest.mark.parametrize("n", range(len(INTEGERS)))
def test_the_kernel_finds_what_a_sorted_search_finds(n: int) -> None:
    (rows, keys), inclusive = ((1, 1), (5, 2), (129, 20), (20, 129), (7, 0))[n], bool(n % 2)
    own = torch.as_tensor(RNG.integers(0, 9, (2, 1, rows)), dtype=INTEGERS[n]).expand(2, 3, rows)
    others = np.sort(RNG.integers(0, 9, (3, keys)), axis=-1)
    other = torch.as_tensor(others, dtype=INTEGERS[n - 1]).mT.contiguous().mT.expand(2, 3, keys)
    expected = torch.searchsorted(other.contiguous().long(), own.contiguous().long(), right=inclusive)
    assert torch.equal(searched(own, other, inclusive, n, None), expected.int() + n)


@pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")
@interprets
def test_the_kernel_stays_among_the_keys_whatever_they_hold() -> None:
    ids = torch.as_tensor(RNG.integers(-(2**62), 2**62, (1, 1, 140)))
    for inclusive in (False, True):
        found = searched(ids, ids, inclusive, 0, 0)
        place = torch.arange(140)
        assert bool(((found > place) & (found <= 140) if inclusive else (found >= 0) & (found <= place)).all())
    # A document's first token is looked for at or before a token, and the one past its last after it.
    ids = ids.sort().values // 2**60
    first, end = (searched(ids, ids, inclusive, 0, 0)[0, 0].tolist() for inclusive in (False, True))
    assert all(ids[0, 0, a] == x == ids[0, 0, b - 1] for x, a, b in zip(ids[0, 0], first, end, strict=True))
    assert len(set(first)) == len(set(ids[0, 0].tolist()))
