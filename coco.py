"""Data of detection: COCO's format, synthetic scenes, views of images with their objects, COCO's evaluation."""

import contextlib
import io
import json
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert, clip_boxes_to_image, masks_to_boxes

from data import Views
from util.image_files import UnreadableImage, read_image
from util.shapes import SHAPES, draw_scene
from util.training import generator

Target = dict[str, Any]  # per image: boxes (n, 4), labels (n,), masks (n, H, W), image_id

# --- annotation files -------------------------------------------------------------------------------------------------


class CocoDetection(Dataset):
    """Images and their objects, from an image folder and an annotation file in COCO's format.

    An item is an image, uint8 (3, H, W), and its target:
        boxes     float32 (n, 4): left, top, right, bottom in pixels
        labels    int64 (n,): from 1, in the order of the category ids, which may have gaps; 0 is the background
        masks     uint8 (n, H, W)
        image_id  as in the file
    Crowds and empty boxes are not targets; `coco` keeps them for the evaluation. `ids` lists the images: all, or
    `limit` at random. `categories` lists (id, name) of labels 1, 2, ... Items raise UnreadableImage if the file is
    broken, not of the annotated size, or very thin. A file that is not in COCO's format ends the script.
    """

    def __init__(self, folder: Path, annotations: Path, limit: int | None = None):
        self.folder, self.coco = folder, COCO()
        try:
            self.coco.dataset = tidy(json.loads(annotations.read_text(encoding="utf-8")))
            with contextlib.redirect_stdout(io.StringIO()):  # createIndex prints
                self.coco.createIndex()
            ids, category_ids = sorted(self.coco.imgs), sorted(self.coco.cats)  # TypeError if ids have several types
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"error: --data: {annotations} is not in COCO's format ({error!r})") from None
        order = torch.randperm(len(ids), generator=generator("limit"))[:limit].tolist() if limit else range(len(ids))
        self.ids = sorted(ids[i] for i in order)
        self.categories = [(i, str(self.coco.cats[i]["name"])) for i in category_ids]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        info = self.coco.imgs[self.ids[index]]
        path, size = self.folder / info["file_name"], (info["height"], info["width"])
        image = read_image(path, upright=False)  # as annotated, if the stored size is the annotated one
        if image.shape[1:] != size:
            image = read_image(path)
        if image.shape[1:] != size or max(size) > 32 * min(size):  # thinner images vanish when resized
            raise UnreadableImage(f"{path}: {tuple(image.shape[1:])} pixels, annotated as {size}, or too thin")
        found = [a for a in self.coco.imgToAnns[info["id"]] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
        boxes = clip_boxes_to_image(box_convert(boxes, "xywh", "xyxy"), size)
        solid = (boxes[:, 2:] - boxes[:, :2] > 0.01).all(dim=1)  # smaller boxes could vanish when resized
        found = [a for a, is_solid in zip(found, solid.tolist(), strict=True) if is_solid]
        masks = torch.zeros(len(found), *size, dtype=torch.uint8)
        for mask, annotation in zip(masks, found, strict=True):
            mask.copy_(torch.from_numpy(self.coco.annToMask(annotation)))
        labels = [category for category, _ in self.categories]
        labels = torch.tensor([1 + labels.index(a["category_id"]) for a in found], dtype=torch.int64)
        return image, dict(boxes=boxes[solid], labels=labels, masks=masks, image_id=info["id"])

    def use_categories(self, categories: list[tuple[int, str]]) -> None:
        """Number the labels by the categories (id, name) of the training set. Unknown categories end the script."""
        unknown = set(self.categories) - set(categories)
        if unknown:
            raise SystemExit(f"error: --data: {self.folder} has categories that are not in the training set: {unknown}")
        self.categories = categories

    def describe(self) -> str:
        """Describe the set: 118,287 images with 849,949 objects of 80 classes."""
        objects = sum(not a["iscrowd"] for i in self.ids for a in self.coco.imgToAnns[i])
        return f"{len(self):,} images with {objects:,} objects of {len(self.categories)} classes"


def tidy(content: dict[str, Any]) -> dict[str, Any]:
    """Return an annotation file's content without objects that pycocotools cannot use, and print their number.

    Modifies `content`. Annotations get new ids from 1, because the evaluation counts an object of id 0 as not found and
    keeps only one object per id. Raises ValueError for repeated image ids, boxes in other units, or if most objects are
    unusable, and KeyError if a field is missing.
    """
    images = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    if len(images) < len(content["images"]):
        raise ValueError("several images have the same id")
    categories = {category["id"] for category in content["categories"]}
    listed = [a for a in content["annotations"] if a["image_id"] in images]
    kept = [a for a in listed if a["category_id"] in categories and is_usable(a, images[a["image_id"]])]
    if len(kept) < len(listed):
        print(f"skipped {len(listed) - len(kept)} of {len(listed)} objects without a usable box, mask or category")
    for name, known in (("image_id", images), ("category_id", categories)):
        strangers = [a[name] for a in content["annotations"] if a[name] not in known]
        if 2 * len(strangers) > len(content["annotations"]):
            raise ValueError(f"most objects have an unlisted {name}, such as {strangers[0]!r}: text or a number?")
    if 2 * len(kept) <= len(listed):
        raise ValueError("at least half of the objects lack a usable box or mask (segmentation)")
    check_units(kept)
    for number, annotation in enumerate(kept, start=1):
        box = annotation["bbox"]
        annotation |= dict(id=number, iscrowd=int(annotation.get("iscrowd") or 0))
        if not isinstance(annotation.get("area"), int | float):
            annotation["area"] = box[2] * box[3]
    return dict(images=content["images"], categories=content["categories"], annotations=kept)


def is_usable(annotation: dict[str, Any], size: tuple[int, int]) -> bool:
    """Return whether box and mask of an object fit an image of `size` (H, W), because C code does not check them.

    Removes polygons of less than three points from `annotation`, because pycocotools would read them as boxes.
    """
    box, mask = annotation.get("bbox") or (), annotation.get("segmentation")
    if isinstance(mask, dict):
        masked, numbers = list(mask["size"]) == list(size) and fills_image(mask), list(box)
    else:
        masked = annotation["segmentation"] = [points for points in mask or () if len(points) >= 6]
        numbers = [*box, *(number for points in masked for number in points)]
    return bool(masked) and len(box) == 4 and all(abs(number) <= 4 * max(size) for number in numbers)


def fills_image(mask: dict[str, Any]) -> bool:
    """Return whether the runs of a run-length encoded mask add up to its image, which pycocotools does not check."""
    counts = mask.get("counts")
    if isinstance(counts, list):
        return min(counts, default=-1) >= 0 and sum(counts) == math.prod(mask["size"])
    try:
        return encode_mask(torch.from_numpy(coco_mask.decode(mask)))["counts"] == counts
    except (ValueError, TypeError):
        return False


def check_units(annotations: list[dict[str, Any]]) -> None:
    """Raise ValueError if most boxes and polygons disagree (IoU below 0.5), as in other units or another order."""
    some = [a for a in annotations if isinstance(a["segmentation"], list)][:1000]
    points = [torch.tensor([x for polygon in a["segmentation"] for x in polygon]).view(-1, 2) for a in some]
    around = torch.tensor([[*xy.amin(0).tolist(), *xy.amax(0).tolist()] for xy in points]).view(-1, 4)
    boxes = box_convert(torch.tensor([a["bbox"] for a in some], dtype=torch.float32).view(-1, 4), "xywh", "xyxy")
    shared = (torch.minimum(boxes, around)[:, 2:] - torch.maximum(boxes, around)[:, :2]).clamp(min=0).prod(1)
    areas = [(x[:, 2:] - x[:, :2]).prod(1) for x in (boxes, around)]
    apart = shared < 0.5 * (areas[0] + areas[1] - shared)  # intersection over union below 0.5
    if len(some) >= 5 and (2 * apart.sum() > len(some) or boxes.max() <= 1):  # too few to judge otherwise
        raise ValueError("boxes do not enclose their masks: expected pixels, boxes as left, top, width, height")


def find_annotations(folder: Path, split: str) -> tuple[Path, Path]:
    """Return the image folder and the annotation file of `split`, train or val. Without exactly one, end the script."""
    files = sorted((folder / "annotations").glob(f"instances_{split}*.json"))
    images = [folder / file.stem.removeprefix("instances_") for file in files]
    if len(files) != 1 or not images[0].is_dir():
        raise SystemExit(
            f"error: --data: {folder} must have exactly one annotations/instances_{split}*.json and a folder with its "
            f"images (instances_{split}2017.json: {split}2017/)"
        )
    return images[0], files[0]


# --- synthetic scenes in COCO's format --------------------------------------------------------------------------------

NUM_SCENES = dict(train=400, val=100)  # --limit may raise the number for training


def write_scenes(root: Path, image_size: tuple[int, int], limit: int | None = None) -> Path:
    """Write synthetic scenes of `image_size` (H, W) in COCO's format to a folder below `root`, unless it exists.

    Writes 100 scenes to validate, and 400 to train, or `limit` if it is larger. Returns the folder. Delete it after a
    change of the scenes.
    """
    lengths = NUM_SCENES | dict(train=max(limit or 0, NUM_SCENES["train"]))
    folder = root / f"shapes-{image_size[0]}x{image_size[1]}-{lengths['train']}-{lengths['val']}"
    root.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            whole = Path(temporary) / "whole"
            (whole / "annotations").mkdir(parents=True)
            for split, length in lengths.items():
                (whole / f"{split}2017").mkdir()
                content = write_split(whole / f"{split}2017", split, length, image_size)
                with open(whole / "annotations" / f"instances_{split}2017.json", "w", encoding="utf-8") as file:
                    json.dump(content, file)
            with contextlib.suppress(OSError):  # another process was first
                whole.rename(folder)
    return folder


def write_split(folder: Path, split: str, length: int, image_size: tuple[int, int]) -> dict[str, Any]:
    """Write the images of one split, with ids from 1, and return the content of the annotation file."""
    images, annotations = [], []
    category_ids = range(1, 2 * len(SHAPES), 2)  # with gaps, like COCO's
    for index in range(length):
        pixels, labels, masks = draw_scene(split, index, image_size)
        name = f"{index + 1:012}.png"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / name)
        images.append(dict(id=index + 1, file_name=name, height=image_size[0], width=image_size[1]))
        for label, mask in zip(labels, masks, strict=True):
            rle = encode_mask(mask)
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index + 1,
                    category_id=category_ids[label],
                    iscrowd=0,
                    bbox=coco_mask.toBbox(rle).tolist(),
                    area=int(mask.sum()),
                    segmentation=rle,
                )
            )
    categories = [dict(id=i, name=shape.__name__) for i, shape in zip(category_ids, SHAPES, strict=True)]
    return dict(images=images, annotations=annotations, categories=categories)


