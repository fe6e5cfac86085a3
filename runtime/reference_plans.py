"""The plans that a program's selections make by the oracle: the reference of calls that hand in none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from attndsl.choice import Data, Mass, choose, real
from attndsl.oracle import Evaluator
from attndsl.plans import own_program, plan_heads, plan_input
from attndsl.program import CallShape, Program
from attndsl.runtime.reference import probabilities
from attndsl.selection import Probs, Share


def oracle_plans(
    program: Program, q: Tensor, k: Tensor, inputs: Mapping[str, Tensor], args: Mapping[str, int],
    scale: float | None, given: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """The plan of each selection as the input that it is: uint8 with an entry a member, or the plan that is given.

    q: [B, Hq, rows, D], k: [B, Hkv, Nk, D]; given: plans by name, [B, H', R, C or M].
    """
    shape = CallShape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], q.shape[3])
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
                masses[selection.score.branch] = [
                    Mass(p.cpu().numpy(), *((1, 1) if part.view is None else (part.view.size, part.view.stride)))
                    for p, part in zip(
                        probabilities(program, branch, q, k, {**inputs, **found}, args, scale),
                        branch.parts,
                        strict=True,
                    )
                ]
            chosen = choose(seen, selection, shape, Data(queries, keys, known, args, factor, masses))
            share = {Share.NONE: 1, Share.GROUP: shape.heads // shape.kv_heads, Share.HEADS: shape.heads}
            plan = torch.from_numpy(chosen.level[:, :: share[plan_heads(selection)]]).to(q.device)
        plan = plan if "q" in axes else plan.squeeze(2)
        found[selection.name] = plan if "h" in axes or "g" in axes else plan.squeeze(1)
        known[selection.name] = found[selection.name].cpu().numpy()
    return {decl.name: found[decl.name] for decl in program.inputs if decl.name in found}
