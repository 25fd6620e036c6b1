"""Detection: ViT pyramid with PTR, Mask R-CNN, and runs of the script, compared to the last bit."""

import argparse
import math

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.ops import roi_align

import detect
from coco import CocoDetection, find_annotations
from detect import LOSSES, Detector
from helpers import assert_same_run, flags, log, start, train, wait_for_rows
from model import ViT, sincos_position_embedding
from ptr import PTR, drop_tokens
from pyramid import STRIDES, PyramidRoIAlign, ViTPyramid, has_learned_positions
from util import runs
from util.training import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
# Four steps on images of 32 pixels, with everything random.
TINY = dict(
    init="none",
    limit=8,
    epochs=2,
    batch_size=4,
    short_side=32,
    drop_path=0.3,
    crop_ratio=0.5,
    drop_ratio=0.3,
    criterion="random",
    channels=16,
    rois=8,
    proposals=16,
    device="cpu",
)


def small_vit(grid=(4, 4), patch_size=8, **changes):
    torch.manual_seed(0)
    return ViT((grid[0] * patch_size, grid[1] * patch_size), patch_size, **dict(dim=16, depth=6, heads=2) | changes)


def run(folder, name, **changes):
    return train("detect", folder / name, data_root=folder / "data", **TINY | changes)


def bare(pyramid):
    """Reduce a pyramid to maps of the tapped blocks' tokens."""
    pyramid.resample, pyramid.fpn = nn.ModuleList(nn.Identity() for _ in STRIDES), nn.Identity()
    return pyramid


def small_detector(short_side=(32,), num_classes=3, **changes):
    sizes = dict(short_side=list(short_side), long_side=64, anchor=8, rois=8, proposals=16)
    return Detector(ViTPyramid(small_vit(**changes), 8), num_classes, **sizes)


