"""The oracle of observations: sums and maxima of a branch's probabilities, dense, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attndsl.alone import separate, sequences, together
from attndsl.branches import View
from attndsl.choice import Data, given_masses, plan_sizes
from attndsl.observation import Observation
from attndsl.observed import as_selection, by_members
from attndsl.plans import own_program
from attndsl.program import CallShape, Program
from attndsl.runtime.reference import probabilities
from attndsl.runtime.reference_plans import masses_of


def observed(
    program: Program, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor], args: Mapping[str, int],
    scale: float | None,
) -> dict[str, Tensor]:  # fmt: skip
    """What a program observes in a call, by name: float64 [B, Hq, row classes, members].

    Rows before the first token are of no class. `inputs`: the plans of selections among them.
    """
    found = {}
    shape = CallShape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    exact = {name: x.detach().cpu().numpy() for name, x in inputs.items() if not x.is_floating_point()}
    for each in program.observations:
        branch = program.named(each.branch)
        views = [part.view for part in branch.parts]
        if by_members(program, each):
            found[each.name] = _by_members(program, each, shape, q, k, inputs, args, scale)
            continue
        if not separate(program):
            parts = probabilities(program, branch, q, k, inputs, args, scale, v.shape[3])
            found[each.name] = by_class(parts, views, each, program, k.shape[2])
            continue
        # Of one document after the other, as many as there may be; of padded sequences those of the call, where they
        # begin. A query has the members of its document.
        packed, at_member, k_len = program.packed is not None, 0, k.shape[2]
        classes = {None: 1, 1: q.shape[2]}.get(each.rows, k_len) if packed else q.shape[2]
        members = k_len if packed and each.rows is None else -(-k_len // each.keys)
        whole = q.new_zeros(*q.shape[:2], classes, members, dtype=torch.float64)
        for x in sequences(program, shape, exact):
            at, own = slice(x.entry, x.entry + 1), x.inputs(program, inputs)
            call, tokens = (
                (q[at, :, x.rows], k[at, :, x.keys], own, args, scale, v.shape[3]),
                x.keys.stop - x.keys.start,
            )
            part = _of_parts(probabilities(together(program), branch, *call), views, each, tokens)
            if not packed or each.rows == 1:
                whole[at, :, x.rows, : part.shape[3]] = part
                continue
            if not tokens:
                continue
            part = _by_row(part, each, program, tokens)
            if each.rows is not None:
                whole[at, :, x.blocks(each.rows), : part.shape[3]] = part
                continue
            at_member = 0 if not x.before else at_member
            whole[at, :, :, at_member : at_member + part.shape[3]] = part
            at_member += part.shape[3]
        found[each.name] = whole if packed else _by_row(whole, each, program, k.shape[2])
    return found


def _by_members(
    program: Program, each: Observation, shape: CallShape, q: Tensor, k: Tensor, inputs: Mapping[str, Tensor],
    args: Mapping[str, int], scale: float | None,
) -> Tensor:  # fmt: skip
    """What is observed of members that are no blocks in a row, as a selection would rank them by it."""
    selection, own = as_selection(each), own_program(program)
    if not separate(program):
        branch, known = program.named(each.branch), {name: x.detach().cpu().numpy() for name, x in inputs.items()}
        parts = probabilities(program, branch, q, k, inputs, args, scale, shape.v_dim)
        masses = {each.branch: masses_of(program, branch, parts, shape, known, args)}
        data = Data(q.detach().double().cpu().numpy(), k.detach().double().cpu().numpy(), known, args, 1.0, masses)
        return torch.from_numpy(given_masses(program, selection, shape, data)).to(q.device)
    # Padded sequences begin where the call does, and so do their classes and members.
    sizes = plan_sizes(own, selection, shape)
    whole = q.new_zeros(shape.batch, shape.heads, *sizes, dtype=torch.float64)
    exact = {name: x.detach().cpu().numpy() for name, x in inputs.items() if not x.is_floating_point()}
    for x in sequences(program, shape, exact):
        at, alone = slice(x.entry, x.entry + 1), x.shape(shape)
        call = q[at, :, x.rows], k[at, :, x.keys], x.inputs(program, inputs)
        part = _by_members(together(program), each, alone, *call, args, scale)
        rows = x.rows if each.rows == 1 else slice(0, part.shape[2])
        whole[at, :, rows, : part.shape[3]] = part
    return whole


def by_class(
    parts: Sequence[Tensor], views: Sequence[View | None], each: Observation, program: Program, k_len: int
) -> Tensor:
    """What is observed of the probabilities [B, Hq, rows, keys] of a branch's parts."""
    return _by_row(_of_parts(parts, views, each, k_len), each, program, k_len)


def _of_parts(parts: Sequence[Tensor], views: Sequence[View | None], each: Observation, k_len: int) -> Tensor:
    """What is observed of each row: [B, Hq, rows, members]."""
    whole = torch.stack([_of_tokens(x, view, each, k_len) for x, view in zip(parts, views, strict=True)])
    return whole.amax(0) if each.largest else whole.sum(0)


def _of_tokens(x: Tensor, view: View | None, each: Observation, k_len: int) -> Tensor:
    """Probabilities [B, H, rows, keys] of a part as those of members [B, H, rows, members]."""
    members = -(-k_len // each.keys)
    found = x.new_zeros(*x.shape[:3], members)
    for j in range(x.shape[3]):
        first, size = (j, 1) if view is None else (j * view.stride, view.size)
        tokens = range(first, min(first + size, k_len))
        for m in {token // each.keys for token in tokens}:
            share = x[..., j] * (sum(token // each.keys == m for token in tokens) / len(tokens))
            found[..., m] = torch.maximum(found[..., m], share) if each.largest else found[..., m] + share
    return found


def _by_row(x: Tensor, each: Observation, program: Program, k_len: int) -> Tensor:
    """Rows [B, H, rows, members] as row classes."""
    rows = x.shape[2]
    first = 0 if program.align_start else k_len - rows
    end = rows if program.align_start else k_len
    if each.rows == 1:
        return x
    classes = 1 if each.rows is None else -(-end // each.rows)
    found = x.new_zeros(*x.shape[:2], classes, x.shape[3])
    for i in range(max(0, -first), rows):
        r = 0 if each.rows is None else (first + i) // each.rows
        found[:, :, r] = torch.maximum(found[:, :, r], x[:, :, i]) if each.largest else found[:, :, r] + x[:, :, i]
    return found
