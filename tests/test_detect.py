"""Detection: COCO's format and its traps, views, the pyramid, PTR in it, COCO's scores, and the script's runs.

Runs call `detect.main` in this process with a tiny model; at the end of this file is what torchrun runs in two.
"""

import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.ops import roi_align

import data
import detect
import engine
from data import CocoDetection
from detect import Detector, ViTPyramid
from engine import UserError, World
from helpers import ROOT, flags, log
from model import ViT, load_encoder, sincos_position_embedding
from ptr import PTR, drop_tokens, scatter_tokens

CPU = World(rank=0, size=1, device=torch.device("cpu"))

# 2 steps an epoch, 4 in all; images of 32 pixels.
TINY = dict(
    init="none", limit=8, batch_size=4, epochs=2, lr=1e-3, short_side=32, long_side=64, dim=16, depth=2, heads=2,
    channels=8, rois=8, proposals=8, anchor=8, device="cpu",
)  # fmt: skip
LEARN = dict(
    limit=None, short_side=48, anchor=12, dim=32, channels=32, proposals=16, lr=2e-3, warmup_steps=5, lr_drops=[2.5],
    epochs=3, batch_size=2,
)  # fmt: skip
RANDOM = TINY | dict(epochs=3, drop_path=0.3, crop_share=0.5, drop_ratio=0.3, drop_stages=1, criterion="random")


# --- helpers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def scenes(tmp_path_factory):
    """Where all tests find the built-in scenes, fewer than usual."""
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "NUM_SCENES", dict(train=24, val=10))
        yield root


