"""attndsl: attention patterns as programs, compiled to block-sparse kernels.

>>> import attndsl
>>> attn = attndsl.compile("causal & (window(512) | sink(4))")
"""

import importlib
from typing import Any

from attndsl.api import Attention, compare, compile, document_ids
from attndsl.diagnostics import Diagnostic, PatternError, PatternWarning

__version__ = "0.1.0"

__all__ = [
    "Attention", "Diagnostic", "PatternError", "PatternWarning", "__version__", "compare", "compile", "document_ids",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # These import torch, which takes seconds: only when they are asked for.
    if name in ("nn", "serving"):
        return importlib.import_module(f"attndsl.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
