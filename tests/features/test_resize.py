import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from ddss_lightning.features.resize import RESIZES, resize_images

IMAGES = torch.rand(1, 1, 40, 33, generator=torch.Generator().manual_seed(0)) * 255


@pytest.mark.parametrize("size", [17, 65])
@pytest.mark.parametrize(
    ("resize", "of_pil"), [("bilinear-antialias", Image.BILINEAR), ("bicubic-antialias", Image.BICUBIC)]
)
def test_antialiased_as_pil(resize, of_pil, size):
    expected = np.asarray(Image.fromarray(IMAGES[0, 0].numpy(), mode="F").resize((size, size), of_pil))
    torch.testing.assert_close(
        resize_images(IMAGES, size, resize)[0, 0], torch.from_numpy(expected.copy()), rtol=0, atol=255e-5
    )


def test_tf1_in_plain_python():
    """Output pixel i is read at position i * (in / out), the last pixel repeated."""
    size = 7
    found = resize_images(IMAGES, size, "tf1")[0, 0]
    for row in range(size):
        for column in range(size):
            y, x = row * 40 / size, column * 33 / size
            corners = [
                ((1 - abs(y - j)) * (1 - abs(x - i)), IMAGES[0, 0, min(j, 39), min(i, 32)])
                for j in (int(y), int(y) + 1)
                for i in (int(x), int(x) + 1)
            ]
            assert found[row, column].item() == pytest.approx(sum(w * float(v) for w, v in corners), rel=1e-4)
    same = interpolate_bilinear_2d_like_tensorflow1x(IMAGES, size=(size, size), align_corners=False)
    assert torch.equal(found, same[0, 0])


@pytest.mark.parametrize("resize", RESIZES)
def test_constant_stays_constant_and_gradients_flow(resize):
    images = torch.full((1, 2, 6, 5), 0.3, dtype=torch.float32, requires_grad=True)
    result = resize_images(images, 9, resize)
    torch.testing.assert_close(result, torch.full((1, 2, 9, 9), 0.3))
    result.sum().backward()
    assert images.grad.abs().sum() > 0


def test_unknown_name():
    with pytest.raises(ValueError, match="Unknown resize 'lanczos'; choose one of tf1, bilinear,"):
        resize_images(IMAGES, 8, "lanczos")