def box_of(mask):
    """The box (left, top, right, bottom) around a mask (H, W), by hand."""
    rows, columns = np.nonzero(np.asarray(mask))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def rectangle(size, left, top, right, bottom):
    mask = torch.zeros(size, dtype=torch.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def rectangles(size, *boxes):
    """A target of solid rectangles, of which each mask is its box."""
    masks = torch.stack([rectangle(size, *box) for box in boxes]) if boxes else torch.zeros(0, *size).byte()
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return dict(boxes=boxes, labels=torch.arange(1, 1 + len(boxes)), masks=masks, image_id=7)


def rle(mask, compressed=True):
    encoded = coco_mask.encode(np.asfortranarray(mask.numpy()))
    if compressed:
        return encoded | dict(counts=encoded["counts"].decode())
    flat = mask.numpy().flatten(order="F")
    counts = [len(list(run)) for _, run in itertools.groupby(flat)]
    return dict(size=list(mask.shape), counts=[0, *counts] if flat[0] else counts)


SIZE = 24, 32
# Categories with holes; annotations from id 0; image 3 has nothing, image 9 only a crowd and a box without an area.
CATEGORIES = [dict(id=8, name="dog"), dict(id=3, name="cat"), dict(id=90, name="bus")]
MASKS = [rectangle(SIZE, 2, 3, 12, 20), rectangle(SIZE, 10, 4, 30, 14), rectangle(SIZE, 5, 5, 25, 21)]
POLYGON = [[2.0, 3.0, 12.0, 3.0, 12.0, 20.0, 2.0, 20.0], [1.0, 1.0, 2.0, 2.0]]  # the second is no polygon


def annotations():
    def annotation(number, image_id, category, box, segmentation, **more):
        left, top, right, bottom = box
        box = [left, top, right - left, bottom - top]
        return dict(id=number, image_id=image_id, category_id=category, bbox=box, segmentation=segmentation) | more

    return [
        annotation(0, 1, 90, (2, 3, 12, 20), POLYGON, iscrowd=0, area=170.0),
        annotation(1, 1, 3, (10, 4, 30, 14), rle(MASKS[1]), iscrowd=0, area=200.0),
        annotation(1, 5, 8, (5, 5, 25, 21), rle(MASKS[2], compressed=False)),  # an id twice; no area, no iscrowd
        annotation(4, 5, 8, (0, 0, 32, 24), rle(rectangle(SIZE, 0, 0, 32, 24), False), iscrowd=1, area=768.0),
        annotation(5, 9, 3, (0, 0, 9, 9), rle(rectangle(SIZE, 0, 0, 9, 9), False), iscrowd=1, area=81.0),
        annotation(6, 9, 3, (4, 4, 4, 9), rle(rectangle(SIZE, 4, 4, 5, 9)), iscrowd=0, area=5.0),
        annotation(7, 77, 3, (4, 4, 8, 9), rle(rectangle(SIZE, 4, 4, 8, 9)), iscrowd=0, area=5.0),  # of no image
    ]


def write_coco(folder, change=lambda content: None, split="val", images=None):
    """A folder in COCO's format with four images, grey and RGBA ones too; `change` its annotation file's content."""
    (folder / f"{split}2017").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    listed = []
    for image_id, mode in zip((9, 1, 5, 3), ("RGB", "L", "RGBA", "P"), strict=True):
        pixels = torch.randint(256, (*SIZE, 3), generator=torch.Generator().manual_seed(image_id)).byte()
        Image.fromarray(pixels.numpy()).convert(mode).save(folder / f"{split}2017" / f"{image_id}.png")
        listed.append(dict(id=image_id, file_name=f"{image_id}.png", height=SIZE[0], width=SIZE[1]))
    content = dict(images=listed, annotations=annotations(), categories=[dict(c) for c in CATEGORIES])
    change(content)
    (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return folder


def read_coco(folder, split="val", limit=None):
    return CocoDetection(*data.find_annotations(folder, split), limit)


def small_vit(grid=(4, 4), patch_size=8, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(dim=16, depth=6, heads=2) | changes
    return ViT((grid[0] * patch_size, grid[1] * patch_size), patch_size, **sizes)


def small_detector(seed=0, num_classes=3, short_side=(32,), long_side=64, precision="fp32", **vit):
    backbone = ViTPyramid(small_vit(seed=seed, **vit), 8, precision=precision)
    sizes = dict(short_side=list(short_side), long_side=long_side, anchor=8, rois=8, proposals=16)
    return Detector(backbone, num_classes, **sizes)


@pytest.fixture
def run(scenes, tmp_path, monkeypatch):
    """Run the script, without timing it first; returns the checkpoint of folder `name`."""
    monkeypatch.setattr(engine.Trainer, "seconds_per_step", lambda trainer: 0.0)

    def run(settings=TINY, name="run", **changes):
        out = tmp_path / name
        detect.main(flags(dict(data_root=scenes, out=out) | settings | changes))
        return torch.load(out / "last.pt", weights_only=True) if (out / "last.pt").exists() else None

    return run


@pytest.fixture
def no_scoring(monkeypatch):
    """Scores without looking for objects, for tests of other things: box APs to be set, and mask APs of 1 - box AP."""
    box_aps = itertools.repeat(0.0)

    def score(*_):
        box_ap = next(box_aps)
        return {name: box_ap if name.startswith("box") else 1 - box_ap for name in detect.APS}, {}

    def set_box_aps(*values):
        nonlocal box_aps
        box_aps = iter(values)

    monkeypatch.setattr(detect, "find_objects", lambda *_: {})
    monkeypatch.setattr(detect, "score_objects", score)
    return set_box_aps


def same(a, b):
    """Equal to the last bit, at any depth, but for how long things took and where they lie."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        free = {"images_per_second", "data_wait", *engine.FREE}
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in free)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


# --- built-in scenes --------------------------------------------------------------------------------------------------


def test_scenes_are_exact():
    counts, labels = set(), set()
    for index in range(60):
        image, names, masks = data.draw_scene("train", index, (48, 64))
        assert image.shape == (3, 48, 64) and image.dtype == torch.uint8 and masks.shape == (len(names), 48, 64)
        counts.add(len(names))
        labels |= set(names)
        assert masks.sum(dim=0).max() == 1, "each pixel shows one object"
        bright = image.float().mean(dim=0) / 255  # objects are light, the ground is dark: masks can be seen
        seen = masks.any(dim=0)
        assert ((bright > 0.5) == seen).float().mean() > 0.99
        for mask in masks:
            left, top, right, bottom = box_of(mask)
            assert mask.sum() > 12 and max(right - left, bottom - top) <= 0.46 * 48
    assert counts == {1, 2, 3, 4, 5} and labels == set(range(10))


def test_scenes_depend_on_split_and_index_alone():
    first = data.draw_scene("train", 3, (32, 32))
    torch.manual_seed(5)
    assert same(first, data.draw_scene("train", 3, (32, 32)))
    for other in (("val", 3), ("train", 4)):
        assert not torch.equal(first[0], data.draw_scene(*other, (32, 32))[0])


def test_scenes_are_a_coco_folder(tmp_path):
    lengths = dict(train=5, val=3)
    folder = data.write_scenes(tmp_path / "root", (32, 40), lengths)
    assert [path.name for path in (tmp_path / "root").iterdir()] == [folder.name], "nothing temporary is left"
    for split, length in lengths.items():
        images = read_coco(folder, split)
        assert len(images) == length
        ids = [category for category, _ in images.categories]
        assert [name for _, name in images.categories] == list(data.Shapes.classes)
        assert ids == sorted(ids) and ids != list(range(ids[0], ids[0] + 10)), "ids have holes"
        for index in range(length):
            pixels, labels, masks = data.draw_scene(split, index, (32, 40))
            image, target = images[index]
            assert torch.equal(image, pixels) and torch.equal(target["masks"], masks.byte())
            assert target["labels"].tolist() == [label + 1 for label in labels] and target["image_id"] == index + 1
            assert target["boxes"].tolist() == [box_of(mask) for mask in masks]
    content = json.loads((folder / "annotations/instances_train2017.json").read_text())
    assert all(a["area"] == coco_mask.area(a["segmentation"]) for a in content["annotations"])


def test_scenes_are_drawn_once_and_whole(monkeypatch, tmp_path):
    honest, calls = data.draw_scene, itertools.count()

    def interrupted(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(data, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.write_scenes(tmp_path, (16, 16), dict(train=3, val=2))
    assert not list(tmp_path.iterdir())
    folder = data.write_scenes(tmp_path, (16, 16), dict(train=3, val=2))
    drawn = next(calls)
    assert data.write_scenes(tmp_path, (16, 16), dict(train=3, val=2)) == folder and next(calls) == drawn + 1
    assert data.write_scenes(tmp_path, (16, 16), dict(train=4, val=2)) != folder
    is_dir = Path.is_dir  # another run draws at the same time and is faster
    answers = iter([False])
    monkeypatch.setattr(Path, "is_dir", lambda path: next(answers, True) and is_dir(path))
    assert data.write_scenes(tmp_path, (16, 16), dict(train=3, val=2)) == folder
    assert [path.suffix for path in folder.glob("*/*")].count(".png") == 5
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--data-root .*file cannot be written"):
        data.write_scenes(tmp_path / "file", (16, 16), dict(train=1, val=1))


# --- COCO's format ----------------------------------------------------------------------------------------------------


def test_targets(tmp_path):
    images = read_coco(write_coco(tmp_path))
    assert images.ids == [1, 3, 5, 9] and images.categories == [(3, "cat"), (8, "dog"), (90, "bus")]
    targets = {target["image_id"]: target for _, target in images}
    for target in targets.values():
        n = len(target["labels"])
        assert target["boxes"].shape == (n, 4) and target["boxes"].dtype == torch.float32
        assert target["labels"].dtype == torch.int64 and target["masks"].dtype == torch.uint8
        assert target["masks"].shape == (n, *SIZE)
    assert targets[1]["labels"].tolist() == [3, 1] and targets[5]["labels"].tolist() == [2], "from 1, without holes"
    assert targets[1]["boxes"].tolist() == [[2, 3, 12, 20], [10, 4, 30, 14]]
    assert torch.equal(targets[1]["masks"], torch.stack(MASKS[:2])), "polygons and run lengths"
    assert torch.equal(targets[5]["masks"], MASKS[2][None]), "uncompressed run lengths; a crowd is no target"
    assert len(targets[3]["labels"]) == 0, "an empty image"
    assert len(targets[9]["labels"]) == 0, "a crowd and a box without an area"
    assert images.num_objects() == 4  # the evaluation counts the one without an area


def test_images_of_all_modes(tmp_path):
    images = read_coco(write_coco(tmp_path))
    for image, target in images:
        assert image.shape == (3, *SIZE) and image.dtype == torch.uint8
        assert torch.equal(image, data.read_image(tmp_path / f"val2017/{target['image_id']}.png"))


def test_boxes_end_at_the_image(tmp_path):
    def change(content):
        content["annotations"][0]["bbox"] = [-3, 10, 100, 100]
        content["annotations"][1]["bbox"] = [40, 2, 5, 5]  # outside
        content["annotations"][2]["bbox"] = [5, 5, 1e-6, 9]

    images = read_coco(write_coco(tmp_path, change))
    assert images[0][1]["boxes"].tolist() == [[0, 10, 32, 24]] and len(images[0][1]["masks"]) == 1
    assert len(images[2][1]["labels"]) == 0, "thin enough to lose its width in float32"


def test_annotations_are_numbered_anew(tmp_path):
    images = read_coco(write_coco(tmp_path))
    numbers = [a["id"] for a in images.coco.dataset["annotations"]]
    assert numbers == [1, 2, 3, 4, 5, 6] and sorted(images.coco.anns) == numbers
    assert [a["iscrowd"] for a in images.coco.dataset["annotations"]] == [0, 0, 0, 1, 1, 0]
    assert images.coco.dataset["annotations"][2]["area"] == 320


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["annotations"][1].pop("segmentation"), "annotation 1 has no mask"),
        (lambda c: c["annotations"][0].update(segmentation=[POLYGON[1]]), "annotation 0 has no mask"),
        (lambda c: c["annotations"][1].update(category_id=4), "of category 4, which is not listed"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, math.nan, 3]), "has the box"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), "has the box"),
        (lambda c: c["annotations"][1].pop("bbox"), "'bbox'"),
        (lambda c: c["images"][0].pop("height"), "'height'"),
        (lambda c: c["images"][0].update(id=1), "two with the same id"),
        (lambda c: c["categories"][0].update(id=3), "two with the same id"),
        (lambda c: c.update(images=[]), "no images"),
        (lambda c: c.update(categories=[]), "no categories"),
        (lambda c: c.pop("annotations"), "'annotations'"),
    ],
)
def test_bad_annotation_files(tmp_path, change, message):
    folder = write_coco(tmp_path, change)
    with pytest.raises(UserError, match=f"instances_val2017.json is no annotation file in COCO's format .*{message}"):
        read_coco(folder)


def test_no_annotation_files(tmp_path):
    folder = write_coco(tmp_path)
    with pytest.raises(UserError, match=r"annotations/instances_train\*.json, .*but has none"):
        data.find_annotations(folder, "train")
    file = folder / "annotations/instances_val2017.json"
    (folder / "annotations/instances_val2014.json").write_text(file.read_text())
    with pytest.raises(UserError, match="several: instances_val2014.json, instances_val2017.json"):
        data.find_annotations(folder, "val")
    (folder / "annotations/instances_val2014.json").unlink()
    for text in ("[]", "{", '"words"'):
        file.write_text(text)
        with pytest.raises(UserError, match="no annotation file in COCO's format"):
            read_coco(folder)
    (folder / "val2017").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="no folder .*val2017"):
        data.find_annotations(folder, "val")


def test_limit(tmp_path):
    folder = data.write_scenes(tmp_path, (16, 16), dict(train=20, val=2))
    some = read_coco(folder, "train", 5)
    assert len(some) == 5 and some.ids == sorted(some.ids) and set(some.ids) <= set(range(1, 21))
    assert some.ids != [1, 2, 3, 4, 5] and some.ids == read_coco(folder, "train", 5).ids, "at random, but always these"
    assert some[2][1]["image_id"] == some.ids[2] and len(read_coco(folder, "train", 50)) == 20


def test_categories_of_another_split(tmp_path):
    write_coco(tmp_path, split="train")

    def change(content):  # no cats in the validation images
        content["categories"].pop(1)
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 3]

    val = read_coco(write_coco(tmp_path, change))
    assert val[0][1]["labels"].tolist() == [2]
    val.use_categories(read_coco(tmp_path, "train").categories)
    assert val[0][1]["labels"].tolist() == [3] and val.category_ids == [3, 8, 90]
    with pytest.raises(UserError, match=r"lack: \[\(8, 'dog'\)"):
        val.use_categories([(3, "cat"), (8, "wolf"), (90, "bus")])


@pytest.mark.parametrize("spoil", ["file", "size", "mask"])
def test_unreadable_images(tmp_path, spoil):
    def change(content):
        if spoil == "size":
            content["images"][1].update(height=32, width=24)
            content["annotations"].pop(1)  # what is left is a polygon, which fits any size
        if spoil == "mask":
            content["annotations"][1]["segmentation"] = rle(rectangle((10, 10), 1, 1, 5, 5))

    images = read_coco(write_coco(tmp_path, change))
    if spoil == "file":
        (tmp_path / "val2017/1.png").write_bytes(b"no image")
    with pytest.raises(data.UnreadableImage, match=r"1\.png"):
        images[0]
    view = data.detection_view(0.5)
    image, target, messages = data.DetectionViews(images, view)[0, 0]
    assert target["image_id"] in (3, 5, 9) and "1.png" in messages[0] and image.shape[0] == 3
    image, target, messages = data.DetectionViews(images, view, replace=False)[0, 0]
    assert target["image_id"] == -1 and target["boxes"].shape == (0, 4) and len(messages) == 1


# --- views ------------------------------------------------------------------------------------------------------------


def scene_target(index=1, size=(40, 56)):
    image, labels, masks = data.draw_scene("train", index, size)
    boxes = torch.tensor([box_of(mask) for mask in masks]).float()
    return image, dict(boxes=boxes, labels=torch.tensor(labels) + 1, masks=masks.byte(), image_id=index)


def assert_tight(target, within=0.0):
    """Boxes are those of the masks."""
    for box, mask in zip(target["boxes"], target["masks"], strict=True):
        assert (box - torch.tensor(box_of(mask))).abs().max() <= within


def test_flip():
    image, target = scene_target()
    flipped, mirrored = data.flip(image, target)
    assert torch.equal(flipped, image.flip(2)) and torch.equal(mirrored["masks"], target["masks"].flip(2))
    assert not torch.equal(mirrored["boxes"], target["boxes"]) and torch.equal(mirrored["labels"], target["labels"])
    assert_tight(mirrored)
    assert all(map(same, data.flip(flipped, mirrored), (image, target)))


def test_crop():
    size = 20, 30
    target = rectangles(size, (2, 2, 10, 12), (20, 5, 28, 9), (0, 16, 5, 20))
    image = torch.randint(256, (3, *size)).byte()
    part, cropped = data.crop(image, target, top=4, left=6, height=10, width=20)
    assert torch.equal(part, image[:, 4:14, 6:26])
    assert cropped["boxes"].tolist() == [[0, 0, 4, 8], [14, 1, 20, 5]], "cut at the crop's border"
    assert cropped["labels"].tolist() == [1, 2] and cropped["masks"].shape == (2, 10, 20), "the third is out of sight"
    assert cropped["image_id"] == 7 and cropped["boxes"].dtype == torch.float32
    assert_tight(cropped)
    _, empty = data.crop(image, target, top=0, left=12, height=3, width=5)
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 3, 5)
    for index in range(20):
        image, target = scene_target(index)
        _, cropped = data.crop(image, target, 5, 9, 20, 30)
        assert_tight(cropped)
        assert len(cropped["labels"]) == target["masks"][:, 5:25, 9:39].flatten(1).any(dim=1).sum()


def test_random_crop_has_detrs_sizes():
    """In pixels of an image whose shorter side was 400, 500 or 600: 384 to 600 a side, or the whole side."""
    size = 300, 400
    target, image = rectangles(size, (10, 10, 290, 290)), torch.zeros(3, *size, dtype=torch.uint8)
    torch.manual_seed(0)
    sizes = torch.tensor([data.random_crop(image, target)[0].shape[1:] for _ in range(400)])
    # heights: 384 / 600 * 300 = 192 to 300; widths: 384 / 800 * 400 = 192, to 600 / 533 * 400 = 400
    assert sizes[:, 0].min() in range(192, 200) and sizes[:, 0].max() == 300
    assert sizes[:, 1].min() in range(192, 205) and sizes[:, 1].max() == 400
    assert (sizes[:, 0] == 300).float().mean() < 0.2 and len(sizes.unique(dim=0)) > 300
    offsets = set()
    mark = torch.arange(300)[None, :, None].expand(3, 300, 400).to(torch.int16)
    for _ in range(50):
        offsets.add(data.random_crop(mark, target)[0][0, 0, 0].item())
    assert len(offsets) > 15
    tiny, none = data.random_crop(torch.zeros(3, 1, 900).byte(), rectangles((1, 900)))
    assert tiny.shape[1] == 1 and none["boxes"].shape == (0, 4)


def test_views_are_functions_of_seed_epoch_and_index(scenes):
    images = CocoDetection(*data.find_annotations(data.write_scenes(scenes, (32, 32), data.NUM_SCENES), "train"))
    views = data.DetectionViews(images, data.detection_view(0.5), seed=1)
    first = [views[0, i] for i in range(24)]
    torch.manual_seed(3)
    assert same(first, [views[0, i] for i in range(24)])
    assert not same(first, [views[1, i] for i in range(24)])
    assert not same(first, [data.DetectionViews(images, data.detection_view(0.5), seed=2)[0, i] for i in range(24)])
    for share, low, high in ((0.0, 0, 0), (0.5, 4, 20), (1.0, 22, 24)):
        views = data.DetectionViews(images, data.detection_view(share))
        cropped = sum(views[0, i][0].shape != (3, 32, 32) for i in range(24))
        assert low <= cropped <= high, share
    flipped = sum(not torch.equal(data.DetectionViews(images, data.detection_view(0))[0, i][0], images[i][0])
                  for i in range(24))  # fmt: skip
    assert 5 < flipped < 19
    assert data.DetectionViews(images, data.detection_view(0), channels=1)[0, 0][0].shape == (1, 32, 32)


def test_resize_keeps_boxes_and_masks_together():
    model = small_detector(short_side=(40,), long_side=60)
    image, target = torch.rand(3, 32, 96), rectangles((32, 96), (3, 2, 40, 30), (50, 8, 61, 15))
    batch, (resized,) = model.transform([image], [target])  # the long side decides: 60 / 96
    assert batch.image_sizes == [(20, 60)] and batch.tensors.shape == (1, 3, 32, 64)
    assert resized["masks"].shape[1:] == (20, 60)
    assert torch.allclose(resized["boxes"], target["boxes"] * 60 / 96)
    assert_tight(resized, within=1)


def test_sizes_in_training_and_testing():
    model = small_detector(short_side=(32, 40, 48), long_side=64)
    image = torch.rand(3, 20, 20)
    torch.manual_seed(0)
    drawn = {model.transform([image])[0].image_sizes[0] for _ in range(40)}
    assert drawn == {(32, 32), (40, 40), (48, 48)}
    model.eval()
    assert model.transform([image, torch.rand(3, 20, 60)])[0].image_sizes == [(48, 48), (21, 64)]


# --- the pyramid ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16, 32])
def test_strides(patch_size):
    model = ViTPyramid(small_vit((4, 4), patch_size), 8)
    maps = model(torch.randn(2, 3, 96, 160), [(96, 160), (65, 70)])
    shapes = {name: tuple(x.shape[1:]) for name, x in maps.items()}
    assert shapes == {"0": (8, 24, 40), "1": (8, 12, 20), "2": (8, 6, 10), "3": (8, 3, 5), "pool": (8, 2, 3)}
    kinds = [[type(layer).__name__ for layer in layers] for layers in model.resample]
    up = ["ConvTranspose2d", "LayerNorm2d", "GELU", "ConvTranspose2d"]
    if patch_size == 16:
        assert kinds == [up, up[:1], [], ["MaxPool2d"]]


def test_taps():
    def taps(depth):
        return ViTPyramid(small_vit(depth=depth, dim=4, heads=1), 4).taps

    assert taps(12) == [3, 5, 7, 11] and taps(24) == [7, 11, 15, 23] and taps(6) == [1, 2, 3, 5]
    assert taps(4) == [0, 1, 2, 3] and taps(2) == [0, 0, 0, 1] and taps(1) == [0, 0, 0, 0]


def test_maps_are_the_blocks_patch_tokens():
    """Against the encoder's own forward pass, cut off after each tapped block."""
    vit = small_vit((3, 5), 8)
    images = torch.randn(2, 3, 24, 40)
    expected = []
    for depth in (2, 3, 4, 6):
        part = small_vit((3, 5), 8, depth=depth)
        part.load_state_dict({name: x for name, x in vit.state_dict().items() if name in part.state_dict()})
        part.norm = nn.Identity()
        expected.append(part(images).tokens[:, 1:].transpose(1, 2).reshape(2, 16, 3, 5))
    maps = ViTPyramid(vit, 8).tapped_maps(images, [(24, 40)] * 2)
    for x, y in zip(maps, expected, strict=True):
        assert torch.allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("ptr", [PTR(), PTR((0, 3), 0.4)])
@pytest.mark.parametrize("learned", [False, True])
def test_an_image_is_seen_alone(ptr, learned):
    """What the blocks see does not depend on the other images of a batch, nor on padding, nor does PTR's choice."""
    model = ViTPyramid(small_vit(), 8, ptr=ptr, learned_positions=learned)
    nn.init.normal_(model.encoder.pos_embed)
    sizes = [(40, 60), (64, 30), (33, 57), (17, 9)]
    images = [torch.randn(3, *size) for size in sizes]
    batch = torch.full((4, 3, 64, 64), 0.0)
    for x, image in zip(batch, images, strict=True):
        x[:, : image.shape[1], : image.shape[2]] = image
    maps = model.tapped_maps(batch, sizes)
    for i, (height, width) in enumerate(sizes):
        rows, columns = math.ceil(height / 8), math.ceil(width / 8)
        padded = F.pad(images[i], (0, 8 * columns - width, 0, 8 * rows - height))[None]
        alone = model.tapped_maps(padded, [(height, width)])
        for together, single in zip(maps, alone, strict=True):
            assert torch.allclose(together[i, :, :rows, :columns], single[0], atol=1e-5)
            outside = together[i].clone()
            outside[:, :rows, :columns] = 0
            assert not outside.any()


def test_positions():
    model = ViTPyramid(small_vit((4, 6)), 8)
    for grid in ((4, 6), (1, 1), (9, 3), (40, 7)):
        assert torch.equal(model.positions(grid), sincos_position_embedding(16, grid)[0])
    vit = small_vit((4, 6))
    nn.init.normal_(vit.pos_embed)
    model = ViTPyramid(vit, 8, learned_positions=True)
    assert torch.allclose(model.positions((4, 6)), vit.pos_embed[0], atol=1e-6)
    model.positions((5, 9)).sum().backward()
    assert model.positions((5, 9)).shape == (46, 16) and vit.pos_embed.grad.abs().min() >= 0
    constant = torch.ones_like(vit.pos_embed)
    vit.pos_embed.data.copy_(constant)
    assert torch.allclose(model.positions((7, 7)), torch.ones(50, 16), atol=1e-5)


def test_learned_positions_are_told_from_fixed_ones():
    vit = small_vit((4, 6))
    assert not detect.has_learned_positions(vit)
    vit.pos_embed.data.copy_(vit.pos_embed.half())
    assert not detect.has_learned_positions(vit), "a file in half precision"
    vit.pos_embed.data[0, 5, 3] += 0.1
    assert detect.has_learned_positions(vit)
    for learned in (False, True):
        assert ViTPyramid(vit, 8, learned_positions=learned).encoder.pos_embed.requires_grad == learned


def test_half_precision_ends_at_the_pyramid():
    """The heads get, and compute in, float32: their parameters and outputs are those of a model without autocast."""
    full, half = small_detector(), small_detector(precision="bf16")
    half.load_state_dict(full.state_dict())
    seen = []
    for module in (half.rpn.head, half.roi_heads.box_head, half.backbone.encoder.blocks[0].mlp.fc1):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.rand(2, 3, 32, 64)
    maps, exact = half.backbone(images), full.backbone(images)
    for name, x in maps.items():
        assert x.dtype == torch.float32
        assert not torch.equal(x, exact[name]) and torch.allclose(x, exact[name], atol=0.2), "bf16 within"
    assert seen[0].dtype == torch.bfloat16
    half.eval()([image for image in images])
    objectness, head = seen[2], seen[3]
    assert objectness[0][0].dtype == torch.float32 and head.dtype == torch.float32


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = ViTPyramid(small_vit(drop_path=0.5), 8, checkpointing=checkpointing)
        torch.manual_seed(1)
        if not gradients:
            state = model.state_dict()
        model.load_state_dict(state)
        calls = []
        model.encoder.blocks[2].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        sum(x.square().mean() for x in model(torch.ones(3, 3, 32, 32)).values()).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        assert len(calls) == 1 + checkpointing
    assert same(*gradients)


def test_regions_are_pooled_at_the_strides():
    """torchvision would infer other strides from a small image in a large batch; and large anchors mean coarse maps."""
    maps = {str(i): torch.randn(1, 4, 64 // 2**i, 64 // 2**i) for i in range(4)} | {"pool": torch.randn(1, 4, 4, 4)}
    pool = detect.PyramidRoIAlign(7, anchor=16)
    sides = [(20, 0), (50, 0), (60, 1), (110, 1), (115, 2), (220, 2), (250, 3), (700, 3)]
    for side, level in sides:
        box = torch.tensor([[8.0, 12.0, 8 + side, 12 + side]])
        expected = roi_align(maps[str(level)], [box], 7, spatial_scale=1 / detect.STRIDES[level], sampling_ratio=2)
        assert torch.equal(pool(maps, [box], [(33, 33)]), expected), side
    box = torch.tensor([[8.0, 12.0, 68.0, 72.0]])
    finest = roi_align(maps["0"], [box], 7, spatial_scale=1 / 4, sampling_ratio=2)
    assert torch.equal(detect.PyramidRoIAlign(7, anchor=32)(maps, [box], [(33, 33)]), finest)


def test_patches_are_resized():
    vit = small_vit((3, 4), 14)
    resized = detect.resize_patches(vit, 16, drop_path=0.2)
    assert resized.image_size == (48, 64) and resized.patch_embed.patch_size == 16
    assert resized.blocks[-1].drop_path.p == 0.2
    colours = torch.randn(2, 3, 1, 1)
    even, same_even = (v.patch_embed(colours.expand(-1, -1, *v.image_size)) for v in (vit, resized))
    assert torch.allclose(even, same_even, atol=0.05) and even.std() > 0.2
    for name, tensor in vit.state_dict().items():
        assert name == "patch_embed.proj.weight" or torch.equal(tensor, resized.state_dict()[name])
    same_size = detect.resize_patches(vit, 14).state_dict()["patch_embed.proj.weight"]
    assert torch.allclose(same_size, vit.patch_embed.proj.weight, atol=1e-6)


# --- PTR in the pyramid -----------------------------------------------------------------------------------------------


def test_ratio_zero_is_the_model_without_ptr():
    vit, images = small_vit(), torch.randn(2, 3, 40, 64)
    plain = ViTPyramid(vit, 8)
    maps = plain(images)
    plain.ptr = PTR((0, 2, 4), 0.0)
    assert same(maps, plain(images))
    plain.ptr = PTR((0, 2, 4), 0.5)
    assert not same(maps, plain(images))


def test_dropped_tokens_keep_their_last_value():
    vit, images = small_vit((4, 6)), torch.randn(3, 3, 32, 48)
    model = ViTPyramid(vit, 8, ptr=PTR((0, 3), 0.5))
    maps = [x.flatten(2).transpose(1, 2) for x in model.tapped_maps(images, [(32, 48)] * 3)]

    x = vit.embed(images, torch.arange(24).expand(3, -1), class_token=True)
    place = torch.arange(24).expand(3, -1)
    whole = torch.zeros(3, 24, 16)  # filled in, token by token, by hand
    expected = {}
    for i, block in enumerate(vit.blocks):
        x = block(x)
        for b, n in itertools.product(range(3), range(place.shape[1])):
            whole[b, place[b, n]] = x[b, 1 + n]
        expected[i] = whole.clone()
        if i in (0, 3):
            x, kept = drop_tokens(x, 0.5, num_prefix=1)
            place = place.gather(1, kept)
    assert place.shape == (3, 6)
    for found, i in zip(maps, (1, 2, 3, 5), strict=True):
        assert torch.allclose(found, expected[i], atol=1e-6)
    dropped_first = (expected[0] == expected[5]).all(dim=2)
    assert (dropped_first.sum(dim=1) == 12).all(), "half of them were not touched after block 0"
    assert torch.allclose(maps[3][dropped_first], expected[0][dropped_first], atol=1e-6)


def test_dropped_tokens_learn():
    """The gradient reaches what made a dropped token, through its last value."""
    model = ViTPyramid(small_vit(), 8, ptr=PTR((1,), 0.9))
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    model.tapped_maps(images, [(32, 32)])[3].square().sum().backward()
    of_patches = images.grad.abs().sum(dim=1).unfold(1, 8, 8).unfold(2, 8, 8).sum(dim=(3, 4))
    assert (of_patches > 0).all()


def test_scatter_tokens():
    x, tokens = torch.zeros(2, 5, 3), torch.randn(2, 2, 3)
    ids = torch.tensor([[4, 0], [1, 3]])
    found = scatter_tokens(x, tokens, ids)
    assert not x.any() and torch.equal(found[0, 4], tokens[0, 0]) and torch.equal(found[1, 3], tokens[1, 1])
    assert found.abs().sum(dim=2).gt(0).sum() == 4
    assert scatter_tokens(x.bfloat16(), tokens, ids).dtype == torch.bfloat16


def test_work_falls_with_the_ratio():
    args = detect.read_settings(["--init", "none", "--short-side", "64"])[0]
    backbone = ViTPyramid(small_vit((4, 4), 8), 8)
    full = detect.gigamacs(args, backbone)
    blocks = 6 * (12 * 16 * 16 * 65 + 2 * 16 * 65 * 65)
    backbone.ptr = PTR((0,), 0.5)
    assert detect.token_list(args, backbone) == [64, 32, 32, 32, 32, 32, 32]
    saved = 5 * (12 * 16 * 16 * 32 + 2 * 16 * (65 * 65 - 33 * 33))
    assert full * 1e9 > blocks and (full - detect.gigamacs(args, backbone)) * 1e9 == pytest.approx(saved)
    precise = ViTPyramid(small_vit((4, 4), 8), 8, precision="bf16")
    assert detect.gigamacs(args, precise) == full


# --- the detector -----------------------------------------------------------------------------------------------------


def test_detector_is_torchvisions():
    """Where no image is padded, its own forward pass and torchvision's are one."""
    model = small_detector()
    images = [torch.rand(3, 32, 64), torch.rand(3, 32, 64)]
    targets = [rectangles((32, 64), (4, 4, 20, 20), (30, 8, 60, 30)), rectangles((32, 64))]
    torch.manual_seed(0)
    losses = model(images, targets)
    torch.manual_seed(0)
    assert same(losses, MaskRCNN.forward(model, images, targets)) and losses.keys() == detect.LOSSES.keys()
    model.eval()
    model.roi_heads.score_thresh = 0.0
    found = model(images)
    assert same(found, MaskRCNN.forward(model, images)) and len(found[0]["labels"]) > 3


def test_the_backbone_is_told_each_images_size():
    model, seen = small_detector(short_side=(40,), long_side=64), []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append((tuple(inputs[0].shape), inputs[1])))
    model.eval()([torch.rand(3, 20, 30), torch.rand(3, 50, 25)])
    assert seen == [((2, 3, 64, 64), [(40, 60), (64, 32)])]


def test_detector_returns_to_the_images_size():
    model = small_detector().eval()
    model.roi_heads.score_thresh = 0.0
    for found, size in zip(model([torch.rand(3, 30, 21), torch.rand(3, 64, 90)]), ((30, 21), (64, 90)), strict=True):
        assert found["masks"].shape[1:] == (1, *size) and found["labels"].min() >= 1
        limits = torch.tensor([size[1], size[0]] * 2)
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= limits + 1e-3).all()
        assert found["boxes"][:, 2].max() > size[1] / 2


def test_the_recipes_parts():
    args = detect.read_settings(["--init", "none", "--recipe", "coco"])[0]
    vit = ViT((64, 64), 16, dim=48, depth=12, heads=3, drop_path=args.drop_path)
    model = detect.build_detector(args, vit, 80, PTR(), False)
    assert model.backbone.taps == [3, 5, 7, 11] and model.backbone.out_channels == 256
    convolutions = [m for m in model.roi_heads.box_head.modules() if isinstance(m, nn.Conv2d)]
    linear = [m for m in model.roi_heads.box_head.modules() if isinstance(m, nn.Linear)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(256, 256)] * 4
    assert [(m.in_features, m.out_features) for m in linear] == [(256 * 49, 1024)]
    assert model.roi_heads.box_predictor.cls_score.out_features == 81
    assert model.transform.min_size == tuple(range(480, 801, 32)) and model.transform.max_size == 1333
    assert model.transform.min_size[-1] == 800 and model.roi_heads.fg_bg_sampler.batch_size_per_image == 512
    assert [sizes for (sizes,) in model.rpn.anchor_generator.sizes] == [32, 64, 128, 256, 512]
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    expected = dict(
        epochs=12, lr=3e-4, weight_decay=0.05, layer_decay=0.75, drop_path=0.2, lr_drops=[9, 11], warmup_steps=500,
        batch_size=32, model="vit_base", patch_size=16, crop_share=0.5,
    )  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


def test_every_parameter_learns_also_without_objects():
    """Else DDP would wait for it for ever."""
    model = small_detector(num_classes=2)
    for target in (rectangles((32, 32)), rectangles((32, 32), (2, 2, 20, 20), (8, 10, 30, 30))):
        model.zero_grad()
        losses = model([torch.rand(3, 32, 32)], [target])
        sum(losses.values()).backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without and all(math.isfinite(loss) for loss in losses.values())


def test_layer_decay():
    model = small_detector(depth=6)
    groups = engine.parameter_groups(model, 0.05, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(parameter.requires_grad for parameter in model.parameters())
    for name, (scale, decay) in found.items():
        parameter = model.get_parameter(name)
        if name.startswith("backbone.encoder.blocks."):
            expected = 0.5 ** (6 - int(name.split(".")[3]))
        elif name.startswith("backbone.encoder."):
            expected = 0.5**7
        else:
            expected = 1.0
        assert scale == expected, name
        assert decay == (0.05 if parameter.ndim > 1 and "cls_token" not in name else 0.0), name
    assert found["backbone.encoder.cls_token"] == (0.5**7, 0.0)


# --- scores -----------------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Finds what is marked, shifted by some pixels; it recognises an image by its pixels."""

    def __init__(self, images, shift=0):
        super().__init__()
        self.images, self.shift, self.seen = images, shift, []

    def forward(self, pixels):
        found = []
        for x in pixels:
            image_id, target = next((t["image_id"], t) for y, t in self.images if torch.equal(x, y.float() / 255))
            self.seen.append(image_id)
            boxes = target["boxes"] + torch.tensor([self.shift, 0, self.shift, 0])
            masks = target["masks"].roll(self.shift, dims=2)[:, None].float()
            found.append(dict(boxes=boxes, labels=target["labels"], masks=masks, scores=torch.ones(len(boxes))))
        return found


def score(images, model, **world):
    args = detect.read_settings(["--init", "none", "--data", "shapes"])[0]
    loader = detect.evaluation_loader(args, images, 3, CPU)
    results = detect.find_objects(model, loader, images.category_ids, CPU, engine.Unreadable())
    return results, *detect.score_objects(images, results)


@pytest.fixture(scope="module")
def val_scenes(scenes):
    return read_coco(data.write_scenes(scenes, (32, 32), data.NUM_SCENES))


def test_perfect_predictions_score_one(tmp_path, val_scenes):
    def change(content):  # the box without an area, which nobody finds, goes; and of one class there is nothing
        content["annotations"].pop(5)
        content["categories"].append(dict(id=7, name="elephant"))

    for images in (val_scenes, read_coco(write_coco(tmp_path, change))):
        model = Oracle(images)
        results, scores, of_classes = score(images, model)
        assert sorted(model.seen) == images.ids == list(results), "each image once"
        assert scores == pytest.approx(dict.fromkeys(detect.APS, 1.0))
        present = {a["category_id"] for a in images.coco.dataset["annotations"] if not a["iscrowd"]}
        for kind in ("box", "mask"):
            of = dict(zip(images.category_ids, of_classes[kind], strict=True))
            assert all(of[i] == pytest.approx(1.0) if i in present else math.isnan(of[i]) for i in of)


def test_shifted_predictions_score_less(val_scenes):
    rows = [score(val_scenes, Oracle(val_scenes, shift))[1] for shift in (0, 1, 2, 16)]
    for name in detect.APS:
        values = [row[name] for row in rows]
        assert values == sorted(values, reverse=True) and values[3] < 0.05
    assert rows[1]["box_ap"] < 0.95 and rows[1]["box_ap50"] > rows[1]["box_ap75"] > rows[1]["box_ap"] - 0.2
    assert rows[2]["box_ap75"] < rows[2]["box_ap50"] and rows[2]["mask_ap"] < rows[2]["box_ap"]


def test_scores_are_those_of_coco(val_scenes, tmp_path):
    """From the written file, as anybody would score it, official summary and all."""
    results, scores, _ = score(val_scenes, Oracle(val_scenes, shift=1))
    detect.write_results(str(tmp_path / "found.json"), results)
    folder, file = data.find_annotations(Path(val_scenes.root).parent, "val")
    truth = COCO(file)
    listed = json.loads((tmp_path / "found.json").read_text())
    assert {result["category_id"] for result in listed} <= set(data.SCENE_CATEGORIES)
    assert all(result.keys() == {"image_id", "category_id", "bbox", "score", "segmentation"} for result in listed)
    for kind, names in (("bbox", detect.APS[:3]), ("segm", detect.APS[3:])):
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert [scores[name] for name in names] == pytest.approx(list(evaluation.stats[:3]))


def test_nothing_found_scores_zero(val_scenes):
    class Blind(nn.Module):
        def forward(self, pixels):
            return [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), scores=torch.zeros(0),
                         masks=torch.zeros(0, 1, 32, 32)) for _ in pixels]  # fmt: skip

    results, scores, _ = score(val_scenes, Blind())
    assert scores == dict.fromkeys(detect.APS, 0.0) and list(results) == val_scenes.ids


def test_results():
    """Soft masks become hard ones, boxes width and height, labels category ids."""
    soft = torch.zeros(1, 1, 8, 10)
    soft[..., 2:6, 3:7], soft[..., 6:8, 3:7] = 0.51, 0.49
    boxes, labels, scores = torch.tensor([[3.0, 2, 7, 6.5]]), torch.tensor([2]), torch.tensor([0.5])
    found = dict(boxes=boxes, labels=labels, scores=scores, masks=soft)
    (result,) = detect.coco_results(found, 9, [3, 8, 90])
    assert result.pop("segmentation") == rle(rectangle((8, 10), 3, 2, 7, 6))
    assert result == dict(image_id=9, category_id=8, bbox=[3, 2, 4, 4.5], score=0.5)
    assert boxes.tolist() == [[3, 2, 7, 6.5]]


def test_a_subset_is_scored_as_such(scenes, val_scenes):
    """Objects of other images are not missed: perfect predictions for four images are perfect."""
    some = read_coco(data.write_scenes(scenes, (32, 32), data.NUM_SCENES), limit=4)
    results, scores, _ = score(some, Oracle(some))
    assert len(results) == 4 and scores == pytest.approx(dict.fromkeys(detect.APS, 1.0))
    missed = detect.score_objects(val_scenes, {i: results.get(i, []) for i in val_scenes.ids})[0]
    assert missed["box_ap"] < 0.9


def test_unreadable_images_are_not_scored(tmp_path):
    images = read_coco(write_coco(tmp_path))
    model = Oracle([images[i] for i in range(4)])
    (tmp_path / "val2017/5.png").write_bytes(b"no image")
    results, scores, _ = score(images, model)
    assert list(results) == [1, 3, 9] and model.seen == [1, 3, 9]
    assert scores["box_ap50"] == pytest.approx((51 / 101 + 1) / 2), "no dog to find; of two cats, one has no area"


def test_crowds_excuse_what_is_found_in_them(tmp_path):
    """A second dog within the crowd of dogs is no mistake; a second bus is."""
    def ap50(image_id, category):
        images = read_coco(write_coco(tmp_path, lambda c: c["annotations"].pop(5)))
        results, _, _ = score(images, Oracle(images))
        extra = dict(image_id=image_id, category_id=category, bbox=[22, 1, 8, 8], score=2.0)
        results[image_id].append(extra | dict(segmentation=rle(rectangle(SIZE, 22, 1, 30, 9))))
        return detect.score_objects(images, results)[0]["box_ap50"]

    assert ap50(5, 8) == pytest.approx(1.0) and ap50(1, 90) == pytest.approx((1 + 1 + 0.5) / 3)


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """The folder of a finished run, for reading."""
    out = tmp_path_factory.mktemp("finished") / "run"
    detect.main(flags(TINY | dict(data_root=scenes, out=out)))
    return out


def test_run_folder(finished):
    assert {path.name for path in finished.iterdir()} == {"args.json", "metrics.jsonl", "last.pt", "best.pt"}
    last, best = (torch.load(finished / name, weights_only=True) for name in ("last.pt", "best.pt"))
    rows = log(finished)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 2), (2, 4)]
    for row in rows:
        assert list(row) == [
            "epoch", "step", "loss", "lr", *detect.LOSSES.values(), "grad_norm", "skipped", "images_per_second",
            "data_wait", *detect.APS,
        ]  # fmt: skip
        assert row["loss"] == pytest.approx(sum(row[name] for name in detect.LOSSES.values()))
        assert all(0 <= row[name] <= 1 for name in detect.APS)
    assert last["history"] == rows and last["method"] == "detect" and last["num_images"] == 8
    assert last["categories"][1] == [3, "square"] and not last["learned_positions"]
    scales = {group["lr_scale"]: group["lr"] for group in last["optimizer"]["param_groups"]}
    assert scales == {0.75**i: pytest.approx(0.75**i * rows[-1]["lr"]) for i in range(4)}
    scores = [row["box_ap"] for row in rows]
    assert best["history"][-1]["box_ap"] == max(scores) and "optimizer" not in best
    encoder = load_encoder(last, log=lambda text: None)  # a detector's encoder can be taken on
    assert torch.equal(encoder.blocks[1].mlp.fc1.weight, last["model"]["backbone.encoder.blocks.1.mlp.fc1.weight"])


