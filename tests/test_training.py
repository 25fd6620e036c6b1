"""Schedules, parameter groups, seeds, precision and processes: closed forms and explicit lists."""

import math
import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from model import PCAE, Classifier, ViT
from ptr import PTR
from util import training
from util.training import World

CPU = torch.device("cpu")


def test_warmup_cosine():
    def rates(*steps, warmup=10):
        return [training.warmup_cosine(step, peak=0.4, total=50, warmup=warmup) for step in steps]

    assert rates(0, 1, 5, 10) == pytest.approx([0, 0.04, 0.2, 0.4])
    assert rates(20, 30, 50) == pytest.approx([0.2 * (1 + math.sqrt(0.5)), 0.2, 0], abs=1e-12)
    assert rates(0, 25, 50, warmup=0) == pytest.approx([0.4, 0.2, 0], abs=1e-12)
    assert rates(10 - 1e-9, 10 + 1e-9) == pytest.approx([0.4, 0.4]), "continuous at the end of the warm-up"


def test_warmup_milestones():
    def rates(*steps, warmup=10):
        options = dict(peak=0.4, milestones=[20.0, 30.0], warmup=warmup)
        return [training.warmup_milestones(step, **options) for step in steps]

    assert rates(0, 1, 5, 10, 19) == pytest.approx([0, 0.04, 0.2, 0.4, 0.4])
    assert rates(20, 29, 30, 99) == pytest.approx([0.04, 0.04, 0.004, 0.004])
    assert rates(0, 19, 20, warmup=0) == pytest.approx([0.4, 0.4, 0.04])


def test_ema_momentum():
    values = [training.ema_momentum(step, base=0.9, total=40) for step in range(41)]
    assert [values[i] for i in (0, 10, 20, 40)] == pytest.approx([0.9, 1 - 0.05 * (1 + math.sqrt(0.5)), 0.95, 1])
    assert values == sorted(values) and training.ema_momentum(7, base=1, total=40) == 1


def test_start_momentum():
    for total in (100, 3120):
        assert 1 / (1 - training.start_momentum(total)) == pytest.approx(total / 30)
    assert training.start_momentum(2) == 0


