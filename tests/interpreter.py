"""Triton's interpreter, made faster: what it makes anew at every operation is kept, and what nothing reads is not made.

Most of the suite's time is spent in that interpreter, and most of its own went to names of types that nothing prints,
to tables of dtypes, to wrapping the language again at each function that a kernel calls, and to overflow checks whose
result goes to an assertion that is off. What kernels compute is the same to the bit (`test_interpreter.py`). Other
versions than the one this was written for run as they are.
"""

import ast
import copy
import inspect
import linecache
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import CodeType, SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

VERSION = "3.6."


def make_faster() -> None:
    """Replace the slow parts, for the whole process."""
    if not triton.__version__.startswith(VERSION):
        return
    builder = interpreter.interpreter_builder
    assert not builder.options.debug  # so that nothing reads what `sanitize_overflow` computes
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _numpy_dtype
    interpreter._patch_builtin = _wrap_builtins
    interpreter._patch_lang = _wrap_language
    interpreter.FunctionRewriter.rewrite_ast = _rewritten
    tl.core.tensor.__init__ = _make_tensor
    tl.core.block_type.__init__ = _make_block_type
    tl.core.tuple_type.__init__ = _make_tuple_type
    tl.core.tuple.__init__ = _make_tuple
    # Made where they are read: names in messages, types of tuples in signatures.
    tl.core.tuple.type = property(_type_of_tuple, _set_type_of_tuple)
    tl.core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    tl.core.tuple_type.name = property(
        lambda self: "[" + ",".join(f"{k}:{v}" for k, v in zip(self.fields, self.types, strict=True)) + "]"
    )


# ------------------------------------------------------------------------------------ types


_numpy_dtype_of_a_scalar = cache(interpreter._get_np_dtype)


def _numpy_dtype(dtype: Any) -> Any:
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _numpy_dtype_of_a_scalar(scalar)


@cache
def _shape(sizes: tuple[int, ...]) -> tuple[Any, int, Any, Any]:
    """The shape and the size of a type, and of its tensors. Nothing changes them, so all of a shape share them."""
    numel = triton._utils.validate_block_shape(sizes)
    return tl.core.tuple(sizes), numel, tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(numel)


def _make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    assert isinstance(shape, list | tl.core.tuple)
    self.element_ty = element_ty
    sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.shape, self.numel, *self.of_tensors = _shape(sizes)


def _make_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle = handle
    self.shape, self.numel = type.of_tensors if type.is_block() else _shape(())[2:]
    self.type = type
    self.dtype = type.scalar


def _make_tuple_type(self: Any, types: Any, fields: Any = None) -> None:
    self.types = types
    self.fields = fields or [""] * len(types)


def _make_tuple(self: Any, values: Any, type: Any = None) -> None:
    self.values = list(values)
    self._type = type if type is None or isinstance(type, tl.core.tuple_type) else tl.core.tuple_type(type)


def _type_of_tuple(self: Any) -> Any:
    if self._type is None:
        self._type = tl.core._type_for_tuple_values(self.values)
    return self._type


def _set_type_of_tuple(self: Any, type: Any) -> None:
    self._type = type


# ------------------------------------------------------------------------------------ functions


_wrapped = False


@cache
def _builtins(owner: Any) -> list[tuple[str, Any]]:
    """The operations of a module or class, as they are where nothing is wrapped."""
    return [(name, member) for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)]


def _wrap_builtins(owner: Any, builder: Any, scope: Any) -> None:
    semantic = interpreter.TritonSemantic(builder)

    def wrapper(member: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)

        return call

    for name, member in _builtins(owner):
        scope.set_attr(owner, name, wrapper(member))


_wrap_the_language_of = interpreter._patch_lang


# Stands for a function of a module that sees all of the language that any module with kernels sees.
_EVERYTHING = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


def _wrap_language(function: Any) -> Any:
    """Once a launch, with all that a kernel's own functions see. Triton's own wraps again at each call of those, and
    leaves what it wrapped there for ever."""
    global _wrapped
    scope = interpreter._LangPatchScope()
    if not _wrapped:
        scope = _wrap_the_language_of(_EVERYTHING)
        restore = scope.restore

        def restored() -> None:
            global _wrapped
            restore()
            _wrapped = False

        scope.restore = restored
        _wrapped = True
    return scope


# ------------------------------------------------------------------------------------ source


def _rewritten(self: Any) -> Any:
    """The function with a tensor made of each value that it assigns."""
    function = self.fn
    path = function.__code__.co_filename
    text = "".join(linecache.getlines(path, function.__globals__))
    if not text:
        return function
    namespace = dict(self.kwargs)
    function.__globals__["interpreter_semantic"] = interpreter.interpreter_semantic
    exec(_compiled(text, path, function.__name__), function.__globals__, namespace)
    return namespace[function.__name__]


@cache
def _functions(text: str) -> dict[str, ast.FunctionDef]:
    """The functions of a file: parsed once, and not once each."""
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


@cache
def _compiled(text: str, path: str, name: str) -> CodeType:
    """Code that defines a function of a file."""
    function = copy.copy(_functions(text)[name])
    function.decorator_list = []
    function.body = [_assigning(statement) for statement in function.body]
    return compile(ast.Module([function], []), path, "exec")


def _assigning(statement: ast.stmt) -> ast.stmt:
    made = copy.copy(statement)
    for block in ("body", "orelse"):
        if hasattr(made, block):
            setattr(made, block, [_assigning(inner) for inner in getattr(made, block)])
    if isinstance(made, ast.Assign):
        tensor = ast.Attribute(ast.Name("interpreter_semantic", ast.Load()), "to_tensor", ast.Load())
        call = ast.Call(tensor, [made.value, ast.Constant(False)], [])
        for node in (tensor.value, tensor, call.args[1], call):
            ast.copy_location(node, made.value)
        made.value = call
    return made
