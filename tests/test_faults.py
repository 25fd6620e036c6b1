"""Nothing lost, nothing let in: the damage is done for real, and the scripts must come out of it.

    python -m pytest tests/test_faults.py           a few kills, small bombs, 50 epochs of one step
    python -m pytest tests/test_faults.py --long    20 kills and 10, thousands of damaged images, 50 epochs of both

`tests/kill.py` is the kill test by itself. Faults that are tested where the code is tested: interrupted and resumed at
every moment of a step and of a save (test_pretrain.py, test_finetune.py), failed writes (test_engine.py), damaged
pickles and cut files (test_engine.py, test_weights.py), steps that are not finite (test_pretrain.py).
"""

import contextlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import detect
import engine
import finetune
import kill
import pretrain
from data import UnreadableImage, read_image
from engine import UserError
from helpers import (
    ENVIRONMENT,
    ROOT,
    assert_same_run,
    contents,
    copy_of,
    flags,
    interrupt,
    limits,
    load,
    log,
    score_few,
    tensors,
    wrap,
    write_classes,
    write_images,
)  # fmt: skip

SCRIPTS = dict(pretrain=pretrain, finetune=finetune, detect=detect)
# 4 steps an epoch, 8 in all.
TINY = dict(
    limit=32, batch_size=8, epochs=2, warmup_epochs=1, lr=1e-3, image_size=16, patch_size=4, dim=16, depth=2, heads=2,
    device="cpu",
)  # fmt: skip
SETTINGS = dict(
    pretrain=TINY | dict(ema=0.9, decoder_dim=16, decoder_heads=2, drop_stages=2, knn_every=0),
    finetune=TINY | dict(init="none"),
    detect=TINY | dict(
        init="none", image_size=None, batch_size=2, limit=4, short_side=32, long_side=32, channels=8, rois=4,
        proposals=8,
    ),
)  # fmt: skip
SILENT = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals, limits and permissions")


@pytest.fixture(autouse=True, scope="module")
def few_images_to_score():
    with pytest.MonkeyPatch.context() as patch:
        score_few(patch, 20)
        patch.setitem(data.NUM_SCENES, "train", 4)
        patch.setitem(data.NUM_SCENES, "val", 2)
        yield


# --- helpers ----------------------------------------------------------------------------------------------------------


def train(script, out, **changes):
    """Run a script in this process; returns the checkpoint."""
    SCRIPTS[script].main(flags(SETTINGS[script] | dict(data_root=out.parent / "data") | dict(out=out) | changes))
    return load(out)


def end_of(capsys, script, words):
    """Run a script as its command line does; how it ended: the exit code, and the lines on stderr, bars aside."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    capsys.readouterr()
    code = 0
    try:
        engine.launch(lambda: SCRIPTS[script].main([str(word) for word in words]))
    except SystemExit as end:
        code = end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    lines = re.split("[\r\n]", capsys.readouterr().err)
    return code, [line for line in lines if line.strip() and not re.search(r"\d+%\||\d+it \[", line)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folders of finished runs by script; to be read, or copied."""
    folder = tmp_path_factory.mktemp("finished")
    for script in SCRIPTS:
        train(script, folder / script)
    return {script: folder / script for script in SCRIPTS}


def assert_whole(out):
    """A run folder whose checkpoints load, are finite and go with the log, and nothing lies about."""
    checkpoint = load(out)
    history = json.loads(re.sub("NaN|-?Infinity", "null", json.dumps(checkpoint["history"])))
    assert history == log(out)[: len(history)] and json.loads((out / "args.json").read_text())  # the log comes first
    assert all(tensor.isfinite().all() for tensor in tensors(checkpoint))
    names = {path.name for path in out.iterdir()}
    assert names <= {"args.json", "metrics.jsonl", "last.pt", "best.pt"}, names
    return checkpoint


@contextlib.contextmanager
def as_nobody():
    """Without root's right to open everything, where these tests have it. Only for relative paths,
    and after a run (`finished`): python itself may be where nobody can import from."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


# --- killed -----------------------------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("script, few, many", [("pretrain", 2, 20), ("finetune", 1, 10)])
def test_killed_at_any_moment(tmp_path, pytestconfig, script, few, many):
    hits = kill.kill_and_resume(script, tmp_path, many if pytestconfig.getoption("long") else few, seed=0)
    assert hits > 0, "none of the kills came while it wrote"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The settings of a run, and its folder when nothing came in between."""
    settings = SETTINGS["pretrain"] | dict(epochs=24, drop_path=0.3, min_crop=0.5)
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    pretrain.main(flags(settings | dict(out=out)))
    return settings, out


