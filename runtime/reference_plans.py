"""The plans that a program's selections make by the oracle: the reference of calls that hand in none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attndsl.alone import Alone, separate, sequences, together
from attndsl.branches import Branch
from attndsl.choice import Data, Mass, choose
from attndsl.choice_values import real
from attndsl.oracle import Evaluator, dim_size
from attndsl.oracle_entries import tokens_of
from attndsl.plans import own_program, plan_heads, plan_input
from attndsl.program import Axis, CallShape, Program
from attndsl.runtime.call import without_values
from attndsl.runtime.reference import probabilities
from attndsl.selection import Probs, Selection, Share


def oracle_plans(
    program: Program, q: Tensor, k: Tensor, inputs: Mapping[str, Tensor], args: Mapping[str, int],
    scale: float | None, given: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """The plan of each selection as the input that it is: uint8 with an entry a member, or the plan that is given.

    q: [B, Hq, rows, D], k: [B, Hkv, Nk, D]; given: plans by name, [B, H', R, C or M].
    """
    shape = without_values(program, q, k, [inputs.get(decl.name) for decl in program.inputs])
    if separate(program) and program.selections:
        return _apart(program, shape, q, k, inputs, args, scale, given)
    queries, keys = (x.detach().double().cpu().numpy() for x in (q, k))
    arrays = {name: x.detach().cpu() for name, x in inputs.items()}
    known = {name: (x.double() if x.is_floating_point() else x).numpy() for name, x in arrays.items()}
    own, found = own_program(program), dict[str, Tensor]()
    for selection in program.selections:
        decl = plan_input(selection)
        axes = [dim.axis.value for dim in decl.dims]
        if selection.name in given:
            plan = given[selection.name]
        else:
            seen = replace(own, inputs=(*own.inputs, *(plan_input(program.selection(name)) for name in found)))
            # The scale of the call stands in the place of the attention's.
            factor = np.asarray(shape.dim**-0.5 if scale is None else scale)
            if scale is None and selection.scale is not None:
                factor = real(Evaluator.of_call(seen, shape, known, args), selection.scale)
            masses: dict[str, list[Mass]] = {}
            if isinstance(selection.score, Probs):
                branch = program.named(selection.score.branch)
                each = probabilities(program, branch, q, k, {**inputs, **found}, args, scale, shape.v_dim)
                masses[selection.score.branch] = masses_of(program, branch, each, shape, known, args)
            chosen = choose(seen, selection, shape, Data(queries, keys, known, args, factor, masses))
            share = {Share.NONE: 1, Share.GROUP: shape.heads // shape.kv_heads, Share.HEADS: shape.heads}
            plan = torch.from_numpy(chosen.level[:, :: share[plan_heads(selection)]]).to(q.device)
        plan = plan if "q" in axes else plan.squeeze(2)
        found[selection.name] = plan if "h" in axes or "g" in axes else plan.squeeze(1)
        known[selection.name] = found[selection.name].cpu().numpy()
    return {decl.name: found[decl.name] for decl in program.inputs if decl.name in found}


def masses_of(
    program: Program, branch: Branch, probabilities: Sequence[Tensor], shape: CallShape,
    inputs: Mapping[str, Any], args: Mapping[str, int],
) -> list[Mass]:  # fmt: skip
    """The probabilities of a branch's parts, with the tokens that their keys stand for."""
    at, found = Evaluator.of_call(program, shape, inputs, args), []
    for part, p in zip(branch.parts, probabilities, strict=True):
        tokens, masses = tokens_of(at, part.view, p.shape[3]), p.cpu().numpy()
        if tokens is not None:
            found.append(Mass(masses, tokens=tokens))
        else:
            found.append(Mass(masses) if part.view is None else Mass(masses, part.view.size, part.view.stride))
    return found


def _apart(
    program: Program, shape: CallShape, q: Tensor, k: Tensor, inputs: Mapping[str, Tensor], args: Mapping[str, int],
    scale: float | None, given: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """What the sequences of a call choose alone. Padded ones begin with the first token, so their blocks are those of
    the call; blocks of documents lie one document after the other."""
    exact = {name: x.detach().cpu().numpy() for name, x in inputs.items() if not x.is_floating_point()}
    found = {each.name: _nothing(program, each, shape, q, given) for each in program.selections}
    for x in sequences(program, shape, exact):
        if x.keys.start == x.keys.stop:
            continue
        own, batch = together(program), slice(x.entry, x.entry + 1)
        plans = {name: _cut(plan, program, program.selection(name), x) for name, plan in given.items()}
        call = q[batch, :, x.rows], k[batch, :, x.keys], x.inputs(program, inputs)
        for name, plan in oracle_plans(own, *call, args, scale, plans).items():
            place: list[slice | list[int]] = [slice(0, size) for size in plan.shape]
            place[0] = batch
            for i, dim in enumerate(plan_input(program.selection(name)).dims):
                if dim.axis is Axis.Q and dim.tiles is not None and program.packed is not None:
                    # Of tiles without tokens, which choose nothing, the first stands where another does.
                    kept = {at: tile for tile, at in reversed([*enumerate(x.tiles(dim.tiles))])}
                    place[i], plan = list(kept), plan.index_select(i, torch.tensor(list(kept.values())))
                elif dim.axis is Axis.Q and (dim.block == 1 or program.packed is not None):
                    place[i] = x.rows if dim.block == 1 else x.blocks(dim.block)
            found[name][tuple(place)] = plan
    return found


def _nothing(
    program: Program, selection: Selection, shape: CallShape, q: Tensor, given: Mapping[str, Tensor]
) -> Tensor:
    """A plan, as the input that it is, in which nothing is chosen."""
    decl = plan_input(selection).of_documents(program.packed is not None)
    sizes = [dim_size(dim, program, shape) for dim in decl.dims[:-1]]
    plan = given.get(selection.name)
    if plan is not None and plan.dtype != torch.uint8:
        return plan.new_full((*sizes, plan.shape[-1]), -1)
    tokens, each = selection.extent
    return torch.zeros(*sizes, -(-shape.k_len // tokens) * each, dtype=torch.uint8, device=q.device)


def _cut(plan: Tensor, program: Program, selection: Selection, x: Alone) -> Tensor:
    """The part of a plan that is handed in, [B, H', R, C or M], that is a sequence's."""
    plan = plan[x.entry : x.entry + 1] if plan.shape[0] > 1 else plan
    if plan.shape[2] == 1 or (selection.rows != 1 and program.packed is None):
        return plan
    if selection.row_tiles is not None and program.packed is not None:
        return plan[:, :, x.tiles(selection.row_tiles)]
    return plan[:, :, x.rows if selection.rows == 1 else x.blocks(selection.rows or 1)]


def scaled(q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor | None, ...] | None) -> tuple[Tensor, ...]:
    """q, k and v, in float64 what they stand for where their numbers, or those of their heads, have scales."""
    if scales is None:
        return q, k, v
    given = zip((q, k, v), scales, strict=True)
    return tuple(x.double() if s is None else x.double() * s.double().view(-1, 1, 1) for x, s in given)
