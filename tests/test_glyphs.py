import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ddss_lightning.glyphs import (
    CLASSES,
    FACES,
    HELD_OUT_FACES,
    TRAIN_FACES,
    coverage,
    draw_scene,
    outline,
    render,
)

INDICES = (49_999, 0, 17, 1234)
DIGEST = (
    "import hashlib; from ddss_lightning.glyphs import draw_scene, render;"
    "print(hashlib.sha256(b''.join(render(draw_scene(s, i), z).tobytes() for z in (16, 32)"
    " for s in ('train', 'held_out') for i in {indices})).hexdigest())"
)


def square(low, high):
    corners = np.array([[low, low], [high, low], [high, high], [low, high]])
    return corners, np.roll(corners, -1, axis=0)


def test_coverage_is_the_covered_area():
    """A square with a corner inside a pixel, one with a hole, a triangle: known areas."""
    starts, ends = square(0.125, 0.625)
    expected = np.outer([0.5, 1, 0.5, 0], [0.5, 1, 0.5, 0])
    np.testing.assert_allclose(coverage(starts, ends, 4), expected, atol=1e-12)
    inner, inner_ends = square(0.25, 0.5)
    # A hole runs the other way round; a second layer the same way, and nonzero winding covers it once.
    hole = coverage(np.concatenate([starts, inner_ends]), np.concatenate([ends, inner]), 4)
    assert hole[1, 1] == pytest.approx(0, abs=1e-12)
    twice = coverage(np.concatenate([starts, inner]), np.concatenate([ends, inner_ends]), 4)
    np.testing.assert_allclose(twice, expected, atol=1e-12)
    triangle = np.array([[0.1, 0.2], [0.9, 0.3], [0.4, 0.8]])
    (ax, ay), (bx, by) = triangle[1] - triangle[0], triangle[2] - triangle[0]
    area = coverage(triangle, np.roll(triangle, -1, axis=0), 16).mean()
    assert area == pytest.approx(abs(ax * by - ay * bx) / 2, rel=1e-3)


def test_an_image_is_a_function_of_split_and_index_in_any_process_and_order():
    command = [sys.executable, "-c", DIGEST.format(indices=INDICES)]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    # Drawn here in another order.
    images = {
        (size, split, index): render(draw_scene(split, index), size)
        for index in sorted(INDICES)
        for split in ("held_out", "train")
        for size in (32, 16)
    }
    data = b"".join(
        images[size, split, index].tobytes()
        for size in (16, 32)
        for split in ("train", "held_out")
        for index in INDICES
    )
    assert other == hashlib.sha256(data).hexdigest()
    assert len({image.tobytes() for image in images.values()}) == len(images)


def test_sizes_show_the_same_scene():
    """An image of 16 pixels is the average of that of 32, but for rounding and the steps of gradients."""
    for index in range(40):
        small, large = (render(draw_scene("train", index), size).astype(float) for size in (16, 32))
        assert np.abs(large.reshape(3, 16, 2, 16, 2).mean((2, 4)) - small).max() < 4


def test_classes_and_faces_are_balanced_and_held_out_faces_stay_out():
    for split in ("train", "held_out"):
        scenes = [draw_scene(split, index) for index in range(len(CLASSES) * len(FACES[split]))]
        assert len({(scene.label, scene.face) for scene in scenes}) == len(scenes)
    labels = Counter(index % len(CLASSES) for index in range(50_000))
    assert max(labels.values()) - min(labels.values()) <= 1
    train = {draw_scene("train", index).face for index in range(0, 50_000, 31)}
    assert train == set(TRAIN_FACES)
    assert not train & set(HELD_OUT_FACES)
    held_out = Counter(draw_scene("held_out", index).face for index in range(0, 10_000, 31))
    assert set(held_out) == set(TRAIN_FACES + HELD_OUT_FACES)


@pytest.mark.parametrize("face", FACES["held_out"])
def test_every_face_has_62_glyphs_of_its_own(face):
    outlines = {character: outline(face, character)[0].tobytes() for character in CLASSES}
    assert len(set(outlines.values())) == len(CLASSES)
    for character in CLASSES:
        starts = outline(face, character)[0]
        assert 0.03 < np.ptp(starts[:, 0]) < 1.3
        assert 0.3 < np.ptp(starts[:, 1]) < 1.1


def test_ink_stands_out_and_glyphs_lie_inside():
    luma, gaps = np.array([0.299, 0.587, 0.114]), []
    for index in range(300):
        scene = draw_scene("held_out", index)
        ink, ground = scene.ink @ luma, scene.ground @ luma
        gaps.append(max(ink.min() - ground.max(), ground.min() - ink.max()))
    assert min(gaps) > 0.1
    assert np.mean(np.array(gaps) >= 0.25) > 0.97
    for index in range(62):
        scene = draw_scene("held_out", index)
        mask = render(replace(scene, ink=np.ones((2, 3)), ground=np.zeros((2, 3))), 32)[0]
        assert mask.max() > 100
        frame = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert (frame == 0).all()


def test_parameters_are_what_the_image_determines():
    """Of order 1; a gradient turned round with its ends exchanged is the same image and the same numbers."""
    scenes = [draw_scene("train", index) for index in range(2000)]
    table = np.array([scene.parameters() for scene in scenes])
    assert table.shape == (2000, 22)
    assert np.abs(table.mean(axis=0)).max() < 0.2
    assert 0.6 < table.std(axis=0).min() <= table.std(axis=0).max() < 1.4
    scene = scenes[3]
    turned = replace(scene, ground=scene.ground[::-1], ground_direction=scene.ground_direction + np.pi)
    assert np.abs(render(turned, 16).astype(int) - render(scene, 16)).max() <= 1
    np.testing.assert_allclose(turned.parameters(), scene.parameters(), atol=1e-9)
