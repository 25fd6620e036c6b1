"""Images in, uint8 batches out: every file format, broken files, the same views however they are loaded, the sets."""

import argparse
import hashlib
import itertools
import math
import os
import pickle
import random
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset, Subset

import data
from data import SHAPES, CenterView, ClassFolders, ImageFiles, Normalize, Shapes, UnreadableImage, Views, read_image
from engine import Unreadable, UserError, flag_parser

ORIENTATION = 0x112  # EXIF tag


def smooth(height=24, width=40):
    """An array (H, W, 3) without symmetry, smooth enough that JPEG changes it by a few levels only."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([250 * x / width, 250 * y / height, 120 + 60 * x / width - 90 * y / height], -1).astype(np.uint8)


def noise(*shape, high=256, seed=0):
    dtype = np.uint8 if high <= 256 else np.uint16
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def saved(path, image, **options):
    """Write an array or Pillow image; returns the path."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(path, **options)
    return path


def assert_reads(path, expected, atol=0):
    """`path` reads as the array `expected`, (H, W, 3) or (H, W) for grey, up to `atol` levels."""
    image = read_image(path)
    expected = np.broadcast_to(expected if expected.ndim == 3 else expected[..., None], (*expected.shape[:2], 3))
    assert image.dtype == torch.uint8 and image.shape == (3, *expected.shape[:2])
    difference = np.abs(image.permute(1, 2, 0).numpy().astype(float) - expected)
    assert difference.max() <= atol, f"{path.name}: off by {difference.max()}"


def on_white(colour, alpha):
    share = alpha[..., None] / 255
    return share * (colour if colour.ndim == 3 else colour[..., None]) + (1 - share) * 255


