"""The cuts of a call (`attndsl.cuts`) on its device: a sorted search, on a GPU in one launch (`cut_kernels.py`), and
without waiting."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.resources import files

import torch
from torch import Tensor
from torch.nn.functional import pad

from attndsl.cuts import domain, reflexive
from attndsl.derivation import Cut
from attndsl.program import Axis, InputDecl, Read, Scalar, Var
from attndsl.runtime.device_kernels import device_kernel
from attndsl.runtime.run_ends import ends_by_kernel
from attndsl.runtime.values import Values


def make_cut(decl: InputDecl, cut: Cut, values: Values) -> Tensor:
    """int32 of the input's own dimensions: where the other side's values stop being below one's own.

    What the inputs hold, sorted or not, an entry lies among the other side's positions, or is one past the last.
    """
    program, shape, device = values.program, values.shape, values.device
    own_first, own_end = domain(cut.own, cut.owner, program, shape)
    first, end = domain(cut.other, cut.cut, program, shape)
    axes = [dim.axis for dim in decl.dims]
    lead = [shape.batch if Axis.B in axes else 1, shape.heads if Axis.H in axes else 1]
    sizes = [n for n, axis in zip(lead, (Axis.B, Axis.H), strict=True) if axis in axes]
    sizes += [own_end - own_first] if cut.owner else []
    if first == end or own_first == own_end:
        return torch.full(sizes, first, dtype=torch.int32, device=device)
    own = _along(cut.own, cut.owner, own_first, own_end, values, lead)
    if isinstance(cut.other, Var):
        # Positions are their own values. The largest integer of an input has none after it in its own width.
        found = (own.to(torch.int64) + cut.inclusive).clamp(first, end).to(torch.int32)
    else:
        other = own if reflexive(cut, program) else _along(cut.other, cut.cut, first, end, values, lead)
        if device.type == "cuda":
            itself = own_first if reflexive(cut, program) else None
            return searched(own, other, cut.inclusive, first, itself).reshape(sizes)
        kind = torch.promote_types(own.dtype, other.dtype)
        own, other = own.to(kind).contiguous(), other.to(kind).contiguous()
        found = torch.searchsorted(other, own, right=cut.inclusive, out_int32=True)
        found = found + first if first else found
    if reflexive(cut, program):
        position = torch.arange(own_first, own_end, dtype=torch.int32, device=device)
        found = torch.maximum(found, position + 1) if cut.inclusive else torch.minimum(found, position)
    return found.reshape(sizes)


def _along(e: Scalar, variable: str, first: int, end: int, values: Values, lead: list[int]) -> Tensor:
    """Values at the positions of one side, integers [batch or 1, heads or 1, positions]."""
    size = [*lead, end - first]
    match e:
        case Read(input=name, index=(*others, Var(name=last))) if last == variable:
            # The entries themselves, where they lie as they are wanted.
            x, dims = values.tensors[name], values.program.input(name).dims
            plain = [Var(dim.axis.value) for dim in dims[:-1]] == others and dims[-1].block == 1
            if plain and not any(dim.axis in (Axis.G, Axis.CONST) for dim in dims):
                at = [i for axis, i in ((Axis.B, 0), (Axis.H, 1)) if axis not in [dim.axis for dim in dims]]
                for i in at:
                    x = x.unsqueeze(i)
                return x.expand(size)
        case _:
            pass
    position = torch.arange(first, end, device=values.device).view(1, 1, -1, 1)
    found = values.at(**{variable: position} if variable else {}).tensor(e)
    return found.expand(*size, 1)[..., 0]


# Own values that a program looks up.
_SEARCHED = 128


def searched(own: Tensor, other: Tensor, inclusive: bool, first: int, itself: int | None) -> Tensor:
    """The cuts of values [batch or 1, heads or 1, positions] among other ones, from `first` on, as `make_cut` says.

    itself: own value n is that of the other side's position `itself` + n; None: the sides differ.
    """
    (batch, heads, size), keys = own.shape, other.shape[2]
    found = torch.empty((batch, heads, size), dtype=torch.int32, device=own.device)
    launch = _search(
        own.device, own.dtype, own.stride(), other.dtype, other.stride(), (batch * heads, heads, size, keys),
        first, itself, inclusive,
    )  # fmt: skip
    launch(own_ptr=own, other_ptr=other, out_ptr=found)
    return found


@functools.lru_cache(maxsize=256)
def _search(
    device: torch.device, own: torch.dtype, own_strides: tuple[int, ...], other: torch.dtype,
    other_strides: tuple[int, ...], sizes: tuple[int, int, int, int], first: int, itself: int | None, inclusive: bool,
) -> Callable[..., None]:  # fmt: skip
    lead, heads, size, keys = sizes
    chunks = -(-size // _SEARCHED)
    given = {
        "own_ptr": own, "other_ptr": other, "out_ptr": torch.int32, "heads": heads, "size": size, "keys": keys,
        "first": first, "position": itself or 0, "inclusive": int(inclusive), "reflexive": int(itself is not None),
        "steps": -(-keys.bit_length() // 2), "chunks": chunks,
    }  # fmt: skip
    for name, strides in (("own", own_strides), ("other", other_strides)):
        given |= {f"stride_{name}_{axis}": stride for axis, stride in zip("bhn", strides, strict=True)}
    return device_kernel(kernel_text(), "search", lead * chunks, device, given)


@functools.cache
def kernel_text() -> str:
    return files("attndsl.runtime").joinpath("cut_kernels.py").read_text("utf-8")


def document_ends(ids: Tensor, ends: bool) -> Tensor:
    """int32 like ids [..., tokens]: the first token of each one's run of equal ids, or one past its last."""
    tokens = ids.shape[-1]
    position = torch.arange(tokens, dtype=torch.int32, device=ids.device)
    if tokens == 0:
        return position.expand(ids.shape)
    if ids.is_cuda:
        return ends_by_kernel(ids)[int(ends)]
    changes = ids[..., 1:] != ids[..., :-1]
    if not ends:
        return torch.where(pad(changes, (1, 0), value=True), position, 0).cummax(-1).values
    last = torch.where(pad(changes, (0, 1), value=True), position + 1, tokens)
    return last.flip(-1).cummin(-1).values.flip(-1)


def document_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """See `attndsl.document_ids`."""
    position = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    ends = cu_seqlens[..., 1:].contiguous()
    found = torch.searchsorted(ends, position.expand(*ends.shape[:-1], tokens).contiguous(), right=True, out_int32=True)
    return found if found.dim() == 2 else found[None]