def objects(size, *boxes):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return dict(boxes=boxes, labels=torch.arange(1, 1 + len(boxes)), masks=torch.ones(len(boxes), *size).byte())


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_maps_have_the_strides_of_the_pyramid_for_all_patch_sizes(patch_size):
    maps = ViTPyramid(small_vit(patch_size=patch_size), 8)(torch.randn(2, 3, 96, 160), [(96, 160), (65, 70)])
    expected = [(2, 8, 96 // stride, 160 // stride) for stride in STRIDES]
    assert [tuple(x.shape) for x in maps.values()] == [*expected, (2, 8, 2, 3)]
    with pytest.raises(ValueError):
        ViTPyramid(small_vit(patch_size=12), 8)


@pytest.mark.parametrize("depth, taps", [(12, [3, 5, 7, 11]), (4, [0, 1, 2, 3]), (2, [0, 0, 0, 1])])
def test_maps_are_the_patch_tokens_of_four_blocks(depth, taps):
    vit, images = small_vit((3, 5), depth=depth), torch.randn(2, 3, 24, 40)
    nn.init.normal_(vit.pos_embed)
    tapped = vit(images, taps=taps).tapped
    maps = bare(ViTPyramid(vit, 8, learned_positions=True))(images)
    for x, tap in zip(maps.values(), taps, strict=True):
        torch.testing.assert_close(x, tapped[tap][0][:, 1:].transpose(1, 2).unflatten(2, (3, 5)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("ptr", [PTR(), PTR((0, 3), 0.4)], ids=["all", "ptr"])
def test_maps_do_not_depend_on_padding_or_other_images_in_the_batch(ptr):
    model, images = bare(ViTPyramid(small_vit(), 8)), torch.randn(4, 3, 64, 64)
    sizes = [(40, 60), (64, 30), (33, 57), (17, 9)]
    together = model(images, sizes, ptr)
    for i, (height, width) in enumerate(sizes):
        rows, columns = math.ceil(height / 8), math.ceil(width / 8)
        alone = model(images[i : i + 1, :, : 8 * rows, : 8 * columns], [(height, width)], ptr)
        for name, x in together.items():
            torch.testing.assert_close(x[i, :, :rows, :columns], alone[name][0], atol=1e-5, rtol=0)
            inside = (torch.arange(8)[:, None] < rows) & (torch.arange(8) < columns)
            assert torch.equal(x[i].abs().sum(0) > 0, inside), "zero exactly in the padding"


def test_positions_fit_any_grid_and_learned_positions_are_resized():
    vit = small_vit((4, 6))
    for grid in ((4, 6), (1, 1), (9, 3), (40, 7)):
        assert torch.equal(ViTPyramid(vit, 8).positions(grid), sincos_position_embedding(16, grid)[0])
    vit.pos_embed.data.copy_(vit.pos_embed.half())
    assert not has_learned_positions(vit), "rounded to half precision, as in some files"
    vit.pos_embed.data[0, 5, 3] += 0.1
    assert has_learned_positions(vit)
    model = ViTPyramid(vit, 8, learned_positions=True)
    torch.testing.assert_close(model.positions((4, 6)), vit.pos_embed[0])
    model.positions((5, 9))[45].sum().backward()
    assert vit.pos_embed.grad.abs().sum() > 0


def test_dropped_tokens_keep_their_last_value():
    vit, images, ptr = small_vit((4, 6)), torch.randn(3, 3, 32, 48), PTR((0, 3), 0.5)
    maps = bare(ViTPyramid(vit, 8))(images, ptr=ptr)
    place = torch.arange(24).expand(3, -1)
    x, whole, expected = vit.embed(images, place, class_token=True), torch.zeros(3, 24, 16), {}
    for i, block in enumerate(vit.blocks):
        x = block(x)
        whole = whole.scatter(1, place[:, :, None].expand(-1, -1, 16), x[:, 1:])
        expected[i] = whole.transpose(1, 2).unflatten(2, (4, 6))
        if i in ptr.blocks:
            x, kept = drop_tokens(x, ptr.drop_ratio, num_prefix=1)
            place = place.gather(1, kept)
    for x, tap in zip(maps.values(), (1, 2, 3, 5), strict=True):
        torch.testing.assert_close(x, expected[tap])


def test_rois_are_pooled_from_the_map_of_their_size():
    """torchvision would infer wrong strides from a small image in a large batch."""
    maps = {str(i): torch.randn(1, 4, 256 // stride, 256 // stride) for i, stride in enumerate(STRIDES)}
    for side, level in ((20, 0), (50, 0), (60, 1), (110, 1), (115, 2), (220, 2), (250, 3), (700, 3)):
        box = torch.tensor([[8.0, 12.0, 8 + side, 12 + side]])
        expected = roi_align(maps[str(level)], [box], 7, spatial_scale=1 / STRIDES[level], sampling_ratio=2)
        assert torch.equal(PyramidRoIAlign(7, anchor=16)(maps, [box], [(33, 33)]), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_parameters_get_gradients_from_five_finite_losses_even_without_objects(channels):
    model = small_detector(channels=channels)
    for target in (objects((32, 48)), objects((32, 48), (2, 2, 20, 20), (8, 10, 30, 30))):
        model.zero_grad()
        losses = model([torch.rand(channels, 32, 48)], [target], PTR((0, 3), 0.3))
        assert losses.keys() == set(LOSSES) and all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "else DDP would wait"
    assert model.backbone.encoder.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_without_padding_the_detector_is_torchvisions():
    model = small_detector()
    images = [torch.rand(3, 32, 64), torch.rand(3, 32, 64)]
    targets = [objects((32, 64), (4, 4, 20, 20), (30, 8, 60, 30)), objects((32, 64))]
    results = []
    for forward in (model.forward, lambda *inputs: MaskRCNN.forward(model, *inputs)):
        torch.manual_seed(0)
        results.append(model.train() and forward(images, targets))
        model.eval().roi_heads.score_thresh = 0.0
        results[-1]["found"] = forward(images)
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert len(results[0]["found"][0]["labels"]) > 3


def test_objects_are_found_in_the_pixels_of_each_image():
    model, seen = small_detector(short_side=(24, 40)).eval(), []
    model.roi_heads.score_thresh = 0.0
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0].shape[2:], inputs[1])))
    images = detect.to_inputs([torch.randint(256, (3, *size)).byte() for size in ((20, 30), (45, 90))], ALONE.device)
    assert 0.99 < images[0].max() <= 1
    for found, (_, height, width) in zip(model(images), (image.shape for image in images), strict=True):
        assert found["masks"].shape[1:] == (1, height, width) and found["labels"].min() >= 1
        assert (found["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all() and found["boxes"].min() >= 0
        assert found["boxes"][:, 2].max() > width / 2
    assert seen == [((64, 64), [(40, 60), (32, 64)])], "the last short side, unless the long side limits the size"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the scenes and, in `whole`, an uninterrupted run."""
    folder = tmp_path_factory.mktemp("detect")
    run(folder, "whole")
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")  # names the missing image
def test_evaluation_uses_each_readable_image_once_and_ptr(folder):
    images = CocoDetection(*find_annotations(next((folder / "data").iterdir()), "val"), limit=3)
    images.coco.imgs[images.ids[0]]["file_name"] = "nowhere.png"
    model, precision = small_detector(num_classes=10), argparse.Namespace(precision="fp32")
    model.roi_heads.score_thresh = 0.0
    loader = detect.scoring_loader(images, 3, 0, ALONE)
    reductions = PTR(), PTR((0, 3), 0.0), PTR((0, 3), 0.5)
    found = [detect.find_objects(model, loader, ptr, precision, ALONE) for ptr in reductions]
    assert [seen for _, seen in found] == 3 * [images.ids[1:]]
    assert found[0][0] == found[1][0] != found[2][0], "a ratio of 0 drops nothing"


def test_run_folder(folder):
    out = folder / "whole"
    assert {path.name for path in out.iterdir()} == {".lock", "args.json", "metrics.jsonl", "last.pt", "best.pt"}
    last, best, rows = runs.load(out / "last.pt"), runs.load(out / "best.pt"), log(out)
    assert last["history"] == rows and [(row["epoch"], row["step"]) for row in rows] == [(1, 2), (2, 4)]
    assert all(g["lr"] == pytest.approx(g["lr_scale"] * rows[-1]["lr"]) for g in last["optimizer"]["param_groups"])
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row[name] for name in LOSSES))
        assert all(0 <= row[f"{kind}_ap"] <= 1 for kind in ("box", "mask"))
    assert best["history"][-1]["box_ap"] == max(row["box_ap"] for row in rows) and "optimizer" not in best


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(folder):
    process = start("detect", folder / "killed", data_root=folder / "data", **TINY)
    wait_for_rows(process, folder / "killed", 1)
    process.kill()
    assert process.wait() != 0 and len(log(folder / "killed")) == 1
    resumed = train("detect", folder / "killed", resume=True, workers=1)
    assert_same_run(resumed, runs.load(folder / "whole" / "last.pt"))


def test_training_changes_all_weights_and_uses_crops_drops_and_new_views(folder):
    still = dict(blr=0.0, drop_path=0.0, drop_ratio=0.0, crop_ratio=0.0, rois=512, limit=4)
    initial = run(folder, "still", **still)
    trained = runs.load(folder / "whole" / "last.pt")["model"]
    same = [name for name, weight in initial["model"].items() if torch.equal(weight, trained[name])]
    assert same == ["backbone.encoder.pos_embed"]
    first, second = (row["loss_mask"] for row in initial["history"])  # independent of the sampled RoIs
    assert first != pytest.approx(second, rel=1e-5), "flips differ between epochs"
    for change in (dict(drop_ratio=0.5), dict(crop_ratio=1.0), dict(drop_path=0.5)):
        row = run(folder, "changed", **still | dict(epochs=1) | change)["history"][0]
        assert row["loss_mask"] != pytest.approx(first, rel=1e-5)


def test_a_public_grey_encoder_with_learned_positions_is_trained_and_evaluated_at_two_ratios(folder, capsys):
    vit = small_vit(dim=64, depth=3, heads=4, channels=1)
    nn.init.normal_(vit.pos_embed, std=0.02)
    torch.save(dict(model=vit.state_dict()), folder / "public.pt")
    checkpoint = run(folder, "grey", init=folder / "public.pt", epochs=1)
    assert not torch.equal(checkpoint["model"]["backbone.encoder.pos_embed"], vit.pos_embed), "positions are trained"
    detect.main(flags(eval=folder / "grey" / "last.pt", drop_ratio=[0, 0.5], drop_blocks=0, limit=2, device="cpu"))
    tables = capsys.readouterr().out.split("drop ratio ")[1:]
    assert [table.split()[0] for table in tables] == ["0", "0.5"]
    assert all(table.count("Average Precision") == 2 * 6 for table in tables)
    with pytest.raises(SystemExit, match="--criterion"):  # nothing is dropped
        run(folder, "unused", drop_ratio=None)
    with pytest.raises(SystemExit, match="--channels"):  # settings of the trained model
        detect.main(flags(eval=folder / "grey" / "last.pt", channels=8, device="cpu"))
