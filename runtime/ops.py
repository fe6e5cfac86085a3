"""The torch operators: how a compiled attention takes part in autograd, torch.compile, export and CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library
from torch.nn import Parameter

from attndsl.asking import not_an_int
from attndsl.diagnostics import PatternError, error
from attndsl.program import CallShape, Program
from attndsl.runtime.call import autocasts, check_backend, check_call
from attndsl.runtime.dropout import Dropout, check_rate, seed_tensor
from attndsl.runtime.outputs import empty_gradient, empty_output, in_order_of
from attndsl.runtime.registry import engine_of, found_first, left_key
from attndsl.runtime.transforms import mapped, no_forward_mode, transformed
from attndsl.widths import check_argument

_LIBRARY = Library("attndsl", "DEF")
_LIBRARY.define(
    "forward(str program, Tensor q, Tensor k, Tensor v, Tensor[] inputs, SymInt[] args, float? scale, str backend, "
    "float dropout=0.0, Tensor? seed=None) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "backward(str program, Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor[] inputs, SymInt[] args, float? scale, str backend, float dropout=0.0, Tensor? seed=None) "
    "-> (Tensor, Tensor, Tensor, Tensor[])"
)


def attend(
    key: str, q: Tensor, k: Tensor, v: Tensor, inputs: list[Tensor], args: list[int], scale: float | None, backend: str,
    dropout: float = 0, seed: int | Tensor | None = None, with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Output and lse, which may be None unless it is asked for.

    Where nothing traces the call (no modes, plain tensors) it skips the dispatcher, which costs several times a launch;
    where the last call was like this one, also what finds the launch.
    """
    if inputs or args:
        checked_values(key, inputs, args)
    if scale is not None and type(scale) is not float:
        check_call(scale)
    if not torch.compiler.is_compiling() and dropout == 0:
        again = engine_of(key).again
        if again is not None and again.fits(q, k, v, inputs, scale, backend):
            wanted = again.wants_gradients and torch.is_grad_enabled()
            if wanted and not left_key(key):
                return _recorded(key, again.launch, inputs, q, k, v, inputs, args, scale, backend)
            if not wanted and again.output is not None and not with_lse:
                return again.output(q, k, v, inputs, args, scale), None
            if not wanted:
                found: tuple[Tensor, Tensor] = again.launch(q, k, v, inputs, args, scale, None)
                return found
    check_call(scale, q=q, k=k, v=v)
    check_backend(backend)
    if left_key(key) and (found_first(key) or wants_gradients((q, k, v, *inputs))):
        from attndsl.runtime.left_tiles import attend_left

        return attend_left(key, q, k, v, inputs, args, scale, backend, dropout, seed)
    rate, given = 0.0, None
    if dropout != 0:
        rate, given = check_rate(dropout), seed_tensor(seed, q.device)
    tensors = (q, k, v, *inputs)
    if traced(tensors):
        out: tuple[Tensor, Tensor]
        if transformed():
            if autocasts(q.device):
                q, k, v = in_dtype(torch.get_autocast_dtype(q.device.type), q, k, v)
            out = _Attend.apply(key, scale, backend, args, rate, given, q, k, v, *inputs)
        else:
            out = torch.ops.attndsl.forward(key, q, k, v, inputs, args, scale, backend, rate, given)
        return out
    engine, drops = engine_of(key), _dropout(rate, given)
    launch, readable = engine.ready(q, k, v, inputs, scale, backend, drops)
    if readable is inputs and drops is None:
        engine.remember(q, k, v, inputs, scale, backend, launch)
    if wants_gradients(tensors):
        return _recorded(key, launch, readable, q, k, v, inputs, args, scale, backend, drops)
    found = launch(q, k, v, readable, args, scale, drops)
    return found


def checked_values(key: str, inputs: Sequence[object], args: Sequence[object]) -> None:
    """Raises `PatternError` for an input that is no tensor, or an argument that is no int or too large for kernels."""
    if not all(isinstance(x, Tensor) and not x.is_nested for x in inputs) or not all(map(_is_int, args)):
        raise _misfit(engine_of(key).program, inputs, args)
    if args and not torch.compiler.is_compiling():
        _check_arguments(key, args)


def _is_int(x: object) -> bool:
    return isinstance(x, int | torch.SymInt) and not isinstance(x, bool)


def _check_arguments(key: str, args: Sequence[Any]) -> None:
    program = engine_of(key).program
    for name, value in zip(program.args, args, strict=True):
        check_argument(program, name, value)


def _misfit(program: Program, inputs: Sequence[object], args: Sequence[object]) -> PatternError:
    """Names the first input that is no tensor, or argument that is no int. Plans may be left out, which stand last."""
    for decl, x in zip(program.inputs, inputs, strict=False):
        if not isinstance(x, Tensor) or x.is_nested:
            said = "dense tensor, not one that is nested" if isinstance(x, Tensor) else f"tensor, not {repr(x)[:40]}"
            return error("A517", f"input `{decl.name}` is a {said}", decl.span, help="pass torch.tensor(…)")
    name, value = next((n, x) for n, x in zip(program.args, args, strict=True) if not _is_int(x))
    return not_an_int(name, value)


