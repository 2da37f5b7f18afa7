"""The documentation: its examples run and print what the pages show, and the site builds."""

from __future__ import annotations

import contextlib
import html
import importlib
import io
import re
import shutil
import socket
import warnings
from dataclasses import fields

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from backbones import Plain
from conftest import ROOT, texture
from consoles import Shell, looks_like, run_console
from patchsvdd_fast import NormalBank, PatchSVDD
from patchsvdd_fast.cli import app as cli
from patchsvdd_fast.cli import terminal
from patchsvdd_fast.encoders.backbone import BackboneEncoder
from patchsvdd_fast.files import store
from patchsvdd_fast.images import drift
from patchsvdd_fast.report import table
from patchsvdd_fast.score.image_result import ImageResult
from patchsvdd_fast.score.regions import Region
from patchsvdd_fast.training import settings
from processes import openvino

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(python|console|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SIDE = 128
DENSE = settings._RECIPES["modes"]["dense"]  # how training is by default

# Programs for Ray are run by test_ray_data.py, where there is Ray.
# export.md is run without OpenVINO, too, by test_export.py, which compares what it computes;
# onnx.md is run by detector/test_onnx.py, which also compares what it computes; serving.md by
# test_serving.py, with a client.
PAGES = [
    page.relative_to(DOCS).as_posix()
    for page in sorted(DOCS.rglob("*.md"))
    if page.name not in ("onnx.md", "serving.md") and BLOCK.search(page.read_text(encoding="utf-8"))
]


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def write_outputs(pytestconfig):
    """Whether the pages are to show what the examples print now, after real trainings."""
    return pytestconfig.getoption("--write-outputs")


@pytest.fixture(scope="module")
def example_files(tmp_path_factory, write_outputs):
    """What the examples find in the folder they run in: images, two categories and a model."""
    root = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(0)
    spot = np.s_[40:60, 60:90]

    def good():
        return texture(rng, SIDE)

    def spotted():
        image = good()
        image[spot] = 85, 77, 68
        return image

    for i in range(9):
        write(root / f"images/good/{i:03}.png", good())
    write(root / "images/new/ok.png", good())
    write(root / "images/new/dark.png", (0.7 * good()).astype(np.uint8))
    write(root / "images/new/spot.png", spotted())
    for i in range(3):
        write(root / f"images/more/{i:03}.png", good())
        write(root / f"images/line2/{i:03}.png", good())
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[spot] = 255
    for category in ("leather", "tile"):
        for i in range(4):
            write(root / f"mvtec/{category}/train/good/{i:03}.png", good())
        for i in range(2):
            write(root / f"mvtec/{category}/test/good/{i:03}.png", good())
            write(root / f"mvtec/{category}/test/spot/{i:03}.png", spotted())
            write(root / f"mvtec/{category}/ground_truth/spot/{i:03}_mask.png", mask)
    detector = PatchSVDD(mode="dense", image_size=SIDE, device="cpu")
    encoder = None if write_outputs else detector.untrained_encoder()
    detector.fit(root / "images/good", encoder=encoder)
    detector.save(root / "model.safetensors")
    return root


@pytest.fixture
def example_folder(example_files, tmp_path, monkeypatch):
    """The working directory of one page's examples, on a CPU, with trainings of two steps."""
    folder = shutil.copytree(example_files, tmp_path / "work")
    monkeypatch.chdir(folder)
    two_steps = DENSE | {"steps": 2, "batch_size": 1}
    monkeypatch.setitem(settings._RECIPES["modes"], "dense", two_steps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(terminal.console, "width", 80)
    return folder


def write_blocks(page, texts):
    """Put these texts in the place of those of a page's blocks."""
    renewed = iter(texts)
    text = BLOCK.sub(lambda found: f"```{found[1]}\n{next(renewed)}```", read(DOCS / page))
    write_text(DOCS / page, text)


def blocks(page):
    """Kind, first line and text of each block of a page."""
    text = read(DOCS / page)
    return [
        (found[1], text.count("\n", 0, found.start(2)), found[2]) for found in BLOCK.finditer(text)
    ]


def test_texts_of_blocks_are_written(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "DOCS", tmp_path)
    page = "Words 1\n\n```{}\n$ echo 1\n{}\n```\n\n```sh\nls 1\n```\n\n```text\n1\n```\nend 1\n"
    write_text(tmp_path / "page.md", page.format("console", "1"))
    first, second = (text for _, _, text in blocks("page.md"))
    write_blocks("page.md", [first.replace("\n1", "\n2"), second])
    assert read(tmp_path / "page.md") == page.format("console", "2")


@pytest.mark.parametrize("page", PAGES)
def test_examples(page, example_folder, write_outputs, monkeypatch):
    if page == "export.md":
        openvino()
    shell, namespace, printed, renewed = Shell(), {}, "", []
    if "train images/good -o model.safetensors" in read(DOCS / page):
        (example_folder / "model.safetensors").unlink()  # which would not be replaced
    for kind, line, text in blocks(page):
        renewed.append(text)
        if "\nimport ray\n" in text:  # run by test_ray_data.py
            continue
        if "patchsvdd demo" in text:  # takes minutes
            continue
        if kind == "console":
            with monkeypatch.context() as patch:
                if write_outputs:
                    patch.setitem(settings._RECIPES["modes"], "dense", DENSE)
                renewed[-1] = run_console(shell, text)
        elif kind == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile("\n" * line + text, page, "exec"), namespace)
            printed = output.getvalue()
        else:
            assert looks_like(text, printed), f"{page}:{line}:\n{printed}\nis not\n{text}"
    assert shell.status == 0
    if write_outputs:
        write_blocks(page, renewed)


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch, write_outputs):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal.console, "width", 80)
    texts = [text for _, _, text in blocks("command-line.md")]
    (place,) = (place for place, text in enumerate(texts) if "patchsvdd demo" in text)
    texts[place] = run_console(Shell(), texts[place])
    if write_outputs:
        write_blocks("command-line.md", texts)