def from_cmyk(inks):
    return (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255


def some_inks(height=24, width=40):
    return np.concatenate([smooth(height, width), 100 - smooth(height, width)[..., :1] // 3], -1)


# --- formats ----------------------------------------------------------------------------------------------------------


def test_jpeg(tmp_path):
    colour, grey = smooth(), smooth()[..., 0]
    assert_reads(saved(tmp_path / "colour.jpg", colour, quality=95, subsampling=0), colour, atol=4)
    assert_reads(saved(tmp_path / "grey.jpg", grey, quality=95), grey, atol=4)
    cmyk = saved(tmp_path / "cmyk.jpg", Image.fromarray(some_inks(), "CMYK"), quality=95, subsampling=0)
    assert_reads(cmyk, from_cmyk(some_inks()), atol=6)
    progressive = saved(tmp_path / "progressive.jpeg", colour, quality=95, subsampling=0, progressive=True)
    assert Image.open(progressive).info["progressive"]
    assert_reads(progressive, colour, atol=4)


def test_the_first_picture_of_a_camera_s_multi_picture_jpeg(tmp_path):
    others = [Image.fromarray(255 - smooth())]
    path = saved(tmp_path / "picture.jpg", smooth(), format="MPO", save_all=True, append_images=others, quality=95)
    assert Image.open(path).format == "MPO"
    assert_reads(path, smooth(), atol=12)  # colour at half resolution


def test_png_of_8_bits(tmp_path):
    rgb, grey, alpha = noise(5, 7, 3), noise(5, 7), noise(5, 7, seed=1)
    assert_reads(saved(tmp_path / "rgb.png", rgb), rgb)
    assert_reads(saved(tmp_path / "grey.png", grey), grey)
    assert_reads(saved(tmp_path / "rgba.png", np.dstack([rgb, alpha])), on_white(rgb, alpha), atol=1)
    assert_reads(saved(tmp_path / "la.png", np.dstack([grey, alpha])), on_white(grey, alpha), atol=1)
    bits = noise(5, 7, high=2).astype(bool)
    path = saved(tmp_path / "bits.png", bits)
    assert Image.open(path).mode == "1"
    assert_reads(path, bits * 255)


def test_png_with_a_palette(tmp_path):
    palette, ids = noise(16, 3), noise(5, 7, high=16, seed=1)
    image = Image.fromarray(ids, "P")
    image.putpalette(palette.flatten().tolist())
    assert_reads(saved(tmp_path / "palette.png", image), palette[ids])
    one = saved(tmp_path / "one.png", image, transparency=3)
    assert_reads(one, np.where(ids[..., None] == 3, 255, palette[ids]))
    alpha = noise(16, seed=2)
    several = saved(tmp_path / "several.png", image, transparency=alpha.tobytes())
    assert_reads(several, on_white(palette[ids], alpha[ids]), atol=1)


def test_png_with_one_transparent_colour(tmp_path):
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    assert_reads(saved(tmp_path / "grey.png", grey, transparency=11), np.where(grey == 11, 255, grey))
    rgb = np.dstack([grey, grey + 50, grey + 100])
    path = saved(tmp_path / "rgb.png", rgb, transparency=(11, 61, 111))
    assert_reads(path, np.where(grey[..., None] == 11, 255, rgb))


@pytest.mark.parametrize(
    "name, mode",
    [
        ("a.png", "I;16"),
        ("a.tif", "I;16"),
        ("a.tif", "I;16B"),
        ("a.tif", "I"),
        ("a.pgm", "I"),
    ],
)  # fmt: skip
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, name, mode):
    values = np.linspace(0, 65535, 12 * 20).round().reshape(12, 20)
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "i4"}[mode]
    path = saved(tmp_path / name, Image.frombytes(mode, (20, 12), values.astype(dtype).tobytes()))
    assert Image.open(path).mode == mode
    assert_reads(path, values / 65535 * 255, atol=1)
    image = read_image(path)
    assert image.min() == 0 and image.max() == 255


def test_16_bit_grey_with_a_transparent_grey(tmp_path):
    values = np.linspace(0, 65535, 12 * 20).astype(np.uint16).reshape(12, 20)
    path = saved(tmp_path / "a.png", values, transparency=int(values[5, 5]))
    expected = values / 65535 * 255
    expected[5, 5] = read_image(path)[0, 5, 5]  # white, or as if opaque: the others matter
    assert_reads(path, expected, atol=1)


def test_webp(tmp_path):
    rgb, alpha = noise(20, 30, 3), noise(20, 30, seed=1)
    assert_reads(saved(tmp_path / "lossless.webp", rgb, lossless=True), rgb)
    rgba = np.dstack([rgb, alpha])
    assert_reads(saved(tmp_path / "a.webp", rgba, lossless=True, exact=True), on_white(rgb, alpha), atol=1)
    frames = [Image.fromarray(noise(20, 30, 3, seed=seed)) for seed in (1, 2)]
    path = saved(tmp_path / "animated.webp", rgb, lossless=True, save_all=True, append_images=frames)
    assert Image.open(path).n_frames == 3
    assert_reads(path, rgb)


def test_bmp_ppm_and_tiff(tmp_path):
    rgb = noise(5, 7, 3)
    for name in ("a.bmp", "a.ppm", "a.tif"):
        assert_reads(saved(tmp_path / name, rgb), rgb)
    for compression in ("tiff_lzw", "tiff_deflate"):
        assert_reads(saved(tmp_path / f"{compression}.tiff", rgb, compression=compression), rgb)
    pages = [Image.fromarray(255 - rgb)]
    assert_reads(saved(tmp_path / "pages.tif", rgb, save_all=True, append_images=pages), rgb)
    cmyk = saved(tmp_path / "cmyk.tif", Image.fromarray(some_inks(), "CMYK"))
    assert_reads(cmyk, from_cmyk(some_inks()), atol=1)


def test_the_content_decides_not_the_name(tmp_path):
    rgb = noise(5, 7, 3)
    assert_reads(saved(tmp_path / "png.jpg", rgb, format="PNG"), rgb)
    assert_reads(saved(tmp_path / "jpeg.png", smooth(), format="JPEG", quality=95, subsampling=0), smooth(), atol=4)


@pytest.mark.parametrize("name", ["a b.jpg", "line\nbreak.jpg", "größe 图.jpg", "größe 图.png"])
def test_odd_file_names(tmp_path, name):
    path = saved(tmp_path / name, smooth())
    assert_reads(path, smooth(), atol=12)
    assert torch.equal(read_image(str(path)), read_image(path))


# What a viewer does with the stored (H, W, 3) array.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),  # clockwise
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def exif(orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_of_jpeg(tmp_path, orientation):
    path = saved(tmp_path / "a.jpg", smooth(), exif=exif(orientation), quality=95, subsampling=0)
    assert_reads(path, UPRIGHT[orientation](smooth()), atol=4)


@pytest.mark.parametrize("name, orientation", [("a.png", 6), ("a.webp", 8), ("a.tif", 5)])
def test_exif_orientation_of_other_formats(tmp_path, name, orientation):
    rgb = noise(20, 30, 3)
    path = saved(tmp_path / name, rgb, exif=exif(orientation), lossless=True)
    assert_reads(path, UPRIGHT[orientation](rgb))


# --- files that cannot be read ----------------------------------------------------------------------------------------


def truncated(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return path


def assert_unreadable(path):
    with pytest.raises(UnreadableImage) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.98])
@pytest.mark.parametrize("name", ["a.jpg", "progressive.jpg", "a.png", "a.webp", "a.tif", "a.bmp"])
def test_truncated_files(tmp_path, name, share):
    path = saved(tmp_path / name, noise(40, 60, 3), progressive=name.startswith("progressive"))
    assert_unreadable(truncated(path, share))


def test_files_that_are_no_images(tmp_path):
    for name in ("empty.jpg", "empty.png"):
        (tmp_path / name).touch()
        assert_unreadable(tmp_path / name)
    for name in ("text.jpg", "text.png", "text.tif"):
        (tmp_path / name).write_text("404 not found\n")
        assert_unreadable(tmp_path / name)
    (tmp_path / "header only.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    assert_unreadable(tmp_path / "header only.jpg")
    (tmp_path / "folder.png").mkdir()
    assert_unreadable(tmp_path / "folder.png")
    assert_unreadable(tmp_path / "missing.jpg")


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_decompression_bombs(tmp_path, monkeypatch, name):
    path = saved(tmp_path / name, noise(30, 40, 3))
    read_image(path)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 500)
    assert_unreadable(path)


# --- folders ----------------------------------------------------------------------------------------------------------


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found_in(folder):
    return [os.path.relpath(path, folder) for path in data.find_images(folder)]


def test_finds_images_at_any_depth_whatever_they_are_called(tmp_path):
    images = ["b.jpg", "a.JPEG", "c/d/e.PnG", "c/f.webp", "g h.bmp", "c/line\nbreak.tif", "größe 图.TIFF", ".h/i.png"]
    images += ["j.tar.jpg", "folder.png/k.ppm"]
    touch(tmp_path, *images)
    touch(tmp_path, "notes.txt", "jpg", "c/a.jpg.part", "labels.csv", "c/thumbs.db", "a.npy")
    assert found_in(tmp_path) == sorted(os.path.join(*name.split("/")) for name in images)
    assert len(ImageFiles(tmp_path)) == len(images)


def test_hidden_files_are_no_images(tmp_path):
    touch(tmp_path, "a/photo.jpg", "a/._photo.jpg", ".hidden.png", "a/.jpg", ".folder/b.png")
    assert found_in(tmp_path) == [os.path.join(".folder", "b.png"), os.path.join("a", "photo.jpg")]
    names = ["x/a.jpg", "A.JPEG", "x.y/.z/a.tar.webp", "x/.a.jpg", "._A.JPEG", "a.txt", "jpg", "x.png/notes"]
    assert [data.is_image_file(os.path.join(*name.split("/"))) for name in names] == [True] * 3 + [False] * 5


def test_follows_links_once(tmp_path):
    touch(tmp_path / "set", "a/1.png", "a/2.png")
    touch(tmp_path / "elsewhere", "3.png")
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    names = ["a/1.png", "a/2.png", "b/3.png"]
    assert found_in(tmp_path / "set") == [os.path.join(*name.split("/")) for name in names]


def test_folders_without_images(tmp_path):
    touch(tmp_path / "empty", "notes.txt")
    for folder in (tmp_path / "empty", tmp_path / "missing", tmp_path / "empty" / "notes.txt"):
        with pytest.raises(UserError, match="--data") as error:
            data.find_images(folder)
        assert str(folder) in str(error.value)


def some_images(folder, count, size=(12, 12), broken=()):
    """`count` PNGs under `folder`, of which the numbers in `broken` are cut short; returns the paths of these."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = saved(folder / f"{i:03}.png", noise(*size, 3, seed=i))
        if i in broken:
            truncated(path, 0.5)
    return {str(folder / f"{i:03}.png") for i in broken}


def folder_views(folder, seed=0, **options):
    return Views(ImageFiles(folder), data.pretraining_view((8, 8), 0.2), seed=seed, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_files_are_named_once_and_replaced(tmp_path, capsys, workers):
    broken = some_images(tmp_path, 60, broken=range(3, 60, 10))
    loader = data.training_loader(folder_views(tmp_path), batch_size=10, workers=workers)
    unreadable, messages = Unreadable(), []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == 6
        for images, labels, in_batch in batches:
            assert images.shape == (10, 3, 8, 8) and images.dtype == torch.uint8 and labels.tolist() == [-1] * 10
            assert all(len(image.unique()) > 20 for image in images), "a stand-in is a picture"
            unreadable.count(len(images), in_batch)
            messages += in_batch
    assert {message.rpartition(": ")[0] for message in messages} == broken
    assert len(messages) >= 12, "each of six files in each of two epochs"
    assert len(unreadable.files) == 6 and unreadable.failures == len(messages)
    printed = capsys.readouterr().out
    assert all(printed.count(path) == 1 for path in broken) and len(printed.splitlines()) == 6


def test_the_stand_in_for_a_corrupt_file_is_a_function_of_seed_epoch_and_index(tmp_path):
    some_images(tmp_path, 30, broken=[4])
    same, again = (folder_views(tmp_path)[1, 4] for _ in range(2))
    assert torch.equal(same[0], again[0]) and same[2] == again[2]
    assert not torch.equal(same[0], folder_views(tmp_path)[2, 4][0])


@pytest.mark.parametrize("count", [1, 40])
def test_a_folder_of_corrupt_files_stops_the_run_at_the_first_batch(tmp_path, monkeypatch, count):
    broken = some_images(tmp_path, count, broken=range(count))
    tries = []

    def read(path):
        tries.append(path)
        if len(tries) > 1000:
            pytest.fail("tries for ever")
        return read_image(path)

    monkeypatch.setattr(data, "read_image", read)
    loader = data.training_loader(folder_views(tmp_path), batch_size=min(count, 8), workers=0)
    images, _, messages = next(iter(loader))
    with pytest.raises(UserError, match="--data") as error:
        Unreadable().count(len(images), messages)
    assert any(path in str(error.value) for path in broken)


def test_the_run_stops_at_a_quarter_but_not_at_a_few():
    few = Unreadable()
    few.count(8, [f"{i}.png: broken" for i in range(8)])
    many = Unreadable()
    for i in range(10):
        many.count(100, [f"{i}-{j}.png: broken" for j in range(15)])
    with pytest.raises(UserError):
        many.count(300, [f"{i}.png: broken" for i in range(300)])


def test_less_than_a_quarter_does_not_stop_the_run():
    Unreadable().count(78, [f"{i}.png: broken" for i in range(22)])  # 22 of 100 files


def test_no_more_images_are_unreadable_than_were_seen():
    with pytest.raises(UserError) as error:
        Unreadable().count(4, [f"{i}.png: broken" for i in range(80)])
    failures, seen = [int(word) for word in str(error.value).split() if word.isdigit()][:2]
    assert failures <= seen


# --- the same views however they are loaded ---------------------------------------------------------------------------


class Numbered(Dataset):
    """Random images whose label is their number."""

    def __init__(self, length):
        self.images = torch.from_numpy(noise(length, 3, 16, 16))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index


VIEWS = {
    "pre-training": data.pretraining_view((8, 8), 0.2),
    "fine-tuning": data.finetuning_view((8, 8), 0.2, rand_augment=9, erasing=0.5),
}
either_view = pytest.mark.parametrize("view", VIEWS)


def numbered_views(length=24, seed=0, view="pre-training"):
    return Views(Numbered(length), VIEWS[view], seed=seed)


def epoch_of(loader, epoch):
    """Batches as lists of (number, view as bytes)."""
    loader.sampler.set_epoch(epoch)
    return [
        [(int(label), view.numpy().tobytes()) for view, label in zip(views, labels, strict=True)]
        for views, labels, _ in loader
    ]


def numbers(batches):
    return [number for batch in batches for number, _ in batch]


@either_view
def test_views_do_not_depend_on_the_workers_but_on_the_epoch(view):
    loaders = [data.training_loader(numbered_views(view=view), 8, workers) for workers in (0, 2)]
    seen = set()
    for epoch in range(3):
        alone, by_two = (epoch_of(loader, epoch) for loader in loaders)
        assert alone == by_two
        seen |= {view for batch in alone for view in batch}
    assert len(seen) > 65, "24 images in three views each; two may happen to be the same crop"


@either_view
def test_a_view_is_a_function_of_seed_epoch_and_index(view):
    views = numbered_views(view=view)
    torch.manual_seed(1)
    first = views[2, 5]
    torch.manual_seed(2)
    again = numbered_views(view=view)[2, 5]
    assert torch.equal(first[0], again[0]) and first[1] == again[1] == 5 and first[2] == []
    others = [views[3, 5], views[2, 6], numbered_views(seed=1, view=view)[2, 5]]
    assert not any(torch.equal(first[0], other[0]) for other in others)


@either_view
def test_views_leave_the_random_state_of_the_caller_alone(view):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    views = numbered_views(view=view)
    for epoch in range(3):
        views[epoch, 1]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and np.array_equal(np.random.get_state()[1], states[2][1])


def test_every_index_once_per_epoch_in_a_new_order():
    loader = data.training_loader(numbered_views(), 8, workers=0)
    orders = [numbers(epoch_of(loader, epoch)) for epoch in (0, 1, 0)]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert orders[0] == orders[2] != orders[1] and orders[0] != sorted(orders[0])
    other_seed = data.training_loader(numbered_views(seed=1), 8, workers=0)
    assert numbers(epoch_of(other_seed, 0)) != orders[0]


@pytest.mark.parametrize("length", [24, 29])
def test_the_batches_of_two_processes_make_up_that_of_one(length):
    one = data.training_loader(numbered_views(length), 8, workers=0)
    two = [data.training_loader(numbered_views(length), 4, 0, rank, num_processes=2) for rank in (0, 1)]
    for epoch in range(2):
        whole, first, second = (epoch_of(loader, epoch) for loader in (one, *two))
        assert len(whole) == len(first) == len(second) == 3
        for batch, *parts in zip(whole, first, second, strict=True):
            assert batch[0::2] == parts[0] and batch[1::2] == parts[1]


def test_evaluation_is_complete_and_in_order():
    loader = data.evaluation_loader(Views(Numbered(11), CenterView((8, 8))), 4, workers=0)
    batches = list(loader)
    assert [len(images) for images, _, _ in batches] == [4, 4, 3]
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == list(range(11))


@pytest.mark.parametrize("length, processes", [(11, 2), (12, 4), (13, 4), (3, 5), (1, 2)])
def test_processes_evaluate_each_image_once(length, processes):
    views = Views(Numbered(length), CenterView((8, 8)))
    shares = []
    for rank in range(processes):
        batches = list(data.evaluation_loader(views, 2, 0, rank, processes))
        shares.append([int(label) for _, labels, _ in batches for label in labels])
        for images, labels, _ in batches:
            assert all(torch.equal(image, views[0, int(i)][0]) for image, i in zip(images, labels, strict=True))
    assert sorted(sum(shares, [])) == list(range(length))
    assert shares == [list(range(rank, length, processes)) for rank in range(processes)], "dealt out like cards"


def test_evaluation_takes_the_centre_of_256_for_224():
    images = Numbered(2)
    images.images = torch.from_numpy(noise(2, 3, 256, 256))
    views = data.evaluation_views(images, (224, 224), 3)
    assert torch.equal(views[0, 1][0], images.images[1, :, 16:240, 16:240])
    assert torch.equal(views[0, 1][0], views[7, 1][0]), "nothing is random"
    assert torch.equal(data.evaluation_views(images, (256, 256), 3)[0, 1][0], images.images[1]), "its size: all of it"
    assert data.evaluation_views(images, (32, 48), 1)[0, 1][0].shape == (1, 32, 48)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_unreadable_image_is_not_replaced_in_an_evaluation(tmp_path, channels):
    broken = some_images(tmp_path / "cat", 7, broken=[1, 4])
    images = ClassFolders(tmp_path)
    loader = data.evaluation_loader(data.evaluation_views(images, (8, 8), channels), 3, workers=0)
    batches = list(loader)
    assert [len(views) for views, _, _ in batches] == [3, 3, 1]
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == [0, -1, 0, 0, -1, 0, 0]
    views = torch.cat([views for views, _, _ in batches])
    assert views.shape == (7, channels, 8, 8) and views.dtype == torch.uint8
    assert len(torch.unique(views.flatten(1), dim=0)) == 6, "five pictures, none of them twice, and blanks"
    messages = [message for _, _, in_batch in batches for message in in_batch]
    assert [message.rpartition(": ")[0] for message in messages] == sorted(broken), "each named where it is met"
    assert batches[0][2] == messages[:1] and batches[1][2] == messages[1:]


def test_a_stand_in_brings_its_own_label(tmp_path):
    for i, name in enumerate(("cat", "cow", "dog")):
        folder = tmp_path / name
        folder.mkdir()
        saved(folder / "1.png", np.full((12, 12, 3), 100 * i, dtype=np.uint8))
    truncated(tmp_path / "cow" / "1.png", 0.5)
    views = Views(ClassFolders(tmp_path), data.pretraining_view((8, 8), 0.2))
    seen = [views[epoch, 1] for epoch in range(12)]
    assert {label for _, label, _ in seen} == {0, 2}
    assert all((view == 100 * label).all() and messages for view, label, messages in seen)


def test_random_crops_keep_at_least_the_share_asked_for_and_flip_half():
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    positions = torch.stack([2 * x, 2 * y, 0 * x]).byte()  # a pixel's colour says where it was
    view = data.pretraining_view((64, 64), 0.3)
    torch.manual_seed(0)
    areas, flips = [], []
    for _ in range(100):
        columns, rows, _ = view(positions).float()
        width, height = columns[32, -1] - columns[32, 0], rows[-1, 32] - rows[0, 32]
        assert height > 0, "never upside down"
        areas.append((width.abs() / 255 * height / 255).item())
        flips.append((width < 0).item())
    assert 0.27 < min(areas) < 0.4 and max(areas) > 0.8
    assert 30 < sum(flips) < 70


# --- built-in shapes --------------------------------------------------------------------------------------------------


def test_a_shape_is_a_function_of_split_and_index():
    short, long = Shapes("train", 7, (24, 24)), Shapes("train", 520, (24, 24))
    assert len(short) == 7 and len(long) == 520
    for i in range(7):
        assert torch.equal(short[i][0], long[i][0]) and short[i][1] == long[i][1]
    images, labels, _ = data.draw_shapes("train", range(498, 503), (24, 24))  # across two chunks
    assert torch.equal(images, long.images[498:503]) and labels.tolist() == long.labels[498:503]
    assert len(torch.unique(long.images.flatten(1), dim=0)) == 520
    val = Shapes("val", 7, (24, 24))
    assert not any(torch.equal(val[i][0], short[i][0]) for i in range(7))


def test_shapes_are_balanced_and_labelled():
    images = Shapes("train", 1000, (16, 16))
    counts = np.bincount(images.labels)
    assert len(counts) == len(images.classes) == 10 and 60 < counts.min() and counts.max() < 150
    image, label = images[0]
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and type(label) is int


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (48, 20), (96, 96)])
def test_shapes_of_any_size(size):
    images, labels, coverage = data.draw_shapes("train", range(100), size)
    assert images.shape == (100, 3, *size) and coverage.shape == (100, *size)
    assert labels.tolist() == Shapes("train", 100, (16, 16)).labels
    assert coverage.min() == 0 and coverage.max() == 1
    short = min(size) ** 2
    areas = coverage.sum((1, 2)) / short
    assert areas.min() > 0.02 and areas.max() < 0.8
    edge = torch.cat([coverage[:, 0], coverage[:, -1], coverage[:, :, 0], coverage[:, :, -1]], dim=1)
    assert edge.max() < 1, "no object leaves the image"
    inside, outside = coverage == 1, coverage == 0
    for image, thing, ground in zip(images.float().mean(1), inside, outside, strict=True):
        assert image[thing].mean() > image[ground].mean() + 25, "a light object on a dark ground"


def grid(n=161):
    line = torch.linspace(-1, 1, n)
    v, u = torch.meshgrid(line, line, indexing="ij")
    return u, v


def tight(inside):
    """The bounding box of a boolean (H, W), resized to 24 x 24."""
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    box = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return torch.nn.functional.interpolate(box[None, None].float(), (24, 24), mode="area")[0, 0] > 0.5


def test_labels_name_what_is_drawn():
    u, v = grid()
    templates = [tight(shape(u, v) < 0) for shape in SHAPES]
    _, labels, coverage = data.draw_shapes("train", range(200), (64, 64))
    right = 0
    for label, covered in zip(labels.tolist(), coverage, strict=True):
        drawn = tight(covered > 0.5)
        overlaps = [((drawn & t).sum() / (drawn | t).sum()).item() for t in templates]
        right += overlaps.index(max(overlaps)) == label
    assert right > 180  # they are tilted, so a few look more like another one


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_shape_functions(shape):
    u, v = grid()
    distance = shape(u, v)
    assert distance.min() < -0.15 and (distance[[0, 0, -1, -1], [0, -1, 0, -1]] > 0).all()
    edge = torch.cat([distance[0], distance[-1], distance[:, 0], distance[:, -1]])
    assert (edge > 0).all(), "all of it within [-1, 1]"
    assert 0.8 < 4 * (distance < 0).float().mean() < 3
    if shape.__name__ != "crescent":
        torch.testing.assert_close(distance, shape(-u, v), msg="left is as right")
    down, right = ((distance[1:, 1:] - before) * 80 for before in (distance[:-1, 1:], distance[1:, :-1]))
    slope = torch.hypot(down, right)[distance[1:, 1:].abs() < 0.05]
    assert (slope - 1).abs().median() < 0.02, "about the distance to the outline near it"
    assert down.abs().max() < 1.01 and right.abs().max() < 1.01, "nowhere steeper"


def test_shape_areas():
    u, v = grid(401)
    area = {shape.__name__: 4 * (shape(u, v) < 0).double().mean().item() for shape in SHAPES}
    known = dict(disk=0.81 * math.pi, square=1.5**2, ring=(0.81 - 0.25) * math.pi, plus=2 * 1.8 * 0.6 - 0.6**2)
    assert {name: area[name] for name in known} == pytest.approx(known, rel=0.03)


@pytest.mark.parametrize("limit", [0, -3])
def test_no_shapes(limit):
    with pytest.raises(UserError, match="--limit"):
        data.unlabelled_images("shapes", Path("data"), False, limit, (16, 16))


def test_shapes_as_a_data_set():
    images = data.unlabelled_images("shapes", Path("data"), False, 12, (16, 24))
    assert len(images) == 12 and torch.equal(images[3][0], Shapes("train", 12, (16, 24))[3][0])
    train, val = data.labelled_images("shapes", Path("data"), False, (8, 8))
    assert (len(train), len(val)) == (5000, 2000) and not torch.equal(train[0][0], val[0][0])


# --- torchvision's sets -----------------------------------------------------------------------------------------------


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def sign(monkeypatch, kind, folder):
    """Let torchvision's class `kind` accept the files that lie in `folder`."""
    for name in ("train_list", "test_list"):
        files = [[file, md5(folder / file)] for file, _ in getattr(kind, name)]
        monkeypatch.setattr(kind, name, files)
    if hasattr(kind, "meta"):
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(folder / kind.meta["filename"])})


