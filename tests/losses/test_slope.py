import subprocess
import sys

import torch

from ddss_lightning.losses.slope import slope_by_parts


def test_parts_have_the_gradient_of_the_whole():
    """L = (mean of f)^2 with f_i = x_i theta: dL/dtheta = 2 mean(x)^2 theta; a parameter without effect has zero."""
    x = torch.randn(7, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theta, idle = (torch.full((1,), value, dtype=torch.float64, requires_grad=True) for value in (3.0, 1.0))

    def loss_and_slope(features):
        return features.mean().square(), 2 * features.mean() / len(features) * torch.ones_like(features)

    parts = [slice(0, 3), slice(3, 6), slice(6, 9)]
    loss, gradients = slope_by_parts(lambda part: x[part] * theta, parts, loss_and_slope, [theta, idle])
    torch.testing.assert_close(loss, (3 * x.mean()) ** 2)
    torch.testing.assert_close(gradients[0], (2 * x.mean() ** 2 * 3).view(1))
    assert gradients[1] == 0


def test_either_way_of_setting_the_precision_is_taken_up_and_put_back():
    """PyTorch refuses to mix its two ways, for the rest of the process: each in a process of its own."""
    code = (
        "import torch; from ddss_lightning.losses.slope import full_precision\n"
        "new = hasattr(torch.backends.cuda.matmul, 'fp32_precision') and {new}\n"
        "if new: torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "else: torch.set_float32_matmul_precision('high')\n"
        "def now(): return torch.backends.cuda.matmul.fp32_precision if new else torch.get_float32_matmul_precision()\n"
        "before = now()\n"
        "with full_precision('cpu'): assert now() in ('ieee', 'highest')\n"
        "assert now() == before\n"
    )
    for new in (True, False):
        subprocess.run([sys.executable, "-c", code.format(new=new)], check=True)
