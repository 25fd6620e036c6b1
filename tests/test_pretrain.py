"""The pre-training script: what a run leaves behind, resuming, accumulation, two processes, and all sorts of trouble.

Nearly all tests call `pretrain.main` in this process with a tiny model, since starting Python and torch takes seconds.
At the end of this file: what torchrun runs in two processes for the tests about them.
"""

import copy
import json
import math
import os
import pickle
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import engine
import model
import pretrain
from engine import UserError
from helpers import (
    ROOT,
    assert_close_runs,
    assert_same_run,
    contents,
    copy_of,
    flags,
    identical,
    interrupt,
    load,
    log,
    run_process,
    tensors,
    torchrun,
    wrap,
    write_classes,
    write_images,
)  # fmt: skip

# 4 steps an epoch, 8 in all, in a quarter of a second.
TINY = dict(
    limit=64, batch_size=16, epochs=2, warmup_epochs=1, lr=1e-3, ema=0.9, image_size=16, patch_size=4, dim=16, depth=2,
    heads=2, drop_stages=2, decoder_dim=16, decoder_heads=2, knn_every=0, device="cpu",
)  # fmt: skip
# Everything that draws random numbers while training.
RANDOM = TINY | dict(epochs=3, drop_path=0.3, criterion="random", min_crop=0.5)


# --- helpers ----------------------------------------------------------------------------------------------------------


def train(out, settings=TINY, **changes):
    """Run the script in this process; returns the checkpoint."""
    pretrain.main(flags(settings | {"out": out} | changes))
    return load(out)


def command(*words, **settings):
    return [sys.executable, str(ROOT / "pretrain.py"), *words, *flags(settings)]


def poison(monkeypatch, steps, how=lambda loss, prediction: loss * math.nan, rank=0):
    """Spoil the loss of these steps in this process."""
    bad = False
    honest = model.cosine_loss

    def look(trainer, _):
        nonlocal bad
        bad = trainer.step in steps and trainer.world.rank == rank

    def loss(prediction, target):
        return how(honest(prediction, target), prediction) if bad else honest(prediction, target)

    wrap(monkeypatch, pretrain.Trainer, "train_step", before=look)
    monkeypatch.setattr(model, "cosine_loss", loss)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run; for reading, or to be copied."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(out)
    return out


# --- what a run leaves behind -----------------------------------------------------------------------------------------


def test_run_folder(finished):
    assert {path.name for path in finished.iterdir()} == {"args.json", "metrics.jsonl", "last.pt"}
    args = json.loads((finished / "args.json").read_text())
    expected = TINY | dict(image_size=[16], out=str(finished), mask_ratio=0.75, seed=0, workers=0, data="shapes")
    assert {name: args[name] for name in expected} == expected


