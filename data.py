"""Data sets, views and loaders: synthetic `shapes`, torchvision's sets, any folder of image files.

Every view is a function of (seed, epoch, index of the image) alone, so the number of workers or processes does not
change the training images. Batches are uint8; `Normalize` scales them on the device.
"""

import argparse
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.transforms import v2

from model import IMAGENET_MEAN, IMAGENET_STD, ViT
from util.image_files import ImageFiles, UnreadableImage, class_folders
from util.shapes import Shapes
from util.small_images import BatchViews, CenterView, InMemory, in_channels, torchvision_set
from util.training import World, derive_seed, generator, positive, to_device

# Data sets by name, with their default settings; util/small_images.py reads them into memory. Any other name is a
# folder.
SMALL = dict(image_size=[32], patch_size=4, channels=3, min_crop=0.2, knn_every=5)
SETS = {
    "shapes": SMALL | dict(min_crop=1.0),  # random enough without crops
    "mnist": SMALL | dict(image_size=[28], channels=1, min_crop=1.0),  # uncropped, because crops are also mirrored
    "fashionmnist": SMALL | dict(image_size=[28], channels=1, min_crop=0.5),
    "cifar10": SMALL,
    "cifar100": SMALL,
    "stl10": SMALL | dict(image_size=[96], patch_size=8),
}
FOLDER = dict(image_size=[224], patch_size=16, channels=3, min_crop=0.2, knn_every=0)
NAMED = SETS | {"a folder": FOLDER}
NUM_SHAPES = dict(train=10_000, val=2_000)


def add_flags(add: Callable[..., Any], *, limited: str, size_of: str = "", before: str = "") -> None:
    """Add the flags about images. `fill_in` completes flags that are None by default.

    For the help texts: `limited` says what `--limit` limits, `size_of` and `before` what overrides the defaults.
    """
    sizes = size_of or ", ".join(f"{name}: {usual['image_size'][0]}" for name, usual in NAMED.items())
    size = f"height and width in pixels, or one number for both (default: {sizes})"
    root = f"folder with torchvision's data sets (mnist, cifar10, ...) (default: {before}data)"
    sets = f"{', '.join(SETS)}, or a folder with image files (default: {before}shapes)"
    add("--data", default="shapes", metavar="NAME", help=sets)
    add("--data-root", default="data", metavar="FOLDER", help=root)
    add("--download", action="store_true", help="let torchvision download the data set if it is missing")
    limit = f"use N images, chosen at random, {limited} (default: all); shapes: make N"
    add("--limit", type=positive, metavar="N", help=limit)
    add("--image-size", type=int, nargs="+", metavar="PIXELS", help=size)
    add_workers_flag(add)


def add_workers_flag(add: Callable[..., Any]) -> None:
    """Add `--workers`."""
    text = "processes that load files, per training process; 0: load in the training process"
    add("--workers", type=int, metavar="N", help=f"{text} (default: one per core, at most 8)")


def add_view_flags(add: Callable[..., Any]) -> None:
    """Add `--min-crop`, None by default (see `fill_in`), and `--no-flip`, for random views of training images."""
    crops = ", ".join(f"{name}: {usual['min_crop']:g}" for name, usual in NAMED.items())
    crop = "smallest area of a random crop, as a fraction of the image; 1: the evaluation's centre crop"
    add("--min-crop", type=float, metavar="FRACTION", help=f"{crop} (default: {crops})")
    add_flip_flag(add, unless=", but never with --min-crop 1")


def add_flip_flag(add: Callable[..., Any], unless: str = "") -> None:
    """Add `--no-flip`, stored as `flip`; `unless` names an exception in the help text."""
    text = f"never mirror training images (default: left to right with probability 0.5{unless})"
    add("--no-flip", dest="flip", action="store_false", help=text)


