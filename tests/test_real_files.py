"""Unusual content of real files, after bug reports of practitioners: one kind of input per test.

Metadata does not make an image unreadable, values of unknown range are rejected by name, and changes or skipped files
are reported.
"""

import json
import math
import multiprocessing
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import coco
import finetune
import pretrain
from coco import CocoDetection, DetectionViews
from data import training_loader
from helpers import evaluate, flags, log, start, wait_for_rows
from model import ViT
from util import image_files, runs
from util.image_files import UnreadableImage, find_images, read_image
from util.training import World, batches, compiled
from weights import find_weights, load_encoder

NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
WORLD = World(rank=0, size=1, device=torch.device("cpu"))

# --- image files ------------------------------------------------------------------------------------------------------


def orientation(kind):
    """Return EXIF with a rotation (good), or broken as some cameras and editors write it."""
    exif = Image.Exif()
    exif[0x112] = 77 if kind == "value 77" else 6
    good = exif.tobytes()
    return dict(good=good, garbage=b"Exif\0\0" + b"\xff" * 40, nothing=b"Exif\0\0", cut=good[:16]).get(kind, good)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns about broken data
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("kind", ["good", "garbage", "nothing", "cut", "value 77"])
def test_broken_exif_does_not_make_images_unreadable(tmp_path, suffix, kind):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(NOISE).save(path, exif=orientation(kind), **dict(lossless=True) if suffix == "webp" else {})
    assert read_image(path).shape == (3, 40, 24) if kind == "good" else read_image(path).shape == (3, 24, 40)


def test_jpeg_is_read_equally_without_the_faster_decoder(tmp_path, monkeypatch):
    smooth = np.linspace(0, 255, 24 * 40 * 3).reshape(24, 40, 3).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95, exif=orientation("good"))
    expected = read_image(tmp_path / "a.jpg")
    monkeypatch.setattr(image_files, "decode_jpeg", None)
    torch.testing.assert_close(read_image(tmp_path / "a.jpg").int(), expected.int(), atol=2, rtol=0)


