"""The oracle of selections: what its options mean, one trap a test, and published rules written down independently."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from attndsl.choice import Chosen, Data, choose
from attndsl.grammar import load
from attndsl.program import CallShape

Floats = npt.NDArray[np.float64]


def chosen(text: str, q: Floats, k: Floats, *, scale: float = 1.0, inputs: str = "", **given: object) -> Chosen:
    """What the selection `text` chooses; q [B, Hq, rows, D], k [B, Hkv, Nk, D]."""
    program = load(f"attention t {{ {inputs} plan sel = {text} attend causal }}").program
    shape = CallShape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], q.shape[3])
    arrays = {name: np.asarray(value) for name, value in given.items()}
    return choose(program, program.selections[0], shape, Data(q, k, arrays, {}, scale, {}))


def scored(scores: object, function: str, first: str, keys: int = 4, **options: str) -> list[list[int]]:
    """Levels [R][M] of `function(first, …)` by given scores [R, M], all members being candidates."""
    given = np.asarray(scores, np.float64)
    rows, members = given.shape
    said = {"among": "all", **options}
    words = ", ".join(f"{name} = {value}" for name, value in said.items())
    q, k = np.zeros((1, 1, rows * keys, 8)), np.zeros((1, 1, members * keys, 8))
    program = load(
        f"attention t {{ input x : float[q/{keys}, k/{keys}] align start "
        f"plan sel = {function}({first}, blocks({keys}), per = rows({keys}), "
        f"by = x, {words}) attend all }}"
    ).program
    shape = CallShape(1, 1, 1, rows * keys, members * keys, 8, 8)
    found = choose(program, program.selections[0], shape, Data(q, k, {"x": given}, {}, 1.0, {}))
    return found.level[0, 0].tolist()  # type: ignore[no-any-return]


def own(keys: int = 4) -> str:
    """The first member."""
    return f"{{ k < {keys} }}"


# ------------------------------------------------------------------------------------------ traps


def test_forced_members_count_inside_n_unless_said_otherwise() -> None:
    scores = [[0.0, 3.0, 2.0, 1.0]]
    assert scored(scores, "top", "2", always=own()) == [[1, 1, 0, 0]]
    assert scored(scores, "top", "2", always=own(), forced="extra") == [[1, 1, 1, 0]]
    assert scored(scores, "top", "2", always=own(), forced="overlay") == [[1, 1, 1, 0]]
    # Overlaid, a forced member may take a place of its own; set aside, it never does.
    assert scored([[9.0, 3.0, 2.0, 1.0]], "top", "2", always=own(), forced="overlay") == [[1, 1, 0, 0]]
    assert scored([[9.0, 3.0, 2.0, 1.0]], "top", "2", always=own(), forced="extra") == [[1, 1, 1, 0]]


def test_forced_members_are_chosen_even_past_n() -> None:
    assert scored([[0.0, 1.0, 2.0, 3.0]], "top", "1", always="{ k < 8 }") == [[1, 1, 0, 0]]


def test_forced_mass_is_credited_in_a_cover_unless_set_aside() -> None:
    masses = [[0.5, 0.3, 0.15, 0.05]]
    # Forced: the last member, 0.05. Then 0.5 makes 0.55, which crosses 0.5.
    last = "{ k >= 12 }"
    assert scored(masses, "cover", "0.5", normalise="none", always=last) == [[1, 0, 0, 1]]
    assert scored(masses, "cover", "0.53", normalise="none", always=last) == [[1, 0, 0, 1]]
    # Not credited, 0.5 does not reach 0.53 of what is left (0.95 * 0.53 = 0.5035): 0.3 is taken too.
    assert scored(masses, "cover", "0.53", normalise="none", always=last, forced="extra") == [[1, 1, 0, 1]]
    assert scored(masses, "cover", "0.53", normalise="none", always=last, forced="overlay") == [[1, 1, 0, 1]]


def test_the_member_that_crosses_is_included_unless_exclusive() -> None:
    masses = [[0.5, 0.25, 0.125, 0.125]]
    assert scored(masses, "cover", "0.6", normalise="none") == [[1, 1, 0, 0]]
    assert scored(masses, "cover", "0.6", normalise="none", exclusive="true") == [[1, 0, 0, 0]]
    # Reached exactly, nothing crosses.
    assert scored(masses, "cover", "0.75", normalise="none") == [[1, 1, 0, 0]]
    assert scored(masses, "cover", "0.75", normalise="none", exclusive="true") == [[1, 1, 0, 0]]


def test_a_cover_never_takes_a_member_without_mass() -> None:
    assert scored([[0.5, 0.0, 0.5, 0.0]], "cover", "1.0", normalise="none") == [[1, 0, 1, 0]]
    assert scored([[0.5, 0.0, 0.5, 0.0]], "cover", "1.0", normalise="none", at_least="3") == [[1, 1, 1, 0]]
    assert scored([[0.4, 0.3, 0.2, 0.1]], "cover", "1.0", normalise="none", at_most="2") == [[1, 1, 0, 0]]


def test_softmax_comes_before_sums_and_thresholds() -> None:
    logits = np.log([[0.6, 0.2, 0.15, 0.05]])
    assert scored(logits, "cover", "0.7") == [[1, 1, 0, 0]]
    assert scored(logits, "above", "0.14") == [[1, 1, 1, 0]]
    assert scored(logits, "above", "0.3", relative="true") == [[1, 1, 0, 0]]


def test_ties_go_to_the_lower_index() -> None:
    assert scored([[1.0, 2.0, 2.0, 2.0], [0.0, -0.0, 0.0, -0.0]], "top", "2") == [[0, 1, 1, 0], [1, 1, 0, 0]]


def test_minmax_spans_the_candidates() -> None:
    # 0, 0.5, 1: the largest and half of it reach 0.9 of 1.5.
    assert scored([[1.0, 2.0, 3.0]], "cover", "0.9", normalise="minmax") == [[0, 1, 1]]
    assert scored([[2.0, 2.0, 2.0]], "above", "1.0", normalise="minmax") == [[1, 1, 1]]


def test_scores_of_minus_infinity_and_nan_withdraw_what_is_not_forced() -> None:
    scores = [[-np.inf, np.nan, 1.0, 0.0]]
    assert scored(scores, "top", "3") == [[0, 0, 1, 1]]
    assert scored(scores, "top", "3", always="{ k < 8 }") == [[1, 1, 1, 0]]
    assert scored([[-np.inf] * 4], "top", "3") == [[0, 0, 0, 0]]


def test_a_fraction_is_of_the_candidates_and_at_least_one() -> None:
    row = [[5.0, 4.0, 3.0, 2.0, 1.0, -np.inf, -np.inf]]
    assert scored(row, "top", "fraction(0.6)") == [[1, 1, 1, 0, 0, 0, 0]]
    assert scored(row, "top", "fraction(0.01)") == [[1, 0, 0, 0, 0, 0, 0]]
    # 0.07 of 100 is 7 as written, though not in binary.
    assert sum(scored([list(range(100))], "top", "fraction(0.07)")[0]) == 7


def test_levels_by_rank_and_by_mass() -> None:
    scores = [[5.0, 4.0, 3.0, 2.0, 1.0]]
    assert scored(scores, "levels", "(1, 2, 4)", quantiles="(0.4, 0.6, 0.8)") == [[1, 1, 2, 4, 0]]
    masses = [[0.5, 0.25, 0.125, 0.125]]
    found = scored(masses, "levels", "(1, 2)", masses="(0.5, 0.8)", normalise="none")
    assert found == [[1, 2, 2, 0]]
    forced = scored(scores, "levels", "(1, 2, 4)", quantiles="(0.4, 0.6, 0.8)",
                    always="{ k >= 16 }", forced="overlay")  # fmt: skip
    assert forced == [[1, 1, 2, 4, 1]]


@pytest.mark.parametrize(("share", "wanted"), [("none", [[1, 0], [0, 1]]), ("group", [[1, 0]] * 2)])
def test_heads_that_share_add_their_scores(share: str, wanted: list[list[int]]) -> None:
    q = np.zeros((1, 2, 1, 8))
    q[0, 0, 0, 0], q[0, 1, 0, 1] = 1, 1
    k = np.zeros((1, 1, 8, 8))
    k[0, 0, :4, 0], k[0, 0, 4:, 1] = 3, 2
    found = chosen(f"top(1, blocks(4), among = causal, by = dot(Q, mean(K)), share = {share})", q, k)
    assert found.level[0, :, 0].tolist() == wanted


def test_normalising_comes_before_the_sum_over_heads() -> None:
    q = np.zeros((1, 2, 1, 8))
    q[0, 0, 0, 0], q[0, 1, 0, 1] = 1, 1
    k = np.zeros((1, 1, 8, 8))
    # Logits (6, 0) and (0, 7): the sum prefers the second, softmax all but ties with the second just ahead;
    # logits (6, 5) and (0, 0.5) prefer the first by logits, and the second by masses only if summed after softmax.
    k[0, 0, :4, 0], k[0, 0, 4:, 0] = 6, 5.4
    k[0, 0, 4:, 1] = 0.7
    by_logits = chosen("top(1, blocks(4), among = causal, by = dot(Q, mean(K)), share = heads)", q, k)
    masses = "top(1, blocks(4), among = causal, by = dot(Q, mean(K)), share = heads, normalise = softmax)"
    by_masses = chosen(masses, q, k)
    assert by_logits.score[0, 0, 0] == pytest.approx([6, 6.1])
    first = 1 / (1 + np.exp(-0.6)) + 1 / (1 + np.exp(0.7))
    assert by_masses.score[0, 0, 0] == pytest.approx([first, 2 - first])


def test_a_ragged_last_block_is_the_mean_of_what_is_present() -> None:
    q, k = np.ones((1, 1, 10, 8)), np.ones((1, 1, 10, 8))
    k[0, 0, 8:] = 2.0
    found = chosen("top(1, blocks(4), among = all, by = dot(Q, mean(K)))", q, k)
    assert found.score[0, 0, -1] == pytest.approx([8, 8, 16])
    assert found.level[0, 0, -1].tolist() == [0, 0, 1]


def test_rows_before_the_first_token_choose_nothing() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(1, 1, 6, 8)), rng.normal(size=(1, 1, 4, 8))
    found = chosen("top(2, blocks(2), among = causal, by = dot(Q, mean(K)))", q, k)
    assert found.level[0, 0].sum(-1).tolist() == [0, 0, 1, 1, 2, 2]
    none = chosen("top(2, blocks(2), among = causal, by = dot(Q, mean(K)))", q, k[:, :, :0])
    assert none.level.shape == (1, 1, 6, 0)


# ------------------------------------------------------------------------------- published rules


def test_moba() -> None:
    """MoBA (Lu et al. 2025): each query's own block and the best earlier ones, n in all, by q . mean of the block."""
    rng = np.random.default_rng(1)
    size, n, tokens = 4, 3, 30
    q, k = rng.normal(size=(1, 2, tokens, 8)), rng.normal(size=(1, 2, tokens, 8))
    found = chosen(f"top({n}, blocks({size}), among = causal, by = dot(Q, mean(K)), always = same_block({size}))", q, k)
    for h in range(2):
        for t in range(tokens):
            own_block = t // size
            gate = {b: q[0, h, t] @ k[0, h, b * size : (b + 1) * size].mean(0) for b in range(own_block)}
            wanted = {own_block, *sorted(gate, key=lambda b: -gate[b])[: n - 1]}
            assert set(np.flatnonzero(found.level[0, h, t])) == wanted


