"""Logs of training: JSON lines, CSV, TensorBoard."""

import csv
import errno
import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from patchsvdd_fast.training.log import FileLog, LogOrWarning, TensorBoardLog
from patchsvdd_fast.training.record import LevelMetrics, Quality, TrainingStep


def _step(number, quality=None):
    level = LevelMetrics(loss=2.0, svdd_loss=0.1, accuracy=0.25, spread=0.01)
    return TrainingStep(number, 9, 2.5 + number, 1e-3, 0.5, 4.0, {32: level, 64: level}, quality)


def _rows(path):
    with path.open(newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file))
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_rows_are_on_disk_at_once_and_continued(suffix, tmp_path):
    path = tmp_path / f"log{suffix}"
    log = FileLog(path)
    for number in (1, 2, 3):
        log(_step(number, Quality(60.0, 80.0) if number == 2 else None))
        assert len(_rows(path)) == number
    log.close()
    rows = _rows(path)
    assert float(rows[2]["loss"]) == 5.5
    assert float(rows[0]["K64_accuracy"]) == 0.25
    assert float(rows[1]["check_segmentation"]) == 80
    assert rows[0]["check_segmentation"] in (None, "")

    resumed = FileLog(path)  # from a checkpoint after step 2
    resumed(_step(3))
    resumed(_step(4))
    resumed.close()
    assert [int(row["step"]) for row in _rows(path)] == [1, 2, 3, 4]

    afresh = FileLog(path)
    afresh(_step(1))
    afresh.close()
    assert [int(row["step"]) for row in _rows(path)] == [1]


def test_a_half_written_last_line_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    log = FileLog(path)
    log(_step(1))
    log.close()
    path.write_text(path.read_text() + '{"step": 2, "lo')
    log = FileLog(path)
    log(_step(2))
    log.close()
    assert [row["step"] for row in _rows(path)] == [1, 2]


def test_other_files_are_left_alone(tmp_path):
    with pytest.raises(ValueError, match=r"\.jsonl or \.csv, got .*log\.txt"):
        FileLog(tmp_path / "log.txt")
    with pytest.raises(ValueError, match="folder of the log does not exist"):
        FileLog(tmp_path / "missing" / "log.csv")
    path = tmp_path / "mine.jsonl"
    path.write_text("something else\nof mine\n")
    with pytest.raises(ValueError, match="not a training log"):
        FileLog(path)(_step(1))
    assert path.read_text() == "something else\nof mine\n"


def test_missing_tensorboard_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        TensorBoardLog(tmp_path)


def test_tensorboard_needs_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        TensorBoardLog(tmp_path / "file")


class _FullDisk:
    """A log on a disk that has room for some steps."""

    def __init__(self, room):
        self.room, self.calls = room, 0

    def __call__(self, step):
        self.calls += 1
        if self.calls > self.room:
            self.close()

    def close(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_the_log_and_not_the_training():
    log = LogOrWarning(full := _FullDisk(room=2))
    log(_step(1))
    log(_step(2))
    with pytest.warns(UserWarning, match="log ends at step 2: .*No space left"):
        log(_step(3))
    log(_step(4))
    log.close()
    assert full.calls == 3
    with pytest.warns(UserWarning, match="log ends at step None: .*No space left"):
        LogOrWarning(_FullDisk(room=0)).close()
    with pytest.raises(OSError, match="No space left"):
        LogOrWarning(_FullDisk(room=0))(_step(1))


def test_tensorboard_forgets_the_steps_that_are_done_again(tmp_path):
    for numbers in ((1, 2, 3), (3, 4)):  # killed after 3, resumed from a checkpoint after 2
        log = TensorBoardLog(tmp_path)
        for number in numbers:
            log(_step(number))
        log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
