import numpy as np
import pytest
import torch
from PIL import Image

from ddss_lightning.data import DigitsDataModule, ImageFolderDataModule
from ddss_lightning.data.base import EpochSampler, Indices, ShardSampler


def test_digits_are_the_1797_images_in_range():
    data = DigitsDataModule(eval_batch_size=500)
    images = torch.cat(list(data.real_dataloader()))
    assert images.shape == (1797, 1, 8, 8)
    assert images.min() == -1
    assert images.max() == 1
    assert len(data.train_dataloader()) == data.steps_per_epoch


def test_epochs_are_whole_permutations_and_repeatable():
    sampler = EpochSampler(Indices(10), samples_per_rank=25, seed=0)
    first = list(sampler)
    assert first == list(sampler)
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10))
    # Batches of the two ranks are together those of one process.
    for rank in range(2):
        assert list(EpochSampler(Indices(10), 12, 0, world_size=2, rank=rank)) == first[rank:24:2]
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    in_the_middle = EpochSampler(Indices(10), 25, 0, used=lambda: 7)
    assert list(in_the_middle) == first[7:] + second[:7]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_shards_hold_every_index_once(world_size):
    shards = [list(ShardSampler(Indices(4), world_size, rank, shuffle=False)) for rank in range(world_size)]
    assert sorted(index for shard in shards for index in shard) == [0, 1, 2, 3]
    assert [len(ShardSampler(Indices(4), world_size, r, shuffle=False)) for r in range(world_size)] == [
        len(s) for s in shards
    ]


def test_folder_of_images(tmp_path):
    (tmp_path / "sub").mkdir()
    pixels = np.zeros((6, 10, 3), np.uint8)
    pixels[:, 2:8] = (255, 0, 128)
    Image.fromarray(pixels).save(tmp_path / "sub" / "a.png")
    (tmp_path / "note.txt").write_text("no image")
    data = ImageFolderDataModule(str(tmp_path), image_size=4)
    (images,) = list(data.real_dataloader())
    expected = torch.tensor([1.0, -1.0, 128 / 127.5 - 1]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    torch.testing.assert_close(images, expected)
    grey = ImageFolderDataModule(str(tmp_path), image_size=4, image_channels=1)
    assert next(iter(grey.real_dataloader())).shape == (1, 1, 4, 4)


def test_files_that_are_not_plain(tmp_path):
    """16 bits a pixel, transparency, and a picture that its EXIF data turn by a quarter."""

    def read(channels):
        return next(iter(ImageFolderDataModule(str(tmp_path), image_size=2, image_channels=channels).real_dataloader()))

    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 257], [257 * 100, 65535]], np.uint16)).save(path)
    torch.testing.assert_close(read(1)[0, 0], torch.tensor([[0.0, 1], [100, 255]]) / 127.5 - 1)
    Image.open(path).save(path, transparency=257 * 100)
    torch.testing.assert_close(read(1)[0, 0], torch.tensor([[0.0, 1], [255, 255]]) / 127.5 - 1)
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    Image.fromarray(pixels, "RGBA").save(path)
    torch.testing.assert_close(read(3)[0, :, 0, 0], torch.tensor([10.0, 20, 30]) / 127.5 - 1)
    assert (read(3)[0, :, 1] == 1).all()  # white, not the black that lies under it
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter
    Image.fromarray(np.array([[0, 50], [100, 200]], np.uint8)).save(path, exif=exif)
    torch.testing.assert_close(read(1)[0, 0], torch.tensor([[100.0, 0], [200, 50]]) / 127.5 - 1)


def test_a_damaged_file_is_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half\.png' cannot be read as an image"):
        list(ImageFolderDataModule(str(tmp_path), image_size=4).real_dataloader())


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_in_lab(tmp_path, channels):
    """White, as Photoshop writes it into a TIFF."""
    Image.new("LAB", (8, 8), (255, 128, 128)).save(tmp_path / "a.tif")
    image = ImageFolderDataModule(str(tmp_path), 8, channels).real_images()[0]
    assert image.shape == (channels, 8, 8)
    torch.testing.assert_close(image, torch.ones_like(image), rtol=0, atol=0.03)


def test_hidden_files_are_no_images_and_tiff_are(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.tiff")
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves in archives")
    assert len(ImageFolderDataModule(str(tmp_path), image_size=4).real_images()) == 1


def test_hidden_folders_are_left_out_and_linked_ones_are_not(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    for path in (
        root / "a" / "1.png",
        root / ".ipynb_checkpoints" / "1-checkpoint.png",
        other / "2.png",
        other / "3.png",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (root / "b").symlink_to(other)
    (root / "a" / "loop").symlink_to(root)
    files = ImageFolderDataModule(str(root), image_size=4).real_images().files
    assert [str(path.relative_to(root)) for path in files] == ["a/1.png", "b/2.png", "b/3.png"]


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="holds no image file"):
        ImageFolderDataModule(str(tmp_path), image_size=4).setup()
    with pytest.raises(ValueError, match="There is no image folder"):
        ImageFolderDataModule(str(tmp_path / "none"), image_size=4).setup()
    for size, message in (("32", "a whole number of pixels, got '32'"), (0, "at least 1 pixel, got 0")):
        with pytest.raises(ValueError, match=f"image_size must be {message}"):
            ImageFolderDataModule(str(tmp_path), size)
    with pytest.raises(ValueError, match=r"image_channels must be 1 \(grey\) or 3 \(RGB\), got 2"):
        ImageFolderDataModule(str(tmp_path), 4, image_channels=2)
    with pytest.raises(ValueError, match="steps_per_epoch must be at least 1, got 0"):
        DigitsDataModule(steps_per_epoch=0)
    with pytest.raises(ValueError, match="num_val_images must be at least 2"):
        DigitsDataModule(num_val_images=1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            [Image.new("L", (8, 8))] * 2,
            r"a Dataset of float32 tensors in \[-1, 1\], each of .*, got Image: .*PIL",
        ),
        ([torch.zeros(1, 8, 8), torch.zeros(1, 8, 9)], "got Tensor: .* equal size"),
    ],
)
def test_images_that_are_no_tensors_of_one_shape_are_refused(images, message):
    data = DigitsDataModule()
    data.dataset = images
    with pytest.raises(ValueError, match=message):
        list(data.real_dataloader())


def test_numbers_of_32_bits_are_refused_and_too_large_files_named(tmp_path, monkeypatch):
    def read(values):
        Image.fromarray(values).save(tmp_path / "a.tif")
        return list(ImageFolderDataModule(str(tmp_path), image_size=2, image_channels=1).real_dataloader())

    for dtype in (np.float32, np.int32):
        with pytest.raises(ValueError, match=r"a\.tif' holds numbers of 32 bits"):
            read(np.ones((2, 2), dtype))
    (found,) = read(np.full((2, 2), 100 * 257, np.uint16))
    torch.testing.assert_close(found, torch.full((1, 1, 2, 2), 100 / 127.5 - 1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(ValueError, match=r"a\.tif' cannot be read as an image.*exceeds limit"):
        read(np.zeros((2, 2), np.uint8))