def test_checkpoint(finished):
    checkpoint = load(finished)
    assert checkpoint.keys() == {
        "method", "config", "encoder", "num_images", "epoch", "history", "student", "teacher", "decoder", "optimizer",
        "step", "skipped", "skipped_in_a_row", "unreadable",
    }  # fmt: skip
    assert checkpoint["method"] == "pcae" and checkpoint["num_images"] == 64
    assert (checkpoint["epoch"], checkpoint["step"], checkpoint["skipped"]) == (2, 8, 0)
    assert checkpoint["history"] == log(finished)
    args = json.loads((finished / "args.json").read_text())
    assert checkpoint["config"] == args
    for part in ("student", "teacher"):  # and they can be built again from the checkpoint alone
        encoder = model.ViT(**checkpoint["encoder"])
        encoder.load_state_dict(checkpoint[part])
    decayed, free = checkpoint["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0)
    assert all(group["betas"] == (0.9, 0.95) for group in (decayed, free))


def test_log(monkeypatch, tmp_path):
    steps = []
    honest = pretrain.Trainer.train_step
    monkeypatch.setattr(pretrain.Trainer, "train_step", lambda *args: steps.append(honest(*args)) or steps[-1])
    train(tmp_path)
    rows = log(tmp_path)
    assert [(row["epoch"], row["step"], row["skipped"]) for row in rows] == [(1, 4, 0), (2, 8, 0)]
    for i, row in enumerate(rows):
        assert list(row) == [
            "epoch", "step", "loss", "lr", "ema", "target_std", "prediction_std", "grad_norm", "skipped",
            "images_per_second", "data_wait",
        ]  # fmt: skip
        for name in ("loss", "target_std", "prediction_std", "grad_norm"):
            assert row[name] == pytest.approx(sum(step[name] for step in steps[4 * i : 4 * i + 4]) / 4)
        assert row["images_per_second"] > 0 and 0 <= row["data_wait"] <= 1
        assert 0 < row["loss"] < 1.2 and row["grad_norm"] > 0
        assert 0.2 < row["target_std"] < 1.1 and 0 < row["prediction_std"] < 1.1


def cosine(start, end, t):
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


@pytest.mark.parametrize(
    "rate, peak, text", [(dict(lr=3e-3), 3e-3, "0.003 = --lr"), (dict(lr=None, blr=8e-3), 5e-4, "0.008 * 16 / 256")]
)
def test_schedules(tmp_path, capsys, rate, peak, text):
    checkpoint = train(tmp_path, epochs=5, warmup_epochs=1.5, ema=0.96, **rate)
    assert text in capsys.readouterr().out
    rows = log(tmp_path)
    for row in rows:
        step = 4 * row["epoch"] - 1  # of 20, 6 to warm up; logged is the last one of the epoch
        expected = peak * step / 6 if step < 6 else cosine(peak, 0, (step - 6) / 14)
        assert row["lr"] == pytest.approx(expected) and row["ema"] == pytest.approx(cosine(0.96, 1, step / 20))
    assert all(group["lr"] == rows[-1]["lr"] for group in checkpoint["optimizer"]["param_groups"])


def test_images_and_splits_of_each_step(monkeypatch, tmp_path):
    images, splits, seeds = [], [], []

    def record(trainer, batch, noise):
        images.extend(image.numpy().tobytes() for image in batch)
        splits.extend(tuple(row.tolist()) for row in noise)
        seeds.append(torch.initial_seed())

    monkeypatch.setattr(pretrain.Trainer, "seconds_per_step", lambda self: 0.0)
    wrap(monkeypatch, pretrain.Trainer, "backward", before=record)
    train(tmp_path / "whole")
    first, second = images[:64], images[64:]
    assert len(set(first)) == 64 and set(first) == set(second) and first != second
    assert len(set(splits)) == 128 and len(set(seeds)) == 8
    train(tmp_path / "crops", min_crop=0.3)
    assert len(set(images[128:])) > 120  # another view of each image in each epoch, but where both are of the whole
    train(tmp_path / "seed", seed=1)
    assert set(images[256:]) == set(first) and images[256:] != first + second
    assert len(set(splits)) == 256 and len(set(seeds)) == 16  # the splits of both epochs of both seeds


def test_gradients_are_clipped(monkeypatch, tmp_path):
    norms = []

    def record(pcae, _):
        norms.append(sum(p.grad.square().sum() for p in pcae.parameters() if p.grad is not None).sqrt().item())

    wrap(monkeypatch, model.PCAE, "update_teacher", before=record)
    train(tmp_path, clip_grad=0.1)
    assert norms == pytest.approx([0.1] * 8, rel=1e-3)
    assert min(row["grad_norm"] for row in log(tmp_path)) > 0.2  # logged is the norm before


# --- same seed, same run ----------------------------------------------------------------------------------------------


def test_same_seed_same_weights(tmp_path):
    first, again, other = (train(tmp_path / name, RANDOM, seed=s) for name, s in (("a", 0), ("b", 0), ("c", 1)))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert identical(first["student"], again["student"])
    for part in ("student", "teacher", "decoder"):
        assert not identical(first[part], other[part])


def test_workers_change_nothing(tmp_path):
    for workers in (0, 2):
        train(tmp_path / str(workers), RANDOM, workers=workers)
    assert_same_run(tmp_path / "0", tmp_path / "2")


# --- resume -----------------------------------------------------------------------------------------------------------


SCORED = RANDOM | dict(knn_every=2)


def few_labels(patch):
    """Make scoring by nearest neighbours fast."""

    def sets(name, root, download, size):
        return data.Shapes("train", 40, size), data.Shapes("val", 20, size)

    patch.setattr(data, "labelled_images", sets)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        few_labels(patch)
        train(out, SCORED)
    return out


def interrupted(out, settings, *moment):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, *moment)
        train(out, settings)


