"""Decoding at run time: the last rows of many sequences over a cache, planned and launched per kind of call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attndsl.branches import Given
from attndsl.compose import part_programs
from attndsl.decode import Cache, DecodePlan, Listing
from attndsl.diagnostics import error
from attndsl.plan import Spec, Tiling
from attndsl.program import CallShape, Dim, Program
from attndsl.runtime.call import check_heads, check_inputs, check_tables, device_target, dtype_of
from attndsl.runtime.engine import MAX_PREPARED, Engine
from attndsl.runtime.entries import all_view_places, check_entries, view_places
from attndsl.runtime.plans import as_four, chosen_entries

CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FP8 = torch.float8_e4m3fn


# Kernels count tokens in 32 bits, and the end of a tile or an entry past the last of them too.
_MOST_TOKENS = 1 << 30


def reach(page: int, page_table: Tensor | None) -> int:
    """Tokens that a sequence can have at most: those of the cache, or of its pages."""
    return min(page if page_table is None else page * page_table.shape[1], _MOST_TOKENS)


@dataclass(slots=True)  # not frozen: that takes longer to make
class DecodeTensors:
    """The tensors of a call, heads before tokens.

    q [B, Hq, n, D]; k, v [B, Hkv, M, D] or with a page table [pages, Hkv, page, D]; seq_lens int32 [B];
    page_table int32 [B, P] or None; k_scale, v_scale [], [1] or [Hkv], or None. `tokens`: where k and v are the entries
    of a view, how many tokens a sequence can have at most.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    seq_lens: Tensor
    page_table: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    tokens: int | None = None

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have at most."""
        if self.tokens is not None:
            return self.tokens
        return reach(self.k.shape[2], self.page_table)

    @property
    def shape(self) -> CallShape:
        """The sizes of the call; its `k_len` is the cache's capacity."""
        batch, heads, rows, dim = self.q.shape
        return CallShape(batch, heads, self.k.shape[1], rows, self.capacity, dim, self.v.shape[3])

    @property
    def cache(self) -> Cache:
        return Cache(
            None if self.page_table is None else self.k.shape[2], self.k.dtype == FP8, self.k_scale is not None,
            self.v_scale is not None,
        )  # fmt: skip

    def of_part(self, program: Program, inputs: Sequence[Tensor]) -> DecodeTensors:
        """The call as a part has it: over a view the keys are entries, of which it takes no copy where they are
        broadcast."""
        (part,) = program.only.parts
        if part.view is None:
            return self
        assert isinstance(part.view, Given), "pools are made before a part is decoded"
        at_k, at_v = view_places(program, part.view)
        sizes = (self.q.shape[0], self.k.shape[1], part.view.entries(self.capacity))
        k, v = (inputs[i].expand(*sizes, x.shape[3]) for i, x in ((at_k, self.k), (at_v, self.v)))
        return DecodeTensors(self.q, k, v, self.seq_lens, None, None, None, self.capacity)

    def kind(self) -> tuple[Any, ...]:
        """Everything about the tensors that a launch depends on. Written out, since it is asked at every call."""
        q, k, v, lengths, table, k_scale, v_scale = (
            self.q, self.k, self.v, self.seq_lens, self.page_table, self.k_scale, self.v_scale
        )  # fmt: skip
        return (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.device,
            k.device, v.device, lengths.shape, lengths.stride(), lengths.dtype, lengths.device,
            None if table is None else (table.shape, table.stride(), table.dtype, table.device),
            None if k_scale is None else (k_scale.shape, k_scale.stride(), k_scale.dtype, k_scale.device),
            None if v_scale is None else (v_scale.shape, v_scale.stride(), v_scale.dtype, v_scale.device),
            (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15 == 0,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Listed:
    """Where the plan of a decode kernel stands among a call's inputs, its dimensions, and what it lists."""

    input: int
    dims: tuple[Dim, ...]
    listing: Listing

    @classmethod
    def of(cls, plan: DecodePlan) -> Listed | None:
        """Of a kernel, None where it reads no list."""
        if plan.listing is None:
            return None
        names = [decl.name for decl in plan.program.inputs]
        number = names.index(plan.listing.plan)
        return cls(number, plan.program.inputs[number].dims, plan.listing)

    def checked(self, inputs: Sequence[Tensor], capacity: int) -> Tensor:
        """The plan, int32 [batch, heads, rows, entries], dense: -1 for entries that do not count."""
        plan = as_four(inputs[self.input], self.dims)
        entries, counts = chosen_entries(plan, -(-capacity // self.listing.keys))
        return torch.where(counts, entries, -1).to(torch.int32)


def dense_strides(sizes: Sequence[int]) -> tuple[int, int, int]:
    """Strides of a dense plan [B, H', R, C] along B, H' and R, 0 where it is broadcast."""
    batch, heads, rows, entries = sizes
    strides = (heads * rows * entries, rows * entries, entries)
    found = (stride if size > 1 else 0 for stride, size in zip(strides, (batch, heads, rows), strict=True))
    return next(found), next(found), next(found)


Launch = Callable[[DecodeTensors, Sequence[Tensor], Sequence[int], float | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class DecodeGenerators:
    """Source printers, handed in by the API."""

    triton: Callable[[DecodePlan], str]
    cpu: Callable[[DecodePlan], str]


@dataclass(slots=True)
class Decoder:
    """The decode kernels of one program, beside its engine. Thread-safe: preparing a call twice is harmless.

    tiling, splits, columns: in place of those that are chosen.
    """

    engine: Engine
    generators: DecodeGenerators
    tiling: Tiling | None = None
    splits: int | None = None
    columns: int = 1
    _prepared: dict[Any, Launch] = field(default_factory=dict)
    # Which inputs hold entries of views.
    _views: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._views = all_view_places(self.engine.program)

    def decode(
        self, call: DecodeTensors, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Output [B, Hq, n, Dv] and lse float32 [B, Hq, n] (float64 for float64 tensors)."""
        key = (
            call.kind(), backend, scale if scale is None else scale > 0,
            tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs),
            all(inputs[i].data_ptr() & 15 == 0 for i in self._views),
        )  # fmt: skip
        launch = self._prepared.get(key)
        if launch is None:
            if len(self._prepared) >= MAX_PREPARED:
                self._prepared.clear()
            launch = self._prepared[key] = self._prepare(call, inputs, scale, backend)
        if os.environ.get("ATTNDSL_DEBUG"):
            check_values(call)
        return launch(call, inputs, args, scale)

    def _prepare(self, call: DecodeTensors, inputs: Sequence[Tensor], scale: float | None, backend: str) -> Launch:
        program = self.engine.program_of(scale)
        check_tensors(program, call)
        shape = call.shape
        check_tables(program, shape)
        check_inputs(program, shape, inputs, call.q.device)
        self._check_entries(program, call, inputs)
        spec = Spec(
            shape.heads, shape.kv_heads, shape.dim, shape.v_dim, dtype_of(call.q), device_target(call.q.device),
            scale_sign=1 if scale is None or scale > 0 else -1,
        )  # fmt: skip
        if backend == "gluon":
            raise error("A510", "decode has no Hopper lowering of its own", help="leave `backend` out")
        if self.engine.choose(backend, spec, shape.k_len) == "cpu":
            from attndsl.runtime.cpu_decode import prepare_decode as prepare_on_cpu

            return prepare_on_cpu(part_programs(program), spec, call, inputs, self.generators.cpu, self.tiling)
        from attndsl.runtime.triton_decode import prepare_decode

        parts = part_programs(program)
        forced = (self.tiling, self.splits, self.columns)
        return prepare_decode(parts, spec, call, inputs, self.generators.triton, *forced)

    def _check_entries(self, program: Program, call: DecodeTensors, inputs: Sequence[Tensor]) -> None:
        check_entries(program, call.q, call.shape.v_dim, inputs)
        for i in self._views:
            # As caches are, entries are large: none is copied at every step.
            if inputs[i].shape[-1] == 1 or inputs[i].stride(-1) != 1:
                said = f"the last dimension of `{program.inputs[i].name}` has stride {inputs[i].stride(-1)}"
                raise error("A552", said, help="keep entries dense")


# ----------------------------------------------------------------------------------------- checks


def check_tensors(program: Program, call: DecodeTensors) -> None:
    """Raises `PatternError` where the tensors do not go together, or the program has no decode."""
    if program.align_start:
        raise error(
            "A554", "`align start` has no decode: where a row stands does not follow from the number of keys",
            program.span, help="leave `align start` out if the pattern does not depend on q",
        )  # fmt: skip
    _check_types(call)
    q, k, v = call.q, call.k, call.v
    batch, (slots, kv_heads, page, dim) = q.shape[0], k.shape
    paged = call.page_table is not None
    room = paged or slots == batch
    if dim != q.shape[3] or v.shape[:3] != k.shape[:3] or not room or (batch and 0 in (page, slots)):
        first = "pages, Hkv, page" if paged else "B, Hkv, M"
        raise error(
            "A504", f"q {list(q.shape)}, k_cache {list(k.shape)}, v_cache {list(v.shape)} do not go together",
            help=f"q is [B, Hq, n, D], the caches of layout 'hnd' [{first}, D] and [{first}, Dv], not empty",
        )  # fmt: skip
    check_heads(q.shape[1], kv_heads, dim, v.shape[3])
    check_lengths(call, batch)
    check_scales(call)


def check_scales(call: DecodeTensors) -> None:
    """Raises `PatternError` where scales are not those of a cache."""
    k, kv_heads = call.k, call.k.shape[1]
    for name, x in (("k_scale", call.k_scale), ("v_scale", call.v_scale)):
        if x is not None and (k.dtype != FP8 or not x.is_floating_point() or x.shape not in ((), (1,), (kv_heads,))):
            raise error(
                "A553", f"{name} is {_said(x)}, for a cache of {_dtype(k)} with {kv_heads} key heads",
                help="scales are for float8_e4m3fn caches: a float tensor of one number, or of one a key head",
            )  # fmt: skip


def check_lengths(call: DecodeTensors, batch: int) -> None:
    """Raises `PatternError` where lengths and the page table are not those of so many sequences."""
    if call.seq_lens.dtype != torch.int32 or call.seq_lens.shape != (batch,):
        raise error(
            "A550", f"seq_lens is {_said(call.seq_lens)}; this call needs int32 [{batch}]",
            help="the length of each sequence, its new tokens included",
        )  # fmt: skip
    table = call.page_table
    fits = table is None or (table.dtype == torch.int32 and table.dim() == 2 and len(table) == batch and table.shape[1])
    if table is not None and not fits:
        raise error(
            "A551", f"page_table is {_said(table)}; this call needs int32 [{batch}, pages of a sequence]",
            help="the pages of each sequence, first tokens first",
        )  # fmt: skip


def _check_types(call: DecodeTensors) -> None:
    q, k = call.q, call.k
    for name, x in (("q", q), ("k_cache", k), ("v_cache", call.v)):
        if x.dim() != 4:
            raise error("A501", f"{name} must have 4 dimensions, not {list(x.shape)}", help="q is [B, Hq, n, D]")
        if x.dtype not in CACHE_DTYPES and not (x.dtype == FP8 and x is not q):
            raise error(
                "A502", f"{name} is {_dtype(x)}; it may be bfloat16, float16, float32, and a cache float8_e4m3fn"
            )
    if call.v.dtype != k.dtype or (k.dtype != FP8 and k.dtype != q.dtype):
        raise error(
            "A502", f"q is {_dtype(q)}, k_cache {_dtype(k)} and v_cache {_dtype(call.v)}",
            help="the caches are of q's dtype, or both of float8_e4m3fn",
        )  # fmt: skip
    others = ("k_cache", "v_cache", "seq_lens", "page_table", "k_scale", "v_scale")
    tensors = (k, call.v, call.seq_lens, call.page_table, call.k_scale, call.v_scale)
    for name, y in zip(others, tensors, strict=True):
        if y is not None and y.device != q.device:
            raise error("A503", f"q is on {q.device} and {name} on {y.device}", help="move them to one device")


def check_values(call: DecodeTensors) -> None:
    """Raises `PatternError` for lengths past the cache and pages that do not exist. Waits for the device.

    An entry of -1 says that a page was given back, and is no error.
    """
    if call.q.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    capacity, lengths = call.capacity, call.seq_lens.tolist()
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise error(
                "A556", f"sequence {b} has length {length}, and the cache holds {capacity} tokens of it",
                help="give it more pages, or a larger cache",
            )  # fmt: skip
    if call.page_table is None:
        return
    pages, size = call.k.shape[0], call.k.shape[2]
    for b, row in enumerate(call.page_table.tolist()):
        for i, page in enumerate(row[: -(-lengths[b] // size)]):
            if not -1 <= page < pages:
                raise error(
                    "A556", f"page {i} of sequence {b} is {page}, and there are {pages} pages",
                    help="entries count from 0; -1 marks a page that was given back",
                )  # fmt: skip


def _said(x: Tensor) -> str:
    return f"{_dtype(x)} {list(x.shape)}"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
