"""Covers in which the members of all row classes of a head, or of all heads, compete."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import attndsl
from tests import routing_rules as rules
from tests.covered import covers
from tests.routing_rules import DIM, HEADS, SHARE, Array, Pairs, best, call, check, numbers, softmax
from tests.test_stability import leaks

pytestmark = pytest.mark.filterwarnings("ignore:::triton.runtime.interpreter", "ignore::attndsl.PatternWarning")
ALWAYS = ("", ", always = same_block(8)", ", always = same_block(8), forced = extra")
RULES = ("", ", exclusive", ", at_least = 2, at_most = 3")


def program(options: str, per: str = "rows(8)") -> attndsl.Attention:
    """0.37 of the masses: of whole rows a share such as 0.4 may be met exactly, but for rounding."""
    by = "dot(Q, mean(K))" if per == "query" else "dot(mean(Q), mean(K))"
    rest = f"cover(0.37, blocks(8), per = {per}, among = causal, by = {by}, {options})"
    return attndsl.compile(f"attention a {{ plan p = {rest}\n attend causal & p }}")


@pytest.mark.parametrize("share", ["none", "group", "heads"])
@pytest.mark.parametrize("compete", ["head", "all"])
@pytest.mark.parametrize("per", ["rows(8)", "query", "head"])
def test_it_is_the_oracles(compete: str, share: str, per: str) -> None:
    options = itertools.product(("softmax", "minmax"), ALWAYS, RULES)
    # A third of them for each, another one for the next.
    for normalise, always, rule in itertools.islice(options, len(compete + share + per) % 3, None, 3):
        bound = ", at_most = 5" if per == "query" and "at_most" not in rule else ""
        attn = program(f"compete = {compete}, share = {share}, normalise = {normalise}{always}{rule}{bound}", per)
        for n, rows in ((43, 43), (30, 11), (1, 1)):
            q, k, v = call(n, rows, seed=n)
            torch.testing.assert_close(attn(q, k, v), attn.reference(q, k, v), msg=lambda m: f"{always}{rule}: {m}")  # noqa: B023


def test_heads_that_choose_for_themselves_from_a_shared_sum() -> None:
    """What is forced reads the head: of a group each head has its own pool."""
    attn = program("compete = all, share = group, always = { h % 2 == 0 and k < 8 }")
    q, k, v = call(43)
    torch.testing.assert_close(attn(q, k, v), attn.reference(q, k, v))
    (plan,) = attn.plan(q, k).values()
    assert plan.shape[1] == HEADS and (plan[:, 0] != plan[:, 1]).any()


@pytest.mark.parametrize("word", ["row", "head", "all"])
def test_who_competes_decides(word: str) -> None:
    """A head whose scores lie far apart takes little where it competes with others'."""
    q, k, _ = call(64)
    q[:, 0] *= 20
    taken = program(f"compete = {word}, normalise = none".replace("none", "softmax"))
    (plan,) = taken.plan(q, k).values()
    counts = plan.sum((0, 2, 3))
    rows = plan.sum(-1).flatten()
    # Alone each row takes something; together a row of even masses takes nothing.
    assert (rows > 0).all() if word == "row" else (rows == 0).any()
    assert word != "all" or counts[0] != program("compete = head").plan(q, k)["p"].sum((0, 2, 3))[0]


def test_it_is_written_back_and_warned_of() -> None:
    attn = program("compete = head")
    assert "compete = head" in str(attn.explain(64))
    rest = "cover(0.3, blocks(4), by = dot(Q, mean(K)), at_most = 4, always = same_block(4), forced = extra"
    for word, later in (("row", False), ("head", True)):
        text = f"attention a {{ attend causal & {rest}, compete = {word}) }}"
        assert leaks(text) is later
        assert ("W305" in [x.code for x in attndsl.compile(text).warnings]) is later


def test_too_many_to_compete() -> None:
    attn = attndsl.compile(
        "attention a { attend cover(0.3, blocks(8), by = dot(Q, mean(K)), compete = head, at_most = 4, among = all) }"
    )
    meta = [torch.empty(1, 2, 32768, 8, device="meta") for _ in range(3)]
    with pytest.raises(attndsl.PatternError, match="A577"):
        attndsl.runtime.select.Selector(
            attn.program, attn.program.selections[0], attndsl.runtime.call.call_shape(*meta), torch.device("cpu")
        )


# ---------------------------------------------------------------------------------------- systems


