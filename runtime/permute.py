"""The order of a call's tokens by unsorted data (`attndsl.permuting`), on their device: sorts, without waiting."""

from __future__ import annotations

import torch
from torch import Tensor

from attndsl.derivation import Alike, Order, Place, Sorted
from attndsl.program import Axis, InputDecl, Read, Scalar, Var
from attndsl.runtime.values import Values

# Keys of a row's own value, on average, from which on copies of a call's tokens are worth it (RESULTS.md).
MANY_ALIKE = 1536
# Of a place's bits those that say which token it is.
TOKEN_BITS = 32


def of_order(decl: InputDecl, d: Order | Sorted | Place | Alike, values: Values) -> Tensor:
    """An order of tokens, or what is known of them in it, of the input's dimensions: see `attndsl.derivation`."""
    if isinstance(d, Alike):
        own, every = values.tensors[d.own], values.tensors[d.among]
        shared = torch.searchsorted(every, own, right=True) - torch.searchsorted(every, own)
        return (shared.sum() >= MANY_ALIKE * own.numel()).view(1)
    if d.same and values.shape.rows == values.shape.k_len:
        return values.tensors[d.same]
    match d:
        case Order(key=key, side=side):
            return torch.sort(_along(decl, key, side, values), dim=-1, stable=True).indices.to(torch.int32)
        case Sorted(key=key, side=side, order=order):
            along = _along(decl, key, side, values)
            return along.gather(-1, values.tensors[order].to(torch.int64)).to(torch.int64)
        case Place(own=name, among=among, position=position, side=side):
            own, every = values.tensors[name], values.tensors[among]
            before = torch.searchsorted(every, own) + torch.searchsorted(every, own, right=True)
            return (before << TOKEN_BITS) + _along(decl, position, side, values)


def _along(decl: InputDecl, e: Scalar, side: str, values: Values) -> Tensor:
    """Integers of the input's dimensions: a scalar at the tokens, or places, of one side."""
    shape, axes = values.shape, [dim.axis for dim in decl.dims]
    tokens = shape.rows if side == "q" else shape.k_len
    if (entries := _entries(e, side, values)) is not None and Axis.G not in axes:
        # Flat in between, so that the strides are those of any tensor of these sizes.
        sizes = [shape.batch, tokens] if Axis.B in axes else [tokens]
        return entries.expand(shape.batch if Axis.B in axes else 1, tokens).reshape(-1).view(sizes)
    position = torch.arange(tokens, device=values.device).view(1, 1, -1, 1)
    heads = torch.arange(shape.kv_heads, device=values.device).view(1, -1, 1, 1)
    found = values.at(**{side: position, "g": heads}).tensor(e)
    batch = shape.batch if Axis.B in axes else 1
    of_heads = shape.kv_heads if Axis.G in axes else 1
    found = found.expand(batch, of_heads, tokens, 1)[..., 0]
    found = found if Axis.G in axes else found[:, 0]
    return (found if Axis.B in axes else found[0]).contiguous()


def _entries(e: Scalar, side: str, values: Values) -> Tensor | None:
    """What an input [b, k] or [k] holds at the keys, as it lies and as narrow as it is; None of other scalars."""
    match e:
        case Read(input=name, index=(*others, Var(name="k"))) if side == "k" and values.lengths is None:
            dims = values.program.input(name).dims
            of_keys = dims[-1].axis is Axis.K and dims[-1].block == 1
            plain = [Var(dim.axis.value) for dim in dims[:-1]] == others and all(d.axis is Axis.B for d in dims[:-1])
            return values.tensors[name] if of_keys and plain else None
        case _:
            return None
