"""Decode of choices whose members are no blocks in a row, for tiles of rows, and among all rows of a call: each
sequence's rows are those of a call that holds them alone, by the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attndsl
import attndsl.serving
from attndsl.program import CallShape
from tests import test_routed
from tests.accuracy import examples
from tests.test_compete import ALWAYS, RULES
from tests.test_decode_views import Sequences
from tests.test_members import data, selections
from tests.test_select import by_oracle, levels_of

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
CAPACITY = 56


def sequences(
    text: str, lengths: list[int], rows: int, seed: int = 0, wild: bool = False, dtype: torch.dtype = torch.float64
) -> Sequences:
    of = Sequences(attndsl.compile(text), lengths, rows, dtype, dims=(8, 16), seed=seed, capacity=CAPACITY)
    of.inputs |= data(text, CallShape(len(lengths), 4, 2, CAPACITY, CAPACITY, 8, 16), seed, wild)
    return of


@given(
    selections(), st.sampled_from(test_routed.PATTERNS), st.lists(st.integers(0, CAPACITY), min_size=1, max_size=2),
    st.integers(1, 9), st.integers(0, 999), st.booleans(),
)  # fmt: skip
@examples(15)
def test_random_choices(
    made: tuple[str, str], pattern: str, lengths: list[int], rows: int, seed: int, wild: bool
) -> None:
    """What is chosen is what the oracle chooses for the rows of each sequence, and so is what comes of it."""
    text, clauses = made
    of = sequences(f"attention a {{ {clauses} attend {pattern.format(text)} }}", lengths, rows, seed, wild)
    cache, attn = of.cache(None if seed % 2 else 8), of.attn
    of.check(attn.decode(of.q, *cache, **of.inputs), None)
    (chosen,), (plan,) = attn.program.selections, attndsl.serving.plan(attn, of.q, *cache, **of.inputs).values()
    tokens, each = chosen.extent
    for b, length in enumerate(lengths):
        here = min(rows, length)
        if not here:
            continue
        shape = CallShape(1, 4, 2, here, length, 8, 16)
        inputs = {}
        for name, x in of.inputs.items():
            x = x[b : b + 1] if x.dim() > 1 else x
            inputs[name] = x[..., :length]
        wanted = by_oracle(
            attn.program, shape, of.q[b : b + 1, :, rows - here :], of.k[b : b + 1, :, :length], **inputs
        )
        members = -(-length // tokens) * each
        level = levels_of(plan[b : b + 1], -(-CAPACITY // tokens) * each, 4)
        assert not level[..., members:].any()
        first = rows - here if chosen.rows == 1 else 0
        classes = slice(first, first + wanted.level.shape[2])
        assert (level[:, :, classes, :members] == wanted.level).all()
        assert not level[:, :, classes.stop :].any() and not level[:, :, :first].any()


@pytest.mark.parametrize("share", ["none", "group", "heads"])
@pytest.mark.parametrize("compete", ["head", "all"])
@pytest.mark.parametrize("per", ["rows(8)", "query", "head"])
def test_all_rows_of_a_call_compete(compete: str, share: str, per: str) -> None:
    of_rows = "Q" if per == "query" else "mean(Q)"
    for i, always in enumerate(ALWAYS):
        rule = RULES[(i + len(share)) % 3]
        rule += ", at_most = 5" if per == "query" and "at_most" not in rule else ""
        options = f"compete = {compete}, share = {share}, normalise = {('softmax', 'minmax')[i % 2]}{always}{rule}"
        chosen = f"cover(0.37, blocks(8), per = {per}, among = causal, by = dot({of_rows}, mean(K)), {options})"
        rows = (1, 11)[(i + len(compete + per)) % 2]
        of = sequences(f"attention a {{ plan p = {chosen}\n attend causal & p }}", [43, 3, 0], rows, seed=i)
        of.check(of.attn.decode(of.q, *of.cache((None, 8)[i % 2]), **of.inputs), None)


SEEN = "causal & { q >= Nk - 4 }"
MASSES = {
    "tokens": f"x = attend {SEEN}\n y = attend causal & top(5, tokens, per = head, among = causal, by = probs(x))",
    "blocks": f"x = attend {SEEN}\n y = attend causal & top(2, blocks(8), per = head, among = causal, "
    "by = probs(x, max))",
    "diagonals": f"x = attend {SEEN}\n y = attend causal & top(5, diagonals(1), per = head, among = causal, "
    "by = probs(x), always = window(2))",
    "wide diagonals": "x = attend causal over pool(mean, 4)\n y = attend causal & cover(0.6, diagonals(6), per = head, "
    "among = causal & { (q + k) % 3 > 0 }, by = probs(x))",
    "largest of diagonals": f"x = attend {SEEN}\n y = attend causal & top(4, diagonals(3), per = head, among = causal, "
    "by = probs(x, max))",
    "diagonals of a row": "x = attend causal over pool(mean, 6, 4) { softmax with sink 0.5 }\n y = attend causal & "
    "top(3, diagonals(4), by = probs(x, max))",
    "diagonals of rows": f"x = attend {SEEN}\n y = attend causal & cover(0.7, diagonals(2), per = rows(4), "
    "among = { (q + k) % 3 > 0 }, by = probs(x), always = window(2))",
    "entries": "x = attend causal over pool(mean, 4, 2)\n y = attend causal & top(2, blocks(8), per = head, "
    "among = causal, by = probs(x, max))",
    "segments": "input c : int[b, k]\n x = attend causal\n y = attend causal & top(3, segments(c), among = causal, "
    "by = probs(x))",
    "placed": "input po : int[k]\n x = attend causal\n y = attend causal & top(3, blocks(4) on permuted(po), "
    "per = rows(8), among = causal, by = probs(x, max))",
    "tiles": "axes t, y[4], x[6]\n v = attend causal\n y_ = attend causal & top(2, tiles(1, 2, 3), "
    "per = tiles(1, 2, 3), among = all, by = probs(v))",
    "a score of tiles": "axes t, y[4], x[6]\n y_ = attend causal & top(2, tiles(1, 2, 3), per = tiles(1, 4, 2), "
    "among = all, by = ((q * 5 + k * 3) % 13) * 0.5)",
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("name", MASSES)
def test_by_the_probabilities_of_the_rows_of_a_call(name: str, rows: int) -> None:
    word = "y_" if "y_" in MASSES[name] else "y"
    of = sequences(f"attention a {{ {MASSES[name]}\n output {word} }}", [43, 56, 3, 0, 1], rows)
    for page in (None, 8):
        of.check(of.attn.decode(of.q, *of.cache(page), **of.inputs), None)


@pytest.mark.parametrize("name", ["diagonals", "segments", "tiles"])
def test_in_triton(name: str) -> None:
    word = "y_" if "y_" in MASSES[name] else "y"
    of = sequences(f"attention a {{ {MASSES[name]}\n output {word} }}", [43, 2], 3, dtype=torch.float32)
    cache = of.cache(8)
    plans = attndsl.serving.plan(of.attn, of.q, *cache, **of.inputs)
    out = of.attn.decode(of.q, *cache, backend="triton", plans=plans, **of.inputs)
    assert torch.equal(out, of.attn.decode(of.q, *cache, backend="triton", **of.inputs))
    # In float64 what is chosen is the oracle's.
    of.check(out, None, tolerance=2e-5)


@pytest.mark.parametrize("name", ["segments", "tiles", "diagonals"])
def test_hostile_lengths_and_pages(name: str) -> None:
    word = "y_" if "y_" in MASSES[name] else "y"
    of = sequences(f"attention a {{ {MASSES[name]}\n output {word} }}", [43, 56, 3], 3)
    of.check_wild()


def test_eight_bits() -> None:
    """What is chosen of an 8-bit cache in pages is chosen of the numbers that it stands for."""
    chosen = "top(2, segments(c), among = causal, by = dot(Q, max(K)))"
    text = f"attention a {{ input c : int[b, k]\n attend causal & {chosen} }}"
    of = sequences(text, [43, 56], 2, dtype=torch.float32)
    (k, v), cache, scales = of.of_eight_bits(8)
    wanted = of.attn.decode(of.q, k, v, of.seq_lens, **of.inputs)
    out = of.attn.decode(of.q, *cache, **(scales | of.inputs))
    torch.testing.assert_close(out, wanted, rtol=2e-5, atol=2e-5)
