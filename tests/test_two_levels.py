"""`within ... with probs(...)`: a softmax inside each member, members weighed by another branch."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import attndsl
from attndsl.observing import Cells
from attndsl.runtime import shares
from attndsl.runtime.engine import Engine
from attndsl.runtime.triton_launch import without_memory
from tests.covered import covers
from tests.gpu import interprets
from tests.routing_rules import HEADS, KV_HEADS, best, call, check, noise, pooled, softmax
from tests.test_view_calls import judge

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
ENTRIES = "votes = attend causal over pool(mean, 16)\n"
SELECTED = "top(2, blocks(16), among = causal, by = dot(Q, mean(K)), always = same_block(16))"
BODIES = {
    "all": f"{ENTRIES} output attend causal within blocks(16) with probs(votes)",
    "bands": f"{ENTRIES} output attend band(19, 7) within blocks(32) with probs(votes)",
    "score": f"{ENTRIES} output attend causal within blocks(16) with probs(votes) "
    "{ score softcap(s, 2.0) - sinks[h] * (q - k) }",
    "scored votes": "votes = attend causal over pool(max, 8, counted) { scale 0.5 score softcap(s, 2.0) * sinks[h] }\n"
    "output attend causal - same_block(16) within blocks(16) with probs(votes)",
    "shared extents": "votes = attend causal over pool(mean, 12, 5)\n"
    "output attend causal within blocks(16) with probs(votes)",
    "raw votes": "votes = attend causal & window(20)\noutput attend causal within blocks(64) with probs(votes)",
    "votes with a sink": f"{ENTRIES[:-1]} {{ softmax with sink sinks[h] }}\n"
    "output attend causal within blocks(128) with probs(votes)",
    "votes of several parts": "votes = attend causal & window(9), causal - window(9) over pool(mean, 6, counted) "
    "{ softmax with sink sinks[h] }\noutput attend causal within blocks(16) with probs(votes)",
    "votes of segments": "votes = attend causal over pool(mean, segments(runs), counted)\n"
    "output attend causal within blocks(16) with probs(votes) { score softcap(s, 2.0) }",
    "votes of picked tokens": "votes = attend causal & window(5), causal over pick(picked, weight = 2)\n"
    "output attend band(19, 7) within blocks(7) with probs(votes)",
    "members of fifty": "votes = attend causal over pool(mean, 10) { scale 0.5 }\n"
    "output attend band(70, 7) within blocks(50) with probs(votes)",
    "members of seven": f"{ENTRIES} output attend causal within blocks(7) with probs(votes) "
    "{ score softcap(s, 2.0) - sinks[h] * (q - k) }",
    "fifty chosen by each": f"plan sel = {SELECTED.replace('16', '24')}\n votes = attend sel over pool(mean, 24)\n"
    "output attend sel within blocks(24) with probs(votes)",
    "chosen by each": f"plan sel = {SELECTED}\n votes = attend sel over pool(mean, 16)\n"
    "output attend sel within blocks(16) with probs(votes)",
    "chosen by a group": f"plan sel = {SELECTED[:-1]}, share = group)\n votes = attend sel over pool(mean, 16)\n"
    "output attend sel within blocks(16) with probs(votes)",
    "chosen by rows": f"plan sel = {SELECTED[:-1].replace('dot(Q', 'dot(mean(Q)')}, per = rows(16))\n"
    f"{ENTRIES} output attend sel within blocks(16) with probs(votes)",
    "chosen by votes": f"plan sel = {SELECTED}\n votes = attend sel over pool(mean, 16, counted) "
    "{ scale 0.3 score softcap(s, 2.0) softmax with sink sinks[h] }\n"
    "output attend causal within blocks(16) with probs(votes) { scale 0.7 }",
    "chosen, merged": f"plan sel = {SELECTED.replace('among = causal', 'among = causal - same_block(16)')}\n"
    "votes = attend sel over pool(mean, 16)\n near = attend causal & same_block(16)\n"
    "output merge(near, attend sel within blocks(16) with probs(votes))",
}
INPUTS = {"sinks": "float[h] learnable", "runs": "int[b, g, k]", "picked": "int[b, g, 9]"}
TWO = f"attention a {{ {ENTRIES} far = attend %s within blocks(16) with probs(votes)\n output %s }}"
SHAPES = [(2, 4, 2, 75, 75, 16, 16), (1, 2, 1, 1, 1, 16, 24), (1, 3, 3, 5, 38, 80, 16)]


def program(body: str) -> attndsl.Attention:
    """`output` may hold the branch itself, for short."""
    before, _, written = body.rpartition("output ")
    wrapped = written
    if "attend" in written:
        start = written.index("attend")
        end = written.rindex(")") if written.startswith("merge") else len(written)
        before, wrapped = f"{before}far = {written[start:end]}\n", f"{written[:start]}far{written[end:]}"
    declared = "".join(f"input {name} : {kind}\n" for name, kind in INPUTS.items() if re.search(rf"\b{name}\b", body))
    return attndsl.compile(f"attention a {{\n{declared}{before}output {wrapped}\n}}")


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_the_cpu(name: str, shape: tuple[int, ...]) -> None:
    judge(program(BODIES[name]), shape, torch.float64, "cpu")


@pytest.mark.parametrize("name", BODIES)
def test_in_triton(name: str) -> None:
    judge(program(BODIES[name]), (1, 2, 1, 37, 37, 16, 16), torch.float32, "triton")


@pytest.mark.parametrize("name", ["bands", "chosen by each"])
def test_small_calls_in_triton(name: str) -> None:
    for shape in SHAPES[1:]:
        judge(program(BODIES[name]), shape, torch.float32, "triton")


@pytest.mark.parametrize("votes", ["causal over pool(mean, 16)", "causal & window(40)"])
@pytest.mark.parametrize(
    "chosen",
    ["top(3, segments(c), per = rows(4), by = k * 5 % 7)", "top(3, tiles(2, 2), per = tiles(2, 3), by = k * 5 % 7)"],
)
def test_of_what_rows_choose_of_other_members(chosen: str, votes: str) -> None:
    """Kernels have lists of segments where the program has maps of them."""
    attn = attndsl.compile(f"""attention a {{
        input c : int[b, g, k]
        axes y, x[5]
        votes = attend {votes}
        far = attend causal & {chosen} within blocks(16) with probs(votes)
        output far }}""")
    c = (torch.arange(37) // 5).expand(1, 1, 37).contiguous()
    for dtype, backend, allowed in ((torch.float64, "cpu", 1e-10), (torch.float32, "triton", 2e-5)):
        q, k, v = (noise(1, heads, 37, 16, seed=i).requires_grad_() for i, heads in enumerate((2, 1, 1)))
        out = attn(*(x.to(dtype) for x in (q, k, v)), backend=backend, c=c)
        exact = attn.reference(q, k, v, c=c)
        found, wanted = (torch.autograd.grad(x.double().sin().sum(), (q, k, v)) for x in (out, exact))
        for x, y in zip((out, *found), (exact, *wanted), strict=True):
            torch.testing.assert_close(x.double(), y, atol=allowed, rtol=allowed)


# Members that no product takes whole.
LARGE = {
    "score": f"{ENTRIES} output attend band(400, 7) within blocks(512) with probs(votes) "
    "{ score softcap(s, 2.0) - sinks[h] * (q - k) }",
    "chosen by each": f"plan sel = {SELECTED.replace('16', '320')}\n votes = attend sel over pool(mean, 320)\n"
    "output attend sel within blocks(320) with probs(votes)",
    "smaller blocks chosen": f"plan sel = {SELECTED}\n votes = attend sel over pool(mean, 16)\n"
    "output attend sel within blocks(264) with probs(votes)",
}


@pytest.mark.parametrize("name", LARGE)
def test_members_in_strips(name: str) -> None:
    attn = program(LARGE[name])
    for shape in SHAPES[1:] if name != "score" else [(1, 2, 1, 37, 650, 16, 16)]:
        judge(attn, shape, torch.float64, "cpu")
        judge(attn, shape, torch.float32, "triton")


def test_dropout_in_strips() -> None:
    body = f"{ENTRIES} output attend causal within blocks(300) with probs(votes)"
    judge(program(body), (1, 2, 1, 19, 320, 80, 16), torch.float32, "triton", dropout=0.4)


@interprets
@pytest.mark.parametrize("name", ["bands", "scored votes", "raw votes", "votes with a sink"])
def test_shares_by_a_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of observations, whose cells are members: of calls, and of the last rows of more tokens."""
    attn, made = program(BODIES[name]), list[Cells]()
    own: Any = Engine.observe

    def observe(engine: Engine, *given: Any) -> Any:
        made.append(given[-1])
        return own(engine, *given[:-2], "triton", given[-1])

    monkeypatch.setattr(shares, "_DEVICES", ("cpu",))
    monkeypatch.setattr(shares, "_CELL", 64)
    monkeypatch.setattr(Engine, "observe", observe)
    for shape in ((1, 2, 1, 37, 37, 16, 16), (2, 2, 2, 5, 38, 16, 16)):
        judge(attn, shape, torch.float32, "triton")
    within = attn.program.named("far").within
    assert within is not None and {x.keys for x in made} == {within.keys}


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_dropout(backend: str) -> None:
    """Of the weights that pairs have at last; what members weigh is not touched."""
    dtype = torch.float64 if backend == "cpu" else torch.float32
    judge(program(BODIES["members of seven"]), (2, 4, 2, 21, 37, 16, 16), dtype, backend, dropout=0.4)


