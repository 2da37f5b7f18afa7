"""The layouts of data sets: the same images are told apart in each, with the same masks."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_sets import (
    SIDE,
    WRITERS,
    btad,
    kolektor_sdd2,
    mvtec_ad,
    mvtec_ad_2,
    mvtec_ad_2_renamed,
    noise_images,
    visa,
    write,
)
from patchsvdd_fast.detector.evaluation import masks_or_reason
from patchsvdd_fast.files.categories import (
    Category,
    find_categories,
    folders_of_categories,
    in_words,
    is_category,
    own_category,
    training_paths,
)
from patchsvdd_fast.files.layouts import LAYOUTS, matching_layouts

SIZE = (96, 96)


@pytest.fixture(scope="module")
def images():
    return noise_images()


CASES = [*WRITERS.items(), ("MVTec AD 2", mvtec_ad_2_renamed)]


def contents(paths):
    return sorted(np.asarray(Image.open(path)).tobytes() for path in paths)


def of_arrays(arrays):
    return sorted(array.tobytes() for array in arrays)


def marked(category):
    """The test images' pixels, each with its label and mask."""
    tests = category.test_images()
    masks, reason = masks_or_reason(tests, SIZE)
    assert reason is None
    return sorted(
        (np.asarray(Image.open(image.path)).tobytes(), image.is_anomalous, mask.tobytes())
        for image, mask in zip(tests, masks, strict=True)
    )