def fill_in(args: argparse.Namespace) -> None:
    """Set flags that are None to the defaults of the data. Ends the script if --min-crop is invalid."""
    for name, value in SETS.get(args.data, FOLDER).items():
        if name in args and getattr(args, name) is None:
            setattr(args, name, value)
    if "min_crop" in args and not 0 < args.min_crop <= 1:
        raise SystemExit(f"error: --min-crop must be above 0 and at most 1, got {args.min_crop:g}")


# --- data sets --------------------------------------------------------------------------------------------------------


def unlabelled_images(
    name: str, root: str, size: tuple[int, int], limit: int | None = None, download: bool = False
) -> Dataset:
    """Return images for pre-training, or `limit` of them at random; of a folder, those in `train/` if it exists.

    Items are images uint8 (3, H, W) and labels (-1 if unknown). Only `shapes` are made in `size` (H, W).
    """
    if name in SETS:
        return named_images(name, "train+unlabeled" if name == "stl10" else "train", root, size, limit, download)
    train = Path(name) / "train"
    return at_most(ImageFiles(train if train.is_dir() else Path(name)), limit)


def labelled_images(
    name: str, root: str, size: tuple[int, int], limit: int | None = None, download: bool = False
) -> Dataset:
    """Return labelled training images, or `limit` of them at random; of a folder, those in `train/`.

    Items are images uint8 (3, H, W) and labels. Only `shapes` are made in `size` (H, W).
    """
    if name in SETS:
        return named_images(name, "train", root, size, limit, download)
    return at_most(class_folders(Path(name) / "train"), limit)


def validation_images(
    name: str,
    root: str,
    size: tuple[int, int],
    limit: int | None = None,
    download: bool = False,
    classes: list[str] | None = None,
) -> Dataset:
    """Return labelled validation images, or `limit` of them at random: torchvision's test set, or a folder's `val/`.

    Items are images uint8 (3, H, W) and labels; in a folder, label i is `classes[i]`. Only `shapes` are made in `size`.
    """
    if name in SETS:
        return named_images(name, "val" if name == "shapes" else "test", root, size, limit, download)
    return at_most(class_folders(Path(name) / "val", classes), limit)


def named_images(
    name: str, split: str, root: str, size: tuple[int, int], limit: int | None, download: bool
) -> InMemory:
    """Return images of one of SETS: all, or `limit` at random. `shapes` are made in any number."""
    if name == "shapes":
        return Shapes(split, limit or NUM_SHAPES[split], size)
    return at_most(torchvision_set(name, split, root, download), limit)


def at_most(images: Dataset, limit: int | None) -> Dataset:
    """Return `limit` images at random, always the same ones, or all if there are at most `limit`.

    Random, because the first images of a sorted folder share a class.
    """
    if limit is None or limit >= len(images):
        return images
    return subset(images, torch.randperm(len(images), generator=generator("limit"))[:limit].tolist())


def few_labels(images: Dataset, fraction: float, seed: int) -> Dataset:
    """Return a random `fraction` of the images of each class, at least one per class.

    The same seed gives the same images, and a smaller subset is part of a larger one.
    """
    order = torch.randperm(len(images), generator=generator(seed, "few labels")).tolist()
    wanted = {label: max(1, round(fraction * count)) for label, count in Counter(images.targets).items()}
    chosen, taken = [], Counter()
    for i in order:
        label = images.targets[i]
        if taken[label] < wanted[label]:
            taken[label] += 1
            chosen.append(i)
    return subset(images, sorted(chosen))


def subset(images: Dataset, indices: list[int]) -> Dataset:
    """Return a subset that, unlike torch's Subset, has `targets` and `classes`. Indices may repeat."""
    if isinstance(images, InMemory):
        return InMemory(images.images[indices], [images.targets[i] for i in indices], images.classes)
    part = Subset(images, indices)
    part.classes = images.classes
    if hasattr(images, "targets"):
        part.targets = [images.targets[i] for i in indices]
    return part


def describe(images: Dataset) -> str:
    """Describe a data set: 10,000 images of 10 classes (disk, square, triangle, ...)."""
    names = [*images.classes[:3], *["..."] * (len(images.classes) > 3)]
    classes = f" of {len(images.classes)} classes ({', '.join(names)})" if names else ""
    return f"{len(images):,} images{classes}"


