"""What `explain` says of two programs, and that what it counts and lists is what the oracle says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import attndsl
from attndsl.api import load_attention
from attndsl.notation import program_text, set_text
from attndsl.pairs import spans, spans_text

STREAMING = "causal & (window(512) | sink(4))"
DOCUMENTS = (
    "attention documents { input doc : int[b, k] sorted  score s - 0.5 * (q - k)  attend causal & document(doc) }"
)


def test_streaming() -> None:
    found = attndsl.compile(STREAMING).explain(1024, dim=64)
    assert found.section("understood").lines == (
        "causal & (window(512) | sink(4))",
        "",
        "pairs (q, k) in { k <= q } & ({ 0 <= q - k < 512 } | { k < 4 })",
        "row i of a call stands at position i + Nk − rows",
        "s = 1/√D · (q · k)",
        "softmax over each row",
    )
    assert found.section("rows").lines == (
        "row 0: keys 0  [1 of 1024]",
        "row 700: keys 0..3, 189..700  [516 of 1024]",
        "row 1023: keys 0..3, 512..1023  [516 of 1024]",
    )
    assert found.section("simplified").lines[-1].startswith("every condition is exact")
    planned = "\n".join(found.section("planned").lines)
    assert "hardware tensor copies" in planned
    assert "full    key tiles" in planned
    assert "mask of partial tiles: " in planned
    assert any(line.startswith("floor: ") for line in found.section("cost").lines)
    with pytest.raises(KeyError):
        found.section("warnings")


def test_documents() -> None:
    attn = attndsl.compile(DOCUMENTS)
    blind = attn.explain(256, heads=2, dim=32, target="sm_80")
    assert "input doc : int[b, k] sorted" in blind.section("understood").lines
    assert "logit s - 0.5 * (q - k)" in blind.section("understood").lines
    assert blind.section("rows").lines == ("give `doc` to see the keys of sample rows",)
    assert any("doc[b, q] == doc[b, k] (reads the input `doc`" in line for line in blind.section("simplified").lines)
    assert "pairs: depend on `doc`" in blind.section("cost").lines
    assert "through pointers" in blind.section("planned").lines[0]

    doc = torch.arange(256)[None] // 100
    seen = attn.explain(256, heads=2, dim=32, row=150, doc=doc)
    assert seen.section("rows").lines == ("row 150: keys 100..150  [51 of 256]",)


@pytest.mark.parametrize(
    "text",
    [
        "causal & dilated(3) | same_block(20)",
        "causal & (if h == 0 then window(9) else sink(30))",
        "coarsen(causal & window(30), 16, any) & causal",
        "attention a { align start  attend band(5, 11) }",
    ],
)
@pytest.mark.parametrize("rows", [200, 77])
def test_pairs_are_counted_exactly(text: str, rows: int) -> None:
    attn = load_attention(text)
    found = attn.explain(rows, 200, heads=2, dim=16, target="sm_80")
    (line,) = (line for line in found.section("cost").lines if line.startswith("pairs: "))
    assert line.startswith(f"pairs: {int(attn.mask(rows, 200, heads=2).sum()):,} of {2 * rows * 200:,} allowed")


def test_more_rows_than_keys() -> None:
    """Those before the first token are rows like any of a pattern that asks of none where it stands."""
    assert "pairs: 28 of 28 allowed" in str(attndsl.compile("all").explain(7, 4))
    assert "pairs: 10 of 28 allowed" in str(attndsl.compile("causal").explain(7, 4))


def test_stages_show_themselves() -> None:
    found = attndsl.compile("causal & window(8)").explain(64, dim=16, heads=2, stages=True)
    titles = [section.title for section in found.sections]
    assert titles == ["syntax", "typed program", "relation", "runs", "plan", "source"]
    assert "Apply(function='window'" in "\n".join(found.section("syntax").lines)
    assert "{ 0 <= q - k < 8 }" in "\n".join(found.section("typed program").lines)
    assert "[q, k]" in found.section("relation").lines[0]
    assert "def attention_forward(" in found.section("source").lines
    assert "\n\nruns\n  query tile" in str(found)


@pytest.mark.parametrize(
    "text",
    [
        "(all | causal) & ~(window(3) - sink(1))",
        "if h < 2 or g == 1 then causal on blocks(4) else coarsen(window(5) on blocks(2), (4, 8), all)",
        "{ not (q % 3 == 1 and k // 2 >= 4) and -(q - (k - 1)) * 2 < abs(min(q, 3) - k) + 7 }",
        "attention a(w : runtime int) { input n : int[b, h]  scale 0.5  score if q > k then s else s * (1 - 2.0 / D)  "
        "softmax with sink 1.5  attend { k < n[b, h] and q - k < w } }",
    ],
)
def test_programs_written_back_mean_the_same(text: str) -> None:
    program = load_attention(text).program
    again = load_attention(program_text(program)).program
    assert again.branch == program.branch
    assert set_text(again.branch.pattern) == set_text(program.branch.pattern)


def test_spans() -> None:
    assert spans(np.array([1, 1, 0, 0, 1, 0, 1], bool)) == ((0, 1), (4, 4), (6, 6))
    assert spans(np.zeros(3, bool)) == ()
    assert spans_text(()) == "none"
    assert spans_text(tuple((i, i) for i in range(0, 20, 2))) == "0, 2, 4, 6, … (4 more) …, 16, 18"


def test_plans_are_explained_as_calls_attend_them() -> None:
    routed = str(attndsl.compile("attention r { input p : blocks(64)[h, q/64]\n attend causal & p }").explain(4096))
    assert "key tiles from k_tiles_p[h, 3 * q_tile]" in routed
    assert "tiles: at most 2,080 of 4,096 visited" in routed and "floor" not in routed
    moba = str(attndsl.compile("attention m { input p : blocks(512)[b, h, q]\n attend causal & p }").explain(4096))
    assert "each 512 keys are visited by the rows that chose them in `p`, 64 of them a tile" in moba
