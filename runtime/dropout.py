"""What a call says of dropout, checked, and as kernels take it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attndsl.diagnostics import error
from attndsl.dropout import threshold

# What a kernel with dropout takes besides: the seed, the word below which pairs are dropped, the factor of the others.
PARAMETERS = ("seed_ptr", "drop_below", "keep_scale")


class Dropout(NamedTuple):
    """Dropout of a call: rate in (0, 1), and the seed, int64 [] on the call's device."""

    rate: float
    seed: Tensor

    def values(self) -> tuple[Tensor, int, float]:
        """The values of `PARAMETERS`."""
        return self.seed, threshold(self.rate), 1.0 / (1.0 - self.rate)


def check_rate(rate: Any) -> float:
    """Raises `PatternError` (A528) unless the rate is a number in [0, 1)."""
    if isinstance(rate, int | float) and not isinstance(rate, bool) and 0.0 <= rate < 1.0:
        return float(rate)
    raise error(
        "A528", f"dropout is the share of pairs to drop, in [0, 1), not {repr(rate)[:40]}", help="pass 0.1 for a tenth"
    )


def seed_tensor(seed: Any, device: torch.device) -> Tensor:
    """The seed as int64 [] on a device; None draws it from torch's generator of that device, without waiting for it.

    Raises `PatternError` (A529) unless it is None, an int of 64 bits, or an int64 tensor of one element there.
    """
    match seed:
        case None:
            return torch.randint(1 << 62, (), dtype=torch.int64, device=device)
        case Tensor() if seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == device:
            return seed.reshape(())
        case Tensor():
            given = f"a tensor {str(seed.dtype).removeprefix('torch.')} {list(seed.shape)} on {seed.device}"
        case bool():
            given = repr(seed)
        case int() if -(1 << 63) <= seed < 1 << 63:
            return torch.full((), seed, dtype=torch.int64, device=device)
        case _:
            given = repr(seed)[:40]
    raise error(
        "A529", f"a seed is an int of 64 bits or an int64 tensor of one element on {device}, not {given}",
        help="leave it out to draw one from torch's generator",
    )  # fmt: skip


def known(rate: Any, seed: Any, device: torch.device) -> tuple[float, int] | None:
    """Rate and seed of a call to the oracle, None without dropout. A seed that is left out is an A529 too."""
    if check_rate(rate) == 0.0:
        return None
    if seed is None:
        raise error("A529", "the oracle draws no seed: which pairs are dropped is to be said", help="pass `seed`")
    return float(rate), int(seed_tensor(seed, device))


__all__ = ["PARAMETERS", "Dropout", "check_rate", "known", "seed_tensor"]
