"""Loading and export of weights: each public format, other image sizes, rejected files, export to timm.

Files are written here with the names of each project. `reference` is a plain ViT from such weights, without our code.
"""

import argparse
import functools
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import IMAGENET_MEAN, IMAGENET_STD, MODELS, Classifier, ViT
from util import runs
from weights import infer_arguments, load_classifier, load_encoder, resize_positions, timm_call, timm_weights

PATCH, SIZE, GRID, DIM, HEADS = 8, (32, 32), (4, 4), 192, 3
assert_close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
TABLE = "relative_position_bias_table"


def random_tensors(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def layers(shapes):
    """Convert shapes by names of layers to shapes by names of weights and biases."""
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in shapes.items()}


def vit_weights(dim=DIM, depth=2, grid=GRID, channels=3, hidden=4 * DIM, seed=0):
    """Return random weights of a plain ViT with the names of timm, MAE, DINO and DeiT."""
    block = {"norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    block |= {"norm2": (dim,), "mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
    shapes = {"patch_embed.proj": (dim, channels, PATCH, PATCH), "norm": (dim,)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    tokens = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + math.prod(grid), dim)}
    return random_tensors(tokens | layers(shapes), seed)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(names)}


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def images_of(size=SIZE, channels=3):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(3))


def norm(tensors, name, x):
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)


def reference(tensors, images, heads=HEADS):
    """Return tokens (B, 1 + N, D) of a plain ViT with these weights, normalised if there is a final norm."""

    def linear(name, x):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    x = F.conv2d(images, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], dim=1) + tensors["pos_embed"]
    for i in range(sum(name.endswith("norm1.bias") for name in tensors)):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(tensors, f"blocks.{i}.norm1", x))
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v
        x = x + linear(f"blocks.{i}.attn.proj", mixed.transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(tensors, f"blocks.{i}.norm2", x)))
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden)
    return norm(tensors, "norm", x) if "norm.weight" in tensors else x


def reference_logits(tensors, images, pool, heads=HEADS):
    x = reference(tensors, images, heads)
    x = x[:, 1:].mean(dim=1) if pool == "mean" else x[:, 0]
    x = norm(tensors, "fc_norm", x) if "fc_norm.weight" in tensors else x
    return x @ tensors["head.weight"].T + tensors["head.bias"]


HEAD = random_tensors(layers({"head": (7, DIM)}), 5)
REST = dict(optimizer={"state": {0: {"step": torch.tensor(5.0)}}}, epoch=99, args=argparse.Namespace(lr=1e-3))
DECODER = random_tensors({"mask_token": (1, 1, 64), "decoder_pos_embed": (1, 17, 64), "decoder_norm.bias": (64,)}, 7)
PROJECTOR = random_tensors({"head.0.weight": (48, DIM), "head.1.running_mean": (48,)}, 7)
ARGUMENTS = dict(image_size=SIZE, patch_size=PATCH, channels=3, dim=DIM, depth=2, heads=HEADS, mlp_ratio=4.0)
ARGUMENTS |= dict(mean=IMAGENET_MEAN, std=IMAGENET_STD)
WIDE = ARGUMENTS | dict(image_size=(16, 64))  # another grid with as many patches


def moco(student, teacher):
    tensors = prefixed("base_encoder.", student | PROJECTOR) | prefixed("momentum_encoder.", teacher | PROJECTOR)
    return REST | dict(arch="vit", state_dict=prefixed("module.", tensors | {"predictor.0.weight": torch.ones(4, 4)}))


FORMATS = {
    "MAE": lambda student, _: REST | dict(model=student | DECODER),
    "DINO": lambda student, teacher: (
        REST
        | dict(
            student=prefixed("module.backbone.", student) | prefixed("module.", PROJECTOR),
            teacher=prefixed("backbone.", teacher) | PROJECTOR,
        )
    ),
    "DINO's backbone": lambda student, _: student,
    "DeiT": lambda student, _: dict(model=student | HEAD),
    "MoCo v3": moco,
    "timm": lambda student, _: student | HEAD,
    "timm, training": lambda student, _: REST | dict(state_dict=student | HEAD, version=2, metric=71.5),
    "DDP of torch.compile": lambda student, _: dict(state_dict=prefixed("module._orig_mod.", student)),
    "torch.compile of DDP": lambda student, _: prefixed("_orig_mod.module.encoder.", student),
    "ours": lambda student, teacher: dict(config={}, encoder=ARGUMENTS, student=student, teacher=teacher),
}


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_files_load_as_they_are(tmp_path, name, capsys):
    sets = dict(student=vit_weights(seed=0), teacher=vit_weights(seed=1))
    torch.save(FORMATS[name](*sets.values()), tmp_path / "file.pth")
    checkpoint = runs.load(tmp_path / "file.pth")
    if name not in ("DINO", "MoCo v3", "ours"):
        del sets["teacher"]
        with pytest.raises(ValueError):
            load_encoder(checkpoint, weights="teacher")
        assert not capsys.readouterr().out
    for weights, tensors in sets.items():
        encoder = load_encoder(checkpoint, weights=weights).eval()
        lines = capsys.readouterr().out.splitlines()  # assumptions about a public file, and matched tensors
        assert encoder.arguments == ARGUMENTS and len(lines) == (1 if name == "ours" else 2)
        assert_close(encoder(images_of()).tokens, reference(tensors, images_of()))


