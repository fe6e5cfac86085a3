"""What inputs hold at the tokens of a pool's sequences, kept beside its keys: rows and evictions read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.diagnostics import error
from attndsl.program import Axis, Dim, Program, Read, Type, Var


class TokenInputs:
    """`tensors`: by name, as the program declares them, with room for all tokens; of the dtype, and with as many heads,
    as the first tokens came with. They may be changed in place, so long as what is not read stays so."""

    def __init__(self, program: Program, names: Sequence[str], batch: int, capacity: int) -> None:
        """Raises `PatternError` (A568) for what is no input that each token of each sequence has."""
        self.program, self.names, self.batch, self.capacity = program, names, batch, capacity
        self.tensors: dict[str, Tensor] = {}
        self._wide: dict[str, Tensor] = {}
        known = {decl.name: decl.dims for decl in program.inputs if decl.derivation is None}
        for name in names:
            dims = known.get(name, ())
            if len(dims) < 2 or dims[0] != Dim(Axis.B) or dims[-1] != Dim(Axis.K):
                raise error(
                    "A568", f"`{name}` is not kept with tokens: it is no input [b, …, k]", program.span,
                    help="keep what each token of each sequence has, and hand the rest to `decode`",
                )  # fmt: skip

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors.values())

    def check(self, given: Mapping[str, Tensor], batch: int, new: int) -> None:
        """Raises `PatternError` (A568) unless these are what so many new tokens of as many sequences hold."""
        for name in dict.fromkeys((*self.names, *given)):
            x, fits = given.get(name), False
            if x is not None and name in self.names and x.dim() == len(self.program.input(name).dims):
                kept = self._wide.get(name)
                fits = (x.shape[0], x.shape[-1]) == (batch, new) and (kept is None or x.shape[1:-1] == kept.shape[1:-1])
            if x is None or not fits:
                said = "nothing" if x is None else f"{list(x.shape)}"
                raise error(
                    "A568", f"append was given {said} for `{name}`, with {new} tokens of {batch} sequences",
                    help="pass what each new token holds, [b, …, n], of every input in `at_tokens`, and of no other",
                )  # fmt: skip

    def write(self, given: Mapping[str, Tensor], rows: slice | Tensor, at: Tensor, fits: Tensor | None) -> None:
        """Put what the new tokens of sequences hold where they stand, at [b, n]; those that do not fit go to a place
        beside."""
        at = at.clamp(0, self.capacity).long()
        if fits is not None:
            at = torch.where(fits[:, None], at, self.capacity)
        for name, x in given.items():
            if name not in self._wide:
                whole = self._dtype(name, x)
                made = torch.zeros(self.batch, *x.shape[1:-1], self.capacity + 1, dtype=whole, device=at.device)
                self._wide[name], self.tensors[name] = made, made[..., : self.capacity]
            wide = self._wide[name]
            here = wide[rows]
            places = at.view(len(at), *[1] * (x.dim() - 2), -1).expand(x.shape)
            wide[rows] = here.scatter(-1, places, x.to(wide.dtype))

    def _dtype(self, name: str, x: Tensor) -> torch.dtype:
        wide = self.program.input(name).type is Type.INT and x.dtype == torch.int64
        return torch.int32 if wide else x.dtype

    def arrays(self, b: int, length: int) -> dict[str, NDArray[Any]]:
        """What the tokens of a sequence hold, as arrays. Waits for the device."""
        return {name: np.asarray(x[b : b + 1, ..., :length].cpu().numpy()) for name, x in self.tensors.items()}

    def by_lead(self, read: Read, rows: slice | Tensor) -> Tensor:
        """What such a read gives at all keys of sequences, int64 [b, h, g, keys], of dimensions that it lacks 1."""
        x, names = self.tensors[read.input][rows].to(torch.int64), [e.name for e in read.index if isinstance(e, Var)]
        sizes = dict(zip(names, x.shape, strict=True))
        x = x.permute([names.index(name) for name in "bhgk" if name in sizes])
        return x.reshape([sizes.get(name, 1) for name in "bhgk"])
