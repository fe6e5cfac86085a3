"""Starting a compiled kernel: what does not differ from call to call is laid out once, and the rest written into it.

On NVIDIA GPUs a launch is one call of the driver (`cuda.py`) on arguments in memory that is kept. That is how one
version's compiled kernels take their parameters; under others, and on AMD's, a launch goes through Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from ctypes import addressof, c_float, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attndsl.diagnostics import error
from attndsl.runtime.build import Kernel, triton_kernel
from attndsl.runtime.cuda import LaunchConfig, TensorMap, driver, launch_again, load_kernel, unrestricted

# Addresses whose tensor maps are kept: a training loop reuses a handful.
MAX_MAPS = 256
DIRECT_VERSIONS = ("3.6.",)
Launch = Callable[[Sequence[Any]], None]


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


def launcher(kernel: Kernel, grid: int, device: int, template: Sequence[Any]) -> Launch:
    """A function of a call's values that launches one kernel on one device, on its current stream, with one grid.

    template: the value of each parameter, a constant, a `Slot` or a `Descriptor`.
    """
    return (DirectLauncher if _is_direct(kernel) else TritonLauncher)(kernel, grid, device, template)


def _is_direct(kernel: Kernel) -> bool:
    """Whether the kernel takes parameters as this module lays them out: as declared, a descriptor as a tensor map with
    its shape and strides behind it, and two addresses of scratch memory that it does not use."""
    facts = kernel.metadata
    needs = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    described = sum(type.startswith("tensordesc") for _, type in kernel.source.types)
    return (
        kernel.target.startswith("cuda:")
        and facts["triton_version"].startswith(DIRECT_VERSIONS)
        and facts["num_ctas"] == 1
        and not any(facts.get(name) for name in needs)
        and len(facts.get("tensordesc_meta") or ()) == described
    )


class DirectLauncher:
    """Launches through the driver. Every argument has eight bytes, of which the kernel reads what its type has."""

    def __init__(self, kernel: Kernel, grid: int, device: int, template: Sequence[Any]) -> None:
        facts = kernel.metadata
        threads = 32 * facts["num_warps"]
        with torch.cuda.device(device), unrestricted():
            self._function = load_kernel(kernel.binary, facts["name"], facts["shared"], threads, device)
        self._device = device
        # Tables, which a kernel reads as long as it is launched.
        self._held = [x for x in template if isinstance(x, Tensor)]
        pointers: list[tuple[int, int]] = []
        numbers: list[tuple[int, int, bool]] = []
        floats: list[tuple[int, int]] = []
        copies: list[tuple[int, int, Mapping[str, Any], Descriptor]] = []
        constants: list[int] = []
        described = iter(facts.get("tensordesc_meta") or ())
        for x in template:
            place = len(constants)
            match x:
                case Slot(index=index, type=type):
                    # A float lies in the first half of its eight bytes.
                    if type.startswith("fp"):
                        floats.append((2 * place, index))
                    elif type.startswith("*"):
                        pointers.append((place, index))
                    else:
                        numbers.append((place, index, type.startswith("u")))
                    constants.append(0)
                case Descriptor(index=index):
                    copies.append((place, index, next(described), x))
                    constants += [0, *x.shape, *x.strides]
                case Tensor():
                    constants.append(x.data_ptr())
                case _:
                    constants.append(int(x))
        self._pointers, self._numbers, self._floats = tuple(pointers), tuple(numbers), tuple(floats)
        self._copies = tuple(copies)
        self._constants = [*constants, 0, 0]
        self._config = (grid, 1, 1, threads, 1, 1, facts["shared"], None, None, 0)
        self._run = driver().cuLaunchKernelEx
        # Memory for arguments that no launch is using: one that another thread starts meanwhile needs its own.
        self._free = [self._arguments()]

    def _arguments(self) -> tuple[Any, Any, Any, Any, LaunchConfig, int, int]:
        """Memory for the arguments of one launch: as integers, as floats, where each lies, tensor maps, and the
        configuration; the addresses of where they lie and of the last."""
        cells = (c_uint64 * len(self._constants))(*self._constants)
        first = addressof(cells)
        parameters = (c_void_p * len(cells))(*(first + 8 * i for i in range(len(cells))))
        config = LaunchConfig(*self._config)
        # As integers they take ctypes no conversion.
        at = addressof(parameters), addressof(config)
        copies = tuple((place, index, _Maps(facts, x, self._device)) for place, index, facts, x in self._copies)
        return cells, (c_float * (2 * len(cells))).from_buffer(cells), parameters, copies, config, *at

    def __call__(self, call: Sequence[Any]) -> None:
        """Launch. `call`: the values that slots and descriptors refer to."""
        device, free = self._device, self._free
        if torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                self(call)
            return
        try:
            arguments = free.pop()
        except IndexError:
            arguments = self._arguments()
        cells, reals, parameters, copies, config, parameters_at, config_at = arguments
        for place, index in self._pointers:
            x = call[index]
            cells[place] = 0 if x is None else x.data_ptr()
        for place, index, maps in copies:
            parameters[place] = maps[call[index].data_ptr()]
        for place, index in self._floats:
            reals[place] = call[index]
        for place, index, unsigned in self._numbers:
            cells[place] = _int32(call[index], unsigned)
        config.stream = torch._C._cuda_getCurrentRawStream(device)
        if status := self._run(config_at, self._function, parameters_at, None):
            launch_again(status, config_at, self._function, parameters_at, device)
        free.append(arguments)


class _Maps(dict[int, int]):
    """Where the tensor map of each address lies. Only shapes and the address matter, so it holds no tensor."""

    def __init__(self, facts: Mapping[str, Any], descriptor: Descriptor, device: int) -> None:
        self._facts, self._descriptor, self._device = facts, descriptor, device
        self._memory: list[TensorMap] = []

    def __missing__(self, address: int) -> int:
        if len(self) >= MAX_MAPS:
            self.clear()
            self._memory.clear()
        described = self._descriptor
        made = TensorMap(self._facts, address, described.shape, described.strides, self._device)
        self._memory.append(made)
        self[address] = made.address
        return made.address


def _int32(x: int, unsigned: bool) -> int:
    """A runtime argument, or dropout's threshold (which is `unsigned`), as a kernel takes it."""
    if (0 if unsigned else -(1 << 31)) <= x < 1 << (32 if unsigned else 31):
        return x
    raise error("A516", f"a runtime int has 32 bits, and {x} does not fit")