@torch.no_grad()
def test_safetensors(tmp_path):
    pytest.importorskip("safetensors.torch").save_file(vit_weights() | HEAD, tmp_path / "timm.safetensors")
    encoder = load_encoder(runs.load(tmp_path / "timm.safetensors")).eval()
    assert_close(encoder(images_of()).tokens, reference(vit_weights(), images_of()))


@torch.no_grad()
def test_public_classifiers():
    images, tensors = images_of(), vit_weights() | HEAD
    mae = without(tensors, "norm.") | random_tensors(layers({"fc_norm": (DIM,)}), 6)
    assert_close(load_classifier(dict(model=mae))(images), reference_logits(mae, images, "mean"))
    for pool in ("class", "mean"):  # a `norm` fits both, so the caller must choose
        model = load_classifier(tensors, pool=pool)
        assert_close(model(images), reference_logits(tensors, images, pool))


@torch.no_grad()
def test_an_unusual_vit():
    """Another width, MLP and grid; one channel; more than ten blocks; given heads and drop path; half precision."""
    tensors = {name: t.half() for name, t in vit_weights(40, 11, grid=(3, 5), channels=1, hidden=100).items()}
    encoder = load_encoder(tensors, heads=5, grid=(3, 5), drop_path=0.2)
    assert encoder.blocks[-1].drop_path.p == 0.2 and encoder.pos_embed.dtype == torch.float32
    tensors, images = {name: tensor.float() for name, tensor in tensors.items()}, images_of((24, 40), channels=1)
    assert_close(encoder.eval()(images).tokens, reference(tensors, images, 5))


@pytest.mark.parametrize("name, heads", dict(tiny=3, small=6, base=12, large=16, huge=16).items())
def test_usual_sizes_are_known(name, heads):
    patch = 14 if name == "huge" else 16
    with torch.device("meta"):
        vit = ViT(patch_size=patch, **MODELS[f"vit_{name}"])
    assert f"'vit_{name}_patch{patch}_224'" in timm_call(vit)
    inferred = infer_arguments(vit.state_dict())
    assert inferred["heads"] == heads and inferred.items() <= vit.arguments.items()


@torch.no_grad()
def test_mocos_small_vit_has_twice_the_usual_heads():
    tensors = vit_weights(384, hidden=4 * 384)
    for file, told, heads in ((tensors, None, 6), (moco(tensors, {}), None, 12), (moco(tensors, {}), 4, 4)):
        encoder = load_encoder(file, heads=told).eval()
        assert_close(encoder(images_of()).tokens, reference(tensors, images_of(), heads))


@pytest.mark.parametrize("old, new", [((4, 4), (8, 8)), ((3, 7), (5, 4)), ((6, 4), (2, 9)), ((3, 5), (3, 5))])
def test_resized_positions(old, new):
    table = torch.randn(3, *old)
    resized = resize_positions(F.pad(table.flatten(1).T, (0, 0, 1, 0), value=7)[None], old, new)[0]
    assert (resized[0] == 7).all(), "the class token's position is unchanged"
    assert_close(resized[1:], F.interpolate(table[None], size=new, mode="bicubic")[0].flatten(1).T)


@pytest.mark.parametrize("says, old", [({}, GRID), (dict(config={}, encoder=WIDE), (2, 8))])
@torch.no_grad()
def test_another_image_size(says, old):
    tensors, images, size = vit_weights() | HEAD, images_of((24, 40)), (24, 40)
    resized = tensors | dict(pos_embed=resize_positions(tensors["pos_embed"], old, (3, 5)))
    others = {"decoder_pos_embed": torch.ones(1, 5, 64), "neck.pos_embed": torch.ones(1, 16, 8)}  # not resized
    encoder = load_encoder(dict(model=tensors | others) | says, image_size=size).eval()
    assert encoder.image_size == encoder.arguments["image_size"] == size
    assert_close(encoder(images).tokens, reference(resized, images))
    model = load_classifier(dict(model=tensors) | says, pool="class", image_size=size)
    assert_close(model(images), reference_logits(resized, images, "class"))