# What is interrupted in the second of three epochs, and how many calls of it went well.
MOMENTS = {
    "step": (pretrain.Trainer, "train_step", 6),
    "teacher": (model.PCAE, "update_teacher", 6),
    "before the log": (engine, "write_log", 2),
    "between log and checkpoint": (engine, "save_checkpoint", 2),
    "writing the checkpoint": (os, "fsync", 5),
    "replacing the checkpoint": (os, "replace", 5),
    "after the checkpoint": (pretrain, "describe_epoch", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_is_uninterrupted(monkeypatch, tmp_path, uninterrupted, moment):
    few_labels(monkeypatch)
    interrupted(tmp_path / "run", SCORED, *MOMENTS[moment])
    assert load(tmp_path / "run")["epoch"] == (2 if moment == "after the checkpoint" else 1)
    train(tmp_path / "run", SCORED, resume=True)
    assert_same_run(uninterrupted, tmp_path / "run")
    assert os.listdir(tmp_path) == ["run"] and len(os.listdir(tmp_path / "run")) == 3  # nothing left lying about


def test_resume_twice(monkeypatch, tmp_path, uninterrupted):
    few_labels(monkeypatch)
    interrupted(tmp_path, SCORED, pretrain.Trainer, "train_step", 6)
    interrupted(tmp_path, SCORED | dict(resume=True), pretrain.Trainer, "train_step", 7)
    train(tmp_path, {}, resume=True)
    assert_same_run(uninterrupted, tmp_path)


def test_resume_takes_the_settings_of_the_checkpoint(tmp_path):
    settings = RANDOM | dict(recipe="imagenet")
    train(tmp_path / "whole", settings)
    interrupted(tmp_path / "parts", settings, pretrain.Trainer, "train_step", 6)
    train(tmp_path / "parts", {}, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_file(monkeypatch, tmp_path, uninterrupted):
    few_labels(monkeypatch)
    interrupted(tmp_path / "run", SCORED, pretrain.Trainer, "train_step", 6)
    before = contents(tmp_path / "run")
    train(tmp_path / "elsewhere", {}, resume=tmp_path / "run/last.pt")
    assert contents(tmp_path / "run") == before
    pretrain.main(flags(dict(resume=tmp_path / "run/last.pt")))  # without --out: where the file is
    for out in ("run", "elsewhere"):
        assert_same_run(uninterrupted, tmp_path / out)


def test_resume_file_into_the_folder_of_another_run(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    interrupted(tmp_path / "other", TINY | dict(seed=1), pretrain.Trainer, "train_step", 6)
    train(out, {}, resume=tmp_path / "other/last.pt")
    assert contents(tmp_path / "run-1") == contents(finished)
    assert load(out)["config"]["seed"] == 1 and load(out)["epoch"] == 2


def test_resume_a_finished_run(finished, tmp_path, capsys):
    out = copy_of(finished, tmp_path)
    train(out, resume=True)
    assert_same_run(finished, out)
    assert contents(out)["last.pt"] == contents(finished)["last.pt"]
    text = capsys.readouterr().out
    assert "2 epochs, 8 steps" in text and f"The student is in {out / 'last.pt'}" in text and "epoch 1/2" not in text


CHANGES = dict(
    epochs=(2, 3), seed=(0, 1), lr=(1e-3, 2e-3), mask_ratio=(0.75, 0.5), drop_ratio=(0.5, 0.25), ema=(0.9, 0.99),
    batch_size=(16, 8), limit=(64, 32), image_size=([16], [32]), depth=(2, 4), drop_blocks=(None, [1]),
    criterion=("similarity", "random"), data=("shapes", "cifar10"), recipe=("laptop", "imagenet"),
    model=("vit_mini", "vit_tiny"), precision=("auto", "bf16"), min_crop=(1.0, 0.5), drop_path=(0.0, 0.1),
    knn_every=(0, 5), clip_grad=(1.0, 2.0), center=(False, True),
)  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_resume_refuses_other_settings(finished, tmp_path, name):
    out, (there, here) = copy_of(finished, tmp_path), CHANGES[name]
    before = contents(out)
    with pytest.raises(UserError) as error:
        train(out, {name: here, "resume": True})
    flag = "--" + name.replace("_", "-")
    assert flag in str(error.value) and str(there) in str(error.value) and str(here) in str(error.value)
    assert contents(out) == before


def test_resume_names_every_difference(finished, tmp_path):
    with pytest.raises(UserError, match="--seed 0 there, 5 here, --epochs 2 there, 9 here|--epochs.*--seed"):
        train(copy_of(finished, tmp_path), dict(resume=True, seed=5, epochs=9, batch_size=16))


def test_resume_with_other_free_settings(finished, tmp_path):
    interrupted(tmp_path, TINY, pretrain.Trainer, "train_step", 6)
    train(tmp_path, workers=1, micro_batch=16, data_root="nowhere", download=True, resume=True)
    assert_same_run(finished, tmp_path)


def test_resume_keeps_the_free_settings_that_are_not_given(monkeypatch, tmp_path):
    split = TINY | dict(micro_batch=4, drop_path=0.3)  # with drop path other micro-batches would give other weights
    train(tmp_path / "whole", split)
    interrupted(tmp_path / "parts", split, pretrain.Trainer, "train_step", 6)
    resumed = train(tmp_path / "parts", {}, resume=True)
    assert resumed["config"]["micro_batch"] == 4
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_killed_in_the_first_epoch_and_resumed(finished, tmp_path):
    interrupted(tmp_path, TINY, pretrain.Trainer, "train_step", 1)
    assert load(tmp_path)["epoch"] == 0 and log(tmp_path) == []
    train(tmp_path, {}, resume=True)
    assert_same_run(finished, tmp_path)


def test_resume_with_other_images(monkeypatch, tmp_path):
    folder = write_images(tmp_path / "images")
    settings = TINY | dict(data=folder, limit=None, batch_size=4)
    train(tmp_path / "run", settings)
    (folder / "0.jpg").rename(tmp_path / "0.jpg")
    with pytest.raises(UserError, match="--data has 15 images here, 16 in the run to resume"):
        train(tmp_path / "run", settings, resume=True)


def test_a_new_run_moves_the_old_one_aside(finished, tmp_path, capsys):
    out = copy_of(finished, tmp_path)
    before = contents(out)
    second = train(out, seed=1)
    assert f"{out} is now in {out}-1" in capsys.readouterr().out
    train(out, seed=2)
    assert contents(tmp_path / "run-1") == before
    assert identical(load(tmp_path / "run-2"), second)
    assert [load(out)["config"]["seed"], *(row["epoch"] for row in log(out))] == [2, 1, 2]


# --- accumulation -----------------------------------------------------------------------------------------------------

# In three steps nothing is clipped.
THREE_STEPS = TINY | dict(epochs=1, warmup_epochs=0, limit=50, clip_grad=1000)


@pytest.mark.parametrize("micro_batch", [8, 4, 1])
def test_micro_batches_equal_the_batch(tmp_path, micro_batch):
    train(tmp_path / "whole", THREE_STEPS)
    train(tmp_path / "parts", THREE_STEPS, micro_batch=micro_batch)
    assert_close_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_the_teacher_moves_once_a_step(monkeypatch, tmp_path, micro_batch):
    start, students = [], []

    def before(pcae, _):
        if not start:
            start.append(copy.deepcopy(pcae.teacher.state_dict()))

    def after(pcae, _):
        students.append(copy.deepcopy(pcae.student.state_dict()))

    wrap(monkeypatch, model.PCAE, "update_teacher", before, after)
    checkpoint = train(tmp_path, micro_batch=micro_batch)
    assert len(students) == 8 and identical(start[0], students[0])  # the first learning rate is zero
    for name, expected in start[0].items():
        expected = expected.double()
        for step, student in enumerate(students):
            momentum = cosine(0.9, 1, step / 8)
            expected = momentum * expected + (1 - momentum) * student[name].double()
        torch.testing.assert_close(checkpoint["teacher"][name].double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(checkpoint["teacher"]["pos_embed"], start[0]["pos_embed"])
    assert not torch.equal(checkpoint["teacher"]["norm.weight"], checkpoint["student"]["norm.weight"])


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder in which `worker`, at the end of this file, ran in two processes."""
    folder = tmp_path_factory.mktemp("two")
    return torchrun(folder, __file__, folder)


def ranks(folder):
    """What the two processes saved."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["whole", "parts"])
def test_two_processes_equal_one(two_processes, tmp_path, name):
    train(tmp_path, THREE_STEPS)
    assert_close_runs(tmp_path, two_processes / name)


@pytest.mark.parametrize("name", ["whole", "parts", "random", "nan", "resumed"])
def test_processes_hold_the_same_weights(two_processes, name):
    first, second = (rank[name] for rank in ranks(two_processes))
    assert identical(first, second)
    checkpoint = load(two_processes / name)
    assert identical(first["teacher"], checkpoint["teacher"]) and identical(first["student"], checkpoint["student"])


def test_one_process_downloads_and_then_the_others_look(two_processes):
    assert [rank["came second"] for rank in ranks(two_processes)] == [False, True]


def test_processes_draw_different_random_numbers(two_processes):
    first, second = (rank["seeds"] for rank in ranks(two_processes))
    assert len(first) == 12 and len(set(first + second)) == 24


def test_resumed_in_two_processes(two_processes):
    assert_same_run(two_processes / "random", two_processes / "resumed")


def test_one_bad_process_skips_the_step_of_both(two_processes):
    for rank in ranks(two_processes):
        assert rank["skipped"] == 1
    assert load(two_processes / "nan")["skipped"] == 1
    assert all(tensor.isfinite().all() for tensor in tensors(load(two_processes / "nan")))


def test_a_batch_that_processes_cannot_share(two_processes):
    assert "error: --batch-size 15 is not divisible by the 2 processes" in (two_processes / "words.txt").read_text()
    assert not (two_processes / "odd").exists()


# --- not finite -------------------------------------------------------------------------------------------------------

BAD = {
    "nan": lambda loss, prediction: loss * math.nan,
    "inf": lambda loss, prediction: loss * math.inf,
    "loss alone": lambda loss, prediction: loss + math.nan,
    "gradient alone": lambda loss, prediction: loss + (prediction.sum() * 0).sqrt(),
}


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("how", BAD)
def test_a_bad_step_is_skipped(monkeypatch, tmp_path, how, micro_batch):
    before, after = {}, {}
    poison(monkeypatch, {2, 5}, BAD[how])
    wrap(
        monkeypatch,
        pretrain.Trainer,
        "train_step",
        before=lambda trainer, _: before.update({trainer.step: copy.deepcopy(trainer.state())}),
        after=lambda trainer, _: after.update({trainer.step - 1: copy.deepcopy(trainer.state())}),
    )
    checkpoint = train(tmp_path, micro_batch=micro_batch)
    for step in range(8):
        unchanged = [identical(before[step][part], after[step][part]) for part in ("student", "teacher", "decoder")]
        unchanged.append(identical(before[step]["optimizer"]["state"], after[step]["optimizer"]["state"]))
        if step > 0:  # whose learning rate is zero
            assert unchanged == [step in (2, 5)] * 4
    assert checkpoint["step"] == 8 and checkpoint["skipped"] == 2 and checkpoint["skipped_in_a_row"] == 0
    assert [row["skipped"] for row in log(tmp_path)] == [1, 2]
    assert all(math.isfinite(value) for row in log(tmp_path) for value in row.values())
    assert all(tensor.isfinite().all() for tensor in tensors(checkpoint))


def test_ten_bad_steps_in_a_row_end_the_run(monkeypatch, tmp_path):
    settings = TINY | dict(limit=256)  # 16 steps an epoch
    with monkeypatch.context() as patch:
        poison(patch, range(18, 28))
        with pytest.raises(UserError, match=r"not finite 10 steps in a row \(step 28\): .*--blr .*--precision fp32"):
            train(tmp_path / "run", settings)
    checkpoint = load(tmp_path / "run")
    assert (checkpoint["epoch"], checkpoint["step"], checkpoint["skipped"]) == (1, 16, 0)
    train(tmp_path / "whole", settings)
    train(tmp_path / "run", settings, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_nine_bad_steps_in_a_row_do_not(monkeypatch, tmp_path, capsys):
    poison(monkeypatch, {*range(1, 10), *range(11, 20)})
    checkpoint = train(tmp_path, epochs=6)
    assert checkpoint["skipped"] == 18 and checkpoint["epoch"] == 6
    rows = log(tmp_path)
    assert rows[1]["loss"] is None and rows[2]["loss"] > 0 and rows[5]["loss"] > 0
    text = capsys.readouterr().out
    assert "epoch 2/6  every step was skipped" in text and "18 steps were skipped" in text


def test_bad_steps_in_a_row_are_counted_across_epochs_and_resume(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        poison(patch, range(2, 8))
        interrupted(tmp_path, TINY | dict(epochs=4), pretrain.Trainer, "train_step", 8)
    poison(monkeypatch, range(8, 16))
    with pytest.raises(UserError, match="step 12"):
        train(tmp_path, epochs=4, resume=True)
    assert all(tensor.isfinite().all() for tensor in tensors(load(tmp_path)))


# --- collapse ---------------------------------------------------------------------------------------------------------


def describe(**changes):
    row = dict(epoch=5, loss=0.3, target_std=0.9, prediction_std=0.5, images_per_second=100.0) | changes
    return pretrain.describe_epoch(row, pretrain.arguments().parse_args(["--warmup-epochs", "3"]))


def test_warning_about_collapse():
    assert "warning" not in describe()
    text = describe(target_std=0.05)
    assert text.count("warning") == 1 and "target_std is 0.05" in text and "--ema" in text and "--blr" in text
    assert "prediction_std is 0.05" in describe(prediction_std=0.05)
    assert describe(target_std=0.05, prediction_std=0.05).count("warning") == 2


def test_warning_about_predictions_only_after_warm_up():
    assert "warning" not in describe(epoch=3, prediction_std=0.05)
    assert "warning" in describe(epoch=4, prediction_std=0.05)
    assert "warning" in describe(epoch=1, target_std=0.05)


def test_knn_in_the_line_of_an_epoch():
    assert "knn 41.5% linear 60.2%" in describe(knn=0.415, linear=0.602) and "knn" not in describe()


def test_collapsed_run_warns(monkeypatch, tmp_path, capsys):
    build = pretrain.build_model

    def build_collapsed(args):
        pcae, encoder = build(args)
        with torch.no_grad():
            pcae.teacher.norm.weight.zero_()
            pcae.teacher.norm.bias.normal_()  # all tokens are this now
        return pcae, encoder

    monkeypatch.setattr(pretrain, "build_model", build_collapsed)
    train(tmp_path, ema=1)
    assert log(tmp_path)[-1]["target_std"] < 1e-3
    assert "warning: target_std is 0.00" in capsys.readouterr().out


# --- learning ---------------------------------------------------------------------------------------------------------


def test_learns(tmp_path, capsys):
    train(tmp_path, epochs=40, warmup_epochs=10, dim=32, decoder_dim=32, lr=1e-2, ema=0.99)
    rows = log(tmp_path)
    assert 0.9 < rows[0]["loss"] < 1.1 and rows[-1]["loss"] < 0.6
    assert rows[-1]["target_std"] > 0.5 and rows[-1]["prediction_std"] > 0.3
    text = capsys.readouterr().out
    assert "warning" not in text
    assert f"The loss went from {rows[0]['loss']:.3f} to {rows[-1]['loss']:.3f}" in text


def test_bf16(tmp_path):
    checkpoint = train(tmp_path / "bf16", precision="bf16")
    train(tmp_path / "fp32", precision="fp32")
    ours, theirs = log(tmp_path / "bf16"), log(tmp_path / "fp32")
    assert all(math.isfinite(row["loss"]) for row in ours)
    assert 0 < abs(ours[0]["loss"] - theirs[0]["loss"]) < 0.05
    assert all(tensor.dtype == torch.float32 for part in ("student", "teacher") for tensor in tensors(checkpoint[part]))


def test_compile_leaves_names_alone(monkeypatch, tmp_path):
    compiled = []

    class Compiled(torch.nn.Module):
        def __init__(self, module, dynamic):
            super().__init__()
            assert dynamic is False
            self._orig_mod = module  # as torch.compile does it
            compiled.append(module)

        def forward(self, *args):
            return self._orig_mod(*args)

    monkeypatch.setattr(torch, "compile", Compiled)
    train(tmp_path / "compiled", compile=True)
    train(tmp_path / "plain")
    assert len(compiled) == 1
    assert_same_run(tmp_path / "compiled", tmp_path / "plain")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_cuda(tmp_path, precision):
    train(tmp_path / "cpu")
    train(tmp_path / "cuda", device="cuda", precision=precision)
    for ours, theirs in zip(log(tmp_path / "cuda"), log(tmp_path / "cpu"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.05)
    train(tmp_path / "cuda", resume=True, precision=precision)


# --- nearest neighbours -----------------------------------------------------------------------------------------------


def test_knn(tmp_path):
    checkpoint = train(tmp_path / "scored", RANDOM, knn_every=2)
    rows = log(tmp_path / "scored")
    assert [row["epoch"] for row in rows if "knn" in row] == [0, 2, 3]
    assert rows[0].keys() == {"epoch", "step", "knn", "linear"} and [row["epoch"] for row in rows] == [0, 1, 2, 3]

    student = model.ViT(**checkpoint["encoder"]).eval()
    student.load_state_dict(checkpoint["student"])
    features, labels = [], []
    for images in (data.Shapes("train", 5000, (16, 16)), data.Shapes("val", 2000, (16, 16))):
        with torch.no_grad():
            features.append(student(data.Normalize()(images.images)).tokens[:, 1:].mean(dim=1))
        labels.append(torch.tensor(images.labels))
    expected = engine.linear_accuracy(features[0], labels[0], features[1], labels[1])
    assert rows[-1]["linear"] == pytest.approx(expected, abs=2e-3) and rows[-1]["linear"] > 0.15
    expected = engine.knn_accuracy(features[0], labels[0], features[1], labels[1])
    assert rows[-1]["knn"] == pytest.approx(expected, abs=2e-3) and rows[-1]["knn"] > 0.15

    plain = train(tmp_path / "plain", RANDOM)  # scoring leaves the training as it is
    for part in ("student", "teacher", "decoder", "optimizer"):
        assert identical(checkpoint[part], plain[part])


def test_knn_on_class_folders(tmp_path):
    folder = write_classes(tmp_path / "images")
    train(tmp_path / "run", data=folder, limit=None, batch_size=8, knn_every=1)
    assert [row["epoch"] for row in log(tmp_path / "run") if "knn" in row] == [0, 1, 2]


def test_knn_needs_labels(tmp_path):
    with pytest.raises(UserError, match="--knn-every"):
        train(tmp_path / "run", data=write_images(tmp_path / "images"), limit=None, knn_every=1)


# --- recipes, sizes, dry runs -----------------------------------------------------------------------------------------

PAPER = dict(
    model="vit_base", image_size=[224], patch_size=16, mask_ratio=0.75, drop_stages=3, drop_ratio=0.5, drop_at="start",
    criterion="similarity", decoder_dim=512, decoder_depth=2, ema=0.9999, epochs=300, warmup_epochs=40, batch_size=4096,
    blr=1.5e-4, lr=None, weight_decay=0.05, min_crop=0.2, drop_path=0.0,
)  # fmt: skip


def settings_of(words):
    return vars(pretrain.read_settings(words.split())[0])


def test_recipe():
    args = settings_of("--recipe imagenet --data somewhere")
    assert {name: args[name] for name in PAPER} == PAPER


def test_recipe_has_the_paper_token_counts():
    args = pretrain.read_settings("--recipe imagenet --dim 48 --decoder-dim 64".split())[0]
    assert pretrain.build_model(args)[0].token_counts == [147, *[73] * 4, *[36] * 4, *[18] * 4]


def test_flags_win_over_the_recipe():
    for words in ("--recipe imagenet --batch-size 64 --ema 0.5", "--batch-size 64 --ema 0.5 --recipe imagenet"):
        args = settings_of(words)  # 64 is also what the flag is without a recipe
        assert (args["batch_size"], args["ema"], args["epochs"]) == (64, 0.5, 300)


@pytest.fixture
def steps_taken(monkeypatch):
    steps = []
    wrap(monkeypatch, pretrain.Trainer, "train_step", after=lambda trainer, _: steps.append(trainer.step))
    return steps


@pytest.fixture
def scratch(monkeypatch, tmp_path):
    """Where temporary folders go, and the folder the script runs in."""
    for name in ("temporary", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_dry_run(scratch, steps_taken, capsys):
    folder = write_images(scratch / "images", 12)
    settings = dict(recipe="imagenet", model="vit_tiny", batch_size=4, data=folder, device="cpu", workers=0)
    pretrain.main(flags(settings | dict(dry_run=True)))
    assert steps_taken == [1, 2] and "dry run" in capsys.readouterr().out
    assert not os.listdir("temporary" if os.path.exists("temporary") else scratch / "temporary")
    assert not os.listdir(scratch / "here")


def test_dry_run_leaves_a_run_alone(scratch, finished, steps_taken):
    out = copy_of(finished, scratch)
    train(out, dry_run=True)
    assert steps_taken == [1, 2] and contents(out) == contents(finished)
    assert sorted(os.listdir(scratch)) == ["here", "run", "temporary"] and not os.listdir(scratch / "temporary")


def test_dry_run_on_little_data(scratch, steps_taken):
    pretrain.main(flags(TINY | dict(dry_run=True, limit=16, out=scratch / "run")))
    assert steps_taken == [1]


@pytest.mark.parametrize("name, blocks", [("vit_large", 24), ("vit_huge", 32)])
def test_large_models(tmp_path, name, blocks):
    checkpoint = train(
        tmp_path, model=name, dim=32, depth=None, drop_stages=3, limit=4, batch_size=4, epochs=1, warmup_epochs=0
    )
    assert len({key.split(".")[1] for key in checkpoint["student"] if key.startswith("blocks.")}) == blocks
    assert checkpoint["step"] == 1 and 0.5 < log(tmp_path)[0]["loss"] < 1.5


@pytest.mark.parametrize("size, patches", [([16, 32], 32), ([32], 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_and_channels(tmp_path, size, patches, channels):
    checkpoint = train(tmp_path, image_size=size, channels=channels, epochs=1, warmup_epochs=0)
    assert checkpoint["student"]["pos_embed"].shape == (1, 1 + patches, 16)
    assert checkpoint["student"]["patch_embed.proj.weight"].shape == (16, channels, 4, 4)


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "missing folder": (dict(data="nowhere"), "--data nowhere"),
    "image size not a multiple of the patch": (dict(image_size=18), "--image-size.*--patch-size"),
    "one side not a multiple": (dict(image_size=[16, 18]), "--image-size"),
    "three sides": (dict(image_size=[16, 16, 16]), "--image-size"),
    "patch size 0": (dict(patch_size=0), "--patch-size"),
    "everything masked": (dict(mask_ratio=1), "--mask-ratio"),
    "negative mask ratio": (dict(mask_ratio=-0.1), "--mask-ratio"),
    "nothing visible": (dict(mask_ratio=0.97), "--mask-ratio"),
    "nothing masked": (dict(mask_ratio=0), "--mask-ratio"),
    "mask ratio nan": (dict(mask_ratio="nan"), "--mask-ratio"),
    "everything dropped": (dict(drop_ratio=1), "--drop-ratio"),
    "negative drop ratio": (dict(drop_ratio=-0.5), "--drop-ratio"),
    "no token left": (dict(depth=4, drop_stages=4), "--drop-"),
    "more stages than blocks": (dict(drop_stages=3), "--drop-stages"),
    "negative stages": (dict(drop_stages=-1), "--drop-stages"),
    "block that is not there": (dict(drop_blocks=2), "--drop-blocks"),
    "block named twice": (dict(drop_blocks=[1, 1]), "--drop-blocks"),
    "micro-batch does not divide": (dict(micro_batch=5), "--micro-batch 5"),
    "micro-batch 0": (dict(micro_batch=0), "--micro-batch"),
    "batch 0": (dict(batch_size=0), "--batch-size"),
    "batch larger than the data": (dict(batch_size=65), "--batch-size 65"),
    "limit 0": (dict(limit=0), "--limit"),
    "epochs 0": (dict(epochs=0), "--epochs"),
    "warm-up as long as the run": (dict(warmup_epochs=2), "--warmup-epochs"),
    "negative warm-up": (dict(warmup_epochs=-1), "--warmup-epochs"),
    "lr 0": (dict(lr=0), "--lr"),
    "lr nan": (dict(lr="nan"), "--lr"),
    "lr infinite": (dict(lr="inf"), "--lr"),
    "blr negative": (dict(blr=-1), "--blr"),
    "weight decay negative": (dict(weight_decay=-1), "--weight-decay"),
    "clip": (dict(clip_grad=-1), "--clip-grad"),
    "ema above 1": (dict(ema=1.1), "--ema"),
    "drop path 1": (dict(drop_path=1), "--drop-path"),
    "crop 0": (dict(min_crop=0), "--min-crop"),
    "knn negative": (dict(knn_every=-1), "--knn-every"),
    "workers negative": (dict(workers=-1), "--workers"),
    "heads do not divide the width": (dict(heads=3), "--heads"),
    "heads 0": (dict(heads=0), "--heads"),
    "decoder heads do not divide": (dict(decoder_heads=3), "--decoder-heads"),
    "width not a multiple of 4": (dict(dim=18), "--dim"),
    "decoder width not a multiple of 4": (dict(decoder_dim=18), "--decoder-dim"),
    "width 0": (dict(dim=0), "--dim"),
    "decoder width 0": (dict(decoder_dim=0), "--decoder-dim"),
    "depth negative": (dict(depth=-1), "--depth|--drop-stages"),
    "decoder depth negative": (dict(decoder_depth=-1), "--decoder-depth"),
    "seed too large": (dict(seed=2**70), "--seed"),
    "unknown device": (dict(device="toaster"), "--device toaster"),
    "nothing to resume": (dict(resume=True), "last.pt"),
    "missing file to resume": (dict(resume="nowhere.pt"), "nowhere.pt"),
}


def assert_mistake(match, *args, **changes):
    with pytest.raises(UserError, match=match) as error:
        train(*args, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(scratch, mistake):
    changes, named = MISTAKES[mistake]
    assert_mistake(named, scratch / "run", **changes)
    assert not (scratch / "run").exists()  # found out before anything is written


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_that_is_not_here(tmp_path):
    assert_mistake("--device cuda", tmp_path / "run", device="cuda")


def test_mistakes_about_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("no image")
    assert_mistake("--data .*empty", tmp_path / "run", data=tmp_path / "empty", limit=None)
    folder = write_images(tmp_path / "images", 16)
    assert_mistake("--limit 17.* 16 images", tmp_path / "run", data=folder, limit=17)
    assert_mistake("--batch-size 17.* 16 images", tmp_path / "run", data=folder, limit=None, batch_size=17)


def test_out_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert_mistake("--out .*file", tmp_path / "file")


def test_out_that_cannot_be_moved_aside(monkeypatch, finished, tmp_path):
    monkeypatch.chdir(copy_of(finished, tmp_path))
    assert_mistake("--out", Path("."))
    assert contents(tmp_path / "run") == contents(finished)


class Code:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_broken_checkpoints(finished, tmp_path):
    path, canary = tmp_path / "last.pt", tmp_path / "canary"
    whole = (finished / "last.pt").read_bytes()
    code = pickle.dumps(Code(canary), protocol=2)
    for content in (b"", b"no checkpoint", whole[:100], whole[: len(whole) // 2], whole[:-10], code):
        path.write_bytes(content)
        assert_mistake(str(path), tmp_path, resume=True)
    for content in (Code(canary), dict(method="pcae", config=Code(canary))):
        torch.save(content, path)
        assert_mistake(str(path), tmp_path, resume=True)
    assert not canary.exists()


def test_checkpoints_of_another_kind(finished, tmp_path):
    path, ours = tmp_path / "last.pt", load(finished)
    for content in (torch.zeros(3), [1, 2], {}, ours["student"], ours | dict(method="finetune")):
        torch.save(content, path)
        assert_mistake(str(path), tmp_path, resume=True)
    for part in ("student", "teacher", "decoder", "optimizer"):
        torch.save({name: value for name, value in ours.items() if name != part}, path)
        expected = "can be continued" if part == "optimizer" else "does not fit"  # best.pt of a classifier has none
        assert_mistake(expected, tmp_path, resume=True)


# --- the command line -------------------------------------------------------------------------------------------------


def test_command_line_on_a_folder(tmp_path):
    folder = write_images(tmp_path / "images", 24)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    settings = TINY | dict(data=folder, limit=None, batch_size=8, workers=1)
    result = run_process(command(**settings, out="run"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "25 images" in result.stdout and "broken.jpg" in result.stdout and "epoch 2/2" in result.stdout
    assert "1 unreadable" in result.stdout
    assert load(tmp_path / "run")["num_images"] == 25 and len(log(tmp_path / "run")) == 2


def test_command_line_mistake(tmp_path):
    result = run_process(command(data="nowhere", out="run"), cwd=tmp_path)
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    assert result.stderr.startswith("error: --data nowhere") and result.stderr.count("\n") == 1


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        pretrain.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "python pretrain.py --data FOLDER" in text
    for action in pretrain.arguments()._actions:
        assert action.option_strings[-1] in text and action.help
        if action.default not in (None, False, "==SUPPRESS=="):
            assert f"(default: {action.default})" in action.help
        if action.default is None and action.dest not in ("resume", "lr", "drop_blocks"):
            assert "(default: " in action.help


# --- run by torchrun in two processes ---------------------------------------------------------------------------------


def worker(folder):
    """Several runs of this process and the other one together; saves what this one holds in the end."""
    world = engine.start_world("cpu")
    engine.start_world = lambda device: world  # joined already
    rank, seen, seeds, models = world.rank, {}, [], []
    wrap(pytest.MonkeyPatch(), model.PCAE, "update_teacher", before=lambda pcae, _: models.append(pcae))

    def run(name, settings):
        pretrain.main(flags(settings | dict(out=folder / name)))
        seen[name] = {part: getattr(models[-1], part).state_dict() for part in ("student", "teacher", "decoder")}

    run("whole", THREE_STEPS)
    with pytest.MonkeyPatch.context() as patch:
        find = data.unlabelled_images

        def download(*arguments):
            seen["came second"] = (folder / "downloaded").exists()
            time.sleep(1 - rank)
            (folder / "downloaded").touch()
            return find(*arguments)

        patch.setattr(data, "unlabelled_images", download)
        run("parts", THREE_STEPS | dict(micro_batch=4, download=True))
    with pytest.MonkeyPatch.context() as patch:
        wrap(patch, pretrain.Trainer, "train_step", after=lambda *_: seeds.append(torch.initial_seed()))
        run("random", RANDOM | dict(workers=1))
    interrupted(folder / "resumed", RANDOM, pretrain.Trainer, "train_step", 6)
    run("resumed", RANDOM | dict(resume=True))
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, {2}, rank=1)
        wrap(patch, pretrain.Trainer, "train_epoch", after=lambda trainer, *_: seen.update(skipped=trainer.skipped))
        run("nan", TINY)
    torch.save(seen | dict(seeds=seeds), folder / f"rank{rank}.pt")
    with pytest.raises(SystemExit):
        engine.launch(lambda: run("odd", TINY | dict(batch_size=15)))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
