"""`patchsvdd evaluate`: AUROC and AUPRO of a model or an encoder on labelled test images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..files.claims import claimed_file
from ..report.text import shown
from .options import (
    BitDepthOption,
    DeviceOption,
    OptionalResizeOption,
    OverwriteOption,
    SkipOption,
    ValueRangeOption,
    encoder_parameters,
    loading,
    one_of,
    parse_resize,
    require_writable,
)
from .terminal import console, evaluate_with_progress, print_error, results_table

if TYPE_CHECKING:
    from ..detector.categories import CategoryDetectors
    from ..detector.evaluation import CategoryResult
    from ..detector.patch_svdd import PatchSVDD
    from ..detector.progress_bars import Display
    from ..files.categories import Category
    from ..files.layouts import LabelledImage, LabelledSet
    from ..score.image_result import ImageResult


def evaluate(
    data: Annotated[
        Path | None,
        typer.Argument(
            help="A category in a layout that is known (patchsvdd info --layouts), or a folder of "
            "them.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model file, or a folder of them, <category>.safetensors.")
    ] = None,
    one_of_model: Annotated[
        str | None,
        typer.Option(
            "--category",
            help="With a --model of several (train --together): which one; default: that of the "
            "folder's name.",
            show_default=False,
        ),
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
        str | None,
        typer.Option(
            help="With --untrained: whose weights and light.",
            show_default="faithful",
            **one_of("faithful", "dense"),
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="With --untrained: its seed.", show_default="0")
    ] = None,
    resize: OptionalResizeOption = None,
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
    normal: Annotated[
        Path | None, typer.Option(help="Instead of DATA: folder of good test images.")
    ] = None,
    anomalous: Annotated[
        Path | None,
        typer.Option(help="With --normal: folder of anomalous ones, or of a folder for each kind."),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="With --anomalous: folder of masks, named as the images."),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(help="With --normal: folder of good images to fill banks with."),
    ] = None,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Measure detection AUROC, segmentation AUROC and AUPRO; prints a row for each category.

    Below it stands what the threshold reaches: how many anomalous images are missed, and how many
    good ones raise a false alarm.

    If one of several categories fails, the others are evaluated, and the exit status is 1.
    """
    if sum((model is not None, encoder is not None, untrained)) != 1:
        raise typer.BadParameter("give exactly one of --model, --encoder and --untrained")
    _require_heard(
        {
            "--resize": resize,
            "--mode": mode,
            "--seed": seed,
            "--bit-depth": bit_depth,
            "--value-range": value_range,
            "--train": train,
        },
        model is not None,
        untrained,
    )
    own = {"normal": normal, "anomalous": anomalous, "masks": masks, "train": train}
    _check_folders(data, own, needs_train=model is None)
    if json_path is not None:
        require_writable(json_path, "--json", overwrite)
    with loading():
        from .. import __version__
        from ..detector.evaluation import write_json
        from ..detector.patch_svdd import PatchSVDD
        from ..detector.progress_bars import FitDisplay, display
        from ..files.categories import find_categories
        from .reports import require_report

    categories = [_own(own)] if data is None else find_categories(data)
    one_file = _opened(model, device, len(categories), one_of_model)

    def folder_of(category: Category) -> Path | None:
        # Its own name, not that of what it links to: two may link to the same.
        return report / category.root.name if report and len(categories) > 1 else report

    for folder in filter(None, {report, *map(folder_of, categories)}):
        require_report(folder, overwrite)

    def detector_for(category: Category, bars: Display) -> PatchSVDD:
        if model is not None:
            if one_file is None:
                return PatchSVDD.load(_file_for(model, category), device=device)
            return _detector_for(one_file, one_of_model, category)
        detector = PatchSVDD(
            image_size=parse_resize(resize or "256"),
            bit_depth=bit_depth,
            value_range=value_range,
            mode=mode or "faithful",
            seed=seed or 0,
            device=device,
        )
        if untrained:
            detector.set_params(encoder=detector.untrained_encoder())
        else:
            detector.set_params(**_encoder_for(str(encoder), category))
        images = category.root if train is None else category.train_paths()
        on_progress = FitDisplay(bars).on_progress
        return detector.fit(images, skip_unreadable=skip_unreadable, on_progress=on_progress)

    results: dict[str, CategoryResult] = {}  # by the category's folder
    failed: dict[str, str] = {}
    for category in categories:
        with display(console) as bars:
            try:
                pages = Pages(folder_of(category), overwrite, _made_from(model, encoder, category))
                results[category.root.name] = _evaluate(
                    detector_for(category, bars), category, pages, skip_unreadable, bars
                )
            except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
                if len(categories) == 1:
                    raise
                print_error(f"{category.name}: {error}")
                failed[category.name] = str(error)
    _show(list(results.values()))
    if report is not None and len(categories) > 1:
        _write_start_page(report, overwrite, results, failed, str(data))
    if json_path is not None:
        with claimed_file(json_path, overwrite):
            write_json([*results.values()], json_path, version=__version__, failed=failed)
        console.print(f"wrote {json_path}", soft_wrap=True)
    if failed:
        print_error(f"{len(failed)} of {len(categories)} failed: {', '.join(failed)}")
        raise typer.Exit(1)


