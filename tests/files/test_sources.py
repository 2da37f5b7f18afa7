"""Where images to score come from: files, folders, globs, lists, folders that are watched."""

import io
import os
from pathlib import Path, PurePath

import pytest

from conftest import stack
from patchsvdd_fast.files import sources
from patchsvdd_fast.files.folders import find_images, walk_images
from patchsvdd_fast.files.sources import Source, arriving_images, image_sources
from patchsvdd_fast.images.prepare import read_image

NAMES = ("a.png", "b/c.JPG", "b/deep/d.tiff", "b.bmp", "e.jpeg", "z.tif")


@pytest.fixture
def folder(tmp_path):
    for name in (*NAMES, "notes.txt", "b/.png", "nothing.png/notes.md"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "images"


def listing(content, errors="strict"):
    """Standard input with this content, in an encoding that most names are no text in."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors=errors)


def found(*given, listed=b""):
    return list(image_sources([str(one) for one in given], listing(listed)))


def inner(*given):
    return [str(source.inner) for source in found(*given)]


def test_a_folder_alone_is_what_outputs_are_named_within(folder):
    assert [source.path for source in found(folder)] == find_images(folder)
    assert inner(folder) == ["a.png", "b/c.JPG", "b/deep/d.tiff", "b.bmp", "e.jpeg", "z.tif"]
    assert inner(f"{folder}/") == inner(folder)


def test_masks_among_images_to_score_are_named(folder):
    for name in ("b/c_GT.png", "e_mask.png", "other_mask.png"):
        (folder / name).touch()
    with pytest.warns(UserWarning, match=r"scored like .*: 2 in .*, such as b/c_GT\.png"):
        assert len(found(folder)) == len(NAMES) + 3


def test_each_page_is_a_source(tmp_path):
    stack(tmp_path / "a.tif", 2)
    stack(tmp_path / "b/a.gif", 3)
    stack(tmp_path / "b.png", 1)
    (tmp_path / "c.tif").write_text("hello")
    listed = listing(f"{tmp_path}/a.tif\n{tmp_path}/a.tif#1\n".encode())
    sources = list(image_sources([str(tmp_path)], listing(b""), "all"))
    names = ["a.tif#1", "a.tif#2", "b/a.gif#1", "b/a.gif#2", "b/a.gif#3", "b.png", "c.tif"]
    assert sorted(str(source.inner) for source in sources) == sorted(names)
    assert all(source.path == tmp_path / source.inner for source in sources)
    found_in_list = [os.fspath(one) for one in image_sources(["-"], listed, "all")]
    assert found_in_list == [f"{tmp_path}/a.tif#{n}" for n in (1, 2, 1)]
    assert inner(tmp_path / "a.tif") == ["a.tif"]
    with pytest.raises(ValueError, match=r"pages must be one of .*'first', 'all'.* got 'each'"):
        list(image_sources([str(tmp_path)], listing(b""), "each"))


def test_several_arguments_keep_their_paths(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert inner("images/b", "images/a.png", "images/missing.png") == [
        *("images/b/c.JPG", "images/b/deep/d.tiff", "images/a.png", "images/missing.png"),
    ]
    assert inner("images/a.png") == ["a.png"]
    assert found("images/a.png")[0].path == Path("images/a.png")


def test_globs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert inner("*") == ["a.png", "b.bmp", "e.jpeg", "z.tif"]
    assert inner("**/*") == sorted(NAMES, key=str)
    (folder / "b/__MACOSX").mkdir()
    (folder / "b/__MACOSX/x.png").touch()
    assert inner("**/*") == sorted(NAMES, key=str)
    assert inner("b/__MACOSX/*") == ["b/__MACOSX/x.png"]
    assert inner("b/**/*.tif*") == ["b/deep/d.tiff"]
    assert inner("[ae].*") == ["a.png", "e.jpeg"]
    (folder / "[ae].png").touch()  # what exists is no pattern
    assert inner("[ae].png") == ["[ae].png"]


@pytest.mark.parametrize("argument", ["*.gif", "b/deep/e?.png", "nothing.png"])
def test_no_images_at_all_is_an_error(folder, monkeypatch, argument):
    monkeypatch.chdir(folder)
    images = image_sources(["a.png", argument], listing(b""))
    assert next(images).path == Path("a.png")
    with pytest.raises(ValueError, match="holds no images"):
        next(images)


def test_an_argument_no_file_could_have_is_a_source_that_fails(tmp_path):
    (source,) = found("x" * 5000)
    with pytest.raises(ValueError, match="File name too long"):
        read_image(source.path)


def test_a_list_on_standard_input():
    content = b"a.png\n\n/b/c.png\r\n../d e.png\n\xff\xfe\xe9.png\n'q\".png\n=1+1.png\nlast"
    names = ["a.png", "/b/c.png", "../d e.png", os.fsdecode(b"\xff\xfe\xe9.png")]
    names += ["'q\".png", "=1+1.png", "last"]
    assert found("-", listed=content) == [Source(Path(n), PurePath(n)) for n in names]
    mixed = image_sources(["first.png", "-", "then.png"], listing(b"x.png\n"))
    assert [str(source.path) for source in mixed] == ["first.png", "x.png", "then.png"]


@pytest.mark.parametrize("content", [b"a.png\0b.png\0", b"\x89PNG\0", b"x" * 100_000])
def test_what_is_no_list_is_refused(content):
    images = image_sources(["-"], listing(b"good.png\n" + content))
    assert str(next(images).path) == "good.png"
    with pytest.raises(ValueError, match="one path a line"):
        next(images)


def test_a_list_may_be_endless_and_is_read_as_it_comes():
    read, write = os.pipe()
    with open(read, encoding="ascii") as listed:  # noqa: PTH123
        images = image_sources(["-"], listed)
        for number in range(100):
            os.write(write, f"{number}.png\n".encode())
            assert next(images).path == Path(f"{number}.png")
        os.close(write)
        assert list(images) == []


# --- folders --------------------------------------------------------------------------------------


def test_images_are_walked_in_the_order_of_their_paths(folder):
    for name in ("b-/x.png", "b0.png", "b/deep.png", "B/y.png", "é/z.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    walked = list(walk_images(folder))
    assert walked == sorted(walked)
    assert len(walked) == len(NAMES) + 5


def test_a_folder_is_listed_when_it_is_its_turn(folder):
    images = walk_images(folder)
    assert next(images) == folder / "a.png"
    (folder / "b" / "added.png").touch()
    assert next(images) == folder / "b" / "added.png"


def test_folders_without_permission_and_dead_links_fail_when_they_are_read(folder, monkeypatch):
    (folder / "dead.png").symlink_to(folder / "nowhere.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "link.png").symlink_to(folder / "a.png")
    (folder / "folder.png").symlink_to(folder / "b")
    (folder / "again").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    (folder / "pipe-too.png").symlink_to(folder / "pipe.png")
    scandir = os.scandir

    def refuse(path):
        if path == folder / "b" / "deep":
            raise PermissionError("no permission")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    names = [str(path.relative_to(folder)) for path in walk_images(folder)]
    assert names == [
        *("a.png", "b/c.JPG", "b/deep", "b.bmp", "dead.png", "e.jpeg", "link.png", "loop.png"),
        "z.tif",
    ]
    for name, kind in (("b/deep", IsADirectoryError), ("dead.png", FileNotFoundError)):
        with pytest.raises(kind):
            read_image(folder / name)
    with pytest.raises(ValueError, match=r"loop\.png"):
        read_image(folder / "loop.png")


# --- arriving -------------------------------------------------------------------------------------


class Looks:
    """Stands for the time between two looks: what happens in it; then the watch ends."""

    def __init__(self, *events):
        self.events = iter(events)

    def __call__(self, seconds):
        event = next(self.events, None)
        if event is None:
            raise StopWatchingError
        event()


class StopWatchingError(Exception):
    pass


def nothing():
    pass


def watched(monkeypatch, folder, *events, is_done=lambda path: False):
    """The names of what is taken, in its order, with None for each look that is over."""
    taken = []
    looks = Looks(*events)

    def look(seconds):
        assert seconds == 1.5
        taken.append(None)
        looks(seconds)

    monkeypatch.setattr(sources.time, "sleep", look)
    with pytest.raises(StopWatchingError):
        for source in arriving_images(folder, is_done, 1.5):
            assert source.path == folder / source.inner
            taken.append(str(source.inner))
    return taken


def writer(path, *parts):
    """Functions that write a file part after part."""
    path.parent.mkdir(exist_ok=True)

    def write(part):
        with path.open("ab") as file:
            file.write(part)

    return [lambda part=part: write(part) for part in parts]


def test_files_are_taken_once_and_in_order(monkeypatch, tmp_path):
    for name in ("b.png", "a.png", "c.txt"):
        (tmp_path / name).touch()
    events = [nothing, *writer(tmp_path / "later" / "d.jpg", b"1"), nothing, nothing]
    taken = watched(monkeypatch, tmp_path, *events)
    assert taken == [None, "a.png", "b.png", None, None, "later/d.jpg", None, None]


def test_a_file_is_taken_when_it_grows_no_more(monkeypatch, tmp_path):
    events = [*writer(tmp_path / "slow.png", b"1", b"2", b"3"), nothing, nothing]
    taken = watched(monkeypatch, tmp_path, *events)
    assert taken == [None, None, None, None, "slow.png", None, None]


def test_a_file_that_grows_after_all_is_taken_again(monkeypatch, tmp_path):
    first, second = writer(tmp_path / "pausing.png", b"1", b"2")
    taken = watched(monkeypatch, tmp_path, first, nothing, second, nothing, nothing)
    assert taken == [None, None, "pausing.png", None, None, "pausing.png", None, None]


def test_what_an_earlier_run_has_done_is_taken_when_it_changes(monkeypatch, tmp_path):
    for name in ("done.png", "new.png"):
        (tmp_path / name).touch()
    change = writer(tmp_path / "done.png", b"more")
    taken = watched(
        monkeypatch,
        tmp_path,
        *(nothing, *change, nothing, nothing),
        is_done=lambda path: path.name == "done.png",
    )
    assert taken == [None, "new.png", None, None, "done.png", None, None]


def test_a_name_that_comes_back_is_a_new_image(monkeypatch, tmp_path):
    path = tmp_path / "current.png"
    path.write_bytes(b"1")
    time = path.stat().st_mtime_ns

    def replace():  # by one of the same size and time, as a copy of a folder may have
        path.write_bytes(b"2")
        os.utime(path, ns=(time, time))

    events = [nothing, path.unlink, replace, nothing, nothing]
    taken = watched(monkeypatch, tmp_path, *events, is_done=lambda path: True)
    assert taken == [None, None, None, None, "current.png", None, None]


def test_files_and_folders_may_vanish_at_any_time(monkeypatch, tmp_path):
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "x.png").touch()
    stat = Path.stat

    def vanish(path, **options):
        if path == tmp_path / "1" / "x.png" and path.parent.exists():
            path.unlink()
            path.parent.rmdir()
            (tmp_path / "3").rename(tmp_path / "4")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", vanish)
    taken = watched(monkeypatch, tmp_path, nothing, nothing)
    assert [name for name in taken if name] == ["0/x.png", "2/x.png", "4/x.png"]


def test_a_watch_ends_with_its_folder(monkeypatch, tmp_path):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(sources.time, "sleep", lambda _: (tmp_path / "folder").rmdir())
    with pytest.raises(ValueError, match="is not a folder"):
        next(arriving_images(tmp_path / "folder", lambda path: False, 1))