REJECTED = {
    "no class token": without(vit_weights(), "cls_token"),
    "absolute and relative positions": vit_weights() | {f"blocks.0.attn.{TABLE}": torch.ones(52, HEADS)},
    "a table of another grid": without(vit_weights(), "pos_embed") | {f"rel_pos_bias.{TABLE}": torch.ones(51, HEADS)},
    "other relative positions": vit_weights() | {"blocks.0.attn.rel_pos_h": torch.ones(7, 64)},
    "rotary positions": vit_weights() | {"rope.freqs_cos": torch.ones(16, 64)},
    "LayerScale and SwiGLU": {name.replace("mlp.fc", "mlp.w"): tensor for name, tensor in vit_weights().items()}
    | {"blocks.0.ls2.gamma": torch.ones(192)},
    "a third layer": vit_weights() | {"blocks.0.mlp.w3.weight": torch.ones(192, 768)},
    "a bias of queries alone": vit_weights() | {"blocks.0.attn.q_bias": torch.ones(192)},
    "register tokens": vit_weights() | {"reg_token": torch.ones(1)},
    "a distillation token": vit_weights() | {"dist_token": torch.ones(1)},
    "a stem": vit_weights() | {"patch_embed.backbone.stem.weight": torch.ones(1)},
    "a wrong shape": vit_weights() | {"blocks.1.attn.qkv.weight": torch.ones(576, 191)},
    "no biases": {name: tensor for name, tensor in vit_weights().items() if not name.endswith(".bias")},
    "one tensor less": without(vit_weights(), "blocks.1.norm1.bias"),
    "a strip of patches": vit_weights(grid=(3, 5)),
    "an unusual width without heads": vit_weights(48),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_files(name):
    for load, options in ((load_encoder, {}), (load_classifier, dict(pool="class"))):
        with pytest.raises(ValueError):
            load(REJECTED[name] | (HEAD if options else {}), **options)


@pytest.mark.parametrize("head", [{}, without(HEAD, "head.bias"), HEAD | {"pre_logits.fc.weight": torch.ones(1)}])
def test_incomplete_or_nonlinear_heads(head):
    with pytest.raises(ValueError):
        load_classifier(vit_weights() | head, pool="class")


KINDS = [None, *(dict(pool=pool, frozen=frozen) for pool in ("mean", "class") for frozen in (False, True))]
all_kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


@torch.no_grad()
def trained(kind):
    """Return an encoder or classifier with random values in every tensor, and images."""
    torch.manual_seed(0)
    model = ViT((24, 40), PATCH, channels=1, dim=48, depth=2, heads=6, mlp_ratio=2.5)
    model = model if kind is None else Classifier(model, 7, **kind)
    for tensor in filter(torch.is_floating_point, model.state_dict().values()):
        tensor += 0.1 * torch.randn_like(tensor)
    if kind and kind["frozen"]:
        model.fc_norm.running_var *= 1e-3  # so epsilon has an effect
    return model.eval(), images_of((24, 40), channels=1)


@all_kinds
@torch.no_grad()
def test_ours_and_exported_weights(kind):
    model, images = trained(kind)
    tensors, sizes = timm_weights(model), dict(grid=(3, 5), heads=6)
    options = dict(img_size=(24, 40), patch_size=8, in_chans=1, embed_dim=48, depth=2, num_heads=6, mlp_ratio=2.5)
    if kind is None:
        assert_close(reference(tensors, images, 6), model(images).tokens)
    else:
        options |= dict(num_classes=7, global_pool="avg" if kind["pool"] == "mean" else "token")
        ours = dict(config={}, encoder=model.encoder.arguments, pool=model.pool, model=model.state_dict())
        for again in (load_classifier(ours), load_classifier(tensors, pool=model.pool, **sizes)):
            assert_close(again.eval()(images), model(images))
        assert_close(reference_logits(tensors, images, model.pool, 6), model(images))
        with pytest.raises(ValueError):
            load_classifier(ours, pool="class" if model.pool == "mean" else "mean")
    assert all(f"{name}={value!r}" in timm_call(model) for name, value in options.items())


@all_kinds
@torch.no_grad()
def test_timm_loads_what_is_exported(kind):
    timm, (model, images) = pytest.importorskip("timm"), trained(kind)
    theirs = eval(timm_call(model), {"timm": timm}).eval()
    theirs.load_state_dict(timm_weights(model), strict=True)
    pairs = (theirs.forward_features(images), model(images).tokens) if kind is None else (theirs(images), model(images))
    torch.testing.assert_close(*pairs, atol=1e-5, rtol=1e-5)
    expected = dict(input_size=(1, 24, 40), mean=(0.449,), crop_pct=0.875, interpolation="bicubic")
    assert expected.items() <= timm.data.resolve_model_data_config(theirs).items(), "as our evaluation"


RECORDED = Path(os.environ.get("PCAE_PARITY", "")).parent / "weights" / "expected.pt"  # by the projects' own code


@pytest.mark.skipif(not RECORDED.exists(), reason="no recordings of public formats beside the one PCAE_PARITY names")
@pytest.mark.parametrize(
    "key", ["mae.tokens", "dino.teacher", "moco.tokens", "deit.logits", "cae.tokens", "beit_finetuned.logits"]
)
@torch.no_grad()
def test_recorded_files(key):
    (name, what), expected = key.split("."), runs.load(RECORDED)
    checkpoint = runs.load(RECORDED.with_name(f"{name}.pth"))
    if what == "logits":
        pool = "class" if name == "deit" else None
        ours = load_classifier(checkpoint, pool=pool, heads=3).eval()(expected["images"])
    else:
        weights = what.replace("tokens", "student")
        ours = load_encoder(checkpoint, weights=weights, heads=3).eval()(expected["images"]).tokens
    torch.testing.assert_close(ours, expected[key], atol=1e-5, rtol=0)
