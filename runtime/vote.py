"""What members are ranked by, of heads that share, by kernels: what `Ranking._scores` says, in one pass over scores."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.resources import files

import torch
from torch import Tensor

from attndsl.runtime.device_kernels import device_kernel
from attndsl.selection import Normalise

_HOW = {Normalise.NONE: 0, Normalise.SOFTMAX: 1, Normalise.MINMAX: 2}
# Scores that a program holds at a time, and the most of one row.
_HELD, _WIDE = 1024, 1024


def voted_by_kernel(
    raw: Tensor, candidates: Tensor, forced: Tensor, how: Normalise, *, extra: bool, masses: bool, size: int, step: int
) -> tuple[Tensor, Tensor]:
    """The scores by which members rank, float32 [B, Hq / step, classes, members], and which compete.

    raw: float32 [B, Hq, classes, members], whatever it is of what is no candidate, NaN of what has no score.
    candidates, forced: bool of that size; what is the same along a dimension may be expanded. extra: what is forced
    does not compete. masses: no head withdraws what another has a mass of. size: heads that add up their scores, of
    which every `step`th is asked for.
    """
    batch, heads, rows, members = raw.shape
    strides = tuple(x.stride() for x in (raw, candidates, forced))
    shape, device = (batch, heads, rows, members), raw.device
    given = {"raw_ptr": raw, "candidate_ptr": candidates, "forced_ptr": forced}
    code = _HOW[how]
    low = high = torch.empty((batch, heads, rows) if code else (1,), dtype=torch.float32, device=device)
    if code:
        high = torch.empty_like(low)
        _launch("ends", device, shape, strides, (("how", code), ("extra", extra)))(low_ptr=low, high_ptr=high, **given)
    score = torch.empty(batch, heads // step, rows, members, dtype=torch.float32, device=device)
    competing = torch.empty(score.shape, dtype=torch.bool, device=device)
    numbers = (("how", code), ("extra", extra), ("masses", masses), ("size", size), ("step", step))
    launch = _launch("vote", device, shape, strides, numbers)
    launch(low_ptr=low, high_ptr=high, score_ptr=score, competing_ptr=competing, **given)
    return score, competing


@functools.lru_cache(maxsize=256)
def _launch(
    function: str, device: torch.device, shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...],
    numbers: tuple[tuple[str, int], ...],
) -> Callable[..., None]:  # fmt: skip
    batch, heads, rows, members = shape
    width = min(_WIDE, max(32, 1 << (members - 1).bit_length()))
    lists = batch * heads * rows // dict(numbers).get("step", 1)
    given: dict[str, object] = {
        **dict.fromkeys(("raw_ptr", "low_ptr", "high_ptr", "score_ptr"), torch.float32),
        **dict.fromkeys(("candidate_ptr", "forced_ptr", "competing_ptr"), torch.bool),
        "lists": lists, "heads": heads, "rows": rows, "members": members,
        **{name: int(x) for name, x in numbers},
    }  # fmt: skip
    for name, of in zip(("raw", "candidate", "forced"), strides, strict=True):
        given |= {f"stride_{name}_{axis}": x for axis, x in zip("bhrm", of, strict=True)}
    many = -(-lists // (_HELD // width))
    return device_kernel(
        _text(width), function, many * (-(-members // width) if function == "vote" else 1), device, given
    )


@functools.cache
def _text(width: int) -> str:
    text = files("attndsl.runtime").joinpath("vote_kernels.py").read_text("utf-8")
    text = text.replace("WIDTH: tl.constexpr = 256", f"WIDTH: tl.constexpr = {width}")
    return text.replace("ROWS: tl.constexpr = 4", f"ROWS: tl.constexpr = {_HELD // width}")
