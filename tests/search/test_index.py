"""Banks that change: rows beside the others, clusters that suit no longer, searches meanwhile."""

import threading

import pytest
import torch

from patchsvdd_fast import NormalBank, PatchSVDD, nearest
from patchsvdd_fast.detector.description import describe
from patchsvdd_fast.detector.encoder_file import load_encoder
from patchsvdd_fast.files import store
from patchsvdd_fast.search import index as index_module
from patchsvdd_fast.search.coreset import select_coreset
from patchsvdd_fast.search.index import Index


def blob(rows, dim, axes, seed, scale=1.0):
    """Rows [rows, dim] along a few axes, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, axes, generator=generator))[0]
    return scale * torch.randn(rows, axes, generator=generator) @ basis.T


def assert_finds_the_canonical_answer(bank, queries, **options):
    for k in (None, 5):
        found = bank.nearest(queries, k=k, **options)
        expected = nearest(queries, bank.embeddings, k=k)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("clusters", [0, 30])
def test_few_rows_are_added_without_a_build(monkeypatch, clusters):
    bank = NormalBank(blob(5000, 24, 4, 0), clusters=clusters)
    before = bank._index
    for name in ("lay_out", "extend_clusters"):
        monkeypatch.setattr(index_module, name, None)  # would fail
    bank.add(blob(1, 24, 4, 0))
    bank.add(blob(7, 24, 4, 1))
    assert bank._index.data is before.data
    assert len(bank) == 5008
    assert bank.groups.tolist() == list(range(5008))
    assert_finds_the_canonical_answer(bank, torch.randn(50, 24))


@pytest.mark.parametrize("clusters", [0, 30])
def test_many_rows_are_merged_with_the_others(clusters):
    bank = NormalBank(blob(5000, 24, 4, 0), clusters=clusters)
    bank.add(blob(2000, 24, 4, 0))
    assert bank._index.appended is None
    assert bank.num_clusters == clusters
    assert_finds_the_canonical_answer(bank, torch.randn(50, 24))


def test_a_bank_that_clusters_did_not_pay_for_is_not_tried_again(monkeypatch):
    bank = NormalBank(torch.rand(5000, 64))
    assert bank.num_clusters == 0
    monkeypatch.setattr(index_module, "lay_out", None)  # would fail
    bank.add(torch.rand(2000, 64))
    assert bank._index.appended is None
    opened = NormalBank.from_state_dict(bank.state_dict())
    opened.add(torch.rand(2000, 64))
    monkeypatch.undo()
    tried = []
    monkeypatch.setattr(index_module, "lay_out", lambda *_: tried.append(1))
    opened.add(torch.rand(2000, 64))  # more than twice what was tried
    assert tried == [1]


@pytest.mark.parametrize(
    ("added", "anew"),
    [
        (blob(2000, 64, 4, 0), False),
        (blob(2000, 64, 4, 5), True),  # other axes
        (blob(2000, 64, 4, 0, scale=20.0), True),  # the same axes, far out
    ],
    ids=["alike", "other axes", "far out"],
)
def test_clusters_that_do_not_suit_what_is_added_are_made_anew(added, anew):
    bank = NormalBank(blob(5000, 64, 4, 0), clusters=30)
    before = bank._index.clusters.centroids
    bank.add(added)
    after = bank._index.clusters.centroids
    assert (before.shape == after.shape and torch.equal(before, after)) != anew
    assert_finds_the_canonical_answer(bank, added[:50] + 0.01)


def test_rows_beside_the_others_have_groups_and_sources():
    patches = torch.rand(6, 3, 5, 8)
    bank = NormalBank(patches[:4], groups=torch.tensor([10, 11, 12, 13]), clusters=5)
    bank.add(patches[4:], groups=torch.tensor([20, 10]))
    assert bank._index.appended is not None
    found = bank.nearest(patches, exclude_same_group=bank.groups)  # one group number per image
    image = bank.source(found[1])[..., 0]
    own = bank.groups[image] == bank.groups[:, None, None]
    assert not own.any()
    groups = bank.groups.repeat_interleave(15)
    expected = nearest(patches.flatten(0, 2), bank.embeddings, exclude_same_group=(groups, groups))
    assert torch.equal(found[0].flatten(), expected[0])
    assert torch.equal(found[1].flatten(), expected[1])
    bank.remove(torch.tensor([10]))
    assert bank.groups.tolist() == [11, 12, 13, 20]
    assert torch.equal(bank.embeddings, patches[1:5].flatten(0, 2))


def test_rows_beside_the_others_are_saved(tmp_path):
    bank = NormalBank(blob(5000, 24, 4, 0), clusters=30)
    bank.add(blob(3, 24, 4, 1))
    opened = NormalBank.from_state_dict(bank.state_dict())
    assert torch.equal(opened.embeddings, bank.embeddings)
    assert opened.num_clusters == 30


def test_a_search_beside_changes_sees_the_bank_before_or_after_one():
    """Data, clusters and groups change as one object."""
    rows = blob(3000, 24, 4, 0)
    bank = NormalBank(rows, clusters=20)
    queries, own = torch.randn(40, 24), torch.arange(40)
    failures, done = [], threading.Event()

    def search():
        try:
            while not done.is_set():
                distances, found = bank.nearest(queries, exclude_same_group=own)
                assert torch.isfinite(distances).all()
                assert (found >= 0).all()
        except Exception as error:
            failures.append(error)

    searches = [threading.Thread(target=search) for _ in range(2)]
    for thread in searches:
        thread.start()
    for size in (1, 600, 1500, 5, 1, 2000):
        bank.add(blob(size, 24, 4, 2))
        bank.remove(bank.groups[-1:])
    done.set()
    for thread in searches:
        thread.join()
    assert failures == []


# --- coresets: banks that hold some of the patches ------------------------------------------------


def some_patches(patches, kept, **options):
    """A bank of images [N, I, J, D] that holds only some of the patches, by number."""
    rows = patches.flatten(0, 2)[kept].contiguous()
    groups = torch.arange(len(patches)) + 100
    grid = tuple(patches.shape[1:3])
    index = Index.build(rows, groups, grid, patches=kept, radius=0.5, **options)
    return NormalBank._over(index)


@pytest.fixture
def patches():
    return torch.rand(6, 3, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def kept():
    picked = torch.randperm(90, generator=torch.Generator().manual_seed(1))[:30]
    return picked.sort().values


@pytest.mark.parametrize("clusters", [0, 4])
def test_rows_of_a_coreset_know_their_patches_and_groups(patches, kept, clusters):
    bank = some_patches(patches, kept, wanted_clusters=clusters)
    assert len(bank) == 30
    _, rows = bank.nearest(bank.embeddings)
    image, row, column = bank.source(rows).unbind(-1)
    assert torch.equal((image * 3 + row) * 5 + column, kept)
    _, rows = bank.nearest(patches, exclude_same_group=bank.groups)
    assert not (bank.source(rows)[..., 0] == torch.arange(6)[:, None, None]).any()


@pytest.mark.parametrize("clusters", [0, 4])
def test_coresets_grow_shrink_merge_and_are_saved(patches, kept, clusters):
    bank = some_patches(patches[:4], kept[kept < 60], wanted_clusters=clusters)
    bank.add(patches[4:5])
    bank.merge(some_patches(patches[5:], kept[kept >= 75] - 75), torch.tensor([200]))
    patch = torch.cat([kept[kept < 60], torch.arange(60, 75), kept[kept >= 75]])
    assert torch.equal(bank.embeddings, patches.flatten(0, 2)[patch])
    assert bank.groups.tolist() == [100, 101, 102, 103, 104, 200]
    bank.remove(torch.tensor([101, 104]))
    image = patch // 15
    left = (image != 1) & (image != 4)
    assert torch.equal(bank.embeddings, patches.flatten(0, 2)[patch[left]])
    source = bank.source(torch.arange(len(bank)))
    new_numbers = torch.tensor([0, -1, 1, 2, -1, 3])
    assert torch.equal(source[:, 0], new_numbers[image[left]])
    opened = NormalBank.from_state_dict(bank.state_dict())
    assert torch.equal(opened.source(torch.arange(len(bank))), source)
    assert opened._index.radius == 0.5
    plain = NormalBank(patches[:2])
    plain.merge(opened, torch.arange(4) + 50)
    assert torch.equal(plain.source(torch.arange(len(plain)))[30:, 0], source[:, 0] + 2)
    assert torch.equal(plain.embeddings[30:], bank.embeddings)


def test_states_of_coresets_that_do_not_fit_are_refused(patches, kept):
    state = some_patches(patches, kept).state_dict()
    for name, value, message in [
        ("patches", kept.flip(0), "must ascend"),
        ("patches", kept + 60, "less than 90"),
        ("patches", kept - 60, "at least 0"),
        ("patches", kept[:-1], r"patches must be int64 \[30\]"),
        ("patches", kept.int(), r"patches must be int64 \[30\]"),
        ("radius", state["radius"] * torch.nan, "radius must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            NormalBank.from_state_dict(state | {name: value})
    del state["radius"]
    with pytest.raises(ValueError, match="'radius' is missing"):
        NormalBank.from_state_dict(state)


def test_torch_defaults_do_not_matter_to_a_state(patches):
    bank = NormalBank(patches)
    with torch.device("meta"):
        state = bank.state_dict()
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}
    assert NormalBank.from_state_dict(state).grid == (3, 5)


@pytest.mark.parametrize("size", [9, 0.1, 1.0, 90])
def test_a_coreset_is_the_selection_in_the_order_of_rows(patches, size):
    whole = NormalBank(patches, groups=torch.arange(6) + 100)
    shares = []
    bank = whole.coreset(size, seed=3, progress=shares.append)
    count = 9 if size in (9, 0.1) else 90
    chosen = select_coreset(patches.flatten(0, 2), count, 3)
    rows = chosen.rows.sort().values
    assert torch.equal(bank.embeddings, patches.flatten(0, 2)[rows])
    assert bank.covering_radius == chosen.radius
    assert bank.is_coreset == (count < 90)
    assert not whole.is_coreset
    assert whole.covering_radius == 0
    assert bank.grid == (3, 5)
    assert bank.groups.tolist() == list(range(100, 106))
    image, row, column = bank.source(torch.arange(count)).unbind(-1)
    assert torch.equal((image * 3 + row) * 5 + column, rows)
    assert shares == sorted(shares)


def test_distances_grow_by_no_more_than_the_covering_radius(patches):
    whole = NormalBank(patches)
    once = whole.coreset(30)
    twice = once.coreset(0.2)
    assert len(twice) == 6
    assert twice.covering_radius > once.covering_radius > 0
    queries = torch.rand(500, 8)
    nearest_of_all = whole.nearest(queries)[0]
    for bank in (once, twice, NormalBank.from_state_dict(twice.state_dict())):
        growth = bank.nearest(queries)[0] - nearest_of_all
        assert growth.min() >= 0
        assert growth.max() > 0
        assert growth.max() <= bank.covering_radius * (1 + 1e-6)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (0, ValueError, r"size must be in \[1, 90\], got 0"),
        (91, ValueError, r"size must be in \[1, 90\], got 91"),
        (0.0, ValueError, r"above 0, up to 1\.0, got 0\.0"),
        (1.5, ValueError, r"above 0, up to 1\.0, got 1\.5"),
        (True, TypeError, "size must be an integer"),
        ("half", TypeError, "size must be an integer"),
    ],
)
def test_sizes_that_no_coreset_can_have(patches, size, error, message):
    with pytest.raises(error, match=message):
        NormalBank(patches).coreset(size)


# --- codes and files ------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_codes_are_kept_where_asked_for(keep):
    rows = torch.rand(3000, 64)
    bank = NormalBank(rows, clusters=0, keep_codes=keep)
    opened = NormalBank.from_state_dict(bank.state_dict(), keep_codes=keep)
    for searched in (bank, opened, bank.coreset(2000, clusters=0)):
        assert (searched._index.codes is not None) == keep
        assert_finds_the_canonical_answer(searched, torch.rand(20, 64))
    bank.add(rows[:2000])
    assert (bank._index.codes is not None) == keep
    if keep:
        assert bank._index.codes.data is bank._index.data
    assert NormalBank(blob(5000, 24, 4, 0), clusters=30)._index.codes is None


@pytest.mark.parametrize("clusters", [0, 30])
def test_a_bank_has_a_file_of_its_own(tmp_path, clusters):
    path = tmp_path / "bank.safetensors"
    bank = NormalBank(blob(5000, 24, 4, 0), clusters=clusters, groups=torch.arange(5000) + 7)
    bank.add(blob(3, 24, 4, 1))
    bank.save(path)
    opened = NormalBank.open(path)
    assert opened.num_clusters == bank.num_clusters
    assert torch.equal(opened.groups, bank.groups)
    queries = torch.randn(30, 24)
    for ours, theirs in zip(opened.nearest(queries), bank.nearest(queries), strict=True):
        assert torch.equal(ours, theirs)
    facts = describe(path)
    assert facts["bank"].startswith("5,003 x 24, 5,003 images")
    for opener in (PatchSVDD.load, load_encoder):
        with pytest.raises(ValueError, match=r"bank\.safetensors holds a bank alone"):
            opener(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is not a model file, or is damaged"):
        NormalBank.open(path)
    flipped = bytearray(whole)
    flipped[-1000] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"checksum of .* does not match"):
        NormalBank.open(path)


def test_a_file_of_something_else_is_no_bank(tmp_path):
    store.save(tmp_path / "other", "checkpoint", {"a": torch.zeros(1)}, {"parameters": {}})
    with pytest.raises(ValueError, match="other holds a checkpoint, not a bank alone"):
        NormalBank.open(tmp_path / "other")