@POSIX
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_ended_by_a_signal(tmp_path, uninterrupted, name, code):
    settings, whole = uninterrupted
    out = tmp_path / "a run"  # has to be quoted
    words = [str(ROOT / "pretrain.py"), *flags(settings | dict(out=out))]
    start = (
        "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # also in a pipeline
    )
    start += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", start, *words], env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True
    ) as process:
        kill.wait_for(lambda: (out / "last.pt").exists() and len(log(out)) > 2, process, "third epoch")
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(getattr(signal, name))
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == code and "Traceback" not in errors
    assert errors.endswith("\ninterrupted\n")
    command = shlex.split(re.search(r"to continue from the last checkpoint: (python .*)\n", errors)[1])
    assert command == ["python", words[0], "--resume", str(out / "last.pt")]
    assert assert_whole(out)["epoch"] < settings["epochs"]
    pretrain.main(command[2:])
    assert_same_run(whole, out)


@POSIX
def test_two_runs_in_one_folder(tmp_path, capsys):
    """The second is refused, and the first one's end, even a sudden one, leaves the folder free."""
    out = tmp_path / "run"
    first, second = (flags(SETTINGS["pretrain"] | dict(epochs=epochs, out=out)) for epochs in (1000, 2))
    with subprocess.Popen([sys.executable, str(ROOT / "pretrain.py"), *first], env=ENVIRONMENT, **SILENT) as process:
        kill.wait_for(lambda: (out / "last.pt").exists() and len(log(out)) > 1, process, "second epoch")
        try:
            ends = [end_of(capsys, "pretrain", words) for words in (second, ["--resume", out / "last.pt"])]
        finally:
            process.kill()
    assert ends == 2 * [(2, [f"error: a run that is still going writes to {out}: end it, or choose another --out"])]
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and load(out)["epoch"] > 1
    train("pretrain", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-1"]


def test_interrupted_while_torch_writes(tmp_path):
    """torch.save then complains about its file; what counts is the interruption."""

    calls = itertools.count()

    class Interrupted(io.BytesIO):
        def write(self, content):
            if next(calls) == 2:
                raise KeyboardInterrupt(15)
            return super().write(content)

    (tmp_path / "a.pt").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        engine.replace_file(tmp_path / "a.pt", lambda _: torch.save(torch.zeros(1000), Interrupted()))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"] and (tmp_path / "a.pt").read_text() == "before"


def test_an_interrupted_evaluation_is_not_to_be_resumed(monkeypatch, finished, capsys):
    interrupt(monkeypatch, engine, "predict", 0)
    code, lines = end_of(capsys, "finetune", ["--eval", finished["finetune"] / "best.pt", "--device", "cpu"])
    assert code == 130 and lines == ["interrupted"]


def test_interrupted_before_there_is_a_checkpoint(monkeypatch, tmp_path, capsys):
    interrupt(monkeypatch, pretrain.Trainer, "seconds_per_step", 0)
    code, lines = end_of(capsys, "pretrain", flags(SETTINGS["pretrain"] | dict(out=tmp_path)))
    assert code == 130 and lines == ["interrupted"]


def test_the_command_to_continue_many_processes(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    interrupt(monkeypatch, pretrain.Trainer, "train_step", 5)
    code, lines = end_of(capsys, "pretrain", flags(SETTINGS["pretrain"] | dict(out=tmp_path)))
    assert code == 130 and "torchrun --nproc-per-node 8 " in lines[0] and lines[0].endswith(f"{tmp_path / 'last.pt'}")


def test_leftovers_of_a_kill_are_swept(finished, tmp_path):
    out = copy_of(finished["finetune"], tmp_path)
    for name in ("last.pt.tmp", "best.pt.tmp", "metrics.jsonl.tmp"):
        (out / name).write_bytes(b"half of it")
    (out / "notes.tmp").write_text("mine")
    train("finetune", out, resume=True)
    assert {path.name for path in out.iterdir()} == {*contents(finished["finetune"]), "notes.tmp"}


def test_the_best_epoch_follows_a_run_into_another_folder(monkeypatch, tmp_path):
    tops = {1: 0.9, 2: 0.5, 3: 0.6}
    monkeypatch.setattr(finetune, "scores", lambda logits, labels: dict(val_loss=1.0, top1=tops[epochs[-1]], top5=1.0))
    epochs = []
    wrap(monkeypatch, finetune.Trainer, "train_epoch", before=lambda trainer, epoch, steps: epochs.append(epoch + 1))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, finetune.Trainer, "train_step", 9)
        train("finetune", tmp_path / "here", epochs=3)
    assert load(tmp_path / "here")["epoch"] == 2
    finetune.main(flags(dict(resume=tmp_path / "here/last.pt", out=tmp_path / "there")))
    best = torch.load(tmp_path / "there/best.pt", weights_only=True)
    assert best["epoch"] == 1 and load(tmp_path / "there")["epoch"] == 3
    assert contents(tmp_path / "here").keys() == contents(tmp_path / "there").keys()

    best["epoch"] = 7  # of another run
    torch.save(best, tmp_path / "here/best.pt")
    finetune.main(flags(dict(resume=tmp_path / "here/last.pt", out=tmp_path / "elsewhere")))
    assert not (tmp_path / "elsewhere/best.pt").exists()


# --- a full disk, a read-only folder ----------------------------------------------------------------------------------


def after_the_first_epoch(monkeypatch, script, action):
    """Do something before the second epoch is saved."""
    wrap(monkeypatch, SCRIPTS[script], "describe_epoch", after=lambda row, args: row["epoch"] == 1 and action())


@POSIX
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk(monkeypatch, tmp_path, capsys, script):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        half = (tmp_path / "run/last.pt").stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, before[1]))

    after_the_first_epoch(monkeypatch, script, fill)
    try:
        words = flags(SETTINGS[script] | dict(out=tmp_path / "run", data_root=tmp_path / "data"))
        code, lines = end_of(capsys, script, words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and len(lines) == 1
    assert re.match(r"error: cannot write .*(last|best)\.pt \(.*File too large.*\); an earlier version", lines[0]), (
        lines
    )
    assert load(tmp_path / "run")["epoch"] == 1
    monkeypatch.undo()
    train(script, tmp_path / "run", resume=True)
    assert assert_whole(tmp_path / "run")["epoch"] == 2


@POSIX
def test_a_folder_that_becomes_read_only(monkeypatch, tmp_path, capsys, finished):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o777)
    out = Path("run")
    after_the_first_epoch(monkeypatch, "pretrain", lambda: out.chmod(0o500))
    with as_nobody():
        code, lines = end_of(capsys, "pretrain", flags(SETTINGS["pretrain"] | dict(out=out)))
        out.chmod(0o700)
        assert code == 2 and len(lines) == 1 and re.match(r"error: cannot write run.*Permission denied", lines[0])
        assert assert_whole(out)["epoch"] == 1
        train("pretrain", out, resume=True)
    train("pretrain", tmp_path / "whole")
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.parametrize("script", SCRIPTS)
def test_folders_that_cannot_be_made(tmp_path, capsys, script):
    (tmp_path / "file").touch()
    places = [tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)]
    places += [Path("/proc/run")] if sys.platform == "linux" else []
    for out in places:
        words = flags(SETTINGS[script] | dict(out=out, data_root=tmp_path / "data"))
        code, lines = end_of(capsys, script, words)
        assert code == 2 and len(lines) == 1 and str(out) in lines[0], lines


