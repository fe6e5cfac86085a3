"""The kernel that chooses of scored members chooses what sorting them does."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from attndsl.grammar import load
from attndsl.runtime.choose import chosen_by_kernel
from attndsl.runtime.ranking import Ranking, listed, of_candidates
from attndsl.runtime.vote import voted_by_kernel
from attndsl.selection import Forced, Normalise, Share
from tests.gpu import interprets

pytestmark = [interprets, pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore:overflow")]
RULES = (
    ("top(3,", ""), ("top(0 * h,", ""), ("top(fraction(0.3),", ""), ("cover(0.9,", ""), ("cover(0.5,", ", exclusive"),
    ("cover(0.3,", ", at_least = 4, at_most = 6"), ("above(0.1,", ""), ("above(0.5,", ", relative, at_most = 3"),
)  # fmt: skip
HEADS = (4, 2)


def ranking_of(rule: tuple[str, str], forced: Forced | None, normalise: Normalise) -> Ranking:
    text = f"{rule[0]} blocks(4), per = rows(4), among = all, by = dot(mean(Q), mean(K)), always = sink(2){rule[1]})"
    (selection,) = load(f"attention a {{ plan p = {text} attend causal & p }}").program.selections
    selection = replace(selection, normalise=normalise, **({"always": None} if forced is None else {"forced": forced}))
    budgets = torch.tensor([0 if "0 *" in rule[0] else 3] * 4).view(1, 4, 1, 1)
    return Ranking(selection, HEADS, budgets if rule[0].startswith("top(") and "fraction" not in rule[0] else None)


def scored(members: int, seed: int, forces: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of some candidates, many of them equal: sums of what is a multiple of a power of two have no order."""
    generator, size = torch.Generator().manual_seed(seed), (1, 4, 5, members)
    chance = torch.rand(3, *size, generator=generator)
    candidates = chance[0] < 0.8
    forced = candidates & (chance[1] < 0.2) & forces
    raw = torch.randint(-8, 25, size, generator=generator) / 16
    return torch.where(candidates & (chance[2] < 0.9), raw, -torch.inf), candidates, forced


CASES = list(product(RULES, [None, *Forced], Normalise))


@pytest.mark.parametrize("nth", range(0, len(CASES), 5))
def test_what_sorting_chooses(nth: int) -> None:
    (rule, how, normalise), members = CASES[nth], (1, 2, 7, 40, 130)[nth % 4]
    ranking = ranking_of(rule, how, normalise)
    raw, candidates, forced = scored(members, nth, how is not None)
    score, competing = ranking._scores(raw, candidates, forced)
    wanted, limit = ranking.decided(raw, candidates, forced), ranking._limit(competing, 1)
    of_bytes = chosen_by_kernel(ranking.selection, score, competing, forced, limit, None)
    if normalise is Normalise.NONE or not rule[0].startswith("cover"):
        assert torch.equal(of_bytes, wanted)
    else:
        # Sums of masses round as they are added up, so those at the boundary may fall on either side of it: equals of
        # one score, of which no other is between.
        differ = of_bytes != wanted
        assert bool((differ.sum(-1) <= 1).all())
    room = 3 if nth % 2 else members
    found = chosen_by_kernel(ranking.selection, score, competing, forced, limit, room)
    assert torch.equal(found, listed(of_bytes, room))


@pytest.mark.parametrize("rule", [RULES[0], RULES[6]])
def test_rows_that_are_longer_than_what_is_written_at_once(rule: tuple[str, str]) -> None:
    ranking = ranking_of(rule, Forced.COUNTED, Normalise.NONE)
    raw, candidates, forced = scored(2500, 1, True)
    score, competing = ranking._scores(raw, candidates, forced)
    found = chosen_by_kernel(ranking.selection, score, competing, forced, ranking._limit(competing, 1), 2500)
    assert torch.equal(found, listed(ranking.decided(raw, candidates, forced), 2500))


def test_scores_at_the_ends() -> None:
    """The largest scores that there are, and what is forced without one."""
    ranking = ranking_of(RULES[0], Forced.COUNTED, Normalise.NONE)
    raw = torch.tensor([3e38, -torch.inf, -3e38, 3e38, 0.0, -0.0, 1e-45]).expand(1, 4, 1, 7)
    candidates = torch.ones(1, 4, 1, 7, dtype=torch.bool)
    forced = torch.tensor([False, True, *[False] * 5]).expand(1, 4, 1, 7)
    score, competing = ranking._scores(raw, candidates, forced)
    found = chosen_by_kernel(ranking.selection, score, competing, forced, 3, 4)
    assert found[0, 0, 0].tolist() == [0, 1, 3, -1]
    assert torch.equal(listed(ranking.decided(raw, candidates, forced), 4), found)


VOTES = list(product([None, *Forced], Normalise, Share))


@pytest.mark.parametrize("nth", range(len(VOTES)))
def test_what_heads_that_share_add_up(nth: int) -> None:
    """Scores that are NaN, infinite or of no candidate, and candidates that no head differs in."""
    (how, normalise, share), members = VOTES[nth], (1, 7, 40, 130)[nth % 4]
    ranking = ranking_of(RULES[0], how, normalise)
    ranking = replace(ranking, selection=replace(ranking.selection, share=share))
    raw, candidates, forced = scored(members, nth, how is not None)
    raw = torch.where(candidates, raw, torch.nan if nth % 3 else 1e30)
    if nth % 5 == 0:
        raw[..., 0] = torch.inf
    if nth % 2:
        candidates = candidates[:, :1].expand(candidates.shape)
        forced = (forced[:, :1] & candidates[:, :1]).expand(forced.shape)
        raw = raw.transpose(2, 3).contiguous().transpose(2, 3)
    wanted, competing = ranking._scores(of_candidates(raw, candidates), candidates, forced)
    for step in {1, ranking._sharing}:
        score, found = voted_by_kernel(
            raw, candidates, forced, normalise, extra=ranking.selection.forced is Forced.EXTRA, masses=ranking._masses,
            size=ranking._sharing, step=step,
        )  # fmt: skip
        assert torch.equal(found, competing[:, ::step])
        # Sums of multiples of a power of two are exact; of a softmax each exponential and sum is rounded.
        torch.testing.assert_close(score, wanted[:, ::step], rtol=0 if normalise is Normalise.NONE else 1e-5, atol=0)