def write_cifar(root, monkeypatch, name):
    """A tiny CIFAR of 4 images a file; returns its images and labels, those of the test file last."""
    kind = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    files = [file for file, _ in kind.train_list + kind.test_list]
    images, labels = noise(len(files), 4, 3, 32, 32), noise(len(files), 4, high=10 if name == "cifar10" else 100)
    key = "labels" if name == "cifar10" else "fine_labels"
    for file, x, y in zip(files, images, labels, strict=True):
        content = {"data": x.reshape(4, -1), key: y.tolist(), "filenames": ["x"] * 4}
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    classes = [f"class {i}" for i in range(10 if name == "cifar10" else 100)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: classes}, protocol=2))
    sign(monkeypatch, kind, folder)
    return torch.from_numpy(images).flatten(0, 1), labels.flatten().tolist()


@pytest.mark.parametrize("name, num_train", [("cifar10", 20), ("cifar100", 4)])
def test_cifar(tmp_path, monkeypatch, name, num_train):
    images, labels = write_cifar(tmp_path, monkeypatch, name)
    for_training = data.unlabelled_images(name, tmp_path, False, None, (32, 32))
    train, val = data.labelled_images(name, tmp_path, False, (32, 32))
    assert len(for_training) == len(train) == num_train and len(val) == 4
    assert len(train.classes) == (10 if name == "cifar10" else 100)
    for i in range(num_train):
        assert torch.equal(for_training[i][0], images[i]) and torch.equal(train[i][0], images[i])
    assert [train[i][1] for i in range(num_train)] + [val[i][1] for i in range(4)] == labels
    assert all(torch.equal(val[i][0], images[num_train + i]) for i in range(4))
    assert data.labels_of(train) + data.labels_of(val) == labels and data.classes_of(val) == val.classes
    alone = data.validation_images(name, tmp_path, False, (32, 32), limit=3)
    assert len(alone) == 3 and data.classes_of(alone) == val.classes
    assert [label for _, label in alone] == data.labels_of(alone) and set(data.labels_of(alone)) <= set(labels[-4:])
    images, labels, messages = next(iter(data.training_loader(Views(for_training, CenterView((32, 32))), 4, workers=0)))
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8 and messages == []


