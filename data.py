"""Images in, uint8 batches out: the built-in `shapes`, torchvision's sets, any folder of image files.

Every view of an image is a function of (seed, epoch, index) alone: the number of workers or of processes never changes
what is trained on. Batches are uint8; `Normalize` scales on the device.
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
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from image_files import ImageFiles, UnreadableImage, class_folders
from model import IMAGENET_MEAN, IMAGENET_STD, ViT
from shapes import Shapes
from small_images import InMemory, draw_boxes, in_channels, resized_crops, torchvision_set
from training import World, derive_seed, generator

# Data sets by name, with what they set where no flag does: all lie in memory. Any other name is a folder.
SMALL = dict(image_size=[32], patch_size=4, channels=3, min_crop=0.2, knn_every=5)
SETS = {
    "shapes": SMALL | dict(min_crop=1.0),  # random enough uncropped
    "mnist": SMALL | dict(image_size=[28], channels=1, min_crop=1.0),  # crops are mirrored, too, which digits are not
    "fashionmnist": SMALL | dict(image_size=[28], channels=1, min_crop=0.5),
    "cifar10": SMALL,
    "cifar100": SMALL,
    "stl10": SMALL | dict(image_size=[96], patch_size=8),
}
FOLDER = dict(image_size=[224], patch_size=16, channels=3, min_crop=0.2, knn_every=0)
NUM_SHAPES = dict(train=10_000, val=2_000)


def add_flags(add: Callable[..., Any]) -> None:
    """The flags about images; those that are None by default `fill_in` completes."""
    named = SETS | {"a folder": FOLDER}
    sizes = ", ".join(f"{name}: {some['image_size'][0]}" for name, some in named.items())
    add("--data", default="shapes", help=f"{', '.join(SETS)}, or a folder with image files")
    add("--data-root", default="data", metavar="FOLDER", help="where torchvision's sets lie")
    add("--download", action="store_true", help="let torchvision download a set that is missing")
    add("--limit", type=int, metavar="N", help="use only N training images (default: all)")
    add("--image-size", type=int, nargs="+", metavar="PIXELS", help="height and width, or one number "
        f"(default: {sizes})")
    add("--min-crop", type=float, help="smallest share of an image that a random crop keeps; 1: whole images (default: "
        + ", ".join(f"{name}: {some['min_crop']:g}" for name, some in named.items()) + ")")
    add_flip_flag(add)
    add("--workers", type=int, help="processes that read files or augment; crops of a named set need none (default: up "
        "to 8, by the CPU's cores)")


def add_flip_flag(add: Callable[..., Any]) -> None:
    """Mirroring, which all three scripts do."""
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the training images left "
        "to right; --no-flip where left and right differ (whole images, --min-crop 1, are never mirrored)")


def fill_in(args: argparse.Namespace) -> None:
    """Complete what depends on the data and was not given, as far as a script has it."""
    for name, value in SETS.get(args.data, FOLDER).items():
        if name in args and getattr(args, name) is None:
            setattr(args, name, value)
    if "min_crop" in args and not 0 < args.min_crop <= 1:
        raise SystemExit(f"error: --min-crop must be more than 0 and at most 1, got {args.min_crop:g}")


# --- data sets --------------------------------------------------------------------------------------------------------


def unlabelled_images(args: argparse.Namespace) -> Dataset:
    """Images for pre-training: `shapes`, a set of torchvision's, or a folder (its `train/`, if it has one)."""
    if args.data == "shapes":
        return Shapes("train", args.limit or NUM_SHAPES["train"], sides(args.image_size))
    if args.data in SETS:
        split = "train+unlabeled" if args.data == "stl10" else "train"
        return at_most(torchvision_set(args.data, split, args.data_root, args.download), args.limit)
    train = Path(args.data) / "train"
    return at_most(ImageFiles(train if train.is_dir() else Path(args.data)), args.limit)


