"""Banks in shards whose parts lie on the device."""

import pytest
import torch

from patchsvdd_fast import NormalBank, PatchSVDD
from patchsvdd_fast.files.shards import SUFFIX
from patchsvdd_fast.search.sharded import ShardedBank


@pytest.mark.parametrize("k", [None, 4])
def test_parts_on_the_device_have_the_bits_of_one_bank(device, k):
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(3, (400, 2, 2, 24), generator=generator).float()  # many ties
    whole = NormalBank(values)
    parts = [
        NormalBank(values[a:b].to(device), groups=torch.arange(a, b, device=device))
        for a, b in [(0, 150), (150, 151), (151, 400)]
    ]
    shards = ShardedBank.of(parts)
    queries, own = values[::5] + 0.25, torch.arange(400)[::5]
    for groups in (None, own):
        on_device = None if groups is None else groups.to(device)
        found = shards.nearest(queries.to(device), k=k, exclude_same_group=on_device)
        expected = whole.nearest(queries, k=k, exclude_same_group=groups)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
    rows = found[1]
    assert torch.equal(shards.source(rows).cpu(), whole.source(rows.cpu()))
    assert torch.equal(
        shards.embeddings_of(rows.clamp(min=0)).cpu(), whole.embeddings_of(rows.cpu().clamp(min=0))
    )


def test_a_detector_on_the_device_keeps_its_banks_in_shards(device, tmp_path):
    generator = torch.Generator().manual_seed(2)
    images = (torch.rand(9, 3, 96, 96, generator=generator) * 255).byte()
    detector = PatchSVDD(image_size=None, embedding_dim=16, device=str(device))
    encoder = detector.untrained_encoder()
    detector.fit(images[:6], encoder=encoder, shard_bytes=50_000)
    (bank, *_) = detector.banks_.values()
    assert len(bank.parts) > 1
    whole = PatchSVDD(image_size=None, embedding_dim=16, device=str(device))
    whole.fit(images[:6], encoder=encoder)
    detector.save(tmp_path / f"m{SUFFIX}")
    opened = PatchSVDD.load(tmp_path / f"m{SUFFIX}", device=str(device))
    for one in (detector, opened):
        assert torch.equal(one.calibration_.image_scores, whole.calibration_.image_scores)
        found, expected = one.score(images[6:]), whole.score(images[6:])
        assert torch.equal(found.anomaly_map, expected.anomaly_map)