def test_file_format_has_every_tensor(example_folder):
    """The tables of tensors are those of a model that has a clustered bank and a coreset."""
    detector = PatchSVDD.load("model.safetensors", device="cpu")
    (first, whole), *_, (level, bank) = detector.banks_.items()
    detector.banks_[first] = whole.coreset(0.5)
    rows = bank.embeddings.view(-1, *bank.grid, bank.dim)
    detector.banks_[level] = NormalBank(rows, groups=bank.groups, clusters=20)
    detector.save("clustered.safetensors")
    tensors, header = store.load("clustered.safetensors")
    page = read(DOCS / "file-format.md")
    table = {
        name: (dtype, shape.split(", "))
        for name, dtype, shape in re.findall(
            r"^\| `([\w.]+)` \| (\w+) \| \[(.*?)\] \|", page, re.MULTILINE
        )
    }
    found = set()
    pretrained = pretrained_tensors()
    unclustered = NormalBank(torch.rand(1100, 8), clusters=0).state_dict()
    coded = {f"bank.K32.{n}": t for n, t in unclustered.items() if n.startswith("leading")}
    for name, tensor in {**tensors, **pretrained, **coded}.items():
        level = next(iter(re.findall(r"K\d+", name)), "K32")
        general = re.sub(r"(small|heads)\.\d+", r"\1.NUMBER", name.replace(level, "LEVEL"))
        found.add(general)
        dtype, shape = table[general]
        assert tensor.dtype == getattr(torch, dtype), name
        sizes = {"C": 24, "D": 8, "A": 0}
        if name not in pretrained and name not in coded:
            sizes = sizes_of(tensors, level)
        for size, term in zip(tensor.shape, shape, strict=True):
            assert term in ("bytes", "in", "out") or eval(term, sizes) == size, name
    assert found == table.keys()
    assert f"schema {store.SCHEMA_VERSION}" in page
    assert [field for field in header if f"`{field}`" not in page] == []


def pretrained_tensors():
    """What only the file of a pretrained encoder holds."""
    rng = np.random.default_rng(0)
    encoder = BackboneEncoder(Plain(), projection="axes", dim=8)
    detector = PatchSVDD(encoder=encoder, image_size=96).fit([texture(rng, 96), texture(rng, 96)])
    detector.save("pretrained.safetensors")
    tensors, header = store.load("pretrained.safetensors")
    assert header["encoder"]["projection"] == "axes"
    assert any(name.startswith("encoder.backbone.") for name in tensors)
    return {name: tensors[name] for name in ("encoder.axes", "calibration.border.K24")}


def sizes_of(tensors, level):
    """What the letters in the shapes of the page stand for, in the bank of a level."""
    bank = store.below(tensors, f"bank.{level}.")
    sizes = {"N": len(bank["groups"]), "H": SIDE, "W": SIDE}
    sizes["M"], sizes["D"] = bank["data"].shape
    if "centroids" in bank:
        sizes["C"], sizes["A"] = bank["centroids"].shape
        sizes["B"] = len(bank["block_radius"])
    return sizes


