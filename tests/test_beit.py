"""BEiT's and CAE's files, and BEiT's encoder compared with a plain one that uses the names of their files."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F

import detect
import helpers
from beit import BEiT, num_distances, relative_index, resize_table
from helpers import train
from model import PCAE, Classifier
from ptr import PTR
from pyramid import ViTPyramid
from util import runs
from weights import load_classifier, load_encoder, timm_call, timm_weights

PATCH, GRID, DIM, HEADS, DEPTH = 4, (4, 4), 48, 3, 3
TABLE, INDEX = "relative_position_bias_table", "relative_position_index"


def random_tensors(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def file_of(kind, grid=GRID, seed=0, last=("norm",)):
    """Random tensors as in files of BEiT (a table per `block`, or one `shared`) and CAE (`absolute` positions)."""
    shapes = {"cls_token": (1, 1, DIM)}
    shapes |= {"patch_embed.proj.weight": (DIM, 3, PATCH, PATCH), "patch_embed.proj.bias": (DIM,)}
    layers = {"norm1": (DIM,), "attn.proj": (DIM, DIM), "norm2": (DIM,), "mlp.fc1": (4 * DIM, DIM)}
    layers |= {"mlp.fc2": (DIM, 4 * DIM)}
    for i in range(DEPTH):
        block = f"blocks.{i}."
        for name, shape in layers.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        shapes |= {f"{block}{name}": (DIM,) for name in ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias")}
        shapes |= {f"{block}attn.qkv.weight": (3 * DIM, DIM)}
        if kind == "block":
            shapes |= {f"{block}attn.{TABLE}": (num_distances(grid), HEADS), f"{block}attn.{INDEX}": (1,)}
    if kind == "shared":
        shapes |= {f"rel_pos_bias.{TABLE}": (num_distances(grid), HEADS), f"rel_pos_bias.{INDEX}": (1,)}
        shapes |= {"mask_token": (1, 1, DIM), "lm_head.weight": (9, DIM)}
    if kind == "absolute":
        shapes |= {"pos_embed": (1, 1 + math.prod(grid), DIM)}
    for name in last:
        shapes |= {f"{name}.weight": (DIM,), f"{name}.bias": (DIM,)}
    return random_tensors(shapes, seed)


HEAD = random_tensors({"head.weight": (7, DIM), "head.bias": (7,)}, seed=9)


def reference(t, images, ids=None, grid=GRID, class_token=True):
    """Return the tokens of the authors' encoder with these tensors; the bias is computed pair by pair."""
    count = math.prod(grid)
    x = F.conv2d(images, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat([t["cls_token"].expand(len(x), -1, -1), x], dim=1) + t.get("pos_embed", 0)
    ids = torch.arange(count).expand(len(x), -1) if ids is None else ids
    chosen = F.pad(ids + 1, (1, 0)) if class_token else ids + 1
    x = torch.stack([image[kept] for image, kept in zip(x, chosen, strict=True)])
    rows, columns = grid
    for i in range(DEPTH):
        b = f"blocks.{i}."
        y = F.layer_norm(x, (DIM,), t[b + "norm1.weight"], t[b + "norm1.bias"], 1e-6)
        bias = torch.cat([t[b + "attn.q_bias"], torch.zeros(DIM), t[b + "attn.v_bias"]])
        q, k, v = (y @ t[b + "attn.qkv.weight"].T + bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(DIM / HEADS)
        table = t.get(f"{b}attn.{TABLE}", t.get(f"rel_pos_bias.{TABLE}"))
        for image, tokens in enumerate(chosen.tolist()) if table is not None else ():
            for i_query, query in enumerate(tokens):
                for i_key, key in enumerate(tokens):
                    if query and key:
                        down = (query - 1) // columns - (key - 1) // columns
                        right = (query - 1) % columns - (key - 1) % columns
                        distance = (down + rows - 1) * (2 * columns - 1) + right + columns - 1
                    else:  # class to patch, patch to class, class to class
                        distance = len(table) - (1 if query == key else 2 if query else 3)
                    scores[image, :, i_query, i_key] += table[distance]
        y = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        x = x + t[b + "gamma_1"] * F.linear(y, t[b + "attn.proj.weight"], t[b + "attn.proj.bias"])
        y = F.layer_norm(x, (DIM,), t[b + "norm2.weight"], t[b + "norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, t[b + "mlp.fc1.weight"], t[b + "mlp.fc1.bias"]))
        x = x + t[b + "gamma_2"] * F.linear(y, t[b + "mlp.fc2.weight"], t[b + "mlp.fc2.bias"])
    return F.layer_norm(x, (DIM,), t["norm.weight"], t["norm.bias"], 1e-6) if "norm.weight" in t else x


def images_of(grid=GRID, batch=2):
    return torch.randn(batch, 3, grid[0] * PATCH, grid[1] * PATCH, generator=torch.Generator().manual_seed(3))


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


# --- the bias ---------------------------------------------------------------------------------------------------------


def test_relative_index_of_two_by_three_patches():
    """By hand: five differences of columns for each of three of rows, 0 to 14, then the class token's three."""
    assert relative_index((2, 3)).tolist() == [
        [17, 15, 15, 15, 15, 15, 15],
        [16, 7, 6, 5, 2, 1, 0],
        [16, 8, 7, 6, 3, 2, 1],
        [16, 9, 8, 7, 4, 3, 2],
        [16, 12, 11, 10, 7, 6, 5],
        [16, 13, 12, 11, 8, 7, 6],
        [16, 14, 13, 12, 9, 8, 7],
    ]


def test_resized_tables_keep_the_nearest_and_the_farthest_and_the_class_tokens():
    table = torch.randn(num_distances((3, 4)), HEADS, generator=torch.Generator().manual_seed(0))
    resized = resize_table(table, (3, 4), (6, 5))
    assert len(resized) == num_distances((6, 5)) and resize_table(table, (3, 4), (3, 4)) is table
    assert torch.equal(resized[-3:], table[-3:])
    old, new = table[:-3].view(5, 7, HEADS), resized[:-3].view(11, 9, HEADS)
    for place in ((0, 0), (-1, 0), (0, -1), (-1, -1)):
        close(new[place], old[place])
    close(new[5, 4], old[2, 3])  # of a token to itself
    linear = torch.arange(5.0)[:, None, None].expand(5, 7, HEADS).reshape(-1, HEADS)
    steps = resize_table(torch.cat([linear, table[-3:]]), (3, 4), (5, 4))[:-3].view(9, 7, HEADS)
    close(steps[4, :, 0], torch.full((7,), 2.0))
    assert (steps.diff(dim=0) > 0).all()


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["block", "shared", "absolute"])
@pytest.mark.parametrize("wrap", ["model", "CAE's"])
@torch.no_grad()
def test_files_load_as_they_are(tmp_path, kind, wrap):
    student, teacher = (file_of(kind, seed=seed) for seed in (0, 1))
    if wrap == "model":
        content = dict(model=student)
    else:
        names = [("encoder.", student), ("teacher.", teacher), ("pretext_neck.", {"mask_token": torch.ones(1, 1, DIM)})]
        content = dict(model={prefix + name: t for prefix, tensors in names for name, t in tensors.items()})
    torch.save(content | dict(args=argparse.Namespace(lr=1)), tmp_path / "file.pth")
    checkpoint = runs.load(tmp_path / "file.pth")
    heads = HEADS if kind == "absolute" else None  # known from the tables
    encoder = load_encoder(checkpoint, heads=heads).eval()
    assert isinstance(encoder, BEiT) == (kind != "absolute")
    close(encoder(images_of()).tokens, reference(student, images_of()))
    if wrap != "model":
        encoder = load_encoder(checkpoint, weights="teacher", heads=heads).eval()
        close(encoder(images_of()).tokens, reference(teacher, images_of()))


@pytest.mark.parametrize("kind, last", [("block", ("fc_norm",)), ("absolute", ("fc_norm",)), ("absolute", ("norm",))])
@torch.no_grad()
def test_classifiers(kind, last):
    tensors, images = file_of(kind, last=last), images_of()
    x = reference(tensors, images)
    x = (
        x[:, 0]
        if last == ("norm",)
        else F.layer_norm(x[:, 1:].mean(dim=1), (DIM,), tensors["fc_norm.weight"], tensors["fc_norm.bias"], 1e-6)
    )
    logits = F.linear(x, HEAD["head.weight"], HEAD["head.bias"])
    pool = "class" if last == ("norm",) else None  # fc_norm means mean pooling
    close(load_classifier(dict(model=tensors | HEAD), pool=pool, heads=HEADS).eval()(images), logits)


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_timms_beit_computes_the_same(shared):
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=16, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, num_classes=7)
    biases = dict(use_rel_pos_bias=not shared, use_shared_rel_pos_bias=shared, init_values=0.1)
    theirs = timm.create_model("beit_base_patch16_224", **sizes, **biases).eval()
    for parameter in theirs.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    close(load_classifier(theirs.state_dict()).eval()(images_of()), theirs(images_of()))


@torch.no_grad()
def test_cae_loads_into_timms_vit():
    timm, encoder = pytest.importorskip("timm"), load_encoder(file_of("absolute"), heads=HEADS).eval()
    theirs = eval(timm_call(encoder), {"timm": timm}).eval()
    theirs.load_state_dict(timm_weights(encoder), strict=True)
    close(theirs.forward_features(images_of()), reference(file_of("absolute"), images_of()))


@torch.no_grad()
def test_layer_scale_by_timms_names():
    tensors = file_of("absolute")
    renamed = {n.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): t for n, t in tensors.items()}
    close(load_encoder(renamed, heads=HEADS).eval()(images_of()).tokens, reference(tensors, images_of()))


# --- the encoder ------------------------------------------------------------------------------------------------------


def beit(grid=GRID, seed=0):
    return load_encoder(file_of("block", grid, seed), grid=grid).eval()


@pytest.mark.parametrize("class_token", [True, False])
@torch.no_grad()
def test_any_patches_in_any_order_have_the_bias_of_their_positions(class_token):
    grid = (2, 5)
    encoder, images = beit(grid), images_of(grid)
    ids = torch.tensor([[3, 9, 0, 6], [8, 1, 2, 7]])
    tokens = encoder(images, ids, class_token=class_token).tokens
    close(tokens, reference(file_of("block", grid), images, ids, grid, class_token))


@torch.no_grad()
def test_ptr_also_drops_the_bias_of_dropped_tokens():
    encoder, images = beit(), images_of()
    whole = encoder(images).tokens
    assert torch.equal(encoder(images, ptr=PTR((0, 1), 0.0)).tokens, whole), "a ratio of 0 is the identity"
    output = encoder(images, ptr=PTR((0,), 0.5), taps=(0,))
    x, (_, ids) = encoder.embed(images, torch.arange(16).expand(2, -1), True), output.tapped[0]
    assert ids.shape == (2, 16) and output.patch_ids.shape == (2, 8)
    index = relative_index(GRID)
    for image, kept in enumerate(output.patch_ids):
        x = output.tapped[0][0][image : image + 1][:, F.pad(kept + 1, (1, 0))]
        for block in encoder.blocks[1:]:
            pair = index[F.pad(kept + 1, (1, 0))][:, F.pad(kept + 1, (1, 0))]
            x = block(x, block.attn.relative_position_bias_table[pair].permute(2, 0, 1)[None])
        close(output.tokens[image], encoder.norm(x)[0])


@torch.no_grad()
def test_another_image_size(capsys):
    tensors, grid = file_of("block"), (5, 3)
    encoder = load_encoder(tensors, image_size=(20, 12)).eval()
    resized = {name: resize_table(t, GRID, grid) if name.endswith(TABLE) else t for name, t in tensors.items()}
    assert encoder.image_size == (20, 12) and len(capsys.readouterr().out.splitlines()) == 3
    close(encoder(images_of(grid)).tokens, reference(resized, images_of(grid), grid=grid))
    with pytest.raises(ValueError):
        load_encoder(tensors, heads=4)


@torch.no_grad()
def test_a_pyramid_encodes_images_of_any_size():
    encoder, grid = beit(), (6, 5)
    pyramid = ViTPyramid(encoder, 16, learned_positions=True).eval()
    tapped = pyramid.tapped_tokens(images_of(grid), grid, PTR())
    tensors = {name: resize_table(t, GRID, grid) if name.endswith(TABLE) else t for name, t in file_of("block").items()}
    plain = {name: t for name, t in tensors.items() if not name.startswith("norm.")}
    assert not encoder.pos_embed.requires_grad
    close(tapped[-1], reference(plain, images_of(grid), grid=grid)[:, 1:])


def test_all_tables_get_gradients():
    for model in (Classifier(beit(), 7).train(), PCAE(beit(), decoder_dim=16, decoder_heads=2).train()):
        output = model(images_of())
        (output.logsumexp(dim=1).sum() if isinstance(output, torch.Tensor) else output.loss).backward()
        tables = [p for name, p in model.named_parameters() if name.endswith(TABLE) and "teacher" not in name]
        assert len(tables) == DEPTH and all(table.grad.abs().sum() > 0 for table in tables)
        assert not any(name.endswith("pos_embed") and "decoder" not in name for name, _ in model.named_parameters())
    probe = Classifier(beit(), 7, frozen=True)
    assert [name for name, p in probe.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_timm_export_is_rejected():
    for model in (beit(), Classifier(beit(), 7)):
        with pytest.raises(ValueError, match="BEiT"):
            timm_weights(model)


def test_the_scripts_accept_beit(tmp_path, capsys):
    """Fine-tune with PTR, evaluate, resume; train a detector on BEiT, evaluate."""
    torch.save(dict(model=file_of("shared")), tmp_path / "beit.pth")
    settings = dict(init=tmp_path / "beit.pth", dry_run=True, device="cpu")
    reduced = dict(limit=128, batch_size=16, drop_ratio=0.3, precision="bf16")
    checkpoint, start = train("finetune", tmp_path / "a", **reduced, **settings), file_of("shared")
    assert isinstance(load_classifier(checkpoint).encoder, BEiT)
    tables = [tensor for name, tensor in checkpoint["model"].items() if name.endswith(TABLE)]
    assert len(tables) == DEPTH and not any(table.equal(start[f"rel_pos_bias.{TABLE}"]) for table in tables)
    helpers.evaluate(tmp_path / "a/dry-run/last.pt", drop_ratio=[0, 0.3], limit=32)
    assert "0.3" in capsys.readouterr().out
    train("finetune", tmp_path / "a/dry-run", resume=tmp_path / "a/dry-run/last.pt")
    small = dict(limit=4, batch_size=2, short_side=32, long_side=32, data_root=tmp_path / "data")
    assert train("detect", tmp_path / "b", **small, **settings)["step"] == 2
    detect.main(helpers.flags(eval=tmp_path / "b/dry-run/last.pt", data_root=tmp_path / "data", limit=2, device="cpu"))
