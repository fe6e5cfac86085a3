"""Layouts: the search divides a pattern exactly, its kernels mean what the oracle does, and it pays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray
from torch import Tensor

import attndsl
from attndsl.api import load_attention
from attndsl.blockruns import Reader
from attndsl.cut_values import cut_values
from attndsl.evaluate import evaluate
from attndsl.layout import Comb, Layout
from attndsl.oracle import mask
from attndsl.piece_plans import backward_plans, forward_plans
from attndsl.piece_tiles import piece_tiles
from attndsl.pieces import choose_pieces
from attndsl.plan import Backend, BackwardPlan, DType, ForwardPlan, Spec, Tiling
from attndsl.program import CallShape, Const, Program, Read, Scalar, Var, walk
from attndsl.wiring import engine as _engine
from tests.accuracy import check, examples
from tests.gradients import judge as judge_gradients
from tests.scattered import SCATTERED, scattered_programs
from tests.strategies import Case, tensors
from tests.test_backward_cpu import runner as cpu_runner
from tests.test_backward_triton import runner as triton_runner

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")

SMALL = Tiling(16, 16)
# What every one of the fixed programs is divided into.
PIECES = {
    "dilated": 1, "only_columns": 1, "blocks": 1, "shifted": 2, "sink": 2, "strided": 2, "columns": 2, "bands": 2,
    "tables": 2, "coarse": 2, "shorter_than_a_period": 2, "more_rows": 2, "cross": 2, "score": 2, "weights": 2,
    "documents": 2,
}  # fmt: skip


# ------------------------------------------------------------------------------------------- combs


@pytest.mark.parametrize(
    ("comb", "classes"),
    [
        (Comb(), 1), (Comb(5, 1, 1), 5), (Comb(12, 4, 4), 3), (Comb(5, 1, 1, 3), 5), (Comb(12, 4, 4, 8), 3),
        (Comb(8, 3, 0, 2), 1),
    ],
)  # fmt: skip
def test_comb(comb: Comb, classes: int) -> None:
    """Positions, indices and numbers of tokens, each against counting."""
    for residue in range(classes):
        known = {"residue": np.asarray(residue)}
        first = int(evaluate(comb.first, known, {}))
        tokens = [t for t in range(-60, 120) if (t - first) % comb.period < comb.width]
        origin = next(i for i, t in enumerate(tokens) if t >= 0)
        i = np.arange(-origin, len(tokens) - origin)
        assert evaluate(comb.position(Var("i")), known | {"i": i}, {}).tolist() == tokens
        for x in range(-40, 90):
            expected = sum(t < x for t in tokens) - origin
            assert int(evaluate(comb.index(Var("start")), known | {"start": np.asarray(x)}, {})) == expected
        for length in range(40):
            most = max(sum(x <= t < x + length for t in tokens) for x in range(30))
            assert comb.most(length) == most
    if comb.step:
        assert {int(evaluate(comb.first, {"residue": np.asarray(r)}, {})) for r in range(classes)} == set(
            range(0, comb.period, comb.width)
        )


# --------------------------------------------------------------------------------- the division


def plans(program: Program, shape: CallShape) -> tuple[ForwardPlan, ...]:
    spec = Spec(shape.heads, shape.kv_heads, shape.dim, shape.v_dim, DType.FLOAT32, "cpu")
    return forward_plans(program, spec, SMALL)


def covered(case: Case, plan: ForwardPlan) -> NDArray[np.int64]:
    """How often a piece allows each pair, int [batch, heads, rows, keys]; its runs and mask are held to each other."""
    program, shape, layout = plan.program, case.shape, plan.layout
    cuts = cut_values(program, shape, case.inputs, case.args)
    reader = Reader(program, shape, {**case.inputs, **cuts}, case.args)
    assert isinstance(layout, Layout)
    start, end = shape.first_position(program), shape.q_len(program)
    found = np.zeros((shape.batch, shape.heads, shape.rows, shape.k_len), np.int64)
    b, h = np.indices((shape.batch, shape.heads))
    for residue in range(layout.classes):
        known = reader.variables(b[..., None, None], h[..., None, None]) | {"residue": np.asarray(residue)}

        def value(e: Scalar, more: dict[str, Any], known: dict[str, Any] = known) -> Any:
            return evaluate(e, known | more, {})

        low, high = (int(value(layout.q.index(Var("start")), {"start": np.asarray(x)})) for x in (start, end))
        keys = np.arange(int(value(layout.k.index(Var("Nk")), {})))
        i_start = {"i_start": np.asarray(low), "start": np.asarray(start)}
        for q_tile, first in enumerate(range(low, high, SMALL.block_q)):
            i = np.arange(first, min(first + SMALL.block_q, high))
            q = value(layout.q.position(Var("i")), {"i": i})
            k = value(layout.k.position(Var("i")), {"i": keys})
            pair = {"q": q[:, None], "k": k, "i": i[:, None], "j": keys}
            allowed = np.ones((shape.batch, shape.heads, i.size, keys.size), bool)
            if plan.mask is not None:
                reading = known | pair | i_start
                leaves: dict[Scalar, Any] = {}
                for e in walk(plan.mask):
                    if isinstance(e, Read):
                        leaves[e] = reader.value(e, reading)
                allowed &= evaluate(plan.mask, reading, leaves)
            visits = np.zeros((shape.batch, shape.heads, -(-keys.size // SMALL.block_k)), np.int64)
            seen = np.zeros_like(allowed)
            for run, full in [(r, True) for r in plan.runs.full] + [(r, False) for r in plan.runs.partial]:
                at = known | i_start | {"q_tile": np.asarray(q_tile)}
                firsts, counts = (
                    np.broadcast_to(reader.value(e, at), (*b.shape, 1, 1)) for e in (run.first, run.count)
                )
                for entry in np.ndindex(b.shape):
                    for n in range(int(counts[entry].item())):
                        tile = int(firsts[entry].item()) + n * run.step
                        visits[entry][tile] += 1
                        columns = slice(tile * SMALL.block_k, (tile + 1) * SMALL.block_k)
                        # A full tile is not masked.
                        seen[entry][:, columns] = True if full else allowed[entry][:, columns]
            assert (visits <= 1).all()
            found[:, :, (q - start)[:, None], k] += seen
    return found


def divides(case: Case) -> None:
    program = case.load()
    made = plans(program, case.shape)
    once = sum(covered(case, plan) for plan in made)
    expected = mask(program, case.shape, case.inputs, case.args)
    np.testing.assert_array_equal(once, expected.astype(np.int64))


@pytest.mark.parametrize("name", SCATTERED)
def test_fixed_programs_are_divided(name: str) -> None:
    case = SCATTERED[name]
    choice = choose_pieces(case.load(), (case.shape.heads, case.shape.kv_heads))
    if name in PIECES:
        assert len(choice.pieces) == PIECES[name]
    assert not choice.plain
    divides(case)


@given(case=scattered_programs())
@examples(12)
def test_random_programs_are_divided(case: Case) -> None:
    if not choose_pieces(case.load(), (case.shape.heads, case.shape.kv_heads)).plain:
        divides(case)


def test_what_gains_nothing_stays_whole() -> None:
    for text in ("causal & window(100)", "same_block(64)", "causal on blocks(16)", "none"):
        program = load_attention(text).program
        assert choose_pieces(program, (2, 1)).plain, text


def test_derived_inputs_keep_tokens_in_order() -> None:
    attn = attndsl.compile("causal & (window(5) | dilated(8) & random(3, of = blocks(4), per = rows(4), seed = h))")
    assert choose_pieces(attn.program, (2, 1)).plain
    assert "computed before the kernel" in attn.explain(100).section("pieces").lines[0]
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    torch.testing.assert_close(attn(q, k, v), attn.reference(q, k, v).float(), atol=1e-5, rtol=1e-5)


def test_tiles() -> None:
    """A residue of a dilated window is a window: a sixteenth of the tiles that its tokens in order touch."""
    program = load_attention("causal & window(4096) & dilated(16)").program
    shape = CallShape(1, 1, 1, 16384, 16384, 64, 64)
    (plan,) = forward_plans(program, Spec(1, 1, 64, 64, DType.FLOAT32, "cpu"), Tiling(64, 64))
    found = piece_tiles(plan, shape, {}, {})
    # 16 residues of 1024 tokens, in tiles of 64: a query tile sees its own, three full ones and a last one.
    assert (found.q_tiles, found.tiles) == (256, 16 * (1 + 2 + 3 + 4 + 12 * 5))
    assert found.full == 16 * (0 + 1 + 2 + 13 * 3)


# ------------------------------------------------------------------------------------- kernels


def attend(case: Case, dtype: torch.dtype, backend: str) -> None:
    program = case.load()
    q, k, v, inputs = tensors(case, dtype=dtype)
    engine = _engine(program)
    engine.tiling = SMALL
    device = DEVICE if backend == "triton" else torch.device("cpu")
    listed = [inputs[decl.name].to(device) for decl in program.inputs]
    there, numbers = [x.to(device) for x in (q, k, v)], [case.args[name] for name in program.args]
    out, lse = engine.forward(there[0], there[1], there[2], listed, numbers, None, backend)
    check(program, q, k, v, inputs, case.args, out.cpu(), lse.cpu())


@pytest.mark.parametrize("name", SCATTERED)
def test_forward(name: str) -> None:
    attend(SCATTERED[name], torch.float32, "cpu")


@pytest.mark.triton_newest
@pytest.mark.parametrize("name", sorted(set(SCATTERED) - {"two_periods", "coarse", "more_rows", "sink", "score"}))
def test_forward_triton(name: str) -> None:
    attend(SCATTERED[name], torch.float32, "triton")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_half_precision(backend: str) -> None:
    """The output of earlier pieces is kept in the call's dtype: within the accuracy that a single kernel has."""
    attend(SCATTERED["strided"], torch.float16, backend)


