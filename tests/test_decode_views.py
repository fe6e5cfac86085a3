"""Decode of programs with views, several branches and selections: each sequence's rows are those of the program on it
alone, by the oracle, over contiguous and paged caches whose other tokens are NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attndsl
import attndsl.serving
from attndsl.compose import has_lse
from attndsl.plans import own_program
from attndsl.program import CallShape, Program
from attndsl.selection import Above, Cover, Selection
from tests.accuracy import examples
from tests.decoding import of_length, paged
from tests.test_routed import PATTERNS as ROUTED
from tests.test_select import by_oracle, levels_of, selections
from tests.test_view_calls import INPUTS, OUTPUTS, PARTS, text_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::attndsl.PatternWarning"),
]
PATTERNS = Path(__file__).parent.parent / "examples" / "patterns"
FP8 = torch.float8_e4m3fn
CAPACITY = 48
NAN = float("nan")
BODIES = [body for body in PARTS + OUTPUTS if "align start" not in body]


class Sequences:
    """Sequences of any length in one cache, and what a call on each alone gives."""

    def __init__(
        self, attn: attndsl.Attention, lengths: Sequence[int], rows: int, dtype: torch.dtype = torch.float64,
        heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (16, 24), seed: int = 0, capacity: int = CAPACITY,
    ) -> None:  # fmt: skip
        self.attn, self.lengths, self.rows, self.capacity = attn, lengths, rows, capacity
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

        batch = len(lengths)
        self.q = draw(batch, heads[0], rows, dims[0])
        self.k, self.v = (draw(batch, heads[1], capacity, dim) for dim in dims)
        for b, length in enumerate(lengths):
            self.k[b, :, length:] = self.v[b, :, length:] = NAN
        names = {decl.name for decl in attn.program.inputs}
        shape = (batch, *heads, rows, capacity, *dims)
        self.inputs: dict[str, Any] = {name: draw(*INPUTS[name][1](*shape)) for name in INPUTS if name in names}
        if "keep" in self.inputs:
            self.inputs["keep"] = self.inputs["keep"] > 0
        if "doc" in self.inputs:
            self.inputs["doc"] = torch.arange(capacity)[None].repeat(batch, 1) // 5
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)

    def cache(self, page: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        k, v, table = (self.k, self.v, None) if page is None else paged(self.k, self.v, page)
        return k, v, self.seq_lens, table

    def of_eight_bits(self, page: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor], Any]:
        """The cache in float8, in pages: the numbers that it stands for, the call's tensors, and the heads' scales."""
        scales = torch.tensor([0.5, 2.0]), torch.tensor(0.25)
        rounded = [x.nan_to_num().to(FP8) for x in (self.k, self.v)]
        k, v = (x.float() * scale.view(-1, 1, 1) for x, scale in zip(rounded, scales, strict=True))
        keys, values, table = paged(rounded[0].view(torch.uint8), rounded[1].view(torch.uint8), page)
        cache = keys.view(FP8), values.view(FP8), self.seq_lens, table
        return (k, v), cache, {"k_scale": scales[0], "v_scale": scales[1]}

    def check_wild(self) -> None:
        """Of three sequences: any length is a length within the cache, and no entry of a page table is trusted."""
        k, v = self.k.nan_to_num(), self.v.nan_to_num()
        wild = torch.tensor([2**31 - 1, -5, -(2**31)], dtype=torch.int32)
        outs = [self.attn.decode(self.q, k, v, x, **self.inputs) for x in (wild, wild.clamp(0, self.capacity))]
        assert torch.equal(*outs) and not outs[0][1:].any()
        k, v, lengths, table = self.cache(8)
        assert table is not None
        table[0, ::2], table[1], table[2, 1:] = -1, 2**31 - 1, -(2**31)
        out = self.attn.decode(self.q, k.nan_to_num(), v.nan_to_num(), lengths, table, **self.inputs)
        assert out.isfinite().all()

    def check_both(self, found: Any, tolerance: float = 1e-11) -> None:
        """Of an output, or of one with its lse."""
        out, lse = found if isinstance(found, tuple) else (found, None)
        self.check(out, lse, tolerance=tolerance)

    def check(self, out: Tensor, lse: Tensor | None, plans: Any = None, tolerance: float = 1e-11) -> None:
        assert out.shape == (*self.q.shape[:3], self.v.shape[3]) and out.dtype == self.q.dtype
        for b, length in enumerate(self.lengths):
            rows = min(self.rows, length)
            before, batch = self.rows - rows, len(self.lengths)
            assert not out[b, :, :before].any(), "rows before the first token give 0"
            if rows == 0:
                continue
            # As entry b of a batch, which the pattern may read.
            q, k, v = (
                x[b : b + 1].double().expand(batch, -1, -1, -1)
                for x in (self.q[:, :, before:], self.k[:, :, :length], self.v[:, :, :length])
            )
            cut = of_length(self.attn.program, self._all_inputs(), length, rows)
            inputs: dict[str, Any] = {
                name: x.double() if x.is_floating_point() else x for name, x in cut.items() if name in self.inputs
            }
            given = None
            if plans is not None:
                given = {name: self._plan(name, x, before, length) for name, x in plans.items()}
            exact = self.attn.reference(q, k, v, return_lse=lse is not None, plans=given, **inputs)
            wanted = exact if lse is not None else (exact,)
            for found, right in zip((out, lse), wanted, strict=False):
                assert found is not None
                torch.testing.assert_close(found[b, :, before:].double(), right[b], rtol=tolerance, atol=tolerance)

    def _plan(self, name: str, plan: Tensor, before: int, length: int) -> Tensor:
        """A plan of the call as one of a sequence alone."""
        selection = self.attn.program.selection(name)
        members = -(-length // selection.keys) if plan.dtype == torch.uint8 else None
        return plan[:, :, of_classes(selection, before, length), :members]

    def _all_inputs(self) -> dict[str, Tensor]:
        """With something in the place of plans, which no call gives."""
        others = {decl.name: torch.zeros([1] * len(decl.dims)) for decl in self.attn.program.inputs}
        return others | self.inputs


def of_classes(selection: Selection, before: int, length: int) -> slice:
    """The row classes of a sequence alone in a plan of the call."""
    if selection.rows is None:
        return slice(None)
    return slice(before, None) if selection.rows == 1 else slice(-(-length // selection.rows))


def with_lse(attn: attndsl.Attention) -> bool:
    return has_lse(attn.program) and all(branch.weights is None for branch in attn.program.branches)


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_cpu(number: int) -> None:
    """With views that are handed in, and with such as are made of all tokens."""
    attn, page = attndsl.compile(text_of(BODIES[number])), (8, None)[number % 2]
    of = Sequences(attn, [41, 2, 0, 48], rows=3 if page else 1)
    cache, lse = of.cache(page), with_lse(attn)
    views = attn.views(*cache)
    for handed in (views, None):
        found = attn.decode(of.q, *cache, views=handed, return_lse=lse, **of.inputs)
        of.check_both(found)


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_triton(number: int) -> None:
    attn, page = attndsl.compile(text_of(BODIES[number])), (None, 8)[number % 2]
    of = Sequences(attn, [41, 2, 48], rows=1 + number % 3 * 2, dtype=torch.float32)
    cache, lse = of.cache(page), with_lse(attn)
    given: Any = {"return_lse": lse, "backend": "triton", **of.inputs}
    found = attn.decode(of.q, *cache, views=attn.views(*cache), **given)
    of.check_both(found, 2e-5)


@pytest.mark.parametrize(("heads", "dims", "rows"), [((1, 1), (8, 80), 1), ((6, 2), (80, 16), 7), ((3, 3), (16, 8), 2)])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_heads_and_dims(heads: tuple[int, int], dims: tuple[int, int], rows: int, backend: str) -> None:
    attn = attndsl.compile(
        "attention a { attend causal & window(4), causal over pool(mean, 4, 2) { softmax with sink 0 } }"
    )
    of = Sequences(attn, [41, 1], rows, torch.float32, heads, dims)
    cache = of.cache(16)
    of.check_both(attn.decode(of.q, *cache, views=attn.views(*cache), return_lse=True, backend=backend), 2e-5)


# ------------------------------------------------------------------------------ published systems

SYSTEMS: dict[str, dict[str, Any]] = {
    "nsa": {"block": 8, "n": 3, "span": 5},
    "moba": {"block": 8, "n": 3},
    "quest": {"page": 4, "budget": 12},
    "flash_moba": {"block": 8, "n": 2},
    "token_select": {"first": 2, "near": 3, "n": 4},
    "dsa": {"n": 5},
    "long_heads": {"chunk": 256, "n": 4},
    "pyramid": {"near": 1, "middle": 2},
    "combiner": {"segment": 8},
    "coarse_and_near": {"block": 8, "span": 5},
    "xattention": {"block": 8, "stride": 4},
    "psa": {"block": 8, "stride": 4},
    "regions": {"region": 7, "n": 2},
    "proxy": {"block": 8, "n": [2, 1, 3, 2]},
}


def system(name: str, rows: int, dtype: torch.dtype) -> Sequences:
    attn = attndsl.compile(PATTERNS / f"{name}.attn", **SYSTEMS[name])
    of = Sequences(attn, [41, 3, 48], rows, dtype)
    generator = torch.Generator().manual_seed(3)
    sizes: dict[str, tuple[int, ...]] = {
        "gate": (3, 4, rows, 3 if name == "nsa" else 2), "kr": (3, 2, CAPACITY, 16), "index": (3, rows, CAPACITY),
        "ck": (3, 2, 1, 16),
    }  # fmt: skip
    for decl in attn.program.inputs:
        if decl.name in sizes:
            of.inputs[decl.name] = torch.randn(sizes[decl.name], generator=generator, dtype=torch.float64).to(dtype)
    return of


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", SYSTEMS)
def test_systems(name: str, rows: int) -> None:
    """Choices of float64 are the oracle's, over pages too."""
    of = system(name, rows, torch.float64)
    for page in (None, 4):
        cache = of.cache(page)
        of.check(of.attn.decode(of.q, *cache, views=of.attn.views(*cache), **of.inputs), None)


