"""Every published system of the examples: a whole call, its choice and its gradients, beside dense attention.

A system is first checked at few tokens, output and every gradient, against the oracle with the same plans.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.dense import Verdict
from benchmarks.failures import short_reason
from benchmarks.published import SYSTEMS, Draw, Published
from benchmarks.timing import milliseconds

PATTERNS = Path(__file__).resolve().parent.parent / "examples" / "patterns"
# Tokens at which a system is compared with the oracle, whose gradients are dense and float64.
CHECKED = 1024
# Relative error (norms) of an output or gradient: of numbers and weights rounded to the dtype, and of float32's sums.
ROUNDINGS, SUMS = 2, 32 * torch.finfo(torch.float32).eps
# Of products, about the fastest dense kernels; of moved tensors, about the memory's.
TFLOPS, TBYTES = 660, 3.0
HEADER = [
    "system", "Hq/Hkv", "keys a row", "floor", "choice", "forward", "with gradients", "dense forward", "dense both",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """A system's attention and one call's tensors; `leaves`: those that get gradients."""

    system: Published
    attn: Any
    q: Tensor
    k: Tensor
    v: Tensor
    given: dict[str, Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, *self.given.values()) if x.requires_grad]

    def __call__(self, **more: Any) -> Tensor:
        found = self.attn(self.q, self.k, self.v, **self.given, **more)
        return found if isinstance(found, Tensor) else found[0]

    def plans(self) -> dict[str, Tensor]:
        if not self.attn.program.selections:
            return {}
        with torch.no_grad():
            found: dict[str, Tensor] = self.attn.plan(self.q, self.k, **self.given)
            return found

    def observed(self) -> object:
        return self.attn(self.q, self.k, self.v, return_observed=True, **self.given)


def make(system: Published, n: int, dim: int, dtype: torch.dtype, device: torch.device, group: bool = False) -> Call:
    """A call of n tokens; group: of one key head and the query heads that share it, or of four heads at most."""
    import attndsl

    sizes = system.sizes(n)
    share = system.heads // system.kv_heads
    kv_heads = 1 if group else system.kv_heads
    if group and any(isinstance(x, tuple) for x in sizes.values()):
        sizes = {name: x[:share] if isinstance(x, tuple) else x for name, x in sizes.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attndsl.PatternWarning)
        attn = attndsl.compile(PATTERNS / f"{system.name}.attn", **sizes)
    draw = Draw(n, kv_heads * share, kv_heads, dim, dtype, device, torch.Generator(device).manual_seed(0))
    q, k, v = draw.vectors(draw.heads), draw.vectors(kv_heads), draw.normal(1, kv_heads, n, dim)
    given = system.inputs(draw)
    if system.backward:
        learned = [given[decl.name] for decl in attn.program.inputs if decl.learnable]
        for x in (q, k, v, *learned):
            x.requires_grad_()
    return Call(system, attn, q, k, v, given)


def check(system: Published, dim: int, dtype: torch.dtype, device: torch.device, n: int = CHECKED) -> Verdict:
    """A call of n tokens against float64 with what it chose: the largest relative error of output and gradients."""
    call = make(system, n, dim, dtype, device, group=True)
    plans = call.plans()
    with torch.set_grad_enabled(system.backward):
        out = call(**({"plans": plans} if plans else {}))
    dout = torch.randn(out.shape, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)
    wide = {id(x): x.detach().double().requires_grad_() for x in call.leaves}
    exact = [wide.get(id(x), x) for x in (call.q, call.k, call.v)]
    given = {name: wide.get(id(x), x) for name, x in call.given.items()}
    right = call.attn.reference(*exact, **given, **({"plans": plans} if plans else {}))
    pairs = [(out, right)]
    if system.backward:
        ours = torch.autograd.grad(out, call.leaves, dout, materialize_grads=True)
        theirs = torch.autograd.grad(right, list(wide.values()), dout.double(), materialize_grads=True)
        pairs += zip(ours, theirs, strict=True)
    # What is zero, such as the gradient of the only member's share, is a difference of what the others are made of.
    sizes = [float(y.detach().norm()) for _, y in pairs]
    differences = [float((x.detach().double() - y.detach()).norm()) for x, y in pairs]
    errors = [d / (size if size > 1e-12 else max(*sizes, 1e-12)) for d, size in zip(differences, sizes, strict=True)]
    return Verdict(max(errors), ROUNDINGS * torch.finfo(dtype).eps * (dtype.itemsize < 4) + SUMS)


def first_call(name: str, n: int, dim: int, dtype: torch.dtype) -> str:
    """Compile what a system's row runs, in a process of its own; why it failed, or nothing."""
    system = next(x for x in SYSTEMS if x.name == name)
    try:
        for tokens, group in ((CHECKED, True), (n, False)):
            call = make(system, tokens, dim, dtype, torch.device("cuda"), group)
            call.plans()
            out = call()
            if system.backward:
                torch.autograd.grad(out, call.leaves, torch.ones_like(out), materialize_grads=True)
            if system.observes:
                call.observed()
    except Exception as error:  # noqa: BLE001 - the table meets it again, and shows it in its cell
        return short_reason(error)
    return ""


