"""`patchsvdd score` and `patchsvdd watch`."""

import csv
import io
import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import plain_image, texture, truncated_image
from patchsvdd_fast import PatchSVDD
from processes import COMMAND, ended, one_line_error


def spotted(rng, spot=True):
    picture = texture(rng)
    if spot:
        picture[30:60, 20:50] = (250, 20, 20)
    return picture


def image_folder(folder, names, seed=2):
    """Images of these names, every other one with a red square."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(spotted(rng, number % 2 == 1)).save(path, format="PNG")
    return folder


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def rows_of(output):
    if (output / "scores.jsonl").exists():
        lines = (output / "scores.jsonl").read_text().splitlines()
        return [json.loads(line, parse_constant=no_constant) for line in lines]
    if not (output / "scores.csv").exists():
        return []
    content = (output / "scores.csv").read_bytes().decode("utf-8", "surrogateescape")
    return list(csv.DictReader(io.StringIO(content, newline="")))


def names_of(output):
    return [str(Path(row["image"])) for row in rows_of(output)]


def pictures_of(output, kind="heat-maps"):
    folder = output / kind
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_bad_images_are_reported_and_skipped(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", ["a.png", "c.png", "f.png", "z.png"])
    (folder / "b.png").write_text("hello")
    (folder / "d.png").write_bytes(b"")
    truncated_image(folder / "e.png")
    plain_image(folder / "g.png", 20)
    Image.new("1", (20_000, 20_000)).save(folder / "h.png")  # of 50 kB
    (folder / "i.png").symlink_to("nowhere.png")
    output, report = tmp_path / "out", tmp_path / "report"
    done = here("score", ready_model, folder, "-o", output, "--report", report)
    assert done.returncode == 3
    rows = rows_of(output)
    assert names_of(output) == [str(folder / f"{name}.png") for name in "abcdefghiz"]
    reasons = {
        "b": "b.png is not an image",
        "d": "d.png is not an image",
        "e": "cannot read image",
        "g": "20x20 pixels, less than one patch of 64x64",
        "h": "--max-pixels",
        "i": "No such file",
    }
    stderr = done.stderr.splitlines()
    assert len(stderr) == len(reasons)
    for line, (name, reason) in zip(stderr, reasons.items(), strict=True):
        assert line.startswith("error: ")
        assert f"{name}.png" in line
        assert reason in line
    for row in rows:
        name = Path(row["image"]).stem
        assert reasons.get(name, "") in row["error"]
        assert bool(row["error"]) == (row["score"] == "") == (name in reasons)
    assert "scored 4 images" in done.stdout
    assert "6 could not be read" in done.stdout
    assert pictures_of(output) == ["a.png", "c.png", "f.png", "z.png"]
    page = (report / "index.html").read_text()
    assert all(reason in page for reason in ("b.png is not an image", "--max-pixels"))
    other = tmp_path / "other"
    assert here("score", ready_model, folder / "a.png", "-o", other).returncode == 0


def test_scores_are_the_detectors(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", [f"{number:02}.png" for number in range(20)])
    output = tmp_path / "out"
    done = here(
        *("score", ready_model, folder, "-o", output, "--format", "jsonl"),
        *("--maps", "npy", "--false-alarm-rate", "0.25"),
    )
    assert done.returncode == 0, done.stderr
    detector = PatchSVDD.load(ready_model)
    expected = detector.score(folder)
    rows = rows_of(output)
    assert [row["score"] for row in rows] == expected.image_scores.tolist()
    assert [row["p_value"] for row in rows] == detector.p_values(expected.image_scores).tolist()
    threshold = detector.threshold(0.25)
    assert {row["threshold"] for row in rows} == {threshold}
    assert [row["verdict"] for row in rows] == [
        "anomalous" if score > threshold else "normal" for score in expected.image_scores.tolist()
    ]
    assert all(row["verdict"] == "anomalous" for row in rows[1::2])
    for number, row in enumerate(rows):
        stored = np.load(output / "maps" / f"{number:02}.npy")
        assert np.array_equal(stored, expected.anomaly_map[number].numpy())
        if row["verdict"] == "anomalous":
            assert row["level"] in ("K64", "K32")
            assert row["regions"][0]["peak"] == row["score"]


def test_pictures_show_images_at_their_own_pixels(here, ready_model, tmp_path):
    image = np.random.default_rng(0).integers(60, 200, (200, 400, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "wide.png")
    output, report = tmp_path / "out", tmp_path / "report"
    done = here("score", ready_model, tmp_path / "wide.png", "-o", output, "--report", report)
    assert done.returncode == 0, done.stderr
    with Image.open(output / "heat-maps" / "wide.png") as picture:
        pixels = np.asarray(picture)
    assert any((pixels[y : y + 200, 8:408] == image).all() for y in range(100))
    page = (report / "index.html").read_text()
    assert '"size":[400,200],"mapSize":[96,96]' in page


ODD_NAMES = (
    'new\nline, "quoted".png',
    os.fsdecode(b"no \xff\xfe text.png"),
    "=1+1.png",
    "\x1b]0;title\x07.png",
    "画像.png",
    "[/bold] markup [red].png",
    "x" * 251 + ".png",
    "a.jpg",
    "a.jpg.png",
    "A.PNG",
    "a.png",
    "a.npy/b.png",
    "a.tiff.png/b.png",
)


@pytest.mark.parametrize(("table", "maps"), [("csv", "png"), ("jsonl", "tiff"), ("parquet", "npy")])
def test_files_of_any_name(here, ready_model, tmp_path, monkeypatch, table, maps):
    if table == "parquet":
        pytest.importorskip("pyarrow")
    image_folder(tmp_path / "in", ODD_NAMES)
    monkeypatch.chdir(tmp_path / "in")
    listed = os.fsencode("\n".join(name for name in ODD_NAMES if "\n" not in name))
    output = tmp_path / "[/out]"  # what markup would make an error
    arguments = ("score", ready_model, ODD_NAMES[0], "-", "-o", output)
    arguments += ("--format", table, "--maps", maps)
    done = here(*arguments, listed=listed)
    assert done.returncode == 0, done.stderr
    assert "see " + str(output) in done.stdout
    assert names_of(output) == list(ODD_NAMES)
    heat_maps = pictures_of(output)
    assert len(heat_maps) == len(pictures_of(output, "maps")) == len(ODD_NAMES)
    assert all(name.isprintable() for name in heat_maps)
    before = rows_of(output)
    done = here(*arguments, "--resume", listed=listed)
    assert "scored 0 images" in done.stdout
    assert rows_of(output) == before
    if table == "parquet":
        from pyarrow import parquet

        scores = parquet.read_table(output / "scores.parquet")["score"].to_pylist()
        assert scores == [row["score"] for row in before]


def test_listed_paths_write_inside_of_output_only(here, ready_model, tmp_path, monkeypatch):
    names = ["x.png", "work/x.png", "work/deep/x.png"]
    image_folder(tmp_path, names)
    monkeypatch.chdir(tmp_path / "work")
    before = sorted(tmp_path.rglob("*"))
    paths = ["../x.png", f"{tmp_path}/x.png", "deep/../../x.png", "x.png", "deep/x.png", "./x.png"]
    output = tmp_path / "out"
    done = here("score", ready_model, "-", "-o", output, listed="\n".join(paths).encode())
    assert done.returncode == 0, done.stderr
    assert len(rows_of(output)) == 6
    assert len(pictures_of(output)) == 5  # ./x.png is x.png
    assert [path for path in sorted(tmp_path.rglob("*")) if output not in path.parents] == sorted(
        [*before, output]
    )


def test_own_pictures_are_not_scored(here, ready_model, tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "in", ["a.png", "z.png"])
    monkeypatch.chdir(folder)
    for _ in range(2):
        done = here("score", ready_model, ".", "--maps", "png", "--overwrite")
        assert done.returncode == 0, done.stderr
        assert names_of(folder / "scores") == ["a.png", "z.png"]
    assert here("score", ready_model, "**/*.png", "--overwrite").returncode == 0
    assert names_of(folder / "scores") == ["a.png", "z.png"]


def test_resume_does_what_is_left(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", [f"{number}.png" for number in range(6)])
    output = tmp_path / "out"
    arguments = ("score", ready_model, folder, "-o", output)
    assert here(*arguments).returncode == 0
    whole, rows = (output / "scores.csv").read_bytes(), rows_of(output)
    lines = whole.splitlines(keepends=True)
    (output / "scores.csv").write_bytes(b"".join(lines[:3]) + lines[3][:-9])
    (output / "heat-maps" / "0.png").unlink()  # to see that it is not made again
    broken = folder / "1.png"
    content = broken.read_bytes()
    broken.write_text("broken")
    done = here(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert "scored 4 images" in done.stdout
    assert (output / "scores.csv").read_bytes() == whole
    assert not (output / "heat-maps" / "0.png").exists()

    assert here(*arguments, "--overwrite").returncode == 3
    assert rows_of(output)[1]["error"] != ""
    broken.write_bytes(content)
    done = here(*arguments, "--resume")  # what failed is tried again
    assert "scored 1 image in" in done.stdout
    assert sorted(rows_of(output), key=str) == sorted(rows, key=str)

    other = here(*arguments, "--resume", "--false-alarm-rate", "0.5")
    assert "another model or rate" in one_line_error(other)
    assert here(*arguments, "--resume").returncode == 0


def test_a_full_disk_ends_in_one_line_and_resume_goes_on(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", [f"{number}.png" for number in range(8)])
    (folder / "3.png").write_text("broken")
    output = tmp_path / "out"
    arguments = ("score", ready_model, folder, "-o", output, "--format", "jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Neither a table of all rows nor a heat map fits.
    for size, options, message in (
        (3_000, ["--no-heat-maps"], "scores.jsonl"),
        (9_000, [], "heat-maps/0.png"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            done = here(*arguments, *options, "--overwrite")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: cannot write ")
        assert message in last
        assert last.endswith("File too large")
        assert "Traceback" not in done.stderr
        part = rows_of(output)
        assert len(part) < 8
        assert not list(output.rglob("*.partial"))
        done = here(*arguments, *options, "--resume")
        assert done.returncode == 3
        rows = rows_of(output)
        assert sorted(names_of(output)) == [str(folder / f"{number}.png") for number in range(8)]
        assert [row for row in part if "error" not in row] == rows[: len(part)][
            : sum("error" not in row for row in part)
        ]
    assert len(pictures_of(output)) == 7


def test_the_limit_of_pixels_can_be_moved(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", ["a.png"])
    arguments = ("score", ready_model, folder, "-o", tmp_path / "out")
    for limit, refused in ((9_215, True), (4_000, True), (9_216, False), (0, False)):
        done = here("--max-pixels", limit, *arguments, "--overwrite")
        assert done.returncode == (3 if refused else 0)
        if refused:
            assert f"more than the limit of {limit:,} (--max-pixels" in one_line_error(done)
    assert here("--max-pixels", "-1", *arguments).returncode == 2


def test_one_training_image_gives_scores_without_a_verdict(here, tmp_path):
    detector = PatchSVDD(image_size=96, mean="channel", embedding_dim=16, device="cpu")
    detector.fit([texture(np.random.default_rng(0))], encoder=detector.untrained_encoder())
    detector.save(tmp_path / "one.safetensors")
    folder = image_folder(tmp_path / "in", ["a.png", "b.png"])
    arguments = ("score", tmp_path / "one.safetensors", folder, "-o", tmp_path / "out")
    for options in ([], ["--resume"]):
        assert here(*arguments, *options, "--maps", "png").returncode == 0
        for row in rows_of(tmp_path / "out"):
            assert float(row["score"]) > 0
            assert row["p_value"] == row["threshold"] == row["verdict"] == row["error"] == ""
    assert pictures_of(tmp_path / "out", "maps") == ["a.png", "b.png"]


def test_wrong_usage_of_score_and_watch(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", ["a.png"])
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (("score", ready_model, folder, "--format", "xml"), 2, "none of csv, jsonl, parquet"),
        (("score", ready_model, folder, "--maps", "bmp"), 2, "none of npy, tiff, png"),
        (("score", ready_model, folder, "-o", ready_model), 1, "is a file"),
        (("score", ready_model, empty, "-o", tmp_path / "o"), 1, "holds no images"),
        (("score", ready_model, "*.gif", "-o", tmp_path / "o"), 1, "holds no images"),
        (("score", ready_model, folder, "--false-alarm-rate", "0.01"), 1, "at the lowest"),
        (("score", ready_model, "-", "-o", tmp_path / "o"), 1, "one path a line"),
        (("score", ready_model), 2, "Missing argument"),
        (("watch", ready_model, tmp_path / "missing"), 1, "is not a folder"),
        (("watch", ready_model, folder, "-o", folder / "scores"), 1, "which is watched"),
        (("watch", ready_model, folder, "--format", "parquet"), 2, "has no end"),
        (("watch", ready_model, folder, "--interval", "0"), 2, "--interval"),
    ]
    for arguments, status, message in cases:
        done = here(*arguments, listed=b"a.png\0b.png\0")
        assert done.returncode == status, arguments
        assert message in one_line_error(done)


def started(*arguments, **options):
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_until(condition, *processes):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def test_a_run_is_gone_on_with_after_a_kill_and_after_ctrl_c(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", [f"{number}.png" for number in range(5)])
    paths = "".join(f"{folder}/{number}.png\n" for number in range(5))
    assert here("score", ready_model, folder, "-o", tmp_path / "whole").returncode == 0
    expected = rows_of(tmp_path / "whole")
    killed, interrupted = tmp_path / "killed", tmp_path / "interrupted"
    processes = [
        started("score", ready_model, "-", "-o", output, stdin=subprocess.PIPE)
        for output in (killed, interrupted)
    ]
    for process in processes:
        process.stdin.write(paths[: len(paths) * 3 // 5])
        process.stdin.flush()
    for output in (killed, interrupted):  # although the list has not ended
        wait_until(lambda output=output: len(rows_of(output)) == 3, *processes)
    processes[0].kill()
    processes[1].send_signal(signal.SIGINT)
    ended(processes[0])
    assert ended(processes[1]) == ("", "interrupted\n")
    assert processes[1].returncode == 130
    with (killed / "scores.csv").open("ab") as file:
        file.write(b"half a row,0.12")
    for process, output in zip(processes, (killed, interrupted), strict=True):
        process.stdin.close()
        assert rows_of(output)[:3] == expected[:3]
        done = here("score", ready_model, "-", "-o", output, "--resume", listed=paths.encode())
        assert "scored 2 images" in done.stdout
        assert rows_of(output) == expected
        assert len(pictures_of(output)) == 5


def test_watch_scores_what_arrives_until_it_is_ended(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", ["done.png", "sub/there.png"])
    outputs = [tmp_path / "interrupted", tmp_path / "terminated"]
    for output in outputs:
        assert here("score", ready_model, folder / "done.png", "-o", output).returncode == 0
    processes = [
        started("watch", ready_model, folder, "-o", output, "--interval", "0.1")
        for output in outputs
    ]

    def all_have(*names):
        good = [
            {Path(row["image"]).name for row in rows_of(output) if not row["error"]}
            for output in outputs
        ]
        return all(set(names) <= found for found in good)

    wait_until(lambda: all_have("done.png", "there.png"), *processes)
    content = (folder / "done.png").read_bytes()
    (folder / "slow.png").write_bytes(content[:3000])
    odd = folder / os.fsdecode(b"odd\n\xff[x].png")
    odd.write_bytes(content)
    (folder / "bad.png").write_text("no image")
    wait_until(lambda: all_have(odd.name), *processes)
    with (folder / "slow.png").open("ab") as file:
        file.write(content[3000:])
    wait_until(lambda: all_have("slow.png"), *processes)
    ends = ((signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"))
    for process, (number, _, _) in zip(processes, ends, strict=True):
        process.send_signal(number)
    for process, (_, status, word) in zip(processes, ends, strict=True):
        stdout, stderr = ended(process)
        assert process.returncode == status
        errors = stderr.splitlines()
        assert errors.pop() == word
        assert errors
        assert all(line.startswith("error: ") and ".png" in line for line in errors)
        lines = stdout.splitlines()
        assert "watching" in lines.pop(0)
        assert [line for line in lines if "odd\\n\\udcff[x].png" in line]
        assert [line for line in lines if "slow.png" in line]
        assert not [line for line in lines if "done.png" in line]
    for output in outputs:
        good = [Path(row["image"]).name for row in rows_of(output) if not row["error"]]
        assert sorted(good) == sorted(["done.png", "there.png", odd.name, "slow.png"])
        assert {Path(row["image"]).name for row in rows_of(output) if row["error"]} >= {"bad.png"}


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_typo_destroys_nothing(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", ["a.png", "b.png"])
    output, report = tmp_path / "out", tmp_path / "report"
    given = ("-o", output, "--report", report)
    assert here("score", ready_model, folder, *given).returncode == 0
    before = tree(tmp_path)
    for image, options, message in (
        ("newX", ["--overwrite"], "newX does not exist"),
        ("*.gif", ["--overwrite"], "holds no images"),
        ("in", [], "outputs of an earlier run (scores.csv): --resume goes on with them"),
        ("in", ["--resume"], "index.html exists already"),
        ("in", ["--resume", "--overwrite"], "either --resume or --overwrite"),
        ("in", ["--overwrite", "--false-alarm-rate", "0.01"], "at the lowest"),
    ):
        done = here("score", ready_model, tmp_path / image, *given, *options)
        assert message in one_line_error(done)
        assert tree(tmp_path) == before, options
    one = here("score", ready_model, folder / "a.png", *given, "--overwrite")
    assert one.returncode == 0, one.stderr
    assert pictures_of(output) == ["a.png"]
    assert len(rows_of(output)) == 1
    (report / "index.html").write_text("<html>a page of mine</html>")
    done = here("score", ready_model, folder, *given, "--overwrite")
    assert "is no report of this program" in one_line_error(done)
    assert len(rows_of(output)) == 1


def test_resume_from_another_folder_keeps_heat_maps_of_equal_names(here, ready_model, tmp_path):
    first = image_folder(tmp_path / "first", ["a.png", "b.png"])
    second = image_folder(tmp_path / "second", ["x.png", "a.png"])
    output = tmp_path / "out"
    assert here("score", ready_model, first, "-o", output).returncode == 0
    before = tree(output / "heat-maps")
    for _ in range(2):
        done = here("score", ready_model, second, "-o", output, "--resume")
        assert done.returncode == 0, done.stderr
    assert tree(output / "heat-maps").items() >= before.items()
    assert len(pictures_of(output)) == len(rows_of(output)) == 4
    done = here("score", ready_model, first, "-o", output, "--resume", "--format", "jsonl")
    assert "go on with its --format" in one_line_error(done)


def test_resume_where_paths_mean_other_images(here, ready_model, tmp_path, monkeypatch):
    output = tmp_path / "out"
    for name in ("first", "second"):
        monkeypatch.chdir(image_folder(tmp_path / name, ["a.png"]))
        done = here("score", ready_model, "a.png", "-o", output, "--resume")
    assert f"paths such as a.png, seen from {tmp_path / 'first'}" in one_line_error(done)
    assert len(rows_of(output)) == 1


def test_two_runs_into_one_folder(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", ["a.png"])
    output = tmp_path / "out"
    process = started("watch", ready_model, folder, "-o", output, "--interval", "0.1")
    wait_until(lambda: len(rows_of(output)) == 1, process)
    for command in (
        ("score", ready_model, folder, "-o", output, "--overwrite"),
        ("score", ready_model, folder, "-o", output, "--resume"),
        ("watch", ready_model, folder, "-o", output),
    ):
        assert f"process ({process.pid}) is writing" in one_line_error(here(*command))
    process.send_signal(signal.SIGINT)
    ended(process)
    assert here("score", ready_model, folder, "-o", output, "--resume").returncode == 0
    assert len(rows_of(output)) == 1


def test_scores_as_multiples_of_the_threshold(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", ["a.png", "b.png"])
    output, report = tmp_path / "out", tmp_path / "report"
    given = ("--format", "jsonl", "--maps", "png", "--report", report)
    done = here("score", ready_model, folder, "-o", output, *given)
    assert done.returncode == 0, done.stderr
    normal, anomalous = rows_of(output)
    for row in (normal, anomalous):
        assert row["relative_score"] == row["score"] / row["threshold"]
        for kind in ("heat-maps", "maps"):
            with Image.open(output / kind / Path(row["image"]).name) as picture:
                assert float(picture.text["patchsvdd.map_threshold"]) == row["threshold"]
    assert normal["relative_score"] <= 1 < anomalous["relative_score"]
    assert anomalous["regions"][0]["relative_peak"] == anomalous["relative_score"]
    assert f"{anomalous['relative_score']}" in (report / "index.html").read_text()
    done = here("score", ready_model, folder / "b.png", "-o", tmp_path / "one")
    line, summary, *_ = done.stdout.splitlines()
    times = f"{anomalous['relative_score']:.3g} x the threshold"
    assert line.startswith(f"{folder / 'b.png'}  anomalous, {times}, p 0.2 (score ")
    assert summary.startswith("scored 1 image in ")


def test_alarms_on_images_in_another_light_are_told(here, ready_model, tmp_path):
    folder = image_folder(tmp_path / "in", ["a.png", "b.png"])
    for path in folder.iterdir():
        Image.fromarray(np.asarray(Image.open(path)) // 4).save(path)
    given = ("score", ready_model, folder, "-o", tmp_path / "out", "--report", tmp_path / "report")
    done = here(*given)
    assert "2 of 2 alarms on images unlike the training images (" in done.stdout
    assert "darker: 2" in done.stdout
    assert "2 of 2 alarms on images unlike" in (tmp_path / "report/index.html").read_text()


def test_masks_and_regions_say_the_same(here, ready_model, tmp_path):
    images = image_folder(tmp_path / "images", ["a.png", "b.png"])
    output, regions = tmp_path / "out", tmp_path / "regions.json"
    done = here("score", ready_model, images, "-o", output, "--masks", "--coco", regions)
    assert done.returncode == 0, done.stderr
    assert f"regions: {regions}" in done.stdout
    content = json.loads(regions.read_text())
    assert [image["file_name"] for image in content["images"]] == names_of(output)
    assert pictures_of(output, "masks") == ["a.png", "b.png"]
    for image in content["images"]:
        with Image.open(output / "masks" / Path(image["file_name"]).name) as mask:
            assert mask.size == (image["width"], image["height"])
            white = int((np.asarray(mask) == 255).sum())
        found = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        assert white == sum(one["area"] for one in found)
        (row,) = [row for row in rows_of(output) if row["image"] == image["file_name"]]
        assert bool(found) == (row["verdict"] == "anomalous")
    assert content["annotations"]


def test_a_file_of_regions_is_neither_replaced_nor_halved(here, ready_model, tmp_path):
    images = image_folder(tmp_path / "images", ["a.png"])
    regions = tmp_path / "regions.json"
    regions.write_text("mine")
    common = ("score", ready_model, images, "-o", tmp_path / "out", "--coco", regions)
    assert "exists already" in here(*common).stderr
    assert not (tmp_path / "out").exists()
    assert "exists already" in one_line_error(here(*common, "--resume"))
    assert regions.read_text() == "mine"


def test_regions_are_gone_on_with(here, ready_model, tmp_path):
    images = image_folder(tmp_path / "images", ["a.png", "b.png"])
    regions = tmp_path / "regions.json"
    common = ("score", ready_model, "-o", tmp_path / "out", "--coco", regions)
    assert here(*common, images / "a.png").returncode == 0
    done = here(*common, images, "--resume")
    assert done.stdout.startswith("scored 1 images") or "scored 1 image " in done.stdout
    content = json.loads(regions.read_text())
    assert [Path(image["file_name"]).name for image in content["images"]] == ["a.png", "b.png"]
    assert content["annotations"]
    regions.unlink()
    done = here(*common, images, "--resume")
    assert "lacks the regions of 2 images of the earlier run, such as" in one_line_error(done)
