import copy
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kernel_mmd, kid_features_to_metric
from torchmetrics import MetricCollection
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from ddss_lightning.metrics import (
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    KernelDistanceSubsets,
    PrecisionRecall,
    frechet_distance,
    gaussian_moments,
)


def draw(num, d=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(num, d, dtype=torch.float64, generator=generator) @ mix + seed * 0.3


def updated(metric, x, sizes):
    for part in x.split(sizes):
        metric.update(part)
    return metric.compute()


def test_fid_is_torchmetrics_and_torch_fidelity():
    real, x = draw(300), draw(200, seed=1)
    value = updated(FrechetDistance(real), x, 64).item()
    moments = (*gaussian_moments(real), *gaussian_moments(x))
    assert value == pytest.approx(_compute_fid(*moments).item(), rel=1e-6)
    statistics = [fid_features_to_statistics(features) for features in (real, x)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert value == pytest.approx(theirs, rel=1e-6)


def test_fid_is_that_of_clean_fid():
    """Its formula: a matrix square root of the product of the covariances (numpy, scipy)."""
    real, x = draw(300).numpy(), draw(200, seed=1).numpy()
    mean_1, cov_1, mean_2, cov_2 = real.mean(0), np.cov(real, rowvar=False), x.mean(0), np.cov(x, rowvar=False)
    root = np.real(scipy.linalg.sqrtm(cov_1 @ cov_2))
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * np.trace(root)
    value = updated(FrechetDistance(torch.from_numpy(real)), torch.from_numpy(x), 64).item()
    assert value == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_gaussians_in_closed_form():
    """Diagonal covariances: sum of (m1 - m2)^2 + (s1 - s2)^2; a rank-deficient one too."""
    s1, s2 = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 0.5, 1.0]).double()
    m1, m2 = torch.tensor([0.0, 1.0, 2.0]).double(), torch.zeros(3).double()
    value = frechet_distance(m1, s1.square().diag(), m2, s2.square().diag())
    torch.testing.assert_close(value, ((m1 - m2) ** 2 + (s1 - s2) ** 2).sum())
    zero = torch.zeros(3, 3, dtype=torch.float64)
    value = frechet_distance(m1, s1.square().diag(), m2, zero)
    torch.testing.assert_close(value, (m1 - m2).square().sum() + s1.square().sum())
    x = draw(5)
    same = frechet_distance(*gaussian_moments(x), *gaussian_moments(x))
    assert abs(same) < 1e-12 * gaussian_moments(x)[1].trace()


def test_kid_is_torchmetrics_and_torch_fidelity():
    real, x = draw(100), draw(100, seed=1)
    value = updated(KernelDistance(real), x, 33).item()
    assert value == pytest.approx(poly_mmd(x, real, 3, None, 1.0).item(), rel=1e-6)
    theirs = kernel_mmd(x.numpy(), real.numpy(), kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_coef0=1)
    assert value == pytest.approx(float(theirs), rel=1e-6)


def test_inception_score_in_closed_form_and_as_torchmetrics():
    sure = 50.0 * torch.eye(4).repeat(3, 1)
    assert updated(InceptionScore(4), sure, 5).item() == pytest.approx(4.0, rel=1e-6)
    assert updated(InceptionScore(4), sure[:1].repeat(6, 1), 5).item() == pytest.approx(1.0, rel=1e-6)
    logits = draw(80, 6)
    p = logits.softmax(1)
    expected = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp()
    assert updated(InceptionScore(6), logits, 7).item() == pytest.approx(expected.item(), rel=1e-10)


def test_subsets_of_everything_are_the_full_estimate():
    real, x = draw(60), draw(60, seed=1)
    value = updated(KernelDistanceSubsets(real, num_subsets=3, subset_size=60), x, 7)
    assert value["kid_mean"].item() == pytest.approx(updated(KernelDistance(real), x, 7).item(), rel=1e-10)
    assert value["kid_std"] < 1e-10 * value["kid_mean"].abs()


