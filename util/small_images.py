"""Small data sets in memory (MNIST, Fashion-MNIST, CIFAR, STL-10), and views of a whole batch at once."""

import functools
import gzip
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, STL10, FashionMNIST
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from util.training import generator, to_device


class InMemory(Dataset):
    """Images uint8 (N, 3 or 1, H, W) with labels; single items are RGB."""

    def __init__(self, images: Tensor, targets: list[int], classes: Sequence[str]):
        self.images, self.targets, self.classes = images, targets, list(classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return in_channels(self.images[index], 3), self.targets[index]


def in_channels(images: Tensor, channels: int) -> Tensor:
    """Convert images (..., 3 or 1, H, W) to `channels`: 3 (colour) or 1 (grey)."""
    if channels == 1:
        return tvf.rgb_to_grayscale(images)
    return images.expand(*images.shape[:-3], 3, *images.shape[-2:])


# --- torchvision's sets -----------------------------------------------------------------------------------------------


def torchvision_set(name: str, split: str, root: str, download: bool) -> InMemory:
    """Read a data set of READERS. `split` is `train`, `test` or, for STL-10, `train+unlabeled`.

    Ends the script if files are missing or broken.
    """
    read = READERS[name]
    try:
        return read(split, root, download)
    except ImportError as error:
        raise SystemExit(f"error: --data {name} needs a missing package ({error})") from None
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, zlib.error) as error:
        raise SystemExit(f"error: --data {name}: incomplete in --data-root {root}; add --download ({error})") from None


def read_cifar(kind: type[CIFAR10], split: str, root: str, download: bool) -> InMemory:
    """Read CIFAR-10 or CIFAR-100."""
    images = kind(root, train=split == "train", download=download)
    return InMemory(torch.from_numpy(images.data).movedim(3, 1).contiguous(), images.targets, images.classes)


def read_stl(split: str, root: str, download: bool) -> InMemory:
    """Read STL-10; unlabelled images have label -1."""
    images = STL10(root, split, download=download)
    return InMemory(torch.from_numpy(images.data), images.labels.tolist(), images.classes)


def read_mnist(kind: type[MNIST], split: str, root: str, download: bool) -> InMemory:
    """Read MNIST or a set in its format from the original files, gzipped or not, in torchvision's folder or in `root`.

    All these sets have the same file names, so files directly in `root` are assumed to be the requested set.
    """
    if download:
        kind(root, download=True)
    folders = Path(root, kind.__name__, "raw"), Path(root)

    def read(name: str) -> Tensor:
        """Read an idx file as uint8: the fourth byte is the number of axes, then their lengths as 32-bit numbers."""
        for path in (folder / (name + suffix) for folder in folders for suffix in (".gz", "")):
            if path.exists():
                with (gzip.open if path.suffix else open)(path, "rb") as file:
                    content = file.read()
                start = 4 + 4 * content[3]
                lengths = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
                return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(lengths)
        raise FileNotFoundError(f"{name}.gz not found in {' or '.join(map(str, folders))}")

    part = "train" if split == "train" else "t10k"
    images, labels = read(f"{part}-images-idx3-ubyte"), read(f"{part}-labels-idx1-ubyte")
    return InMemory(images[:, None], labels.tolist(), kind.classes)


# Functions (split, root, download) -> InMemory, by name. A new set is a line here and one in `data.SETS`.
READERS: dict[str, Callable[[str, str, bool], InMemory]] = {
    "mnist": functools.partial(read_mnist, MNIST),
    "fashionmnist": functools.partial(read_mnist, FashionMNIST),
    "cifar10": functools.partial(read_cifar, CIFAR10),
    "cifar100": functools.partial(read_cifar, CIFAR100),
    "stl10": read_stl,
}


# --- views of a batch -------------------------------------------------------------------------------------------------


def draw_boxes(draws: Tensor, height: int, width: int, min_area: float) -> Tensor:
    """Draw rectangles (B, 4): left, top, width, height in whole pixels, from `draws` (B, 4), uniform in [0, 1).

    The area is uniform between the fraction `min_area` and all of the image, the aspect ratio between 3:4 and 4:3 if
    possible. In very long or wide images, large areas have no such ratio and are clipped.
    """
    fraction = min_area + (1 - min_area) * draws[:, 0]
    low = (fraction * width / height).clamp(min=3 / 4).log()  # of width to height: below, the height would not fit
    high = (width / height / fraction).clamp(max=4 / 3).log()
    aspect = torch.lerp(low, high, draws[:, 1]).exp()
    area = fraction * height * width
    sides = [(area * aspect).sqrt().clamp(1, width).round(), (area / aspect).sqrt().clamp(1, height).round()]
    left, top = (((n - side + 1) * draws[:, i]).floor() for n, side, i in ((width, sides[0], 2), (height, sides[1], 3)))
    return torch.stack([left, top, *sides], dim=1)