# --- hostile checkpoints ----------------------------------------------------------------------------------------------


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


MEGABYTES = 320  # that each bomb asks for, at least; loading it may take 200


def swollen(path, content, part):
    """A checkpoint as zip file whose part is followed by so many zeros, which take no room when compressed."""
    torch.save(content, path)
    whole = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for entry in whole.infolist():
            with archive.open(entry.filename, "w", force_zip64=True) as file:
                file.write(whole.read(entry))
                if entry.filename.endswith(part):
                    for _ in range(MEGABYTES):
                        file.write(bytes(2**20))


def compressed(path, content):
    """The same checkpoint in a zip file that compresses: what its pickle calls cannot be seen in the file."""
    torch.save(content, path)
    whole = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in whole.infolist():
            archive.writestr(entry.filename, whole.read(entry))


def lying(path, content):
    """A checkpoint whose zip directory says that its tensors have 4 GB."""
    torch.save(content, path)
    raw = bytearray(path.read_bytes())
    start = raw.find(b"PK\x01\x02")
    while start >= 0:
        name = raw[start + 46 : start + 46 + int.from_bytes(raw[start + 28 : start + 30], "little")]
        if b"/data/" in name:
            raw[start + 20 : start + 28] = (0xFFFFFFF0).to_bytes(4, "little") * 2
        start = raw.find(b"PK\x01\x02", start + 4)
    path.write_bytes(raw)


def changed(content, part, change):
    """A copy of a checkpoint with the first tensor of several numbers below one of its parts replaced."""
    content = pickle.loads(pickle.dumps(content))
    inner = content[part]
    if part == "optimizer":
        inner = next(iter(inner["state"].values()))
    name = next(name for name, tensor in inner.items() if tensor.numel() > 1 and tensor.is_floating_point())
    inner[name] = change(inner[name])
    return content


