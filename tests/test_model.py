"""Networks: the ViT equals torchvision's and plain loops; inputs of PCAE's networks; teacher; classifier."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from model import MODELS, PCAE, Block, Classifier, Decoder, ViT, cosine_loss, sincos_position_embedding, split_patches
from ptr import PTR, num_kept, select_tokens

SIZE, PATCH, GRID, N = (24, 40), 4, (6, 10), 60  # small images that are not square


def small_vit(**changes):
    return ViT(**dict(image_size=SIZE, patch_size=PATCH, dim=32, depth=4, heads=4) | changes)


def small_pcae(**changes):
    torch.manual_seed(0)
    return PCAE(small_vit(**changes), ptr=PTR((0, 2), 0.5), decoder_dim=24, decoder_depth=1, decoder_heads=3)


def random_images(batch=3, channels=3, size=SIZE, seed=0):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def random_ids(batch, n):
    return torch.rand(batch, N).argsort(dim=1)[:, :n]


@torch.no_grad()
def randomize(module):
    """Give every parameter random values, because zero biases and unit norms would hide errors."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def pixels_of(ids):
    """Return a boolean mask (B, 1, H, W) of the pixels of patches `ids` (B, n)."""
    patches = torch.zeros(len(ids), N).scatter(1, ids, 1).bool().reshape(-1, 1, *GRID)
    return patches.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


