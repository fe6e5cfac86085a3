"""`pick(idx, weight = w)`: listed tokens as the entries of a view."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.program import Axis
from tests.decoding import paged
from tests.gradients import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")

DECLARED = {
    "few": "int[b, g, 7]", "many": "int[64]", "every": "int[g, k/4]", "heavy": "float[b, 64]", "doc": "int[b, k]",
    "sinks": "float[h] learnable", "order": "int[k]",
}  # fmt: skip
TOP = "top(2, blocks(4), among = causal, by = dot(Q, mean(K)))"
BODIES = [
    "attend causal over pick(few) { score softcap(s, 2.0) softmax with sink sinks[h] }",
    "attend causal & window(5), causal - window(5) over pick(many, weight = heavy)",
    "attend ~(dilated(3) & document(doc)) & { k % 5 != q % 5 or k < 3 } over pick(every, weight = Nk / 3)",
    f"plan sel = {TOP}\n attend causal & sel, causal - sel over pick(many, weight = 2)",
    "attend causal & coarsen(window(5), 4, any) over pick(many) { weights sigmoid(s) }",
    "far = attend (causal on blocks(2)) & (causal on permuted(order)) over pick(few)\n"
    "near = attend all over pick(every) from pool(mean, 4)\n output merge(far, near)",
]
# batch, heads, key heads, rows, keys, D, Dv
SHAPES = [(2, 4, 2, 37, 37, 16, 16), (1, 2, 1, 1, 1, 16, 24), (1, 3, 3, 5, 38, 80, 16)]


def compiled(body: str) -> attndsl.Attention:
    written = "".join(f"input {name} : {kind}\n" for name, kind in DECLARED.items() if name in body)
    return attndsl.compile(f"attention a {{\n{written}{body}\n}}")


def call(attn: attndsl.Attention, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    batch, heads, kv_heads, rows, tokens, dim, v_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def listed(*sizes: int) -> Tensor:
        # Some lie outside, some come twice.
        return torch.randint(-2, tokens + 2, sizes, generator=generator).to(torch.int32)

    made = {
        "few": listed(batch, kv_heads, 7), "many": listed(64), "every": listed(kv_heads, -(-tokens // 4)),
        "heavy": torch.randn(batch, 64, generator=generator).to(dtype),
        "sinks": torch.randn(heads, generator=generator).to(dtype).requires_grad_(),
        "doc": torch.arange(tokens)[None].repeat(batch, 1) // 11,
        "order": torch.randperm(tokens, generator=generator).to(torch.int32),
    }  # fmt: skip
    sizes = ((heads, rows, dim), (kv_heads, tokens, dim), (kv_heads, tokens, v_dim))
    leaves = [torch.randn(batch, *size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    return leaves, {decl.name: made[decl.name] for decl in attn.program.inputs if decl.name in made}


def judge(body: str, shape: tuple[int, ...], dtype: torch.dtype, backend: str, dropout: float = 0.0) -> None:
    """Output and gradients are the oracle's."""
    attn = compiled(body)
    leaves, inputs = call(attn, shape, dtype)
    more: dict[str, Any] = {"dropout": dropout, "seed": 3} if dropout else {}
    learned = [name for name, x in inputs.items() if x.requires_grad]
    leaves += [inputs[name] for name in learned]
    plans = attn.plan(*leaves[:2], **inputs) if attn.program.selections else {}
    q, k, v = leaves[:3]
    found = attn(q, k, v, backend=backend, **inputs, **more)
    right = [x.detach().double().requires_grad_() for x in leaves]
    exact = inputs | dict(zip(learned, right[3:], strict=True))
    q, k, v = right[:3]
    expected = attn.reference(q, k, v, plans=plans, **exact, **more)
    torch.testing.assert_close(found.double(), expected, atol=10 * TOLERANCE[dtype], rtol=10 * TOLERANCE[dtype])
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    given = torch.autograd.grad((found.double() * weight).sum(), leaves, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad((expected * weight).sum(), right, allow_unused=True, materialize_grads=True)
    for x, y in zip(given, wanted, strict=True):
        largest = max(float(y.abs().max()) if y.numel() else 0.0, 1.0)
        assert float((x.double() - y).abs().max()) <= 5 * TOLERANCE[dtype] * largest


@pytest.mark.parametrize("body", BODIES)
def test_cpu(body: str) -> None:
    for shape in SHAPES:
        judge(body, shape, torch.float64, "cpu")
    judge(body, SHAPES[2], torch.float64, "cpu", dropout=0.4)


@pytest.mark.parametrize("body", BODIES)
def test_triton(body: str) -> None:
    judge(body, SHAPES[len(body) % 3], torch.float32, "triton")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_rule(backend: str) -> None:
    """Token by token: each listed one that a row may see, as often as it is listed, weighs w times its e^s."""
    attn = attndsl.compile(
        "attention a { input idx : int[6]\n input w : float[6]\n attend causal over pick(idx, weight = w) }"
    )
    listed, weights = [2, 0, 2, -1, 9, 5], [1.0, 0.5, 2.0, 1.0, 1.0, 0.0]
    q, k, v = (torch.randn(1, 1, 7, 8) for _ in range(3))
    inputs: dict[str, Any] = {"idx": torch.tensor(listed, dtype=torch.int32), "w": torch.tensor(weights)}
    found = attn(q, k, v, backend=backend, **inputs)[0, 0]
    for i in range(7):
        masses, total = 0.0, torch.zeros(8)
        for token, w in zip(listed, weights, strict=True):
            if 0 <= token <= i:
                mass = w * float((q[0, 0, i] @ k[0, 0, token] / 8**0.5).exp())
                masses, total = masses + mass, total + mass * v[0, 0, token]
        torch.testing.assert_close(found[i], total / masses if masses else total, atol=1e-5, rtol=1e-5)
    seen = attn.mask(7, 7, idx=np.asarray(listed, np.int32))[0]
    np.testing.assert_array_equal(seen[-1], [True, True, True, False, False, True])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_no_keys_and_no_rows(backend: str) -> None:
    for body in (BODIES[1], "attend causal over pick(every)"):
        attn = compiled(body)
        for rows, tokens in ((0, 0), (0, 5)):
            (q, k, v), inputs = call(attn, (1, 2, 1, rows, tokens, 16, 16), torch.float32)
            out = attn(q, k, v, backend=backend, **inputs)
            assert not out.any()
            out.sum().backward()
            assert k.grad is not None and not k.grad.any()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_gradients_are_the_same_to_the_bit(backend: str) -> None:
    """A token that is listed many times gets what its entries get in their order."""
    attn = attndsl.compile("attention a { input idx : int[g, 90]\n attend all over pick(idx) }")
    idx = torch.randint(0, 5, (2, 90), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 1, 40, 2, 16).transpose(2, 3).requires_grad_()
    runs = []
    for _ in range(2):
        q, k, v = x
        runs.append(torch.autograd.grad(attn(q, k, v, idx=idx, backend=backend).square().sum(), x)[0])
    assert torch.equal(*runs)


def test_inside_torch() -> None:
    attn = compiled(BODIES[1])
    (q, k, v), inputs = call(attn, (1, 2, 1, 24, 24, 16, 16), torch.float32)
    expected = attn(q, k, v, **inputs)
    views = attn.views(k, v, many=inputs["many"])
    assert {name: x.shape[2] for name, (x, _) in views.items()} == {"pick(many)": 64}
    torch.testing.assert_close(attn(q, k, v, views=views, **inputs), expected)
    step = torch.compile(lambda *x, **more: attn(*x, **more), fullgraph=True, backend="aot_eager")
    found = step(q, k, v, **inputs)
    torch.testing.assert_close(found, expected)
    for x, y in zip(*(torch.autograd.grad(out.sum(), (q, k, v)) for out in (found, expected)), strict=True):
        torch.testing.assert_close(x, y)


def test_what_was_understood() -> None:
    attn = compiled(BODIES[1])
    inputs: dict[str, Any] = {"many": np.arange(64, dtype=np.int32), "heavy": np.ones((1, 64), np.float32)}
    text = str(attn.explain(4096, heads=2, kv_heads=2, **inputs))
    assert "over pick(many, weight = heavy[b, k])" in text
    assert "pick(many): 64 entries by torch" in text
    assert attn.kernels() == ("forward", "forward_2", "dq", "dkdv", "dq_2", "dkdv_2", "decode", "decode_2")
    assert not attn.evictable(64, 16), "any token may be listed later"
    near = compiled("attend causal & window(20) over pick(few)")
    assert near.evictable(64, 16) == [0, 1]
    with pytest.raises(attndsl.PatternError, match="A565"):
        attn.views(*torch.zeros(2, 1, 1, 4, 8))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("input idx : int[b, h, 64]\n attend causal over pick(idx)", "A048"),
        ("input idx : float[b, g, 64]\n attend causal over pick(idx)", "A048"),
        ("input idx : int[b, g, 64]\n input w : float[b, h, 64]\n attend causal over pick(idx, weight = w)", "A048"),
        ("input idx : int[64]\n input w : float[64] learnable\n attend causal over pick(idx, weight = w)", "A033"),
        ("input idx : int[64]\n attend causal over pick(idx, weight = q)", "A035"),
        ("input idx : int[64]\n attend causal over pick(idx, 2)", "A013"),
        ("input idx : int[64]\n attend causal over pick(idx, weight = 2) { weights sigmoid(s) }", "A047"),
    ],
)
def test_mistakes(text: str, code: str) -> None:
    with pytest.raises(attndsl.PatternError) as caught:
        attndsl.compile(f"attention a {{\n{text}\n}}")
    assert [d.code for d in caught.value.diagnostics] == [code]