def labelled_images(args: argparse.Namespace, limit: int | None = None) -> Dataset:
    """Training images with labels, at most `limit`; of a folder those in `train/`."""
    if args.data == "shapes":
        return Shapes("train", limit or NUM_SHAPES["train"], sides(args.image_size))
    if args.data in SETS:
        return at_most(torchvision_set(args.data, "train", args.data_root, args.download), limit)
    return at_most(class_folders(Path(args.data) / "train"), limit)


def validation_images(args: argparse.Namespace, classes: list[str] | None = None, limit: int | None = None) -> Dataset:
    """Labelled images to score on: the test set of torchvision's, a folder's `val/`, which may lack some `classes`."""
    if args.data == "shapes":
        return Shapes("val", limit or NUM_SHAPES["val"], sides(args.image_size))
    if args.data in SETS:
        return at_most(torchvision_set(args.data, "test", args.data_root, args.download), limit)
    return at_most(class_folders(Path(args.data) / "val", classes), limit)


def at_most(images: Dataset, limit: int | None) -> Dataset:
    """A random but fixed choice of `limit` images: in a sorted folder the first ones would be all of one class."""
    if limit is None or limit >= len(images):
        return images
    return subset(images, torch.randperm(len(images), generator=generator("limit"))[:limit].tolist())


def few_labels(images: Dataset, share: float, seed: int) -> Dataset:
    """A random `share` of each class, at least one image.

    The same seed draws the same images, and a smaller part lies within a larger one.
    """
    order = torch.randperm(len(images), generator=generator(seed, "few labels")).tolist()
    wanted = {label: max(1, round(share * count)) for label, count in Counter(images.targets).items()}
    chosen, taken = [], Counter()
    for i in order:
        label = images.targets[i]
        if taken[label] < wanted[label]:
            taken[label] += 1
            chosen.append(i)
    return subset(images, sorted(chosen))


def subset(images: Dataset, indices: list[int]) -> Dataset:
    """A part, with the labels and classes that torch's Subset does not know of."""
    if isinstance(images, InMemory):
        return InMemory(images.images[indices], [images.targets[i] for i in indices], images.classes)
    part = Subset(images, indices)
    part.classes = images.classes
    if hasattr(images, "targets"):
        part.targets = [images.targets[i] for i in indices]
    return part


def describe(images: Dataset) -> str:
    """10,000 images of 10 classes (disk, square, triangle, ...)."""
    classes = f" of {len(images.classes)} classes ({', '.join(images.classes[:3])}, ...)" if images.classes else ""
    return f"{len(images):,} images{classes}"


# --- views and loaders ------------------------------------------------------------------------------------------------


def sides(image_size: list[int]) -> tuple[int, int]:
    """Height and width that `--image-size` gives in one number or two."""
    return image_size[0], image_size[-1]


class CenterView:
    """The largest centred part that has the shape of `size` (H, W), or 1 / `margin` of its sides, resized to `size`.

    Of one image or of a batch of one size.
    """

    def __init__(self, size: tuple[int, int], margin: float = 1.0):
        self.size, self.margin = size, margin

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if (height, width) == self.size:
            return image
        scale = min(height / self.size[0], width / self.size[1]) / self.margin
        part = tvf.center_crop(image, [max(1, round(scale * side)) for side in self.size])
        return tvf.resize(part, list(self.size), v2.InterpolationMode.BICUBIC, antialias=True)


def pretraining_view(size: tuple[int, int], min_crop: float, flip: bool = True) -> Callable[[Tensor], Tensor]:
    """Random crop of at least `min_crop` of the area, resized to `size`, mirrored or not; 1: the image as it is."""
    if min_crop == 1:
        return CenterView(size)
    crop = v2.RandomResizedCrop(size, (min_crop, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(0.5 if flip else 0.0)])


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


def augmentations(rand_augment: int, erasing: float) -> list[Callable[[Tensor], Tensor]]:
    """Two operations of RandAugment at a strength of 0 (none) to 10, then RandomErasing."""
    steps = []
    if rand_augment:
        grey = [round(255 * mean) for mean in IMAGENET_MEAN]
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(v2.RandAugment(2, rand_augment, num_magnitude_bins=11, interpolation=bilinear, fill=grey))
    if erasing:
        steps.append(RandomErasing(erasing))
    return steps