def competed(scores: Array, seen: Pairs, forced: Pairs, share: float, inclusive: bool) -> set[tuple[int, int]]:
    """The (row, block) pairs that hold the share, those that are forced ranked first."""
    pairs = [(r, m) for r, m in np.ndindex(scores.shape) if seen[r, m]]
    pairs.sort(key=lambda x: (not forced[x], -scores[x], x))
    total, sofar, taken = float(scores[seen].sum()), 0.0, set[tuple[int, int]]()
    for x in pairs:
        if sofar >= share * total or (not inclusive and sofar + scores[x] > share * total):
            break
        taken.add(x)
        sofar += float(scores[x])
    return taken


@covers("vmoba_global")
@pytest.mark.parametrize("tokens", [1, 40, 45])
def test_vmoba_global(tokens: int) -> None:
    q, k, v = call(tokens)
    queries, keys = numbers(q, k)

    def choose(h: int, g: int) -> list[set[int]]:
        gate = queries[h] @ np.stack(rules.means(keys[g], 8)).T
        gate = (gate - gate.min()) / (np.ptp(gate) or 1.0)
        own = np.arange(tokens)[:, None] // 8 == np.arange(gate.shape[1])
        taken = competed(gate, np.ones_like(own), own, 0.6, inclusive=True)
        return [{m for m in range(gate.shape[1]) if (t, m) in taken or own[t, m]} for t in range(tokens)]

    chosen = rules.for_heads(choose)
    assert tokens == 1 or len({len(row) for row in chosen[0]}) > 2
    rules.by_choice("vmoba_global", [q, k, v], chosen, 1, 8, causal=False, params={"block": 8, "share": 0.6})


@covers("flex_prefill")
@pytest.mark.parametrize("tokens", [1, 40, 45])
def test_flex_prefill(tokens: int) -> None:
    """Heads 0 and 3 by blocks that compete, the others by columns and diagonals of the last 8 rows."""
    q, k, v = call(tokens)
    queries, keys = numbers(q, k)
    aware = torch.tensor([[True, False, False, True]])
    i, j = rules.pairs(tokens)
    blocks, allowed = -(-tokens // 8), np.zeros((HEADS, tokens, tokens), bool)
    for h in range(HEADS):
        g = h // SHARE
        if aware[0, h]:
            logits = np.stack(rules.means(queries[h], 8)) @ np.stack(rules.means(keys[g], 8)).T / DIM**0.5
            seen = np.tri(blocks, dtype=bool)
            scores = np.zeros_like(logits)
            for r in range(blocks):
                scores[r, : r + 1] = softmax(logits[r, : r + 1])
            taken = competed(scores, seen, np.zeros_like(seen), 0.77, inclusive=False)
            taken |= {(r, 0) for r in range(blocks)} | {(r, r) for r in range(blocks)}
            allowed[h] = [[(t // 8, s // 8) in taken for s in range(tokens)] for t in range(tokens)]
            continue
        columns, slashes = np.zeros(tokens), np.zeros(tokens)
        for t in range(max(0, tokens - 8), tokens):
            mass = softmax(keys[g][: t + 1] @ queries[h][t] / DIM**0.5)
            columns[: t + 1] += mass
            slashes[t - np.arange(t + 1)] += mass
        kept = []
        for x in (columns, slashes):
            ranked, sofar, some = best(dict(enumerate(x.tolist())), tokens), 0.0, set(range(min(8, tokens)))
            for place in ranked:
                if sofar >= 0.77 * x.sum():
                    break
                some.add(place)
                sofar += x[place]
            kept.append(some)
        allowed[h] = [[s in kept[0] or t - s in kept[1] for s in range(tokens)] for t in range(tokens)]
    allowed &= j <= i
    params = {"gamma": 0.77, "block": 8}
    check("flex_prefill", [q, k, v], lambda q, k, v, _: rules.attend(q, k, v, allowed), params, aware=aware)


def test_flex_prefill_leaves_out_what_crosses() -> None:
    """The trap: with the block that crosses the share a head takes one more."""
    text = (rules.EXAMPLES / "flex_prefill.attn").read_text("utf-8")
    q, k, _ = call(200)
    aware = torch.tensor([[True] * HEADS])
    counts = []
    for word in ("true", "false"):
        attn = attndsl.compile(text.replace("exclusive = true", f"exclusive = {word}"), gamma=0.77, block=8)
        counts.append(attn.plan(q, k, aware=aware)["best"].to(torch.int64).sum((0, 2, 3)))
    crossing = counts[1] - counts[0]
    assert ((crossing == 0) | (crossing == 1)).all() and crossing.any()
