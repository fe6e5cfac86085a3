"""The public interface: `compile`, the attention it returns, and `compare`. The only module that wires the parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from attndsl.diagnostics import PatternWarning, error
from attndsl.grammar import load, read_source
from attndsl.program import Program

if TYPE_CHECKING:
    from torch import Tensor


def compile(source: str | os.PathLike[str], *, name: str | None = None, **params: object) -> Attention:
    """Compile a pattern.

    >>> import attndsl
    >>> attn = attndsl.compile("causal & (window(512) | sink(4))")

    source: source text, or the path of a file (a string that ends in `.attn`, or any `os.PathLike`).
    name: which of a file's programs (default: its only attention, else its last pattern).
    params: values of the program's parameters; a table takes a nested sequence of numbers.

    Raises `PatternError` with every mistake found.
    """
    path = isinstance(source, os.PathLike) or source.endswith(".attn")
    text, origin = (source, "<pattern>")
    if path:
        found = read_source(source)
        text, origin = found.text, found.name
    assert isinstance(text, str)
    loaded = load(text, name=origin, select=name, params=params)
    return Attention(loaded.program)


class Attention:
    """A compiled attention. Call it on tensors; everything else looks inside."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._inputs = tuple(decl.name for decl in program.inputs)
        self._forward: Callable[..., Any] | None = None
        self._key = ""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: bool = False, backend: str = "auto",
        **inputs: Any,
    ) -> Any:
        """Attend.

        q: [B, Hq, Nq, D]; k: [B, Hkv, Nk, D]; v: [B, Hkv, Nk, Dv], one dtype (bfloat16, float16, float32; float64 on
        the CPU), Hq a multiple of Hkv, D and Dv multiples of 8 up to 256. Returns [B, Hq, Nq, Dv] in that dtype, and
        with `return_lse` the natural log-sum-exp too, float32 [B, Hq, Nq].

        scale: factor of q . k; default 1/sqrt(D), or the program's own. inputs: the program's inputs (tensors) and
        runtime arguments (ints), by name. Raises `PatternError` when they do not fit.
        """
        if self._forward is None:
            self._prepare()
        assert self._forward is not None
        if len(inputs) != len(self._inputs) + len(self.program.args):
            self._check_names(inputs)
        try:
            tensors = [inputs[name] for name in self._inputs]
            args = [inputs[name] for name in self.program.args]
        except KeyError:
            self._check_names(inputs)
            raise
        out, lse = self._forward(self._key, q, k, v, tensors, args, scale, backend)
        if not return_lse:
            return out
        if self.program.branch.weights is not None:
            raise error("A521", "`weights` replaces the softmax: there is no lse", self.program.branch.span)
        return out, lse

    def _prepare(self) -> None:
        """Import torch and make the operators know the program: once."""
        import torch

        from attndsl.codegen.cpu import forward_source as cpu_forward
        from attndsl.codegen.triton_forward import forward_source as triton_forward
        from attndsl.runtime import ops
        from attndsl.runtime.cache import cache_key
        from attndsl.runtime.engine import Engine, Generators

        self._key = cache_key("program", self.program)
        ops.register(self._key, Engine(self.program, Generators(triton_forward, cpu_forward)))
        self._forward = torch.ops.attndsl.forward

    def _check_names(self, given: Mapping[str, object]) -> None:
        """Raises `PatternError` for the first input that is missing, or that the program does not have."""
        wanted = (*self._inputs, *self.program.args)
        for name in wanted:
            if name not in given:
                raise error("A522", f"`{name}` is missing: this attention takes {', '.join(wanted)}", self._span(name))
        for name in given:
            if name not in wanted:
                known = f"it takes {', '.join(wanted)}" if wanted else "it takes no inputs"
                raise error("A522", f"`{name}` is not an input of this attention: {known}")

    def _span(self, name: str) -> Any:
        return next((decl.span for decl in self.program.inputs if decl.name == name), None)

    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: bool = False, **inputs: Any
    ) -> Any:
        """The oracle: what a call means, dense, in float64, written straight from the typed program. Slow."""
        from attndsl.runtime.reference import reference

        self._check_names(inputs)
        tensors = {name: inputs[name] for name in self._inputs}
        args = {name: inputs[name] for name in self.program.args}
        return reference(self.program, q, k, v, tensors, args, scale, return_lse)


__all__ = ["Attention", "PatternWarning", "compile"]
