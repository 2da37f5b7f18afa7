"""The HTML report: one file, safe with any text, and usable with thousands of images."""

import base64
import errno
import gc
import hashlib
import io
import json
import re
import shutil
import time
import weakref
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from conftest import texture
from patchsvdd_fast.report.html import Finding, ReportEntry, ReportWriter
from patchsvdd_fast.report.start_page import write_scores_page
from patchsvdd_fast.report.text import shown
from patchsvdd_fast.score.regions import Region

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
SIDE = 96

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "<!--<script>",
    "]]>'`${window.hacked = 1}`\\",
    "&lt;b&gt; {{index}} {{policy}}",
    "line\nbreak\ttab\x00nul\x1b[31m\x7f\x85\u2028\u2029",
    "not UTF-8: \udcff\ud800",
    "turned \u202egnp.exe",
    "ünïcode 日本 \U0001f600",
    "",
    "x" * 5000,
]


def _picture(seed=0, side=SIDE):
    return Image.fromarray(texture(np.random.default_rng(seed), side))


def _heat(side=SIDE):
    y, x = np.mgrid[:side, :side] / side
    return np.exp(-20 * ((x - 0.4) ** 2 + (y - 0.5) ** 2)).astype(np.float32)


def _finding(**changes):
    picture = changes.pop("match_picture", _picture(9))
    left, top, width, height = changes.pop("box", (20, 30, 30, 25))
    values = {
        "area": 500,
        "peak": 7.5,
        "level": "K32",
        "distance": 0.125,
        "patch": (16, 28, 32),
        "match_image": 3,
        "match_name": "train/3.png",
        "match": (8, 40, 32),
    }
    return Finding(Region(left, top, width, height, **{**values, **changes}), picture)


def _entry(name="spot/0.png", **changes):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[30:60, 20:50] = True
    values = {
        "name": name,
        "picture": _picture(),
        "heat": _heat(),
        "score": 7.5,
        "p_value": 0.02,
        "anomalous": True,
        "label": "spot",
        "mask": mask,
        "findings": [_finding()],
        "notes": ["darker than the training images: 34, usual 80 to 92"],
    }
    return ReportEntry(**{**values, **changes})


def _good(name="good/0.png", **changes):
    values = {
        "score": 2.5,
        "p_value": 0.6,
        "anomalous": False,
        "label": "good",
        "mask": None,
        "findings": [],
    }
    return _entry(name, **{**values, "notes": [], **changes})


def _write(folder, entries, threshold=5.0, metrics=None, **arguments):
    writer = ReportWriter(folder, "A title", {"model": "m.safetensors"}, threshold, **arguments)
    with writer:
        for entry in entries:
            writer.add(entry)
        return writer.close(metrics)