def test_best_is_of_the_highest_box_ap(no_scoring, run, tmp_path):
    no_scoring(0.1, 0.3, 0.2)
    run(epochs=3)
    assert torch.load(tmp_path / "run/best.pt", weights_only=True)["epoch"] == 2


def test_resumed_equals_uninterrupted(monkeypatch, run, tmp_path):
    whole = run(RANDOM, name="whole")
    honest, epochs = engine.Trainer.train_epoch, iter(range(3))

    def interrupted(trainer, *args):
        if next(epochs) == 2:
            raise KeyboardInterrupt
        return honest(trainer, *args)

    monkeypatch.setattr(engine.Trainer, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(RANDOM, name="parts")
    monkeypatch.setattr(engine.Trainer, "train_epoch", honest)
    assert log(tmp_path / "parts")[-1]["epoch"] == 2
    resumed = run({}, name="parts", resume=True, workers=1, checkpointing=True, per_class=True)
    assert same(whole, resumed) and same(log(tmp_path / "whole"), log(tmp_path / "parts"))
    with pytest.raises(UserError, match="made with other settings: --rois 8 there, 16 here"):
        run({}, name="parts", resume=True, rois=16)


def test_seed_decides(no_scoring, run):
    first, other = run(name="first", epochs=1), run(name="other", epochs=1, seed=1)
    assert not same(first["model"], other["model"])


def test_each_process_draws_its_own_sizes(monkeypatch, no_scoring, run):
    """Steps are seeded with the rank: two processes would else draw the same sizes and regions."""
    seeds = []
    honest = engine.seed_generators
    monkeypatch.setattr(engine, "seed_generators", lambda *args: seeds.append(args[1:]) or honest(*args))
    run(epochs=1)
    assert [seed for seed in seeds if "step" in seed] == [(0, "step", 0, 0), (0, "step", 1, 0)]


def test_learning_rate(no_scoring, run, tmp_path):
    run(epochs=6, lr=1e-3, warmup_steps=4, lr_drops=[3, 5], limit=4, batch_size=2)
    assert [row["lr"] for row in log(tmp_path / "run")] == pytest.approx([2.5e-4, 7.5e-4, 1e-3, 1e-4, 1e-4, 1e-5])

    def rate(step, **changes):
        return engine.warmup_steps(step, **dict(peak=2.0, milestones=[10, 20], warmup=4) | changes)

    assert [rate(s) for s in (0, 1, 4, 9, 10, 19, 20)] == pytest.approx([0, 0.5, 2, 2, 0.2, 0.2, 0.02])
    assert rate(0, warmup=0) == 2.0
    args = detect.read_settings(["--init", "none", "--epochs", "24"])[0]
    assert args.lr_drops == [18, 22]


def test_evaluation_alone_says_the_same(finished, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(engine, "images_per_second", lambda functions, *_: [1.0] * len(functions))
    row = log(finished)[-1]
    more = ["--limit", "8", "--per-class", "--results", str(tmp_path / "found.json")]
    detect.main(["--eval", str(finished / "last.pt"), *more])
    out = capsys.readouterr().out
    (cells,) = [line.split() for line in out.splitlines() if line.strip().startswith("0 ")]
    assert cells[5:] == [f"{100 * row[name]:.1f}" for name in detect.APS] and row["box_ap50"] > 0
    names = [name for name in data.Shapes.classes if f"\n  {name} " in out]
    assert names == list(data.Shapes.classes)
    assert isinstance(json.loads((tmp_path / "found.json").read_text()), list)


@pytest.mark.parametrize("name", ["encoder", "model", "categories", "learned_positions"])
def test_half_a_checkpoint(finished, tmp_path, name):
    content = torch.load(finished / "last.pt", weights_only=True)
    del content[name]
    torch.save(content, tmp_path / "last.pt")
    for flag in ("--eval", "--resume"):
        with pytest.raises(UserError, match=f"last.pt is not a whole checkpoint of this script: it has no .* '{name}'"):
            detect.main([flag, str(tmp_path / "last.pt")])


def test_evaluation_at_several_ratios(finished, capsys):
    command = ["--eval", str(finished / "last.pt"), "--drop-ratio", "0", "0.5", "--drop-blocks", "0", "--limit", "3"]
    detect.main(command)
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("0 ", "0.5 "))]
    assert [(row[0], row[1]) for row in rows] == [("0", "64"), ("0.5", "32")] and "3 images" in out
    assert f"{float(rows[0][2]):.3g} GMACs" in out
    assert float(rows[1][2]) < float(rows[0][2]) and "dropping after blocks [0]" in out