def hostile_files(content, part, canary):
    """By name, functions that write a hostile file, made of a good checkpoint of which `part` is looked at."""
    huge = MEGABYTES * 2**20
    buffer = io.BytesIO()
    torch.save(content, buffer)
    whole = buffer.getvalue()

    def save(made):
        return lambda path: torch.save(made, path)

    def write(raw):
        return lambda path: path.write_bytes(raw)

    def expanded(tensor):
        return torch.zeros(1).expand(huge)

    def with_nan(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = math.nan
        return tensor

    return {
        "code": save(content | dict(config=Call(open, str(canary), "w"))),
        "code, legacy": lambda path: torch.save(
            content | dict(epoch=Call(open, str(canary), "w")), path, _use_new_zipfile_serialization=False
        ),
        "code, plain pickle": write(pickle.dumps(Call(os.system, f"touch '{canary}'"), protocol=2)),
        "compressed tensors": lambda path: swollen(path, content, "data/1"),
        "compressed pickle": lambda path: swollen(path, content, "data.pkl"),
        "lying directory": lambda path: lying(path, content),
        "a few bytes that ask for gigabytes": save(content | dict(extra=Call(bytearray, huge))),
        "a compressed call that asks for gigabytes": lambda path: compressed(path, dict(x=Call(bytearray, huge))),
        "a tensor without its numbers": save(content | dict(extra=Call(torch.Tensor, huge // 16))),  # not filled
        "an expanded tensor": save(changed(content, part, expanded)),
        "a tensor of nowhere": save(content | dict(extra=torch.empty(huge, device="meta"))),
        "a sparse tensor": save(changed(content, part, lambda tensor: tensor.to_sparse())),
        "cut": write(whole[: len(whole) * 2 // 3]),
        "text": write(b"404 not found\n"),
        "empty": write(b""),
        "an image": lambda path: Image.new("RGB", (9, 9)).save(path, "JPEG"),
        "a folder": lambda path: path.mkdir(),
        "a list": save([content]),
        "wrong shapes": save(changed(content, part, lambda tensor: torch.zeros(tensor.numel() + 4))),
        "NaN": save(changed(content, part, with_nan)),
        "infinity": save(changed(content, part, lambda tensor: with_nan(tensor).nan_to_num(math.inf))),
    }


# How a file gets in: script, flag, whose file, and the part of it that is looked at.
DOORS = [
    ("pretrain", "--resume", "pretrain", "student"), ("pretrain", "--resume", "pretrain", "optimizer"),
    ("finetune", "--init", "pretrain", "student"), ("finetune", "--eval", "finetune", "model"),
    ("finetune", "--resume", "finetune", "model"), ("detect", "--init", "pretrain", "student"),
    ("detect", "--eval", "detect", "model"), ("detect", "--resume", "detect", "optimizer"),
]  # fmt: skip


def test_lists_within_lists_without_end(tmp_path):
    """A few kilobytes can name the same list 30^30 times: each is looked at once."""
    content = [torch.zeros(3)]
    for _ in range(30):
        content = [content] * 30
    torch.save(dict(content=content), tmp_path / "a.pt")
    with limits(seconds=20, size=2**29):
        assert "content" in engine.load_checkpoint(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script, flag, made_by, part", DOORS)
def test_hostile_checkpoints(finished, tmp_path, capsys, script, flag, made_by, part):
    canary, path = tmp_path / "canary", tmp_path / "here" / "a.pt"
    path.parent.mkdir()
    words = [flag, path, "--device", "cpu", "--dry-run"]
    words += [] if flag == "--eval" else ["--data-root", finished[made_by].parent / "data"]
    for name, make in hostile_files(load(finished[made_by]), part, canary).items():
        if name.startswith("compressed") and flag != "--init":
            continue  # takes a second to write, and all doors have the same lock
        make(path)
        with limits(seconds=60, size=200 * 2**20):  # of address space: a bomb that goes off is out of memory
            code, lines = end_of(capsys, script, words)
        assert code == 2 and len(lines) == 1, (name, code, lines)
        assert "a.pt" in lines[0] or "checkpoint" in lines[0], (name, lines)
        assert not re.search("memory|allocate|MemoryError", lines[0]), (name, lines)
        assert name not in ("NaN", "infinity") or "NaN or infinity" in lines[0], (name, lines)
        assert not canary.exists(), f"{name}: code was run"
        assert os.listdir(path.parent) == ["a.pt"], f"{name}: something was written"
        path.rmdir() if path.is_dir() else path.unlink()


def test_the_canary_sings(finished, tmp_path):
    """What the files above hold would run, were they opened as anyone opens a pickle."""
    canary, path = tmp_path / "canary", tmp_path / "a.pt"
    files = hostile_files(load(finished["pretrain"]), "student", canary)
    for name in ("code", "code, legacy", "code, plain pickle"):
        files[name](path)
        torch.load(path, weights_only=False) if "plain" not in name else pickle.loads(path.read_bytes())
        assert canary.exists()
        canary.unlink()


@pytest.mark.parametrize(
    "changes",
    [dict(dim=4 * 10**5), dict(dim=8000), dict(depth=10**8), dict(image_size=(4 * 10**6,) * 2), dict(mlp_ratio=1e9)],
    ids=str,
)
@pytest.mark.parametrize("script, flag", [("finetune", "--init"), ("detect", "--init"), ("finetune", "--eval")])
def test_a_model_that_is_said_to_be_enormous(finished, tmp_path, capsys, script, flag, changes):
    content = load(finished["pretrain" if flag == "--init" else "finetune"])
    torch.save(content | dict(encoder=content["encoder"] | changes), tmp_path / "a.pt")
    with limits(seconds=20, size=2**29):
        code, lines = end_of(capsys, script, [flag, tmp_path / "a.pt", "--device", "cpu", "--dry-run"])
    assert code == 2 and len(lines) == 1 and "a.pt: " in lines[0] and "memory" not in lines[0], lines


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(depth=10**8), "larger than any"), (dict(dim=4 * 10**7), "larger than any"),
        (dict(image_size=4 * 10**4, limit=1), "larger than any"), (dict(decoder_depth=10**8), "larger than any"),
        (dict(decoder_dim=4 * 10**7), "larger than any"), (dict(image_size=2000, limit=10000), "keep in memory"),
        (dict(workers=1000), "--workers must be at most"), (dict(epochs=10**400), "--epochs is beyond"),
        (dict(device="meta"), "--device meta"), (dict(device="privateuseone"), "--device privateuseone"),
    ],
    ids=str,
)  # fmt: skip
def test_slips_of_the_finger(tmp_path, changes, message):
    with limits(seconds=20, size=2**29), pytest.raises(UserError, match=message):
        train("pretrain", tmp_path / "run", **changes)


def hostile_safetensors(name):
    """A file of the format whose header lies."""
    entry = dict(dtype="F32", shape=[10**5], data_offsets=[0, 4 * 10**5])
    header = {"a": entry}
    length = None
    if name == "longer than the file":
        length = 2**62
    elif name == "larger than the file":
        header["a"] = dict(dtype="F32", shape=[2**40], data_offsets=[0, 2**42])
    elif name == "the same numbers many times":
        header = {f"{i}": entry for i in range(2000)}
    elif name == "negative":
        header |= {"b": dict(dtype="F32", shape=[1000], data_offsets=[-(10**9), -(10**9) + 4000])}
    elif name == "deep":
        return (10**5).to_bytes(8, "little") + b"[" * 10**5
    elif name == "no header":
        header = [1, 2]
    text = json.dumps(header).encode()
    return (length or len(text)).to_bytes(8, "little") + text + bytes(4 * 10**5)


@pytest.mark.parametrize(
    "name", ["longer than the file", "larger than the file", "the same numbers many times", "negative", "deep",
             "no header"],
)  # fmt: skip
def test_hostile_safetensors(tmp_path, name):
    path = tmp_path / "a.safetensors"
    path.write_bytes(hostile_safetensors(name))
    with limits(seconds=20, size=2**27), pytest.raises(UserError, match="a.safetensors is damaged") as error:
        engine.load_checkpoint(path)
    assert "MemoryError" not in str(error.value)


def test_a_resumed_run_takes_no_orders(finished, tmp_path, capsys):
    """A checkpoint's settings name no files to write, and nothing else to do."""
    for script, orders in (("finetune", dict(export="x", eval="x", knn=3)), ("detect", dict(results="x"))):
        out = copy_of(finished[script], tmp_path / script) if (tmp_path / script).mkdir() is None else None
        content, target = load(out), tmp_path / "target"
        for name, value in orders.items():
            order = {name: str(target) if value == "x" else value}
            torch.save(content | dict(config=content["config"] | order), out / "last.pt")
            assert end_of(capsys, script, ["--resume", out / "last.pt"]) == (0, [])
            assert not target.exists() and json.loads((out / "args.json").read_text())[name] is None


# --- broken data ------------------------------------------------------------------------------------------------------


def bomb(path):
    """A small PNG of 30,000 x 30,000 pixels: a hundred kilobytes of compressed zeros."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = zlib.compress(bytes(30000 * (1 + 30000 // 8)))
    header = struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


BROKEN = {
    "empty.png": lambda path: path.touch(),
    "text.jpg": lambda path: path.write_text("404 not found"),
    "head.jpg": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0"),
    "bomb.png": bomb,
    "folder.png": lambda path: path.symlink_to(path.parent),  # found as a folder, in which one has been
    "nowhere.jpg": lambda path: path.symlink_to("no such file"),
    "with a\nnew line.png": lambda path: path.touch(),
}
ODD = {
    "1 x 1.png": lambda path: Image.new("RGB", (1, 1), "red").save(path),
    "wide.png": lambda path: Image.new("RGB", (20000, 20), "green").save(path),
    "tall.jpg": lambda path: Image.new("RGB", (20, 20000), "blue").save(path),
    "animated.webp": lambda path: animate(path),
    "animated gif.png": lambda path: animate(path, "GIF"),
    "animated.png": lambda path: animate(path, "PNG"),
    "größe 图 new\nline.png": lambda path: Image.new("L", (9, 9)).save(path),
    "\x1b[31mred.png": lambda path: Image.new("L", (9, 9)).save(path),
    b"no utf-8 \xff\xfe.png".decode(errors="surrogateescape"): lambda path: Image.new("L", (9, 9)).save(
        io.BytesIO() if sys.platform in ("win32", "darwin") else path, "PNG"
    ),
}


def animate(path, kind=None):
    frames = [Image.new("RGB", (12, 10), color) for color in ("red", "green", "blue")]
    frames[0].save(path, kind, save_all=True, append_images=frames[1:])


def write_trouble(folder, good=54):
    """A folder of images of which a tenth cannot be read, and more are odd; links that loop. How many are broken."""
    write_images(folder, good)
    for name, make in (BROKEN | ODD).items():
        make(folder / name)
    (folder / "loop").symlink_to(folder)
    (folder / "deep" / "loop").symlink_to(folder / "deep")
    return len(BROKEN) - 1  # the link to the folder is none


@POSIX
def test_a_tenth_of_the_files_is_broken(monkeypatch, tmp_path, capsys):
    broken = write_trouble(tmp_path / "images")
    with limits(seconds=30, size=2**31):  # the links loop
        files = data.find_images(tmp_path / "images")
    assert 0.08 < broken / len(files) < 0.12
    doomed = files[5]
    steps = []

    def vanish(*_):
        steps.append(1)
        Path(doomed).unlink(missing_ok=True)

    wrap(monkeypatch, pretrain.Trainer, "train_step", before=vanish)
    checkpoint = train("pretrain", tmp_path / "run", data=tmp_path / "images", limit=None, epochs=4)
    text = capsys.readouterr().out
    assert len(steps) == 4 * (len(files) // 8) and checkpoint["skipped"] == 0 and assert_whole(tmp_path / "run")
    assert f"{broken + 1} unreadable images were passed over" in text and Path(doomed).name in text
    for name in BROKEN.keys() - {"folder.png"}:
        assert text.count(f"{engine.printable(name)}: ") == 1
    assert "exceeds limit of" in text  # Pillow's, named
    assert all(line.isprintable() for line in text.splitlines())


@POSIX
def test_unreadable_images_are_counted_across_a_resume(monkeypatch, tmp_path, capsys):
    broken = write_trouble(tmp_path / "images")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, pretrain.Trainer, "train_step", 15)  # in the third epoch
        train("pretrain", tmp_path / "run", data=tmp_path / "images", limit=None, epochs=3)
    seen = len(load(tmp_path / "run")["unreadable"])
    assert seen > 0
    for name in BROKEN.keys() - {"folder.png"}:
        (tmp_path / "images" / name).unlink()
        Image.new("L", (9, 9)).save(tmp_path / "images" / name, "PNG")
    capsys.readouterr()
    pretrain.main(flags(dict(out=tmp_path / "run", resume=True)))
    assert f"{seen} unreadable images were passed over" in capsys.readouterr().out and seen <= broken


@POSIX
def test_broken_files_among_classes(tmp_path, capsys):
    folder = write_classes(tmp_path / "images")
    for split in ("train", "val"):
        for name, make in BROKEN.items():
            make(folder / split / "cat" / name)
        write_images(folder / split / "cat", 40)
        (folder / split / "cat" / "loop").symlink_to(folder / split)
        (folder / split / "dog" / "deep" / "loop").symlink_to(folder / split / "dog")
    with limits(seconds=30, size=2**31):
        train_set = data.class_folders(folder / "train")
    assert len(train_set) == 40 + 8 + len(BROKEN) - 1 and train_set.targets.count(1) == 8
    assert all("loop" not in path for path, _ in train_set.samples)
    train("finetune", tmp_path / "run", data=folder, limit=None)
    assert_whole(tmp_path / "run")
    text = capsys.readouterr().out
    assert f"{2 * (len(BROKEN) - 1)} unreadable images were passed over" in text
    assert f"on {len(train_set) - len(BROKEN) + 1} validation images" in text


@POSIX
def test_files_and_folders_without_permission(monkeypatch, tmp_path, capsys, finished):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o777)
    with as_nobody():
        write_images(Path("images"), 30)
        write_images(Path("images/private"), 3)
        Path("images/6.jpg").chmod(0)
        Path("images/private").chmod(0)
        try:
            train("pretrain", Path("run"), data="images", limit=None, workers=0)
        finally:
            Path("images/private").chmod(0o700)
    text = capsys.readouterr().out
    assert "30 images" in text and "1 unreadable images were passed over" in text
    assert re.search(r"unreadable image: images/6.jpg: .*Permission denied", text)
    assert re.search(r"skipped an unreadable folder: .*Permission denied.*images/private", text)


@pytest.mark.filterwarnings("ignore")
def test_damaged_images_are_images_or_unreadable(tmp_path, pytestconfig):
    """Bytes overwritten, cut out and repeated, in files of seven kinds."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    kinds = dict(jpg={}, png={}, webp={}, tif=dict(compression="tiff_lzw"), bmp={}, gif={}, ppm={})
    wholes = []
    for suffix, options in kinds.items():
        Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **options)
        wholes.append((suffix, (tmp_path / f"a.{suffix}").read_bytes()))
    seed = random.SystemRandom().randrange(10**9) if pytestconfig.getoption("long") else 0
    outcomes = []
    for case in range(10000 if pytestconfig.getoption("long") else 500):
        draw = random.Random(f"{seed} {case}")
        suffix, whole = draw.choice(wholes)
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 5, 50])):
            place = int(len(damaged) * draw.random() ** 3)  # headers more often
            kind = draw.random()
            if kind < 0.7:
                damaged[place : place + 1] = bytes([draw.choice([0, 255, 127, draw.randrange(256)])])
            elif kind < 0.85:
                del damaged[place : place + draw.choice([1, 8])]
            else:
                damaged[place:place] = damaged[place : place + draw.choice([1, 8, 100])]
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(damaged)
        try:
            with limits(seconds=20, size=2**31):
                image = read_image(path)
            assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3
            outcomes.append("image")
        except UnreadableImage as error:
            assert str(error).startswith(str(path)) and str(error).isprintable()
            outcomes.append("unreadable")
        except Exception as error:
            raise AssertionError(f"seed {seed}, case {case}: {type(error).__name__}: {error}") from error
    assert min(outcomes.count("image"), outcomes.count("unreadable")) > 0.1 * len(outcomes)


