"""Synthetic images: functions of split, index and size, balanced classes, masks of the visible parts."""

import pytest
import torch
import torch.nn.functional as F

from util.shapes import SHAPES, Shapes, draw_scene, draw_shapes

# Points (right, down) inside each object, and points outside.
INSIDE = dict(
    disk=[(0, 0), (0.6, 0.6)],
    square=[(0.7, 0.7)],
    triangle=[(0, -0.8), (0.7, 0.45)],
    ring=[(0.7, 0), (0, -0.6)],
    plus=[(0.8, 0), (0, 0.8)],
    star=[(0, -0.9), (0.85, -0.27)],
    heart=[(0.4, -0.3), (0, 0.85)],
    crescent=[(-0.6, 0)],
    hourglass=[(0.5, 0.75), (-0.5, -0.75)],
    arrow=[(0, -0.8), (0.7, -0.15), (0, 0.85)],
)
BESIDE = dict(
    disk=[(0.7, 0.7)],
    square=[(0.8, 0)],
    triangle=[(0.5, -0.5), (0, 0.6)],
    ring=[(0, 0), (0.95, 0)],
    plus=[(0.5, 0.5), (0.95, 0)],
    star=[(0, 0.45), (0.8, 0)],
    heart=[(0, -0.75), (0.7, 0.6)],
    crescent=[(0.45, 0), (0.95, 0)],
    hourglass=[(0.3, 0), (0, 0.9)],
    arrow=[(0.5, 0.3), (0.5, -0.8)],
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_shapes_are_negative_inside_and_positive_outside(shape):
    assert (shape(*torch.tensor(INSIDE[shape.__name__]).T) < 0).all()
    assert (shape(*torch.tensor(BESIDE[shape.__name__]).T) > 0).all()


def test_an_image_depends_on_its_split_index_and_size_alone():
    few, many = (Shapes("train", length, (12, 16)) for length in (3, 502))
    images, labels, _ = draw_shapes("train", range(499, 502), (12, 16))
    assert torch.equal(few.images, many.images[:3]) and few.targets == many.targets[:3]
    assert torch.equal(images, many.images[499:]) and labels.tolist() == many.targets[499:]
    assert len(torch.unique(torch.cat([many.images, Shapes("val", 50, (12, 16)).images]), dim=0)) == 552
    assert 502 / 20 < torch.bincount(torch.tensor(many.targets), minlength=10).min(), "classes are balanced"


def cut_out(mask):
    """Return the content of a mask's bounding box, resized to (16, 16)."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return F.interpolate(box[None, None].float(), (16, 16), mode="area")[0, 0]


def test_coverage_matches_the_bright_object_and_its_label():
    images, labels, coverage = draw_shapes("train", range(100), (48, 64))
    pixels = images.movedim(1, -1) / 255
    assert pixels[coverage == 1].min() > 0.63 and pixels[coverage == 0].max() < 0.37
    line = torch.linspace(-1, 1, 101)
    templates = torch.stack([cut_out(shape(line[None], line[:, None]) < 0) for shape in SHAPES])
    nearest = torch.stack([(templates - cut_out(mask)).abs().sum((1, 2)).argmin() for mask in coverage > 0.5])
    assert (nearest == labels).float().mean() > 0.9  # below 1, because objects are tilted


def test_scenes_match_their_masks():
    scenes = [draw_scene("train", index, (48, 64)) for index in range(40)]
    for image, _, masks in scenes:
        assert masks.sum(0).max() == 1 and masks.flatten(1).sum(1).min() > 12, "disjoint, and inside the image"
        assert ((image.float().mean(0) > 127) == masks.any(0)).float().mean() > 0.99
    assert {len(labels) for _, labels, _ in scenes} == {1, 2, 3, 4, 5}
    assert all(map(torch.equal, scenes[7][::2], draw_scene("train", 7, (48, 64))[::2]))
