"""Runs read off isl's loops, where the tiles of a line are no plain intervals."""

from __future__ import annotations

from collections.abc import Callable

import islpy as isl

from attndsl.program import Binary, Call, Compare, Const, If, Logic, Scalar, Unary
from attndsl.runs import Run, TileKind, TileRuns


def loop_runs(
    lines: dict[TileKind, isl.Set], context: isl.Set, scalar: Callable[[isl.AstExpr], Scalar], tiles: Scalar
) -> TileRuns:
    """Let isl write the loops over disjoint lines { [t] } of both kinds in order of the tile index, and read runs off
    them. tiles: how many there are on the other side."""
    ctx = context.get_ctx()
    statements = isl.UnionSet.empty(isl.Space.params_alloc(ctx, 0))
    for kind, line in lines.items():
        statements = statements.union(isl.UnionSet.from_set(line.set_tuple_name(kind.value)))
    schedule = isl.UnionMap.read_from_str(ctx, "{ full[t] -> [t]; partial[t] -> [t] }")
    build = isl.AstBuild.from_context(context)
    build = build.set_options(isl.UnionMap.read_from_str(ctx, "{ [t] -> separate[0] }"))
    scan = _Scan(scalar, tiles)
    scan.collect(build.node_from_schedule_map(schedule.intersect_domain(statements)))
    return TileRuns(
        full=tuple(run for run in scan.found if run.kind is TileKind.FULL),
        partial=tuple(run for run in scan.found if run.kind is TileKind.PARTIAL),
    )


class _Scan:
    """Reads runs off isl's loops.

    What isl executes comes in increasing order of the tile index, so its loops are disjoint. A condition left
    inside a loop is dropped: the range becomes a partial run, whose mask decides. Since a range so widened
    may reach into its neighbours, it is clipped to the tiles after those already passed (`cursor`), and what
    follows it is clipped likewise.
    """

    def __init__(self, scalar: Callable[[isl.AstExpr], Scalar], tiles: Scalar) -> None:
        self.scalar, self.tiles = scalar, tiles
        self.found: list[Run] = []
        self.cursor: Scalar = Const(0)
        self.widened = False

    def collect(self, node: isl.AstNode, guard: Scalar = Const(True)) -> None:
        match node.get_type():
            case isl.ast_node_type.block:
                children = node.block_get_children()
                for i in range(children.n_ast_node()):
                    self.collect(children.get_at(i), guard)
            case isl.ast_node_type.if_:
                cond, before = self.scalar(node.if_get_cond()), self.cursor
                self.collect(node.if_get_then_node(), _both(guard, cond))
                after_then, self.cursor = self.cursor, before
                if node.if_has_else_node():
                    self.collect(node.if_get_else_node(), _both(guard, Unary("not", cond)))
                self.cursor = If(cond, after_then, self.cursor)
            case isl.ast_node_type.for_:
                self._loop(node, guard)
            case isl.ast_node_type.user:
                tile = self.scalar(node.user_get_expr().get_op_arg(1))
                self._add(tile, Binary("+", tile, Const(1)), 1, _kind(node), guard)
            case _:
                raise AssertionError(node.to_C_str())

    def _loop(self, node: isl.AstNode, guard: Scalar) -> None:
        first, cond, body = self.scalar(node.for_get_init()), node.for_get_cond(), node.for_get_body()
        end = self.scalar(cond.get_op_arg(1))
        if cond.get_op_type() != isl.ast_expr_op_type.lt:
            end = Binary("+", end, Const(1))
        if body.get_type() == isl.ast_node_type.user:
            self._add(first, end, int(node.for_get_inc().get_val().to_python()), _kind(body), guard)
        else:
            self.widened = True
            self._add(first, Call("min", (end, self.tiles)), 1, TileKind.PARTIAL, guard)

    def _add(self, first: Scalar, end: Scalar, step: int, kind: TileKind, guard: Scalar) -> None:
        if self.widened:
            skipped: Scalar = Call("max", (Binary("-", self.cursor, first), Const(0)))
            if step > 1:
                skipped = Binary("*", Binary("//", Binary("+", skipped, Const(step - 1)), Const(step)), Const(step))
            first = Binary("+", first, skipped)
        length: Scalar = Binary("-", end, first)
        if step > 1:
            length = Binary("//", Binary("+", length, Const(step - 1)), Const(step))
        count: Scalar = Call("max", (length, Const(0)))
        self.found.append(Run(first, count if guard == Const(True) else If(guard, count, Const(0)), step, kind))
        # A run that is empty has passed nothing: its end may lie beyond tiles that follow.
        self.cursor = If(Compare("<", first, end), Call("max", (self.cursor, end)), self.cursor)


def _kind(node: isl.AstNode) -> TileKind:
    return TileKind(node.user_get_expr().get_op_arg(0).get_id().get_name())


def _both(a: Scalar, b: Scalar) -> Scalar:
    return b if a == Const(True) else Logic("and", (a, b))