def write_stl10(root, monkeypatch):
    """3 training, 2 test, 4 unlabelled images; returns these and the labels (from 0) of the first two."""
    kind = torchvision.datasets.STL10
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    images = {split: noise(n, 3, 96, 96, seed=n) for split, n in (("train", 3), ("test", 2), ("unlabeled", 4))}
    labels = {"train": np.array([1, 10, 4], dtype=np.uint8), "test": np.array([7, 2], dtype=np.uint8)}
    for split, x in images.items():
        (folder / f"{split}_X.bin").write_bytes(x.swapaxes(2, 3).tobytes())  # the format is column-major
    for split, y in labels.items():
        (folder / f"{split}_y.bin").write_bytes(y.tobytes())  # and counts from 1
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    sign(monkeypatch, kind, folder)
    return {k: torch.from_numpy(x) for k, x in images.items()}, {k: (y - 1).tolist() for k, y in labels.items()}


def test_stl10(tmp_path, monkeypatch):
    images, labels = write_stl10(tmp_path, monkeypatch)
    for_training = data.unlabelled_images("stl10", tmp_path, False, None, (96, 96))
    train, val = data.labelled_images("stl10", tmp_path, False, (96, 96))
    everything = torch.cat([images["train"], images["unlabeled"]])
    assert torch.equal(torch.stack([image for image, _ in for_training]), everything)
    for split, loaded in (("train", train), ("test", val)):
        assert torch.equal(torch.stack([image for image, _ in loaded]), images[split])
        assert [label for _, label in loaded] == labels[split] == data.labels_of(loaded)
    assert {type(label) for label in data.labels_of(train)} == {int}, "not numpy's, which JSON does not take"
    assert data.labels_of(data.validation_images("stl10", tmp_path, False, (96, 96))) == labels["test"]


