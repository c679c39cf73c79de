import torch

from ddss_lightning.noise import draw_noise, generator_for, held_out_noise


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