@pytest.mark.parametrize("dim, grid", [(32, (4, 4)), (16, (3, 5)), (20, (5, 2))])
def test_positions_equal_a_plain_loop(dim, grid):
    table = sincos_position_embedding(dim, grid)
    assert table.shape == (1, 1 + math.prod(grid), dim) and not table[0, 0].any(), "zero for the class token"
    assert torch.equal(ViT([5 * n for n in grid], 5, dim=dim, depth=1, heads=1).pos_embed, table)
    for i, got in enumerate(table[0, 1:]):
        row, column = divmod(i, grid[1])
        angles = [[position / 10000 ** (k / (dim // 4)) for k in range(dim // 4)] for position in (column, row)]
        expected = [function(a) for some in angles for function in (math.sin, math.cos) for a in some]
        torch.testing.assert_close(got, torch.tensor(expected))


@torch.no_grad()
def test_drop_path_skips_branches_of_single_images():
    torch.manual_seed(0)
    block, x = randomize(Block(8, 2, drop_path=0.5)), torch.randn(40, 5, 8)
    out = block(x)
    after_attention = [x, x + 2 * block.attn(block.norm1(x))]  # kept branches are scaled by 1 / (1 - 0.5)
    outcomes = [y + scale * block.mlp(block.norm2(y)) for y in after_attention for scale in (0, 2)]
    fits = torch.stack([torch.isclose(out, y, atol=1e-5).flatten(1).all(dim=1) for y in outcomes])  # (4, B)
    assert fits.any(dim=0).all() and fits.any(dim=1).all(), "each image has one outcome, and each outcome occurs"
    assert [block.drop_path.p for block in small_vit(drop_path=0.3).blocks] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_initial_weights():
    for module in small_vit().modules():
        if isinstance(module, nn.Linear | nn.Conv2d):  # Xavier-uniform; the convolution as a linear layer
            bound = math.sqrt(6 / sum(module.weight.flatten(1).shape))
            assert 0.9 * bound < module.weight.abs().max() <= bound and not module.bias.any()


@torch.no_grad()
def test_encoder_equals_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(32, 8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=256)
    theirs.heads = nn.Identity()  # returns the class token
    ours, images, encoder = ViT((32, 32), 8, dim=64, depth=3, heads=4), random_images(size=(32, 32)), theirs.encoder
    layers = [weight for part in (theirs.conv_proj, encoder.layers, encoder.ln) for weight in part.parameters()]
    weights = [theirs.class_token, encoder.pos_embedding, *layers]  # in the order of ours
    for weight, parameter in zip(weights, randomize(ours).parameters(), strict=True):
        weight.copy_(parameter)
    torch.testing.assert_close(ours.eval()(images).tokens[:, 0], theirs.eval()(images), atol=2e-5, rtol=0)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("ptr", [PTR((0, 2, 3), 0.3), PTR((1,), 0.5, "reverse")])
@torch.no_grad()
def test_encoder_of_some_patches_with_ptr_and_taps_equals_a_plain_loop(ptr, class_token):
    torch.manual_seed(0)
    vit, images, ids = randomize(small_vit()), random_images(), random_ids(3, 40)
    encoded = vit(images, ids, class_token=class_token, ptr=ptr, taps=(1, 3))
    assert set(encoded.tapped) == {1, 3}
    for i, retained in enumerate(ids):
        prefix = (vit.cls_token[0] + vit.pos_embed[0, :1])[: int(class_token)]
        x = vit.patch_embed.proj(images[i]).flatten(1).mT[retained] + vit.pos_embed[0, 1:][retained]
        for j, block in enumerate(vit.blocks):
            tokens = block(torch.cat([prefix, x])[None])[0]
            if j in encoded.tapped:
                torch.testing.assert_close(encoded.tapped[j][0][i], tokens, atol=2e-5, rtol=0)
                assert torch.equal(encoded.tapped[j][1][i], retained)
            prefix, x = tokens[: len(prefix)], tokens[len(prefix) :]
            if j in ptr.blocks:
                kept = select_tokens(x[None], num_kept(len(x), ptr.drop_ratio), ptr.criterion)[0]
                x, retained = x[kept], retained[kept]
        torch.testing.assert_close(encoded.tokens[i], vit.norm(torch.cat([prefix, x])), atol=2e-5, rtol=0)
        assert torch.equal(encoded.patch_ids[i], retained)


def test_usual_sizes_have_as_many_parameters_as_timms():
    sizes = dict(tiny=5_524_416, small=21_665_664, base=85_798_656, large=303_301_632, huge=630_764_800)
    for name, parameters in sizes.items():
        with torch.device("meta"):
            vit = ViT(patch_size=14 if name == "huge" else 16, **MODELS[f"vit_{name}"])
        assert sum(p.numel() for p in vit.parameters()) == parameters, name


@torch.no_grad()
def test_decoder_predicts_queried_positions_in_any_order():
    torch.manual_seed(0)
    decoder = randomize(Decoder(GRID, 32, 24, 2, 3, 40))
    tokens, (visible, queried) = torch.randn(2, 1 + 7, 32), random_ids(2, 12).split([7, 5], dim=1)
    prediction, flipped = decoder(tokens, visible, queried), torch.cat([tokens[:, :1], tokens[:, 1:].flip(1)], dim=1)
    torch.testing.assert_close(decoder(flipped, visible.flip(1), queried.flip(1)), prediction.flip(1))
    for other in (decoder(tokens, visible.flip(1), queried), prediction.flip(1)):  # at other positions
        assert (other - prediction).abs().max() > 1e-3


@pytest.mark.parametrize("mask_ratio, num_visible", [(0.75, 49), (0.85, 29), (0.9, 19)])
def test_split(mask_ratio, num_visible):
    noise = torch.rand(5, 196)
    visible, masked = split_patches(noise, mask_ratio)
    assert visible.shape == (5, num_visible) and masked.shape == (5, 196 - num_visible)
    for image, *ids in zip(noise.tolist(), visible.tolist(), masked.tolist(), strict=True):
        assert sum(ids, []) == sorted(range(196), key=image.__getitem__), "a partition by the noise"


def test_who_sees_what():
    model, noise, images = randomize(small_pcae()), torch.rand(3, N), random_images().requires_grad_()
    assert not any(p.requires_grad for p in model.teacher.parameters())
    model.teacher.requires_grad_(True)  # still without a gradient
    out = model(images, noise)
    out.loss.backward()
    for name, p in model.named_parameters():
        trains = not name.startswith("teacher.") and not name.endswith("pos_embed")
        assert (p.grad is not None and p.grad.any()) == trains, name
    student_saw = images.grad.any(dim=1, keepdim=True)
    assert torch.equal(student_saw, pixels_of(out.visible)) and torch.equal(~student_saw, pixels_of(out.masked))


def test_target_is_the_normalised_retained_latents():
    model, images = randomize(small_pcae()), random_images()
    out = model(images)
    latent, retained, _ = model.teacher(images, out.masked, class_token=False, ptr=PTR((0, 2), 0.5))  # 45, 22, 11
    assert torch.equal(out.retained, retained) and out.target.shape == out.prediction.shape == (3, 11, 32)
    expected = (latent - latent.mean(dim=-1, keepdim=True)) / latent.std(dim=-1, keepdim=True, correction=0)
    torch.testing.assert_close(out.target, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(out.loss, cosine_loss(out.prediction, out.target)), "only over retained tokens"
    assert not torch.equal(out.visible[0], out.visible[1]) and not torch.equal(out.visible, model(images).visible)


def test_cosine_loss():
    target, other, lengths = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.rand(2, 5, 1) + 0.5
    for prediction, loss in ((target, 0), (-target, 2)):
        assert cosine_loss(lengths * prediction, target).item() == pytest.approx(loss, abs=1e-6), "lengths do not count"
    half = target.bfloat16(), other.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):  # still computed in float32
        assert cosine_loss(*half).item() == pytest.approx(cosine_loss(*(x.float() for x in half)).item(), abs=1e-6)


def test_only_the_student_has_drop_path():
    model, images, noise = small_pcae(drop_path=0.5), random_images(), torch.rand(3, N)
    for mode in (True, False, True):  # a new model is in training mode
        first, second = model(images, noise), model(images, noise)
        assert torch.equal(first.target, second.target) and torch.equal(first.prediction, second.prediction) != mode
        model.train(not mode)


def test_update_teacher():
    model = small_pcae()
    pairs = list(zip(model.student.parameters(), model.teacher.parameters(), strict=True))
    for _ in range(100):
        model.update_teacher(0.9)
    assert all(torch.equal(*pair) for pair in pairs), "the teacher starts as a copy, and equal weights stay equal"
    before = [teacher.clone() for _, teacher in pairs]
    after = [student.detach().clone() for student in randomize(model.student).parameters()]
    model.update_teacher(0.9)
    for (student, teacher), old, new in zip(pairs, before, after, strict=True):
        torch.testing.assert_close(teacher, 0.9 * old + 0.1 * new)
        assert torch.equal(student, new), "the student does not change"


@pytest.mark.parametrize("by, frozen", [("mean", False), ("mean", True), ("class", False), ("class", True)])
@torch.no_grad()
def test_classifier_by_formula(by, frozen):
    torch.manual_seed(0)
    model, images = randomize(Classifier(small_vit(drop_path=0.5), 7, pool=by, frozen=frozen)).eval(), random_images()
    if frozen:
        model.fc_norm.running_mean.normal_()
        model.fc_norm.running_var.copy_(10 ** torch.linspace(-6, 1, 32))
    assert isinstance(model.encoder.norm, nn.Identity) == (by == "mean" and not frozen)
    for ptr in (PTR(), PTR((0, 2), 0.3)):
        tokens, norm = model.encoder(images, ptr=ptr).tokens, model.fc_norm
        x = tokens[:, 1:].mean(dim=1) if by == "mean" else tokens[:, 0]
        if frozen:
            x = (x - norm.running_mean) / (norm.running_var + 1e-6).sqrt()
        elif by == "mean":
            x = F.layer_norm(x, (32,), norm.weight, norm.bias, 1e-6)
        torch.testing.assert_close(model(images, ptr), x @ model.head.weight.T + model.head.bias, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(images, PTR((0, 2), 0.0)), model(images)), "a drop ratio of 0 is the identity"


@pytest.mark.parametrize("by, frozen", [("mean", False), ("mean", True), ("class", False), ("class", True)])
def test_trained_parameters_of_the_classifier(by, frozen):
    model, images = Classifier(small_vit(drop_path=0.5), 7, pool=by, frozen=frozen), random_images(20)
    assert 0 < model(images).abs().max() < 1e-3, "logits start at zero"
    F.cross_entropy(randomize(model)(images, PTR((0, 2), 0.3)), torch.arange(20) % 7).backward()
    for name, p in model.named_parameters():
        trains = name.startswith("head.") or not frozen
        assert p.requires_grad == trains and (p.grad is not None and p.grad.any()) == trains, name
    assert torch.equal(model.encoder(images).tokens, model.train().encoder(images).tokens) == frozen, "no drop path"


@pytest.mark.parametrize(
    "impossible",
    [
        lambda: small_vit(image_size=(25, 40)),
        lambda: small_vit(image_size=(24, 41)),
        lambda: small_vit(patch_size=0),
        lambda: small_vit(image_size=(0, 40)),
        lambda: small_vit(heads=5),
        lambda: small_vit(dim=30, heads=3),
        lambda: small_vit()(torch.zeros(1, 3, 40, 24)),
        lambda: PCAE(small_vit(), decoder_dim=24, decoder_heads=5),
        lambda: PCAE(small_vit(), ptr=PTR((4,), 0.5)),
        lambda: PCAE(small_vit(), ptr=PTR((0, 1, 2), 0.8)),
        lambda: PCAE(small_vit(), mask_ratio=-0.1),
        lambda: PCAE(small_vit(), mask_ratio=0.0),
        lambda: PCAE(small_vit(), mask_ratio=0.999),
        lambda: PCAE(small_vit(), mask_ratio=math.nan),
    ],
)
def test_invalid_values(impossible):
    with pytest.raises(ValueError):
        impossible()