class Views(Dataset):
    """Views of images by (epoch, index): view uint8 (C, H, W), label, and whether the image could be read.

    An unreadable file gives way to another image, drawn at random, or with `replace=False` to a blank.
    """

    collate = staticmethod(default_collate)

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
        """The view of an image; detection's change the label, too."""
        return self.view(image), label

    def read(self, index: int) -> tuple[Tensor, int, bool]:
        """Image `index` or what stands for it, its label, and whether it could be read. Raises UnreadableImage."""
        for attempt in range(20):
            try:
                return *self.images[index], attempt == 0
            except UnreadableImage as error:
                warnings.warn(f"left out an unreadable image: {error}", stacklevel=2)
                if not self.replace:
                    return torch.zeros(3, 1, 1, dtype=torch.uint8), -1, False
                index = int(torch.randint(len(self), ()))
        raise UnreadableImage("of 20 images drawn at random not one can be read")


class BatchViews(Dataset):
    """Views of images that lie in memory, of a whole batch at once and on `device`.

    As `pretraining_view`, but bilinear. A table of uniform numbers, with a row for each image and anew for each epoch,
    says what is cropped and mirrored.
    """

    def __init__(
        self, images: InMemory, size: tuple[int, int], min_crop: float = 1.0, margin: float = 1.0, channels: int = 3,
        seed: int = 0, device: torch.device | str = "cpu", flip: bool = True,
    ):  # fmt: skip
        self.images, self.size, self.min_crop, self.channels, self.flip = images, size, min_crop, channels, flip
        self.center, self.seed, self.device = CenterView(size, margin), seed, device
        self.labels = torch.tensor(images.targets)
        self.epoch, self.boxes, self.mirrored = None, None, None

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of one epoch: views uint8 (B, C, H, W), labels (B,), and that all could be read."""
        epoch, indices = keys[0][0], torch.tensor([index for _, index in keys])
        images = in_channels(self.images.images[indices].to(self.device), self.channels)
        if self.min_crop == 1:
            images = self.center(images)
        else:
            if self.epoch != epoch:
                draws = torch.rand(len(self), 5, generator=generator(self.seed, "views", epoch))
                boxes = draw_boxes(draws[:, :4], *images.shape[-2:], self.min_crop)
                mirrored = draws[:, 4] < 0.5 if self.flip else torch.zeros(len(self), dtype=torch.bool)
                self.epoch, self.boxes, self.mirrored = epoch, boxes.to(self.device), mirrored.to(self.device)
            images = resized_crops(images, self.boxes[indices], self.mirrored[indices], self.size)
        return images, self.labels[indices], torch.ones(len(keys), dtype=torch.bool)

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """It is a batch already."""
        return batch


def training_views(
    images: Dataset, args: argparse.Namespace, size: tuple[int, int], device: torch.device,
    augment: list[Callable[[Tensor], Tensor]] | None = None,
) -> Views | BatchViews:  # fmt: skip
    """Random crops, resized to `size` (H, W) and mirrored, then `augment`ed, as the flags say."""
    if isinstance(images, InMemory) and not augment:
        options = dict(channels=args.channels, seed=args.seed, device=device, flip=args.flip)
        return BatchViews(images, size, args.min_crop, **options)
    view = v2.Compose([pretraining_view(size, args.min_crop, args.flip), *(augment or [])])
    return Views(images, view, args.channels, args.seed)


def evaluation_views(images: Dataset, args: argparse.Namespace) -> Views | BatchViews:
    """What features and classifiers are scored on: the centre of an image, as MAE crops it."""
    size = sides(args.image_size)
    margin = evaluation_margin(size)
    if isinstance(images, InMemory):
        return BatchViews(images, size, margin=margin, channels=args.channels)
    return Views(images, CenterView(size, margin), args.channels, replace=False)


def evaluation_margin(size: tuple[int, int]) -> float:
    """How much longer than the crop the resized image is: 8/7 (256 -> 224), or 1 above 224 pixels, as in MAE."""
    return 8 / 7 if max(size) <= 224 else 1.0


def check_readable(unreadable: int, seen: int) -> None:
    """Stop a run more than a quarter of whose images are unreadable."""
    if unreadable > max(8, seen / 4):
        raise SystemExit(f"error: --data: {unreadable} of {seen} images cannot be read (named above)")


class EpochSampler(DistributedSampler):
    """torch's DistributedSampler, handing out (epoch, index): views differ from epoch to epoch in every worker."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


