"""The `patchsvdd` command: train, score, evaluate, info, demo."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from . import __version__, demo, runtime
from .dense_pairs import smallest_crop
from .detector import PatchSVDD, load_encoder, preparation_of, resolve_device
from .evaluation import CategoryResult, evaluate_category, write_json
from .images import Category, ImageSize, find_categories, find_images, parse_size, read_image
from .interrupts import Terminated
from .levels import DEFAULT_LEVELS
from .report import write_heat_map, write_scores_csv
from .terminal import console, errors, fit_with_progress, results_table
from .train_command import Keeping, require_writable, train_all, training_sets
from .workers import joined_workers, local_device

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Patch SVDD anomaly detection with exact nearest-neighbour search.",
)
INTERRUPTED = 130  # exit status after Ctrl-C, by the shell's convention
TERMINATED = 143  # likewise after SIGTERM
_DENSE_SIDE = smallest_crop(max(level.size for level in DEFAULT_LEVELS))

DeviceOption = Annotated[str, typer.Option(help='"auto", "cpu", "cuda" or "cuda:N".')]
ResizeOption = Annotated[
    str, typer.Option(help='Resize images: pixels of a square, "HEIGHTxWIDTH", or "none".')
]
CombinationOption = Annotated[
    str, typer.Option(help='How the levels join into one map: "mult", "sum", "K64" or "K32".')
]
EncoderOption = Annotated[
    Path | None,
    typer.Option(
        help="Use this encoder instead of training one: a model, a training checkpoint, or an "
        "official .pkl."
    ),
]


def main() -> None:
    """Entry point: errors in one line, exit status 1; 2 for wrong usage, 130 for Ctrl-C."""
    warnings.showwarning = _show_warning
    try:
        status = app(standalone_mode=False)  # Typer turns Ctrl-C into an exit status or an Abort
    except typer.Abort:
        status = INTERRUPTED
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError) as error:
        _fail(str(error) or type(error).__name__, status=1)
    except Exception as error:
        # Usage errors of Typer know how to show themselves; everything else is a bug.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), status=2)
    if status == INTERRUPTED:
        errors.print("[bold red]interrupted[/]")
    if status == TERMINATED:
        errors.print("[bold red]terminated[/]")
    sys.exit(status or 0)


@app.command()
def train(
    data: Annotated[
        Path,
        typer.Argument(help="Folder of good images, an MVTec category, or a folder of categories."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Model file to write, model.safetensors; for several categories a folder, models.",
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help='"faithful": the paper\'s protocol; "dense": neighbours from dense maps, for '
            'little time. "auto": faithful on a GPU, dense on a CPU.'
        ),
    ] = "auto",
    surface: Annotated[
        str | None, typer.Option(help='"texture" or "object": a lambda that suits it (faithful).')
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Train for about so long instead of the mode's length.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over 100 x the number of images.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Stop after this many steps.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Pairs of each kind (faithful) or crops (dense) per step.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's learning rate.")] = None,
    svdd_weight: Annotated[
        float | None,
        typer.Option("--lambda", help="Weight of SVDD' against the position loss (faithful)."),
    ] = None,
    initialization: Annotated[
        str | None,
        typer.Option(help='"default": the paper\'s; "kaiming": learns positions at once.'),
    ] = None,
    train_last_layer: Annotated[
        bool | None,
        typer.Option(help="Train the classifier's last layer (faithful; the paper's is fixed)."),
    ] = None,
    redraw_clipped: Annotated[
        bool, typer.Option(help="Draw pairs that leave the image again, do not clip (faithful).")
    ] = False,
    precision: Annotated[
        str, typer.Option(help='On a GPU: "float32", "tf32" or "bfloat16".')
    ] = "float32",
    check_every: Annotated[
        int | None,
        typer.Option(help="Steps between checks on drawn defects, the best are kept; 0: none."),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many checks without an improvement.")
    ] = None,
    illumination: Annotated[
        str | None,
        typer.Option(
            help='"matched": scale colours to the usual light; "as_is". Default: the mode\'s.'
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(help='Subtract the mean image ("pixel") or one mean per channel ("channel").'),
    ] = None,
    resize: ResizeOption = "256",
    combination: CombinationOption = "mult",
    contamination: Annotated[
        float, typer.Option(help="Share of good images that may be called anomalous.")
    ] = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of weights and pairs.")] = 0,
    device: DeviceOption = "auto",
    encoder: EncoderOption = None,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Minutes between training checkpoints.")
    ] = 5.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from OUTPUT.checkpoint if there is one.")
    ] = False,
    log: Annotated[
        Path | None, typer.Option(help="Write each step's figures to this .jsonl or .csv file.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write them for TensorBoard to this folder.")
    ] = None,
) -> None:
    """Train on good images and write a model file.

    The state of training is kept in OUTPUT.checkpoint: after Ctrl-C, a kill or a full disk the same
    command with --resume goes on from there. Several GPUs or processes: torchrun
    --nproc-per-node N -m patchsvdd_fast train ...
    """
    target = local_device(resolve_device(device))
    if encoder is not None:
        mode = "faithful" if mode == "auto" else mode
        prepared = preparation_of(encoder)
        illumination, mean = illumination or prepared["illumination"], mean or prepared["mean"]
    if mode == "auto":
        size = parse_size(_parse_resize(resize))
        length = minutes or epochs or steps
        mode = _mode_for(target, size, "" if length else ", a few minutes")

    def make_detector() -> PatchSVDD:
        return PatchSVDD(
            image_size=_parse_resize(resize),
            combination=combination,
            contamination=contamination,
            illumination=illumination,
            mean=mean or "pixel",
            mode=mode,
            surface=surface,
            epochs=epochs,
            steps=steps,
            minutes=minutes,
            batch_size=batch_size,
            learning_rate=learning_rate,
            svdd_weight=svdd_weight,
            initialization=initialization,
            train_last_layer=train_last_layer,
            redraw_clipped=redraw_clipped,
            precision=precision,
            check_every=check_every,
            patience=patience,
            seed=seed,
            device=device,
        )

    sets = training_sets(data, output)
    ready = None if encoder is None else load_encoder(encoder)
    with joined_workers(target) as workers:
        if not workers.is_first:
            console.quiet = True
            warnings.simplefilter("ignore")  # the first one says the same
        keeping = Keeping(checkpoint_minutes, resume, log, tensorboard, workers)
        try:
            failed = train_all(sets, make_detector, keeping, ready)
        except Terminated:
            raise typer.Exit(TERMINATED) from None
        if failed:
            raise typer.Exit(1)


def _mode_for(device: torch.device, size: ImageSize, lasting: str) -> str:
    """The mode that suits the machine; says what was chosen, and how long the dense one lasts."""
    if device.type != "cpu":
        return "faithful"
    if size is not None and min(size) < _DENSE_SIDE:
        _say_once(
            f"images of less than {_DENSE_SIDE} pixels: training in mode faithful, the paper's "
            "protocol, which may take days without a GPU (--minutes or --steps end it sooner)"
        )
        return "faithful"
    _say_once(
        f"no GPU: training in mode dense on {torch.get_num_threads()} threads{lasting} "
        "(--mode faithful is the paper's protocol, a day or more here)"
    )
    return "dense"


def _say_once(message: str) -> None:
    """Under torchrun in the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        console.print(message, soft_wrap=True)


