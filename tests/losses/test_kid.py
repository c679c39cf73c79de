import importlib
import itertools

import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from ddss_lightning.losses import KIDLoss, Samples, kid


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel", ["cubic", "linear"])
def test_gradient_is_right(kernel):
    x, y = draw(5, 3).requires_grad_(), draw(7, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: kid(a, b, kernel), (x, y))


def test_cubic_kid_is_torchmetrics():
    x, y = draw(50, 16), draw(50, 16, seed=1) + 0.3
    torch.testing.assert_close(kid(x, y), poly_mmd(x, y, degree=3, gamma=None, coef=1.0), rtol=1e-12, atol=0)


def test_linear_kid_is_unbiased_for_the_squared_distance_of_means():
    """E KID_linear = |m_x - m_y|^2 / d in closed form, for any sample size."""
    d, shift = 4, 0.5
    values = torch.stack(
        [kid(draw(6, d, seed=2 * i), draw(5, d, seed=2 * i + 1) + shift, "linear") for i in range(4000)]
    )
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - shift**2) < 4 * error


def test_loss_scales_features_to_mean_square_one():
    real, x = 20 * draw(40, 8), 20 * draw(10, 8, seed=1)
    loss = KIDLoss()
    loss.fit_real(real)
    scale = real.square().mean().sqrt()
    torch.testing.assert_close(loss(Samples(x)), kid(x / scale, real / scale), rtol=1e-5, atol=0)


@pytest.mark.parametrize("real", ["bank", "batch"])
def test_samples_that_kid_cannot_compare_are_refused(real):
    """It was NaN for one of them."""
    loss, bank = KIDLoss(real=real), draw(40, 8)
    loss.fit_real(bank)
    for num, d in ((1, 8), (5, 7)):
        message = rf"of at least two samples, shape \(n, 8\) as those of the real images, got \({num}, {d}\)"
        with pytest.raises(ValueError, match=message):
            loss(Samples(draw(num, d), real=bank))


def test_bank_and_whole_set_as_minibatch_agree():
    real, x = draw(40, 8), draw(10, 8, seed=1).requires_grad_()
    bank, batch = KIDLoss(), KIDLoss(real="batch")
    for loss in (bank, batch):
        loss.fit_real(real)
    values = bank(Samples(x)), batch(Samples(x, real=real))
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(value, x)[0] for value in values]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def controlled(kernel="cubic", pairs=6, d=4):
    """A loss whose scale is 1, the teacher's features, those of samples from the same noise, and the real ones."""
    real = draw(30, d, seed=5) + 0.4
    real = real / real.square().mean().sqrt()
    teacher = draw(pairs, d, seed=6)
    loss = KIDLoss(kernel, control_variate=True)
    loss.fit_real(real)
    loss.fit_target(lambda network: teacher)
    return loss, teacher, teacher + 0.1 * draw(pairs, d, seed=7) + 0.2, real


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("kernel", ["cubic", "linear"])
def test_control_variate_is_unbiased_over_the_pairs(kernel, size):
    """The mean over all batches of some of six pairs is the KID of all six, and so is the gradient's."""
    loss, teacher, x, real = controlled(kernel)
    x.requires_grad_()
    batches = [list(batch) for batch in itertools.combinations(range(6), size)]
    values = torch.stack([loss(Samples(x[batch], target_features=teacher[batch])) for batch in batches])
    expected = kid(x, real, kernel)
    torch.testing.assert_close(values.mean(), expected, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(value, x)[0] for value in (values.mean(), expected)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)


def test_control_variate_of_two_pairs_by_hand():
    """Linear kernel, one feature: x = (1, 2), t = (1, 1) of T = (1, 1, 4), y = (1, 1), scale 1."""
    loss = KIDLoss("linear", control_variate=True)
    loss.fit_real(torch.ones(2, 1).double())
    loss.fit_target(lambda network: torch.tensor([[1.0], [1.0], [4.0]]).double())
    x, t = torch.tensor([[1.0], [2.0]]).double(), torch.ones(2, 1).double()
    # Pairs: 2 - 1 - 2 + 1 = 0. b_i(x) = x (2.5 - 1): their mean is 2.25 of x and 1.5 of t. KID of T: 3 + 1 - 4 = 0.
    torch.testing.assert_close(float(loss(Samples(x, target_features=t))), 2 * (2.25 - 1.5))


def test_of_the_teachers_own_images_every_batch_has_the_teachers_kid():
    loss, teacher, _, real = controlled()
    for batch in ([0, 1], [2, 3, 4], range(6)):
        own = teacher[list(batch)]
        torch.testing.assert_close(loss(Samples(own, target_features=own)), kid(teacher, real), rtol=1e-5, atol=1e-6)


def test_control_variate_has_less_noise_about_the_same_mean():
    loss, teacher, x, real = controlled(pairs=400)
    plain = KIDLoss()
    plain.fit_real(real)
    batches = torch.randperm(400, generator=torch.Generator().manual_seed(0)).view(20, 20)
    with_it = torch.stack([loss(Samples(x[batch], target_features=teacher[batch])) for batch in batches])
    without = torch.stack([plain(Samples(x[batch])) for batch in batches])
    assert with_it.std() < 0.2 * without.std()
    assert abs(with_it.mean() - without.mean()) < 4 * without.std() / 20**0.5


