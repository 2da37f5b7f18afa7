"""Videos and cameras as sources of images."""

import csv
import sys

import numpy as np
import pytest

from conftest import texture
from patchsvdd_fast.files import pages, sources
from patchsvdd_fast.files.pages import is_stream, is_video, video_frames, video_length
from patchsvdd_fast.images.prepare import UnreadableError, read_image

cv2 = pytest.importorskip("cv2")


@pytest.fixture
def clip(tmp_path):
    """Seven frames without loss, a red square in the third and sixth; its path, and the frames."""
    rng, frames = np.random.default_rng(2), []
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), 10.0, (96, 96))
    assert writer.isOpened()
    for number in range(1, 8):
        frame = texture(rng)
        if number % 3 == 0:
            frame[30:60, 20:50] = (250, 20, 20)
        writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
        frames.append(frame)
    writer.release()
    return path, frames


def near(image, frame):
    """Whether an image is the frame, but for the rounding of colours."""
    return np.abs(np.asarray(image).astype(int) - frame).mean() < 4


def test_frames_have_numbers_and_colours_in_order(clip):
    path, frames = clip
    assert is_video(path) and not is_video(f"{path}#2")
    assert video_length(path) == 7
    found = list(video_frames(path, every=3))
    assert [number for number, _ in found] == [1, 4, 7]
    assert all(near(image, frames[number - 1]) for number, image in found)
    assert near(read_image(f"{path}#6"), frames[5])
    with pytest.raises(UnreadableError, match="it has no such frame"):
        read_image(f"{path}#8")
    with pytest.raises(UnreadableError, match=r"name one of its frames, such as .*clip\.avi#1"):
        read_image(path)


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"broken\.mp4: OpenCV reads no frame"):
        next(video_frames(tmp_path / "broken.mp4"))


def test_score_takes_the_frames_of_a_video(clip, here, ready_model, tmp_path):
    path, _ = clip
    output = tmp_path / "out"
    done = here("score", ready_model, path, "-o", output, "--every", "2")
    assert done.returncode == 0, done.stderr
    with (output / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"{path}#{number}" for number in (1, 3, 5, 7)]
    assert max(rows, key=lambda row: float(row["score"]))["image"] == f"{path}#3"
    heat_maps = sorted(file.name.split("-")[0] for file in (output / "heat-maps").iterdir())
    assert len(heat_maps) == 4 and all(name.startswith("clip.avi#") for name in heat_maps)
    done = here("score", ready_model, path, "-o", output, "--resume")
    assert "scored 3 images" in done.stdout


def test_explain_takes_a_frame(clip, here, ready_model, tmp_path):
    path, _ = clip
    done = here("explain", ready_model, f"{path}#3", "-o", tmp_path / "why")
    assert done.returncode == 0, done.stderr
    assert "clip.avi#3: anomalous" in done.stdout


def test_a_broken_video_is_reported_and_the_rest_is_scored(clip, here, ready_model, tmp_path):
    path, _ = clip
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    done = here("score", ready_model, tmp_path / "broken.mp4", path, "-o", tmp_path / "out")
    assert done.returncode == 3
    assert "broken.mp4" in done.stderr
    assert "scored 7 images" in done.stdout


def test_how_many_frames_there_are(clip):
    path, _ = clip
    assert sources.num_images([str(path)], "first") == 7
    assert sources.num_images([str(path)], "first", {f"{path}#1", f"{path}#7"}, every=3) == 1


def test_without_opencv_it_is_named_at_once(clip, here, ready_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    done = here("score", ready_model, clip[0], "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "pip install opencv-python-headless" in done.stderr
    assert not (tmp_path / "out").exists()


def test_names_of_cameras_and_streams(tmp_path, monkeypatch):
    assert is_stream("camera:0") and is_stream("rtsp://host/1")
    assert not is_stream("camera:x") and not is_stream("images")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "camera:1").mkdir()
    assert not is_stream("camera:1")


def test_watch_takes_frames_of_a_camera(clip, here, ready_model, tmp_path, monkeypatch):
    """The clip stands for the camera, which ends."""
    path, _ = clip

    class Opened:
        VideoCapture = staticmethod(lambda source: cv2.VideoCapture(str(path)))

        def __getattr__(self, name):
            return getattr(cv2, name)

    monkeypatch.setattr(pages, "_opencv", Opened)
    monkeypatch.setattr(sources.time, "monotonic", iter(range(0, 10_000)).__next__)
    output = tmp_path / "out"
    done = here("watch", ready_model, "camera:0", "-o", output, "--interval", "0.5")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("camera:0#")]
    assert [line.split("  ")[0] for line in lines] == [f"camera:0#{n}" for n in range(1, 8)]
    here("watch", ready_model, "camera:0", "-o", output, "--interval", "0.5")
    names = [line.split(",")[0] for line in (output / "scores.csv").read_text().splitlines()[1:]]
    assert names == [f"camera:0#{number}" for number in range(1, 15)]


def test_score_refuses_what_never_ends(here, ready_model, tmp_path):
    done = here("score", ready_model, "camera:0", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "patchsvdd watch" in done.stderr
