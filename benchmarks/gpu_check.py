"""`python -m benchmarks.gpu_check`: compare attndsl's kernels with dense attention on many programs and shapes.

Every call is judged as FlashAttention's tests judge theirs (benchmarks/dense.py), against this folder's own
float64 attention; `attn.reference`, the language's oracle, must agree with that too.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attndsl
from benchmarks.check_cases import CASES, DIMS, DTYPES, Case, Shape, random_shape
from benchmarks.composed_check import STRATEGIES, check_composed
from benchmarks.dense import Verdict, attend, judge
from benchmarks.failures import Failure, short_reason
from benchmarks.report import render

GRADIENTS = ("dq", "dk", "dv")
ORACLE_TOLERANCE = 1e-9
# What a backend that was asked for says of a program that it has no kernel for.
REFUSED = "A510"


def tensors(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v; strided ones lie as [B, N, H, D + 8] in memory, so no dimension is where it is expected."""

    def one(heads: int, length: int, dim: int) -> Tensor:
        if shape.strided:
            whole = torch.randn(shape.batch, length, heads, dim + 8, generator=generator)
            return whole.to(device, shape.dtype)[..., :dim].transpose(1, 2)
        return torch.randn(shape.batch, heads, length, dim, generator=generator).to(device, shape.dtype)

    return (
        one(shape.heads, shape.rows, shape.dim),
        one(shape.kv_heads, shape.k_len, shape.dim),
        one(shape.kv_heads, shape.k_len, shape.v_dim),
    )


def dense(
    case: Case, shape: Shape, inputs: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Output and lse of the case by plain attention in `dtype`, from the case's own rule."""
    device = q.device
    b = torch.arange(shape.batch, device=device)[:, None, None, None]
    h = torch.arange(shape.heads, device=device)[:, None, None]
    q_pos = torch.arange(shape.k_len - shape.rows, shape.k_len, device=device)[:, None]
    k_pos = torch.arange(shape.k_len, device=device)
    # Rows before the first token see nothing, and their position may index nothing.
    seen = torch.clamp(q_pos, min=0)
    allowed = case.rule(inputs)(b, h, seen, k_pos) & (q_pos >= 0)
    score = case.score(inputs) if case.score is not None else None
    groups = shape.heads // shape.kv_heads
    sink = inputs["sinks"][:, None, None] if "sinks" in inputs else None
    return attend(
        q,
        k.repeat_interleave(groups, 1),
        v.repeat_interleave(groups, 1),
        allowed.expand(shape.batch, shape.heads, shape.rows, shape.k_len),
        dtype,
        (lambda s: score(s, h, q_pos, k_pos)) if score is not None else None,
        sink,
    )


def gradients(
    case: Case, shape: Shape, inputs: dict[str, Tensor], qkv: Sequence[Tensor], dout: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
    out, _ = dense(case, shape, inputs, leaves[0], leaves[1], leaves[2], dtype)
    return torch.autograd.grad(out, leaves, dout.to(dtype))


def check(
    case: Case, shape: Shape, device: torch.device, backward: bool, seed: int, backend: str = "auto"
) -> list[Failure]:
    """Run one call and return what was wrong with it: nothing where the backend asked for refuses it."""
    generator = torch.Generator().manual_seed(seed)
    qkv = tensors(shape, device, generator)
    inputs = {name: x.to(device) for name, x in case.inputs(shape, generator).items()}
    failures: list[Failure] = []

    def expect(what: str, verdict: Verdict) -> None:
        if not verdict.passed:
            failures.append(Failure(case.name, shape, what, f"{verdict.error:.2e} > {verdict.allowed:.2e}"))

    try:
        attn: Any = attndsl.compile(case.text)
        exact, exact_lse = dense(case, shape, inputs, *qkv, torch.float64)
        plain, plain_lse = dense(case, shape, inputs, *qkv, shape.dtype)
        oracle = attn.reference(*qkv, **inputs)
        expect(
            "oracle", Verdict(float((oracle - exact).abs().max()), ORACLE_TOLERANCE * (1 + float(exact.abs().max())))
        )
        leaves = tuple(x.detach().requires_grad_(backward) for x in qkv)
        out, lse = attn(*leaves, return_lse=True, backend=backend, **inputs)
        if out.dtype != shape.dtype or lse.dtype != torch.float32:
            failures.append(Failure(case.name, shape, "dtype", f"out {out.dtype}, lse {lse.dtype}"))
        expect("out", judge(out.detach(), exact, plain))
        expect("lse", judge_lse(lse.detach(), exact_lse, plain_lse))
        if backward:
            dout = torch.randn(out.shape, generator=generator).to(out)
            ours = torch.autograd.grad(out, leaves, dout)
            right = gradients(case, shape, inputs, qkv, dout, torch.float64)
            rough = gradients(case, shape, inputs, qkv, dout, shape.dtype)
            for name, g, e, p in zip(GRADIENTS, ours, right, rough, strict=True):
                expect(name, judge(g, e, p, 0.0 if name == "dv" else cancelled(qkv, dout)))
    except attndsl.PatternError as error:
        if backend == "auto" or error.diagnostics[0].code != REFUSED:
            failures.append(Failure(case.name, shape, "raised", short_reason(error)))
    except Exception as error:  # noqa: BLE001 - every kind of failure is a line of the table
        failures.append(Failure(case.name, shape, "raised", short_reason(error)))
    return failures


def cancelled(qkv: Sequence[Tensor], dout: Tensor) -> float:
    """How large a score's gradient is before the row's mean is taken from it, times the largest entry of q or k."""
    q, k, v = (x.double() for x in qkv)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    scores = float((dout.double() @ values.mT).abs().max())
    return scores * max(float(q.abs().max()), float(k.abs().max())) / math.sqrt(q.shape[-1])


def judge_lse(lse: Tensor, exact: Tensor, plain: Tensor) -> Verdict:
    """Judge the lse; where a row is empty it must be -inf exactly."""
    empty = torch.isneginf(exact)
    if not torch.equal(torch.isneginf(lse), empty):
        return Verdict(float("inf"), 0.0)
    return judge(lse.masked_fill(empty, 0.0), exact.masked_fill(empty, 0.0), plain.double().masked_fill(empty, 0.0))


def plan(seed: int, shapes: int) -> Iterator[tuple[Case, Shape]]:
    """Every (case, dim, dtype) in a random order, each at a few shapes: an early stop still covers all of them."""
    generator = torch.Generator().manual_seed(seed)
    groups = list(itertools.product(CASES, DIMS, DTYPES))
    for index in torch.randperm(len(groups), generator=generator).tolist():
        case, dim, dtype = groups[index]
        for _ in range(shapes):
            yield case, random_shape(case, dim, dtype, generator)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    top.add_argument("--seconds", type=float, default=240.0, help="stop after this long")
    top.add_argument("--shapes", type=int, default=4, help="shapes for each pattern, head dimension and dtype")
    top.add_argument("--only", default="", help="only cases whose name contains this text")
    top.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in DTYPES])
    top.add_argument("--dim", type=int, choices=DIMS)
    top.add_argument("--composed", type=int, default=60, help="random composed programs, run first; 0 for none")
    top.add_argument("--composed-seconds", type=float, default=90.0, help="stop these after this long")
    top.add_argument("--backward", action="store_true", help="check the gradients too")
    top.add_argument(
        "--backend", choices=("auto", "triton", "gluon", "cpu"), default="auto", help="of the fixed programs"
    )
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--workers", type=int, default=1, help="processes that share the calls: most of the time compiles")
    top.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return top