def test_control_variate_in_standardised_features():
    real, teacher = 20 * draw(40, 8) + 3, 20 * draw(10, 8, seed=1)
    x = teacher + draw(10, 8, seed=2)
    loss = KIDLoss("linear", standardize=True, control_variate=True)
    loss.fit_real(real)
    loss.fit_target(lambda network: teacher)
    y, z = ((values - real.mean(0)) / real.std(0) for values in (real, x))
    value = loss(Samples(x, target_features=teacher))
    torch.testing.assert_close(value, kid(z, y, "linear"), rtol=1e-5, atol=1e-6)


def test_control_variate_needs():
    with pytest.raises(ValueError, match="set real='bank'"):
        KIDLoss(real="batch", control_variate=True)
    assert KIDLoss(control_variate=True).needs == {"features", "target_features"}
    loss = KIDLoss(control_variate=True)
    with pytest.raises(ValueError, match="call `fit_real` first"):
        loss.fit_target(lambda network: draw(4, 2))
    loss.fit_real(draw(5, 2))
    with pytest.raises(ValueError, match=r"no features of the teacher .* call `fit_target` first"):
        loss(Samples(draw(3, 2), target_features=draw(3, 2)))
    for wrong in (draw(1, 2), draw(4, 2) * torch.nan):
        with pytest.raises(ValueError, match="finite features of at least two images of the teacher"):
            loss.fit_target(lambda network, wrong=wrong: wrong)
    KIDLoss().fit_target(lambda network: pytest.fail("is not needed"))


def test_bad_arguments():
    with pytest.raises(ValueError, match="Unknown kernel 'rbf'; choose one of cubic, linear"):
        KIDLoss("rbf")
    with pytest.raises(ValueError, match="real must be 'bank' or 'batch', got 'all'"):
        KIDLoss(real="all")
    with pytest.raises(ValueError, match="call `fit_real` first"):
        KIDLoss()(Samples(draw(3, 2)))
    with pytest.raises(ValueError, match=r"reads `real` of the samples, which were made without: add"):
        KIDLoss(real="batch")(Samples(draw(3, 2)))
    with pytest.raises(ValueError, match="at least two real feature vectors"):
        KIDLoss().fit_real(draw(1, 2))
    with pytest.raises(ValueError, match="not finite"):
        KIDLoss().fit_real(draw(3, 2) * torch.nan)


def test_a_large_bank_needs_no_large_memory(monkeypatch):
    """The real-real term of 50,000 images would be a matrix of 20 GB; it is made in blocks of rows."""
    # The package exports a function of the same name as this room.
    room = importlib.import_module("ddss_lightning.losses.kid")
    sizes, kernel = [], room.polynomial_kernel

    def noted(x, y, name="cubic"):
        sizes.append(len(x))
        return kernel(x, y, name)

    features = torch.randn(1000, 5, dtype=torch.float64)
    expected = room.mean_off_diagonal(
        kernel(features / features.square().mean().sqrt(), features / features.square().mean().sqrt())
    )
    monkeypatch.setattr(room, "polynomial_kernel", noted)
    loss = KIDLoss()
    loss.fit_real(features)
    assert max(sizes) <= room.BLOCK
    assert loss.real_term == pytest.approx(float(expected), rel=1e-12)


def test_standardized_features_have_mean_zero_and_deviation_one():
    real, generated = draw(50, 3) * torch.tensor([1e-2, 1.0, 5.0]) + 100, draw(20, 3, seed=1) + 99
    loss = KIDLoss(standardize=True)
    loss.fit_real(real)
    expected = kid((generated - real.mean(0)) / real.std(0), (real - real.mean(0)) / real.std(0))
    torch.testing.assert_close(loss(Samples(generated)), expected, rtol=1e-4, atol=1e-4)
    # A shift of all features is one of the images, not of the score.
    shifted = KIDLoss(standardize=True)
    shifted.fit_real(real - 100)
    torch.testing.assert_close(shifted(Samples(generated - 100)), expected, rtol=1e-3, atol=1e-3)


def test_a_feature_that_hardly_differs_between_real_images_is_left_out():
    """In units of its deviation one grey level would be a thousand: no gradient would be finite."""
    real, generated = draw(50, 4), draw(20, 4, seed=1)
    real[:, 1] = -1.0
    real[0, 2], real[1:, 2] = 0.5 + 1e-5, 0.5
    loss = KIDLoss(standardize=True)
    loss.fit_real(real)
    leaf = generated.clone().requires_grad_()
    value = loss(Samples(leaf))
    (slope,) = torch.autograd.grad(value, leaf)
    kept = torch.tensor([1.0, 0.0, 0.0, 1.0])
    expected = kid(*(kept * (each - real.mean(0)) / real.std(0).clamp(min=1e-9) for each in (generated, real)))
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    assert (slope[:, 1:3] == 0).all()
    assert (slope[:, [0, 3]] != 0).all()
    with pytest.raises(ValueError, match="The features of all 5 real images are the same"):
        loss.fit_real(torch.ones(5, 4))


def test_a_loss_says_what_it_takes():
    with pytest.raises(TypeError, match=r"KIDLoss takes Samples\(features=\.\.\.\), got Tensor"):
        KIDLoss()(torch.zeros(4, 2))
