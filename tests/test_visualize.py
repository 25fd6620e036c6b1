"""Pictures, read back as pixels and texts: kept patches, scores, predictions, detections, curves."""

import argparse
import json

import pytest
import torch
from einops import rearrange
from PIL import Image, ImageColor, ImageDraw
from torchvision.transforms.v2 import functional as tvf

import data
import detect
import finetune
import pretrain
import visualize
from model import patchify
from ptr import CRITERIA, PTR, token_counts
from util import runs
from util.shapes import SHAPES, Shapes, draw_scene
from weights import load_classifier, load_encoder

IMAGES = Shapes("val", 3, (32, 32)).images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run two steps of each script: PCAE in `a`, a detector in `c`; b.pt is a classifier with scaled-up logits."""
    folder = tmp_path_factory.mktemp("runs")
    flags = f"--dry-run --device cpu --init {folder}/a/dry-run/last.pt --data-root {folder} --out {folder}".split()
    pretrain.main(["--limit", "128", "--knn-every", "0", *flags[:3], "--out", f"{folder}/a"])
    finetune.main(["--limit", "128", "--drop-ratio", "0.3", *flags[:-1], f"{folder}/b"])
    detect.main(["--limit", "4", "--batch-size", "2", "--short-side", "32", *flags[:-1], f"{folder}/c"])
    classifier = runs.load(folder / "b/dry-run/best.pt")
    classifier["model"]["head.weight"] *= 100
    torch.save(classifier, folder / "b.pt")
    return folder


@pytest.fixture
def written(monkeypatch):
    """Record the texts that Pillow writes."""
    texts, write = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *a, **b: (texts.append(a[2]), write(*a, **b)))
    return texts


def draw(folder, *words):
    visualize.main([*map(str, words), "--device", "cpu", "--out", f"{folder}/picture.png"])
    return tvf.pil_to_tensor(Image.open(folder / "picture.png"))


def patches_of(picture, columns):
    """Cut the tiles of a picture of three images into patches at the images' resolution: (3, columns, 64, 48)."""
    step = (picture.shape[2] - visualize.GAP) // columns
    tiles = rearrange(picture[:, -3 * step :, visualize.GAP :], "c (b y) (k x) -> (b k) c y x", y=step, x=step)
    tiles = tiles[..., : -visualize.GAP, : -visualize.GAP]
    return patchify(tiles[..., :: tiles.shape[2] // 32, :: tiles.shape[3] // 32], 4).unflatten(0, (3, columns))


@pytest.mark.parametrize(
    "words, weights, class_token, ptr, num_given",
    [
        ([], "teacher", False, PTR((0, 1, 2), 0.5), 64),
        (["--masked"], "teacher", False, PTR((0, 1, 2), 0.5), 48),
        (["--weights", "student", "--drop-ratio", 0.25, "--drop-blocks", 1, 3], "student", True, PTR((1, 3), 0.25), 64),
    ],
)
def test_drawn_patches_are_those_that_the_encoder_keeps(folder, words, weights, class_token, ptr, num_given):
    picture = draw(folder, *words, "--checkpoint", folder / "a/dry-run/last.pt", "--limit", 3)
    found, original = patches_of(picture, 1 + len(ptr.blocks)), patchify(IMAGES, 4)
    assert torch.equal(found[:, 0], original)
    stages = (found[:, 1:] == original[:, None]).all(dim=3)  # (3, S, 64)
    counts = list(dict.fromkeys(token_counts(num_given, 4, ptr)))
    assert (stages.sum(dim=2) == torch.tensor(counts[1:])).all()
    given = stages[:, 0] | (found[:, 1] < 190).all(dim=2)  # patches not given to PTR are light
    ids = given.nonzero()[:, 1].view(3, num_given)
    encoder = load_encoder(runs.load(folder / "a/dry-run/last.pt"), weights=weights).eval()
    kept = encoder(data.Normalize()(IMAGES), ids, class_token=class_token, ptr=ptr).patch_ids
    assert torch.equal(stages[:, -1], torch.zeros(3, 64, dtype=torch.bool).scatter(1, kept, True))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_heat_maps_show_the_scores_of_the_selection(folder, criterion):
    flags = "--heatmap", "--criterion", criterion, "--limit", 3
    found = patches_of(draw(folder, *flags, "--checkpoint", folder / "a/dry-run/last.pt"), 7)
    heat = found[..., ::16].int().sum(dim=3)  # per pixel: from black to white first red grows, then green, then blue
    shown = (found == found[:, :1]).all(dim=3)  # (3, 7, 64): columns 1, 3 and 5 hold scores
    for i in (1, 3, 5):
        for scores, before, after in zip(heat[:, i], shown[:, i - 1], shown[:, i + 1], strict=True):
            assert scores[after].max() <= scores[before & ~after].min()
        assert heat[:, i][shown[:, i - 1]].aminmax() == (0, 3 * 255)


@torch.no_grad()
def test_predictions_for_files_use_ptr_as_in_training(folder, tmp_path, written):
    for i, image in enumerate(IMAGES):
        tvf.to_pil_image(image).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="broken.jpg"):
        draw(folder, tmp_path, "--checkpoint", folder / "b.pt", "--drop-ratio", 0.6)
    model, images = load_classifier(runs.load(folder / "b.pt")).eval(), data.Normalize()(IMAGES)
    answer, other = (model(images, ptr=PTR((0, 1, 2), ratio)).softmax(dim=1).max(dim=1) for ratio in (0.3, 0.6))
    assert not torch.allclose(answer.values, other.values, atol=2e-3)
    answers = [(SHAPES[label].__name__, f"{100 * score:.1f}") for score, label in zip(*answer, strict=True)]
    for texts in (("25", "64"), *answers):  # the number kept by the first stage, and the predictions
        assert any(all(text in line for text in texts) for line in written)


@torch.no_grad()
def test_detections_are_drawn_in_place(folder, written):
    checkpoint = runs.load(folder / "c/dry-run/best.pt")
    model = detect.load_detector(argparse.Namespace(**checkpoint["config"]), checkpoint).eval()
    (found,) = model([draw_scene("val", 0, (32, 32))[0] / 255])
    threshold = found["scores"].median().item()
    sure = found["scores"] >= threshold
    flags = "--checkpoint", folder / "c/dry-run/best.pt", "--limit", 1, "--score-threshold"
    bare, picture = draw(folder, *flags, 2), draw(folder, *flags, threshold)
    names = [checkpoint["categories"][label - 1][1] for label in found["labels"][sure]]
    assert [text.split()[0] for text in written] == names and len(names) < len(sure)
    colours = torch.tensor([ImageColor.getrgb(colour) for colour in visualize.COLOURS]).T[:, :, None, None]
    lines = (picture[:, None] == colours).all(dim=0).any(dim=0)  # (H, W); masks are half transparent
    for left, top, _, bottom in (found["boxes"][sure] * len(lines) / 32).int().tolist():
        assert lines[top : bottom + 1, left].float().mean() > 0.7  # texts cover some of the line
    masks = (tvf.resize(found["masks"][sure], lines.shape) >= 0.5).any(dim=0)[0] & ~lines
    assert masks.any() and (picture != bare)[:, masks].any(dim=0).float().mean() > 0.9


def test_curves(folder, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [dict(epoch=0, knn=0.1), dict(epoch=1, knn=None, loss=2.0), dict(epoch=2, knn=0.5, loss=1.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    panels = visualize.draw_curves([str(tmp_path)], ["loss", "knn"]).axes
    curves = [[line.get_xydata().tolist() for line in panel.lines] for panel in panels]
    assert curves == [[[[1, 2.0], [2, 1.0]]], [[[0, 0.1], [2, 0.5]]]]
    assert draw(folder, "--log", folder / "a/dry-run", folder / "b/dry-run").float().std() > 0


def test_settings_that_do_not_fit_give_a_one_line_error(folder):
    with pytest.raises(SystemExit, match="^error: [^\n]+$"):
        draw(folder, "--checkpoint", folder / "a/dry-run/last.pt", "--drop-stages", 9)
