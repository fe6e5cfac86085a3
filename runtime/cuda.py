"""The CUDA driver, called directly: a kernel loaded, described tensors, and a launch.

Triton's own launcher is C that it writes, compiles and loads for every list of parameters, after a driver module that
it compiles as well: half a second the first time, a dozen milliseconds from its cache, and a C compiler on every
machine. The driver's own functions need none of it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import byref, c_char, c_char_p, c_int, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any

_NO_CONTEXT = 201
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_MAX_SHARED, _SHARED_OF_A_BLOCK = 8, 97  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_…, CU_DEVICE_ATTRIBUTE_MAX_…_PER_BLOCK_OPTIN
_STATIC_SHARED, _MAX_THREADS = 1, 0
_PREFER_SHARED = 1
# More than this a kernel has to ask for.
_DEFAULT_SHARED = 48 * 1024
_MAP_BYTES, _MAP_ALIGNMENT = 128, 128
_L2_128B = 2
# Triton numbers element types as the device does; the host's functions number these differently.
_HOST_TYPES = {8: 10, 9: 8, 10: 9}


class CudaError(RuntimeError):
    """The driver refused."""


class LaunchConfig(ctypes.Structure):
    """`CUlaunchConfig`."""

    _fields_ = (
        ("grid_x", c_uint), ("grid_y", c_uint), ("grid_z", c_uint), ("block_x", c_uint), ("block_y", c_uint),
        ("block_z", c_uint), ("shared", c_uint), ("stream", c_void_p), ("attributes", c_void_p),
        ("attribute_count", c_uint),
    )  # fmt: skip


@functools.cache
def driver() -> Any:
    """The driver's library, with the types of what is called often."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p)
    library.cuModuleLoadData.argtypes = (c_void_p, c_char_p)
    library.cuModuleGetFunction.argtypes = (c_void_p, c_void_p, c_char_p)
    library.cuFuncGetAttribute.argtypes = (c_void_p, c_int, c_void_p)
    library.cuFuncSetAttribute.argtypes = (c_void_p, c_int, c_int)
    library.cuFuncSetCacheConfig.argtypes = (c_void_p, c_int)
    library.cuTensorMapEncodeTiled.argtypes = (
        c_void_p, c_int, c_uint32, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_int,
    )  # fmt: skip
    return library


def load_kernel(binary: bytes, name: str, shared: int, threads: int, device: int) -> int:
    """The handle of a kernel on a device, whose context must be current or none be.

    shared: bytes of dynamic shared memory that a launch will ask for; threads: those of a block.

    Raises `CudaError` where the device cannot hold the kernel. It stays loaded as long as the process lives.
    """
    cuda = driver()
    bind(device)
    module, function = c_void_p(), c_void_p()
    _check(cuda.cuModuleLoadData(byref(module), binary), "loading a kernel")
    _check(cuda.cuModuleGetFunction(byref(function), module, name.encode()), f"finding {name} in its module")

    def attribute(which: int) -> int:
        found = c_int()
        _check(cuda.cuFuncGetAttribute(byref(found), which, function), f"asking about {name}")
        return found.value

    if threads > (most := attribute(_MAX_THREADS)):
        raise CudaError(f"{name} runs {threads} threads a block, and its registers suffice for {most}")
    if shared > _DEFAULT_SHARED:
        limit = c_int()
        _check(cuda.cuDeviceGetAttribute(byref(limit), _SHARED_OF_A_BLOCK, device), "asking about the device")
        room = limit.value - attribute(_STATIC_SHARED)
        if shared > room:
            raise CudaError(f"{name} needs {shared} bytes of shared memory, and the device has {room}")
        _check(cuda.cuFuncSetCacheConfig(function, _PREFER_SHARED), f"configuring {name}")
        _check(cuda.cuFuncSetAttribute(function, _MAX_SHARED, room), f"configuring {name}")
    assert function.value is not None
    return function.value


@contextmanager
def unrestricted() -> Iterator[None]:
    """For this thread, also while some thread captures a graph: load kernels, take memory, wait for another stream.

    None of it is captured, and a capture that is not told of it would end in an error.
    """
    mode, exchange = c_int(_RELAXED), driver().cuThreadExchangeStreamCaptureMode
    _check(exchange(byref(mode)), "taking leave to load")
    try:
        yield
    finally:
        _check(exchange(byref(mode)), "giving it back")


def bind(device: int) -> None:
    """Make the device's context current on a thread that has none."""
    cuda = driver()
    context = c_void_p()
    _check(cuda.cuCtxGetCurrent(byref(context)), "asking for the context")
    if not context.value:
        _check(cuda.cuDevicePrimaryCtxRetain(byref(context), device), "opening the device")
        _check(cuda.cuCtxSetCurrent(context), "taking the device's context")


def launch_again(status: int, config: int, function: int, parameters: int, device: int) -> None:
    """After a launch that the driver refused: launch once more where the thread had no context.

    config, parameters: addresses of a `LaunchConfig` and of those of the arguments. Raises `CudaError`.
    """
    if status == _NO_CONTEXT:
        bind(device)
        status = driver().cuLaunchKernelEx(config, function, parameters, None)
    _check(status, "launching a kernel")


class TensorMap:
    """A description of a tensor and of the tiles to copy, for the hardware. Holds no reference to the tensor.

    facts: what Triton recorded of the tiles; shape, strides: of the tensor, in elements, the last stride 1;
    device: whose memory it lies in, and whose context a thread is given that has none, as autograd's may.
    """

    __slots__ = ("_memory", "address")

    def __init__(
        self, facts: Mapping[str, Any], address: int, shape: Sequence[int], strides: Sequence[int], device: int
    ) -> None:
        self._memory = (c_char * (_MAP_BYTES + _MAP_ALIGNMENT))()
        self.address = -(-ctypes.addressof(self._memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        rank, size = len(shape), int(facts["elem_size"])
        # The driver counts dimensions from the last.
        sizes = (c_uint64 * rank)(*reversed(shape))
        steps = (c_uint64 * max(1, rank - 1))(*(size * s for s in reversed(strides[:-1])))
        box = (c_uint32 * rank)(*reversed(facts["block_size"]))
        ones = (c_uint32 * rank)(*[1] * rank)
        kind = int(facts["elem_type"])
        given = (
            self.address, _HOST_TYPES.get(kind, kind), rank, address, sizes, steps, box, ones, 0,
            int(facts["swizzle"]), _L2_128B, 0,
        )  # fmt: skip
        status = driver().cuTensorMapEncodeTiled(*given)
        if status == _NO_CONTEXT:
            bind(device)
            status = driver().cuTensorMapEncodeTiled(*given)
        _check(status, f"describing a tensor {list(shape)} with strides {list(strides)}")


def _check(status: int, doing: str) -> None:
    if status:
        text = c_char_p()
        driver().cuGetErrorString(status, byref(text))
        raise CudaError(f"CUDA error {status} ({(text.value or b'unknown').decode()}) while {doing}")


__all__ = ["CudaError", "LaunchConfig", "TensorMap", "bind", "driver", "launch_again", "load_kernel", "unrestricted"]
