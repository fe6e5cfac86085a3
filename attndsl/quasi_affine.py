"""isl's quasi-affine expressions as scalars, and sets of integers as conditions."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import islpy as isl

from attndsl.isl_sets import integer
from attndsl.layout import PLAIN, Layout
from attndsl.program import Binary, Call, Compare, Const, If, Logic, Scalar, Type, Unary, Var
from attndsl.simplify import fold

_BINARY = {
    isl.ast_expr_op_type.add: "+",
    isl.ast_expr_op_type.sub: "-",
    isl.ast_expr_op_type.mul: "*",
    isl.ast_expr_op_type.div: "//",
    isl.ast_expr_op_type.fdiv_q: "//",
    isl.ast_expr_op_type.pdiv_q: "//",
    isl.ast_expr_op_type.pdiv_r: "%",
    isl.ast_expr_op_type.zdiv_r: "%",
}
_COMPARE = {
    isl.ast_expr_op_type.eq: "==",
    isl.ast_expr_op_type.le: "<=",
    isl.ast_expr_op_type.lt: "<",
    isl.ast_expr_op_type.ge: ">=",
    isl.ast_expr_op_type.gt: ">",
}
_LOGIC = {
    isl.ast_expr_op_type.and_: "and",
    isl.ast_expr_op_type.and_then: "and",
    isl.ast_expr_op_type.or_: "or",
    isl.ast_expr_op_type.or_else: "or",
}
_HOLDS = {"==": operator.eq, "<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
_EXTREMA = {isl.ast_expr_op_type.min: "min", isl.ast_expr_op_type.max: "max"}


def to_scalar(expr: isl.AstExpr, names: Mapping[str, Scalar]) -> Scalar:
    """An isl expression as a scalar; `names` says what its identifiers stand for."""
    match expr.get_type():
        case isl.ast_expr_type.id:
            return names[expr.get_id().get_name()]
        case isl.ast_expr_type.int:
            return Const(integer(expr.get_val()))
        case _:
            pass
    op = expr.get_op_type()
    args = tuple(to_scalar(expr.get_op_arg(i), names) for i in range(expr.get_op_n_arg()))
    if op in _COMPARE:
        written = Compare(_COMPARE[op], *args)
        compared = _truth(written)
        # A boolean compared with more than 0 or 1.
        return Compare(_COMPARE[op], *map(_number, args)) if compared is written else compared
    if op in _BINARY:
        return Binary(_BINARY[op], *map(_number, args))
    if op in _LOGIC:
        return Logic(_LOGIC[op], args)
    if op in _EXTREMA:
        return Call(_EXTREMA[op], tuple(map(_number, args)))
    match op:
        case isl.ast_expr_op_type.minus:
            return Unary("-", *map(_number, args))
        case isl.ast_expr_op_type.cond | isl.ast_expr_op_type.select:
            return If(*args)
        case _:
            raise AssertionError(f"unexpected isl expression: {expr.to_C_str()}")


def rounded(value: isl.Aff, names: Mapping[str, Scalar], up: bool) -> Scalar:
    """An affine function of parameters, and of quotients of such, rounded up or down.

    isl makes expressions under a context, which took longer than all else about an end of a run.
    """
    divisor = value.get_denominator_val()
    whole, n = value.scale_val(divisor), integer(divisor)
    found = _sum(_terms(whole, names), integer(whole.get_constant_val()) + up * (n - 1))
    return found if n == 1 else Binary("//", found, Const(n))


def conjunction(piece: isl.BasicSet, names: Mapping[str, Scalar]) -> Scalar | None:
    """The condition under which parameters are in a set of them, None where it has quotients; as `rounded`."""
    constraints = piece.get_constraints()
    if any(_quotients(x.get_aff()) for x in constraints):
        return None
    return fold(Logic("and", tuple(_constraint(x, names) for x in constraints)))


def comparisons(pairs: isl.Set) -> int:
    """How many comparisons with q or k a condition for a set { [q, k] } takes, roughly at least: of each conjunction
    one may follow from what all pairs meet."""
    positions, dims = isl.dim_type.set, pairs.dim(isl.dim_type.set)
    of = (sum(x.involves_dims(positions, 0, dims) for x in part.get_constraints()) for part in pairs.get_basic_sets())
    return sum(max(1, n - 1) for n in of)


def least_cost(pairs: isl.Set) -> int:
    """What a condition for a set { [q, k] } costs a pair (`mask.pair_cost`) at least, if nothing follows from what all
    pairs meet: one for each comparison and each position in it, and five for a quotient of positions. What
    conjunctions share is tested once.
    """
    costs = {str(x): _least_cost(part, x) for part in pairs.get_basic_sets() for x in part.get_constraints()}
    return sum(cost for cost in costs.values() if cost > 1)


def _least_cost(part: isl.BasicSet, constraint: isl.Constraint) -> int:
    div, dims = isl.dim_type.div, part.dim(isl.dim_type.set)
    positions = [i for i in range(dims) if constraint.involves_dims(isl.dim_type.set, i, 1)]
    quotients = [
        i for i in range(part.dim(div))
        if constraint.involves_dims(div, i, 1) and part.get_div(i).involves_dims(isl.dim_type.in_, 0, dims)
    ]  # fmt: skip
    return 1 + len(positions) + 5 * len(quotients)


def _constraint(constraint: isl.Constraint, names: Mapping[str, Scalar]) -> Scalar:
    left = constraint.get_aff()
    constant, terms = integer(left.get_constant_val()), _terms(left, names)
    op = "==" if constraint.is_equality() else ">="
    if len(terms) == 1 and terms[0][1].type is Type.BOOL:
        # A boolean, which is 0 or 1.
        ((factor, e),) = terms
        at_0, at_1 = _HOLDS[op](constant, 0), _HOLDS[op](constant + factor, 0)
        return Const(at_0) if at_0 == at_1 else e if at_1 else Unary("not", e)
    positive = [(factor, e) for factor, e in terms if factor > 0]
    negative = [(-factor, e) for factor, e in terms if factor < 0]
    if positive:
        return Compare(op, _sum(positive, 0), _sum(negative, -constant))
    return Compare("==" if op == "==" else "<=", _sum(negative, 0), Const(constant))


def _quotients(value: isl.Aff) -> bool:
    return any(value.involves_dims(isl.dim_type.div, i, 1) for i in range(value.dim(isl.dim_type.div)))


def _terms(value: isl.Aff, names: Mapping[str, Scalar]) -> list[tuple[int, Scalar]]:
    """The parameters of an affine function, then its quotients, and their integer factors."""
    param, div, found = isl.dim_type.param, isl.dim_type.div, list[tuple[int, Scalar]]()
    for i in range(value.dim(param)):
        if value.involves_dims(param, i, 1):
            factor = integer(value.get_coefficient_val(param, i))
            found.append((factor, names[value.get_dim_name(param, i)]))
    for i in range(value.dim(div)):
        if value.involves_dims(div, i, 1):
            found.append((integer(value.get_coefficient_val(div, i)), rounded(value.get_div(i), names, up=False)))
    return found


def _sum(terms: list[tuple[int, Scalar]], constant: int) -> Scalar:
    found: Scalar = Const(constant)
    for factor, e in terms:
        found = Binary("+", found, Binary("*", Const(factor), _number(e)))
    return found


def dims_to_params(pairs: isl.Set, *dims: str) -> isl.Set:
    """A set of tuples as a set of parameters, its dimensions named."""
    for name in dims:
        position = pairs.dim(isl.dim_type.param)
        pairs = pairs.insert_dims(isl.dim_type.param, position, 1)
        pairs = pairs.set_dim_name(isl.dim_type.param, position, name)
        pairs = pairs.equate(isl.dim_type.param, position, isl.dim_type.set, 0)
        pairs = pairs.project_out(isl.dim_type.set, 0, 1)
    return pairs.params()


def condition(pairs: isl.Set, context: isl.Set, names: Mapping[str, Scalar], layout: Layout = PLAIN) -> Scalar:
    """A set { [q, k] } as a condition on q and k, simplified under what the context says of the parameters.

    `names` says what its parameters other than Nq and Nk stand for; a boolean is 0 or 1 in the set and a
    condition in the result. In a layout the set is in its indices, and the condition on i and j, where
    these are not q and k.
    """
    # Keys are not negative; what rows that do not exist would see does not matter.
    existing = isl.Set.read_from_str(
        pairs.get_ctx(), f"[q, k, Nq, Nk, residue] -> {{ : 0 <= k and {layout.q.text('q')} < Nq }}"
    )
    build = isl.AstBuild.from_context(existing.intersect(context))
    known: dict[str, Scalar] = {name: Var(name) for name in ("q", "k", "Nq", "Nk", "residue")}
    if not layout.q.every:
        known["q"] = Var("i")
    if not layout.k.every:
        known["k"] = Var("j")
    found = to_scalar(build.expr_from_set(dims_to_params(pairs, "q", "k")), known | dict(names))
    return Const(bool(found.value)) if isinstance(found, Const) else found


def _number(e: Scalar) -> Scalar:
    """A boolean as 0 or 1."""
    return If(e, Const(1), Const(0)) if e.type is Type.BOOL else e


def _truth(e: Scalar) -> Scalar:
    """A comparison of a boolean with 0 or 1 as the boolean itself."""
    match e:
        case Compare(op=op, left=x, right=Const(value=bound)) if x.type is Type.BOOL:
            true_at_1 = _HOLDS[op](1, bound)
            true_at_0 = _HOLDS[op](0, bound)
            if true_at_0 == true_at_1:
                return Const(true_at_0)
            return x if true_at_1 else Unary("not", x)
        case _:
            return e
