import re

import pytest
import torch

from ddss_lightning.losses import Samples, TeacherLoss
from ddss_lightning.losses.perceptual import PerceptualDistance
from tests.conftest import ALEXNET
from tests.losses.test_kid import draw


def test_l2_and_features_in_closed_form():
    x, y = draw(3, 1, 2, 2), draw(3, 1, 2, 2, seed=1)
    torch.testing.assert_close(TeacherLoss()(Samples(images=x, target=y)), ((x - y) ** 2).mean())
    loss = TeacherLoss("features")
    loss.fit_real(7 * torch.ones(5, 2))
    f, g = draw(3, 2), draw(3, 2, seed=1)
    torch.testing.assert_close(loss(Samples(f, target_features=g)), ((f - g) ** 2).mean() / 49)


def test_lpips_is_the_package_s(alexnet):
    """Of images of 64 pixels or more as they are, grey ones as three channels, small ones enlarged."""
    import lpips

    reference = lpips.LPIPS(net="alex", verbose=False)
    loss = TeacherLoss("lpips")
    images = torch.rand(3, 2, 3, 64, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x, y, _ = images
    with torch.no_grad():
        torch.testing.assert_close(loss(Samples(images=x, target=y)), reference(x, y).mean())
        grey = [each[:, :1] for each in (x, y)]
        expected = reference(*(each.expand(-1, 3, -1, -1) for each in grey)).mean()
        torch.testing.assert_close(loss(Samples(images=grey[0], target=grey[1])), expected)
        small = [each[..., :8, :16] for each in (x, y)]
        large = [torch.nn.functional.interpolate(each, (64, 128), mode="bilinear") for each in small]
        torch.testing.assert_close(loss(Samples(images=small[0], target=small[1])), reference(*large).mean())
        assert loss(Samples(images=x, target=x)) == 0


def test_lpips_is_frozen_and_differentiable_in_parts(alexnet):
    x, y = (torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in (0, 1))
    whole, parts = TeacherLoss("lpips"), TeacherLoss("lpips", batch_size=2)
    whole.train()
    assert not any(module.training for module in whole.perceptual.modules())
    assert not any(parameter.requires_grad for parameter in whole.parameters())
    gradients = []
    for loss in (whole, parts):
        leaf = x.clone().requires_grad_()
        value = loss(Samples(images=leaf, target=y))
        gradients.append(torch.autograd.grad(value, leaf)[0])
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4 * float(gradients[0].abs().max()))
    moved = (x - 1e-3 * gradients[0] / gradients[0].norm()).detach()
    assert whole(Samples(images=moved, target=y)) < whole(Samples(images=x, target=y))


def test_a_missing_backbone_is_a_clear_word(alexnet):
    (alexnet / ALEXNET).unlink()
    url = f"https://download.pytorch.org/models/{ALEXNET}"
    message = f"needs the file '{ALEXNET}' in the folder '{alexnet}'; put it there from {url}, or set download=True"
    with pytest.raises(ValueError, match=re.escape(message)):
        TeacherLoss("lpips")


def test_bad_arguments():
    with pytest.raises(ValueError, match="Unknown distance 'l1'; choose one of l2, features, lpips"):
        TeacherLoss("l1")
    with pytest.raises(ValueError, match="Unknown backbone 'resnet'; choose one of alex, vgg, squeeze"):
        PerceptualDistance("resnet")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TeacherLoss(batch_size=0)
    with pytest.raises(ValueError, match="reads `target` of the samples"):
        TeacherLoss()(Samples(images=draw(2, 1, 2, 2)))
