"""`patchsvdd demo`: train and score on a built-in sample, with settings that learn quickly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files.claims import RunFolder
from ..files.folders import counted
from .options import DeviceOption, OverwriteOption, encoder_hint, has_pretrained, loading
from .terminal import console, evaluate_with_progress, fit_with_progress, results_table

if TYPE_CHECKING:
    from ..detector.evaluation import CategoryResult
    from ..detector.patch_svdd import PatchSVDD
    from ..files.categories import Category
    from ..files.layouts import LabelledImage
    from ..score.image_result import ImageResult

STEPS = 60
MODEL, HEAT_MAPS, REPORT = "model.safetensors", "heat-maps", "report"


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int, typer.Option(help="Training steps.")] = STEPS,
    seed: Annotated[
        int, typer.Option(help="Seed of images, initial weights and training pairs.")
    ] = 0,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Train and score on a built-in sample of woven cloth; a few minutes on two cores.

    Shows what training adds to Patch SVDD; and, if its weights are installed, how the pretrained
    efficientnet_lite0 does, which is not trained. Model, heat maps and report are Patch SVDD's.
    """
    with loading():
        from ..detector.evaluation import mask_of
        from ..detector.patch_svdd import PatchSVDD
        from ..images import sample_cloth
        from ..report.entries import open_report, report_entry
        from ..report.heat_maps import write_heat_map

    with RunFolder(output, ("sample", MODEL, HEAT_MAPS, REPORT), overwrite=overwrite) as run:
        console.print(f"making a sample of good and defective cloth in {output}", soft_wrap=True)
        try:
            category = sample_cloth.write_sample_category(output / "sample", seed=seed)
        finally:
            for path in sorted((output / "sample").rglob("*.png")):
                run.note(path.relative_to(output))
        detector = _detector(steps, seed, device)
        untrained = PatchSVDD(**detector.get_params())
        fit_with_progress(untrained.fit, category.root, encoder=untrained.untrained_encoder())
        fit_with_progress(detector.fit, category.root)
        model = run.note(Path(MODEL))
        detector.save(model)

        def write(image: LabelledImage, result: ImageResult) -> None:
            path = run.place(Path(HEAT_MAPS, f"{image.defect}_{image.path.stem}.png"))
            width, height = result.original_picture.size
            mask = mask_of(image, (height, width))
            write_heat_map(path, result, mask)
            regions = detector.explain(result)
            page.add(report_entry(detector, result, regions, image.defect, mask))

        results = [_result(untrained, category, "untrained")]
        folder = run.note(Path(REPORT, "index.html")).parent
        with open_report(folder, detector, detector.threshold_, title=category.name) as page:
            trained = f"trained, {counted(steps, 'step')}"
            results.append(_result(detector, category, trained, write))
            page.close(results[-1].percent)
    console.print(results_table(results, with_mean=False))
    reached = results[1].at_threshold
    if reached is not None:
        told = f"{trained}: {reached.in_words()[0]}"
        console.print(told, soft_wrap=True, highlight=False)
    _show_pretrained(category, seed, device)
    heat_maps = counted(len(category.test_images()), "heat map")
    console.print(f"wrote {model} and {heat_maps}", soft_wrap=True)
    console.print(f"report: {page.path}", soft_wrap=True)
    images = output / "sample" / category.name / "test"
    console.print(f"next: patchsvdd score {model} {images}", soft_wrap=True)


def _show_pretrained(category: Category, seed: int, device: str) -> None:
    """Print how a pretrained encoder does; a hint, where its weights are not installed."""
    from ..detector.patch_svdd import PatchSVDD
    from ..encoders.pretrained import DEFAULT_PRETRAINED

    if not has_pretrained():
        console.print(encoder_hint(), soft_wrap=True)
        return
    detector = PatchSVDD(encoder=DEFAULT_PRETRAINED, seed=seed, device=device)
    fit_with_progress(detector.fit, category.root)
    result = _result(detector, category, DEFAULT_PRETRAINED)
    console.print(results_table([result], with_mean=False))  # its levels are others


def _result(
    detector: PatchSVDD,
    category: Category,
    name: str,
    on_result: Callable[[LabelledImage, ImageResult], None] | None = None,
) -> CategoryResult:
    from ..detector.progress_bars import display

    with display(console) as shown:
        result = evaluate_with_progress(shown, detector, category, on_result)
    return replace(result, category=name)


def _detector(steps: int, seed: int, device: str) -> PatchSVDD:
    """A detector set to learn within minutes: not the paper's protocol, which takes a day."""
    from ..detector.patch_svdd import PatchSVDD

    return PatchSVDD(
        steps=steps,
        batch_size=32,
        learning_rate=3e-4,
        svdd_weight=1.0,  # a large one suits textures
        initialization="kaiming",
        train_last_layer=True,
        seed=seed,
        device=device,
    )
