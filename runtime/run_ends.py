"""Where runs of equal ids begin and end, and the entries of each, on a GPU: two launches, where torch takes dozens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.resources import files

import torch
from torch import Tensor

from attndsl.runtime.device_kernels import device_kernel

# Tokens of a program.
_CHUNK = 1024


def ends_by_kernel(ids: Tensor) -> Tensor:
    """int32 [2, ..., tokens] of ids [..., tokens], of which there are some: as `cuts.document_ends` has them."""
    tokens = ids.shape[-1]
    found = torch.empty((2, *ids.shape), dtype=torch.int32, device=ids.device)
    launch = _launch("run_ends", ids.device, tokens, ids.numel() // tokens, 2, ids.dtype)
    launch(ids_ptr=ids.contiguous(), out_ptr=found)
    return found


def entries_by_kernel(ids: Tensor, size: int, stride: int, present: Tensor | None = None) -> Tensor:
    """int32 [4, ..., tokens] of ids [..., tokens], of which there are some: what `runs.document_entries` returns."""
    tokens, ends = ids.shape[-1], ends_by_kernel(ids)
    found = torch.empty((4, *ids.shape), dtype=torch.int32, device=ids.device)
    bound = ends if present is None else present.to(torch.int32).expand(ids.shape[:-1]).contiguous()
    more = {"size": min(size, tokens), "step": min(stride, tokens), "bounded": int(present is not None)}
    launch = _launch("run_entries", ids.device, tokens, ids.numel() // tokens, 1, torch.int32, *more.items())
    launch(ends_ptr=ends, present_ptr=bound, out_ptr=found)
    return found


@functools.lru_cache(maxsize=256)
def _launch(
    function: str, device: torch.device, tokens: int, lead: int, parts: int, ids: torch.dtype, *more: tuple[str, int]
) -> Callable[..., None]:
    chunks = -(-tokens // _CHUNK)
    given = {
        "ids_ptr": ids, "ends_ptr": torch.int32, "present_ptr": torch.int32, "out_ptr": torch.int32, "tokens": tokens,
        "lead": lead, "chunks": chunks, **dict(more),
    }  # fmt: skip
    return device_kernel(kernel_text(), function, parts * lead * chunks, device, given)


@functools.cache
def kernel_text() -> str:
    return files("attndsl.runtime").joinpath("run_kernels.py").read_text("utf-8")
