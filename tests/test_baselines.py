"""MAE and SimMIM: against plain computations of their papers' words, who sees which pixels, and as runs."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import engine
import finetune
import pretrain
from baselines import MAE, SimMIM
from engine import UserError
from helpers import assert_close_runs, assert_same_run, flags, identical, interrupt, load, log, torchrun
from model import ViT, load_encoder
from test_model import capture, pixels_of, random_images, randomize, small_vit

PATCH, ROWS, COLUMNS, N, VISIBLE = 4, 6, 10, 60, 15

TINY = dict(
    limit=64, batch_size=16, epochs=2, warmup_epochs=1, lr=1e-3, image_size=16, patch_size=4, dim=16, depth=2, heads=2,
    knn_every=0, device="cpu",
)  # fmt: skip
THREE_STEPS = dict(epochs=1, warmup_epochs=0, limit=50, clip_grad=1000)  # nothing is clipped
METHODS = {"mae": TINY | dict(method="mae", decoder_dim=16, decoder_heads=2), "simmim": TINY | dict(method="simmim")}


def small(method, **changes):
    """A model whose biases, norms and tokens are not what they start from."""
    torch.manual_seed(0)
    options = dict(decoder_dim=24, decoder_depth=2, decoder_heads=3) if method is MAE else {}
    return randomize(method(small_vit(**changes), **options))


def cut(images):
    """Patches of images, one after the other, by plain loops: (B, C, 24, 40) -> (B, N, C p p)."""
    rows, columns = range(0, 24, PATCH), range(0, 40, PATCH)
    return torch.stack([images[:, :, y : y + PATCH, x : x + PATCH].flatten(1) for y in rows for x in columns], dim=1)


def train(out, settings, **changes):
    pretrain.main(flags(settings | dict(out=out) | changes))


# --- the papers' words, computed plainly ------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_mae(channels):
    model, noise = small(MAE, channels=channels), torch.rand(3, N)
    images = random_images(channels=channels) * 2 + 1
    out = model(images, noise)
    seen = noise < noise.sort(dim=1).values[:, VISIBLE : VISIBLE + 1]  # (B, N)

    # The whole grid in its own order, as MAE's decoder has it: latents where patches are visible, else mask tokens.
    decoder, latents = model.decoder, model.student(images, out.visible).tokens
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
    assert out.loss.item() == pytest.approx((error[~seen].sum() / (~seen).sum()).item(), rel=1e-5)
    assert predicted.shape[-1] == channels * PATCH**2
    for i in range(3):
        assert torch.allclose(out.prediction[i], predicted[i, out.masked[i]], atol=1e-5)
        assert torch.allclose(out.target[i], target[i, out.masked[i]], atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_simmim(channels):
    model, noise = small(SimMIM, channels=channels), torch.rand(3, N)
    images = random_images(channels=channels) * 2 + 1
    out = model(images, noise)
    hidden = (noise >= noise.sort(dim=1).values[:, VISIBLE : VISIBLE + 1])[..., None]  # (B, N, 1)

    # All patches embedded by the convolution, the masked ones' embeddings replaced, in the grid's own order.
    vit = model.student
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = torch.where(hidden, model.decoder.mask_token, x)
    x = torch.cat([vit.cls_token.expand(3, -1, -1), x], dim=1) + vit.pos_embed
    for block in vit.blocks:
        x = block(x)
    predicted = model.decoder.pred(vit.norm(x)[:, 1:])

    # As in the paper: the L1 distance in the image, under the mask, per number.
    picture = F.fold(predicted.transpose(1, 2), (24, 40), PATCH, stride=PATCH)
    mask = hidden.reshape(3, 1, ROWS, COLUMNS).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    loss = ((picture - images).abs() * mask).sum() / (mask.sum() * channels)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for i in range(3):
        assert torch.allclose(out.prediction[i], predicted[i, out.masked[i]], atol=1e-5)
        assert torch.equal(out.target[i], cut(images)[i, out.masked[i]])


# --- who sees what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [MAE, SimMIM])
def test_encoders_do_not_see_masked_pixels(method):
    model, images, noise = small(method), random_images(), torch.rand(3, N)
    latents = capture(model.student.norm, lambda inputs, output: output)
    out, other = model(images, noise), random_images(seed=1)
    hidden = model(torch.where(pixels_of(out.masked), other, images), noise)
    seen = model(torch.where(pixels_of(out.visible), other, images), noise)
    assert latents[0].shape[1] == 1 + {MAE: VISIBLE, SimMIM: N}[method]
    assert torch.equal(latents[0], latents[1]) and torch.equal(out.prediction, hidden.prediction)
    assert not torch.equal(latents[0], latents[2]) and not torch.equal(out.prediction, seen.prediction)


@pytest.mark.parametrize("method", [MAE, SimMIM])
def test_targets_do_not_see_visible_pixels(method):
    model, images, noise = small(method), random_images(), torch.rand(3, N)
    out, other = model(images, noise), random_images(seed=1)
    assert torch.equal(out.target, model(torch.where(pixels_of(out.visible), other, images), noise).target)
    assert not torch.equal(out.target, model(torch.where(pixels_of(out.masked), other, images), noise).target)


@pytest.mark.parametrize("method", [MAE, SimMIM])
def test_the_split(method):
    model, images, noise = small(method), random_images(), torch.rand(3, N)
    out = model(images, noise)
    for row, visible, masked in zip(noise.tolist(), out.visible.tolist(), out.masked.tolist(), strict=True):
        assert visible + masked == sorted(range(N), key=row.__getitem__) and len(visible) == VISIBLE
    assert not torch.equal(model(images).masked, model(images).masked), "drawn anew by default"


@pytest.mark.parametrize("method", [MAE, SimMIM])
def test_gradients_reach_everything(method):
    model = small(method)
    model(random_images(), torch.rand(3, N)).loss.backward()
    for name, parameter in model.named_parameters():
        assert name.endswith("pos_embed") or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("method", [MAE, SimMIM])
@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.0, 0.999, math.nan])
def test_mask_ratios_that_leave_nothing(method, ratio):
    with pytest.raises(ValueError, match="--mask-ratio"):
        method(small_vit(), mask_ratio=ratio)


def test_initial_weights_of_the_pixel_head():
    head = SimMIM(small_vit(dim=64)).decoder
    assert head.mask_token.std().item() == pytest.approx(0.02, rel=0.3) and not head.pred.bias.any()
    bound = math.sqrt(6 / (64 + 3 * PATCH**2))  # Xavier
    assert 0.9 * bound < head.pred.weight.abs().max() <= bound


def test_bf16_losses_are_float32():
    for method in (MAE, SimMIM):
        with torch.autocast("cpu", torch.bfloat16):
            out = small(method)(random_images(), torch.rand(3, N))
        assert out.loss.dtype == out.prediction.dtype == out.target.dtype == torch.float32


# --- pretrain.py --method ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory):
    """The name, settings and folder of a finished run; for reading."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    train(out, METHODS[request.param])
    return request.param, METHODS[request.param], out


