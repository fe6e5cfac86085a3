"""Scale, score, softmax and weights of each branch, those of the attention where it has none, and dropout."""

from __future__ import annotations

import itertools

import pytest
import torch

import attndsl
from tests.gradients import TOLERANCE
from tests.test_view_calls import judge, leaves, text_of

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")

# What a branch says, and what stands outside for those that say nothing of the kind.
CLAUSES = [
    "",
    "{ scale 0.5 }",
    "{ score softcap(s, 2.0) }",
    "{ score s * (1 + sinks[h]) + heads[g] }",
    "{ softmax with sink sinks[h] }",
    "{ score s - heads[g] * s * s / 9 softmax with sink 0.5 }",
    "{ weights sigmoid(s + sinks[h]) }",
]
OUTSIDE = ["", "scale 0.3\n", "score softcap(s, 3.0)\n", "softmax with sink heads[g]\n"]
PAIRS = [*itertools.product(range(len(CLAUSES)), repeat=2)]
SHAPE = (1, 4, 2, 21, 21, 16, 16)


def program(i: int, j: int, outside: str) -> str:
    far, near = CLAUSES[i], CLAUSES[j]
    body = f"far = attend causal over pool(mean, 4) {far}\n near = attend causal & window(6) {near}\n"
    plain = "sink" not in far + near + outside and "weights" not in far + near
    joined = "merge(far, near) - near" if plain else "far - near"
    return text_of(f"{outside}{body} output gates[0] * ({joined}) + heads[g] * near")


@pytest.mark.parametrize(("i", "j"), PAIRS)
def test_each_branch_has_its_own(i: int, j: int) -> None:
    """Each pair of clauses on the CPU, with one of what stands outside, in float64."""
    judge(attndsl.compile(program(i, j, OUTSIDE[(i + 2 * j) % 4])), SHAPE, torch.float64, "cpu")


@pytest.mark.parametrize("i", range(len(CLAUSES)))
def test_in_triton(i: int) -> None:
    j = (i + 3) % len(CLAUSES)
    judge(attndsl.compile(program(i, j, OUTSIDE[i % 4])), SHAPE, torch.float32, "triton")


def test_what_stands_outside_holds_where_a_branch_says_nothing() -> None:
    """Each clause by itself: a branch with another score keeps the attention's sink and scale."""
    outside = attndsl.compile("""attention a {
        input sinks : float[h]
        scale 0.3
        score softcap(s, 3.0)
        softmax with sink sinks[h]
        x = attend causal { score softcap(s, 1.0) }
        y = attend causal { weights s }
        z = attend causal
        output x + 10 * y + 100 * z
    }""")
    written = attndsl.compile("""attention a {
        input sinks : float[h]
        x = attend causal { scale 0.3 score softcap(s, 1.0) softmax with sink sinks[h] }
        y = attend causal { scale 0.3 weights s }
        z = attend causal { scale 0.3 score softcap(s, 3.0) softmax with sink sinks[h] }
        output x + 10 * y + 100 * z
    }""")
    (q, k, v), _ = leaves(outside, SHAPE, torch.float64)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    torch.testing.assert_close(outside(q, k, v, sinks=sinks), written(q, k, v, sinks=sinks))
    # A call's scale takes the place of all.
    torch.testing.assert_close(
        outside(q, k, v, sinks=sinks, scale=-0.2), outside.reference(q, k, v, sinks=sinks, scale=-0.2)
    )


DROPPED = [
    "far = attend causal & dilated(3)\n near = attend causal & window(6) { weights sigmoid(s) }\n"
    "output gates[0] * far + gates[1] * near",
    "far = attend causal & { q - k >= 4 }\n near = attend causal & window(4)\n output merge(far, near)",
    "far = attend causal & top(2, blocks(4), by = dot(Q, mean(K)))\n near = attend causal & window(6)\n"
    "output gates[0] * far + near",
]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("body", DROPPED)
def test_branches_drop_the_same_pairs(body: str, backend: str) -> None:
    """Output and gradients are the oracle's with the same seed; a seed that is drawn is one for all branches."""
    attn = attndsl.compile(text_of(body))
    dtype = torch.float64 if backend == "cpu" else torch.float32
    (q, k, v), inputs = leaves(attn, SHAPE, dtype)
    given = [q, k, v, *inputs.values()]
    exact = [x.detach().double().requires_grad_() for x in given]
    right = dict(zip(inputs, exact[3:], strict=True))
    expected = attn.reference(*exact[:3], dropout=0.4, seed=7, **right)
    found = attn(q, k, v, dropout=0.4, seed=7, backend=backend, **inputs)
    assert float((found - expected).detach().abs().max()) <= 20 * TOLERANCE[dtype]
    assert not torch.allclose(found, attn(q, k, v, dropout=0.4, seed=8, backend=backend, **inputs))
    gradients = torch.autograd.grad(found.square().sum(), given)
    for x, y in zip(gradients, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert float((x.double() - y).abs().max()) <= 20 * TOLERANCE[dtype] * max(1.0, float(y.abs().max()))


def test_a_drawn_seed_is_one_for_all_branches() -> None:
    twice = attndsl.compile("attention a { x = attend causal\n y = attend causal\n output x - y }")
    q, k, v = torch.randn(3, 1, 2, 30, 16)
    assert (twice(q, k, v, dropout=0.5) == 0).all()
    views = attndsl.compile(
        "attention a { x = attend causal over pool(sum, 4)\n y = attend causal over pool(sum, 4)\n output x - y }"
    )
    assert (views(q, k, v, dropout=0.5) == 0).all()
