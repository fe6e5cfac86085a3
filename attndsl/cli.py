"""The command line. Exit status 0: ok, 1: diagnostics, 2: usage."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from attndsl import api
from attndsl.api import Attention
from attndsl.diagnostics import Diagnostic, PatternError, Severity, error
from attndsl.terminal import plain, show

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    # Those print values of variables, and so whatever a file holds.
    pretty_exceptions_enable=False,
    help="Attention patterns as programs.",
)

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.LINT: "cyan"}

Pattern = Annotated[str, typer.Argument(metavar="FILE", help="A file ending in .attn, or a pattern as text.")]
Params = Annotated[
    list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="A parameter: 3, 0.5, true or 1,2,3.")
]
Inputs = Annotated[list[str] | None, typer.Option("--arg", metavar="NAME=INT", help="The value of a `runtime int`.")]
Chosen = Annotated[str | None, typer.Option("--name", help="Which program of the file.")]
Tokens = Annotated[int, typer.Option("--n", min=1, help="Tokens.")]
Heads = Annotated[int, typer.Option(min=1, help="Query heads.")]
KvHeads = Annotated[int | None, typer.Option(min=1, help="Key heads; as many as query heads if left out.")]
Dim = Annotated[int, typer.Option(help="Head dimension.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Target = Annotated[str, typer.Option(help="sm_80, sm_86, sm_89, sm_90, sm_100, gfx90a or gfx942.")]
Backend = Annotated[str, typer.Option(help="triton, gluon or cpu.")]


def app_main() -> None:
    """Entry point of the command `attndsl`."""
    try:
        app()
    except PatternError as problem:
        _report(problem.diagnostics)
        sys.exit(1)
    except BrokenPipeError:
        # The reader has left. Python would complain once more when it closes its output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


# --------------------------------------------------------------------------------------- commands


@app.command()
def run(
    pattern: Pattern, param: Params = None, arg: Inputs = None, name: Chosen = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Tokens.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads.")] = None,
    kv_heads: KvHeads = None, dim: Dim = 64,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    backend: Annotated[str, typer.Option(help="auto, triton, gluon or cpu.")] = "auto",
) -> None:  # fmt: skip
    """Run a pattern on random tensors here: check it against the oracle, time it beside dense attention."""
    attn = _loaded(pattern, name, param)
    found = _answer(lambda: api.measure(
        attn, n=n, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, backend=backend, args=_integers(arg)
    ))  # fmt: skip
    shape, console = found.shape, _console()
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("pattern", plain(attn.program.name)),
        ("call", f"{shape.heads} heads ({shape.kv_heads} of keys) x {shape.k_len} tokens x {shape.dim}, {found.dtype}"),
        ("device", f"{found.device}; {found.backend} backend"),
        *((f"input {plain(key)}", text) for key, text in found.inputs),
        ("pairs allowed", _share(found.pairs, shape.batch * shape.heads * shape.rows * shape.k_len)),
        ("tiles visited", _part(found.tiles)),
        ("error", f"{found.error:.1e} against the oracle over {found.rows_checked:,} rows"),
        ("", f"(rounding explains {found.allowed_error:.1e})"),
        ("time", _speed(found.ms, found.flops)),
        ("dense attention", _beside(found.ms, found.dense_ms, found.dense_why, found.masked)),
    ]  # fmt: skip
    for key, value in rows:
        table.add_row(key, value)
    console.print(table)
    if not found.passed:
        _report([Diagnostic("A922", Severity.ERROR, "the result differs from the oracle's: this is a bug of attndsl")])
        raise typer.Exit(1)


@app.command()
def check(pattern: Pattern, param: Params = None, name: Chosen = None) -> None:
    """Report every mistake and warning of a pattern."""
    attn = _loaded(pattern, name, param)
    chosen = [selection.name for selection in attn.program.selections]
    inputs = [decl.name for decl in attn.program.inputs if decl.name not in chosen]
    said = (f"with inputs {', '.join(inputs)}" if inputs else "", f"choosing {', '.join(chosen)}" if chosen else "")
    show(_console(), ", ".join([f"{attn.program.name}: ok", *filter(None, said)]), "green")


@app.command()
def explain(
    pattern: Pattern, param: Params = None, arg: Inputs = None, name: Chosen = None, n: Tokens = 4096, heads: Heads = 1,
    kv_heads: KvHeads = None, dim: Dim = 128, dtype: Dtype = "bfloat16", target: Target = "sm_90",
    backend: Backend = "triton", row: Annotated[int | None, typer.Option(min=0, help="List this row's keys.")] = None,
    stages: Annotated[bool, typer.Option("--stages", help="Print what every stage makes.")] = False,
) -> None:  # fmt: skip
    """Say what was understood, simplified and planned, and what a call should cost."""
    attn = _loaded(pattern, name, param, report=False)
    given: dict[str, Any] = {"row": row, "stages": stages, **_integers(arg)}
    found = _answer(
        lambda: attn.explain(
            n, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, target=target, backend=backend, **given
        )
    )
    console = _console()
    for i, section in enumerate(found.sections):
        show(console, ("\n" if i else "") + section.title, "bold")
        for line in section.lines:
            show(console, f"  {line}".rstrip())


@app.command("show")
def show_blocks(
    pattern: Pattern, param: Params = None, arg: Inputs = None, name: Chosen = None, n: Tokens = 4096, heads: Heads = 1,
    kv_heads: KvHeads = None, head: Annotated[int, typer.Option(min=0, help="Which head to draw.")] = 0,
    part: Annotated[str | None, typer.Option(help="Which part to draw; all, if left out.")] = None,
    block_q: Annotated[int, typer.Option(min=1, help="Rows of a tile.")] = 128,
    block_k: Annotated[int, typer.Option(min=1, help="Keys of a tile.")] = 128,
    png: Annotated[Path | None, typer.Option(help="Write a picture to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file.")] = None,
) -> None:  # fmt: skip
    """Draw which tiles of keys the tiles of queries visit."""
    attn = _loaded(pattern, name, param)
    files = [(path, ending) for path, ending in ((png, ".png"), (html, ".html")) if path is not None]
    if part is None and len(attn.parts) > 1 and files:
        raise typer.BadParameter(f"one of {', '.join(attn.parts)}: a file holds one part", param_hint="--part")
    if head >= heads:
        raise typer.BadParameter(f"there is no head {head} of {heads}", param_hint="--head")
    for name in attn.parts if part is None else (part,):
        ask = functools.partial(attn.blocks, part=name, **_integers(arg))
        graph = _answer(functools.partial(ask, n, n, block_q, block_k, heads, kv_heads or heads))
        for path, ending in files:
            if path.suffix.lower() != ending:
                raise typer.BadParameter(f"the file must end in {ending}", param_hint=f"--{ending[1:]}")
            _written(path, functools.partial(graph.save, head=head))
            show(_console(), f"wrote {path}")
        if not files:
            from attndsl.render import to_text

            console = _console()
            columns = max(8, min(64, (console.width - 2) // 2))
            if name:
                show(console, f"{name}: {graph.q_tiles} x {graph.k_tiles} tiles", "bold")
            show(console, to_text(graph.picture(36, columns, head)))


@app.command()
def source(
    pattern: Pattern, param: Params = None, name: Chosen = None, kernel: str = "forward", heads: Heads = 8,
    kv_heads: KvHeads = None, dim: Dim = 128, dtype: Dtype = "bfloat16", target: Target = "sm_90",
    backend: Backend = "triton",
    assembly: Annotated[str | None, typer.Option(help="ttir, ttgir, llir, ptx, sass or amdgcn instead.")] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Print the kernels' names instead.")] = False,
) -> None:  # fmt: skip
    """Print a generated kernel, or what it compiles to for a target that need not be there."""
    attn = _loaded(pattern, name, param)
    if kernels:
        sys.stdout.write("\n".join(_answer(lambda: attn.kernels(heads, kv_heads))) + "\n")
        return
    sizes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "dtype": dtype}
    if assembly is None:
        text = _answer(lambda: attn.source(kernel, target, backend, **sizes))
    else:
        text = _answer(lambda: attn.assembly(kernel, assembly, target, backend, **sizes))
    # Not through rich: it is code, perhaps on its way to a file.
    sys.stdout.write(plain(text))


@app.command()
def compare(first: Pattern, second: Pattern) -> None:
    """Say how two patterns relate, for every length, with witnesses."""
    a, b = _loaded(first, None, None, report=False), _loaded(second, None, None, report=False)
    found = _answer(lambda: api.compare(a, b))
    verdict, *lines = str(found).splitlines()
    show(_console(), verdict, "bold")
    for line in lines:
        show(_console(), line)


@app.command()
def bench(
    pattern: Pattern, param: Params = None, arg: Inputs = None, name: Chosen = None,
    n: Annotated[list[int] | None, typer.Option("--n", min=1, help="Tokens; may be given several times.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads.")] = None, kv_heads: KvHeads = None,
    dim: Dim = 64, dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    backend: Annotated[str, typer.Option(help="auto, triton, gluon or cpu.")] = "auto",
) -> None:  # fmt: skip
    """Time a pattern at several lengths, beside dense attention with the same mask."""
    attn = _loaded(pattern, name, param)
    table = Table(box=None, pad_edge=False)
    for heading in ("tokens", "pairs", "tiles", "ms", "rate", "dense ms", "speed-up"):
        table.add_column(heading, justify="right")
    passed = True
    for length in n or [1024, 2048, 4096]:
        found = _answer(lambda length=length: api.measure(  # type: ignore[misc]
            attn, n=length, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, backend=backend, args=_integers(arg)
        ))  # fmt: skip
        passed = passed and found.passed
        everything = found.shape.batch * found.shape.heads * length**2
        dense = "–" if found.dense_ms is None else f"{found.dense_ms:.3f}"
        gain = "–" if found.dense_ms is None else f"{found.dense_ms / found.ms:.1f}x"
        pairs = "–" if found.pairs is None else f"{100 * found.pairs / everything:.2f} %"
        table.add_row(
            str(length),
            pairs,
            _part(found.tiles),
            f"{found.ms:.3f}",
            _rate(found.ms, found.flops),
            dense,
            gain,
        )
    _console().print(table)
    if not passed:
        _report([Diagnostic("A922", Severity.ERROR, "a result differs from the oracle's: this is a bug of attndsl")])
        raise typer.Exit(1)


@app.command()
def fmt(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files ending in .attn.")],
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit 1 if a file would change.")] = False,
) -> None:
    """Lay files out canonically, in place."""
    changed, failed = 0, False
    for path in files:
        try:
            before = api.source_of(path)
            after = api.format_source(before.text, before.name)
            if after == before.text:
                continue
            changed += 1
            if not check:
                _written(path, lambda at, text=after: at.write_text(text, "utf-8", newline="\n"))  # type: ignore[misc]
            show(_console(), f"{'would change' if check else 'changed'} {path}")
        except PatternError as problem:
            _report(problem.diagnostics)
            failed = True
    if failed or (check and changed):
        raise typer.Exit(1)


@app.command()
def cache(action: Annotated[str, typer.Argument(help="info or clear")] = "info") -> None:
    """Show or clear the cache of compiled kernels."""
    if action not in ("info", "clear"):
        raise typer.BadParameter(f"{action!r} is neither info nor clear", param_hint="ACTION")
    kernels = api.kernel_cache()
    found = kernels.info() if action == "info" else kernels.clear()
    removed = "" if action == "info" else " removed"
    show(_console(), f"{found.path}: {found.entries} kernels, {found.bytes / 1e6:.1f} MB{removed}")


# ---------------------------------------------------------------------------------------- helpers


def _console(stderr: bool = False) -> Console:
    # Made when used: tests and pipes replace the streams.
    return Console(stderr=stderr, highlight=False)


def _report(diagnostics: tuple[Diagnostic, ...] | list[Diagnostic]) -> None:
    console = _console(stderr=True)
    for i, diagnostic in enumerate(diagnostics):
        head, *rest = diagnostic.render().splitlines()
        show(console, ("\n" if i else "") + head, _STYLES[diagnostic.severity])
        for line in rest:
            show(console, line)


def _answer(question: Callable[[], Any]) -> Any:
    """The answer, or its diagnostics on the error stream and exit status 1."""
    try:
        return question()
    except PatternError as problem:
        _report(problem.diagnostics)
        raise typer.Exit(1) from None


def _loaded(pattern: str, name: str | None, param: list[str] | None, report: bool = True) -> Attention:
    """The compiled pattern, its warnings printed."""
    given = _params(param)
    place: str | Path = Path(pattern) if pattern.endswith(".attn") or Path(pattern[:255]).is_file() else pattern
    attn: Attention = _answer(lambda: api.load_attention(place, name=name, **given))
    if report and attn.warnings:
        _report(attn.warnings)
    return attn


def _params(given: list[str] | None) -> dict[str, Any]:
    found = {}
    for item in given or []:
        name, sign, text = item.partition("=")
        if not sign or not name.isidentifier() or name in ("source", "name"):
            raise typer.BadParameter(f"{plain(item)!r} is not NAME=VALUE", param_hint="--param")
        values = [_value(part.strip(), item) for part in text.split(",")]
        found[name] = values if "," in text else values[0]
    return found


def _value(text: str, item: str) -> int | float | bool:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise typer.BadParameter(f"{plain(item)!r}: a value is a number, true or false", param_hint="--param")


def _integers(given: list[str] | None) -> dict[str, int]:
    found = {}
    for item in given or []:
        name, _, text = item.partition("=")
        try:
            found[name] = int(text)
        except ValueError:
            raise typer.BadParameter(f"{plain(item)!r} is not NAME=INT", param_hint="--arg") from None
    return found


def _written(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file as a whole or not at all; a link keeps pointing where it did."""
    target = path.resolve()
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".attndsl-") as directory:
            draft = Path(directory) / target.name
            write(draft)
            if target.exists():
                draft.chmod(target.stat().st_mode & 0o777)
            os.replace(draft, target)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        _report(error("A525", f"cannot write `{path}`: {reason}", help="check the folder's permissions").diagnostics)
        raise typer.Exit(1) from None


def _share(pairs: int | None, everything: int) -> str:
    return "not counted at this length" if pairs is None else f"{100 * pairs / max(1, everything):.2f} % ({pairs:,})"


def _speed(ms: float, flops: float | None) -> str:
    return f"{ms:.3f} ms" + (f", {_rate(ms, flops)} of allowed pairs" if flops is not None else "")


def _rate(ms: float, flops: float | None) -> str:
    if flops is None:
        return "–"
    rate = flops / (ms / 1e3)
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.1f} GFLOP/s"


def _part(share: float | None) -> str:
    return "not counted" if share is None else f"{100 * share:.2f} %"


def _beside(ms: float, dense_ms: float | None, why: str, masked: bool) -> str:
    if dense_ms is None:
        return f"not timed: {why}"
    ratio = dense_ms / ms
    verdict = f"{ratio:.1f}x slower than ours" if ratio >= 1 else f"{1 / ratio:.1f}x faster than ours"
    what = "with the same mask" if masked else "of every pair, without a mask"
    return f"{dense_ms:.3f} ms {what}, {verdict}"
