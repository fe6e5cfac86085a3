"""The oracle of observations: sums and maxima of a branch's probabilities, dense, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attndsl.branches import View
from attndsl.observation import Observation
from attndsl.program import Program
from attndsl.runtime.reference import probabilities


def observed(
    program: Program, q: Tensor, k: Tensor, v: Tensor, inputs: Mapping[str, Tensor], args: Mapping[str, int],
    scale: float | None,
) -> dict[str, Tensor]:  # fmt: skip
    """What a program observes in a call, by name: float64 [B, Hq, row classes, members].

    Rows before the first token are of no class. `inputs`: the plans of selections among them.
    """
    found = {}
    for each in program.observations:
        branch = program.named(each.branch)
        parts = probabilities(program, branch, q, k, inputs, args, scale, v.shape[3])
        views = [part.view for part in branch.parts]
        found[each.name] = by_class(parts, views, each, program, k.shape[2])
    return found


def by_class(
    parts: Sequence[Tensor], views: Sequence[View | None], each: Observation, program: Program, k_len: int
) -> Tensor:
    """What is observed of the probabilities [B, Hq, rows, keys] of a branch's parts."""
    whole = torch.stack([_of_tokens(x, view, each, k_len) for x, view in zip(parts, views, strict=True)])
    return _by_row(whole.amax(0) if each.largest else whole.sum(0), each, program, k_len)


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