@app.command()
def score(
    model: Annotated[Path, typer.Argument(help="Model file written by `patchsvdd train`.")],
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for scores.csv and heat maps.")
    ] = Path("scores"),
    heat_maps: Annotated[bool, typer.Option(help="Write a heat-map overlay per image.")] = True,
    false_alarm_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of good images that may be called anomalous; default: as in training "
            "(--contamination), or the least that the number of training images can promise."
        ),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Score images: writes scores.csv and, per image, a PNG with the anomaly map over it."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; --output names a folder")
    detector = PatchSVDD.load(model, device=device)
    threshold = None
    if false_alarm_rate is not None:
        threshold = detector.threshold(false_alarm_rate)
    elif detector.calibration_ is not None:
        threshold = detector.threshold_
    paths = [
        path for given in images for path in (find_images(given) if given.is_dir() else [given])
    ]
    started = time.perf_counter()
    result = detector.score(paths)
    seconds = time.perf_counter() - started
    scores = [float(value) for value in result.image_scores]
    output.mkdir(parents=True, exist_ok=True)
    names = [str(path) for path in paths]
    write_scores_csv(output / "scores.csv", names, scores, detector.calibration_, threshold)
    if heat_maps:
        for name, path, anomaly_map in zip(
            _distinct_names(paths), paths, result.anomaly_map.numpy(), strict=True
        ):
            write_heat_map(
                output / f"{name}.png", read_image(path), anomaly_map, detector.calibration_
            )
    flagged = "" if threshold is None else f", {sum(s > threshold for s in scores)} anomalous"
    console.print(
        f"scored {len(paths)} images in {seconds:.2f} s{flagged}; see {output}", soft_wrap=True
    )