def test_subsets_scatter_as_those_of_torch_fidelity():
    real, x = draw(400), draw(400, seed=1)
    value = updated(KernelDistanceSubsets(real, num_subsets=400, subset_size=40), x, 100)
    settings = {"kid_subsets": 400, "kid_subset_size": 40, "rng_seed": 0, "verbose": False}
    theirs = kid_features_to_metric(x, real, **settings)
    error = theirs["kernel_inception_distance_std"] / 400**0.5
    assert abs(value["kid_mean"] - theirs["kernel_inception_distance_mean"]) < 3 * 2**0.5 * error
    assert value["kid_std"].item() == pytest.approx(theirs["kernel_inception_distance_std"], rel=0.2)


def test_splits_go_on_from_batch_to_batch_however_a_metric_is_called():
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    called, updated_ = InceptionScore(5, splits=4), InceptionScore(5, splits=4)
    for part in logits.split(6):
        called(part)
        updated_.update(part)
    assert called.num.tolist() == updated_.num.tolist() == [3, 3, 3, 3]
    assert called.compute() == updated_.compute()


def test_inception_score_of_splits_is_that_of_torch_fidelity():
    """It takes contiguous splits; ours go by index modulo the number of splits."""
    logits, indices = draw(84, 6), torch.randperm(84)
    metric = InceptionScore(6, splits=4)
    for rows, index in zip(logits.split(10), indices.split(10), strict=True):
        metric.update(rows, index)
    value = metric.compute()
    order = torch.cat([torch.nonzero(indices % 4 == split).flatten() for split in range(4)])
    theirs = isc_features_to_metric(logits[order], splits=4, shuffle=False)
    assert value["is_mean"].item() == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert value["is_std"].item() == pytest.approx(theirs["inception_score_std"], rel=1e-6)


METRICS = {
    "fid": FrechetDistance,
    "kid": KernelDistance,
    "subsets": lambda real: KernelDistanceSubsets(real, num_subsets=5, subset_size=20),
    "prdc": PrecisionRecall,
    "is": lambda real: InceptionScore(real.shape[1]),
}


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
def test_result_does_not_depend_on_batch_size_and_order(make):
    real, x = draw(90), draw(70, seed=2)
    whole = updated(make(real), x, 70)
    for order in (torch.arange(70), torch.randperm(70)):
        torch.testing.assert_close(updated(make(real), x[order], 11), whole, rtol=1e-10, atol=0)
    metric = make(real)
    metric.update(x)
    metric.reset()
    torch.testing.assert_close(updated(metric, x, 70), whole, rtol=0, atol=0)