def test_checkpoint_and_log(run):
    method, _, out = run
    checkpoint = load(out)
    assert checkpoint["method"] == checkpoint["config"]["method"] == method
    assert {"student", "decoder", "optimizer"} <= checkpoint.keys() and "teacher" not in checkpoint
    assert ("mask_token" in checkpoint["decoder"]) and checkpoint["step"] == 8
    assert [row["epoch"] for row in log(out)] == [1, 2] and not any("ema" in row for row in log(out))


def test_learns_to_predict(run, tmp_path):
    _, settings, _ = run
    train(tmp_path, settings, epochs=40, lr=5e-3)
    first, *_, last = (row["loss"] for row in log(tmp_path))
    assert last < 0.75 * first


def test_resumed_is_uninterrupted(run, monkeypatch, tmp_path):
    method, settings, out = run
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, pretrain.Trainer, "train_step", 6)
        train(tmp_path / "run", settings)
    with pytest.raises(UserError, match=f"--method {method} there, pcae here"):
        train(tmp_path / "run", {}, method="pcae", resume=True)
    train(tmp_path / "run", {}, resume=True)  # which method it was, the checkpoint says
    assert_same_run(out, tmp_path / "run")


def test_micro_batches_equal_the_batch(run, tmp_path):
    _, settings, _ = run
    train(tmp_path / "whole", settings, **THREE_STEPS)
    train(tmp_path / "parts", settings, **THREE_STEPS, micro_batch=4)
    assert_close_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder of runs in two processes."""
    folder = tmp_path_factory.mktemp("two")
    return torchrun(folder, __file__, folder)


def test_two_processes_equal_one(run, two_processes, tmp_path):
    method, settings, _ = run
    train(tmp_path, settings, **THREE_STEPS)
    assert_close_runs(tmp_path, two_processes / method)


def test_finetune_takes_the_encoder(run, tmp_path, capsys):
    _, _, out = run
    settings = dict(limit=64, batch_size=16, epochs=1, warmup_epochs=0, device="cpu")
    finetune.main(flags(settings | dict(init=out / "last.pt", out=tmp_path, lr=1e-9)))
    words = capsys.readouterr().out
    assert "0 missing" in words and "0 left over" in words
    checkpoint, student = load(out), load(tmp_path)["model"]
    expected = ViT(**checkpoint["encoder"])
    expected.load_state_dict(checkpoint["student"])
    for name, tensor in expected.blocks.state_dict().items():
        assert torch.allclose(student[f"encoder.blocks.{name}"], tensor, atol=1e-6), name
    assert identical(load_encoder(checkpoint).state_dict(), expected.state_dict())
    with pytest.raises(UserError, match="weights of the student alone"):
        finetune.main(flags(settings | dict(init=out / "last.pt", weights="teacher", out=tmp_path / "x")))


@pytest.mark.parametrize("method, flag, value", [
    ("mae", "ema", 0.9), ("mae", "drop_ratio", 0.5), ("mae", "drop_blocks", 0), ("simmim", "criterion", "random"),
    ("simmim", "decoder_dim", 16), ("simmim", "drop_stages", 3), ("mae", "drop_at", "late"), ("mae", "center", True),
])  # fmt: skip
def test_flags_that_mean_nothing_to_a_method(tmp_path, method, flag, value):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} means nothing to --method {method}"):
        train(tmp_path / "run", TINY, method=method, **{flag: value})
    assert not (tmp_path / "run").exists()


def test_the_recipe_of_mae():
    args, _ = pretrain.read_settings(["--recipe", "mae"])
    fair, _ = pretrain.read_settings(["--recipe", "imagenet", "--method", "mae"])
    assert (args.method, args.decoder_depth, args.decoder_dim, args.batch_size) == ("mae", 8, 512, 4096)
    assert (fair.method, fair.decoder_depth) == ("mae", 2)
    different = copy.copy(vars(args)) | dict(decoder_depth=2, recipe="imagenet")
    assert different == vars(fair)


def test_runs_say_what_they_are(run, capsys, tmp_path):
    method, settings, _ = run
    pretrain.main(flags(settings | dict(out=tmp_path, dry_run=True)))
    words = capsys.readouterr().out
    tokens = {"mae": "student: 4 visible + class token; decoder: all 16", "simmim": "4 visible + 12 mask tokens"}
    assert f"by {method}:" in words and tokens[method] in words


# --- run by torchrun in two processes ---------------------------------------------------------------------------------


def worker(folder):
    world = engine.start_world("cpu")
    engine.start_world = lambda device: world  # joined already
    for method, settings in METHODS.items():
        pretrain.main(flags(settings | THREE_STEPS | dict(out=folder / method)))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
