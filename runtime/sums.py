"""Gradients of learnable inputs, added up from the sums that kernels write: in float64, in one order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attndsl.program import CallShape, Program
from attndsl.runtime.call import dim_size


class Totals:
    """The gradients of one call's inputs, each of the shape it has where nothing of it is broadcast."""

    def __init__(self, program: Program, shape: CallShape, device: torch.device) -> None:
        self.program, self.shape, self.device = program, shape, device
        self._found: dict[str, Tensor] = {}

    def size(self, name: str) -> list[int]:
        """The declared sizes of an input."""
        return [dim_size(dim, self.program, self.shape) for dim in self.program.input(name).dims]

    def _of(self, name: str) -> Tensor:
        if name not in self._found:
            self._found[name] = torch.zeros(self.size(name), dtype=torch.float64, device=self.device)
        elif self._found[name].dtype != torch.float64:
            self._found[name] = self._found[name].double()
        return self._found[name]

    def add(self, name: str, values: Tensor, places: Tensor) -> None:
        """Add each value to the entry, of the flattened input, that its place names."""
        # In float64, where `index_put_` adds in one order on the CPU too.
        self._of(name).view(-1).index_put_((places.flatten(),), values.double().flatten(), accumulate=True)

    def add_whole(self, name: str, values: Tensor) -> None:
        """Add a value to every entry, of the declared sizes. A first one is kept as it is: it may be large."""
        self._found[name] = self._of(name).add_(values) if name in self._found else values

    def gradients(self, inputs: Sequence[Tensor], learned: Sequence[str]) -> list[Tensor | None]:
        """The gradient of each input, of its own shape and dtype; None where it is not learnable or not read.

        learned: the names of those that are.
        """
        for name in learned:
            if name not in self._found:
                self._of(name)
        return [
            self._found[decl.name].sum_to_size(x.shape).to(x.dtype) if decl.name in self._found else None
            for decl, x in zip(self.program.inputs, inputs, strict=True)
        ]