@pytest.mark.parametrize("what", ["train", "eval", "knn"])
def test_more_images_asked_for_than_there_are(tmp_path, finished, what):
    folder = write_classes(tmp_path / "images")
    words = dict(data=folder, device="cpu")
    if what == "train":
        words |= SETTINGS["finetune"] | dict(out=tmp_path / "run")
    elif what == "knn":
        words |= dict(knn=3, init=finished["pretrain"] / "last.pt")
    else:
        train("finetune", tmp_path / "run", data=folder, limit=16, epochs=1, warmup_epochs=0)
        words |= dict(eval=tmp_path / "run" / "best.pt")
    with pytest.raises(UserError, match="--limit 17 must be between 1 and the 16 images there are"):
        finetune.main(flags(words | dict(limit=17)))


# --- bad numbers ------------------------------------------------------------------------------------------------------


def test_half_precision_overflows(monkeypatch, tmp_path, capsys):
    """fp16 has no numbers above 65504: steps in which something passes it are skipped, and the rest learns."""
    bright = False
    monkeypatch.setattr(engine, "autocast", lambda device, precision: torch.autocast("cpu", torch.float16))

    def look(trainer, _):
        nonlocal bright
        bright = trainer.step in (2, 5)

    honest = data.Normalize.forward
    wrap(monkeypatch, pretrain.Trainer, "train_step", before=look)
    monkeypatch.setattr(data.Normalize, "forward", lambda self, images: honest(self, images) * (1e6 if bright else 1))
    checkpoint = train("pretrain", tmp_path / "run")
    assert checkpoint["skipped"] == 2 and assert_whole(tmp_path / "run")["step"] == 8
    assert "2 steps were skipped because something was not finite" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