@pytest.mark.parametrize("name", data.TORCHVISION_SETS)
def test_missing_sets(tmp_path, name):
    for read in (
        lambda: data.unlabelled_images(name, tmp_path / "nowhere", False, None, (32, 32)),
        lambda: data.labelled_images(name, tmp_path / "nowhere", False, (32, 32)),
        lambda: data.validation_images(name, tmp_path / "nowhere", False, (32, 32)),
    ):
        with pytest.raises(UserError, match="--data-root") as error:
            read()
        assert str(tmp_path / "nowhere") in str(error.value) and f"--data {name}" in str(error.value)


def test_a_damaged_set(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "cifar10")
    truncated(tmp_path / "cifar-10-batches-py" / "data_batch_3", 0.9)
    with pytest.raises(UserError, match="--data-root"):
        data.unlabelled_images("cifar10", tmp_path, False, None, (32, 32))


# --- folders as data sets ---------------------------------------------------------------------------------------------


def image_net(root, train=("cat", "dog"), val=("cat", "dog"), count=3):
    for split, classes in (("train", train), ("val", val)):
        for i, name in enumerate(classes):
            some_images(root / split / name, count + i)


def test_pretraining_uses_train_only(tmp_path):
    image_net(tmp_path)
    saved(tmp_path / "cover.png", noise(4, 4, 3))
    images = data.unlabelled_images(str(tmp_path), Path("data"), False, None, (8, 8))
    assert len(images) == 3 + 4 and all(Path(path).is_relative_to(tmp_path / "train") for path in images.paths)
    assert images[0][1] == -1
    flat = data.unlabelled_images(str(tmp_path / "val" / "dog"), Path("data"), False, None, (8, 8))
    assert len(flat) == 4 and torch.equal(flat[2][0], torch.from_numpy(noise(12, 12, 3, seed=2)).permute(2, 0, 1))


def test_labelled_class_folders(tmp_path):
    image_net(tmp_path)
    train, val = data.labelled_images(str(tmp_path), Path("data"), False, (8, 8))
    assert train.classes == val.classes == ["cat", "dog"]
    assert [label for _, label in train] == [0, 0, 0, 1, 1, 1, 1] == [label for _, label in val]
    image = train[0][0]
    assert image.dtype == torch.uint8 and image.shape == (3, 12, 12)


def test_hidden_folders_are_no_classes_and_hidden_files_no_images(tmp_path):
    image_net(tmp_path)
    for split in ("train", "val"):
        some_images(tmp_path / split / ".ipynb_checkpoints", 2)
        touch(tmp_path / split, "cat/._000.png", "dog/.DS_Store", "notes.txt", "5.png", "cat/notes.txt")
    train, val = data.labelled_images(str(tmp_path), Path("data"), False, (8, 8))
    assert train.classes == val.classes == ["cat", "dog"]
    assert data.labels_of(train) == data.labels_of(val) == [0, 0, 0, 1, 1, 1, 1]
    assert len([image for image, _ in train]) == 7, "and all of them can be read"


def test_class_folders_hold_images_of_any_format_at_any_depth(tmp_path):
    saved(tmp_path / "b.TIFF", noise(5, 7, 3), format="TIFF")
    for name in ("cat/deep/er/1.TIFF", "cat/2.tif", "dog/3.TIFF"):
        touch(tmp_path / "set", name)
        (tmp_path / "set" / name).write_bytes((tmp_path / "b.TIFF").read_bytes())
    images = ClassFolders(tmp_path / "set")
    assert sorted(label for _, label in images) == [0, 0, 1]
    assert all(np.array_equal(image.permute(1, 2, 0).numpy(), noise(5, 7, 3)) for image, _ in images)


@pytest.mark.parametrize("there", ["missing", "empty", "no image"])
def test_a_class_without_validation_images_keeps_its_number(tmp_path, there):
    image_net(tmp_path, train=("cat", "cow", "dog"), val=("cat", "dog"))
    if there != "missing":
        (tmp_path / "val" / "cow").mkdir()
    if there == "no image":
        touch(tmp_path / "val" / "cow", "notes.txt", "._1.jpg")
    train, val = data.labelled_images(str(tmp_path), Path("data"), False, (8, 8))
    assert data.classes_of(train) == data.classes_of(val) == ["cat", "cow", "dog"]
    assert data.labels_of(train) == [0] * 3 + [1] * 4 + [2] * 5
    assert data.labels_of(val) == [label for _, label in val] == [0] * 3 + [2] * 4


