"""Warnings about patterns: what is found, where, with which witness, and what is left alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from attndsl import worlds
from attndsl.diagnostics import Diagnostic, Severity
from attndsl.effort import EFFORT, compilation
from attndsl.findings import findings
from attndsl.grammar import load
from attndsl.oracle import mask
from attndsl.program import Inter, Program, Union
from tests.accuracy import examples
from tests.strategies import Case, composed_programs
from tests.tiling import call

DATA = """attention x(n : runtime int) {
    input doc : int[b, k] sorted
    input flag : bool[b, k]
    input width : int[h]
    attend %s
}"""


def program(text: str) -> Program:
    return load(text).program


def found(text: str) -> tuple[Diagnostic, ...]:
    return findings(program(text))


def codes(text: str) -> list[str]:
    return [d.code for d in found(text)]


def marked(text: str, code: str) -> list[str]:
    """The pieces of the text that findings of a code point at."""
    return [text[d.span.start : d.span.end] for d in found(text) if d.code == code and d.span is not None]


def test_a_number_beside_itself() -> None:
    """What is compared with itself is known, whatever the data."""
    assert codes(DATA % "{ doc[k // 3] > doc[k // 3] }") == ["W302"]
    assert codes(DATA % "causal & { flag[k] != flag[k] }") == ["W302"]
    assert codes(DATA % "causal - { doc[k] < doc[k] }") == ["W301"]


def test_a_set_whose_least_pair_isl_does_not_find_at_once() -> None:
    here = "strided(4, 1) & ~neighborhood(3, 3, 4)"
    there = "(dilated(2) - band(reach[b], 3)) on segment(ids)"
    declared = "input reach : int[b]\n input dense : bool[g]\n input ids : int[b, k]"
    assert codes(f"attention a {{ {declared}\n attend (if dense[g] then {here} else {there}) }}") == []


# ------------------------------------------------------------------------------------------- silence


@pytest.mark.parametrize(
    "text",
    [
        "all",
        "causal",
        # Says that nothing sees the future, whatever the rest becomes.
        "causal & window(512)",
        "causal & (window(512) | sink(4))",
        "causal & (same_block(512) | strided(512))",
        "window(2) on blocks(64) & causal",
        "causal & coarsen(causal & window(100), 32, any)",
        "if h % 2 == 0 then causal & window(8) else causal",
        "attention a { align start\n attend { k <= q or k >= Nk - Nq } }",
        DATA % "causal & document(doc)",
        DATA % "document(doc) & (window(n) | global_tokens(flag))",
        # Empty for some arguments, not for all.
        DATA % "causal & window(n)",
        DATA % "window(width[h]) - sink(n)",
        "attention a(many = false) { attend causal & (if many then all else window(4) & { q % 2 == 0 } | { q == k }) }",
    ],
)
def test_ordinary_patterns_have_no_findings(text: str) -> None:
    assert codes(text) == []


def test_every_finding_is_a_warning_with_help() -> None:
    for text in ("none", "window(8) | window(8)", "strided(4)", "neighborhood(7)"):
        for diagnostic in found(text):
            assert diagnostic.severity is Severity.WARNING
            assert diagnostic.help
            assert diagnostic.code in {"W301", "W302", "W303", "W304"}


# -------------------------------------------------------------------------------------- idle terms


@pytest.mark.parametrize(
    ("text", "idle"),
    [
        ("causal & (window(4) | { q - k < 2 })", ["{ q - k < 2 }"]),
        ("causal & (window(4) | { k > q })", ["{ k > q }"]),
        ("{ k <= q } & { k < q + 1 } & window(9)", ["{ k < q + 1 }"]),
        ("{ q == k } | { q == k } | strided(4)", ["{ q == k }"]),
        ("causal - { k > q }", ["{ k > q }"]),
        ("causal - ({ k > q } | sink(2)) | { k < 1 }", ["{ k > q }"]),
        ("(causal | ~{ k < q }) & window(3)", ["causal | ~{ k < q }"]),
        ("if h == 0 then causal & { k < q + 3 } else all", ["{ k < q + 3 }"]),
        ("causal & ({ q % 2 == 0 } | { q % 2 == 1 })", ["{ q % 2 == 0 } | { q % 2 == 1 }"]),
    ],
)
def test_idle_terms(text: str, idle: list[str]) -> None:
    assert marked(text, "W301") == idle


def test_idle_terms_on_data() -> None:
    text = DATA % "causal & (document(doc) | { q == k })"
    assert marked(text, "W301") == ["{ q == k }"]
    assert codes(DATA % "causal & (document(doc) | { q == k + 1 })") == []
    assert codes(DATA % "{ doc[k] < 9 } & { doc[k] < 3 } & causal | { q == k }") == ["W301"]


def test_the_standard_library_is_named_and_not_searched() -> None:
    text = "causal & (window(8) | window(4))"
    (diagnostic,) = found(text)
    assert diagnostic.code == "W301"
    assert diagnostic.span is not None
    assert diagnostic.span.source.text == text
    assert "window(4)" in text[diagnostic.span.start : diagnostic.span.end]


def test_a_side_never_taken_has_no_findings() -> None:
    text = "attention a(wide = true) { attend causal & (if wide then window(64) else window(8) & window(4)) }"
    assert codes(text) == []


@pytest.mark.parametrize("first", ["", " from 5"])
def test_that_tiles_lie_on_their_grid_is_no_term(first: str) -> None:
    chosen = "top(1, tiles(4, 4), by = dot(mean(Q), mean(K)), per = tiles(4, 4))"
    text = f"attention a {{ axes y[8], x[8]{first}  attend {chosen} }}"
    assert codes(text) == []


def test_removing_an_idle_term_keeps_the_pattern() -> None:
    whole = program("causal & (window(4) | { q - k < 2 } | strided(3))")
    (diagnostic,) = findings(whole)
    inter = whole.branch.pattern
    assert isinstance(inter, Inter)
    causal, union = inter.parts
    assert isinstance(union, Union)
    kept = tuple(part for part in union.parts if part.span != diagnostic.span)
    assert len(kept) == 2
    smaller = whole.with_branch(pattern=Inter((causal, Union(kept))))
    for n in (1, 5, 12):
        np.testing.assert_array_equal(mask(whole, call(n, n)), mask(smaller, call(n, n)))


# -------------------------------------------------------------------------------- never, empty rows


@pytest.mark.parametrize(
    "text", ["none", "window(8) & ~window(8)", "causal & { k > q }", "{ k >= Nk }", "strided(2) & strided(2, 1)"]
)
def test_patterns_that_allow_nothing(text: str) -> None:
    assert codes(text) == ["W302"]


@pytest.mark.parametrize(
    ("text", "row", "length"),
    [
        ("causal & { k >= 4 }", 0, 1),
        ("strided(4) & window(2)", 2, 3),
        ("{ k > q }", 0, 1),
        ("{ k >= 3 }", 0, 1),
        ("causal & sink(4) & window(16)", 19, 20),
        (DATA % "document(doc) & { k < q }", 0, 1),
        ("if h == 0 then { k < q } else sink(2) & { k < q }", 0, 1),
    ],
)
def test_empty_rows(text: str, row: int, length: int) -> None:
    (diagnostic,) = [d for d in found(text) if d.code == "W303"]
    assert diagnostic.notes == (f"row q = {row} at Nk = {length} sees nothing: its output is 0",)
    if "attention" not in text:
        assert not mask(program(text), call(length, length, heads=2))[0, :, row].any()


def test_empty_rows_of_cross_attention_have_two_lengths() -> None:
    (diagnostic,) = found("attention a { align start\n attend { k >= q } }")
    assert diagnostic.code == "W303"
    assert "Nq = 2, Nk = 1" in diagnostic.notes[0]


# ---------------------------------------------------------------------------- dependence on length


@pytest.mark.parametrize(
    "text",
    [
        "causal & neighborhood(5)",
        "causal & { q >= Nk - 4 or q - k < 8 }",
        "{ k < Nk // 2 or q == k }",
        "coarsen({ q + k < 100 }, 7, all) | { k <= q }",
        DATA % "causal & ({ k < Nk // 2 } | document(doc) | { q == k })",
    ],
)
def test_dependence_on_length(text: str) -> None:
    assert "W304" in codes(text)


@pytest.mark.parametrize(
    "text",
    [
        "causal & { q < Nk }",
        "causal | { k < Nk and q == k + 1 }",
        "causal_neighborhood(5)",
        "causal & coarsen(causal & window(9), 4, any)",
        "(causal & window(2)) on blocks(16)",
        "attention a { align start\n attend { k < Nk // 2 or k == 0 } }",
    ],
)
def test_reading_a_length_alone_is_no_finding(text: str) -> None:
    assert "W304" not in codes(text)


@pytest.mark.parametrize("text", ["causal_neighborhood(5)", "coarsen(causal & window(9), 4, any) & causal"])
def test_nothing_is_tried_where_length_decides_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the longest call there is none a token longer, which is no dependence."""

    def tried(*given: object) -> bool:
        raise AssertionError(f"a call was looked for: {given[1]}")

    monkeypatch.setattr(worlds, "realise", tried)
    assert codes(text) == []