class _Page(HTMLParser):
    """The page as a parser sees it: its elements, their text, its code, and the data by id."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.blocks = [], "", {}
        self._open = None
        self.feed(path.read_text(encoding="utf-8"))
        self.code = {name: self.blocks.pop(name) for name in ("script", "style")}
        self.data = {name: json.loads(text) for name, text in self.blocks.items()}

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        if tag in ("script", "style"):
            self._open = attributes.get("id", tag)
            self.blocks[self._open] = ""

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open is None:
            self.text += data
        else:
            self.blocks[self._open] += data


# --- without a browser ----------------------------------------------------------------------------


def test_one_file_holds_everything(tmp_path):
    metrics = {"mult": {"detection": 91.24, "segmentation": None, "aupro": 80.0}}
    tables = {"By defect": [["defect", "found"], ["spot", "1 of 1"]]}
    path = _write(
        tmp_path / "new" / "report",
        [_entry(), _good()],
        metrics=metrics,
        tables=tables,
        good_scores=[1.0, 2.0, 3.0],
    )
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]
    page = _Page(path)
    text = " ".join(page.text.split())
    for expected in ("A title", "m.safetensors", "AUROC 100.0 %", "91.2", "By defect", "1 of 1"):
        assert expected in text
    assert page.data["index"] == {
        "entries": [
            ["spot/0.png", 7.5, 1.5, 0.02, True, "spot"],
            ["good/0.png", 2.5, 0.5, 0.6, False, "good"],
        ],
        "hasNotes": True,
        "threshold": 5.0,
    }
    source = path.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', source)
    assert "@import" not in source and "url(" not in source


def test_the_policy_allows_this_script_and_this_style_alone(tmp_path):
    path = _write(tmp_path, [_entry()])
    source = path.read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', source)
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    assert allowed["default-src"] == "'none'" and allowed["img-src"] == "data:"
    for tag, inline in _Page(path).code.items():
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert allowed[f"{tag}-src"] == f"'sha256-{digest}'"


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_any_kind_stays_text(text, tmp_path):
    usual, hostile = tmp_path / "usual", tmp_path / "hostile"
    _write(usual, [_entry()])
    with ReportWriter(usual, "t", {"f": "v"}, 5.0, tables={"c": [["h"], ["r"]]}) as writer:
        writer.add(_entry())
        writer.add_failure("n", "m")
    tables = {text: [[text], [text]]}
    with ReportWriter(hostile, text, {text: text}, 5.0, tables=tables) as writer:
        finding = _finding(level=text, match_name=text)
        writer.add(_entry(text, label=text, findings=[finding], notes=[text]))
        writer.add_failure(text, text)
    page = _Page(writer.path)
    assert page.tags == _Page(usual / "index.html").tags
    assert page.data["index"]["entries"][0] == [shown(text), 7.5, 1.5, 0.02, True, shown(text)]
    entry = page.data["entry-0"]
    assert entry["notes"] == [shown(text)]
    assert entry["findings"][0]["matchName"] == entry["findings"][0]["level"] == shown(text)
    assert page.text.count(shown(text)) >= 8 or not text


def test_what_cannot_be_seen_is_spelled_out():
    assert shown("a\nb\x00\u202e\udcff\u2028") == r"a\nb\x00\u202e\udcff\u2028"
    assert shown("ünïcode 日本 \U0001f600 'quoted' <b>") == "ünïcode 日本 \U0001f600 'quoted' <b>"


def test_an_older_report_stays_after_an_exception(tmp_path):
    before = _write(tmp_path, [_entry()]).read_bytes()
    with (
        pytest.raises(KeyboardInterrupt),
        ReportWriter(tmp_path, "New", {}, None) as writer,
    ):
        writer.add(_good())
        raise KeyboardInterrupt
    assert (tmp_path / "index.html").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1

    empty = tmp_path / "empty"
    with pytest.raises(RuntimeError), ReportWriter(empty, "New", {}, None):
        raise RuntimeError
    assert not list(empty.iterdir())


def test_an_older_report_stays_when_the_disk_is_full(monkeypatch, tmp_path):
    before = _write(tmp_path, [_entry()]).read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    with pytest.raises(OSError, match=r"cannot write .*index\.html: No space left"):
        _write(tmp_path, [_good()])
    assert (tmp_path / "index.html").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_closed_at_the_end_and_once(tmp_path):
    with ReportWriter(tmp_path, "Title", {}, None) as writer:
        writer.add(_good(anomalous=None))
        assert not writer.path.exists()
    assert writer.path.exists()
    first = writer.path.stat().st_mtime_ns
    assert writer.close() == tmp_path / "index.html"
    assert writer.path.stat().st_mtime_ns == first
    with pytest.raises(ValueError, match="closed already"):
        writer.add(_good())
    with pytest.raises(ValueError, match="closed already"):
        writer.add_failure("a", "b")


def test_failures_are_listed(tmp_path):
    with ReportWriter(tmp_path, "Title", {}, None) as writer:
        writer.add_failure("broken.png", "is not an image")
    text = " ".join(_Page(writer.path).text.split())
    assert "Not scored: 1" in text and "broken.png is not an image" in text


def test_no_entries(tmp_path):
    page = _Page(_write(tmp_path, [], threshold=None))
    assert page.data["index"] == {"entries": [], "hasNotes": False, "threshold": None}
    assert "Not scored" not in page.text
    assert "figcaption" not in page.tags


def test_no_labels_and_no_threshold(tmp_path):
    unlabelled = _entry(label=None, mask=None, anomalous=None, p_value=None, findings=[], notes=[])
    page = _Page(_write(tmp_path, [unlabelled], threshold=None))
    assert page.data["index"]["entries"] == [["spot/0.png", 7.5, None, None, None, None]]
    for absent in ("AUROC", "missed", "false alarms"):
        assert absent not in page.text
    assert "scored images (1)" in page.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": float("nan")}, "score of spot/0.png must be finite, got nan"),
        ({"score": float("-inf")}, "score of spot/0.png must be finite, got -inf"),
        ({"p_value": 1.5}, "p_value of spot/0.png must lie between 0 and 1, got 1.5"),
        ({"p_value": float("nan")}, "must lie between 0 and 1, got nan"),
        ({"heat": np.zeros((0, 3), np.float32)}, r"heat of .* shape \[H, W\], got \[0, 3\]"),
        ({"heat": 2 * _heat()}, "heat of .* between 0 and 1, got .* to 1.99"),
        ({"heat": np.full((SIDE, SIDE), np.nan)}, "heat of .* between 0 and 1, got nan"),
        ({"mask": np.zeros((1, 2), bool)}, r"mask of .* shape \[96, 96\] .* got \[1, 2\]"),
        ({"findings": [_finding(peak=np.inf)]}, "peak of a finding in .* must be finite, got inf"),
        ({"findings": [_finding(distance=np.nan)]}, "distance of a finding in .* got nan"),
    ],
)
def test_bad_entries_are_refused(changes, message, tmp_path):
    with ReportWriter(tmp_path, "Title", {}, 5.0) as writer:
        writer.add(_good())
        with pytest.raises(ValueError, match=message):
            writer.add(_entry(**changes))
    assert len(_Page(writer.path).data["index"]["entries"]) == 1


def test_bad_arguments_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="is a file; a report needs a folder"):
        ReportWriter(file, "Title", {}, None)
    with pytest.raises(ValueError, match="threshold must be finite, got nan"):
        ReportWriter(tmp_path, "Title", {}, float("nan"))
    with pytest.raises(ValueError, match="good_scores must be finite, got inf"):
        ReportWriter(tmp_path, "Title", {}, None, [1.0, float("inf")])
    with pytest.raises(ValueError, match="picture_side must be at least 1, got 0"):
        ReportWriter(tmp_path, "Title", {}, None, picture_side=0)


def test_numpy_numbers_are_taken(tmp_path):
    finding = _finding(
        box=tuple(np.arange(4)),
        patch=tuple(np.arange(3)),
        peak=np.float32(1),
        distance=np.float32(2),
    )
    entry = _entry(
        score=np.float32(2), p_value=np.float64(0.5), anomalous=np.bool_(True), findings=[finding]
    )
    page = _Page(_write(tmp_path, [entry], threshold=np.float32(1), good_scores=np.ones(3)))
    assert page.data["index"]["entries"][0][1:5] == [2.0, 2.0, 0.5, True]
    assert page.data["entry-0"]["findings"][0]["box"] == [0, 1, 2, 3]


def test_pictures_are_shrunk_and_training_images_stored_once(tmp_path):
    wide = Image.new("RGB", (800, 400), (200, 30, 30))
    heat, other = np.zeros((400, 800), np.float32), _finding(match_name="b", match_picture=None)
    entries = [
        _entry("wide", picture=wide, heat=heat, mask=None, findings=[_finding(), _finding()]),
        _entry("small", findings=[_finding(), other]),
        _good("normal", picture=wide, heat=heat),
        _good("missed", picture=wide, heat=heat, label="spot"),
    ]
    data = _Page(_write(tmp_path, entries, picture_side=200)).data
    assert [name for name in data if name.startswith("match")] == ["match-0"]
    assert [f["matchPicture"] for f in data["entry-1"]["findings"]] == [0, None]
    assert data["entry-0"]["size"] == data["entry-0"]["mapSize"] == [800, 400]
    assert _decoded(data["entry-0"]["picture"]).size == (200, 100)
    assert _decoded(data["entry-0"]["heat"]).size == (100, 50)
    assert _decoded(data["entry-1"]["picture"]).size == (SIDE, SIDE)
    assert _decoded(data["entry-2"]["picture"]).size == (100, 50)  # who looks at good images?
    assert _decoded(data["entry-2"]["heat"]).size == (50, 25)
    assert _decoded(data["entry-3"]["picture"]).size == (200, 100)


def test_a_picture_may_be_larger_than_its_map(tmp_path):
    wide = Image.new("RGB", (600, 300))
    mask = np.zeros((300, 600), bool)
    mask[100:150, 200:300] = True
    data = _Page(_write(tmp_path, [_entry(picture=wide, mask=mask, map_threshold=1.0)])).data
    entry = data["entry-0"]
    assert entry["size"] == [600, 300] and entry["mapSize"] == [SIDE, SIDE]
    assert _decoded(entry["picture"]).size == (600, 300)
    assert _decoded(entry["heat"]).size == (384, 192)
    assert entry["mask"].startswith("M200 100h100")
    ends = np.array(re.findall(r"([\d.]+) ([\d.]+)", entry["contour"]), float)
    middle = (ends.min(axis=0) + ends.max(axis=0)) / 2
    assert middle == pytest.approx([0.4 * 600, 0.5 * 300], abs=6)


def test_pictures_do_not_stay_in_memory(tmp_path):
    with ReportWriter(tmp_path, "Title", {}, None) as writer:
        picture = _picture()
        seen = [weakref.ref(picture)]
        writer.add(_good(picture=picture, anomalous=None))
        del picture
        gc.collect()
        assert seen[0]() is None


def _decoded(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_a_row_for_each_label(tmp_path):
    entries = [
        *(_good(f"good/{number}", score=score) for number, score in enumerate((1.0, 2.0, 3.0))),
        _entry("a/0", score=10.0, label="a"),
        *(_entry(f"b/{i}", score=s, label="b", anomalous=s > 5) for i, s in enumerate((2.5, 15.0))),
    ]
    page = _Page(_write(tmp_path, entries))
    text = " ".join(page.text.split())
    assert "By label" in text
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    for label, cells in {
        "good": ["3", "0 of 3", "0.4 x", "-"],
        "a": ["1", "1 of 1", "2 x", "100.0"],
        "b": ["2", "1 of 2", "1.75 x", "83.3"],
    }.items():
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        assert f'<tr><th scope="row">{label}</th>{row}</tr>' in source
    unlabelled = _write(tmp_path / "unlabelled", [_entry(label=None)])
    assert "By label" not in _Page(unlabelled).text


def test_further_figures_stand_at_the_head(tmp_path):
    with ReportWriter(tmp_path, "Title", {}, 5.0) as writer:
        writer.add(_good())
        writer.close(None, {"false alarms in <validation>": "2 of 50"})
    source = writer.path.read_text(encoding="utf-8")
    assert "<dt>false alarms in &lt;validation&gt;</dt><dd>2 of 50</dd>" in source
    assert source.index("2 of 50") < source.index("<main>")


def test_roc_curve_and_what_the_threshold_reaches(tmp_path):
    scores = [(1.0, "good"), (2.0, "good"), (4.0, "good"), (9.0, "good"), (3.0, "a"), (8.0, "b")]
    entries = [
        _entry(str(number), score=score, label=label, anomalous=score > 5, findings=[])
        for number, (score, label) in enumerate(scores)
    ]
    source = _write(tmp_path, entries).read_text(encoding="utf-8")
    assert "AUROC 62.5 %; at the threshold 50 % found at 25 % false alarms" in source
    for figure in ("<dd>1 of 2</dd>", "<dd>1 of 4</dd>", "<dd>2</dd>", "<dd>5</dd>"):
        assert figure in source


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the PATH")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens a report's file; by the end it must not have complained or asked for another file."""
    complaints = []
    context = browser.new_context(viewport={"width": 1200, "height": 800})

    def open_report(path):
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith("data:")
                or request.url == path.as_uri()
                or complaints.append(request.url)
            ),
        )
        page.goto(path.as_uri())
        return page

    yield open_report
    context.close()
    assert not complaints


