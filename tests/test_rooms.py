"""The rule of the rooms (ARCHITECTURE.md): which room imports which, and what an import loads."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, script_environment

BIN = Path(sys.executable).parent
LINTER = [str(BIN / "lint-imports"), "--no-cache"]
RUFF = [str(BIN / "ruff"), "check", "--no-cache", "--select", "TID251", "."]
needs_linters = pytest.mark.skipif(
    not (BIN / "lint-imports").exists() or not (BIN / "ruff").exists(), reason="needs the linters"
)


def imported_by(statement):
    """The modules that a fresh interpreter has after a statement."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{statement}\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        env=script_environment(),
    )
    return set(done.stdout.split())


def test_the_search_comes_alone():
    modules = imported_by("import patchsvdd_fast.score")
    assert "patchsvdd_fast.search.bank" in modules
    for unwanted in ("patchsvdd_fast.detector", "sklearn", "scipy", "PIL"):
        assert unwanted not in modules
    ours = {name.split(".")[1] for name in modules if name.startswith("patchsvdd_fast.")}
    assert ours == {"score", "search", "encoders", "images", "files", "ops"}


def test_a_name_of_the_package_is_imported_when_it_is_used():
    assert "torch" not in imported_by("import patchsvdd_fast; patchsvdd_fast.__version__")
    assert "patchsvdd_fast.ops" in imported_by("import patchsvdd_fast; patchsvdd_fast.ops.nearest")
    modules = imported_by("from patchsvdd_fast import nearest, PatchLevel, __version__")
    assert "patchsvdd_fast.detector" not in modules
    assert "patchsvdd_fast.detector.patch_svdd" in imported_by(
        "from patchsvdd_fast import PatchSVDD"
    )


def test_every_name_of_the_package_is_there():
    import patchsvdd_fast

    for name in patchsvdd_fast.__all__:
        assert getattr(patchsvdd_fast, name) is not None
        assert name in dir(patchsvdd_fast)
    with pytest.raises(AttributeError, match="no attribute 'nearness'"):
        _ = patchsvdd_fast.nearness


@pytest.fixture
def copied_package(tmp_path):
    """The sources in a folder of their own, to break the rule in."""
    shutil.copytree(
        ROOT / "patchsvdd_fast", tmp_path / "patchsvdd_fast", ignore=shutil.ignore_patterns("*.so")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(command, folder):
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )


@needs_linters
def test_the_rule_is_kept(copied_package):
    for command in (LINTER, RUFF):
        done = run(command, copied_package)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_linters
@pytest.mark.parametrize(
    ("file", "line", "command", "complaint"),
    [
        ("files/whole.py", "from ..score import maps", LINTER, "patchsvdd_fast.score.maps"),
        ("score/maps.py", "from ..report import text", LINTER, "patchsvdd_fast.report.text"),
        ("search/bank.py", "from ..images import light", LINTER, "patchsvdd_fast.images.light"),
        ("attic/__init__.py", "", LINTER, "patchsvdd_fast.attic"),  # a room without a place
        ("search/bank.py", "from ..ops import _native", RUFF, "Only the room ops"),
        ("search/bank.py", "import patchsvdd_fast.ops._native", RUFF, "Only the room ops"),
    ],
)
def test_a_breach_of_the_rule_is_noticed(copied_package, file, line, command, complaint):
    path = copied_package / "patchsvdd_fast" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    done = run(command, copied_package)
    assert done.returncode != 0
    assert complaint in re.sub(r"\s+", " ", done.stdout + done.stderr)


def test_no_room_or_file_is_too_large():
    """What a newcomer can hold: ten rooms, about nine files in each, 400 lines in a file."""
    package = ROOT / "patchsvdd_fast"
    rooms = [path for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(rooms) == 10
    for room in rooms:
        files = [path for path in room.glob("*.py") if path.name != "__init__.py"]
        most = {"cli": 12, "detector": 19, "files": 11, "ops": 11, "report": 15, "search": 14}
        assert len(files) <= most.get(room.name, 10)
        for path in files:
            assert len(path.read_text().splitlines()) <= 400, path
