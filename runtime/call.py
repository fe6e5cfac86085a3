"""One call: its sizes, checked against the program, and the kind of kernel it needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from attndsl.diagnostics import PatternError, Span, error
from attndsl.plan import DType
from attndsl.program import Axis, CallShape, Dim, InputDecl, Program, Type

_DTYPES = {
    torch.bfloat16: DType.BFLOAT16, torch.float16: DType.FLOAT16, torch.float32: DType.FLOAT32,
    torch.float64: DType.FLOAT64,
}  # fmt: skip
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
_PLANS = (torch.int32, torch.int64, torch.uint8)
MAX_DIM = 256
BACKENDS = ("auto", "gluon", "triton", "cpu")


def call_shape(q: Tensor, k: Tensor, v: Tensor) -> CallShape:
    """The sizes of a call. Raises `PatternError` when the tensors do not go together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise _wrong("A501", f"{name} must have 4 dimensions [batch, heads, tokens, dim], not {list(x.shape)}")
        if x.dtype not in _DTYPES:
            raise _wrong(
                "A502", f"{name} is {_dtype(x)}; attention takes bfloat16, float16 or float32 (and float64 on the CPU)"
            )
        if x.dtype != q.dtype:
            raise _wrong("A502", f"q is {_dtype(q)} and {name} is {_dtype(x)}", "convert them to one dtype")
        if x.device != q.device:
            raise _wrong("A503", f"q is on {q.device} and {name} on {x.device}", "move them to one device")
    batch, heads, rows, dim = q.shape
    kv_heads, k_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
    if k.shape[0] != batch or k.shape[3] != dim or v.shape[:3] != k.shape[:3]:
        raise _wrong(
            "A504", f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} do not go together",
            "q is [B, Hq, Nq, D], k [B, Hkv, Nk, D] and v [B, Hkv, Nk, Dv]",
        )  # fmt: skip
    check_heads(heads, kv_heads, dim, v_dim)
    # Where torch.compile knows none of the sizes, these are settled all the same: programs are made for them.
    return CallShape(batch, int(heads), int(kv_heads), rows, k_len, int(dim), int(v_dim))


def check_rows(program: Program, shape: CallShape, takes_more: Callable[[Program], bool]) -> None:
    """Raise `PatternError` for a call of more rows than keys, unless the program takes such ones (`takes_more`)."""
    if shape.rows > shape.k_len and not takes_more(program):
        what = f"{shape.rows} query rows for {shape.k_len} keys: the first rows would stand before the first token"
        raise error("A507", what, program.span, help="write `align start` if row i stands at position i")


def present_lengths(
    program: Program, shape: CallShape, inputs: Sequence[Tensor], cached: Tensor | None = None
) -> Tensor | None:
    """How many tokens of each batch entry are present, int64 [B, 1, 1, 1]; None where all are. inputs: those that a
    call gives. cached: the same, where sequences of a cache have lengths of their own."""
    if program.lengths is None:
        return cached
    count = inputs[[decl.name for decl in program.inputs].index(program.lengths)]
    present = count.clamp(0, shape.k_len).to(torch.int64).expand(shape.batch).view(-1, 1, 1, 1)
    return present if cached is None else torch.minimum(present, cached)


def present_in_cache(program: Program, seq_lens: Tensor, count: Tensor | None) -> Tensor:
    """How many tokens of each sequence of a cache are present, int32 [B]: what the cache has, bounded by what `lengths`
    says (count), if it does."""
    if program.lengths is None or count is None:
        return seq_lens
    return torch.minimum(seq_lens, count.clamp(0, torch.iinfo(torch.int32).max).to(torch.int32))


