# ruff: noqa: N802 (a driver's functions have the names that it gives them)
"""The launch through the driver, against a driver that only remembers, and against what compiled kernels declare."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from attndsl.diagnostics import PatternError
from attndsl.runtime import cuda
from attndsl.runtime import launcher as launching
from attndsl.runtime.build import Kernel, KernelSource
from attndsl.runtime.cuda import CudaError, LaunchConfig
from attndsl.runtime.launcher import MAX_MAPS, Descriptor, DirectLauncher, Slot, launcher
from tests.caching import python

FACTS = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 1, 64, 64], "fp4_padded": False}
METADATA: dict[str, Any] = {
    "name": "attend", "shared": 100_000, "num_warps": 4, "num_ctas": 1, "triton_version": "3.6.0",
    "launch_cooperative_grid": False, "launch_pdl": False, "global_scratch_size": 0, "profile_scratch_size": 0,
    "tensordesc_meta": [FACTS],
}  # fmt: skip
TILES = "tensordesc<bf16[1, 1, 64, 64]>"
TYPES = (
    ("q_ptr", "*bf16"), ("k_desc", TILES), ("table", "*i32"), ("stride", "i64"), ("scale", "fp32"), ("rows", "i32"),
    ("span", "i32"), ("page_table_ptr", "*i32"),
)  # fmt: skip


def kernel(target: str = "cuda:90", **changed: Any) -> Kernel:
    source = KernelSource("", "attend", TYPES, (), 4, 2)
    return Kernel(source, target, {"cubin": b"machine code"}, METADATA | changed)


class Driver:
    """Stands in for libcuda. Launches are read as a kernel with `TYPES` reads its parameters."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.maps: list[tuple[Any, ...]] = []
        self.statuses: list[int] = []
        self.bound = 0
        # The capture mode of this thread, global at first, and in which kernels were loaded.
        self.mode = 0
        self.loaded: list[int] = []
        self.limit, self.threads = 200_000, 1024

    def cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = None
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        context._obj.value = 77
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.bound += 1
        return 0

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        self.mode, mode._obj.value = mode._obj.value, self.mode
        return 0

    def cuModuleLoadData(self, module: Any, binary: bytes) -> int:
        assert binary == b"machine code"
        self.loaded.append(self.mode)
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        assert name == b"attend"
        function._obj.value = 4242
        return 0

    def cuFuncGetAttribute(self, found: Any, which: int, function: Any) -> int:
        found._obj.value = {0: self.threads, 1: 16}[which]
        return 0

    def cuDeviceGetAttribute(self, found: Any, which: int, device: int) -> int:
        found._obj.value = self.limit
        return 0

    def cuFuncSetCacheConfig(self, function: Any, config: int) -> int:
        return 0

    def cuFuncSetAttribute(self, function: Any, which: int, value: int) -> int:
        assert (which, value) == (8, self.limit - 16)
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:
        text._obj.value = b"out of luck"
        return 0

    def cuTensorMapEncodeTiled(self, where: int, kind: int, rank: int, address: int, *rest: Any) -> int:
        assert where % 64 == 0
        sizes, steps, box, ones, *codes = rest
        self.maps.append((kind, address, list(sizes), list(steps), list(box), list(ones), codes))
        ctypes.memset(where, len(self.maps) % 256, 128)
        return 0

    def cuLaunchKernelEx(self, config: int, function: int, parameters: int, extra: None) -> int:
        assert function == 4242
        if self.statuses and (status := self.statuses.pop(0)):
            return status
        given = LaunchConfig.from_address(config)
        places = iter((ctypes.c_void_p * 24).from_address(parameters))

        def value(type: Any) -> Any:
            return type.from_address(next(places)).value

        read: dict[str, Any] = {"grid": given.grid_x, "threads": given.block_x, "shared": given.shared}
        read["stream"] = given.stream
        for name, type in TYPES:
            if type == TILES:
                read[name] = ctypes.string_at(next(places), 128)
                read["shape"] = [value(ctypes.c_int32) for _ in range(4)]
                read["strides"] = [value(ctypes.c_int64) for _ in range(4)]
            else:
                wide = ctypes.c_int64 if type == "i64" else ctypes.c_uint64
                read[name] = value({"i32": ctypes.c_int32, "fp32": ctypes.c_float}.get(type, wide))
        assert [value(ctypes.c_uint64), value(ctypes.c_uint64)] == [0, 0], "scratch memory"
        self.launches.append(read)
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    found = Driver()
    for module in (cuda, launching):
        monkeypatch.setattr(module, "driver", lambda: found)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 900 + index, raising=False)
    yield found


