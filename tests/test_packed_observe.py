"""What is observed of packed calls: of rows their own document's members, of all rows those of all documents."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import attndsl
from tests.gradients import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")

# Equal ids apart are different documents; one entry of the batch is one document.
DOC = torch.tensor([[4] * 20 + [1] * 3 + [4] * 9 + [7, 8] + [0] * 14, [5] * 48])
PARTS = "causal & window(9), causal over pool(sum, 4)"
VIEWS = ["causal", "causal over pool(mean, 4)", "all over pool(max, 5, 3)", PARTS]
WANTED = ["sum, head, tokens", "max, head, tokens", "sum, head, blocks(16)", "max, head, blocks(8)"]
OF_QUERIES = ["sum, query, blocks(16)", "max, query, blocks(8)"]
OF_BLOCKS = ["sum, rows(8), tokens", "max, rows(16), blocks(8)"]


def compiled(view: str, wanted: str, clause: str = "packed doc") -> attndsl.Attention:
    count = "input n : int[b]\n" if "lengths" in clause else ""
    text = f"input doc : int[b, k]\n{count}{clause}\nx = attend {view}\nobserve m = probs(x, {wanted})\noutput x"
    return attndsl.compile(f"attention a {{\n{text}\n}}")


def judge(attn: attndsl.Attention, rows: int, dtype: torch.dtype, backend: str, tokens: int = 48) -> None:
    generator = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(2, h, n, 16, generator=generator) for h, n in ((4, rows), (2, tokens), (2, tokens)))
    given: dict[str, Any] = {"doc": DOC[:, :tokens], "n": torch.tensor([min(tokens, 37), tokens])}
    given = {decl.name: given[decl.name] for decl in attn.program.inputs}
    q, k, v = (x.to(dtype) for x in (q, k, v))
    _, found = attn(q, k, v, return_observed=True, backend=backend, **given)
    _, expected = attn.reference(q, k, v, return_observed=True, **given)
    assert found["m"].shape == expected["m"].shape
    # Sums over all rows: as many roundings as rows.
    torch.testing.assert_close(found["m"].double(), expected["m"], atol=rows * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(("view", "wanted"), [*product(VIEWS, [*WANTED, *OF_QUERIES, *OF_BLOCKS])])
def test_on_the_cpu(view: str, wanted: str) -> None:
    attn = compiled(view, wanted)
    for rows, tokens in ((48, 48), (19, 48), (1, 1)):
        judge(attn, rows, torch.float64, "cpu", tokens)
    judge(compiled(view, wanted, "lengths n packed doc"), 31, torch.float64, "cpu")


@pytest.mark.parametrize(("view", "wanted"), [(VIEWS[0], WANTED[2]), (VIEWS[3], WANTED[3])])
def test_in_triton(view: str, wanted: str) -> None:
    judge(compiled(view, wanted), 23, torch.float32, "triton", 30)


def test_of_all_rows_documents_follow_one_another() -> None:
    """Each with what it gives alone."""
    attn = compiled(VIEWS[0], WANTED[2])
    alone = attndsl.compile(
        "attention a { x = attend causal\n observe m = probs(x, sum, head, blocks(16))\n output x }"
    )
    q, k, v = (torch.randn(1, 2, 48, 16) for _ in range(3))
    found, at = attn(q, k, v, doc=DOC[:1], return_observed=True)[1]["m"], 0
    for low, end in ((0, 20), (20, 23), (23, 32), (32, 33), (33, 34), (34, 48)):
        _, own = alone(*(x[:, :, low:end] for x in (q, k, v)), return_observed=True)
        blocks = own["m"].shape[3]
        torch.testing.assert_close(found[..., at : at + blocks], own["m"])
        at += blocks
    assert found.shape == (1, 2, 1, 48) and not found[..., at:].any()


def test_classes_of_documents_follow_one_another() -> None:
    """Each row class with the members of its document, as this gives them alone."""
    text = "x = attend causal & window(9), causal over pool(mean, 4)\n observe m = probs(x, sum, rows(8), blocks(4))"
    attn = attndsl.compile(f"attention a {{ input doc : int[b, k]\n packed doc\n {text}\n output x }}")
    alone = attndsl.compile(f"attention a {{ {text}\n output x }}")
    q, k, v = (torch.randn(1, 2, 48, 16) for _ in range(3))
    found, at = attn(q, k, v, doc=DOC[:1], return_observed=True)[1]["m"], 0
    for low, end in ((0, 20), (20, 23), (23, 32), (32, 33), (33, 34), (34, 48)):
        _, own = alone(*(x[:, :, low:end] for x in (q, k, v)), return_observed=True)
        classes, members = own["m"].shape[2:]
        torch.testing.assert_close(found[:, :, at : at + classes, :members], own["m"])
        assert not found[:, :, at : at + classes, members:].any()
        at += classes
    assert found.shape == (1, 2, 48, 12) and not found[:, :, at:].any()


def test_in_a_compiled_graph() -> None:
    for wanted in (WANTED[2], OF_BLOCKS[0]):
        attn = compiled(VIEWS[1], wanted)
        q, k, v = (torch.randn(2, 2, 48, 16) for _ in range(3))

        def run(attn: Any = attn, q: Any = q, k: Any = k, v: Any = v) -> Any:
            return attn(q, k, v, doc=DOC, return_observed=True)[1]["m"]

        torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(), run())