def encode_mask(mask: Tensor) -> dict[str, Any]:
    """Encode a boolean mask (H, W) by COCO's run-length encoding, as text for JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return rle | dict(counts=rle["counts"].decode("ascii"))


# --- views ------------------------------------------------------------------------------------------------------------


def flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Mirror an image (C, H, W) and its objects, left to right."""
    left, top, right, bottom = target["boxes"].unbind(1)
    boxes = torch.stack([image.shape[-1] - right, top, image.shape[-1] - left, bottom], dim=1)
    return image.flip(-1), target | dict(boxes=boxes, masks=target["masks"].flip(-1))


def crop(image: Tensor, target: Target, top: int, left: int, height: int, width: int) -> tuple[Tensor, Target]:
    """Crop an image and its objects. Boxes follow from the visible masks. Removes objects without a visible pixel."""
    area = ..., slice(top, top + height), slice(left, left + width)
    masks = target["masks"][area]
    seen = masks.flatten(1).any(dim=1).bool()
    boxes = masks_to_boxes(masks[seen]) + torch.tensor([0, 0, 1, 1])  # from pixel centres to edges
    return image[area], target | dict(boxes=boxes, labels=target["labels"][seen], masks=masks[seen])


def random_crop(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Crop an image (C, H, W) and its objects as in DETR, at a random place.

    The crop's sides are 384 to 600 pixels (at most the whole side) of the image scaled to a shorter side of 400, 500 or
    600 pixels. DETR scales, crops and scales again. Here the crop is cut from the image as it is, so only the model
    scales.
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


class Packed(NamedTuple):
    """A batch in few tensors, because each tensor from a loader's process takes a file descriptor."""

    pixels: Tensor  # of all images, then of all masks: uint8, flat
    boxes: Tensor  # (n, 4) of all objects
    labels: Tensor  # (n,)
    readable: Tensor  # (B,)
    shapes: list[tuple[int, ...]]  # (C, H, W) of each image
    counts: list[int]  # objects of each image
    image_ids: list[int]


def pack(samples: list[tuple[Tensor, Target, bool]]) -> Packed:
    """Pack images of any sizes, their targets, and which images were readable."""
    images, targets, readable = zip(*samples, strict=True)
    flat = [image.flatten() for image in images] + [target["masks"].flatten() for target in targets]
    boxes, labels = (torch.cat([target[name] for target in targets]) for name in ("boxes", "labels"))
    shapes, counts = [tuple(image.shape) for image in images], [len(target["labels"]) for target in targets]
    image_ids = [target["image_id"] for target in targets]
    return Packed(torch.cat(flat), boxes, labels, torch.tensor(readable), shapes, counts, image_ids)


def unpack(batch: Packed) -> tuple[list[Tensor], list[Target], Tensor]:
    """Return images, targets and which images were readable: the inverse of `pack`."""
    mask_shapes = [(count, *shape[1:]) for count, shape in zip(batch.counts, batch.shapes, strict=True)]
    shapes = [*batch.shapes, *mask_shapes]
    parts = batch.pixels.split([math.prod(shape) for shape in shapes])
    parts = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    images, masks = parts[: len(batch.shapes)], parts[len(batch.shapes) :]
    columns = batch.boxes.split(batch.counts), batch.labels.split(batch.counts), masks, batch.image_ids
    names = "boxes", "labels", "masks", "image_id"
    return images, [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)], batch.readable


