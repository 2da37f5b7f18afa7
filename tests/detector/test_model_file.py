"""Model files: damaged, forged, half written, read by two. Run as a script, it opens mutants."""

import ast
import hashlib
import json
import math
import os
import platform
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

from conftest import ROOT, script_environment, texture
from patchsvdd_fast import NormalBank, PatchSVDD
from patchsvdd_fast.detector.model_file import load_encoder
from patchsvdd_fast.files import store
from patchsvdd_fast.files.whole import remove_leftovers, written_whole
from patchsvdd_fast.ops.cpu_bank import MOST_CLUSTERS

HUGE = 2**63 - 1
HEADER, CHECKSUMS = "patchsvdd_fast", "checksums"  # in the metadata
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


def packed(tensors, header, **changed):
    """A file's bytes with checksums that fit, whatever it holds; `changed` metadata, None: gone."""
    text = header if isinstance(header, str) else json.dumps(header)
    apart = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    sums = json.dumps(store._checksums(text, apart))
    metadata = {HEADER: text, CHECKSUMS: sums} | changed
    kept = {key: value for key, value in metadata.items() if value is not None}
    return safetensors.torch.save(apart, metadata=kept)


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


def status(field):
    """A figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def run(*command, **options):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env=script_environment(OMP_NUM_THREADS="1"),
        **options,
    )


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")


@needs_proc
@pytest.mark.parametrize("is_forged", [False, True])
@pytest.mark.parametrize(("name", "few", "many"), [(MODEL, 200, 4000), (CHECKPOINT, 50, 1000)])
def test_mutants_are_refused_or_harmless(folder, name, few, many, is_forged, request):
    count = many if request.config.getoption("--slow") else few
    done = run(__file__, folder, name, int(is_forged), 0, count)
    *_, last = done.stdout.splitlines()
    assert done.returncode == 0, f"mutant {last}: {done.stderr[-3000:]}"
    outcomes = json.loads(last)
    assert outcomes["grown"] < 2**28
    assert outcomes["refused"] > count // 3
    if is_forged:
        searched = outcomes.get("equal", 0) + outcomes.get("different", 0)
        assert searched > count // 10


# --- what exactly is refused ----------------------------------------------------------------------


TENSORS = {"a": torch.arange(6.0), "b": torch.arange(6.0) + 1, "c": torch.arange(3)}


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"a": TENSORS["a"] + 1e-6}, "tensor a"),
        ({"a": TENSORS["a"].view(2, 3)}, "tensor a"),
        ({"a": TENSORS["a"].view(torch.int32)}, "tensor a"),
        ({"a": TENSORS["b"], "b": TENSORS["a"]}, "tensor a"),
        ({"d": torch.zeros(1)}, "tensor d"),
        ({"c": None}, "tensor c"),
    ],
)
def test_every_change_shows_in_a_checksum(tmp_path, changed, complaint):
    path = tmp_path / "model"
    store.save(path, "detector", TENSORS, {"parameters": {}})
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    kept = {k: v.clone() for k, v in (TENSORS | changed).items() if v is not None}
    safetensors.torch.save_file(kept, path, metadata=metadata)
    with pytest.raises(ValueError, match=f"model is damaged: the checksum of {complaint}"):
        store.load(path)


HEADER_OF_ONE = {"kind": "detector", "schema_version": store.SCHEMA_VERSION, "parameters": {}}


def test_header_and_checksums_are_checked(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(packed(TENSORS, HEADER_OF_ONE))
    assert store.load(path)[1] == HEADER_OF_ONE
    other = json.dumps(HEADER_OF_ONE | {"parameters": {"seed": 1}})
    sums = json.dumps(store._checksums(other, TENSORS))
    for changed, complaint in [
        ({HEADER: other}, "the checksum of the header does not match"),
        ({HEADER: other.replace("4", "3")}, "the checksum of the header does not match"),
        ({CHECKSUMS: None}, "its checksums are missing"),
        ({CHECKSUMS: "[]"}, "not what it should be"),
        ({CHECKSUMS: "{}"}, "the checksum of"),
        ({CHECKSUMS: sums[:-1]}, "Expecting"),
    ]:
        path.write_bytes(packed(TENSORS, HEADER_OF_ONE, **changed))
        with pytest.raises(ValueError, match=f"model is damaged.*{complaint}"):
            store.load(path)


@pytest.mark.parametrize("schema", [2, 3])
def test_files_of_before_checksums_open(tmp_path, schema):
    path = tmp_path / "model"
    path.write_bytes(packed(TENSORS, HEADER_OF_ONE | {"schema_version": schema}, checksums=None))
    tensors, header = store.load(path)
    assert header["schema_version"] == schema
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property"),
        ("[" * 100_000, "recursion"),
        ("1" * 10_000, "digits"),
        ("[]", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ('"kind"', "must be a JSON object"),
        ({}, "kind must be of type str, got None"),
        (HEADER_OF_ONE | {"kind": 1}, "kind must be of type str, got 1"),
        (HEADER_OF_ONE | {"kind": "bank"}, "kind must be one of"),
        (HEADER_OF_ONE | {"schema_version": "4"}, "schema_version must be of type int"),
        (HEADER_OF_ONE | {"schema_version": True}, "schema_version must be of type int"),
        (HEADER_OF_ONE | {"schema_version": 4.0}, "schema_version must be of type int"),
        (HEADER_OF_ONE | {"schema_version": 1}, "development version"),
        (HEADER_OF_ONE | {"schema_version": -(10**30)}, "development version"),
        (HEADER_OF_ONE | {"schema_version": 10**30}, "newer patchsvdd_fast"),
        (HEADER_OF_ONE | {"parameters": []}, "parameters must be of type dict"),
    ],
)
def test_headers_that_are_none(tmp_path, header, complaint):
    path = tmp_path / "some.model"
    path.write_bytes(packed(TENSORS, header))
    with pytest.raises(ValueError, match=rf"some.model (?s:.)*{complaint}"):
        store.load(path)


def raw_file(tensors, padding=0):
    """A safetensors file as no writer makes it; tensors: name -> (dtype, shape, bytes)."""
    described, end = {"__metadata__": {HEADER: json.dumps(HEADER_OF_ONE)}}, 0
    for name, (dtype, shape, values) in tensors.items():
        offsets = [end, end + len(values)]
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8 + padding)
    return struct.pack("<Q", len(text)) + text + b"".join(v for *_, v in tensors.values())


@pytest.mark.parametrize(
    ("contents", "complaint"),
    [
        (b"", "header too small"),
        (b"\x07\0\0", "header too small"),
        (b"1234567", "a header of"),
        (struct.pack("<Q", HUGE) + b"{}", "a header of 9,223,372,036,854,775,807 bytes"),
        (struct.pack("<Q", 2**23) + b" " * 2**23, "a header of 8,388,608 bytes"),
        (raw_file({f"t{i}": ("U8", [0], b"") for i in range(5000)}), "5000 tensors"),
        (raw_file({"a": ("F32", [1], b"1234")}, padding=1), "a is torch.float32, or not aligned"),
        (raw_file({"a": ("U8", [1], b"1"), "b": ("I64", [1], bytes(8))}), "b is torch.int64, or"),
        (raw_file({"a": ("BOOL", [1], b"\x07")}), "a is torch.bool, or not aligned"),
        (raw_file({"a": ("F8_E4M3", [1], b"1")}), "a is torch.float8_e4m3fn"),
        (raw_file({"a": ("F32", [0, 2**64 - 1], b"")}), "damaged"),
        (raw_file({"a": ("F32", [2**62, 2**62], b"1234")}), "damaged"),
        (raw_file({"a": ("F32", [2], b"1234")}), "damaged"),
        (raw_file({"a": ("F32", [1], b"1234")}) + b"more", "damaged"),
    ],
)
def test_files_that_are_none(tmp_path, contents, complaint):
    path = tmp_path / "some.model"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=f"some.model is .*{complaint}"):
        store.load(path)


# --- banks that would lead a search astray --------------------------------------------------------


@pytest.fixture(scope="module")
def bank_state():
    """A clustered bank that projects, and whose clusters do not fill their last blocks."""
    generator = torch.Generator().manual_seed(1)
    few_axes = torch.randn(3, 200, 6, generator=generator) @ torch.randn(6, 40, generator=generator)
    bank = NormalBank(few_axes.flatten(0, 1), clusters=3)
    state = bank.state_dict()
    assert state["basis"].shape == (40, 16)
    assert len(state["starts"]) == 4
    return state


def with_value(name, index, value):
    def change(state):
        changed = state[name].clone()
        changed.view(-1)[index] = value
        return {name: changed}

    return change


def wrapping_starts(state):
    """Sizes that are all positive and add up to the rows, but for 2^64."""
    rows = len(state["ids"])
    starts = torch.tensor([0, HUGE, -17, rows])
    blocks = torch.cat([torch.zeros(1, dtype=torch.int64), ((starts.diff() + 15) // 16).cumsum(0)])
    assert (starts.diff() > 0).all()
    kept = int(blocks[-1])
    return {
        "starts": starts,
        "blocks": blocks,
        "codes": state["codes"][:kept],
        "bias": state["bias"][: 16 * kept],
        "block_radius": state["block_radius"][:kept].sort().values,
    }


def of_clusters(count):
    """A bank of one row in each cluster."""
    state = NormalBank(torch.rand(8, 20), clusters=1).state_dict()
    each = torch.arange(count + 1)
    return {
        "data": torch.rand(count, 20),
        "groups": each[:-1],
        "ids": each[:-1],
        "starts": each,
        "blocks": each,
        "codes": state["codes"][:1].repeat(count, 1, 1, 1) * 0,
        "bias": torch.tensor([0, *[2**31 - 1] * 15], dtype=torch.int32).repeat(count),
        "block_radius": torch.zeros(count),
        "mean": state["mean"],
        "basis": state["basis"],
        "centroids": state["centroids"][:1].repeat(count, 1),
        **{n: state[n][:1].repeat(count) for n in ("scales", "slack", "code_slack", "reach")},
    }


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (wrapping_starts, "do not cover"),
        (with_value("starts", 1, 0), "do not cover"),
        (with_value("starts", 1, HUGE), "do not cover"),
        (with_value("blocks", 1, -HUGE), "do not cover"),
        (with_value("ids", 0, -1), "do not cover"),
        (with_value("ids", 0, HUGE), "do not cover"),
        (lambda s: {"block_radius": s["block_radius"][:, None][:, :0]}, "must have shape"),
        (lambda s: {"block_radius": s["block_radius"][0]}, "must have shape"),
        (lambda s: {"basis": s["basis"][0, 0]}, "must have shape"),
        # All queries near (1, 1, ...) would be nearest to what fills up the last tile of centroids.
        (lambda s: {"basis": torch.full_like(s["basis"], 1e18)}, "basis must be orthonormal"),
        (with_value("basis", 5, torch.nan), "basis must be orthonormal"),
        (with_value("mean", 0, torch.inf), "mean must be in"),
        (with_value("centroids", 3, torch.nan), "do not cover"),
        (with_value("centroids", 3, 1e18), "do not cover"),
        (with_value("scales", 0, 0.0), "scales must be in"),
        (with_value("scales", 0, torch.nan), "scales must be in"),
        (with_value("slack", 0, -1.0), "slack must be in"),
        (with_value("code_slack", 0, torch.inf), "code_slack must be in"),
        (with_value("reach", 0, torch.nan), "reach must be in"),
        (with_value("block_radius", 0, torch.nan), "block_radius must be in"),
        (with_value("block_radius", 0, 1e9), "must not fall within a cluster"),
        (with_value("bias", 0, -(2**31)), "bias does not fit"),
        (with_value("bias", 0, 2**31 - 1), "bias does not fit"),
        (with_value("bias", -1, 0), "bias does not fit"),
        (with_value("codes", -1, 1), "bias does not fit"),
        (with_value("data", 77, torch.nan), "data must be finite"),
        (with_value("stretch", 0, torch.nan), "stretch"),
        (lambda s: {"stretch": s["stretch"].repeat(2)}, "stretch"),
        (
            lambda s: {"clustered_rows": s["clustered_rows"].double()},
            "clustered_rows must be int64",
        ),
        (lambda s: {"grid": torch.tensor([0, 1])}, "grid at least 1 x 1"),
        (lambda s: {"grid": torch.tensor([-1, -1])}, "grid at least 1 x 1"),
        (lambda s: {"grid": torch.tensor([2**32, 2**32])}, "600 groups cannot have 600 rows"),
        (lambda s: {"grid": torch.tensor(1)}, r"grid must be int64 \[2\]"),
        (lambda s: {"grid": torch.ones(2)}, r"grid must be int64 \[2\]"),
        (lambda s: {"settings": torch.ones(3).long()}, r"settings must be int64 \[2\]"),
        (lambda s: {"groups": s["groups"].int()}, "groups must be int64"),
        (lambda s: {"groups": s["groups"][:, None]}, "groups must be int64"),
        (lambda s: {"groups": s["groups"][:0]}, "0 groups cannot have 600 rows"),
        (lambda s: {"data": s["data"].double()}, "data must have shape"),
        (lambda s: {"data": s["data"][:, :0]}, "data must have shape"),
        (lambda s: {"data": s["data"][0, 0]}, "data must have shape"),
        (lambda _: of_clusters(MOST_CLUSTERS + 1), "cannot have 4097 clusters"),
    ],
)
def test_banks_that_would_lead_astray(bank_state, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        NormalBank.from_state_dict(bank_state | change(bank_state))


def test_as_many_clusters_as_are_allowed(bank_state):
    opened = NormalBank.from_state_dict(bank_state | of_clusters(MOST_CLUSTERS))
    assert opened.num_clusters == MOST_CLUSTERS
    assert opened.nearest(torch.rand(3, 20))[1].shape == (3,)


def test_a_bank_that_is_not_aligned_is_refused(bank_state):
    shifted = torch.empty(8 * 4 + 1, dtype=torch.uint8)[1:].view(torch.uint8)
    starts = torch.frombuffer(shifted.numpy(), dtype=torch.int64, count=4).copy_(
        bank_state["starts"]
    )
    assert starts.data_ptr() % 8
    with pytest.raises(ValueError, match="starts must be aligned"):
        NormalBank.from_state_dict(bank_state | {"starts": starts})


def test_a_bank_as_it_should_be(bank_state):
    opened = NormalBank.from_state_dict(bank_state)
    queries = torch.randn(30, 40)
    expected = NormalBank(opened.embeddings, clusters=0).nearest(queries)
    assert all(map(torch.equal, opened.nearest(queries), expected))


# --- saving and opening ---------------------------------------------------------------------------


@needs_proc
def test_an_opened_file_is_mapped_not_copied(tmp_path):
    path = tmp_path / "model"
    store.save(path, "detector", {"a": torch.ones(1 << 24)}, {"parameters": {}})
    before = status("RssAnon")
    tensors, _ = store.load(path)
    assert status("RssAnon") - before < 2**23  # of 2^26 bytes
    address, mapped = tensors["a"].data_ptr(), []
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        mapped += [line] if first <= address < last else []
    assert str(path) in mapped[0]


def test_two_processes_score_with_one_file(folder, model):
    code = (
        "import sys, hashlib, test_model_file as t; from pathlib import Path\n"
        "found = t.answers(Path(sys.argv[1]), Path(sys.argv[1]).parent)\n"
        "print(t.digest(found))"
    )
    command = [sys.executable, "-c", code, str(model)]
    path = os.pathsep.join(
        [
            str(ROOT),
            str(Path(__file__).parent),
            str(ROOT / "tests"),
            os.environ.get("PYTHONPATH", ""),
        ]
    )
    environment = os.environ | {"PYTHONPATH": path}
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    printed = [process.communicate()[0].decode().strip() for process in both]
    assert printed == [digest(answers(model, folder))] * 2


def digest(tensors):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from patchsvdd_fast.files import store

path = Path(sys.argv[1])
models = [{"a": torch.full((1 << 21,), value)} for value in (0.0, 1.0)]
store.save(path, "checkpoint", models[0], {"parameters": {}})
left, pause = 0, random.Random(0)
for _ in range(10):
    child = os.fork()
    while child == 0:
        for model in models:
            store.save(path, "checkpoint", model, {"parameters": {}})
    time.sleep(pause.uniform(0.01, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left += sum(".partial" in file.name for file in path.parent.iterdir())
    tensors, _ = store.load(path)
    assert any(torch.equal(tensors["a"], model["a"]) for model in models)
store.save(path, "checkpoint", models[0], {"parameters": {}})
print(left)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_saving_may_be_killed_at_any_moment(tmp_path):
    done = run("-c", KILLED, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1  # of the ten, some were killed while writing
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


FULL = """
import resource, signal, sys
import torch
from patchsvdd_fast.files import store

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.save(sys.argv[1], "checkpoint", {"a": torch.ones(1 << 20)}, {"parameters": {}})
except OSError as error:
    print(error)
