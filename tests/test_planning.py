"""Planning stays fast: every example within its operations, which no clock tells; `benchmarks planning` shows times."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attndsl import effort
from attndsl.compose import compose
from attndsl.grammar import load
from attndsl.piece_plans import backward_plans, forward_plans
from attndsl.relation import Lowering
from attndsl.tile_sets import TileSets
from attndsl.wiring import asked_warnings
from benchmarks import planning

# Of one file's plans, all branches and kernels. A published pattern takes up to 0.4 s on one idle core.
SECONDS = 4.0
# Elementary isl operations of one branch, both sides, nothing known before: 0.1 s or less.
MOST = 370_000
# … and of patterns that take more, with room for a fifth.
LARGER = {"block_diffusion": 515_000, "moa": 490_000, "power": 1_080_000, "radial": 475_000}
# Patterns that were slow, and of which no step passes its bound of effort now.
WITHIN = {"block_attention", "block_diffusion", "duo", "longlora", "moa", "packed", "sliding_tile", "star", "video"}
# … and of what warnings ask about a program.
MOST_ASKED = 45_000
MORE_ASKED = {"longformer": 56_000, "moa": 85_000, "power": 71_000, "radial": 74_000}
FILES = sorted(planning.PATTERNS.glob("*.attn"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_example_is_planned_soon(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds with room for a busy machine; that no step passes its bound holds the line without a clock."""
    passed = list[effort.TooHard]()

    def counted(self: effort.TooHard, *given: Any) -> None:
        passed.append(self)

    # A file whose parameters have no defaults has values of them in `benchmarks/planning.py`.
    program = load(path.read_text(), name=path.name, params=planning.TABLES.get(path.stem, {})).program
    monkeypatch.setattr(effort.TooHard, "__init__", counted)
    begun = time.process_time()
    for part in compose(program).programs:
        spec = planning.spec_of(part)
        with effort.compilation() as taking:
            assert forward_plans(part, spec)
        assert not taking.cut
        with effort.compilation() as taking:
            assert backward_plans(planning.differentiated(part), spec)
        assert taking.taken < LARGER.get(path.stem, MOST), "planning takes more than it did: see `benchmarks planning`"
    assert time.process_time() - begun < SECONDS
    assert not passed or path.stem not in WITHIN


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_warnings_ask_is_little(path: Path) -> None:
    """Every `compile` waits for it."""
    program = load(path.read_text(), name=path.name, params=planning.TABLES.get(path.stem, {})).program
    with effort.compilation() as taking:
        list(asked_warnings(program))
    assert taking.taken < MORE_ASKED.get(path.stem, MOST_ASKED), "warnings take more: see `benchmarks planning`"


@pytest.mark.parametrize(
    "text",
    [
        "causal & (window(78) | dilated(16) & window(2048))",
        "causal & (window(78) | { q // 96 == k // 96 })",
        "{ doc[q] == doc[k] } & window(78)",
    ],
)
def test_kernels_of_a_program_share_its_relation(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One lowering for both sides, whatever the number of tilings and kernels."""
    text = f"attention shared {{ input doc : int[k] sorted  attend {text} }}"
    program = load(text).program
    lowered = list[Lowering]()
    relation = Lowering.relation

    def counted(self: Lowering, *given: Any) -> Any:
        lowered.append(self)
        return relation(self, *given)

    monkeypatch.setattr(Lowering, "relation", counted)
    spec = planning.spec_of(program)
    forward_plans(program, spec)
    backward_plans(program, spec)
    assert len(lowered) == 1


@pytest.mark.parametrize("name", ["block_diffusion", "longlora", "moa", "power", "sliding_tile", "star"])
def test_both_sides_share_what_is_full(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full tiles are told from partial ones once for each pair of tile sizes, whoever owns them."""
    text, params = (planning.PATTERNS / f"{name}.attn").read_text(), planning.TABLES.get(name, {})
    # Of a program of another name nothing is known yet.
    program = replace(load(text, params=params).program, name="shared")
    told, split = list[str](), TileSets.split

    def counted(self: TileSets, *given: Any) -> Any:
        of = self.of
        told.append(f"{of.block_q} x {of.block_k}, {of.layout}: {of.relation.pairs}, {of.relation.context}")
        return split(self, *given)

    monkeypatch.setattr(TileSets, "split", counted)
    spec = planning.spec_of(program)
    assert forward_plans(program, spec) and backward_plans(program, spec)
    assert told and len(told) == len(set(told))
