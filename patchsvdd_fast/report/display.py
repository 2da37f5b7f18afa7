"""How results are shown in a notebook: short pages, drawings, tables.

These are the methods `_repr_html_`, `plot` and `to_pandas` of results: the classes stand in the
room `score`, below this one, and reach it through the package's face. Two optional libraries are
imported where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..score.image_result import ImageResult, ScoredImages
from .heat_maps import heat_map_overlay, smooth_map
from .pictures import jpeg_text
from .table import CATEGORY, COLUMNS, row_of
from .text import html_text, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

_MOST_ROWS = 10  # of a page
_THUMBNAIL, _PICTURE = 200, 640  # longer side of a picture in pixels: of many, and alone
_LONGEST_NAME = 60  # characters above a drawing
_ACROSS = 2  # drawings beside each other
_DRAWING = (6.0, 3.4)  # width and height of one in inches


def html_of_image(result: ImageResult) -> str:
    """The image, its heat map and its verdict as HTML that needs no other file."""
    notes = "".join(f"<div>{html_text(note)}</div>" for note in result.unusual)
    words = f"<div><b>{html_text(result.name)}</b>: {html_text(result.in_words())}</div>"
    return f"<div>{words}{notes}{_picture(result, _PICTURE)}</div>"


def html_of_images(scored: ScoredImages) -> str:
    """A table of the first ten images as HTML that needs no other file."""
    rows = "".join(
        f"<tr><td>{_picture(result, _THUMBNAIL)}</td><th>{html_text(result.name)}</th>"
        f"<td>{html_text(result.in_words())}</td>"
        f"<td>{'<br>'.join(map(html_text, result.unusual))}</td></tr>"
        for result in islice(scored, _MOST_ROWS)
    )
    left = len(scored) - _MOST_ROWS
    more = f"<div>and {left:,} more: .to_pandas() has all</div>" if left > 0 else ""
    head = "".join(f"<th>{name}</th>" for name in ("heat map", "image", "result", "unusual"))
    return (
        f"<div><div>{html_text(repr(scored))}</div><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>{more}</div>"
    )


def _picture(result: ImageResult, side: int) -> str:
    source = f"data:image/jpeg;base64,{jpeg_text(_overlay(result), side)}"
    return f'<img alt="{html_text(result.name)}" src="{source}">'


def _overlay(result: ImageResult) -> Image.Image:
    picture, values = result.original_picture, smooth_map(result.scores)
    return heat_map_overlay(picture, values, result.map_threshold)


def plot_image(result: ImageResult, axes: Axes | None = None) -> Axes:
    """Draw the image beside its heat map, below its name and verdict; axes: None makes new ones.

    Raises ImportError without matplotlib.
    """
    if axes is None:
        _, axes = _pyplot().subplots(figsize=_DRAWING, layout="constrained")
    axes.imshow(_overlay(result))
    name = shown(result.name)
    if len(name) > _LONGEST_NAME:  # the end tells more than the folders
        name = f"...{name[3 - _LONGEST_NAME :]}"
    # Names may hold what matplotlib takes for formulas.
    axes.set_title(f"{name}\n{result.in_words()}", fontsize=9, parse_math=False)
    axes.set_axis_off()
    return axes


def plot_images(scored: ScoredImages, most: int) -> list[Axes]:
    """Draw the first images, at most so many, in one figure; returns the axes of each.

    Raises ImportError without matplotlib, ValueError for a `most` below 1.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    count = min(most, len(scored))
    across = min(count, _ACROSS)
    down = -(-count // across)
    _, grid = _pyplot().subplots(
        down,
        across,
        figsize=(across * _DRAWING[0], down * _DRAWING[1]),
        layout="constrained",
        squeeze=False,
    )
    for unused in grid.flat[count:]:
        unused.set_axis_off()
    return [
        plot_image(result, axes) for result, axes in zip(scored, grid.flat[:count], strict=False)
    ]


def to_pandas(results: Iterable[ImageResult]) -> DataFrame:
    """A table of a row an image, with the columns of scores.csv in their order.

    results: also those of `PatchSVDD.score_stream`. What makes images unusual is joined by "; ", as
    there. Raises ImportError without pandas.
    """
    pandas: Any = _pandas()
    rows = [row_of(result) for result in results]
    for row in rows:
        row["unusual"] = "; ".join(row["unusual"]) or None
    columns = [*COLUMNS, *([CATEGORY] if any(CATEGORY in row for row in rows) else [])]
    return pandas.DataFrame(rows, columns=columns)


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas needs pandas: pip install pandas") from error
    return pandas


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error
    return pyplot
