"""Features of many real images are computed once, and never those of something else."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ddss_lightning import ImageFolderDataModule
from ddss_lightning.features import ConvFeatures
from ddss_lightning.features.kept import KeptFeatures
from tests.conftest import FEATURES
from tests.test_module import make, trainer


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Forty images, which count as many here; a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("ddss_lightning.sampling.LARGE", 40)
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(40):
        draw(folder, index)
    return folder


def draw(folder, index, seed=None):
    pixels = np.random.default_rng(index if seed is None else seed).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{index:02d}.png")


class Counted(ConvFeatures):
    """Counts the images that it encodes."""

    seen = 0

    def forward(self, images):
        Counted.seen += len(images)
        return super().forward(images)


def network(kind=Counted):
    """The shipped one, of another class."""
    found = ConvFeatures.from_pretrained(FEATURES)
    found.__class__ = kind
    return found


def encode(root, features=None, **options):
    """Real features of a new command, and how many images were encoded for them."""
    data = ImageFolderDataModule(str(root), 8, 1, eval_batch_size=15, num_val_images=20, **options)
    module = make()
    module.features = features or network()
    runner = trainer(root.parent, 1, enable_checkpointing=False, limit_val_batches=1)
    Counted.seen = 0
    runner.validate(module, data, verbose=False)
    before, Counted.seen = Counted.seen, 0
    found = module.encode_real(module.features)
    assert before == 0  # without a callback that scores, nothing is encoded
    return found, Counted.seen


def files(root):
    return sorted((root.parent / "cache" / "ddss_lightning").glob("features-*"))


def test_the_second_command_encodes_a_few_and_has_the_same_bits(root):
    first, seen = encode(root)
    assert (seen, len(files(root))) == (40, 1)
    second, seen = encode(root)
    assert seen == 15  # a batch: no more than sixteen
    assert torch.equal(first, second)
    plain, seen = encode(root, keep_features=False)
    assert seen == 40
    assert torch.equal(first, plain)


def test_few_images_are_not_kept(root, monkeypatch):
    monkeypatch.setattr("ddss_lightning.sampling.LARGE", 41)
    assert encode(root)[1] == 40
    assert files(root) == []


def test_other_images_are_encoded_anew(root):
    first, _ = encode(root)
    draw(root, 39, seed=99)
    os.utime(root / "39.png", (1, 1))
    second, seen = encode(root)
    assert seen == 40
    assert torch.equal(first[:39], second[:39])
    assert not torch.equal(first[39], second[39])
    shutil.copy(root / "39.png", root / "40.png")
    assert encode(root)[1] == 41


def test_another_network_has_features_of_its_own(root):
    first, _ = encode(root)
    other = network()
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    second, seen = encode(root, other)
    assert seen == 40
    assert not torch.allclose(first, second)
    assert len(files(root)) == 2


def test_a_network_of_other_code_is_noticed(root):
    """Its weights and name are the same."""

    def changed():
        class Counted2(Counted):
            def forward(self, images):
                return 2 * super().forward(images)

        Counted2.__name__ = "Counted"
        return network(Counted2)

    first, _ = encode(root)
    with pytest.warns(UserWarning, match="Counted no longer makes the features that are kept in '.*again"):
        second, _ = encode(root, changed())
    assert torch.equal(second, 2 * first)
    # And those are kept now.
    assert encode(root, changed())[1] == 15


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"no"), lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_made_again(root, damage):
    first, _ = encode(root)
    damage(*files(root))
    with pytest.warns(UserWarning, match="are damaged .*made again"):
        again, seen = encode(root)
    assert seen == 40
    assert torch.equal(first, again)
    assert encode(root)[1] == 15


def test_what_cannot_be_kept_is_a_warning(root):
    (root.parent / "cache").write_text("a file")
    with pytest.warns(UserWarning, match="could not be kept in"):
        assert encode(root)[1] == 40


def test_the_number_is_part_of_the_name():
    features = network()
    path = KeptFeatures(features, "x", 1).path
    assert path == KeptFeatures(network(), "x", 1).path
    others = [KeptFeatures(features, "x", 2), KeptFeatures(features, "y", 1), KeptFeatures(network().double(), "x", 1)]
    assert path not in [other.path for other in others]
