"""Command-line options of the tests, and fixtures: reference data, the CUDA-on-host module."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def _find_data() -> Path:
    """Where reference results and images lie, if anywhere: named, or beside the project."""
    if "PATCHSVDD_TEST_DATA" in os.environ:
        return Path(os.environ["PATCHSVDD_TEST_DATA"])
    beside = sorted(ROOT.parent.glob("*/reference/summary.json"))
    return beside[0].parent.parent if beside else ROOT / "no-data"


DATA = _find_data()


def pytest_configure():
    # A shell's background jobs ignore Ctrl-C, and so would the processes that tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long property and training tests")
    parser.addoption(
        "--write-outputs",
        action="store_true",
        help="of test_docs.py: train as long as by default, and write what is printed into docs/",
    )
    parser.addoption(
        "--gpu-device",
        default="cuda",
        help="device of tests/gpu; cpu tries the tests themselves where there is no card",
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="needs --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def reference_dir():
    """What the paper's implementation computes; not part of the project."""
    folder = DATA / "reference"
    if not folder.is_dir():
        pytest.skip("no reference data here")
    return folder


@pytest.fixture(scope="session")
def categories_dir():
    """Real and synthetic image categories; not part of the project."""
    folder = DATA / "data"
    if not folder.is_dir():
        pytest.skip("no image categories here")
    return folder


@pytest.fixture(scope="session")
def reference_summary(reference_dir):
    return json.loads((reference_dir / "summary.json").read_text())


def stack(path, count):
    """A file of so many different pages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pages = [Image.fromarray(np.full((40, 50), 60 * number, np.uint8)) for number in range(count)]
    pages[0].save(path, **({"save_all": True, "append_images": pages[1:]} if count > 1 else {}))
    return path


def texture(rng: np.random.Generator, side: int = 96) -> np.ndarray:
    """A small striped texture [side, side, 3] uint8 with noise."""
    y, x = np.mgrid[:side, :side]
    stripes = 128 + 60 * np.sin(x / 3 + rng.uniform(0, 6)) * np.cos(y / 5)
    noisy = stripes[..., None] * [1.0, 0.9, 0.8] + rng.normal(0, 5, (side, side, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def plain_image(path, side):
    """Write a grey image of side x side pixels."""
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(path)


def truncated_image(path):
    """Write an image file that ends too early."""
    pixels = np.random.default_rng(0).integers(256, size=(90, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:5000])


@pytest.fixture
def good_folder(tmp_path):
    """Four good 96x96 images in a folder."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "good"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(texture(rng)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def category_folder(tmp_path):
    """A tiny category in MVTec layout: 4 + 3 good and 3 defective images of 96x96, with masks."""
    rng = np.random.default_rng(1)
    root = tmp_path / "stripes"
    for part in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (root / part).mkdir(parents=True)
    for i in range(4):
        Image.fromarray(texture(rng)).save(root / f"train/good/{i}.png")
    for i in range(3):
        Image.fromarray(texture(rng)).save(root / f"test/good/{i}.png")
        image, mask = texture(rng), np.zeros((96, 96), np.uint8)
        image[30:60, 20:50], mask[30:60, 20:50] = (250, 20, 20), 255
        Image.fromarray(image).save(root / f"test/spot/{i}.png")
        Image.fromarray(mask).save(root / f"ground_truth/spot/{i}_mask.png")
    return root


def script_environment(*folders, **variables):
    """For a process that runs a file of these tests; folders: to import from as well."""
    path = [ROOT, ROOT / "tests", *folders, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))} | variables


def build_native(folder, target, *options):
    """Build a target of CMakeLists.txt without CUDA; returns the build folder."""
    import pybind11

    build = ROOT / "build" / folder
    build.mkdir(parents=True, exist_ok=True)
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DPATCHSVDD_CUDA=OFF"),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *options,
    ]
    with (build / ".lock").open("w") as lock:  # of several processes of tests one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(build), "--target", target]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return build


@pytest.fixture(scope="session")
def cuda_on_host():
    """The CUDA kernels compiled for the host, as a module like patchsvdd_fast.ops._native."""
    build = build_native("cuda_on_host", "_cuda_on_host", "-DPATCHSVDD_CUDA_ON_HOST=ON")
    (path,) = build.glob("_cuda_on_host*.so")
    spec = importlib.util.spec_from_file_location("_cuda_on_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
