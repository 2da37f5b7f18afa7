"""What objects show of themselves: one line each, HTML, drawings and tables of results."""

import csv
import pickle
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backbones import Plain
from conftest import texture
from patchsvdd_fast import NormalBank, PatchSVDD
from patchsvdd_fast.cli.app import main
from patchsvdd_fast.detector.evaluation import evaluate_category
from patchsvdd_fast.files.categories import Category
from patchsvdd_fast.files.layouts import LabelledImage, LabelledSet
from patchsvdd_fast.images.prepare import prepare_image
from patchsvdd_fast.report.display import to_pandas
from patchsvdd_fast.report.table import COLUMNS
from patchsvdd_fast.search.identified import IdentifiedBank
from patchsvdd_fast.training.record import TrainingRecord

EVIL = "<script>alert(1)</script>&\"'>.png"


@pytest.fixture(scope="module")
def detector():
    rng = np.random.default_rng(0)
    return PatchSVDD(encoder=Plain(), image_size=96).fit([texture(rng) for _ in range(6)])


@pytest.fixture
def new_folder(tmp_path):
    """A good image, a spotted one, and a dark one of a name that is no good HTML or formula."""
    rng = np.random.default_rng(5)
    folder = tmp_path / "new"
    folder.mkdir()
    spotted = texture(rng)
    spotted[30:60, 20:50] = (250, 20, 20)
    images = {"ok.png": texture(rng), "spot.png": spotted, "$x^.png": texture(rng) // 4}
    for name, image in images.items():
        Image.fromarray(image).save(folder / name)
    return folder


@pytest.fixture
def scored(detector, new_folder):
    return detector.score(new_folder)


class Pictures(HTMLParser):
    """Elements and sources of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_reprs_are_one_line_and_hold_no_values(detector, scored, category_folder):
    category = Category(category_folder)
    image = prepare_image(np.zeros((96, 96, 3), np.uint8), "image 0", None, 16)
    grid = NormalBank(torch.rand(3, 5, 4, 8))
    shown = {
        repr(detector): "PatchSVDD(6 images of 96x96, own, K24: 600 x ",
        repr(scored): "ScoreResult(3 images, 96x96 pixels, K24, mult, 2 anomalous)",
        repr(scored[1]): "ImageResult('ok.png', normal, ",
        repr(scored.images): "ImageSet(3 images, 96x96 pixels, uint8)",
        repr(image): "PreparedImage('image 0', 96x96 pixels, uint8)",
        repr(detector.calibration_): "Calibration(6 images, scores ",
        repr(detector.gallery_): "Gallery(6 images, with pictures)",
        repr(detector.record_): "TrainingRecord(no training)",
        repr(TrainingRecord(1200, 31.2, True, 0.5, {}, 50, [(0, 1.0), (50, 2.0)])): (
            "TrainingRecord(1,200 steps in 31 s, loss 0.5, weights of step 50, 2 checks, collapsed)"
        ),
        repr(detector.banks_): "{PatchLevel(size=24, stride=8): NormalBank(600 x ",
        repr(grid): "NormalBank(60 x 8, 3 images, 1.94 kB, cpu)",
        repr(grid.coreset(0.5)): "NormalBank(30 x 8, 3 images, coreset, ",
        repr(NormalBank(torch.rand(2000, 8), clusters=9)): "NormalBank(2,000 x 8, 9 clusters, ",
        repr(IdentifiedBank(NormalBank(torch.rand(5, 8)), np.arange(5))): "IdentifiedBank(5 x 8, ",
        repr(category.test_set()): "LabelledSet(6 images)",
        repr(evaluate_category(detector, category)): (
            "CategoryResult('stripes', 3 good, 3 anomalous; K24: detection 100.0, segmentation "
        ),
    }
    for line, beginning in shown.items():
        assert line.startswith(beginning)
        assert "\n" not in line and "tensor" not in line and len(line) < 160
    assert re.search(r"threshold \S+ at 14\.29% false alarms, cpu\)$", repr(detector))


def test_memory_counts_arrays_once():
    plain = NormalBank(torch.rand(100_000, 8), clusters=0, keep_codes=False)
    # Rows of 32 bytes and their groups of 8.
    assert repr(plain) == "NormalBank(100,000 x 8, 4 MB, cpu)"
    plain.add(torch.rand(10, 8))
    assert repr(plain) == "NormalBank(100,010 x 8, 4 MB, cpu)"


def test_a_detector_before_fit_is_shown_as_by_scikit_learn(detector):
    unfitted = PatchSVDD(mode="dense")
    assert repr(unfitted) == "PatchSVDD(mode='dense')"
    assert repr(PatchSVDD(encoder=Plain(), seed=3)) == "PatchSVDD(encoder='Plain', seed=3)"
    assert "sk-container" in unfitted._repr_mimebundle_()["text/html"]
    shown = detector._repr_mimebundle_(include=None, exclude=None)
    assert shown == {"text/plain": repr(detector), "text/html": f"<code>{detector!r}</code>"}


def test_one_training_image_gives_no_verdicts():
    rng = np.random.default_rng(0)
    detector = PatchSVDD(encoder=Plain(), image_size=96).fit([texture(rng)])
    scored = detector.score([texture(rng)])
    assert "threshold" not in repr(detector)
    assert repr(scored) == "ScoreResult(1 image, 96x96 pixels, K24, mult)"
    assert repr(scored[0]).startswith("ImageResult('image 0', score ")
    assert repr(scored.images) == "ImageSet(1 image, 96x96 pixels, uint8)"
    assert repr(detector).startswith("PatchSVDD(1 image of 96x96, ")
    assert repr(detector.gallery_) == "Gallery(1 image, with pictures)"
    assert repr(NormalBank(torch.rand(1, 2, 2, 8))).startswith("NormalBank(4 x 8, 1 image, ")
    assert (
        repr(LabelledSet([LabelledImage(Path("a.png"), "good", ())], [])) == "LabelledSet(1 image)"
    )
    record = TrainingRecord(steps=1, seconds=2.0, qualities=[(1, 50.0)])
    assert repr(record) == "TrainingRecord(1 step in 2 s, 1 check)"
    assert "score" in scored._repr_html_()


def test_scored_images_are_those_of_a_stream(detector, new_folder, scored):
    paths = [new_folder / name for name in scored.images.names]
    with detector.score_stream(paths) as stream:
        streamed = list(stream)
    assert len(scored) == len(list(scored)) == len(streamed) == 3
    for mine, theirs in zip(scored, streamed, strict=True):
        assert (mine.score, mine.p_value, mine.threshold, mine.anomalous, mine.unusual) == (
            *(theirs.score, theirs.p_value, theirs.threshold, theirs.anomalous, theirs.unusual),
        )
        assert mine.level == theirs.level == detector.highest_place(theirs).level
        assert torch.equal(mine.anomaly_map, theirs.anomaly_map)
        assert torch.equal(mine.pixels, theirs.pixels)
        assert detector.explain(mine) == detector.explain(theirs)
    assert scored[-1].name == scored[2].name == "spot.png"
    with pytest.raises(IndexError):
        scored[3]
    again = pickle.loads(pickle.dumps(scored))
    assert repr(list(again)) == repr(list(scored))


def test_html_is_self_contained_and_escaped(detector):
    rng = np.random.default_rng(0)
    scored = detector.score([texture(rng) for _ in range(12)])
    object.__setattr__(scored.images, "names", (EVIL,) * 12)
    page = scored._repr_html_()
    assert "and 2 more" in page
    for html, count in ((page, 10), (scored[0]._repr_html_(), 1)):
        found = Pictures(html)
        assert found.tags.count("img") == len(found.sources) == count
        assert all(source.startswith("data:image/jpeg;base64,") for source in found.sources)
        assert "script" not in found.tags
        assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in html


def test_a_page_says_what_is_unusual(scored):
    dark = scored[0]
    assert dark.unusual
    assert dark.unusual[0].partition("(")[0] in dark._repr_html_()
    assert dark.unusual[0].partition("(")[0] in scored._repr_html_()


def test_plots(scored, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    axes = scored.plot()
    assert [one.get_title().split("\n")[0] for one in axes] == list(scored.images.names)
    assert "anomalous" in axes[2].get_title()
    axes[0].figure.savefig(tmp_path / "all.png")  # also of the name with $
    assert len(scored.plot(most=1)) == 1
    _, own = pyplot.subplots()
    assert scored[2].plot(axes=own) is own
    assert own.images[0].get_array().shape[0] == 96
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        scored.plot(most=0)
    pyplot.close("all")


def test_tables_are_those_of_the_command(detector, new_folder, scored, tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    table = scored.to_pandas()
    assert tuple(table.columns) == COLUMNS
    assert table["image"].tolist() == list(scored.images.names)
    assert table["score"].tolist() == scored.image_scores.tolist()

    rng = np.random.default_rng(0)
    fitted = PatchSVDD(mode="dense", image_size=96, device="cpu")
    fitted.fit([texture(rng) for _ in range(6)], encoder=fitted.untrained_encoder())
    fitted.save(tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["patchsvdd", "score", "model.safetensors", "new", "-o", "out"]
    )
    with pytest.raises(SystemExit):
        main()
    with Path("out/scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with fitted.score_stream([f"new/{name}" for name in scored.images.names]) as stream:
        streamed = to_pandas(stream)
    written = [{k: v or None for k, v in row.items()} for row in rows]
    assert written == [
        {
            k: None if pandas.isna(v) else v if isinstance(v, str) else repr(float(v))
            for k, v in row.items()
        }
        for row in streamed.to_dict("records")
    ]
    one = scored[0].to_pandas()
    assert one.equals(table[:1]) or one.iloc[0].dropna().equals(table.iloc[0].dropna())


@pytest.mark.parametrize(
    ("missing", "act", "message"),
    [
        ("matplotlib", lambda scored: scored.plot(), "plot needs matplotlib: pip install"),
        ("matplotlib", lambda scored: scored[0].plot(), "plot needs matplotlib: pip install"),
        ("pandas", lambda scored: scored.to_pandas(), "to_pandas needs pandas: pip install pandas"),
        ("pandas", lambda scored: scored[0].to_pandas(), "to_pandas needs pandas: pip install"),
    ],
)
def test_a_missing_library_is_named(scored, monkeypatch, missing, act, message):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=message):
        act(scored)