def test_no_validation_images_at_all(tmp_path):
    image_net(tmp_path, val=())
    touch(tmp_path / "val", "cat/notes.txt", ".cache/1.png", "dog/._1.png")
    with pytest.raises(UserError, match="--data: .*val: there are no images"):
        data.labelled_images(str(tmp_path), Path("data"), False, (8, 8))


def test_classes_that_training_lacks_are_named(tmp_path):
    image_net(tmp_path, val=("ant", "cat", "dog", "owl"))
    (tmp_path / "val" / ".cache").mkdir()
    with pytest.raises(UserError, match=r"--data: .*val has classes that the training images lack: ant, owl$"):
        data.labelled_images(str(tmp_path), Path("data"), False, (8, 8))


def test_an_empty_class_of_the_training_images_is_named(tmp_path):
    image_net(tmp_path)
    touch(tmp_path / "train", "cow/._1.jpg")
    with pytest.raises(UserError, match=r"--data: .*\bcow\b"):
        data.labelled_images(str(tmp_path), Path("data"), False, (8, 8))


def test_validation_images_alone(tmp_path):
    image_net(tmp_path, train=(), val=("cat", "dog"))
    val = data.validation_images(str(tmp_path), Path("data"), False, (8, 8))
    assert data.classes_of(val) == ["cat", "dog"] and data.labels_of(val) == [0] * 3 + [1] * 4
    numbers = {"owl": 0, "dog": 1, "ant": 2, "cat": 3}  # a checkpoint's
    val = data.validation_images(str(tmp_path), Path("data"), False, (8, 8), class_to_idx=numbers)
    assert data.classes_of(val) == list(numbers) and sorted(data.labels_of(val)) == [1] * 4 + [3] * 3
    assert all(label == numbers[Path(path).parent.name] for path, label in val.samples)
    some = data.validation_images(str(tmp_path), Path("data"), False, (8, 8), 5, numbers)
    assert len(some) == 5 and data.classes_of(some) == list(numbers)
    assert data.labels_of(some) == [label for _, label in some] and set(data.labels_of(some)) == {1, 3}
    with pytest.raises(UserError, match="--data: .*lack: cat"):
        data.validation_images(str(tmp_path), Path("data"), False, (8, 8), class_to_idx={"dog": 0})
    (tmp_path / "val" / "owl").mkdir()
    with pytest.raises(UserError, match=r"--data: .*\bowl\b"):
        data.validation_images(str(tmp_path), Path("data"), False, (8, 8))


