"""`patchsvdd evaluate`: AUROC and AUPRO of a model or an encoder on labelled test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files.claims import claimed_file
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
from .terminal import console, print_error, print_line, results_table

if TYPE_CHECKING:
    from ..detector.categories import CategoryDetectors
    from ..detector.evaluation import CategoryResult
    from ..detector.patch_svdd import PatchSVDD
    from ..detector.progress_bars import Display
    from ..files.categories import Category
    from ..files.layouts import LabelledImage
    from ..score.image_result import ImageResult
    from ..training.workers import Workers
    from .reports import Evaluation

_SHARD_BYTES = 300_000_000  # as `train --shard-bank`


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
        from ..files.categories import find_categories
        from ..ops.backends import resolve_device
        from ..training.workers import local_device
        from .reports import require_report, write_evaluation_page
        from .terminal import joined, require_same

    target = local_device(resolve_device(device))
    parameters = {
        "image_size": parse_resize(resize or "256"),
        "bit_depth": bit_depth,
        "value_range": value_range,
        "mode": mode or "faithful",
        "seed": seed or 0,
        "device": str(target),  # of this process, if there are several GPUs
    }
    with joined(target) as workers:
        judges = _Judges(
            *(model, one_of_model, encoder, skip_unreadable, train is not None, parameters),
            shard_bytes=_SHARD_BYTES if workers.count > 1 else None,
        )
        with workers.together():
            categories = [_own(own)] if data is None else find_categories(data)
        with workers.together():
            judges.open(len(categories))
            # A category's own name, not that of what it links to: two may link to the same.
            reports = {
                one.root.name: report / one.root.name if report and len(categories) > 1 else report
                for one in categories
            }
            for folder in filter(None, {report, *reports.values()}):
                require_report(folder, overwrite)
        require_same(workers, model, categories=[category.name for category in categories])
        results, failed = _evaluate_all(categories, judges, reports, overwrite, workers)
        if not workers.is_first:
            raise typer.Exit(1 if failed else 0)
        _show(list(results.values()))
        if report is not None and len(categories) > 1:
            write_evaluation_page(report, overwrite, results, failed, str(data))
        if json_path is not None:
            with claimed_file(json_path, overwrite):
                write_json([*results.values()], json_path, version=__version__, failed=failed)
            print_line(f"wrote {json_path}")
    if failed:
        print_error(f"{len(failed)} of {len(categories)} failed: {', '.join(failed)}")
        raise typer.Exit(1)


def _evaluate_all(
    categories: Sequence[Category],
    judges: _Judges,
    reports: Mapping[str, Path | None],
    overwrite: bool,
    workers: Workers,
) -> tuple[dict[str, CategoryResult], dict[str, str]]:
    """Results by the category's folder, in the first process; and why others failed, by category.

    reports: folders for them, by the category's folder.
    """
    from ..detector.progress_bars import display
    from ..search.processes import WorkerError
    from .reports import Evaluation, claimed_report

    results: dict[str, CategoryResult] = {}
    failed: dict[str, str] = {}
    for category in categories:
        report = reports[category.root.name]
        with display(console) as bars, ExitStack() as stack:
            try:
                with workers.together():
                    detector = judges.detector(category, bars)
                    if report is not None and workers.is_first:
                        stack.enter_context(claimed_report(report, overwrite))
                    how = detector, category, category.test_set(), judges.skip_unreadable
                evaluation = Evaluation(*how, report, judges.facts(category), workers)
                found = _evaluate(evaluation, bars)
            except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
                if len(categories) == 1:
                    raise
                if not isinstance(error, WorkerError):
                    print_error(f"{category.name}: {error}")
                failed[category.name] = str(error) or "failed in another process"
            else:
                results |= {} if found is None else {category.root.name: found}
    return results, failed


@dataclass
class _Judges:
    """What judges the images of categories: a model's detectors, or new ones with an encoder."""

    model: Path | None
    chosen: str | None
    """Of a model of several categories, the one that judges; None: that of the folder's name."""
    encoder: str | None
    """As of --encoder; with neither, an untrained one."""
    skip_unreadable: bool
    has_own_training: bool
    """Whether the training images have a folder of their own, as of --train."""
    parameters: dict[str, Any]
    """Of new detectors; all go to its device."""
    shard_bytes: int | None
    """Of the banks of new detectors, which several processes fill, and search, together."""
    one_file: PatchSVDD | CategoryDetectors | None = None
    """The model, if it is one file."""

    def open(self, num_categories: int) -> None:
        """Open the model. Raises ValueError if it cannot judge so many categories."""
        from ..detector.categories import open_detectors, require_category
        from ..detector.patch_svdd import PatchSVDD

        model = self.model
        no_file = model is None or model.is_dir()
        if self.chosen is not None and (no_file or num_categories > 1):
            raise ValueError("--category is for one --model file and the images of one category")
        if model is None or no_file:
            return
        opened = open_detectors(model, self.parameters["device"])
        require_category(opened, self.chosen)
        if isinstance(opened, PatchSVDD) and num_categories > 1:
            raise ValueError(
                f"{model} is one model, but there are {num_categories} categories: give a folder "
                "of models, <category>.safetensors, or a model of several (train --together)"
            )
        self.one_file = opened

    def detector(self, category: Category, bars: Display) -> PatchSVDD:
        """The detector that judges a category."""
        from ..detector.patch_svdd import PatchSVDD
        from ..detector.progress_bars import FitDisplay

        if self.model is not None:
            if self.one_file is None:
                return PatchSVDD.load(
                    _file_for(self.model, category), device=self.parameters["device"]
                )
            return _detector_for(self.one_file, self.chosen, category)
        detector = PatchSVDD(**self.parameters)
        if self.encoder is None:
            detector.set_params(encoder=detector.untrained_encoder())
        else:
            detector.set_params(**_encoder_for(self.encoder, category))
        images = category.train_paths() if self.has_own_training else category.root
        return detector.fit(
            images,
            skip_unreadable=self.skip_unreadable,
            on_progress=FitDisplay(bars).on_progress,
            shard_bytes=self.shard_bytes,
        )

    def facts(self, category: Category) -> dict[str, str]:
        """What a report says that a category is judged by."""
        if self.model is not None:
            return {"model": str(_file_for(self.model, category))}
        return {"encoder from": self.encoder or "untrained"}


def _require_heard(options: dict[str, object], has_model: bool, untrained: bool) -> None:
    """Raise typer.BadParameter for options that would have no effect. options: None: not given."""
    given = [name for name, value in options.items() if value is not None]
    if has_model and given:
        raise typer.BadParameter(f"{', '.join(given)}: a model has its own from training")
    if not untrained and "--seed" in given:
        raise typer.BadParameter("--seed is for --untrained")


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
            print_line(f"{result.category}: {line}")


def _evaluate(evaluation: Evaluation, bars: Display) -> CategoryResult | None:
    """None in all but the first of several processes."""
    from ..files.categories import in_words
    from ..report.summary import Alarms, broken_promise

    category = evaluation.category
    print_line(in_words(category, evaluation.tests))
    if not evaluation.workers.is_first:
        evaluation.share()
        return None
    alarms = Alarms()

    def count(image: LabelledImage, result: ImageResult) -> None:
        alarms.add(result.anomalous, result.unusual)

    evaluated = evaluation.run(bars, count)
    reached = evaluated.at_threshold
    lines = [alarms.in_words()]
    if reached is not None:
        rate = reached.false_alarm_rate
        lines.append(broken_promise(reached.false_alarms, reached.num_good, rate))
    for line in filter(None, lines):
        print_line(f"{category.name}: {line}")
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