def num_workers(views: Dataset, workers: int | None, world: World) -> int:
    """Processes of a loader: none for a batch in memory, else `workers`, by default one per core, 8 at most."""
    if isinstance(views, BatchViews):
        return 0
    return min(8, max(1, (os.cpu_count() or 1) // world.local_size)) if workers is None else workers


def training_loader(views: Views | BatchViews, batch_size: int, workers: int | None, world: World) -> DataLoader:
    """Shuffled batches of this process; call `loader.sampler.set_epoch` before each epoch.

    Process r of R gets images r, r + R, ... of the common order: their batches make up the batch of one process.
    """
    seed = derive_seed(views.seed, "order") % 2**32  # torch adds the epoch: plain seeds 0, 1, ... would share orders
    sampler = EpochSampler(views, world.size, world.rank, shuffle=True, seed=seed, drop_last=True)
    workers = num_workers(views, workers, world)
    return DataLoader(
        views, batch_size, sampler=sampler, num_workers=workers, collate_fn=views.collate, drop_last=True,
        pin_memory=torch.cuda.is_available() and not isinstance(views, BatchViews), persistent_workers=workers > 0,
        generator=torch.Generator(),  # else it would draw from torch's own, which each step seeds
    )  # fmt: skip


def evaluation_loader(views: Views | BatchViews, batch_size: int, workers: int | None, world: World) -> DataLoader:
    """All views once, in order; process r of R gets r, r + R, ...: none is repeated to fill up, some get one less."""
    keys = [(0, index) for index in range(world.rank, len(views), world.size)]
    workers = num_workers(views, workers, world)
    return DataLoader(views, batch_size, sampler=keys, num_workers=workers, collate_fn=views.collate)


def batches(loader: DataLoader) -> Iterator[Any]:
    """A loader's batches. What its processes mostly die of, in a container or with few descriptors, gets one line."""
    try:
        yield from loader
    except UnreadableImage as error:  # one from a loader's process brings its traceback along
        raise SystemExit(f"error: --data: {str(error).splitlines()[-1]}") from None
    except (RuntimeError, OSError) as error:
        signs = "DataLoader worker (pid", "No space left", "shared memory", "ancdata", "Too many open files"
        if not any(sign in str(error) for sign in signs):
            raise
        raise SystemExit(
            "error: the processes that load data ran out of memory, shared memory (/dev/shm) or file descriptors: "
            f"take fewer --workers, 0 for none ({str(error).splitlines()[-1]})"
        ) from None


def normalize_for(encoder: ViT) -> "Normalize":
    """What an encoder expects to be done to pixels."""
    return Normalize(*(encoder.arguments[name] for name in ("channels", "mean", "std")))


class Normalize(nn.Module):
    """uint8 (B, C, H, W) -> float (pixels / 255 - mean) / std, on the module's device; C is 3, or 1 for grey."""

    def __init__(
        self, channels: int = 3, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ):
        super().__init__()
        mean, std = torch.tensor([mean, std]).view(2, 3, 1, 1)
        self.register_buffer("mean", mean if channels == 3 else mean.mean(0, keepdim=True))
        self.register_buffer("std", std if channels == 3 else std.mean(0, keepdim=True))

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.mean.device, non_blocking=True)
        return (images.float() / 255 - self.mean) / self.std