@given(case=scattered_programs())
@examples(6)
def test_random_forward(case: Case) -> None:
    attend(case, torch.float64, "cpu")


@given(case=scattered_programs(lengths=((1, 5), (33, 33), (12, 40))))
@examples(2)
def test_random_forward_triton(case: Case) -> None:
    attend(case, torch.float32, "triton")


@pytest.mark.parametrize("name", sorted(set(SCATTERED) - {"two_periods", "coarse", "dilated", "score"}))
def test_backward(name: str) -> None:
    judge_gradients(cpu_runner(SMALL), SCATTERED[name], torch.float64)


@pytest.mark.triton_newest
@pytest.mark.parametrize(
    "name",
    ["strided", "only_columns", "bands", "blocks", "shifted", "score", "weights", "tables"],
)
def test_backward_triton(name: str) -> None:
    judge_gradients(triton_runner(SMALL), SCATTERED[name], torch.float32)


def test_backward_half_precision() -> None:
    for run in (cpu_runner(SMALL), triton_runner(SMALL)):
        judge_gradients(run, SCATTERED["shifted"], torch.float16)


@given(case=scattered_programs(lengths=((1, 5), (33, 33), (23, 70))))
@examples(4)
def test_random_backward(case: Case) -> None:
    judge_gradients(cpu_runner(SMALL), case, torch.float64)


