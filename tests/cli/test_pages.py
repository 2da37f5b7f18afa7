"""`--pages all`: each page of a file is an image of its own, in training and in scoring."""

import json

import numpy as np
import pytest
from PIL import Image

from conftest import texture
from patchsvdd_fast import PatchSVDD

FAST = ("--steps", "1", "--resize", "96", "--mode", "faithful", "--check-every", "0")


def write_stack(path, count, spotted=()):
    """A TIFF of so many pages, some of them with a red square."""
    rng = np.random.default_rng(3)
    pages = [texture(rng) for _ in range(count)]
    for number in spotted:
        pages[number][30:60, 20:50] = (250, 20, 20)
    first, *others = map(Image.fromarray, pages)
    first.save(path, save_all=True, append_images=others)


def test_each_page_is_trained_on(here, good_folder, tmp_path):
    write_stack(good_folder / "stack.tif", 3)
    model = tmp_path / "model.safetensors"
    done = here("train", good_folder, "-o", model, *FAST)
    assert "stack.tif has 3 pages or frames; the first is read" in done.stderr
    assert PatchSVDD.load(model, device="cpu").num_images == 5
    done = here("train", good_folder, "-o", model, *FAST, "--pages", "all", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert "pages" not in done.stderr
    names = PatchSVDD.load(model, device="cpu").gallery_.names
    assert names[4:] == ("stack.tif#1", "stack.tif#2", "stack.tif#3")
    done = here("update", model, "--remove", "stack.tif#2")
    assert "7 training images before, 6 now" in done.stdout
    done = here("update", model, "--add", good_folder / "stack.tif", "--pages", "all")
    assert "6 training images before, 9 now" in done.stdout
    done = here("update", model, "--replace", good_folder, "--pages", "all")
    assert "9 training images before, 7 now" in done.stdout
    done = here("train", good_folder, "-o", model, *FAST, "--pages", "each")
    assert done.returncode == 2
    assert "'each' is none of first, all" in done.stderr


@pytest.mark.parametrize("table", ["jsonl", "csv"])
def test_each_page_is_scored(here, ready_model, good_folder, tmp_path, table):
    write_stack(good_folder / "stack.tif", 3, spotted=[1])
    output, report = tmp_path / "out", tmp_path / "report"
    arguments = ("score", ready_model, good_folder, "-o", output, "--format", table)
    done = here(*arguments, "--pages", "all", "--report", report, "--maps", "npy")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    expected = [str(good_folder / f"{number}.png") for number in range(4)]
    expected += [f"{good_folder / 'stack.tif'}#{number}" for number in (1, 2, 3)]
    if table == "jsonl":
        rows = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
        assert [row["image"] for row in rows] == expected
        assert max(rows, key=lambda row: row["score"])["image"].endswith("stack.tif#2")
    for kind in ("heat-maps", "maps"):
        written = sorted(path.name for path in (output / kind).iterdir())
        assert len(written) == 7
        assert [name.split("-")[0] for name in written[4:]] == [
            *("stack.tif#1", "stack.tif#2", "stack.tif#3"),
        ]
    assert "stack.tif#2" in (report / "index.html").read_text()
    done = here(*arguments, "--pages", "all", "--resume")
    assert "scored 0 images" in done.stdout
    done = here("explain", ready_model, f"{good_folder}/stack.tif#2", "-o", tmp_path / "why")
    assert "stack.tif#2: anomalous" in done.stdout
    done = here(*arguments, "--overwrite")
    assert "scored 5 images" in done.stdout
    assert "stack.tif has 3 pages or frames; the first is read" in done.stderr
