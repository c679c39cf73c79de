from itertools import pairwise

import pytest
import torch

from ddss_lightning import KIDLoss
from ddss_lightning.losses import Samples
from ddss_lightning.noise import (
    batch_noise,
    draw_noise,
    generator_for,
    held_out_noise,
    independent_indices,
    take_turns,
)


def test_keys_tell_generators_apart():
    def draw(*key):
        return torch.randn(4, generator=generator_for(*key))

    assert torch.equal(draw("train", 0, 1, 2), draw("train", 0, 1, 2))
    others = [("train", 0, 1, 3), ("train", 0, 2, 2), ("train", 1, 1, 2), ("val", 0, 1, 2), ("train", 0, 12)]
    assert not any(torch.equal(draw("train", 0, 1, 2), draw(*key)) for key in others)


def test_held_out_noise_depends_on_the_index_only():
    x_T, noise = held_out_noise("test", list(range(10)), (1, 3, 3), 4)
    part_x, part_noise = held_out_noise("test", [7, 2], (1, 3, 3), 4)
    assert torch.equal(part_x, x_T[[7, 2]])
    assert torch.equal(part_noise, noise[:, [7, 2]])
    assert torch.equal(held_out_noise("test", [7], (1, 3, 3), 9)[0], x_T[[7]])
    assert not torch.equal(held_out_noise("other", [7], (1, 3, 3), 4)[0], x_T[[7]])


def test_noise_is_standard_normal():
    x_T, noise = draw_noise((50_000,), 3, generator_for("x"))
    drawn = torch.cat([x_T[None], noise])
    assert drawn.shape == (3, 50_000)
    assert (drawn.mean(1).abs() < 5 / 50_000**0.5).all()
    assert ((drawn.std(1) - 1).abs() < 5 / 100_000**0.5).all()
    assert (torch.corrcoef(drawn).fill_diagonal_(0).abs() < 5 / 50_000**0.5).all()


@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 64, 64)])
def test_noise_of_a_batch_is_the_same_however_it_is_split(shape):
    """Blocks hold 1024 and 85 images here: parts begin and end inside of blocks, and one spans a whole block."""
    key, num = ("train", 0, 7), 1500 if shape[0] == 1 else 180
    x_T, noise = batch_noise(key, 0, num, shape, 3)
    assert x_T.shape == (num, *shape)
    assert noise.shape == (2, num, *shape)
    edges = [0, 1, num // 3, num - 5, num]
    parts = [batch_noise(key, start, stop, shape, 3) for start, stop in pairwise(edges)]
    assert torch.equal(torch.cat([x for x, _ in parts]), x_T)
    assert torch.equal(torch.cat([z for _, z in parts], 1), noise)
    assert len(x_T.flatten(1)[:, 0].unique()) == num
    assert not torch.equal(batch_noise(("train", 0, 8), 0, num, shape, 3)[0], x_T)


def test_independent_indices_are_the_same_however_a_batch_is_split():
    key = ("train", 0, 7)
    whole = independent_indices(key, 0, 2500)
    edges = [0, 1, 1000, 1030, 2500]
    assert [index for start, stop in pairwise(edges) for index in independent_indices(key, start, stop)] == whole
    assert len(set(whole)) == 2500
    assert independent_indices(("train", 0, 8), 0, 2500) != whole
    # 3 classes are equally likely, and one says nothing of the next.
    classes = take_turns("train/0/7", whole, 3)
    pairs = torch.bincount(3 * classes[:-1] + classes[1:], minlength=9)
    assert ((pairs - 2499 / 9).abs() < 5 * (2499 / 9) ** 0.5).all()


def test_the_kid_of_a_training_batch_is_unbiased_and_lower_by_what_is_known_where_classes_take_turns():
    """Two classes, one feature that is their sign: the kernel is 8 within a class and 0 between two."""
    loss = KIDLoss(kernel="cubic")
    loss.fit_real(torch.tensor([[1.0], [-1.0]]).repeat(1000, 1))

    def mean(indices):
        values = [
            loss(Samples(features=take_turns(f"k/{step}", indices(step), 2)[:, None] * 2.0 - 1)) for step in range(3000)
        ]
        return float(torch.stack(values).mean()), float(torch.stack(values).std()) / 3000**0.5

    # Of real images half of the pairs, but for a thousandth, are of one class.
    found, error = mean(lambda step: independent_indices(("k", step), 0, 4))
    assert abs(found) < 4 * error + 0.01 < 0.3
    in_turn, _ = mean(lambda _: range(4))
    assert in_turn == pytest.approx(-8 / (2 * (4 - 1)), abs=0.01)
