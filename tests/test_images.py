import torch

from ddss_lightning.images import to_pixels, to_uint8


def test_pixels_are_what_an_image_file_holds_and_the_gradient_is_the_identity():
    x = torch.tensor([-3.0, -1.0, -0.2001, 0.0, 0.5, 1.0, 7.0], requires_grad=True)
    y = to_pixels(x)
    torch.testing.assert_close(y, to_uint8(x).float() / 127.5 - 1, rtol=0, atol=1e-6)
    assert y[0] == -1
    assert y[-1] == 1
    weights = torch.arange(7.0)
    (y * weights).sum().backward()
    assert torch.equal(x.grad, weights)
