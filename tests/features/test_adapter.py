import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms.functional import normalize, resize

from ddss_lightning.features import ModuleFeatures
from ddss_lightning.losses import InFeatures, KIDLoss
from ddss_lightning.metrics import FrechetDistance, ReferenceStatistics

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def images(channels=3, num=2):
    return torch.rand(num, channels, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return resnet18()


def test_torchvision_with_its_own_preprocessing(encoder):
    features = ModuleFeatures(encoder, (3, 16, 16), size=32, resize="bilinear-antialias", layer="avgpool", **IMAGENET)
    x = images()
    expected = normalize(resize((x + 1) / 2, [32, 32], antialias=True), **IMAGENET)
    body = nn.Sequential(*list(encoder.eval().children())[:-1], nn.Flatten())
    assert features.num_features == 512
    with torch.no_grad():
        torch.testing.assert_close(features(x), body(expected))
        map_features = ModuleFeatures(encoder, (3, 16, 16), 32, "bilinear-antialias", layer="layer4", **IMAGENET)
        torch.testing.assert_close(map_features(x), features(x))
        whole = ModuleFeatures(encoder, (3, 16, 16), 32, "bilinear-antialias", **IMAGENET)
        torch.testing.assert_close(whole(x), encoder(expected))
    assert not any(p.requires_grad for p in features.parameters())
    assert not features.train().module.training
    x.requires_grad_()
    features(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not features.module.avgpool._forward_hooks


def test_default_takes_images_as_they_are_and_repeats_grey():
    class Flat(nn.Module):
        def forward(self, x):
            return x.flatten(1)

    torch.testing.assert_close(ModuleFeatures(Flat(), (3, 16, 16))(images()), images().flatten(1))
    grey = ModuleFeatures(Flat(), (1, 16, 16))
    torch.testing.assert_close(grey(images(1)), images(1).repeat(1, 3, 1, 1).flatten(1))
    one = ModuleFeatures(Flat(), (1, 16, 16), mean=(0.5,), std=(0.5,))
    assert one.num_features == 256


def test_protocol_tells_layers_and_resizing_apart(encoder):
    one = ModuleFeatures(encoder, (3, 16, 16), 32, layer="layer4")
    protocol = one.protocol()
    assert protocol == {
        "name": "ModuleFeatures",
        "fingerprint": one.fingerprint(),
        "resize": "bicubic-antialias 32",
        "num_features": 512,
        "layer": "layer4",
    }
    statistics = ReferenceStatistics.from_features(one(images(num=3)), one)
    FrechetDistance(statistics, features=one).update(images())
    with pytest.raises(
        ValueError, match="resize 'bicubic-antialias 32', here 'tf1 24'; layer 'layer4', here 'avgpool'"
    ):
        statistics.check(ModuleFeatures(encoder, (3, 16, 16), 24, "tf1", layer="avgpool"))


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_encoders_in_other_precisions(dtype, size):
    """Made of an encoder in another precision: nearly the same features, of images in any."""
    torch.manual_seed(0)
    conv, some = nn.Conv2d(1, 4, 3), torch.rand(3, 1, 16, 16) * 2 - 1
    expected = ModuleFeatures(conv, (1, 16, 16), size, mean=(0.4,), std=(0.3,))(some)
    network = ModuleFeatures(copy.deepcopy(conv).to(dtype), (1, 16, 16), size, mean=(0.4,), std=(0.3,))
    for given in (some, some.to(dtype)):
        found = network(given)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=3e-2, atol=3e-2)


def test_bad_arguments(encoder):
    with pytest.raises(ValueError, match="no submodule 'layer9'; at its top level it has conv1, bn1"):
        ModuleFeatures(encoder, (3, 16, 16), layer="layer9")
    with pytest.raises(ValueError, match="one number for each channel"):
        ModuleFeatures(encoder, (3, 16, 16), mean=(0.5,), std=(0.5,))
    pair = type("Pair", (nn.Module,), {"forward": lambda self, x: (x, x)})()
    with pytest.raises(TypeError, match="the encoder's output is of tuple; name a `layer`"):
        ModuleFeatures(pair, (3, 16, 16))
    with pytest.raises(TypeError, match=r"of shape \(1, 48, 16\)"):
        ModuleFeatures(nn.Flatten(1, 2), (3, 16, 16))
    unused = nn.Flatten()
    unused.add_module("spare", nn.Linear(1, 1))
    with pytest.raises(ValueError, match="'spare' does not run"):
        ModuleFeatures(unused, (3, 16, 16), layer="spare")
    with pytest.raises(ValueError, match=r"takes images of shape \(3, 16, 16\)"):
        ModuleFeatures(encoder, (3, 16, 16))(images(1))


def test_identity_says_what_scores_depend_on(encoder):
    last = ModuleFeatures(encoder, [3, 16, 16], 32, layer="layer4")
    assert last.identity() == f"ModuleFeatures ({last.fingerprint()}), resize bicubic-antialias 32, layer layer4"
    assert last.image_shape == (3, 16, 16)
    last.check_input(images())
    plain = ModuleFeatures(nn.Flatten(), (3, 16, 16))
    assert plain.identity() == f"ModuleFeatures ({plain.fingerprint()})"
    assert InFeatures(last, KIDLoss()).identity() == f"InFeatures({last.identity()})"