def _names(page):
    labels = page.locator(".card").evaluate_all("all => all.map(c => c.ariaLabel)")
    return [label.rsplit(", score", 1)[0] for label in labels]


def _mixed(folder):
    """Verdicts of each kind, with p-values and labels in no order."""
    entries = [
        _entry("spot/10.png", score=9.0, p_value=0.01),
        _entry("spot/9.png", score=3.0, p_value=0.4, anomalous=False, notes=[]),
        _good("good/1.png", score=1.0, p_value=0.9),
        _good("good/2.png", score=6.0, p_value=0.03, anomalous=True),
        _entry("cut/1.png", score=8.0, p_value=0.02, label="cut"),
    ]
    return _write(folder, entries, good_scores=[1.0, 2.0, 3.0])


def test_gallery_sorts(opened, tmp_path):
    page = opened(_mixed(tmp_path))
    by_score = ["spot/10.png", "cut/1.png", "good/2.png", "spot/9.png", "good/1.png"]
    assert _names(page) == by_score
    page.select_option("#order", "lowest")
    assert _names(page) == by_score[::-1]
    page.select_option("#order", "name")
    assert _names(page) == ["cut/1.png", "good/1.png", "good/2.png", "spot/9.png", "spot/10.png"]
    page.select_option("#order", "label")
    assert _names(page) == ["cut/1.png", "good/2.png", "good/1.png", "spot/10.png", "spot/9.png"]
    page.select_option("#order", "pValue")
    assert _names(page) == by_score


