"""`python -m benchmarks` and a command: ours and every installed peer side by side."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.compile_time import PATTERN, run_compile
from benchmarks.decode import CONTENDERS, DecodeSizes, run_decode
from benchmarks.memory import run_growth, run_memory
from benchmarks.overhead import run_overhead
from benchmarks.planning import run_planning
from benchmarks.published import SYSTEMS
from benchmarks.quest import run_quest
from benchmarks.report import Report, heading, render, timing_table
from benchmarks.routed import run_routed, systems
from benchmarks.rows import CPU_ROWS, GPU_ROWS, Sizes, select
from benchmarks.serving import run_serving
from benchmarks.systems import run_systems
from benchmarks.systems import warm as warm_systems
from benchmarks.tables import run_table
from benchmarks.warm import warm

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parser() -> argparse.ArgumentParser:
    """The command line; sizes left out take the command's defaults."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    top.add_argument(
        "command",
        choices=(
            "forward",
            "backward",
            "memory",
            "growth",
            "decode",
            "quest",
            "serving",
            "routed",
            "systems",
            "cpu",
            "overhead",
            "compile",
            "planning",
        ),
    )
    top.add_argument("--rows", help="comma-separated rows of benchmarks/rows.py; planning, systems: examples")
    top.add_argument("--peers", help="comma-separated peers; `none` for ours alone")
    top.add_argument("--batch", type=int, default=1)
    top.add_argument("--heads", type=int)
    top.add_argument("--n", type=int, help="tokens")
    top.add_argument("--dim", type=int)
    top.add_argument("--dtype", choices=tuple(DTYPES))
    top.add_argument("--out", type=Path, help="write the results here as JSON, after every row")
    top.add_argument("--md", action="store_true", help="print Markdown")
    top.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no further row is started")
    top.add_argument("--site", type=Path, help="folder with unpacked flash-attn-4 packages, for this process only")
    top.add_argument("--flex", action="store_true", help="cpu: also FlexAttention, which needs a C++ compiler")
    top.add_argument("--workers", type=int, default=0, help="compile in so many processes first, then time")
    top.add_argument("--pattern", default=PATTERN, help="compile: the program that is compiled")
    top.add_argument("--backward", action="store_true", help="compile: to the first gradients")
    return top


def sizes_of(options: argparse.Namespace) -> Sizes:
    cpu = options.command == "cpu"
    heads, n, dim, dtype = (8, 8192, 64, "fp32") if cpu else (16, 16384, 128, "bf16")
    return Sizes(
        options.batch,
        options.heads or heads,
        options.n or n,
        options.dim or dim,
        DTYPES[options.dtype or dtype],
        torch.device("cpu" if cpu else "cuda"),
    )


def peers_of(options: argparse.Namespace) -> tuple[peers.Peer, ...]:
    """The peers of a table.

    Raises KeyError, naming the peers there are, for one that does not exist.
    """
    cpu_peers = (*peers.CPU_PEERS, peers.CPU_FLEX) if options.flex else peers.CPU_PEERS
    known = {peer.name: peer for peer in (cpu_peers if options.command == "cpu" else peers.GPU_PEERS)}
    if options.peers is None:
        return tuple(known.values())
    names = [] if options.peers == "none" else options.peers.split(",")
    if missing := [name for name in names if name not in known]:
        raise KeyError(f"no peer called {', '.join(missing)}; there are {', '.join(known)}")
    return tuple(known[name] for name in names)


def timing(options: argparse.Namespace, command: str) -> str:
    default = CPU_ROWS if options.command == "cpu" else GPU_ROWS
    rows, others, sizes = select(options.rows, default), peers_of(options), sizes_of(options)
    backward = options.command == "backward"
    if options.workers:
        for failure in warm(rows, others, sizes, backward, options.workers, options.site):
            print(failure, file=sys.stderr)
    report = run_table(
        rows,
        others,
        sizes,
        backward=backward,
        command=command,
        out=options.out,
        budget_s=options.budget,
    )
    notes = "\n\n\\* plain causal attention: another function, shown as the cost of leaving the pattern out"
    text = f"{heading(report)}\n\n{render(timing_table(report), options.md)}"
    return text + notes if options.command == "cpu" else text


def memory(options: argparse.Namespace, command: str) -> str:
    sizes = sizes_of(options)
    table = run_memory(select(options.rows, GPU_ROWS), peers_of(options), sizes)
    dtype = str(sizes.dtype).removeprefix("torch.")
    setting = (
        f"B={sizes.batch} H={sizes.heads} N={sizes.n} D={sizes.dim} {dtype}, peak of forward and backward; MiB "
        "(multiple of the least: q, k, v, the output, their gradients, lse and delta)"
    )
    return f"{heading(Report(command, setting))}\n\n{render(table, options.md)}"


