"""Options that several commands share, and helpers for their values; imports nothing slow."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..detector.patch_svdd import PatchSVDD

INTERRUPTED = 130
"""Exit status after Ctrl-C, by the shell's convention."""
TERMINATED = 143
"""Exit status after SIGTERM, likewise."""
SOME_FAILED = 3
"""Exit status if some images could not be read; all others were scored."""


DeviceOption = Annotated[
    str, typer.Option(help='"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".')
]
ResizeOption = Annotated[
    str,
    typer.Option(
        help='Resize images to a square of this side, or "HEIGHTxWIDTH" pixels; or "none".'
    ),
]
CombinationOption = Annotated[
    str, typer.Option(help='How levels become one map: "mult" (product), "sum", "K64" or "K32".')
]
EncoderOption = Annotated[
    Path | None,
    typer.Option(
        help="Use this encoder instead of training one: a model, a training checkpoint, or an "
        "official checkpoint (.pkl)."
    ),
]
RateOption = Annotated[
    float | None,
    typer.Option(
        help="Share of good images that may be called anomalous; default: as in training "
        "(--contamination), or the least that the number of training images can promise."
    ),
]
ImagesArgument = Annotated[
    list[str],
    typer.Argument(
        help='Images, folders, globs in quotes, or "-" for a list of paths on standard input.'
    ),
]
ModelArgument = Annotated[Path, typer.Argument(help="Model file written by `patchsvdd train`.")]


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Within the context, which is for a command's imports, Ctrl-C ends the process at once.

    PyTorch takes seconds to import. A KeyboardInterrupt in that time would end in a traceback, or
    the module that is being imported might take it for a broken library. Nothing is lost: there is
    nothing to save yet.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler  # a background job's
    ):
        yield
        return

    def end(*_: object) -> None:
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def parse_resize(text: str) -> int | tuple[int, int] | None:
    """The value of --resize as `PatchSVDD`'s `image_size`. Raises typer.BadParameter."""
    if text.lower() == "none":
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f'--resize takes pixels, "HEIGHTxWIDTH" or "none", got {text!r}')
    sizes = [int(part) for part in parts]
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def threshold_in_words(detector: PatchSVDD) -> str:
    """A line that says a calibrated detector's threshold, and the rate that it promises."""
    return (
        f"threshold on the image score: {detector.threshold_:.6g}, exceeded by at most "
        f"{detector.false_alarm_rate_:.2g} of good images like these"
    )


def require_writable(output: Path, option: str = "--output") -> None:
    """Raise ValueError for a file that cannot be written: now, not after hours of training."""
    if output.is_dir():
        raise ValueError(f"{output} is a folder; {option} names a file")
    if not output.parent.is_dir():
        raise ValueError(f"the folder of {option} does not exist: {output.parent}")