def test_gallery_filters(opened, tmp_path):
    page = opened(_mixed(tmp_path))
    for verdict, expected in {
        "anomalous": ["spot/10.png", "cut/1.png", "good/2.png"],
        "normal": ["spot/9.png", "good/1.png"],
        "wrong": ["good/2.png", "spot/9.png"],
    }.items():
        page.select_option("#verdicts", verdict)
        assert _names(page) == expected
        assert page.inner_text("#count") == f"{len(expected)} of 5"
    page.fill("#part", "SPOT")
    assert _names(page) == ["spot/9.png"]
    page.select_option("#verdicts", "all")
    assert _names(page) == ["spot/10.png", "spot/9.png"]
    page.fill("#part", "nothing like it")
    assert _names(page) == [] and page.inner_text("#count") == "0 of 5"


def test_cards_tell_verdict_label_and_notes(opened, tmp_path):
    page = opened(_mixed(tmp_path))
    first = page.locator(".card").first
    first.locator("img").first.wait_for()
    text = first.inner_text()
    for expected in ("spot/10.png", "1.8 × threshold", "p-value 0.01", "anomalous", "darker than"):
        assert expected in text
    assert "false alarm" in page.locator(".card").nth(2).inner_text()
    assert "missed" in page.locator(".card").nth(3).inner_text()
    widths = "all => Promise.all(all.map(i => i.decode().then(() => i.naturalWidth)))"
    assert first.locator("img").evaluate_all(widths) == [SIDE, SIDE]