def test_two_backward_runs_agree_to_the_bit() -> None:
    attn = attndsl.compile("causal & (window(12) | strided(8, 3))")
    q, k, v = (torch.randn(2, 2, 90, 16, requires_grad=True) for _ in range(3))

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(attn(q, k, v).square().sum(), (q, k, v)))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_backward_pieces_share_what_enters_once() -> None:
    """The sink's gradient comes from the first piece only, and on the CPU there are no runs of key tiles."""
    program = SCATTERED["sink"].load()
    found: tuple[BackwardPlan, ...] = backward_plans(
        program, Spec(2, 1, 16, 16, DType.FLOAT32, "cpu", backend=Backend.CPU), (SMALL, SMALL)
    )
    assert [bool(plan.sink_learnable) for plan in found] == [True, False]
    assert [plan.follows for plan in found] == [False, True]
    assert not any(plan.key_runs.full or plan.key_runs.partial for plan in found)


# ---------------------------------------------------------------------------------- looking inside


def test_every_piece_is_shown() -> None:
    attn = attndsl.compile("causal & (window(128) | dilated(128))")
    assert attn.kernels() == ("forward", "forward_2", "dq", "dkdv", "dq_2", "dkdv_2", "decode", "decode_2")
    assert attndsl.compile("causal").kernels() == ("forward", "dq", "dkdv", "decode")
    first, second = (attn.source(kernel) for kernel in attn.kernels()[:2])
    assert "residue" not in first
    assert "residue = tl.program_id(0) // q_tiles % 128" in second
    assert "adding to what earlier pieces found" in second
    for name in ("dq", "dkdv"):
        first, second = (attn.source(kernel) for kernel in (name, f"{name}_2"))
        assert f"def attention_{name}(" in first
        assert "residue" not in first
        assert f"def attention_{name}(" in second
        assert "residue = tl.program_id(0)" in second
    with pytest.raises(attndsl.PatternError, match="A531"):
        attn.source("dq_3")
    first, second = (attn.source(kernel, backend="gluon") for kernel in attn.kernels()[:2])
    assert "residue" not in first
    assert "[b, h, residue, row, 0]" in second and "adding to what earlier pieces found" in second
    with pytest.raises(attndsl.PatternError, match="A510"):
        attndsl.compile("causal & strided(7, 3)").source(backend="gluon")
    found = attn.explain(4096)
    lines = found.section("pieces").lines
    assert "chosen: tokens in order; then queries and keys 1 of every 128, from residue on" in lines[1]
    assert "  tokens in order  (" in lines[2]
    assert any("piece 2 of 2: queries and keys" in line for line in found.section("planned").lines)
    assert any("visited in 2 pieces" in line for line in found.section("cost").lines)
    assert "pieces" not in [section.title for section in attndsl.compile("causal").explain(100).sections]


