"""Data sets in memory: their files; batched views equal torchvision's and those of single images."""

import gzip
import pickle

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

import data
import visualize
from data import BatchViews, CenterView
from helpers import evaluate, flags, train
from util.small_images import InMemory, draw_boxes, resized_crops, torchvision_set
from util.training import World

ALONE, *TWO = (World(rank, size, torch.device("cpu")) for rank, size in ((0, 1), (0, 2), (1, 2)))


def noise(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).byte()


def numbered(count, height=24, width=20, channels=3):
    """Return images whose label is their number."""
    return InMemory(noise(count, channels, height, width), list(range(count)), [])


# --- views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 20), (40, 50), (10, 7)])
def test_crops_equal_torchvisions_of_the_same_rectangle(size):
    images = noise(64, 3, 24, 20)
    boxes = draw_boxes(torch.rand(64, 4, generator=torch.Generator().manual_seed(1)), 24, 20, 0.1)
    mirrored = torch.arange(64) % 2 == 0
    ours = resized_crops(images, boxes, mirrored, size)
    for i, (left, top, width, height) in enumerate(boxes.int().tolist()):
        mode = InterpolationMode.BILINEAR
        expected = tvf.resized_crop(images[i], top, left, height, width, list(size), mode, antialias=True)
        expected = tvf.horizontal_flip(expected) if mirrored[i] else expected
        assert (ours[i].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("height, width", [(32, 32), (24, 36), (100, 20)])
def test_boxes_lie_inside_and_have_the_requested_areas_and_ratios(height, width):
    boxes = draw_boxes(torch.rand(4000, 4, generator=torch.Generator().manual_seed(0)), height, width, 0.3)
    left, top, wide, high = boxes.unbind(1)
    assert boxes.equal(boxes.round()) and min(left.min(), top.min()) == 0 and min(wide.min(), high.min()) > 0
    for start, side, length in ((left, wide, width), (top, high, height)):
        ends = (start + side)[side < length]  # of boxes that could be moved
        assert len(ends) == 0 or (ends.min() < length and ends.max() == length)
    if height < 2 * width:  # else boxes of 3:4 cannot have the area
        assert boxes[:, 0].unique().numel() > 3 and boxes[:, 1].unique().numel() > 3
        quantiles = (wide * high / (height * width)).quantile(torch.tensor([0.0, 0.25, 0.5, 0.75]))
        assert (quantiles - torch.tensor([0.3, 0.475, 0.65, 0.825])).abs().max() < 0.04
        ratio = wide / high
        assert 0.65 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.55


@pytest.mark.parametrize("channels, min_crop", [(3, 0.3), (1, 0.3), (3, 1.0)])
def test_a_batch_of_views_equals_single_ones_and_depends_on_seed_epoch_and_index_alone(channels, min_crop):
    images = numbered(29, channels=channels)

    def views(seed=0):
        return BatchViews(images, (16, 16), min_crop, channels=channels, seed=seed)

    def epoch_of(loader, epoch):
        loader.sampler.set_epoch(epoch)
        return {int(label): view for batch, labels, _ in loader for view, label in zip(batch, labels, strict=True)}

    loader = data.training_loader(views(), 8, seed=0, workers=3, world=ALONE)
    whole, whole_again = (epoch_of(loader, epoch) for epoch in (1, 2))
    halves = [epoch_of(data.training_loader(views(), 4, seed=0, workers=0, world=world), 1) for world in TWO]
    assert len(whole) == 24 and whole.keys() == halves[0].keys() | halves[1].keys() and list(whole) != sorted(whole)
    for index, view in whole.items():
        single, labels, readable = views().__getitems__([(1, index)])
        assert torch.equal(single[0], view) and labels.item() == index and readable.item()
        assert torch.equal((halves[0] | halves[1])[index], view) and view.shape == (channels, 16, 16)
    other = views(seed=1).__getitems__([(1, index) for index in whole])[0]
    for views_of in (other, [whole_again.get(index) for index in whole]):
        same = [torch.equal(a, b) for a, b in zip(whole.values(), views_of, strict=True) if b is not None]
        assert all(same) if min_crop == 1 else not any(same)


def test_half_of_the_crops_are_mirrored():
    ramp = InMemory((8 * torch.arange(32)).byte().expand(400, 3, 32, 32), [0] * 400, [])
    batch = BatchViews(ramp, (16, 16), 0.5).__getitems__([(0, i) for i in range(400)])[0].int()
    assert 150 < (batch[:, 0, 0, 0] > batch[:, 0, 0, -1]).sum() < 250


@pytest.mark.parametrize("size, margin", [((16, 16), 8 / 7), ((24, 20), 1.0)])
def test_uncropped_views_are_the_centre(size, margin):
    images = numbered(5)
    batch, _, _ = BatchViews(images, size, margin=margin).__getitems__([(0, 3), (0, 1)])
    assert torch.equal(batch, torch.stack([CenterView(size, margin)(images[i][0]) for i in (3, 1)]))


def test_type_of_training_views():
    options = dict(flip=True, channels=1, seed=0, device=torch.device("cpu"))
    augment = data.augmentations(rand_augment=9, erasing=0.9)
    at_once, one_by_one = (
        data.training_views(numbered(8), (16, 16), 0.5, augment=steps, **options) for steps in ([], augment)
    )
    loading = dict(workers=0, world=ALONE)
    loaders = [data.evaluation_loader(views, 8, **loading) for views in (at_once, one_by_one)]
    for loader in (*loaders, data.scoring_loader(numbered(8), (16, 16), 1, batch_size=8, **loading)):
        (batch, labels, readable), *_ = loader
        assert batch.shape == (8, 1, 16, 16) and labels.tolist() == list(range(8)) and readable.all()
    assert [isinstance(views, BatchViews) for views in (at_once, one_by_one)] == [True, False]


# --- files ------------------------------------------------------------------------------------------------------------


def write_idx(path, array, pack):
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + bytes(array.numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if pack else content)


def write_mnist(folder, pack, train=6, test=3, size=28, seed=0):
    """Write the four files; a label is the image's number modulo 10."""
    suffix = ".gz" if pack else ""
    for part, count in (("train", train), ("t10k", test)):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", noise(count, size, size, seed=seed + count), pack)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", (torch.arange(count) % 10).byte(), pack)