class _Region:
    """What Triton's launcher reads of a `TensorDescriptor`, without the checks that the latter makes at every call."""

    __slots__ = ("base", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, base: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.base, self.shape, self.strides = base, shape, strides


class TritonLauncher:
    """Launches through Triton's public path."""

    def __init__(self, kernel: Kernel, grid: int, device: int, template: Sequence[Any]) -> None:
        self._kernel, self._grid, self._device = triton_kernel(kernel), grid, device
        self._template = tuple(template)
        with torch.cuda.device(device), unrestricted() if kernel.target.startswith("cuda:") else nullcontext():
            self._run = self._kernel.run  # loads the kernel on the current device

    def __call__(self, call: Sequence[Any]) -> None:
        """Launch. `call`: the values that slots and descriptors refer to."""
        kernel = self._kernel

        def value(x: Any) -> Any:
            if isinstance(x, Descriptor):
                return _Region(call[x.index], x.shape, x.strides)
            return call[x.index] if isinstance(x, Slot) else x

        with torch.cuda.device(self._device):
            stream = torch._C._cuda_getCurrentRawStream(self._device)
            self._run(
                self._grid, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None,
                *map(value, self._template),
            )  # fmt: skip


__all__ = ["Descriptor", "DirectLauncher", "Launch", "Slot", "TritonLauncher", "launcher"]