"""


def test_a_full_disk_is_an_error_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "model"
    store.save(path, "checkpoint", TENSORS, {"parameters": {}})
    done = run("-c", FULL, path)
    assert done.returncode == 0, done.stderr
    assert f"cannot write {path}" in done.stdout
    assert "large" in done.stdout
    assert torch.equal(store.load(path)[0]["a"], TENSORS["a"])
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_go_with_the_process_that_left_them(tmp_path):
    path = tmp_path / "a[b].model"
    ended = run("-c", "import os; print(os.getpid())").stdout.strip()
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


# --- nothing is executed --------------------------------------------------------------------------

RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}


@pytest.mark.parametrize(
    "source", sorted((ROOT / "patchsvdd_fast").rglob("*.py")), ids=lambda p: p.name
)
def test_no_module_runs_what_it_reads(source):
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            assert not RUNS_CODE & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in RUNS_CODE
        elif isinstance(node, ast.Call):
            called, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__"), called
            if called == "torch.load":
                assert ast.unparse(keywords["weights_only"]) == "True"
            if called in ("np.load", "numpy.load"):
                assert "allow_pickle" not in keywords


if __name__ == "__main__":
    where, name, is_forged, *numbers = sys.argv[1:]
    try:
        open_mutants(Path(where), name, bool(int(is_forged)), *map(int, numbers))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