@pytest.mark.parametrize("lr", [1e2, 1e6, 1e12, 1e20, 1e30, 1e38, 1e300])
def test_an_exploding_learning_rate(tmp_path, capsys, script, lr):
    """A run that stays finite, or one that is stopped with advice; whatever it leaves is finite."""
    out = tmp_path / "run"
    words = flags(SETTINGS[script] | dict(out=out, lr=lr, epochs=8, clip_grad=0))
    code, lines = end_of(capsys, script, words)
    assert code == 0 or (code == 2 and re.search("finite.* lower --blr or --lr", lines[0])), lines
    assert code == 2 or lr < 1e20
    assert_whole(out)
    if (out / "best.pt").exists():
        assert all(tensor.isfinite().all() for tensor in tensors(torch.load(out / "best.pt", weights_only=True)))


def test_weights_that_are_not_finite_are_not_saved(monkeypatch, tmp_path):
    """Gradient and loss were finite, but the last step of an epoch was too much."""

    def spoil(trainer, _):
        if trainer.step == 8:
            with torch.no_grad():
                trainer.model.decoder.mask_token.fill_(math.inf)

    wrap(monkeypatch, pretrain.Trainer, "train_step", after=spoil)
    with pytest.raises(UserError, match=r"decoder.mask_token is no longer finite \(step 8\): lower --blr or --lr"):
        train("pretrain", tmp_path / "run")
    assert assert_whole(tmp_path / "run")["epoch"] == 1


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes of one run say: started differently, and then one of them killed, and one halted."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    said = [open(folder / f"{rank}.txt", "w") for rank in (0, 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdout=said[rank], stderr=said[rank],
            env=ENVIRONMENT | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                                   MASTER_PORT=port),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        out = folder / "run"
        end = time.monotonic() + 90
        while not ((out / "last.pt").exists() and len(log(out)) > 2):
            assert time.monotonic() < end and processes[0].poll() is None, (folder / "0.txt").read_text()
            time.sleep(0.01)
        processes[1].kill()
        start = time.monotonic()
        code = processes[0].wait(timeout=60)
        seconds = time.monotonic() - start
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for file in said:
            file.close()
    return dict(folder=folder, code=code, seconds=seconds, texts=[(folder / f"{r}.txt").read_text() for r in (0, 1)])


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


