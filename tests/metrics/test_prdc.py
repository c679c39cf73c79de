import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from ddss_lightning.metrics import PrecisionRecall
from ddss_lightning.metrics import prdc as prdc_file


def draw(num, shift=0.0, seed=0, d=3):
    return torch.randn(num, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift


def scores(real, x, k):
    metric = PrecisionRecall(real, k)
    for part in x.split(13):
        metric.update(part)
    return {name: value.item() for name, value in metric.compute().items()}


def by_loops(real, x, k):
    """The definitions in plain Python."""

    def distance(a, b):
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5

    real, x = real.tolist(), x.tolist()
    radius_real = [sorted(distance(y, z) for z in real)[k] for y in real]
    radius_x = [sorted(distance(y, z) for z in x)[k] for y in x]
    holds = [[distance(y, z) < radius for z in x] for y, radius in zip(real, radius_real, strict=True)]
    found = [[distance(y, z) < radius for z, radius in zip(x, radius_x, strict=True)] for y in real]
    return {
        "precision": sum(any(row[i] for row in holds) for i in range(len(x))) / len(x),
        "recall": sum(any(row) for row in found) / len(real),
        "density": sum(sum(row) for row in holds) / (k * len(x)),
        "coverage": sum(any(row) for row in holds) / len(real),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [7, 2048])
def test_definitions_in_plain_python(k, block, monkeypatch):
    monkeypatch.setattr(prdc_file.squared_radii, "__defaults__", (block,))
    real, x = draw(41), draw(37, 0.8, 1)
    assert scores(real, x, k) == pytest.approx(by_loops(real, x, k), rel=1e-12)


def test_precision_and_recall_of_torch_fidelity():
    real, x = draw(150), draw(120, 0.5, 1)
    precision, recall = calculate_precision_recall_full(x, real, 3)
    value = scores(real, x, 3)
    assert (value["precision"], value["recall"]) == pytest.approx((precision, recall), rel=1e-6)


def test_known_cases():
    real = draw(60)
    same = scores(real, real, 5)
    assert same == pytest.approx({"precision": 1, "recall": 1, "density": 1, "coverage": 1}, rel=1e-12)
    assert scores(real, real[torch.randperm(60)] + 0.0, 5) == same
    far = scores(real, real + 1e3, 5)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    # One mode of two: faithful, not diverse.
    two = torch.cat([draw(60), draw(60, 100.0, 2)])
    value = scores(two, draw(60, seed=3), 5)
    assert value["precision"] > 0.8
    assert value["recall"] <= 0.5
    assert value["coverage"] <= 0.5


def test_expected_values_of_equal_distributions():
    """Naeem et al.: E density = 1; E coverage = 1 - prod_{j=1..k} (m - j) / (m + n - j)."""
    values = [scores(draw(50, seed=2 * seed), draw(40, seed=2 * seed + 1), 2) for seed in range(60)]
    for name, expected in (("density", 1.0), ("coverage", 1 - (49 / 89) * (48 / 88))):
        found = torch.tensor([value[name] for value in values])
        assert abs(found.mean() - expected) < 3 * found.std() / 60**0.5


def test_a_neighbour_at_exactly_the_radius_is_outside():
    """Equally spaced on a line the third neighbour is one of two at the same distance, but for rounding."""
    for seed in range(5):
        real = torch.arange(20, dtype=torch.float64)[:, None] * draw(1, seed=seed, d=64) + draw(1, seed=9, d=64)
        # Inside the balls of itself and of the two beside it.
        assert scores(real, real[5:15] + 0.0, 3)["density"] == pytest.approx(3 / 3)
