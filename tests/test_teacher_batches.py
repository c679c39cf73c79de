from dataclasses import replace

import pytest
import torch

from ddss_lightning import TeacherPairs
from ddss_lightning.teacher_batches import TeacherBatches

SHAPE = (1, 2, 2)


@pytest.fixture
def pairs(tmp_path, mixture):
    pairs = TeacherPairs(num_pairs=10, num_steps=8, cache_dir=str(tmp_path), relax_radius=0.5)
    pairs.make(mixture, dtype=torch.float64)
    return pairs


def gradient(indices):
    """One of each pair, whatever batch it is in."""
    return torch.tensor(indices).float().add(1).view(-1, 1, 1, 1).expand(-1, *SHAPE)


def test_a_batch_is_the_teachers_own_noise_and_images(pairs, mixture):
    batches = TeacherBatches(replace(pairs, relax_radius=0.0), mixture, batch_size=4)
    indices, x_T, images = batches.start(step=3)
    assert indices == pairs.batch(3, 4, 0)
    assert TeacherBatches(pairs, mixture, batch_size=4, seed=5).start(3)[0] == pairs.batch(3, 4, 5) != indices
    assert torch.equal(x_T, pairs.noise(indices, SHAPE))
    assert torch.equal(images, pairs.load(mixture)[indices])
    assert not x_T.requires_grad
    assert batches.offsets is None


def test_start_noise_moves_when_the_step_is_taken(pairs, mixture):
    """By a tenth of the radius against the gradient, for the pairs of the step alone."""
    batches = TeacherBatches(pairs, mixture, batch_size=4)
    indices, x_T, _ = batches.start(0)
    assert x_T.requires_grad
    batches.plan(0, gradient(indices))
    assert not batches.offsets.any()
    batches.advance(lambda moved: moved)
    expected = torch.zeros(10, *SHAPE)
    expected[indices] = -0.1 * 0.5 / 2
    torch.testing.assert_close(batches.offsets, expected)
    # What is not planned anew is not moved again.
    batches.advance(lambda moved: moved)
    torch.testing.assert_close(batches.offsets, expected)
    # The first step of the second epoch starts from there.
    again, x_T, _ = batches.start(2)
    torch.testing.assert_close(x_T.detach(), pairs.noise(again, SHAPE) + expected[again])


def test_two_processes_move_what_one_would(pairs, mixture):
    one = TeacherBatches(pairs, mixture, batch_size=4)
    two = [TeacherBatches(pairs, mixture, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(4):
        whole = one.start(step)
        one.plan(step, gradient(whole[0]))
        one.advance(lambda moved: moved)
        parts = [each.start(step) for each in two]
        assert parts[0][0] + parts[1][0] == whole[0]
        for each in (1, 2):
            assert torch.equal(torch.cat([part[each] for part in parts]), whole[each])
        for each, part in zip(two, parts, strict=True):
            each.plan(step, gradient(part[0]))
        own = [pairs.moved(each.offsets[part[0]], gradient(part[0])) for each, part in zip(two, parts, strict=True)]
        for each in two:
            each.advance(lambda _: torch.cat(own))  # noqa: B023 - called at once
        assert all(torch.equal(each.offsets, one.offsets) for each in two)
    assert one.offsets.any()


def test_offsets_of_an_earlier_fit(pairs, mixture):
    earlier = torch.rand(10, *SHAPE)
    assert TeacherBatches(pairs, mixture, 4, offsets=earlier).offsets is earlier
    with pytest.raises(ValueError, match="start noise is of 9 teacher pairs, num_pairs is 10; resume with the recipe"):
        TeacherBatches(pairs, mixture, 4, offsets=earlier[:9])
