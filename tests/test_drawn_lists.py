"""Blocks that `random` draws, listed: which members, which tiles, and what kernels that read the lists compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attndsl
from attndsl.api import load_attention
from attndsl.derivation import Draw
from attndsl.derive import own_inputs
from attndsl.grammar import load
from attndsl.listing import even_start, lists_tiles
from attndsl.oracle import mask
from attndsl.piece_plans import forward_plans
from attndsl.pieces import choose_pieces
from attndsl.plan import Backend, Tiling, forward_plan
from attndsl.program import CallShape
from attndsl.runtime.cache import KernelCache
from attndsl.runtime.derive import Deriver
from attndsl.runtime.printing import printed_backward, printed_forward
from attndsl.splitting import SplitPiece
from attndsl.targets import hopper_refusal, layout_refusal, make_spec
from attndsl.tiling import all_listables
from attndsl.wiring import engine
from tests.accuracy import examples
from tests.cases import case, floats
from tests.gradients import judge
from tests.scattered import SINK
from tests.strategies import Case
from tests.test_backward_cpu import runner as cpu
from tests.test_backward_triton import runner as triton

SMALL = Tiling(16, 16)

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")

DRAWN: dict[str, Case] = {
    "of rows": case("causal & random(2, of = blocks(16), per = rows(16), seed = h)", 100, 100, (4, 2)),
    "of all rows": case("random(3, of = blocks(16), per = head, seed = 5)", 70, 70, batch=1),
    "of a chunk": case("causal & random(2, of = blocks(32), per = rows(32), seed = h % 2)", 40, 168, (4, 2), batch=1),
    "more than there are": case("causal & random(20, of = blocks(16), per = rows(16), seed = h)", 50, 50, batch=1),
    "one token": case("random(1, of = blocks(16), per = rows(16), seed = 1)", 1, 1),
    "among": case(
        """attention a { input flag : bool[b, k]
        attend window(60) & random(2, of = blocks(16), per = rows(32), seed = b, among = causal & { flag[k] }) }""",
        100, 100, inputs={"flag": np.random.default_rng(0).random((2, 100)) < 0.5},
    ),
    "wide heads": case(
        "causal & random(2, of = blocks(64), per = rows(64), seed = h)", 130, 130, (2, 2), (80, 80), batch=1
    ),
}  # fmt: skip


# What is drawn adds to what is there without it.
SPLIT: dict[str, Case] = {
    "window": case("causal & (window(12) | random(2, of = blocks(16), per = rows(16), seed = h))", 100, 100, (4, 2)),
    "bigbird": case(
        """(band(1, 1) | { q == 0 or k == 0 or q == Nq - 1 or k == Nk - 1 }) on blocks(16)
        | random(3, of = blocks(16), per = rows(16), seed = h)""", 100, 100, batch=1,
    ),
    "chunk": case("causal & (window(12) | random(2, of = blocks(32), per = rows(32), seed = h))", 40, 168),
    "sink": case(
        f"attention a {{ {SINK}\n attend window(5) | random(2, of = blocks(16), per = head, seed = h) }}",
        inputs={"sinks": floats(2)},
    ),
    "documents": case(
        """attention a { input doc : int[b, k] sorted
        attend document(doc) & window(20) | causal & random(2, of = blocks(16), per = rows(16), seed = h) }""",
        inputs={"doc": np.sort(np.random.default_rng(0).integers(0, 4, (2, 70)), axis=1).astype(np.int32)},
    ),
    "bias": case(
        """attention a { input near : float[h, 9] learnable
        score s + near[h, clamp(q - k, -4, 4) + 4]
        attend window(5) | random(2, of = blocks(16), per = rows(16), seed = h) }""",
        batch=1, inputs={"near": floats(2, 9)},
    ),
}  # fmt: skip


def plan_of(program: Any, shape: CallShape) -> Any:
    spec = replace(make_spec("sm_90", "triton", shape.heads, shape.kv_heads, 64), even_start=True)
    return forward_plan(program, spec, SMALL)


def listed(chosen: Case) -> None:
    """Every tile with a pair is listed once, in lists of which a tile's full ones come first; and what is drawn is."""
    program, shape = chosen.load(), chosen.shape
    plan = plan_of(program, shape)
    runs = plan.runs.full + plan.runs.partial
    assert len(runs) == 2
    assert all(run.list is not None for run in runs)
    given = [torch.from_numpy(np.asarray(chosen.inputs[d.name])) for d in own_inputs(program)]
    deriver = Deriver(plan.program, shape, torch.device("cpu"))
    decls = [d for d in plan.program.inputs if d.derivation]
    made = dict(zip((d.name for d in decls), deriver(given, []), strict=True))
    for decl, like in zip(decls, deriver.examples(), strict=True):
        assert (made[decl.name].shape, made[decl.name].dtype) == (like.shape, like.dtype)
    (draw,) = (d for d in decls if isinstance(d.derivation, Draw))
    members, lists = made[draw.name], next(x for name, x in made.items() if name.startswith("k_tiles"))
    # Members come in order, each once, -1 after them.
    gaps = members.diff(dim=-1)
    assert ((gaps > 0) | (members[..., 1:] == -1)).all()
    allowed = mask(program, shape, chosen.inputs, chosen.args)
    lists = lists.expand(shape.batch, shape.heads, -1) if lists.dim() == 2 else lists
    q_tiles = -(-shape.rows // 16)
    for b, h, tile in np.ndindex(shape.batch, shape.heads, q_tiles):
        row = lists[b, h].tolist()
        begin, middle, end = row[3 * tile : 3 * tile + 3]
        rows = allowed[b, h, 16 * tile : 16 * tile + 16]
        touched = {int(i) for i in np.nonzero(rows.any(0))[0] // 16}
        assert len(set(row[begin:end])) == end - begin
        assert touched <= set(row[begin:end])
        for k_tile in row[begin:middle]:
            assert rows[:, 16 * k_tile : 16 * k_tile + 16].shape[1] == 16
            assert rows[:, 16 * k_tile : 16 * k_tile + 16].all()


@pytest.mark.parametrize("name", DRAWN)
def test_lists(name: str) -> None:
    listed(DRAWN[name])


@pytest.mark.parametrize("name", DRAWN)
def test_gradients_on_the_cpu(name: str) -> None:
    judge(cpu(SMALL), DRAWN[name], torch.float64)


@pytest.mark.parametrize("name", ["of a chunk", "more than there are", "among"])
def test_gradients_in_triton(name: str) -> None:
    judge(triton(SMALL), DRAWN[name], torch.float32)


def test_default_tiles_are_made_of_members() -> None:
    """Members smaller than a tile share one, in the kernels of forward and dq."""
    judge(triton(None), DRAWN["of rows"], torch.float32)


@pytest.mark.parametrize("name", SPLIT)
def test_what_is_drawn_besides_the_rest_is_a_piece(name: str) -> None:
    """The second piece's tiles are listed, and the two share what the runtime makes for them."""
    chosen = SPLIT[name]
    program, shape = chosen.load(), chosen.shape
    pieces = choose_pieces(program, (shape.heads, shape.kv_heads)).pieces
    assert len(pieces) == 2
    spec = replace(make_spec("sm_90", "triton", shape.heads, shape.kv_heads, 64), even_start=True)
    first, second = forward_plans(program, spec, SMALL)
    assert (first.follows, second.follows) == (False, True)
    assert all(run.list is not None for run in second.runs.full + second.runs.partial)
    assert first.program == second.program
    assert all(isinstance(piece, SplitPiece) for piece in pieces)


@pytest.mark.parametrize("name", SPLIT)
def test_gradients_of_pieces_on_the_cpu(name: str) -> None:
    judge(cpu(SMALL), SPLIT[name], torch.float64)


@pytest.mark.parametrize("name", ["chunk", "sink"])
def test_gradients_of_pieces_in_triton(name: str) -> None:
    judge(triton(SMALL), SPLIT[name], torch.float32)


def test_default_tiles_of_pieces() -> None:
    judge(triton(None), SPLIT["bigbird"], torch.float32)


def test_what_stays_whole() -> None:
    for text in (
        "causal - random(2, of = blocks(16), per = rows(16), seed = h, among = causal)",  # pairs taken away
        "causal & (window(12) | random(2, of = tokens, per = query, seed = h))",
        "causal | random(2, of = blocks(16), per = rows(16), seed = h) & window(9)",  # nothing to spare
        # Without one of them the other may draw any tile.
        "causal & (random(1, blocks(32), rows(16), h) | random(2, blocks(16), rows(32), 5))",
    ):
        assert choose_pieces(load(text).program, (2, 1)).plain, text
    # Where rows begin elsewhere, and beside other parts of a softmax.
    program, spec = SPLIT["window"].load(), make_spec("sm_90", "triton", 4, 2, 64)
    assert len(forward_plans(program, replace(spec, even_start=False))) == 1
    assert len(forward_plans(program, replace(spec, even_start=True), alone=False)) == 1
    assert not layout_refusal(program, replace(spec, even_start=False))
    assert layout_refusal(program, replace(spec, even_start=True))
    judge(cpu(SMALL), replace(SPLIT["chunk"], shape=CallShape(1, 2, 1, 41, 168, 16, 16)), torch.float64)


def test_pieces_of_a_draw_are_explained() -> None:
    attn = load_attention("window(9) | random(2, of = blocks(64), per = rows(64), seed = h)")
    text = str(attn.explain(1024, 1024))
    assert "what `random` adds to the rest is a piece of its own" in text
    assert "computed before the kernel: members_drawn" in text
    assert "tiles: some are listed when the kernel runs, and are not counted here" in text


def test_pieces_of_a_draw_are_kept(tmp_path: Path) -> None:
    program = SPLIT["bigbird"].load()
    spec = replace(make_spec("sm_90", "triton", 4, 2, 64), even_start=True)
    printers = engine(program).generators
    of_backend = {Backend.TRITON: printers.triton_forward}
    first, again = (
        printed_forward(program, spec, (Backend.TRITON,), None, of_backend, KernelCache(tmp_path / "kernels"))
        for _ in range(2)
    )
    assert first == again
    assert [x.follows for x in first] == [False, True]
    assert first[0].program.inputs == forward_plans(program, spec)[0].program.inputs
    back, kept = (
        printed_backward(program, spec, False, None, printers, KernelCache(tmp_path / "kernels")) for _ in range(2)
    )
    assert back == kept
    assert load_attention("window(9) | random(2, of = blocks(64), per = rows(64), seed = h)").kernels() == (
        "forward", "forward_2", "dq", "dkdv", "dq_2", "dkdv_2", "decode",
    )  # fmt: skip


@st.composite
def drawn_programs(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    """A draw of blocks, within other sets and around them."""
    rows, k_len = draw(st.sampled_from(((1, 1), (33, 33), (70, 70), (6, 134), (150, 150))))
    per = draw(st.sampled_from(("head", "rows(16)", "rows(32)", "rows(48)")))
    seed = draw(st.sampled_from(("3", "h", "g - 1", "b")))
    among = draw(st.sampled_from(("", ", among = causal", ", among = window(20) | sink(4)", ", among = ~causal")))
    keys = draw(st.sampled_from((16, 32, 48)))
    drawn = f"random({draw(st.integers(1, 5))}, blocks({keys}), {per}, {seed}{among})"
    around = draw(
        st.sampled_from(
            (
                "{}", "causal & {}", "{} - window(9)", "{} & same_block(40)", "dilated(2) & {}", "window(9) | {}",
                "causal & (sink(3) | window(7) | {})", "strided(9) | {} & causal",
                "(if h < 1 then window(5) else none) | {}",
            )
        )
    )  # fmt: skip
    return case(around.format(drawn), rows, k_len, draw(st.sampled_from(((2, 1), (2, 2)))))


@given(case=drawn_programs())
@examples(12)
def test_random_lists(case: Case) -> None:
    if all_listables(case.load(), (case.shape.heads, case.shape.kv_heads)):
        listed(case)


@given(case=drawn_programs())
@examples(5)
def test_random_gradients(case: Case) -> None:
    judge(cpu(SMALL), case, torch.float64)


def test_what_is_listed() -> None:
    def found(text: str) -> int:
        return len(all_listables(load(text).program, (2, 1)))

    assert found("causal & random(2, blocks(32), rows(16), 5)") == 1
    for text in (
        "causal & random(2, blocks(8), rows(16), 5)",  # smaller than a tile
        "causal & random(2, blocks(32), query, 5)",
        "causal & random(2, tokens, rows(16), 5)",
        "window(5) | random(2, blocks(32), rows(16), 5)",  # not all pairs are drawn
        "causal & (random(2, blocks(32), rows(16), 5, among = causal) on blocks(2))",
        "causal",
    ):
        assert not found(text), text


def test_calls_whose_rows_begin_elsewhere_are_masked() -> None:
    program = DRAWN["of rows"].load()
    assert lists_tiles(program)
    assert even_start(program, CallShape(1, 2, 1, 40, 168, 16, 16))
    assert not even_start(program, CallShape(1, 2, 1, 41, 168, 16, 16))
    spec = replace(make_spec("sm_90", "triton", 2, 1, 64), even_start=False)
    assert all(run.list is None for run in forward_plan(program, spec, SMALL).runs.partial)
    judge(cpu(SMALL), replace(DRAWN["of a chunk"], shape=CallShape(1, 4, 2, 41, 168, 16, 16)), torch.float64)


def test_lists_of_its_own_tiles_have_a_hopper_lowering() -> None:
    program, spec = DRAWN["of rows"].load(), make_spec("sm_90", "triton", 4, 2, 64)
    assert "several members" in hopper_refusal(program, replace(spec, even_start=True))
    assert not hopper_refusal(program, replace(spec, even_start=False))
    large = load("causal & random(2, blocks(128), rows(128), 5)").program
    assert not hopper_refusal(large, replace(spec, even_start=True))


def test_blocks_that_are_not_drawn_are_not_read() -> None:
    attn = attndsl.compile("random(1, of = blocks(64), per = head, seed = 5)")
    q, k, v = (torch.randn(1, 1, 256, 16) for _ in range(3))
    seen = attn.mask(256, 256)[0].any(0)
    assert seen.sum() == 64
    k[:, :, ~torch.from_numpy(seen)] = torch.nan
    assert attn(q, k, v).isfinite().all()