def test_large_texts_and_colour_profiles_do_not_make_images_unreadable(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    Image.fromarray(NOISE).save(tmp_path / "text.png", pnginfo=info)
    Image.fromarray(NOISE).save(tmp_path / "icc.png", icc_profile=b"\0" * 3_000_000)
    for name in ("text.png", "icc.png"):
        assert np.array_equal(read_image(tmp_path / name).permute(1, 2, 0), NOISE)


@pytest.mark.parametrize("scale, dtype", [(1, np.float32), (255, np.float32), (255, np.int32), (2**20, np.int32)])
def test_values_of_unknown_range_are_rejected_by_name(tmp_path, scale, dtype):
    Image.fromarray((np.linspace(0, 1, 64).reshape(8, 8) * scale).astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImage, match="a.tif"):
        read_image(tmp_path / "a.tif")


def test_formats_of_pillow_are_read_and_other_files_counted(tmp_path, capsys):
    kinds = dict(jfif="JPEG", jpe="JPEG", gif="GIF", png="PNG") | ({"avif": "AVIF"} if "AVIF" in Image.SAVE else {})
    for suffix, kind in kinds.items():
        if kind != "AVIF" or Image.registered_extensions().get(".avif"):
            Image.fromarray(NOISE).save(tmp_path / f"a.{suffix}", format=kind)
    for name in ("@eaDir/a.png", ".thumbnails/a.png", "notes.txt", "labels.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images(tmp_path)
    assert {Path(path).suffix[1:] for path in found} == kinds.keys() and len(found) == len(kinds)
    assert all(read_image(path).shape == (3, 24, 40) for path in found)
    assert "2 files" in capsys.readouterr().out


# --- weight files -----------------------------------------------------------------------------------------------------


def weights(**arguments):
    torch.manual_seed(1)
    return ViT((16, 16), 4, dim=64, depth=2, heads=4, **arguments).state_dict()


@pytest.mark.parametrize("inner", ["_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("outer", ["", "model.", "vit.", "module.", "_fsdp_wrapped_module."])
def test_wrappers_inside_and_before_names(inner, outer):
    tensors = weights()
    wrapped = {outer + name.replace("blocks.1.", f"blocks.1.{inner}"): value for name, value in tensors.items()}
    assert find_weights(dict(state_dict=wrapped)).keys() == tensors.keys()


@pytest.mark.parametrize("place", ["model_ema", "state_dict_ema"])
def test_an_average_alone_is_used_and_reported(place, capsys):
    tensors = weights()
    assert torch.equal(find_weights({place: tensors})["cls_token"], tensors["cls_token"])
    assert place in capsys.readouterr().out
    both = find_weights({"model": tensors, place: {name: value + 1 for name, value in tensors.items()}})
    assert torch.equal(both["cls_token"], tensors["cls_token"])


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_weights_for_other_channels_are_rejected(channels):
    with pytest.raises(ValueError, match=str(channels)):
        load_encoder(weights(channels=channels))


def test_rejected_content_of_a_checkpoint_is_named(tmp_path):
    torch.save(dict(model=weights(), where=Path("here")), tmp_path / "a.pt")
    with pytest.raises(SystemExit, match="(?s)a.pt.*pathlib"):
        runs.load(tmp_path / "a.pt")


def test_the_suffix_determines_the_format(tmp_path):
    with pytest.raises(SystemExit, match="a.npz"):
        runs.save_weights(tmp_path / "a.npz", weights(), {})
    safetensors = pytest.importorskip("safetensors.torch")
    runs.save_weights(tmp_path / "a.safetensors", weights(), {})
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    with pytest.raises(SystemExit, match="b.safetensors"):
        runs.load(tmp_path / "b.safetensors")
    for tensors in (safetensors.load_file(tmp_path / "a.safetensors"), runs.load(tmp_path / "a.safetensors")["model"]):
        assert torch.equal(tensors["cls_token"], weights()["cls_token"])


# --- places and order of files ----------------------------------------------------------------------------------------


def write_colours(folder, names):
    for split in ("train", "val"):
        for i, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for j in range(6):
                grey = np.full((16, 16, 3), 20 * i, np.uint8) + NOISE[:16, :16] % 3
                Image.fromarray(grey).save(folder / split / name / f"{j}.png")


def test_classes_that_are_numbers(tmp_path, capsys):
    """The order of classes is unknown for a public file: a warning if the order matters, and a flag."""
    write_colours(tmp_path / "a", [f"{i:02}" for i in range(12)])
    write_colours(tmp_path / "b", [str(i) for i in range(12)])
    shape = dict(image_size=16, patch_size=4, min_crop=1, workers=0, batch_size=8, epochs=8, blr=3e-2, layer_decay=1)
    finetune.main(flags(init="none", data=tmp_path / "a", out=tmp_path / "run", **shape))
    torch.save(find_weights(runs.load(tmp_path / "run/last.pt")), tmp_path / "public.pt")
    expected = log(tmp_path / "run")[-1]["top1"]
    assert expected > 0.3

    def top1(**settings):
        capsys.readouterr()
        evaluate(tmp_path / "public.pt", **settings)
        out = capsys.readouterr().out
        return float(out.split("%")[0].split()[-1]) / 100, "--class-order" in out

    right = pytest.approx(expected, abs=1e-3)
    assert top1(data=tmp_path / "a") == (right, False)
    assert top1(data=tmp_path / "b", class_order="number") == (right, False)
    score, warned = top1(data=tmp_path / "b")
    assert score < expected and warned


def test_a_run_resumes_after_its_images_moved(tmp_path):
    write_colours(tmp_path / "first", "abc")
    out, settings = tmp_path / "run", dict(image_size=16, patch_size=4, workers=0, batch_size=4, epochs=60, limit=18)
    with start("pretrain", out, data=tmp_path / "first", **settings) as process:
        wait_for_rows(process, out, 1)
        process.kill()
    done = len(log(out))
    (tmp_path / "first").rename(tmp_path / "second")
    with pytest.raises(SystemExit, match="--data"):
        pretrain.main(flags(resume=out / "last.pt", data="shapes"))  # as many images
    pretrain.main(flags(resume=out / "last.pt", data=tmp_path / "second"))
    assert done < len(log(out)) == 60


# --- detection --------------------------------------------------------------------------------------------------------


def write_squares(folder, spoil=lambda annotation, index: None, exif=None):
    """Write twelve images of 64 x 96 with one light square each, and their annotations."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    images, annotations = [], []
    for i in range(12):
        x, y, s = 5 + 3 * i, 5 + 2 * i, 25
        pixels = np.full((64, 96, 3), 40, np.uint8)
        pixels[y : y + s, x : x + s] = 200
        Image.fromarray(pixels).save(folder / "val2017" / f"{i}.png", exif=exif or Image.Exif())
        images.append(dict(id=i + 1, file_name=f"{i}.png", width=96, height=64))
        outline = [[x, y, x + s, y, x + s, y + s, x, y + s]]
        annotations.append(dict(image_id=i + 1, category_id=1, bbox=[x, y, s, s], segmentation=outline))
        spoil(annotations[-1], i)
    content = dict(images=images, annotations=annotations, categories=[dict(id=1, name="square")])
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return CocoDetection(*coco.find_annotations(folder, "val"))


RUNS = [[0, 10**9], [10, 10], [-5, 6149], None, "oooooooooo0", "garbage"]  # none adds up to 64 x 96
BAD = [[[10, 10, 2.0e8, 3.5e8, 40, 40]], [[10, 10, math.inf, 9, 40, 40]], [[10, 10, 12, 12]]]
BAD += [dict(size=[64, 96], counts=counts) for counts in RUNS]


def target_of(item):
    """Return the output of a perfect detector."""
    _, target = item
    return target | dict(scores=torch.ones(len(target["boxes"])), masks=target["masks"][:, None])


@pytest.mark.parametrize("crowd", [0, 1])
@pytest.mark.parametrize("mask", BAD, ids=str)
def test_one_bad_mask_is_skipped(tmp_path, capsys, mask, crowd):
    spoiled = {3: dict(segmentation=mask, iscrowd=crowd), 4: dict(area=None)}  # the area can be recomputed
    images = write_squares(tmp_path, lambda annotation, i: annotation.update(spoiled.get(i, {})))
    assert [len(target["labels"]) for _, target in images] == [i != 3 for i in range(12)]
    assert "1 of 12" in capsys.readouterr().out
    found = coco.coco_results(target_of(images[5]), 6, images.categories)
    assert coco.average_precision(images, found, images.ids)["box_ap"] > 0


@pytest.mark.parametrize("turn", [3, 6])
def test_photographs_annotated_as_stored(tmp_path, turn):
    exif = Image.Exif()
    exif[0x112] = turn
    image, target = write_squares(tmp_path, exif=exif)[0]
    left, top, right, bottom = target["boxes"][0].int().tolist()
    assert (image[:, top:bottom, left:right] == 200).all()


UNITS = {
    "normalised": lambda x, y, w, h: [x / 96, y / 64, w / 96, h / 64],
    "corners": lambda x, y, w, h: [x, y, x + w, y + h],
    "centre": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],
}


@pytest.mark.parametrize("masks_too", [False, True])
@pytest.mark.parametrize("units", UNITS)
def test_boxes_in_other_units_are_rejected(tmp_path, units, masks_too):
    def spoil(annotation, i):
        annotation["bbox"] = UNITS[units](*annotation["bbox"])
        if masks_too and units == "normalised":
            annotation["segmentation"] = [[x / (96, 64)[k % 2] for k, x in enumerate(annotation["segmentation"][0])]]

    with pytest.raises(SystemExit, match="instances_val2017.json"):
        write_squares(tmp_path, spoil)


def test_a_batch_has_few_tensors(tmp_path):
    """Each tensor from a loader's process takes a file descriptor, so the number must not grow."""
    views = DetectionViews(write_squares(tmp_path), channels=3)
    samples = [views[0, i] for i in range(12)]
    packed = coco.pack(samples)
    assert sum(isinstance(part, torch.Tensor) for part in packed) <= 4
    images, targets, readable = coco.unpack(packed)
    torch.testing.assert_close(images, [sample[0] for sample in samples], rtol=0, atol=0)
    torch.testing.assert_close(targets, [sample[1] for sample in samples], rtol=0, atol=0)
    assert readable.all()


@pytest.mark.parametrize("method", ["spawn", "forkserver"] if os.name == "posix" else ["spawn"])
def test_loaders_work_with_all_start_methods(tmp_path, method):
    views = DetectionViews(write_squares(tmp_path), channels=3, augment=True, crop_ratio=0.5)
    loader = training_loader(views, 4, seed=0, workers=1, world=WORLD)
    loader.multiprocessing_context = multiprocessing.get_context(method)
    assert len(list(batches(loader))) == 3


def test_a_loader_without_memory_gives_a_one_line_error():
    def fail():
        yield struct.pack("i", 0)
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    with pytest.raises(SystemExit, match="--workers"):
        list(batches(fail()))


def test_compile_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="--compile"):
        compiled(torch.nn.Linear(1, 1))
