"""MAE and SimMIM equal plain computations after their papers; encoder and target see the right pixels."""

import math

import pytest
import torch
import torch.nn.functional as F

from baselines import MAE, SimMIM
from test_model import GRID, PATCH, SIZE, N, pixels_of, random_images, randomize, small_vit

VISIBLE = 15  # of 60 patches


def small(method, channels=3):
    """Build a model with random biases, norms and tokens."""
    torch.manual_seed(0)
    options = dict(decoder_dim=24, decoder_depth=2, decoder_heads=3) if method is MAE else {}
    return randomize(method(small_vit(channels=channels), **options))


def cut(images):
    """Cut images into patches by plain loops: (B, C, H, W) -> (B, N, C p p)."""
    corners = [(y, x) for y in range(0, SIZE[0], PATCH) for x in range(0, SIZE[1], PATCH)]
    return torch.stack([images[:, :, y : y + PATCH, x : x + PATCH].flatten(1) for y, x in corners], dim=1)


def hidden_by(noise):
    """Return which patches the noise masks, boolean (B, N)."""
    return noise >= noise.sort(dim=1).values[:, VISIBLE : VISIBLE + 1]


both = pytest.mark.parametrize("method", [MAE, SimMIM])


@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_mae(channels):
    model, noise, images = small(MAE, channels), torch.rand(3, N), random_images(channels=channels) * 2 + 1
    out, decoder, hidden = model(images, noise), model.decoder, hidden_by(noise)

    # The whole grid in row-major order, as in MAE's decoder: latents of visible patches, else mask tokens.
    latents = model.student(images, out.visible).tokens
    grid = decoder.mask_token.repeat(3, N, 1)
    for i in range(3):
        for latent, patch in zip(latents[i, 1:], out.visible[i].tolist(), strict=True):
            grid[i, patch] = decoder.embed(latent)
    x = torch.cat([decoder.embed(latents[:, :1]), grid], dim=1) + decoder.pos_embed
    for block in decoder.blocks:
        x = block(x)
    predicted = decoder.pred(decoder.norm(x))[:, 1:]  # (B, N, C p p)

    pixels = cut(images)
    target = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    error = (predicted - target).square().mean(-1)  # (B, N)
    assert out.loss.item() == pytest.approx((error[hidden].sum() / hidden.sum()).item(), rel=1e-5)
    for i in range(3):
        torch.testing.assert_close(out.prediction[i], predicted[i, out.masked[i]], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.target[i], target[i, out.masked[i]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_simmim(channels):
    model, noise, images = small(SimMIM, channels), torch.rand(3, N), random_images(channels=channels) * 2 + 1
    out, hidden = model(images, noise), hidden_by(noise)[..., None]  # (B, N, 1)

    # All patches in row-major order, embedded by the convolution; embeddings of masked patches are replaced.
    vit = model.student
    x = torch.where(hidden, model.decoder.mask_token, vit.patch_embed.proj(images).flatten(2).mT)
    x = torch.cat([vit.cls_token.expand(3, -1, -1), x], dim=1) + vit.pos_embed
    for block in vit.blocks:
        x = block(x)
    predicted = model.decoder.pred(vit.norm(x)[:, 1:])

    # As in the paper: the L1 distance in the image, under the mask, per number.
    picture = F.fold(predicted.mT, SIZE, PATCH, stride=PATCH)
    mask = hidden.reshape(3, 1, *GRID).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    loss = ((picture - images).abs() * mask).sum() / (mask.sum() * channels)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for i in range(3):
        torch.testing.assert_close(out.prediction[i], predicted[i, out.masked[i]], atol=1e-5, rtol=1e-5)
        assert torch.equal(out.target[i], cut(images)[i, out.masked[i]])


@both
def test_who_sees_what(method):
    model, images, noise = small(method), random_images().requires_grad_(), torch.rand(3, N)
    out = model(images, noise)
    for row, visible, masked in zip(noise.tolist(), out.visible.tolist(), out.masked.tolist(), strict=True):
        assert visible + masked == sorted(range(N), key=row.__getitem__) and len(visible) == VISIBLE
    (seen,) = torch.autograd.grad(out.prediction.square().sum(), images, retain_graph=True)
    assert torch.equal(seen.any(dim=1, keepdim=True), pixels_of(out.visible))
    (asked,) = torch.autograd.grad(out.target.pow(3).sum(), images, retain_graph=True)
    assert torch.equal(asked.any(dim=1, keepdim=True), pixels_of(out.masked))
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert name.endswith("pos_embed") or parameter.grad.any(), name
    assert not torch.equal(model(images).masked, model(images).masked), "the default noise differs per call"


@both
def test_targets_and_losses_are_float32(method):
    with torch.autocast("cpu", torch.bfloat16):
        out = small(method)(random_images(), torch.rand(3, N))
    assert out.loss.dtype == out.prediction.dtype == out.target.dtype == torch.float32


def test_initial_weights_of_the_pixel_head():
    head = SimMIM(small_vit(dim=64)).decoder
    assert head.mask_token.std().item() == pytest.approx(0.02, rel=0.4) and not head.pred.bias.any()
    assert head.pred.weight.std().item() == pytest.approx(math.sqrt(2 / (64 + 3 * PATCH**2)), rel=0.1)  # Xavier


@both
@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.0, 0.999, math.nan])
def test_invalid_mask_ratios(method, ratio):
    with pytest.raises(ValueError):
        method(small_vit(), mask_ratio=ratio)
