"""The fine-tuning script: initialisation, trained parameters, invariances, evaluation, export, invalid settings."""

import argparse
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

import data
import finetune
import helpers
from helpers import flags, identical, log, train
from model import NO_PTR, Classifier, pool
from ptr import PTR
from util import metrics, runs, training
from util.image_files import class_folders
from util.shapes import SHAPES
from weights import load_classifier, load_encoder

CPU = torch.device("cpu")
NAMES = ["ant", "bee", "cat"]
# 3 steps per epoch, 6 in total.
TINY = dict(batch_size=16, epochs=2, image_size=16, workers=0, device="cpu")
SCRATCH = TINY | dict(init="none", patch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write 48 images of three classes and 17 to validate: no cats, ants and bees swapped, so training lowers top-1."""
    folder = tmp_path_factory.mktemp("classes")
    for i, name in enumerate(NAMES):
        helpers.write_images(folder / "train" / name, 16, shade=10 * i)
        helpers.write_images(folder / "val" / name, (8, 9, 0)[i], shade=11 - 10 * i)
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Return a checkpoint of pre-training, whose student and teacher differ."""
    out = tmp_path_factory.mktemp("pretrained")
    train("pretrain", out, limit=64, batch_size=16, epochs=1, image_size=16, knn_every=0, device="cpu")
    return out / "last.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):
    """Return the folder of a finished run with PTR."""
    out = tmp_path_factory.mktemp("finished") / "run"
    changes = dict(data=folder, epochs=6, blr=0.02, drop_ratio=0.4, drop_blocks=1, criterion="reverse", seed=1)
    train("finetune", out, **SCRATCH | changes)
    return out


def images_of(folder):
    """Return all images of a folder as evaluation sees them, (n, 3, 16, 16), and their labels (n,)."""
    images, labels, _ = zip(*helpers.scored(class_folders(folder, NAMES), (16, 16)), strict=True)
    return data.Normalize()(torch.stack(images)), torch.tensor(labels)


@torch.no_grad()
def logits_of(path, images, ptr=NO_PTR, pool=None):
    return load_classifier(runs.load(path), pool=pool).eval()(images, ptr=ptr)


def test_files_of_a_run(finished, folder):
    assert {path.name for path in finished.iterdir()} == {".lock", "args.json", "metrics.jsonl", "last.pt", "best.pt"}
    last, best = runs.load(finished / "last.pt"), runs.load(finished / "best.pt")
    assert (last["method"], last["epoch"], last["step"], last["classes"]) == ("finetune", 6, 18, NAMES)
    assert json.loads((finished / "args.json").read_text())["epochs"] == last["config"]["epochs"] == 6
    assert last["history"] == log(finished) and best["history"] == log(finished)[: best["epoch"]]
    assert best["history"][-1]["top1"] == max(row["top1"] for row in log(finished)) > log(finished)[-1]["top1"]
    images, labels = images_of(folder / "val")
    for name, checkpoint in (("last.pt", last), ("best.pt", best)):
        logits, row = logits_of(finished / name, images, PTR((1,), 0.4, "reverse")), checkpoint["history"][-1]
        assert row["top1"] == pytest.approx((logits.argmax(dim=1) == labels).double().mean().item())
        assert row["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


def test_four_steps_by_hand(tmp_path, folder):
    """The training loop of two epochs in plain torch: images, mixing, loss, clipping, AdamW, learning rates."""
    checkpoint = train(
        "finetune",
        tmp_path,
        **SCRATCH | dict(data=folder, batch_size=24),
        warmup_epochs=0.5,
        blr=2.56 / 24,
        seed=3,
        weight_decay=0.1,
        clip_grad=0.3,
        layer_decay=0.5,
        smoothing=0.2,
        mixup=0.8,
        drop_path=0.3,
        min_crop=0.5,
        drop_ratio=0.3,
        drop_blocks=1,
    )
    args = argparse.Namespace(**checkpoint["config"])
    training.seed_generators(CPU, 3, "weights")
    model = Classifier(finetune.build_encoder(args, None), 3).train()
    views = data.Views(data.labelled_images(args.data, "", (16, 16)), data.pretraining_view((16, 16), 0.5), seed=3)
    world = training.World(0, 1, CPU)
    loader = data.training_loader(views, 24, seed=3, workers=0, world=world)
    mix = finetune.mixing(0.8, 0.0, 3)
    optimizer = torch.optim.AdamW(training.parameter_groups(model, 0.1, layer_decay=0.5))
    for step, (images, labels, _) in enumerate(helpers.batches_of(loader, epochs=2)):
        training.seed_generators(CPU, 3, "step", step, 0)
        images, targets = mix(data.Normalize()(images), labels)
        log_probabilities = model(images, ptr=PTR((1,), 0.3)).log_softmax(dim=1)
        loss = -((0.8 * targets + 0.2 / 3) * log_probabilities).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3) > 0.3
        for group in optimizer.param_groups:
            group["lr"] = [0, 0.01, 0.0075, 0.0025][step] * group["lr_scale"]
        optimizer.step()
    assert checkpoint["step"] == step + 1 == 4
    helpers.assert_close_weights(model.state_dict(), checkpoint["model"])


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_starts_from_init(tmp_path, folder, pretrained, weights):
    """At a learning rate of 0 the weights do not change."""
    checkpoint = train("finetune", tmp_path, **TINY | dict(data=folder, init=pretrained, weights=weights, blr=0))
    source = runs.load(pretrained)
    assert not identical(source["student"], source["teacher"])
    for name in source[weights].keys() - {"norm.weight", "norm.bias"}:  # mean pooling has its own norm
        assert torch.equal(checkpoint["model"][f"encoder.{name}"], source[weights][name])


@pytest.mark.parametrize(
    "moving, changes",
    [
        ("all", dict(pool="class")),
        ("all", dict(drop_ratio=0.5, precision="bf16")),
        ("norm", dict(layer_decay=0, pool="class")),
        ("none", dict(linear_probe=True, weight_decay=0.3)),
    ],
)
def test_trained_parameters(tmp_path, folder, pretrained, moving, changes):
    """All parameters; with a layer decay of 0 those after the blocks; of a linear probe the head."""
    end = train("finetune", tmp_path, **TINY | dict(data=folder, init=pretrained, epochs=10) | changes)["model"]
    assert log(tmp_path)[-1]["loss"] < log(tmp_path)[0]["loss"]
    start = {f"encoder.{name}": tensor for name, tensor in runs.load(pretrained)["student"].items()}
    moved = {name for name in start.keys() & end.keys() if not torch.equal(start[name], end[name])}
    norm = {"encoder.norm.weight", "encoder.norm.bias"}
    assert moved == dict(all=start.keys() & end.keys(), norm=norm, none=set())[moving]
    assert end["head.weight"].abs().max() > 1e-3 and end.get("fc_norm.running_mean", torch.ones(1)).abs().max() > 0.1


def test_mixing():
    """MixUp blends pixels, CutMix copies them. With both, each batch gets one of the two."""
    images, labels = torch.arange(4.0)[:, None, None, None].expand(4, 1, 8, 8), torch.arange(4)
    torch.manual_seed(0)
    for mixup, cutmix, expected in ((1.0, 0.0, {True}), (0.0, 1.0, {False}), (1.0, 1.0, {True, False})):
        mix = finetune.mixing(mixup, cutmix, 4)
        mixed = [mix(images, labels)[0].unique().tolist() for _ in range(20)]
        assert {not set(pixels) <= {0, 1, 2, 3} for pixels in mixed} == expected


def test_a_killed_run_resumes_with_the_same_bits(tmp_path, folder):
    """With all random draws, by the same command. Resuming the finished run changes nothing."""
    settings = SCRATCH | dict(
        data=folder,
        epochs=5,
        drop_path=0.3,
        min_crop=0.5,
        rand_augment=9,
        erasing=0.5,
        mixup=0.8,
        cutmix=1.0,
        drop_ratio=0.3,
        drop_blocks=0,
        criterion="random",
        micro_batch=8,
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = train("finetune", whole, **settings)
    with helpers.start("finetune", killed, **settings) as process:
        helpers.wait_for_rows(process, killed, 1)
        process.kill()
    assert runs.load(killed / "last.pt")["epoch"] < 5, "the run ended before it was killed"
    for words in (settings, {}):
        helpers.assert_same_run(uninterrupted, train("finetune", killed, resume=True, **words))
    best = [runs.load(out / "best.pt") for out in (whole, killed)]
    assert identical(best[0]["model"], best[1]["model"]) and best[0]["epoch"] == best[1]["epoch"]


def test_micro_batches_and_two_processes_equal_one(tmp_path, folder):
    """All 17 images are evaluated. The saved weights give the same loss. A probe uses statistics of all processes."""
    settings = SCRATCH | dict(data=folder, epochs=1, warmup_epochs=0)
    whole = train("finetune", tmp_path / "whole", **settings)
    helpers.assert_close_runs(whole, train("finetune", tmp_path / "parts", **settings, micro_batch=4), ["model"])
    two, probe = dict(out=tmp_path / "two", micro_batch=4), dict(out=tmp_path / "probe", linear_probe=True)
    helpers.two_processes("finetune", settings | two, settings | probe)
    helpers.assert_close_runs(whole, runs.load(tmp_path / "two/last.pt"), ["model"])
    images, labels = images_of(folder / "val")
    for name in ("two", "probe"):
        expected = F.cross_entropy(logits_of(tmp_path / name / "last.pt", images), labels).item()
        assert log(tmp_path / name)[-1]["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_steps_that_are_not_finite(tmp_path, folder):
    """Steps with an infinite loss are skipped, and ten in a row end the run. Skipped steps change no weights."""

    def resume(run, bias, **config):
        run["model"]["head.bias"][0] = bias
        runs.save(tmp_path / "last.pt", run | dict(config=run["config"] | config))
        return train("finetune", tmp_path, resume=True)

    first = train("finetune", tmp_path, **SCRATCH | dict(data=folder, epochs=1, batch_size=1, smoothing=0))
    second = resume(first, -math.inf, epochs=2)
    assert second["history"][-1]["skipped"] == 16 and math.isfinite(second["history"][-1]["loss"])
    with pytest.raises(SystemExit):
        resume(second, math.nan, epochs=6, batch_size=16)  # 3 steps per epoch
    third = runs.load(tmp_path / "last.pt")
    assert third["epoch"] == 5
    for name in first["model"].keys() - {"head.bias"}:
        assert not torch.equal(first["model"][name], second["model"][name])
        assert torch.equal(second["model"][name], third["model"][name])


def test_few_labels(tmp_path, folder):
    """A quarter of each class, a batch of at most as many images, and --repeats passes over them per epoch.

    The same command resumes.
    """
    settings = SCRATCH | dict(data=folder, label_fraction=0.25)
    for repeats in (1, 3):
        checkpoint = train("finetune", tmp_path / str(repeats), **settings, repeats=repeats)
        assert (checkpoint["num_images"], checkpoint["step"], checkpoint["classes"]) == (12, 2 * repeats, NAMES)
        train("finetune", tmp_path / str(repeats), resume=True, **settings, repeats=repeats)


def test_few_labels_are_repeated_for_about_2000_steps(tmp_path):
    settings = SCRATCH | dict(data="shapes", limit=64, image_size=8, label_fraction=0.5, batch_size=16, min_crop=1)
    checkpoint = train("finetune", tmp_path, **settings)
    assert abs(checkpoint["step"] - 2000) <= 10 and checkpoint["num_images"] == 32


@pytest.mark.parametrize("by", ["mean", "class"])
def test_knn(folder, pretrained, capsys, by):
    helpers.evaluate(pretrained, knn=7, data=folder, pool=by)
    encoder, sets = load_encoder(runs.load(pretrained)).eval(), []
    for split in ("train", "val"):
        images, labels = images_of(folder / split)
        with torch.no_grad():
            sets += [pool(encoder(images).tokens, by), labels]
    assert f" {metrics.knn_accuracy(*sets, k=7):.1%} " in capsys.readouterr().out


def test_eval(finished, folder, capsys):
    """Data and PTR are as in training, unless flags are given."""
    helpers.evaluate(finished / "last.pt", drop_ratio=[0, 0.4])
    text = capsys.readouterr().out
    helpers.evaluate(finished / "last.pt")
    assert capsys.readouterr().out.count(f"  {log(finished)[-1]['top1']:.1%}  ") == 1
    rows = [line.split() for line in text.splitlines() if re.match(r" +0(\.\d+)? ", line)]
    images, labels = images_of(folder / "val")
    plain = metrics.topk_accuracy(logits_of(finished / "last.pt", images), labels, 1)
    expected = ["0", "16", f"{plain:.1%}"], ["0.4", "9", f"{log(finished)[-1]['top1']:.1%}"]
    assert [[row[0], row[1], row[3]] for row in rows] == list(expected)
    assert float(rows[0][2]) > float(rows[1][2])  # multiply-accumulates


@pytest.mark.parametrize("probe", [False, True])
def test_an_exported_classifier_gives_the_same_logits(tmp_path, folder, finished, pretrained, probe):
    path, images = finished / "best.pt", images_of(folder / "val")[0]
    if probe:
        path = tmp_path / "best.pt"
        train("finetune", tmp_path, **TINY | dict(data=folder, init=pretrained, linear_probe=True))
    helpers.export(path, tmp_path / "new/timm.pt")
    exported = logits_of(tmp_path / "new/timm.pt", images)
    torch.testing.assert_close(exported, logits_of(path, images))


def test_invalid_settings_and_files(tmp_path, folder, pretrained, finished):
    """Flags that do not fit; files without weights, of another script, with other classes or order."""
    last, names = runs.load(finished / "last.pt"), [shape.__name__ for shape in SHAPES]
    model = last["model"] | {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}
    runs.save(tmp_path / "order.pt", last | dict(model=model, classes=names[::-1], config={}))
    runs.save(tmp_path / "number.pt", last | dict(classes=names, config={}))
    torch.save({"fc.weight": torch.zeros(3, 4)}, tmp_path / "other.pt")
    new = SCRATCH | dict(data=folder)
    mistakes = [
        ("blocks", new | dict(drop_ratio=0.5, drop_blocks=4)),
        ("--micro-batch", new | dict(micro_batch=5)),
        ("--criterion", new | dict(criterion="reverse")),
        ("--layer-decay", new | dict(linear_probe=True, layer_decay=0.5)),
        ("image.size", new | dict(image_size=18)),
        ("nowhere", new | dict(data="nowhere")),
        ("nothing.pt", dict(init="nothing.pt")),
        *[("other.pt", {flag: tmp_path / "other.pt"}) for flag in ("init", "resume")],
        ("last.pt", dict(resume=pretrained)),
    ]
    for named, settings in mistakes:
        with pytest.raises(SystemExit, match=named):
            finetune.main(flags(out=tmp_path / "run", **settings))
    for path in (tmp_path / "other.pt", pretrained, tmp_path / "order.pt", tmp_path / "number.pt"):
        with pytest.raises(SystemExit, match=path.name):
            helpers.evaluate(path)
    assert not (tmp_path / "run").exists()
