"""What the tests of the scripts share: calling them, looking at what they leave behind, getting in their way."""

import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import engine

ROOT = Path(__file__).resolve().parent.parent


def flags(settings):
    """{"batch_size": 4, "resume": True, "image_size": [8, 16]} -> --batch-size 4 --resume --image-size 8 16"""
    words = []
    for name, value in settings.items():
        if value is not None:
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return words


def load(out):
    return torch.load(out / "last.pt", weights_only=True)


def log(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
run_process = functools.partial(subprocess.run, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def torchrun(folder, *words):
    """Run a Python file with its arguments in two processes; what they say goes to a file in the folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    with open(folder / "words.txt", "w") as said:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=said, stderr=said)
        try:
            process.wait(timeout=120)
        finally:
            process.terminate()  # in case they wait for each other: torchrun then ends both
    assert process.returncode == 0, (folder / "words.txt").read_text()
    return folder


def identical(a, b):
    """Equal to the last bit, at any depth."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


def timeless(rows):
    return [{name: row[name] for name in row if name not in ("images_per_second", "data_wait")} for row in rows]


def assert_same_run(a, b):
    """Two run folders hold the same bits, but for how long things took."""
    x, y = load(a), load(b)
    for part in x:
        if part == "history":
            assert timeless(x[part]) == timeless(y[part]) == timeless(log(a)) == timeless(log(b))
        elif part == "config":
            assert settled(x[part]) == settled(y[part])
        else:
            assert identical(x[part], y[part]), part


def without_keys(name, parameter):
    return parameter.view(3, -1)[::2] if name.endswith("qkv.bias") else parameter


def assert_close_runs(a, b):
    """Two folders of pre-training hold nearly the same weights and gradients.

    AdamW turns any gradient into a step of about the learning rate, also those of the keys' biases, which are rounding
    errors: zero in theory, since softmax ignores what is added to all of its inputs. So these biases are left out. And
    it hides the scale of the gradients, so their averages are compared as well.
    """
    x, y = load(a), load(b)
    parts = {"student", "teacher", "decoder"} & x.keys()
    assert parts == {"student", "teacher", "decoder"} & y.keys()
    for part in parts:
        for name in x[part]:
            ours, theirs = without_keys(name, x[part][name]), without_keys(name, y[part][name])
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=f"{part} {name}")
    for i, state in x["optimizer"]["state"].items():
        torch.testing.assert_close(state["exp_avg"], y["optimizer"]["state"][i]["exp_avg"], atol=1e-6, rtol=1e-4)
        assert state["step"] == y["optimizer"]["state"][i]["step"]
    for ours, theirs in zip(timeless(log(a)), timeless(log(b)), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def settled(config):
    return {name: value for name, value in config.items() if name not in engine.FREE}


def tensors(content):
    """All tensors at any depth, in order."""
    if isinstance(content, torch.Tensor):
        return [content]
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [tensor for value in values for tensor in tensors(value)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copy_of(run, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name, content in contents(run).items():
        (out / name).write_bytes(content)
    return out


def wrap(monkeypatch, owner, name, before=None, after=None):
    """Call `before(*args)` and `after(*args)` around each call of a function or method."""
    honest = getattr(owner, name)

    def wrapper(*args, **kwargs):
        if before:
            before(*args)
        result = honest(*args, **kwargs)
        if after:
            after(*args)
        return result

    monkeypatch.setattr(owner, name, wrapper)


def score_few(monkeypatch, count):
    """Let scripts score `count` of the built-in validation images: all 2,000 would take most of the time of a test."""
    honest = data.validation_images

    def few(name, root, download, image_size, limit=None, class_to_idx=None):
        limit = count if name == "shapes" and limit is None else limit
        return honest(name, root, download, image_size, limit, class_to_idx)

    monkeypatch.setattr(data, "validation_images", few)


def interrupt(monkeypatch, owner, name, calls):
    """Ctrl-C when a function is called once more after `calls` calls."""
    count = itertools.count()

    def stop(*_):
        if next(count) == calls:
            raise KeyboardInterrupt

    wrap(monkeypatch, owner, name, before=stop)


class TooLong(BaseException):
    """What no `except` for errors catches."""


@contextlib.contextmanager
def limits(seconds, size):
    """Stop what takes long, or asks for more bytes of memory, by an error in the allocator; where the system can.

    Signal handlers that were set within are put back.
    """
    try:
        import resource
    except ImportError:  # Windows
        yield
        return

    def late(number, frame):
        raise TooLong(f"still running after {seconds} seconds")

    before = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + size, before[1]))
    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def write_images(folder, count=16, size=(24, 20)):
    """Files of many kinds, at several depths."""
    kinds = [("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "bmp"), ("RGB", "webp"), ("1", "tif")]
    for i in range(count):
        mode, suffix = kinds[i % len(kinds)]
        path = folder / ("deep/er" if i % 3 else ".") / f"{i}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(i)).byte()
        Image.fromarray(pixels.numpy()).convert(mode).save(path)
    return folder


def write_classes(folder):
    for split, name in itertools.product(("train", "val"), ("cat", "dog")):
        write_images(folder / split / name, 8)
    return folder
