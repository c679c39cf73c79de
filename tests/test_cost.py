"""The cost that is planned is the cost that is paid."""

from types import SimpleNamespace

import pytest
import torch

from ddss_lightning import DDSSModule, GaussNewton, GGDMSampler, TeacherLoss, TeacherPairs
from ddss_lightning.cost import calls_per_step, difference_calls, teacher_calls


class Counted:
    """Counts images that pass, and gradients that come back."""

    def __init__(self, module):
        self.calls = 0
        self.handle = module.register_forward_hook(self.forward_hook)

    def forward_hook(self, _module, _arguments, output):
        self.calls += len(output)
        if output.requires_grad:
            output.register_hook(self.backward_hook)

    def backward_hook(self, gradient):
        self.calls += len(gradient)


@pytest.mark.parametrize("kind", ["adam", "gauss-newton"])
def test_the_planned_calls_are_those_that_are_made(denoiser, features, kind):
    method = GaussNewton(residual_images=40, trial_images=20, dampings=(0.1, 0.01)) if kind != "adam" else None
    sampler = GGDMSampler(denoiser.schedule, 4, stride="quadratic")
    module = DDSSModule(denoiser, sampler, features, batch_size=16, gauss_newton=method)
    planned = calls_per_step(module)
    module._trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=0, datamodule=None)
    module.log = lambda *_args, **_kwargs: None
    module._real = features(torch.rand(200, 1, 8, 8))
    module.loss.fit_real(module._real)
    counted = Counted(denoiser)
    module.training_step(torch.zeros(16, 1, 8, 8), 0).backward()
    counted.handle.remove()
    assert counted.calls == planned


def test_teachers_count(denoiser, features):
    sampler = GGDMSampler(denoiser.schedule, 4)
    teacher = TeacherPairs(num_pairs=30, num_steps=7)
    module = DDSSModule(denoiser, sampler, features, loss=TeacherLoss(), teacher=teacher, batch_size=16)
    assert teacher_calls(module) == 210
    # The start noise moves: the first call has a gradient too.
    relaxed = TeacherPairs(num_pairs=30, num_steps=7, relax_radius=0.1)
    module = DDSSModule(denoiser, sampler, features, loss=TeacherLoss(), teacher=relaxed, batch_size=16)
    assert calls_per_step(module) == 16 * 8


def test_differences_by_hand(schedule):
    """Two calls: mu_00, nu_0 and std_0 move x_1, which is seen once; mu_10, mu_11, nu_1 move x_2; a time its own call.

    A gap of log-SNRs moves the second time, and with the weights all of the second step.
    """
    sampler = GGDMSampler(schedule, 2, learn=("mu", "nu", "std", "time", "logsnr"))
    assert difference_calls(sampler) == 2 + 1 + 1 + 1 + 0 + 0 + 0 + 1 + 1
