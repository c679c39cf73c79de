from itertools import pairwise

import torch

from ddss_lightning.pictures import comparison_figure, enlargement, image_grid, thumbnails


def test_grids_are_at_most_six_in_a_row_and_titles_do_not_overlap():
    images = torch.zeros(4, 3, 8, 8)
    names = ["UniPC 3\nFID 150.68", "coefficients and times, teacher, from UniPC leading\nFID 144.55"]
    figure = comparison_figure([(name, images) for name in (names * 4)[:7]], "title")
    figure.draw_without_rendering()
    panels = figure.axes
    assert len(panels) == 8
    assert min(axes.get_position().y0 for axes in panels[:4]) > max(axes.get_position().y1 for axes in panels[4:])
    assert [bool(axes.images) for axes in panels] == [True] * 7 + [False]
    boxes = [axes.title.get_window_extent() for axes in panels[:4]]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert panels[1].get_title().endswith("\nFID 144.55")


def test_few_grids_lie_in_one_row():
    figure = comparison_figure([("a", torch.zeros(1, 1, 8, 8))] * 3, "title")
    assert len(figure.axes) == 3
    assert tuple(figure.get_size_inches()) == (9, 3.5)


def test_pictures_do_not_grow_with_the_images():
    assert [enlargement(height) for height in (1, 8, 16, 32, 64, 512)] == [4, 4, 4, 2, 1, 1]
    images = torch.zeros(2, 3, 256, 128)
    images[:, :, :4] = 1.0
    small = thumbnails(images)
    assert small.shape == (2, 3, 64, 32)
    assert small[0, 0, :, 0].tolist() == [1.0] + [0.0] * 63
    assert thumbnails(small) is small
    (axes,) = comparison_figure([("a", images)], "title").axes
    assert axes.images[0].get_array().shape == (65, 8 * 33, 3)


def test_images_of_any_number_of_channels_can_be_looked_at():
    levels = torch.linspace(-1, 1, 5).view(1, 5, 1, 1)
    first = {channels: image_grid(levels[:, :channels])[:, 0, 0].tolist() for channels in (1, 2, 3, 4, 5)}
    assert first == {1: [0], 2: [32], 3: [0, 64, 128], 4: [0, 64, 128], 5: [0, 64, 128]}
    comparison_figure([("a", levels[:, :2])], "title").draw_without_rendering()