def warm(which: Sequence[Published], n: int, dim: int, dtype: torch.dtype, workers: int) -> list[str]:
    """Compile what the rows run, in so many processes, into the cache on disk; what failed there, in a line each."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        calls = {pool.submit(first_call, system.name, n, dim, dtype): system.name for system in which}
        return [f"{calls[call]}: {call.result()}" for call in as_completed(calls) if call.result()]


def run_systems(
    n: int, dim: int, dtype: torch.dtype, device: torch.device, which: Sequence[Published] = SYSTEMS
) -> Iterator[list[str]]:
    """A header, and a row for each system: milliseconds, and how many times longer dense attention takes.

    choice: what a call takes longer than one that is handed its plans, and its share of the whole.
    """
    yield HEADER
    dense: dict[tuple[int, bool], tuple[float, ...]] = {}
    for system in which:
        start = [system.name, f"{system.heads}/{system.kv_heads}"]
        try:
            yield [*start, *_cells(system, n, dim, dtype, device, dense)]
        except Exception as error:  # noqa: BLE001 - a row that cannot run says why
            yield [*start, short_reason(error)]


def _cells(
    system: Published, n: int, dim: int, dtype: torch.dtype, device: torch.device,
    dense: dict[tuple[int, bool], tuple[float, ...]],
) -> list[str]:  # fmt: skip
    verdict = check(system, dim, dtype, device)
    if not verdict.passed:
        return [f"FAILED: error {verdict.error:.1e}, allowed {verdict.allowed:.1e}"]
    call = make(system, n, dim, dtype, device)
    plans = call.plans()
    keys = system.seen(n, plans)
    floor = floor_ms(system, n, dim, keys, dtype)
    with torch.no_grad():
        forward = milliseconds(call.observed if system.observes else call, device)
        if not plans:
            choice = "-"
        elif system.chooses:
            choice = f"{milliseconds(call.plans, device):.2f} beside it"
        else:
            spent = max(0.0, forward - milliseconds(lambda: call(plans=plans), device))
            choice = f"{spent:.2f} ({100 * spent / forward:.0f} %)"
    cells = [f"{keys:.0f}", f"{floor:.3f}", choice, f"{forward:.2f}"]
    others = dense_of(system, n, dim, dtype, device, dense)
    both = "-"
    if system.backward:
        dout = torch.randn(1, system.heads, n, dim, device=device, dtype=dtype)
        ours = milliseconds(lambda: torch.autograd.grad(call(), call.leaves, dout, materialize_grads=True), device)
        both = f"{ours:.2f}"
        cells += [both, f"{others[0]:.2f} ({others[0] / forward:.2f}x)", f"{others[1]:.2f} ({others[1] / ours:.2f}x)"]
    else:
        cells += [both, f"{others[0]:.2f} ({others[0] / forward:.2f}x)", "-"]
    return cells


def floor_ms(system: Published, n: int, dim: int, keys: float, dtype: torch.dtype) -> float:
    """Milliseconds of the products of what is attended to, and of q, k, v and the output once."""
    size = torch.finfo(dtype).bits / 8
    work = 4 * dim * system.heads * n * keys
    moved = 2 * dim * n * (system.heads + system.kv_heads) * size
    return work / TFLOPS / 1e9 + moved / TBYTES / 1e9


def dense_of(
    system: Published, n: int, dim: int, dtype: torch.dtype, device: torch.device,
    known: dict[tuple[int, bool], tuple[float, ...]],
) -> tuple[float, ...]:  # fmt: skip
    """Dense attention of as many heads, causal where the system is, the faster of flash and cuDNN; both ways."""
    key = (system.heads, system.causal)
    if key not in known:
        q, k, v, dout = (torch.randn(1, system.heads, n, dim, device=device, dtype=dtype) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        found = []
        backends = (
            (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if device.type == "cuda" else (SDPBackend.MATH,)
        )
        for backend in backends:
            with sdpa_kernel(backend):

                def call() -> Tensor:
                    return scaled_dot_product_attention(q, k, v, is_causal=system.causal)

                with torch.no_grad():
                    forward = milliseconds(call, device)
                found.append((forward, milliseconds(lambda: torch.autograd.grad(call(), leaves, dout), device)))
        known[key] = min(x for x, _ in found), min(x for _, x in found)
    return known[key]