def test_the_witness_of_a_dependence_is_one() -> None:
    text = "causal & { q >= Nk - 4 or q - k < 8 }"
    (diagnostic,) = found(text)
    # Row 8 is among the last four until token 12 comes.
    assert diagnostic.notes == ("q = 8, k = 0 at Nk = 12 is allowed, and with Nk = 13 it is not",)
    n = int(diagnostic.notes[0].split("Nk = ")[1].split()[0])
    assert mask(program(text), call(n, n))[0, 0, 8, 0]
    assert not mask(program(text), call(n + 1, n + 1))[0, 0, 8, 0]


# ---------------------------------------------------------------------------------- effort, random


def test_ordinary_patterns_take_little_effort() -> None:
    texts = [
        "causal & (window(512) | sink(4))",
        "causal & neighborhood(7)",
        DATA % "causal & document(doc) & window(n)",
    ]
    for text in texts:
        with compilation() as taking:
            findings(program(text))
        # 2 to 15 ms on an idle core.
        assert 0 < taking.taken < EFFORT // 4


def test_hostile_patterns_are_passed_over() -> None:
    whole = program(" | ".join(f"dilated({m}) & ~strided({m + 1})" for m in (7, 11, 13, 17, 19, 23, 29)))
    with compilation() as taking:
        findings(whole)
    assert 0 < taking.taken < EFFORT


@given(case=composed_programs(max_depth=2, lengths=(1, 7, 16), scores=False))
@examples(30)
def test_findings_of_composed_programs_hold(case: Case) -> None:
    whole, shape = case.load(), case.shape
    allowed = mask(whole, shape, case.inputs, case.args)
    for diagnostic in findings(whole):
        match diagnostic.code:
            case "W302":
                assert not allowed.any()
            case "W303" if "Nq" not in diagnostic.notes[0]:
                row, length = (int(part.split()[0]) for part in diagnostic.notes[0].split(" = ")[1:])
                if length == shape.k_len and not whole.align_start and shape.rows >= length - row:
                    assert not allowed[:, :, row - shape.first_position(whole)].any()
            case _:
                pass
