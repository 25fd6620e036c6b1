"""Images in, uint8 batches out: the built-in `shapes`, any folder of image files, torchvision's sets, COCO's format.

Every view of an image is a function of (seed, epoch, index) alone: the number of workers or of processes never changes
what is trained on. Workers hand over uint8; `Normalize` scales on the device.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import os
import pickle
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.ops import box_convert, clip_boxes_to_image, masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf
from tqdm import tqdm

from engine import UserError, add_flag, derive_seed, generator, printable, reason

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SHAPES_BYTES = 2**34  # all images of `shapes` together at most: they are kept in memory
SHAPES_LENGTH = 10_000  # training images of the built-in data, unless --limit says otherwise
TORCHVISION_SETS = ("cifar10", "cifar100", "stl10")


# What Pillow's parsers raise on broken files; OSError covers missing, unreadable, truncated and unidentified ones.
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error,
    Image.DecompressionBombError, MemoryError,
)  # fmt: skip


class UnreadableImage(Exception):
    """An image file that cannot be decoded; the message, one printable line, names the file."""

    def __init__(self, message: str):
        super().__init__(printable(message))


# --- image files ------------------------------------------------------------------------------------------------------


def read_image(path: str | Path) -> Tensor:
    """Any image file as upright RGB, uint8 (3, H, W): of an animation the first frame. Raises UnreadableImage.

    JPEG is decoded by torchvision (about twice as fast as Pillow, same pixels), all else, and what that refuses, by
    Pillow, which also looks at every header first and stops decompression bombs.
    """
    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                has_exif = "exif" in image.info  # to look for it costs torchvision a tenth of the time
                try:
                    return decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB, apply_exif_orientation=has_exif)
                except RuntimeError:
                    pass  # rare encodings, or broken: Pillow knows
            return tvf.pil_to_tensor(to_rgb(ImageOps.exif_transpose(image)))
    except DECODING_ERRORS as error:
        raise UnreadableImage(f"{path}: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Pillow image of any mode -> RGB: 16-bit grey is scaled (Pillow would clip it), transparency lies on white."""
    if image.mode.startswith("I"):  # "I;16" and its kin, or 32-bit integers that hold 16-bit values
        image = image.convert("I").point(lambda value: value / 256).convert("L")
        image.info.pop("transparency", None)  # one of the 16-bit greys, which no 8-bit one can stand for
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_image_file(path: str) -> bool:
    """Whether a file's name says it is an image, and not a hidden one: a Mac leaves ._photo.jpg beside photo.jpg."""
    name = os.path.basename(path)
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def find_images(folder: Path, flag: str = "--data ") -> list[str]:
    """All image files below `folder`, sorted; linked folders are followed, each once. Raises UserError if none."""
    if not folder.is_dir():
        raise UserError(f"{flag}{folder} is neither a folder nor one of: shapes, {', '.join(TORCHVISION_SETS)}")
    found = walk_images(folder, set())
    if not found:
        raise UserError(f"{flag}{folder} holds no image files ({' '.join(IMG_EXTENSIONS)})")
    return found


def walk_images(folder: str | Path, seen: set[str]) -> list[str]:
    """All image files below `folder`, sorted; folders in `seen`, which grows, are not entered: links may loop."""

    def warn(error: OSError) -> None:
        tqdm.write(f"skipped an unreadable folder: {printable(str(error))}")

    found = []
    for parent, children, files in os.walk(folder, followlinks=True, onerror=warn):
        real = os.path.realpath(parent)
        if real in seen:
            children.clear()
            continue
        seen.add(real)
        children.sort()
        found += [path for name in files if is_image_file(path := os.path.join(parent, name))]
    return sorted(found)


class ImageFiles(Dataset):
    """Every image file of a folder tree, without labels (-1)."""

    classes: tuple[str, ...] = ()

    def __init__(self, folder: Path):
        self.paths = find_images(folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self.paths[index]), -1


class ClassFolders(ImageFolder):
    """Image files in one folder for each class. With the `class_to_idx` of another split, some may be missing here.

    Raises OSError, or UserError where there are others.
    """

    def __init__(self, folder: Path, class_to_idx: dict[str, int] | None = None):
        self.expected = class_to_idx
        super().__init__(folder, loader=read_image, is_valid_file=is_image_file, allow_empty=class_to_idx is not None)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """As torchvision's, without hidden folders."""
        found = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if self.expected is None:
            return found, {name: i for i, name in enumerate(found)}
        unknown = [name for name in found if name not in self.expected]
        if unknown:
            raise UserError(f"--data: {directory} has classes that the training images lack: {', '.join(unknown[:5])}")
        return list(self.expected), self.expected

    def make_dataset(
        self, directory: str | Path, class_to_idx: dict[str, int], allow_empty: bool = False, **options: Any
    ) -> list[tuple[str, int]]:
        """As torchvision's, but a link that loops is followed once, and none leads from a class to all classes."""
        files = {}
        for name in sorted(class_to_idx):
            folder = os.path.join(directory, name)
            files[name] = walk_images(folder, {os.path.realpath(directory)}) if os.path.isdir(folder) else []
        empty = [name for name in files if not files[name]]
        if empty and not allow_empty:
            raise FileNotFoundError(f"there are no images in the folders {', '.join(empty)}")
        return [(path, class_to_idx[name]) for name in files for path in files[name]]


