"""`train`, `score` and `evaluate` in several processes that hold a bank's shards."""

import json
import signal
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import texture
from processes import COMMAND, one_line_error
from torchrun import ended, files_of, started, together

SUFFIX = ".safetensors.index.json"

# A process that is killed in a phase, its first argument.
ENDS = """
import os, signal, sys
from patchsvdd_fast.cli import app, outputs
from patchsvdd_fast.detector import filling
from patchsvdd_fast.files import store
from patchsvdd_fast.search.sharded import ShardedBank

PHASES = {
    "filling": (filling, "encode"),
    "calibrating": (ShardedBank, "_found"),
    "saving": (store, "_write"),
    "scoring": (ShardedBank, "_found"),
}
owner, name = PHASES[sys.argv.pop(1)]

def end(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, name, end)
app.main()
"""


def train(folder, encoder, path, *options):
    options = ("--resize", 96, "--device", "cpu", *options)
    return ["train", folder, "--encoder", encoder, "-o", path, *options]


@pytest.fixture(scope="module")
def shards(ready_model, tmp_path_factory):
    """A folder of images, and models of it that one process and three have made, in shards."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(5)
    (folder / "good").mkdir()
    for number in range(7):
        Image.fromarray(texture(rng)).save(folder / "good" / f"{number}.png")
    small = ("--shard-bank", "--shard-size", "30KB")
    for count in (1, 3):
        path = folder / f"of{count}{SUFFIX}"
        first, *others = together(count, *train(folder / "good", ready_model, path, *small))
        assert first.returncode == 0, first.stderr
        assert f"wrote {path}: " in first.stdout
        assert all((one.returncode, one.stdout, one.stderr) == (0, "", "") for one in others)
    return folder


def test_each_process_writes_shards_and_opens_some(shards, images, ready_model, tmp_path):
    one, three = (json.loads((shards / f"of{count}{SUFFIX}").read_text()) for count in (1, 3))
    assert one["metadata"]["total_size"] > 0
    assert len({*three["weight_map"].values()}) >= 1 + 3
    whole = tmp_path / "whole.safetensors"
    (done,) = together(1, *train(shards / "good", ready_model, whole))
    assert done.returncode == 0, done.stderr

    def scored(count, model):
        folder = tmp_path / f"{model.name}-{count}"
        first, *_ = together(count, "score", model, images, "-o", folder, "--maps", "npy")
        assert first.returncode == 3, first.stderr  # one image cannot be read
        return files_of(folder)

    expected = scored(1, whole)
    assert len(expected) == 1 + 2 * 19
    for count in (1, 2):
        assert scored(count, shards / f"of3{SUFFIX}") == expected


@pytest.mark.parametrize("judge", ["--model", "--encoder"])
def test_an_evaluation_is_that_of_one_process(
    judge, shards, ready_model, category_folder, tmp_path
):
    path = shards / f"of3{SUFFIX}" if judge == "--model" else ready_model
    for count in (1, 2):
        options = (judge, path, "--json", tmp_path / f"{count}.json")
        first, *others = together(count, "evaluate", category_folder, *options)
        assert first.returncode == 0, first.stderr
        assert all((one.returncode, one.stderr) == (0, "") for one in others)
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def with_one_that_ends(phase, command, tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    ending = [sys.executable, tmp_path / "ends.py", phase, *command]
    return ended(started([[*COMMAND, *command], ending]))


@pytest.mark.parametrize("phase", ["filling", "calibrating", "saving"])
def test_a_killed_process_leaves_the_old_model(phase, shards, ready_model, tmp_path):
    path = tmp_path / f"m{SUFFIX}"
    for old in shards.glob("of1*"):
        (tmp_path / old.name.replace("of1", "m")).write_bytes(old.read_bytes())
    path.write_text(path.read_text().replace("of1-", "m-"))
    before = files_of(tmp_path)
    options = ("--shard-bank", "--overwrite")
    command = train(shards / "good", ready_model, path, *options)
    first, second = with_one_that_ends(phase, command, tmp_path)
    assert (first.returncode, second.returncode) == (1, -signal.SIGKILL)
    assert "another process has ended" in one_line_error(first)
    (tmp_path / "ends.py").unlink()
    after = files_of(tmp_path)
    assert {name: after[name] for name in before} == before
    if phase == "saving":  # what it has left goes with the next save
        first, _ = together(2, *command)
        assert first.returncode == 0, first.stderr
        named = {*json.loads(path.read_text())["weight_map"].values()}
        assert {*files_of(tmp_path)} == {path.name, *named}


def test_scoring_goes_on_where_it_ended(shards, images, tmp_path):
    command = ["score", shards / f"of3{SUFFIX}", images, "-o", tmp_path / "out"]
    first, second = with_one_that_ends("scoring", command, tmp_path)
    assert (first.returncode, second.returncode) == (1, -signal.SIGKILL)
    assert "another process has ended" in one_line_error(first)
    first, _ = together(2, *command, "--resume")
    assert first.returncode == 3
    assert len((tmp_path / "out" / "scores.csv").read_text().splitlines()) == 1 + 20


def test_what_cannot_be_in_shards_is_refused(here, shards, category_folder, ready_model, tmp_path):
    wrong = train(shards / "good", ready_model, tmp_path / "m.safetensors", "--shard-bank")
    message = one_line_error(here(*wrong))
    assert "with --shard-bank the model is called NAME.safetensors.index.json" in message
    several = ["train", category_folder.parent, "--encoder", ready_model, "--shard-bank"]
    assert "train one at a time with --shard-bank" in one_line_error(here(*several))
    assert "cannot be in shards" in one_line_error(here(*several, "--together"))
    size = train(shards / "good", ready_model, tmp_path / f"m{SUFFIX}", "--shard-size", "12")
    assert "takes a size such as" in here(*size, "--shard-bank").stderr
    (parts,) = shards.glob("of1-*-00002-of-*.safetensors")
    assert "is a part of a model: open its index" in one_line_error(
        here("score", parts, shards / "good")
    )
    added = here("update", shards / f"of1{SUFFIX}", "--add", category_folder / "train/good")
    assert "its banks lie in shards" in one_line_error(added)
    told = here("info", shards / f"of3{SUFFIX}").stdout
    assert "7 images in" in told and "shards" in told