def traced(tensors: tuple[Tensor, ...]) -> bool:
    """Whether a call has to go through torch's dispatcher."""
    if (
        torch.compiler.is_compiling()
        or tensors[0].is_meta
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_any_autocast_enabled()
        # Tangents, of which there are none here: autograd says so.
        or forward_ad._current_level >= 0
    ):
        return True
    for x in tensors:  # noqa: SIM110 (a generator costs more than the loop)
        # Of a tensor that is negated when it is read, memory holds the opposite: the dispatcher makes it anew.
        if (type(x) is not Tensor and type(x) is not Parameter) or x.is_neg():
            return True
    return False


def wants_gradients(tensors: tuple[Tensor, ...]) -> bool:
    """Whether autograd records a call."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                return True
    return False


def _dropout(rate: float, seed: Tensor | None) -> Dropout | None:
    return None if seed is None else Dropout(rate, seed)


def _forward(
    key: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Sequence[Tensor],
    args: Sequence[int],
    scale: float | None,
    backend: str,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if args:
        # A compiled graph knows them only now.
        _check_arguments(key, args)
    return engine_of(key).forward(q, k, v, inputs, args, scale, backend, _dropout(dropout, seed))


def _forward_fake(
    key: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Sequence[Tensor],
    args: Sequence[int],
    scale: float | None,
    backend: str,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = CallShape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    return empty_output(q, shape)


# -------------------------------------------------------------------------------------- gradients


def _backward(
    key: str,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    inputs: Sequence[Tensor],
    args: Sequence[int],
    scale: float | None,
    backend: str,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    originals = (q, k, v)
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = in_order_of(q, out), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    engine = engine_of(key)
    *found, learned = engine.backward(
        dout, dlse, q, k, v, out, lse, inputs, args, scale, backend, _dropout(dropout, seed)
    )  # fmt: skip
    dq, dk, dv = (in_order_of(x, gradient) for x, gradient in zip(originals, found, strict=True))
    return dq, dk, dv, _of_learnable(engine.program, inputs, learned)


def _of_learnable(program: Program, inputs: Sequence[Tensor], found: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients of learnable inputs: one that nothing reads gets zeros."""
    return [
        torch.zeros(x.shape, dtype=x.dtype, device=x.device) if gradient is None else gradient.contiguous()
        for decl, x, gradient in zip(program.inputs, inputs, found, strict=True)
        if decl.learnable
    ]


