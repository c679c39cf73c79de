import json

import numpy as np
import pytest
import torch

from ddss_lightning.features import ConvFeatures
from ddss_lightning.metrics import FrechetDistance, ReferenceStatistics


@pytest.fixture
def real(features):
    images = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return features(images).detach()


def distance(real, x, **options):
    metric = FrechetDistance(real, **options)
    metric.update(x)
    return metric.compute().item()


def test_statistics_from_disk_are_as_good_as_features(tmp_path, real, features):
    statistics = ReferenceStatistics.from_features(real, features, dataset="noise", split="train")
    statistics.save(tmp_path / "new" / "noise.npz")
    again = ReferenceStatistics.load(tmp_path / "new" / "noise.npz")
    assert torch.equal(again.mean, statistics.mean)
    assert torch.equal(again.cov, statistics.cov)
    assert again.num == 90
    assert again.metadata == {"dataset": "noise", "split": "train", "extractor": features.protocol()}
    x = real.flip(0)[:70] * 1.1
    assert distance(again, x) == distance(real, x)
    assert distance(again, torch.zeros(70, 1, 8, 8), features=features) > 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["noise.npz"]


def test_files_of_others(tmp_path, real, features):
    """pytorch-fid, clean-fid and EDM: `mu` and `sigma`; the latter in float32 too."""
    x = real.flip(0)[:70] * 1.1
    mu, sigma = real.double().mean(0).numpy(), np.cov(real.numpy(), rowvar=False)
    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    theirs = ReferenceStatistics.load(tmp_path / "theirs.npz")
    assert theirs.num is None
    assert distance(theirs, x, features=None) == pytest.approx(distance(real, x), rel=1e-6)
    theirs.check(features)
    half = ReferenceStatistics(theirs.mean.float(), theirs.cov.float())
    assert distance(half, x) == pytest.approx(distance(real, x), rel=1e-4)
    assert FrechetDistance(half).outer.dtype == torch.float64
    ReferenceStatistics.from_features(real).save(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as ours:
        np.testing.assert_allclose(ours["sigma"], sigma, rtol=1e-5, atol=1e-9)


def test_statistics_of_another_extractor(real, features):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"another extractor \(fingerprint '\w+', here '\w+'\)"):
        ReferenceStatistics.from_features(real, ConvFeatures()).check(features)
    with pytest.raises(ValueError, match="another extractor"):
        FrechetDistance(ReferenceStatistics.from_features(real, ConvFeatures()), features=features)
    with pytest.raises(ValueError, match=r"num_features 63, here 64"):
        ReferenceStatistics.from_features(real[:, 1:]).check(features)
    metadata = {"extractor": {**features.protocol(), "resize": "tf1"}}
    with pytest.raises(ValueError, match="resize 'tf1', here 'none'"):
        ReferenceStatistics(*(torch.zeros(64), torch.eye(64)), metadata=metadata).check(features)


def test_never_overwritten_by_accident(tmp_path, real, monkeypatch):
    path = tmp_path / "a.npz"
    statistics = ReferenceStatistics.from_features(real)
    statistics.save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="exists; give another name or overwrite=True"):
        statistics.save(path)
    monkeypatch.setattr(np, "savez", lambda file, **_: file.write(b"half a file") / 0)
    with pytest.raises(ZeroDivisionError):
        statistics.save(path, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
    monkeypatch.undo()
    statistics.save(path, overwrite=True)
    with pytest.raises(ValueError, match=r"end the name in \.npz"):
        statistics.save(tmp_path / "a.pt")


def test_bad_files(tmp_path, real):
    with pytest.raises(ValueError, match="No statistics at"):
        ReferenceStatistics.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(2), sigma=np.full((2, 2), np.nan))
    np.savez(tmp_path / "skew.npz", mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0.0, 1.0]]))
    np.savez(tmp_path / "list.npz", mu=np.zeros(2), sigma=np.eye(2), metadata=json.dumps("x"))
    for name, reason in {
        "text": "pickle",
        "other": "it holds mean, not mu and sigma",
        "shape": r"got \(3,\) and \(2, 2\)",
        "nan": "not finite",
        "skew": "not symmetric",
        "list": "metadata",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}.npz' holds no statistics that can be used: .*{reason}"):
            ReferenceStatistics.load(tmp_path / f"{name}.npz")
    real[[2, 5, 7], 1] = torch.nan
    with pytest.raises(ValueError, match="3 of 90 feature vectors of real images hold NaN or infinite numbers; look"):
        ReferenceStatistics.from_features(real)
    with pytest.raises(ValueError, match="at least 2 real images"):
        ReferenceStatistics.from_features(real[:1])


def test_a_space_of_one_number():
    """(m - m')^2 + (s - s')^2."""
    x, y = (
        torch.randn(50, 1, generator=torch.Generator().manual_seed(seed)) * scale for seed, scale in ((0, 1), (1, 3))
    )
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert distance(x, y) == pytest.approx(float(expected), rel=1e-4)
