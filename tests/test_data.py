"""Data sets and views: every kind of file, class folders, views that depend only on seed, epoch and index."""

import argparse
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

import data
from data import CenterView, Normalize, Views
from helpers import scored
from util import image_files
from util.image_files import UnreadableImage
from util.small_images import InMemory
from util.training import World, check_readable

ALONE, *TWO = (World(rank, size, torch.device("cpu")) for rank, size in ((0, 1), (0, 2), (1, 2)))

# --- image files ------------------------------------------------------------------------------------------------------


def noise(*shape, high=256, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


def on_white(colour, alpha):
    return colour * (alpha[..., None] / 255) + (255.0 - alpha[..., None])


Y, X = np.mgrid[0:24, 0:40]
SMOOTH = np.stack([6 * X, 10 * Y, 120 + X - 3 * Y], axis=-1).astype(np.uint8)  # JPEG changes it by a few levels only
INKS = np.concatenate([SMOOTH, 100 - SMOOTH[..., :1] // 3], axis=-1)
FROM_INKS = (255.0 - INKS[..., :3]) * (255.0 - INKS[..., 3:]) / 255
RGB, ALPHA, BITS = noise(5, 7, 3), noise(5, 7, seed=1), noise(5, 7, high=2).astype(bool)
GREY, DEEP = RGB[..., :1], np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
IDS, COLOURS, OPACITIES = noise(5, 7, high=16, seed=1), noise(16, 3), noise(16, seed=2)
PALETTE = Image.fromarray(IDS, "P")
PALETTE.putpalette(COLOURS.flatten().tolist())
FINE, SHEETS = dict(quality=95, subsampling=0), dict(save_all=True, append_images=[Image.fromarray(255 - RGB)])

# Image to save, options; expected pixels, (H, W, 3) or (H, W, 1), and tolerance in levels.
FILES = {
    "colour.jpg": (SMOOTH, FINE, SMOOTH, 4),
    "grey.jpg": (SMOOTH[..., 0], FINE, SMOOTH[..., :1], 4),
    "progressive.jpeg": (SMOOTH, FINE | dict(progressive=True), SMOOTH, 4),
    "inks.jpg": (Image.fromarray(INKS, "CMYK"), FINE, FROM_INKS, 6),
    "rgb.png": (RGB, {}, RGB, 0),
    "rgba.png": (np.dstack([RGB, ALPHA]), {}, on_white(RGB, ALPHA), 1),
    "palette.png": (PALETTE, {}, COLOURS[IDS], 0),
    "clear palette.png": (PALETTE, dict(transparency=OPACITIES.tobytes()), on_white(COLOURS[IDS], OPACITIES[IDS]), 1),
    "grey and alpha.png": (np.dstack([GREY, ALPHA]), {}, on_white(GREY, ALPHA), 1),
    "16 bits.png": (DEEP, {}, DEEP[..., None] / 257, 1),
    "16 bits.tif": (DEEP, {}, DEEP[..., None] / 257, 1),
    "1 bit.png": (BITS, {}, BITS[..., None] * 255, 0),
    "rgb.webp": (RGB, dict(lossless=True), RGB, 0),
    "animation.webp": (RGB, SHEETS | dict(lossless=True), RGB, 0),
    "größe 图.bmp": (RGB, {}, RGB, 0),
    "pages.tif": (RGB, SHEETS | dict(compression="tiff_lzw"), RGB, 0),
    "inks.tiff": (Image.fromarray(INKS, "CMYK"), {}, FROM_INKS, 1),
}


def save(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def assert_reads(path, expected, atol):
    image = image_files.read_image(path)
    assert image.dtype == torch.uint8 and image.shape == (3, *expected.shape[:2])
    assert np.abs(image.permute(1, 2, 0).numpy().astype(float) - expected).max() <= atol


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_read_as_rgb(tmp_path, name):
    image, options, *expected = FILES[name]
    assert_reads(save(tmp_path / name, image, **options), *expected)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_images_are_turned_upright(tmp_path, name):
    turned = SMOOTH, SMOOTH[::-1, ::-1], np.rot90(SMOOTH, -1), np.rot90(SMOOTH)
    mirrored = SMOOTH[:, ::-1], SMOOTH[::-1], SMOOTH.swapaxes(0, 1), SMOOTH[::-1, ::-1].swapaxes(0, 1)
    for orientation, upright in zip((1, 3, 6, 8, 2, 4, 5, 7), turned + mirrored, strict=True):  # in EXIF's numbers
        exif = Image.Exif()
        exif[0x112] = orientation
        assert_reads(save(tmp_path / name, SMOOTH, exif=exif, **FINE if name == "a.jpg" else {}), upright, atol=4)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.bmp"])
def test_broken_files_are_unreadable(tmp_path, name):
    whole = save(tmp_path / name, noise(40, 60, 3)).read_bytes()
    cut = [whole[: int(part * len(whole))] for part in (0, 0.02, 0.3, 0.6, 0.98)]
    for content in (*cut, b"404 not found\n", b"\xff\xd8\xff\xe0"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableImage, match=name):
            image_files.read_image(tmp_path / name)


# --- folders, classes and parts ---------------------------------------------------------------------------------------


def write_images(folder, count):
    folder.mkdir(parents=True)
    for i in range(count):
        save(folder / f"{i:02}.png", noise(12, 12, 3, seed=i))
    return folder


def test_images_are_found_at_any_depth_unless_hidden(tmp_path):
    images = ["a.JPEG", "b.jpg", os.path.join("c", "d", "e.PnG"), os.path.join("c", "f.webp"), "größe 图.TIFF"]
    for name in (*images, "notes.txt", "jpg", "c/a.jpg.part", "._b.jpg", "c/.f.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [os.path.relpath(path, tmp_path) for path in image_files.find_images(tmp_path)] == images


def test_classes_have_equal_labels_in_training_and_validation(tmp_path):
    for count, name in enumerate(("train/cat", "train/cow", "train/dog", "val/cat", "val/dog", "val/.cache"), start=1):
        (write_images(tmp_path / name, count) / "._00.png").touch()
    assert len(data.unlabelled_images(str(tmp_path), "", (8, 8))) == 6, "pre-training also uses train/"
    train = data.labelled_images(str(tmp_path), "", (8, 8))
    val = data.validation_images(str(tmp_path), "", (8, 8), classes=train.classes)
    assert train.classes == val.classes == ["cat", "cow", "dog"]
    assert train.targets == [label for _, label in train] == [0, 1, 1, 2, 2, 2]
    assert val.targets == [label for _, label in val] == 4 * [0] + 5 * [2], "val lacks the cow"
    write_images(tmp_path / "val" / "owl", 1)
    with pytest.raises(SystemExit, match="owl"):
        data.validation_images(str(tmp_path), "", (8, 8), classes=train.classes)


@pytest.mark.parametrize("name", [*list(data.SETS)[1:], "nowhere"])
def test_missing_data_are_rejected(tmp_path, name):
    for read in (data.unlabelled_images, data.labelled_images, data.validation_images):
        with pytest.raises(SystemExit, match="--data"):
            read(name, str(tmp_path), (8, 8))


class Labelled(TensorDataset):
    """A data set not in memory, whose pixels are the number of the image."""

    def __init__(self, numbers, targets, classes):
        super().__init__(numbers, torch.tensor(targets))
        self.targets, self.classes = targets, classes


@pytest.mark.parametrize("kind", [InMemory, Labelled])
def test_subsets_have_labels_and_are_part_of_larger_subsets(kind):
    labels = torch.randint(10, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    images = kind(torch.arange(400)[:, None, None, None], labels, list("abcdefghij"))

    def indices(part):
        return [int(part[i][0].flatten()[0]) for i in range(len(part))]

    counts = np.bincount(images.targets).tolist()
    few = {fraction: data.few_labels(images, fraction, seed=0) for fraction in (1e-9, 0.1, 0.5)}
    for fraction, part in few.items():
        assert np.bincount(part.targets).tolist() == [max(1, round(fraction * count)) for count in counts]
    again, other = (indices(data.few_labels(images, 0.1, seed)) for seed in (0, 1))
    assert indices(few[0.1]) == again != other
    limited = {limit: data.at_most(images, limit) for limit in (30, 100, 400, 500)}
    assert [len(part) for part in limited.values()] == [30, 100, 400, 400]
    assert indices(limited[30]) == indices(data.at_most(images, 30)) and max(indices(limited[30])) > 200
    for smaller, larger in ((few[1e-9], few[0.1]), (few[0.1], few[0.5]), (limited[30], limited[100])):
        assert set(indices(smaller)) < set(indices(larger)) and smaller.classes == images.classes
        assert smaller.targets == [smaller[i][1] for i in range(len(smaller))] == [labels[i] for i in indices(smaller)]


@pytest.mark.parametrize("name", [*data.SETS, "some/folder"])
def test_flags_that_are_not_given_are_filled_in(name):
    expected = data.SETS.get(name, data.FOLDER)
    args = argparse.Namespace(data=name, **dict.fromkeys(expected))
    data.fill_in(args)
    assert {key: getattr(args, key) for key in expected} == expected and args.image_size[0] % args.patch_size == 0
    given = argparse.Namespace(data=name, image_size=[7], workers=3, min_crop=0.1)
    data.fill_in(given)
    assert vars(given) == dict(data=name, image_size=[7], workers=3, min_crop=0.1), "given flags stay, without new ones"


# --- views and loaders ------------------------------------------------------------------------------------------------


def numbered(length):
    return TensorDataset(torch.from_numpy(noise(length, 3, 48, 48)), torch.arange(length))


CROP = data.pretraining_view((8, 8), 0.2)
KINDS = dict(pretraining=CROP, finetuning=v2.Compose([CROP, *data.augmentations(9, 0.5)]))


def epoch_of(loader, epoch):
    """Return the batches of an epoch as lists of (number, view as bytes)."""
    loader.sampler.set_epoch(epoch)
    pairs = (zip(numbers.tolist(), views, strict=True) for views, numbers, _ in loader)
    return [[(number, bytes(view.numpy())) for number, view in batch] for batch in pairs]


@pytest.mark.parametrize("kind", KINDS)
def test_views_depend_on_seed_epoch_and_index_alone(kind):
    views = Views(numbered(29), KINDS[kind])
    one, by_workers = (data.training_loader(views, 8, seed=0, workers=workers, world=ALONE) for workers in (0, 2))
    two = [data.training_loader(views, 4, seed=0, workers=0, world=world) for world in TWO]
    seen = set()
    for epoch in (0, 1):
        batches = epoch_of(one, epoch)
        assert batches == epoch_of(by_workers, epoch)
        for whole, first, second in zip(batches, *(epoch_of(loader, epoch) for loader in two), strict=True):
            assert whole[0::2] == first and whole[1::2] == second, "two processes together have the batch of one"
        numbers = [number for batch in batches for number, _ in batch]
        assert len(numbers) == len(set(numbers)) == 24 and numbers != sorted(numbers)
        seen.update(*batches)
    assert len(seen) == 48, "views differ between epochs"
    state = torch.get_rng_state()
    view, other_seed = (Views(numbered(29), KINDS[kind], seed=seed)[2, 5][0] for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state), "the generator of the caller is unchanged"
    assert not torch.equal(view, other_seed)


def test_processes_evaluate_each_image_once():
    for world in (ALONE, *TWO):
        loader = data.evaluation_loader(Views(numbered(11), CenterView((8, 8))), 4, workers=0, world=world)
        assert torch.cat([numbers for _, numbers, _ in loader]).tolist() == list(range(11))[world.rank :: world.size]


def test_unreadable_images_are_replaced_in_training_and_blank_in_evaluation(tmp_path):
    images = image_files.ImageFiles(write_images(tmp_path / "images", 8))
    (tmp_path / "images" / "02.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="02.png"):
        stand_in, _, is_itself = Views(images, CenterView((8, 8)))[0, 2]
        views, _, readable = zip(*scored(images, (8, 8), channels=1), strict=True)
    assert not is_itself and len(stand_in.unique()) > 20, "another image"
    assert list(readable) == [len(view.unique()) > 1 for view in views] == [i != 2 for i in range(8)]
    check_readable(25, seen=100)
    with pytest.raises(SystemExit, match="--data"):
        check_readable(26, seen=100)


def test_center_view():
    wide, tall, fits = (torch.from_numpy(noise(3, *size)) for size in ((32, 64), (70, 32), (24, 40)))
    assert torch.equal(CenterView((32, 32))(wide), wide[:, :, 16:48])
    assert torch.equal(CenterView((32, 32))(tall), tall[:, 19:51])
    (square, _), ((view, *_),) = numbered(1)[0], scored(numbered(1), (42, 42))
    assert torch.equal(view, square[:, 3:45, 3:45]), "42 of 48 pixels, like 224 of 256"
    assert [data.evaluation_margin((side, 64)) for side in (64, 224, 256)] == [8 / 7, 8 / 7, 1], "as MAE's"
    assert torch.equal(data.pretraining_view((24, 40), min_crop=1)(fits), fits)
    for images in (numbered(1), InMemory(square[None], [0], [])):
        options = dict(flip=True, channels=3, seed=0, device=ALONE.device)
        trained = data.training_views(images, (42, 42), min_crop=1, **options)[0, 0][0]
        assert torch.equal(trained, view), "training without random crops sees what the evaluation sees"
    for size in ((1, 9), (7, 3), (17, 90)):
        assert (CenterView((33, 21), margin=8 / 7)(torch.full((3, *size), 77).byte()) == 77).all(), "without borders"
    ramp = torch.arange(200)[None, None].expand(3, 100, 200).byte()  # a column's level is its number
    assert (CenterView((50, 50))(ramp)[0, 20] - (2 * torch.arange(50) + 50.5))[2:-2].abs().max() <= 1


def test_random_crops_keep_the_requested_area_and_half_are_flipped():
    y, x = torch.meshgrid(2 * torch.arange(128), 2 * torch.arange(128), indexing="ij")
    torch.manual_seed(0)
    crops = [data.pretraining_view((64, 64), 0.3)(torch.stack([x, y, x]).byte()).float() / 255 for _ in range(100)]
    widths, heights, _ = torch.stack([crop[:, -1, -1] - crop[:, 0, 0] for crop in crops]).unbind(1)
    areas = widths.abs() * heights
    assert 0.27 < areas.min() < 0.4 and areas.max() > 0.8 and 30 < (widths < 0).sum() < 70


def test_rand_augment_has_the_requested_strength():
    torch.manual_seed(0)
    for strength in (5, 9):
        (view,) = data.augmentations(strength, 0)
        levels = {int(view(torch.full((3, 16, 16), 100, dtype=torch.uint8))[0, 8, 8]) for _ in range(200)}
        assert {100 - 9 * strength, 100 + 9 * strength} <= levels, "brightness alone"


def test_random_erasing_fills_a_rectangle_with_noise_of_imagenets_statistics():
    image = torch.full((3, 80, 60), 2, dtype=torch.uint8)  # a level that noise rarely has in all three channels
    torch.manual_seed(0)
    pixels = []
    for _ in range(100):
        erased = data.RandomErasing(1.0)(image)
        rows, columns = ((erased != 2).any(0).any(dim).nonzero() for dim in (1, 0))
        pixels.append(erased[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].flatten(1).double() / 255)
    assert 0.02 * 4800 <= min(part.shape[1] for part in pixels) and max(part.shape[1] for part in pixels) <= 0.34 * 4800
    low, median, high = torch.cat(pixels, dim=1).quantile(torch.tensor([0.25, 0.5, 0.75]).double(), dim=1)
    assert median.tolist() == pytest.approx([0.485, 0.456, 0.406], abs=0.006)
    assert ((high - low) / 1.349).tolist() == pytest.approx([0.229, 0.224, 0.225], abs=0.006)  # a normal distribution's
    assert 60 < sum(not torch.equal(data.RandomErasing(0.25)(image), image) for _ in range(400)) < 140


def test_normalize_and_grey():
    image = torch.tensor([255, 51, 128], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(1 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]
    assert Normalize()(image).flatten().tolist() == pytest.approx(expected, abs=1e-5)
    expected = (0.2 - (0.485 + 0.456 + 0.406) / 3) / ((0.229 + 0.224 + 0.225) / 3)
    assert Normalize(channels=1)(image[:, 1:2]).item() == pytest.approx(expected, abs=1e-5)
    colour, grey = (Views(numbered(5), KINDS["pretraining"], channels)[0, 3][0].float() for channels in (3, 1))
    assert (grey - torch.einsum("chw,c->hw", colour, torch.tensor([0.299, 0.587, 0.114]))).abs().max() < 1.1