@pytest.fixture(scope="module")
def expected(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("expected") / "noise"
    mvtec_ad(root, images)
    return marked(Category(root))


def test_every_layout_is_tried():
    assert [layout.name for layout in LAYOUTS] == list(WRITERS)


@pytest.mark.parametrize(("name", "lay_out"), CASES)
def test_the_same_images_in_every_layout(name, lay_out, images, expected, tmp_path):
    root = tmp_path / "noise"
    lay_out(root, images)
    for where in (root, root.parent):
        (category,) = find_categories(where)
        assert (category.root, category.layout.name) == (root, name)
    assert marked(category) == expected
    assert category.test_set().remarks == []
    assert contents(category.train_paths()) == of_arrays(images["train"])
    assert training_paths(root) == category.train_paths()
    has_validation = category.layout.parts["validation"] != ""
    assert contents(category.validation_paths()) == (
        of_arrays(images["validation"]) if has_validation else []
    )
    aside = ", 3 of validation kept aside" if has_validation else ""
    assert in_words(category) == f"noise: layout {name}, 3 images to train on{aside}"
    assert in_words(category, category.test_set()).endswith(
        "3 good and 3 anomalous images, 3 of them with masks"
        + (", and 3 good ones of validation for false alarms" if has_validation else "")
    )


def test_two_layouts_are_an_error_that_names_both(images, tmp_path):
    mvtec_ad(tmp_path, images)
    btad(tmp_path, images)
    assert len(matching_layouts(tmp_path)) == 2
    (category,) = find_categories(tmp_path)
    with pytest.raises(ValueError, match="MVTec AD and BTAD"):
        category.test_images()
    with pytest.raises(ValueError, match="MVTec AD and BTAD"):
        training_paths(tmp_path)


@pytest.mark.parametrize(
    "folder", ["train", "test", "ground_truth", "part/Train/ok", "masks", "bad", "x/NG"]
)
def test_folders_of_an_unknown_layout_are_not_trained_on(folder, images, tmp_path):
    write(tmp_path / "line" / folder / "0.png", images["good"][0])
    write(tmp_path / "line/1.png", images["good"][1])
    assert not is_category(tmp_path / "line")
    with pytest.raises(ValueError, match="no layout that is known"):
        training_paths(tmp_path / "line")
    assert len(training_paths(tmp_path / "line" / folder)) == 1


@pytest.mark.parametrize("good", ["good", "part/OK"])
def test_good_images_beside_others_are_not_trained_on_together(good, images, tmp_path):
    write(tmp_path / "line" / good / "deep/0.png", images["good"][0])
    assert len(training_paths(tmp_path / "line")) == 1
    scratch = tmp_path / "line" / Path(good).parent / "scratch/0.png"
    write(scratch, images["bad"][0])
    with pytest.raises(ValueError, match=f"a folder scratch beside {Path(good).name}"):
        training_paths(tmp_path / "line")
    with pytest.raises(ValueError, match="a folder scratch beside"):
        folders_of_categories((tmp_path / "line" / good).parent)


def test_a_folder_of_categories_is_not_one_training_set(images, tmp_path):
    mvtec_ad(tmp_path / "a", images)
    with pytest.raises(ValueError, match="a single category"):
        training_paths(tmp_path)
    write(tmp_path / "b/train/0.png", images["good"][0])
    write(tmp_path / "c/Defects/0.png", images["bad"][0])
    write(tmp_path / "d/fine/0.png", images["good"][0])
    with pytest.warns(UserWarning, match="in no layout that is known: b, c$"):
        assert [category.name for category in find_categories(tmp_path)] == ["a"]


def test_masks_beside_images_are_not_trained_on(images, tmp_path):
    for name in ("0.png", "1.png", "1_GT.png", "2.png", "2_mask.bmp", "3_label.png"):
        write(tmp_path / name, images["good"][0])
    with pytest.warns(UserWarning, match=r"left out.*: 2 in .* such as 1_GT\.png"):
        found = training_paths(tmp_path)
    assert [path.name for path in found] == ["0.png", "1.png", "2.png", "3_label.png"]


def test_masks_among_good_images_of_a_category_are_not_trained_on(images, tmp_path):
    category = Category(tmp_path)
    mvtec_ad_2(tmp_path, images)
    before = training_paths(tmp_path), category.validation_paths()
    assert all(before)
    for part in ("train", "validation"):
        for name in ("masks/000.png", "deeper/ground_truth/000.png", "000_regular_mask.png"):
            write(tmp_path / part / "good" / name, images["masks"][0])
    with pytest.warns(UserWarning, match="masks by their names or those of their folders: 3 in "):
        assert (training_paths(tmp_path), category.validation_paths()) == before


def test_images_whose_masks_mark_something_are_not_trained_on(images, tmp_path):
    kolektor_sdd2(tmp_path, images)
    with pytest.warns(UserWarning, match=r"mark something: 1 of 4 \(train/20003\.png\)"):
        found = training_paths(tmp_path / "train")
    assert found == training_paths(tmp_path)
    for number in range(3):
        (tmp_path / f"train/{20000 + number}.png").unlink()
    with pytest.raises(ValueError, match="holds no good images"):
        training_paths(tmp_path / "train")


def test_what_systems_leave_behind_is_passed_over(images, expected, recwarn, tmp_path):
    root = tmp_path / "noise"
    mvtec_ad(root, images)
    for part in ("train/good", "test", "test/good", "test/spot", "ground_truth/spot"):
        for name in (
            ".ipynb_checkpoints/000.png",
            "._001.png",
            "__MACOSX/x.png",
            ".hidden/y.png",
            "@eaDir/z.jpg",
        ):
            write(root / part / name, images["good"][0])
        (root / part / "Thumbs.db").touch()
        (root / part / ".DS_Store").touch()
    (category,) = find_categories(tmp_path)
    assert len(category.train_paths()) == 3
    assert marked(category) == expected
    assert category.test_set().remarks == []
    assert {image.defect for image in category.test_images()} == {"good", "spot"}
    assert len(recwarn) == 0


def test_what_is_skipped_is_said(images, tmp_path):
    mvtec_ad(tmp_path, images)
    for part in ("train/good", "test/spot"):
        (tmp_path / part / "linked").symlink_to(tmp_path / "test/good")
        (tmp_path / part / "unplugged").symlink_to(tmp_path / "not there")
        (tmp_path / part / "a.heic").touch()
        (tmp_path / part / "b.heic").touch()
    said = r"files \.heic, which are not read: 2 \(.\.heic\), links .*\(unplugged\), links to.*: 1 "
    with pytest.warns(UserWarning, match=said):
        assert len(training_paths(tmp_path)) == 3
    (tmp_path / "test/good/c.heic").touch()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "test/good/pipe.png")
        said = Category(tmp_path).test_set().remarks[0]
        assert "what is neither a file nor a folder: 1 (pipe.png)" in said
    (tmp_path / "ground_truth/spot/d.heic").touch()
    remark, of_masks = Category(tmp_path).test_set().remarks
    assert "files .heic, which are not read: 3" in remark
    assert of_masks.endswith("ground_truth: files .heic, which are not read: 1 (d.heic)")
    (tmp_path / "test/good").rename(tmp_path / "good")
    (tmp_path / "test/good").symlink_to(tmp_path / "good")
    tests = Category(tmp_path).test_set()
    assert len(tests.images) == 6
    assert "links to folders, which are not followed: 1 (linked)" in tests.remarks[-2]
    assert "links to folders, which are not followed: 1" in remark


