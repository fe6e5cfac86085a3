"""Starting a compiled kernel: Triton's own launch, less what need not be done again at every call.

Triton's launcher encodes a tensor map for every descriptor at every launch, and looks through all arguments for
them. Here the arguments are laid out once, and the map of an address is kept. That reaches into one version's
launcher; under other versions the launch goes through Triton's public path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# Addresses whose tensor maps are kept: a training loop reuses a handful.
MAX_MAPS = 256
FAST_VERSIONS = ("3.6.",)


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter that differs from call to call: its place among the call's values."""

    index: int
    type: str


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A parameter that is a tensor descriptor of one of the call's tensors."""

    index: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    type: str


class _Region:
    """What Triton's launcher reads of a `TensorDescriptor`, without the checks that the latter makes at every call."""

    __slots__ = ("base", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, base: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.base, self.shape, self.strides = base, shape, strides


class Launcher:
    """Launches one kernel on one device with one grid. `template`: the value of each parameter, a constant, a `Slot` or
    a `Descriptor`."""

    def __init__(self, kernel: Any, grid: int, device: int, template: Sequence[Any]) -> None:
        self._kernel, self._grid, self._device = kernel, grid, device
        with torch.cuda.device(device):
            run = kernel.run  # loads the kernel on the current device
        raw = _raw_launch(run) if triton.__version__.startswith(FAST_VERSIONS) else None
        self._raw: Any = raw and raw[0]
        self._encode: Any = raw and raw[1]
        self._maps: dict[tuple[int, int], Any] = {}
        values: list[Any] = []
        self._slots: list[tuple[int, int]] = []
        self._descriptors: list[tuple[int, int, Descriptor]] = []
        for x in template:
            if isinstance(x, Slot):
                self._slots.append((len(values), x.index))
            elif isinstance(x, Descriptor):
                self._descriptors.append((len(values), len(self._descriptors), x))
                if raw is not None:
                    values += [None, *x.shape, *x.strides]
                    continue
            values.append(x)
        self._values = values
        self._options = (run.launch_cooperative_grid, run.launch_pdl, None, None) if raw is not None else ()

    def __call__(self, call: Sequence[Any]) -> None:
        """Launch on the device's current stream. `call`: the values that slots and descriptors refer to."""
        if torch._C._cuda_getDevice() == self._device:
            self._launch(call)
        else:
            with torch.cuda.device(self._device):
                self._launch(call)

    def _launch(self, call: Sequence[Any]) -> None:
        values = self._values.copy()
        for position, index in self._slots:
            values[position] = call[index]
        kernel, stream = self._kernel, torch._C._cuda_getCurrentRawStream(self._device)
        if self._raw is None:
            for position, _, x in self._descriptors:
                values[position] = _Region(call[x.index], x.shape, x.strides)
            kernel.run(self._grid, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *values)
            return
        for position, number, x in self._descriptors:
            values[position] = self._map(number, x, call[x.index])
        self._raw(
            self._grid, 1, 1, stream, kernel.function, *self._options, kernel.packed_metadata, None, None, None, *values
        )

    def _map(self, number: int, descriptor: Descriptor, tensor: Tensor) -> Any:
        """The tensor map of an address. It holds no reference to the tensor: only shapes and the address matter."""
        key = (number, tensor.data_ptr())
        found = self._maps.get(key)
        if found is None:
            if len(self._maps) >= MAX_MAPS:
                self._maps.clear()
            assert self._encode is not None
            found = self._maps[key] = self._encode(_Region(tensor, descriptor.shape, descriptor.strides), number)
        return found


def _raw_launch(run: Any) -> tuple[Any, Any] | None:
    """The launcher inside Triton's wrapper and a function that encodes its descriptors, where they are as known."""
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    launch = run.launch
    if getattr(launch, "__closure__", None) is None:
        return launch, None  # No descriptors: the wrapper was left out.
    cells = dict(zip(launch.__code__.co_freevars, (cell.cell_contents for cell in launch.__closure__), strict=True))
    make = launch.__globals__.get("make_tensordesc_arg")
    if not {"launcher", "tensordesc_meta"} <= cells.keys() or make is None:
        return None
    metadata = cells["tensordesc_meta"]
    return cells["launcher"], lambda region, number: make(region, metadata[number])[0]
