"""Each script on the device of `foreign.py`, which rejects what CUDA rejects and counts waits of the host."""

import json
import subprocess
import sys
from collections import Counter
from importlib import import_module

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import backend_registration

import helpers
from helpers import ENVIRONMENT, ROOT, flags, log, train
from util import runs

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch has no Python devices"
)

NAME = "foreign"
# 2 steps per epoch, with drop path and crops; `shapes` are cropped on the device, image files on the CPU.
TINY = dict(epochs=1, drop_path=0.3, workers=0)
SMALL_IMAGES = TINY | dict(limit=32, batch_size=16, image_size=16, min_crop=0.5)
PRETRAIN = SMALL_IMAGES | dict(patch_size=4, knn_every=0)
PCAE = PRETRAIN | dict(drop_stages=2, ema=0.9, decoder_dim=16)
FINETUNE = SMALL_IMAGES | dict(patch_size=4, init="none")
DETECT = TINY | dict(init="none", limit=2, batch_size=1, short_side=32, channels=16, rois=8, proposals=4)
PTR = dict(drop_ratio=0.3, drop_blocks=[0, 2])


@pytest.fixture(scope="module")
def device():
    """Start a process with the device; `device(script, ...)` runs a script in it and returns output and waits."""
    command = [sys.executable, str(ROOT / "tests" / "foreign.py")]
    with subprocess.Popen(
        command, env=ENVIRONMENT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:

        def run(script, *words, **settings):
            print(
                json.dumps([script, *map(str, words), *flags(device=NAME, **settings)]), file=process.stdin, flush=True
            )
            reply = json.loads(process.stdout.readline())
            if reply["error"]:
                pytest.fail(f"{script} on {NAME}: {reply['error']}")
            return reply["text"], Counter(reply["waits"])

        yield run
        process.stdin.close()


@pytest.fixture(autouse=True)
def attention():
    """Compute attention on the CPU by matrix products, as on devices without an attention kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write 48 training and 18 validation images of three classes. detect.py writes its scenes to the same folder."""
    folder = tmp_path_factory.mktemp("data")
    for i, name in enumerate(("ant", "bee", "cat")):
        helpers.write_images(folder / "train" / name, 16, shade=10 * i)
        helpers.write_images(folder / "val" / name, 6, shade=10 * i)
    return folder


def with_data(script, folder, settings):
    """Add the data to a script's settings: `folder`, unless the settings name a data set."""
    return (dict(data_root=folder) if script == "detect" else dict(data=folder)) | settings


def assert_same_results(ours, theirs):
    """Assert equal bits in the checkpoints of two run folders, and equal logs except for speed."""
    helpers.assert_same_run(runs.load(ours / "last.pt"), runs.load(theirs / "last.pt"))
    for one, other in zip(log(ours), log(theirs), strict=True):
        assert {name for name in one if one[name] != other[name]} <= {"images_per_second", "data_wait"}


RUNS = [
    ("pretrain", PCAE | dict(data="shapes", micro_batch=8, criterion="random")),
    ("pretrain", PRETRAIN | dict(method="mae", channels=1)),
    ("pretrain", PRETRAIN | dict(method="simmim", knn_every=1)),
    ("finetune", FINETUNE | PTR | dict(micro_batch=8, mixup=0.8, cutmix=1.0)),
    ("finetune", FINETUNE | dict(linear_probe=True, drop_path=0, rand_augment=9, erasing=0.5)),
    ("finetune", FINETUNE | dict(pool="class", label_fraction=0.5, repeats=1)),
    ("detect", DETECT | PTR | dict(batch_size=2, micro_batch=1, crop_ratio=0.5)),
]


@pytest.mark.parametrize("script, settings", RUNS)
def test_results_equal_the_cpus(tmp_path, device, folder, script, settings):
    settings = with_data(script, folder, settings)
    device(script, out=tmp_path / "there", **settings)
    train(script, tmp_path / "here", device="cpu", **settings)
    assert_same_results(tmp_path / "there", tmp_path / "here")


STEPS = [
    ("pretrain", PCAE | dict(data="shapes")),
    ("pretrain", PRETRAIN | dict(method="mae")),
    ("pretrain", PRETRAIN | dict(method="simmim")),
    ("finetune", FINETUNE),
    ("finetune", FINETUNE | PTR | dict(mixup=0.8)),
    ("finetune", FINETUNE | dict(linear_probe=True, drop_path=0)),
]


@pytest.mark.parametrize("script, settings", STEPS)
def test_each_step_waits_once(tmp_path, device, folder, script, settings):
    """The host waits where the loss is read: two more steps, two more waits."""
    waits = []
    for limit in (16, 48):
        settings = with_data(script, folder, settings | dict(limit=limit))
        waits.append(device(script, out=tmp_path / str(limit), **settings)[1])
    assert waits[1] - waits[0] == {"metrics.compute": 2}


# --- files of one device, read on the other ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory, device, folder):
    """Run one epoch of each script on the device, in `pretrain`, `finetune` and `detect`; return the parent folder."""
    root = tmp_path_factory.mktemp("written")
    for script, settings in dict(pretrain=PCAE, finetune=FINETUNE | PTR, detect=DETECT | PTR).items():
        device(script, out=root / script, **with_data(script, folder, settings))
    return root


@pytest.mark.parametrize("script", ["pretrain", "finetune", "detect"])
def test_each_device_resumes_runs_of_the_other(tmp_path, device, written, script):
    def extended(path, epochs):
        checkpoint = runs.load(path)
        checkpoint["config"]["epochs"] = epochs
        runs.save(tmp_path / "extended.pt", checkpoint)
        return tmp_path / "extended.pt"

    path = extended(written / script / "last.pt", epochs=2)
    train(script, tmp_path / "here", resume=path, device="cpu")
    device(script, out=tmp_path / "there", resume=path)
    assert_same_results(tmp_path / "there", tmp_path / "here")
    device(script, out=tmp_path / "again", resume=extended(tmp_path / "here" / "last.pt", epochs=3))
    assert [row["epoch"] for row in log(tmp_path / "again")] == [1, 2, 3]


def test_knn_equals_the_cpus(device, folder, written, capsys):
    path, settings = written / "pretrain/last.pt", dict(data=folder, workers=0, knn=5)
    text, _ = device("evaluate", path, **settings)
    helpers.evaluate(path, **settings)
    assert text == capsys.readouterr().out and "%" in text


def test_eval_finds_the_logged_accuracy(device, folder, written):
    text, _ = device("evaluate", written / "finetune/last.pt", data=folder, workers=0)
    assert f" {log(written / 'finetune')[-1]['top1']:.1%} " in text


@pytest.mark.parametrize(
    "run, settings",
    [
        ("pretrain", dict(masked=True, heatmap=True, criterion="random")),
        ("finetune", dict()),
        ("detect", dict(score_threshold=0, limit=1)),
    ],
)
def test_pictures_equal_the_cpus(tmp_path, device, written, run, settings):
    settings = settings | dict(checkpoint=written / run / "last.pt")
    device("visualize", out=tmp_path / "there.png", **settings)
    import_module("visualize").main(flags(device="cpu", out=tmp_path / "here.png", **settings))
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()
