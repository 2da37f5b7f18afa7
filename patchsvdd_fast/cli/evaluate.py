"""`patchsvdd evaluate`: AUROC and AUPRO of a model or an encoder on labelled test images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    BitDepthOption,
    DeviceOption,
    ResizeOption,
    SkipOption,
    ValueRangeOption,
    encoder_parameters,
    loading,
    parse_resize,
    require_writable,
)
from .terminal import console, results_table

if TYPE_CHECKING:
    from ..detector.evaluation import CategoryResult
    from ..detector.patch_svdd import PatchSVDD
    from ..files.folders import Category, LabelledImage
    from ..score.image_result import ImageResult


def evaluate(
    data: Annotated[Path, typer.Argument(help="A category in MVTec layout, or a folder of them.")],
    model: Annotated[
        Path | None, typer.Option(help="Model file, or a folder of them, <category>.safetensors.")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Encoder to fill banks with from train/good: the name of a pretrained one, a "
            "file, or a folder of them, <category>*."
        ),
    ] = None,
    untrained: Annotated[bool, typer.Option(help="Use an untrained encoder: a baseline.")] = False,
    mode: Annotated[
        str,
        typer.Option(help='With --untrained: whose weights and light, "faithful" or "dense".'),
    ] = "faithful",
    seed: Annotated[int, typer.Option(help="Seed of the untrained encoder.")] = 0,
    resize: ResizeOption = "256",
    bit_depth: BitDepthOption = None,
    value_range: ValueRangeOption = None,
    skip_unreadable: SkipOption = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the results as JSON to this file.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write an HTML report to this folder; of several categories, one each."),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure detection AUROC, segmentation AUROC and AUPRO; prints a row for each category."""
    if sum((model is not None, encoder is not None, untrained)) != 1:
        raise typer.BadParameter("give exactly one of --model, --encoder and --untrained")
    if model is not None and (bit_depth is not None or value_range is not None):
        raise typer.BadParameter("--bit-depth, --value-range: a model has its own from training")
    if json_path is not None:
        require_writable(json_path, "--json")
    with loading():
        from .. import __version__
        from ..detector.evaluation import evaluate_category, write_json
        from ..detector.patch_svdd import PatchSVDD
        from ..files.folders import find_categories

    categories = find_categories(data)
    results = []
    for category in categories:
        with console.status(f"evaluating {category.name}"):
            if model is not None:
                detector = PatchSVDD.load(_file_for(model, category), device=device)
            else:
                detector = PatchSVDD(
                    image_size=parse_resize(resize),
                    bit_depth=bit_depth,
                    value_range=value_range,
                    mode=mode,
                    seed=seed,
                    device=device,
                )
                if untrained:
                    detector.set_params(encoder=detector.untrained_encoder())
                else:
                    detector.set_params(**_encoder_for(str(encoder), category))
                detector.fit(category.root, skip_unreadable=skip_unreadable)
            if report is None:
                evaluated = evaluate_category(detector, category, skip_unreadable=skip_unreadable)
                results.append(evaluated)
            else:
                # Its own name, not that of what it links to: two may link to the same.
                folder = report / category.root.name if len(categories) > 1 else report
                results.append(_evaluate_with_report(detector, category, folder, skip_unreadable))
    console.print(results_table(results))
    if json_path is not None:
        write_json(results, json_path, version=__version__)
        console.print(f"wrote {json_path}", soft_wrap=True)


def _evaluate_with_report(
    detector: PatchSVDD, category: Category, folder: Path, skip_unreadable: bool
) -> CategoryResult:
    from ..detector.evaluation import evaluate_category, mask_of
    from ..report.entries import open_report, report_entry

    threshold = detector.threshold_or_none()
    with open_report(folder, detector, threshold, title=category.name) as page:

        def add(image: LabelledImage, result: ImageResult) -> None:
            height, width = result.anomaly_map.shape
            mask = mask_of(image, (height, width))
            regions = detector.explain(result)
            page.add(report_entry(detector, result, regions, image.defect, mask))

        evaluated = evaluate_category(detector, category, add, skip_unreadable)
        page.close(evaluated.percent)
    console.print(f"report: {page.path}", soft_wrap=True, markup=False)
    return evaluated


def _encoder_for(encoder: str, category: Category) -> dict[str, Any]:
    """The parameters of `PatchSVDD` that --encoder stands for."""
    if Path(encoder).is_dir():
        return encoder_parameters(encoder, _file_for(Path(encoder), category))
    if encoder == "patch-svdd":
        raise typer.BadParameter("patch-svdd has to be trained first: patchsvdd train")
    return encoder_parameters(encoder)


def _file_for(path: Path, category: Category) -> Path:
    """The file itself; in a folder the category's file.

    That is <category>.safetensors, else the only file whose name starts with the category's.
    """
    if not path.is_dir():
        return path
    exact = path / f"{category.name}.safetensors"
    if exact.is_file():
        return exact
    found = sorted(file for file in path.glob(f"{category.name}*") if file.is_file())
    if len(found) != 1:
        raise ValueError(f"{path} needs one file for {category.name}, found {len(found)}")
    return found[0]
