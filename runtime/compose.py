"""Calls of programs with views and several branches: the entries, then a kernel a branch, then their combination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attndsl.branches import Attended
from attndsl.compose import Composition, Pooling, output_inputs
from attndsl.diagnostics import error
from attndsl.program import Program
from attndsl.runtime.call import call_shape, check_inputs
from attndsl.runtime.combine import Combiner, State
from attndsl.runtime.ops import attend, checked_values
from attndsl.runtime.pool import pooled

Views = Mapping[str, tuple[Tensor, Tensor]]


def make_views(key: str, composition: Composition, k: Tensor, v: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The entries of every pooled view, keys [B, Hkv, entries, D] and values [B, Hkv, entries, Dv], by its name."""
    return {pooling.name: _made(key, pooling, k, v) for pooling in composition.pools}


def _made(key: str, pooling: Pooling, k: Tensor, v: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    return pooled(key, k, pooling.pool, backend), pooled(key, v, pooling.pool, backend)


def attend_composed(
    program: Program, key: str, composition: Composition, keys: Sequence[str], q: Tensor, k: Tensor, v: Tensor,
    given: Sequence[Tensor], args: Sequence[int], scale: float | None, backend: str, dropout: float,
    views: Views | None,
) -> State:  # fmt: skip
    """Output and, where there is one, lse of a call. key, keys: the registered program, and those of its branches."""
    if dropout:
        raise error(
            "A911", "dropout is not yet supported for views and several branches", program.span, help="leave it out"
        )
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    shape = call_shape(q, k, v)
    checked_values(key, given, args)
    check_inputs(program, shape, given, q.device)
    inputs = {decl.name: x for decl, x in zip(program.inputs, given, strict=True)}
    made = _entries(key, composition, k, v, views, backend)
    attended: dict[str, State] = {}
    for own_key, (name, part) in zip(keys, composition.branches, strict=True):
        own = [made[decl.name] if decl.name in made else inputs[decl.name] for decl in part.inputs]
        out, lse = attend(own_key, q, k, v, own, list(args), scale, backend)
        attended[name] = out, None if part.only.weights is not None else lse
    if isinstance(composition.output, Attended):
        return attended[composition.output.branch]
    read = output_inputs(composition.output)
    gates = {name: x for name, x in inputs.items() if name in read}
    numbers = dict(zip(program.args, args, strict=True))
    found = Combiner(program, shape, q.device, gates, numbers, attended).state(composition.output)
    return found[0].to(q.dtype).expand(shape.batch, shape.heads, shape.rows, shape.v_dim), found[1]


def _entries(
    key: str, composition: Composition, k: Tensor, v: Tensor, views: Views | None, backend: str
) -> dict[str, Tensor]:
    """The tensors of pooled views by the inputs that hold them: those handed in, or made here."""
    if views is not None and set(views) != set(composition.names):
        names = ", ".join(f"`{name}`" for name in composition.names) or "none"
        raise error("A565", f"the views of this attention are {names}", help="pass what `attn.views(k, v)` returns")
    found: dict[str, Tensor] = {}
    for pooling in composition.pools:
        made = _made(key, pooling, k, v, backend) if views is None else views[pooling.name]
        found[pooling.keys], found[pooling.values] = made
    return found
