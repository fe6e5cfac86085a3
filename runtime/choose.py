"""Choosing of scored members by a kernel: what `ranking.py` says, without a sort."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.resources import files

import torch
from torch import Tensor

from attndsl.runtime.device_kernels import device_kernel
from attndsl.runtime.lasting import number_tensor
from attndsl.selection import Above, Cover, Forced, Levels, Selection, Top

# The most members of a row that a program holds.
MOST = 16384
# Scores that a program holds, where rows are short; a warp then has rows of its own.
_HELD, _SHORT = 512, 256


def chosen_by_kernel(
    selection: Selection, score: Tensor, competing: Tensor, forced: Tensor, limit: Tensor | int, room: int | None
) -> Tensor:
    """int32 [..., room] of scores float32 [..., members], increasing members and -1 after them; where room is None
    uint8 [..., members].

    competing, forced: bool like the scores. limit: how many rank in all, an int or broadcast to [...].
    """
    lead, members = score.shape[:-1], score.shape[-1]
    match selection.rule:
        case Top():
            rule, share, least = 0, 0.0, 0
        case Cover(share=share, exclusive=exclusive, at_least=least):
            rule = 2 if exclusive else 1
        case Above(share=share, relative=relative):
            rule, least = (4 if relative else 3), 0
        case Levels():
            raise AssertionError("levels are several choices")
    lists = score.numel() // members
    if isinstance(limit, int):
        limits = torch.full(lead, limit, dtype=torch.int32, device=score.device)
    else:
        limits = limit.to(torch.int32).expand(lead).contiguous()
    if room is None:
        found = torch.empty((*lead, members), dtype=torch.uint8, device=score.device)
    else:
        found = torch.full((*lead, room), -1, dtype=torch.int32, device=score.device)
    shares = _number(share, score.device)
    counted = int(selection.forced is Forced.COUNTED)
    launch = _launch(score.device, lists, members, -1 if room is None else room, rule, least, counted, found.dtype)
    launch(
        score_ptr=score.contiguous(), competing_ptr=competing.contiguous(), forced_ptr=forced.contiguous(),
        limit_ptr=limits, share_ptr=shares, out_ptr=found,
    )  # fmt: skip
    return found


@functools.lru_cache(maxsize=256)
def _number(value: float, device: torch.device) -> Tensor:
    return number_tensor((value,), (1,), torch.float32, device)


@functools.lru_cache(maxsize=256)
def _launch(
    device: torch.device, lists: int, members: int, room: int, rule: int, least: int, counted: int, out: torch.dtype
) -> Callable[..., None]:
    width = max(32, 1 << (members - 1).bit_length())
    rows = max(4, _HELD // width) if width <= _SHORT else 1
    given = {
        "score_ptr": torch.float32, "competing_ptr": torch.bool, "forced_ptr": torch.bool, "limit_ptr": torch.int32,
        "share_ptr": torch.float32, "out_ptr": out, "lists": lists, "members": members, "room": room, "rule": rule,
        "least": least, "counted": counted,
    }  # fmt: skip
    return device_kernel(_text(width, rows), "choose", -(-lists // rows), device, given, max(4, min(16, width // 1024)))


@functools.cache
def _text(width: int, rows: int) -> str:
    text = files("attndsl.runtime").joinpath("choose_kernels.py").read_text("utf-8")
    text = text.replace("WIDTH: tl.constexpr = 256", f"WIDTH: tl.constexpr = {width}")
    return text.replace("ROWS: tl.constexpr = 4", f"ROWS: tl.constexpr = {rows}")
