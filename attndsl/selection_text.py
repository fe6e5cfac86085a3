"""Selections written back in the language, every option said, `among` too where the text left it out."""

from __future__ import annotations

from typing import assert_never

from attndsl.members import Lags, Members, Placed, Runs, Tiles
from attndsl.notation import scalar_text, set_text
from attndsl.selection import (
    WHOLE,
    Above,
    Antidiagonal,
    Bound,
    Compete,
    Cover,
    Dot,
    Given,
    Levels,
    Normalise,
    Probs,
    Rule,
    Score,
    Selection,
    Share,
    Top,
    Vectors,
)


def selection_text(selection: Selection) -> str:
    """A selection as a call of its function."""
    of = members_text(selection.keys, selection.members)
    per = {1: "query", None: "head", WHOLE: "head"}.get(selection.rows, f"rows({selection.rows})")
    per = per if selection.row_tiles is None else members_text(1, selection.row_tiles)
    name, first, more = _rule(selection.rule)
    options = [of, f"per = {per}", f"by = {_score(selection.score)}", f"among = {set_text(selection.among)}"]
    if selection.always is not None:
        options += [f"always = {set_text(selection.always)}", f"forced = {selection.forced.value}"]
    if selection.share is not Share.NONE:
        options.append(f"share = {selection.share.value}")
    if selection.normalise is not Normalise.NONE:
        options.append(f"normalise = {selection.normalise.value}")
    return f"{name}({', '.join([first, *options, *more])})"


def members_text(keys: int, members: Members | None) -> str:
    match members:
        case None:
            return "tokens" if keys == 1 else f"blocks({keys})"
        case Tiles(sizes=sizes):
            return f"tiles({', '.join(map(str, sizes))})"
        case Placed(size=size, input=name, tiles=tiles):
            return f"{members_text(size, tiles)} on permuted({name})"
        case Runs(input=name, order=order):
            return f"segments({name})" + ("" if order is None else f" on permuted({order.input})")
        case Lags(size=size):
            return f"diagonals({size})"
        case _:
            assert_never(members)


def _rule(rule: Rule) -> tuple[str, str, list[str]]:
    """The function, its first argument and its own options."""
    match rule:
        case Top(count=None, fraction=fraction):
            return "top", f"fraction({fraction})", []
        case Top(count=count):
            assert count is not None
            return "top", scalar_text(count), []
        case Cover(share=share, exclusive=exclusive, at_least=least, at_most=most, compete=compete):
            said: list[tuple[str, object]] = [("exclusive = true", exclusive), (f"at_least = {least}", least)]
            said.append((f"compete = {compete.value}", compete is not Compete.ROW))
            return "cover", repr(share), [text for text, holds in (*said, (f"at_most = {most}", most)) if holds]
        case Above(share=share, relative=relative, at_most=most):
            said = [("relative = true", relative), (f"at_most = {most}", most)]
            return "above", repr(share), [text for text, holds in said if holds]
        case Levels(factors=factors, bounds=bounds, masses=masses):
            return "levels", repr(factors), [f"{'masses' if masses else 'quantiles'} = {bounds}"]
        case _:
            assert_never(rule)


def _score(score: Score) -> str:
    match score:
        case Dot(x=x, y=y):
            return f"dot({_vectors(x)}, {_vectors(y)})"
        case Bound(x=x, low=low, high=high):
            return f"bound({_vectors(x)}, {_vectors(low)}, {_vectors(high)})"
        case Antidiagonal(stride=stride):
            return f"antidiagonal(Q, K, {stride})"
        case Probs(branch=branch, largest=largest):
            return f"probs({branch}, {'max' if largest else 'sum'})"
        case Given(value=value):
            return scalar_text(value)
        case _:
            assert_never(score)


def _vectors(v: Vectors) -> str:
    return v.source if v.pool is None else f"{v.pool.value}({v.source})"