# --- built-in shapes --------------------------------------------------------------------------------------------------

# Each class is an implicit function of object coordinates, u to the right and v down, both about [-1, 1]:
# negative inside, positive outside, and about the distance to the outline near it.


def box(u: Tensor, v: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


def disk(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 0.9


def square(u: Tensor, v: Tensor) -> Tensor:
    return box(u, v, 0.75, 0.75)


def triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(v - 0.5, 0.866 * u.abs() - 0.5 * v - 0.45)


def ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.7).abs() - 0.2


def plus(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(box(u, v, 0.9, 0.3), box(u, v, 0.3, 0.9))


def star(u: Tensor, v: Tensor) -> Tensor:
    fifth = 2 * math.pi / 5  # fold the five points onto the one that looks up; its edge is a straight line
    angle = torch.remainder(torch.atan2(u, -v) + fifth / 2, fifth) - fifth / 2
    radius = torch.hypot(u, v)
    return 0.351 * (radius * angle.cos() - 0.95) + 0.936 * radius * angle.sin().abs()


def heart(u: Tensor, v: Tensor) -> Tensor:
    diamond = (u.abs() + (v - 0.1).abs() - 0.8) * 0.707
    return torch.minimum(diamond, torch.hypot(u.abs() - 0.4, v + 0.3) - 0.566)


def crescent(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(disk(u, v), 0.7 - torch.hypot(u - 0.45, v))


def hourglass(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(v.abs() - 0.8, (u.abs() - 0.8 * v.abs()) * 0.78)


def arrow(u: Tensor, v: Tensor) -> Tensor:
    head = torch.maximum(v + 0.1, (u.abs() - v - 0.9) * 0.707)
    return torch.minimum(head, box(u, v - 0.35, 0.28, 0.55))


SHAPES = (disk, square, triangle, ring, plus, star, heart, crescent, hourglass, arrow)


class Shapes(Dataset):
    """Procedural images of one object in one of ten shapes: nothing to download, as many as asked for.

    Image `index` of `split` is a function of these two and of the image size alone. A light object of random hue, size,
    place, tilt and stripes lies on a dark ground of random hue and stripes. Drawn once, kept in memory as uint8.
    """

    classes = tuple(shape.__name__ for shape in SHAPES)

    def __init__(self, split: str, length: int, image_size: tuple[int, int]):
        if not 0 < length <= 1_000_000:
            raise UserError(f"--limit {length} must be between 1 and a million shapes: they are kept in memory")
        if length * 3 * math.prod(image_size) > SHAPES_BYTES:
            raise UserError(
                f"{length:,} shapes of {image_size[0]} x {image_size[1]} pixels are too many to keep in memory: lower "
                "--limit or --image-size"
            )
        chunks = [range(i, min(i + 500, length)) for i in range(0, length, 500)]
        drawn = [draw_shapes(split, chunk, image_size) for chunk in chunks]
        self.images = torch.cat([images for images, _, _ in drawn])
        self.labels = torch.cat([labels for _, labels, _ in drawn]).tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def paint(darkest: float, brightest: float, hue: Tensor, stripe: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A colour between two, with faint stripes: draws (n, 3) and (n, 3, 1, 1), grids (1, 1, W), (1, H, 1) -> pixels."""
    direction, frequency, strength = math.pi * stripe[:, 0], 2 * math.pi * (1 + stripe[:, 1]), 0.06 * stripe[:, 2]
    wave = strength * torch.sin(frequency * (direction.cos() * x + direction.sin() * y))
    return (darkest + (brightest - darkest) * hue)[:, :, None, None] + wave[:, None]


def draw_shapes(split: str, indices: range, image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images of `shapes`: uint8 (n, 3, H, W), labels (n,), and how far the object covers each pixel (n, H, W)."""
    draws = torch.stack([torch.rand(18, generator=generator("shapes", split, index)) for index in indices])
    # Columns of (n, 1, 1) to go with pixel grids: each random number below has one meaning.
    label, size, left, top, tilt = draws[:, :5, None, None].unbind(1)
    hues, stripes = draws[:, 5:11], draws[:, 11:17, None, None]
    labels = (label.flatten() * len(SHAPES)).long()

    height, width = image_size
    aspect = torch.tensor([width, height]) / min(image_size)  # the shorter side is [-1, 1]
    y, x = (torch.linspace(-1 + 1 / n, 1 - 1 / n, n) * n / min(image_size) for n in image_size)
    x, y = x[None, None, :], y[None, :, None]

    radius = 0.6 + 0.3 * size
    right, down = x - (2 * left - 1) * (aspect[0] - radius), y - (2 * top - 1) * (aspect[1] - radius)
    angle = math.radians(15) * (2 * tilt - 1)
    u = (angle.cos() * right + angle.sin() * down) / radius
    v = (angle.cos() * down - angle.sin() * right) / radius
    distance = torch.empty_like(u)
    for i, shape in enumerate(SHAPES):
        chosen = labels == i
        distance[chosen] = shape(u[chosen], v[chosen])
    coverage = (0.5 - distance * radius * min(image_size) / 2).clamp(0, 1)  # a one-pixel soft edge

    ground = paint(0.1, 0.3, hues[:, :3], stripes[:, :3], x, y)
    thing = paint(0.7, 0.9, hues[:, 3:], stripes[:, 3:], x, y)
    images = torch.lerp(ground, thing, coverage[:, None])
    return (images.clamp(0, 1) * 255).round().byte(), labels, coverage


# --- data sets by name ------------------------------------------------------------------------------------------------


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags about images; those that are None by default `fill_in` completes."""
    add = functools.partial(add_flag, parser.add_argument_group("data"))
    add("--data", "shapes", f"shapes, {', '.join(TORCHVISION_SETS)}, or a folder with image files")
    add("--data-root", "data", "where torchvision's sets lie", metavar="FOLDER")
    add("--download", False, "let torchvision download a set that is missing", action="store_true")
    add("--limit", None, "use only N training images (default: all)", type=int, metavar="N")
    add("--image-size", None, "pixels: one number or height and width (default: 32 for shapes, CIFAR; 96 for STL; "
        "224 for a folder)", type=int, nargs="+", metavar="PIXELS")
    add("--min-crop", None, "smallest share of an image that a random crop keeps; 1: whole images (default: .2; 1 for "
        "shapes)", type=float)
    add("--workers", None, "processes that load data (default: none for shapes, else up to 8)", type=int)


def fill_in(args: argparse.Namespace) -> None:
    """Complete what depends on the data and was not given, as far as a script has it. Any unknown name is a folder."""
    small = dict(image_size=[32], patch_size=4, min_crop=0.2, knn_every=0)
    known = {
        "shapes": small | dict(min_crop=1.0, knn_every=5),  # random enough uncropped; and it shows what it learns
        "cifar10": small,
        "cifar100": small,
        "stl10": small | dict(image_size=[96], patch_size=8),
    }
    folder = dict(image_size=[224], patch_size=16, min_crop=0.2, knn_every=0)
    for name, value in (known.get(args.data, folder) | dict(workers=usual_workers(args.data))).items():
        if name in args and getattr(args, name) is None:
            setattr(args, name, value)


def usual_workers(name: str) -> int:
    """How many processes load the data of this name, where nobody says."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0 if name == "shapes" else min(8, max(1, cores))


def sides(image_size: list[int]) -> tuple[int, int]:
    """Height and width that `--image-size` gives in one number or two."""
    return image_size[0], image_size[-1]


def classes_of(images: Dataset) -> list[str]:
    """The names of a set's classes, also where it is a part of a set; none where there are no labels."""
    while isinstance(images, Subset):
        images = images.dataset
    return list(getattr(images, "classes", ()))


def describe_classes(images: Dataset, remark: str = "") -> str:
    """ of 10 classes (disk, square, triangle, ...), or nothing where a set has none."""
    classes = classes_of(images)
    return f" of {len(classes)} classes ({', '.join(classes[:3])}, ...){remark}" if classes else ""


def unlabelled_images(name: str, root: Path, download: bool, limit: int | None, image_size: tuple[int, int]) -> Dataset:
    """Training images for pre-training: `shapes`, a set of torchvision's, or a folder (its `train/`, if it has one).

    `limit` keeps that many: the first of `shapes`, a random but fixed choice of others. Raises UserError.
    """
    if name == "shapes":
        return Shapes("train", SHAPES_LENGTH if limit is None else limit, image_size)
    if name in TORCHVISION_SETS:
        images = torchvision_set(name, "train+unlabeled" if name == "stl10" else "train", root, download)
    else:
        folder = Path(name)
        images = ImageFiles(folder / "train" if (folder / "train").is_dir() else folder)
    check_limit(limit, images)
    return at_most(images, limit)


def check_limit(limit: int | None, images: Dataset) -> None:
    """Raise UserError where `--limit` asks for more than these images."""
    if limit is not None and not 0 < limit <= len(images):
        raise UserError(f"--limit {limit} must be between 1 and the {len(images)} images there are")


def labelled_images(
    name: str,
    root: Path,
    download: bool,
    image_size: tuple[int, int],
    limits: tuple[int | None, int | None] = (5000, 2000),
) -> tuple[Dataset, Dataset]:
    """Training and validation images with labels, at most `limits` of them (default: enough to score features).

    A folder has `train/` and `val/`, with a folder for each class in each; `val/` may lack some. Raises UserError.
    """
    class_to_idx = None
    if name == "shapes":
        train = Shapes("train", SHAPES_LENGTH if limits[0] is None else limits[0], image_size)
    elif name in TORCHVISION_SETS:
        train = torchvision_set(name, "train", root, download)
    else:
        train = class_folders(Path(name) / "train")
        class_to_idx = train.class_to_idx
    return at_most(train, limits[0]), validation_images(name, root, download, image_size, limits[1], class_to_idx)


def validation_images(
    name: str,
    root: Path,
    download: bool,
    image_size: tuple[int, int],
    limit: int | None = None,
    class_to_idx: dict[str, int] | None = None,
) -> Dataset:
    """Labelled images to score on: the test set of torchvision's, a folder's `val/`. Raises UserError.

    `class_to_idx` says which label each class folder gets, where that is known; else they are numbered in order.
    """
    if name == "shapes":
        return Shapes("val", 2000 if limit is None else limit, image_size)
    if name in TORCHVISION_SETS:
        return at_most(torchvision_set(name, "test", root, download), limit)
    return at_most(class_folders(Path(name) / "val", class_to_idx), limit)


def class_folders(folder: Path, class_to_idx: dict[str, int] | None = None) -> ClassFolders:
    """`ClassFolders`, with one sentence for the user where there are none, or no images. Raises UserError."""
    try:
        images = ClassFolders(folder, class_to_idx)
        if not len(images):
            raise OSError("there are no images in them")
        return images
    except (OSError, ValueError) as error:  # ValueError: nothing but hidden folders
        raise UserError(
            f"--data: fine-tuning and --knn-every need train/ and val/ with a folder for each class, but of {folder}: "
            f"{error}"
        ) from None


def labels_of(images: Dataset) -> list[int]:
    """All labels, without reading an image."""
    if isinstance(images, Subset):
        labels = labels_of(images.dataset)
        return [labels[i] for i in images.indices]
    return [int(label) for label in (images.targets if hasattr(images, "targets") else images.labels)]


def few_labels(images: Dataset, share: float | None, per_class: int | None, seed: int) -> Dataset:
    """A random part of each class, at least one image: `share` of it, or `per_class` images (all if it has fewer).

    The same seed draws the same images, and a smaller part lies within a larger one.
    """
    labels = labels_of(images)
    order = torch.randperm(len(labels), generator=generator(seed, "few labels")).tolist()
    counts = Counter(labels)
    wanted = {label: per_class if share is None else max(1, round(share * n)) for label, n in counts.items()}
    chosen, taken = [], Counter()
    for i in order:
        if taken[labels[i]] < wanted[labels[i]]:
            taken[labels[i]] += 1
            chosen.append(i)
    return Subset(images, sorted(chosen))


def torchvision_set(name: str, split: str, root: Path, download: bool) -> Dataset:
    """CIFAR-10, CIFAR-100 or STL-10 from `root`. Raises UserError where it is missing or damaged."""
    to_tensor = v2.PILToTensor()
    try:
        if name == "stl10":
            return torchvision.datasets.STL10(root, split, transform=to_tensor, download=download)
        cifar = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
        return cifar(root, train=split == "train", transform=to_tensor, download=download)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"--data {name} is not whole in --data-root {root} (--download fetches it): {error}") from None


def at_most(images: Dataset, limit: int | None) -> Dataset:
    """A random but fixed choice of `limit` images: in a sorted folder the first ones would be all of one class."""
    if limit is None or limit >= len(images):
        return images
    return Subset(images, torch.randperm(len(images), generator=generator("limit"))[:limit].tolist())


# --- views and loaders ------------------------------------------------------------------------------------------------


class CenterView:
    """The largest centred part that has the shape of `size` (H, W), or 1 / `margin` of its sides, resized to `size`."""

    def __init__(self, size: tuple[int, int], margin: float = 1.0):
        self.size, self.margin = size, margin

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if (height, width) == self.size:
            return image
        scale = min(height / self.size[0], width / self.size[1]) / self.margin
        part = tvf.center_crop(image, [max(1, round(scale * side)) for side in self.size])
        return tvf.resize(part, list(self.size), v2.InterpolationMode.BICUBIC, antialias=True)


def pretraining_view(size: tuple[int, int], min_crop: float) -> Callable[[Tensor], Tensor]:
    """Random crop of at least `min_crop` of the area, resized to `size`, randomly flipped; 1: the image as it is."""
    if min_crop == 1:
        return CenterView(size)
    crop = v2.RandomResizedCrop(size, (min_crop, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


class RandomErasing(v2.RandomErasing):
    """torchvision's, filling the erased rectangle of uint8 pixels with noise of ImageNet's mean and deviation.

    That is MAE's and timm's "pixel" mode, before normalisation instead of after it.
    """

    def __init__(self, probability: float):
        super().__init__(probability, value="random")

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        if params["v"] is not None:
            mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
            params["v"] = ((params["v"] * std + mean).clamp(0, 1) * 255).round().byte()
        return params


def finetuning_view(
    size: tuple[int, int], min_crop: float, rand_augment: int, erasing: float
) -> Callable[[Tensor], Tensor]:
    """`pretraining_view`, then two operations of RandAugment at a strength of 0 (none) to 10, then RandomErasing."""
    steps = [pretraining_view(size, min_crop)]
    if rand_augment:
        grey = [round(255 * mean) for mean in IMAGENET_MEAN]
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(v2.RandAugment(2, rand_augment, num_magnitude_bins=11, interpolation=bilinear, fill=grey))
    if erasing:
        steps.append(RandomErasing(erasing))
    return v2.Compose(steps)


class Views(Dataset):
    """Views of images by (epoch, index): (view uint8 (C, H, W), label, messages about unreadable files met on the way).

    An unreadable file gives way to another image, drawn at random, or with `replace=False` to a blank with label -1;
    `engine.Unreadable` counts and decides when to stop.
    """

    def __init__(
        self,
        images: Dataset,
        view: Callable[[Tensor], Tensor],
        channels: int = 3,
        seed: int = 0,
        replace: bool = True,
    ):
        self.images, self.view, self.channels, self.seed, self.replace = images, view, channels, seed, replace

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, list[str]]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, "view", *key))
            image, label, unreadable = self.read(key[1])
            image, label = self.show(image, label)
        return image if self.channels == 3 else tvf.rgb_to_grayscale(image), label, unreadable

    def show(self, image: Tensor, label: Any) -> tuple[Tensor, Any]:
        """The view of an image, and what becomes of its label."""
        return self.view(image), label

    def read(self, index: int) -> tuple[Tensor, int, list[str]]:
        """Image `index`, or where that is unreadable another one; its label; messages about the unreadable ones."""
        unreadable: list[str] = []
        while len(unreadable) < 20:
            try:
                return *self.images[index], unreadable
            except UnreadableImage as error:
                unreadable.append(str(error))
                if not self.replace:
                    break
                index = int(torch.randint(len(self), ()))
        # Twenty in a row (the loop will stop now), or one that is not to be replaced.
        return torch.zeros(3, 1, 1, dtype=torch.uint8), -1, unreadable


class EpochSampler(DistributedSampler):
    """torch's DistributedSampler, handing out (epoch, index): views differ from epoch to epoch in every worker."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


def collate(samples: list[tuple[Tensor, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    """Views (B, C, H, W), labels (B,), all messages about unreadable files."""
    views, labels = default_collate([sample[:2] for sample in samples])
    return views, labels, [message for sample in samples for message in sample[2]]


def training_loader(
    views: Views,
    batch_size: int,
    workers: int,
    rank: int = 0,
    num_processes: int = 1,
    collate_fn: Callable = collate,
) -> DataLoader:
    """Shuffled batches of one process; call `loader.sampler.set_epoch` before each epoch.

    Process r of R gets images r, r + R, ... of the common order: their batches make up the batch of one process.
    """
    seed = derive_seed(views.seed, "order") % 2**32  # torch adds the epoch: plain seeds 0, 1, ... would share orders
    sampler = EpochSampler(views, num_processes, rank, shuffle=True, seed=seed, drop_last=True)
    return DataLoader(
        views,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate_fn,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


def evaluation_view(size: tuple[int, int]) -> CenterView:
    """What features and classifiers are scored on: the centre of an image, 8/7 smaller (256 -> 224, as is usual)."""
    return CenterView(size, margin=8 / 7)


def evaluation_views(images: Dataset, size: tuple[int, int], channels: int) -> Views:
    """Each image as `evaluation_view` shows it, and a blank for an unreadable one."""
    return Views(images, evaluation_view(size), channels, replace=False)


def evaluation_loader(
    views: Views,
    batch_size: int,
    workers: int,
    rank: int = 0,
    num_processes: int = 1,
    collate_fn: Callable = collate,
) -> DataLoader:
    """All views once, in order; process r of R gets r, r + R, ...: none is repeated to fill up, some get one less."""
    keys = [(0, index) for index in range(rank, len(views), num_processes)]
    return DataLoader(views, batch_size, sampler=keys, num_workers=workers, collate_fn=collate_fn)


class Normalize(nn.Module):
    """uint8 (B, C, H, W) -> float with ImageNet's mean and deviation, on the module's device; C is 3, or 1 for grey."""

    def __init__(self, channels: int = 3):
        super().__init__()
        mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
        self.register_buffer("mean", mean if channels == 3 else mean.mean(0, keepdim=True))
        self.register_buffer("std", std if channels == 3 else std.mean(0, keepdim=True))

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.mean.device, non_blocking=True)
        return (images.float() / 255 - self.mean) / self.std


# --- detection: COCO's format -----------------------------------------------------------------------------------------

Target = dict[str, Any]  # of an image: boxes (n, 4), labels (n,), masks (n, H, W), image_id


class CocoDetection(torchvision.datasets.CocoDetection):
    """Images and their objects, from an image folder and an annotation file in COCO's format. Raises UserError.

    An item is an image, uint8 (3, H, W), and its target: `boxes`, float32 (n, 4), left, top, right, bottom in pixels;
    `labels`, int64 (n,), from 1 in the order of the category ids, which may have holes (0 is the background); `masks`,
    uint8 (n, H, W); `image_id`. Crowds and boxes without an area are no targets; `coco` has them for the evaluation.
    `ids` are the images: all, or `limit` of them at random; `categories` (id, name) of labels 1, 2, ...
    """

    def __init__(self, folder: Path, annotations: Path, limit: int | None = None):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the reader is talkative
                super().__init__(folder, annotations)
                tidy_annotations(self.coco.dataset)
                self.coco.createIndex()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"--data: {annotations} is no annotation file in COCO's format ({reason(error)})") from None
        self.use_categories([(category, self.coco.cats[category]["name"]) for category in sorted(self.coco.cats)])
        self.ids = sorted(at_most(self.ids, limit))

    def use_categories(self, categories: list[tuple[int, str]]) -> None:
        """Number the labels by these ids and names, of another split say, instead of by its own. Raises UserError."""
        own = [(i, category["name"]) for i, category in self.coco.cats.items()]
        unknown = [category for category in own if category not in categories]
        if unknown:
            raise UserError(f"--data: {self.root} has categories that the training images lack: {unknown[:5]}")
        self.categories = categories
        self.category_ids = [category for category, _ in categories]
        self.labels = {category: label for label, category in enumerate(self.category_ids, start=1)}

    def num_objects(self) -> int:
        """How many objects there are to find, crowds not counted."""
        return sum(not a["iscrowd"] for image_id in self.ids for a in self.coco.imgToAnns.get(image_id, ()))

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        info = self.coco.imgs[self.ids[index]]
        path = Path(self.root) / info["file_name"]
        image, size = read_image(path), (info["height"], info["width"])
        if tuple(image.shape[-2:]) != size:
            raise UnreadableImage(f"{path}: {image.shape[-2]} x {image.shape[-1]} pixels, annotated as {size}")
        refuse_thin(path, size)
        return image, self.target(info)

    def target(self, info: dict[str, Any]) -> Target:
        """The objects of one image. Raises UnreadableImage where a mask cannot be read or has another size."""
        size = info["height"], info["width"]
        found = [a for a in self.coco.imgToAnns.get(info["id"], ()) if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
        boxes = clip_boxes_to_image(box_convert(boxes, "xywh", "xyxy"), size)
        solid = (boxes[:, 2:] - boxes[:, :2] > 0.01).all(dim=1)  # less could round to nothing when resized
        found = [a for a, is_solid in zip(found, solid.tolist(), strict=True) if is_solid]
        try:
            masks = [torch.from_numpy(self.coco.annToMask(a)) for a in found]
            masks = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8)
            if masks.shape[1:] != size:
                raise ValueError(f"they are {tuple(masks.shape[1:])}")
        except (ValueError, RuntimeError, TypeError, LookupError) as error:
            raise UnreadableImage(f"{info['file_name']}: its masks do not fit {size} ({reason(error)})") from None
        labels = torch.tensor([self.labels[a["category_id"]] for a in found], dtype=torch.int64)
        return dict(boxes=boxes[solid], labels=labels, masks=masks, image_id=info["id"])


def refuse_thin(path: str | Path, size: tuple[int, int]) -> None:
    """Raise UnreadableImage where a detector's resizing would leave nothing of an image of `size` (H, W)."""
    if max(size) > 32 * min(size):
        raise UnreadableImage(f"{path}: {size} is so thin that nothing would be left of it at a usual length")


def tidy_annotations(content: dict[str, Any]) -> None:
    """Check an annotation file's content and complete what COCO's own evaluation needs, in place. Raises ValueError.

    Annotations get new ids from 1: the evaluation takes an object of id 0 for one that was not found, and of two with
    the same id knows only one. Those of images that are not listed go; polygons of less than three points go, which
    would be read as boxes.
    """
    for category in content["categories"]:
        category["name"] = str(category["name"])
    categories = {category["id"]: category["name"] for category in content["categories"]}
    if not categories or len(categories) != len(content["categories"]):
        raise ValueError("no categories, or two with the same id")
    images = {image["id"]: (image["file_name"], image["height"], image["width"]) for image in content["images"]}
    if not images or len(images) != len(content["images"]):
        raise ValueError("no images, or two with the same id")
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in images]
    for number, annotation in enumerate(content["annotations"], start=1):
        name = f"annotation {annotation.get('id')}"
        if annotation["category_id"] not in categories:
            raise ValueError(f"{name} is of category {annotation['category_id']}, which is not listed")
        box = annotation["bbox"]
        if len(box) != 4 or not all(map(math.isfinite, box)):
            raise ValueError(f"{name} has the box {box}")
        mask = annotation.get("segmentation")
        if isinstance(mask, list):
            mask = annotation["segmentation"] = [points for points in mask if len(points) >= 6]
        if not mask:
            raise ValueError(f"{name} has no mask (segmentation), and Mask R-CNN learns masks")
        annotation["id"] = number
        annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
        area = annotation.get("area")
        if not isinstance(area, int | float) or not math.isfinite(area):
            annotation["area"] = box[2] * box[3]


def detection_folder(name: str, root: Path, limit: int | None, image_size: tuple[int, int]) -> Path:
    """Where the images with objects are: `shapes` are drawn into `root` if they are not there yet, at least `limit` to
    train on; `coco` is in `root`; any other name is a folder like COCO's. Raises UserError.
    """
    if name == "shapes":
        if limit is not None and limit > MAX_SCENES:
            raise UserError(f"--limit {limit} must be at most {MAX_SCENES:,} scenes: they are drawn to the disk")
        return write_scenes(root, image_size, dict(train=max(limit or 0, NUM_SCENES["train"]), val=NUM_SCENES["val"]))
    return root if name == "coco" else Path(name)


def find_annotations(folder: Path, split: str) -> tuple[Path, Path]:
    """The image folder and the annotation file of `split`, train or val. Raises UserError."""
    files = sorted((folder / "annotations").glob(f"instances_{split}*.json"))
    if len(files) != 1:
        what = f"several: {', '.join(file.name for file in files)}" if files else "none"
        raise UserError(
            f"--data: {folder} must have one file annotations/instances_{split}*.json, beside a folder with its images "
            f"(instances_{split}2017.json: {split}2017/), but has {what}"
        )
    images = folder / files[0].stem.removeprefix("instances_")
    if not images.is_dir():
        raise UserError(f"--data: there is no folder {images} with the images of {files[0]}")
    return images, files[0]


# --- detection: built-in scenes of shapes -----------------------------------------------------------------------------

NUM_SCENES = dict(train=400, val=100)  # more to train on if --limit says so
MAX_SCENES = 100_000
SCENE_CATEGORIES = tuple(range(1, 2 * len(SHAPES), 2))  # ids with holes, as COCO's have


def draw_scene(split: str, index: int, image_size: tuple[int, int]) -> tuple[Tensor, list[int], Tensor]:
    """One to five `shapes` on one ground: uint8 (3, H, W), their labels from 0, and what is seen of each, (n, H, W).

    A function of (split, index, size) alone. Sizes are 0.2 to 0.45 of the shorter side; outlines hardly overlap, and
    where they do the later object is in front.
    """
    random = generator("scene", split, index)
    height, width = image_size
    short = min(image_size)
    rows, columns = torch.arange(height)[None, :, None] + 0.5, torch.arange(width)[None, None, :] + 0.5  # of pixels
    x, y = 2 * columns / short, 2 * rows / short

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random)

    image = paint(0.1, 0.3, draw(1, 3), draw(1, 3, 1, 1), x, y)
    placed: list[tuple[float, float, float]] = []
    labels, masks = [], torch.zeros(0, height, width, dtype=torch.bool)
    for _ in range(1 + int(5 * draw(1))):
        radius = short * (0.1 + 0.125 * draw(1).item())
        for left, top in draw(10, 2).tolist():  # ten tries to find a free place
            place = radius + left * (width - 2 * radius), radius + top * (height - 2 * radius)
            if all(math.dist(place, other) > 0.8 * (radius + size) for *other, size in placed):
                break
        else:
            continue
        placed.append((*place, radius))
        labels.append(int(len(SHAPES) * draw(1)))
        angle = math.radians(15) * (2 * draw(1).item() - 1)
        right, down = (columns - place[0]) / radius, (rows - place[1]) / radius
        u, v = math.cos(angle) * right + math.sin(angle) * down, math.cos(angle) * down - math.sin(angle) * right
        coverage = (0.5 - SHAPES[labels[-1]](u, v) * radius).clamp(0, 1)  # (1, H, W), with a soft edge of one pixel
        image = torch.lerp(image, paint(0.7, 0.9, draw(1, 3), draw(1, 3, 1, 1), x, y), coverage)
        masks = torch.cat([masks & (coverage < 0.5), coverage >= 0.5])
    return (image[0].clamp(0, 1) * 255).round().byte(), labels, masks


def write_scenes(root: Path, image_size: tuple[int, int], lengths: dict[str, int]) -> Path:
    """Scenes as a folder in COCO's format, of `lengths` by split; drawn once, and then whole. Raises UserError."""
    height, width = image_size
    folder = root / f"shapes-{height}x{width}-{'-'.join(map(str, lengths.values()))}"
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".shapes-") as temporary:
            whole = Path(temporary) / "whole"
            (whole / "annotations").mkdir(parents=True)
            for split, length in lengths.items():
                (whole / f"{split}2017").mkdir()
                content = write_split(whole / f"{split}2017", split, length, image_size)
                (whole / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
            whole.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another run was faster
            raise UserError(f"--data-root {root} cannot be written ({reason(error)})") from None
    return folder


def write_split(folder: Path, split: str, length: int, image_size: tuple[int, int]) -> dict[str, Any]:
    """Write the images of one split, from image id 1; returns the content of its annotation file."""
    images, annotations = [], []
    for index in range(length):
        pixels, labels, masks = draw_scene(split, index, image_size)
        name = f"{index + 1:012}.png"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / name)
        images.append(dict(id=index + 1, file_name=name, height=image_size[0], width=image_size[1]))
        for label, mask in zip(labels, masks, strict=True):
            rle = encode_mask(mask)
            annotations.append(dict(
                id=len(annotations) + 1, image_id=index + 1, category_id=SCENE_CATEGORIES[label], iscrowd=0,
                bbox=coco_mask.toBbox(rle).tolist(), area=int(mask.sum()), segmentation=rle,
            ))  # fmt: skip
    categories = [dict(id=i, name=shape.__name__) for i, shape in zip(SCENE_CATEGORIES, SHAPES, strict=True)]
    return dict(images=images, annotations=annotations, categories=categories)