class DetectionViews(Views):
    """Views by (epoch, index): image uint8 (channels, H, W), target, and whether it was readable; batches are `Packed`.

    `augment` mirrors with probability 0.5 (if `flip`) and crops with probability `crop_ratio`. Without `augment`, an
    unreadable image is replaced by a blank one without objects and with image id -1.
    """

    collate = staticmethod(pack)

    def __init__(
        self,
        images: CocoDetection,
        channels: int,
        seed: int = 0,
        *,
        augment: bool = False,
        crop_ratio: float = 0.0,
        flip: bool = True,
    ):
        super().__init__(images, None, channels, seed, replace=augment)
        self.augment, self.crop_ratio, self.flip = augment, crop_ratio, flip

    def show(self, image: Tensor, target: Target | int) -> tuple[Tensor, Target]:
        """Return the view of an image (C, H, W) and its target, augmented; -1: the target of an unreadable image."""
        if target == -1:
            target = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), image_id=-1)
            target["masks"] = torch.zeros(0, *image.shape[-2:], dtype=torch.uint8)
        if self.augment:
            do_flip, do_crop = torch.rand(2).tolist()
            if do_flip < 0.5 and self.flip:
                image, target = flip(image, target)
            if do_crop < self.crop_ratio:
                image, target = random_crop(image, target)
        return image, target


