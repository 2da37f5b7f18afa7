"""The programs of docs/export.md: in each runtime they print what the library says of the image."""

import contextlib
import io
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, texture
from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.detector.onnx import export_detector
from processes import openvino

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

PAGE = (ROOT / "docs/export.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```(python|cpp|javascript)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(IN_ONNXRUNTIME, IN_OPENVINO), (IN_CPP,), (IN_JAVASCRIPT,) = (
    [text for kind, text in PROGRAMS if kind == language]
    for language in ("python", "cpp", "javascript")
)
SIDE = 96


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with detector.onnx, two images larger than the model's, and the detector itself."""
    folder = tmp_path_factory.mktemp("export")
    rng = np.random.default_rng(0)
    detector = PatchSVDD(mode="dense", initialization="kaiming", image_size=SIDE, device="cpu")
    detector.fit([texture(rng) for _ in range(9)], encoder=detector.untrained_encoder())
    export_detector(detector, folder / "detector.onnx")
    (folder / "images/new").mkdir(parents=True)
    for name in ("good", "spot"):
        image = texture(rng)
        if name == "spot":
            image[40:60, 60:90] = 250, 20, 20
        picture = Image.fromarray(image).resize((130, 110))
        picture.save(folder / f"images/new/{name}.png")
        picture.save(folder / f"images/new/{name}.ppm")
    return folder, detector


def printed_by(text, namespace):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(text, namespace)
    return output.getvalue()


def as_the_library_says(detector, path):
    """Image score, verdict, and column and row of the highest pixel."""
    result = detector.score(path)
    row, column = divmod(int(result.anomaly_map[0].argmax()), result.anomaly_map.shape[2])
    score = float(result.image_scores[0])
    return score, "anomalous" if score > detector.threshold_ else "normal", f"{column},{row}"


@pytest.mark.parametrize("in_openvino", [False, True])
def test_python(made, monkeypatch, in_openvino):
    """The second program goes on from the first."""
    if in_openvino:
        openvino()
    folder, detector = made
    monkeypatch.chdir(folder)
    score, verdict, place = as_the_library_says(detector, "images/new/spot.png")
    times = f"{score / detector.threshold_:.2f} times the threshold"
    namespace = {}
    assert printed_by(IN_ONNXRUNTIME, namespace) == f"{verdict}, {times}, most at {place}\n"
    assert verdict == "anomalous"
    if in_openvino:
        assert printed_by(IN_OPENVINO, namespace) == f"{times}\n"


def check_program(command, detector, folder, suffix):
    """A program prints the library's score, verdict and place for both images."""
    verdicts = set()
    for name in ("good", "spot"):
        path = folder / f"images/new/{name}.{suffix}"
        done = subprocess.run(
            [*command, str(folder / "detector.onnx"), str(path)],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr
        found = re.fullmatch(r"(\w+), score (\S+), most at (\S+)\n", done.stdout)
        score, verdict, place = as_the_library_says(detector, path)
        assert (found[1], found[3]) == (verdict, place)
        assert float(found[2]) == pytest.approx(score, rel=1e-4)
        verdicts.add(verdict)
    assert verdicts == {"normal", "anomalous"}


def test_cpp(made, tmp_path):
    """PyPI's onnxruntime brings the library, but not the headers."""
    headers = os.environ.get("ONNXRUNTIME_INCLUDE")
    if headers is None:
        pytest.skip("needs the folder of onnxruntime's headers, in ONNXRUNTIME_INCLUDE")
    libraries = Path(onnxruntime.__file__).parent / "capi"
    (library,) = libraries.glob("libonnxruntime.so.*")
    folder, detector = made
    (tmp_path / "score.cpp").write_text(IN_CPP)
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-isystem", headers, "score.cpp", "-o"]
    command += ["score", str(library), f"-Wl,-rpath,{tmp_path}"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""
    check_program([str(tmp_path / "score")], detector, folder, "ppm")


@pytest.mark.parametrize("runtime", ["onnxruntime-node", "onnxruntime-web"])
def test_javascript(made, tmp_path, runtime):
    """Of packages that are installed beside the sources (CONTRIBUTING.md)."""
    node = shutil.which("node")
    packages = ROOT / "node_modules"
    if node is None:
        pytest.skip("needs Node.js")
    if not all((packages / name).is_dir() for name in (runtime, "pngjs")):
        pytest.skip(f"needs `npm install --no-save {runtime} pngjs`")
    folder, detector = made
    assert IN_JAVASCRIPT.count("onnxruntime-node") == 1
    program = IN_JAVASCRIPT.replace("onnxruntime-node", runtime)
    (tmp_path / "score.mjs").write_text(program)
    (tmp_path / "node_modules").symlink_to(packages)
    check_program([node, str(tmp_path / "score.mjs")], detector, folder, "png")