def test_an_image_opens_and_keys_move(opened, tmp_path):
    page = opened(_mixed(tmp_path))
    viewer = page.locator("#viewer")
    page.locator(".card").nth(1).click()
    assert page.inner_text("#viewer-name") == "cut/1.png"
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#viewer-name") == "good/2.png"
    assert "false alarm" in page.inner_text("#about")
    for _ in range(3):  # beyond the first it stays there
        page.keyboard.press("ArrowLeft")
    assert page.inner_text("#viewer-name") == "spot/10.png"
    page.click("#next")
    page.keyboard.press("Escape")
    assert not viewer.is_visible()
    page.wait_for_function("document.activeElement.ariaLabel?.startsWith('cut/1.png')")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert viewer.is_visible() and page.inner_text("#viewer-name") == "spot/10.png"


def test_the_slider_fades_the_heat_map(opened, tmp_path):
    page = opened(_mixed(tmp_path))
    page.locator(".card").first.click()
    opacity = "getComputedStyle(document.querySelector('#stage .heat')).opacity"
    assert float(page.evaluate(opacity)) == pytest.approx(0.8)
    slider = page.locator("#viewer .opacity")
    slider.fill("0.25")
    assert float(page.evaluate(opacity)) == pytest.approx(0.25)
    slider.focus()
    page.keyboard.press("ArrowRight")  # moves the slider, not on to the next image
    assert float(page.evaluate(opacity)) == pytest.approx(0.3)
    assert page.inner_text("#viewer-name") == "spot/10.png"


