"""Triton's passes from its GPU dialect to LLVM's, without the optimisations of LLVM.

These take a quarter of the time to a first result, and ptxas optimises what they leave. Kernels that are compiled so
say it (`KernelSource.plain`): it was measured that they lose nothing. Calls into libdevice are put in line all the
same. The order of passes is that of Triton 3.6, less those that share subexpressions: shared, they keep registers until
a last use.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Stage = Callable[[Any, dict[str, Any]], Any]


def source() -> bytes:
    """This file: a kernel that it made is not one that another version of it would make."""
    return Path(__file__).read_bytes()


def to_llvm(backend: Any, options: Any, lines: bool) -> Stage | None:
    """The stage "llir" of a backend of Triton's for NVIDIA's GPUs, None where Triton's own is to be taken: where its
    settings ask for checks or measurements in the compiled code.

    lines: whether machine code says of which lines it was made.
    """
    from triton import knobs

    compilation = knobs.compilation
    if backend.instrumentation or options.instrumentation_mode or compilation.instrumentation_mode:
        return None
    if compilation.enable_asan or compilation.dump_ir_extract_di_local_variables:
        return None

    def stage(module: Any, metadata: dict[str, Any]) -> str:
        return _to_llvm(module, metadata, backend, options, lines)

    return stage


def _to_llvm(module: Any, metadata: dict[str, Any], backend: Any, options: Any, lines: bool) -> str:
    """The text of LLVM's module of a kernel; what a launch has to know of it goes to the metadata."""
    from triton._C.libtriton import ir, llvm, nvidia, passes
    from triton.backends.nvidia import compiler

    capability = backend._parse_arch(options.arch)
    ptx_version = compiler.get_ptx_version_from_options(options, backend.target.arch)
    manager = ir.pass_manager(module.context)
    manager.enable_debug()
    gpu, hopper = nvidia.passes.ttgpuir, nvidia.passes.ttnvgpuir
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    gpu.add_allocate_shared_memory_nv(manager, capability, ptx_version)
    hopper.add_allocate_tensor_memory(manager)
    hopper.add_check_matmul_two_cta(manager)
    passes.ttgpuir.add_allocate_global_scratch_memory(manager)
    hopper.add_proxy_fence_insertion(manager, capability)
    gpu.add_to_llvmir(manager, capability, ptx_version)
    passes.common.add_canonicalizer(manager)
    hopper.add_nvgpu_to_llvm(manager)
    hopper.add_warp_specialize_to_llvm(manager)
    passes.common.add_symbol_dce(manager)
    passes.convert.add_nvvm_to_llvm(manager)
    if lines:
        passes.llvmir.add_di_scope(manager)
    manager.run(module, "make_llir")

    llvm.init_targets()
    # The context lives as long as the module.
    context = llvm.context()
    made = llvm.to_module(module, context)
    nvidia.set_short_ptr()
    chip = compiler.sm_arch_from_capability(capability)
    llvm.attach_datalayout(made, "nvptx64-nvidia-cuda", chip, compiler.get_features(options, backend.target.arch))
    if options.enable_reflect_ftz:
        nvidia.set_nvvm_reflect_ftz(made)
    if options.extern_libs and nvidia.has_extern_deps(made):
        llvm.link_extern_libs(made, [path for _, path in options.extern_libs])
    llvm.optimize_module(made, llvm.OPTIMIZE_O0)

    # Warp specialisation changes the number of warps.
    warps = module.get_int_attr("ttg.total-num-warps")
    if warps is not None:
        metadata["num_warps"] = warps
    metadata["shared"] = module.get_int_attr("ttg.shared")
    metadata["tmem_size"] = module.get_int_attr("ttg.tensor_memory_size")
    metadata["global_scratch_size"] = module.get_int_attr("ttg.global_scratch_memory_size")
    metadata["global_scratch_align"] = module.get_int_attr("ttg.global_scratch_memory_alignment")
    metadata["profile_scratch_size"] = module.get_int_attr("ttg.profile_scratch_memory_size") or 0
    metadata["profile_scratch_align"] = module.get_int_attr("ttg.profile_scratch_memory_alignment") or 1
    text = str(made)
    del made, context
    return text
