"""Data of detection: COCO's format and its pitfalls, synthetic scenes, views with objects, COCO's evaluation."""

import json
import math
import pickle

import pytest
import torch
from PIL import Image

import coco
from coco import CocoDetection, DetectionViews
from data import evaluation_loader
from util.image_files import read_image
from util.shapes import SHAPES, draw_scene
from util.training import World

SIZE = 24, 32
POLYGONS = [[2, 3, 12, 3, 12, 20, 2, 20], [1, 1, 2, 2]]  # the second has two points
BAND = dict(size=SIZE, counts=[5 * 24, 20 * 24, 7 * 24])  # by columns: columns 5 to 24
WHOLE = dict(size=SIZE, counts=[0, 32 * 24])


def rectangle(left, top, right, bottom):
    mask = torch.zeros(SIZE, dtype=torch.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def annotation(number, image_id, category, box, mask=None, **more):
    left, top, right, bottom = box
    mask, box = mask or coco.encode_mask(rectangle(*box)), [left, top, right - left, bottom - top]
    return dict(id=number, image_id=image_id, category_id=category, bbox=box, segmentation=mask) | more


def write_coco(folder, change=lambda annotations: None):
    """Write four images: category ids with gaps; an object with id 0; two with equal ids; images without objects."""
    annotations = [
        annotation(0, 1, 90, (2, 3, 12, 20), POLYGONS, iscrowd=0, area=170.0),
        annotation(1, 1, 3, (10, 4, 30, 14), iscrowd=0, area=200.0),
        annotation(1, 5, 8, (5, 0, 25, 24), BAND),  # without area and iscrowd
        annotation(2, 1, 3, (1, 1, 9, 9)),
        annotation(4, 5, 8, (0, 0, 32, 24), WHOLE, iscrowd=1, area=768.0),
        annotation(5, 9, 3, (0, 0, 32, 24), WHOLE, iscrowd=1, area=768.0),
        annotation(6, 77, 3, (4, 4, 8, 9)),  # of an unlisted image
    ]
    change(annotations)
    images = [dict(id=i, file_name=f"{i}.png", height=SIZE[0], width=SIZE[1]) for i in (9, 1, 5, 3)]
    categories = [dict(id=i, name=name) for i, name in ((8, "dog"), (3, "cat"), (90, "bus"))]
    (folder / "val2017").mkdir(parents=True)
    for image, mode in zip(images, ("RGB", "L", "RGBA", "P"), strict=True):
        pixels = torch.randint(256, (*SIZE, 3), generator=torch.Generator().manual_seed(image["id"])).byte()
        Image.fromarray(pixels.numpy()).convert(mode).save(folder / "val2017" / image["file_name"])
    (folder / "annotations").mkdir()
    content = json.dumps(dict(images=images, annotations=annotations, categories=categories))
    (folder / "annotations" / "instances_val2017.json").write_text(content)
    return folder


def read_coco(folder, limit=None):
    return CocoDetection(*coco.find_annotations(folder, "val"), limit)


def test_targets(tmp_path):
    images = read_coco(write_coco(tmp_path))
    assert images.ids == [1, 3, 5, 9] and images.categories == [(3, "cat"), (8, "dog"), (90, "bus")]
    targets = {target["image_id"]: target for _, target in images}
    assert [target["labels"].tolist() for target in targets.values()] == [[3, 1, 1], [], [2], []]
    boxes = [[2, 3, 12, 20], [10, 4, 30, 14], [1, 1, 9, 9]]
    assert targets[1]["boxes"].tolist() == boxes
    assert torch.equal(targets[1]["masks"], torch.stack([rectangle(*box) for box in boxes]))
    assert torch.equal(targets[5]["masks"], rectangle(5, 0, 25, 24)[None]), "a crowd is not a target"
    assert targets[3]["boxes"].shape == (0, 4) and targets[9]["masks"].shape == (0, *SIZE)
    assert all(torch.equal(x, read_image(tmp_path / "val2017" / f"{target['image_id']}.png")) for x, target in images)
    few = read_coco(tmp_path, limit=2)
    assert len(few) == 2 and few.ids == read_coco(tmp_path, limit=2).ids and set(few.ids) < set(images.ids)


def test_boxes_end_at_the_image(tmp_path):
    whole = [2, 3, 12, 20], [10, 4, 30, 14], [1, 1, 9, 9]
    over_the_edge = 0, [-3, 10, 100, 100], [[0, 10, 32, 24], *whole[1:]]
    for number, box, left in over_the_edge, (1, [40, 2, 5, 5], whole[::2]), (1, [5, 5, 1e-6, 9], whole[::2]):
        folder = write_coco(tmp_path / str(box), lambda annotations, n=number, b=box: annotations[n].update(bbox=b))
        _, target = read_coco(folder)[0]
        assert target["boxes"].tolist() == list(left) and len(target["masks"]) == len(target["labels"]) == len(left)


MASKS = [None, [[1, 1, 2, 2]], [[1, 1, 5, 1, 1e8, 9]], [[1, 1, 5, 1, math.nan, 9]], dict(size=[9, 9], counts=[81])]
BOXES = [None, [1, 1, 5], [1, 1, math.nan, 5], [1, 1, math.inf, 5], [1, 1, 1e8, 5]]


@pytest.mark.parametrize(
    "spoiled", [dict(category_id=4), *(dict(segmentation=m) for m in MASKS), *(dict(bbox=b) for b in BOXES)], ids=str
)
def test_objects_that_pycocotools_cannot_use_are_skipped_and_counted(tmp_path, capsys, spoiled):
    images = read_coco(write_coco(tmp_path / "one", lambda annotations: annotations[1].update(spoiled)))
    assert [len(target["labels"]) for _, target in images] == [2, 0, 1, 0]
    assert "1 of 6" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="instances_val2017.json"):
        read_coco(write_coco(tmp_path / "all", lambda annotations: [some.update(spoiled) for some in annotations]))


