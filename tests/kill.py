"""Kill a run again and again, at any moment and while it writes: in the end it holds the bits of one left in peace.

    python tests/kill.py                        20 kills of pretrain.py and 10 of finetune.py, some three minutes
    python tests/kill.py --kills 100 --seed 7   more of each

A kill is SIGKILL, which no process can prepare for, sent to the script run by its command line. After each, the
checkpoint must load; then the script goes on from it with --resume. `tests/test_faults.py` does this with few kills.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import finetune
import pretrain
from helpers import ENVIRONMENT, ROOT, assert_same_run, flags, identical, load, log, timeless, write_classes

MAINS = dict(pretrain=pretrain.main, finetune=finetune.main)
TINY = dict(
    batch_size=8, warmup_epochs=1, lr=1e-3, image_size=16, patch_size=4, dim=16, depth=2, heads=2, min_crop=0.5,
    drop_path=0.3, criterion="random", device="cpu",
)  # fmt: skip
SETTINGS = dict(
    pretrain=TINY | dict(limit=64, ema=0.9, decoder_dim=16, decoder_heads=2, drop_stages=2, knn_every=0),
    finetune=TINY | dict(
        init="none", drop_ratio=0.3, drop_blocks=0, rand_augment=9, erasing=0.5, mixup=0.8, cutmix=1.0, workers=1
    ),
)  # fmt: skip

# What is killed: a script whose disk is slow, so that a good part of its time goes into writing.
SLOW_DISK = """
import os, runpy, sys, time
fsync = os.fsync
os.fsync = lambda file: (time.sleep(0.02), fsync(file))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def wait_for(condition, process, what):
    """Wait until it holds; an error where the process ends before, or after a minute."""
    end = time.monotonic() + 60
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"no {what}: exit code {process.poll()}, {process.stderr.read()}")
        time.sleep(0.0005)


def half_written(out):
    """The files that were being written when a run was killed, and when that was."""
    return {(path.name, path.stat().st_mtime_ns) for path in out.glob("*.tmp")}


def kill_once(words, out, moment, draw):
    """Start a script and kill it at a moment; whether it was writing then."""
    done = len(log(out)) if (out / "metrics.jsonl").exists() else -1  # epochs
    before = half_written(out)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_DISK, *words], env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True
    ) as process:
        if moment == "early":  # while it imports, reads, or starts
            time.sleep(draw.uniform(0.5, 5))
        else:
            more = done + draw.randint(1, 3)
            wait_for(lambda: (out / "last.pt").exists() and len(log(out)) >= more, process, f"epoch {more}")
            if moment == "writing":
                name = draw.choice(["*.tmp", "last.pt.tmp"])
                wait_for(lambda: any(out.glob(name)), process, "writing")
            else:
                time.sleep(draw.uniform(0, 0.1))
        assert process.poll() is None, f"it ended before it was killed: {process.stderr.read()}"
        process.kill()
    return bool(half_written(out) - before)


def kill_and_resume(script, folder, kills, seed):
    """Kill and resume a script so many times; raises AssertionError where anything is lost. How many hit a writing."""
    draw = random.Random(f"{script} {seed}")
    settings = SETTINGS[script] | dict(epochs=4 * kills + 4)
    if script == "finetune":
        settings |= dict(data=write_classes(folder / "images"))
    whole, out = folder / "whole", folder / "killed"
    MAINS[script](flags(settings | dict(out=whole)))
    start = [str(ROOT / f"{script}.py"), *flags(settings | dict(out=out))]
    resume = [start[0], "--resume", "--out", str(out)]
    moments = ["writing", "any", "writing", "early", "any"]
    hits, epoch = 0, 0
    for i in range(kills):
        hits += kill_once(resume if (out / "last.pt").exists() else start, out, moments[i % len(moments)], draw)
        if (out / "last.pt").exists():
            before, epoch = epoch, load(out)["epoch"]
            assert before <= epoch < settings["epochs"], f"epoch {epoch} after {before}: lost, or done too early"
    MAINS[script](resume[1:])
    assert_same_run(whole, out)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir()), "something is left over"
    if script == "finetune":
        best, expected = (torch.load(run / "best.pt", weights_only=True) for run in (out, whole))
        assert identical(best["model"], expected["model"])
        assert timeless(best["history"]) == timeless(expected["history"])
    return hits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="of each script (default: 20 and 10)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for script, kills in (("pretrain", 20), ("finetune", 10)):
        kills = kills if args.kills is None else args.kills
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            hits = kill_and_resume(script, Path(folder), kills, args.seed)
        seconds = time.monotonic() - start
        print(f"{script}: killed {kills} times, {hits} of them while it wrote; the same bits ({seconds:.0f} seconds)")
