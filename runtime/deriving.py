"""Launches of a plan that take the derived inputs of a call after its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attndsl.runtime.derive import Deriver
from attndsl.runtime.engine import Gradients


class Deriving:
    """Makes of a launch one that takes a call's own inputs alone."""

    def __init__(self, deriver: Deriver) -> None:
        self.deriver = deriver
        self.examples = deriver.examples()

    def forward(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        """The launch as a function of a call's own inputs."""
        if not self.examples:
            return launch

        def call(*given: Any) -> Any:
            *tensors, inputs, args, scale, dropout = given
            return launch(*tensors, [*inputs, *self.deriver(inputs, args)], args, scale, dropout)

        return call

    def backward(self, launch: Callable[..., Gradients]) -> Callable[..., Gradients]:
        """The launch as a function of a call's own inputs, with their gradients."""
        if not self.examples:
            return launch

        def call(*given: Any) -> Gradients:
            *tensors, inputs, args, scale, dropout = given
            derived = self.deriver(inputs, args)
            dq, dk, dv, learned = launch(*tensors, [*inputs, *derived], args, scale, dropout)
            return dq, dk, dv, learned[: len(inputs)]

        return call