@app.command()
def evaluate(
    data: Annotated[Path, typer.Argument(help="A category in MVTec layout, or a folder of them.")],
    model: Annotated[
        Path | None, typer.Option(help="Model file, or folder of <category>.safetensors.")
    ] = None,
    encoder: Annotated[
        Path | None,
        typer.Option(
            help="Encoder file, or folder of <category>*; banks are built from train/good."
        ),
    ] = None,
    untrained: Annotated[bool, typer.Option(help="Use a fresh encoder, as a baseline.")] = False,
    mode: Annotated[
        str, typer.Option(help="Whose untrained encoder, in whose light: faithful's or dense's.")
    ] = "faithful",
    seed: Annotated[int, typer.Option(help="Seed of the untrained encoder.")] = 0,
    resize: ResizeOption = "256",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the results as JSON to this file.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Measure detection and segmentation AUROC and AUPRO; several categories give a table."""
    if sum((model is not None, encoder is not None, untrained)) != 1:
        raise typer.BadParameter("give exactly one of --model, --encoder and --untrained")
    if json_path is not None:
        require_writable(json_path, "--json")
    categories = find_categories(data)
    results = []
    for category in categories:
        with console.status(f"evaluating {category.name}"):
            if model is not None:
                detector = PatchSVDD.load(_file_for(model, category), device=device)
            else:
                detector = PatchSVDD(
                    image_size=_parse_resize(resize), mode=mode, seed=seed, device=device
                )
                ready = detector.untrained_encoder()
                if encoder is not None:
                    file = _file_for(encoder, category)
                    ready = load_encoder(file)
                    detector.set_params(**preparation_of(file))
                detector.fit(category.root, encoder=ready)
            results.append(evaluate_category(detector, category))
    console.print(results_table(results))
    if json_path is not None:
        write_json(results, json_path, version=__version__)
        console.print(f"wrote {json_path}", soft_wrap=True)


@app.command()
def info() -> None:
    """Versions, backends, instruction sets and GPU."""
    table = Table(show_header=False, box=None)
    for name, value in runtime.describe().items():
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int, typer.Option(help="Training steps.")] = demo.STEPS,
    seed: Annotated[int, typer.Option(help="Seed of images, weights and pairs.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Train and score on a built-in sample of woven cloth; a few minutes on two cores."""
    console.print(f"making a sample of good and defective cloth in {output}", soft_wrap=True)
    category = demo.make_category(output, seed)
    detector = demo.make_detector(steps, seed, device)
    untrained = demo.untrained(detector, category)
    fit_with_progress(detector, category.root)
    detector.save(output / "model.safetensors")
    result = detector.score([image.path for image in category.test_images()])
    trained = evaluate_category(detector, category, result)
    console.print(
        results_table(
            [
                _renamed(evaluate_category(untrained, category), "untrained"),
                _renamed(trained, f"trained, {steps} steps"),
            ],
            with_mean=False,
        )
    )
    overlays = demo.write_heat_maps(detector, category, result, output / "heat-maps")
    console.print(f"wrote {output / 'model.safetensors'} and {overlays} heat maps", soft_wrap=True)


def _renamed(result: CategoryResult, name: str) -> CategoryResult:
    return CategoryResult(name, result.num_good, result.num_anomalous, result.percent)


def _parse_resize(text: str) -> int | tuple[int, int] | None:
    if text.lower() == "none":
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f'--resize takes pixels, "HEIGHTxWIDTH" or "none", got {text!r}')
    sizes = [int(part) for part in parts]
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def _file_for(path: Path, category: Category) -> Path:
    """The file itself, or in a folder the one file whose name starts with the category's."""
    if not path.is_dir():
        return path
    exact = path / f"{category.name}.safetensors"
    if exact.is_file():
        return exact
    found = sorted(file for file in path.glob(f"{category.name}*") if file.is_file())
    if len(found) != 1:
        raise ValueError(f"{path} needs one file for {category.name}, found {len(found)}")
    return found[0]


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """File names for the images' overlays: their own, with folders in front where these clash."""
    for depth in range(max(len(path.parts) for path in paths)):
        folders = [path.parent.parts[len(path.parent.parts) - depth :] for path in paths]
        names = ["_".join([*front, path.stem]) for front, path in zip(folders, paths, strict=True)]
        if len(set(names)) == len(names) and not any("/" in name for name in names):
            return names
    return [f"{index:05}_{path.stem}" for index, path in enumerate(paths)]


def _fail(message: str, status: int) -> None:
    errors.print("[bold red]error:[/] ", end="")
    errors.print(" ".join(message.split()), markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    errors.print(f"[bold yellow]warning:[/] {message}", soft_wrap=True)