# ------------------------------------------------------------------------------------------ decode


def sequence(attn: attndsl.Attention, inputs: dict[str, Tensor], b: int, tokens: int) -> dict[str, Any]:
    """Inputs of one sequence of a cache, of so many tokens."""
    found: dict[str, Any] = {}
    for name, x in inputs.items():
        for axis, dim in enumerate(attn.program.input(name).dims):
            if dim.axis is Axis.B:
                x = x.narrow(axis, b, 1)
            if dim.axis is Axis.K:
                x = x.narrow(axis, 0, -(-tokens // dim.block))
        found[name] = x.double() if x.is_floating_point() else x
    return found


DECODED = [*BODIES[:5], "far = attend causal over pick(few)\nnear = attend window(6)\noutput merge(far, near)"]


@pytest.mark.parametrize(("body", "backend"), [*((x, "cpu") for x in DECODED), (BODIES[1], "triton")])
def test_decode(body: str, backend: str) -> None:
    """Each step gathers what is listed of a sequence's own tokens, in pages or not; what lies past them is NaN."""
    attn = compiled(body)
    leaves, inputs = call(attn, (2, 4, 2, 3, 40, 16, 24), torch.float64 if backend == "cpu" else torch.float32)
    q, k, v = (x.detach() for x in leaves)
    inputs = {name: x.detach() for name, x in inputs.items()}
    lengths = torch.tensor([40, 23], dtype=torch.int32)
    k[1, :, 23:] = v[1, :, 23:] = float("nan")
    tolerance = 10 * TOLERANCE[q.dtype]
    for keys, values, table in ((k, v, None), paged(k, v, 8)):
        found = attn.decode(q, keys, values, lengths, table, backend=backend, **inputs)
        for b, n in enumerate(lengths.tolist()):
            own = (x[b : b + 1, :, :m].double() for x, m in ((q, 3), (k, n), (v, n)))
            exact = attn.reference(*own, **sequence(attn, inputs, b, n))
            torch.testing.assert_close(found[b : b + 1].double(), exact, atol=tolerance, rtol=tolerance)
    assert "pick" not in str(attn.views(k, v, lengths)), "nothing is kept"


def test_decode_of_8_bits() -> None:
    attn = compiled(BODIES[0])
    leaves, inputs = call(attn, (2, 4, 2, 1, 40, 16, 16), torch.float32)
    q, k, v = (x.detach() for x in leaves)
    inputs["sinks"] = inputs["sinks"].detach()
    lengths, scale = torch.tensor([40, 23], dtype=torch.int32), torch.tensor([0.5, 2.0])
    k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
    found = attn.decode(q, k, v, lengths, k_scale=scale, v_scale=scale, **inputs)
    k, v = (x.float() * scale.view(-1, 1, 1) for x in (k, v))
    torch.testing.assert_close(found, attn.decode(q, k, v, lengths, **inputs), atol=1e-5, rtol=1e-5)
