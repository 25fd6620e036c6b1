"""Doubtful data: broken validation sets, links, folders that are not classes, ids, mirrored images, names."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import coco
import data
import helpers
from coco import CocoDetection
from helpers import ENVIRONMENT, ROOT, evaluate, flags, log, train
from util import runs, training
from util.image_files import class_folders, find_images
from util.small_images import InMemory

TINY = dict(batch_size=8, epochs=1, image_size=16, patch_size=4, workers=0, device="cpu")
RAMP = (255 * torch.linspace(0, 1, 48)).byte().expand(3, 32, 48)  # from black on the left to white on the right


def write_classes(folder, *names, count=10):
    for split in ("train", "val"):
        for name in names:
            helpers.write_images(folder / split / name, count, shade=len(name))
    return folder


def write_ramps(folder, image_id=int, category_id=int, listed_id=int):
    """Write ramps with one square each in COCO's format; ids have the given types."""
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"{split}2017").mkdir()
        images, annotations = [], []
        for i in range(1, 41):
            Image.fromarray(RAMP.permute(1, 2, 0).numpy()).save(folder / f"{split}2017" / f"{i}.png")
            images.append(dict(id=listed_id(i), file_name=f"{i}.png", width=48, height=32))
            outline = [[4, 4, 16, 4, 16, 16, 4, 16]]
            annotations.append(dict(image_id=image_id(i), category_id=category_id(1), bbox=[4, 4, 12, 12]))
            annotations[-1] |= dict(segmentation=outline)
        content = dict(images=images, annotations=annotations, categories=[dict(id=1, name="größe 图")])
        text = json.dumps(content, ensure_ascii=False)
        (folder / f"annotations/instances_{split}2017.json").write_text(text, encoding="utf-8")
    return folder


# --- unreadable images ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:skipped an unreadable image")
def test_only_readable_images_are_counted(tmp_path, capsys):
    """A few unreadable images are skipped in each evaluation; most images unreadable is an error."""
    folder, settings = write_classes(tmp_path / "images", "a", "bb", count=20), TINY | dict(init="none")
    broken = sorted((folder / "val").rglob("*.*"))
    for path in broken[:2]:
        path.write_bytes(b"404 not found")
    train("finetune", tmp_path / "run", data=folder, **settings)
    evaluate(tmp_path / "run/last.pt")
    evaluate(tmp_path / "run/last.pt", knn=5)
    assert log(tmp_path / "run")[-1]["scored"] == 38 and capsys.readouterr().out.count(" 38 ") == 3
    for path in broken[2:-2]:
        path.write_bytes(b"404 not found")
    with pytest.raises(SystemExit, match="--data"):
        train("finetune", tmp_path / "other", data=folder, **settings)
    for changes in (dict(), dict(knn=5)):
        with pytest.raises(SystemExit, match="--data"):
            evaluate(tmp_path / "run/last.pt", **changes)


@pytest.mark.filterwarnings("ignore:skipped an unreadable image")
@pytest.mark.parametrize("broken", [0, 3, 30])
def test_only_readable_images_are_counted_in_detection(tmp_path, broken):
    folder = write_ramps(tmp_path / "coco")
    for i in range(1, 1 + broken):
        (folder / f"val2017/{i}.png").write_bytes(b"404 not found")
    settings = dict(data=folder, init="none", batch_size=20, epochs=1, short_side=32, channels=16, workers=0)
    if broken == 30:
        with pytest.raises(SystemExit, match="--data"):
            train("detect", tmp_path / "run", device="cpu", **settings)
    else:
        train("detect", tmp_path / "run", device="cpu", **settings)
        assert log(tmp_path / "run")[-1]["scored"] == 40 - broken


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [".", "..", "../..", "../bb", "deeper"])
def test_links_do_not_multiply_images(tmp_path, target):
    """Each folder counts once, however many links lead to it. Parent folders are not followed."""
    folder = write_classes(tmp_path / "images", "a", "bb") / "train"
    before = {name: len(find_images(folder / name)) for name in ("a", "bb")}
    for name in ("link", "another")[: 2 if target in ("../bb", "deeper") else 1]:
        (folder / "a" / name).symlink_to(target, target_is_directory=True)
    foreign = before["bb"] if target == "../bb" else 0  # added once by the links
    assert len(find_images(folder / "a")) == before["a"] + foreign
    assert len(find_images(folder)) == before["a"] + before["bb"]
    if not foreign:
        assert len(class_folders(folder)) == before["a"] + before["bb"]


def test_folders_without_images_are_not_classes(tmp_path, capsys):
    folder = write_classes(tmp_path, "ant", "bee", "cat")
    for split in ("train", "val"):
        (folder / split / "__MACOSX" / "ant").mkdir(parents=True)
        (folder / split / "__MACOSX" / "ant" / "._0.png").write_bytes(b"of a Mac")
    for images in (class_folders(folder / "train"), class_folders(folder / "val", ["ant", "bee", "cat"])):
        assert images.classes == ["ant", "bee", "cat"] and images.targets == 10 * [0] + 10 * [1] + 10 * [2]
    assert capsys.readouterr().out.count("__MACOSX") == 2
    assert train("finetune", tmp_path / "run", data=folder, init="none", **TINY)["classes"] == ["ant", "bee", "cat"]


