"""Text that may hold anything, for an HTML report."""

from __future__ import annotations

import unicodedata
from html import escape

_BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def shown(text: str) -> str:
    r"""The text with what cannot be seen or encoded spelled out, "\n" for a line break say.

    These are control characters, unpaired surrogates (of file names that are no UTF-8) and
    characters that turn the direction of writing.
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or character in _BIDIRECTIONAL
        else character
        for character in text
    )


def html_text(text: str) -> str:
    """The text as HTML shows it."""
    return escape(shown(text))