def test_invalid_coco_folders_are_rejected(tmp_path):
    write_coco(tmp_path)
    for content in ("{", "[]", '{"images": []}', '{"images": [{}], "annotations": [], "categories": []}'):
        (tmp_path / "annotations" / "instances_val2017.json").write_text(content)
        with pytest.raises(SystemExit, match="instances_val2017.json"):
            read_coco(tmp_path)
    with pytest.raises(SystemExit, match="--data"):
        coco.find_annotations(tmp_path, "train")


def test_written_scenes_equal_drawn_scenes(tmp_path):
    images = read_coco(coco.write_scenes(tmp_path, SIZE))
    assert [name for _, name in images.categories] == [shape.__name__ for shape in SHAPES]
    for index in range(0, len(images), 10):
        pixels, labels, masks = draw_scene("val", index, SIZE)
        image, target = images[index]
        assert torch.equal(image, pixels) and torch.equal(target["masks"], masks.byte())
        assert target["labels"].tolist() == [1 + label for label in labels]
        assert_tight(target)


def assert_tight(target):
    """Assert that boxes tightly enclose the masks."""
    for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
        (top, bottom), (left, right) = (mask.any(dim).nonzero().flatten()[[0, -1]].tolist() for dim in (1, 0))
        assert box == [left, top, right + 1, bottom + 1]