def test_the_threshold_can_be_tried(opened, tmp_path):
    page = opened(_mixed(tmp_path))

    def counts():
        ids = ("found", "missed", "false-alarms", "passed")
        return [int(page.inner_text(f"#{name}")) for name in ids]

    assert counts() == [2, 1, 1, 1]
    assert page.inner_text("#chosen") == "1 × the model's"
    rates = "precision 66.7 % recall 66.7 % false alarms 50 % F1 0.667"
    assert page.inner_text("#rates").split() == rates.split()
    slider = page.locator("#threshold")
    slider.focus()
    page.keyboard.press("ArrowRight")  # from 5 to 7, between the scores 6 and 8
    assert counts() == [2, 1, 0, 2]
    assert page.inner_text("#chosen") == "1.4 × the model's"
    assert page.locator("svg .chosen").count() == 1
    assert "normal" in page.locator(".card").nth(2).inner_text()  # verdicts follow
    page.select_option("#verdicts", "wrong")
    assert _names(page) == ["spot/9.png"]
    page.reload()
    assert counts() == [2, 1, 0, 2] and _names(page) == ["spot/9.png"]
    page.click("#own-threshold")
    assert counts() == [2, 1, 1, 1] and page.locator("svg .chosen").count() == 0
    assert _names(page) == ["good/2.png", "spot/9.png"]


def test_filters_and_the_opened_image_survive_a_reload(opened, tmp_path):
    page = opened(_mixed(tmp_path))
    page.select_option("#order", "name")
    page.select_option("#verdicts", "anomalous")
    page.fill("#part", "png & 1")
    page.fill("#part", "/1")
    page.reload()
    assert page.input_value("#part") == "/1"
    assert _names(page) == ["cut/1.png", "spot/10.png"]
    page.locator(".card").nth(1).click()
    link = page.locator("#link").get_attribute("href")
    page.reload()
    assert page.inner_text("#viewer-name") == "spot/10.png"
    page.click("#close")
    page.wait_for_function("!location.hash.includes('image')")
    page.evaluate("link => { location.hash = link; }", link.replace("spot%2F10", "spot%2F9"))
    page.locator("#viewer").wait_for()  # an image that the filter hides is shown all the same
    assert page.inner_text("#viewer-name") == "spot/9.png"
    page.evaluate("location.hash = '#order=nonsense&image=nobody&threshold=99&show='")
    page.reload()
    assert len(_names(page)) == 5 and not page.locator("#viewer").is_visible()


def test_images_of_one_name_have_links_of_their_own(opened, tmp_path):
    page = opened(_write(tmp_path, [_entry("a", score=9.0), _entry("a", score=8.0)]))
    page.locator(".card").nth(1).click()
    page.reload()
    assert page.inner_text("#place") == "2 of 2"


def test_the_image_can_be_enlarged_and_moved(opened, tmp_path):
    page = opened(_mixed(tmp_path))
    page.locator(".card").first.click()

    def view():
        return [float(v) for v in page.locator("#stage").get_attribute("viewBox").split()]

    assert view() == [0, 0, SIDE, SIDE] and page.locator("#zoom-out").is_disabled()
    page.click("#zoom-in")
    page.keyboard.press("+")
    x, y, width, _ = view()
    assert width == pytest.approx(SIDE / 2.25) and x == y == pytest.approx((SIDE - width) / 2)
    stage = page.locator("#stage").bounding_box()
    middle = stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1])
    page.mouse.up()
    assert view()[0] < x - 3 and view()[1] == pytest.approx(y)
    page.mouse.wheel(0, -300)
    page.wait_for_function("document.querySelector('#stage').viewBox.baseVal.width < 96 / 4")
    page.mouse.dblclick(*middle)
    assert view() == [0, 0, SIDE, SIDE]
    page.click("#zoom-in")
    page.keyboard.press("ArrowRight")
    assert view() == [0, 0, SIDE, SIDE]


def test_positions_of_the_map_are_shown_in_the_picture(opened, tmp_path):
    wide = Image.new("RGB", (4 * SIDE, 2 * SIDE), (90, 120, 150))
    page = opened(_write(tmp_path, [_entry(picture=wide, mask=None)]))
    page.locator(".card").first.click()
    box = page.locator("#stage .box .line").first.evaluate(
        "r => ['x', 'y', 'width', 'height'].map((name) => Number(r.getAttribute(name)))"
    )
    assert box == [4 * 20, 2 * 30, 4 * 30, 2 * 25]
    assert page.locator("#stage").get_attribute("viewBox") == f"0 0 {4 * SIDE} {2 * SIDE}"
    views = page.locator("#match svg").evaluate_all(
        "all => all.map(s => s.getAttribute('viewBox'))"
    )
    assert views == ["64 56 128 64", "32 80 128 64", f"0 0 {4 * SIDE} {2 * SIDE}"]
    assert f"x 16, y 28, 32 pixels wide, of {SIDE}×{SIDE}" in page.inner_text("#match")


