"""Tests that need a CUDA card, at most five minutes: `pytest -m cuda`.

PCAE_TEST_DEVICE=cpu runs these tests on a CPU, except those that read the card's memory.
"""

import gc
import os

import pytest
import torch

import benchmark
import data
import helpers
from baselines import MAE, SimMIM
from helpers import train
from model import MODELS, PCAE, ViT
from ptr import PTR
from util import runs
from util.shapes import Shapes

DEVICE = os.environ.get("PCAE_TEST_DEVICE", "cuda")
HAS_CARD = torch.cuda.is_available()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(DEVICE == "cuda" and not HAS_CARD, reason="no CUDA card")]
reads_memory = pytest.mark.skipif(not HAS_CARD or DEVICE != "cuda", reason="no CUDA card")

# 2 steps per epoch.
SMALL = dict(limit=32, batch_size=16, epochs=1, image_size=16, patch_size=4, workers=0)
PRETRAIN = SMALL | dict(decoder_dim=16, drop_stages=2, ema=0.9, knn_every=0)
OTHERS = SMALL | dict(limit=16, knn_every=0)
FINETUNE = SMALL | dict(init="none", drop_ratio=0.3, drop_blocks=[0, 2], smoothing=0)
# RoIs are sampled by the device's generator, which differs from the CPU's. With these sizes, all RoIs are sampled.
DETECT = dict(
    init="none", limit=2, batch_size=2, epochs=1, short_side=32, channels=16, rois=512, proposals=32, drop_ratio=0.3
)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Compute float32 convolutions in float32: by default cuDNN uses TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def assert_close_gradients(a, b, tolerance):
    """Assert that loss, gradient norm and averaged gradients of two runs differ by at most this fraction."""
    for name in ("loss", "grad_norm"):
        losses = [[row[name] for row in run["history"]] for run in (a, b)]
        torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
    for i, state in b["optimizer"]["state"].items():
        scale = state["exp_avg"].abs().max().item()
        found = a["optimizer"]["state"][i]["exp_avg"]
        torch.testing.assert_close(found, state["exp_avg"], rtol=0, atol=max(tolerance * scale, 1e-9))


# --- the same results as on the CPU -----------------------------------------------------------------------------------

ONE_STEP = [
    ("pretrain", PRETRAIN | dict(limit=16)),
    ("pretrain", OTHERS | dict(method="mae")),
    ("pretrain", OTHERS | dict(method="simmim")),
    ("finetune", FINETUNE | dict(limit=16)),
    ("detect", DETECT),
]


@pytest.mark.parametrize("script, settings", ONE_STEP)
def test_a_step_equals_the_cpus(tmp_path, script, settings):
    settings = settings | dict(data_root=tmp_path)
    here, there, half = (
        train(script, tmp_path / f"{device} {precision}", device=device, precision=precision, **settings)
        for device, precision in (("cpu", "fp32"), (DEVICE, "fp32"), (DEVICE, "bf16"))
    )
    assert_close_gradients(there, here, tolerance=1e-4)
    assert half["history"][0]["loss"] == pytest.approx(here["history"][0]["loss"], rel=0.01)


def test_crops_equal_the_cpus():
    """Except that a value halfway between two may be rounded to the other one."""
    images = Shapes("train", 64, (32, 32))
    keys = [(0, i) for i in range(64)]
    here, there = (
        data.BatchViews(images, (32, 32), min_crop=0.2, device=device).__getitems__(keys)[0].cpu().int()
        for device in ("cpu", DEVICE)
    )
    assert (here - there).abs().max() <= 1 and (here != there).float().mean() < 0.05


# --- resuming, processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, settings", [("pretrain", PRETRAIN), ("finetune", FINETUNE)])
def test_a_killed_run_resumes_with_the_same_bits(tmp_path, script, settings):
    """With drop path. Detection is not tested, because its kernels add in any order."""
    settings = settings | dict(epochs=16, drop_path=0.3, min_crop=0.5, device=DEVICE)
    uninterrupted = train(script, tmp_path / "whole", **settings)
    with helpers.start(script, tmp_path / "killed", **settings) as process:
        helpers.wait_for_rows(process, tmp_path / "killed", 1)
        process.kill()
    assert runs.load(tmp_path / "killed/last.pt")["epoch"] < 16, "the run ended before it was killed"
    helpers.assert_same_run(uninterrupted, train(script, tmp_path / "killed", resume=True))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script, settings", [("pretrain", PRETRAIN), ("finetune", FINETUNE)])
def test_torchrun_equals_one_process(tmp_path, processes, script, settings):
    if DEVICE == "cuda" and torch.cuda.device_count() < processes:
        pytest.skip("needs two cards")
    settings = settings | dict(device=DEVICE, precision="fp32")
    helpers.torchrun(processes, script, out=tmp_path / "torchrun", **settings)
    alone = train(script, tmp_path / "alone", **settings)
    assert_close_gradients(runs.load(tmp_path / "torchrun/last.pt"), alone, tolerance=1e-4)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def assert_same_losses(a, b, epochs):
    losses = [[row["loss"] for row in run["history"]] for run in (a, b)]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    assert len(losses[0]) == epochs and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("script, settings", [("pretrain", PRETRAIN), ("finetune", FINETUNE | dict(blr=0.1))])
def test_compiled_steps_have_the_same_losses(tmp_path, script, settings):
    """With PTR, and drop path that draws as without compilation. All steps use one graph."""
    settings = settings | dict(epochs=4, drop_path=0.3, device=DEVICE, precision="fp32")
    plain = train(script, tmp_path / "plain", **settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(fallback_random=True):
        compiled = train(script, tmp_path / "compiled", compile=True, **settings)
    assert_same_losses(compiled, plain, epochs=4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_steps_of_torchrun_have_the_same_losses(tmp_path):
    settings = PRETRAIN | dict(epochs=4, device=DEVICE, precision="fp32", micro_batch=8)
    helpers.torchrun(1, "pretrain", out=tmp_path / "compiled", compile=True, **settings)
    plain = train("pretrain", tmp_path / "plain", **settings)
    assert_same_losses(runs.load(tmp_path / "compiled/last.pt"), plain, epochs=4)


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_memory(function):
    """Return the bytes that a call allocates in addition."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


@reads_memory
@pytest.mark.parametrize("script, settings", [("pretrain", PRETRAIN), ("finetune", FINETUNE)])
def test_memory_does_not_grow(tmp_path, script, settings):
    """200 steps need as much as 20."""
    settings = settings | dict(limit=320, device=DEVICE)
    train(script, tmp_path / "first", **settings)  # allocations that libraries make once
    few, many = (
        peak_memory(lambda epochs=epochs: train(script, tmp_path / str(epochs), **settings | dict(epochs=epochs)))
        for epochs in (1, 10)
    )
    assert many <= 1.01 * few


@reads_memory
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method, options", [(PCAE, dict(ptr=PTR((0, 4, 8), 0.5))), (MAE, {}), (SimMIM, {})])
def test_bytes_kept_for_backward_are_the_allocators(method, options, precision):
    """Compared per image. The allocator also counts outputs and rounds up."""
    model = method(ViT((224, 224), 16, **MODELS["vit_tiny"]), **options).to(DEVICE)
    kept, allocated = [], []
    for count in (8, 24):
        images = torch.randn(count, 3, 224, 224, device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
            kept.append(benchmark.kept_for_backward(model, images))
            before = torch.cuda.memory_allocated()
            output = model(images)
            allocated.append(torch.cuda.memory_allocated() - before)
        del output
    assert allocated[1] - allocated[0] == pytest.approx(kept[1] - kept[0], rel=0.1)
