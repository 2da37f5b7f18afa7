"""A model to score with, and the command run in this process."""

import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from conftest import texture
from patchsvdd_fast import PatchLevel, PatchSVDD
from patchsvdd_fast.cli import app as cli


@pytest.fixture(scope="session")
def ready_model(tmp_path_factory):
    """A model file of an untrained encoder, which tells red squares from stripes as well."""
    rng = np.random.default_rng(0)
    detector = PatchSVDD(
        image_size=96,
        levels=(PatchLevel(64, 16), PatchLevel(32, 8)),
        embedding_dim=16,
        initialization="kaiming",
        device="cpu",
    )
    detector.fit([texture(rng) for _ in range(4)], encoder=detector.untrained_encoder())
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    detector.save(path)
    return path


@pytest.fixture
def here(monkeypatch, capsys):
    """As `run`, in this process: what the command's entry point does, without importing it anew."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back afterwards
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("COLUMNS", "200")

    def run_here(*arguments, listed=b""):
        monkeypatch.setattr(sys, "argv", ["patchsvdd", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed), encoding="ascii"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            cli.main()
        return subprocess.CompletedProcess(arguments, ended.value.code, *capsys.readouterr())

    return run_here


@pytest.fixture
def images(tmp_path):
    """A folder of twenty images, every other with a defect, one of which cannot be read."""
    rng, folder = np.random.default_rng(2), tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        pixels = texture(rng)
        pixels[30:60, 20:50] = pixels[30:60, 20:50] if number % 2 else (250, 20, 20)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (folder / "07.png").write_text("no image")
    return folder
