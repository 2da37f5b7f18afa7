"""Text that may hold anything, such as file names, made fit for a terminal and for HTML."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
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


def definitions(pairs: Mapping[str, str]) -> str:
    """Names and values as the items of a `dl`."""
    return "".join(
        f"<div><dt>{html_text(name)}</dt><dd>{html_text(value)}</dd></div>"
        for name, value in pairs.items()
    )


def table(caption: str, rows: Sequence[Sequence[str]]) -> str:
    """A table. rows: the headings first; each row's first cell is its heading."""
    head = "".join(f'<th scope="col">{html_text(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{html_text(row[0])}</th>'
        + "".join(f"<td>{html_text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows[1:]
    )
    return (
        f'<div class="table"><table><caption>{html_text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def failures_section(failures: Sequence[tuple[str, str]]) -> str:
    """The section that lists images by name, each with the reason why it was not scored."""
    if not failures:
        return ""
    items = "".join(
        f"<li><strong>{html_text(name)}</strong> {html_text(message)}</li>"
        for name, message in failures
    )
    return (
        f'<section class="failures"><h2>Not scored: {len(failures)}</h2><ul>{items}</ul></section>'
    )
