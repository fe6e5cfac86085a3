"""A program in several pieces: their kernels, one after another on the same output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from attndsl.runtime.dropout import Dropout


class First(Protocol):
    """A forward kernel, ready to be launched."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        dropout: Dropout | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The output and lse of a call."""


class Forward(First, Protocol):
    """One that may also follow others."""

    def into(
        self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
        scale: float | None, dropout: Dropout | None,
    ) -> None:  # fmt: skip
        """Add a piece to what those before it have found."""


@dataclass(frozen=True, slots=True)
class InTurn:
    """The forward kernels of a program's pieces. Each but the first takes up the output and lse of those before it."""

    first: First
    others: tuple[Forward, ...]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        dropout: Dropout | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = self.first(q, k, v, inputs, args, scale, dropout)
        for piece in self.others:
            piece.into(out, lse, q, k, v, inputs, args, scale, dropout)
        return out, lse


def in_turn(first: First, *others: Forward) -> First:
    """One function of a call; a program that is one piece keeps its own."""
    return InTurn(first, others) if others else first
