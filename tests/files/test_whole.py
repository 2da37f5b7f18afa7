"""Files appear whole or not at all."""

import errno
import os
import platform

import pytest

from patchsvdd_fast.files.whole import remove_leftovers, written_whole
from processes import run_script


def test_leftovers_go_with_the_process_that_left_them(tmp_path):
    path = tmp_path / "a[b].model"
    ended = run_script("-c", "import os; print(os.getpid())").stdout.strip()
    here = platform.node()
    kept = [
        f".{path.name}.{here}.{os.getppid()}.partial",  # it still runs
        f".{path.name}.{here}x.{ended}.partial",  # of another machine
        f".b.model.{here}.{ended}.partial",  # of another file
        f".{path.name}.{here}.note.partial",
    ]
    gone = [f".{path.name}.{here}.{ended}.partial", f".{path.name}.{here}.{10**30}.partial"]
    for name in (*kept, *gone):
        (tmp_path / name).write_text("half")
    remove_leftovers(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)


def test_a_leftover_of_the_same_number_is_begun_anew(tmp_path):
    path = tmp_path / "model"
    (tmp_path / f".model.{platform.node()}.{os.getpid()}.partial").write_text("of before")
    with written_whole(path) as partial:
        assert partial.read_bytes() == b""
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_only_when_whole(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("before")
    with (
        pytest.raises(OSError, match=r"cannot write .*scores.csv: No space left"),
        written_whole(path) as partial,
    ):
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with written_whole(path) as partial:
        partial.write_text("after")
    assert path.read_text() == "after"
