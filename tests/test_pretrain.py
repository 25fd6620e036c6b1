"""The pre-training script: its steps in plain code, invariances, resuming after a kill, invalid settings."""

import argparse
import json
import math
import shutil

import pytest
import torch

import data
import helpers
import pretrain
from helpers import flags, identical, log, train
from model import ViT
from util import runs, training

CPU = torch.device("cpu")
# 4 steps per epoch, 8 in total, in 0.2 seconds.
TINY = dict(
    limit=64,
    batch_size=16,
    epochs=2,
    image_size=16,
    patch_size=4,
    decoder_dim=16,
    drop_stages=2,
    ema=0.9,
    knn_every=0,
    workers=0,
    device="cpu",
)
# Everything that draws random numbers while training.
RANDOM = TINY | dict(drop_path=0.3, criterion="random", min_crop=0.5)
# The other methods reject PCAE's flags.
MAE = dict(method="mae", drop_stages=None, ema=None)
SIMMIM = dict(method="simmim", drop_stages=None, ema=None, decoder_dim=None)
PARTS = ("student", "teacher", "decoder")


def pretrained(out, **changes):
    return train("pretrain", out, **TINY | changes)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_files_of_a_run(tmp_path):
    checkpoint = pretrained(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "args.json", "metrics.jsonl", "last.pt"}
    assert json.loads((tmp_path / "run/args.json").read_text())["epochs"] == checkpoint["config"]["epochs"] == 2
    assert (checkpoint["method"], checkpoint["epoch"], checkpoint["step"]) == ("pcae", 2, 8)
    assert checkpoint["history"] == log(tmp_path / "run") and checkpoint["num_images"] == 64
    for part in ("student", "teacher"):  # rebuilt from the file alone
        ViT(**checkpoint["encoder"]).load_state_dict(checkpoint[part])


@pytest.mark.parametrize("method, changes", [("pcae", {}), ("mae", MAE)])
def test_four_steps_by_hand(tmp_path, method, changes):
    """The training loop of two epochs in plain tensors: images, split, forward pass, clipping, AdamW, EMA."""
    lr, decay, clip, ema = 0.01, 0.1, 0.3, 0.9
    checkpoint = pretrained(
        tmp_path,
        limit=32,
        warmup_epochs=1,
        blr=lr * 256 / 16,
        weight_decay=decay,
        clip_grad=clip,
        drop_path=0.3,
        min_crop=0.5,
        seed=3,
        **changes,
    )
    args = argparse.Namespace(**checkpoint["config"])
    training.seed_generators(CPU, 3, "weights")
    model = pretrain.build_model(args).train()
    views = data.BatchViews(data.unlabelled_images("shapes", "", (16, 16), 32), (16, 16), 0.5, seed=3)
    loader = data.training_loader(views, 16, seed=3, workers=0, world=training.World(0, 1, CPU))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    first, second = ({name: torch.zeros_like(parameter) for name, parameter in trained.items()} for _ in range(2))
    for step, (images, _, _) in enumerate(helpers.batches_of(loader, epochs=2)):
        training.seed_generators(CPU, 3, "step", step, 0)
        noise = torch.rand(16, 16, generator=training.generator(3, "split", step))
        loss = model(data.Normalize()(images), noise).loss
        gradients = torch.autograd.grad(loss, list(trained.values()))
        norm = sum(gradient.square().sum() for gradient in gradients).sqrt()
        assert norm > clip
        rate = lr * step / 2 if step < 2 else lr * (1 + math.cos(math.pi * (step - 2) / 2)) / 2  # warm-up of 2 steps
        with torch.no_grad():
            for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
                gradient = gradient * clip / norm
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.95 * second[name] + 0.05 * gradient.square()
                if parameter.ndim >= 2 and "token" not in name:
                    parameter *= 1 - rate * decay
                mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
                parameter -= rate * mean / (square.sqrt() + 1e-8)
            if method == "pcae":
                momentum = 1 - (1 - ema) * (1 + math.cos(math.pi * step / 4)) / 2
                for ours, new in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                    ours.copy_(momentum * ours + (1 - momentum) * new)
    assert checkpoint["step"] == step + 1 == 4 and checkpoint["history"][-1]["lr"] == pytest.approx(lr / 2)
    for name, part in model.named_children():
        helpers.assert_close_weights(checkpoint[name], part.state_dict())