def growth(options: argparse.Namespace, command: str) -> int:
    """Row by row, from 16 K to 256 K tokens or at one length."""
    heads, dim, dtype = options.heads or 16, options.dim or 128, options.dtype or "bf16"
    setting = f"B=1 H={heads} D={dim} {dtype}, bytes a token of forward and backward beside q, k, v and dout"
    print(f"{heading(Report(command, setting))}\n", flush=True)
    lengths = [options.n] if options.n else [1 << i for i in range(14, 19)]
    for row in run_growth(lengths, heads, dim, DTYPES[dtype]):
        print(" | ".join(row), flush=True)
    return 0


def decode(options: argparse.Namespace, command: str) -> int:
    """Row by row, at one length or two."""
    batch, dim, dtype = options.batch if options.batch > 1 else 8, options.dim or 128, DTYPES[options.dtype or "bf16"]
    contenders = None
    if options.peers is not None:
        asked = [] if options.peers == "none" else options.peers.split(",")
        contenders = [name for name in CONTENDERS if name.startswith("attndsl") or name in asked]
    print(heading(Report(command, f"B={batch} Hq/Hkv=32/8 D={dim} {dtype}, one row, under a CUDA graph")))
    if options.command == "serving":
        n = options.n or 131072
        sizes = DecodeSizes(batch, 32, 8, n, dim, dtype, torch.device("cuda"))
        print("\n" + render(list(run_serving(sizes, n // 4)), options.md))
        return 0
    quest = options.command == "quest"
    for n in [options.n] if options.n else [32768, 131072]:
        sizes = DecodeSizes(batch, 32, 8, n, dim, dtype, torch.device("cuda"))
        table = list(run_quest(sizes) if quest else run_decode(sizes, contenders))
        print("\n" + render(table, options.md), flush=True)
    return 0


def published(options: argparse.Namespace, command: str) -> int:
    """Row by row, so that what a run has found is there when it is cut short."""
    n, dim, dtype = options.n or 16384, options.dim or 128, DTYPES[options.dtype or "bf16"]
    asked = options.rows.split(",") if options.rows else [system.name for system in SYSTEMS]
    which = [system for system in SYSTEMS if system.name in asked]
    for failure in warm_systems(which, n, dim, dtype, options.workers) if options.workers else ():
        print(failure, file=sys.stderr)
    setting = (
        f"B=1 N={n} D={dim} {options.dtype or 'bf16'}; milliseconds (dense: the faster of SDPA's, its time over ours)"
    )
    print(f"{heading(Report(command, setting))}\n", flush=True)
    for row in run_systems(n, dim, dtype, torch.device("cuda"), which):
        print(" | ".join(row), flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(given)
    if options.site is not None:
        peers.add_site(options.site)
    command = "python -m benchmarks " + shlex.join(given)
    if (
        options.command
        in ("forward", "backward", "memory", "growth", "decode", "quest", "serving", "routed", "systems")
        and not torch.cuda.is_available()
    ):
        print("this table needs a GPU; `python -m benchmarks cpu` does not", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match options.command:
        case "overhead":
            table = run_overhead(device)
            print(f"{heading(Report(command, f'B=1 H=2 N=64 D=64 on {device.type}'))}\n\n{render(table, options.md)}")
        case "decode" | "quest" | "serving":
            return decode(options, command)
        case "growth":
            return growth(options, command)
        case "routed":
            n, dim, dtype = options.n or 65536, options.dim or 128, DTYPES[options.dtype or "bf16"]
            table = list(run_routed(n, dim, dtype, device, options.peers != "none", systems()))
            setting = f"B=1 D={dim} {dtype}, choice included; milliseconds (dense: SDPA flash, its time over ours)"
            print(f"{heading(Report(command, setting))}\n\n{render(table, options.md)}")
        case "systems":
            return published(options, command)
        case "planning":
            table = list(run_planning(options.rows.split(",") if options.rows else None))
            setting = "processor time, one core, sm_90, portable"
            print(f"{heading(Report(command, setting))}\n\n{render(table, options.md)}")
        case "compile":
            table = run_compile(options.pattern, device, options.backward)
            print(f"{heading(Report(command, f'{options.pattern} on {device.type}'))}\n\n{render(table, options.md)}")
        case _:
            try:
                print(memory(options, command) if options.command == "memory" else timing(options, command))
            except KeyError as error:
                print(error.args[0], file=sys.stderr)
                return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