def test_flips_and_crops_keep_boxes_and_masks_together(tmp_path):
    image, target = read_coco(write_coco(tmp_path))[0]
    mirrored, its_target = coco.flip(image, target)
    assert torch.equal(mirrored, image.flip(2)) and not torch.equal(its_target["boxes"], target["boxes"])
    assert_tight(its_target)
    torch.testing.assert_close(coco.flip(mirrored, its_target), (image, target), rtol=0, atol=0)
    part, seen = coco.crop(image, target, top=4, left=10, height=12, width=20)
    assert torch.equal(part, image[:, 4:16, 10:30]) and seen["masks"].shape == (2, 12, 20)
    assert seen["boxes"].tolist() == [[0, 0, 2, 12], [0, 0, 20, 10]] and seen["labels"].tolist() == [3, 1]
    assert coco.crop(image, target, 20, 0, 4, 4)[1]["boxes"].shape == (0, 4)

    # DETR's crop: with a shorter side of 400, 500 or 600 pixels, sides of 384 to 600, or the whole side.
    image, target = torch.zeros(3, 300, 400), target | dict(masks=torch.ones(3, 300, 400).byte())
    torch.manual_seed(0)
    crops = [coco.random_crop(image, target) for _ in range(200)]
    assert_tight(crops[0][1])
    heights, widths = torch.tensor([crop.shape[1:] for crop, _ in crops]).T
    assert 192 <= heights.min() < 205 and heights.max() == 300 and (heights == 300).float().mean() < 0.2
    assert 192 <= widths.min() < 215 and widths.max() == 400


@pytest.mark.filterwarnings("ignore::UserWarning")  # names the broken file
def test_views_are_equal_in_workers_and_blank_for_broken_files(tmp_path):
    images = read_coco(write_coco(tmp_path))
    (tmp_path / "val2017" / "5.png").write_bytes(b"broken")
    views, world = DetectionViews(images, channels=1), World(rank=0, size=1, device=torch.device("cpu"))
    loaders = [evaluation_loader(views, 4, workers=workers, world=world) for workers in (0, 2)]
    batches = [coco.unpack(next(iter(loader))) for loader in loaders]
    torch.testing.assert_close(*batches, rtol=0, atol=0)
    pixels, targets, readable = batches[0]
    assert pixels[0].shape == (1, *SIZE) and readable.tolist() == [True, True, False, True]
    assert [target["image_id"] for target in targets] == [1, 3, -1, 9] and targets[2]["boxes"].shape == (0, 4)
    assert torch.equal(pickle.loads(pickle.dumps((views, coco.pack)))[0][0, 0][0], pixels[0]), "workers may be spawned"

    augmented = DetectionViews(images, channels=3, augment=True)
    assert augmented[0, 2][1]["image_id"] in (1, 3, 9) and not augmented[0, 2][2], "training uses another image"
    epochs = [augmented[epoch, 0][0] for epoch in range(40)]
    assert torch.equal(epochs[3], augmented[3, 0][0]) and 10 < sum(torch.equal(x, images[0][0]) for x in epochs) < 30


def test_average_precision(tmp_path):
    images = read_coco(write_coco(tmp_path))
    results = []
    for _, target in images:  # output of a perfect detector, with soft masks
        found = target | dict(scores=torch.ones(len(target["boxes"])), masks=0.49 + 0.02 * target["masks"][:, None])
        results += coco.coco_results(found, target["image_id"], images.categories)

    def score(results, image_ids=images.ids):
        return list(coco.average_precision(images, results, image_ids).values())

    assert score(results) == pytest.approx([1] * 6)
    assert score([]) == [0] * 6
    assert score([result for result in results if result["image_id"] == 1], [1, 3]) == pytest.approx([1] * 6)
    # One of two cats: precision is 1 up to a recall of 0.5, which is 51 of COCO's 101 recall thresholds.
    one_cat = [result for result in results if result["bbox"] != [1, 1, 8, 8]]
    assert score(one_cat) == pytest.approx([(1 + 1 + 51 / 101) / 3] * 6)
    # A second dog within the crowd of dogs is not an error. A second bus is an error, with the highest score.
    for image_id, category, expected in ((5, 8, 1), (1, 90, (1 + 1 + 1 / 2) / 3)):
        more = annotation(None, image_id, category, (22, 1, 30, 9), score=2.0)
        assert score([more, *results]) == pytest.approx([expected] * 6)
