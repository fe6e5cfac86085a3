"""The language front end: text to the typed program (`SPEC.md` is the language's specification)."""

if not __name__.startswith("attndsl."):
    raise ImportError(
        "import this package as attndsl.grammar: a second copy of its modules would not be equal to the first"
    )

from attndsl.grammar.format import format_source
from attndsl.grammar.lower import Loaded, load
from attndsl.grammar.parse import parse

__all__ = ["Loaded", "format_source", "load", "parse"]
