"""The fine-tuning script: training, resuming, few labels, other protocols, evaluation with PTR, export, bad input.

Nearly all tests call `finetune.main` in this process with a tiny model. At the end of this file: what torchrun runs in
two processes.
"""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import engine
import finetune
import model
import pretrain
from engine import UserError
from helpers import (
    ROOT,
    assert_same_run,
    contents,
    flags,
    identical,
    interrupt,
    load,
    log,
    run_process,
    score_few,
    tensors,
    torchrun,
    wrap,
    write_classes,
    write_images,
)  # fmt: skip
from model import Classifier, ViT
from ptr import PTR

# 4 steps an epoch, 8 in all.
SIZES = dict(image_size=16, patch_size=4, dim=16, depth=2, heads=2)
TINY = dict(limit=64, batch_size=16, epochs=2, warmup_epochs=1, lr=1e-3, device="cpu")
SCRATCH = TINY | SIZES | dict(init="none")
# Everything that draws random numbers while training.
RANDOM = SCRATCH | dict(
    epochs=3, drop_path=0.3, min_crop=0.5, rand_augment=9, erasing=0.5, mixup=0.8, cutmix=1.0, drop_ratio=0.3,
    drop_blocks=0, criterion="random",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def few_images_to_score():
    with pytest.MonkeyPatch.context() as patch:
        score_few(patch, 50)
        yield


def train(out, settings=SCRATCH, **changes):
    """Run the script in this process; returns the checkpoint."""
    finetune.main(flags(settings | {"out": out} | changes))
    return load(out)


def run(*words, **settings):
    finetune.main([*map(str, words), *flags(settings)])


def interrupted(out, settings, *moment):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, *moment)
        train(out, settings)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pre-trained checkpoint."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    settings = TINY | SIZES | dict(ema=0.9, decoder_dim=16, decoder_heads=2, drop_stages=2, knn_every=0)
    pretrain.main(flags(settings | dict(out=out)))
    return out / "last.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run; for reading."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(out)
    return out


def scored(path, images="shapes", **settings):
    """A checkpoint's logits and labels on the validation images, computed here and plainly."""
    checkpoint = torch.load(path, weights_only=True)
    encoder, num_classes = ViT(**checkpoint["encoder"]), len(checkpoint["classes"])
    classifier = Classifier(encoder, num_classes, pool=checkpoint["pool"], **settings)
    classifier.load_state_dict(checkpoint["model"])
    val = data.validation_images(images, Path("data"), False, checkpoint["encoder"]["image_size"])
    views = torch.stack([val[i][0] for i in range(len(val))])
    with torch.no_grad():
        return classifier.eval()(data.Normalize()(views)), torch.tensor(data.labels_of(val))


# --- a run ------------------------------------------------------------------------------------------------------------


def test_run_folder_and_checkpoints(finished):
    assert {path.name for path in finished.iterdir()} == {"args.json", "metrics.jsonl", "last.pt", "best.pt"}
    last, best = (torch.load(finished / name, weights_only=True) for name in ("last.pt", "best.pt"))
    assert last.keys() == {
        "method", "config", "encoder", "pool", "classes", "num_images", "epoch", "history", "model", "optimizer",
        "step", "skipped", "skipped_in_a_row", "unreadable",
    }  # fmt: skip
    assert last.keys() - best.keys() == {"optimizer"}
    assert (last["method"], last["epoch"], last["step"], last["num_images"]) == ("finetune", 2, 8, 64)
    assert last["config"] == json.loads((finished / "args.json").read_text()) and last["history"] == log(finished)
    assert last["classes"] == list(data.Shapes.classes)
    top = max(row["top1"] for row in log(finished))
    assert best["history"][-1]["top1"] == top


