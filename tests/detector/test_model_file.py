"""Model files: damaged, forged, half written, opened twice. As a script, it opens mutated files."""

import copy
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from conftest import script_environment, texture
from forging import HEADER, HUGE, packed
from patchsvdd_fast import NormalBank, PatchSVDD
from patchsvdd_fast.detector.encoder_file import load_encoder
from patchsvdd_fast.search.identified import IdentifiedBank
from processes import run_script, status

MODEL, CHECKPOINT, IMAGES = "model.safetensors", "model.checkpoint", "images.npy"


def make_model(folder):
    """A complete detector file of one clustered and one plain bank, a checkpoint, and images.

    The last of the images is one to score, the others are those of the training.
    """
    rng = np.random.default_rng(0)
    images = np.stack([texture(rng) for _ in range(5)])
    detector = PatchSVDD(image_size=96)
    detector.fit(images[:4], encoder=detector.untrained_encoder())
    small = next(level for level in detector.banks_ if level.size == 32)
    embeddings = detector.banks_[small].embeddings.view(4, *small.grid_shape(96, 96), -1)
    detector.banks_[small] = NormalBank(embeddings, clusters=20)
    detector.save(folder / MODEL)
    np.save(folder / IMAGES, images)
    with pytest.raises(KeyboardInterrupt):
        train(images[:4], folder / CHECKPOINT, on_step=interrupt)


def train(images, checkpoint, **options):
    """A training run of two steps."""
    detector = PatchSVDD(image_size=96, steps=2, batch_size=2, embedding_dim=8, device="cpu")
    return detector.fit(images, checkpoint=checkpoint, **options)


def interrupt(step):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    make_model(made)
    return made


@pytest.fixture
def model(folder):
    return folder / MODEL


def answers(path, folder):
    """All that a file decides: of one image what is found, and the threshold.

    Of a checkpoint, the weights in it and those after another step.
    """
    *training, new = np.load(folder / IMAGES)
    if path.suffix == Path(CHECKPOINT).suffix:
        encoder = load_encoder(path)
        resumed = train(training, path, resume=True).encoder_
        return [*encoder.state_dict().values(), *resumed.state_dict().values()]
    detector = PatchSVDD.load(path)
    result = detector.score([new])
    found = [*result.distances.values(), *result.bank_rows.values(), result.anomaly_map]
    return [*found, torch.tensor(detector.threshold_)]


# --- mutants --------------------------------------------------------------------------------------


def damaged(whole, rng):
    """The bytes of a file after an accident. Half of the accidents happen to the header."""
    end_of_header = 8 + struct.unpack("<Q", whole[:8])[0]
    first = rng.randrange(end_of_header if rng.random() < 0.5 else len(whole))
    length = min(rng.choice((1, 2, 8, 100, 5000)), len(whole) - first)
    cut = whole[first : first + length]
    noise = rng.randbytes(length)
    return rng.choice(
        (
            lambda: (
                whole[:first] + bytes([whole[first] ^ 1 << rng.randrange(8)]) + whole[first + 1 :]
            ),
            lambda: whole[:first] + noise + whole[first + length :],
            lambda: whole[:first] + bytes(length) + whole[first + length :],
            lambda: whole[:first],
            lambda: whole[:first] + whole[first + length :],
            lambda: whole[:first] + noise + whole[first:],
            lambda: whole[:first] + cut + whole[first:],
            lambda: whole + noise,
            lambda: cut + whole[length:],
            lambda: struct.pack("<Q", end_of_header - 8 + rng.randint(-9, 9)) + whole[8:],
        )
    )()


def forged(whole, rng):
    """The bytes of a file after someone has changed it and computed the checksums anew."""
    tensors, size = safetensors.torch.load(whole), struct.unpack("<Q", whole[:8])[0]
    header = json.loads(json.loads(whole[8 : 8 + size])["__metadata__"][HEADER])
    for _ in range(rng.choice((1, 1, 2, 4))):
        if rng.random() < 0.25:
            forge_header(header, rng)
        else:
            forge_tensor(tensors, rng)
    return packed(tensors, header)


HOSTILE_VALUES = (
    *(0, 1, -1, 2, 15, 16, 17, 127, -128, 4096, 2**31 - 1, -(2**31), 2**32, 2**62, HUGE),
    *(-HUGE, 0.5, 1e-45, 1e16, 1e18, -1e18, 3e38, float("inf"), -float("inf"), float("nan")),
)