_VALIDATION = "false alarms in validation"  # a figure of a report


class Pages(NamedTuple):
    """A report to be written."""

    folder: Path | None
    """None: no report."""
    overwrite: bool
    """Whether the folder may hold one."""
    facts: dict[str, str]
    """What it says of the run, values by name."""


def _require_heard(options: dict[str, object], has_model: bool, untrained: bool) -> None:
    """Raise typer.BadParameter for options that would have no effect. options: None: not given."""
    given = [name for name, value in options.items() if value is not None]
    if has_model and given:
        raise typer.BadParameter(f"{', '.join(given)}: a model has its own from training")
    if not untrained and "--seed" in given:
        raise typer.BadParameter("--seed is for --untrained")


def _made_from(model: Path | None, encoder: str | None, category: Category) -> dict[str, str]:
    """What a report says that a category is judged by."""
    made = _file_for(model, category) if model else encoder or "untrained"
    return {"model" if model else "encoder from": str(made)}


def _opened(
    model: Path | None, device: str, num_categories: int, chosen: str | None
) -> PatchSVDD | CategoryDetectors | None:
    """The model, if it is one file. Raises ValueError if it cannot judge so many categories.

    chosen: the category in it that judges, if not that of the folder's name.
    """
    from ..detector.categories import open_detectors, require_category
    from ..detector.patch_svdd import PatchSVDD

    no_file = model is None or model.is_dir()
    if chosen is not None and (no_file or num_categories > 1):
        raise ValueError("--category is for one --model file and the images of one category")
    if model is None or no_file:
        return None
    opened = open_detectors(model, device)
    require_category(opened, chosen)
    if isinstance(opened, PatchSVDD) and num_categories > 1:
        raise ValueError(
            f"{model} is one model, but there are {num_categories} categories: give a folder "
            "of models, <category>.safetensors, or a model of several (train --together)"
        )
    return opened


def _detector_for(
    opened: PatchSVDD | CategoryDetectors, chosen: str | None, category: Category
) -> PatchSVDD:
    from ..detector.patch_svdd import PatchSVDD

    if isinstance(opened, PatchSVDD):
        return opened
    # The folder's own name, as in training, not that of what it links to.
    own = category.root.name
    name = chosen or (category.name if own in ("", "..") else own)
    if name not in opened:
        raise ValueError(f"no category {name!r}, only {', '.join(opened)}: --category names one")
    return opened[name]


