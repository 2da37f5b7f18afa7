"""Text that may hold anything, such as file names, made fit for a terminal and for HTML."""

from __future__ import annotations

import unicodedata
from html import escape

_BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def shown(text: str) -> str:
    r"""The text with characters that cannot be seen or encoded spelled out: "\n" for a line break.

    These are control characters, unpaired surrogates (of file names that are not UTF-8) and
    characters that change the direction of writing.
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or character in _BIDIRECTIONAL
        else character
        for character in text
    )


def html_text(text: str) -> str:
    """The text, after `shown`, escaped for HTML."""
    return escape(shown(text))
