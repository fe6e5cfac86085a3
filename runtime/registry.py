"""What this process has compiled, under the keys by which operators and graphs name it. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attndsl.diagnostics import error

if TYPE_CHECKING:
    from attndsl.runtime.decode import DecodeGenerators, Decoder
    from attndsl.runtime.engine import Engine

_MAKERS: dict[str, Callable[[], Engine]] = {}
_ENGINES: dict[str, Engine] = {}
_LEFT: dict[str, str] = {}
_FOUND_FIRST: set[str] = set()
_DECODERS: dict[str, Decoder] = {}
_GENERATORS: dict[str, Callable[[], DecodeGenerators]] = {}


def register(key: str, make: Callable[[], Engine], decode: Callable[[], DecodeGenerators]) -> None:
    """Make a program known under its key; its engine, and what decodes, are made when first asked for."""
    _MAKERS.setdefault(key, make)
    _GENERATORS.setdefault(key, decode)


def engine_of(key: str) -> Engine:
    """The engine of a key, one for the whole process."""
    engine = _ENGINES.get(key)
    if engine is not None:
        return engine
    if key not in _MAKERS:
        raise error(
            "A520", "this process has not compiled the attention that the graph calls",
            help="call attndsl.compile with the same program before running an exported graph",
        )  # fmt: skip
    return _ENGINES.setdefault(key, _MAKERS[key]())


def register_left(key: str, left: str, always: bool) -> None:
    """Make known under which key stands the attention to those tiles that a program, which skips, leaves. always: calls
    without gradients go there too."""
    _LEFT[key] = left
    if always:
        _FOUND_FIRST.add(key)


def left_key(key: str) -> str:
    """That key; empty where a program does not skip."""
    return _LEFT.get(key, "")


def found_first(key: str) -> bool:
    """Whether calls of a program find which tiles are left whether gradients are asked for or not."""
    return key in _FOUND_FIRST


def attend_operator(needed: bool = False) -> Any:
    """`attend` of `ops.py`, which imports torch: where torch is not there yet, None unless it is `needed`.

    An attention looks for it once: an import statement takes as long as a tenth of a call.
    """
    if not needed and "torch" not in sys.modules:
        return None
    from attndsl.runtime.ops import attend

    return attend


def decoder_of(key: str) -> Decoder:
    """The decode kernels of a key, beside its engine."""
    decoder = _DECODERS.get(key)
    if decoder is None:
        from attndsl.runtime.decode import Decoder

        decoder = _DECODERS.setdefault(key, Decoder(engine_of(key), _GENERATORS[key]()))
    return decoder
