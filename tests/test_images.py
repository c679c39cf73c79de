import torch

from ddss_lightning.images import to_pixels, to_uint8


def test_pixels_are_what_an_image_file_holds_and_the_gradient_is_the_identity():
    x = torch.tensor([-1e30, -3.0, -1.0, -0.2001, 0.0, 0.5, 1.0, 7.0, 3e7, 1e30], requires_grad=True)
    y = to_pixels(x)
    assert torch.equal(y, to_uint8(x).float() / 127.5 - 1)
    assert y[0] == -1
    assert y[-1] == 1
    weights = torch.arange(10.0)
    (y * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_what_is_not_finite_is_no_pixel():
    assert to_pixels(torch.tensor([float("inf"), -float("inf"), float("nan")])).isnan().all()
