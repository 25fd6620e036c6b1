"""Image files: any kind that Pillow reads as upright RGB, folders of them, class folders."""

import os
import struct
from pathlib import Path

import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as tvf

try:  # JPEG about twice as fast as by Pillow; torchvision's is announced to leave in favour of torchcodec's
    from torchcodec.decoders import decode_jpeg
except (ImportError, RuntimeError):  # RuntimeError: it does not find its libraries
    try:
        from torchvision.io import decode_jpeg
    except ImportError:
        decode_jpeg = None

PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # a long text or colour profile beside good pixels is no reason to refuse them
PngImagePlugin.MAX_TEXT_MEMORY = 2**28
SUFFIXES = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif", ".avif")

# What Pillow's parsers raise on broken files; OSError covers missing, truncated and unidentified ones.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error)
DECODING_ERRORS += (Image.DecompressionBombError,)


class UnreadableImage(Exception):
    """An image file that cannot be decoded; the message names it."""


def read_image(path: str | Path, upright: bool = True) -> Tensor:
    """Any image file as RGB, uint8 (3, H, W), turned as its EXIF says if `upright`: of an animation the first frame.

    JPEG is decoded by `decode_jpeg` (the same pixels), all else, what that refuses and what is to be turned by Pillow,
    which also looks at every header first. Raises UnreadableImage.
    """
    try:
        with Image.open(path) as image:
            if image.format == "JPEG" and decode_jpeg is not None and not (upright and "exif" in image.info):
                try:
                    content = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)
                    return decode_jpeg(content, mode="RGB")
                except RuntimeError:
                    pass  # rare encodings, or broken: Pillow knows
            if upright:
                try:
                    ImageOps.exif_transpose(image, in_place=True)
                except DECODING_ERRORS:
                    pass  # broken EXIF says nothing of the pixels
            return tvf.pil_to_tensor(to_rgb(image))
    except DECODING_ERRORS as error:
        raise UnreadableImage(f"{path}: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Pillow image of any mode -> RGB: 16-bit grey is scaled (Pillow would clip it), transparency lies on white.

    Raises ValueError for floats and 32-bit integers: what is black and what is white there, nobody knows.
    """
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(f"numbers of unknown range (Pillow's mode {image.mode}): save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # "I;16" and its kin
        image = image.convert("I").point(lambda value: value / 256).convert("L")
        image.info.pop("transparency", None)  # one of the 16-bit greys, which no 8-bit one can stand for
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is a system's own: ._photo.jpg of a Mac, @eaDir with the thumbnails of a storage."""
    return name.startswith((".", "@"))


def is_image_file(path: str) -> bool:
    """Whether a path's end says that it is an image, and not in a hidden folder or hidden itself."""
    folder, name = os.path.split(path)
    return name.lower().endswith(SUFFIXES) and not is_hidden(name) and not is_hidden(os.path.basename(folder))


def list_images(folder: Path) -> tuple[list[str], int]:
    """All image files below `folder`, sorted, and the number of other files.

    Linked folders are followed, but each folder is visited once, and none that `folder` lies in.
    """
    found, others, visited = [], 0, {str(parent) for parent in folder.resolve().parents}
    for parent, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in visited:
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        images = [name for name in files if is_image_file(name)]
        found += [os.path.join(parent, name) for name in images]
        others += len(files) - len(images)
    return sorted(found), others


def find_images(folder: Path) -> list[str]:
    """All image files below `folder`, sorted, at least one. Prints how many files are not images."""
    found, others = list_images(folder)
    if not folder.is_dir():
        raise SystemExit(f"error: there is no folder {folder}, nor a data set of this name (--data)")
    if not found:
        raise SystemExit(f"error: the folder {folder} holds no image files ({' '.join(SUFFIXES)})")
    if others:
        print(f"{others:,} files in {folder} are no images ({' '.join(SUFFIXES)})")
    return found


class ImageFiles(Dataset):
    """Every image file of a folder tree, without labels (-1)."""

    classes: list[str] = []

    def __init__(self, folder: Path):
        self.paths = find_images(folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self.paths[index]), -1


class ClassFolders(Dataset):
    """Image files in one folder per class. Label i is `classes[i]`: as given, or the folders' names, sorted."""

    def __init__(self, folder: Path, classes: list[str] | None = None):
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))
        found = {name: list_images(folder / name)[0] for name in names}
        empty = [name for name in names if not found[name]]
        if empty:
            print(f"left out of {folder}, as they hold no images: {', '.join(empty[:5])}{', ...' * (len(empty) > 5)}")
        filled = [name for name in names if found[name]]
        self.classes = filled if classes is None else classes
        unknown = [name for name in filled if name not in self.classes]
        if unknown:
            raise SystemExit(f"error: --data: {folder} has classes that were not trained on: {', '.join(unknown[:5])}")
        samples = [(path, self.classes.index(name)) for name in filled for path in found[name]]
        self.paths, self.targets = [path for path, _ in samples], [label for _, label in samples]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self.paths[index]), self.targets[index]


def class_folders(folder: Path, classes: list[str] | None = None) -> ClassFolders:
    """The images of `folder`, which has a folder per class: at least two, or with `classes` some of those."""
    try:
        images = ClassFolders(folder, classes)
    except OSError as error:
        raise SystemExit(f"error: --data: labels need train/ and val/ with a folder per class ({error})") from None
    if not len(images):
        raise SystemExit(f"error: --data: there are no images in the class folders of {folder}")
    inside = {Path(path).relative_to(folder).parts[:-1] for path in images.paths}  # (class, ...) of each image
    below = [{parts[1:] for parts in inside if parts[0] == name} for name in images.classes]
    if len(below) > 1 and len(below[0]) > 1 and () not in below[0] and all(names == below[0] for names in below):
        names = ", ".join("/".join(parts) for parts in sorted(below[0])[:3])
        print(f"warning: all classes of {folder} hold the same folders ({names}, ...): are these the classes instead?")
    if len(images.classes) < 2:
        raise SystemExit(
            f"error: --data: {folder} has images of one class only, {images.classes[0]}: the folders in it must be the "
            "classes, not a folder that holds them"
        )
    return images
