"""Patterns in the order of unsorted data: what is put in which order, what it then means, and what kernels compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import attndsl
from attndsl.compose import compose
from attndsl.derive import derive
from attndsl.grammar import load
from attndsl.layout import PLAIN, Permutation
from attndsl.notation import scalar_text
from attndsl.oracle import mask
from attndsl.order_values import order_values
from attndsl.permuting import PermutedPiece, permuted
from attndsl.piece_plans import backward_plans, forward_plans
from attndsl.pieces import choose_pieces
from attndsl.plan import Backend, Loads, Tiling
from attndsl.program import Where
from attndsl.runtime.cache import KernelCache
from attndsl.runtime.derive import Deriver
from attndsl.runtime.printing import printed_backward, printed_forward
from attndsl.targets import make_spec
from attndsl.wiring import engine
from tests.accuracy import check, examples
from tests.cases import case
from tests.gradients import judge, upstream
from tests.permuted import PERMUTED, ids, permuted_programs
from tests.strategies import Case, tensors
from tests.test_backward_cpu import runner as cpu
from tests.test_backward_triton import runner as triton
from tests.tiling import check_tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Tiling(16, 16)

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")


def found(chosen: Case) -> PermutedPiece | None:
    return permuted(derive(chosen.load()), (chosen.shape.heads, chosen.shape.kv_heads))


def condition(text: str, heads: tuple[int, int] = (2, 1)) -> str | None:
    piece = permuted(derive(load(text).program), heads)
    if piece is None:
        return None
    pattern = piece.program.branch.pattern
    assert isinstance(pattern, Where)
    return scalar_text(pattern.cond)


# ---------------------------------------------------------------------------------------- what

DOC = "input doc : int[b, k]"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("document(doc)", "doc_of_rows[b, q] == doc_of_keys[b, k]"),
        # Places bound the keys of a row from above, and so do the ids they count first.
        (
            "causal & document(doc)",
            "place_of_keys[b, k] <= place_of_rows[b, q] and doc_of_rows[b, q] <= doc_of_keys[b, k]",
        ),
        (
            "document(doc) & { k > q }",
            "doc_of_rows[b, q] >= doc_of_keys[b, k] and place_of_keys[b, k] > place_of_rows[b, q]",
        ),
        # From both sides: ids need no comparison.
        ("document(doc) & band(5, 0)", "0 <= place_of_rows[b, q] - place_of_keys[b, k] <= 5"),
        # Further than documents are apart.
        (
            "document(doc) & { -2000000000 < q - k < 5 }",
            "doc_of_rows[b, q] >= doc_of_keys[b, k] and -2000000000 < place_of_rows[b, q] - place_of_keys[b, k] < 5",
        ),
        ("document(doc) & sink(4)", "doc_of_rows[b, q] == doc_of_keys[b, k] and keys_by_doc[b, k] < 4"),
    ],
)  # fmt: skip
def test_what_a_pattern_becomes(pattern: str, expected: str) -> None:
    assert condition(f"attention a {{ {DOC}\n attend {pattern} }}") == expected


@pytest.mark.parametrize(
    "text",
    [
        "causal & window(9)",
        "attention a { input doc : int[b, k] sorted\n attend causal & document(doc) }",
        # One side alone, or both at once, bound nothing.
        f"attention a {{ {DOC}\n attend causal & {{ doc[q] <= doc[k] }} }}",
        f"attention a {{ {DOC}\n attend causal & {{ doc[k] == 1 }} }}",
        f"attention a {{ {DOC}\n attend causal & {{ doc[q] + doc[k] == 4 }} }}",
        # The heads that share keys would each have them in an order of their own.
        "attention a { input doc : int[h, k]\n attend causal & document(doc) }",
        # Gradients of inputs at tokens are summed for tokens in order.
        f"attention a {{ {DOC}\n input x : float[k] learnable\n score s + x[k]\n attend document(doc) }}",
        # What is computed for blocks of rows in order.
        f"attention a {{ {DOC}\n attend document(doc) & random(3, tokens, query, 5) }}",
    ],
)
def test_what_keeps_its_order(text: str) -> None:
    assert condition(text) is None
    assert not any(isinstance(x.layout, Permutation) for x in choose_pieces(load(text).program, (2, 1)).pieces)


def test_parts_of_one_softmax_keep_tokens_in_order() -> None:
    spec = make_spec("sm_90", "triton", 2, 1, 64)
    shared = load(f"attention a {{ {DOC}\n attend causal & document(doc), causal over pool(mean, 4) }}")
    assert all(plan.layout == PLAIN for plan in forward_plans(compose(shared.program).programs[0], spec))
    whole = PERMUTED["documents"].load()
    assert all(isinstance(plan.layout, Permutation) for plan in forward_plans(whole, replace(spec, dropout=True)))
    assert all(isinstance(plan.layout, Permutation) for plan in forward_plans(whole, spec))


# ------------------------------------------------------------------------------------- meaning


def means_the_same(chosen: Case) -> None:
    """The program on places allows the pairs of the tokens that stand there, and its tiles hold them."""
    piece, shape = found(chosen), chosen.shape
    if piece is None:
        return
    orders = order_values(piece.program, shape, chosen.inputs, chosen.args)
    inputs = {**chosen.inputs, **orders}
    expected = mask(chosen.load(), shape, chosen.inputs, chosen.args)
    placed = mask(piece.program, shape, inputs, chosen.args)
    rows, keys = (orders[read.input] for read in (piece.layout.q, piece.layout.k))
    by_head = any(d.axis.value == "g" for d in piece.program.input(piece.layout.q.input).dims)
    by_batch = any(d.axis.value == "b" for d in piece.program.input(piece.layout.q.input).dims)
    group = shape.heads // shape.kv_heads
    for b in range(shape.batch):
        for h in range(shape.heads):
            at = ((b,) if by_batch else ()) + ((h // group,) if by_head else ())
            assert sorted(rows[at].tolist()) == list(range(shape.rows))
            assert sorted(keys[at].tolist()) == list(range(shape.k_len))
            np.testing.assert_array_equal(placed[b, h], expected[b, h][np.ix_(rows[at], keys[at])])
    check_tiles(piece.program, shape, 8, 4, inputs, chosen.args)


@pytest.mark.parametrize("name", PERMUTED)
def test_fixed_programs_mean_the_same(name: str) -> None:
    assert found(PERMUTED[name]) is not None
    means_the_same(PERMUTED[name])


@given(case=permuted_programs())
@examples(25)
def test_random_programs_mean_the_same(case: Case) -> None:
    means_the_same(case)


@pytest.mark.parametrize("name", PERMUTED)
def test_the_runtime_finds_the_same_orders(name: str) -> None:
    chosen = PERMUTED[name]
    piece = found(chosen)
    assert piece is not None
    given = [torch.from_numpy(chosen.inputs[d.name]) for d in piece.program.inputs if d.derivation is None]
    derived = [d for d in piece.program.inputs if d.derivation is not None]
    made = Deriver(piece.program, chosen.shape, torch.device("cpu"))(given, list(chosen.args.values()))
    expected = order_values(piece.program, chosen.shape, chosen.inputs, chosen.args)
    examples = Deriver(piece.program, chosen.shape, torch.device("cpu")).examples()
    assert len(made) == len(expected) > 0
    for decl, x, like in zip(derived, made, examples, strict=True):
        np.testing.assert_array_equal(x.numpy(), expected[decl.name])
        assert (x.shape, x.dtype, x.stride()) == (like.shape, like.dtype, like.stride())


def test_unsorted_documents_visit_the_tiles_of_sorted_ones() -> None:
    text = "attention a {{ input doc : int[b, k]{}\n attend causal & document(doc) }}"
    doc = torch.from_numpy(ids(1, 1000, most=5))
    (plain,), (ordered,) = (
        attndsl.compile(text.format(said)).pieces(1000, 1000, block_q=64, block_k=64, doc=x)
        for said, x in (("", doc), (" sorted", doc.sort().values))
    )
    assert (plain.full, plain.partial) == (ordered.full, ordered.partial)
    assert plain.full > 0


# ------------------------------------------------------------------------------------- kernels


def attend(chosen: Case, dtype: torch.dtype, backend: str) -> None:
    program = chosen.load()
    q, k, v, inputs = tensors(chosen, dtype=dtype)
    made = engine(program)
    made.tiling = SMALL
    device = DEVICE if backend == "triton" else torch.device("cpu")
    listed = [inputs[decl.name].to(device) for decl in program.inputs]
    there, numbers = [x.to(device) for x in (q, k, v)], [chosen.args[name] for name in program.args]
    out, lse = made.forward(there[0], there[1], there[2], listed, numbers, None, backend)
    check(program, q, k, v, inputs, chosen.args, out.cpu(), lse.cpu())


@pytest.mark.parametrize("name", PERMUTED)
def test_forward(name: str) -> None:
    attend(PERMUTED[name], torch.float32, "cpu")


@pytest.mark.triton_newest
@pytest.mark.parametrize(
    "name", ["one token", "empty rows", "blocks of tokens", "blocks on", "cross", "two conditions"]
)
def test_forward_triton(name: str) -> None:
    attend(PERMUTED[name], torch.float32, "triton")


@pytest.mark.parametrize("name", PERMUTED)
def test_gradients_on_the_cpu(name: str) -> None:
    judge(cpu(SMALL), PERMUTED[name], torch.float64)


@pytest.mark.triton_newest
@pytest.mark.parametrize(
    "name", ["chunk", "more rows", "band and sink", "heads", "key heads", "window on", "cross and near", "score"]
)
def test_gradients_in_triton(name: str) -> None:
    judge(triton(SMALL), PERMUTED[name], torch.float32)


@given(case=permuted_programs())
@examples(8)
def test_random_gradients(case: Case) -> None:
    judge(cpu(SMALL), case, torch.float64)


@given(case=permuted_programs(lengths=((1, 40), (33, 33), (23, 40))))
@examples(2)
def test_random_gradients_in_triton(case: Case) -> None:
    judge(triton(SMALL), case, torch.float32)


def test_half_precision() -> None:
    for backend in ("cpu", "triton"):
        attend(PERMUTED["one value"], torch.float16, backend)


@pytest.mark.parametrize(("rows", "k_len"), [(0, 9), (5, 0), (0, 0)])
def test_nothing_to_attend_to(rows: int, k_len: int) -> None:
    text = "attention a { align start  input x : int[b, q]  input y : int[b, k]\n attend { x[q] == y[k] } }"
    for run in (cpu(), triton()):
        judge(run, case(text, rows, k_len, inputs={"x": ids(2, rows), "y": ids(2, k_len)}), torch.float32)


@pytest.mark.parametrize("run", [cpu(), triton(SMALL)], ids=["cpu", "triton"])
def test_two_runs_agree_to_the_bit(run: Any) -> None:
    chosen = PERMUTED["heads"]
    q, k, v, inputs = tensors(chosen)
    dout, _ = upstream(q, v)
    first, again = (run(chosen.load(), dout, None, q, k, v, inputs, {}, None)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_other_documents_are_not_read() -> None:
    """Keys of documents that no row of a tile is in may hold anything."""
    attn = attndsl.compile(f"attention a {{ {DOC}\n attend causal & document(doc) }}")
    doc = torch.arange(512)[None] % 2
    q, k, v = (torch.randn(1, 1, 512, 16) for _ in range(3))
    k[:, :, 1::2] = torch.nan
    out: Tensor = attn(q, k, v, doc=doc)
    assert out[:, :, ::2].isfinite().all()
    assert out[:, :, 1::2].isnan().any()


# -------------------------------------------------------------------------------- looking inside


def test_kernels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed once, nothing is searched or planned again, and the orders are made all the same."""
    program, spec = PERMUTED["documents"].load(), make_spec("sm_90", "triton", 4, 2, 64)
    printers = engine(program).generators
    of_backend = {Backend.TRITON: printers.triton_forward, Backend.GLUON: printers.gluon_forward}
    both = (Backend.GLUON, Backend.TRITON)
    first = printed_forward(program, spec, both, None, of_backend, KernelCache(tmp_path / "kernels"))
    backward = printed_backward(program, spec, True, None, printers, KernelCache(tmp_path / "kernels"))
    (plan,) = forward_plans(program, spec)
    assert first[0].program.inputs == plan.program.inputs
    assert first[0].program.align_start
    assert (first[0].spec.loads, first[0].spec.backend) == (Loads.POINTER, Backend.TRITON)
    assert backward.pieces[0][0].program.inputs == backward_plans(program, spec)[0].program.inputs

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("planned again")

    for name in ("piece_plans.choose_pieces", "targets.choose_pieces", "runtime.printing.backward_plans"):
        monkeypatch.setattr(f"attndsl.{name}", refuse)
    assert printed_forward(program, spec, both, None, of_backend, KernelCache(tmp_path / "kernels")) == first
    assert printed_backward(program, spec, True, None, printers, KernelCache(tmp_path / "kernels")) == backward


def test_explain_says_what_is_put_in_order() -> None:
    attn = attndsl.compile(f"attention a {{ {DOC}\n attend causal & document(doc) }}")
    text = str(attn.explain(256, 256))
    assert "rows in the order of `rows_by_doc`, keys in that of `keys_by_doc`" in text
    assert "computed before the kernel: rows_by_doc : int[b, q], the rows in the order of doc[b, q + (Nk - Nq)]" in text
    assert "tiles: input `doc` is missing" in text
    known = str(attn.explain(256, 256, doc=torch.arange(256)[None] % 3))
    assert "visited in 1 piece" in known
    assert "rows_by_doc_ptr" in attn.source("dq")
    assert "rows_by_doc_ptr" in attn.source("dkdv")
    assert attn.kernels() == ("forward", "dq", "dkdv", "decode")
    with pytest.raises(attndsl.PatternError, match="A523"):
        attn.pieces(256, 256)
