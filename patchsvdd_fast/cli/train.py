"""`patchsvdd train`: its options, and the choice of a mode; `training_sets` does the rest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files.folders import counted
from ..training.interrupts import Terminated
from .options import (
    TERMINATED,
    BitDepthOption,
    CombinationOption,
    CoresetOption,
    DeviceOption,
    DimOption,
    EncoderOption,
    OverwriteOption,
    PagesOption,
    ProjectionOption,
    ResizeOption,
    ReweightOption,
    SkipOption,
    ValueRangeOption,
    encoder_hint,
    encoder_parameters,
    loading,
    one_of,
    parse_bytes,
    parse_resize,
)
from .terminal import console, joined

if TYPE_CHECKING:
    import torch

    from ..detector.patch_svdd import PatchSVDD
    from ..images.prepare import ImageSize


def train(
    data: Annotated[
        Path,
        typer.Argument(
            help="Folder of good images, a category (patchsvdd info --layouts), or a folder of "
            "categories."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Model file to write (default: model.safetensors); for several categories a "
            "folder (default: models).",
        ),
    ] = None,
    together: Annotated[
        bool,
        typer.Option(
            "--together",
            help="Of several categories make one model: one encoder for all, and banks and a "
            "threshold for each. DATA may hold folders of good images, too.",
        ),
    ] = False,
    encoder: EncoderOption = None,
    projection: ProjectionOption = None,
    dim: DimOption = None,
    coreset: CoresetOption = None,
    reweight: ReweightOption = None,
    mode: Annotated[
        str,
        typer.Option(
            help="faithful: the paper's protocol; dense: neighbouring patches of dense maps, for "
            "little time; auto: faithful on a GPU, dense on a CPU.",
            **one_of("auto", "faithful", "dense"),
        ),
    ] = "auto",
    surface: Annotated[
        str | None,
        typer.Option(
            help="What is seen: sets the lambda that suits it (mode faithful).",
            **one_of("texture", "object"),
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Train for about so long instead of the mode's length.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Train for so many epochs; one takes each image 100 times.")
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
        typer.Option(
            help="Initial weights: default, the paper's, or kaiming, which learns positions at "
            "once.",
            **one_of("default", "kaiming"),
        ),
    ] = None,
    train_last_layer: Annotated[
        bool | None,
        typer.Option(
            help="Train the position classifier's last layer, fixed in the paper (faithful)."
        ),
    ] = None,
    redraw_clipped: Annotated[
        bool,
        typer.Option(help="Draw a pair again if it leaves the image, do not clip it (faithful)."),
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            help="Of convolutions in training; tf32 is a GPU's.",
            **one_of("float32", "tf32", "bfloat16"),
        ),
    ] = "float32",
    encoding_precision: Annotated[
        str,
        typer.Option(
            help="Of convolutions that make banks and scores, now and later.",
            **one_of("float32", "tf32", "bfloat16"),
        ),
    ] = "float32",
    check_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between checks on synthetic defects, which decide what weights are kept; "
            "0: no checks."
        ),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many checks without an improvement.")
    ] = None,
    illumination: Annotated[
        str | None,
        typer.Option(
            help="matched: scale each image's colours to the mean of the training images; as_is: "
            "leave them. Default: the mode's.",
            **one_of("matched", "as_is"),
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            help="What to subtract from images: pixel, the mean image (of the others, from a "
            "training image); channel, one mean per channel; paper, one mean image from all; "
            "fixed, the encoder's own constants. Default: pixel, or as for the encoder given.",
            **one_of("pixel", "channel", "paper", "fixed"),
        ),
    ] = None,
    resize: ResizeOption = "256",
    bit_depth: BitDepthOption = None,
    value_range: ValueRangeOption = None,
    skip_unreadable: SkipOption = False,
    pages: PagesOption = "first",
    shard_bank: Annotated[
        bool,
        typer.Option(
            "--shard-bank",
            help="Keep the banks in shards, an index *.safetensors.index.json and files beside it; "
            "under torchrun each process keeps those of its own images.",
        ),
    ] = False,
    shard_size: Annotated[
        str, typer.Option(help="With --shard-bank: embeddings in a shard, at most.")
    ] = "300MB",
    combination: CombinationOption = "mult",
    contamination: Annotated[
        float, typer.Option(help="Share of good images that may be called anomalous.")
    ] = 0.01,
    keep_images: Annotated[
        bool, typer.Option(help="Keep small pictures of the images, for explanations.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of initial weights and training pairs.")] = 0,
    device: DeviceOption = "auto",
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Minutes between training checkpoints.")
    ] = 5.0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from OUTPUT.checkpoint if there is one; a model that is done stays.",
        ),
    ] = False,
    overwrite: OverwriteOption = False,
    log: Annotated[
        Path | None, typer.Option(help="Write each step's figures to this .jsonl or .csv file.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write the same figures for TensorBoard to this folder.")
    ] = None,
) -> None:
    """Make a model file from good images: train an encoder on them, or take a pretrained one.

    The state of training is kept in OUTPUT.checkpoint: after Ctrl-C, a kill or a full disk the same
    command with --resume goes on from there. Several GPUs or processes: torchrun
    --nproc-per-node N -m patchsvdd_fast train ...
    """
    if not data.exists():
        raise ValueError(f"{data} does not exist")
    with loading():
        from ..detector.parameters import parse_size
        from ..detector.patch_svdd import PatchSVDD
        from ..encoders.pretrained import PATCH_SVDD
        from ..ops.backends import resolve_device
        from ..training.workers import local_device
        from .training_sets import Keeping, train_all, training_sets

    shard_bytes = parse_bytes(shard_size)
    sets = training_sets(data, output, resume, overwrite, together, shard_bank)
    target = local_device(resolve_device(device))
    chosen = encoder_parameters(encoder)
    is_trained = chosen["encoder"] == PATCH_SVDD
    length = minutes or epochs or steps
    if not is_trained:
        useless = {
            "--mode": None if mode == "auto" else mode,
            "--minutes": minutes,
            "--epochs": epochs,
            "--steps": steps,
            "--batch-size": batch_size,
            "--learning-rate": learning_rate,
            "--lambda": svdd_weight,
            "--surface": surface,
            "--initialization": initialization,
            "--train-last-layer": train_last_layer,
            "--redraw-clipped": redraw_clipped or None,
            "--precision (see --encoding-precision)": None if precision == "float32" else precision,
            "--check-every": check_every,
            "--patience": patience,
            "--log": log,
            "--tensorboard": tensorboard,
        }
        given = [name for name, value in useless.items() if value is not None]
        if given:
            raise typer.BadParameter(
                f"{', '.join(given)}: for training, but only the encoder patch-svdd is trained; "
                "others are used as they are"
            )
        mode = "faithful"
    elif mode == "auto":
        size = parse_size(parse_resize(resize))
        mode = _mode_for(target, size, "" if length else ", a few minutes")
    if is_trained:
        _say_once(encoder_hint())
    preparation: dict[str, Any] = {
        "illumination": illumination or chosen.get("illumination"),
        "mean": mean or chosen.get("mean"),
    }

    def make_detector() -> PatchSVDD:
        return PatchSVDD(
            encoder=chosen["encoder"],
            projection=projection,
            embedding_dim=dim,
            coreset=coreset,
            reweight=reweight,
            bit_depth=bit_depth,
            value_range=value_range,
            image_size=parse_resize(resize),
            combination=combination,
            contamination=contamination,
            **preparation,
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
            encoding_precision=encoding_precision,
            check_every=check_every,
            patience=patience,
            keep_images=keep_images,
            seed=seed,
            device=device,
        )

    with joined(target) as workers:
        keeping = Keeping(
            *(checkpoint_minutes, resume, log, tensorboard, workers, skip_unreadable, pages),
            overwrite=overwrite,
            shard_bytes=shard_bytes if shard_bank else None,
        )
        try:
            failed = train_all(sets, make_detector, keeping)
        except Terminated:
            raise typer.Exit(TERMINATED) from None
        if failed:
            raise typer.Exit(1)


def _mode_for(device: torch.device, size: ImageSize, lasting: str) -> str:
    """The mode that suits the device; says so if it is a CPU.

    size: that images are resized to. lasting: how long mode dense takes, to add to the line.
    """
    import torch

    from ..encoders.levels import DEFAULT_LEVELS
    from ..training.dense_pairs import smallest_crop

    smallest = smallest_crop(max(level.size for level in DEFAULT_LEVELS))
    if device.type != "cpu":
        return "faithful"
    if size is not None and min(size) < smallest:
        _say_once(
            f"images of less than {smallest} pixels: training in mode faithful, the paper's "
            "protocol, which may take days without a GPU (--minutes or --steps end it sooner)"
        )
        return "faithful"
    threads = counted(torch.get_num_threads(), "thread")
    _say_once(
        f"no GPU: training in mode dense on {threads}{lasting} "
        "(--mode faithful is the paper's protocol, a day or more here)"
    )
    return "dense"


def _say_once(message: str) -> None:
    """Print a line; under torchrun only the first process does."""
    if os.environ.get("RANK", "0") == "0":
        console.print(message, soft_wrap=True)