def test_pieces_are_counted() -> None:
    found = attndsl.compile("causal & (window(128) | dilated(16))").pieces(2048, 4096, heads=2, kv_heads=1)
    # The last 16 query tiles of 128 see two key tiles each; a residue has 128 rows after 128 earlier tokens.
    assert [(piece.layout, piece.q_tiles, piece.tiles) for piece in found] == [
        ("tokens in order", 2 * 16, 2 * 16 * 2),
        ("queries and keys 1 of every 16, from residue on", 2 * 16, 2 * 16 * 2),
    ]
    (whole,) = attndsl.compile("causal & window(128)").pieces(256, 256)
    assert (whole.layout, whole.tiles) == ("tokens in order", 3)
    with pytest.raises(attndsl.PatternError, match="A523"):
        attndsl.compile("attention a { input n : int[b]\n attend dilated(8) & { k < n[b] } }").pieces(99, 99)


@pytest.mark.parametrize(("rows", "k_len"), [(0, 10), (5, 0), (0, 0), (3, 2)])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_nothing_to_attend_to(rows: int, k_len: int, backend: str) -> None:
    engine = _engine(SCATTERED["more_rows"].load())
    device = DEVICE if backend == "triton" else torch.device("cpu")
    q, k, v = (torch.randn(1, *size, 16, device=device) for size in ((2, rows), (1, k_len), (1, k_len)))
    out, lse = engine.forward(q, k, v, [], [], None, backend)
    dq, dk, dv, _ = engine.backward(torch.randn_like(out), None, q, k, v, out, lse, [], [], None, backend)
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    if rows == 0 or k_len == 0:
        assert not any(x.any() for x in (out, dq, dk, dv))
        assert (lse == -torch.inf).all()


def test_positions_of_a_constant() -> None:
    assert Comb(8, 3, 0, 2).first == Const(2)
