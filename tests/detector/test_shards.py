"""Models in shards: several processes fit, score and save with the bits of one process."""

import importlib
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import distributed

from backbones import Plain
from conftest import script_environment
from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.encoders.backbone import BackboneEncoder
from patchsvdd_fast.files.shards import SUFFIX, NewShards
from patchsvdd_fast.search.processes import ToldError, WorkerError
from patchsvdd_fast.search.sharded import ShardedBank

IMAGES, SIDE = 11, 64
SHARD_BYTES = 3 * 4 * 36 * 24  # three images of 36 patches, D = 24


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_have_the_bits_of_one(processes, tmp_path):
    """Runs each function below, whose name begins with `together_`, in several processes."""
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(processes), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=script_environment(
                Path(__file__).parent, Path(__file__).parents[1], OMP_NUM_THREADS="1"
            ),
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)
    names = [name for name in globals() if name.startswith("together_")]
    assert all(output.split() == names for output in outputs), outputs


def test_one_process_alone_fits_saves_and_opens_shards(tmp_path):
    whole, parts = fitted(), fitted(shard_bytes=SHARD_BYTES)
    (bank,) = parts.banks_.values()
    assert len(bank.parts) == 4
    assert_same_models(parts, whole)
    path = tmp_path / f"m{SUFFIX}"
    parts.save(path)
    opened = PatchSVDD.load(path, encoder=encoder())
    assert_same_models(opened, whole)
    assert_same_scores(opened.score(images(4, 5)), whole.score(images(4, 5)))
    first = next(tmp_path.glob("m-*-00001-of-00005.safetensors"))
    with pytest.raises(ValueError, match="is a part of a model: open its index, NAME"):
        PatchSVDD.load(first, encoder=encoder())


def test_what_shards_cannot_do_is_said(tmp_path):
    parts = fitted(shard_bytes=SHARD_BYTES)
    with pytest.raises(ValueError, match="banks lie in shards, which can be searched, but neither"):
        parts.add(images(2, 1))
    with pytest.raises(ValueError, match="banks lie in shards"):
        parts.remove([0])
    with pytest.raises(ValueError, match=r"must be called NAME\.safetensors\.index\.json"):
        parts.save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="would be a model in shards, which this one is not"):
        fitted().save(tmp_path / f"m{SUFFIX}")
    with pytest.raises(ValueError, match="shard_bytes must be at least 1, got 0"):
        fitted(shard_bytes=0)
    with pytest.raises(ValueError, match="a coreset is chosen from all patches"):
        fitted(coreset=0.5, shard_bytes=SHARD_BYTES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", ["index", "nothing"])
def test_what_an_index_names_stays_whoever_fails_then(after, tmp_path, monkeypatch):
    path, parts = tmp_path / f"m{SUFFIX}", fitted(shard_bytes=SHARD_BYTES)
    parts.save(path)
    before = sorted(tmp_path.iterdir())
    finish = NewShards.finish

    def failing(files, shards):
        if after == "nothing":
            raise OSError("cannot write it")
        finish(files, shards)
        raise WorkerError("another process has ended")  # as in the first one, asking the others

    monkeypatch.setattr(NewShards, "finish", failing)
    with pytest.raises((OSError, WorkerError)):
        parts.save(path)
    assert (sorted(tmp_path.iterdir()) == before) == (after == "nothing")
    assert_same_models(PatchSVDD.load(path, encoder=encoder()), parts)


# --- shared by all --------------------------------------------------------------------------------


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, SIDE, SIDE, generator=generator) * 255).byte()


def encoder(projection="none"):
    dim = None if projection == "none" else 10
    return BackboneEncoder(Plain(), name="plain", projection=projection, dim=dim)


def fitted(projection="none", shard_bytes=None, **parameters):
    detector = PatchSVDD(encoder=encoder(projection), image_size=None, device="cpu", **parameters)
    return detector.fit(images(IMAGES), shard_bytes=shard_bytes)


def assert_same_models(one, other):
    mine, theirs = one.calibration_.tensors(), other.calibration_.tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(one.mean_, other.mean_)
    assert torch.equal(one.light_, other.light_)
    assert one.gallery_.names == other.gallery_.names
    assert torch.equal(one.gallery_.statistics, other.gallery_.statistics)
    assert one.gallery_.pictures == other.gallery_.pictures
    for level, bank in other.banks_.items():
        assert len(one.banks_[level]) == len(bank)
        assert torch.equal(one.banks_[level].groups, bank.groups)


def assert_same_scores(one, other):
    assert torch.equal(one.anomaly_map, other.anomaly_map)
    assert torch.equal(one.image_scores, other.image_scores)
    assert all(torch.equal(one.matches[name], other.matches[name]) for name in one.matches)


# --- in each of several processes -----------------------------------------------------------------

CONFIGURATIONS = {
    "plain": {},
    "re-weighted": {"reweight": 3},
    "whitened, in matched light": {"projection": "whiten", "illumination": "matched"},
}