def test_masks_and_images_without_each_other_are_named(images, tmp_path):
    mvtec_ad(tmp_path, images)
    (tmp_path / "ground_truth/spot/002_mask.png").rename(tmp_path / "ground_truth/spot/9.png")
    write(tmp_path / "ground_truth/good/000_mask.png", images["masks"][0])
    write(tmp_path / "test/loose.png", images["good"][0])
    tests = Category(tmp_path).test_set()
    assert len(tests.images) == 6
    assert tests.remarks == [
        "images in no folder of test, so without a label: 1 (test/loose.png)",
        "masks that match no test image: 1 of 4 (spot/9.png)",
        "anomalous images without a mask: 1 of 3 (spot/002.png)",
    ]
    assert "anomalous images without a mask: 1 of 3" in masks_or_reason(tests.images, SIZE)[1]


def test_masks_of_other_proportions_than_their_images_are_named(images, tmp_path):
    mvtec_ad(tmp_path, images)
    half, turned, cut = sorted((tmp_path / "ground_truth/spot").iterdir())
    Image.open(half).resize((65, 64)).save(half)
    for path in (turned, cut):
        Image.open(path).crop((0, 0, SIDE, 120)).save(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(turned).save(turned, exif=exif)
    tests = Category(tmp_path).test_images()
    sizes = [(SIDE, SIDE)] * 4 + [(128, 120), (128, 128)]
    with pytest.warns(UserWarning, match=r"other proportions.*: 1 \(spot/002_mask\.png\)"):
        _, reason = masks_or_reason(tests, SIZE, sizes)
    assert reason is None


def test_masks_with_black_and_white_exchanged_are_noticed(images, tmp_path):
    mvtec_ad(tmp_path, images | {"masks": [255 - mask for mask in images["masks"]]})
    with pytest.warns(UserWarning, match="mark 93% of the pixels of anomalous images: are black"):
        masks_or_reason(Category(tmp_path).test_images(), SIZE)


def test_visa_from_within(images, expected, tmp_path, monkeypatch):
    visa(tmp_path / "noise", images)
    monkeypatch.chdir(tmp_path / "noise")
    (category,) = find_categories(Path())
    assert marked(category) == expected
    assert len(training_paths(Path())) == 3


def test_visa_says_what_is_wrong_with_its_table(images, tmp_path):
    visa(tmp_path / "noise", images)
    table = tmp_path / "split_csv/1cls.csv"
    text = table.read_text()
    for bad, message in (
        (text.replace("label", "kind"), "must have the columns object,split,label,image,mask, got"),
        (text.replace("noise/Data", "../Data"), "which is not in"),
        (text.replace("noise,", "other,"), "no images of noise"),
        (text.replace("another", "anöther"), r"1cls\.csv is not a table in UTF-8"),
        (text + '"', r"1cls\.csv is not a table in UTF-8"),
    ):
        table.write_text(bad, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            Category(tmp_path / "noise").test_images()
    table.unlink()
    with pytest.raises(ValueError, match=r"1cls\.csv is missing"):
        training_paths(tmp_path / "noise")


def test_what_only_looks_like_kolektor_is_no_layout(images, tmp_path):
    for part in ("train", "test"):
        for name in ("._0.png", "._0_GT.png", "list.txt", "list_GT.txt"):
            write(tmp_path / part / "0.png", images["good"][0])
            (tmp_path / part / name).touch()
    assert matching_layouts(tmp_path) == []


def test_kolektor_leaves_out_what_no_mask_tells(images, tmp_path):
    kolektor_sdd2(tmp_path, images)
    (tmp_path / "test/20000_GT.png").unlink()
    (tmp_path / "test/20001_GT.png").write_text("no image")
    tests = Category(tmp_path).test_set()
    assert len(tests.images) == 4
    (tmp_path / "train/20000_GT.png").unlink()
    with pytest.warns(UserWarning, match=r"are good: 1 \(train/20000\.png\)"):
        assert len(training_paths(tmp_path)) == 2
    assert tests.remarks[0].endswith("are good: 2 (test/20000.png, test/20001.png)")


def test_folders_of_masks_are_no_kind_of_defect(images, expected, tmp_path, monkeypatch):
    for name, folder in (("a", "test/ground_truth/spot"), ("b", "test/spot/Masks")):
        mvtec_ad(tmp_path / name, images)
        (tmp_path / name / folder).parent.mkdir(exist_ok=True)
        shutil.move(tmp_path / name / "ground_truth/spot", tmp_path / name / folder)
        write(tmp_path / name / "test/good/masks/000.png", images["masks"][0])
        assert Category(tmp_path / name).test_set().remarks == []
        assert marked(Category(tmp_path / name)) == expected
    good, kinds = tmp_path / "b/test/good", tmp_path / "kinds"  # folders of one's own
    kinds.mkdir()
    shutil.move(tmp_path / "b/test/spot", kinds / "spot")
    for bad in (kinds, kinds / "spot"):
        assert marked(own_category(good, bad)) == expected
    monkeypatch.chdir(tmp_path)
    bad = kinds / "spot"
    (bad / "Masks").rename(bad / "marked")
    for folder in (bad / "marked", Path("kinds/spot/marked")):
        assert marked(own_category(good, bad, folder)) == expected
    for mask in (bad / "marked").iterdir():
        mask.rename(bad / mask.name)
    assert marked(own_category(good, bad, Path("kinds/spot"))) == expected


def test_a_folder_that_may_not_be_opened_is_an_image_that_cannot_be_read(
    images, tmp_path, monkeypatch
):
    mvtec_ad(tmp_path, images)
    scandir = os.scandir

    def refused(path):
        if path == tmp_path / "test/spot":
            raise PermissionError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    tests = own_category(tmp_path / "test/good", tmp_path / "test/spot").test_images()
    assert [image.path.name for image in tests if image.is_anomalous] == ["spot"]


@pytest.mark.parametrize("masks", ["folder", "beside"])
def test_folders_of_ones_own(masks, images, expected, tmp_path):
    for i in range(3):
        write(tmp_path / f"fine/{i}.png", images["train"][i])
        write(tmp_path / f"ok/{i}.png", images["good"][i])
        write(tmp_path / f"good/{i}.png", images["bad"][i])  # an odd name
        beside = tmp_path / f"good/{i}_mask.png"
        write(beside if masks == "beside" else tmp_path / f"m/{i}.PNG", images["masks"][i])
    category = own_category(
        tmp_path / "ok",
        tmp_path / "good",
        tmp_path / "m" if masks == "folder" else None,
        tmp_path / "fine",
    )
    assert marked(category) == expected
    assert contents(category.train_paths()) == of_arrays(images["train"])
    assert category.validation_paths() == []
    without = own_category(tmp_path / "ok", tmp_path / "good")
    with pytest.raises(ValueError, match="--train names one"):
        without.train_paths()
    for folders, message in (
        ({"masks": tmp_path / "none"}, "folder of masks images is not there"),
        ({"train": tmp_path / "ok"}, "trained on too"),
        ({"train": tmp_path}, "trained on too"),
        ({"normal": tmp_path / "good"}, "two folders"),
        ({"normal": tmp_path}, "neither of them in the other"),
        ({"anomalous": tmp_path}, "neither of them in the other"),
    ):
        with pytest.raises(ValueError, match=message):
            own_category(**{"normal": tmp_path / "ok", "anomalous": tmp_path / "good"} | folders)
    write(tmp_path / "good/line/Good/9.png", images["good"][0])
    with pytest.raises(ValueError, match=r"9\.png lies in a folder Good, but was given as anomal"):
        own_category(tmp_path / "ok", tmp_path / "good").test_set()
    (tmp_path / "none").mkdir()
    for folders in ((tmp_path / "none", tmp_path / "ok"), (tmp_path / "ok", tmp_path / "none")):
        with pytest.raises(ValueError, match="none holds no images"):
            own_category(*folders).test_set()


def test_a_mask_whose_image_is_missing_is_no_image(images, tmp_path):
    for name in ("ok/0.png", "bad/1.png", "bad/1_mask.png", "bad/2_mask.png", "bad/3_GT.png"):
        write(tmp_path / name, images["masks"][0])
    tests = own_category(tmp_path / "ok", tmp_path / "bad").test_set()
    assert [image.path.name for image in tests.images] == ["1.png", "3_GT.png", "0.png"]
    assert tests.remarks[0] == "masks that match no test image: 1 of 2 (bad/2_mask.png)"