def resize_matrix(start: Tensor, length: Tensor, before: int, after: int, mirrored: Tensor | None = None) -> Tensor:
    """Return weights (B, after, before) that resize a part of `before` pixels to `after` new pixels.

    The part begins at `start` (B,) and is `length` (B,) pixels long. Bilinear and antialiased, as in Pillow and
    torchvision: a triangle around the centre of each new pixel, cut at the ends of the part and scaled to sum 1. Its
    half-width is the larger of one new and one old pixel. `mirrored` (B,) reverses the new pixels.
    """
    pixels = torch.arange(before, device=start.device) + 0.5
    place = (torch.arange(after, device=start.device) + 0.5) / after  # of each new pixel's centre, from 0 to 1
    if mirrored is not None:
        place = torch.where(mirrored[:, None], 1 - place, place)
    start, length = start[:, None], length[:, None]
    inside = (pixels > start) & (pixels < start + length)
    distance = (pixels - (start + place * length)[..., None]).abs() / (length / after).clamp(min=1)[..., None]
    weights = (1 - distance).clamp(min=0) * inside[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


def resized_crops(images: Tensor, boxes: Tensor, mirrored: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop images uint8 (B, C, H, W), resize to `size` (H, W), mirror where `mirrored` (B,).

    `boxes` (B, 4) are left, top, width, height in whole pixels.
    """
    left, top, width, height = boxes.unbind(1)
    rows = resize_matrix(top, height, images.shape[2], size[0])
    columns = resize_matrix(left, width, images.shape[3], size[1], mirrored)
    pixels = rows[:, None] @ (images.float().flatten(1, 2) @ columns.mT).unflatten(1, images.shape[1:3])
    return pixels.round().byte()


class CenterView:
    """Centre view: the largest crop with the aspect ratio of `size` (H, W), its sides divided by `margin`, resized.

    Works on one image or on a batch of equal sizes. Images that already have `size` are returned unchanged.
    """

    def __init__(self, size: tuple[int, int], margin: float = 1.0):
        self.size, self.margin = size, margin

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if (height, width) == self.size:
            return image
        scale = min(height / self.size[0], width / self.size[1]) / self.margin
        part = tvf.center_crop(image, [max(1, round(scale * side)) for side in self.size])
        return tvf.resize(part, list(self.size), InterpolationMode.BICUBIC, antialias=True)


class BatchViews(Dataset):
    """Views of in-memory images by (epoch, index), made for a whole batch at once on `device`.

    As `data.pretraining_view`, but random crops are bilinear. Without them (`min_crop` 1), `margin` is that of
    `CenterView`. A table of uniform random numbers per epoch, with one row per image, determines crops and mirroring.
    """

    def __init__(
        self,
        images: InMemory,
        size: tuple[int, int],
        min_crop: float = 1.0,
        *,
        flip: bool = True,
        margin: float = 1.0,
        channels: int = 3,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.images, self.size, self.min_crop, self.flip, self.channels = images, size, min_crop, flip, channels
        self.center, self.seed, self.device = CenterView(size, margin), seed, device
        self.labels = torch.tensor(images.targets)
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}  # of recent epochs

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the view of a key (epoch, index), its label, and True (readable)."""
        images, labels, readable = self.__getitems__([key])
        return images[0], labels[0], readable[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the batch of (epoch, index) keys: views uint8 (B, C, H, W), labels (B,), and True (readable) each."""
        epochs, indices = torch.tensor(keys).unbind(1)
        images = in_channels(to_device(self.images.images[indices], self.device), self.channels)
        if self.min_crop == 1:
            views = self.center(images)
        else:
            boxes, mirrored = torch.empty(len(keys), 4), torch.empty(len(keys), dtype=torch.bool)
            for epoch in epochs.unique().tolist():
                chosen = epochs == epoch
                boxes[chosen], mirrored[chosen] = (rows[indices[chosen]] for rows in self.table(epoch))
            places = (to_device(x, self.device) for x in (boxes, mirrored))
            views = resized_crops(images, *places, self.size)
        return views, self.labels[indices], torch.ones(len(keys), dtype=torch.bool)

    def table(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return an epoch's crops (N, 4), left, top, width, height in pixels, and which images are mirrored (N,)."""
        if epoch not in self.tables:
            draws = torch.rand(len(self), 5, generator=generator(self.seed, "views", epoch))
            boxes = draw_boxes(draws[:, :4], *self.images.images.shape[-2:], self.min_crop)
            if len(self.tables) == 4:  # remove the oldest
                del self.tables[next(iter(self.tables))]
            self.tables[epoch] = boxes, (draws[:, 4] < 0.5) & self.flip
        return self.tables[epoch]

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the batch, which is already collated."""
        return batch
