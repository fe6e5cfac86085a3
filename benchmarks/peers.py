"""attndsl and its peers behind one interface: build a call for a row, or say why there is none."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.rows import Inputs, Row, Sizes


class CannotRun(Exception):
    """Why a peer has no call for a row, in a few words."""


@dataclass(frozen=True, slots=True)
class Job:
    """One row at one size: q, k, v [B, H, N, D] and the inputs that the row reads."""

    row: Row
    sizes: Sizes
    inputs: Inputs
    q: Tensor
    k: Tensor
    v: Tensor


Attention = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Peer:
    """`build` makes the call whose forward is timed; its output is [B, H, N, D]."""

    name: str
    build: Callable[[Job], Attention]


def build_ours(job: Job) -> Attention:
    import attndsl

    attn: Any = attndsl.compile(job.row.text(job.sizes))
    return lambda: attn(job.q, job.k, job.v, **job.inputs)


def sdpa(backend: SDPBackend) -> Callable[[Job], Attention]:
    """SDPA pinned to one backend; these take no mask, so only the causal row is expressible."""

    def build(job: Job) -> Attention:
        if not job.row.causal or job.row.window is not None:
            raise CannotRun("not expressible")

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(job.q, job.k, job.v, is_causal=True)

        return call

    return build


def dense_mask(job: Job) -> Tensor:
    """The row's mask, bool, [N, N] or [H, N, N]."""
    h = torch.arange(job.sizes.heads if job.row.per_head else 1, device=job.sizes.device)[:, None, None]
    positions = torch.arange(job.sizes.n, device=job.sizes.device)
    mask = job.row.rule(job.sizes, job.inputs)(torch.zeros_like(h), h, positions[:, None], positions)
    return mask if job.row.per_head else mask.reshape(job.sizes.n, job.sizes.n)


def build_sdpa_mask(job: Job) -> Attention:
    """SDPA with the pattern as a dense boolean mask, whatever backend it picks."""
    mask = dense_mask(job)
    return lambda: scaled_dot_product_attention(job.q, job.k, job.v, attn_mask=mask)


def build_sdpa_causal(job: Job) -> Attention:
    """SDPA's plain causal attention, whatever the pattern: the cost of leaving the pattern out."""
    return lambda: scaled_dot_product_attention(job.q, job.k, job.v, is_causal=True)


def flex(backend: str | None) -> Callable[[Job], Attention]:
    """FlexAttention, compiled for this row with a block mask made outside the timing."""

    def build(job: Job) -> Attention:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if backend == "FLASH" and not has_module("flash_attn.cute"):
            raise CannotRun("not installed")
        prepare_dynamo()
        rule, n = job.row.rule(job.sizes, job.inputs), job.sizes.n
        heads = job.sizes.heads if job.row.per_head else None
        # Eager mask creation holds several int64 arrays of all the pairs.
        compiled = job.sizes.device.type == "cuda" and (heads or 1) * n * n > 2**30
        block_mask = create_block_mask(rule, None, heads, n, n, device=str(job.sizes.device), _compile=compiled)
        fn: Any = torch.compile(flex_attention, dynamic=False)
        options: Any = {"BACKEND": backend} if backend else None
        return lambda: fn(job.q, job.k, job.v, block_mask=block_mask, kernel_options=options)

    return build


def prepare_dynamo() -> None:
    """Forget earlier rows and lift the limit past which FlexAttention silently runs uncompiled."""
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.reset()
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = 10_000
    dynamo.accumulated_recompile_limit = 10_000
    functorch: Any = torch._functorch.config
    functorch.donated_buffer = False  # the backward is run many times over one forward


def build_fa4(job: Job) -> Attention:
    """flash-attn-4 called directly: with its own causal and window arguments, documents as sequences of a batch, other
    rows by a rule in its language and the blocks where it holds."""
    if not has_module("flash_attn.cute"):
        raise CannotRun("not installed")
    interface: Any = importlib.import_module("flash_attn.cute")
    if job.row.name == "documents":
        return fa4_documents(interface, job)
    q, k, v = (x.transpose(1, 2) for x in (job.q, job.k, job.v))
    if job.row.causal:
        window = (None, None) if job.row.window is None else (job.row.window - 1, 0)
        options: dict[str, Any] = {"causal": job.row.window is None, "window_size": window}
    else:
        masks: Any = importlib.import_module("benchmarks.fa4_masks")
        if job.row.name not in masks.RULES:
            raise CannotRun("not expressible")
        blocks = masks.blocks(job.row, job.sizes, job.inputs)
        options = {"mask_mod": masks.RULES[job.row.name](job.sizes), "block_sparse_tensors": blocks}
    return lambda: _output(interface.flash_attn_func(q, k, v, **options)).transpose(1, 2)


def fa4_documents(interface: Any, job: Job) -> Attention:
    """Documents of one row of tokens as sequences of their own lengths."""
    if job.sizes.batch != 1:
        raise CannotRun("documents of one batch entry")
    lengths = torch.bincount(job.inputs["doc"][0])
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    q, k, v = (x[0].transpose(0, 1) for x in (job.q, job.k, job.v))
    longest = int(lengths.max())

    def call() -> Tensor:
        out = interface.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
        )
        return _output(out).transpose(0, 1)[None]

    return call


def _output(result: Any) -> Tensor:
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


OURS = Peer("attndsl", build_ours)
GPU_PEERS: tuple[Peer, ...] = (
    Peer("Flex TRITON", flex("TRITON")),
    Peer("Flex FLASH", flex("FLASH")),
    Peer("FA4", build_fa4),
    Peer("SDPA flash", sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("SDPA cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION)),
)
CPU_PEERS: tuple[Peer, ...] = (Peer("SDPA mask", build_sdpa_mask), Peer("SDPA causal*", build_sdpa_causal))
CPU_FLEX = Peer("Flex CPU", flex(None))


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def add_site(folder: Path) -> None:
    """Put a folder of unpacked packages on this process's path, the CuTe DSL's inner folder first."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--site: there is no folder {folder}")
    sys.path[:0] = [str(folder / "nvidia_cutlass_dsl" / "dsl_packages"), str(folder)]
    importlib.invalidate_caches()


def versions() -> dict[str, str]:
    """Versions of everything that takes part, by name."""
    found = {"python": sys.version.split()[0]}
    for package in ("torch", "triton", "attndsl", "flash-attn-4", "nvidia-cutlass-dsl"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
