"""No silent wrong numbers: settings that a public file lacks, settings of an export, statistics of a probe."""

import json

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tvf

import data
import detect
import evaluate
import helpers
import visualize
from helpers import flags, train
from model import MODELS, NO_PTR, Classifier, ViT
from ptr import PTR, drop_blocks
from util import runs
from util.image_files import class_folders
from weights import find_weights, load_classifier, load_encoder, resize_positions, timm_weights

HALF = (0.5, 0.5, 0.5)
SIZE = (16, 64)  # 2 x 8 patches: as many as in a grid of 4 x 4
TOLD = dict(heads=12, grid=[2, 8], mean=[*HALF], std=[*HALF])
TINY = dict(data="shapes", limit=64, batch_size=16, epochs=1, image_size=16, workers=0, device="cpu")


def score(capsys, path, **settings):
    """Return the output of evaluate.py and its first row: drop ratio, tokens, GMACs, top-1 accuracy."""
    capsys.readouterr()
    helpers.evaluate(path, **settings)
    out = capsys.readouterr().out
    return out, out.split("speed-up\n")[-1].split()[:4]


def save_public(path, model):
    torch.save(dict(model=timm_weights(model)), path)
    return path


# --- a public file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(72, 128), (128, 72), (48, 192), (72, 132), (96, 96), (48, 48)])
@pytest.mark.parametrize("load", [load_encoder, lambda *args, **options: load_classifier(*args, **options).encoder])
def test_positions_of_a_square_are_resized_for_any_grid(size, load):
    """Also for grids with the same number of patches as the square."""
    model = Classifier(ViT((96, 96), 4, dim=192, depth=1, heads=3), 2)
    encoder = load(dict(model=timm_weights(model)), image_size=size)
    expected = resize_positions(model.encoder.pos_embed, (24, 24), (size[0] // 4, size[1] // 4))
    assert F.cosine_similarity(encoder.pos_embed[0, 1:], expected[0, 1:], dim=1).min() > 0.9999


@pytest.fixture(scope="module")
@torch.no_grad()
def unusual(tmp_path_factory):
    """Write an unusual public classifier, and images whose classes are its predictions."""
    folder = tmp_path_factory.mktemp("unusual")
    torch.manual_seed(0)
    model = Classifier(ViT(SIZE, 8, dim=192, depth=2, heads=12, mean=HALF, std=HALF), 2, pool="class").eval()
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    images = torch.randint(256, (200, 3, *SIZE)).byte()
    views = torch.stack([data.CenterView(SIZE, data.evaluation_margin(SIZE))(image) for image in images])
    margins = model(data.Normalize(3, HALF, HALF)(views)).diff(dim=1).flatten()
    model.head.bias[0] += margins.sort().values[99:101].mean()
    for i, (image, margin) in enumerate(zip(images, margins, strict=True)):
        path = folder / "val" / ("b" if margin > margins.sort().values[99] else "a") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tvf.to_pil_image(image).save(path)
    save_public(folder / "public.pth", model)
    return folder


@pytest.mark.parametrize("left_out", [None, *TOLD])
def test_flags_give_what_the_file_does_not_record(unusual, capsys, left_out):
    """With all flags, top-1 is 100 %. A missing flag is replaced by an assumption, whose line names the flag."""
    told = {name: value for name, value in TOLD.items() if name != left_out}
    path, size = unusual / "public.pth", dict(image_size=[*SIZE])
    out, row = score(capsys, path, data=unusual, pool="class", **size, **told)
    assert (row[-1] == "100.0%") == (left_out is None)
    named = [name for name in TOLD if f"--{name}" in out]
    assert named == ([left_out] if left_out else [])
    assert left_out or load_classifier(runs.load(path), pool="class", **told).encoder.arguments["mean"] == HALF
    with pytest.raises(SystemExit, match="--pool"):
        score(capsys, path, data=unusual, **size, **told)


@pytest.mark.parametrize("lacking", ["norm.", "blocks.1.", "blocks.1.mlp.fc1.", "blocks.0.norm1.bias", "cls_token"])
def test_a_part_of_a_larger_model_is_rejected(tmp_path, lacking):
    """Such as the first of several files, without the final norm, or a later one, without some blocks."""
    tensors = timm_weights(Classifier(ViT((16, 16), 4, dim=192, depth=3, heads=3), 2, pool="class"))
    part = {name: tensor for name, tensor in tensors.items() if not name.startswith(lacking)}
    for load, options in ((load_encoder, {}), (load_classifier, dict(pool="class"))):
        load(dict(model=dict(tensors)), **options)
        with pytest.raises(ValueError):
            load(dict(model=dict(part)), **options)
    torch.save(part, tmp_path / "part.pth")
    with pytest.raises(SystemExit, match="part.pth"):
        train("finetune", tmp_path / "run", init=tmp_path / "part.pth", **TINY)


@torch.no_grad()
def test_missing_biases_of_qkv_are_zero():
    vit = ViT((16, 16), 4, dim=192, depth=2, heads=3).eval()
    tensors = {name: tensor for name, tensor in vit.state_dict().items() if not name.endswith("qkv.bias")}
    for block in vit.blocks:
        block.attn.qkv.bias.zero_()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(load_encoder(tensors).eval()(images).tokens, vit(images).tokens)


# --- flags beside a file ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """Write a public ViT-Tiny with one channel and patches of 8 pixels, which is not the default of any script."""
    vit = ViT((16, 16), 8, channels=1, **MODELS["vit_tiny"])
    return save_public(tmp_path_factory.mktemp("grey") / "vit.pth", vit)


@pytest.mark.parametrize(
    "script, file, changes",
    [
        *(("finetune", "init", change) for change in (dict(model="vit_mini"), dict(patch_size=8), dict(channels=1))),
        ("detect", "eval", dict(patch_size=8)),
        ("detect", "init", dict(model="vit_mini")),
        ("detect", "init", dict(patch_size=8)),
    ],
)
def test_flags_about_a_new_encoder_are_rejected_with_a_file(tmp_path, grey, script, file, changes):
    """Also if a flag repeats the default or the value in the file."""
    (name,) = changes
    with pytest.raises(SystemExit, match="--" + name.replace("_", "-")):
        train(script, tmp_path / "run", **{file: grey}, limit=64, dry_run=True, **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["finetune", "detect"])
@pytest.mark.parametrize("name", ["heads", "grid", "mean", "std", "weights"])
def test_flags_about_a_file_are_rejected_without_a_file(tmp_path, script, name):
    told = (TOLD | dict(weights="teacher"))[name]
    with pytest.raises(SystemExit, match=f"--{name}"):
        train(script, tmp_path / "run", init="none", limit=64, dry_run=True, **{name: told})


@pytest.mark.parametrize("told", [dict(std=(0, 0, 0)), dict(mean=(123, 116, 103)), dict(mean=HALF, std=(58, 57, 57))])
def test_statistics_are_of_pixels_between_0_and_1(grey, told):
    with pytest.raises(ValueError, match="--mean"):
        load_encoder(runs.load(grey), **told)


def test_recorded_settings_are_those_of_the_trained_encoder(tmp_path, grey):
    small = dict(limit=4, batch_size=2, short_side=32, long_side=32, data_root=tmp_path / "data", epochs=1)
    for script, settings in (("finetune", TINY), ("detect", small | dict(device="cpu"))):
        out, told = tmp_path / script, dict(mean=[*HALF], std=[*HALF])
        encoder = train(script, out, init=grey, **settings, **told)["encoder"]
        recorded = json.loads((out / "args.json").read_text())
        assert (recorded["model"], recorded["patch_size"]) == ("vit_tiny", 8) and encoder["mean"] == HALF
        assert script == "detect" or recorded["channels"] == 1
        train(script, out, resume=True, init=grey, **settings, **told)  # the same command resumes


def test_flags_about_stages_override_recorded_blocks(tmp_path, grey, capsys):
    checkpoint = train("finetune", tmp_path / "a", init=grey, drop_ratio=0.2, drop_blocks=[4], **TINY)
    detector = dict(limit=4, short_side=32, long_side=32, data_root=tmp_path / "data", device="cpu")
    train("detect", tmp_path / "b", init=grey, drop_ratio=0.2, drop_blocks=[4], epochs=1, batch_size=2, **detector)
    assert checkpoint["config"]["drop_blocks"] == [4]
    for out in "ab":
        for changes, blocks in ((dict(), (4,)), (dict(drop_stages=2), drop_blocks(12, 2, "start"))):
            capsys.readouterr()
            if out == "a":
                helpers.evaluate(tmp_path / "a/last.pt", limit=4, **changes)
            else:
                detect.main(flags(eval=tmp_path / "b/last.pt", **detector | changes))
            assert f"after blocks {list(blocks)}" in capsys.readouterr().out
    pictures = []
    for changes in (dict(), dict(drop_stages=2), dict(drop_blocks=[*drop_blocks(12, 2, "start")])):
        path = tmp_path / "picture.png"
        visualize.main(flags(checkpoint=tmp_path / "a/last.pt", limit=2, out=path, device="cpu", **changes))
        pictures.append(path.read_bytes())
    assert pictures[0] != pictures[1] == pictures[2]


def test_random_draws_do_not_depend_on_the_other_drop_ratios(tmp_path, capsys):
    train("finetune", tmp_path, init="none", **TINY)
    random = dict(criterion="random", limit=64, batch_size=8)
    several = [score(capsys, tmp_path / "last.pt", drop_ratio=x, **random)[0] for x in ([0.2, 0.5], 0.5)]
    assert several[0].splitlines()[-1].split()[:5] == several[1].splitlines()[-1].split()[:5]


def test_flags_about_ptr_are_rejected_if_nothing_is_dropped(tmp_path):
    detector = dict(limit=4, short_side=32, long_side=32, data_root=tmp_path / "data", device="cpu")
    train("finetune", tmp_path / "a", init="none", **TINY)
    train("detect", tmp_path / "b", init="none", epochs=1, batch_size=2, **detector)
    for main, words in (
        (evaluate.main, [str(tmp_path / "a/last.pt"), *flags(drop_stages=2)]),
        (detect.main, flags(eval=tmp_path / "b/last.pt", drop_stages=2, **detector)),
        (visualize.main, flags(checkpoint=tmp_path / "b/last.pt", drop_stages=2)),
    ):
        with pytest.raises(SystemExit, match="--drop-stages"):
            main(words)


# --- linear probes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write training images of two classes: 47 readable and one unreadable."""
    folder = tmp_path_factory.mktemp("classes")
    for i, name in enumerate(("ant", "bee")):
        helpers.write_images(folder / "train" / name, 24, shade=30 * i)
        helpers.write_images(folder / "val" / name, 9, shade=30 * i + 1)
    (folder / "train/bee/0.bmp").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    vit = ViT((16, 16), 4, dim=64, depth=2, heads=4)
    return save_public(tmp_path_factory.mktemp("pretrained") / "vit.pth", vit)


@torch.no_grad()
def assert_statistics(checkpoint, folder, ptr=NO_PTR):
    """Assert that mean and variance are those of the features of all readable training images."""
    model = load_classifier(checkpoint).eval()
    views = helpers.scored(class_folders(folder / "train"), (16, 16))
    images = torch.stack([view for view, _, readable in views if readable])
    features = model.features(data.Normalize()(images), ptr).double()
    assert len(images) == 47
    expected = features.var(dim=0, correction=0), features.mean(dim=0)
    found = checkpoint["model"]["fc_norm.running_var"], checkpoint["model"]["fc_norm.running_mean"]
    torch.testing.assert_close(found, tuple(x.float() for x in expected), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:skipped an unreadable image")
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(micro_batch=1),
        dict(micro_batch=1, batch_size=1, epochs=2),
        dict(batch_size=48, epochs=3),
        dict(pool="class"),
        dict(drop_ratio=0.5, drop_blocks=0, min_crop=0.5),
    ],
    ids=str,
)
def test_a_probe_standardises_by_its_training_features(tmp_path, folder, pretrained, changes):
    settings = TINY | dict(data=folder, limit=None, init=pretrained, linear_probe=True)
    checkpoint = train("finetune", tmp_path, **settings | changes)
    assert_statistics(checkpoint, folder, PTR((0,), 0.5) if "drop_ratio" in changes else NO_PTR)


@pytest.mark.filterwarnings("ignore:skipped an unreadable image")
def test_probes_do_not_depend_on_micro_batches_or_processes(tmp_path, folder, pretrained):
    settings = TINY | dict(data=folder, limit=None, init=pretrained, linear_probe=True, min_crop=0.5)
    whole = train("finetune", tmp_path / "whole", **settings)
    single = train("finetune", tmp_path / "single", micro_batch=1, **settings)
    helpers.two_processes("finetune", settings | dict(out=tmp_path / "two"))
    two = runs.load(tmp_path / "two/last.pt")
    assert_statistics(two, folder)
    for other in (single, two):
        helpers.assert_close_runs(whole, other, ["model"])
        assert whole["history"][-1]["top1"] == other["history"][-1]["top1"]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("by", ["mean", "class"])
def test_an_exported_probe_has_the_accuracy_of_the_probe(tmp_path, capsys, pretrained, suffix, by):
    """The file records its settings. Without the record, an error names the flag to set."""
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    probe = dict(linear_probe=True, blr=0.5, pool=by, drop_ratio=0.4, drop_blocks=1) | TINY | dict(limit=256, epochs=3)
    train("finetune", tmp_path / "run", init=pretrained, mean=[*HALF], **probe)
    original, exported = tmp_path / "run/last.pt", tmp_path / f"vit.{suffix}"
    helpers.export(original, exported)
    row = score(capsys, original, limit=500)[1]
    out, again = score(capsys, exported, limit=500)
    assert again == row and row[0] == "0.4" and not any(f"--{name}" in out for name in (*TOLD, "pool"))
    images, models = torch.randn(4, 3, 16, 16), [load_classifier(runs.load(path)) for path in (original, exported)]
    with torch.no_grad():
        torch.testing.assert_close(*(model.eval()(images) for model in models), atol=1e-4, rtol=1e-4)
    assert models[1].encoder.arguments == models[0].encoder.arguments and models[1].pool == by
    with pytest.raises(ValueError, match="--pool"):
        load_classifier(find_weights(runs.load(exported)))
    with pytest.raises(SystemExit, match="--mean"):
        score(capsys, exported, mean=[0.4, 0.5, 0.5])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_printed_call_of_timm_loads_the_export(tmp_path, capsys, pretrained, suffix):
    timm, exported = pytest.importorskip("timm"), tmp_path / f"vit.{suffix}"
    train("finetune", tmp_path / "run", init=pretrained, linear_probe=True, **TINY)
    helpers.export(tmp_path / "run/last.pt", exported)
    call = capsys.readouterr().out.strip().split("\n")[-1]
    theirs, ours = eval(call, {"timm": timm}).eval(), load_classifier(runs.load(exported)).eval()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), atol=1e-4, rtol=1e-4)