def test_on_paper_all_images_or_the_opened_one(opened, tmp_path):
    page = opened(_mixed(tmp_path))
    page.emulate_media(media="print")
    assert not page.locator(".tools").is_visible() and not page.locator("#threshold").is_visible()
    assert page.pdf().startswith(b"%PDF")
    page.set_viewport_size({"width": 690, "height": 1000})  # A4 between its margins
    columns = "getComputedStyle(document.querySelector('.overview')).gridTemplateColumns"
    assert len(page.evaluate(columns).split()) == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 690
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".card .thumb").count() == 5
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    page.locator(".card").first.click()
    page.emulate_media(media="print")
    assert page.locator("#stage").is_visible() and not page.locator("#cards").is_visible()
    assert not page.locator("#close").is_visible()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1600, "dark")])
def test_nothing_is_wider_than_the_screen(opened, tmp_path, width, scheme):
    entries = [_entry("folder/" * 30 + "1.png"), _entry("b" * 300), _good()]
    page = opened(_write(tmp_path, entries))
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#cards").scroll_into_view_if_needed()
    name = page.locator(".card .name").first
    name.scroll_into_view_if_needed()
    assert name.locator(".tail").inner_text() == ("folder/" * 30 + "1.png")[-12:]
    page.locator(".card").first.click()
    assert page.evaluate("document.querySelector('#viewer').scrollWidth") <= width


def test_the_start_page_fits_a_phone(opened, tmp_path):
    counts = {"magnetic_tile": (1200, 30), "b" * 30: (5, 1)}
    page = opened(write_scores_page(tmp_path, counts, [], {}))
    page.set_viewport_size({"width": 390, "height": 800})
    assert (
        page.evaluate("(t => t.scrollWidth - t.clientWidth)(document.querySelector('.start'))") == 0
    )
    assert page.locator("td").all_inner_texts() == ["5", "1", "1,200", "30"]
    assert not page.locator("thead").is_visible()
    page.set_viewport_size({"width": 1000, "height": 800})
    assert page.locator("thead").is_visible()


def test_mask_and_findings_can_be_hidden(opened, tmp_path):
    page = opened(_mixed(tmp_path))
    page.locator(".card").first.click()
    for box, drawn in (("#show-mask", "#stage .mask"), ("#show-boxes", "#stage .box")):
        before = page.locator(drawn).count()
        assert before == (2 if drawn.endswith("mask") else 1)  # a line and its halo
        page.uncheck(box)
        assert page.locator(drawn).count() == 0
        page.check(box)
        assert page.locator(drawn).count() == before
    assert page.locator("#stage .box.chosen").count() == 1
    page.keyboard.press("Escape")
    page.locator(".card").nth(2).click()
    assert not page.locator("#with-mask").is_visible()
    assert not page.locator("#with-boxes").is_visible()


def test_a_finding_shows_its_match(opened, tmp_path):
    small = _finding(box=(30, 40, 8, 8), peak=6.5, level="K64", distance=0.5)
    lost = _finding(box=(70, 5, 20, 20), peak=6.0, match_name="lost.png", match_picture=None)
    around = _finding(match_name="train/8.png", match_picture=_picture(8))
    page = opened(_write(tmp_path, [_entry(findings=[around, small, lost])]))
    page.locator(".card").first.click()
    match = page.locator("#match")
    assert "train/8.png" in match.inner_text()  # the first is chosen at the start

    page.locator("#stage .box[data-finding='1'] text").hover()  # inside the first one's box
    for expected in ("train/3.png", "0.5 at K64", "x 16, y 28", "x 8, y 40"):
        assert expected in match.inner_text()
    views = match.locator("svg").evaluate_all("all => all.map(s => s.getAttribute('viewBox'))")
    assert views == ["16 28 32 32", "8 40 32 32", "0 0 96 96"]
    shown_pictures = match.locator("image").evaluate_all("all => all.map(i => i.href.baseVal)")
    data = _Page(tmp_path / "index.html").data
    number = data["entry-0"]["findings"][1]["matchPicture"]
    assert shown_pictures[0].endswith(data["entry-0"]["picture"])
    assert shown_pictures[1] == shown_pictures[2]
    assert shown_pictures[1].endswith(data[f"match-{number}"]["picture"])

    page.locator("#findings button").nth(2).focus()
    assert "lost.png" in match.inner_text() and "was not kept" in match.inner_text()
    assert page.locator("#stage .box.chosen").get_attribute("data-finding") == "2"
    page.locator("#findings button").nth(0).hover()
    assert "train/8.png" in match.inner_text()