def grouped(model, **options):
    """Return {name: (lr_scale, weight_decay)} of trained parameters, each in exactly one group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = training.parameter_groups(model, 0.05, **options)
    found = [(names[p], (group["lr_scale"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names[p] for p in model.parameters() if p.requires_grad)
    return dict(found)


def test_weight_decay():
    """Weights of linear layers and patch embedding decay, not biases, norms, class token, mask token or positions."""
    student = ViT((8, 12), 4, dim=16, depth=2, heads=2)
    model = PCAE(student, ptr=PTR((0,), 0.2), decoder_dim=8, decoder_depth=1, decoder_heads=2)
    layers = [
        f"{block}.{layer}.weight"
        for block in ("student.blocks.0", "student.blocks.1", "decoder.blocks.0")
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    layers += ["student.patch_embed.proj.weight", "decoder.embed.weight", "decoder.pred.weight"]
    found = grouped(model)
    assert {name for name, group in found.items() if group == (1, 0.05)} == set(layers)
    assert {"student.cls_token", "decoder.mask_token", "student.norm.weight", "decoder.pred.bias"} < found.keys()
    assert all(found[name] == (1, 0) and not name.startswith("teacher.") for name in found.keys() - set(layers))
    student.pos_embed.requires_grad_()
    assert grouped(model)["student.pos_embed"] == (1, 0)


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_layer_decay(pool):
    """One factor from head to last block, from each block to the one before, and from block 0 to the embeddings."""
    found = grouped(Classifier(ViT((8, 12), 4, dim=16, depth=11, heads=2), 5, pool=pool), layer_decay=0.5)
    for name, (scale, _) in found.items():
        power = 12 if name.split(".")[1] in ("cls_token", "pos_embed", "patch_embed") else 0
        if ".blocks." in name:
            power = 11 - int(name.split(".")[2])
        assert scale == pytest.approx(0.5**power), name
    assert ("encoder.norm.weight" in found) == (pool == "class") and "head.weight" in found
    frozen = Classifier(ViT((8, 12), 4, dim=16, depth=11, heads=2), 5, frozen=True)
    assert grouped(frozen, layer_decay=0.5) == {"head.weight": (1, 0.05), "head.bias": (1, 0)}


def test_seeds():
    """Equal parts give equal seeds, other parts other seeds, of 63 bits, valid for all generators of torch."""
    assert training.derive_seed(0, "view", 3, 14) == training.derive_seed(0, "view", 3, 14)
    parts = [("1", 2), (1, "2"), (1, 2), (12,), ("12",), (2, 1), (-1, 2), ("1, 2",), ()]
    parts += [(seed, "view", epoch, index) for seed in range(4) for epoch in range(10) for index in range(40)]
    seeds = {training.derive_seed(*some) for some in parts}
    assert len(seeds) == len(parts) and all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62


def test_generators():
    def own(*parts):
        return torch.rand(4, generator=training.generator(*parts)).tolist()

    def of_torch(*parts):
        training.seed_generators(CPU, *parts)
        return torch.rand(4).tolist()

    assert of_torch(1, "a") == of_torch(1, "a") != of_torch(2, "a")
    state = torch.get_rng_state()
    assert own(1, "a") == own(1, "a") != own(1, "b")
    assert torch.equal(torch.get_rng_state(), state), "torch's default generator is unchanged"


def test_autocast_on_a_cpu():
    for precision, dtype in dict(auto=torch.float32, fp32=torch.float32, bf16=torch.bfloat16).items():
        with training.autocast(CPU, precision):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_single_process():
    world = training.start_world("cpu")
    assert world == World(0, 1, CPU) and world.is_main
    assert training.gather_lists([1, 2]) == [1, 2]
    assert training.mean_over_processes(torch.tensor([3.0])).tolist() == [3.0]
    training.end_world()


def test_a_missing_device():
    with pytest.raises(SystemExit, match="--device toaster"):
        training.start_world("toaster")


@pytest.mark.parametrize(
    "batch, micro, processes, expected",
    [
        (16, None, 1, (16, 1)),
        (16, 4, 1, (4, 4)),
        (16, None, 2, (8, 1)),
        (16, 4, 2, (4, 2)),
        (16, 99, 4, (4, 1)),
        (15, None, 2, None),
        (16, 5, 1, None),
        (16, 3, 2, None),
        (1, None, 2, None),
        (0, None, 1, None),
    ],
)
def test_batch_sizes(batch, micro, processes, expected):
    """(micro-batch size, number): over all processes they must equal the batch size, else an error."""
    world = World(0, processes, CPU)
    if expected is None:
        with pytest.raises(SystemExit, match="--batch-size"):
            training.batch_sizes(batch, micro, world)
    else:
        assert training.batch_sizes(batch, micro, world) == expected


@pytest.mark.parametrize("script", ["pretrain", "finetune", "evaluate", "detect", "visualize", "benchmark"])
def test_the_spin_count_is_set_before_torch_is_loaded(script):
    code = f"import sys, {script}; names = list(sys.modules); print(names.index('util.threads') < names.index('torch'))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "True"


@pytest.mark.parametrize(
    "variables, spins", [({}, "700"), (dict(OMP_NUM_THREADS="1"), "None"), (dict(GOMP_SPINCOUNT="5"), "5")]
)
def test_the_spin_count_is_bounded_unless_the_user_sets_threads(variables, spins):
    environment = {name: text for name, text in os.environ.items() if "OMP_" not in name} | variables
    code = "import os, util.threads; print(os.environ.get('GOMP_SPINCOUNT'))"
    found = subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=ROOT, text=True)
    assert found.strip() == spins