def forge_tensor(tensors, rng):
    # The arrays of the clustered bank steer the search, so they get half of the attention.
    steering = [name for name in tensors if name.startswith("bank.K32.")] or list(tensors)
    name = rng.choice(steering if rng.random() < 0.5 else list(tensors))
    other = rng.choice(steering if name in steering else list(tensors))
    tensor = tensors[name].contiguous().clone()
    flat = tensor.view(-1)

    def with_values():
        for _ in range(rng.choice((1, 1, 3, 20))):
            value = rng.choice(HOSTILE_VALUES)
            if not tensor.is_floating_point():
                limits = torch.iinfo(tensor.dtype)
                value = 0 if math.isnan(value) else int(min(max(value, limits.min), limits.max))
            if len(flat):
                flat[rng.randrange(len(flat))] = value
        return tensor

    def with_noise():
        number_of_bytes = flat.view(torch.uint8)
        for _ in range(rng.choice((1, 1, 10))):
            if len(number_of_bytes):
                number_of_bytes[rng.randrange(len(number_of_bytes))] = rng.randrange(256)
        return tensor

    def with_its_own():
        for _ in range(rng.choice((1, 3, 20)) if len(flat) else 0):
            flat[rng.randrange(len(flat))] = flat[rng.randrange(len(flat))].clone()
        return tensor

    dtypes = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int8)
    tensors[name] = rng.choice(
        (
            with_values,
            with_values,
            with_values,
            with_noise,
            with_noise,
            with_its_own,
            with_its_own,
            lambda: flat,
            flat[:1].sum,  # of no dimension
            lambda: tensor[None],
            lambda: tensor[..., None],
            lambda: tensor[..., :0] if tensor.ndim else tensor,
            lambda: flat[:0],
            lambda: flat[:-1],
            lambda: tensor[:-1] if tensor.ndim else tensor,
            lambda: torch.cat([tensor, tensor]) if tensor.ndim else tensor,
            lambda: tensor.mT if tensor.ndim > 1 else tensor.flip(0) if tensor.ndim else tensor,
            lambda: tensor.to(rng.choice(dtypes)),
            lambda: flat.view(torch.uint8),
            lambda: tensors[other],
            lambda: flat[torch.randperm(len(flat))].view(tensor.shape),
            lambda: flat.sort().values.view(tensor.shape),
        )
    )()
    if rng.random() < 0.1:
        del tensors[other]


def forge_header(header, rng):
    parent = header
    key = rng.choice(sorted(parent))
    while isinstance(parent[key], dict | list) and len(parent[key]) and rng.random() < 0.8:
        parent = parent[key]
        key = rng.choice(sorted(parent) if isinstance(parent, dict) else range(len(parent)))
    if rng.random() < 0.2:
        del parent[key]
        return
    others = (
        *HOSTILE_VALUES,
        None,
        True,
        "",
        "K32",
        "cpu",
        [],
        {},
        [[]],
        [None],
        {"a": 1},
        10**300,
    )
    parent[key] = rng.choice((*others, [96, 96], [[32, 4]], [[64, 16], [32, 4], [2**40, 2]]))


def open_mutants(folder, name, is_forged, first, count):
    """Open and score with mutants of a file; prints their numbers, then the outcomes as JSON.

    For a process of its own: it may crash, and its memory is limited.
    """
    whole = (folder / name).read_bytes()
    mutant = (folder / f"mutant-{os.getpid()}").with_suffix(Path(name).suffix)
    mutant.write_bytes(whole)
    expected = answers(mutant, folder)
    before = status("VmHWM")
    limit = status("VmSize") + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcomes = Counter()
    for number in range(first, first + count):
        print(number, flush=True)
        rng = random.Random(number)
        torch.manual_seed(number)
        mutant.unlink(missing_ok=True)  # a new file: the old one may still be mapped
        mutant.write_bytes((forged if is_forged else damaged)(whole, rng))
        try:
            found = answers(mutant, folder)
        except (ValueError, OSError, FloatingPointError) as error:
            outcomes["refused"] += 1
            assert "allocate" not in str(error), error
            continue
        equal = all(map(torch.equal, found, expected))
        outcomes["equal" if equal else "different"] += 1
        assert equal or is_forged, "damage went unnoticed"
    mutant.unlink()
    print(json.dumps(dict(outcomes) | {"grown": status("VmHWM") - before}))


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")


