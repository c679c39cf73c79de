import pytest
import torch

from ddss_lightning.features import PixelFeatures
from ddss_lightning.losses import KIDLoss
from ddss_lightning.losses.base import Samples


def test_features_are_means_over_equal_areas():
    images = torch.rand(3, 2, 8, 8) * 2 - 1
    features = PixelFeatures(image_channels=2, image_size=8, size=4)
    assert features.num_features == 32
    expected = images.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
    torch.testing.assert_close(features(images), expected.flatten(1))
    torch.testing.assert_close(PixelFeatures(2, 8)(images), images.flatten(1))
    assert PixelFeatures(image_size=64).num_features == 3 * 16 * 16


def test_size_is_part_of_the_fingerprint():
    assert PixelFeatures(size=4).fingerprint() == PixelFeatures(size=4).fingerprint() != PixelFeatures().fingerprint()


def test_a_kid_in_pixels_minds_contrast():
    """Of d independent, symmetric pixels that are g times too strong it is 3 (g^2 - 1)^2 / d."""
    draws = torch.rand(4000, 3, 2, 2, generator=torch.Generator().manual_seed(0)).mul(2).sub(1) / 1.5
    features, loss = PixelFeatures(image_size=2), KIDLoss()
    loss.fit_real(features(draws[:2000]))
    same, sharper = (float(loss(Samples(features=features(draws[2000:] * gain)))) for gain in (1.0, 1.5))
    assert same == pytest.approx(0, abs=0.01)
    assert sharper == pytest.approx(3 * 1.25**2 / 12, rel=0.1)


def test_bad_arguments():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        PixelFeatures(size=0)
    with pytest.raises(ValueError, match="multiple of size, got 32 and 5"):
        PixelFeatures(size=5)
    with pytest.raises(ValueError, match="takes images of shape"):
        PixelFeatures()(torch.zeros(2, 3, 8, 8))


def test_the_default_size_divides_that_of_the_images():
    assert [PixelFeatures(1, size).num_features for size in (7, 16, 24, 28, 32, 48, 50)] == [
        size**2 for size in (7, 16, 12, 14, 16, 16, 10)
    ]
    with pytest.raises(ValueError, match="image_size 31 has no divisor from 8 to 16; give `size`"):
        PixelFeatures(1, 31)
