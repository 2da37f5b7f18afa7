"""`patchsvdd score` and `patchsvdd watch`; what they write is in `outputs`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files.pages import is_stream, require_video
from ..training.interrupts import Terminated
from .options import (
    SOME_FAILED,
    TERMINATED,
    DeviceOption,
    ImagesArgument,
    ModelArgument,
    OverwriteOption,
    PagesOption,
    RateOption,
    loading,
    one_of,
    require_writable,
)

if TYPE_CHECKING:
    from ..files.sources import Source
    from ..training.workers import Workers

OutputOption = Annotated[
    Path, typer.Option("--output", "-o", help="Folder for the table, heat maps and maps.")
]
HeatMapsOption = Annotated[
    bool, typer.Option(help="Write a heat map over each image, to OUTPUT/heat-maps.")
]
MapsOption = Annotated[
    str | None,
    typer.Option(
        help="Write the anomaly maps to OUTPUT/maps: npy and tiff hold float32, png 16 bits.",
        **one_of("npy", "tiff", "png"),
    ),
]
MasksOption = Annotated[
    bool,
    typer.Option(
        "--masks",
        help="Write a mask for each image, at its own size, to OUTPUT/masks: white where it is "
        "anomalous.",
    ),
]
ChoiceOption = Annotated[
    str | None,
    typer.Option(
        "--category",
        help="Of a model of several (train --together): the category of all images; or nearest, "
        "for each the one whose normal patches are nearest. Default: the innermost folder in an "
        "image's path that is called as one, else the nearest.",
        show_default=False,
    ),
]
FormatOption = Annotated[
    str,
    typer.Option(
        "--format",
        help="Format of the table; jsonl has regions, too, parquet needs pyarrow.",
        **one_of("csv", "jsonl", "parquet"),
    ),
]


def score(
    model: ModelArgument,
    images: ImagesArgument,
    output: OutputOption = Path("scores"),
    heat_maps: HeatMapsOption = True,
    maps: MapsOption = None,
    masks: MasksOption = False,
    coco: Annotated[
        Path | None,
        typer.Option(
            help="Write the anomalous regions of all images to this file, as COCO's JSON."
        ),
    ] = None,
    table_format: FormatOption = "csv",
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML report of these images to this folder.")
    ] = None,
    false_alarm_rate: RateOption = None,
    category: ChoiceOption = None,
    pages: PagesOption = "first",
    every: Annotated[
        int, typer.Option(help="Of a video, take the first of so many frames, and so on.", min=1)
    ] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an earlier run into OUTPUT ended.")
    ] = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Score images: writes a table, scores.csv, and a heat map per image.

    Any number of images, in bounded memory. One that cannot be read is reported in the table and
    skipped; the exit status is then 3. Heat maps and maps in OUTPUT are not scored themselves.
    """
    if resume and overwrite:
        raise typer.BadParameter("give either --resume or --overwrite")
    if coco is not None:
        require_writable(coco, "--coco", overwrite or resume)
    with loading():
        from ..detector.categories import open_detectors, require_category
        from ..files.sources import image_sources, num_images, require_given
        from ..ops.backends import resolve_device
        from ..training.workers import local_device
        from .outputs import Outputs, score_all
        from .reports import require_report
        from .terminal import joined, require_same

    require_given(images)
    outputs = Outputs(output, table_format, heat_maps, maps, masks, coco)
    target = local_device(resolve_device(device))
    with joined(target) as workers, _ended_by_sigterm():
        require_divisible(workers, images)
        require_same(workers, model)
        run = workers.from_first(lambda: outputs.claim(resume, overwrite))
        if report is not None:
            workers.from_first(lambda: require_report(report, overwrite))
        with workers.together():
            detectors = open_detectors(model, str(target))
        require_category(detectors, category)
        if report is not None:
            workers.from_first(lambda: require_report(report, overwrite, detectors))
        failed = score_all(
            detectors,
            lambda done: (
                s for s in image_sources(images, sys.stdin, pages, every) if str(s.path) not in done
            ),
            outputs,
            run,
            category=category,
            false_alarm_rate=false_alarm_rate,
            resume=resume,
            report=report,
            overwrite=overwrite,
            num_images=lambda done: num_images(images, pages, done, every),
            facts={"model": str(model), "images": " ".join(map(str, images))},
            workers=workers,
        )
    if failed:
        raise typer.Exit(SOME_FAILED)


def require_divisible(workers: Workers, images: Sequence[str]) -> None:
    """Raise ValueError unless processes can divide these images."""
    if workers.count > 1 and "-" in images:
        raise ValueError(
            f"the images that standard input lists cannot be divided over {workers.count} processes"
        )


def watch(
    model: ModelArgument,
    source: Annotated[
        str,
        typer.Argument(
            help='Folder that images arrive in; or a camera, "camera:0", or a stream, "rtsp://...".'
        ),
    ],
    output: OutputOption = Path("scores"),
    heat_maps: HeatMapsOption = True,
    maps: MapsOption = None,
    masks: MasksOption = False,
    table_format: FormatOption = "csv",
    false_alarm_rate: RateOption = None,
    category: ChoiceOption = None,
    interval: Annotated[
        float, typer.Option(help="Seconds between looks into the folder, or frames.", min=0.05)
    ] = 1.0,
    device: DeviceOption = "auto",
) -> None:
    """Score the images of a folder as they arrive, or frames of a camera, until Ctrl-C.

    Goes on where an earlier run into OUTPUT ended. A file is scored when it no longer grows.
    """
    folder, is_camera = Path(source), is_stream(source)
    if is_camera:
        require_video()
    elif not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if table_format == "parquet":
        raise typer.BadParameter("--format parquet is for `score`: a watch has no end to write it")
    if not is_camera and output.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{output} lies in {folder}, which is watched: use another --output")
    with loading():
        from ..detector.categories import open_detectors, require_category
        from ..files.sources import arriving_images, camera_frames
        from .outputs import Outputs, score_all

    outputs = Outputs(output, table_format, heat_maps, maps, masks)
    run = outputs.claim(resume=True, overwrite=False)
    detectors = open_detectors(model, device)
    require_category(detectors, category)

    def arriving(done: set[str]) -> Iterator[Source]:
        def is_done(path: Path) -> bool:
            return str(path) in done

        if is_camera:
            return camera_frames(source, is_done, interval)
        return arriving_images(folder, is_done, interval)

    with _ended_by_sigterm():
        score_all(
            detectors,
            arriving,
            outputs,
            run,
            category=category,
            false_alarm_rate=false_alarm_rate,
            resume=True,
            report=None,
            line_each=f"watching {source}; Ctrl-C ends it",
        )


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within the context, SIGTERM ends the run as Ctrl-C does, with exit status 143."""

    def end(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except Terminated:
        raise typer.Exit(TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
