"""Synthetic images of one of ten shapes, and scenes of several, in any number and without a download.

Image `index` of `split` is a function of split, index and image size alone. Each shape is an approximate signed
distance function (negative inside, positive outside) of object coordinates in about [-1, 1]: u right, v down.
"""

import math

import torch
from torch import Tensor

from util.small_images import InMemory
from util.training import generator


def box(u: Tensor, v: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


def disk(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 0.9


def square(u: Tensor, v: Tensor) -> Tensor:
    return box(u, v, 0.75, 0.75)


def triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(v - 0.5, 0.866 * u.abs() - 0.5 * v - 0.45)


def ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.7).abs() - 0.2


def plus(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(box(u, v, 0.9, 0.3), box(u, v, 0.3, 0.9))


def star(u: Tensor, v: Tensor) -> Tensor:
    fifth = 2 * math.pi / 5  # fold the five points onto the one that looks up; its edge is a straight line
    angle = torch.remainder(torch.atan2(u, -v) + fifth / 2, fifth) - fifth / 2
    radius = torch.hypot(u, v)
    return 0.351 * (radius * angle.cos() - 0.95) + 0.936 * radius * angle.sin().abs()


def heart(u: Tensor, v: Tensor) -> Tensor:
    diamond = (u.abs() + (v - 0.1).abs() - 0.8) * 0.707
    return torch.minimum(diamond, torch.hypot(u.abs() - 0.4, v + 0.3) - 0.566)


def crescent(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(disk(u, v), 0.7 - torch.hypot(u - 0.45, v))


def hourglass(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(v.abs() - 0.8, (u.abs() - 0.8 * v.abs()) * 0.78)


def arrow(u: Tensor, v: Tensor) -> Tensor:
    head = torch.maximum(v + 0.1, (u.abs() - v - 0.9) * 0.707)
    return torch.minimum(head, box(u, v - 0.35, 0.28, 0.55))


SHAPES = (disk, square, triangle, ring, plus, star, heart, crescent, hourglass, arrow)


def paint(darkest: float, brightest: float, hue: Tensor, stripe: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return pixels (n, 3, H, W), about [0, 1], of one colour with faint stripes; x (1, 1, W), y (1, H, 1).

    `hue` (n, 3) and `stripe` (n, 3, 1, 1: direction, frequency, strength) are random numbers in [0, 1].
    """
    direction, frequency, strength = math.pi * stripe[:, 0], 2 * math.pi * (1 + stripe[:, 1]), 0.06 * stripe[:, 2]
    wave = strength * torch.sin(frequency * (direction.cos() * x + direction.sin() * y))
    return (darkest + (brightest - darkest) * hue)[:, :, None, None] + wave[:, None]


def draw_shapes(split: str, indices: range, image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images: uint8 (n, 3, H, W), labels (n,), and the fraction of each pixel that the object covers (n, H, W)."""
    draws = torch.stack([torch.rand(18, generator=generator("shapes", split, index)) for index in indices])
    # Columns (n, 1, 1), to broadcast with pixel grids. Each random number has one meaning.
    label, size, left, top, tilt = draws[:, :5, None, None].unbind(1)
    hues, stripes = draws[:, 5:11], draws[:, 11:17, None, None]
    labels = (label.flatten() * len(SHAPES)).long()

    height, width = image_size
    aspect = torch.tensor([width, height]) / min(image_size)  # the shorter side is [-1, 1]
    y, x = (torch.linspace(-1 + 1 / n, 1 - 1 / n, n) * n / min(image_size) for n in image_size)
    x, y = x[None, None, :], y[None, :, None]

    radius = 0.6 + 0.3 * size
    right, down = x - (2 * left - 1) * (aspect[0] - radius), y - (2 * top - 1) * (aspect[1] - radius)
    angle = math.radians(15) * (2 * tilt - 1)
    u = (angle.cos() * right + angle.sin() * down) / radius
    v = (angle.cos() * down - angle.sin() * right) / radius
    distance = torch.empty_like(u)
    for i, shape in enumerate(SHAPES):
        chosen = labels == i
        distance[chosen] = shape(u[chosen], v[chosen])
    coverage = (0.5 - distance * radius * min(image_size) / 2).clamp(0, 1)  # a one-pixel soft edge

    ground = paint(0.1, 0.3, hues[:, :3], stripes[:, :3], x, y)
    thing = paint(0.7, 0.9, hues[:, 3:], stripes[:, 3:], x, y)
    images = torch.lerp(ground, thing, coverage[:, None])
    return (images.clamp(0, 1) * 255).round().byte(), labels, coverage


class Shapes(InMemory):
    """Data set of images with one object of ten shapes, in memory as uint8 (N, 3, H, W), with labels.

    A light object of random hue, size, place, tilt and stripes lies on a dark background of random hue and stripes.
    """

    def __init__(self, split: str, length: int, image_size: tuple[int, int]):
        chunks = [range(i, min(i + 500, length)) for i in range(0, length, 500)]
        drawn = [draw_shapes(split, chunk, image_size) for chunk in chunks]
        images, labels = (torch.cat(parts) for parts in list(zip(*drawn, strict=True))[:2])
        super().__init__(images, labels.tolist(), [shape.__name__ for shape in SHAPES])


def draw_scene(split: str, index: int, image_size: tuple[int, int]) -> tuple[Tensor, list[int], Tensor]:
    """Draw one to five objects: uint8 (3, H, W), labels from 0, and masks of the visible parts (n, H, W).

    A function of (split, index, size) alone. Sizes are 0.2 to 0.45 of the shorter side. Objects hardly overlap; if they
    do, the later one is in front.
    """
    random = generator("scene", split, index)
    height, width = image_size
    short = min(image_size)
    rows, columns = torch.arange(height)[None, :, None] + 0.5, torch.arange(width)[None, None, :] + 0.5  # of pixels
    x, y = 2 * columns / short, 2 * rows / short

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random)

    image = paint(0.1, 0.3, draw(1, 3), draw(1, 3, 1, 1), x, y)
    placed: list[tuple[float, float, float]] = []
    labels, masks = [], torch.zeros(0, height, width, dtype=torch.bool)
    for _ in range(1 + int(5 * draw(1))):
        radius = short * (0.1 + 0.125 * draw(1).item())
        for left, top in draw(10, 2).tolist():  # ten tries to find a free place
            place = radius + left * (width - 2 * radius), radius + top * (height - 2 * radius)
            if all(math.dist(place, other) > 0.8 * (radius + size) for *other, size in placed):
                break
        else:
            continue
        placed.append((*place, radius))
        labels.append(int(len(SHAPES) * draw(1)))
        angle = math.radians(15) * (2 * draw(1).item() - 1)
        right, down = (columns - place[0]) / radius, (rows - place[1]) / radius
        u, v = math.cos(angle) * right + math.sin(angle) * down, math.cos(angle) * down - math.sin(angle) * right
        coverage = (0.5 - SHAPES[labels[-1]](u, v) * radius).clamp(0, 1)  # (1, H, W), with a soft edge of one pixel
        image = torch.lerp(image, paint(0.7, 0.9, draw(1, 3), draw(1, 3, 1, 1), x, y), coverage)
        masks = torch.cat([masks & (coverage < 0.5), coverage >= 0.5])
    return (image[0].clamp(0, 1) * 255).round().byte(), labels, masks
