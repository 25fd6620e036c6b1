"""Pictures: which patches are greyed, heat maps, captions, detections, curves; the numbers of --coverage; bad input.

Most tests call `visualize.main` in this process on checkpoints of tiny models and read the PNG that it writes.
"""

import itertools
import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as tvf

import data
import detect
import engine
import finetune
import pretrain
import visualize
from engine import UserError
from helpers import ROOT, flags, log, run_process, wrap, write_images
from model import Classifier, ViT, load_encoder, pool, split_patches
from ptr import CRITERIA, PTR, drop_blocks, num_kept, token_counts
from visualize import Stage, Subject

CPU = torch.device("cpu")


# --- helpers ----------------------------------------------------------------------------------------------------------


def make_vit(seed=0, image_size=(24, 40), patch_size=8, depth=4, channels=3, dim=16):
    """An encoder whose tokens differ more than those of a fresh one, in evaluation mode."""
    torch.manual_seed(seed)
    vit = ViT(image_size, patch_size, channels=channels, dim=dim, depth=depth, heads=2).eval()
    for parameter in vit.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return vit


CONFIG = dict(
    drop_ratio=0.5, drop_stages=3, drop_at="start", drop_blocks=None, criterion="similarity", mask_ratio=0.75,
)  # fmt: skip


def save(path, content):
    torch.save(content, path)
    return path


def save_pcae(path, student=None, teacher=None, config=CONFIG, method="pcae"):
    """A checkpoint as pretrain.py writes it, as far as it is read."""
    student, teacher = student or make_vit(0), teacher or make_vit(1)
    states = dict(student=student.state_dict(), teacher=teacher.state_dict())
    return save(path, dict(method=method, config=config, encoder=student.arguments) | states)


def save_classifier(path, encoder, config=CONFIG | dict(drop_ratio=[0.5]), classes=("cat", "dog", "owl"), **options):
    arguments, model = encoder.arguments, Classifier(encoder, len(classes), **options).eval()
    nn.init.normal_(model.head.weight)
    content = dict(method="finetune", config=config, encoder=arguments, pool=model.pool, classes=list(classes))
    save(path, content | dict(model=model.state_dict()))
    return model


def run(out, *words, **settings):
    """Run the script in this process; returns the picture, uint8 (3, H, W), if it writes one."""
    visualize.main([*map(str, words), *flags(dict(device="cpu") | settings), "--out", str(out)])
    return tvf.pil_to_tensor(Image.open(out).convert("RGB")) if out.exists() else None


def settings(*words, **more):
    return visualize.read_settings([*map(str, words), *flags(more)])


def vivid(count, size, channels=3):
    """Images of which no pixel is grey: red is always 60 or more above blue."""
    images = torch.randint(0, 120, (count, 3, *size), generator=torch.Generator().manual_seed(5)).byte()
    images[:, 0] += 121
    images[:, 2] //= 2
    return images


def is_grey(image):
    """Where a picture (3, H, W) has no colour: (H, W)."""
    return image.amax(dim=0) == image.amin(dim=0)


def all_patches(vit, count):
    return torch.arange(vit.num_patches).expand(count, -1)


def some_patches(vit, count, number):
    noise = torch.rand(count, vit.num_patches, generator=torch.Generator().manual_seed(3))
    return noise.argsort(dim=1)[:, :number]


def pixels_of(ids, vit, scale):
    """Where patches `ids` (n,) of one image lie, by hand: bool (H, W)."""
    rows, columns = vit.grid
    side = vit.arguments["patch_size"] * scale
    where = torch.zeros(rows * side, columns * side, dtype=torch.bool)
    for i in ids.tolist():
        top, left = i // columns * side, i % columns * side
        where[top : top + side, left : left + side] = True
    return where


# --- what PTR does ----------------------------------------------------------------------------------------------------


def walk(subject, images, ids):
    """The scores and kept patches of each stage, from the definition, one image at a time."""
    vit, ptr, stages = subject.encoder, subject.ptr, []
    x = vit.embed(images, ids, subject.class_token)
    for i, block in enumerate(vit.blocks):
        x = block(x)
        if i not in ptr.blocks:
            continue
        prefix = int(subject.class_token)
        tokens = nn.functional.normalize(x[:, prefix:], dim=-1)
        scores = (tokens @ tokens.transpose(1, 2)).mean(dim=2)  # of all pairs
        order = scores.argsort(dim=1, descending=ptr.criterion == "reverse")
        kept = order[:, : num_kept(ids.shape[1], ptr.drop_ratio)].sort(dim=1).values
        stages.append((ids, scores, ids.gather(1, kept)))
        rows = [torch.cat([x[b, :prefix], x[b, prefix:][kept[b]]]) for b in range(len(x))]
        x, ids = torch.stack(rows), ids.gather(1, kept)
    return stages


