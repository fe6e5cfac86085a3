"""Lowers `output`: the expression by which branches combine."""

from __future__ import annotations

from attndsl import syntax as ast
from attndsl.branches import Attended, Branch, Factor, Handed, Merged, Output, Product, Sum
from attndsl.grammar.scalars import number
from attndsl.grammar.scope import BranchRef, Context, InputRef
from attndsl.program import Axis, Binary, Call, Const, InputDecl, Read, Scalar, Type, Unary, Var, reads

_LEAD = {Axis.B: "b", Axis.H: "h", Axis.G: "g", Axis.Q: "q"}


def lower_output(node: ast.Expr, branches: dict[str, Branch | None], ctx: Context) -> Output | None:
    """An output, a plain number included; None if a mistake in it was reported.

    branches: those with a name; None for one with a mistake.
    """
    return _Lowering(branches, ctx).output(node)


class _Lowering:
    def __init__(self, branches: dict[str, Branch | None], ctx: Context) -> None:
        self.branches, self.ctx = branches, ctx

    def output(self, node: ast.Expr) -> Output | None:
        match node:
            case ast.Name(id=name) if isinstance(self.ctx.scope.find(name), BranchRef):
                return Attended(name)
            case ast.Arithmetic(first=first, rest=rest):
                left = self.output(first)
                for op, operand in rest:
                    left = self._joined(op, left, self.output(operand), node)
                return left
            case ast.Prefix(op="-", operand=operand):
                inner = self.output(operand)
                if isinstance(inner, Factor):
                    return Factor(Unary("-", inner.value))
                return None if inner is None else Product(Const(-1), inner)
            case ast.Apply(function="merge"):
                return self._merged(node)
            case ast.Apply(function="sigmoid", args=[ast.Argument(value=value)]):
                inner = self.output(value)
                if inner is None or isinstance(inner, Factor):
                    return None if inner is None else Factor(Call("sigmoid", (inner.value,)))
                self._error("`sigmoid` gates, it does not take a branch", node, "here", "gate with an input")
                return None
            case ast.Name(id=name) | ast.Subscript(name=name) if channels := self._channels(name):
                return self._gate(channels, node)
            case _:
                e = number(node, self.ctx)
                return None if e is None else Factor(e)

    def _joined(self, op: str, left: Output | None, right: Output | None, node: ast.Expr) -> Output | None:
        if op not in ("+", "-", "*", "/") or (op == "/" and not isinstance(right, Factor | None)):
            self._error(
                f"`{op}` does not combine branches", node, "here", "branches combine with `+`, `-`, `*` and `merge`"
            )
            return None
        if left is None or right is None:
            return None
        if isinstance(left, Factor) and isinstance(right, Factor):
            return Factor(Binary(op, left.value, right.value))
        match op:
            case "+":
                return Sum(left, right)
            case "-":
                negative = Factor(Unary("-", right.value)) if isinstance(right, Factor) else Product(Const(-1), right)
                return Sum(left, negative)
            case _:
                if isinstance(left, Factor):
                    return Product(left.value, right)
                if isinstance(right, Factor):
                    factor = Binary("/", Const(1.0), right.value) if op == "/" else right.value
                    return Product(factor, left)
                self._error("two branches cannot be multiplied", node, "here", "multiply by an input")
                return None

    def _merged(self, node: ast.Apply) -> Merged | None:
        found: list[Attended | Handed | Merged] = []
        good = True
        for arg in node.args:
            if isinstance(arg.value, ast.Apply) and arg.value.function == "given":
                operand: Output | None = self._handed(arg.value)
            else:
                operand = self.output(arg.value)
            if isinstance(operand, Attended):
                good = self._may_merge(operand, arg) and good
            if isinstance(operand, Attended | Handed | Merged):
                found.append(operand)
            elif operand is not None:
                self._error("`merge` joins branches", arg, "not a branch", "name a branch")
            good = good and isinstance(operand, Attended | Handed | Merged)
        if good and len(found) < 2:
            self._error("`merge` joins two branches or more", node, f"{len(found)} given", "write `merge(a, b)`")
            return None
        return Merged(tuple(found)) if good else None

    def _may_merge(self, operand: Attended, at: ast.Argument) -> bool:
        """A merge weighs by lse, which `weights` does not have, and in which a sink would count once a branch."""
        branch = self.branches.get(operand.branch)
        if branch is not None and branch.within is not None:
            # Its lse is that of the branch that weighs its members.
            branch = self.branches.get(branch.within.branch)
        if branch is None or (branch.weights is None and branch.sink is None):
            return True
        what = "a sink" if branch.sink is not None else "`weights`"
        self._error(f"`{operand.branch}` has {what}", at, "not merged by lse", "merge branches with a plain softmax")
        return False

    def _handed(self, node: ast.Apply) -> Handed | None:
        """`given(o, lse)`: an output and its lse as inputs."""
        if len(node.args) != 2 or any(arg.name for arg in node.args):
            self._error(
                "`merge` takes `given(o, lse)`", node, f"{len(node.args)} given", "hand in an output and its lse"
            )
            return None
        out, lse = (self.output(arg.value) for arg in node.args)
        if out is None or lse is None:
            return None
        if not isinstance(out, Factor) or not isinstance(lse, Factor):
            self._error("`given(o, lse)` takes inputs", node, "a branch", "merge the branch itself")
            return None
        if reads(lse.value, "d"):
            self._error("an lse has no channels", node.args[1], "a number a channel", "hand in a number a row")
            return None
        return Handed(out.value, lse.value)

    # -------------------------------------------------------------------------------------- gates

    def _channels(self, name: str) -> InputDecl | None:
        """The declaration of an input that holds a number a channel of the output."""
        bound = self.ctx.scope.find(name)
        if isinstance(bound, InputRef) and bound.decl.dims and bound.decl.dims[-1].axis is Axis.DV:
            return bound.decl
        return None

    def _gate(self, decl: InputDecl, node: ast.Name | ast.Subscript) -> Factor | None:
        """A read of it: the dimensions before the channel as of any input."""
        if decl.type is not Type.FLOAT:
            self._error(f"`{decl.name}` gates channels", node, f"it holds {decl.type.value}", "declare it float")
            return None
        given = node.index if isinstance(node, ast.Subscript) else ()
        dims = decl.dims[:-1]
        lead = dims[: len(dims) - len(given)]
        if len(given) > len(dims) or any(dim.axis not in _LEAD or dim.block > 1 for dim in lead):
            self._error(
                f"`{decl.name}` takes other indices", node, "here", "leave out leading b, h, g, q and the channel"
            )
            return None
        index: list[Scalar] = [Var(_LEAD[dim.axis]) for dim in lead]
        for dim, at in zip(dims[len(lead) :], given, strict=True):
            e = number(at, self.ctx)
            if e is None:
                return None
            if dim.axis is Axis.Q and e != Var("q"):
                self._error(f"`{decl.name}` holds rows", at, "indexed by `q` only", "write `q`")
                return None
            index.append(e)
        return Factor(Read(decl.name, (*index, Var("d")), Type.FLOAT))

    def _error(self, message: str, node: ast.Expr | ast.Argument, label: str, help: str) -> None:
        self.ctx.report.error("A046", message, node.span, label, help)