def together_fit_and_score(rank, processes, folder, wholes):
    for name, parameters in CONFIGURATIONS.items():
        whole, path = wholes[name], folder / f"{name}{SUFFIX}"
        parts = fitted(shard_bytes=SHARD_BYTES, **parameters)
        assert all(isinstance(bank, ShardedBank) for bank in parts.banks_.values())
        assert_same_models(parts, whole)
        own = images(5, 1)[rank::processes]
        assert_same_scores(parts.score(own), whole.score(own))
        parts.save(path)
        opened = PatchSVDD.load(path, encoder=encoder(parameters.get("projection", "none")))
        assert_same_models(opened, whole)
        own = images(9, 2)[: 9 // (1 + rank)]  # fewer in later processes
        with opened.score_stream(own) as stream:
            for result, expected in zip(stream, whole.score_stream(own), strict=True):
                assert_same_scores(result.scores, expected.scores)
                assert result.score == expected.score


def together_a_stream_ends_when_those_of_all_have(rank, processes, folder, wholes):
    parts = fitted(shard_bytes=SHARD_BYTES)
    own = list(images(40 if rank == 0 else 1, 3))
    groups = len(distributed.distributed_c10d._world.pg_map)
    assert len(list(parts.score_stream(own))) == len(own)
    assert len(distributed.distributed_c10d._world.pg_map) == groups  # that of the stream is gone


def together_some_have_no_images(rank, processes, folder, wholes):
    parts = fitted(shard_bytes=SHARD_BYTES)
    own = list(images(3, 3)) if rank == processes - 1 else []
    found = [result.score for result in parts.score_stream(own)]
    assert found == [result.score for result in wholes["plain"].score_stream(own)]


def together_without_shards_the_first_has_it(rank, processes, folder, wholes):
    for name, parameters in CONFIGURATIONS.items():
        alone = fitted(**parameters)
        if rank:
            assert not hasattr(alone, "banks_")
            continue
        assert_same_models(alone, wholes[name])
        (bank,), (expected,) = alone.banks_.values(), wholes[name].banks_.values()
        assert torch.equal(bank.embeddings, expected.embeddings)


def together_trained_encoders_are_alike(rank, processes, folder, wholes):
    def trained(shard_bytes):
        detector = PatchSVDD(
            **{"image_size": None, "levels": [(32, 16)], "embedding_dim": 8, "check_every": 0},
            **{"steps": 2, "batch_size": 4, "device": "cpu"},
        )
        return detector.fit(images(IMAGES), shard_bytes=shard_bytes)

    parts, alone = trained(SHARD_BYTES), trained(None)
    assert parts.record_.steps == 2
    if rank == 0:
        assert_same_models(parts, alone)


def together_a_stream_that_ends_early_ends_all(rank, processes, folder, wholes):
    parts = fitted(shard_bytes=SHARD_BYTES)
    if rank == 1:
        with parts.score_stream(images(200)) as stream:
            next(stream)
    else:
        with pytest.raises(WorkerError), parts.score_stream(images(200)) as stream:
            for _ in stream:
                pass
    assert len(list(parts.score_stream(images(2)))) == 2  # the next is not affected


def together_what_cannot_be_used_is_told_of_all_images(rank, processes, folder, wholes):
    def fit(paths, **options):
        detector = PatchSVDD(encoder=encoder(), image_size=None, device="cpu")
        return detector.fit(paths, shard_bytes=SHARD_BYTES, **options)

    paths = [folder / f"{number}.png" for number in range(7)]
    distributed.barrier()
    if rank == 0:
        for path, pixels in zip(paths, images(7), strict=True):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
        paths[5].write_text("no image")  # in the share of the last process
    distributed.barrier()
    kind = ToldError if rank else ValueError
    with pytest.raises(kind, match=r"1 of 7 images cannot be read.*5\.png"):
        fit(paths)
    with pytest.warns(UserWarning, match=r"left out 1 of 7 images.*5\.png"):
        parts = fit(paths, skip_unreadable=True)
    assert parts.num_images == 6
    distributed.barrier()
    if rank == 0:
        Image.new("RGB", (SIDE + 8, SIDE)).save(paths[6])
        Image.new("RGB", (SIDE + 8, SIDE)).save(paths[5])
        Image.new("RGB", (SIDE + 8, SIDE)).save(paths[4])
        if processes == 2:  # each of whose shares then has images of one size
            Image.new("RGB", (SIDE + 8, SIDE)).save(paths[3])
    distributed.barrier()
    with pytest.raises(kind, match=r"0\.png has 64x64 pixels, .*\.png has 72x64"):
        fit(paths)


def together_errors_are_those_of_all(rank, processes, folder, wholes):
    mine = images(IMAGES).float() / 255
    if rank == 1:
        mine[-1] = torch.nan  # in the share of the last process
    detector = PatchSVDD(encoder=encoder(), image_size=None, device="cpu")
    if processes == 2:
        kind = ValueError if rank == 1 else ToldError
        with pytest.raises(kind, match="NaN"):
            detector.fit(mine, shard_bytes=SHARD_BYTES)
    path = folder / f"plain{SUFFIX}"
    last = sorted(folder.glob("plain-*.safetensors"))[-1]
    distributed.barrier()
    if rank == 0:
        last.write_bytes(last.read_bytes()[:-1])
    distributed.barrier()
    kind = ValueError if rank == 0 else ToldError  # all see it, the first says it
    with pytest.raises(kind, match=r"is damaged, or not of the model .*bytes instead of"):
        PatchSVDD.load(path, encoder=encoder())


if __name__ == "__main__":
    rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    wholes = {name: fitted(**parameters) for name, parameters in CONFIGURATIONS.items()}
    # Adam imports this, which would then keep the group alive: see `joined_workers`.
    importlib.import_module("torch.distributed.nn")
    distributed.init_process_group(
        *("gloo", f"file://{folder / 'meeting'}"),
        timeout=timedelta(seconds=120),
        rank=rank,
        world_size=processes,
    )
    for name, function in list(globals().items()):
        if name.startswith("together_"):
            function(rank, processes, folder, wholes)
            print(name, flush=True)
    distributed.destroy_process_group()
