"""Frequent changes by readers take a few lines: layers of the code, views, data sets, pictures."""

import ast

import pytest
import torch
from torch.utils.data import Dataset

import data
import visualize
from helpers import ROOT
from model import ViT
from ptr import PTR
from util.small_images import InMemory, torchvision_set
from util.training import World

ALONE = World(0, 1, torch.device("cpu"))
SCRIPTS = {"pretrain", "finetune", "evaluate", "detect", "visualize", "benchmark"}


def imports(path):
    """Return the modules that a file imports, by the first part of their names."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in found}


def test_imports_point_one_way():
    """util/ imports nothing from the level above; model.py and ptr.py import no data code; scripts share no code."""
    top = {path.stem for path in ROOT.glob("*.py")}
    for path in (ROOT / "util").glob("*.py"):
        assert not imports(path) & top, path
    assert not imports(ROOT / "ptr.py") & top and imports(ROOT / "model.py") & {*top, "util"} == {"ptr"}
    for script in SCRIPTS:
        assert imports(ROOT / f"{script}.py") & SCRIPTS <= ({"detect"} if script == "visualize" else set())


class TwoViews(Dataset):
    """Two views of each image, by one data set of views."""

    def __init__(self, views):
        self.views = views

    def __len__(self):
        return len(self.views)

    def __getitem__(self, key):
        epoch, index = key
        return self.views[2 * epoch, index][0], self.views[2 * epoch + 1, index][0]


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_wrapper_gives_two_views_of_an_image(in_memory):
    noise = torch.randint(256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    images = InMemory(noise, [0] * 12, ["a"])
    make = (
        data.BatchViews
        if in_memory
        else lambda images, size, crop: data.Views(images, data.pretraining_view(size, crop))
    )
    views = make(images, (16, 16), 0.3)
    loader = data.training_loader(TwoViews(views), 4, seed=0, workers=0, world=ALONE)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        order = [index for _, index in loader.sampler]
        first, second = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert first.shape == (12, 3, 16, 16) and not torch.equal(first, second)
        assert torch.equal(first, torch.stack([views[2 * epoch, i][0] for i in order]))


def test_a_batch_may_mix_epochs():
    images = InMemory(torch.randint(256, (3, 3, 16, 16)).byte(), [0, 1, 2], ["a", "b", "c"])
    views, keys = data.BatchViews(images, (8, 8), 0.3), [(0, 2), (5, 2), (0, 1), (5, 0)]
    assert torch.equal(views.__getitems__(keys)[0], torch.stack([views[key][0] for key in keys]))


def test_an_unknown_set_is_an_error(tmp_path):
    with pytest.raises(KeyError, match="svhn"):
        torchvision_set("svhn", "train", str(tmp_path), download=False)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_of_any_encoder(channels):
    encoder = ViT((32, 48), 8, channels=channels, dim=16, depth=4, heads=2).eval()
    images, ids = torch.randint(256, (2, 3, 32, 48)).byte(), torch.arange(24).expand(2, -1)
    picture = visualize.draw_stages(encoder, images, ids, PTR((0, 2), 0.5), heatmap=True, captions=["a", "b"])
    plain = visualize.draw_stages(encoder, images, ids, PTR((0, 2), 0.5))
    assert picture.width > plain.width and picture.height > plain.height
    with pytest.raises(ValueError):
        visualize.draw_stages(encoder, images, ids, PTR((0, 2), 0.9))