def test_runtime_arguments() -> None:
    """In what members weigh, too."""
    body = "votes = attend causal & window(n) over pool(mean, 4) far = attend causal within blocks(4) with probs(votes)"
    attn = attndsl.compile(f"attention a(n : runtime int) {{ {body}\n output far }}")
    leaves = [torch.randn(1, 2, 19, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found, expected = (torch.autograd.grad(f(*leaves, n=7).square().sum(), leaves) for f in (attn, attn.reference))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tokens", [1, 75])
def test_the_rule(tokens: int) -> None:
    """Token by token: a block gives the softmax of its own tokens, as often as its entry is voted for."""
    q, k, v = call(tokens)
    found = program(BODIES["all"])(q, k, v)
    expected = np.zeros(found.shape[1:])
    for h, t in np.ndindex(HEADS, tokens):
        x, keys, values = q[0, h, t].numpy(), k[0, h // 2].numpy(), v[0, h // 2].numpy()
        finished = (t + 1) // 16
        if not finished:
            continue
        entries = np.stack([keys[16 * m : 16 * m + 16].mean(0) for m in range(finished)])
        for m, share in enumerate(softmax(entries @ x / 8**0.5)):
            own = slice(16 * m, min(16 * m + 16, t + 1))
            expected[h, t] += share * softmax(keys[own] @ x / 8**0.5) @ values[own]
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-12)


def test_a_bias_of_pairs() -> None:
    """It may be read; that it learns would need tiles of another shape, and is refused."""
    score = "{ score s + bias[h, clamp(q - k, 0, 63)] }"
    body = f"{ENTRIES} far = attend causal within blocks(16) with probs(votes) {score}\n output far"
    text = "attention a { input bias : float[h, 64] %s\n" + body + " }"
    with pytest.raises(attndsl.PatternError, match="A077"):
        attndsl.compile(text % "learnable")
    q, k, v = call(40)
    bias = noise(HEADS, 64)
    attn = attndsl.compile(text % "")
    torch.testing.assert_close(attn(q, k, v, bias=bias), attn.reference(q, k, v, bias=bias))


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
    """Keeps the size of the largest tensor that an operator of the library returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.namespace == "attndsl":
            sizes = (x.numel() for x in tree_leaves(found) if isinstance(x, torch.Tensor))
            self.largest = max(self.largest, *sizes, 0)
        return found


def test_votes_are_kept_nowhere() -> None:
    """Where the weighing branch has an entry a member, nothing has an entry a row and member, nor have gradients."""
    attn, tokens = attndsl.compile(TWO.replace("16", "4") % ("causal", "far")), 256
    leaves = [torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(3)]
    with _Largest() as seen:
        attn(*leaves).sum().backward()
    assert seen.largest == tokens * 8 < tokens * tokens // 4


def test_its_lse_is_that_of_the_votes() -> None:
    q, k, v = call(40)
    _, found = attndsl.compile(TWO % ("causal", "far"))(q, k, v, return_lse=True)
    _, expected = attndsl.compile(TWO % ("causal", "votes"))(q, k, v, return_lse=True)
    torch.testing.assert_close(found, expected)


def test_one_softmax_where_members_vote_for_themselves() -> None:
    """The probabilities of a softmax, given to members, and a softmax inside each: that is the softmax itself."""
    attn = attndsl.compile(
        "attention a { votes = attend causal\n far = attend causal within blocks(16) with probs(votes)\n output far }"
    )
    for shape in ((75, 75), (5, 38)):
        q, k, v = call(shape[1], shape[0])
        torch.testing.assert_close(attn(q, k, v), attndsl.compile("causal")(q, k, v))


def test_pages_stay_that_two_levels_read() -> None:
    assert attndsl.compile(TWO % ("causal", "far")).evictable(64, page=16) == []
    assert attndsl.compile(TWO % ("causal & window(16)", "far")).evictable(64, page=16) == [0, 1, 2]


def test_what_was_understood() -> None:
    attn = program(BODIES["all"])
    assert "softmax over each row inside each block of 16 keys" in str(attn.explain(64))
    assert "far.decode" in attn.kernels()
    for kernel in ("far.forward", "far.dq", "far.dkdv", "far.decode"):
        assert "two levels" in attn.source(kernel)


# ---------------------------------------------------------------------------------------- systems


def two_levels(q: Any, k: Any, v: Any, marks: Any, n: int, merged: bool) -> Any:
    """HSA, or where near tokens and landmarks share a softmax, Landmark."""
    rows = []
    for h in range(HEADS):
        g, of_head = h // (HEADS // KV_HEADS), []
        for t in range(q.shape[2]):
            x, own, dim = q[0, h, t], t // 64, q.shape[3]
            votes = (marks[0, g] @ x).detach()
            opened = best({m: float(votes[m]) for m in range(own)}, n)
            near = k[0, g, 64 * own : t + 1] @ x / dim**0.5
            scores = marks[0, g][opened] @ x / dim**0.5
            inside = [
                (k[0, g, 64 * m : 64 * m + 64] @ x / dim**0.5).softmax(0) @ v[0, g, 64 * m : 64 * m + 64]
                for m in opened
            ]
            if merged:
                weights = torch.cat((near, scores)).softmax(0)
                tokens, shares = weights[: len(near)], weights[len(near) :]
            else:
                tokens, shares = near.softmax(0), scores.softmax(0)
            out = tokens @ v[0, g, 64 * own : t + 1]
            for share, found in zip(shares, inside, strict=True):
                out = out + share * found
            of_head.append(out)
        rows.append(torch.stack(of_head))
    return torch.stack(rows)[None]


@covers("hsa", "landmark")
@pytest.mark.parametrize("name", ["hsa", "landmark"])
@pytest.mark.parametrize("tokens", [1, 200])
def test_systems(name: str, tokens: int) -> None:
    given = {"hsa": "summary", "landmark": "marks"}[name]
    qkv = call(tokens)
    marks = pooled(qkv[1], 64) + noise(1, KV_HEADS, -(-tokens // 64), 8)
    check(
        name, qkv, lambda q, k, v, x: two_levels(q, k, v, x[given], 2, name == "landmark"), {"n": 2}, (given,),
        **{given: marks},
    )  # fmt: skip


def test_in_a_compiled_graph() -> None:
    """What members weigh, pooled queries and a plan are operators of a graph like any other."""
    attn = attndsl.compile(
        f"attention a {{ plan sel = {SELECTED}\n votes = attend sel over pool(mean, 16)\n"
        "far = attend sel within blocks(16) with probs(votes)\n"
        "coarse = attend causal over pool(mean, 16) from pool(mean, 16)\n output far + coarse }"
    )
    leaves = [x.requires_grad_() for x in call(40)]
    q, k, v = leaves
    runs = [attn(q, k, v), torch.compile(lambda: attn(q, k, v), backend="aot_eager", fullgraph=True)()]
    gradients = [torch.autograd.grad(x.square().sum(), leaves) for x in runs]
    torch.testing.assert_close(runs[0], runs[1])
    torch.testing.assert_close(*gradients)


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what an operator was called with."""

    def __init__(self, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.name, self.found = name, list[tuple[Any, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == self.name:
            self.found.append(tree_map_only(torch.Tensor, torch.Tensor.detach, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lies", ["heads inside", "expanded"])
def test_gradients_of_shares_lie_as_graphs_expect(lies: str) -> None:
    attn, (q, k, v) = attndsl.compile(TWO.replace("blocks(16)", "blocks(32)") % ("causal", "far")), call(40)
    q = q[:, :1].expand(q.shape) if lies == "expanded" else q.transpose(1, 2).contiguous().transpose(1, 2)
    q = q.detach().requires_grad_()
    with _Calls("attndsl::shares_backward") as calls:
        attn(q, k, v).sum().backward()
    (arguments,) = calls.found
    operator: Any = torch.ops.attndsl.shares_backward
    meta = tree_map_only(torch.Tensor, without_memory, arguments)
    expected = tree_map_only(torch.Tensor, torch.Tensor.stride, operator(*meta))
    assert tree_map_only(torch.Tensor, torch.Tensor.stride, operator(*arguments)) == expected