@needs_proc
@pytest.mark.parametrize("is_forged", [False, True])
@pytest.mark.parametrize(("name", "few", "many"), [(MODEL, 200, 4000), (CHECKPOINT, 50, 1000)])
def test_mutants_are_refused_or_harmless(folder, name, few, many, is_forged, request):
    count = many if request.config.getoption("--slow") else few
    done = run_script(__file__, folder, name, int(is_forged), 0, count)
    *_, last = done.stdout.splitlines()
    assert done.returncode == 0, f"mutant {last}: {done.stderr[-3000:]}"
    outcomes = json.loads(last)
    assert outcomes["grown"] < 2**28
    assert outcomes["refused"] > count // 3
    if is_forged:
        searched = outcomes.get("equal", 0) + outcomes.get("different", 0)
        assert searched > count // 10


# --- saving and opening ---------------------------------------------------------------------------


def test_two_processes_score_with_one_file(folder, model):
    code = (
        "import sys, hashlib, test_model_file as t; from pathlib import Path\n"
        "found = t.answers(Path(sys.argv[1]), Path(sys.argv[1]).parent)\n"
        "print(t.digest(found))"
    )
    command = [sys.executable, "-c", code, str(model)]
    environment = script_environment(Path(__file__).parent)
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    printed = [process.communicate()[0].decode().strip() for process in both]
    assert printed == [digest(answers(model, folder))] * 2


def test_a_file_written_into_while_it_is_open_is_noticed(folder, tmp_path):
    *training, new = np.load(folder / IMAGES)
    path = tmp_path / MODEL
    path.write_bytes((folder / MODEL).read_bytes())
    detector = PatchSVDD.load(path, "cpu")
    detector.save(path)  # in its own place, as another file
    before = detector.score([new]).image_scores
    detector = PatchSVDD.load(path, "cpu")
    taken_out = copy.deepcopy(detector)
    refitted, merged = (detector.refit([new[::-1], new[:, ::-1]]) for _ in range(2))
    merged.merge(detector)
    stream = detector.score_stream(itertools.repeat(new))
    result = next(stream)
    other = PatchSVDD(image_size=96).fit(training[:3], encoder=detector.encoder_)
    other.save(tmp_path / "other")
    with path.open("r+b") as file:  # as `cp` does, but for cutting it short first
        file.write((tmp_path / "other").read_bytes())
    for ask in (
        lambda: detector.score([new]),
        lambda: detector.predict([new]),
        lambda: detector.threshold_,
        lambda: detector.explain(result),
        lambda: detector.save(tmp_path / "again"),
        lambda: detector.add([new]),
        lambda: detector.encode(detector.load_images([new]).pixels),
        lambda: copy.deepcopy(detector),  # which could not notice it any more
        lambda: pickle.dumps(detector),
        lambda: pickle.dumps(next(iter(detector.banks_.values()))),
        lambda: next(iter(detector.banks_.values())).nearest(torch.zeros(1, 64)),
        lambda: list(itertools.islice(stream, 99)),
    ):
        with pytest.raises(OSError, match="was changed in place while it was open"):
            ask()
    assert repr(detector) == repr(taken_out)
    refitted.merge(taken_out)
    assert refitted.gallery_.pictures == merged.gallery_.pictures
    assert torch.equal(refitted.score([new]).image_scores, merged.score([new]).image_scores)
    assert torch.equal(taken_out.score([new]).image_scores, before)
    with pytest.raises(ValueError, match="damaged"):  # for the old file was longer
        PatchSVDD.load(path, "cpu")
    path.write_bytes((tmp_path / "other").read_bytes())
    assert torch.equal(
        PatchSVDD.load(path, "cpu").score([new]).image_scores, other.score([new]).image_scores
    )


@pytest.mark.parametrize("kind", [NormalBank, IdentifiedBank])
def test_a_bank_written_into_while_it_is_open_is_noticed(tmp_path, kind):
    path, rows = tmp_path / "bank", torch.rand(50, 4)
    bank = (
        NormalBank(rows)
        if kind is NormalBank
        else IdentifiedBank(NormalBank(rows), torch.arange(50))
    )
    bank.save(path)
    bank = kind.open(path)
    assert bank.nearest(rows[:1])[1] == 0
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    for ask in (
        lambda: bank.nearest(rows),
        lambda: bank.within(rows, 1),
        bank.state_dict,
    ):
        with pytest.raises(OSError, match="was changed in place while it was open"):
            ask()


def digest(tensors):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


if __name__ == "__main__":
    where, name, is_forged, *numbers = sys.argv[1:]
    try:
        open_mutants(Path(where), name, bool(int(is_forged)), *map(int, numbers))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
