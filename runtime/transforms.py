"""Operators beside the attention (entries of views, choices) under the transforms of torch.func.

`torch.library` knows none of them, so under one an operator is called as a function of autograd's, which they take; and
where a dimension is mapped, one entry of it after another. The attention's own function is in `ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils._pytree import tree_flatten, tree_unflatten

from attndsl.diagnostics import error


def transformed() -> bool:
    """Whether torch.func transforms are at work: they take an autograd.Function, but not inside an operator."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def mapped(library: Library, *names: str) -> None:
    """Lets torch.vmap map operators."""
    for name in names:
        torch.library.register_vmap(f"attndsl::{name}", one_by_one(getattr(torch.ops.attndsl, name)), lib=library)


def one_by_one(operator: Any) -> Callable[..., Any]:
    """Batched calls of an operator, one after another."""

    def call(info: Any, in_dims: Any, *args: Any) -> Any:
        values, structure = tree_flatten(args)
        dims, _ = tree_flatten(in_dims)
        found = []
        if not info.batch_size:
            # Of no entries, what one would have come to says the sizes.
            values = [
                x if dim is None else x.new_zeros([1 if n == dim else size for n, size in enumerate(x.shape)])
                for x, dim in zip(values, dims, strict=True)
            ]
        for i in range(max(1, info.batch_size)):
            chosen = [x if dim is None else x.select(dim, i) for x, dim in zip(values, dims, strict=True)]
            found.append(tree_flatten(operator(*tree_unflatten(chosen, structure))))
        stacked = [
            torch.stack(entries)[: info.batch_size] for entries in zip(*(leaves for leaves, _ in found), strict=True)
        ]
        structure = found[0][1]
        return tree_unflatten(stacked, structure), tree_unflatten([0] * len(stacked), structure)

    return call


def differentiable(
    library: Library, name: str, setup: Callable[[Any, tuple[Any, ...], Any], None], differentiate: Callable[..., Any]
) -> Callable[..., Tensor]:
    """Registers what is the gradient of an operator of tensors that returns one, and returns how to call it."""
    torch.library.register_autograd(f"attndsl::{name}", differentiate, setup_context=setup, lib=library)
    operator = getattr(torch.ops.attndsl, name)

    class Function(torch.autograd.Function):
        generate_vmap_rule = True
        backward = staticmethod(differentiate)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, inputs, output)

        @staticmethod
        def forward(*call: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*call)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise no_forward_mode()

    def call(*given: Any) -> Tensor:
        found: Tensor = Function.apply(*given) if transformed() else operator(*given)
        return found

    return call


def no_forward_mode() -> Exception:
    return error(
        "A921", "attention has no derivative in forward mode here",
        help="use torch.func.grad, vjp or jacrev, and write it with torch operators where you need jvp or a Hessian",
    )  # fmt: skip