def test_pages_name_every_field():
    """Tables of fields and columns cannot go stale."""
    for page, names in {
        "streaming.md": [*table.COLUMNS, *(field.name for field in fields(ImageResult))],
        "explaining.md": [field.name for field in fields(Region)],
        "calibration.md": drift.STATISTICS,
    }.items():
        text = read(DOCS / page)
        assert [name for name in names if f"`{name}`" not in text] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as HTML, built as `make docs` does, with the network out of reach."""
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    from sphinx.cmd.build import build_main

    def refuse(*_):
        raise OSError("the documentation must build without a network")

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(socket.socket, "connect", refuse)
        warnings.simplefilter("ignore")  # what myst_parser calls will go in a later Sphinx
        assert build_main(["-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(folder)]) == 0
    return folder


def test_site_has_every_page(site):
    for page in DOCS.rglob("*.md"):
        address = page.relative_to(DOCS).with_suffix(".html").as_posix()
        assert address == "index.html" or f'href="{address}"' in read(site / "index.html")
    assert 'id="patchsvdd_fast.PatchSVDD.score_stream"' in read(site / "reference/detector.html")


@pytest.fixture
def public_names(monkeypatch):
    """The module with the check that the reference has every public name."""
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("public_names")


def test_every_name_is_public_or_internal(public_names):
    arguments = public_names.PACKAGE, public_names.PUBLIC, public_names.INTERNAL
    names, problems = public_names.public_names(*arguments)
    assert problems == []
    assert public_names.problems_of(names) == []  # a reference with all of them
    for gone in ("score.maps.combine", "detector.patch_svdd.PatchSVDD.threshold_"):
        (problem,) = public_names.problems_of(names.keys() - {f"patchsvdd_fast.{gone}"})
        assert problem == f"patchsvdd_fast.{gone} is public, but not in the reference"


def test_what_the_reference_lacks_is_noticed(public_names, tmp_path, monkeypatch):
    files = {
        "__init__.py": '__all__ = ["exported"]\nfrom .inside import exported\n',
        "inside.py": 'def exported():\n    """Text."""\ndef other(): ...\n',
        "new.py": "",
        "outside.py": """
LIMIT = 3
BARE = 4
"Text."
class Thing:
    "Text."
    side: int
    def told(self):
        "Text."
    def silent(self): ...
    def _own(self): ...
def helper(): ...
def shown():
    "Text."
def _own(): ...
""",
    }
    for name, text in files.items():
        write_text(tmp_path / "undocumented" / name, text)
    monkeypatch.syspath_prepend(tmp_path)
    problems = public_names.problems_of(
        [
            "undocumented.outside.Thing",
            "undocumented.outside.Thing.silent",
            "undocumented.inside.other",
        ],
        "undocumented",
        ("outside", "gone"),
        {"inside": "", "inside.other": "", "outside.helper": "", "outside.missing": ""},
    )
    assert sorted(problems) == [
        f"undocumented.{problem}"
        for problem in (
            "gone is listed, but does not exist",
            "inside.exported is public, but not in the reference",
            "inside.other is internal, but in the reference",
            "new is neither in PUBLIC nor in INTERNAL",
            "outside.BARE is public, but not in the reference",
            "outside.LIMIT is public, but has no docstring",
            "outside.LIMIT is public, but not in the reference",
            "outside.Thing.side is public, but has no docstring",
            "outside.Thing.side is public, but not in the reference",
            "outside.Thing.silent is public, but has no docstring",
            "outside.Thing.told is public, but not in the reference",
            "outside.missing is listed, but does not exist",
            "outside.shown is public, but not in the reference",
        )
    ]


def test_site_with_a_name_missing_fails(public_names, tmp_path, capsys):
    from sphinx.cmd.build import build_main

    write_text(tmp_path / "conf.py", 'extensions = ["public_names"]\n')
    names = public_names.PACKAGE, public_names.PUBLIC, public_names.INTERNAL
    *documented, missing = sorted(public_names.public_names(*names)[0])
    entries = "".join(f".. py:data:: {name}\n" for name in documented)
    write_text(tmp_path / "index.rst", f"Names\n=====\n\n{entries}")
    options = ["-W", "--keep-going", "-q", "-b", "html", str(tmp_path), str(tmp_path / "site")]
    assert build_main(options) == 1
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"{missing} is public, but not in the reference" in warning
    with (tmp_path / "index.rst").open("a") as file:
        file.write(f".. py:data:: {missing}\n")
    assert build_main(options) == 0


def test_command_line_lists_every_option(site):
    text = html.unescape(re.sub("<[^>]+>", "", read(site / "command-line.html")))
    commands = typer.main.get_command(cli.app)
    for command in (commands, *commands.commands.values()):
        assert command is commands or f"$ patchsvdd {command.name}" in text
        for option in command.params:
            assert option.help.replace("`", "") in text
            if option.param_type_name == "option":
                for name in [*option.opts, *option.secondary_opts]:
                    assert re.search(rf"(?<![\w-]){name}(?![\w-])", text), name


def read(path):
    return path.read_text(encoding="utf-8")
