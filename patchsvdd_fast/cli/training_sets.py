"""What `patchsvdd train` does: one training set or several, with checkpoints, logs and a table."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..detector.categories import CategoryDetectors, by_category, open_detectors
from ..detector.evaluation import CategoryResult
from ..detector.patch_svdd import PatchSVDD
from ..detector.progress_bars import display
from ..encoders.pretrained import PATCH_SVDD
from ..files.categories import (
    Category,
    find_categories,
    folders_of_categories,
    in_words,
    is_category,
)
from ..files.claims import claimed_file, require_new
from ..files.folders import counted
from ..files.shards import SUFFIX, is_index
from ..report.text import shown
from ..search.bank import NormalBank
from ..training.log import FileLog, Log, LogOrWarning, TensorBoardLog
from ..training.workers import Workers
from .options import require_writable, threshold_in_words
from .terminal import (
    console,
    errors,
    evaluate_with_progress,
    fit_with_progress,
    print_error,
    print_line,
    results_table,
)


@dataclass(frozen=True)
class TrainingSet:
    """A folder of good images to train on, and the model file to write."""

    data: Path
    output: Path
    together: dict[str, Path] = field(default_factory=dict)
    """Folders of the categories in it that are to share an encoder and a file, by name."""

    @property
    def checkpoint(self) -> Path:
        """The file that keeps the state of a training until it has ended."""
        return self.output.with_name(self.output.name + ".checkpoint")

    def is_done(self) -> bool:
        """Whether there is a model, and no training of it was left unfinished."""
        return self.output.exists() and not self.checkpoint.exists()


@dataclass(frozen=True)
class Keeping:
    """Checkpoints and logs of a training, the processes that do it, and whether it is strict."""

    checkpoint_minutes: float = 5.0
    resume: bool = False
    log: Path | None = None
    """A .jsonl or .csv file; for several training sets, NAME.jsonl beside each model."""
    tensorboard: Path | None = None
    workers: Workers = field(default_factory=Workers)
    skip_unreadable: bool = False
    """Go on without images that cannot be read."""
    pages: str = "first"
    """Of a file with several, as of `PatchSVDD.fit`."""
    overwrite: bool = False
    """Replace models that are there."""
    shard_bytes: int | None = None
    """As of `PatchSVDD.fit`."""


def training_sets(
    data: Path,
    output: Path | None,
    resume: bool = False,
    overwrite: bool = False,
    together: bool = False,
    in_shards: bool = False,
) -> list[TrainingSet]:
    """The training sets in a folder: each category that lies in it, else the folder itself.

    output: the model file, or for several categories the folder of the models. None:
        "model.safetensors" or "models" in the working directory; in shards, the former's index.

    resume: whether models that are there are gone on with, or done; overwrite: replaced.
    together: the categories are one set. in_shards: the bank lies in shards, of a single category.

    Raises ValueError if a model could not be written there.
    """
    if in_shards and together:
        raise ValueError("a model of several categories cannot be in shards")
    if together:
        folders = folders_of_categories(data)
        output = output or Path("model.safetensors")
        require_writable(output, overwrite=resume or overwrite)
        return [TrainingSet(data, output, folders)]
    categories: list[Path] = []
    if data.is_dir() and not is_category(data):
        with contextlib.suppress(ValueError):  # none: a folder of good images
            categories = [category.root for category in find_categories(data)]
    if categories and in_shards:
        raise ValueError(f"{data} holds several categories: train one at a time with --shard-bank")
    if not categories:
        output = output or Path(f"model{SUFFIX if in_shards else '.safetensors'}")
        if in_shards != is_index(output):
            raise ValueError(
                f"with --shard-bank the model is called NAME{SUFFIX}, else NAME.safetensors, "
                f"got {output}"
            )
        require_writable(output, overwrite=resume or overwrite)
        return [TrainingSet(data, output)]
    output = output or Path("models")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{data} holds several categories; --output must name a folder for models")
    sets = [TrainingSet(path, output / f"{path.name}.safetensors") for path in categories]
    there = [str(one.output) for one in sets if one.output.exists()]
    if there and not (resume or overwrite):
        raise ValueError(
            f"models exist already: {', '.join(there)}: --overwrite replaces them, --resume makes "
            "those that are missing"
        )
    output.mkdir(parents=True, exist_ok=True)
    return sets


def train_all(
    sets: Sequence[TrainingSet],
    make_detector: Callable[[], PatchSVDD],
    keeping: Keeping,
) -> int:
    """Train on each set and write its model; returns how many failed.

    Several categories are also evaluated where they have test images. An error in one of several
    sets then ends its training alone, and logs are files beside the models, in the format of
    `keeping.log`.

    make_detector: returns a new detector for each set.
    """
    results: list[CategoryResult] = []
    failed, several = 0, len(sets) > 1
    for one in sets:
        if several:
            console.print(shown(one.data.name), style="bold", soft_wrap=True, highlight=False)
        made: PatchSVDD | CategoryDetectors | None = None
        try:
            detector = make_detector()
            # Of several processes all must do the same: not each may see the first one's files.
            is_done = keeping.workers.from_first(one.is_done)
            if keeping.resume and not keeping.overwrite and is_done:
                print_line(f"{one.output} is done already")
                made = open_detectors(one.output, detector.device)
                _require_same(one, made)
            else:
                made = _train_one(one, detector, keeping, several)
        except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
            if not several or keeping.workers.count > 1:  # or other processes go on alone
                raise
            print_error(f"{one.data.name}: {error}")
            failed += 1
        if isinstance(made, CategoryDetectors):
            for name, detector in made.items():
                results += _evaluated(detector, one.together[name], keeping)
        elif made is not None and several:
            results += _evaluated(made, one.data, keeping)
    if results:
        console.print(results_table(results))
    return failed


def _require_same(one: TrainingSet, made: PatchSVDD | CategoryDetectors) -> None:
    """Raise ValueError if a model that is done is not of the categories of a set."""
    has = [] if isinstance(made, PatchSVDD) else sorted(made)
    if has != sorted(one.together):
        held = f"of {', '.join(has)}" if has else "of a single category"
        raise ValueError(
            f"{one.output} is a model {held}, so it cannot be gone on with: --overwrite trains a "
            "new one, `patchsvdd update --category NAME --replace DIR` adds a category"
        )


def _evaluated(detector: PatchSVDD, data: Path, keeping: Keeping) -> list[CategoryResult]:
    """The result for a category, in a list; an empty one if it has no test images."""
    if not is_category(data):
        return []
    try:
        with display(console) as shown:
            result = evaluate_with_progress(
                shown, detector, Category(data), skip_unreadable=keeping.skip_unreadable
            )
    except (ValueError, OSError) as error:  # such as no anomalous image
        print_line(f"not evaluated: {error}")
        return []
    return [result]


def _train_one(
    one: TrainingSet,
    detector: PatchSVDD,
    keeping: Keeping,
    several: bool,
) -> PatchSVDD | CategoryDetectors | None:
    """Train, save, and say so; None in all but the first process under torchrun."""
    started = time.perf_counter()
    for folder in one.together.values() or [one.data]:
        if is_category(folder):
            print_line(in_words(Category(folder)))
    is_trained = detector.encoder == PATCH_SVDD
    leftover = keeping.workers.is_first and one.checkpoint.exists()
    if leftover and not keeping.resume and is_trained:
        raise ValueError(
            f"{one.checkpoint} is there from a training that did not end: --resume goes on, "
            "or remove it to begin anew"
        )
    if keeping.resume and is_trained:
        found = "going on from" if one.checkpoint.exists() else "nothing to resume: there is no"
        print_line(f"{found} {one.checkpoint}")
    with ExitStack() as claims:
        if keeping.workers.is_first:
            # A model beside a checkpoint is the one that was to be replaced when training began.
            replaces = keeping.overwrite or (keeping.resume and one.checkpoint.exists())
            claims.enter_context(claimed_file(one.output, replaces))
        made = _fit_and_save(one, detector, keeping, several)
    if made is not None:
        _say_what_was_made(made, one.output, time.perf_counter() - started)
    return made


def _fit_and_save(
    one: TrainingSet, detector: PatchSVDD, keeping: Keeping, several: bool
) -> PatchSVDD | CategoryDetectors | None:
    is_trained = detector.encoder == PATCH_SVDD
    fit: Callable[..., PatchSVDD | CategoryDetectors | None] = partial(detector.fit, one.data)
    if one.together:
        fit = partial(CategoryDetectors.fit, detector, one.together)
    try:
        with ExitStack() as stack:
            made = fit_with_progress(
                fit,
                logs=_open_logs(one, keeping, several, stack),
                checkpoint=one.checkpoint,
                checkpoint_minutes=keeping.checkpoint_minutes,
                resume=keeping.resume,
                skip_unreadable=keeping.skip_unreadable,
                pages=keeping.pages,
                **({} if one.together else {"shard_bytes": keeping.shard_bytes}),
            )
        in_shards = keeping.shard_bytes is not None
        if made is None or not (keeping.workers.is_first or in_shards):
            return None
        with display(console) as shown:
            shown.phase("writing", None, None)
            _save_or_rescue(made, one)
            shown.phase("writing", 1.0, None)
    except (KeyboardInterrupt, OSError, RuntimeError):
        if is_trained and one.checkpoint.exists() and keeping.workers.is_first:
            errors.print(
                f"training is kept in {one.checkpoint}: the same command with --resume goes on, "
                "--encoder makes a model of it as it is",
                soft_wrap=True,
            )
        raise
    if not keeping.workers.is_first:
        return None
    if is_trained:
        one.checkpoint.unlink(missing_ok=True)
    return made


def _open_logs(one: TrainingSet, keeping: Keeping, several: bool, stack: ExitStack) -> list[Log]:
    logs: list[Log] = []
    if not keeping.workers.is_first:
        return logs
    if keeping.log is not None:
        path = one.output.with_suffix(keeping.log.suffix) if several else keeping.log
        if not (keeping.resume or keeping.overwrite):
            require_new(path)
        logs.append(FileLog(path))
    if keeping.tensorboard is not None:
        folder = keeping.tensorboard / one.data.name if several else keeping.tensorboard
        logs.append(TensorBoardLog(folder))
    lasting: list[Log] = [LogOrWarning(log) for log in logs]
    for log in lasting:
        stack.callback(log.close)
    return lasting


def _say_what_was_made(fitted: PatchSVDD | CategoryDetectors, output: Path, seconds: float) -> None:
    categories = by_category(fitted)
    detector = next(iter(categories.values()))
    made = detector.encoder_.name
    if made == PATCH_SVDD:
        made = counted(detector.record_.steps, "training step")
    banks = _banks_in_words(detector) if len(categories) == 1 else f"{len(categories)} categories"
    print_line(f"wrote {output}: {made}, {banks}, {seconds:.0f} s")
    _say_how_it_went(detector)
    for category, one in categories.items():
        begin = f"{category}: " if category else ""
        if category:
            print_line(f"{begin}{counted(one.num_images, 'image')}, {_banks_in_words(one)}")
        for level, bank in one.banks_.items():
            if isinstance(bank, NormalBank) and bank.is_coreset:
                patches = len(bank.groups) * bank.grid[0] * bank.grid[1]
                print_line(
                    f"{begin}{level}: {len(bank):,} of {patches:,} patches kept; a distance to the "
                    f"nearest grows by at most {bank.covering_radius:.4g}"
                )
        if one.calibration_ is not None:
            print_line(f"{begin}{threshold_in_words(one)}")


def _banks_in_words(detector: PatchSVDD) -> str:
    return f"banks of {' and '.join(f'{len(bank):,}' for bank in detector.banks_.values())} patches"


def _say_how_it_went(detector: PatchSVDD) -> None:
    record = detector.record_
    if detector.samples_.in_words():
        console.print(f"{detector.samples_.in_words()} (--bit-depth, --value-range)")
    if record.collapsed and record.best_step is not None:
        console.print(f"training ended at step {record.steps:,}: all embeddings had become alike")
    if record.best_step is not None:
        found = dict(record.qualities)
        untrained, best = record.qualities[0][1], max(found.values())
        console.print(
            f"kept the weights of step {record.best_step:,}: they find synthetic defects at "
            f"{found[record.best_step]:.1f}, untrained ones at {untrained:.1f} (AUROC in %, that "
            "of images counted twice, that of pixels once)",
            soft_wrap=True,
        )
        if record.best_step == 0 and best > untrained:
            console.print(
                f"training gained {best - untrained:.1f}, less than the {record.least_gain:.0f} "
                "points from which on it also helps to find real defects",
                soft_wrap=True,
            )


def _save_or_rescue(fitted: PatchSVDD | CategoryDetectors, one: TrainingSet) -> None:
    """Save the model; if that fails after training, save it to a temporary folder as well."""
    try:
        fitted.save(one.output)
    except OSError:
        if next(iter(by_category(fitted).values())).record_.steps and not is_index(one.output):
            rescued = Path(tempfile.mkdtemp(prefix="patchsvdd-")) / one.output.name
            fitted.save(rescued)
            errors.print(f"the model is kept in {rescued}", soft_wrap=True)
        raise