# --- views and loaders ------------------------------------------------------------------------------------------------


def sides(image_size: list[int]) -> tuple[int, int]:
    """Return height and width from one or two numbers of `--image-size`."""
    return image_size[0], image_size[-1]


def pretraining_view(size: tuple[int, int], min_crop: float, flip: bool = True) -> Callable[[Tensor], Tensor]:
    """Build the view of pre-training: uint8 (C, H, W) of any size -> uint8 (C, *size).

    A random crop of at least the fraction `min_crop` of the area is resized and, if `flip`, mirrored with probability
    0.5. With `min_crop` 1, the view is the centre crop of the evaluation, never mirrored.
    """
    if min_crop == 1:
        return CenterView(size, evaluation_margin(size))
    crop = v2.RandomResizedCrop(size, (min_crop, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(0.5 if flip else 0.0)])


class RandomErasing(v2.RandomErasing):
    """torchvision's RandomErasing for uint8 pixels: noise with ImageNet's mean and standard deviation.

    As the "pixel" mode of MAE and timm, but before normalisation, so the noise is clipped to the range of pixels.
    """

    def __init__(self, probability: float):
        super().__init__(probability, value="random")

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        if params["v"] is not None:
            mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
            params["v"] = ((params["v"] * std + mean).clamp(0, 1) * 255).round().byte()
        return params


def augmentations(rand_augment: int, erasing: float) -> list[Callable[[Tensor], Tensor]]:
    """Build a list of RandAugment (two operations of strength `rand_augment`, 1 to 10) and RandomErasing.

    `erasing` is a probability. 0 leaves an operation out.
    """
    steps = []
    if rand_augment:
        grey = [round(255 * mean) for mean in IMAGENET_MEAN]
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(v2.RandAugment(2, rand_augment, num_magnitude_bins=11, interpolation=bilinear, fill=grey))
    if erasing:
        steps.append(RandomErasing(erasing))
    return steps


class Views(Dataset):
    """Views of images by (epoch, index): view uint8 (C, H, W), label, and whether the image was readable.

    An unreadable image is replaced by another one, drawn at random, with its label. With `replace=False` it is replaced
    by a black one with label -1. Raises UnreadableImage if 20 in a row are unreadable.
    """

    def __init__(
        self, images: Dataset, view: Callable[[Tensor], Tensor], channels: int = 3, seed: int = 0, replace: bool = True
    ):
        self.images, self.view, self.channels, self.seed, self.replace = images, view, channels, seed, replace

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, bool]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, "view", *key))
            image, label, readable = self.read(key[1])
            image, label = self.show(image, label)
        return in_channels(image, self.channels), label, readable

    def show(self, image: Tensor, label: Any) -> tuple[Tensor, Any]:
        """Return the view of an image, and its label unchanged. `coco.DetectionViews` overrides this for both."""
        return self.view(image), label

    def read(self, index: int) -> tuple[Tensor, int, bool]:
        """Return image `index` or its replacement, its label, whether `index` was readable. Raises UnreadableImage."""
        for attempt in range(20):
            try:
                return *self.images[index], attempt == 0
            except UnreadableImage as error:
                warnings.warn(f"skipped an unreadable image: {error}", stacklevel=2)
                if not self.replace:
                    return torch.zeros(3, 1, 1, dtype=torch.uint8), -1, False
                index = int(torch.randint(len(self), ()))
        raise UnreadableImage("20 images in a row, drawn at random, cannot be read")


def training_views(
    images: Dataset,
    size: tuple[int, int],
    min_crop: float,
    *,
    flip: bool,
    channels: int,
    seed: int,
    device: torch.device,
    augment: list[Callable[[Tensor], Tensor]] | None = None,
) -> Views | BatchViews:
    """Build the training views: `pretraining_view`, then `augment`. `channels` is 1 (grey) or 3.

    Returns `BatchViews` on `device` for images in memory without `augment`, else `Views`.
    """
    if isinstance(images, InMemory) and not augment:
        options = dict(flip=flip, margin=evaluation_margin(size), channels=channels, seed=seed, device=device)
        return BatchViews(images, size, min_crop, **options)
    view = v2.Compose([pretraining_view(size, min_crop, flip), *(augment or [])])
    return Views(images, view, channels, seed)


