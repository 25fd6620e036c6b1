"""Weights from files and to files: each public format, ours, other image sizes, what is refused, and export to timm.

Files are written here from the key names that each project uses; what they mean is in `reference`, which computes a
plain ViT from its named weights and nothing of ours.
"""

import argparse
import ast
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import finetune
import pretrain
from engine import UserError, load_checkpoint, save_checkpoint
from finetune import timm_call, timm_weights
from model import (
    MODELS,
    Classifier,
    ViT,
    find_weights,
    infer_arguments,
    load_classifier,
    load_encoder,
    resize_positions,
)

PATCH, SIZE, GRID = 8, (32, 32), (4, 4)


def random_tensors(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def layer(name, outputs, *inputs):
    return {f"{name}.weight": (outputs, *inputs), f"{name}.bias": (outputs,)}


def block(name, dim, hidden):
    return (
        layer(f"{name}.norm1", dim) | layer(f"{name}.attn.qkv", 3 * dim, dim) | layer(f"{name}.attn.proj", dim, dim)
        | layer(f"{name}.norm2", dim) | layer(f"{name}.mlp.fc1", hidden, dim) | layer(f"{name}.mlp.fc2", dim, hidden)
    )  # fmt: skip


def vit_weights(dim=192, depth=2, patch=PATCH, grid=GRID, channels=3, hidden=None, seed=0):
    """Random weights of a plain ViT by the names that timm, MAE, DINO and DeiT give them: 6 + 12 * depth tensors."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + math.prod(grid), dim)}
    shapes |= layer("patch_embed.proj", dim, channels, patch, patch)
    for i in range(depth):
        shapes |= block(f"blocks.{i}", dim, hidden or 4 * dim)
    return random_tensors(shapes | layer("norm", dim), seed)


def head_weights(dim, classes=7, seed=5):
    return random_tensors(layer("head", classes, dim), seed)


def fc_norm_weights(dim, seed=6):
    return random_tensors(layer("fc_norm", dim), seed)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(names)}


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def images_of(size=SIZE, channels=3):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(3))


def reference(tensors, images, heads):
    """Tokens (B, 1 + N, D) that a plain ViT with these weights makes, normalised if it has a last norm."""

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    x = F.conv2d(images, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], dim=1) + tensors["pos_embed"]
    i = 0
    while f"blocks.{i}.norm1.weight" in tensors:
        name = f"blocks.{i}."
        qkv = linear(norm(x, tensors, name + "norm1"), name + "attn.qkv")
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), name + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, tensors, name + "norm2"), name + "mlp.fc1")), name + "mlp.fc2")
        i += 1
    return norm(x, tensors, "norm") if "norm.weight" in tensors else x


def norm(x, tensors, name):
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)


def reference_logits(tensors, images, heads, global_pool):
    x = reference(tensors, images, heads)
    x = x[:, 1:].mean(dim=1) if global_pool == "avg" else x[:, 0]
    x = norm(x, tensors, "fc_norm") if "fc_norm.weight" in tensors else x
    return x @ tensors["head.weight"].T + tensors["head.bias"]


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def quiet(_):
    pass


# --- files as they are published --------------------------------------------------------------------------------------

SETTINGS = argparse.Namespace(model="vit", lr=1e-3, blr=None, resume="", dist_on_itp=False, opt_betas=[0.9, 0.95])
OPTIMIZER = {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}


def mae_pretrained(student, teacher):
    decoder = {"mask_token": (1, 1, 64), "decoder_pos_embed": (1, 17, 64)}
    decoder |= layer("decoder_embed", 64, 192) | block("decoder_blocks.0", 64, 256)
    decoder |= layer("decoder_norm", 64) | layer("decoder_pred", 3 * PATCH**2, 64)
    return dict(
        model=student | random_tensors(decoder, 7), optimizer=OPTIMIZER, epoch=799, scaler={"scale": 65536.0},
        args=SETTINGS,
    )  # fmt: skip


def mae_finetuned(student, teacher):
    model = without(student, "norm.") | head_weights(192) | fc_norm_weights(192)
    return dict(model=model, optimizer=OPTIMIZER, epoch=99, scaler={"scale": 65536.0}, args=SETTINGS)


def dino_full(student, teacher):
    head = layer("head.mlp.0", 64, 192) | layer("head.mlp.2", 64, 64) | layer("head.mlp.4", 32, 64)
    head = random_tensors(head | {"head.last_layer.weight_g": (99, 1), "head.last_layer.weight_v": (99, 32)}, 7)
    return dict(
        student=prefixed("module.backbone.", student) | prefixed("module.", head),
        teacher=prefixed("backbone.", teacher) | head,
        optimizer=OPTIMIZER, epoch=100, args=SETTINGS, dino_loss={"center": torch.zeros(1, 99)},
        fp16_scaler={"scale": 65536.0},
    )  # fmt: skip


def bare(student, teacher):
    return student


def deit(student, teacher):
    return dict(model=student | head_weights(192))


def moco(student, teacher):
    def projector(name, widths):
        tensors = {}
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
            tensors |= random_tensors({f"{name}.{3 * i}.weight": (outputs, inputs)}, i)
            norm = f"{name}.{3 * i + 1}."
            tensors |= random_tensors({norm + "running_mean": (outputs,), norm + "running_var": (outputs,)}, i)
            tensors[norm + "num_batches_tracked"] = torch.tensor(5)
        return tensors

    head = projector("head", [len(student["norm.bias"]), 48, 48, 16])
    tensors = prefixed("module.base_encoder.", student | head) | prefixed("module.momentum_encoder.", teacher | head)
    tensors |= projector("module.predictor", [16, 48, 16])
    return dict(epoch=300, arch="vit_small", state_dict=tensors, optimizer=OPTIMIZER, scaler={"scale": 65536.0})


def timm_bare(student, teacher):
    return student | head_weights(192)


def timm_mean(student, teacher):
    return without(student, "norm.") | fc_norm_weights(192) | head_weights(192)


def timm_training(student, teacher):
    return dict(
        epoch=17, arch="vit_tiny_patch16_224", state_dict=student | head_weights(len(student["norm.bias"])),
        optimizer=OPTIMIZER, version=2, args=SETTINGS, amp_scaler={"scale": 65536.0}, metric=71.5,
    )  # fmt: skip


def compiled(student, teacher):
    return dict(model=prefixed("_orig_mod.", student))


def compiled_and_distributed(student, teacher):
    return dict(state_dict=prefixed("module._orig_mod.", student))


def distributed_and_compiled(student, teacher):
    return prefixed("_orig_mod.module.", student)


def our_pretrained(student, teacher):
    words = "--image-size 32 --patch-size 8 --dim 192 --depth 2 --heads 3 --drop-stages 2"
    model, encoder = pretrain.build_model(pretrain.read_settings(words.split())[0])
    return dict(
        method="pcae", config=dict(lr=None), encoder=encoder, num_images=8, epoch=1, history=[], student=student,
        teacher=teacher, decoder=model.decoder.state_dict(), optimizer=OPTIMIZER, step=4,
    )  # fmt: skip


def our_classifier(pool="mean", frozen=False):
    def checkpoint(student, teacher):
        tensors = student
        if frozen:
            statistics = {"fc_norm.running_mean": student["norm.bias"], "fc_norm.running_var": torch.full([192], 0.5)}
            tensors = tensors | statistics | {"fc_norm.num_batches_tracked": torch.tensor(4)}
        elif pool == "mean":
            tensors = without(student, "norm.") | fc_norm_weights(192)
        names = [f"encoder.{name}" if name in student else name for name in tensors]
        model = dict(zip(names, tensors.values(), strict=True)) | head_weights(192)
        encoder = ViT(SIZE, PATCH, dim=192, depth=2, heads=3).arguments
        return dict(method="finetune", encoder=encoder, pool=pool, classes=list("abcdefg"), model=model, step=4)

    return checkpoint


class Format(NamedTuple):
    make: Callable[[dict, dict], dict[str, Any]]
    has_teacher: bool = False
    left_over: str = "0 left over"
    has_norm: bool = True
    dim: int = 192
    heads: int = 3


HEAD_NAMES = "2 left over (head.weight, head.bias)"
NORM_AND_HEAD = "4 left over (fc_norm.weight, fc_norm.bias, head.weight, head.bias)"
HEAD_AND_NORM = "4 left over (head.weight, head.bias, fc_norm.weight, fc_norm.bias)"
MOCO_HEAD = "12 left over (head.0.weight, head.1.running_mean, head.1.running_var, head.1.num_batches_tracked, ...)"
DINO_HEAD = "8 left over (head.mlp.0.weight, head.mlp.0.bias, head.mlp.2.weight, head.mlp.2.bias, ...)"
PROBE_HEAD = "5 left over (fc_norm.running_mean, fc_norm.running_var, fc_norm.num_batches_tracked, head.weight, ...)"
MAE_DECODER = "20 left over (mask_token, decoder_pos_embed, decoder_embed.weight, decoder_embed.bias, ...)"
FORMATS = {
    "MAE pre-trained": Format(mae_pretrained, left_over=MAE_DECODER),
    "MAE fine-tuned": Format(mae_finetuned, has_norm=False, left_over=HEAD_AND_NORM),
    "DINO, all": Format(dino_full, has_teacher=True, left_over=DINO_HEAD),
    "DINO, backbone": Format(bare),
    "DINO, ViT-S": Format(bare, dim=384, heads=6),
    "DeiT": Format(deit, left_over=HEAD_NAMES),
    "MoCo v3 ViT-S": Format(moco, has_teacher=True, dim=384, heads=12, left_over=MOCO_HEAD),
    "MoCo v3, other width": Format(moco, has_teacher=True, left_over=MOCO_HEAD),
    "timm": Format(timm_bare, left_over=HEAD_NAMES),
    "timm, mean pooling": Format(timm_mean, has_norm=False, left_over=NORM_AND_HEAD),
    "timm, training": Format(timm_training, left_over=HEAD_NAMES),
    "timm, training ViT-S": Format(timm_training, dim=384, heads=6, left_over=HEAD_NAMES),
    "torch.compile": Format(compiled),
    "DDP of torch.compile": Format(compiled_and_distributed),
    "torch.compile of DDP": Format(distributed_and_compiled),
    "ours, pre-trained": Format(our_pretrained, has_teacher=True),
    "ours, fine-tuned": Format(our_classifier(), has_norm=False, left_over=NORM_AND_HEAD),
    "ours, class token": Format(our_classifier("class"), left_over=HEAD_NAMES),
    "ours, linear probe": Format(our_classifier(frozen=True), left_over=PROBE_HEAD),
}


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_files_load_as_they_are(tmp_path, name):
    kind, images, lines = FORMATS[name], images_of(), []
    student, teacher = (vit_weights(kind.dim, seed=seed) for seed in (0, 1))
    torch.save(kind.make(student, teacher), tmp_path / "file.pth")
    checkpoint = load_checkpoint(tmp_path / "file.pth")
    for weights, tensors in dict(student=student, teacher=teacher).items():
        if weights == "teacher" and not kind.has_teacher:
            with pytest.raises(ValueError, match="no teacher's: use --weights student"):
                load_encoder(checkpoint, weights="teacher", log=quiet)
            continue
        encoder = load_encoder(checkpoint, weights=weights, log=lines.append).eval()
        missing = "30 of 30 tensors matched; 0 missing"
        if not kind.has_norm:
            missing = "28 of 30 tensors matched; 2 missing (norm.weight, norm.bias)"
            tensors = tensors | {"norm.weight": torch.ones(kind.dim), "norm.bias": torch.zeros(kind.dim)}
        assert lines.pop() == f"weights {missing}; {kind.left_over}" and not lines
        assert encoder.state_dict().keys() == tensors.keys()
        assert all(torch.equal(value, tensors[name]) for name, value in encoder.state_dict().items())
        assert_close(encoder(images).tokens, reference(tensors, images, kind.heads))
        assert encoder.arguments == dict(
            image_size=SIZE, patch_size=8, channels=3, dim=kind.dim, depth=2, heads=kind.heads, mlp_ratio=4.0
        )


@pytest.mark.parametrize(
    "make, global_pool",
    [
        (mae_finetuned, "avg"),
        (deit, "token"),
        (timm_bare, "token"),
        (timm_mean, "avg"),
        (timm_training, "token"),
        (our_classifier(), "avg"),
        (our_classifier("class"), "token"),
        (our_classifier(frozen=True), "avg"),
        (our_classifier("class", frozen=True), "token"),
    ],
)
@torch.no_grad()
def test_classifiers_load_with_their_head(tmp_path, make, global_pool):
    student, images = vit_weights(), images_of()
    torch.save(make(student, None), tmp_path / "file.pth")
    model = load_classifier(load_checkpoint(tmp_path / "file.pth"), log=quiet).eval()
    tensors = find_weights(make(student, None)) | head_weights(192)
    frozen = "fc_norm.running_mean" in tensors
    assert model.frozen == frozen and model.pool == ("mean" if global_pool == "avg" else "class")
    assert model.ptr is None and all(p.requires_grad != frozen for p in model.encoder.parameters())
    if frozen:  # by hand: (x - mean) / std before the head
        std = (tensors["fc_norm.running_var"] + 1e-6).sqrt()
        tensors["head.weight"] = tensors["head.weight"] / std
        tensors["head.bias"] = tensors["head.bias"] - tensors["head.weight"] @ tensors["fc_norm.running_mean"]
    assert_close(model(images), reference_logits(tensors, images, 3, global_pool))


def test_distilled_deit_is_refused():
    model = vit_weights() | head_weights(192) | {"dist_token": torch.zeros(1, 1, 192), "head_dist.bias": torch.zeros(7)}
    model["pos_embed"] = torch.zeros(1, 2 + 196, 192)
    with pytest.raises(ValueError, match="its 198 positions are not a class token and a square of patches"):
        load_encoder(dict(model=model))


# --- finding and understanding weights --------------------------------------------------------------------------------


def test_where_weights_are_looked_for():
    tensors = {name: {"x": torch.full((1,), i)} for i, name in enumerate(("student", "model", "state_dict", "teacher"))}
    assert find_weights(tensors)["x"] == 0 and find_weights(tensors, "teacher")["x"] == 3
    assert find_weights(without(tensors, "student"))["x"] == 1
    assert find_weights(without(tensors, "student", "model"))["x"] == 2
    assert find_weights({"x": torch.ones(1), "epoch": 3, "version": "2"}).keys() == {"x"}, "tensors only"


def test_a_public_file_may_name_its_method():
    assert load_encoder(dict(method="mae", model=vit_weights()), log=quiet).image_size == SIZE


def test_wrappers_are_taken_off_in_any_order():
    names = ["module.backbone.a", "_orig_mod.module.encoder.b", "encoder.backbone._orig_mod.module.c", "d.module.e"]
    assert list(find_weights(dict.fromkeys(names, torch.ones(1)))) == ["a", "b", "c", "d.module.e"]


@pytest.mark.parametrize("size", [name for name in MODELS if name != "vit_mini"])
def test_the_usual_sizes_are_known(size):
    dim, depth, heads = (MODELS[size][name] for name in ("dim", "depth", "heads"))
    patch = 14 if size == "vit_huge" else 16
    with torch.device("meta"):
        tensors = ViT(patch_size=patch, **MODELS[size]).state_dict()
    assert infer_arguments(tensors) == dict(
        image_size=(224, 224), patch_size=patch, channels=3, dim=dim, depth=depth, heads=heads, mlp_ratio=4.0
    )


@torch.no_grad()
def test_an_unusual_vit():
    """Another width, MLP, patch and grid; one channel; more than ten blocks; heads as told."""
    tensors, images = vit_weights(40, 11, grid=(3, 3), channels=1, hidden=100), images_of((24, 24), 1)
    encoder = load_encoder(tensors, heads=5, drop_path=0.2, log=quiet)
    assert encoder.arguments == dict(
        image_size=(24, 24), patch_size=8, channels=1, dim=40, depth=11, heads=5, mlp_ratio=2.5
    )
    assert encoder.blocks[-1].drop_path.p == 0.2 and encoder.blocks[0].drop_path.p == 0
    assert_close(encoder.eval()(images).tokens, reference(tensors, images, 5))
    model = load_classifier(tensors | head_weights(40), heads=5, log=quiet).eval()
    assert_close(model(images), reference_logits(tensors | head_weights(40), images, 5, "token"))


@torch.no_grad()
def test_heads_that_are_told_win():
    tensors, images = vit_weights(384), images_of()
    for checkpoint in (tensors, moco(tensors, tensors)):
        encoder = load_encoder(checkpoint, heads=4, log=quiet).eval()
        assert_close(encoder(images).tokens, reference(tensors, images, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [SIZE, (40, 24)])
def test_other_precisions_become_float32(dtype, size):
    tensors = {name: tensor.to(dtype) for name, tensor in vit_weights().items()}
    encoder = load_encoder(tensors, image_size=size, log=quiet)
    exact = load_encoder({name: tensor.float() for name, tensor in tensors.items()}, image_size=size, log=quiet)
    for name, tensor in encoder.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, exact.state_dict()[name])


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_encoder, load_classifier])
def test_report_is_printed_or_goes_where_it_is_told(capsys, load):
    head = "0 left over" if load is load_classifier else HEAD_NAMES
    report, lines = f"weights 30 of 30 tensors matched; 0 missing; {head}", []
    load(deit(vit_weights(), None))
    assert capsys.readouterr().out == report + "\n"
    load(deit(vit_weights(), None), log=lines.append)
    assert lines == [report] and not capsys.readouterr().out


@pytest.mark.parametrize(
    "absent, missing",
    [
        (["norm.bias"], "1 missing (norm.bias)"),
        (
            ["norm.", "blocks.0.norm1."],
            "4 missing (blocks.0.norm1.weight, blocks.0.norm1.bias, norm.weight, norm.bias)",
        ),
        (["blocks.1.attn.proj.bias"], "1 missing (blocks.1.attn.proj.bias)"),
    ],
)
def test_report_counts_and_names(absent, missing):
    tensors = without(vit_weights(), *absent)
    for count, names in ((1, "a1"), (4, "a1, a2, a3, a4"), (5, "a1, a2, a3, a4, ...")):
        extra = {f"a{i + 1}": torch.zeros(1) for i in range(count)}
        lines = []
        load_encoder(tensors | extra, log=lines.append)
        assert lines == [f"weights {len(tensors)} of 30 tensors matched; {missing}; {count} left over ({names})"]


def test_what_is_missing_keeps_its_initial_value():
    encoder = load_encoder(without(vit_weights(), "norm.", "blocks.0.attn.proj.bias"), log=quiet)
    assert torch.equal(encoder.norm.weight, torch.ones(192)) and not encoder.norm.bias.any()
    assert not encoder.blocks[0].attn.proj.bias.any()


# --- other image sizes ------------------------------------------------------------------------------------------------


def resized(pos_embed, old, new):
    """By torch's own interpolation, and by nothing else of ours."""
    table = pos_embed[0, 1:].reshape(*old, -1).permute(2, 0, 1)
    table = F.interpolate(table[None], size=new, mode="bicubic", align_corners=False)[0]
    return torch.cat([pos_embed[0, :1], table.permute(1, 2, 0).reshape(new[0] * new[1], -1)])[None]


@pytest.mark.parametrize("old", [(4, 4), (3, 7)])
@pytest.mark.parametrize("new", [(8, 8), (2, 2), (3, 5), (9, 2), (4, 4), (3, 7)])
def test_resized_positions(old, new):
    pos_embed = torch.randn(1, 1 + math.prod(old), 12)
    positions = resize_positions(pos_embed, old, new)
    assert positions.shape == (1, 1 + math.prod(new), 12)
    assert torch.equal(positions[:, 0], pos_embed[:, 0]), "the class token's"
    torch.testing.assert_close(positions, resized(pos_embed, old, new))
    if old == new:
        torch.testing.assert_close(positions, pos_embed)


def test_rows_stay_rows():
    """A table whose first channel is the row and whose second is the column."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    table = torch.stack([rows, columns], dim=-1).reshape(1, 24, 2)
    new = resize_positions(F.pad(table, (0, 0, 1, 0)), (4, 6), (8, 12))[0, 1:].reshape(8, 12, 2)
    assert torch.allclose(new[:, :1, 0], new[..., 0]) and torch.allclose(new[:1, :, 1], new[..., 1])
    assert (new[1:, :, 0] > new[:-1, :, 0]).all() and (new[:, 1:, 1] > new[:, :-1, 1]).all()


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (24, 40), (40, 24), (8, 64)])
@torch.no_grad()
def test_public_weights_at_another_image_size(size):
    tensors, images = vit_weights(), images_of(size)
    expected = tensors | {"pos_embed": resized(tensors["pos_embed"], GRID, (size[0] // 8, size[1] // 8))}
    encoder = load_encoder(dict(model=tensors), image_size=size, log=quiet).eval()
    assert encoder.image_size == encoder.arguments["image_size"] == size
    assert_close(encoder(images).tokens, reference(expected, images, 3))
    model = load_classifier(deit(tensors, None), image_size=size, log=quiet).eval()
    assert_close(model(images), reference_logits(expected | head_weights(192), images, 3, "token"))


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (32, 32), (16, 80), (16, 60)])
@torch.no_grad()
def test_our_weights_at_another_image_size(size):
    """From 24 x 40 pixels: 16 x 60 has as many patches of 4 pixels, in another shape."""
    torch.manual_seed(0)
    source = ViT((24, 40), 4, dim=32, depth=2, heads=4)
    nn.init.normal_(source.pos_embed)
    checkpoint = dict(method="pcae", encoder=source.arguments, student=source.state_dict())
    encoder = load_encoder(checkpoint, image_size=size, log=quiet)
    if size == (24, 40):
        assert torch.equal(encoder.pos_embed, source.pos_embed)
    else:
        torch.testing.assert_close(encoder.pos_embed, resized(source.pos_embed, (6, 10), (size[0] // 4, size[1] // 4)))
    changed = {n for n, value in encoder.state_dict().items() if not torch.equal(value, source.state_dict()[n])}
    assert changed <= {"pos_embed"}
    assert encoder(images_of(size)).tokens.shape == (2, 1 + size[0] * size[1] // 16, 32)


@pytest.mark.parametrize("checkpoint", [mae_pretrained, our_pretrained])
def test_the_same_size_leaves_the_positions_alone(checkpoint):
    tensors = vit_weights()
    encoder = load_encoder(checkpoint(tensors, tensors), image_size=SIZE, log=quiet)
    assert torch.equal(encoder.pos_embed, tensors["pos_embed"])


def test_positions_are_read_only():
    tensors = vit_weights()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    load_encoder(tensors, image_size=(64, 64), log=quiet)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


# --- refusals ---------------------------------------------------------------------------------------------------------


def with_value(value):
    tensors = vit_weights()
    tensors["blocks.1.mlp.fc1.bias"][3] = value
    return tensors


def renamed(tensors, old, new):
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def on_meta(build, **arguments):
    with torch.device("meta"):
        return build(**arguments).state_dict()


ones = torch.ones
REFUSED = {
    "a ResNet": (lambda: on_meta(torchvision.models.resnet18), "not a plain ViT .*: cls_token, pos_embed,.* missing"),
    "torchvision's ViT": (
        lambda: on_meta(torchvision.models.vit_b_32),
        "not a plain ViT .*: cls_token, .*blocks.0.mlp.fc1.weight missing",
    ),
    "no class token": (lambda: without(vit_weights(), "cls_token"), "with a class token: cls_token missing"),
    "no positions": (lambda: without(vit_weights(), "pos_embed"), "with a class token: pos_embed missing"),
    "LayerScale": (
        lambda: vit_weights() | {"blocks.0.ls1.gamma": ones(192), "blocks.0.ls2.gamma": ones(192)},
        "not a plain ViT, but has blocks.0.ls1.gamma, blocks.0.ls2.gamma besides",
    ),
    "a norm before": (lambda: vit_weights() | {"norm_pre.weight": ones(192)}, "has norm_pre.weight besides"),
    "query norms": (lambda: vit_weights() | {"blocks.1.attn.q_norm.weight": ones(64)}, "has blocks.1.attn.q_norm"),
    "registers": (lambda: vit_weights() | {"reg_token": ones(1, 4, 192)}, "has reg_token besides"),
    "a distillation token": (lambda: vit_weights() | {"dist_token": ones(1, 1, 192)}, "has dist_token besides"),
    "relative positions": (lambda: vit_weights() | {"rel_pos_bias.table": ones(9, 3)}, "has rel_pos_bias.table beside"),
    "rotary positions": (lambda: vit_weights() | {"rope.periods": ones(16)}, "has rope.periods besides"),
    "a stem": (
        lambda: vit_weights() | {"patch_embed.backbone.stem.weight": ones(2)},
        "has patch_embed.backbone.stem.weight besides",
    ),
    "many besides": (
        lambda: vit_weights() | {f"blocks.0.extra{i}": ones(1) for i in range(5)},
        "has blocks.0.extra0, blocks.0.extra1, blocks.0.extra2 besides$",
    ),
    # 930,624 numbers in all, 192 * 576 of them in one qkv.weight: 28 of 30 tensors, but 76 % of the numbers
    "too little": (
        lambda: without(vit_weights(), "blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"),
        "only 76% of the encoder is there; missing: blocks.0.attn.qkv.weight, blocks.1.attn.qkv.weight, ...",
    ),
    "hardly too little": (
        lambda: without(vit_weights(), "blocks.0.attn.qkv.weight"),
        "only 88% of the encoder is there; missing: blocks.0.attn.qkv.weight",
    ),
    "a wrong shape": (
        lambda: vit_weights() | {"blocks.1.attn.qkv.weight": ones(576, 191)},
        r"blocks.1.attn.qkv.weight is \(576, 191\) there, \(576, 192\) here",
    ),
    "NaN": (lambda: with_value(math.nan), "blocks.1.mlp.fc1.bias holds NaN or infinity"),
    "infinity": (lambda: with_value(-math.inf), "blocks.1.mlp.fc1.bias holds NaN or infinity"),
    "a strip of patches": (lambda: vit_weights(grid=(3, 5)), "its 16 positions are not a class token and a square"),
    "an unknown width": (lambda: vit_weights(48), "width 48 is not a usual one: .*--heads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, text = REFUSED[name]
    for load, head in ((load_encoder, {}), (load_classifier, {"head.weight": ones(7, 192), "head.bias": ones(7)})):
        lines = []
        with pytest.raises(ValueError, match=text) as error:
            load(make() | head, log=lines.append)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200 and not lines


@pytest.mark.parametrize("checkpoint", [dict(model=3), dict(state_dict=[ones(1)]), dict(student=None)])
def test_files_without_weights(checkpoint):
    for load in (load_encoder, load_classifier):
        with pytest.raises(ValueError, match="holds no weights by name"):
            load(checkpoint)
    with pytest.raises(ValueError, match="not a plain ViT with a class token: cls_token, pos_embed, .*missing"):
        load_encoder({})


def test_nine_tenths_are_enough():
    tensors = without(vit_weights(), "blocks.0.attn.proj.weight", "blocks.1.attn.proj.weight")  # 92 % are left
    load_encoder(tensors, log=quiet)


@pytest.mark.parametrize("absent", [(".bias",), ("norm1", "norm2"), ("blocks.0.attn.", "blocks.0.mlp.fc1.bias")])
def test_many_small_tensors_are_not_nothing(absent):
    """Without its biases or norms an encoder has 99 % of its numbers and is none."""
    tensors = {name: t for name, t in vit_weights().items() if not any(part in name for part in absent)}
    with pytest.raises(ValueError, match="% of the encoder is there"):
        load_encoder(tensors, log=quiet)


def test_heads_other_than_our_file_says():
    checkpoint = our_pretrained(vit_weights(), vit_weights())
    load_encoder(checkpoint, heads=3, log=quiet)
    with pytest.raises(ValueError, match="says itself that it has 3 heads, not 6"):
        load_encoder(checkpoint, heads=6, log=quiet)


@pytest.mark.parametrize("heads", [5, 7])
def test_heads_that_do_not_divide(heads):
    with pytest.raises(ValueError, match=f"width 192.*heads {heads} .*--heads"):
        load_encoder(vit_weights(), heads=heads)


def test_image_size_that_patches_do_not_fill():
    with pytest.raises(ValueError, match="36 x 32.*--image-size"):
        load_encoder(vit_weights(), image_size=(36, 32))


@pytest.mark.parametrize("make", [bare, mae_pretrained, dino_full, moco, our_pretrained])
def test_an_encoder_alone_is_no_classifier(make):
    with pytest.raises(ValueError, match=r"without the head of a classifier \(head.weight\)"):
        load_classifier(make(vit_weights(), vit_weights()), log=quiet)


def test_head_that_does_not_fit():
    tensors = timm_bare(vit_weights(), None)
    for changes, text in (
        ({"head.weight": ones(7, 191)}, "head.weight"),
        ({"head.bias": ones(6)}, "head.bias"),
    ):
        with pytest.raises(ValueError, match=text) as error:
            load_classifier(tensors | changes, log=quiet)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="its head is not whole: head.bias missing"):
        load_classifier(without(tensors, "head.bias"), log=quiet)
    with pytest.raises(ValueError, match="its head is not whole: fc_norm.bias missing"):
        load_classifier(without(mae_finetuned(vit_weights(), None)["model"], "fc_norm.bias"), log=quiet)


def test_a_public_file_of_another_grid_than_a_square():
    """Weights of 2 x 8 patches look like 4 x 4: --image-size tells."""
    source = ViT((16, 64), 8, dim=192, depth=2, heads=3)
    tensors = source.state_dict()
    encoder = load_encoder(tensors, image_size=(16, 64), log=quiet)
    assert encoder.grid == (2, 8) and torch.equal(encoder.pos_embed, source.pos_embed)
    tensors["pos_embed"] = ones(1, 1 + 12, 192)
    with pytest.raises(ValueError, match="13 positions are not a class token and a square"):
        load_encoder(tensors, log=quiet)
    assert load_encoder(tensors, image_size=(24, 32), log=quiet).grid == (3, 4)


@pytest.mark.parametrize("name", ["head.weight", "head.bias", "fc_norm.weight"])
def test_a_head_of_nan_is_refused(name):
    tensors = mae_finetuned(vit_weights(), None)["model"]
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
        load_classifier(tensors | {name: tensors[name] * math.nan}, log=quiet)


def test_frozen_encoder_is_in_evaluation_mode_from_the_start():
    model = Classifier(ViT(SIZE, 8, dim=64, depth=2, heads=4, drop_path=0.5), 7, frozen=True)
    assert model.training and not any(module.training for module in model.encoder.modules())


@pytest.mark.parametrize(
    "changes, size",
    [
        ({"pos_embed": ones(17)}, None),
        ({"pos_embed": ones(2, 17, 192)}, (64, 64)),
        ({"pos_embed": ones(1, 17, 1, 192)}, (64, 64)),
        ({"pos_embed": ones(1, 0, 192)}, None),
        ({"patch_embed.proj.weight": ones(192, 192)}, None),
        ({"patch_embed.proj.weight": ones(192, 3, 2, 8, 8)}, None),
        ({"blocks.norm.weight": ones(192)}, None),
    ],
)
def test_strange_shapes_get_a_sentence(changes, size):
    with pytest.raises(ValueError, match="patch_embed.proj.weight|pos_embed|positions|blocks.norm.weight"):
        load_encoder(vit_weights() | changes, image_size=size, log=quiet)


def test_positions_of_ours_that_do_not_fit_its_size():
    arguments = ViT((64, 64), 8, dim=192, depth=2, heads=3).arguments
    with pytest.raises(ValueError, match="pos_embed"):
        load_encoder(dict(method="pcae", encoder=arguments, student=vit_weights()), image_size=(32, 32), log=quiet)


def test_registers_by_their_other_names():
    """`register_tokens` is what DINOv2's own files call them; timm's are `reg_token`."""
    with pytest.raises(ValueError, match="register_tokens besides"):
        load_encoder(vit_weights() | {"register_tokens": ones(1, 4, 192)}, log=quiet)


@pytest.mark.parametrize("dim, hidden", [(44, 120), (52, 240), (28, 61)])
def test_any_mlp_width(dim, hidden):
    """int(dim * (hidden / dim)) is hidden - 1 for these."""
    load_encoder(vit_weights(dim, hidden=hidden), heads=4, log=quiet)


def test_export_of_a_head_that_does_not_fit(tmp_path):
    save_checkpoint(tmp_path / "a.pt", without(timm_bare(vit_weights(), None), "head.bias"))
    with pytest.raises(UserError, match="head is not whole: head.bias missing"):
        finetune.main(["--init", str(tmp_path / "a.pt"), "--export", str(tmp_path / "b.pt")])


def test_export_of_a_teacher_that_is_not_there(tmp_path):
    save_checkpoint(tmp_path / "a.pt", our_classifier()(vit_weights(), None))
    with pytest.raises(UserError, match="teacher"):
        finetune.main(["--init", str(tmp_path / "a.pt"), "--export", str(tmp_path / "b.pt"), "--weights", "teacher"])


def test_dino_file_with_a_teacher_only():
    with pytest.raises(ValueError, match="--weights teacher"):
        load_encoder(dict(teacher={f"backbone.{name}": t for name, t in vit_weights().items()}), log=quiet)


def test_pre_logits_are_part_of_a_head():
    """Old timm files (in21k) have a layer before the head: the encoder is whole without it, a classifier is not."""
    load_encoder(timm_bare(vit_weights(), None) | {"pre_logits.fc.weight": torch.ones(192, 192)}, log=quiet)
    with pytest.raises(ValueError, match="pre_logits"):
        load_classifier(timm_bare(vit_weights(), None) | {"pre_logits.fc.weight": torch.ones(192, 192)}, log=quiet)


# --- export to timm ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def trained(kind, **sizes):
    """An encoder, or a classifier on one, with a value of its own in every parameter."""
    torch.manual_seed(0)
    model = ViT(**dict(image_size=SIZE, patch_size=PATCH, dim=64, depth=2, heads=4) | sizes)
    if kind is not None:
        model = Classifier(model, 7, **kind)
        if model.frozen:
            model.fc_norm.running_mean.normal_()
            model.fc_norm.running_var.uniform_(0.2, 5)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


ENCODER = [
    "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
    "blocks.0.norm1.weight", "blocks.0.norm1.bias", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias",
    "blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias", "blocks.0.norm2.weight", "blocks.0.norm2.bias",
    "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias",
    "blocks.1.norm1.weight", "blocks.1.norm1.bias", "blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.bias",
    "blocks.1.attn.proj.weight", "blocks.1.attn.proj.bias", "blocks.1.norm2.weight", "blocks.1.norm2.bias",
    "blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc1.bias", "blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc2.bias",
]  # fmt: skip
NORM, FC_NORM, HEAD = (
    [f"{name}.{part}" for part in ("weight", "bias")] for name in ("norm", "fc_norm", "head")
)  # fmt: skip
MEAN, CLASS = dict(pool="mean"), dict(pool="class")
EXPORTED = {  # what timm's model has, the arguments that make it so
    "encoder": (None, ENCODER + NORM, dict(num_classes=0)),
    "mean": (MEAN, ENCODER + FC_NORM + HEAD, dict(num_classes=7, global_pool="avg")),
    "class": (CLASS, ENCODER + NORM + HEAD, dict(num_classes=7, global_pool="token")),
    "probe, mean": (
        MEAN | dict(frozen=True), ENCODER + NORM + HEAD, dict(num_classes=7, global_pool="avg", fc_norm=False),
    ),
    "probe, class": (
        CLASS | dict(frozen=True), ENCODER + NORM + HEAD, dict(num_classes=7, global_pool="token", fc_norm=False),
    ),
}  # fmt: skip


def call_arguments(call):
    """'timm.create_model(name, **options)' -> name, options"""
    tree = ast.parse(call, mode="eval").body
    assert ast.unparse(tree.func) == "timm.create_model"
    return ast.literal_eval(tree.args[0]), {word.arg: ast.literal_eval(word.value) for word in tree.keywords}


@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_exported_weights(tmp_path, name):
    kind, names, options = EXPORTED[name]
    model, images = trained(kind), images_of()
    save_checkpoint(tmp_path / "vit.pth", timm_weights(model))
    tensors = torch.load(tmp_path / "vit.pth", weights_only=True)
    assert sorted(tensors) == sorted(names)
    if kind is None:
        assert_close(model(images).tokens, reference(tensors, images, 4))
    else:
        assert_close(model(images), reference_logits(tensors, images, 4, options["global_pool"]))
    assert call_arguments(timm_call(model)) == (
        "vit_base_patch16_224",
        dict(img_size=SIZE, patch_size=8, in_chans=3, embed_dim=64, depth=2, num_heads=4, mlp_ratio=4.0) | options,
    )


@torch.no_grad()
def test_batch_norm_of_nearly_constant_features_is_folded_too():
    model, x = trained(MEAN | dict(frozen=True)).double(), torch.randn(4, 64).double()
    model.fc_norm.running_var.copy_(10 ** torch.linspace(-8, 0, 64))
    exported = timm_weights(model)
    expected = model.head(model.fc_norm(x))
    torch.testing.assert_close(x @ exported["head.weight"].T + exported["head.bias"], expected)


def test_export_leaves_the_model_alone():
    model, images = trained(MEAN | dict(frozen=True)), images_of()
    before = model(images)
    exported = timm_weights(model)
    assert not any(tensor.requires_grad for tensor in exported.values())
    exported["head.weight"].zero_(), exported["head.bias"].zero_()
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_exported_weights_load_again(name):
    kind, _, options = EXPORTED[name]
    model, images = trained(kind), images_of()
    if kind is None:
        assert torch.equal(load_encoder(timm_weights(model), log=quiet).eval()(images).tokens, model(images).tokens)
    elif name != "probe, mean":  # which no name in it tells from the class token
        assert_close(load_classifier(timm_weights(model), log=quiet).eval()(images), model(images))


@pytest.mark.parametrize(
    "size, name",
    [
        ("vit_mini", "vit_base_patch16_224"),  # ours: any other will do
        ("vit_tiny", "vit_tiny_patch16_224"),
        ("vit_small", "vit_small_patch16_224"),
        ("vit_base", "vit_base_patch16_224"),
        ("vit_large", "vit_large_patch16_224"),
        ("vit_huge", "vit_huge_patch14_224"),
    ],
)
def test_timms_names_of_the_sizes(size, name):
    with torch.device("meta"):
        vit = ViT((28, 42), 14, channels=1, **MODELS[size], mlp_ratio=2.5)
    options = dict(
        img_size=(28, 42), patch_size=14, in_chans=1, embed_dim=MODELS[size]["dim"], depth=MODELS[size]["depth"],
        num_heads=MODELS[size]["heads"], mlp_ratio=2.5, num_classes=0,
    )  # fmt: skip
    assert call_arguments(timm_call(vit)) == (name, options)


# --- with timm, where it is installed ---------------------------------------------------------------------------------

SHAPES = {
    "small": {},
    "not square": dict(image_size=(24, 40), dim=192, heads=3),
    "unusual": dict(image_size=(48, 16), channels=1, dim=48, heads=6, mlp_ratio=2.5),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_timm_loads_what_is_exported(tmp_path, capsys, name, shape):
    timm = pytest.importorskip("timm")
    kind, sizes = EXPORTED[name][0], SHAPES[shape]
    model = trained(kind, **sizes)
    encoder = model if kind is None else model.encoder
    if kind is None:
        checkpoint = dict(method="pcae", student=model.state_dict())
    else:
        checkpoint = dict(method="finetune", pool=model.pool, model=model.state_dict())
    save_checkpoint(tmp_path / "ours.pt", checkpoint | dict(encoder=encoder.arguments))
    finetune.main(["--init", str(tmp_path / "ours.pt"), "--export", str(tmp_path / "timm.pth")])
    call = capsys.readouterr().out.splitlines()[-1]
    theirs = eval(call, {"timm": timm}).eval()
    theirs.load_state_dict(torch.load(tmp_path / "timm.pth", weights_only=True), strict=True)
    images = images_of(encoder.image_size, encoder.arguments["channels"])
    if kind is None:
        torch.testing.assert_close(theirs.forward_features(images), model(images).tokens, atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(theirs(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("global_pool", ["token", "avg"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_small_patch16_224"])
@torch.no_grad()
def test_timms_models_load(tmp_path, name, global_pool):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(name, depth=2, img_size=64, num_classes=7, global_pool=global_pool).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    checkpoint, images = load_checkpoint(tmp_path / "timm.pth"), images_of((64, 64))
    model = load_classifier(checkpoint, log=quiet).eval()
    torch.testing.assert_close(model(images), theirs(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encoder(images).tokens, theirs.forward_features(images), atol=1e-5, rtol=1e-5)
    encoder, features = load_encoder(checkpoint, log=quiet).eval(), theirs.forward_features(images)
    features = F.layer_norm(features, features.shape[-1:], eps=1e-6) if global_pool == "avg" else features
    torch.testing.assert_close(encoder(images).tokens, features, atol=1e-5, rtol=1e-5)
