"""The keys and values that a plan attends to: a call's own, or those of the entries of a view, which are inputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attndsl.branches import Given
from attndsl.diagnostics import error
from attndsl.plan import Plan, Printed
from attndsl.program import Program


def keys_of(plan: Plan | Printed, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys [B, Hkv, keys, D] and values [B, Hkv, keys, Dv]: of dimensions of size 1, broadcast, no copy is made."""
    return (k, v) if plan.view is None else _entries_of(plan.program, plan.view, k, v, inputs)


def all_entries(program: Program, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The keys and the values of the entries of every view, as `keys_of` has them."""
    views = (part.view for branch in program.branches for part in branch.parts)
    return [x for view in views if isinstance(view, Given) for x in _entries_of(program, view, k, v, inputs)]


def _entries_of(program: Program, view: Given, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    at_k, at_v = view_places(program, view)
    # Of a packed call there is room for as many as there are tokens.
    entries = k.shape[2] if program.input(view.keys).dims[-2].apart else view.entries(k.shape[2])
    return (
        inputs[at_k].expand(*k.shape[:2], entries, k.shape[3]), inputs[at_v].expand(*v.shape[:2], entries, v.shape[3]),
    )  # fmt: skip


def view_places(program: Program, view: Given) -> tuple[int, int]:
    """Which of a program's inputs hold the keys and the values of a view."""
    names = [decl.name for decl in program.inputs]
    return names.index(view.keys), names.index(view.values)


def all_view_places(program: Program) -> tuple[int, ...]:
    """Which of a program's inputs hold entries."""
    views = (part.view for branch in program.branches for part in branch.parts)
    found = (i for view in views if isinstance(view, Given) for i in view_places(program, view))
    return tuple(dict.fromkeys(found))


def check_entries(program: Program, q: Tensor, v_dim: int, inputs: Sequence[Tensor]) -> None:
    """Raises `PatternError` where entries are not of the call's dtype (A511), or one input is to hold keys and values
    of different dimensions (A513)."""
    views = (part.view for branch in program.branches for part in branch.parts)
    for at_k, at_v in (view_places(program, view) for view in views if isinstance(view, Given)):
        for i, size in ((at_k, q.shape[3]), (at_v, v_dim)):
            if inputs[i].shape[-1] not in (1, size):
                decl, numbers = program.inputs[i], inputs[i].shape[-1]
                raise error(
                    "A513", f"input `{decl.name}` has entries of {numbers} numbers; D = {q.shape[3]} and Dv = {v_dim} "
                    f"need {size}", decl.span, help="hand in keys and values apart",
                )  # fmt: skip
    for i in all_view_places(program):
        if inputs[i].dtype != q.dtype:
            have, want = (str(x.dtype).removeprefix("torch.") for x in (inputs[i], q))
            name, span = program.inputs[i].name, program.inputs[i].span
            raise error("A511", f"input `{name}` holds keys or values: it is {have} and q is {want}", span)