def _backward_fake(
    key: str,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    inputs: Sequence[Tensor],
    args: Sequence[int],
    scale: float | None,
    backend: str,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    declared = zip(engine_of(key).program.inputs, inputs, strict=True)
    gradients = [x.new_empty(x.shape) for decl, x in declared if decl.learnable]
    return empty_gradient(q), empty_gradient(k), empty_gradient(v), gradients


class _Attend(torch.autograd.Function):
    """out, lse with a gradient: dout, dlse -> dq, dk, dv, and the gradients of learnable inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        key: str,
        scale: float | None,
        backend: str,
        args: Sequence[int],
        dropout: float,
        seed: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *inputs: Tensor,
    ) -> Any:
        if not traced((q, k, v, *inputs)):
            return _forward(key, q, k, v, inputs, args, scale, backend, dropout, seed)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.attndsl.forward(key, q, k, v, list(inputs), args, scale, backend, dropout, seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if any(ctx.needs_input_grad):
            key, scale, backend, args, dropout, *tensors = inputs
            check_learnable(engine_of(key).program, ctx.needs_input_grad[9:])
            ctx.save_for_backward(*output, *tensors)
            ctx.call = (key, args, scale, backend, dropout)
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        return None, None, None, None, None, None, *_differentiated(ctx, dout, dlse)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode()


class _Recorded(torch.autograd.Function):
    """`_Attend` of calls that only autograd watches: what `launch` finds, with a gradient.

    torch.func takes functions with a `setup_context` alone. Torch binds the arguments of such to a signature at each
    call, which takes as long as ten launches.
    """

    @staticmethod
    def forward(
        ctx: Any, call: tuple[Any, ...], launch: Callable[[], tuple[Tensor, Tensor]], seed: Tensor | None, q: Tensor,
        k: Tensor, v: Tensor, *inputs: Tensor,
    ) -> Any:  # fmt: skip
        check_learnable(engine_of(call[0]).program, ctx.needs_input_grad[6:])
        out, lse = launch()
        ctx.save_for_backward(out, lse, seed, q, k, v, *inputs)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        return None, None, None, *_differentiated(ctx, dout, dlse)


def _recorded(
    key: str, launch: Callable[..., Any], readable: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor,
    inputs: Sequence[Tensor], args: Sequence[int], scale: float | None, backend: str, dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse of a call that only autograd watches. readable: the inputs as the launch takes them."""
    rate, seed = (0.0, None) if dropout is None else (dropout.rate, dropout.seed)
    call = (key, args, scale, backend, rate)
    run = functools.partial(launch, q, k, v, readable, args, scale, dropout)
    out: tuple[Tensor, Tensor] = _Recorded.apply(call, run, seed, q, k, v, *inputs)
    return out


def _differentiated(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> list[Tensor | None]:
    """Gradients of q, k, v and the inputs (None where they are not learnable)."""
    out, lse, seed, q, k, v, *inputs = ctx.saved_tensors
    key, args, scale, backend, dropout = ctx.call
    if dout is None:
        dout = torch.zeros_like(out)
    engine = engine_of(key)
    found: Sequence[Tensor]
    if (
        (known := engine.again_backward) is not None
        and dlse is None
        and seed is None
        and not torch.compiler.is_compiling()
        # A second derivative was asked for, and is refused below.
        and not torch.is_grad_enabled()
        and known.fits(dout, q, k, v, out, lse, inputs, scale, backend)
    ):
        dq, dk, dv, own = known.call.launch(dout, None, q, k, v, out, lse, inputs, args, scale, None)
        found = _of_learnable(engine.program, inputs, own)
    else:
        differentiate: Callable[..., Any] = _backward
        # Or something traces the call.
        if torch.is_grad_enabled() or traced((dout, q, k, v, *inputs)):
            differentiate = _backward_autograd if transformed() else torch.ops.attndsl.backward
        dq, dk, dv, found = differentiate(
            key, dout, dlse, q, k, v, out, lse, inputs, args, scale, backend, dropout, seed
        )  # fmt: skip
    learned = iter(found)
    gradients = [next(learned) if decl.learnable else None for decl in engine.program.inputs]
    return [dq, dk, dv, *gradients]


def check_learnable(program: Program, wanted: Sequence[bool]) -> None:
    """Raises `PatternError` for an input that requires a gradient and was not declared to get one."""
    for decl, wants in zip(program.inputs, wanted, strict=True):
        if wants and not decl.learnable:
            raise error(
                "A526",
                f"input `{decl.name}` requires a gradient and is not declared learnable",
                decl.span,
                help="declare it `learnable`, or detach the tensor",
            )


class _Once(torch.autograd.Function):
    """The backward pass, whose own derivative is refused when it is asked for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: tuple[Any, ...], dout: Tensor, dlse: Tensor | None, seed: Tensor | None, *tensors: Tensor) -> Any:
        key, args, scale, backend, dropout = call
        q, k, v, out, lse, *inputs = tensors
        with torch._C._AutoDispatchBelowAutograd():
            dq, dk, dv, gradients = torch.ops.attndsl.backward(
                key, dout, dlse, q, k, v, out, lse, inputs, args, scale, backend, dropout, seed
            )
        return dq, dk, dv, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass  # There is nothing to keep.

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise error(
            "A921",
            "attention has no second derivative here",
            help="write it with torch operators where you need one, or drop create_graph=True",
        )


def _forward_autograd(
    key: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Sequence[Tensor],
    args: Sequence[int],
    scale: float | None,
    backend: str,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if left_key(key) and wants_gradients((q, k, v, *inputs)):
        # Of a graph that was made where none were.
        from attndsl.runtime.left_tiles import attend_left

        return attend_left(key, q, k, v, inputs, args, scale, backend, dropout, seed)
    out: tuple[Tensor, Tensor] = _Attend.apply(key, scale, backend, args, dropout, seed, q, k, v, *inputs)
    return out


def _backward_autograd(
    key: str,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    inputs: Sequence[Tensor],
    args: Sequence[int],
    scale: float | None,
    backend: str,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    call = (key, args, scale, backend, dropout)
    dq, dk, dv, *gradients = _Once.apply(call, dout, dlse, seed, q, k, v, out, lse, *inputs)
    return dq, dk, dv, gradients


# --------------------------------------------------------------------------------------- autocast


def in_dtype(dtype: torch.dtype, *tensors: Tensor) -> Iterator[Tensor]:
    """Each tensor in the autocast dtype, which leaves float64 alone."""
    return (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _register_autocast(device: str) -> None:
    """The operators under autocast: q, k and v in its dtype, as in torch's own attention, and inputs as they are.

    Inside, the products of the CPU lowering are in float32 all the same.
    """
    name = f"Autocast{device.upper()}"
    here = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))

    def forward(key: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        q, k, v = in_dtype(torch.get_autocast_dtype(device), q, k, v)
        with torch._C._ExcludeDispatchKeyGuard(here):
            return torch.ops.attndsl.forward(key, q, k, v, *rest)

    def backward(*call: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(here):
            return torch.ops.attndsl.backward(*call)

    _LIBRARY.impl("forward", forward, name)
    _LIBRARY.impl("backward", backward, name)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("forward", _forward, _device)
    _LIBRARY.impl("backward", _backward, _device)
    _register_autocast(_device.lower())
_LIBRARY.impl("forward", _forward_autograd, "Autograd")
_LIBRARY.impl("backward", _backward_autograd, "Autograd")
# On "Meta", which fake tensors take too: `register_fake` looks up this module's source, 10 ms each.
_LIBRARY.impl("forward", _forward_fake, "Meta")
_LIBRARY.impl("backward", _backward_fake, "Meta")
mapped(_LIBRARY, "forward", "backward")