def prepared(table: torch.Tensor, **changed: Any) -> Any:
    tiles = Descriptor(1, (2, 3, 70, 64), (13440, 4480, 64, 1), (1, 1, 64, 64), TILES)
    template = [
        Slot(0, "*bf16"), tiles, table, -(1 << 40), Slot(2, "fp32"), 70, Slot(3, "i32"), Slot(4, "*i32"),
    ]  # fmt: skip
    return launcher(kernel(**changed), 12, 1, template)


def test_a_kernel_reads_what_was_passed(driver: Driver) -> None:
    table, q, k = torch.arange(5, dtype=torch.int32), torch.zeros(3), torch.zeros(4)
    launch = prepared(table)
    assert isinstance(launch, DirectLauncher)
    launch((q, k, 0.125, -7, None))
    launch((k, q, -3.0, 9, table))
    launch((q, k, 1, 0, None))
    first, second, third = driver.launches
    common: dict[str, Any] = {
        "grid": 12,
        "threads": 128,
        "shared": 100_000,
        "stream": 901,
        "table": table.data_ptr(),
        "rows": 70,
    }
    common |= {"stride": -(1 << 40), "shape": [2, 3, 70, 64], "strides": [13440, 4480, 64, 1]}
    own = {"q_ptr": q.data_ptr(), "scale": 0.125, "span": -7, "page_table_ptr": 0, "k_desc": b"\x01" * 128}
    assert first == common | own
    own = {"q_ptr": k.data_ptr(), "scale": -3.0, "span": 9, "page_table_ptr": table.data_ptr(), "k_desc": b"\x02" * 128}
    assert second == common | own
    # The map of an address is kept.
    assert third["k_desc"] == b"\x01" * 128
    kind, address, *rest = driver.maps[0]
    assert (kind, address) == (9, k.data_ptr())
    assert rest == [[64, 70, 3, 2], [128, 8960, 26880], [64, 64, 1, 1], [1, 1, 1, 1], [0, 3, 2, 0]]


def test_many_addresses(driver: Driver) -> None:
    launch, table = prepared(torch.zeros(1, dtype=torch.int32)), torch.zeros(1)
    memory = torch.zeros(2 * MAX_MAPS)
    for i in range(2 * MAX_MAPS):
        launch((table, memory[i:], 1.0, 1, None))
        assert driver.launches[-1]["k_desc"] == bytes([(i + 1) % 256]) * 128


def test_launches_at_once_have_arguments_of_their_own(driver: Driver) -> None:
    launch, q, k = prepared(torch.zeros(1, dtype=torch.int32)), torch.zeros(3), torch.zeros(4)
    run = driver.cuLaunchKernelEx

    def run_late(*given: Any) -> int:
        # Another thread launches when this one's arguments are written, and not read yet.
        launch._run = run
        launch((k, q, -3.0, 9, k))
        return run(*given)

    launch._run = run_late
    launch((q, k, 0.125, -7, None))
    inner, outer = driver.launches
    assert (outer["q_ptr"], outer["scale"], outer["span"], outer["page_table_ptr"]) == (q.data_ptr(), 0.125, -7, 0)
    assert (inner["q_ptr"], inner["scale"], inner["span"]) == (k.data_ptr(), -3.0, 9)
    assert len(launch._free) == 2


