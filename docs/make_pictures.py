"""Make the pictures of README and these pages from the built-in sample: docs/pictures/*.

`make pictures`. Needs the extra `pretrained`; for the picture of the report also Chromium and
playwright, as the tests of reports do.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.files.categories import Category
from patchsvdd_fast.images.sample_cloth import write_sample_category
from patchsvdd_fast.report.heat_maps import heat_map_overlay, heat_map_picture, smooth_map
from patchsvdd_fast.report.side_by_side import side_by_side
from patchsvdd_fast.report.summary import verdict_in_words
from patchsvdd_fast.score.image_result import ImageResult

PICTURES = Path(__file__).parent / "pictures"
SHOWN = ("worn/003", "hole/000", "good/001")
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


def main() -> None:
    """Fit, score, and write every picture."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        category = write_sample_category(Path(folder) / "sample")
        detector = PatchSVDD(encoder="efficientnet_lite0", image_size=256).fit(category.root)
        paths = [category.root / "test" / f"{name}.png" for name in SHOWN]
        with detector.score_stream(paths) as stream:
            results = list(stream)
        save(heat_map_of(results[0], category, SHOWN[0]), "heat-map.jpg")
        (region, *_) = detector.explain(results[1])
        hole, match = results[1], detector.match_picture(region)
        save(side_by_side(hole.original_picture, region, match, hole.map_threshold), "match.jpg")
        save(gallery(results, category), "gallery.jpg")
        model = Path(folder) / "model.safetensors"
        detector.save(model)
        save(report(model, category, Path(folder) / "report"), "report.jpg")


def heat_map_of(result: ImageResult, category: Category, name: str) -> Image.Image:
    """The picture that `patchsvdd demo` saves of a result."""
    return heat_map_picture(
        *(result.original_picture, smooth_map(result.scores), result.map_threshold),
        *(f"cloth/test/{name}.png", verdict_in_words(result), result.anomalous),
        mask_of(category, name),
    )


def gallery(results: Sequence[ImageResult], category: Category) -> Image.Image:
    """Images above, and the same images under their heat maps below."""
    side, gap = 200, 8
    sheet = Image.new("RGB", (len(results) * (side + gap) - gap, 2 * side + gap), "white")
    for column, (result, name) in enumerate(zip(results, SHOWN, strict=True)):
        values = smooth_map(result.scores)
        mask = mask_of(category, name)
        overlay = heat_map_overlay(result.original_picture, values, result.map_threshold, mask)
        for row, picture in enumerate((result.original_picture, overlay)):
            place = column * (side + gap), row * (side + gap)
            sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), place)
    return sheet


def mask_of(category: Category, name: str) -> np.ndarray | None:
    """The ground truth of a test image; None for a good one."""
    path = category.root / "ground_truth" / f"{name}_mask.png"
    return np.asarray(Image.open(path)) > 0 if path.exists() else None


def report(model: Path, category: Category, folder: Path) -> Image.Image:
    """A photograph of the report that `patchsvdd evaluate` writes."""
    from playwright.sync_api import sync_playwright

    data = category.root.relative_to(model.parent)
    command = [sys.executable, "-m", "patchsvdd_fast", "evaluate", data]
    command += ["--model", model.name, "--report", folder]
    subprocess.run(command, check=True, cwd=model.parent)
    browser_path = next(filter(None, map(shutil.which, BROWSERS)))
    photograph = folder / "report.png"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        page = browser.new_page(viewport={"width": 1280, "height": 1420})
        page.goto((folder / "index.html").as_uri())
        page.locator(".card img").first.wait_for()
        page.wait_for_timeout(500)
        page.screenshot(path=photograph)
        browser.close()
    with Image.open(photograph) as image:
        return image.convert("RGB").resize((880, 976), Image.Resampling.LANCZOS)


def save(picture: Image.Image, name: str) -> None:
    """Write a picture, small: these files are part of every clone."""
    path = PICTURES / name
    picture.save(path, quality=66, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:,.0f} kB, {picture.width}x{picture.height}")


if __name__ == "__main__":
    main()
