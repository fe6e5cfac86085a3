"""Calls copied into the order of unsorted data: interpreted by the portable kernels, which know no order then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.codegen.triton_move import move_source
from attndsl.copying import copied
from attndsl.derive import derive
from attndsl.diagnostics import PatternError
from attndsl.permuting import permuted
from attndsl.plan import Backend, Loads, Spec, Tiling
from attndsl.program import Program
from attndsl.runtime import permute
from attndsl.runtime.call import call_shape, dtype_of
from attndsl.runtime.moved import backward_of_both, forward_of_both
from attndsl.runtime.printing import printed_backward, printed_forward
from attndsl.targets import make_spec
from attndsl.wiring import engine as make_engine
from tests.gpu import interprets
from tests.gradients import Run, judge
from tests.permuted import PERMUTED

SMALL = Tiling(32, 32)
DOCUMENTS = "attention a { input doc : int[b, k]\n attend causal & document(doc) }"


def spec_of(q: Tensor, k: Tensor, v: Tensor) -> Spec:
    shape = call_shape(q, k, v)
    loads = Loads.DESCRIPTOR if shape.dim % 16 == 0 else Loads.POINTER
    return Spec(shape.heads, shape.kv_heads, shape.dim, shape.v_dim, dtype_of(q), "cuda:90", loads)


def runner() -> Run:
    """Gradients by the kernels that the data chooses, of outputs that they made."""

    def run(
        program: Program, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
        inputs: Mapping[str, Tensor], args: Mapping[str, int], scale: float | None,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:  # fmt: skip
        engine, spec = make_engine(program), spec_of(q, k, v)
        piece = permuted(derive(program), (spec.heads, spec.kv_heads))
        assert piece is not None
        listed, numbers = [inputs[decl.name] for decl in program.inputs], [args[name] for name in program.args]
        printers = {Backend.TRITON: engine.generators.triton_forward}
        kinds = ((piece.program, replace(spec, many=True)), (program, replace(spec, many=False)))
        ordered, in_place = (printed_forward(*x, (Backend.TRITON,), SMALL, printers, None)[0] for x in kinds)
        forward = forward_of_both(engine, piece, ordered, in_place, q, k, v, listed, True)
        out, lse = forward(q, k, v, listed, numbers, scale, None)
        for found, wanted in zip((out, lse), engine.forward(q, k, v, listed, numbers, scale, "cpu"), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        first, second = (printed_backward(*x, dlse is not None, SMALL, engine.generators, None) for x in kinds)
        backward = backward_of_both(engine, piece, first, second, dout, q, k, v, listed, True)
        dq, dk, dv, learned = backward(dout, dlse, q, k, v, out, lse, listed, numbers, scale, None)
        return [dq, dk, dv], learned

    return run


@pytest.fixture
def least(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many keys of its value a row has, on average, where copies are made."""
    return lambda n: monkeypatch.setattr(permute, "MANY_ALIKE", n)


@interprets
@pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter")
@pytest.mark.parametrize(
    ("name", "many"),
    [("chunk", True), ("key heads", True), ("cross and near", True), ("cross and near", False), ("one token", True)],
)
def test_outputs_and_gradients(name: str, many: bool, least: Callable[[int], None]) -> None:
    """Of both kernels one leaves the outputs as they are."""
    least(0 if many else 1000)
    judge(runner(), PERMUTED[name], torch.float32)


@interprets
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("dim", [1, 24, 80])
def test_rows_are_moved(dim: int, back: bool) -> None:
    """Heads that differ in strides, and groups of them that share an order."""
    from attndsl.runtime.load import load_source

    batch, heads, rows = 2, 4, 37
    x = torch.randn(batch, rows, heads, dim).transpose(1, 2)
    order = torch.stack([torch.randperm(rows) for _ in range(batch * 2)]).view(batch, 2, rows).int()
    found = torch.full((batch, heads, rows, dim), torch.nan)
    kernel = load_source(move_source(dim, 16, back), "move_rows").move_rows
    strides = (*x.stride()[:3], *found.stride()[:3], *order.stride()[:2])
    chosen = torch.tensor([True])
    kernel[(batch * heads * 3,)](x, found, order, ~chosen, *strides, heads, 2, rows)
    assert found.isnan().all()
    kernel[(batch * heads * 3,)](x, found, order, chosen, *strides, heads, 2, rows)
    index = order.repeat_interleave(2, 1).long()[..., None].expand_as(x)
    expected = torch.empty_like(found).scatter_(2, index, x.contiguous()) if back else x.gather(2, index)
    assert torch.equal(found, expected)


def test_which_calls_are_copied() -> None:
    """Those that the Hopper lowering then takes; what it prints is what they run."""
    spec = make_spec("sm_90", "gluon", 8, 2, 128)
    attn = attndsl.compile(DOCUMENTS)
    assert copied(attn.program, spec) is not None
    assert copied(attn.program, make_spec("sm_80", "triton", 8, 2, 128)) is None
    assert copied(attn.program, make_spec("sm_90", "triton", 8, 2, 128, dtype="float32")) is None
    assert copied(attndsl.compile(DOCUMENTS.replace("[b, k]", "[b, k] sorted")).program, spec) is None
    assert copied(attndsl.compile("causal").program, spec) is None
    assert "doc_of_rows" in attn.source("forward", backend="gluon")
    assert "attention_gradients" in attn.source("gradients", backend="gluon")
    with pytest.raises(PatternError, match="A510"):
        attndsl.compile(f"{DOCUMENTS[:-2]} | sink(4) }}").source("forward", backend="gluon")


@pytest.mark.parametrize(("tokens", "named"), [(16384, "on copies of q, k and v"), (512, "portable Triton")])
def test_what_is_copied_is_said(tokens: int, named: str) -> None:
    explained = str(attndsl.compile(DOCUMENTS).explain(tokens, doc=torch.zeros(1, tokens, dtype=torch.int32)))
    (line,) = (x for x in explained.splitlines() if "on a call" in x)
    assert named in line