def test_a_thread_without_a_context_gets_one(driver: Driver) -> None:
    launch, x = prepared(torch.zeros(1, dtype=torch.int32)), torch.zeros(1)
    driver.statuses, driver.bound = [201], 0
    launch((x, x, 1.0, 1, None))
    assert (len(driver.launches), driver.bound) == (1, 1)


def test_the_driver_refuses(driver: Driver) -> None:
    launch, x = prepared(torch.zeros(1, dtype=torch.int32)), torch.zeros(1)
    driver.statuses = [719]
    with pytest.raises(CudaError, match=r"CUDA error 719 \(out of luck\) while launching"):
        launch((x, x, 1.0, 1, None))
    driver.limit = 60_000
    with pytest.raises(CudaError, match="needs 100000 bytes of shared memory, and the device has 59984"):
        prepared(x.int())
    driver.threads = 64
    with pytest.raises(CudaError, match="128 threads a block, and its registers suffice for 64"):
        prepared(x.int())


def test_a_runtime_int_that_does_not_fit(driver: Driver) -> None:
    launch, x = prepared(torch.zeros(1, dtype=torch.int32)), torch.zeros(1)
    with pytest.raises(PatternError, match="A516"):
        launch((x, x, 1.0, 1 << 31, None))
    assert not driver.launches


OTHERS: list[dict[str, Any]] = [
    {"triton_version": "3.9.1"}, {"num_ctas": 2}, {"launch_pdl": True}, {"global_scratch_size": 8},
    {"tensordesc_meta": []}, {"target": "hip:gfx942"},
]  # fmt: skip


@pytest.mark.parametrize("changed", OTHERS, ids=lambda x: next(iter(x)))
def test_other_kernels_go_through_triton(changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("attndsl.runtime.launcher.TritonLauncher", lambda *given: seen.append(given))
    launcher(kernel(**changed), 1, 0, [])
    assert len(seen) == 1


CALL = """
import json, sys
import torch
import attndsl
from attndsl.runtime import call, engine, triton_launch
call.device_target = engine.device_target = lambda device: "cuda:90"
kernels = []
def launcher(kernel, grid, device, template):
    kernels.append(kernel)
    return lambda call: None
triton_launch.launcher = launcher
q, k, v = (torch.zeros(1, 2, 300, 64, dtype=torch.bfloat16) for _ in range(3))
attndsl.compile("causal & window(100)")(q, k, v, backend="triton")
kernel, = kernels
print(json.dumps([sorted(kernel.files), kernel.source.types, "triton" in sys.modules]))
if len(sys.argv) > 1:
    from attndsl.runtime.build import compile_kernel
    print(json.dumps(compile_kernel(kernel.source, kernel.target).text("ptx")))
"""


def test_a_kernel_from_the_cache_needs_nothing_of_triton(tmp_path: Path) -> None:
    settings = {"ATTNDSL_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": ""}
    cold = python(f"import sys; sys.argv += ['ptx']{CALL}", **settings).stdout.splitlines()
    files, types, imported = json.loads(cold[0])
    assert imported
    assert files == ["cubin", "json"]
    warm = json.loads(python(CALL, **settings).stdout)
    assert warm == [files, types, False]
    # The parameters that the compiled kernel declares are those that are laid out for it.
    entry = json.loads(cold[1]).partition(".entry")[2].partition("{")[0]
    declared = re.findall(r"\.param (.*) \S+_param_\d+(?:\[(\d+)\])?", entry)
    expected = []
    for _, type in types:
        if type.startswith("tensordesc"):
            expected += ["128", *["u32"] * 4, *["u64"] * 4]
        else:
            expected.append({"i32": "u32", "i64": "u64", "fp32": "f32"}.get(type, "u64"))
    assert [size or re.findall(r"[uf]\d+", type)[0] for type, size in declared] == [*expected, "u64", "u64"]