def wanted(case: Case, shape: Shape, options: argparse.Namespace) -> bool:
    dtype = options.dtype in (None, str(shape.dtype).removeprefix("torch."))
    return options.only in case.name and dtype and options.dim in (None, shape.dim)


@dataclass(frozen=True, slots=True)
class Found:
    """What checks gave: calls planned, run, failed, and all that was wrong with these."""

    planned: int = 0
    run: int = 0
    failed: int = 0
    failures: tuple[Failure, ...] = ()

    def __add__(self, other: Found) -> Found:
        return Found(
            self.planned + other.planned,
            self.run + other.run,
            self.failed + other.failed,
            self.failures + other.failures,
        )


def check_share(options: argparse.Namespace, share: tuple[int, int]) -> Found:
    """Check one of so many equal parts of the calls, as many as the time allows."""
    device = torch.device(options.device)
    start = time.perf_counter()
    part, parts = share
    total = Found()
    if options.composed and STRATEGIES.exists():
        run, failures = check_composed(options.composed, options.seed, device, start + options.composed_seconds, share)
        total += Found(len(range(part, options.composed, parts)), run, len(failures), tuple(failures))
    for number, (case, shape) in enumerate(plan(options.seed, options.shapes)):
        if number % parts != part or not wanted(case, shape, options):
            continue
        if time.perf_counter() >= start + options.seconds:
            total += Found(planned=1)
            continue
        found = check(case, shape, device, options.backward, options.seed + number, options.backend)
        total += Found(1, 1, bool(found), tuple(found))
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    shares = [(part, options.workers) for part in range(options.workers)]
    if len(shares) == 1:
        total = check_share(options, shares[0])
    else:
        with ProcessPoolExecutor(len(shares), multiprocessing.get_context("spawn")) as pool:
            total = sum(pool.map(check_share, [options] * len(shares), shares), Found())
    if total.failures:
        table = [["program", "call", "what", "detail"]]
        table += [[" ".join(f.program.split())[:70], str(f.shape), f.what, f.detail] for f in total.failures]
        print(render(table, markdown=False))
    if total.run < total.planned:
        print(f"out of time: {total.planned - total.run} of {total.planned} calls were not run")
    print(f"{total.run - total.failed} passed, {total.failed} failed")
    return 1 if total.failed or not total.run else 0


if __name__ == "__main__":
    sys.exit(main())
