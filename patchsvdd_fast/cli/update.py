"""`patchsvdd update`: other normal images for a model, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..files.claims import claimed_file
from ..files.folders import counted
from .options import (
    DeviceOption,
    ModelArgument,
    OverwriteOption,
    PagesOption,
    SkipOption,
    loading,
    require_writable,
    threshold_in_words,
)
from .terminal import print_line

if TYPE_CHECKING:
    from ..detector.categories import CategoryDetectors
    from ..detector.patch_svdd import PatchSVDD
    from ..training.workers import Workers


def update(
    model: ModelArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Model file to write; default: MODEL itself."),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(help="Training image to take out, by name or number; may be repeated."),
    ] = None,
    add: Annotated[
        list[Path] | None,
        typer.Option(help="Good image or folder of them to add; may be repeated."),
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(help="Model with the same encoder, whose images to add; may be repeated."),
    ] = None,
    replace: Annotated[
        Path | None,
        typer.Option(help="Folder of other good images, to use instead of all that the model has."),
    ] = None,
    category: Annotated[
        str | None,
        typer.Option(
            help="Of a model of several (train --together): which one to change; or, with "
            "--replace, to add. Default of --merge: all, each with that of its name.",
            show_default=False,
        ),
    ] = None,
    merge_category: Annotated[
        str | None,
        typer.Option(
            help="Of models of several to --merge: which one. Default: that of --category.",
            show_default=False,
        ),
    ] = None,
    remove_category: Annotated[
        list[str] | None,
        typer.Option(help="Category of a model of several to take out; may be repeated."),
    ] = None,
    overwrite: OverwriteOption = False,
    skip_unreadable: SkipOption = False,
    pages: PagesOption = "first",
    device: DeviceOption = "auto",
) -> None:
    """Change which images a model takes as normal, without training; calibrates anew.

    Changes are made in this order: --remove-category, --replace, --remove, --add, --merge.
    `patchsvdd info MODEL` says how many images there are. Without --output MODEL itself is changed.
    Several processes under torchrun divide the images that are embedded.
    """
    changes_one = bool(remove or add or replace or category or merge_category)
    if not (remove or add or merge or replace or remove_category):
        raise typer.BadParameter(
            "give at least one of --replace, --remove, --add, --merge and --remove-category"
        )
    output = output or model
    overwrite = overwrite or (output.exists() and output.samefile(model))
    require_writable(output, overwrite=overwrite)
    with loading():
        from ..detector.categories import by_category, open_detectors
        from ..detector.patch_svdd import PatchSVDD
        from ..files.sources import require_there
        from ..ops.backends import resolve_device
        from ..training.workers import local_device
        from .terminal import joined, require_same
    for path in (*(add or []), *(merge or []), *([] if replace is None else [replace])):
        require_there(path)

    target = local_device(resolve_device(device))
    with joined(target) as workers, ExitStack() as claims:
        if workers.is_first:
            claims.enter_context(claimed_file(output, overwrite))
        require_same(workers, model)
        opened = open_detectors(model, str(target))
        others = {path: open_detectors(path, str(target)) for path in merge or []}
        changes = _Changes(
            replace,
            remove or [],
            add or [],
            others,
            merge_category,
            skip_unreadable,
            pages,
            workers,
        )
        before = {name: one.num_images for name, one in by_category(opened).items()}
        for name in remove_category or []:
            _take_out(opened, name, model)
        if changes_one or isinstance(opened, PatchSVDD):
            detector = _to_change(opened, category, model, is_new=replace is not None)
            detector = changes.made_to(detector, category)
            if isinstance(opened, PatchSVDD):
                opened = detector
            else:
                opened[str(category)] = detector
            changed = [category or ""]
        else:
            changed = _merge_all(opened, others) if workers.is_first else []
        if not workers.is_first:
            return
        opened.save(output)
    now = by_category(opened)
    lines = [f"without {name}" for name in remove_category or []]
    for name in changed:
        had = counted(before.get(name, 0), "training image") + (name and f" of {name}")
        lines.append(f"{had} before, {now[name].num_images:,} now")
        if now[name].calibration_ is not None:
            lines.append(threshold_in_words(now[name]))
    print_line(f"wrote {output}: {lines[0]}")
    for line in lines[1:]:
        print_line(line)


class _Changes(NamedTuple):
    """What is to be done to a detector, in this order."""

    replace: Path | None
    remove: Sequence[str]
    add: Sequence[Path]
    merge: Mapping[Path, PatchSVDD | CategoryDetectors]
    merge_category: str | None
    skip_unreadable: bool
    pages: str
    workers: Workers
    """Processes that embed images in shares; the first does the rest."""

    def made_to(self, detector: PatchSVDD, category: str | None) -> PatchSVDD:
        """The changed detector, of this category if there are several; in the first process."""
        how: dict[str, Any] = {
            "skip_unreadable": self.skip_unreadable,
            "pages": self.pages,
            "progress": True,
        }
        if self.replace is not None:
            detector = detector.refit(self.replace, **how)
        if self.remove:
            names = [int(name) if name.isdecimal() else name for name in self.remove]
            with self.workers.together():
                if self.workers.is_first:
                    detector.remove(names, progress=True)
        if self.add:
            images = self.add[0] if len(self.add) == 1 else _all_images(self.add)
            detector.add(images, **how)
        for path, other in self.merge.items() if self.workers.is_first else ():
            theirs = _to_merge(other, self.merge_category or category, path)
            detector.merge(theirs, progress=True)
        return detector


def _take_out(opened: PatchSVDD | CategoryDetectors, category: str, model: Path) -> None:
    from ..detector.patch_svdd import PatchSVDD

    if isinstance(opened, PatchSVDD):
        raise ValueError(f"{model} has no categories, such as {category!r}")
    del opened[category]


def _merge_all(
    opened: CategoryDetectors, others: Mapping[Path, PatchSVDD | CategoryDetectors]
) -> list[str]:
    """Merge models of several categories; returns the names of those that have changed."""
    from ..detector.patch_svdd import PatchSVDD

    changed: list[str] = []
    for path, other in others.items():
        if isinstance(other, PatchSVDD):
            raise ValueError(f"{path} has no categories: --category names one to merge it into")
        opened.merge(other, progress=True)
        changed += other
    return list(dict.fromkeys(changed))


def _to_change(
    opened: PatchSVDD | CategoryDetectors, category: str | None, model: Path, is_new: bool
) -> PatchSVDD:
    """The detector of a category to change.

    is_new: the category may be a new one; the detector is then another's, to be refitted.
    """
    from ..detector.categories import check_names, require_category
    from ..detector.patch_svdd import PatchSVDD

    if isinstance(opened, PatchSVDD):
        require_category(opened, category)
        return opened
    if category is None:
        raise ValueError(
            f"{model} has several categories, {', '.join(opened)}: --category names one"
        )
    if is_new and category not in opened:
        check_names([category])  # now, not after the time that it takes
        return next(iter(opened.values()))
    opened.require(category)
    return opened[category]


def _to_merge(other: PatchSVDD | CategoryDetectors, category: str | None, path: Path) -> PatchSVDD:
    """The detector in a model to merge; category: of several, which one."""
    from ..detector.patch_svdd import PatchSVDD

    if isinstance(other, PatchSVDD):
        return other
    if category is None or category not in other:
        raise ValueError(
            f"{path} has several categories, {', '.join(other)}: --merge-category names one"
        )
    return other[category]


def _all_images(given: Sequence[Path]) -> list[Path]:
    from ..files.categories import training_paths

    return [
        image for path in given for image in (training_paths(path) if path.is_dir() else [path])
    ]
