"""Lowers data-dependent selections (`top`, `cover`, `above`, `levels`): their options, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attndsl import syntax as ast
from attndsl.grammar import sets
from attndsl.grammar.arguments import match_arguments
from attndsl.grammar.routing import classes_of, members_of, nearest_word, partition, routing_score, rows
from attndsl.grammar.scalars import integer, static_float, static_int
from attndsl.grammar.scope import Context, Use
from attndsl.grammar.unsupported import Feature, unsupported
from attndsl.members import Lags, Members, Tiles
from attndsl.program import Arg, Const, Inter, Read, Set, Where, reads, walk
from attndsl.selection import (
    WHOLE,
    Above,
    Antidiagonal,
    Bound,
    Compete,
    Cover,
    Dot,
    Forced,
    Levels,
    Normalise,
    Probs,
    Rule,
    Score,
    Selection,
    Share,
    Top,
)

# The words each option takes, in the order of the specification.
WORDS = {
    "share": tuple(word.value for word in Share),
    "forced": tuple(word.value for word in Forced),
    "normalise": tuple(word.value for word in Normalise),
    "compete": tuple(word.value for word in Compete),
}
_COMMON = ("of", "per", "share", "among", "always", "forced", "by", "normalise")
_OPTIONS = {
    "top": ("n", *_COMMON),
    "cover": ("p", *_COMMON, "compete", "exclusive", "at_least", "at_most"),
    "above": ("t", *_COMMON, "relative", "at_most"),
    "levels": ("factors", *_COMMON, "quantiles", "masses"),
}
_FLAGS = ("exclusive", "relative")


def selection(node: ast.Apply, ctx: Context, name: str | None = None) -> Selection | None:
    """The selection of a call, kept under a name of its own or that of its plan; None if a mistake was reported.

    Without `among` that is left open here, and `settle` fills it in once the whole pattern is known.
    """
    matched = _matched(node, ctx)
    if matched is None:
        return None
    ctx.maker.term(node.span)
    before = len(ctx.report.errors)
    function = node.function
    required = (_OPTIONS[function][0], "of", "by")
    for word in required:
        if word not in matched:
            help = f"write `{function}({', '.join(required[:2])}, by = ...)`"
            ctx.report.error("A013", f"`{function}` needs `{word}`", node.span, "left out here", help)
    if ctx.among and "among" not in matched and not ctx.maker.dead:
        what = f"`{function}` in {ctx.among} must say what it selects among"
        ctx.report.error("A044", what, node.span, "no `among`", "write `among = causal`")
    found = _Options(function, {word: arg.value for word, arg in matched.items()}, ctx)
    made = found.selection(node, name or ctx.maker.selection_name(function))
    if made is None or len(ctx.report.errors) > before:
        return None
    if not ctx.maker.dead:
        ctx.maker.selections[made.name] = made
        if "among" not in matched:
            ctx.maker.open_selections.add(made.name)
    return made


def _of_tiles(node: ast.Expr | None) -> bool:
    return isinstance(node, ast.Apply) and node.function == "tiles"


def _matched(node: ast.Apply, ctx: Context) -> dict[str, ast.Argument] | None:
    """The arguments; option words may stand alone."""
    name, flags, rest = node.function, list[ast.Argument](), list[ast.Argument]()
    for arg in node.args:
        alone = arg.name is None and isinstance(arg.value, ast.Name) and arg.value.id in _FLAGS
        (flags if alone else rest).append(arg)
    matched = match_arguments(name, _OPTIONS[name], tuple(rest), node.span, ctx)
    if matched is None:
        return None
    for arg in flags:
        assert isinstance(arg.value, ast.Name)
        if arg.value.id not in _OPTIONS[name]:
            ctx.report.error(
                "A043", f"`{name}` has no option `{arg.value.id}`", arg.span, "unknown word", "leave it out"
            )
            return None
        matched[arg.value.id] = replace(arg, value=ast.Truth(True, arg.span))
    return matched


@dataclass(frozen=True, slots=True)
class _Options:
    """The options of one selection. Each method reports its own mistakes, and then gives something harmless."""

    function: str
    given: Mapping[str, ast.Expr]
    ctx: Context

    def selection(self, node: ast.Apply, name: str) -> Selection | None:
        of, per = self._members(), self._rows()
        keys, members = of or (None, None)
        rows, row_tiles = per or (1, None)
        share = Share(self._word("share", "none"))
        forced = Forced(self._word("forced", "counted"))
        among, always = self._set("among"), self._set("always")
        score: Score | None = None
        if "by" in self.given:
            sizes = 0 if members else keys or 1, 0 if row_tiles else rows
            score = routing_score(self.given["by"], *sizes, replace(self.ctx, use=Use.BY))
        # Masses are normalised already, and what only ranks needs it not.
        plain = self.function == "top" or isinstance(score, Antidiagonal | Probs)
        normalise = Normalise(self._word("normalise", "none" if plain else "softmax"))
        rule = self._rule(node)
        if rule is None or score is None or keys is None or per is None:
            return None
        if among is None:
            among = Where(Const(True), node.span)
        if _of_tiles(self.given.get("of")) or _of_tiles(self.given.get("per")):
            on_grid = sets.gridded(among, self.ctx)
            among = on_grid.parts[-1] if "among" not in self.given and isinstance(on_grid, Inter) else on_grid
        whole = WHOLE if self.ctx.packed and row_tiles is None else None
        made = Selection(
            name, rule, keys, rows or whole, share, among, always, forced, score, normalise, members=members,
            row_tiles=row_tiles, span=node.span,
        )  # fmt: skip
        return made if self._fits(made, node) else None

    def _fits(self, made: Selection, node: ast.Apply) -> bool:
        """Refuses what means nothing, and what has no good kernel."""
        sums = isinstance(made.rule, Cover) or (isinstance(made.rule, Levels) and made.rule.masses)
        if sums and made.normalise is Normalise.NONE and isinstance(made.score, Dot | Bound):
            self.ctx.report.error(
                "A071", f"`{self.function}` sums masses, and these scores may be negative", node.span, "not masses",
                "write `normalise = softmax`, or leave it out",
            )  # fmt: skip
            return False
        if isinstance(made.members, Lags) and not isinstance(made.score, Probs):
            self.ctx.report.error(
                "A070", "a diagonal holds no vectors, and no key of its own", self.given["by"].span, "for diagonals",
                "write `by = probs(branch)`",
            )  # fmt: skip
            return False
        if made.rows == 1 and not made.bounded:
            bound = "`per = rows(64)`" if self.function == "levels" else "`at_most = 64`"
            self.ctx.report.error(
                "A072", f"`{self.function}` for each query may choose every member", node.span, "without a bound",
                f"add {bound}",
            )  # fmt: skip
            return False
        return True

    # -------------------------------------------------------------------------------------- division

    def _members(self) -> tuple[int, Members | None] | None:
        """Keys of a member, and what members are where they are no blocks."""
        node = self.given.get("of")
        if node is None:
            return None
        before = len(self.ctx.report.errors)
        found = members_of(node, self.ctx)
        if found is None and len(self.ctx.report.errors) == before and partition(node, self.ctx):
            unsupported(Feature.PARTITIONS, node.span, self.ctx)
        return found

    def _rows(self) -> tuple[int, Tiles | None] | None:
        """Rows of a class, 0 for all of them, and what classes are where they are no rows in order."""
        node = self.given.get("per")
        if node is None:
            return 1, None
        before = len(self.ctx.report.errors)
        found = classes_of(node, self.ctx)
        if found is None and len(self.ctx.report.errors) == before:
            rows(node, self.ctx)
        return found

    def _set(self, option: str) -> Set | None:
        node = self.given.get(option)
        return None if node is None else sets.pattern_set(node, replace(self.ctx, among="an option"))

    def _word(self, option: str, default: str) -> str:
        node = self.given.get(option)
        if node is None:
            return default
        words = WORDS[option]
        if isinstance(node, ast.Name) and node.id in words:
            return node.id
        what = f"this is not a word of `{option}`"
        self.ctx.report.error("A043", what, node.span, "unknown word", nearest_word(node, words))
        return default

    # ------------------------------------------------------------------------------------------ rule

    def _rule(self, node: ast.Apply) -> Rule | None:
        match self.function:
            case "top":
                return None if "n" not in self.given else self._top(self.given["n"])
            case "cover":
                share, least, most = self._share("p"), self._count("at_least"), self._count("at_most")
                return None if share is None else self._cover(share, least or 0, most)
            case "above":
                share, most = self._share("t"), self._count("at_most")
                return None if share is None else Above(share, self._flag("relative"), most)
            case _:
                return self._levels(node)

    def _cover(self, share: float, least: int, most: int | None) -> Cover:
        return Cover(share, self._flag("exclusive"), least, most, Compete(self._word("compete", "row")))

    def _top(self, node: ast.Expr) -> Top | None:
        if isinstance(node, ast.Apply) and node.function == "fraction":
            if len(node.args) != 1:
                given = f"{len(node.args)} given"
                self.ctx.report.error(
                    "A013", "`fraction` takes 1 argument", node.span, given, "write `fraction(0.1)`"
                )  # fmt: skip
                return None
            share = self._in_unit(node.args[0].value, "a fraction")
            return None if share is None else Top(None, share)
        count = integer(node, replace(self.ctx, use=Use.SET))
        if count is None:
            return None
        if reads(count, "q", "k", "b", "Nq", "Nk") or any(isinstance(x, Arg | Read) for x in walk(count)):
            what = "how many are chosen is known at compile time, for each head"
            self.ctx.report.error("A024", what, node.span, "not known", "write a number, or a table `n[h]`")
            return None
        if isinstance(count, Const) and int(count.value) < 1 and not self.ctx.maker.dead:
            self.ctx.report.error(
                "A012", "`n` must be at least 1", node.span, f"this is {count.value}", "write 1 or more"
            )
            return None
        return Top(count)

    def _levels(self, node: ast.Apply) -> Levels | None:
        given = [word for word in ("quantiles", "masses") if word in self.given]
        factors = self._numbers("factors", whole=True)
        bounds = self._numbers(given[0], whole=False) if given else None
        if len(given) != 1:
            label = "both are given" if given else "left out here"
            self.ctx.report.error(
                "A013", "`levels` needs `quantiles` or `masses`", node.span, label, "write `quantiles = (0.2, 0.5)`"
            )  # fmt: skip
        if factors is None or bounds is None:
            return None
        keys, members = self._members() or (1, None)
        keys = keys if members is None else 1
        ordered = list(bounds) == sorted(bounds) and all(0 <= x <= 1 for x in bounds)
        whole = tuple(int(x) for x in factors)
        if len(factors) != len(bounds) or not ordered or any(keys % x for x in whole) or max(whole) > 255:
            self.ctx.report.error(
                "A012", "`levels` takes as many ascending shares as factors, which divide the block", node.span, "here",
                "write `levels((1, 2, 4), blocks(64), quantiles = (0.1, 0.3, 0.6), ...)`",
            )  # fmt: skip
            return None
        return Levels(whole, tuple(bounds), given == ["masses"])

    def _numbers(self, option: str, *, whole: bool) -> tuple[float, ...] | None:
        node = self.given.get(option)
        if node is None:
            return None
        if not isinstance(node, ast.Group):
            self.ctx.report.error(
                "A020", "a tuple of numbers belongs here", node.span, "one value", "write `(1, 2, 4)`"
            )  # fmt: skip
            return None
        ctx = self.ctx
        values = [static_int(i, ctx, "a factor") if whole else static_float(i, ctx, "a share") for i in node.items]
        found = tuple(x for x in values if x is not None)
        return found if len(found) == len(values) else None

    def _share(self, option: str) -> float | None:
        node = self.given.get(option)
        return None if node is None else self._in_unit(node, f"`{option}`")

    def _in_unit(self, node: ast.Expr, what: str) -> float | None:
        share = static_float(node, self.ctx, what)
        if share is not None and not 0 <= share <= 1:
            self.ctx.report.error("A012", f"{what} lies in [0, 1]", node.span, f"this is {share}", "write a share")
            return None
        return None if share is None else float(share)

    def _count(self, option: str) -> int | None:
        node = self.given.get(option)
        return None if node is None else static_int(node, self.ctx, f"`{option}`")

    def _flag(self, option: str) -> bool:
        node = self.given.get(option)
        if node is None or isinstance(node, ast.Truth):
            return node is not None and node.value
        self.ctx.report.error(
            "A043", f"`{option}` is true or false", node.span, "unknown word", f"write `{option} = true`"
        )  # fmt: skip
        return False
