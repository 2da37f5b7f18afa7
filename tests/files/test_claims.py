"""Nothing that a run or a user has written is lost; two runs do not write to one place."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import script_environment
from patchsvdd_fast.files.claims import MANIFEST, BusyError, RunFolder, claimed_file

OWN = ("scores.csv", "heat-maps")


def written(folder, **files):
    """A run that writes these: the content of each by its path, made from itself."""
    with RunFolder(folder, OWN) as run:
        for name, content in files.items():
            run.place(Path("heat-maps", name + ".png"), f"/in/{name}").write_text(content)
        run.note(Path("scores.csv")).write_text("table")


def files_of(folder):
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


def test_outputs_of_an_earlier_run_are_replaced_only_when_asked(tmp_path):
    folder = tmp_path / "out"
    written(folder, a="a", b="b")
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"holds the outputs of an earlier run \(scores.csv\)"):
        written(folder, c="c")
    assert (
        files_of(folder)
        == before
        == {
            "heat-maps/a.png": "a",
            "heat-maps/b.png": "b",
            "scores.csv": "table",
        }
    )
    (folder / "notes.txt").write_text("mine")
    (folder / "heat-maps/c.png").write_text("mine")
    os.utime(folder / "heat-maps/c.png", (1, 1))
    with RunFolder(folder, OWN, overwrite=True) as run:
        assert files_of(folder) == {"notes.txt": "mine", "heat-maps/c.png": "mine"}
        run.place(Path("heat-maps/c.png"), "/in/c").write_text("new")
    *_, other = sorted(files_of(folder))
    assert files_of(folder)["heat-maps/c.png"] == "mine"  # the new one has another name
    assert sorted(files_of(folder).values()) == ["mine", "mine", "new"], other


def test_what_is_not_known_to_be_of_a_run_is_not_removed(tmp_path):
    (tmp_path / "heat-maps").mkdir()
    written(tmp_path)  # an empty folder is in nobody's way
    (tmp_path / MANIFEST).unlink()
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"scores.csv"):
            RunFolder(tmp_path, OWN, **options).check()
    with RunFolder(tmp_path, OWN, resume=True):
        assert files_of(tmp_path) == {"scores.csv": "table"}


def test_a_manifest_leads_out_of_no_folder(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/a.png").write_text("mine")
    (tmp_path / "b.png").write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "precious")
    names = ("../b.png", str(tmp_path / "b.png"), "linked/a.png", "", ".")
    lines = [f'{{"file": "{name}", "made_from": ""}}' for name in names]
    (folder / MANIFEST).write_text("\n".join([*lines, "not json", "[1]", '{"file": 3}', "half"]))
    with RunFolder(folder, overwrite=True):
        pass
    assert files_of(tmp_path / "precious") == {"a.png": "mine"}
    assert (tmp_path / "b.png").exists()


def test_one_name_of_two_images(tmp_path):
    """Gone on with from another folder, a heat map does not take the place of another's."""
    written(tmp_path, a="first")
    with (tmp_path / MANIFEST).open("a") as file:
        file.write('{"file": "half a li')  # killed
    for content in ("second", "again"):  # the same image again: in its own place
        with RunFolder(tmp_path, OWN, resume=True) as run:
            assert run.made_from("heat-maps/a.png") == "/in/a"
            run.place(Path("heat-maps/a.png"), "/elsewhere/a").write_text(content)
    found = files_of(tmp_path)
    assert found.pop("heat-maps/a.png") == "first"
    assert sorted(found.values()) == ["again", "table"]


def test_of_two_processes_the_second_is_refused(tmp_path):
    folder, file = tmp_path / "out", tmp_path / "model"
    code = (
        "import sys, time; from pathlib import Path\n"
        "from patchsvdd_fast.files.claims import RunFolder, claimed_file\n"
        "with RunFolder(Path(sys.argv[1])), claimed_file(Path(sys.argv[2])):\n"
        "    print('writing', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder, file],
        stdout=subprocess.PIPE,
        text=True,
        env=script_environment(),
    )
    assert process.stdout.readline() == "writing\n"
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(BusyError, match=rf"process \({process.pid}\) is writing .*out"):
            RunFolder(folder, **options).__enter__()
    with pytest.raises(BusyError, match=r"is writing .*model"), claimed_file(file):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with RunFolder(folder, resume=True), claimed_file(file):  # a crash leaves no lock
        file.write_text("model")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"model", MANIFEST}


def test_a_file_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "model"
    with claimed_file(path):
        path.write_text("old")
    with pytest.raises(ValueError, match="model exists already: --overwrite"), claimed_file(path):
        path.write_text("new")
    assert path.read_text() == "old"
    with claimed_file(path, overwrite=True):
        path.write_text("new")
    assert os.listdir(tmp_path) == ["model"]  # noqa: PTH208
    with pytest.raises(OSError, match=r"cannot write .*model"), claimed_file(tmp_path / "no/model"):
        pass
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(path).check()