@pytest.mark.parametrize("smallest", [0.0, 1e-9, 1e-7, 1e-5, 1e-3])
def test_fid_of_nearly_singular_covariances_does_not_depend_on_the_order(smallest):
    """From features of 64 dimensions whose scales fall to `smallest`, or of which only 40 are not 0."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2, 64, 64, dtype=torch.float64, generator=generator)).Q
    scales = torch.logspace(0, -3, 64).double() if smallest == 0 else smallest ** (torch.arange(64).double() / 63)
    scales[40:] *= smallest > 0
    real, x = (torch.randn(n, 64, dtype=torch.float64, generator=generator) * scales @ basis[0] for n in (300, 200))
    values = [updated(FrechetDistance(real), x[torch.randperm(200)] + 0.05, size) for size in (200, 7, 64)]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
def test_autocast_changes_nothing(make):
    real, x = draw(90), draw(70, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        value = updated(make(real), x, 70)
    torch.testing.assert_close(value, updated(make(real), x, 70), rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
def test_a_module_in_bfloat16_does_not_round_its_metrics(make):
    real, x = draw(90), draw(70, seed=2)
    metric = make(real)
    torch.nn.ModuleList([metric]).to(torch.bfloat16).half()
    metric.update(x[:30])
    torch.nn.ModuleList([metric]).to(torch.bfloat16)
    metric.update(x[30:])
    torch.testing.assert_close(metric.compute(), updated(make(real), x, 70), rtol=1e-12, atol=0)


def test_in_a_collection():
    """Metrics of rows share them in one compute group; all get their arguments, and results have names."""
    real, x = draw(90), draw(70, seed=2)
    collection = MetricCollection({name: make(real) for name, make in METRICS.items()})
    for part in torch.arange(70).split(16):
        collection.update(x[part], indices=part)
    value = collection.compute()
    assert len(collection.compute_groups) == 3
    assert value.keys() == {"fid", "kid", "is", "kid_mean", "kid_std", "precision", "recall", "density", "coverage"}
    for name in ("fid", "kid", "is"):
        torch.testing.assert_close(value[name], updated(METRICS[name](real), x, 70), rtol=1e-10, atol=0)
    torch.testing.assert_close(
        {name: value[name] for name in ("precision", "recall", "density", "coverage")},
        updated(PrecisionRecall(real), x, 70),
    )
    collection.reset()
    assert collection(x)["fid"] == collection.compute()["fid"]


def test_indices_give_the_order():
    """Noise in the last bit, as other batch sizes make it, changes the order by content but not that by index."""
    real, x = draw(90), draw(70, seed=2)
    indices = torch.randperm(70)
    values = []
    for noise in (0.0, 1e-15):
        metric = KernelDistanceSubsets(real, num_subsets=2, subset_size=20)
        metric.update(x * (1 + noise * torch.randn(70, 12)), indices)
        values.append(metric.compute())
    torch.testing.assert_close(*values, rtol=1e-9, atol=0)
    metric.update(x[:1], torch.tensor([69]))
    with pytest.raises(ValueError, match="1 samples have an index that another sample has"):
        metric.compute()
    metric = KernelDistance(real)
    metric.update(x[:30], torch.arange(30))
    metric.update(x[30:])
    with pytest.raises(ValueError, match="some without"):
        metric.compute()
    with pytest.raises(ValueError, match="one for each sample"):
        metric.update(x, torch.arange(3))


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
def test_images_through_a_feature_network(make, features):
    images = torch.rand(70, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    real = features(torch.rand(80, 1, 8, 8) * 2 - 1).detach()
    is_score = make is METRICS["is"]
    real = features.logits(real) if is_score else real
    plain = make(real)
    plain.update(features.logits(features(images)) if is_score else features(images))
    metric = make(real)
    metric._network = (features,)
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(images)
    torch.testing.assert_close(metric.compute(), plain.compute(), rtol=1e-6, atol=1e-9)
    assert not metric.state_dict()
    with pytest.raises(ValueError, match=r"images must lie in \[-1, 1\], got values from -3 to 3"):
        metric.update(images.sign() * 3)
    with pytest.raises(TypeError, match=r"got torch.uint8; convert bytes"):
        metric.update(images.to(torch.uint8))
    with pytest.raises(ValueError, match="takes vectors of shape"):
        make(real).update(images)


def test_features_in_another_precision(features):
    """As a Trainer of precision 64-true leaves them."""
    images = torch.rand(9, *features.image_shape, generator=torch.manual_seed(0)) * 2 - 1
    found = {}
    for dtype in (torch.float32, torch.float64):
        network = copy.deepcopy(features).to(dtype)
        real = network(images.to(dtype)).detach()
        metric = KernelDistance(real.float(), features=network)
        metric.update(images)
        found[dtype] = metric.compute()
    torch.testing.assert_close(found[torch.float32], found[torch.float64], rtol=1e-4, atol=1e-4)


def test_the_features_argument(features):
    real = features(torch.rand(80, 1, 8, 8) * 2 - 1).detach()
    images = torch.rand(80, 1, 8, 8) * 2 - 1
    for with_images, with_vectors in (
        (FrechetDistance(real, features=features), FrechetDistance(real)),
        (KernelDistance(real, features=features), KernelDistance(real)),
        (KernelDistanceSubsets(real, 2, 9, features=features), KernelDistanceSubsets(real, 2, 9)),
        (PrecisionRecall(real, features=features), PrecisionRecall(real)),
    ):
        with_images.update(images)
        with_vectors.update(features(images))
        assert with_images.compute() == with_vectors.compute()
    score = InceptionScore(10, features=features)
    score.update(images)
    assert 1 <= score.compute() <= 10


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance, PrecisionRecall])
def test_a_network_in_place_of_real_features_is_told_what_goes_there(kind, features):
    with pytest.raises(ValueError, match=r"real must hold the features .*, got ConvFeatures; give what"):
        kind(features)


def test_rank_deficient_covariances_warn_once():
    metric = FrechetDistance(draw(12))
    with pytest.warns(UserWarning, match="12 dimensions from 8 generated images and 12 real images"):
        updated(metric, draw(8), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.reset()
        updated(metric, draw(8), 8)
        updated(FrechetDistance(draw(13)), draw(13), 8)


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(make, value, features):
    """Vectors, images, and real vectors; what was refused does not count."""
    real, x = draw(90), draw(30)
    metric = make(real)
    metric.update(x[:25])
    broken = x.clone()
    broken[3, 2], broken[17, :4] = value, value
    with pytest.raises(
        ValueError, match="2 of 30 feature vectors hold NaN or infinite numbers; a sampler that diverges"
    ):
        metric.update(broken)
    torch.testing.assert_close(metric.compute(), updated(make(real), x[:25], 25), rtol=0, atol=0)
    images = torch.zeros(6, 1, 8, 8)
    images[4, 0, 1, 1] = value
    metric._network = (features,)
    with pytest.raises(ValueError, match="1 of 6 images hold NaN or infinite numbers; a sampler that diverges"):
        metric.update(images)
    if make is not METRICS["is"]:
        with pytest.raises(
            ValueError, match="2 of 30 feature vectors of real images hold NaN or infinite numbers; look"
        ):
            make(broken)


def test_too_few_images():
    with pytest.raises(ValueError, match="FID needs at least two generated images, got 1"):
        updated(FrechetDistance(draw(9)), draw(1), 1)
    with pytest.raises(ValueError, match="KernelDistance needs at least 2 generated images, got 1"):
        updated(KernelDistance(draw(9)), draw(1), 1)
    with pytest.raises(ValueError, match="KernelDistanceSubsets needs at least 9 generated images, got 1"):
        updated(KernelDistanceSubsets(draw(9), subset_size=9), draw(1), 1)
    with pytest.raises(ValueError, match="PrecisionRecall needs at least 6 generated images, got 1"):
        updated(PrecisionRecall(draw(9)), draw(1), 1)
    with pytest.raises(ValueError, match=r"at least one image in each of 2 splits, got \[1, 0\]"):
        updated(InceptionScore(12, splits=2), draw(1), 1)
    with pytest.raises(ValueError, match="at least 1000 real images"):
        KernelDistanceSubsets(draw(9))
    with pytest.raises(ValueError, match="Unknown kernel 'rbf'"):
        KernelDistance(draw(9), "rbf")
    with pytest.raises(ValueError, match="num_neighbours must be at least 1, got 0"):
        PrecisionRecall(draw(9), 0)


def test_a_cast_leaves_a_metric_on_its_device():
    """`meta` stands for a GPU: with the function tried on a tensor of the CPU, a cast moved the metric there."""
    metric = FrechetDistance(torch.randn(20, 3)).to("meta")
    for cast in (metric.bfloat16, metric.double, metric.half):
        cast()
        assert {each.device.type for each in metric.buffers()} == {"meta"}
        assert metric.device.type == "meta"
