"""Sets of small images that lie in memory, MNIST, Fashion-MNIST, CIFAR and STL, and views of a whole batch at once."""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, STL10, FashionMNIST
from torchvision.transforms.v2 import functional as tvf


class InMemory(Dataset):
    """Images uint8 (N, 3 or 1, H, W) with labels; item by item they are RGB."""

    def __init__(self, images: Tensor, targets: list[int], classes: Sequence[str]):
        self.images, self.targets, self.classes = images, targets, list(classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return in_channels(self.images[index], 3), self.targets[index]


def in_channels(images: Tensor, channels: int) -> Tensor:
    """Images (..., 3 or 1, H, W) in colour (3) or grey (1)."""
    if channels == 1:
        return tvf.rgb_to_grayscale(images)
    return images.expand(*images.shape[:-3], 3, *images.shape[-2:])


# --- torchvision's sets -----------------------------------------------------------------------------------------------


def torchvision_set(name: str, split: str, root: str, download: bool) -> InMemory:
    """A set by its name: `train`, `test`, of STL-10 also `train+unlabeled`."""
    try:
        if name in ("mnist", "fashionmnist"):
            return read_mnist(MNIST if name == "mnist" else FashionMNIST, split, root, download)
        if name == "stl10":
            images = STL10(root, split, download=download)
            return InMemory(torch.from_numpy(images.data), images.labels.tolist(), images.classes)
        images = (CIFAR10 if name == "cifar10" else CIFAR100)(root, train=split == "train", download=download)
        return InMemory(torch.from_numpy(images.data).movedim(3, 1).contiguous(), images.targets, images.classes)
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, zlib.error) as error:
        raise SystemExit(f"error: --data {name}: not whole in --data-root {root}; --download? ({error})") from None


def read_mnist(kind: type[MNIST], split: str, root: str, download: bool) -> InMemory:
    """MNIST or a set of its format: the original files, packed or not, where torchvision puts them or in `root`.

    All such sets name their files alike: what lies in `root` is taken for the set that is asked for.
    """
    if download:
        kind(root, download=True)
    folders = Path(root, kind.__name__, "raw"), Path(root)

    def read(name: str) -> Tensor:
        """uint8, of as many axes as the fourth byte says; their lengths follow as 32-bit numbers."""
        for path in (folder / (name + suffix) for folder in folders for suffix in (".gz", "")):
            if path.exists():
                with (gzip.open if path.suffix else open)(path, "rb") as file:
                    content = file.read()
                start = 4 + 4 * content[3]
                lengths = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
                return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(lengths)
        raise FileNotFoundError(f"there is no {name}.gz in {' or '.join(map(str, folders))}")

    part = "train" if split == "train" else "t10k"
    images, labels = read(f"{part}-images-idx3-ubyte"), read(f"{part}-labels-idx1-ubyte")
    return InMemory(images[:, None], labels.tolist(), kind.classes)


# --- views of a batch -------------------------------------------------------------------------------------------------


def draw_boxes(draws: Tensor, height: int, width: int, min_share: float) -> Tensor:
    """Rectangles (B, 4) left, top, width, height, in whole pixels, by numbers (B, 4), uniform in [0, 1).

    Their share of the area is uniform from `min_share` to 1, their shape between 3:4 and 4:3 as far as it fits. (Of
    images that are much longer than wide, or wider than long, a large share has no such shape: it is cut.)
    """
    share = min_share + (1 - min_share) * draws[:, 0]
    low = (share * width / height).clamp(min=3 / 4).log()  # of width to height: below it the height would not fit
    high = (width / height / share).clamp(max=4 / 3).log()
    aspect = torch.lerp(low, high, draws[:, 1]).exp()
    area = share * height * width
    sides = [(area * aspect).sqrt().clamp(1, width).round(), (area / aspect).sqrt().clamp(1, height).round()]
    left, top = (((n - side + 1) * draws[:, i]).floor() for n, side, i in ((width, sides[0], 2), (height, sides[1], 3)))
    return torch.stack([left, top, *sides], dim=1)


def resize_matrix(start: Tensor, length: Tensor, before: int, after: int, mirrored: Tensor | None = None) -> Tensor:
    """Weights (B, after, before) that resize pixels [start, start + length) of `before` to `after`; those are (B,).

    Bilinear and antialiased, as in Pillow and torchvision: a triangle around each new pixel's centre, as wide as the
    new pixels are, cut off at the ends of the part and scaled to a sum of 1. Where `mirrored` (B,) from end to start.
    """
    pixels = torch.arange(before, device=start.device) + 0.5
    share = (torch.arange(after, device=start.device) + 0.5) / after
    if mirrored is not None:
        share = torch.where(mirrored[:, None], 1 - share, share)
    start, length = start[:, None], length[:, None]
    inside = (pixels > start) & (pixels < start + length)
    distance = (pixels - (start + share * length)[..., None]).abs() / (length / after).clamp(min=1)[..., None]
    weights = (1 - distance).clamp(min=0) * inside[:, None]
    return weights / weights.sum(dim=2, keepdim=True)


def resized_crops(images: Tensor, boxes: Tensor, mirrored: Tensor, size: tuple[int, int]) -> Tensor:
    """The part `boxes` (B, 4) of each image, uint8 (B, C, H, W), resized to `size`, left and right `mirrored` (B,)."""
    left, top, width, height = boxes.unbind(1)
    rows = resize_matrix(top, height, images.shape[2], size[0])
    columns = resize_matrix(left, width, images.shape[3], size[1], mirrored)
    pixels = rows[:, None] @ (images.float().flatten(1, 2) @ columns.mT).unflatten(1, images.shape[1:3])
    return pixels.round().byte()
