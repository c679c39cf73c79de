from itertools import pairwise

import pytest
import torch

from ddss_lightning.noise import batch_noise, draw_noise, generator_for, held_out_noise


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
