import torch

from ddss_lightning.losses.slope import slope_by_parts


def test_parts_have_the_gradient_of_the_whole():
    """L = (mean of f)^2 with f_i = x_i theta: dL/dtheta = 2 mean(x)^2 theta; a parameter without effect has zero."""
    x = torch.randn(7, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theta, idle = (torch.full((1,), value, dtype=torch.float64, requires_grad=True) for value in (3.0, 1.0))

    def loss_and_slopes(outputs):
        (features,) = outputs
        return features.mean().square(), [2 * features.mean() / len(features) * torch.ones_like(features)]

    for parts in ([slice(0, 3), slice(3, 6), slice(6, 9)], [slice(None)]):
        loss, gradients = slope_by_parts(lambda part: [x[part] * theta], parts, loss_and_slopes, [theta, idle])
        torch.testing.assert_close(loss, (3 * x.mean()) ** 2)
        torch.testing.assert_close(gradients[0], (2 * x.mean() ** 2 * 3).view(1))
        assert gradients[1] == 0


def test_parts_have_the_gradient_of_several_outputs():
    """L = sum f g with f_i = x_i theta and g_i = theta^2: dL/dtheta = 3 theta^2 sum x; one pass for a single part."""
    x = torch.arange(1.0, 6.0, dtype=torch.float64)
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    calls = []

    def outputs_of(part):
        calls.append(part)
        return x[part] * theta, theta**2 * torch.ones_like(x[part])

    def loss_and_slopes(outputs):
        f, g = outputs
        assert not f.requires_grad
        return (f * g).sum(), [g, f]

    for parts, num in (([slice(0, 2), slice(2, 5)], 4), ([slice(None)], 1)):
        calls.clear()
        loss, (gradient,) = slope_by_parts(outputs_of, parts, loss_and_slopes, [theta])
        assert (float(loss), float(gradient), len(calls)) == (8 * 15, 12 * 15, num)
