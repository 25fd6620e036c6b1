"""Helpers of the tests: run scripts, also in separate processes, and compare their checkpoints."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

import data
from util import runs, training

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def flags(**settings):
    """batch_size=4, resume=True, image_size=[8, 16] -> --batch-size 4 --resume --image-size 8 16; None is skipped."""
    words = []
    for name, value in settings.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [] if value is None else ["--" + name.replace("_", "-"), *map(str, values)]
    return words


def train(script, out, **settings):
    """Run a script in this process and return its last checkpoint."""
    importlib.import_module(script).main(flags(out=out, **settings))
    return runs.load(out / ("dry-run" if settings.get("dry_run") else ".") / "last.pt")


def evaluate(path, **settings):
    """Run evaluate.py on a file in this process."""
    importlib.import_module("evaluate").main([str(path), *flags(**dict(workers=0, device="cpu") | settings)])


def export(path, out, **settings):
    """Export a checkpoint for timm by weights.py."""
    importlib.import_module("weights").main([str(path), str(out), *flags(**settings)])


def scored(images, size, channels=3):
    """Return the evaluation views of a data set one by one: (view, label, readable)."""
    world = training.World(0, 1, torch.device("cpu"))
    loader = data.scoring_loader(images, size, channels, batch_size=64, workers=0, world=world)
    return [tuple(part[i] for part in batch) for batch in loader for i in range(len(batch[0]))]


def batches_of(loader, epochs):
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        yield from loader


def log(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def start(script, out, **settings):
    """Start a script in a separate process, with its output discarded."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags(out=out, **settings)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_rows(process, out, count):
    """Wait until the log of a running process has `count` rows."""
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < count:
        assert process.poll() is None, f"the run ended before its log had {count} rows"
        time.sleep(0.001)


def two_processes(script, *several):
    """Run a script in two processes of torchrun, once per settings."""
    for settings in several:
        torchrun(2, script, **settings)


def torchrun(processes, script, **settings):
    """Run a script in `processes` processes of torchrun."""
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node".split(), str(processes)]
    command += [str(ROOT / f"{script}.py"), *flags(**settings)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def identical(a, b):
    """Return whether nested dicts, tensors and values are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(a, b):
    """Assert that two checkpoints have the same bits, step and losses."""
    for part in (a.keys() | b.keys()) - {"history", "config"}:
        assert identical(a[part], b[part]), part
    assert [row.get("loss") for row in a["history"]] == [row.get("loss") for row in b["history"]]


def assert_close_weights(a, b):
    """Assert nearly equal weights, except for biases of keys: their gradients are noise, which AdamW scales up."""
    for name in a:
        pair = [x[name].view(3, -1)[::2] if name.endswith("qkv.bias") else x[name] for x in (a, b)]
        torch.testing.assert_close(*pair, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def assert_close_runs(a, b, parts):
    """Assert nearly equal weights, gradient averages and gradient norms, because AdamW hides the scale of gradients."""
    for part in parts:
        assert_close_weights(a[part], b[part])
    for i, state in a["optimizer"]["state"].items():
        for name in state.keys() & {"exp_avg", "momentum_buffer"}:  # AdamW's, SGD's
            torch.testing.assert_close(state[name], b["optimizer"]["state"][i][name], atol=1e-6, rtol=1e-4)
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(*([row[name] for row in run["history"]] for run in (a, b)), atol=0, rtol=1e-4)


def write_images(folder, count=16, shade=0):
    """Write image files of 24 x 20 pixels at two folder depths: noise on a `shade` of grey."""
    for i in range(count):
        noise = torch.randint(160, (20, 24, 3), generator=training.generator(shade, i))
        path = folder / ("deeper" if i % 3 else ".") / f"{i}.{'png' if i % 2 else 'bmp'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((noise + shade).byte().numpy()).save(path)
    return folder