@pytest.mark.parametrize("name", ["nsa", "moba", "quest", "dsa"])
def test_systems_in_triton(name: str) -> None:
    """The plan that was made, handed in, gives the same; and what it gives is the oracle's of that plan."""
    of = system(name, 2, torch.float32)
    cache = of.cache(8)
    views = of.attn.views(*cache)
    plans = attndsl.serving.plan(of.attn, of.q, *cache, views=views, **of.inputs)
    found = of.attn.decode(of.q, *cache, views=views, backend="triton", **of.inputs)
    of.check(found, None, plans, tolerance=2e-5)
    again = of.attn.decode(of.q, *cache, views=views, plans=plans, backend="triton", **of.inputs)
    assert torch.equal(found, again)


@pytest.mark.parametrize("pattern", ["document(doc)", "document(doc) & causal, causal & document(doc)"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_entries_of_one_token_by_sorted_data(pattern: str, backend: str) -> None:
    """Tiles of them are skipped as those of tokens are, by where the rows of a call cut them."""
    declared = "input doc : int[b, k] sorted"
    attn = attndsl.compile(f"attention a {{ {declared}  u = attend {pattern} over pool(max, 1)\n output u }}")
    of = Sequences(attn, [41, 2, 48], rows=3, dtype=torch.float32)
    of.check_both(attn.decode(of.q, *of.cache(8), backend=backend, **of.inputs), 2e-5)


def test_the_last_rows_of_a_prefill() -> None:
    """A row is what it was in a call on the whole sequence, whatever came after it."""
    for name in ("nsa", "moba", "pyramid", "combiner"):
        of = system(name, 3, torch.float64)
        cache = of.cache(4)
        out = of.attn.decode(of.q, *cache, views=of.attn.views(*cache), **of.inputs)
        for b, length in enumerate(of.lengths):
            q, gate = torch.randn(1, 4, length, 16, dtype=torch.float64), torch.zeros(1, 4, length, 3)
            q[:, :, -3:] = of.q[b : b + 1]
            inputs: dict[str, Any] = {}
            if name == "nsa":
                gate = gate.double()
                gate[:, :, -3:] = of.inputs["gate"][b : b + 1]
                inputs = {"gate": gate}
            whole = of.attn(q, *(x[b : b + 1, :, :length] for x in (of.k, of.v)), **inputs)
            torch.testing.assert_close(out[b], whole[0, :, -3:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("nsa", "triton"), ("quest", "triton"), ("moba", "cpu"), ("token_select", "cpu"), ("pyramid", "cpu")],
)
def test_eight_bits(name: str, backend: str) -> None:
    """Over an 8-bit cache in pages, with scales of heads, what is kept and chosen is that of the numbers it stands for:
    made at once, and kept up to date."""
    of = system(name, 2, torch.float32)
    stands_for, (keys, values, _, table), given = of.of_eight_bits(4)
    wanted = of.attn.decode(of.q, *stands_for, of.seq_lens, **of.inputs)
    views = of.attn.views(keys, values, of.seq_lens - 3, table, dtype=torch.float32, **given)
    attndsl.serving.update_views(of.attn, views, keys, values, of.seq_lens, table, new=3, **given)
    for handed in (views, None):
        asked: Any = {"views": handed, "backend": backend, **given, **of.inputs}
        out = of.attn.decode(of.q, keys, values, of.seq_lens, table, **asked)
        torch.testing.assert_close(out, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["xattention", "psa", "proxy", "nsa"])
def test_a_prompt_in_chunks(name: str) -> None:
    """Chunks that begin where blocks of rows do, over pages, give what one call on the whole prompt gives."""
    of = system(name, CAPACITY, torch.float64)
    k, v = of.k[2:], of.v[2:]
    inputs = {key: x[2:] for key, x in of.inputs.items()}
    whole = of.attn(of.q[2:], k, v, **inputs)
    pools, step = paged(k, v, 4), 16
    for first in range(0, CAPACITY, step):
        rows = slice(first, first + step)
        chunk = {key: x[:, :, rows] for key, x in inputs.items()}
        cache = (*pools[:2], torch.tensor([first + step], dtype=torch.int32), pools[2])
        out = of.attn.decode(of.q[2:, :, rows], *cache, views=of.attn.views(*cache), **chunk)
        torch.testing.assert_close(out, whole[:, :, rows], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("heads", "share"), [((2, 2), "none"), ((4, 2), "none"), ((4, 2), "heads")])
def test_a_choice_for_all_rows_over_a_view(heads: tuple[int, int], share: str, backend: str) -> None:
    """Its tiles are listed in calls; of sequences that have lengths of their own no list is made."""
    attn = attndsl.compile(
        f"attention a {{ plan near = top(1, blocks(32), per = head, among = causal, share = {share}, "
        "by = dot(mean(Q), mean(K))) attend causal & near over pool(mean, 2) }"
    )
    dtype, tolerance = (torch.float64, 1e-11) if backend == "cpu" else (torch.float32, 2e-5)
    of = Sequences(attn, (CAPACITY, 19, 1), 1, dtype, heads=heads)
    for page in (None, 4):
        of.check_both(attn.decode(of.q, *of.cache(page), backend=backend, return_lse=True), tolerance)


# ----------------------------------------------------------------------------- untrusted tensors


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", ["nsa", "moba", "pyramid"])
def test_hostile_lengths_and_tables(name: str, backend: str) -> None:
    """Lengths are clamped, and a page that does not exist is neither read nor chosen by what it holds."""
    of = system(name, 2, torch.float32)
    wild = torch.tensor([2**31 - 1, -5, -(2**31)], dtype=torch.int32)
    tame = torch.tensor([CAPACITY, 0, 0], dtype=torch.int32)
    k, v = of.k.nan_to_num(), of.v.nan_to_num()
    outs = []
    for lengths in (wild, tame):
        given: Any = {"views": of.attn.views(k, v, lengths), "backend": backend, **of.inputs}
        outs.append(of.attn.decode(of.q, k, v, lengths, **given))
    assert torch.equal(*outs) and not outs[0][1:].any()
    pools = paged(k, v, 4)
    table = pools[2].clone()
    table[0, ::2], table[1], table[2, 1] = -1, 2**31 - 1, -(2**31)
    cache = (pools[0].nan_to_num(), pools[1].nan_to_num(), of.seq_lens, table)
    given = {"views": of.attn.views(*cache), "backend": backend, **of.inputs}
    out = of.attn.decode(of.q, *cache, **given)
    assert out.isfinite().all()


def test_what_lies_past_a_sequence_ranks_nothing() -> None:
    """Where rows see later tokens: these are those of the sequence, whatever its cache holds after them."""
    attn = attndsl.compile(
        "attention a { near = attend band(9, 30)\n far = attend top(1, blocks(16), among = band(40, 40), "
        "by = probs(near))\n output far + near }"
    )
    of = Sequences(attn, [37, 20], 3)
    cache = of.cache(None)
    plan = attndsl.serving.plan(attn, of.q, *cache)["top"]
    for held in (5.0, -3.0, 50.0):
        again = attndsl.serving.plan(attn, of.q, of.k.nan_to_num(held), *cache[1:])["top"]
        assert torch.equal(plan, again)
    of.check(attn.decode(of.q, of.k.nan_to_num(50.0), of.v.nan_to_num(50.0), of.seq_lens), None)


# ------------------------------------------------------------------------------ random selections


@given(
    # Levels make views.
    selections().filter(lambda text: not text.startswith("levels")),
    st.sampled_from(ROUTED),
    st.lists(st.integers(0, CAPACITY), min_size=1, max_size=2),
    st.integers(1, 4),
    st.integers(0, 99),
)
@examples(20)
def test_random_selections(selection: str, pattern: str, lengths: list[int], rows: int, seed: int) -> None:
    """In two steps: what is chosen is what the oracle chooses, or as good to 1e-9; and of that plan the output is the
    oracle's."""
    attn = attndsl.compile(pattern.format(selection))
    of = Sequences(attn, lengths, rows, seed=seed, dims=(8, 8))
    cache = of.cache(None if seed % 2 else 8)
    views = attn.views(*cache)
    plans = attndsl.serving.plan(attn, of.q, *cache, views=views)
    of.check(attn.decode(of.q, *cache, views=views), None, plans)
    of.check(attn.decode(of.q, *cache, views=views, plans=plans), None, plans)
    (chosen,), (plan,) = attn.program.selections, plans.values()
    for b, length in enumerate(lengths):
        before = rows - min(rows, length)
        here = plan[b : b + 1, :, of_classes(chosen, before, length)]
        level = levels_of(here, -(-CAPACITY // chosen.keys), 4)[..., : -(-length // chosen.keys)] > 0
        shape = CallShape(1, 4, 2, rows - before, length, 8, 8)
        q, k = of.q[b : b + 1, :, before:], of.k[b : b + 1, :, :length]
        if q.numel() and k.numel():
            as_good(attn.program, chosen, shape, q, k, level)


def as_good(program: Program, selection: Selection, shape: CallShape, q: Tensor, k: Tensor, level: Any) -> None:
    """Each row chooses what the oracle does for some share within 1e-9, or members whose scores are as high."""
    rules = [selection.rule]
    if isinstance(selection.rule, Cover | Above):
        rules += [replace(selection.rule, share=selection.rule.share * (1 + x)) for x in (1e-9, -1e-9)]
    right = np.zeros(level.shape[:3], bool)
    for rule in rules:
        changed = replace(program, selections=(replace(selection, rule=rule),))
        found = by_oracle(own_program(changed), shape, q, k)
        right |= (level == (found.level > 0)).all(-1)
    lowest = np.where(level & found.free, found.score, np.inf).min(-1)
    highest = np.where(~level & found.free, found.score, -np.inf).max(-1)
    tied = (highest - lowest <= 1e-9) & (level.sum(-1) == (found.level > 0).sum(-1))
    assert (right | tied).all()