def _check_folders(data: Path | None, own: dict[str, Path | None], needs_train: bool) -> None:
    """Raise typer.BadParameter unless there is DATA alone, or the folders of one's own."""
    if data is not None:
        if any(own.values()):
            raise typer.BadParameter(
                "give either DATA or --normal and --anomalous (with --masks and --train), not both"
            )
    elif own["normal"] is None or own["anomalous"] is None:
        raise typer.BadParameter("give DATA, or both --normal and --anomalous")
    elif needs_train and own["train"] is None:
        raise typer.BadParameter("--encoder and --untrained need --train, a folder of good images")


def _own(folders: dict[str, Path | None]) -> Category:
    from ..files.categories import own_category

    normal, anomalous = folders["normal"], folders["anomalous"]
    assert normal is not None and anomalous is not None
    return own_category(normal, anomalous, folders["masks"], folders["train"])


def _show(results: Sequence[CategoryResult]) -> None:
    if results:
        console.print(results_table(results))
    for result in results:
        lines = [] if result.at_threshold is None else result.at_threshold.in_words()
        if result.no_segmentation is not None:
            lines.append(f"no segmentation: {result.no_segmentation}")
        for line in lines:
            text = shown(f"{result.category}: {line}")
            console.print(text, soft_wrap=True, markup=False, highlight=False)


def _write_start_page(folder: Path, overwrite: bool, *of_page: Any) -> None:
    """of_page: what `write_start_page` takes besides the folder."""
    from ..report.start_page import write_start_page
    from .reports import claimed_report

    with claimed_report(folder, overwrite):
        page = write_start_page(folder, *of_page)
    console.print(shown(f"all reports: {page}"), soft_wrap=True, markup=False)


def _evaluate(
    detector: PatchSVDD, category: Category, pages: Pages, skip_unreadable: bool, bars: Display
) -> CategoryResult:
    from ..files.categories import in_words
    from ..report.summary import Alarms, broken_promise
    from .reports import claimed_report

    tests = category.test_set()
    console.print(in_words(category, tests), soft_wrap=True, markup=False, highlight=False)
    alarms = Alarms()

    def count(image: LabelledImage, result: ImageResult) -> None:
        alarms.add(result.anomalous, result.unusual)

    if pages.folder is None:
        evaluated = evaluate_with_progress(bars, detector, category, count, tests, skip_unreadable)
    else:
        with claimed_report(pages.folder, pages.overwrite):
            evaluated = _evaluate_with_report(
                detector, category, pages, tests, skip_unreadable, count, bars
            )
    reached = evaluated.at_threshold
    lines = [alarms.in_words()]
    if reached is not None:
        rate = reached.false_alarm_rate
        lines.append(broken_promise(reached.false_alarms, reached.num_good, rate))
    for line in filter(None, lines):
        text = shown(f"{category.name}: {line}")
        console.print(text, soft_wrap=True, markup=False, highlight=False)
    return evaluated


def _evaluate_with_report(
    detector: PatchSVDD,
    category: Category,
    pages: Pages,
    tests: LabelledSet,
    skip_unreadable: bool,
    on_result: Callable[[LabelledImage, ImageResult], None],
    bars: Display,
) -> CategoryResult:
    from ..detector.evaluation import mask_of
    from ..report.entries import open_report, report_entry

    folder = pages.folder
    assert folder is not None
    threshold = detector.threshold_or_none()
    facts = pages.facts | {"data": str(category.root)}
    with open_report(folder, detector, threshold, title=category.name, facts=facts) as page:

        def add(image: LabelledImage, result: ImageResult) -> None:
            on_result(image, result)
            width, height = result.original_picture.size
            try:
                mask = mask_of(image, (height, width))
            except (ValueError, OSError):  # said at the end, with the category's figures
                mask = None
            regions = detector.explain(result)
            page.add(report_entry(detector, result, regions, image.defect, mask))

        evaluated = evaluate_with_progress(
            bars, detector, category, add, tests, skip_unreadable, keep_originals=True
        )
        alarms = evaluated.validation_alarms
        page.close(evaluated.percent, {_VALIDATION: alarms} if alarms else None)
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