def encode_mask(mask: Tensor) -> dict[str, Any]:
    """A mask (H, W), bool, run-length encoded as COCO's tools do, fit for JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return rle | dict(counts=rle["counts"].decode("ascii"))


# --- detection: views -------------------------------------------------------------------------------------------------


def flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Mirror an image (C, H, W) and its objects, left to right."""
    left, top, right, bottom = target["boxes"].unbind(1)
    boxes = torch.stack([image.shape[-1] - right, top, image.shape[-1] - left, bottom], dim=1)
    return image.flip(-1), target | dict(boxes=boxes, masks=target["masks"].flip(-1))


def crop(image: Tensor, target: Target, top: int, left: int, height: int, width: int) -> tuple[Tensor, Target]:
    """A part of an image and what of its objects is in it; boxes shrink to what is seen, objects out of sight go."""
    area = ..., slice(top, top + height), slice(left, left + width)
    masks = target["masks"][area]
    seen = masks.flatten(1).any(dim=1).bool()
    boxes = masks_to_boxes(masks[seen]) + torch.tensor([0, 0, 1, 1])  # from a pixel's edge to an edge
    return image[area], target | dict(boxes=boxes, labels=target["labels"][seen], masks=masks[seen])


def random_crop(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """DETR's crop: of 384 to 600 pixels a side (or the whole side), when the shorter one measures 400, 500 or 600.

    DETR resizes, crops and resizes again; here the crop is worked out in the image's own pixels, so that it is resized
    once, by the model.
    """

    def draw(lowest: int, highest: int) -> int:
        return int(torch.randint(lowest, highest + 1, ()))

    sides = image.shape[-2:]
    scale = (400, 500, 600)[draw(0, 2)] / min(sides)
    scaled = [round(scale * side) for side in sides]
    lengths = [draw(min(384, side), min(600, side)) for side in scaled]
    lengths = [min(side, max(1, round(length / scale))) for side, length in zip(sides, lengths, strict=True)]
    offsets = [draw(0, side - length) for side, length in zip(sides, lengths, strict=True)]
    return crop(image, target, *offsets, *lengths)


def detection_view(crop_share: float) -> Callable[[Tensor, Target], tuple[Tensor, Target]]:
    """Half of the images flipped, `crop_share` of them cropped; the model resizes."""

    def view(image: Tensor, target: Target) -> tuple[Tensor, Target]:
        do_flip, do_crop = torch.rand(2).tolist()
        if do_flip < 0.5:
            image, target = flip(image, target)
        return random_crop(image, target) if do_crop < crop_share else (image, target)

    return view


class DetectionViews(Views):
    """As `Views`, for images with targets; what stands for an unreadable one has no objects, and image id -1."""

    def show(self, image: Tensor, target: Target | int) -> tuple[Tensor, Target]:
        if target == -1:
            target = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), image_id=-1)
            target["masks"] = torch.zeros(0, *image.shape[-2:], dtype=torch.uint8)
        return self.view(image, target)


def collate_detection(samples: list[tuple[Tensor, Target, list[str]]]) -> tuple[list[Tensor], list[Target], list[str]]:
    """Views and targets as lists, since sizes and numbers differ, and all messages about unreadable files."""
    images, targets, messages = zip(*samples, strict=True)
    return list(images), list(targets), [message for some in messages for message in some]