def test_limits_on_labelled_images(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_LENGTH", 60)
    sizes = [len(images) for images in data.labelled_images("shapes", Path("data"), False, (8, 8), (None, None))]
    assert sizes == [60, 2000]
    train, val = data.labelled_images("shapes", Path("data"), False, (8, 8), (30, 7))
    assert (len(train), len(val)) == (30, 7)
    assert torch.equal(val[3][0], data.validation_images("shapes", Path("data"), False, (8, 8))[3][0])
    image_net(tmp_path)
    train, val = data.labelled_images(str(tmp_path), Path("data"), False, (8, 8), (2, 5))
    assert (len(train), len(val)) == (2, 5) and data.classes_of(train) == ["cat", "dog"]
    assert [label for _, label in val] == data.labels_of(val)
    train, val = data.labelled_images(str(tmp_path), Path("data"), False, (8, 8), (None, None))
    assert (len(train), len(val)) == (7, 7)


def test_labels_and_classes_of_parts():
    shapes = Shapes("val", 40, (8, 8))
    assert data.labels_of(shapes) == [label for _, label in shapes]
    part = Subset(shapes, [31, 5, 17, 2, 30])
    part_of_part = Subset(part, [4, 0, 3])
    for images in (part, part_of_part):
        assert data.labels_of(images) == [label for _, label in images]
        assert data.classes_of(images) == [shape.__name__ for shape in SHAPES]
    assert data.labels_of(part_of_part) == [shapes.labels[i] for i in (30, 31, 2)]


def test_sets_without_labels_have_no_classes(tmp_path):
    some_images(tmp_path, 3)
    for images in (ImageFiles(tmp_path), Subset(ImageFiles(tmp_path), [1]), Numbered(3)):
        assert data.classes_of(images) == [] and data.describe_classes(images, ", a remark") == ""


def test_classes_in_words():
    shapes = Shapes("val", 4, (8, 8))
    text = " of 10 classes (disk, square, triangle, ...)"
    assert data.describe_classes(shapes) == data.describe_classes(Subset(shapes, [1])) == text
    assert data.describe_classes(shapes, ", labels not used") == text + ", labels not used"


class Labelled(Dataset):
    """Labels whose images nobody may read."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        raise AssertionError("an image was read")


# 200, 47, 10, 3 and 1 images, scattered.
COUNTS = {0: 200, 1: 47, 4: 10, 6: 3, 9: 1}
SCATTERED = np.random.default_rng(0).permutation(np.repeat(list(COUNTS), list(COUNTS.values()))).tolist()


def few(share=None, per_class=None, seed=0, labels=SCATTERED):
    """The indices that are chosen, and how many of each label."""
    images = Labelled(labels)
    part = data.few_labels(images, share, per_class, seed)
    assert part.dataset is images and part.indices == sorted(set(part.indices)), "each once, in the set's order"
    counts = np.bincount(data.labels_of(part), minlength=10)
    return part.indices, {label: int(counts[label]) for label in COUNTS}


@pytest.mark.parametrize(
    "options, counts",
    [
        (dict(share=0.1), [20, 5, 1, 1, 1]),
        (dict(share=0.6), [120, 28, 6, 2, 1]),
        (dict(share=1e-9), [1, 1, 1, 1, 1]),
        (dict(share=1.0), [200, 47, 10, 3, 1]),
        (dict(per_class=1), [1, 1, 1, 1, 1]),
        (dict(per_class=5), [5, 5, 5, 3, 1]),
        (dict(per_class=1000), [200, 47, 10, 3, 1]),
    ],
    ids=str,
)
def test_few_labels_are_a_part_of_each_class(options, counts):
    assert few(**options)[1] == dict(zip(COUNTS, counts, strict=True))


def test_few_labels_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = few(share=0.2)[0]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert few(share=0.2)[0] == first and torch.equal(torch.get_rng_state(), state)
    other = few(share=0.2, seed=1)[0]
    assert other != first and len(set(other) & set(first)) < len(first) / 2
    of_a_class = [i for i, label in enumerate(SCATTERED) if label == 0]
    chosen = {i for i in first if SCATTERED[i] == 0}
    assert chosen != set(of_a_class[: len(chosen)]), "not just the first ones"
    assert 60 < np.mean([of_a_class.index(i) for i in chosen]) < 140, "but from everywhere"


def test_few_labels_lie_within_more():
    by_count = [few(per_class=n)[0] for n in (1, 2, 7, 30, 150)]
    by_share = [few(share=share)[0] for share in (0.01, 0.02, 0.1, 0.6, 0.9)]
    for smaller, larger in [*itertools.pairwise(by_count), *itertools.pairwise(by_share)]:
        assert set(smaller) < set(larger)


def test_few_labels_of_a_part():
    images = data.at_most(Labelled(SCATTERED), 100)
    part = data.few_labels(images, None, 2, 0)
    assert part.dataset is images and sorted(data.labels_of(part)) == sorted(
        label for label, n in zip(*np.unique(data.labels_of(images), return_counts=True), strict=True)
        for _ in range(min(2, n))
    )  # fmt: skip


def test_labelled_folders_that_do_not_fit(tmp_path):
    image_net(tmp_path / "differ", val=("cat", "cow"))
    image_net(tmp_path / "no val", val=())
    (tmp_path / "flat" / "train").mkdir(parents=True)
    saved(tmp_path / "flat" / "train" / "1.png", noise(4, 4, 3))
    image_net(tmp_path / "empty class")
    (tmp_path / "empty class" / "train" / "cow").mkdir()
    for name in ("differ", "no val", "flat", "empty class", "missing"):
        with pytest.raises(UserError, match="lack: cow" if name == "differ" else "--knn-every need") as error:
            data.labelled_images(str(tmp_path / name), Path("data"), False, (8, 8))
        assert "--data" in str(error.value) and str(tmp_path / name) in str(error.value)


def test_a_file_in_place_of_a_folder_of_classes(tmp_path):
    image_net(tmp_path, val=())
    (tmp_path / "val").write_text("a file")
    with pytest.raises(UserError, match="--knn-every"):
        data.labelled_images(str(tmp_path), Path("data"), False, (8, 8))


def test_at_most():
    images = Numbered(50)
    assert data.at_most(images, None) is images and data.at_most(images, 50) is images
    some, again, more = (data.at_most(images, limit) for limit in (12, 12, 30))
    chosen, others = ([label for _, label in subset] for subset in (some, more))
    assert chosen == [label for _, label in again] and len(set(chosen)) == 12 and set(chosen) <= set(range(50))
    assert set(chosen) <= set(others) and chosen != list(range(12))


def test_limit(tmp_path):
    some_images(tmp_path, 6)
    assert len(data.unlabelled_images(str(tmp_path), Path("data"), False, 4, (8, 8))) == 4
    assert len(data.unlabelled_images(str(tmp_path), Path("data"), False, 6, (8, 8))) == 6
    for limit in (0, -1, 7):
        with pytest.raises(UserError, match=f"--limit {limit}"):
            data.unlabelled_images(str(tmp_path), Path("data"), False, limit, (8, 8))


def test_an_unknown_name_is_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="cifar10"):
        data.unlabelled_images(str(tmp_path / "cifar11"), Path("data"), False, None, (8, 8))


# --- views and normalisation ------------------------------------------------------------------------------------------


def as_tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


@pytest.mark.parametrize("margin", [1.0, 8 / 7])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3), (31, 33), (17, 90), (90, 17), (64, 48), (333, 200)])
@pytest.mark.parametrize("target", [(32, 32), (24, 40), (33, 21)])
def test_center_view_of_any_size(size, target, margin):
    image = CenterView(target, margin)(as_tensor(np.full((*size, 3), (10, 100, 200), dtype=np.uint8)))
    assert image.shape == (3, *target) and image.dtype == torch.uint8
    assert (image == torch.tensor([10, 100, 200])[:, None, None]).all(), "covered: no black borders"


def test_center_view_crops_the_longer_side():
    wide, tall = as_tensor(noise(32, 64, 3)), as_tensor(noise(70, 32, 3))
    assert torch.equal(CenterView((32, 32))(wide), wide[:, :, 16:48])
    assert torch.equal(CenterView((32, 32))(tall), tall[:, 19:51])
    square = as_tensor(noise(48, 48, 3))
    assert torch.equal(CenterView((32, 32), margin=1.5)(square), square[:, 8:40, 8:40])


def test_center_view_scales_both_sides_alike():
    y, x = np.mgrid[0:100, 0:300]
    image = as_tensor(np.stack([x % 256, y * 2, (np.hypot(x - 149.5, y - 49.5) < 40) * 255], -1).astype(np.uint8))
    view = CenterView((50, 50))(image).float()
    expected_columns, expected_rows = 2 * torch.arange(50) + 100.5, 2 * (2 * torch.arange(50) + 0.5)
    torch.testing.assert_close(view[0, 20, 2:-2], expected_columns[2:-2], atol=1, rtol=0)
    torch.testing.assert_close(view[1, 2:-2, 20], expected_rows[2:-2], atol=1, rtol=0)
    assert (view[2] > 127).float().sum().item() == pytest.approx(math.pi * 20**2, rel=0.02)


def test_center_view_of_the_exact_size_is_the_image():
    image = as_tensor(noise(24, 40, 3))
    assert torch.equal(CenterView((24, 40))(image), image)
    assert torch.equal(data.pretraining_view((24, 40), 1)(image), image), "as does --min-crop 1"


def test_a_fine_tuning_view_without_extras_is_the_pretraining_view():
    image = as_tensor(noise(40, 60, 3))
    for min_crop in (0.08, 1):
        for seed in range(5):
            torch.manual_seed(seed)
            expected = data.pretraining_view((24, 16), min_crop)(image)
            torch.manual_seed(seed)
            assert torch.equal(data.finetuning_view((24, 16), min_crop, 0, 0)(image), expected)


def test_rand_augment_changes_pixels_and_nothing_else():
    image = as_tensor(noise(24, 16, 3))
    view = data.finetuning_view((24, 16), 1, rand_augment=9, erasing=0)
    torch.manual_seed(0)
    views = [view(image) for _ in range(40)]
    assert all(v.shape == (3, 24, 16) and v.dtype == torch.uint8 for v in views)
    assert sum(not torch.equal(v, image) for v in views) > 30 and len({v.numpy().tobytes() for v in views}) > 25
    assert torch.equal(image, as_tensor(noise(24, 16, 3)))


def augmented_grey(strength, count=300):
    """Views of an even grey: those that are one level all over, by level, and the others."""
    view = data.finetuning_view((16, 16), 1, strength, 0)
    torch.manual_seed(0)
    views = [view(torch.full((3, 16, 16), 100, dtype=torch.uint8)) for _ in range(count)]
    even = [int(v[0, 0, 0]) for v in views if (v == v[0, 0, 0]).all()]
    return np.bincount(even, minlength=256), [v for v in views if not (v == v[0, 0, 0]).all()]


@pytest.mark.parametrize("strength", [2, 5, 9, 10])
def test_rand_augment_is_as_strong_as_asked_for(strength):
    levels, _ = augmented_grey(strength)
    for sign in (-1, 1):  # a strength of 10 changes the brightness by 90 %, as far as torchvision goes
        level = 100 * (1 + sign * 0.09 * strength)
        assert levels[math.floor(level - 0.01) : math.floor(level - 0.01) + 2].sum() > 2


def test_rand_augment_does_two_operations_and_fills_with_grey():
    levels, others = augmented_grey(strength=5)
    assert 0.2 < levels[100] / 300 < 0.32, "half of the operations leave an even grey alone, two a quarter"
    corners = [tuple(v[:, y, x].tolist()) for v in others for y in (0, -1) for x in (0, -1)]
    assert corners.count((124, 116, 104)) > 50, "ImageNet's mean where a shifted image leaves a gap"
    assert any(0 < (v[0] - 100).abs().max() < 24 for v in others)


def test_slanted_edges_are_smooth_after_rand_augment():
    _, others = augmented_grey(strength=9)
    in_between = [((v[0] > 102) & (v[0] < 122)).any() for v in others if set(v[0].unique().tolist()) >= {100, 124}]
    assert len(in_between) > 20 and np.mean(in_between) > 0.3, "pixels are interpolated where an image is turned"


def enclosing(before, after):
    """Top, left, height and width of the smallest rectangle around all that differs."""
    changed = (before != after).any(0)
    rows, columns = (changed.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def test_random_erasing():
    image = torch.full((3, 80, 60), 2, dtype=torch.uint8)  # a level that the noise hardly takes in all three
    erase = data.RandomErasing(1.0)
    torch.manual_seed(0)
    rectangles, noises = [], []
    for _ in range(150):
        erased = erase(image)
        assert erased.dtype == torch.uint8 and erased.shape == image.shape
        top, left, height, width = rectangle = enclosing(image, erased)
        inside = erased[:, top : top + height, left : left + width]
        assert (inside != 2).any(0).all(), "all of the rectangle"
        rectangles.append(rectangle)
        noises.append(inside.flatten(1).double() / 255)
    assert (image == 2).all(), "the image itself stays as it was"
    top, left, height, width = np.array(rectangles).T
    area, shape = height * width / (80 * 60), height / width
    assert 0.018 < area.min() < 0.04 and 0.29 < area.max() < 0.34
    assert 0.28 < shape.min() < 0.5 and 2 < shape.max() < 3.5
    assert len(set(zip(top, left, strict=True))) > 100 and (top + height).max() == 80 and (left + width).max() == 60

    pixels = torch.cat(noises, dim=1)  # quartiles, which the clipping to [0, 255] leaves alone
    quartiles = pixels.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.double), dim=1).T
    expected = zip(quartiles.tolist(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    for (low, middle, high), mean, std in expected:
        assert middle == pytest.approx(mean, abs=0.005) and (high - low) / 1.349 == pytest.approx(std, abs=0.005)
    assert pixels.min() == 0 and pixels.max() == 1, "clipped, not wrapped around"
    assert (pixels == 0).double().mean() < 0.05 and (pixels == 1).double().mean() < 0.02
    assert torch.corrcoef(pixels).fill_diagonal_(0).abs().max() < 0.01, "each channel has noise of its own"


def test_random_erasing_as_often_as_asked_for():
    image = as_tensor(noise(16, 16, 3))
    for probability, low, high in ((0.0, 0, 0), (0.25, 70, 130), (1.0, 400, 400)):
        erase = data.RandomErasing(probability)
        torch.manual_seed(0)
        assert low <= sum(not torch.equal(erase(image), image) for _ in range(400)) <= high


def test_erasing_comes_after_rand_augment():
    image = as_tensor(noise(40, 60, 3))
    plain, erasing = (data.finetuning_view((32, 32), 0.5, 9, probability) for probability in (0, 1))
    for seed in range(20):
        torch.manual_seed(seed)
        before = plain(image)
        torch.manual_seed(seed)
        _, _, height, width = enclosing(before, erasing(image))
        assert 0 < height * width < 0.37 * 32 * 32, "what is drawn for it changes nothing else"


def test_grey_fine_tuning_views_are_erased_in_colour():
    options = dict(min_crop=1, rand_augment=9, erasing=1)
    colour, grey = (Views(Numbered(5), data.finetuning_view((16, 16), **options), channels) for channels in (3, 1))
    view = grey[0, 3][0]
    assert view.shape == (1, 16, 16) and view.dtype == torch.uint8
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close(view[0].float(), (weights * colour[0, 3][0]).sum(0), atol=1.1, rtol=0)


def test_normalize():
    images = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
    images[1, :, 2, 3] = torch.tensor([255, 51, 128])
    out = Normalize()(images)
    assert out.dtype == torch.float32 and out.shape == images.shape
    expected = [(1 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]
    assert out[1, :, 2, 3].tolist() == pytest.approx(expected, abs=1e-5)
    assert out[0, :, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], abs=1e-5)


def test_normalize_grey():
    out = Normalize(channels=1)(torch.full((2, 1, 4, 5), 51, dtype=torch.uint8))
    mean, std = (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3
    assert out.shape == (2, 1, 4, 5) and out.flatten().tolist() == pytest.approx([(0.2 - mean) / std] * 40, abs=1e-5)


def test_grey_views():
    colour = Views(Numbered(5), CenterView((16, 16)))
    grey = Views(Numbered(5), CenterView((16, 16)), channels=1)
    view = grey[0, 3][0]
    assert view.shape == (1, 16, 16) and view.dtype == torch.uint8
    red, green, blue = colour[0, 3][0].float()
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    torch.testing.assert_close(view[0].float(), luma, atol=1.1, rtol=0)
    assert next(iter(data.training_loader(grey, 4, workers=0)))[0].shape == (4, 1, 16, 16)


@pytest.mark.parametrize("name", ["shapes", "cifar10", "cifar100", "stl10", "some/folder"])
def test_what_is_filled_in_fits_together(name):
    unset = dict.fromkeys(("image_size", "patch_size", "min_crop", "knn_every", "workers"))
    args = argparse.Namespace(data=name, **unset)
    data.fill_in(args)
    assert args.image_size[0] % args.patch_size == 0 and 0 < args.min_crop <= 1
    assert args.knn_every >= 0 and args.workers >= 0
    given = argparse.Namespace(data=name, image_size=[7], workers=3, patch_size=None)
    data.fill_in(given)  # and what a script does not have stays away
    assert vars(given) == dict(data=name, image_size=[7], workers=3, patch_size=args.patch_size)


def test_sides():
    assert data.sides([7]) == (7, 7) and data.sides([5, 9]) == (5, 9)


# image size, smallest crop, patch size
FILLED_IN = {
    "shapes": ([32], 1.0, 4),
    "cifar10": ([32], 0.2, 4),
    "cifar100": ([32], 0.2, 4),
    "stl10": ([96], 0.2, 8),
    "some/folder": ([224], 0.2, 16),
}


def data_flags(*words):
    parser = flag_parser("")
    data.add_data_flags(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("name", FILLED_IN)
def test_data_flags_that_are_not_given_are_filled_in(name):
    args = data_flags("--data", name)
    assert (args.data_root, args.download, args.limit) == ("data", False, None)
    args.patch_size = None
    data.fill_in(args)
    assert (args.image_size, args.min_crop, args.patch_size) == FILLED_IN[name]
    assert data_flags().data == "shapes"


def test_data_flags_that_are_given_stay():
    words = "--data cifar10 --data-root elsewhere --download --limit 5 --image-size 16 24 --min-crop 0.5 --workers 0"
    args = data_flags(*words.split())
    expected = dict(
        data="cifar10", data_root="elsewhere", download=True, limit=5, image_size=[16, 24], min_crop=0.5, workers=0
    )
    assert vars(args) == expected
    data.fill_in(args)
    assert vars(args) == expected


@pytest.mark.parametrize(
    "name, cores, processes, workers",
    [
        ("shapes", 64, 1, 0),
        ("some/folder", 64, 1, 8),
        ("some/folder", 64, 16, 4),
        ("cifar10", 6, 2, 3),
        ("stl10", 1, 4, 1),
        ("some/folder", None, 1, 1),
    ],
)
def test_workers_share_the_cores_of_a_machine(monkeypatch, name, cores, processes, workers):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes > 1:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    args = data_flags("--data", name)
    data.fill_in(args)
    assert args.workers == workers


def test_only_hidden_class_folders(tmp_path):
    image_net(tmp_path, train=(".git",), val=("cat",))
    with pytest.raises(UserError, match="--knn-every need"):
        data.labelled_images(str(tmp_path), Path("data"), False, (8, 8))
