"""The cost that is planned is the cost that is paid."""

import copy
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.plugins import Precision

from ddss_lightning import (
    DDSSModule,
    DenoiserFeatures,
    GaussNewton,
    GGDMSampler,
    InFeatures,
    KIDLoss,
    TeacherLoss,
    TeacherPairs,
    WeightedSum,
)
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


KINDS = ["adam", "gauss-newton", "teacher", "relaxed teacher", "unused teacher", "own features of all"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_planned_calls_are_those_that_are_made(denoiser, features, kind, tmp_path):
    options = {}
    if kind == "gauss-newton":
        options["gauss_newton"] = GaussNewton(residual_images=40, trial_images=20, dampings=(0.1, 0.01))
    elif kind != "adam":
        radius = 0.0 if kind == "teacher" else 0.1
        options["teacher"] = TeacherPairs(20, 7, chunk_size=16, relax_radius=radius, cache_dir=str(tmp_path))
        options["loss"] = KIDLoss() if kind == "unused teacher" else TeacherLoss()
    if kind == "own features of all":
        # Of generated, real and the teacher's images, here and in a loss with features of its own.
        losses = {"kid": KIDLoss(real="batch"), "teacher": TeacherLoss("features")}
        features = DenoiserFeatures(denoiser)
        losses["again"] = InFeatures(DenoiserFeatures(denoiser), TeacherLoss("features"))
        losses["controlled"] = InFeatures(DenoiserFeatures(denoiser), KIDLoss(standardize=True, control_variate=True))
        options["loss"] = WeightedSum(losses)
    sampler = GGDMSampler(denoiser.schedule, 4, stride="quadratic")
    module = DDSSModule(denoiser, sampler, features, batch_size=16, **options)
    before = copy.deepcopy(sampler.state_dict())
    planned, of_teacher = calls_per_step(module), teacher_calls(module)
    assert all(torch.equal(value, before[name]) for name, value in sampler.state_dict().items())
    strategy = Mock(reduce_boolean_decision=lambda wish, **_: wish)
    module._trainer = SimpleNamespace(
        world_size=1, global_rank=0, global_step=0, datamodule=None, strategy=strategy, lr_scheduler_configs=[],
        precision_plugin=Precision(),
    )  # fmt: skip
    module.log = lambda *_args, **_kwargs: None
    module._real = features(torch.rand(200, 1, 8, 8))
    module.encode_real = lambda network: torch.rand(200, network.num_features)
    module._real_source = (None, module.features.identity())
    # Features are taken from inner layers: what every call begins with sees them all.
    counted = Counted(denoiser.unet.conv_in if kind == "own features of all" else denoiser)
    module.on_train_start()
    # One call more for each image of the teacher that is a control variate.
    each = 8 if kind == "own features of all" else 7
    assert counted.calls == of_teacher == (20 * each if module.needs_teacher else 0)
    module.training_step(torch.zeros(16, 1, 8, 8), 0).backward()
    counted.handle.remove()
    assert counted.calls == of_teacher + planned


def test_a_teacher_beside_gauss_newton_is_not_asked(denoiser, features):
    teacher, loss = TeacherPairs(num_pairs=30, num_steps=7, relax_radius=0.1), TeacherLoss()
    sampler = GGDMSampler(denoiser.schedule, 4)
    module = DDSSModule(denoiser, sampler, features, loss, teacher=teacher, gauss_newton=GaussNewton())
    assert not module.needs_teacher
    assert teacher_calls(module) == 0


def test_differences_by_hand(schedule):
    """Two calls: mu_00, nu_0 and std_0 move x_1, which is seen once; mu_10, mu_11, nu_1 move x_2; a time its own call.

    A gap of log-SNRs moves the second time, and with the weights all of the second step.
    """
    sampler = GGDMSampler(schedule, 2, learn=("mu", "nu", "std", "time", "logsnr"))
    assert difference_calls(sampler) == 2 + 1 + 1 + 1 + 0 + 0 + 0 + 1 + 1
    # What is held has none.
    sampler.corrections["time"].requires_grad_(False)
    sampler.corrections["mu"].requires_grad_(False)
    assert difference_calls(sampler) == 2 + 1 + 1 + 0 + 0 + 1


def test_the_network_s_own_features_are_calls_of_it(denoiser, features):
    own = InFeatures(DenoiserFeatures(denoiser), KIDLoss(standardize=True))
    modules = [
        DDSSModule(denoiser, GGDMSampler(denoiser.schedule, 4), features, loss=loss, batch_size=16)
        for loss in (KIDLoss(), WeightedSum({"kid": KIDLoss(), "own": own}))
    ]
    modules.append(DDSSModule(denoiser, GGDMSampler(denoiser.schedule, 4), DenoiserFeatures(denoiser), batch_size=16))
    assert [calls_per_step(module) for module in modules] == [16 * 7, 16 * 9, 16 * 9]