def test_ptr_is_announced(no_scoring, run, capsys):
    run(epochs=1, drop_ratio=0.5, drop_blocks=[0])
    assert "class token + 64 32 32" in capsys.readouterr().out
    run(epochs=1, name="none")
    assert "class token" not in capsys.readouterr().out


def test_a_coco_folder(tmp_path, run, capsys):
    for split in ("train", "val"):
        write_coco(tmp_path / "coco", split=split)
    settings = TINY | dict(limit=None, workers=0, epochs=1, crop_share=0.5)
    run(settings, data="coco", data_root=tmp_path / "coco")
    assert "4 images with 4 objects of 3 classes (cat, dog, bus)" in capsys.readouterr().out
    run(settings, name="other", data=tmp_path / "coco")
    detect.main(["--eval", str(tmp_path / "other/last.pt"), "--device", "cpu"])
    assert "4 images with 4 objects" in capsys.readouterr().out


def test_dry_run_leaves_nothing(run, tmp_path, capsys):
    assert run(dry_run=True, limit=None) is None and not (tmp_path / "run").exists()
    assert "to validate 8 images" in capsys.readouterr().out


def test_encoders_of_all_sorts(run, tmp_path, capsys):
    """A pre-trained one of ours, and a public file with learned positions and patches of 14 pixels, in grey."""
    vit = ViT((32, 32), 4, dim=16, depth=2, heads=2)
    content = dict(method="pcae", encoder=vit.arguments, student=vit.state_dict())
    torch.save(content, tmp_path / "ours.pt")
    sizes = dict(init=tmp_path / "ours.pt", dim=None, depth=None, heads=None, epochs=1)
    checkpoint = run(TINY | sizes)
    assert not checkpoint["learned_positions"] and checkpoint["encoder"] == vit.arguments
    assert torch.equal(checkpoint["model"]["backbone.encoder.pos_embed"], vit.pos_embed)

    vit = ViT((56, 56), 14, dim=192, depth=2, heads=3, channels=1)
    nn.init.normal_(vit.pos_embed, std=0.02)
    torch.save(dict(model=vit.state_dict()), tmp_path / "public.pt")
    checkpoint = run(TINY | sizes | dict(init=tmp_path / "public.pt"), name="public", short_side=64)
    assert "patches of 14 pixels are resized to 16" in capsys.readouterr().out
    assert checkpoint["learned_positions"] and checkpoint["encoder"]["patch_size"] == 16
    assert not torch.equal(checkpoint["model"]["backbone.encoder.pos_embed"], vit.pos_embed), "they learn"
    detect.main(["--eval", str(tmp_path / "public/last.pt"), "--limit", "2"])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(init="nowhere.pt", dim=None, depth=None), "there is no checkpoint nowhere.pt"),
        (dict(init="nowhere.pt"), "--dim goes with --init none"),
        (dict(eval="nowhere.pt"), "there is no checkpoint nowhere.pt"),
        (dict(drop_ratio=[0.1, 0.2]), "--drop-ratio takes one number"),
        (dict(drop_ratio=1.5, drop_blocks=[0]), "--drop-ratio. must be in"),
        (dict(drop_ratio=0.3, drop_blocks=[2]), r"\[2\] do not fit a model of 2 blocks"),
        (dict(compile=True), "--compile is not for detection"),
        (dict(short_side=100), "--long-side must be at least --short-side = 100"),
        (dict(short_side=[0, 32]), "--short-side must be positive"),
        (dict(patch_size=12), "--patch-size must be a power of 2"),
        (dict(lr_drops=[2]), r"--lr-drops must be in \(0, --epochs = 2\)"),
        (dict(crop_share=1.1), r"--crop-share must be in \[0, 1\]"),
        (dict(layer_decay=0), "--layer-decay must be"),
        (dict(rois=0), "--rois must be 1 or more"),
        (dict(limit=0), "--limit must be 1 or more"),
        (dict(batch_size=16), "--batch-size 16 is more than the 8 images"),
        (dict(heads=3), "--heads"),
        (dict(data="nowhere"), "nowhere must have one file annotations"),
        (dict(data="coco"), "must have one file annotations/instances_train"),
    ],
)
def test_bad_settings(run, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(**changes)
    assert not (tmp_path / "run").exists()


def test_bad_data(run, tmp_path):
    folder = tmp_path / "coco"
    write_coco(folder, split="train")
    write_coco(folder, lambda c: c.update(annotations=[]))
    with pytest.raises(UserError, match="no object is marked in the 4 images of val"):
        run(data=folder, workers=0)
    write_coco(folder, lambda c: c["categories"].append(dict(id=91, name="elephant")))
    with pytest.raises(UserError, match="lack: .*elephant"):
        run(data=folder, workers=0)


def test_a_checkpoint_of_another_kind(finished, tmp_path):
    torch.save(dict(method="pcae"), tmp_path / "other.pt")
    with pytest.raises(UserError, match="--eval .*other.pt is not a checkpoint of this script"):
        detect.main(["--eval", str(tmp_path / "other.pt")])
    checkpoint = torch.load(finished / "last.pt", weights_only=True)
    checkpoint["model"].popitem()
    torch.save(checkpoint, tmp_path / "torn.pt")
    with pytest.raises(UserError, match="does not fit the model"):
        detect.main(["--eval", str(tmp_path / "torn.pt")])


def test_it_learns(tmp_path, run):
    """On six images that it sees eight times an epoch: the losses fall, and the AP rises from nothing.

    But not those of classes and boxes: the better the proposals, the more of them hold an object.
    """
    drawn = data.write_scenes(tmp_path, (48, 48), dict(train=1, val=6))
    content = json.loads((drawn / "annotations/instances_val2017.json").read_text())
    content["categories"] = [dict(id=4, name="thing")]
    content["annotations"] = [a | dict(category_id=4) for a in content["annotations"]]
    (drawn / "annotations/instances_val2017.json").write_text(json.dumps(content))
    copies = range(0, 800, 100)
    content["images"] = [image | dict(id=image["id"] + i) for i in copies for image in content["images"]]
    content["annotations"] = [a | dict(image_id=a["image_id"] + i) for i in copies for a in content["annotations"]]
    (drawn / "annotations/instances_train2017.json").write_text(json.dumps(content))
    shutil.copytree(drawn / "val2017", drawn / "train2017", dirs_exist_ok=True)
    run(TINY | LEARN, data=drawn, workers=0)
    first, _, last = log(tmp_path / "run")
    assert last["loss_object"] < 0.3 * first["loss_object"] and last["loss_mask"] < 0.8 * first["loss_mask"]
    assert first["box_ap50"] < 0.2 and last["box_ap50"] > 0.3 and last["mask_ap50"] > 0.2


def test_odd_annotations_are_made_good(tmp_path):
    """Areas that are no numbers, crowds that are null or text, names that are numbers."""
    content = dict(
        images=[dict(id=1, file_name="a.png", height=8, width=8)],
        annotations=[
            dict(id=i, image_id=1, category_id=3, bbox=[1, 1, 4, 4], segmentation=[[1, 1, 5, 1, 5, 5]], **odd)
            for i, odd in enumerate((dict(area=None, iscrowd=None), dict(area=math.nan, iscrowd="0"), dict(area=9.0)))
        ],
        categories=[dict(id=3, name=7)],
    )
    data.tidy_annotations(content)
    assert [a["area"] for a in content["annotations"]] == [16, 16, 9] and content["categories"][0]["name"] == "7"
    assert [a["iscrowd"] for a in content["annotations"]] == [0, 0, 0]


def test_an_image_too_thin_to_resize(tmp_path):
    Image.new("RGB", (400, 2)).save(tmp_path / "thin.png")
    image, category = dict(id=1, file_name="thin.png", height=2, width=400), dict(id=1, name="a")
    content = dict(images=[image], categories=[category], annotations=[])
    (tmp_path / "thin.json").write_text(json.dumps(content))
    images = CocoDetection(tmp_path, tmp_path / "thin.json")
    with pytest.raises(data.UnreadableImage, match="thin.png.*so thin"):
        images[0]


def test_eval_passes_over_a_broken_first_image(run, scenes, tmp_path, capsys):
    """Also where it takes images to measure the speed with."""
    run(limit=None, epochs=1)
    root = tmp_path / "copy"
    shutil.copytree(next(path for path in scenes.iterdir() if path.is_dir()), root)
    sorted((root / "val2017").iterdir())[0].write_bytes(b"broken")
    results = tmp_path / "found.json"
    detect.main(["--eval", str(tmp_path / "run" / "last.pt"), "--data", str(root), "--results", str(results)])
    assert "speed-up" in capsys.readouterr().out and results.is_file()


def test_results_that_cannot_be_written_are_known_before(run, tmp_path):
    with pytest.raises(UserError, match="--results .*there is no folder"):
        run(results=tmp_path / "nowhere" / "found.json")
    assert not (tmp_path / "run").exists()


def test_the_recipes_drops_scale_with_its_epochs():
    for epochs, drops in ((12, [9, 11]), (24, [18, 22]), (6, [4.5, 5.5])):
        args = detect.read_settings(["--recipe", "coco", "--epochs", str(epochs)])[0]
        assert args.lr_drops == drops


# --- two processes ----------------------------------------------------------------------------------------------------


def in_two_processes(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_two_processes(scenes, tmp_path):
    """They train together, and score what one process scores: each of an odd number of images once."""
    out = tmp_path / "two"
    found = tmp_path / "one.json", tmp_path / "two.json"
    settings = TINY | dict(limit=9, data_root=scenes, out=out, epochs=1, results=found[1])
    text = in_two_processes(__file__, *flags(settings))
    assert "2 process(es)" in text and log(out)[-1]["step"] == 2
    lines = [line for line in text.splitlines() if line.startswith("scored[") and line != "scored[]"]  # of no file
    shares = [set(json.loads(line.removeprefix("scored"))) for line in lines]
    assert sorted(map(len, shares)) == [4, 5] and len(shares[0] | shares[1]) == 9
    detect.main(["--eval", str(out / "last.pt"), "--device", "cpu", "--results", str(found[0]), "--limit", "9"])
    one, two = (json.loads(path.read_text()) for path in found)
    assert one == two and {result["image_id"] for result in one} <= shares[0] | shares[1] and len(one) > 9


if __name__ == "__main__":
    data.NUM_SCENES = dict(train=24, val=10)
    gather_lists = engine.gather_lists

    def report(items):
        if items:  # else the files that could not be read, which there are none of
            sys.stdout.write(f"scored{json.dumps([image_id for image_id, _ in items])}\n")
        return gather_lists(items)

    engine.gather_lists = report
    engine.launch(functools.partial(detect.main, sys.argv[1:]))
