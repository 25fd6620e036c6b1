"""Images in, uint8 batches out: the built-in `shapes`, any folder of image files, torchvision's sets.

Every view of an image is a function of (seed, epoch, index) alone: the number of workers or of processes never changes
what is trained on. Workers hand over uint8; `Normalize` scales on the device.
"""

import argparse
import functools
import math
import os
import pickle
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from engine import UserError, add_flag, derive_seed, generator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SHAPES_LENGTH = 10_000  # training images of the built-in data, unless --limit says otherwise
TORCHVISION_SETS = ("cifar10", "cifar100", "stl10")


# What Pillow's parsers raise on broken files; OSError covers missing, unreadable, truncated and unidentified ones.
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip


class UnreadableImage(Exception):
    """An image file that cannot be decoded; the message names the file."""


# --- image files ------------------------------------------------------------------------------------------------------


def read_image(path: str | Path) -> Tensor:
    """Any image file as upright RGB, uint8 (3, H, W): of an animation the first frame. Raises UnreadableImage.

    JPEG is decoded by torchvision (about twice as fast as Pillow, same pixels), all else, and what that refuses, by
    Pillow, which also looks at every header first and stops decompression bombs.
    """
    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                try:
                    return decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB, apply_exif_orientation=True)
                except RuntimeError:
                    pass  # rare encodings, or broken: Pillow knows
            return tvf.pil_to_tensor(to_rgb(ImageOps.exif_transpose(image)))
    except DECODING_ERRORS as error:
        printable = f"{path}: {error}".encode(errors="backslashreplace").decode()  # names may hold any bytes
        raise UnreadableImage(printable) from None


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


def find_images(folder: Path) -> list[str]:
    """All image files below `folder`, sorted; linked folders are followed, each once. Raises UserError if none."""
    if not folder.is_dir():
        raise UserError(f"--data {folder} is neither a folder nor one of: shapes, {', '.join(TORCHVISION_SETS)}")
    found, seen = [], set()
    for parent, children, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            children.clear()  # a link that loops
            continue
        seen.add(real)
        children.sort()
        found += [path for name in files if is_image_file(path := os.path.join(parent, name))]
    if not found:
        raise UserError(f"--data {folder} holds no image files ({' '.join(IMG_EXTENSIONS)})")
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
        chunks = [range(i, min(i + 500, length)) for i in range(0, length, 500)]
        drawn = [draw_shapes(split, chunk, image_size) for chunk in chunks]
        self.images = torch.cat([images for images, _, _ in drawn])
        self.labels = torch.cat([labels for _, labels, _ in drawn]).tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


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

    def paint(darkest: float, brightest: float, hue: Tensor, stripe: Tensor) -> Tensor:
        direction, frequency, strength = math.pi * stripe[:, 0], 2 * math.pi * (1 + stripe[:, 1]), 0.06 * stripe[:, 2]
        wave = strength * torch.sin(frequency * (direction.cos() * x + direction.sin() * y))
        return (darkest + (brightest - darkest) * hue)[:, :, None, None] + wave[:, None]

    ground = paint(0.1, 0.3, hues[:, :3], stripes[:, :3])
    thing = paint(0.7, 0.9, hues[:, 3:], stripes[:, 3:])
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
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = 0 if args.data == "shapes" else min(8, max(1, cores))
    for name, value in (known.get(args.data, folder) | dict(workers=workers)).items():
        if name in args and getattr(args, name) is None:
            setattr(args, name, value)


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
    if limit is not None and not 0 < limit <= len(images):
        raise UserError(f"--limit {limit} must be between 1 and the {len(images)} images there are")
    return at_most(images, limit)


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
    """`ClassFolders`, with one sentence for the user where there are none. Raises UserError."""
    try:
        return ClassFolders(folder, class_to_idx)
    except OSError as error:
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
            view = self.view(image)
        return view if self.channels == 3 else tvf.rgb_to_grayscale(view), label, unreadable

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


def training_loader(views: Views, batch_size: int, workers: int, rank: int = 0, num_processes: int = 1) -> DataLoader:
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
        collate_fn=collate,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


def evaluation_views(images: Dataset, size: tuple[int, int], channels: int) -> Views:
    """What features and classifiers are scored on: the centre of each image, 8/7 smaller (256 -> 224, as is usual)."""
    return Views(images, CenterView(size, margin=8 / 7), channels, replace=False)


def evaluation_loader(
    views: Views, batch_size: int, workers: int, rank: int = 0, num_processes: int = 1
) -> DataLoader:
    """All views once, in order; process r of R gets r, r + R, ...: none is repeated to fill up, some get one less."""
    keys = [(0, index) for index in range(rank, len(views), num_processes)]
    return DataLoader(views, batch_size, sampler=keys, num_workers=workers, collate_fn=collate)


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