def test_a_single_class_is_rejected(tmp_path):
    """Also if the class folders are one level too deep."""
    write_classes(tmp_path / "one", "ant")
    write_classes(tmp_path / "deep", "images/ant", "images/bee")
    for name in ("one", "deep"):
        with pytest.raises(SystemExit, match="--data"):
            train("finetune", tmp_path / "run", data=tmp_path / name, init="none", **TINY)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("types", [dict(image_id=str), dict(category_id=str), dict(image_id=str, category_id=str)])
def test_ids_that_are_text_on_one_side_are_rejected(tmp_path, types):
    with pytest.raises(SystemExit, match=f"instances_val2017.json.* {next(iter(types))}"):
        CocoDetection(*coco.find_annotations(write_ramps(tmp_path, **types), "val"))


def test_images_with_equal_ids_are_rejected(tmp_path):
    with pytest.raises(SystemExit, match="instances_val2017.json"):
        CocoDetection(*coco.find_annotations(write_ramps(tmp_path, listed_id=lambda i: i // 2), "val"))


@pytest.mark.filterwarnings("ignore:skipped an unreadable image")
def test_unreadable_images_of_all_processes_are_counted(tmp_path):
    folder = write_classes(tmp_path / "images", "a", "b", count=10)
    for path in sorted((folder / "train").rglob("*.*"))[:3]:
        path.write_bytes(b"404 not found")
    settings = TINY | dict(data=folder, patch_size=4, knn_every=0, batch_size=20, out=tmp_path / "run")
    helpers.two_processes("pretrain", settings)
    assert log(tmp_path / "run")[-1]["unreadable"] == 3


# --- left and right ---------------------------------------------------------------------------------------------------


class OneByOne(Dataset):
    """Forty ramps as a data set that is not in memory."""

    targets, classes = [i % 2 for i in range(40)], ["a", "b"]

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return RAMP, index % 2


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(
    "script, images",
    [
        *((script, kind) for script in ("pretrain", "finetune") for kind in ("in memory", "one by one")),
        ("detect", None),
    ],
)
def test_images_are_mirrored_unless_no_flip_is_given(tmp_path, monkeypatch, script, images, flip):
    """For crops of a batch at once, single crops, and images with objects."""
    mirrored, original = [], training.batches

    def batches(loader):
        for batch in original(loader):
            views = coco.unpack(batch)[0] if script == "detect" else batch[0]
            mirrored.extend(bool(view[0, :, 0].float().mean() > view[0, :, -1].float().mean()) for view in views)
            yield batch

    monkeypatch.setattr(training, "batches", batches)
    settings = TINY | dict(epochs=2, min_crop=0.5)
    if script == "detect":
        settings = dict(data=write_ramps(tmp_path / "coco"), limit=16, batch_size=8, epochs=2, short_side=32)
        settings |= dict(channels=16, crop_ratio=0.5, workers=0, device="cpu")
    else:
        in_memory = InMemory(RAMP.expand(40, -1, -1, -1), OneByOne.targets, OneByOne.classes)
        ramps = in_memory if images == "in memory" else OneByOne()
        for name in ("unlabelled_images", "labelled_images", "validation_images"):
            monkeypatch.setattr(data, name, lambda *args, **options: ramps)
    settings |= dict(knn_every=0) if script == "pretrain" else dict(init="none")
    importlib.import_module(script).main(flags(out=tmp_path / "run", **settings) + ["--no-flip"] * (not flip))
    assert len(mirrored) >= 32 and any(mirrored) == flip and not all(mirrored)


# --- names ------------------------------------------------------------------------------------------------------------


LOCALES = [dict(PYTHONIOENCODING="ascii"), dict(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")]


@pytest.mark.parametrize("script", ["finetune", "detect"])
@pytest.mark.parametrize("locale", LOCALES, ids=str)
def test_names_that_cannot_be_printed_do_not_end_a_run(tmp_path, script, locale):
    """Names of classes, of a folder without images, and in a UTF-8 file under any locale."""
    name, settings = "größe 图", dict(init="none", epochs=1, batch_size=8, workers=0, device="cpu")
    if script == "finetune":
        folder = write_classes(tmp_path / "images", name, "plain")
        (folder / "train" / f"{name} 2").mkdir()
        settings |= dict(image_size=16, patch_size=4)
    else:
        folder = write_ramps(tmp_path / "coco")
        settings |= dict(short_side=32, channels=16, limit=8)
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags(out=tmp_path / "run", data=folder, **settings)]
    result = subprocess.run(command, env=ENVIRONMENT | dict(LC_ALL="C") | locale, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    last = runs.load(tmp_path / "run/last.pt")
    names = last["classes"] if script == "finetune" else [category for _, category in last["categories"]]
    assert [os.fsencode(some).decode() for some in names] == ([name, "plain"] if script == "finetune" else [name])
