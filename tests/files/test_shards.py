"""Model files in shards: the index, and what is wrong with its files."""

import json
import platform
import subprocess

import pytest
import torch

from patchsvdd_fast.files.shards import SUFFIX, NewShards, fingerprint, first_file, read_index
from patchsvdd_fast.files.store import SCHEMA_VERSION


def written(path, value=1.0):
    """A model of three files, which hold this number."""
    files = NewShards(path, NewShards.new_word(), 3)
    kinds = ["sharded", "shard", "shard"]
    files.finish(
        [
            files.write(number, kind, {f"part.{number}": torch.full((5,), value)}, HEADER)
            for number, kind in enumerate(kinds, 1)
        ]
    )
    return files


HEADER = {"parameters": {}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / f"m{SUFFIX}"
    written(path)
    return path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_index_is_what_users_of_safetensors_know(path):
    from safetensors import safe_open

    index = json.loads(path.read_text())
    assert index["metadata"]["total_size"] == 3 * 5 * 4
    for name, file in index["weight_map"].items():
        with safe_open(path.with_name(file), framework="pt") as opened:
            assert torch.equal(opened.get_tensor(name), torch.ones(5))
    found = read_index(path)
    word = found.word
    assert found.names == tuple(f"m-{word}-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    tensors, header = found.load(2, "shard")
    assert torch.equal(tensors["part.3"], torch.ones(5))
    assert header["schema_version"] == SCHEMA_VERSION
    assert first_file(path) == path.with_name(found.names[0])
    assert first_file("m.safetensors").name == "m.safetensors"


def test_a_save_replaces_what_was_there(path, tmp_path):
    before = fingerprint(path)
    other = tmp_path / "m-other-00001-of-00002.safetensors"  # not of ours
    other.write_text("")
    killed = tmp_path / "m-0123abcd-00001-of-00009.safetensors"
    killed.write_text("left by a save that was killed")
    pid = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, check=True).stdout.decode()
    of_killed = f".m-0123abcd-00002-of-00009.safetensors.{platform.node()}.{pid.strip()}.partial"
    (tmp_path / of_killed).write_text("likewise, in the midst of a file")
    written(path, 2.0)
    found = read_index(path)
    assert names_in(tmp_path) == sorted([other.name, path.name, *found.names])
    assert torch.equal(found.load(0, "sharded")[0]["part.1"], torch.full((5,), 2.0))
    assert fingerprint(path) != before


def test_until_the_index_is_written_the_old_model_is_there(path, tmp_path, monkeypatch):
    before = names_in(tmp_path)
    files = NewShards(path, NewShards.new_word(), 3)
    files.write(1, "sharded", {"a": torch.ones(2)}, HEADER)
    assert len(names_in(tmp_path)) == len(before) + 1
    assert torch.equal(read_index(path).load(0, "sharded")[0]["part.1"], torch.ones(5))
    files.discard()
    assert names_in(tmp_path) == before


def test_of_two_saves_at_once_one_model_stays_whole(path, tmp_path):
    first, second = (NewShards(path, NewShards.new_word(), 2) for _ in range(2))
    parts = {
        files: [
            files.write(number, kind, {f"part.{number}": torch.ones(2)}, HEADER)
            for number, kind in enumerate(["sharded", "shard"], 1)
        ]
        for files in (first, second)
    }
    first.finish(parts[first])  # which takes the second's files for those of a killed save
    with pytest.raises(OSError, match=r"cannot write .*is gone: another save to this path"):
        second.finish(parts[second])
    found = read_index(path)
    assert found.word == first.word
    assert names_in(tmp_path) == sorted([path.name, *found.names])


def test_a_model_is_there_even_if_nothing_can_be_removed(path, monkeypatch):
    def refused(_):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.iterdir", refused)
    files = written(path, 2.0)
    assert read_index(path).word == files.word


def test_an_index_may_be_a_link(path, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / f"other{SUFFIX}"
    link.symlink_to(path)
    assert torch.equal(read_index(link).load(2, "shard")[0]["part.3"], torch.ones(5))
    assert first_file(link) == first_file(path)
    for name in read_index(path).names:  # as caches of downloads have them
        (tmp_path / "links" / name).symlink_to(tmp_path / name)
    assert read_index(link).path == link


def test_damage_is_named(path, tmp_path):
    _, second, third = (path.with_name(name) for name in read_index(path).names)
    content = third.read_bytes()
    third.write_bytes(content[:-3])
    size = len(content)
    with pytest.raises(ValueError, match=f"{third.name} is damaged.*{size - 3:,} .* of {size:,}"):
        read_index(path)
    third.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=f"{third.name} is damaged, or not of the model.*hash"):
        read_index(path)
    third.unlink()
    with pytest.raises(FileNotFoundError, match=f"{third.name} is missing, which is a part of"):
        read_index(path)
    third.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # in a tensor: its checksum tells
    with pytest.raises(ValueError, match=rf"{third.name} is damaged: the checksum of tensor part"):
        read_index(path).load(2, "shard")


def test_files_of_other_models_are_refused(path, tmp_path):
    other = tmp_path / f"other{SUFFIX}"
    written(other)
    ours, theirs = json.loads(path.read_text()), json.loads(other.read_text())
    for name in ("files", "weight_map"):  # an index that somebody has put together
        part = ours if name in ours else ours["metadata"]["patchsvdd_fast"]
        source = theirs if name in theirs else theirs["metadata"]["patchsvdd_fast"]
        part[name] = source[name]
    path.write_text(json.dumps(ours))
    with pytest.raises(ValueError, match=r"other-.* is not of the model"):
        read_index(path).load(1, "shard")
    with pytest.raises(ValueError, match="is not of the model"):
        read_index(other).load(0, "shard")  # of another kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.update(format=2), "was written by a newer patchsvdd_fast"),
        (lambda about: about.pop("files"), "is damaged, a field is not what it should be"),
        (lambda about: about.update(files={}), "is damaged: it names 0 files"),
        (lambda about: about.update(files=[1]), "is damaged"),
        (
            lambda about: about.update(files={"../../etc/x.safetensors": "1-2", "b": "1-2"}),
            "it names a file that cannot be one of its own",
        ),
        (
            lambda about: about.update(files=dict.fromkeys(about["files"], "nonsense")),
            "is damaged",
        ),
    ],
)
def test_forged_indexes_are_refused(path, change, message):
    index = json.loads(path.read_text())
    change(index["metadata"]["patchsvdd_fast"])
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        read_index(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"metadata": 3}', '{"metadata": {}}', "\udcff"])
def test_what_is_no_index_is_said(path, text):
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match="is not the index of a model of patchsvdd_fast"):
        read_index(path)


def test_its_name_tells_an_index(tmp_path):
    with pytest.raises(ValueError, match=r"must be called NAME\.safetensors\.index\.json, got"):
        NewShards(tmp_path / "m.json", "0123abcd", 2)
