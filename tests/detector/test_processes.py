"""Detectors in other processes: pickled, copied, forked, sent to workers. Also a script."""

import copy
import io
import multiprocessing
import os
import pickle
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from backbones import Plain
from conftest import texture
from patchsvdd_fast import NormalBank, PatchLevel, PatchSVDD
from patchsvdd_fast.encoders.backbone import BackboneEncoder
from patchsvdd_fast.ops import _native, backends
from patchsvdd_fast.search.identified import IdentifiedBank
from patchsvdd_fast.search.neighbors import ExactKNeighborsTransformer
from processes import run_script

MODEL, IMAGES = "model.safetensors", "images.npy"
OTHERS = ["threads", "stream", "workers", "spawn", "forkserver"]
SECONDS = 120  # of a script; a child that hangs would take longer


def make_model(folder):
    """Write a model and images; returns the detector that was fitted."""
    rng = np.random.default_rng(0)
    images = np.stack([texture(rng, 128) for _ in range(4)])
    detector = PatchSVDD(
        image_size=128, levels=(PatchLevel(64, 32), PatchLevel(32, 16)), device="cpu"
    )
    detector.fit(images[:3], encoder=detector.untrained_encoder())
    detector.save(folder / MODEL)
    np.save(folder / IMAGES, images)
    return detector


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    make_model(made)
    return made


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_joblib(value):
    file = io.BytesIO()
    joblib.dump(value, file)
    file.seek(0)
    return joblib.load(file)


WAYS = (through_pickle, through_torch, through_joblib, copy.deepcopy)


@pytest.mark.parametrize("way", WAYS)
def test_detectors_are_copied_whole(folder, tmp_path, way):
    images = np.load(folder / IMAGES)
    detector = PatchSVDD.load(folder / MODEL, "cpu")
    copied = way(detector)
    assert torch.equal(copied.score(images).image_scores, detector.score(images).image_scores)
    assert copied.threshold_ == detector.threshold_
    for made in (copied, detector):
        made.save(tmp_path / f"{made is copied}")
    assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()
    (result,) = copied.score_stream(images[3:])
    region = copied.highest_place(result)
    assert copied.match_picture(region).tobytes() == detector.match_picture(region).tobytes()
    changed = copied.add(images[3:])
    assert (changed.num_images, detector.num_images) == (4, 3)


def test_fitted_detectors_are_copied(tmp_path):
    detector = make_model(tmp_path)
    images = np.load(tmp_path / IMAGES)
    for way in WAYS:
        assert torch.equal(
            way(detector).score(images).anomaly_map, detector.score(images).anomaly_map
        )


@pytest.mark.parametrize("way", WAYS)
def test_public_objects_are_copied(folder, tmp_path, way):
    detector = PatchSVDD.load(folder / MODEL, "cpu")
    images = np.load(folder / IMAGES)
    score = detector.score(images)
    assert torch.equal(way(score).anomaly_map, score.anomaly_map)
    result = next(detector.score_stream(images))
    assert torch.equal(way(result).scores.anomaly_map, result.scores.anomaly_map)
    region = detector.highest_place(result)
    assert way(region) == region
    for value in (
        detector.load_images(images),
        detector.calibration_,
        detector.gallery_,
        detector.record_,
        detector.levels_,
    ):
        assert type(way(value)) is type(value)
    embeddings = torch.rand(300, 8)
    bank = NormalBank(embeddings)
    bank.save(tmp_path / "bank")
    for made in (bank, NormalBank.open(tmp_path / "bank"), NormalBank(embeddings, clusters=4)):
        copied = way(made)
        assert torch.equal(
            copied.nearest(embeddings[:9] + 1)[1], bank.nearest(embeddings[:9] + 1)[1]
        )
    identified = IdentifiedBank(bank, torch.arange(300) + 7)
    assert int(way(identified).nearest(embeddings[:1])[1]) == 7
    neighbours = ExactKNeighborsTransformer(n_neighbors=3).fit(embeddings.numpy())
    assert (
        way(neighbours).transform(embeddings.numpy()).nnz
        == neighbours.transform(embeddings.numpy()).nnz
    )
    pixels = torch.rand(1, 3, 64, 64)
    backbone = BackboneEncoder(Plain())
    levels = backbone.default_levels
    (copied,), (made,) = way(backbone).dense(pixels, levels), backbone.dense(pixels, levels)
    assert torch.equal(copied, made)


def test_streams_are_not_copied(folder):
    detector = PatchSVDD.load(folder / MODEL, "cpu")
    with detector.score_stream(np.load(folder / IMAGES)) as stream:
        for way in WAYS:
            with pytest.raises(TypeError, match="a stream has threads and cannot be pickled"):
                way(stream)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_detector_scores_in_children(folder):
    done = run_script(__file__, folder, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["forked", "forked", "alone", *OTHERS]


# --- as a script ----------------------------------------------------------------------------------


class Scores:
    """A data set of image scores."""

    def __init__(self, detector, images):
        self.detector, self.images = detector, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.detector.score(self.images[number : number + 1]).image_scores[0]


def scores(detector, images):
    return detector.score(images).image_scores.tolist()


def in_a_fork(work):
    """Do the work in a child, which must not raise."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main(folder):
    torch.set_num_threads(2)
    images = np.load(f"{folder}/{IMAGES}")
    detector = PatchSVDD.load(f"{folder}/{MODEL}", "cpu")

    def same():
        assert np.allclose(scores(detector, images), expected, rtol=1e-4)

    in_a_fork(lambda: scores(detector, images))  # after loading alone
    print("forked")
    torch.rand(1 << 20).exp()  # the caller's own work starts threads, too
    expected = scores(detector, images)
    in_a_fork(same)
    same()
    print("forked")
    find, backends._loaded_openmp = backends._loaded_openmp, lambda: [_native.__file__]

    def alone():
        assert torch.get_num_threads() == 1
        same()

    in_a_fork(alone)  # where OpenMP's threads cannot be ended
    backends._loaded_openmp = find
    print("alone")

    with ThreadPoolExecutor(2) as pool:
        pool.submit(same).result()
        going_on = pool.submit(lambda: [same() for _ in range(9)])
        pool.submit(in_a_fork, same).result()  # of a thread, while another one searches
        going_on.result()
    print("threads")

    stream = detector.score_stream(image for image in [*images] * 3)
    next(stream)

    def read_on():
        with pytest.raises(RuntimeError, match="call score_stream in the child"):
            next(stream)
        stream.close()
        assert len(list(detector.score_stream(images))) == len(images)

    in_a_fork(read_on)
    assert len(list(stream)) == 3 * len(images) - 1
    print("stream")
    loader = DataLoader(
        Scores(detector, images), num_workers=1, multiprocessing_context="fork", timeout=60
    )
    assert np.allclose([float(score) for score in loader], expected, rtol=1e-4)
    print("workers")
    pools = {
        method: ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method))
        for method in ("spawn", "forkserver")
    }
    found = {method: pool.submit(scores, detector, images) for method, pool in pools.items()}
    for method, pool in pools.items():
        assert np.allclose(found[method].result(timeout=SECONDS), expected, rtol=1e-4)
        pool.shutdown()
        print(method)


if __name__ == "__main__":
    main(sys.argv[1])