# No stage is given two tokens: these are always as redundant as each other.
SCHEDULES = [PTR((0, 1, 2), 0.4), PTR((3, 0, 2), 0.3), PTR((1,), 0.6), PTR((0, 1, 2, 3), 0.2)]


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("ptr", SCHEDULES, ids=lambda ptr: str(ptr.blocks))
@pytest.mark.parametrize("criterion", ["similarity", "reverse"])
@torch.no_grad()
def test_stages_are_those_of_the_definition(class_token, ptr, criterion):
    vit = make_vit()
    subject = Subject(vit, class_token, replace(ptr, criterion=criterion))
    images = torch.randn(3, 3, 24, 40)
    for ids in (all_patches(vit, 3), some_patches(vit, 3, 11)):
        stages = visualize.trace(subject, images, ids)
        expected = walk(subject, images, ids)
        assert len(stages) == len(expected) == len(ptr.blocks)
        for stage, (given, scores, kept) in zip(stages, expected, strict=True):
            assert torch.equal(stage.given, given)
            assert torch.equal(stage.kept, kept)
            torch.testing.assert_close(stage.redundancy, scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
@torch.no_grad()
def test_stages_end_where_the_encoder_does(class_token, criterion):
    vit = make_vit()
    images, ids = torch.randn(4, 3, 24, 40), some_patches(vit, 4, 13)
    ptr = PTR((2, 0, 3), 0.3, criterion)
    stages = visualize.trace(Subject(vit, class_token, ptr), images, ids, 7, "there")
    engine.seed_generators(CPU, 7, "there")
    assert torch.equal(stages[-1].kept, vit(images, ids, class_token=class_token, ptr=ptr).patch_ids)
    counts = [stages[0].given.shape[1]] + [stage.kept.shape[1] for stage in stages]
    assert counts == sorted(set(token_counts(13, 4, ptr)), reverse=True)
    for before, after in itertools.pairwise(stages):
        assert torch.equal(before.kept, after.given)
        for given, kept in zip(after.given.tolist(), after.kept.tolist(), strict=True):
            assert set(kept) < set(given)
    assert not any(block._forward_hooks for block in vit.blocks)


def test_random_draws_follow_the_seed():
    vit = make_vit()
    subject = Subject(vit, False, PTR((0, 1), 0.5, "random"))
    images, ids = torch.randn(4, 3, 24, 40), all_patches(vit, 4)
    a, b, c = (visualize.trace(subject, images, ids, seed)[0].kept for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# --- what is in a file ------------------------------------------------------------------------------------------------


def subject_of(path, **more):
    args, given = settings(checkpoint=path, **more)
    return visualize.load_subject(args, given, engine.load_checkpoint(path)), args


def test_the_teacher_is_shown_as_pcae_runs_it(tmp_path):
    student, teacher = make_vit(0), make_vit(1)
    path = save_pcae(tmp_path / "last.pt", student, teacher)
    for more, encoder, class_token in (
        ({}, teacher, False), (dict(weights="teacher"), teacher, False), (dict(weights="student"), student, True),
    ):  # fmt: skip
        subject, _ = subject_of(path, **more)
        assert torch.equal(subject.encoder.blocks[2].mlp.fc1.weight, encoder.blocks[2].mlp.fc1.weight)
        assert subject.class_token == class_token and not subject.encoder.training
        assert subject.classifier is None and subject.ptr == PTR((0, 1, 2), 0.5)
    other = save_pcae(tmp_path / "mae.pt", student, teacher, method="mae")
    assert subject_of(other)[0].class_token
    assert torch.equal(subject_of(other)[0].encoder.cls_token, student.cls_token)


def test_settings_are_the_files_unless_given(tmp_path):
    config = dict(drop_ratio=0.25, drop_stages=2, drop_at="late", drop_blocks=None, criterion="reverse", mask_ratio=0.5)
    path = save_pcae(tmp_path / "a.pt", config=config)
    assert subject_of(path)[0].ptr == PTR((1, 3), 0.25, "reverse")
    assert subject_of(path)[1].mask_ratio == 0.5
    assert subject_of(path, mask_ratio=0.75)[1].mask_ratio == 0.75  # a default, given
    assert subject_of(path, drop_stages=3, drop_ratio=0.5)[0].ptr == PTR((0, 1, 3), 0.5, "reverse")
    assert subject_of(path, drop_blocks=[2], criterion="similarity")[0].ptr == PTR((2,), 0.25)
    path = save_pcae(tmp_path / "b.pt", config=config | dict(drop_blocks=[0, 3]))
    assert subject_of(path)[0].ptr.blocks == (0, 3)
    assert subject_of(path, drop_stages=1)[0].ptr.blocks == (3,)  # not the file's blocks
    assert subject_of(path, drop_at="start")[0].ptr.blocks == (0, 2)


@pytest.mark.parametrize("saved, shown", [([0.0], 0.5), ([0.3], 0.3)])
def test_a_file_without_drops_is_shown_with_the_usual_ones(tmp_path, saved, shown):
    save_classifier(tmp_path / "best.pt", make_vit(), CONFIG | dict(drop_ratio=saved))
    assert subject_of(tmp_path / "best.pt")[0].ptr.drop_ratio == shown
    assert subject_of(tmp_path / "best.pt", drop_ratio=0.2)[0].ptr.drop_ratio == 0.2


def test_a_classifier_comes_with_its_head(tmp_path):
    model = save_classifier(tmp_path / "best.pt", make_vit())
    subject, _ = subject_of(tmp_path / "best.pt")
    assert subject.classes == ("cat", "dog", "owl") and subject.class_token
    assert torch.equal(subject.classifier.head.weight, model.head.weight)
    assert subject.classifier.encoder is subject.encoder


@pytest.mark.parametrize("wrap_it", [lambda state: dict(model=state), lambda state: state])
def test_public_files(tmp_path, wrap_it):
    vit = make_vit(image_size=(32, 32), dim=192)
    path = save(tmp_path / "vit.pth", wrap_it(vit.state_dict()))
    subject, _ = subject_of(path, heads=2)
    assert subject.class_token and subject.ptr == PTR((0, 1, 2), 0.5) and subject.classifier is None
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(subject.encoder(images).tokens, vit(images).tokens)
    picture = run(tmp_path / "a.png", checkpoint=path, heads=2, limit=1, image_size=[32, 64])
    assert picture.shape[2] == 4 * 256 + 5 * visualize.GAP


# --- the picture ------------------------------------------------------------------------------------------------------


def columns_of(vit, images, stages, **more):
    args, _ = settings(**more)
    return visualize.patch_columns(args, vit, images, stages)


CASES = {
    "whole": dict(),
    "wide": dict(image_size=(8, 72)),
    "thin": dict(image_size=(40, 8)),
    "large": dict(image_size=(144, 192), patch_size=48),
    "one stage": dict(stages=1),
    "twelve stages": dict(depth=12, stages=12, ratio=0.1),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_greyed_pixels_are_the_dropped_patches(name, masked):
    sizes = dict(CASES[name])
    stages, ratio = sizes.pop("stages", 2), sizes.pop("ratio", 0.4)
    vit = make_vit(**sizes)
    ids = some_patches(vit, 3, max(4, vit.num_patches * 3 // 4)) if masked else all_patches(vit, 3)
    images = vivid(3, vit.image_size)
    subject = Subject(vit, False, PTR(drop_blocks(len(vit.blocks), stages), ratio))
    traced = visualize.trace(subject, data.Normalize()(images), ids)
    columns = columns_of(vit, images, traced, masked=masked or None)
    texts = [f"{stage.kept.shape[1]} of {ids.shape[1]} patches" for stage in traced]
    expected = [["input", ""]] + [["masked part", f"{ids.shape[1]} of {vit.num_patches} patches"]] * masked
    assert [column.header for column in columns] == expected + [[f"stage {i}", t] for i, t in enumerate(texts, start=1)]

    scale = columns[0].images.shape[-1] // images.shape[-1]
    assert scale == max(1, math.ceil(128 / min(vit.image_size)))
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    left = [all_patches(vit, 3)] + [ids] * masked + [stage.kept for stage in traced]
    for column, shown in zip(columns, left, strict=True):
        assert column.images.shape == large.shape and column.images.dtype == torch.uint8
        for b in range(3):
            picture, kept = column.images[b], pixels_of(shown[b], vit, scale)
            assert torch.equal(is_grey(picture), ~kept)
            assert torch.equal(picture[:, kept], large[b][:, kept])
            given = pixels_of(ids[b], vit, scale)
            dropped, hidden = given & ~kept, ~given & ~kept
            brightness = picture[0][dropped]
            assert not len(brightness) or (brightness.min() >= 100 and brightness.max() <= 164)
            stripes = picture[0][hidden].unique().tolist()
            assert stripes == ([215, 255] if hidden.any() else [])


def test_faint_images_remain_in_grey():
    """The brighter a pixel, the brighter its grey."""
    levels = torch.arange(0, 256, 15).byte().expand(1, 3, 1, -1)
    grey = visualize.fade(levels)[0, 0, 0].int()
    assert (grey.diff() > 0).all()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_heat_map(criterion):
    vit = make_vit(patch_size=4)
    ids, images = some_patches(vit, 3, 40), vivid(3, (24, 40))
    subject = Subject(vit, False, PTR((0, 2), 0.4, criterion))
    traced = visualize.trace(subject, data.Normalize()(images), ids)
    columns = columns_of(vit, images, traced, heatmap=True, masked=True)[2:]
    scale = columns[0].images.shape[-1] // 40
    side = 4 * scale
    for stage, column in zip(traced, columns, strict=True):
        low, high = stage.redundancy.min(), stage.redundancy.max()
        for b in range(3):
            cells = rearrange(column.images[b], "c (h p) (w q) -> (h w) c p q", p=side, q=side)
            corner, middle = cells[:, :, 0, 0], cells[:, :, side // 2, side // 2]
            score = dict(zip(stage.given[b].tolist(), stage.redundancy[b].tolist(), strict=True))
            for patch in range(60):
                inside = cells[patch].flatten(1)
                if patch not in score:
                    assert is_grey(cells[patch]).all()
                    continue
                place = 4 * (score[patch] - low) / (high - low)  # on five colours
                i = min(int(place), 3)
                colour = torch.lerp(visualize.SCALE[i], visualize.SCALE[i + 1], place - i) * 255
                assert (corner[patch] - colour).abs().max() <= 1
                assert (middle[patch] != corner[patch]).any() == (patch in stage.kept[b])
                assert len(inside.unique(dim=1).T) == 1 + (patch in stage.kept[b])  # a dot, or nothing
        bar = column.footer[:, 8]
        assert (bar[:, 36] == (visualize.SCALE[0] * 255).round()).all()
        assert (bar[:, -37] == (visualize.SCALE[-1] * 255).round()).all()
        ends = [visualize.text_strip([f"{x:.2f}"], 36) for x in (low, high)]
        assert torch.equal(column.footer[:, :, :36], ends[0]) and torch.equal(column.footer[:, :, -36:], ends[1])


def test_a_heat_map_of_equal_scores():
    """All tokens alike: no division by zero."""
    stage = Stage(torch.arange(15)[None], torch.full((1, 15), 0.5), torch.arange(7)[None])
    (_, column) = columns_of(make_vit(), vivid(1, (24, 40)), [stage], heatmap=True)
    assert (column.images[0, :, 0, 0] == (visualize.SCALE[0] * 255).round()).all()


def tiles_of(picture, vit, rows, columns, caption=0):
    """The tiles of a sheet by row and column, uint8 (3, h, w); what is between them must be white."""
    scale = max(1, math.ceil(128 / min(vit.image_size)))
    height, width = (side * scale for side in vit.image_size)
    gap, head = visualize.GAP, 2 * 17 + visualize.GAP
    found = []
    for row, column in itertools.product(range(rows), range(columns)):
        top, left = head + gap + row * (height + caption + gap), gap + column * (width + gap)
        found.append(picture[:, top : top + height, left : left + width])
        assert (picture[:, top - gap : top, left : left + width] == 255).all()
        assert (picture[:, top : top + height, left - gap : left] == 255).all()
    assert picture.shape[2] == gap + columns * (width + gap)
    return [found[i : i + columns] for i in range(0, len(found), columns)]


@pytest.mark.parametrize("words", [{}, dict(masked=True), dict(drop_stages=1), dict(drop_stages=4, heatmap=True)])
def test_the_sheet(tmp_path, words):
    """The whole way: what the PNG shows of built-in images is what the teacher keeps of them."""
    vit = make_vit(1, image_size=(32, 48))
    path = save_pcae(tmp_path / "last.pt", make_vit(0, image_size=(32, 48)), vit)
    picture = run(tmp_path / "a.png", checkpoint=path, limit=3, **words)
    subject, args = subject_of(path, **words)
    images = data.Shapes("val", 3, (32, 48)).images
    ids = all_patches(vit, 3)
    if args.masked:
        noise = torch.stack([torch.rand(24, generator=engine.generator(0, "split", i)) for i in range(3)])
        ids = split_patches(noise, 0.75)[1]
        assert ids.shape[1] == 18
    traced = visualize.trace(subject, data.Normalize()(images), ids, 0)
    columns = visualize.patch_columns(args, vit, images, traced)
    assert len(columns) == 1 + args.masked + words.get("drop_stages", 3)
    footer, lines = (17 + 8, 4) if args.heatmap else (0, 2 if args.masked else 1)
    assert picture.shape[1] == 34 + 8 + 3 * (128 + 8) + 8 + footer + 17 * (lines + 1)
    for b, row in enumerate(tiles_of(picture, vit, 3, len(columns))):
        for tile, column in zip(row, columns, strict=True):
            assert torch.equal(tile, column.images[b])


def test_the_sheet_says_what_is_what(tmp_path, monkeypatch):
    texts = []
    wrap(monkeypatch, visualize, "text_strip", before=lambda lines, width: texts.extend(lines))
    path = save_pcae(tmp_path / "last.pt")
    run(tmp_path / "a.png", checkpoint=path, limit=1)
    assert [text for text in texts if text] == [
        "input", "stage 1", "7 of 15 patches", "stage 2", "3 of 15 patches", "stage 3", "1 of 15 patches",
        "grey: dropped",
    ]  # fmt: skip
    texts.clear()
    run(tmp_path / "a.png", checkpoint=path, limit=1, masked=True, heatmap=True)
    assert {"masked part", "12 of 15 patches", "hatched: for the student", "dot: kept"} < set(texts)


def test_text_is_dark_on_white():
    strip = visualize.text_strip(["", "WWWW"], 100)
    assert strip.shape == (3, 34, 100) and (strip[:, :17] == 255).all()
    rows, columns = (strip[0] < 100).nonzero(as_tuple=True)
    assert abs((columns.min() + columns.max()) / 2 - 50) < 2 and 19 <= rows.min() < rows.max() <= 31


# --- classifiers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("by", ["mean", "class"])
def test_answers_are_of_the_tokens_shown(tmp_path, monkeypatch, criterion, by):
    vit = make_vit(image_size=(32, 48))
    model = save_classifier(tmp_path / "best.pt", vit, CONFIG | dict(drop_ratio=[0.4], criterion=criterion), pool=by)
    seen = []
    wrap(monkeypatch, visualize, "patch_columns", before=lambda *call: seen.append(call[-1]))
    texts = []
    wrap(monkeypatch, visualize, "text_strip", before=lambda lines, width: texts.extend(lines))
    picture = run(tmp_path / "a.png", checkpoint=tmp_path / "best.pt", limit=5)
    kept = seen[0][-1].kept
    images = data.Normalize()(data.Shapes("val", 5, (32, 48)).images)
    engine.seed_generators(CPU, 0)
    with torch.no_grad():
        encoded = model.encoder(images, ptr=PTR((0, 1, 2), 0.4, criterion))
        shares = model.head(model.fc_norm(pool(encoded.tokens, by))).softmax(dim=1)
    assert torch.equal(encoded.patch_ids, kept)
    expected = [f"{('cat', 'dog', 'owl')[row.argmax()]} {100 * row.max():.1f} %" for row in shares]
    assert [text for text in texts if "%" in text] == expected
    rows = tiles_of(picture, vit, 5, 4, caption=17)
    assert torch.equal(rows[4][0], visualize.enlarge(data.Shapes("val", 5, (32, 48)).images[4], 128)[0])


def test_a_public_classifier_has_numbers_for_names(tmp_path):
    vit = make_vit(image_size=(32, 32), dim=192)
    head = {"head.weight": torch.randn(7, 192), "head.bias": torch.zeros(7)}
    path = save(tmp_path / "deit.pth", dict(model=vit.state_dict() | head))
    subject, _ = subject_of(path, heads=2)
    found = visualize.answers(subject, torch.randn(3, 3, 32, 32), 0)
    assert all(re.fullmatch(r"class [0-6] \d+\.\d %", text) for text in found)


# --- images -----------------------------------------------------------------------------------------------------------


def test_files_and_folders(tmp_path, monkeypatch, capsys):
    drawn = []
    wrap(monkeypatch, visualize, "patch_columns", before=lambda args, encoder, images, stages: drawn.append(images))
    path = save_pcae(tmp_path / "last.pt")
    folder = write_images(tmp_path / "photos", 12)
    single = write_images(tmp_path / "more", 2) / "0.jpg"
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    missing = tmp_path / "missing.jpg"
    run(tmp_path / "a.png", single, broken, folder, missing, single, checkpoint=path, limit=5)
    view = data.evaluation_view((24, 40))
    expected = [single, *data.at_most(data.find_images(folder), 5), single]
    assert torch.equal(drawn[0], torch.stack([view(data.read_image(file)) for file in expected]))
    out = capsys.readouterr().out
    assert out.count("skipped an unreadable image") == 2 and str(broken) in out and str(missing) in out
    run(tmp_path / "a.png", folder, checkpoint=path)
    assert len(drawn[1]) == 8


def test_grey_encoders_see_grey_images(tmp_path, monkeypatch):
    drawn = []
    wrap(monkeypatch, visualize, "patch_columns", before=lambda args, encoder, images, stages: drawn.append(images))
    path = save_pcae(tmp_path / "last.pt", make_vit(channels=1), make_vit(1, channels=1))
    run(tmp_path / "a.png", checkpoint=path, limit=2)
    assert torch.equal(drawn[0], tvf.rgb_to_grayscale(data.Shapes("val", 2, (24, 40)).images, 3))
    run(tmp_path / "a.png", write_images(tmp_path / "photos", 6), checkpoint=path)
    assert drawn[1].shape == (6, 3, 24, 40)


# --- the picture in numbers -------------------------------------------------------------------------------------------


def covered_by_hand(index, size, patch_size):
    """Of each patch of an image: the mean coverage of its pixels, one by one."""
    _, _, coverage = data.draw_shapes("val", range(index, index + 1), size)
    rows, columns = size[0] // patch_size, size[1] // patch_size
    return [
        coverage[0, r * patch_size : (r + 1) * patch_size, c * patch_size : (c + 1) * patch_size].double().mean().item()
        for r in range(rows)
        for c in range(columns)
    ]


@pytest.mark.parametrize("masked", [False, True])
def test_coverage_of_each_stage(masked):
    vit = make_vit(image_size=(32, 48), patch_size=4)
    args, _ = settings("--coverage", limit=103, mask_ratio=0.5)  # more than one batch
    subject = Subject(vit, False, PTR((0, 2), 0.4))
    found = visualize.coverage(args, subject, masked, CPU)
    assert found.shape == (103, 3, 3)
    for index in (0, 57, 100, 102):
        image = data.draw_shapes("val", range(index, index + 1), (32, 48))[0]
        ids = torch.arange(96)[None]
        if masked:
            ids = split_patches(torch.rand(1, 96, generator=engine.generator(0, "split", index)), 0.5)[1]
        shares = covered_by_hand(index, (32, 48), 4)
        left = [ids[0]] + [stage[2][0] for stage in walk(subject, data.Normalize()(image), ids)]
        for row, some in zip(found[index], left, strict=True):
            chosen = [shares[i] for i in some.tolist()]
            outline, inside = (sum(test(x) for x in chosen) for test in (lambda x: 0 < x < 1, lambda x: x == 1))
            expected = torch.tensor([sum(chosen), outline, inside]) / len(chosen)
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


def test_random_keeps_what_chance_says():
    vit = make_vit(image_size=(32, 32), patch_size=4)
    args, _ = settings("--coverage", limit=300)
    given, *left = visualize.coverage(args, Subject(vit, False, PTR((0, 1), 0.5, "random")), False, CPU).unbind(1)
    for stage in left:
        difference = (stage - given)[:, 0]
        assert abs(difference.mean()) < 4 * difference.std() / 300**0.5
        assert difference.std() > 0


def test_coverage_table(tmp_path, capsys):
    vit = make_vit(1, image_size=(32, 32), patch_size=4)
    path = save_pcae(tmp_path / "last.pt", teacher=vit, student=make_vit(0, image_size=(32, 32), patch_size=4))
    visualize.main(["--coverage", *flags(dict(checkpoint=path, limit=40, drop_stages=2, device="cpu"))])
    args, _ = settings("--coverage", limit=40)
    lines = capsys.readouterr().out.splitlines()
    engine.seed_generators(CPU, 0, "weights")
    fresh = ViT(**vit.arguments).eval()
    for masked, title in ((False, "of the whole image"), (True, "of the masked part")):
        (start,) = (i for i, line in enumerate(lines) if line.startswith(title))
        assert lines[start].split()[4:8] == [*CRITERIA, "untrained"]
        columns = [(vit, criterion) for criterion in CRITERIA] + [(fresh, "similarity")]
        found = [
            visualize.coverage(args, Subject(encoder, False, PTR((0, 2), 0.5, criterion)), masked, CPU)
            for encoder, criterion in columns
        ]
        names = ["given: 48 patches", "stage 1: 24 patches", "stage 2: 12 patches"] if masked else [
            "given: 64 patches", "stage 1: 32 patches", "stage 2: 16 patches"]  # fmt: skip
        for i, name in enumerate(names):
            line = lines[start + 1 + i]
            assert line.strip().startswith(name)
            numbers = [float(x) for x in re.findall(r"\d+\.\d", line)]
            cells = [some[:, i, 0] for some in found] + [found[0][:, i, 1], found[0][:, i, 2]]
            expected = [100 * x for cell in cells for x in (cell.mean().item(), cell.std().item() / 40**0.5)]
            assert numbers == pytest.approx(expected, abs=0.051)


# --- detections -------------------------------------------------------------------------------------------------------


def found_objects(size, boxes, labels, scores):
    masks = torch.zeros(len(boxes), 1, *size)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[0, top:bottom, left : (left + right) // 2] = 0.9  # the left half of its box
        mask[0, top:bottom, (left + right) // 2 : right] = 0.4
    boxes, labels, scores = torch.tensor(boxes).float().reshape(-1, 4), torch.tensor(labels), torch.tensor(scores)
    return dict(boxes=boxes, labels=labels, scores=scores, masks=masks)


def test_objects_are_drawn_where_they_are(monkeypatch):
    texts = []
    wrap(monkeypatch, visualize, "draw_bounding_boxes", before=lambda image, boxes, labels, *_: texts.extend(labels))
    image = torch.full((3, 40, 60), 100).byte()
    found = found_objects((40, 60), [(5, 10, 25, 30), (40, 12, 56, 36)], [1, 3], [0.913, 0.3])
    drawn = visualize.draw_objects(image, found, ["disk", "square", "star"], 0.5)
    assert drawn.shape == (3, 280, 420) and texts == ["disk 0.91"]  # 7 times as large
    touched = (drawn != 100).any(dim=0)
    rows, columns = touched.nonzero(as_tuple=True)
    assert abs(rows.min() - 70) <= 2 and abs(rows.max() - 210) <= 2
    assert abs(columns.min() - 35) <= 2 and abs(columns.max() - 175) <= 2
    blue = torch.tensor([0, 0x72, 0xB2])
    assert (drawn[:, 209, 140] == blue).all() and (drawn[:, 140, 175] == blue).all()  # the box
    assert ((drawn[:, 180, 60] - (100 + blue) / 2).abs() <= 1).all()  # the mask, half transparent
    assert (drawn[:, 180, 140] == 100).all()  # in the box, not on the mask
    texts.clear()
    visualize.draw_objects(image, found, ["disk", "square", "star"], 0.3)
    assert texts == ["disk 0.91", "star 0.30"]


def test_nothing_found():
    image = vivid(1, (40, 60))[0]
    for found in (found_objects((40, 60), [(5, 10, 25, 30)], [1], [0.1]), found_objects((40, 60), [], [], [])):
        drawn = visualize.draw_objects(image, found, ["disk"], 0.5)
        assert torch.equal(drawn, image.repeat_interleave(7, 1).repeat_interleave(7, 2))


def test_large_images_are_reduced():
    image = torch.full((3, 1200, 1920), 100).byte()
    found = found_objects((1200, 1920), [(500, 250, 1000, 750)], [1], [0.9])
    drawn = visualize.draw_objects(image, found, ["disk"], 0.5)
    assert drawn.shape == (3, 480, 768)
    rows, columns = (drawn != 100).any(dim=0).nonzero(as_tuple=True)
    assert abs(columns.min() - 200) <= 2 and abs(columns.max() - 400) <= 2 and abs(rows.max() - 300) <= 2


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A detector's checkpoint, of one run of two steps, which finds something in every image."""
    folder = tmp_path_factory.mktemp("detector")
    settings = dict(
        init="none", limit=4, batch_size=2, epochs=1, short_side=32, long_side=64, dim=16, depth=2, heads=2, channels=8,
        rois=8, proposals=8, anchor=8, device="cpu", out=folder / "run", data_root=folder / "data", lr=1e-4,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "NUM_SCENES", dict(train=4, val=4))
        detect.main(flags(settings))
    return folder / "run" / "last.pt"


def test_a_detector_finds_the_same_here(detector, tmp_path, monkeypatch):
    seen = []
    wrap(monkeypatch, visualize, "draw_objects", before=lambda *call: seen.append(call))
    picture = run(tmp_path / "a.png", checkpoint=detector, limit=5, score_threshold=0)
    args, checkpoint = detect.read_settings(["--eval", str(detector)])
    model = detect.load_detector(args, checkpoint).eval()
    assert len(seen) == 5
    for i, (image, found, names, threshold) in enumerate(seen):
        assert torch.equal(image, data.draw_scene("val", i, (32, 32))[0]) and threshold == 0
        assert names == [shape.__name__ for shape in data.SHAPES]
        with torch.no_grad():
            (expected,) = model([image / 255])
        assert len(found["boxes"]) and all(torch.equal(found[name], expected[name]) for name in expected)
    assert picture.shape == (3, 2 * (256 + 8) + 8, 4 * (256 + 8) + 8)  # 4 beside each other
    seen.clear()
    run(tmp_path / "a.png", checkpoint=detector, limit=1, drop_ratio=0.5, drop_blocks=[0], score_threshold=0)
    model.backbone.ptr = PTR((0,), 0.5)
    with torch.no_grad():
        (expected,) = model([seen[0][0] / 255])
    assert torch.equal(seen[0][1]["boxes"], expected["boxes"])
    checkpoint["config"] |= dict(drop_blocks=[1], drop_ratio=[0.5])
    other = save(tmp_path / "other.pt", checkpoint)
    run(tmp_path / "a.png", checkpoint=other, limit=1, drop_stages=1, score_threshold=0)  # after block 0, not block 1
    assert torch.equal(seen[1][1]["boxes"], expected["boxes"])
    run(tmp_path / "a.png", checkpoint=other, limit=1, score_threshold=0)
    assert not torch.equal(seen[2][1]["boxes"], expected["boxes"])


def test_detections_in_files_of_all_sizes(detector, tmp_path, capsys):
    Image.new("L", (30, 50), 90).save(tmp_path / "grey.png")
    Image.new("RGB", (700, 500), "red").save(tmp_path / "large.jpg")
    Image.new("RGB", (400, 4)).save(tmp_path / "thin.png")
    files = [tmp_path / name for name in ("grey.png", "thin.png", "large.jpg")]
    picture = run(tmp_path / "a.png", *files, checkpoint=detector, score_threshold=1)
    out = capsys.readouterr().out
    assert out.count("skipped an unreadable image") == 1 and "thin.png" in out
    assert picture.shape == (3, 480 + 16, 2 * (672 + 8) + 8)
    assert (picture[:, 8 : 8 + 450, 8 : 8 + 270] == 90).all() and (picture[:, 8 : 8 + 450, 278 : 8 + 672] == 255).all()


# --- curves -----------------------------------------------------------------------------------------------------------


def write_log(folder, rows, end="\n"):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + end)
    return folder


ROWS = [
    dict(epoch=0, step=0, knn=0.25),
    dict(epoch=1, step=10, loss=2.0, lr=0.1, knn=0.5),
    dict(epoch=2, step=20, loss=None, lr=0.2),
    dict(epoch=3, step=30, lr=0.1, loss=math.nan),
    dict(epoch=4, step=40, loss=1.0, lr=0.0, knn=0.75, note="x", flag=[1]),
]


def test_curves_leave_out_what_is_no_number(tmp_path):
    curves = visualize.read_curves(visualize.read_log(str(write_log(tmp_path, ROWS))))
    assert curves == dict(
        loss=[(1, 2.0), (4, 1.0)], lr=[(1, 0.1), (2, 0.2), (3, 0.1), (4, 0.0)], knn=[(0, 0.25), (1, 0.5), (4, 0.75)],
    )  # fmt: skip
    assert list(curves) == ["loss", "lr", "knn"]  # in the order of a whole row, not of the first one


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_truncated_log(tmp_path, capsys, cut):
    folder = write_log(tmp_path / "run", ROWS)
    text = (folder / "metrics.jsonl").read_text().rstrip("\n")
    (folder / "metrics.jsonl").write_text(text[:-cut])
    assert len(visualize.read_log(str(folder))) == 4
    assert "is cut short" in capsys.readouterr().out
    assert run(tmp_path / "a.png", device=None, log=folder) is not None


def test_a_whole_log_needs_no_warning(tmp_path, capsys):
    for end in ("\n", ""):
        folder = write_log(tmp_path, ROWS, end)
        assert len(visualize.read_log(str(folder))) == len(visualize.read_log(str(folder / "metrics.jsonl"))) == 5
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["", "\n", "{", '{"loss": 1}', "[1]", '{"epoch": 1}\n{"ep\n{"epoch": 3}\n', "7\n8\n"])
def test_logs_that_cannot_be_drawn(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match="--log") as error:
        visualize.read_log(str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_a_log_that_is_not_there(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "binary"):
        with pytest.raises(UserError, match="cannot be read"):
            visualize.read_log(str(path))


def test_ticks_are_few_round_and_within():
    draw = torch.Generator().manual_seed(0)
    for _ in range(500):
        a, b = (torch.randn(2, generator=draw) * 10 ** (6 * torch.rand(1, generator=draw) - 4)).tolist()
        low, high = sorted((a, b))
        numbers = [x for x, _ in visualize.ticks(low, high, 5)]
        assert 1 <= len(numbers) <= 5 and low - 1e-6 * (high - low) <= numbers[0]
        assert numbers[-1] <= high + 1e-6 * (high - low)
        steps = {round(y - x, 10) for x, y in itertools.pairwise(numbers)}
        if len(numbers) > 1:
            step = numbers[1] - numbers[0]
            assert min(abs(step / 10 ** math.floor(math.log10(step) + 1e-6) - factor) for factor in (1, 2, 5)) < 1e-6
            assert len(steps) <= 2 and (len(numbers) > 2 or 2.5 * step > (high - low) / 5)
        for x, text in visualize.ticks(low, high, 5):
            assert float(text) == pytest.approx(x, abs=1e-3 * (high - low))


def test_ticks_as_one_would_write_them():
    assert [text for _, text in visualize.ticks(-0.04, 1.04)] == ["0.0", "0.5", "1.0"]
    assert [text for _, text in visualize.ticks(0.9, 20.8, 7)] == ["5", "10", "15", "20"]
    assert [text for _, text in visualize.ticks(0.99990, 1.00001)] == ["0.99990", "0.99995", "1.00000"]
    assert [text for _, text in visualize.ticks(0, 3e-8)] == ["0", "1e-08", "2e-08", "3e-08"]


BLUE, ORANGE, GRID = (0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0xE4, 0xE4, 0xE4)


def where(picture, colour):
    """Rows and columns of the pixels of a colour."""
    return (picture == torch.tensor(colour)[:, None, None]).all(dim=0).nonzero(as_tuple=True)


def test_a_curve_lies_at_its_values(tmp_path):
    """A straight line through (0, 0), (4, 1), (8, .5): measured by the ticks beside it, which say 0, .5 and 1."""
    folder = write_log(tmp_path, [dict(epoch=0, a=0.0), dict(epoch=4, a=1.0), dict(epoch=8, a=0.5)])
    picture = run(tmp_path / "a.png", device=None, log=folder)[:, 60:]  # without the legend
    rows, columns = where(picture, GRID)
    lines = sorted({row.item() for row in rows if (rows == row).sum() > 300})
    centres = [row for row in lines if row - 1 not in lines]
    assert len(centres) == 3  # at 1, .5 and 0
    blue_rows, blue_columns = where(picture, BLUE)
    radius = 5  # of a dot, in pixels
    assert blue_rows.min() == pytest.approx(centres[0] - radius, abs=2)
    assert blue_rows.max() == pytest.approx(centres[2] + radius, abs=2)
    at = {x: blue_rows[blue_columns == x] for x in blue_columns.unique().tolist()}
    left, right = blue_columns.min() + radius, blue_columns.max() - radius
    assert picture.shape[2] - 60 < right < picture.shape[2] - 40  # the whole width is used
    assert at[left.item()].float().mean() == pytest.approx(centres[2], abs=3)
    assert at[right.item()].float().mean() == pytest.approx(centres[1], abs=3)
    middle = blue_columns[blue_rows == blue_rows.min()].float().mean()
    assert middle == pytest.approx((left + right) / 2, abs=2)
    quarter = at[round((left.item() * 3 + right.item()) / 4)].float().mean()  # epoch 2, where the line is at .5
    assert quarter == pytest.approx(centres[1], abs=3)


def test_runs_lie_over_each_other(tmp_path, monkeypatch):
    panels, texts = [], []
    wrap(monkeypatch, visualize, "draw_panel", before=lambda paper, box, title, curves: panels.append((title, curves)))
    wrap(monkeypatch, visualize.Paper, "text", before=lambda paper, x, y, text, *_: texts.append(text))
    a = write_log(tmp_path / "a", [dict(epoch=e, x=1.0, y=2.0) for e in range(3)])
    b = write_log(tmp_path / "b", [dict(epoch=e, y=3.0, z=4.0) for e in range(2)])
    visualize.main(["--log", str(a), str(b), "--out", str(tmp_path / "a.png")])
    picture = tvf.pil_to_tensor(Image.open(tmp_path / "a.png"))
    assert texts[:2] == [str(a), str(b)]
    blue, orange = visualize.COLOURS[:2]
    flat = [[(0, v), (1, v), (2, v)] for v in (1.0, 2.0)]
    assert panels == [
        ("x", [(blue, flat[0])]), ("y", [(blue, flat[1]), (orange, flat_of(3.0))]), ("z", [(orange, flat_of(4.0))]),
    ]  # fmt: skip
    legend = picture[:, :100, :100]
    assert where(legend, BLUE)[0].max() < where(legend, ORANGE)[0].min()
    width = picture.shape[2] // 3
    for column, colours in enumerate(((BLUE,), (BLUE, ORANGE), (ORANGE,))):
        panel = picture[:, 110:, column * width : (column + 1) * width]
        assert [len(where(panel, colour)[0]) > 0 for colour in (BLUE, ORANGE)] == [c in colours for c in (BLUE, ORANGE)]
    middle = picture[:, 110:, width : 2 * width]
    assert where(middle, BLUE)[0].min() > where(middle, ORANGE)[0].max()  # 3 is above 2


def flat_of(value):
    return [(0, value), (1, value)]


def test_panels_are_those_asked_for(tmp_path, monkeypatch):
    boxes = {}
    wrap(monkeypatch, visualize, "draw_panel", before=lambda paper, box, title, curves: boxes.update({title: box}))
    folder = write_log(tmp_path, [dict(epoch=1) | {name: i for i, name in enumerate("abcde")}])
    for names, size in ((None, (828, 1740)), (["d"], (448, 580)), (["e", "b"], (448, 1160))):
        assert run(tmp_path / "a.png", device=None, log=folder, metrics=names).shape[1:] == size
    assert list(boxes) == list("abcde")
    visualize.draw_curves({"run": {name: [(1.0, 1.0)] for name in "abcde"}}, None)
    for (_, one), (_, other) in itertools.combinations(boxes.items(), 2):
        assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


# --- real runs --------------------------------------------------------------------------------------------------------


def test_what_the_scripts_write(tmp_path):
    """Pre-train and fine-tune as a user does, and look at both."""
    tiny = dict(
        limit=32, batch_size=16, epochs=1, warmup_epochs=0, lr=1e-3, image_size=16, patch_size=4, dim=16, depth=2,
        heads=2, device="cpu", drop_stages=1,
    )  # fmt: skip
    pretrain.main(flags(tiny | dict(out=tmp_path / "a", knn_every=0, decoder_dim=16, decoder_depth=1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "validation_images", lambda *_: data.Shapes("val", 20, (16, 16)))
        sizes = dict(image_size=None, patch_size=None, dim=None, depth=None, heads=None, drop_ratio=0.2)
        finetune.main(flags(tiny | sizes | dict(out=tmp_path / "b", init=tmp_path / "a" / "last.pt")))
    teacher = load_encoder(engine.load_checkpoint(tmp_path / "a" / "last.pt"), weights="teacher")
    subject, _ = subject_of(tmp_path / "a" / "last.pt")
    assert torch.equal(subject.encoder.pos_embed, teacher.pos_embed) and subject.ptr == PTR((0,), 0.5)
    assert run(tmp_path / "1.png", checkpoint=tmp_path / "a" / "last.pt").shape[2] == 2 * 136 + 8
    assert subject_of(tmp_path / "b" / "best.pt")[0].ptr == PTR((0,), 0.2)
    assert run(tmp_path / "2.png", checkpoint=tmp_path / "b" / "best.pt").shape[2] == 2 * 136 + 8
    assert run(tmp_path / "3.png", device=None, log=[tmp_path / "a", tmp_path / "b"]) is not None
    assert set(visualize.read_curves(log(tmp_path / "a"))) >= {"loss", "lr", "target_std", "prediction_std"}


# --- bad input --------------------------------------------------------------------------------------------------------


WRONG = {
    "two tasks": (["--log", "x", "--coverage"], "--coverage means nothing to --log"),
    "log and images": (["a.png", "--log", "x"], "IMAGES means nothing to --log"),
    "log and heat": (["--heatmap", "--log", "x"], "--heatmap means nothing to --log"),
    "coverage and images": (["a.png", "--coverage"], "IMAGES means nothing to --coverage"),
    "coverage and masked": (["--coverage", "--masked"], "--masked means nothing to --coverage"),
    "metrics": (["--metrics", "loss"], "--metrics goes with --log"),
    "out": (["--out", "a.jpg"], "--out must end in .png"),
    "limit": (["--limit", "0"], "--limit must be 1 or more"),
    "one image": (["--coverage", "--limit", "1"], "--limit must be 2 or more"),
    "mask ratio": (["--mask-ratio", "1"], "--mask-ratio must be in"),
    "threshold": (["--score-threshold", "nan"], "--score-threshold must be in"),
    "seed": (["--seed", "-1"], "--seed must be in"),
    "image size": (["--image-size", "1", "2", "3"], "--image-size must be one number or two"),
    "no file": (["--checkpoint", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
    "device": (["--device", "toaster"], "--device toaster cannot be used"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_flags(name):
    words, message = WRONG[name]
    with pytest.raises(UserError, match=re.escape(message)):
        visualize.main(words)


def test_what_does_not_fit_the_file(tmp_path, monkeypatch, detector):
    monkeypatch.chdir(tmp_path)
    pcae, best = save_pcae(tmp_path / "last.pt"), tmp_path / "best.pt"
    save_classifier(best, make_vit())
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    decoder_only = save(tmp_path / "other.pt", dict(decoder={}))
    for words, message in (
        (["--checkpoint", best, "--masked"], "a classifier sees whole images"),
        (["--checkpoint", best, "--weights", "teacher"], "--checkpoint"),
        (["--checkpoint", decoder_only], "not a plain ViT"),
        (["--checkpoint", pcae, "--drop-ratio", "0"], "nothing would be dropped"),
        (["--checkpoint", pcae, "--drop-stages", "0"], "nothing would be dropped"),
        (["--checkpoint", pcae, "--drop-ratio", "1"], "--drop-ratio"),
        (["--checkpoint", pcae, "--drop-stages", "5"], "--drop-stages"),
        (["--checkpoint", pcae, "--drop-blocks", "4"], "--drop-blocks"),
        (["--checkpoint", pcae, "--masked", "--mask-ratio", ".2"], "leaves no token"),
        (["--checkpoint", pcae, "--masked", "--mask-ratio", ".99"], "visible"),
        (["--checkpoint", pcae, "--score-threshold", ".1"], "--score-threshold means nothing to the patches of PTR"),
        (["--checkpoint", pcae, tmp_path / "empty"], "empty holds no image files"),
        (["--checkpoint", pcae, tmp_path / "broken.png"], "not one image can be read"),
        (["--checkpoint", pcae, "--out", tmp_path / "none" / "a.png"], "cannot write"),
        (["--checkpoint", detector, "--heatmap"], "--heatmap means nothing to a detector"),
        (["--checkpoint", detector, "--coverage"], "--coverage means nothing to a detector"),
        (["--checkpoint", detector, "--drop-ratio", ".99", "--drop-stages", "1"], "leaves no token"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as error:
            visualize.main([*map(str, words), "--device", "cpu"])
        assert "\n" not in str(error.value)


def test_curves_that_cannot_be_drawn(tmp_path):
    with pytest.raises(UserError, match=r"no --metrics top1 in these logs, but loss, lr, knn"):
        visualize.draw_curves({"run": visualize.read_curves(ROWS)}, ["loss", "top1"])
    with pytest.raises(UserError, match="no column with numbers"):
        visualize.draw_curves({"run": {}}, None)
    with pytest.raises(UserError, match="at most 8 runs"):
        visualize.draw_curves({str(i): dict(a=[(1.0, 1.0)]) for i in range(9)}, None)


def test_errors_are_one_line_and_code_2(tmp_path):
    result = run_process([sys.executable, str(ROOT / "visualize.py"), "--device", "cpu"], cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(r"error: there is no checkpoint runs.pretrain.last\.pt\n", result.stderr)


def test_an_interrupted_picture_is_not_to_be_resumed(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        engine.launch(stop)
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"
