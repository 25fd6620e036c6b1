"""Image files: read any format of Pillow as upright RGB; folders of images, class folders."""

import os
import struct
from pathlib import Path

import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as tvf

try:  # about twice as fast as Pillow; torchvision plans to drop its decoder for torchcodec's
    from torchcodec.decoders import decode_jpeg
except (ImportError, RuntimeError):  # RuntimeError: its libraries are missing
    try:
        from torchvision.io import decode_jpeg
    except ImportError:
        decode_jpeg = None

PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # long texts or colour profiles must not make an image unreadable
PngImagePlugin.MAX_TEXT_MEMORY = 2**28
SUFFIXES = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif", ".avif")

# Raised by Pillow's parsers on broken files; OSError covers missing, truncated and unidentified files.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error)
DECODING_ERRORS += (Image.DecompressionBombError,)


class UnreadableImage(Exception):
    """Error for an image file that cannot be decoded; the message names the file."""


def read_image(path: str | Path, upright: bool = True) -> Tensor:
    """Read an image file as RGB, uint8 (3, H, W), rotated by its EXIF if `upright`; of an animation, the first frame.

    Pillow checks every header. `decode_jpeg` decodes JPEG files (to the same pixels), Pillow everything else: other
    formats, files that `decode_jpeg` rejects, images to rotate. Raises UnreadableImage.
    """
    try:
        with Image.open(path) as image:
            if image.format == "JPEG" and decode_jpeg is not None and not (upright and "exif" in image.info):
                try:
                    content = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
                    return decode_jpeg(content, mode="RGB")
                except RuntimeError:
                    pass  # a rare encoding or a broken file: left to Pillow
            if upright:
                try:
                    ImageOps.exif_transpose(image, in_place=True)
                except DECODING_ERRORS:
                    pass  # broken EXIF does not make the pixels unreadable
            return tvf.pil_to_tensor(to_rgb(image))
    except DECODING_ERRORS as error:
        raise UnreadableImage(f"{path}: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow image of any mode to RGB: scale 16-bit grey (Pillow would clip it), put transparency on white.

    Raises ValueError for floats and 32-bit integers, because their black and white levels are unknown.
    """
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(f"unknown range of values (Pillow's mode {image.mode}): save the image with 8 or 16 bits")
    if image.mode.startswith("I"):  # "I;16" and similar
        image = image.convert("I").point(lambda value: value / 256).convert("L")
        image.info.pop("transparency", None)  # a 16-bit grey level, invalid with 8 bits
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_hidden(name: str) -> bool:
    """Return whether a name starts with . or @, as system files do: ._photo.jpg of macOS, @eaDir of a NAS."""
    return name.startswith((".", "@"))


def list_images(folder: Path) -> tuple[list[str], int]:
    """Return all image files below `folder`, sorted, and the number of other files.

    Follows links, but visits each folder once and never a parent of `folder`. Skips hidden folders.
    """
    found, others, visited = [], 0, {str(parent) for parent in folder.resolve().parents}
    for parent, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in visited:
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        images = [name for name in files if name.lower().endswith(SUFFIXES) and not is_hidden(name)]
        found += [os.path.join(parent, name) for name in images]
        others += len(files) - len(images)
    return sorted(found), others


def find_images(folder: Path) -> list[str]:
    """Return all image files below `folder`, sorted, and print the number of others. Ends the script if none."""
    found, others = list_images(folder)
    if not folder.is_dir():
        raise SystemExit(f"error: --data: {folder} is neither a folder nor the name of a data set")
    if not found:
        raise SystemExit(f"error: --data: no image files in the folder {folder} ({' '.join(SUFFIXES)})")
    if others:
        print(f"{others:,} files in {folder} are not images ({' '.join(SUFFIXES)})")
    return found


class ImageFiles(Dataset):
    """Image files below a folder, sorted by path. Items are images uint8 (3, H, W) and label -1.

    Ends the script if there are none. Items raise UnreadableImage for a broken file.
    """

    classes: list[str] = []

    def __init__(self, folder: Path):
        self.paths = find_images(folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self.paths[index]), -1


class ClassFolders(Dataset):
    """Image files in one folder per class. Items are images uint8 (3, H, W) and labels.

    Label i is `classes[i]`: as given, or the sorted folder names. Folders that are not in `classes` end the script.
    """

    def __init__(self, folder: Path, classes: list[str] | None = None):
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))
        found = {name: list_images(folder / name)[0] for name in names}
        empty = [name for name in names if not found[name]]
        if empty:
            print(f"skipped folders without images in {folder}: {', '.join(empty[:5])}{', ...' * (len(empty) > 5)}")
        filled = [name for name in names if found[name]]
        self.classes = filled if classes is None else classes
        unknown = [name for name in filled if name not in self.classes]
        if unknown:
            raise SystemExit(f"error: --data: {folder} has classes unknown in training: {', '.join(unknown[:5])}")
        samples = [(path, self.classes.index(name)) for name in filled for path in found[name]]
        self.paths, self.targets = [path for path, _ in samples], [label for _, label in samples]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self.paths[index]), self.targets[index]


def class_folders(folder: Path, classes: list[str] | None = None) -> ClassFolders:
    """Return the labelled images of `folder`, which has a folder per class.

    Ends the script if there are no images, or less than two classes.
    """
    try:
        images = ClassFolders(folder, classes)
    except OSError as error:
        raise SystemExit(f"error: --data: labels need train/ and val/ with a folder per class ({error})") from None
    if not len(images):
        raise SystemExit(f"error: --data: the class folders of {folder} are empty")
    inside = {Path(path).relative_to(folder).parts[:-1] for path in images.paths}  # (class, ...) of each image
    below = [{parts[1:] for parts in inside if parts[0] == name} for name in images.classes]
    if len(below) > 1 and len(below[0]) > 1 and () not in below[0] and all(names == below[0] for names in below):
        names = ", ".join("/".join(parts) for parts in sorted(below[0])[:3])
        print(f"warning: all classes of {folder} have the same subfolders ({names}, ...), which may be the classes")
    if len(images.classes) < 2:
        raise SystemExit(
            f"error: --data: {folder} has a single class, {images.classes[0]}: expected one folder per class directly "
            "below, at least two"
        )
    return images