def test_xattention() -> None:
    """XAttention (Xu et al. 2025), over whole blocks: antidiagonal sums, softmax, sums over blocks, cover, first block
    and diagonal counted and credited."""
    rng = np.random.default_rng(2)
    size, stride, tokens, share = 8, 4, 32, 0.7
    q, k = rng.normal(size=(1, 1, tokens, 8)), rng.normal(size=(1, 1, tokens, 8))
    found = chosen(
        f"cover({share}, blocks({size}), per = rows({size}), among = causal, by = antidiagonal(Q, K, {stride}), "
        f"always = {{ k < {size} or q // {size} == k // {size} }})", q, k, scale=8**-0.5,
    )  # fmt: skip
    groups = tokens // stride
    logits = np.full((groups, groups), -np.inf)
    for i in range(groups):
        for j in range(i + 1):
            picked = [q[0, 0, i * stride + t] @ k[0, 0, j * stride + stride - 1 - t] for t in range(stride)]
            logits[i, j] = sum(picked) / stride / 8**0.5
    masses = np.exp(logits - logits.max(1, keepdims=True))
    masses /= masses.sum(1, keepdims=True)
    wide = size // stride
    for r in range(tokens // size):
        of_rows = masses[r * wide : (r + 1) * wide]
        block = [of_rows[:, m * wide : (m + 1) * wide].sum() for m in range(r + 1)]
        kept = {0, r}
        total, credited = sum(block), sum(block[m] for m in kept)
        for m in sorted(set(range(r + 1)) - kept, key=lambda m: -block[m]):
            if credited < share * total:
                kept.add(m)
                credited += block[m]
        assert set(np.flatnonzero(found.level[0, 0, r])) == kept


def test_quest() -> None:
    """Quest (Tang et al. 2024): pages by an upper bound of the score."""
    rng = np.random.default_rng(3)
    page, n, tokens = 4, 2, 18
    q, k = rng.normal(size=(1, 1, 3, 8)), rng.normal(size=(1, 1, tokens, 8))
    found = chosen(f"top({n}, blocks({page}), among = causal, by = bound(Q, min(K), max(K)))", q, k)
    pages = [k[0, 0, p : p + page] for p in range(0, tokens, page)]
    for row, t in enumerate(range(tokens - 3, tokens)):
        bounds = {
            p: np.maximum(q[0, 0, row] * x.min(0), q[0, 0, row] * x.max(0)).sum()
            for p, x in enumerate(pages)
            if p * page <= t
        }
        best = sorted(bounds, key=lambda p: -bounds[p])[:n]
        assert set(np.flatnonzero(found.level[0, 0, row])) == set(best)
