"""Text for terminals: nothing that a file or its name says may act on the terminal."""

from __future__ import annotations

import unicodedata

from rich.console import Console
from rich.text import Text

# Everything that moves the cursor, sets colours or turns the writing direction is in these categories.
_ACTING = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def plain(text: str) -> str:
    """The text with characters that act on a terminal written out.

    >>> plain("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in _ACTING else c.encode("unicode_escape").decode()
        for c in text
    )


def show(console: Console, text: str, style: str = "") -> None:
    """Prints text as it is: no markup, no wrapping, colour only where the console has it."""
    console.print(Text(plain(text), style=style), soft_wrap=True)
