"""Outputs of packed and padded calls: what they read of positions and lengths is a document's, or a sequence's, own."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import attndsl
from tests.gradients import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")

# Equal ids apart are different documents; one entry of the batch is one document.
DOC = torch.tensor([[4] * 9 + [1] * 3 + [4] * 5 + [7, 8] + [0] * 14, [5] * 33])
DECLARED = {
    "doc": "int[b, k]", "n": "int[b]", "role": "int[b, q]", "kind": "int[b, k]", "gate": "float[b, h, q, 2] learnable",
    "table": "float[8] learnable", "slide": "float[b, k] learnable",
}  # fmt: skip
OUTPUTS = [
    "q * x + (Nk - q) * y",
    "table[q] * x + 0.5 * gate[1]",
    "table[clamp(Nk - 1 - q, 0, 7)] * x + (if q % 3 == role[q] then 1.0 else gate[0]) * y",
    "sigmoid(gate[0] * (q + 1)) * merge(x, y) + kind[q + 1] * x",
    "x * (Nq - 1)",
    "slide[q] * x - slide[q - 3] * ((q + 1) / (Nk + 1)) * y",
]
# heads, key heads, rows, keys, D, Dv
SHAPES = [(4, 2, 33, 33, 16, 16), (1, 1, 14, 33, 80, 24), (2, 1, 1, 1, 16, 16)]


def compiled(clause: str, output: str) -> attndsl.Attention:
    body = f"{clause}\nx = attend causal\ny = attend {{ k >= q - 2 }}\noutput {output}"
    written = "".join(f"input {name} : {kind}\n" for name, kind in DECLARED.items() if re.search(rf"\b{name}\b", body))
    return attndsl.compile(f"attention a {{\n{written}{body}\n}}")


def inputs_of(attn: attndsl.Attention, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    heads, _, rows, k_len, *_ = shape
    made = {
        "doc": DOC[:, :k_len], "n": torch.tensor([k_len - 2, k_len // 2]), "table": torch.randn(8, generator=generator),
        "role": torch.randint(0, 3, (2, rows), generator=generator),
        "kind": torch.randint(-2, 3, (2, k_len), generator=generator),
        "gate": torch.randn(2, heads, rows, 2, generator=generator),
        "slide": torch.randn(2, k_len, generator=generator),
    }  # fmt: skip
    return {decl.name: made[decl.name] for decl in attn.program.inputs}


def judge(attn: attndsl.Attention, shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    """The output and the gradients, of gates too, are those of the oracle, which asks of each document alone."""
    heads, kv_heads, rows, k_len, dim, v_dim = shape
    generator = torch.Generator().manual_seed(7)
    sizes = ((heads, rows, dim), (kv_heads, k_len, dim), (kv_heads, k_len, v_dim))
    tensors = [torch.randn(2, *size, generator=generator) for size in sizes]
    inputs = inputs_of(attn, shape, generator)
    found, right = list[Any](), list[Any]()
    for made, kind in ((found, dtype), (right, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in tensors]
        given = {name: x.to(kind).requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}
        run: Any = attn.reference if kind is torch.float64 and made is right else attn
        out = run(*leaves, **given, **({"backend": backend} if run is attn else {}))
        wanted = [*leaves, *(x for x in given.values() if x.requires_grad)]
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        made += [out, *torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)]
    for x, y in zip(found, right, strict=True):
        if y is None:
            assert x is None or not x.any()
            continue
        bound = TOLERANCE[dtype] * max(1.0, float(y.detach().abs().max()))
        torch.testing.assert_close(x.double(), y, atol=bound, rtol=TOLERANCE[dtype])


CLAUSES = ["packed doc", "lengths n", "lengths n packed doc"]


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_on_the_cpu(clause: str, output: str) -> None:
    attn = compiled(clause, output)
    for shape in SHAPES if clause == CLAUSES[-1] else SHAPES[1:2]:
        judge(attn, shape, torch.float64, "cpu")


@pytest.mark.parametrize(("clause", "output"), [
    ("lengths n packed doc", OUTPUTS[2]), ("packed doc", OUTPUTS[3]),
])  # fmt: skip
def test_in_triton(clause: str, output: str) -> None:
    judge(compiled(clause, output), SHAPES[1], torch.float32, "triton")


@pytest.mark.parametrize("clause", ["packed doc", "lengths n"])
def test_rows_of_no_sequence_have_no_output(clause: str) -> None:
    """Whatever an output makes of them."""
    attn = compiled(clause, "x + 1.0")
    q, k, v = (torch.randn(1, 2, rows, 16) for rows in (9, 6, 6))
    given: dict[str, Any] = {"doc": DOC[:1, :6]} if clause == "packed doc" else {"n": torch.tensor([4])}
    out = attn(q, k, v, **given)
    torch.testing.assert_close(out.double(), attn.reference(q, k, v, **given), atol=1e-5, rtol=1e-5)
    end = 9 if clause == "packed doc" else 7
    assert not out[:, :, :3].any() and not out[:, :, end:].any() and out[:, :, 3:end].all()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_what_no_sequence_makes_of_its_length(backend: str) -> None:
    """Rows of no sequence have output 0 and no gradient, though their length is none, or less; and so have calls of no
    tokens, where inputs have no entry that could be read."""
    kind = torch.float64 if backend == "cpu" else torch.float32
    attn: Any = attndsl.compile(
        "attention a { input n : int[b]\n input doc : int[b, k]\n input slide : float[b, k] learnable\n"
        "lengths n packed doc\n x = attend causal\n"
        "output slide[q] / Nk * x + sqrt(slide[q] * slide[q] / Nk) * log(Nk) * x }"
    )
    for k_len, n in ((12, 7), (12, 0), (0, 0)):
        tensors = [torch.randn(1, 2, 12, 16), torch.randn(1, 1, k_len, 16), torch.randn(1, 1, k_len, 16)]
        tensors.append(torch.rand(1, k_len) + 0.5)
        found = list[Any]()
        for run in (lambda *x, **given: attn(*x, backend=backend, **given), attn.reference):
            leaves = [x.to(kind).requires_grad_() for x in tensors]
            out = run(*leaves[:3], slide=leaves[3], n=torch.tensor([n]), doc=torch.arange(k_len)[None] // 5)
            found.append(
                [out.double(), *(x.double() for x in torch.autograd.grad(out.sum(), leaves, materialize_grads=True))]
            )
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, atol=TOLERANCE[kind] * 10, rtol=TOLERANCE[kind])


def test_decode_in_a_document() -> None:
    attn = compiled("packed doc", "(q + 1) * x + (Nk - q) * y")
    q, k, v = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 33, 16), torch.randn(1, 2, 33, 16)
    for n in (33, 20, 11):
        found = attn.decode(q, k, v, torch.tensor([n], dtype=torch.int32), doc=DOC[:1])
        expected = attn.reference(q, k[:, :, :n], v[:, :, :n], doc=DOC[:1, :n])
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_in_a_compiled_graph() -> None:
    attn = compiled("packed doc", OUTPUTS[1])
    generator = torch.Generator().manual_seed(2)
    inputs = inputs_of(attn, (2, 1, 33, 33, 16, 16), generator)
    q, k, v = (torch.randn(2, heads, 33, 16, generator=generator) for heads in (2, 1, 1))
    found = torch.compile(lambda: attn(q, k, v, **inputs), backend="aot_eager", fullgraph=True)()
    torch.testing.assert_close(found, attn(q, k, v, **inputs))
