"""EfficientNet-Lite against the package that its weights were published with."""

import pytest
import torch

from patchsvdd_fast.encoders.efficientnet_lite import VARIANTS, EfficientNetLite


def published(variant, size):
    """The package's network, with random weights and statistics, and its state."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    network = package.EfficientNet.from_name(variant.replace("_", "-"), image_size=size).eval()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_mean"):
                value.normal_(0, 0.1)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2)
    return network


def all_maps(network, images):
    values, maps = network._swish(network._bn0(network._conv_stem(images))), []
    for block in network._blocks:
        values = block(values)
        maps.append(values)
    return maps


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_maps_are_those_of_the_published_network(variant):
    theirs, ours = published(variant, 64), EfficientNetLite(variant, maps=(0, 1, 2, 3, 4)).eval()
    ours.load_pretrained(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    blocks, maps = all_maps(theirs, images), ours(images)
    assert [images.shape[2] // values.shape[2] for values in maps] == [2, 4, 8, 16, 32]
    for values in maps:
        # The last block before the number of channels and the stride change.
        alike = [block for block in blocks if block.shape == values.shape][-1]
        torch.testing.assert_close(values, alike, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_cells_of_a_part_are_those_of_the_whole():
    """Also where sizes are odd, which TensorFlow's padding would move by half a stride."""
    network = EfficientNetLite(maps=(1, 2)).eval()
    whole = torch.randn(1, 3, 303, 271)
    part = whole[..., 64:, 96:]
    for stride, a, b in zip((4, 8), network(whole), network(part), strict=True):
        inside = slice(96 // stride, 128 // stride)
        rows = slice(inside.start + 64 // stride, inside.stop + 64 // stride)
        columns = slice(inside.start + 96 // stride, inside.stop + 96 // stride)
        torch.testing.assert_close(
            a[..., rows, columns], b[..., inside, inside], rtol=1e-5, atol=1e-6
        )


def test_stages_behind_the_last_map_are_left_out():
    def size(*maps):
        return sum(p.numel() for p in EfficientNetLite(maps=maps).parameters())

    assert size(1) < size(1, 2) < size(3) < size(4)


@pytest.mark.parametrize("maps", [(), (2, 1), (1, 1), (0, 5), (-1,)])
def test_unknown_maps_and_variants_are_refused(maps):
    with pytest.raises(ValueError, match="ascending numbers of 0 to 4"):
        EfficientNetLite(maps=maps)
    with pytest.raises(ValueError, match="variant must be one of"):
        EfficientNetLite("efficientnet_b0")


def test_weights_of_another_network_are_refused():
    theirs = published("efficientnet_lite0", 64).state_dict()
    with pytest.raises(ValueError, match=r"weight must have shape .* weights of another network"):
        EfficientNetLite("efficientnet_lite2").load_pretrained(theirs)
    del theirs["_bn0.running_var"]
    with pytest.raises(ValueError, match=r"the weights lack _bn0\.running_var"):
        EfficientNetLite("efficientnet_lite0").load_pretrained(theirs)
