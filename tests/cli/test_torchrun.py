"""`score` and `evaluate` in several processes: one result, and what happens if one fails."""

import shutil
import signal
import sys

import pytest

from patchsvdd_fast.cli.score import require_divisible
from patchsvdd_fast.training.workers import Workers
from processes import COMMAND, one_line_error
from torchrun import ended, files_of, started, together

# A process that ends in the midst of its work, in the way of its first argument.
ENDS = """
import os, signal, sys
from patchsvdd_fast.cli import app, outputs

way, written = sys.argv.pop(1), []

def write(path, result):
    written.append(path)
    if len(written) == 3:
        if way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("no more pictures")
    draw(path, result)

draw, outputs.write_heat_map = outputs.write_heat_map, write
app.main()
"""


def test_images_are_divided_and_the_outputs_are_those_of_one_process(images, ready_model, tmp_path):
    def run(count):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        options = ("-o", folder / "out", "--report", folder / "report", "--masks", "--maps", "npy")
        options += ("--coco", folder / "regions.json", "--format", "jsonl")
        folder.mkdir()
        first, *others = together(count, "score", ready_model, images, *options)
        assert "07.png" in one_line_error(first)
        assert "scored 19 images in" in first.stdout
        assert [(one.returncode, one.stdout, one.stderr) for one in others] == [(3, "", "")] * (
            count - 1
        )
        return files_of(folder)

    alone = run(1)
    assert len(alone) == 3 * 19 + 3
    assert run(3) == alone


def with_one_that_ends(way, command, tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    commands = [[*COMMAND, *command], [sys.executable, tmp_path / "ends.py", way, *command]]
    return ended(started(commands))


def test_a_run_that_was_killed_can_be_gone_on_with(images, ready_model, tmp_path):
    command = ["score", ready_model, images, "-o", tmp_path / "out"]
    first, second = with_one_that_ends("killed", command, tmp_path)
    assert (first.returncode, second.returncode) == (1, -signal.SIGKILL)
    assert "another process has ended" in one_line_error(first)
    (resumed,) = together(1, *command, "--resume")
    assert "scored 19 images" in resumed.stdout
    other = tmp_path / "other"
    (done,) = together(1, "score", ready_model, images, "-o", other)
    assert done.returncode == 3
    assert files_of(tmp_path / "out") == files_of(other)
    assert len((other / "scores.csv").read_text().splitlines()) == 1 + 20


def test_an_error_is_told_once(images, ready_model, tmp_path):
    command = ["score", ready_model, images, "-o", tmp_path / "out"]
    first, second = with_one_that_ends("raises", command, tmp_path)
    assert (first.returncode, first.stderr) == (1, "")
    assert one_line_error(second) == "error: no more pictures"


def test_processes_that_differ_are_named(images, ready_model, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        shutil.copy(ready_model, folder / "m.safetensors")
    with (folders[1] / "m.safetensors").open("ab") as file:
        file.write(b"\0")
    command = [*COMMAND, "score", "m.safetensors", images]
    first, second = ended(started([command] * 2, folders))
    message = one_line_error(first)
    assert "process 1 differs from process 0 in the file m.safetensors: " in message
    assert (second.returncode, second.stderr) == (1, "")
    assert not (folders[0] / "scores").exists()
    (folders[1] / "m.safetensors").unlink()
    first, second = ended(started([command] * 2, folders))
    assert "process 0 in the file m.safetensors: missing, not " in one_line_error(first)
    assert (second.returncode, second.stderr) == (1, "")


def test_what_cannot_be_divided_is_refused(here, ready_model, tmp_path, monkeypatch):
    workers = Workers()
    workers.count = 2
    with pytest.raises(ValueError, match="standard input lists cannot be divided over 2 processes"):
        require_divisible(workers, ["-"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "`watch` is one process" in one_line_error(here("watch", ready_model, tmp_path))


def test_an_evaluation_is_divided(category_folder, ready_model, tmp_path):
    def run(count):
        options = ("--json", tmp_path / f"{count}.json", "--report", tmp_path / f"report{count}")
        first, *others = together(
            count, "evaluate", category_folder, "--model", ready_model, *options
        )
        assert first.returncode == 0, first.stderr
        assert all((one.returncode, one.stdout, one.stderr) == (0, "", "") for one in others)
        return (tmp_path / f"{count}.json").read_bytes(), files_of(tmp_path / f"report{count}")

    assert run(2) == run(1)


def test_images_of_an_update_are_divided(category_folder, good_folder, ready_model, tmp_path):
    changes = ("--replace", category_folder / "train/good", "--remove", "0.png")
    changes += ("--add", good_folder)
    for count in (1, 2):
        output = tmp_path / f"{count}.safetensors"
        first, *others = together(count, "update", ready_model, *changes, "-o", output)
        assert first.returncode == 0, first.stderr
        assert "4 training images before, 7 now" in first.stdout
        assert all((one.returncode, one.stdout, one.stderr) == (0, "", "") for one in others)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    first, second = together(2, "update", ready_model, "--remove", "9.png", "--add", good_folder)
    assert "no training image is named '9.png'" in one_line_error(first)
    assert (second.returncode, second.stderr) == (1, "")
