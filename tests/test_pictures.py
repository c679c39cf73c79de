from itertools import pairwise

import pytest
import torch
from matplotlib.figure import Figure

from ddss_lightning.coefficients import Coefficients
from ddss_lightning.pictures import caption, comparison_figure, enlargement, image_grid, mu_figure, thumbnails


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
    assert [enlargement(height) for height in (1, 8, 16, 28, 32, 64, 512)] == [64, 8, 4, 3, 2, 1, 1]
    images = torch.zeros(2, 3, 256, 128)
    images[:, :, :4] = 1.0
    small = thumbnails(images)
    assert small.shape == (2, 3, 64, 32)
    assert small[0, 0, :, 0].tolist() == [1.0] + [0.0] * 63
    assert thumbnails(small) is small
    (axes,) = comparison_figure([("a", images)], "title").axes
    assert axes.images[0].get_array().shape == (65, 2 * 33, 3)


def test_images_of_any_number_of_channels_can_be_looked_at():
    levels = torch.linspace(-1, 1, 5).view(1, 5, 1, 1)
    first = {channels: image_grid(levels[:, :channels])[:, 0, 0].tolist() for channels in (1, 2, 3, 4, 5)}
    assert first == {1: [0], 2: [32], 3: [0, 64, 128], 4: [0, 64, 128], 5: [0, 64, 128]}
    comparison_figure([("a", levels[:, :2])], "title").draw_without_rendering()


def test_a_grid_has_no_more_columns_than_images():
    images = torch.zeros(3, 1, 8, 8)
    for columns, shape in ((2, (18, 18)), (3, (9, 27)), (8, (9, 27))):
        assert image_grid(images, columns).shape == (1, *shape)


def coefficients(num_steps):
    """All weights are zero but nu of the last step and the state before in the first: mu[0, 0]."""
    mu, nu = torch.zeros(num_steps, num_steps), torch.zeros(num_steps)
    mu[0, 0], nu[-1] = -0.5, 1.0
    mu[-1, 0] = -0.004
    rest = torch.zeros(num_steps), torch.zeros(num_steps, 2), torch.arange(num_steps, 0, -1.0)
    return Coefficients(mu, nu, *rest, torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("num_steps", [1, 5, 10, 25])
def test_nothing_is_cut_from_the_heat_map(num_steps):
    figure = mu_figure(coefficients(num_steps))
    figure.draw_without_rendering()
    axes, bar = figure.axes
    texts = [*axes.get_yticklabels(), *axes.get_xticklabels(), axes.title, *bar.get_yticklabels()]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) > 2 * num_steps
    assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
    assert all(box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)


def test_weights_of_zero_are_no_missing_ones_and_have_no_sign():
    axes, _ = mu_figure(coefficients(3)).axes
    assert [text.get_text() for text in axes.texts] == ["-0.50", "0.00", "0.00", "0.00", "0.00", *["0.00"] * 3, "1.00"]
    picture = axes.images[0]
    assert min(picture.to_rgba(0.0)) > 0.95
    assert max(axes.get_facecolor()[:3]) < 0.9


@pytest.mark.parametrize("width", [3, 7.5, 18])
def test_captions_and_titles_fit_the_width(width):
    figure = Figure(figsize=(width, 3.5), layout="constrained")
    figure.subplots()
    words = "10000 images, ModuleFeatures resnet50 of layer avgpool (0123456789abcdef), WWW, clamped to [-1, 1]; "
    caption(figure, 3 * words)
    figure.draw_without_rendering()
    box = figure._supxlabel.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    # Not in more lines than it needs.
    assert box.width > 0.6 * min(figure.bbox.width, figure.dpi * 14)
    assert figure._supxlabel.get_text().replace("\n", " ") == (3 * words).strip()


def test_the_title_of_a_single_grid_fits():
    figure = comparison_figure([("a", torch.zeros(4, 1, 8, 8))], "100 network calls, same noise, seed 1234567")
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
