"""`observe` of members that are no blocks in a row, for any classes of rows, of any branch that has probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attndsl
from tests.test_probs import SEVERAL, declared, told
from tests.test_routed import tensors

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")

REDUCTIONS = (
    "head, segments(other)", "rows(8), segments(other)", "head, diagonals(1)", "rows(4), diagonals(3)",
    "query, diagonals(4)", "head, blocks(4) on permuted(po)", "query, blocks(3) on permuted(po)",
    "head, tokens on permuted(po)", "tiles(2, 2), tiles(2, 3)", "query, tiles(1, 3)", "tiles(1, 3), blocks(7)",
    "tiles(2, 3), tokens", "rows(7), blocks(9)", "query, blocks(5)", "rows(5), tokens", "head, blocks(6)",
)  # fmt: skip
OBSERVED = "\n".join(
    f"observe {word}_{i} = probs(x, {word}, {of})" for i, of in enumerate(REDUCTIONS) for word in ("sum", "max")
)


def judge(body: str, rows: int, k_len: int, dtype: torch.dtype = torch.float64, **more: Any) -> None:
    attn = attndsl.compile(f"attention a {{\n{declared(body)}\naxes t, z[6]\n{body}\n}}")
    q, k, v = (x.to(dtype) for x in tensors(rows, k_len))
    given = told(declared(body), k_len) | more
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
    out, found = attn(q, k, v, return_observed=True, **given)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    wanted_out, wanted = attn.reference(q.double(), k.double(), v.double(), return_observed=True, **exact)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(out.double(), wanted_out, atol=tolerance, rtol=tolerance)
    assert list(found) == list(wanted)
    for name, x in found.items():
        assert x.dtype == dtype and not x.requires_grad
        torch.testing.assert_close(x.double(), wanted[name], atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("seen", ["causal & window(11)", *SEVERAL])
def test_members_of_every_kind(seen: str) -> None:
    judge(f"x = attend {seen}\n{OBSERVED}\noutput x", 14, 14)


@pytest.mark.parametrize(("rows", "k_len"), [(3, 17), (1, 1)])
@pytest.mark.parametrize("seen", ["causal & window(11)", SEVERAL[3], SEVERAL[5]])
def test_of_calls_of_few_rows(seen: str, rows: int, k_len: int) -> None:
    judge(f"x = attend {seen}\n{OBSERVED}\noutput x", rows, k_len)


@pytest.mark.parametrize("seen", SEVERAL)
def test_blocks_of_branches_over_what_data_tells(seen: str) -> None:
    observed = "\n".join(
        f"observe {word}_{i} = probs(x, {word}, {of})"
        for i, of in enumerate(("head, tokens", "rows(8), blocks(16)", "query, blocks(4)"))
        for word in ("sum", "max")
    )
    judge(f"x = attend {seen}\n{observed}\noutput x", 23, 23, torch.float32)


def test_of_a_branch_that_chooses() -> None:
    plan = "plan p = top(2, blocks(4), among = causal, by = dot(Q, mean(K)), share = group)"
    judge(f"{plan}\nx = attend causal & (p | window(2))\n{OBSERVED}\noutput x", 13, 13)


@pytest.mark.parametrize("seen", ["causal & window(11)", SEVERAL[0], SEVERAL[3], SEVERAL[4]])
def test_padded(seen: str) -> None:
    judge(f"lengths left\nx = attend {seen}\n{OBSERVED}\noutput x", 13, 13)


def test_align_start() -> None:
    body = "align start\nx = attend all\nobserve d = probs(x, sum, rows(4), diagonals(3))\n"
    judge(body + "observe far = probs(x, max, head, diagonals(2))\noutput x", 31, 9)


def test_the_rule() -> None:
    """Written out: which mass each cluster of keys gets, and how far back rows look."""
    attn = attndsl.compile(
        "attention a { input c : int[k] x = attend causal observe cluster = probs(x, sum, head, segments(c))\n"
        "observe far = probs(x, sum, rows(8), diagonals(4)) output x }"
    )
    q, k, v = tensors(21, 21)
    ids = torch.tensor([0] * 5 + [1] * 9 + [0] * 7)
    found = attn(q, k, v, c=ids, return_observed=True)[1]
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) / 4
    p = logits.masked_fill(torch.ones(21, 21).triu(1) > 0, -torch.inf).softmax(-1)
    for first, end in ((0, 5), (5, 14), (14, 21)):
        torch.testing.assert_close(found["cluster"][:, :, 0, first], p[..., first:end].sum((2, 3)))
    assert float(found["cluster"].sum()) == pytest.approx(2 * 4 * 21)
    lag = np.arange(21)[:, None] - np.arange(21)
    for r, m in np.ndindex(3, 6):
        inside = torch.from_numpy((np.arange(21)[:, None] // 8 == r) & (lag // 4 == m) & (lag >= 0))
        torch.testing.assert_close(found["far"][:, :, r, m], (p * inside).sum((2, 3)))


def test_in_a_compiled_step() -> None:
    attn = attndsl.compile(
        "attention a { input c : int[k] x = attend causal over pool(mean, segments(c)), causal & window(4)\n"
        "observe far = probs(x, max, rows(8), diagonals(4)) output x }"
    )
    q, k, v = (x.float() for x in tensors(21, 21))
    ids = torch.arange(21) // 4

    def call(*x: Any) -> Any:
        return attn(*x[:3], c=x[3], return_observed=True)[1]["far"]

    compiled: Any = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, ids), call(q, k, v, ids))


@pytest.mark.parametrize("of", ["tokens on permuted(c)", "segments(c)", "diagonals(1)"])
def test_what_is_as_large_as_all_pairs_is_refused(of: str) -> None:
    with pytest.raises(attndsl.PatternError, match="A074"):
        attndsl.compile(f"attention a {{ input c : int[k] x = attend causal observe m = probs(x, sum, query, {of}) }}")