def test_log(finished):
    rows = log(finished)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 4), (2, 8)]
    for row in rows:
        assert list(row) == [
            "epoch", "step", "loss", "lr", "grad_norm", "skipped", "images_per_second", "data_wait", "val_loss", "top1",
            "top5",
        ]  # fmt: skip
        assert row["loss"] > 0 and 0 <= row["top1"] <= row["top5"] <= 1
    logits, labels = scored(finished / "last.pt")
    assert rows[-1]["top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    in_five = [label in row.argsort(descending=True)[:5] for row, label in zip(logits, labels, strict=True)]
    assert rows[-1]["top5"] == pytest.approx(sum(in_five) / len(in_five))
    assert rows[-1]["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


def test_the_rate_of_each_layer(finished):
    """With the default decay of .75 and two blocks: tokens .75^3, blocks .75^2 and .75, head 1."""
    checkpoint = load(finished)
    groups = checkpoint["optimizer"]["param_groups"]
    rate = log(finished)[-1]["lr"]
    assert sorted({round(group["lr"] / rate, 6) for group in groups}) == [0.421875, 0.5625, 0.75, 1]
    assert all(group["betas"] == (0.9, 0.999) and group["weight_decay"] in (0, 0.05) for group in groups)


def test_overfits_32_images(tmp_path, monkeypatch):
    """All that is in the way of learning would show here."""
    train_images = data.Shapes("train", 32, (16, 16))
    monkeypatch.setattr(data, "validation_images", lambda *_, **__: train_images)
    settings = SCRATCH | dict(limit=32, batch_size=32, epochs=120, warmup_epochs=5, dim=32, heads=4, smoothing=0)
    train(tmp_path, settings, lr=4e-3)
    assert log(tmp_path)[-1]["top1"] == 1.0 and log(tmp_path)[-1]["loss"] < 0.05
    logits, labels = scored(tmp_path / "best.pt")
    assert torch.equal(logits.argmax(dim=1), labels)


def test_starts_from_the_weights_of_init(monkeypatch, tmp_path, pretrained, capsys):
    source = torch.load(pretrained, weights_only=True)
    assert not identical(source["student"], source["teacher"])

    def check(weights):
        def look(args, trainer, *_):
            own = trainer.model.encoder.state_dict()
            assert all(torch.equal(own[name], source[weights][name]) for name in own)
            raise KeyboardInterrupt

        return look

    for weights in ("student", "teacher"):
        monkeypatch.setattr(finetune, "describe_run", check(weights))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, TINY | dict(init=pretrained, weights=weights))
        assert "30 of 30 tensors matched; 0 missing; 0 left over" in capsys.readouterr().out


def test_the_best_of_equals_is_the_last(tmp_path, capsys):
    train(tmp_path, lr=1e-12)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 2
    assert "after epoch 2." in capsys.readouterr().out


def test_smoothing_and_mixing_in_the_loss(monkeypatch, tmp_path):
    """The loss of a step against one computed by hand from what the model got and gave."""
    seen = []
    forward = Classifier.forward

    def record(classifier, images):
        logits = forward(classifier, images)
        if classifier.training:
            seen.append((images, logits.detach()))
        return logits

    monkeypatch.setattr(Classifier, "forward", record)
    monkeypatch.setattr(finetune.Trainer, "seconds_per_step", lambda self: 0.0)
    steps, targets = [], []
    honest = finetune.mixing

    def mixing(*args):
        mix = honest(*args)
        if mix is None:
            return None

        def remember(images, labels):
            images, labels = mix(images, labels)
            targets.append(labels)
            return images, labels

        return remember

    monkeypatch.setattr(finetune, "mixing", mixing)
    step = finetune.Trainer.train_step
    monkeypatch.setattr(finetune.Trainer, "train_step", lambda *args: steps.append(step(*args)) or steps[-1])
    train(tmp_path, smoothing=0.2, mixup=0.8, cutmix=1.0)
    assert len(seen) == len(steps) == len(targets) == 8
    for (_, logits), result, soft in zip(seen, steps, targets, strict=True):
        assert torch.allclose(soft.sum(dim=1), torch.ones(16)) and (soft >= 0).all()
        smooth = 0.8 * soft + 0.2 / 10
        expected = -(smooth * logits.log_softmax(dim=1)).sum(dim=1).mean()
        assert result["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 7, 8])
def test_mixing(size):
    """MixUp or CutMix, one for each batch, odd ones too: targets are shares of two labels that sum to 1."""
    images = torch.arange(size).float()[:, None, None, None].expand(size, 3, 16, 16).contiguous()
    labels = torch.arange(size)
    torch.manual_seed(0)
    mix, kinds = finetune.mixing(0.8, 1.0, 10), set()
    for _ in range(40):
        mixed, targets = mix(images, labels)
        assert mixed.shape == images.shape and targets.shape == (size, 10)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(size))
        partners = labels.roll(1)
        for i in range(size):  # an image is as much of its partner as its label is
            share = targets[i, labels[i]] if partners[i] != labels[i] else torch.tensor(1.0)
            blend = share * labels[i] + (1 - share) * partners[i]
            assert mixed[i].mean().item() == pytest.approx(blend.item(), abs=1e-3)
        kinds.add(len(mixed[0].unique()) <= 2 and mixed[0].unique().tolist() <= [0.0, size - 1.0])
    assert size == 1 or kinds == {True, False}  # CutMix leaves pixels as they are, MixUp none
    assert finetune.mixing(0, 0, 10) is None
    for alphas, kind in (((0.8, 0), "MixUp"), ((0, 1), "CutMix")):
        (only,) = finetune.mixing(*alphas, 10).transforms
        assert type(only).__name__ == kind and only.alpha == max(alphas)


def test_an_odd_batch_with_everything(tmp_path, monkeypatch):
    views = []
    wrap(monkeypatch, data, "finetuning_view", before=lambda *settings: views.append(settings))
    checkpoint = train(tmp_path, RANDOM, batch_size=9, limit=50)
    assert views == [((16, 16), 0.5, 9, 0.5)]
    assert checkpoint["step"] == 15 and all(math.isfinite(row["loss"]) for row in log(tmp_path))


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(out, RANDOM)
    return out


MOMENTS = {
    "step": (finetune.Trainer, "train_step", 6),
    "scoring": (engine, "predict", 1),
    "writing the best": (engine, "save_checkpoint", 3),
    "after the checkpoint": (finetune, "describe_epoch", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_is_uninterrupted(tmp_path, uninterrupted, moment):
    interrupted(tmp_path / "run", RANDOM, *MOMENTS[moment])
    train(tmp_path / "run", {}, resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)
    best, theirs = (torch.load(folder / "best.pt", weights_only=True) for folder in (tmp_path / "run", uninterrupted))
    assert identical(best["model"], theirs["model"]) and best["epoch"] == theirs["epoch"]


def test_resumed_without_the_file_of_init(tmp_path, pretrained):
    init = shutil.copy(pretrained, tmp_path / "init.pt")
    settings = TINY | dict(init=init, linear_probe=True, epochs=3)
    train(tmp_path / "whole", settings)
    interrupted(tmp_path / "run", settings, finetune.Trainer, "train_step", 6)
    Path(init).unlink()
    train(tmp_path / "run", {}, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_same_command_with_resume(finished, tmp_path):
    """All flags again, sizes included, and a flag that changes nothing."""
    shutil.copytree(finished, tmp_path / "run")
    train(tmp_path / "run", SCRATCH, resume=True, workers=1)
    assert_same_run(tmp_path / "run", finished)


def test_resume_refuses_other_settings_and_the_best(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(UserError, match="--mixup 0.0 there, 0.5 here"):
        run(out=tmp_path / "run", resume=True, mixup=0.5)
    with pytest.raises(UserError, match="choose one of --eval and --resume"):
        run(out=tmp_path / "run", resume=True, eval=tmp_path / "run" / "best.pt")
    with pytest.raises(UserError, match="best.pt is not a checkpoint of this script that can be continued"):
        run(out=tmp_path / "run", resume=tmp_path / "run" / "best.pt")


def test_micro_batches_equal_the_batch(tmp_path):
    a, b = (train(tmp_path / str(n), SCRATCH, micro_batch=n, epochs=1, warmup_epochs=0, limit=48) for n in (16, 4))
    for name, tensor in a["model"].items():
        torch.testing.assert_close(tensor, b["model"][name], atol=1e-5, rtol=0)


# --- few labels, other data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how, count", [(dict(label_fraction=0.25), 16), (dict(labels_per_class=2), 20)])
def test_few_labels(monkeypatch, tmp_path, how, count):
    seen = []
    wrap(monkeypatch, data, "training_loader", before=lambda views, *_: seen.append(views.images))
    for seed in (0, 0, 1):
        train(tmp_path / f"{len(seen)}", SCRATCH, batch_size=4, seed=seed, limit=64, **how)
    chosen = [images.indices for images in seen]
    assert chosen[0] == chosen[1] != chosen[2]
    labels = data.labels_of(seen[0])
    assert abs(len(labels) - count) <= 5 and len(set(labels)) == 10
    assert load(tmp_path / "0")["num_images"] == len(labels)


def test_the_batch_is_no_larger_than_the_few_labels(tmp_path):
    settings = {name: value for name, value in SCRATCH.items() if name != "batch_size"}
    checkpoint = train(tmp_path, settings, labels_per_class=2, limit=None)
    assert checkpoint["config"]["batch_size"] == 20 and checkpoint["step"] == 2
    train(tmp_path, settings, labels_per_class=2, limit=None, resume=True)


def test_class_folders(tmp_path, capsys):
    folder = write_classes(tmp_path / "images")
    shutil.copytree(folder / "train" / "dog", folder / "train" / "bee")  # none of which are in val
    (folder / "val" / "cat" / "broken.jpg").write_bytes(b"no image")
    train(tmp_path / "run", SCRATCH, data=folder, limit=None, batch_size=8, per_class=True)
    text = capsys.readouterr().out
    assert "24 images of 3 classes (bee, cat, dog, ...), 17 to validate (none of bee)" in text
    assert re.search(r"bee +0 images +nan%", text) and re.search(r"cat +8 images", text)
    assert "1 unreadable images were passed over" in text
    assert text.count("skipped an unreadable image") == 1
    assert load(tmp_path / "run")["classes"] == ["bee", "cat", "dog"]
    assert log(tmp_path / "run")[-1]["top5"] == 1.0  # there are only three

    shutil.rmtree(folder / "train")  # to score, `val` is enough, and labels keep their numbers
    run(eval=tmp_path / "run" / "last.pt", per_class=True)
    assert re.search(r"dog +8 images", capsys.readouterr().out)


def test_cifar_is_read(tmp_path, monkeypatch):
    """As the other sets of torchvision's; their formats are tested in test_data.py."""

    class Few(torch.utils.data.Dataset):
        classes, targets = ["a", "b", "c"], [0, 1, 2] * 8

        def __len__(self):
            return 24

        def __getitem__(self, i):
            return torch.full((3, 32, 32), 10 * i).byte(), self.targets[i]

    asked = []
    monkeypatch.setattr(data, "torchvision_set", lambda name, split, *_: asked.append((name, split)) or Few())
    train(tmp_path, SCRATCH | dict(image_size=None, patch_size=8), data="cifar10", limit=20, batch_size=10)
    assert asked == [("cifar10", "train"), ("cifar10", "test")] and load(tmp_path)["num_images"] == 20
    assert load(tmp_path)["encoder"]["image_size"] == (32, 32)


# --- other protocols --------------------------------------------------------------------------------------------------


def test_linear_probe_trains_the_head_alone(tmp_path, pretrained):
    """With everything on that could move an encoder."""
    checkpoint = train(tmp_path, TINY | dict(init=pretrained), linear_probe=True, drop_path=0.5, weight_decay=0.3)
    source = torch.load(pretrained, weights_only=True)["student"]
    trained = {name.removeprefix("encoder."): tensor for name, tensor in checkpoint["model"].items()}
    assert all(torch.equal(trained[name], source[name]) for name in source)
    assert trained["head.weight"].abs().max() > 1e-3 and trained["fc_norm.running_mean"].abs().max() > 0
    assert checkpoint["optimizer"]["param_groups"][0]["momentum"] == 0.9
    assert len(tensors(checkpoint["optimizer"]["state"])) == 2  # momentum of the head's weight and bias
    logits, labels = scored(tmp_path / "last.pt", frozen=True)
    assert log(tmp_path)[-1]["top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert log(tmp_path)[-1]["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_knn(tmp_path, pretrained, capsys, pool):
    run(init=pretrained, knn=7, limit=64, pool=pool, drop_path=0.9, device="cpu")
    encoder = model.load_encoder(torch.load(pretrained, weights_only=True), log=lambda _: None).eval()
    sets = []
    for images in (data.Shapes("train", 64, (16, 16)), data.Shapes("val", 50, (16, 16))):
        with torch.no_grad():
            tokens = encoder(data.Normalize()(images.images)).tokens
        sets += [tokens[:, 0] if pool == "class" else tokens[:, 1:].mean(dim=1), torch.tensor(images.labels)]
    expected = engine.knn_accuracy(*sets, k=7)
    assert f"top-1 {expected:.1%} by 7 nearest neighbours" in capsys.readouterr().out


def test_knn_with_dropped_tokens(monkeypatch, pretrained):
    seen = []
    wrap(monkeypatch, model.Block, "forward", before=lambda _, x: seen.append(x.shape[1]))
    run(init=pretrained, knn=7, limit=64, drop_ratio=0.5, drop_blocks=0)
    assert set(zip(seen[::2], seen[1::2], strict=True)) == {(17, 9)}


# --- evaluation -------------------------------------------------------------------------------------------------------


def rows_of(text):
    """Numbers of the table: {ratio: (tokens, GMACs, top-1, top-5, images/s, speed-up)}."""
    lines = [line.split("|")[0].split() for line in text.splitlines() if re.match(r" +0(\.\d+)? ", line)]
    return {float(line[0]): [float(word.rstrip("%x").replace(",", "")) for word in line[1:]] for line in lines}


def test_eval_sweeps_ratios(finished, capsys):
    run(eval=finished / "last.pt", drop_ratio=[0, 0.25, 0.4], drop_blocks=0, device="cpu")
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert "dropping after blocks [0]" in text
    assert list(rows) == [0, 0.25, 0.4] and [rows[ratio][0] for ratio in rows] == [16, 12, 9]
    assert rows[0][1] > rows[0.25][1] > rows[0.4][1]
    for ratio in rows:
        logits, labels = scored(finished / "last.pt", ptr=PTR((0,), ratio))
        assert rows[ratio][2] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), abs=0.06)
    assert all(row[4] > 0 for row in rows.values())
    # Both are over the same speed, of one more measurement.
    assert rows[0.25][5] / rows[0][5] == pytest.approx(rows[0.25][4] / rows[0][4], rel=0.03)
    assert "17.57  83.8%     1.00x" in text and "9.53  82.6%     1.88x" in text  # the poster has no row for .25
    assert "25" not in [word for line in text.splitlines() if "0.25" in line for word in line.split("|")[1].split()]


def test_a_sweep_in_any_order(finished, capsys):
    """Speed-ups are over the model that drops nothing, wherever that stands, if at all."""
    run(eval=finished / "last.pt", drop_ratio=[0.4, 0], drop_stages=2, limit=10)
    text = capsys.readouterr().out
    assert "dropping after blocks [0, 1]" in text and list(rows_of(text)) == [0.4, 0]
    run(eval=finished / "last.pt", drop_ratio=0.9, drop_blocks=0, image_size=64)  # 256 tokens and 25
    assert rows_of(capsys.readouterr().out)[0.9][5] > 1.2


def test_an_exported_linear_probe_is_scored_alike(tmp_path, pretrained, capsys):
    """By the mean of its patches, if told to; the file does not say so."""
    train(tmp_path, TINY | dict(init=pretrained, linear_probe=True, lr=0.1))
    run(init=tmp_path / "last.pt", export=tmp_path / "probe.pt")
    tables = []
    for words in (dict(eval=tmp_path / "last.pt"), dict(eval=tmp_path / "probe.pt", pool="mean", heads=2)):
        capsys.readouterr()
        run(**words)
        tables.append(rows_of(capsys.readouterr().out)[0][2:4])
    assert tables[0] == tables[1]
    with pytest.raises(UserError, match="made for the other way to pool"):
        run(eval=tmp_path / "last.pt", pool="class")


def test_eval_uses_what_it_was_trained_with(tmp_path, capsys):
    train(tmp_path, SCRATCH, drop_ratio=0.5, drop_blocks=[0, 1])
    capsys.readouterr()
    run(eval=tmp_path / "best.pt")
    assert {ratio: row[0] for ratio, row in rows_of(capsys.readouterr().out).items()} == {0.5: 4}
    run(eval=tmp_path / "best.pt", drop_ratio=0)
    assert {ratio: row[0] for ratio, row in rows_of(capsys.readouterr().out).items()} == {0: 16}
    run(eval=tmp_path / "best.pt", drop_stages=1)
    assert "dropping after blocks [0]" in (text := capsys.readouterr().out) and rows_of(text)[0.5][0] == 8


def test_eval_needs_the_classes(finished, tmp_path):
    for classes in (None, 5):
        torch.save(torch.load(finished / "best.pt", weights_only=True) | dict(classes=classes), tmp_path / "best.pt")
        with pytest.raises(UserError, match="best.pt is not a whole checkpoint .*: it has no list 'classes'"):
            run(eval=tmp_path / "best.pt")


def test_tokens_while_training(monkeypatch, tmp_path, capsys):
    seen = []
    wrap(monkeypatch, model.Block, "forward", before=lambda _, x: seen.append(x.shape[1]))
    train(tmp_path, SCRATCH, drop_ratio=0.5, drop_blocks=0)
    assert "class token + 16 8 8" in capsys.readouterr().out
    assert set(zip(seen[::2], seen[1::2], strict=True)) == {(17, 9)}


def test_a_public_classifier_is_scored(tmp_path, capsys):
    """A timm-like file without anything of ours, pooled by its class token."""
    classifier = Classifier(ViT((16, 16), 4, dim=64, depth=1, heads=4), 10, pool="class")
    torch.nn.init.normal_(classifier.head.weight)
    torch.save(finetune.timm_weights(classifier), tmp_path / "public.pth")
    run(eval=tmp_path / "public.pth", device="cpu")
    val = data.validation_images("shapes", Path("data"), False, (16, 16))
    with torch.no_grad():
        logits = classifier.eval()(data.Normalize()(val.images))
    expected = 100 * (logits.argmax(dim=1) == torch.tensor(val.labels)).float().mean().item()
    assert rows_of(capsys.readouterr().out)[0][2] == pytest.approx(expected, abs=0.06)


def test_a_linear_probe_is_scored_in_evaluation_mode(tmp_path, pretrained, capsys):
    """A part of the images, on which BatchNorm's own statistics would give other results."""
    train(tmp_path, TINY | dict(init=pretrained, linear_probe=True))
    capsys.readouterr()
    run(eval=tmp_path / "last.pt", limit=20)
    text = capsys.readouterr().out
    logits, labels = scored(tmp_path / "last.pt", frozen=True)
    expected = 100 * (logits[:20].argmax(dim=1) == labels[:20]).float().mean().item()
    assert "20 images to validate" in text and rows_of(text)[0][2] == pytest.approx(expected, abs=0.06)


def test_scoring_at_another_size(finished, capsys):
    run(eval=finished / "best.pt", image_size=[24, 32])
    assert rows_of(capsys.readouterr().out)[0][0] == 48


# --- recipes ----------------------------------------------------------------------------------------------------------

MAE = dict(
    epochs=100, warmup_epochs=5, batch_size=1024, blr=5e-4, layer_decay=0.65, weight_decay=0.05, drop_path=0.1,
    rand_augment=9, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1, clip_grad=0, min_crop=0.08, image_size=[224],
    linear_probe=False, lr=None, pool="mean", drop_ratio=[0.0],
)  # fmt: skip


def settings_of(*words):
    return vars(finetune.read_settings([*words])[0])


def test_recipe():
    args = settings_of("--recipe", "imagenet")
    assert {name: args[name] for name in MAE} == MAE
    probe = settings_of("--recipe", "imagenet", "--linear-probe")
    plain = dict(mixup=0, cutmix=0, smoothing=0, rand_augment=0, erasing=0, drop_path=0, weight_decay=0)
    assert {name: probe[name] for name in plain} == plain and probe["epochs"] == 90 and probe["min_crop"] == 0.08
    assert settings_of("--linear-probe", "--blr", "0.3", "--mixup", "0.5")["blr"] == 0.3


def test_the_recipe_trains_vit_base(tmp_path):
    """One step of MAE's recipe on two images of another size than theirs."""
    folder = write_classes(tmp_path / "images")
    small = dict(batch_size=2, depth=1, workers=0, image_size=32)
    run("--recipe", "imagenet", "--init", "none", "--dry-run", data=folder, **small)


# --- export -----------------------------------------------------------------------------------------------------------


def test_export(finished, pretrained, tmp_path, capsys):
    run(init=finished / "best.pt", export=tmp_path / "vit.pt")
    exported = torch.load(tmp_path / "vit.pt", weights_only=True)
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.mlp.fc1.bias"} < exported.keys()
    assert exported["fc_norm.weight"].shape == (16,)
    assert exported["head.weight"].shape == (10, 16) and "norm.weight" not in exported
    assert "num_classes=10, global_pool='avg')" in capsys.readouterr().out
    run(init=pretrained, export=tmp_path / "encoder.pt", weights="teacher")
    encoder, source = (torch.load(path, weights_only=True) for path in (tmp_path / "encoder.pt", pretrained))
    assert identical(encoder, source["teacher"])
    assert "num_classes=0)" in capsys.readouterr().out


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, pretrained):
    folder = tmp_path_factory.mktemp("two")
    return torchrun(folder, __file__, folder, pretrained)


EVEN = SCRATCH | dict(epochs=1, warmup_epochs=0, limit=48, clip_grad=1000)


def test_two_processes_equal_one(two_processes, tmp_path, monkeypatch):
    """Weights and, on 51 images (26 + 25), every score: each image counts once."""
    monkeypatch.setattr(data, "validation_images", validation_of_51)
    ours = train(tmp_path / "run", EVEN)
    theirs = load(two_processes / "run")
    for name, tensor in ours["model"].items():
        torch.testing.assert_close(tensor, theirs["model"][name], atol=1e-5, rtol=0)
    for name in ("loss", "grad_norm", "val_loss", "top1", "top5"):
        assert log(tmp_path / "run")[0][name] == pytest.approx(log(two_processes / "run")[0][name], rel=1e-4), name


def test_two_processes_score_the_probe_that_is_saved(two_processes, monkeypatch):
    """BatchNorm's statistics differ between processes while they train."""
    monkeypatch.setattr(data, "validation_images", validation_of_51)
    logits, labels = scored(two_processes / "probe" / "last.pt", frozen=True)
    expected = F.cross_entropy(logits, labels).item()
    assert log(two_processes / "probe")[-1]["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_two_processes_score_as_one(two_processes, pretrained, monkeypatch, capsys):
    monkeypatch.setattr(data, "validation_images", validation_of_51)
    text = (two_processes / "words.txt").read_text()
    run(eval=two_processes / "run" / "last.pt", drop_ratio=[0, 0.4], drop_stages=2)
    run(init=pretrained, knn=5, limit=63)
    ours = capsys.readouterr().out
    for pattern in (r"^ +0 .*?%.*?%", r"^ +0\.4 .*?%.*?%", r"top-1 .* by 5 nearest"):
        mine, theirs = (re.findall(pattern, output, re.MULTILINE) for output in (ours, text))
        assert len(mine) == 1 and mine == theirs


def validation_of_51(name, root, download, image_size, limit=None, class_to_idx=None):
    return data.Shapes("val", 51, image_size)


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "fraction 0": (dict(label_fraction=0), "--label-fraction"),
    "fraction 2": (dict(label_fraction=2), "--label-fraction"),
    "labels 0": (dict(labels_per_class=0), "--labels-per-class"),
    "both": (dict(labels_per_class=1, label_fraction=0.5), "one of --label-fraction and --labels-per-class"),
    "smoothing": (dict(smoothing=1), "--smoothing"),
    "mixup": (dict(mixup=-1), "--mixup"),
    "endless mixup": (dict(mixup="inf"), "--mixup"),
    "cutmix": (dict(cutmix="nan"), "--cutmix"),
    "augment": (dict(rand_augment=11), "--rand-augment"),
    "erasing": (dict(erasing=1.5), "--erasing"),
    "decay": (dict(layer_decay=0), "--layer-decay"),
    "drop ratio": (dict(drop_ratio=1, drop_stages=1), "--drop-ratio"),
    "several ratios": (dict(drop_ratio=[0, 0.1]), "--drop-ratio takes one number"),
    "nothing left": (dict(drop_ratio=0.99, drop_stages=1), "leaves no token"),
    "stages": (dict(drop_ratio=0.1, drop_stages=3), "--drop-stages"),
    "blocks": (dict(drop_ratio=0.1, drop_blocks=[7]), "--drop-blocks"),
    "two tasks": (dict(linear_probe=True, knn=5), "choose one of --linear-probe and --knn"),
    "k": (dict(knn=0), "--knn"),
    "tiny mixup": (dict(mixup=1e-320), "--mixup"),
    "one image": (dict(linear_probe=True, micro_batch=1), "--linear-probe needs two images at once"),
    "eval of an unset variable": (dict(eval=""), "no checkpoint"),
    "batch": (dict(batch_size=100), "--batch-size 100 is more than the 64 images"),
    "few for the batch": (dict(labels_per_class=1), "--batch-size 16 is more than the 10 images"),
    "limit": (dict(limit=0), "--limit"),
    "size": (dict(image_size=15), "--image-size"),
    "data": (dict(data="cifar11"), "train/ and val/"),
    "size of a model": (dict(heads=3), "--heads"),
    "eval of nothing": (dict(eval="nowhere.pt"), "no checkpoint nowhere.pt"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path, mistake):
    changes, text = MISTAKES[mistake]
    with pytest.raises(UserError, match=re.escape(text)) as error:
        train(tmp_path / "run", SCRATCH, **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_sizes_are_those_of_init(tmp_path, pretrained):
    for name, value in dict(model="vit_base", dim=8, depth=1, patch_size=2, channels=1).items():
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} goes with --init none"):
            train(tmp_path, TINY | {"init": pretrained, name: value})


def test_mistakes_about_files(tmp_path, finished, pretrained):
    torch.save({"fc.weight": torch.zeros(10, 4)}, tmp_path / "other.pt")
    for flag in ("init", "eval"):
        with pytest.raises(UserError, match=f"--{flag} .*other.pt: it "):
            run(**{flag: tmp_path / "other.pt"})
        with pytest.raises(UserError, match="no checkpoint .*nowhere.pt"):
            run(**{flag: tmp_path / "nowhere.pt"})
    with pytest.raises(UserError, match="cannot write"):  # an unset variable in place of a name
        run(init=finished / "last.pt", export="")
    with pytest.raises(UserError, match=r"--eval .*last.pt: .*without the head"):
        run(eval=pretrained)
    with pytest.raises(UserError, match=r"--init .*: it holds one set of weights"):
        run(init=finished / "last.pt", weights="teacher")


def test_no_images_to_validate(tmp_path):
    folder = write_classes(tmp_path / "images")
    for path in (folder / "val").rglob("*.*"):
        path.unlink()
    with pytest.raises(UserError, match="there are no images in them"):
        train(tmp_path / "run", SCRATCH, data=folder, limit=None, batch_size=4)


def test_settings_of_others_are_not_obeyed(tmp_path, finished):
    """What a public file calls `config` and `classes` is anything."""
    public = {name: torch.load(finished / "last.pt", weights_only=True)["model"] for name in ("model",)}
    for others in (dict(config="data"), dict(config=dict(data="nowhere", drop_ratio=0.5)), dict(classes=5)):
        torch.save(public | others, tmp_path / "public.pt")
        run(eval=tmp_path / "public.pt", heads=2, limit=10)


def test_classes_that_do_not_fit(tmp_path, finished):
    folder = write_classes(tmp_path / "images")
    with pytest.raises(UserError, match="cat, dog"):
        run(eval=finished / "last.pt", data=folder)
    checkpoint = torch.load(finished / "last.pt", weights_only=True)
    torch.save(checkpoint | dict(classes=list("abcdefghij")), tmp_path / "letters.pt")
    with pytest.raises(UserError, match="tells 10 classes apart, but --data shapes has other ones"):
        run(eval=tmp_path / "letters.pt")
    one = tmp_path / "one"
    for split in ("train", "val"):
        write_images(one / split / "cat", 8)
    with pytest.raises(UserError, match="single class"):
        train(tmp_path / "run", SCRATCH, data=one, limit=None, batch_size=4)


def test_damaged_checkpoint_of_ours(tmp_path, finished):
    checkpoint = torch.load(finished / "last.pt", weights_only=True)
    for name, value in dict(encoder=None, model=None).items():
        torch.save(checkpoint | {name: value}, tmp_path / "bad.pt")
        with pytest.raises(UserError, match="bad.pt"):
            run(eval=tmp_path / "bad.pt")


# --- the command line -------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, pretrained):
    """As a user would: fine-tune on class folders, score as it says then, and see one line on a mistake."""
    folder = write_classes(tmp_path / "images")

    def call(**settings):
        return run_process([sys.executable, str(ROOT / "finetune.py"), *flags(settings)], cwd=tmp_path)

    result = call(init=pretrained, data=folder, batch_size=8, epochs=2, workers=1, min_crop=0.5, rand_augment=5)
    assert result.returncode == 0, result.stderr
    assert "16 images of 2 classes (cat, dog, ...), 16 to validate" in result.stdout and "best top-1" in result.stdout
    command = result.stdout.splitlines()[-1].split()
    assert command[:2] == ["python", "finetune.py"]
    result = run_process([sys.executable, str(ROOT / "finetune.py"), *command[2:], "--drop-stages", "2"], cwd=tmp_path)
    assert result.returncode == 0 and len(rows_of(result.stdout)) == 5, result.stderr
    result = call(init=tmp_path / "nothing.pt")
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(**SCRATCH, dry_run=True)
    assert contents(tmp_path) == {} and "nothing was kept" in capsys.readouterr().out


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        run("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for action in finetune.arguments()._actions:
        assert action.option_strings[-1] in text and action.help
        if action.default not in (None, False, "==SUPPRESS=="):
            assert f"(default: {action.default})" in action.help


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_cuda(tmp_path):
    train(tmp_path / "cpu")
    train(tmp_path / "cuda", device="cuda")
    for ours, theirs in zip(log(tmp_path / "cuda"), log(tmp_path / "cpu"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.05)


# --- run by torchrun in two processes ---------------------------------------------------------------------------------


def worker(folder, pretrained):
    """Training, evaluation and nearest neighbours by this process and the other one together."""
    world = engine.start_world("cpu")
    engine.start_world = lambda device: world  # joined already
    data.validation_images = validation_of_51
    finetune.main(flags(EVEN | dict(out=folder / "run")))
    finetune.main(flags(TINY | dict(out=folder / "probe", init=pretrained, linear_probe=True, lr=0.1)))
    torch.distributed.barrier()  # the first one still writes
    run(eval=folder / "run" / "last.pt", drop_ratio=[0, 0.4], drop_stages=2)
    run(init=pretrained, knn=5, limit=63)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