def evaluation_margin(size: tuple[int, int]) -> float:
    """Return the ratio of resized side to centre crop, as in MAE: 8/7 (256 -> 224), or 1 above 224 pixels."""
    return 8 / 7 if max(size) <= 224 else 1.0


class EpochSampler(DistributedSampler):
    """torch's DistributedSampler with keys (epoch, index), so that every worker knows the epoch of a view."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


def num_workers(views: Dataset, workers: int | None, world: World) -> int:
    """Return the number of loader processes: 0 for batched views, else `workers`.

    The default is the number of cores divided by the training processes on this machine, 1 to 8.
    """
    if hasattr(views, "__getitems__"):
        return 0
    return min(8, max(1, (os.cpu_count() or 1) // world.local_size)) if workers is None else workers


def training_loader(
    views: Dataset, batch_size: int, *, seed: int, workers: int | None = None, world: World
) -> DataLoader:
    """Build a loader of shuffled batches for this process. Call `loader.sampler.set_epoch` before each epoch.

    `views` is any data set with keys (epoch, index), `batch_size` is per process. Images that do not fill a batch are
    left out of the epoch. Process r of R gets images r, r + R, ... of the common order, so the batches of all processes
    together equal the batch of a single process.
    """
    order = derive_seed(seed, "order") % 2**32  # torch adds the epoch: seeds 0, 1, ... would share orders
    sampler = EpochSampler(views, world.size, world.rank, shuffle=True, seed=order, drop_last=True)
    workers = num_workers(views, workers, world)
    return DataLoader(
        views,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=getattr(views, "collate", None),
        drop_last=True,
        pin_memory=torch.cuda.is_available() and workers > 0,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # not torch's own generator, which is seeded per step
    )


def evaluation_loader(views: Dataset, batch_size: int, *, workers: int | None = None, world: World) -> DataLoader:
    """Build a loader of all views, each once and in order. Process r of R gets r, r + R, ..., without padding."""
    keys = [(0, index) for index in range(world.rank, len(views), world.size)]
    workers = num_workers(views, workers, world)
    return DataLoader(views, batch_size, sampler=keys, num_workers=workers, collate_fn=getattr(views, "collate", None))


def scoring_loader(images: Dataset, size: tuple[int, int], channels: int, **options: Any) -> DataLoader:
    """Build this process's loader for evaluation, with centre crops as in MAE. `options`: see `evaluation_loader`.

    Batches are views uint8 (B, C, H, W), labels (B,), and whether each image was readable (B,).
    """
    margin = evaluation_margin(size)
    if isinstance(images, InMemory):
        views = BatchViews(images, size, margin=margin, channels=channels)
    else:
        views = Views(images, CenterView(size, margin), channels, replace=False)
    return evaluation_loader(views, **options)


def normalize_for(encoder: ViT) -> "Normalize":
    """Build the normalisation with the channels, mean and standard deviation that an encoder expects."""
    return Normalize(*(encoder.arguments[name] for name in ("channels", "mean", "std")))


class Normalize(nn.Module):
    """Map uint8 images (B, C, H, W) to (pixels / 255 - mean) / std on the module's device; C is 3, or 1 for grey."""

    def __init__(self, channels: int = 3, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD):
        super().__init__()
        mean, std = torch.tensor([mean, std]).view(2, 3, 1, 1)
        self.register_buffer("mean", mean if channels == 3 else mean.mean(0, keepdim=True))
        self.register_buffer("std", std if channels == 3 else std.mean(0, keepdim=True))

    def forward(self, images: Tensor) -> Tensor:
        images = to_device(images, self.mean.device)
        return (images.float() / 255 - self.mean) / self.std
