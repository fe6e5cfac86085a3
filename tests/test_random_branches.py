"""Random programs of several branches, views, selections and gates: output and every gradient against the oracle.

Selections are the call's own, handed to the oracle as plans: what they choose is tested elsewhere, and two masses that
are equal but for rounding may be ranked either way.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attndsl
from tests.accuracy import examples

pytestmark = pytest.mark.filterwarnings("ignore::attndsl.PatternWarning")
RAW = (
    "causal", "causal & window({n})", "causal & dilated({n})", "causal - same_block({n})", "causal & document(doc)",
    "band({n}, {n})",
)  # fmt: skip
OVER = ("causal", "causal - window({n})", "all", "causal & {{ q // 4 - k // 4 >= {n} }}")
INPUTS = {
    "gates": "float[b, h, q, 3] learnable", "channels": "float[b, h, q, Dv] learnable", "heads": "float[g] learnable",
    "sinks": "float[h] learnable", "kc": "float[b, g, k/4, D] learnable", "vc": "float[b, g, k/4, Dv] learnable",
    "doc": "int[b, k] sorted", "n": "int[b]", "runs": "int[b, g, k]", "picked": "int[b, g, 9]",
    "own": "int[b, k]",
}  # fmt: skip
TOLD = ("segments(", "pick(")
FACTORS = ("gates[0]", "sigmoid(gates[1])", "channels", "heads[g]", "(1 - gates[2])", "0.5")


class Draft:
    """A program while it is drawn: its lines, and which branches merge by their lse, or rank or weigh by their
    mass."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.lines: list[str] = []
        self.merging: list[str] = []
        self.ranking: list[str] = []
        self.voting: list[str] = []
        self.branches: list[str] = []

    def one(self, *choices: str) -> str:
        return self.draw(st.sampled_from(choices))

    def pattern(self, choices: tuple[str, ...]) -> str:
        return self.one(*choices).format(n=self.draw(st.integers(1, 9)))

    def view(self) -> str:
        size = self.draw(st.integers(1, 5))
        stride = self.draw(st.sampled_from((size, size, 1 + size // 2)))
        words = self.one("", ", visible = any")
        words += self.one("", ", counted") if stride == size else ""
        pooled = f"pool({self.one('mean', 'max', 'min', 'sum')}, {size}, {stride}{words})"
        counted = self.one("", ", counted")
        told = f"pool({self.one('mean', 'max')}, segments(runs){counted})"
        picked = f"pick(picked{self.one('', ', weight = Nk / 4')})"
        return self.one(pooled, pooled, "given(kc, vc, 4)", self.one(told, picked))

    def selection(self) -> str:
        """Members of blocks, by products of means or by the mass of an earlier branch."""
        by = [f"dot({self.one('Q')}, {self.one('mean', 'max')}(K))"]
        by += [f"probs({name})" for name in self.ranking]
        always = self.one("", ", always = same_block(4)")
        rest = f"blocks(4), among = causal, by = {self.one(*by)}, share = {self.one('none', 'group', 'heads')}{always}"
        return self.one(f"top(2, {rest})", f"cover(0.6, {rest}, at_most = 3)")

    def part(self) -> str:
        kind = self.draw(st.integers(0, 3))
        if kind == 0:
            return f"causal & ({self.selection()})"
        if kind == 1:
            return self.pattern(RAW)
        view = self.view()
        pooled = (
            ""
            if any(word in view for word in TOLD)
            else self.one(
                "", "", f" from pool({self.one('mean', 'max', 'min', 'sum')}, {self.draw(st.integers(1, 9))})"
            )
        )
        return f"{self.pattern(OVER)} over {view}{pooled}"

    def branch(self, name: str) -> None:
        shape, votes = self.draw(st.integers(0, 4)), ""
        if shape == 0:
            self.lines.append(f"plan sel_{name} = {self.selection()}")
            parts = f"causal & sel_{name}, causal - sel_{name} over pool(mean, 4, counted)"
        elif shape == 1 and self.voting and self.draw(st.booleans()):
            votes = self.one(*self.voting)
            parts = f"{self.pattern(RAW)} within blocks({self.one('4', '16')}) with probs({votes})"
        elif shape == 1:
            parts = f"{self.pattern(RAW)}, {self.pattern(OVER)} over {self.view()}"
        else:
            parts = self.part()
        clauses = ["", "", " { score softcap(s, 2.0) }"]
        clauses += [" { softmax with sink sinks[h] }"] if "within" not in parts else []
        if not any(word in parts for word in ("counted", "within", "weight =")):
            clauses.append(" { weights sigmoid(s) }")
        clause = self.one(*clauses)
        self.lines.append(f"{name} = attend {parts}{clause}")
        self.branches.append(name)
        # An lse that has a sink in it is merged with no other, and that of two levels is the voting branch's.
        if "sink sinks" not in clause and "weights" not in clause and (not votes or votes in self.merging):
            self.merging.append(name)
        told = any(word in parts for word in TOLD)
        if "weights" not in clause and not any(word in parts for word in ("within", "top(", "cover(", "sel_")):
            self.voting.append(name)
            if shape > 1 and not told:
                self.ranking.append(name)

    def output(self, depth: int = 2) -> str:
        kind = self.draw(st.integers(0, 4)) if depth else 0
        if kind in (0, 1):
            name = self.one(*self.branches)
            if len(self.merging) > 1 and self.draw(st.booleans()):
                name = f"merge({self.one(*self.merging)}, {self.one(*self.merging)})"
            return f"{self.one(*FACTORS)} * {name}"
        left, right = self.output(depth - 1), self.output(depth - 1)
        return f"({left} {self.one('+', '-')} {right})"


@st.composite
def programs(draw: st.DrawFn) -> str:
    draft = Draft(draw)
    for name in ("first", "second", "third")[: draw(st.integers(1, 3))]:
        draft.branch(name)
    present = ["lengths n"] if draw(st.integers(0, 2)) == 0 else []
    # In a packed call members are those of documents (A907), and entries that are given as many as tokens.
    barred = (" within ", "given(", "probs(")
    apart = not any(word in line for line in draft.lines for word in barred)
    present += ["packed own"] if apart and draw(st.booleans()) else []
    body = "\n".join([*present, *draft.lines, f"output {draft.output()}"])
    declared = "".join(f"input {name} : {kind}\n" for name, kind in INPUTS.items() if re.search(rf"\b{name}\b", body))
    return f"attention random {{\n{declared}{body}\n}}"


def judge(
    text: str, rows: int, k_len: int, seed: int, backend: str, dtype: torch.dtype, allowed: float, drops: float = 0.0
) -> None:
    attn = attndsl.compile(text)
    generator = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads, dim = 2, 4, 2, 8
    entries = (batch, kv_heads, -(-k_len // 4), dim)
    sizes: dict[str, tuple[int, ...]] = {
        "gates": (batch, heads, rows, 3), "channels": (batch, heads, rows, dim), "heads": (kv_heads,),
        "sinks": (heads,), "kc": entries, "vc": entries,
    }  # fmt: skip
    names = [decl.name for decl in attn.program.inputs if decl.name in sizes]
    shapes: list[tuple[int, ...]] = [
        (batch, heads, rows, dim),
        (batch, kv_heads, k_len, dim),
        (batch, kv_heads, k_len, dim),
    ]
    shapes += [sizes[name] for name in names]
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64) for size in shapes]
    doc: dict[str, Any] = {}
    if "document(doc)" in text:
        doc = {"doc": torch.arange(k_len)[None].repeat(batch, 1) // 6}
    if "segments(runs)" in text:
        changes = torch.rand(batch, kv_heads, k_len, generator=generator) < 0.3
        doc["runs"] = (changes.cumsum(-1) % 3).to(torch.int32)
    if "pick(" in text:
        # Some are no tokens, and some come twice.
        listed = torch.randint(-1, k_len + 1, (batch, kv_heads, 9), generator=generator)
        doc["picked"] = listed.to(torch.int32)
    if "packed own" in text:
        doc["own"] = (torch.rand(batch, k_len, generator=generator) < 0.15).cumsum(1) % 3
    if "lengths n" in text:
        # Of one sequence all tokens or none may be there, and a length past the end is the end.
        doc["n"] = torch.tensor([(seed * 7) % (k_len + 3), max(0, k_len - seed % 5)])
    dropping: dict[str, Any] = {"dropout": drops, "seed": seed} if drops else {}
    passed = torch.randn(batch, heads, rows, dim, generator=generator, dtype=torch.float64)

    def run(dtype: torch.dtype, oracle: bool, plans: Any = None) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in drawn]
        given: dict[str, Any] = dict(zip(names, leaves[3:], strict=True)) | doc
        q, k, v = leaves[:3]
        given |= dropping
        out = attn.reference(q, k, v, plans=plans, **given) if oracle else attn(q, k, v, backend=backend, **given)
        found = torch.autograd.grad(out, leaves, passed.to(out.dtype), allow_unused=True, materialize_grads=True)
        return [out.detach(), *found]

    ours = run(dtype, oracle=False)
    q, k = (x.to(dtype) for x in drawn[:2])
    given = {name: x.to(dtype) for name, x in zip(names, drawn[3:], strict=True)} | doc
    plans = attn.plan(q, k, **given) if attn.program.selections else None
    for what, x, y in zip(("out", *"qkv", *names), ours, run(torch.float64, oracle=True, plans=plans), strict=True):
        scale = max(1.0, float(y.abs().max()) if y.numel() else 0.0)
        error = float((x.double() - y).abs().max()) if y.numel() else 0.0
        assert error <= allowed * scale, f"{what}: {error:.3g}"


@examples(25)
@given(programs(), st.integers(1, 30), st.integers(0, 99), st.sampled_from((0.0, 0.3)))
def test_on_the_cpu(text: str, k_len: int, seed: int, drops: float) -> None:
    rows = seed % k_len + 1 if seed % 3 else k_len
    judge(text, rows, k_len, seed, "cpu", torch.float64, 1e-9, drops)
