"""attndsl: attention patterns as programs, compiled to block-sparse kernels.

>>> import attndsl
>>> attn = attndsl.compile("causal & (window(512) | sink(4))")
"""

from attndsl.api import Attention, compare, compile
from attndsl.diagnostics import Diagnostic, PatternError, PatternWarning

__version__ = "0.1.0"

__all__ = ["Attention", "Diagnostic", "PatternError", "PatternWarning", "__version__", "compare", "compile"]
