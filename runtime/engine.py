"""A program's kernels at run time: chosen, compiled and launched per kind of call."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attndsl.diagnostics import error
from attndsl.keeping import KeepPlan
from attndsl.listing import even_start
from attndsl.mapping import maps_call
from attndsl.mixing import mixes
from attndsl.one_pass import prefers_two_passes
from attndsl.piece_plans import backward_plans, forward_plans, whole
from attndsl.plan import Backend, BackwardPlan, DType, ForwardPlan, Loads, Spec, Tiling
from attndsl.pooling import PoolPlan
from attndsl.program import Program
from attndsl.properties import is_whole, takes_more_rows_than_keys
from attndsl.runtime.again import Again, AgainBackward, again, again_backward
from attndsl.runtime.call import (
    call_shape,
    check_backend,
    check_inputs,
    check_rows,
    check_tables,
    device_target,
    dtype_of,
)
from attndsl.runtime.dropout import Dropout
from attndsl.runtime.entries import all_entries, all_view_places, check_entries
from attndsl.runtime.pieces import in_turn
from attndsl.runtime.values import readable
from attndsl.widths import check_tokens

if TYPE_CHECKING:
    from attndsl.combining import CombinePlan
    from attndsl.observing import Cells, ObservePlan
    from attndsl.runtime.deriving import Deriving
    from attndsl.runtime.quantized import Scales
    from attndsl.select_plan import SelectPlan
    from attndsl.skipping import LeftPlan

Gradients = tuple[Tensor, Tensor, Tensor, list[Tensor | None]]
# Kinds of calls whose launches are kept.
MAX_PREPARED = 4096


@dataclass(frozen=True, slots=True)
class Generators:
    """Source printers, handed in by the API: the runtime knows plans, not how they are printed.

    `triton_backward` prints two files: of the kernel of dq, and of that of dk and dv; `gluon_backward` of a kernel of
    rows, and of one that makes all three. For inputs that q and k read
    together `triton_diagonals` prints one more, and `triton_pairs` one a read.
    """

    triton_forward: Callable[[ForwardPlan], str]
    cpu_forward: Callable[[ForwardPlan], str]
    triton_backward: Callable[[BackwardPlan], tuple[str, str]]
    cpu_backward: Callable[[BackwardPlan], str]
    gluon_forward: Callable[[ForwardPlan], str]
    gluon_backward: Callable[[BackwardPlan], tuple[str, str]]
    triton_select: Callable[[SelectPlan], str]
    triton_rank: Callable[[SelectPlan], str]
    triton_diagonals: Callable[[BackwardPlan], str]
    triton_pairs: Callable[[BackwardPlan], Mapping[int, str]]
    triton_pool: Callable[[PoolPlan], str]
    triton_left: Callable[[LeftPlan], str]
    cpu_left: Callable[[LeftPlan], str]
    triton_observe: Callable[[ObservePlan], str]
    cpu_observe: Callable[[ObservePlan], str]
    triton_combine: Callable[[CombinePlan], str]
    triton_keep: Callable[[KeepPlan], str]
    triton_values: Callable[[int, int], str]
    triton_move: Callable[[int, int, bool], str]


@dataclass(slots=True)
class Engine:
    """The kernels of one program. Thread-safe: preparing a call twice is harmless.

    `again`, `again_backward`: the kind of the last calls, and of the last backward passes, once two were alike.
    `keep_text`: keeps beside kernels what was found of the text that the program was read from.
    """

    program: Program
    generators: Generators
    tiling: Tiling | None = None
    keep_text: Callable[[], None] | None = None
    again: Again | None = None
    again_backward: AgainBackward | None = None
    _last: Callable[..., Any] | None = None
    _last_backward: Any = None
    _prepared: dict[Any, Any] = field(default_factory=dict)
    _texts: dict[Any, Any] = field(default_factory=dict)
    _kept: dict[Any, dict[str, Tensor]] = field(default_factory=dict)
    _views: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._views = all_view_places(self.program)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: Sequence[Tensor],
        args: Sequence[int],
        scale: float | None,
        backend: str,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output [B, Hq, Nq, Dv] and lse float32 [B, Hq, Nq] (float64 for float64 tensors)."""
        launch, inputs = self.ready(q, k, v, inputs, scale, backend, dropout)
        result: tuple[Tensor, Tensor] = launch(q, k, v, inputs, args, scale, dropout)
        return result

    def ready(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], scale: float | None, backend: str,
        dropout: Dropout | None = None,
    ) -> tuple[Callable[..., Any], Sequence[Tensor]]:  # fmt: skip
        """The launch of a call, and the inputs as it takes them.

        Kernels want the last dimension of q, k and v dense, and take other strides: where it is not, these are copied.
        """
        pointers = q.data_ptr() | k.data_ptr() | v.data_ptr()
        if self._views:
            inputs = self._dense(inputs)
            pointers |= self._entries(inputs)
        key = _kind(q, k, v, inputs, scale, backend, dropout, pointers)
        launch = self._prepared.get(key)
        if launch is None:
            if any(x.dim() and x.stride(-1) != 1 and not x.is_contiguous() for x in (q, k, v)):
                launch = self._on_copies(backend)
            else:
                launch = self._prepare(q, k, v, inputs, scale, backend, key[-1], dropout is not None)
            self._keep(key, launch)
        if inputs and not k.shape[2]:
            inputs = self._readable(inputs)
        return launch, inputs

    def remember(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], scale: float | None, backend: str,
        launch: Callable[..., Any],
    ) -> None:  # fmt: skip
        """Know calls like this one, which had to be looked up, in one step from the second in a row on."""
        if launch is self._last:
            self.again, self._last = again(q, k, v, inputs, scale, backend, launch), None
        else:
            self._last = launch

    def _on_copies(self, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        """The launch of calls whose tensors have to be copied."""

        def launch(
            q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
            dropout: Dropout | None,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            dense = q.contiguous(), k.contiguous(), v.contiguous()
            return self.forward(*dense, inputs, args, scale, backend, dropout)

        return launch

    def backward(
        self, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, backend: str,
        dropout: Dropout | None = None,
    ) -> Gradients:  # fmt: skip
        """Gradients of q, k, v and of each input (None where it is not learnable, or does not count).

        dout [B, Hq, Nq, Dv], dlse [B, Hq, Nq] (None: zero): the gradients of what `forward` returned, out and lse.
        """
        if dout.stride(-1) != 1:
            # Otherwise it is read where it lies: a copy would be as large as the output.
            dout = dout.contiguous()
        pointers = q.data_ptr() | k.data_ptr() | v.data_ptr() | out.data_ptr() | dout.data_ptr()
        if self._views:
            inputs = self._dense(inputs)
            pointers |= self._entries(inputs)
        kind = _kind(q, k, v, inputs, scale, backend, dropout, pointers)
        deterministic = torch.are_deterministic_algorithms_enabled()
        key = ("backward", deterministic, dlse is None, dout.stride(), out.stride(), *kind)
        launch = self._prepared.get(key)
        if launch is None:
            drops, uses_lse = dropout is not None, dlse is not None
            made = self._prepare_backward(dout, q, k, v, inputs, scale, backend, kind[-1], drops, uses_lse)
            launch = self._keep(key, made)
        given = inputs if k.shape[2] else self._readable(inputs)
        if given is inputs and dlse is None and dropout is None and not self._views:
            if launch is self._last_backward:
                known = again_backward(dout, q, k, v, out, lse, inputs, scale, backend, launch)
                self.again_backward, self._last_backward = known, None
            else:
                self._last_backward = launch
        dq, dk, dv, learned = launch(dout, dlse, q, k, v, out, lse, given, args, scale, dropout)
        if given is not inputs:
            pairs = zip(learned, inputs, strict=True)
            learned = [g if g is None or x.numel() else torch.zeros_like(x) for g, x in pairs]
        return dq, dk, dv, learned

    def observe(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, inputs: Sequence[Tensor], args: Sequence[int],
        scale: float | None, backend: str, wanted: Cells,
    ) -> Tensor:  # fmt: skip
        """What `forward`, which found this lse, gives of probabilities: float32 [B, Hq, row classes, members] (float64
        for float64 tensors)."""
        if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        inputs = self._dense(inputs)
        if not k.shape[2]:
            inputs = self._readable(inputs)
        pointers = q.data_ptr() | k.data_ptr() | v.data_ptr() | self._entries(inputs)
        kind = _kind(q, k, v, inputs, scale, backend, None, pointers)
        launch = self._prepared.get(("observe", wanted, *kind))
        if launch is None:
            from attndsl.runtime.observing import prepare_observer

            launch = prepare_observer(self, q, k, v, inputs, scale, backend, wanted, kind[-1])
            self._keep(("observe", wanted, *kind), launch)
        found: Tensor = launch(q, k, v, lse.contiguous(), inputs, args, scale)
        return found

    def left_tiles(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], args: Sequence[int], scale: float | None,
        backend: str,
    ) -> list[Tensor]:  # fmt: skip
        """The number of each row's tile, int32 [rows], or [B, rows] of a packed call, and for each part which tiles it
        does not drop, bool [B, Hq, row tiles, key tiles]: those that no row sees may count as either."""
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        inputs = self._dense(inputs)
        if not k.shape[2]:
            inputs = self._readable(inputs)
        pointers = q.data_ptr() | k.data_ptr() | self._entries(inputs)
        kind = _kind(q, k, v, inputs, scale, backend, None, pointers)
        launch = self._prepared.get(("left", *kind))
        if launch is None:
            from attndsl.runtime.leaving import prepare_left

            launch = self._keep(("left", *kind), prepare_left(self, q, k, v, inputs, scale, backend, kind[-1]))
        found: list[Tensor] = launch(q, k, v, inputs, args, scale)
        return found

    def quantized(
        self, q: Tensor, k: Tensor, v: Tensor, scales: Scales, inputs: Sequence[Tensor], args: Sequence[int],
        scale: float | None, backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`forward` of float8 tensors, whose numbers stand for so many times as much as their heads' scales say; the
        output is bfloat16."""
        pointers = q.data_ptr() | k.data_ptr() | v.data_ptr()
        kind = _kind(q, k, v, inputs, scale, backend, None, pointers)
        launch = self._prepared.get(("quantized", scales.kind, *kind))
        if launch is None:
            from attndsl.runtime.quantized import prepare_quantized

            launch = prepare_quantized(self, q, k, v, scales, inputs, scale, backend, kind[-1])
            self._keep(("quantized", scales.kind, *kind), launch)
        found: tuple[Tensor, Tensor] = launch(q, k, v, scales, inputs, args, scale, None)
        return found

    def _dense(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs, those that hold entries with their last dimension dense, as kernels want it."""
        return [
            x.contiguous() if i in self._views and x.dim() and x.stride(-1) != 1 else x for i, x in enumerate(inputs)
        ]

    def _entries(self, inputs: Sequence[Tensor]) -> int:
        """The pointers of entries, whose alignment kernels depend on."""
        found = 0
        for i in self._views:
            found |= inputs[i].data_ptr()
        return found

    def _readable(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs, each with an entry; those that hold entries of views have as many as there are."""
        return [x if i in self._views else readable(x) for i, x in enumerate(inputs)]

    def _keep(self, key: Any, launch: Any) -> Any:
        """Keep a prepared launch; a decode makes one a length, so the store is emptied now and then."""
        if len(self._prepared) >= MAX_PREPARED:
            self._prepared.clear()
        self._prepared[key] = launch
        return launch

    def _text(self, generate: Callable[[Any], Any], plan: ForwardPlan | BackwardPlan) -> Any:
        """What a printer makes of a plan, printed once."""
        key = (generate, plan.spec, plan.tiling, id(plan))
        found = self._texts.get(key)
        if found is None:
            # The plan is kept too, so that no other plan takes its identity.
            found = self._texts[key] = (generate(plan), plan)
        return found[0]

    def _prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: Sequence[Tensor],
        scale: float | None,
        backend: str,
        aligned: bool,
        drops: bool,
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """Checks a kind of call and prepares its launch."""
        program, spec = self.program_of(scale), replace(self.spec_of(q, k, v, inputs, scale), dropout=drops)
        if not k.shape[2]:
            inputs = self._readable(inputs)
        if self.choose(backend, spec, max(q.shape[2], k.shape[2])) == "cpu":
            from attndsl.runtime.cpu import CpuForward

            plans = forward_plans(program, replace(spec, backend=Backend.CPU), self.tiling)
            functions = [CpuForward(plan, self._text(self.generators.cpu_forward, plan)) for plan in plans]
            return self.deriving(plans[0].program, q, k, v, inputs).forward(in_turn(*functions))
        from attndsl.runtime.moved import moved_forward
        from attndsl.runtime.printing import printed_forward
        from attndsl.runtime.triton_launch import (
            INTERPRETED,
            TritonForward,
            loads_for,
            shared_cache,
            together,
            why_not_gluon,
        )  # fmt: skip

        views = all_entries(program, k, v, inputs)
        spec = replace(spec, loads=loads_for(spec, aligned, k, v, *views))
        spec = replace(spec, whole=is_whole(program, call_shape(q, k, v)))
        if (moved := moved_forward(self, program, spec, q, k, v, inputs, backend, aligned)) is not None:
            return moved
        backends: tuple[Backend, ...] = (Backend.TRITON,)
        if backend in ("auto", "gluon"):
            reason = why_not_gluon(program, spec, aligned, q, k, v, *views)
            if backend == "gluon" and reason:
                raise error("A510", reason, help="leave `backend` out to get the portable kernel")
            if not reason:
                backends = (Backend.GLUON,) if backend == "gluon" else (Backend.GLUON, Backend.TRITON)
        printers = {
            Backend.TRITON: self.generators.triton_forward,
            Backend.GLUON: self.generators.gluon_forward,
        }
        cache = None if INTERPRETED else shared_cache()
        kernels = printed_forward(program, spec, backends, self.tiling, printers, cache)
        if cache is not None and self.keep_text is not None:
            self.keep_text()
            self.keep_text = None
        deriving = self.deriving(kernels[0].program, q, k, v, inputs)
        inputs = [*inputs, *deriving.examples]
        steps: list[Callable[[], Any]] = [
            functools.partial(TritonForward, x, q, k, v, inputs, aligned) for x in kernels if x.gathered is None
        ]
        if kernels[0].gathered is not None:
            from attndsl.runtime.triton_gathered import GatheredForward

            steps.insert(0, functools.partial(GatheredForward, kernels[0], q, k, v, inputs, aligned))
        return deriving.forward(in_turn(*together(steps)))

    def _prepare_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], scale: float | None,
        backend: str, aligned: bool, drops: bool, uses_lse: bool,
    ) -> Callable[..., Gradients]:  # fmt: skip
        program, spec = self.program_of(scale), replace(self.spec_of(q, k, v, inputs, scale), dropout=drops)
        if not k.shape[2]:
            inputs = self._readable(inputs)
        if self.choose(backend, spec, max(q.shape[2], k.shape[2])) == "cpu":
            from attndsl.runtime import cpu_backward

            tilings = None if self.tiling is None else (self.tiling, self.tiling)
            plans = backward_plans(program, replace(spec, backend=Backend.CPU), tilings, uses_lse=uses_lse)
            generate = self.generators.cpu_backward
            functions = tuple(cpu_backward.CpuBackward(plan, self._text(generate, plan)) for plan in plans)
            deriving = self.deriving(plans[0].program, q, k, v, inputs)
            return deriving.backward(cpu_backward.InTurn(functions))
        from attndsl.runtime import gluon_backward
        from attndsl.runtime.moved import moved_backward
        from attndsl.runtime.printing import printed_backward, printed_gradients
        from attndsl.runtime.triton_backward import prepare_backward
        from attndsl.runtime.triton_launch import INTERPRETED, loads_for, shared_cache

        spec = replace(spec, loads=loads_for(spec, aligned, q, k, v, dout, *all_entries(program, k, v, inputs)))
        moved = moved_backward(self, program, spec, dout, q, k, v, inputs, backend, aligned, uses_lse)
        if moved is not None:
            return moved
        shape, cache = call_shape(q, k, v), None if INTERPRETED else shared_cache()
        kernels = None
        if self.tiling is None and not gluon_backward.why_not(program, spec, q, backend):
            on_hopper = replace(spec, backend=Backend.GLUON)

            def wanted(plan: BackwardPlan) -> bool:
                return backend == "gluon" or not prefers_two_passes(plan, shape)

            kernels = printed_gradients(program, on_hopper, uses_lse, wanted, self.generators, cache)
        if kernels is None:
            spec = replace(spec, whole=whole(program, spec, shape))
            kernels = printed_backward(program, spec, uses_lse, self.tiling, self.generators, cache)
        deriving = self.deriving(kernels.pieces[0][0].program, q, k, v, inputs)
        inputs = [*inputs, *deriving.examples]
        return deriving.backward(prepare_backward(kernels, dout, q, k, v, inputs, aligned))

    def deriving(self, program: Program, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Deriving:
        """How launches of a plan's program get their derived inputs."""
        from attndsl.runtime.derive import Deriver
        from attndsl.runtime.deriving import Deriving

        sizes = [torch.empty_like(x, device="meta") for x in inputs]
        return Deriving(Deriver(program, call_shape(q, k, v), q.device, self._kept, sizes))

    def program_of(self, scale: float | None) -> Program:
        """The program, whose own scale a call's takes the place of."""
        if scale is None or self.program.only.scale is None:
            return self.program
        return self.program.with_branch(scale=None)

    def spec_of(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], scale: float | None) -> Spec:
        """What the call's plan is made for. Raises `PatternError` when the call does not fit the program."""
        shape = call_shape(q, k, v)
        check_tables(self.program, shape)
        check_inputs(self.program, shape, inputs, q.device)
        check_entries(self.program, q, shape.v_dim, inputs)
        check_rows(self.program, shape, takes_more_rows_than_keys)
        return Spec(
            shape.heads, shape.kv_heads, shape.dim, shape.v_dim, dtype_of(q), device_target(q.device),
            scale_sign=1 if scale is None or scale > 0 else -1, even_start=even_start(self.program, shape),
            lists=lists_plans(self.program, inputs),
            maps=maps_call(self.program, shape), all_rows=shape.rows == shape.k_len and mixes(self.program),
        )  # fmt: skip

    def choose(self, backend: str, spec: Spec, tokens: int) -> str:
        """The backend of a call. Raises `PatternError` for one that does not exist, does not run on the device, or has
        too few bits for the integers of a call of so many tokens."""
        check_backend(backend)
        target = spec.target
        if backend == "auto":
            backend = "cpu" if target == "cpu" else "triton"
        if backend == "cpu" and target != "cpu":
            raise error(
                "A510", "the CPU backend takes tensors on the CPU", help="move q, k and v, or leave `backend` out"
            )
        if backend in ("triton", "gluon"):
            from attndsl.runtime.triton_launch import INTERPRETED

            if target == "cpu" and not INTERPRETED:
                raise error(
                    "A510", "Triton kernels run on a GPU",
                    help="move q, k and v to one, or set TRITON_INTERPRET=1 to interpret the kernel",
                )  # fmt: skip
            if spec.dtype is DType.FLOAT64:
                raise error(
                    "A508", "float64 runs on the CPU backend only", help="convert to float32, or pass backend='cpu'"
                )
            if spec.dtype is DType.BFLOAT16 and INTERPRETED:
                # It multiplies their bits as integers.
                raise error(
                    "A508", "Triton's interpreter does not multiply bfloat16", help="convert to float16 or float32"
                )
            check_tokens(self.program, tokens)
        return backend


def lists_plans(program: Program, inputs: Sequence[Tensor]) -> bool:
    """Whether a call's plans, where it has any, list members."""
    plans = [x for decl, x in zip(program.inputs, inputs, strict=True) if decl.members]
    return bool(plans) and all(x.dtype != torch.uint8 for x in plans)


def _kind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Sequence[Tensor],
    scale: float | None,
    backend: str,
    dropout: Dropout | None,
    pointers: int,
) -> tuple[Any, ...]:
    """Everything that a launch depends on; last whether all pointers are aligned."""
    return (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.device, k.device,
        v.device, backend, scale if scale is None else scale > 0, dropout is None,
        tuple((x.shape, x.stride(), x.dtype, x.device) for x in inputs), pointers & 15 == 0,
    )  # fmt: skip


def default_scale(dim: int) -> float:
    return 1.0 / math.sqrt(dim)


__all__ = ["Engine", "Generators", "Gradients", "Loads", "default_scale"]