def test_hostile_text_is_shown_and_runs_nothing(opened, tmp_path):
    path = tmp_path / "index.html"
    with ReportWriter(tmp_path, HOSTILE[0], {HOSTILE[1]: HOSTILE[2]}, 5.0) as writer:
        for number, text in enumerate(HOSTILE):
            finding = _finding(level=text, match_name=text)
            changes = {"label": text, "findings": [finding], "notes": [text]}
            writer.add(_entry(text, score=100.0 - number, **changes))
            writer.add_failure(text, text)
    page = opened(path)
    assert _names(page) == [shown(text) for text in HOSTILE]
    assert page.inner_text("h1") == HOSTILE[0]
    page.locator("#cards").scroll_into_view_if_needed()
    page.locator(".card img").first.wait_for()
    page.locator(".card").first.click()
    for text in HOSTILE:
        assert page.locator("#viewer-name").text_content() == shown(text)
        assert shown(text) in page.locator("#about").text_content()
        assert page.locator("#notes li").text_content() == shown(text)
        assert shown(text) in page.locator("#match").text_content()
        page.keyboard.press("ArrowRight")
    assert page.evaluate("window.hacked") is None
    # Cards, opened image and its match are the only pictures; none came from a name.
    sources = page.locator("img").evaluate_all("all => all.map(i => i.src.slice(0, 11))")
    assert set(sources) == {"data:image/"}


def test_without_labels_verdicts_and_entries_nothing_is_offered(opened, tmp_path):
    bare = {
        "label": None,
        "mask": None,
        "anomalous": None,
        "p_value": None,
        "findings": [],
        "notes": [],
    }
    page = opened(_write(tmp_path, [_entry(**bare)], threshold=None))
    options = page.locator("option").evaluate_all("all => all.map(o => o.value)")
    assert options == ["highest", "lowest", "name", "all"]
    page.locator(".card").first.click()
    assert page.inner_text("#about").split() == ["Score", "7.5"]
    unlabelled = _entry(label=None)
    page = opened(_write(tmp_path / "unlabelled", [unlabelled]))
    options = page.locator("#verdicts option").evaluate_all("all => all.map(o => o.value)")
    assert options == ["all", "anomalous", "normal"]
    page = opened(_write(tmp_path / "empty", []))
    assert page.inner_text("#count") == "No image was scored."
    assert not page.locator(".tools").is_visible()


def test_thousands_of_images(opened, tmp_path):
    entry = _good(picture=_picture(side=32), heat=_heat(32))
    with ReportWriter(tmp_path, "Many", {}, 5.0) as writer:
        for number, score in enumerate(np.random.default_rng(0).random(3000).tolist()):
            writer.add(replace(entry, name=f"{number}.png", score=score))
    started = time.monotonic()
    page = opened(writer.path)
    page.set_viewport_size({"width": 1200, "height": 800})
    cards = page.locator(".card")
    assert cards.count() == 3000
    page.locator("#images").scroll_into_view_if_needed()
    page.locator(".card img").first.wait_for()
    page.select_option("#order", "name")
    cards.first.get_by_text("0.png", exact=True).wait_for()
    assert time.monotonic() - started < 30
    assert 0 < page.locator(".card img").count() < 300
    cards.nth(2999).scroll_into_view_if_needed()
    cards.nth(2999).locator("img").first.wait_for()
    cards.nth(0).locator("img").first.wait_for(state="detached")  # given up again, far away
    assert page.locator(".card img").count() < 300