# --- evaluation -------------------------------------------------------------------------------------------------------


def coco_results(found: Target, image_id: int, categories: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Convert the objects that `Detector` found in one image to rows of COCO's result format, with boxes and masks."""
    boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
    rows = zip(boxes, found["labels"].tolist(), found["scores"].tolist(), found["masks"], strict=True)
    return [
        dict(
            image_id=image_id,
            category_id=categories[label - 1][0],
            bbox=box,
            score=score,
            segmentation=encode_mask(mask[0] >= 0.5),
        )
        for box, label, score, mask in rows
    ]


def average_precision(
    images: CocoDetection, results: list[dict[str, Any]], image_ids: list[int], show: bool = False
) -> dict[str, float]:
    """Evaluate `results` on the images `image_ids` by COCO's own evaluation. `show` prints its tables.

    Returns `box_ap`, `box_ap50`, `box_ap75`, `mask_ap`, `mask_ap50`, `mask_ap75` in [0, 1], or -1 without any object.
    """
    scores = {}
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        with contextlib.redirect_stdout(io.StringIO()) as summary:
            # Without `bbox`, COCO sorts masks by their own area into small, medium, large. `loadRes` needs results.
            rows = [{key: value for key, value in r.items() if kind == "bbox" or key != "bbox"} for r in results]
            found = images.coco.loadRes(rows) if rows else COCO()
            evaluation = COCOeval(images.coco, found, kind)
            evaluation.params.imgIds = sorted(image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        if show:
            print("\n".join([f"{name}:", *summary.getvalue().splitlines()[-12:]]))
        ap, ap50, ap75 = evaluation.stats[:3].tolist()
        scores |= {f"{name}_ap": ap, f"{name}_ap50": ap50, f"{name}_ap75": ap75}
    return scores