@POSIX
def test_processes_started_differently(two_ranks):
    for text in two_ranks["texts"]:
        settings, images = lines_of(text, "error: process 0 and process 1 were started differently: ")
        assert settings.endswith(": seed is 0 and 5, lr is 0.001 and 0.002")
        assert images.endswith(": num_images is 16 and 8")
    assert not (two_ranks["folder"] / "settings").exists() and not (two_ranks["folder"] / "images run").exists()


@POSIX
def test_a_process_that_dies_ends_the_other(two_ranks):
    assert two_ranks["code"] == 1 and two_ranks["seconds"] < 20
    text = two_ranks["texts"][0]
    assert "Traceback" not in text
    (line,) = lines_of(text, "error: another process of this run is gone or does not answer (")
    out = two_ranks["folder"] / "run"
    assert lines_of(text, "to continue from the last checkpoint: ")[0].endswith(f"--resume {out / 'last.pt'}")
    assert 2 < assert_whole(out)["epoch"] < 200


def worker(folder):
    """A run whose processes have other settings, one on other images, and one that goes on until a process dies."""
    engine.PATIENCE = timedelta(seconds=30)
    world = engine.start_world("cpu")
    engine.start_world = lambda device: world  # joined already
    settings = SETTINGS["pretrain"] | dict(limit=16)
    write_images(folder / f"machine {world.rank}" / "images", 16 if world.rank == 0 else 8)
    differently = [
        dict(out=folder / "settings", lr=1e-3 * (1 + world.rank), seed=5 * world.rank, workers=world.rank),
        dict(out=folder / "images run", data="images", limit=None),
    ]
    os.chdir(folder / f"machine {world.rank}")  # where `images` is another folder
    for changes in differently:
        with contextlib.suppress(SystemExit):
            engine.launch(lambda changes=changes: pretrain.main(flags(settings | changes)))
    engine.launch(lambda: pretrain.main(flags(settings | dict(out=folder / "run", epochs=200))))


# --- memory and file handles ------------------------------------------------------------------------------------------


def resident():
    """Bytes of memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("script, workers", [("pretrain", 0), ("finetune", 1)])
def test_memory_and_file_handles_stay_flat(monkeypatch, tmp_path, pytestconfig, script, workers):
    if workers and not pytestconfig.getoption("long"):
        pytest.skip("takes half a minute: --long")
    memory, handles = [], []

    def measure(*_):
        memory.append(resident())
        handles.append(len(os.listdir("/proc/self/fd")))

    wrap(monkeypatch, SCRIPTS[script], "describe_epoch", after=measure)
    folder = write_classes(tmp_path / "images")
    changes = dict(data=folder, limit=16, micro_batch=4, epochs=50, workers=workers, min_crop=0.2)
    changes |= dict(knn_every=10) if script == "pretrain" else {}
    train(script, tmp_path / "run", **changes)
    assert len(memory) == 50
    assert max(memory[10:]) < 1.05 * max(memory[:10]), [round(value / 2**20) for value in memory]
    assert max(handles[10:]) <= max(handles[:10]), handles


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