@pytest.mark.parametrize(
    "name, place, pack",
    [
        ("fashionmnist", ".", True),
        ("fashionmnist", "FashionMNIST/raw", True),
        ("mnist", "MNIST/raw", False),
    ],
)
def test_mnist_is_read_from_its_four_files(tmp_path, name, place, pack):
    write_mnist(tmp_path / place, pack)
    for split, count in (("train", 6), ("test", 3)):
        found, images = torchvision_set(name, split, str(tmp_path), download=False), noise(count, 28, 28, seed=count)
        assert torch.equal(found.images[:, 0], images) and found.targets == list(range(count))
        assert len(found.classes) == 10
        image, label = found[2]
        assert torch.equal(image, images[2].expand(3, -1, -1)) and label == 2
    cut = next((tmp_path / place).glob("train-images*"))
    for length in (900, 0):
        cut.write_bytes(cut.read_bytes()[:length])
        with pytest.raises(SystemExit, match="--data-root"):
            torchvision_set(name, "train", str(tmp_path), download=False)


def test_sets_with_equal_file_names_are_distinguished(tmp_path):
    for seed, place in enumerate((".", "MNIST/raw", "FashionMNIST/raw")):
        write_mnist(tmp_path / place, pack=True, seed=seed)
    for seed, name in ((1, "mnist"), (2, "fashionmnist")):
        found = torchvision_set(name, "train", str(tmp_path), download=False)
        assert torch.equal(found.images[:, 0], noise(6, 28, 28, seed=seed + 6))


def test_a_grey_set_works_in_all_scripts(tmp_path, capsys):
    """From batched crops to a fine-tuned classifier with RandAugment, a probe, evaluation and a picture."""
    write_mnist(tmp_path, pack=True, train=64, test=20)
    common = dict(data="fashionmnist", data_root=tmp_path, device="cpu", batch_size=16, epochs=1)
    checkpoint = train("pretrain", tmp_path / "a", **common, workers=0, knn_every=1)
    assert checkpoint["config"]["channels"] == checkpoint["encoder"]["channels"] == 1 and checkpoint["step"] == 4
    assert 0 <= checkpoint["history"][-1]["knn"] <= 1
    init = dict(init=tmp_path / "a/last.pt")
    for name, changes in (("b", dict(rand_augment=5, workers=0)), ("c", dict(linear_probe=True)), ("d", {})):
        assert train("finetune", tmp_path / name, **common, **init, **changes)["encoder"]["channels"] == 1
    evaluate(tmp_path / "d/last.pt", drop_ratio=[0, 0.3])
    evaluate(tmp_path / "a/last.pt", knn=True)
    visualize.main(flags(checkpoint=tmp_path / "d/last.pt", limit=2, out=tmp_path / "picture.png", device="cpu"))
    assert " 20 images" in capsys.readouterr().out and (tmp_path / "picture.png").exists()


def test_cifar_and_stl(tmp_path, monkeypatch):
    """Files as in the authors' archives, with few images. torchvision's checksums are disabled."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *args: True)
    cifar = tmp_path / "cifar-10-batches-py"
    cifar.mkdir()
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = noise(2, 3 * 32 * 32, seed=i).numpy()
        (cifar / name).write_bytes(pickle.dumps(dict(data=rows, labels=[i, 9])))
    (cifar / "batches.meta").write_bytes(pickle.dumps(dict(label_names=[f"class {i}" for i in range(10)])))
    train, test = (torchvision_set("cifar10", split, str(tmp_path), False) for split in ("train", "test"))
    assert train.images.shape == (10, 3, 32, 32) and train.targets == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert torch.equal(test.images, noise(2, 3, 32, 32, seed=5)) and test.classes[3] == "class 3"

    stl = tmp_path / "stl10_binary"
    stl.mkdir()
    for seed, (part, count) in enumerate((("train", 2), ("test", 3), ("unlabeled", 4))):
        (stl / f"{part}_X.bin").write_bytes(bytes(noise(count, 3, 96, 96, seed=seed).numpy()))  # by columns
        (stl / f"{part}_y.bin").write_bytes(bytes(range(1, count + 1)))
    (stl / "class_names.txt").write_text("airplane\nbird\n")
    train, test = (torchvision_set("stl10", split, str(tmp_path), False) for split in ("train+unlabeled", "test"))
    assert train.targets == [0, 1, -1, -1, -1, -1] and test.targets == [0, 1, 2]
    assert torch.equal(test.images, noise(3, 3, 96, 96, seed=1).mT)