def check_call(scale: object, **tensors: object) -> None:
    """Raises `PatternError` for what is no dense tensor, or a scale that is no number."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise _wrong("A501", f"{name} is a tensor, not {repr(x)[:40]}")
        if x.layout is not torch.strided or x.is_nested:
            kind = "that is nested" if x.is_nested else f"of {x.layout}"
            raise _wrong("A501", f"{name} is a dense tensor, not one {kind}", "pass x.to_dense()")
    if scale is not None and not isinstance(scale, Real | torch.SymInt | torch.SymFloat):
        raise _wrong("A518", f"`scale` is a number, not {repr(scale)[:40]}", "multiply q by a tensor")
    if isinstance(scale, int) and scale.bit_length() > 63:
        raise _wrong("A518", f"`scale` is a number of 64 bits, not {repr(scale)[:40]}")


def check_backend(backend: object) -> None:
    """Raises `PatternError` (A509) for what is no backend."""
    if backend not in BACKENDS:
        raise _wrong("A509", f"there is no backend {backend!r}", f"one of {', '.join(BACKENDS)}")


def names_of(given: object) -> set[str] | None:
    """The names that something is given by, None where it is given by none."""
    return set(given) if isinstance(given, Mapping) else None


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for calls on a device; none is on the one that holds no numbers."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_values(program: Program, q: Tensor, k: Tensor, inputs: Sequence[Any]) -> CallShape:
    """The sizes of a call whose values play no part: their dimension is that of the inputs that have one, or else D."""
    return of_values(program, call_shape(q, k, k), inputs)


def of_values(program: Program, shape: CallShape, inputs: Sequence[Any]) -> CallShape:
    """The sizes of such a call with the dimension of values that its inputs have."""
    for decl, x in zip(program.inputs, inputs, strict=False):
        if isinstance(x, Tensor) and len(decl.dims) == x.dim():
            for dim, size in zip(decl.dims, x.shape, strict=True):
                if dim.axis is Axis.DV and size > 1:
                    return replace(shape, v_dim=size)
    return shape


def check_heads(heads: int, kv_heads: int, dim: int, v_dim: int) -> None:
    """Raises `PatternError` for heads that do not divide, or head dimensions that no kernel takes."""
    if heads == 0:
        raise _wrong("A505", "there are no query heads")
    if kv_heads == 0 or heads % kv_heads:
        raise _wrong("A505", f"{heads} query heads are not a multiple of {kv_heads} key heads")
    for name, size in (("D", dim), ("Dv", v_dim)):
        if size % 8 or not 8 <= size <= MAX_DIM:
            raise _wrong(
                "A506",
                f"{name} = {size}: head dimensions are multiples of 8 up to {MAX_DIM}",
                "pad the last dimension with zeros",
            )


def check_inputs(program: Program, shape: CallShape, inputs: Sequence[Tensor], device: torch.device) -> None:
    """Raises `PatternError` where an input's type, device or sizes are not those it was declared with."""
    for decl, x in zip(program.inputs, inputs, strict=True):
        name = f"input `{decl.name}`"
        allowed = {Type.INT: _INTEGERS, Type.BOOL: (torch.bool,), Type.FLOAT: tuple(_DTYPES)}[decl.type]
        if decl.members is not None and x.dtype not in _PLANS:
            said = "an int32 list of members, or uint8 with one entry a member"
            raise _wrong("A511", f"{name} is a plan, {said}, and the tensor is {_dtype(x)}", span=decl.span)
        if x.dtype not in allowed:
            raise _wrong("A511", f"{name} is declared {decl.type.value} and the tensor is {_dtype(x)}", span=decl.span)
        if x.layout is not torch.strided:
            raise _wrong("A517", f"{name} is a dense tensor, not one of {x.layout}", "pass x.to_dense()", decl.span)
        if x.device != device:
            raise _wrong("A512", f"{name} is on {x.device} and q on {device}", span=decl.span)
        sizes = declared_sizes(decl, program, shape, x)
        if len(sizes) != x.dim() or not broadcasts(x.shape, sizes):
            raise _wrong(
                "A513", f"{name} has shape {list(x.shape)}; this call needs {sizes}",
                "a dimension may also have size 1, and is then broadcast", span=decl.span,
            )  # fmt: skip


def broadcasts(sizes: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether each size is the one that is wanted, or 1.

    Not `size in (1, want)`: to torch.compile two symbolic sizes are then different things, whatever they hold.
    """
    return all(size == 1 or size == want for size, want in zip(sizes, wanted, strict=False))


def declared_sizes(decl: InputDecl, program: Program, shape: CallShape, x: Tensor) -> list[int]:
    """The sizes that an input has in a call. A plan lists as many members as it likes, or in uint8 says it of each."""
    sizes = [dim_size(dim, program, shape) for dim in decl.dims]
    if decl.tile and x.dim() == len(sizes):
        sizes[-2:] = x.shape[-2:]
    if decl.members is not None and x.dim() == len(sizes):
        sizes[-1] = shape.members(decl, program) if x.dtype == torch.uint8 else x.shape[-1]
    return sizes


def check_tables(program: Program, shape: CallShape) -> None:
    """Raises `PatternError` where a table over heads was compiled for other heads."""
    heads = {Axis.H: shape.heads, Axis.G: shape.kv_heads}
    for table in program.tables:
        for dim, size in zip(table.dims, table.shape, strict=True):
            if dim.axis in heads and size not in (1, heads[dim.axis]):
                raise _wrong(
                    "A514",
                    f"table `{table.name}` has {size} entries for {dim.axis.value}; this call has {heads[dim.axis]}",
                )


def dim_size(dim: Dim, program: Program, shape: CallShape) -> int:
    """Size of a declared dimension in a call."""
    match dim.axis:
        case Axis.B:
            return shape.batch
        case Axis.H:
            return shape.heads
        case Axis.G:
            return shape.kv_heads
        case Axis.Q | Axis.K if dim.apart:
            return shape.k_len
        case Axis.Q:
            return shape.rows if dim.block == 1 else -(-shape.q_len(program) // dim.block) * max(1, dim.size)
        case Axis.K:
            return -(-shape.k_len // dim.block) * max(1, dim.size)
        case Axis.D:
            return shape.dim
        case Axis.DV:
            return shape.v_dim
        case Axis.CONST | Axis.LIST:
            return dim.size


def dtype_of(x: Tensor) -> DType:
    return _DTYPES[x.dtype]


@functools.cache
def device_target(device: torch.device) -> str:
    """`cuda:90`, `hip:gfx942` or `cpu`."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return f"hip:{torch.cuda.get_device_properties(device).gcnArchName.split(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major * 10 + minor}"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _wrong(code: str, message: str, help: str = "", span: Span | None = None) -> PatternError:

    return error(code, message, span, help=help)