@pytest.mark.parametrize("changes", [dict(), MAE | dict(channels=1), SIMMIM | dict(image_size=[8, 16])])
def test_the_loss_falls(tmp_path, changes):
    losses = [row["loss"] for row in pretrained(tmp_path, epochs=12, **changes)["history"]]
    assert losses[-1] < 0.9 * losses[0]


def test_bf16_changes_the_loss_but_not_the_type_of_weights(tmp_path):
    full, half = (pretrained(tmp_path / precision, precision=precision) for precision in ("fp32", "bf16"))
    assert 0 < abs(full["history"][-1]["loss"] - half["history"][-1]["loss"]) < 0.05
    assert {tensor.dtype for part in PARTS for tensor in half[part].values()} == {torch.float32}


# --- invariances ------------------------------------------------------------------------------------------------------


def test_the_seed_and_the_workers(tmp_path):
    """The same seed gives the same bits with any number of workers; another seed gives another run."""
    folder = helpers.write_images(tmp_path / "images")
    settings = RANDOM | dict(data=folder, limit=None, batch_size=4)
    first, second, other = (
        train("pretrain", tmp_path / f"{workers} {seed}", **settings | dict(workers=workers, seed=seed))
        for workers, seed in ((0, 0), (2, 0), (0, 1))
    )
    helpers.assert_same_run(first, second)
    assert not any(identical(first[part], other[part]) for part in PARTS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run three steps of one process, without micro-batches."""
    return pretrained(tmp_path_factory.mktemp("whole"), epochs=1, limit=48)


def test_micro_batches_equal_the_batch(tmp_path, whole):
    helpers.assert_close_runs(whole, pretrained(tmp_path, epochs=1, limit=48, micro_batch=4), PARTS)


def test_two_processes_equal_one(tmp_path, whole):
    settings = TINY | dict(epochs=1, limit=48)
    outs = [tmp_path / "whole", tmp_path / "parts"]
    helpers.two_processes("pretrain", settings | dict(out=outs[0]), settings | dict(out=outs[1], micro_batch=4))
    for out in outs:
        helpers.assert_close_runs(whole, runs.load(out / "last.pt"), PARTS)


# --- killed and resumed -----------------------------------------------------------------------------------------------


def test_a_killed_run_resumes_with_the_same_bits(tmp_path):
    """After SIGKILL; from a copy made during the run, in another folder; after the end."""
    settings = RANDOM | dict(epochs=16, limit=32)
    killed, copy, other = tmp_path / "killed", tmp_path / "copy.pt", tmp_path / "other"
    uninterrupted = train("pretrain", tmp_path / "whole", **settings)
    with helpers.start("pretrain", killed, **settings) as process:
        helpers.wait_for_rows(process, killed, 1)
        shutil.copy(killed / "last.pt", copy)
        helpers.wait_for_rows(process, killed, 3)
        process.kill()
    assert runs.load(killed / "last.pt")["epoch"] < 16, "the run ended before it was killed"
    for out, resumed in ((killed, killed / "last.pt"), (other, copy)):
        helpers.assert_same_run(uninterrupted, train("pretrain", out, resume=resumed))
        assert [row["epoch"] for row in log(out)] == list(range(1, 17))
    finished = (killed / "last.pt").read_bytes()
    pretrain.main(flags(resume=True, out=killed))
    assert (killed / "last.pt").read_bytes() == finished and not (killed / "earlier-1").exists()


# --- failures ---------------------------------------------------------------------------------------------------------


def spoiled(out, name, index, epochs, **settings):
    """Run one of `epochs` epochs and set a weight of the decoder to nan."""
    checkpoint = pretrained(out, epochs=1, **settings)
    checkpoint["config"]["epochs"] = epochs
    checkpoint["decoder"][name][index] = math.nan
    runs.save(out / "last.pt", checkpoint)
    return checkpoint


def test_ten_steps_in_a_row_that_are_not_finite(tmp_path):
    """A mask token of nan makes every step invalid: an epoch of 8 is skipped, the tenth step ends the run."""
    before = spoiled(tmp_path, "mask_token", ..., epochs=4, batch_size=8)
    with pytest.raises(SystemExit):
        pretrain.main(flags(resume=True, out=tmp_path))
    after = runs.load(tmp_path / "last.pt")
    assert (after["epoch"], after["step"], after["history"][-1]["skipped"]) == (2, 16, 8)
    assert identical(before["optimizer"]["state"], after["optimizer"]["state"])
    assert identical(before["student"], after["student"]) and identical(before["teacher"], after["teacher"])


def test_some_steps_that_are_not_finite(tmp_path):
    """A position of nan makes steps invalid if its patch is in the decoder. The other steps train."""
    before = spoiled(tmp_path, "pos_embed", (0, 3), epochs=2, batch_size=1, limit=32)
    pretrain.main(flags(resume=True, out=tmp_path))
    after, row = runs.load(tmp_path / "last.pt"), log(tmp_path)[-1]
    assert 10 < row["skipped"] < 32 and math.isfinite(row["loss"])
    for part in ("student", "teacher"):
        assert all(tensor.isfinite().all() for tensor in after[part].values())
        assert not identical(before[part], after[part])


def test_unreadable_images_are_counted(tmp_path):
    folder = helpers.write_images(tmp_path / "images", 16)
    (folder / "broken.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="broken.jpg"):
        checkpoint = pretrained(tmp_path / "run", data=folder, limit=None, batch_size=17)
    assert [row["unreadable"] for row in checkpoint["history"]] == [1, 1] and checkpoint["num_images"] == 17
    checkpoint["config"]["epochs"] = 3
    runs.save(tmp_path / "run/last.pt", checkpoint)
    (folder / "more.bmp").write_bytes((folder / "0.bmp").read_bytes())  # the order of the images would change
    with pytest.raises(SystemExit, match="--data"):
        pretrain.main(flags(resume=True, out=tmp_path / "run"))


@pytest.mark.parametrize(
    "useless, changes",
    [
        (False, dict(epochs=6, ema=0.9999)),
        (True, dict(epochs=2, ema=0.9999, criterion="reverse")),
        (True, dict(epochs=2, ema=0, blr=3e-2)),
    ],
    ids=["healthy", "reverse", "collapsed"],
)
def test_useless_targets_give_a_warning(tmp_path, capsys, useless, changes):
    """Either the k-NN accuracy rises above that of the untrained encoder, or the script prints a warning."""
    settings = dict(limit=4000, batch_size=32, patch_size=8, knn_every=9, device="cpu")
    history = train("pretrain", tmp_path, **settings | changes)["history"]
    assert (history[-1]["knn"] <= history[0]["knn"]) == useless == ("warning" in capsys.readouterr().out)


MISTAKES = [
    ("mask.ratio", dict(mask_ratio=1)),
    ("drop.ratio", dict(drop_ratio=1)),
    ("drop.ratio", dict(drop_ratio=0.9)),
    ("stages", dict(drop_stages=5)),
    ("blocks", dict(drop_blocks=4)),
    ("image.size", dict(image_size=18)),
    ("decoder", dict(decoder_dim=18)),
    ("nowhere", dict(data="nowhere")),
    ("--batch-size", dict(batch_size=65)),
    ("--micro-batch", dict(micro_batch=5)),
    ("--device", dict(device="toaster")),
    ("--min-crop", dict(min_crop=0)),
]


@pytest.mark.parametrize("named, changes", MISTAKES)
def test_invalid_settings(tmp_path, named, changes):
    with pytest.raises(SystemExit, match=named):
        pretrained(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists(), "an error before anything is written"


@pytest.mark.parametrize("name, value", [("ema", 1.5), ("drop_path", 1.5), ("epochs", 0), ("batch_size", 0)])
def test_numbers_out_of_range_are_rejected(tmp_path, name, value, capsys):
    with pytest.raises(SystemExit):
        pretrained(tmp_path / "run", **{name: value})
    assert f"--{name.replace('_', '-')}" in capsys.readouterr().err


# --- the scripts together ---------------------------------------------------------------------------------------------


def test_dry_runs_lead_from_script_to_script(tmp_path):
    """With the defaults of each script, except for sizes. pretrain.py also evaluates features."""
    checkpoint = train("pretrain", tmp_path / "a", dry_run=True, image_size=16, limit=256, device="cpu")
    assert checkpoint["step"] == 2
    assert all(0 <= row[name] <= 1 for row in checkpoint["history"] for name in ("knn", "ridge"))
    init = dict(init=tmp_path / "a/dry-run/last.pt", dry_run=True, device="cpu")
    assert train("finetune", tmp_path / "b", limit=256, **init)["step"] == 2
    small = dict(limit=16, batch_size=2, short_side=32, long_side=32, data_root=tmp_path / "data")
    assert train("detect", tmp_path / "c", **small, **init)["step"] == 2
