"""`patchsvdd info`, `explain` and `export`: commands for one model file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..files.claims import RunFolder, claimed_file
from ..files.folders import counted
from .options import (
    SOME_FAILED,
    CategoryOption,
    DeviceOption,
    ImagesArgument,
    ModelArgument,
    OverwriteOption,
    RateOption,
    loading,
    one_of,
    require_writable,
    threshold_in_words,
)
from .terminal import console, print_error, print_line

if TYPE_CHECKING:
    from ..files.sources import Source
    from ..score.regions import Region

_MOST_PICTURES = 20  # of an image: where all of it is anomalous, regions may be hundreds


def info(
    model: Annotated[
        Path | None, typer.Argument(help="A model file or training checkpoint to describe.")
    ] = None,
    layouts: Annotated[
        bool, typer.Option("--layouts", help="Show which folders of data sets are understood.")
    ] = False,
) -> None:
    """Show versions, backends, instruction sets and GPUs; or what a model file holds."""
    if layouts:
        if model is not None:
            raise typer.BadParameter("give either a model file or --layouts")
        _print_layouts()
        return
    with loading():
        from ..ops.backends import describe

        if model is not None:
            from ..detector.description import describe as describe_model

    table = Table(show_header=False, box=None)
    for name, value in (describe() if model is None else describe_model(model)).items():
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table)


def _print_layouts() -> None:
    from ..files.layouts import LAYOUTS

    for layout in LAYOUTS:
        print_line(layout.name)
        for part, where in layout.parts.items():
            if where:
                print_line(f"  {part:<10}  {where}")


def explain(
    model: ModelArgument,
    images: ImagesArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path(
        "explanations"
    ),
    false_alarm_rate: RateOption = None,
    category: CategoryOption = None,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Show each anomalous region side by side with the normal patch most like it.

    Of an image that is not anomalous, the pixel with the highest map value is shown.
    """
    with loading():
        from ..detector.patch_svdd import PatchSVDD
        from ..files.sources import image_sources, require_given
        from ..files.whole import written_whole
        from ..report.map_files import inner_path
        from ..report.side_by_side import side_by_side
        from ..report.summary import verdict_in_words

    require_given(images)
    run = RunFolder(output, overwrite=overwrite)
    run.check()
    detector = PatchSVDD.load(model, device=device, category=category)
    failed = 0

    def note_failure(_: Source, error: Exception) -> None:
        nonlocal failed
        failed += 1
        print_error(str(error))

    sources = image_sources(images, sys.stdin)
    stream = detector.score_stream(
        sources,
        false_alarm_rate=false_alarm_rate,
        on_error=note_failure,
        keep_originals=True,
    )
    with run, stream:
        for result in stream:
            regions = detector.explain(result)
            lower = "" if result.anomalous or result.anomalous is None else "; its highest place is"
            print_line(f"{result.name}: {verdict_in_words(result)}{lower}")
            image = os.path.abspath(result.source.path)  # noqa: PTH100 (follows no links)
            shown_regions = regions[:_MOST_PICTURES] or [detector.highest_place(result)]
            for number, region in enumerate(shown_regions, start=1):
                path = run.place(inner_path(result.source.inner, f"-{number}.png"), image)
                match = detector.match_picture(region)
                height, width = result.anomaly_map.shape
                picture = side_by_side(
                    result.original_picture, region, match, result.map_threshold, (height, width)
                )
                with written_whole(path) as partial:
                    picture.save(partial, format="PNG")
                print_line(f"  {_in_words(region, result.map_threshold)}; {path}")
            if len(regions) > _MOST_PICTURES:
                print_line(
                    f"  and {counted(len(regions) - _MOST_PICTURES, 'less anomalous region')}"
                )
    if failed:
        raise typer.Exit(SOME_FAILED)


def _in_words(region: Region, threshold: float | None) -> str:
    left, top, size = region.match
    peak = f"{region.peak:.4g}"
    if threshold is not None:
        peak = f"{region.peak / threshold:.3g} x the threshold"
    return (
        f"{region.width}x{region.height} at {region.left},{region.top}: {peak}, "
        f"by {region.level}; nearest at distance {region.distance:.4g} is "
        f"{region.match_name} {size}x{size} at {left},{top}"
    )


def export(
    model: ModelArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="ONNX file to write; default: detector.onnx, or encoder.onnx with --encoder-only.",
        ),
    ] = None,
    false_alarm_rate: RateOption = None,
    storage: Annotated[
        str,
        typer.Option(
            help="What rows of the banks are kept in; float16 for half the size.",
            **one_of("float32", "float16"),
        ),
    ] = "float32",
    category: CategoryOption = None,
    encoder_only: Annotated[
        bool,
        typer.Option("--encoder-only", help="Write the encoder alone; the search stays here."),
    ] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Write the detector as one ONNX model, from pixels to score, anomaly map and verdict.

    The model is checked with onnxruntime where that is installed.
    """
    if encoder_only and (false_alarm_rate is not None or storage != "float32"):
        raise typer.BadParameter("--encoder-only writes neither a threshold nor banks")
    output = output or Path("encoder.onnx" if encoder_only else "detector.onnx")
    require_writable(output, overwrite=overwrite)
    with loading():
        from ..detector.categories import by_category, open_detectors
        from ..detector.onnx import export_detector, export_encoder
        from ..detector.patch_svdd import PatchSVDD
        from ..detector.progress_bars import display

    with claimed_file(output, overwrite), display(console) as bars:
        if encoder_only and category is None:  # which all have in common
            detector = next(iter(by_category(open_detectors(model, "cpu")).values()))
        else:
            detector = PatchSVDD.load(model, device="cpu", category=category)
        bars.phase("exporting", None, None)
        if encoder_only:
            difference = export_encoder(detector, output)
            checked = "its embeddings differ from PyTorch's by {:.1e} at the most"
        else:
            difference = export_detector(
                detector, output, false_alarm_rate=false_alarm_rate, storage=storage
            )
            checked = "its image scores are within {:.1e}, relative, of the detector's"
        bars.phase("exporting", 1.0, None)
    if difference is None:
        checked = "not checked: onnxruntime is not installed"
    print_line(
        f"wrote {output}, {output.stat().st_size / 1e6:.1f} MB; {checked.format(difference)}"
    )
    if not encoder_only and detector.calibration_ is not None:
        print_line(threshold_in_words(detector, false_alarm_rate))
