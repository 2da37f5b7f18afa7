"""The format of model files: what is refused, and what a killed or failed save leaves."""

import ast
import copy
import json
import os
import struct
from contextlib import nullcontext
from pathlib import Path

import pytest
import safetensors.torch
import torch

from conftest import ROOT
from forging import CHECKSUMS, HEADER, HUGE, packed
from patchsvdd_fast.files import store
from processes import run_script, status

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")


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


def test_changes_in_place_are_noticed(tmp_path):
    path, other = tmp_path / "model", tmp_path / "other"
    for made in (path, other):
        store.save(made, "bank", TENSORS, {"parameters": {}})
    store.save(path, "bank", TENSORS, {"parameters": {}})
    file = store.file_of(store.below(store.load(path)[0], "a"))
    file.check()
    os.utime(path, ns=(0, path.stat().st_mtime_ns))  # read, not written
    file.check()
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    for _ in range(2):
        with pytest.raises(OSError, match=r"model was changed in place .* open it again, and re"):
            file.check()
    file = store.file_of(store.load(path)[0])
    with path.open("ab") as longer:
        longer.write(b" ")
    for ask in (file.check, lambda: copy.deepcopy(file)):
        with pytest.raises(OSError, match="changed in place"):
            ask()
    file = store.file_of(store.load(other)[0])
    assert copy.deepcopy(file) is None
    store.save(other, "bank", {"a": TENSORS["a"]}, {"parameters": {}})
    file.check()  # another file now: the one that is mapped is as it was
    other.unlink()
    file.check()
    store.save(path, "bank", TENSORS, {"parameters": {}})
    file = store.file_of(store.load(path)[0])
    path.rename(tmp_path / "older")
    store.save(path, "bank", TENSORS, {"parameters": {}})
    file.check()
    (tmp_path / "older").write_bytes(b"")
    with pytest.raises(OSError, match="changed in place"):
        file.check()  # it is still the one that is mapped


def test_a_missing_file_is_named_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.model'"):
        store.load("nowhere.model")


@pytest.mark.parametrize("descriptor", ["closed", "another file's", "none left"])
def test_changes_are_noticed_without_the_descriptor(tmp_path, monkeypatch, descriptor):
    path = tmp_path / "model"
    store.save(path, "bank", TENSORS, {"parameters": {}})
    number = os.dup(0)
    os.close(number)  # the next that is opened
    if descriptor == "none left":
        monkeypatch.setattr(store, "_MOST_DESCRIPTORS", 0)
    file = store.MappedFile(path)
    if descriptor != "none left":
        os.close(number)  # as a daemon closes all that it inherits
    other = (tmp_path / "other").open("w") if descriptor == "another file's" else nullcontext()
    with other:
        file.check()
        path.write_bytes(b"")
        with pytest.raises(OSError, match="changed in place"):
            file.check()
        path.unlink()
        file.check()  # there is nothing left to ask
        del file  # closes no other's descriptor


@needs_proc
def test_files_are_closed_with_what_lies_in_them(tmp_path):
    store.save(tmp_path / "model", "bank", TENSORS, {"parameters": {}})
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    tensors, _ = store.load(tmp_path / "model")
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1  # noqa: PTH208
    del tensors
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
    assert store.file_of(TENSORS) is None


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
        (HEADER_OF_ONE | {"kind": "table"}, "holds a 'table', which this version does not know"),
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
        (raw_file({f"t{i}": ("U8", [0], b"") for i in range(9000)}), "9,000 tensors"),
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
    done = run_script("-c", KILLED, tmp_path / "model")
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
    done = run_script("-c", FULL, path)
    assert done.returncode == 0, done.stderr
    assert f"cannot write {path}" in done.stdout
    assert "large" in done.stdout
    assert torch.equal(store.load(path)[0]["a"], TENSORS["a"])
    assert list(tmp_path.iterdir()) == [path]


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


@pytest.mark.parametrize("schema", [2, 3])
def test_files_of_before_checksums_open(tmp_path, schema):
    path = tmp_path / "model"
    path.write_bytes(packed(TENSORS, HEADER_OF_ONE | {"schema_version": schema}, checksums=None))
    tensors, header = store.load(path)
    assert header["schema_version"] == schema
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
