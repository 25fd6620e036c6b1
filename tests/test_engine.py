"""What a run needs around the method: schedules, optimizer groups, seeds, command line, the loop, scores, files."""

import argparse
import copy
import io
import json
import math
import os
import pickle
import subprocess
import sys
import traceback
import zipfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import data
import engine
from engine import (
    Unreadable,
    UserError,
    World,
    derive_seed,
    ema_momentum,
    knn_accuracy,
    linear_accuracy,
    load_checkpoint,
    save_checkpoint,
    standardise,
    warmup_cosine,
)
from helpers import ENVIRONMENT, identical, log, tensors, wrap
from model import PCAE, Classifier, ViT
from ptr import PTR, token_counts

ROOT = Path(engine.__file__).parent


def run_python(code, *arguments, **environment):
    """What the code prints in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- schedules --------------------------------------------------------------------------------------------------------


def test_warmup_cosine():
    def rate(step, **changes):
        return warmup_cosine(step, **{"peak": 0.4, "total": 50, "warmup": 10, **changes})

    assert [rate(step) for step in (0, 1, 5, 9, 10)] == pytest.approx([0, 0.04, 0.2, 0.36, 0.4])
    third = 0.2 * (1 + math.cos(math.pi / 4))
    assert [rate(step) for step in (20, 30, 50)] == pytest.approx([third, 0.2, 0], abs=1e-12)
    assert [rate(s, final=0.1) for s in (5, 10, 30, 50)] == pytest.approx([0.2, 0.4, 0.25, 0.1])
    assert [rate(s, warmup=0) for s in (0, 25, 50)] == pytest.approx([0.4, 0.2, 0], abs=1e-12)
    rates = [rate(step / 2) for step in range(101)]
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)


def test_warmup_steps():
    def rates(*steps, **changes):
        options = dict(peak=0.4, milestones=[20, 30], warmup=10) | changes
        return [engine.warmup_steps(step, **options) for step in steps]

    assert rates(0, 1, 5, 10, 19) == pytest.approx([0, 0.04, 0.2, 0.4, 0.4])
    assert rates(20, 29, 30, 99) == pytest.approx([0.04, 0.04, 0.004, 0.004])
    assert rates(5, 20, 30, milestones=[5], factor=0.5) == pytest.approx([0.1, 0.2, 0.2])
    assert rates(0, 19.9, warmup=0) == pytest.approx([0.4, 0.4])


def test_ema_momentum():
    values = [ema_momentum(step, base=0.9, total=40) for step in range(41)]
    assert [values[i] for i in (0, 20, 40)] == pytest.approx([0.9, 0.95, 1.0])
    assert values[10] == pytest.approx(1 - 0.05 * (1 + math.cos(math.pi / 4))) and values == sorted(values)
    assert ema_momentum(3, base=1.0, total=40) == 1.0


@pytest.mark.skipif(not os.environ.get("PCAE_PARITY"), reason="PCAE_PARITY does not name a recording")
def test_schedules_of_the_authors():
    schedules = torch.load(os.environ["PCAE_PARITY"], weights_only=True)["schedules"]
    for name in ("pretrain_lr", "finetune_lr"):
        cfg = schedules[name]["cfg"]
        ours = [
            warmup_cosine(e, peak=cfg["lr"], total=cfg["epochs"], warmup=cfg["warmup_epochs"], final=cfg["min_lr"])
            for e in schedules[name]["epochs"]
        ]
        assert ours == pytest.approx(schedules[name]["lr"], rel=1e-9, abs=1e-12)
    cfg, theirs = schedules["momentum"]["cfg"], schedules["momentum"]["values"]
    assert cfg["final"] == 1 and len(theirs) == cfg["epochs"] * cfg["niter"]
    assert [ema_momentum(i, base=cfg["base"], total=len(theirs)) for i in range(len(theirs))] == pytest.approx(theirs)


# --- optimizer groups -------------------------------------------------------------------------------------------------


def small_pcae():
    student = ViT((16, 24), 4, dim=16, depth=2, heads=2)
    return PCAE(student, ptr=PTR((0,), 0.5), decoder_dim=8, decoder_depth=1, decoder_heads=2)


def names_of(model, parameters):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in parameters]


def test_parameter_groups():
    model = small_pcae()
    decaying, free = engine.parameter_groups(model, 0.05)
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    decayed, kept = names_of(model, decaying["params"]), names_of(model, free["params"])
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(decayed + kept) == sorted(trainable), "each exactly once"
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    matrices = [f"student.blocks.{i}.{layer}.weight" for i in range(2) for layer in layers]
    matrices += [f"decoder.blocks.0.{layer}.weight" for layer in layers]
    matrices += ["student.patch_embed.proj.weight", "decoder.embed.weight", "decoder.pred.weight"]
    assert sorted(decayed) == sorted(matrices)
    assert {"student.cls_token", "decoder.mask_token", "student.norm.weight", "decoder.pred.bias"} <= set(kept)
    assert not any("pos_embed" in name or name.startswith("teacher") for name in decayed + kept)


def test_trainable_positions_do_not_decay():
    vit = ViT((16, 24), 4, dim=16, depth=1, heads=2)
    vit.pos_embed.requires_grad_()
    decaying, free = engine.parameter_groups(vit, 0.1)
    assert "pos_embed" in names_of(vit, free["params"]) and "pos_embed" not in names_of(vit, decaying["params"])


def small_classifier(**options):
    return Classifier(ViT((16, 24), 4, dim=16, depth=3, heads=2), 5, **options)


# The rate of each part of a classifier with three blocks, for a layer decay of 1/2.
RATES = {
    "encoder.cls_token": 1 / 16,
    "encoder.pos_embed": 1 / 16,
    "encoder.patch_embed": 1 / 16,
    "encoder.blocks.0": 1 / 8,
    "encoder.blocks.1": 1 / 4,
    "encoder.blocks.2": 1 / 2,
    "encoder.norm": 1,
    "fc_norm": 1,
    "head": 1,
}
DECAYING = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "head.weight")


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_layer_decay(pool):
    model = small_classifier(pool=pool)
    groups = engine.parameter_groups(model, 0.05, layer_decay=0.5)
    found = {}
    for group in groups:
        for name in names_of(model, group["params"]):
            assert name not in found, "each once"
            found[name] = group["lr_scale"], group["weight_decay"]
    assert found == {
        name: (
            next(rate for part, rate in RATES.items() if name == part or name.startswith(part + ".")),
            0.05 if name.endswith(DECAYING) else 0,
        )
        for name, _ in model.named_parameters()
    }
    assert len(groups) == 10, "with and without weight decay for each of five rates"
    top = "fc_norm.weight" if pool == "mean" else "encoder.norm.weight"
    assert found[top] == (1, 0) and found["encoder.pos_embed"] == (1 / 16, 0)


def test_layer_decay_of_a_bare_encoder():
    vit = ViT((16, 24), 4, dim=16, depth=12, heads=2)
    rates = {
        name: group["lr_scale"]
        for group in engine.parameter_groups(vit, 0.05, layer_decay=0.65)
        for name in names_of(vit, group["params"])
    }
    assert "pos_embed" not in rates, "fixed"
    expected = {"cls_token": 0.65**13, "blocks.0.mlp.fc1.bias": 0.65**12, "blocks.10.norm1.weight": 0.65**2}
    expected |= {"blocks.1.attn.qkv.weight": 0.65**11, "blocks.11.mlp.fc2.weight": 0.65, "norm.bias": 1}
    assert {name: rates[name] for name in expected} == pytest.approx(expected)


def test_frozen_parameters_are_in_no_group():
    model = small_classifier(frozen=True)
    groups = engine.parameter_groups(model, 0.1, layer_decay=0.5)
    rates = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    assert rates == [(1, 0.1), (1, 0)]
    assert [names_of(model, group["params"]) for group in groups] == [["head.weight"], ["head.bias"]]
    some = small_classifier()
    some.encoder.blocks[1].requires_grad_(False)  # the blocks keep their numbers
    rates = {
        name: group["lr_scale"]
        for group in engine.parameter_groups(some, 0.1, layer_decay=0.5)
        for name in names_of(some, group["params"])
    }
    assert rates["encoder.blocks.0.norm1.bias"] == 1 / 8 and not any("blocks.1." in name for name in rates)


def test_without_layer_decay_there_are_two_groups():
    model = small_classifier()
    decaying, free = engine.parameter_groups(model, 0.05)
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.05, 0)
    assert decaying["lr_scale"] == free["lr_scale"] == 1
    assert all(name.endswith(DECAYING) for name in names_of(model, decaying["params"]))
    assert len(decaying["params"]) + len(free["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "name, depth, index",
    [
        ("cls_token", 12, 0),
        ("encoder.pos_embed", 12, 0),
        ("module.encoder.patch_embed.proj.weight", 3, 0),
        ("blocks.0.norm1.weight", 12, 1),
        ("encoder.blocks.2.attn.qkv.bias", 3, 3),
        ("blocks.10.mlp.fc1.weight", 12, 11),
        ("student.blocks.31.attn.proj.weight", 32, 32),
        ("norm.weight", 12, 13),
        ("fc_norm.bias", 12, 13),
        ("head.weight", 3, 4),
        ("decoder.mask_token", 3, 4),
    ],
)
def test_layer_index(name, depth, index):
    assert engine.layer_index(name, depth) == index


# --- seeds and precision ----------------------------------------------------------------------------------------------


def test_seeds_are_the_same_in_every_process():
    parts = [(0, "view", 3, 14), ("shapes", "train", 5), (), ("größe 图", -1)]
    code = f"from engine import derive_seed, generator; print([derive_seed(*p) for p in {parts!r}])"
    here = str([derive_seed(*p) for p in parts])
    other = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    assert run_python(code, PYTHONHASHSEED=other, PYTHONIOENCODING="utf-8").strip() == here


def test_seeds_of_distinct_parts_are_distinct():
    parts = [("1", 2), (1, "2"), (1, 2), ("1", "2"), (12,), ("12",), (1, 2, ""), ("1, 2",), (2, 1), (-1, 2), ()]
    parts += [(seed, "view", epoch, index) for seed in range(5) for epoch in range(10) for index in range(40)]
    seeds = {derive_seed(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62, "63 bits: what manual_seed takes"


def test_generator():
    def draw(*parts):
        return torch.rand(4, generator=engine.generator(*parts))

    state = torch.get_rng_state()
    assert torch.equal(draw(1, "a"), draw(1, "a")) and not torch.equal(draw(1, "a"), draw(2, "a"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "precision, dtype", [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_autocast_on_a_cpu(precision, dtype):
    with engine.autocast(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


# --- command line -----------------------------------------------------------------------------------------------------


def parse(*argv):
    parser = engine.flag_parser("")
    parser.add_argument("--recipe", default="plain", choices=["plain", "big"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--resume", nargs="?", const="", default=None)
    parser.add_argument("--dry-run", action="store_true")
    args, given = engine.parse_arguments(parser, {"plain": {}, "big": dict(epochs=300, sizes=[224])}, list(argv))
    return vars(args), given


def test_arguments_are_layered():
    defaults = dict(recipe="plain", epochs=10, rate=0.5, sizes=[8], resume=None, dry_run=False)
    assert parse() == (defaults, {})
    assert parse("--rate", "2") == (defaults | {"rate": 2.0}, {"rate": 2.0})
    big = defaults | dict(recipe="big", epochs=300, sizes=[224])
    assert parse("--recipe", "big") == (big, {"recipe": "big"})
    given = dict(recipe="big", epochs=20, sizes=[4, 6], resume="", dry_run=True)
    assert parse("--recipe", "big", "--epochs=20", "--sizes", "4", "6", "--resume", "--dry-run") == (big | given, given)


def test_a_flag_given_its_default_wins_over_the_recipe():
    args, given = parse("--epochs", "10", "--recipe", "big", "--sizes", "8")
    assert args["epochs"] == 10 and args["sizes"] == [8]
    assert given == dict(recipe="big", epochs=10, sizes=[8])


@pytest.mark.parametrize("given, left", [
    ({}, dict(drop_blocks=[3], drop_ratio=0.2)),
    (dict(drop_ratio=0.1), dict(drop_blocks=[3])),
    (dict(drop_blocks=[1]), dict(drop_ratio=0.2)),
    (dict(drop_stages=2), dict(drop_ratio=0.2)),
    (dict(drop_at="late", epochs=2), dict(drop_ratio=0.2)),
])  # fmt: skip
def test_settings_that_flags_leave_to_a_checkpoint(given, left):
    config = dict(drop_blocks=[3], drop_ratio=0.2, epochs=9)
    names = ("drop_blocks", "drop_stages", "drop_at", "drop_ratio")
    assert engine.settings_left_to(config, names, given) == left


def test_wrong_flags_are_mistakes():
    for argv in (["--recipe", "huge"], ["--epochs", "x"], ["--nope"]):
        with pytest.raises(UserError, match=rf"{argv[0]}.*\(--help shows all flags\)"):
            parse(*argv)


def test_arguments_come_from_the_command_line_by_default(monkeypatch):
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="plain")
    monkeypatch.setattr(sys, "argv", ["script.py", "--recipe", "big"])
    assert engine.parse_arguments(parser, {"big": {}})[1] == {"recipe": "big"}


def test_flags_say_their_default_and_take_its_type():
    parser = engine.flag_parser("What the script does.\n\n    python script.py   as it is")
    group = parser.add_argument_group("things")
    engine.add_flag(group, "--count", 3, "how many")
    engine.add_flag(group, "--rate", 0.0, "how fast")
    engine.add_flag(group, "--name", "x", "what it is called")
    engine.add_flag(group, "--file", None, "where to write", metavar="FILE")
    engine.add_flag(group, "--quiet", False, "say nothing", action="store_true")
    engine.add_flag(group, "--sizes", [8], "how large", type=int, nargs="+")
    engine.add_flag(group, "--scale", 2, "how long", type=float)
    assert {action.option_strings[0]: action.help for action in parser._actions[1:]} == {
        "--count": "how many (default: 3)",
        "--rate": "how fast (default: 0.0)",
        "--name": "what it is called (default: x)",
        "--file": "where to write",
        "--quiet": "say nothing",
        "--sizes": "how large (default: [8])",
        "--scale": "how long (default: 2)",
    }
    text = parser.format_help()
    assert "\n    python script.py   as it is\n" in text and "how many (default: 3)" in text and "things:" in text
    defaults = dict(count=3, rate=0.0, name="x", file=None, quiet=False, sizes=[8], scale=2)
    assert vars(parser.parse_args([])) == defaults
    words = "--count 4 --rate 1 --name 5 --file 6 --quiet --sizes 7 8 --scale 1.5"
    given = dict(count=4, rate=1.0, name="5", file="6", quiet=True, sizes=[7, 8], scale=1.5)
    parsed = vars(parser.parse_args(words.split()))
    assert parsed == given and all(type(parsed[name]) is type(given[name]) for name in given)


@pytest.mark.parametrize("words", ["--count 1.5", "--count x", "--rate x", "--rat 1", "--quie"])
def test_flags_of_the_wrong_type_and_abbreviated_ones(words):
    parser = engine.flag_parser("")
    engine.add_flag(parser, "--count", 3, "how many")
    engine.add_flag(parser, "--rate", 0.5, "how fast")
    engine.add_flag(parser, "--quiet", False, "say nothing", action="store_true")
    with pytest.raises(UserError, match=words.split()[0]):
        parser.parse_args(words.split())


def shared_flags():
    parser = engine.flag_parser("")
    engine.add_run_flags(parser, {"laptop": {}, "large": {}}, "runs/here", "some files")

    def add(*arguments, **options):
        engine.add_flag(parser, *arguments, **options)

    engine.add_ptr_flags(add)
    engine.add_optimisation_flags(add, epochs=7, blr=0.3, warmup_epochs=2)
    return parser


def test_flags_that_all_scripts_share():
    parser = shared_flags()
    assert vars(parser.parse_args([])) == dict(
        recipe="laptop", out="runs/here", resume=None, dry_run=False, device="auto", precision="auto", compile=False,
        seed=0, drop_stages=3, drop_at="start", drop_blocks=None, criterion="similarity", epochs=7, batch_size=64,
        micro_batch=None, blr=0.3, lr=None, warmup_epochs=2, weight_decay=0.05, clip_grad=1.0,
    )  # fmt: skip
    words = "--recipe large --resume --drop-blocks 1 5 --micro-batch 4 --lr 1 --clip-grad 0 --precision bf16"
    args = parser.parse_args(words.split())
    assert (args.recipe, args.resume, args.drop_blocks, args.micro_batch) == ("large", "", [1, 5], 4)
    assert (args.lr, args.clip_grad, args.precision) == (1.0, 0.0, "bf16")
    assert parser.parse_args(["--resume", "a.pt", "--drop-blocks"]).resume == "a.pt"
    assert "some files" in parser.format_help()


VALUES = dict(
    epochs=10, batch_size=8, micro_batch=None, workers=None, seed=0, weight_decay=0.0, clip_grad=0.0, blr=1e-3, lr=None,
    warmup_epochs=0.0, drop_path=0.0, min_crop=None, image_size=None, knn=None, erasing=0.0,
)  # fmt: skip
LARGEST = dict(
    micro_batch=1, workers=0, seed=2**32 - 1, lr=1e9, warmup_epochs=9.9, drop_path=0.99, min_crop=1, image_size=[8, 16],
    knn=1, erasing=1,
)  # fmt: skip


def check(**changes):
    args = argparse.Namespace(**(VALUES | changes))
    engine.check_values(args, dict(knn=1), [("erasing", 0 <= args.erasing <= 1, "in [0, 1]")])


def test_values_that_make_sense():
    check()
    for name, value in LARGEST.items():
        check(**{name: value})
    check(**LARGEST)


@pytest.mark.parametrize(
    "name, value",
    [
        *[(name, 0) for name in ("epochs", "batch_size", "micro_batch", "blr", "lr", "min_crop", "knn")],
        *[(name, -1) for name in ("workers", "seed", "weight_decay", "clip_grad", "blr", "warmup_epochs", "drop_path")],
        *[(name, math.nan) for name in ("weight_decay", "clip_grad", "blr", "lr", "warmup_epochs", "drop_path",
                                        "min_crop", "erasing")],
        *[(name, math.inf) for name in ("blr", "lr", "warmup_epochs", "weight_decay", "clip_grad", "knn")],
        ("seed", 2**32), ("warmup_epochs", 10), ("drop_path", 1), ("min_crop", 1.1), ("image_size", [8, 8, 8]),
        ("erasing", 1.1),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(name, value):
    with pytest.raises(UserError) as error:
        check(**{name: value})
    text = str(error.value)
    assert text.startswith(f"--{name.replace('_', '-')} must be ") and text.endswith(f", got {value}")
    assert "\n" not in text


def test_smallest_values_a_script_gives_win_over_the_shared_ones():
    args = argparse.Namespace(**VALUES)
    engine.check_values(args, dict(epochs=10), [])
    with pytest.raises(UserError, match="--epochs must be 11 or more.*, got 10"):
        engine.check_values(args, dict(epochs=11), [])


# --- nearest neighbours -----------------------------------------------------------------------------------------------


def clusters(per_class=40, classes=5, dim=16, noise=0.3):
    """Features around random centres, and labels: a bank and queries."""
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, dim, generator=random)
    labels = torch.arange(classes).repeat(per_class)
    bank, queries = (centres[labels] + noise * torch.randn(len(labels), dim, generator=random) for _ in range(2))
    return bank, labels, queries, labels.clone()


def test_knn_on_clusters():
    bank, bank_labels, queries, labels = clusters()
    assert knn_accuracy(bank, bank_labels, queries, labels) == 1.0
    assert knn_accuracy(bank, bank_labels, queries, (labels + 1) % 5) == 0.0
    half = torch.where(torch.arange(len(labels)) % 2 == 0, labels, (labels + 1) % 5)
    assert knn_accuracy(bank, bank_labels, queries, half) == pytest.approx(0.5)


def test_knn_on_shuffled_labels_is_chance():
    bank, labels, queries, query_labels = clusters(per_class=200)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    assert 0.1 < knn_accuracy(bank, shuffled, queries, query_labels) < 0.3


def test_knn_ignores_what_all_features_share():
    bank, bank_labels, queries, labels = clusters(noise=1.2)
    plain = knn_accuracy(bank, bank_labels, queries, labels)
    assert 0.5 < plain < 1
    offset = 100 * torch.linspace(-1, 1, bank.shape[1])
    assert knn_accuracy(bank + offset, bank_labels, queries + offset, labels) == plain
    scale = torch.logspace(-2, 2, bank.shape[1])
    assert knn_accuracy(bank * scale, bank_labels, queries * scale, labels) == pytest.approx(plain, abs=0.01)
    constant = torch.ones(len(bank), 3)
    assert knn_accuracy(torch.cat([bank, constant], 1), bank_labels, torch.cat([queries, constant], 1), labels) == plain


def test_knn_votes_by_similarity_among_k():
    directions = torch.tensor([[1.0, 0.1], [-0.2, 1], [-0.2, 1.1], [-1, -1], [-0.9, -1.1]])
    labels = torch.tensor([0, 1, 1, 2, 2])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_accuracy(directions, labels, query, torch.tensor([0]), k=1) == 1.0
    assert knn_accuracy(directions, labels, query, torch.tensor([0]), k=3) == 1.0, "one near beats two far"
    assert knn_accuracy(directions, labels, query, torch.tensor([0]), k=50) == 1.0, "more than there are"


def test_knn_takes_k_into_account():
    bank = torch.cat([torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.02]]).repeat(9, 1), -torch.ones(10, 2)])
    labels = torch.tensor([0] + [1] * 9 + [2] * 10)
    queries, of_label = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    assert knn_accuracy(bank, labels, queries, of_label, k=1) == 0.0
    assert knn_accuracy(bank, labels, queries, of_label, k=10) == 1.0


def test_knn_does_not_depend_on_the_chunks_of_queries():
    bank, bank_labels, queries, labels = clusters(per_class=460, noise=2.0)  # 2300 queries: two chunks and a part
    right = []
    for part in (slice(0, 1), slice(1, 999), slice(999, 1001), slice(1001, 2000), slice(2000, 2300)):
        std, mean = torch.std_mean(bank, dim=0)
        x, y = (nn.functional.normalize((z - mean) / (std + 1e-6), dim=1) for z in (bank, queries[part]))
        similarity, nearest = (y @ x.T).sort(dim=1, descending=True)
        for cosines, ids, label in zip(similarity[:, :20], nearest[:, :20], labels[part], strict=True):
            votes = [(cosines[bank_labels[ids] == c] / 0.07).exp().sum() for c in range(5)]
            right.append(votes.index(max(votes)) == int(label))
    accuracy = sum(right) / 2300
    assert 0.5 < accuracy < 0.95 and abs(sum(right[2000:]) / 300 - accuracy) > 1e-3
    assert knn_accuracy(bank, bank_labels, queries, labels) == pytest.approx(accuracy, abs=1e-9)


def test_linear_classifier_on_clusters():
    bank, bank_labels, queries, labels = clusters()
    assert linear_accuracy(bank, bank_labels, queries, labels) == 1.0
    assert linear_accuracy(bank, bank_labels, queries, (labels + 1) % 5) == 0.0


def test_linear_classifier_on_shuffled_labels_is_chance():
    bank, labels, queries, query_labels = clusters(per_class=200)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    assert linear_accuracy(bank, shuffled, queries, query_labels) < 0.4


def test_linear_classifier_needs_its_bias_and_cannot_bend():
    x = torch.linspace(-1, 1, 300)[:, None]
    thirds = torch.arange(300) // 100  # the middle one of three on a line is no straight line's to tell
    assert linear_accuracy(x, thirds, x, thirds) == pytest.approx(2 / 3, abs=0.02)
    unequal = (torch.arange(300) >= 240).long()  # without a bias the boundary would be at 0: half of all
    assert linear_accuracy(x, unequal, x, unequal) > 0.7


def test_linear_classifier_is_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 6, generator=generator) for n in (40, 300))
    labels, query_labels = (torch.randint(3, (n,), generator=generator) for n in (40, 300))
    x, y = standardise(bank, queries)
    weights = torch.zeros(7, 3, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)
    ones = torch.cat([x, torch.ones(40, 1)], dim=1).double()

    def closure():
        optimizer.zero_grad()
        error = (ones @ weights - torch.nn.functional.one_hot(labels).double()).square().sum()
        loss = error + 5 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    predicted = (torch.cat([y, torch.ones(300, 1)], dim=1).double() @ weights).argmax(dim=1)
    expected = (predicted == query_labels).float().mean().item()
    assert linear_accuracy(bank, labels, queries, query_labels, ridge=5.0) == pytest.approx(expected, abs=1e-6)


# --- predictions and accuracy -----------------------------------------------------------------------------------------


class Numbered(Dataset):
    """Random images of 4 x 4 pixels whose label is their number; some cannot be read."""

    def __init__(self, length, broken=()):
        generator = torch.Generator().manual_seed(length)
        self.images = torch.randint(256, (length, 3, 4, 4), generator=generator).byte()
        self.broken = broken

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.broken:
            raise data.UnreadableImage(f"{index}.png: broken")
        return self.images[index], index


WEIGHTS = torch.randn(48, 5, generator=torch.Generator().manual_seed(0))


def linear(images):
    return images.flatten(1) @ WEIGHTS


def predict(images, batch_size=4, precision="fp32", unreadable=None, rank=0, processes=1, function=linear):
    loader = data.evaluation_loader(data.evaluation_views(images, (4, 4), 3), batch_size, 0, rank, processes)
    return engine.predict(function, loader, data.Normalize(), precision, unreadable or Unreadable())


def test_predictions_are_those_of_a_plain_loop():
    images = Numbered(11)
    weights = WEIGHTS.clone().requires_grad_()
    logits, labels = predict(images, function=lambda x: x.flatten(1) @ weights)
    assert labels.tolist() == list(range(11)) and logits.shape == (11, 5)
    assert logits.dtype == torch.float32 and not logits.requires_grad and logits.device.type == "cpu"
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for logit, image in zip(logits, images.images, strict=True):
        x = (image / 255 - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(logit, x.flatten() @ WEIGHTS, rtol=1e-4, atol=1e-4)


def test_predictions_of_any_shape_do_not_depend_on_the_batches():
    images = Numbered(11)
    whole, parts = (predict(images, batch_size, function=lambda x: x * 2) for batch_size in (11, 3))
    assert whole[0].shape == (11, 3, 4, 4) and identical(list(whole), list(parts))


def test_predictions_in_bf16_come_back_in_float32():
    images = Numbered(11)
    (half, _), (full, _) = predict(images, precision="bf16"), predict(images)
    assert half.dtype == torch.float32 and torch.equal(half, half.bfloat16().float())
    assert 0 < (half - full).abs().max() < 0.03 * full.abs().max()


def test_unreadable_images_are_not_predicted(capsys):
    unreadable, images = Unreadable(), Numbered(11, broken=(0, 6, 10))
    readable = [i for i in range(11) if i not in images.broken]
    for _ in range(2):  # as after each epoch
        logits, labels = predict(images, unreadable=unreadable)
        assert labels.tolist() == readable
        assert torch.equal(logits, linear(data.Normalize()(images.images))[readable])
    assert unreadable.files == {f"{i}.png: broken" for i in images.broken}
    assert capsys.readouterr().out.count("skipped an unreadable image: ") == 3


def test_too_many_unreadable_images_stop_an_evaluation():
    with pytest.raises(UserError, match="unreadable"):
        predict(Numbered(40, broken=range(30)))


def test_topk_accuracy():
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [1, 9, 8, 7, 0, 2], [3, 1, 2, 0, 5, 4]])
    labels = torch.tensor([0, 4, 5, 3])  # first, second, fourth and last
    expected = {1: 0.25, 2: 0.5, 3: 0.5, 4: 0.75, 5: 0.75, 6: 1.0}
    assert {k: engine.topk_accuracy(logits, labels, k) for k in expected} == expected


def test_topk_accuracy_with_fewer_classes():
    logits, labels = torch.tensor([[1.0, 0, 0.5], [0, 2, 1]]), torch.tensor([1, 2])
    assert [engine.topk_accuracy(logits, labels, k) for k in (1, 2, 3, 5)] == [0, 0.5, 1, 1]


def test_class_accuracy():
    predicted, labels = torch.tensor([0, 1, 1, 3, 3, 0, 3]), torch.tensor([0, 0, 1, 3, 3, 3, 3])
    logits = nn.functional.one_hot(predicted, 5).float()
    counts, accuracies = zip(*engine.class_accuracy(logits, labels), strict=True)
    assert counts == (2, 1, 0, 4, 0)
    assert accuracies == pytest.approx((0.5, 1, math.nan, 0.75, math.nan), nan_ok=True)
    total = sum(n * accuracy for n, accuracy in zip(counts, accuracies, strict=True) if n)
    assert total / len(labels) == pytest.approx(engine.topk_accuracy(logits, labels, 1))


def join_two_processes(rank, folder):
    """What this process, number `rank` of two, gets from predicting together with the other one."""
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=1))
    try:
        seen = {
            length: predict(Numbered(length, broken=(4, 5)), batch_size=2, rank=rank, processes=2)
            for length in (11, 12, 1)
        }
        return seen | dict(mean=engine.mean_over_processes(torch.tensor([rank + 1.0, 5.0])).tolist())
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_predict_each_image_once(tmp_path):
    with open(tmp_path / "output.txt", "w") as output:
        other = subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)], env=ENVIRONMENT, stdout=output, stderr=output
        )  # fmt: skip
        try:
            ours = join_two_processes(0, tmp_path)
            assert other.wait(60) == 0
        except Exception:
            pytest.fail(traceback.format_exc() + (tmp_path / "output.txt").read_text())
        finally:
            other.kill()
    theirs = torch.load(tmp_path / "seen.pt")
    for length in (11, 12, 1):
        assert theirs[length] is None, "the first process alone gets the result"
        logits, labels = ours[length]
        order = labels.argsort()
        expected = predict(Numbered(length, broken=(4, 5)), batch_size=2)
        torch.testing.assert_close((logits[order], labels[order]), expected)
        assert len(labels) == max(1, length - 2)
    assert ours["mean"] == theirs["mean"] == [1.5, 5.0]


# --- work and speed ---------------------------------------------------------------------------------------------------


def test_macs_of_layers():
    image = torch.zeros(1, 3, 12, 20)
    layers = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4, bias=False), nn.Flatten(), nn.Linear(8 * 3 * 5, 7))
    assert engine.count_macs(layers, image) == 3 * 5 * 8 * (3 * 4 * 4) + 8 * 3 * 5 * 7
    assert engine.count_macs(nn.Sequential(nn.LayerNorm(20), nn.GELU()), image) == 0


@pytest.mark.parametrize("drop", [PTR(), PTR((0, 2), 0.4), PTR((1,), 0.5, "random")], ids=str)
def test_macs_of_a_classifier(drop):
    dim, depth, classes = 16, 3, 5
    model = small_classifier(ptr=drop).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    macs = 24 * dim * 3 * 4 * 4 + dim * classes
    for tokens in token_counts(24, depth, drop)[:-1]:
        n = tokens + 1
        macs += n * 12 * dim**2 + 2 * n**2 * dim  # q, k, v, projection, MLP; attention's two products
    assert engine.count_macs(model, torch.zeros(1, 3, 16, 24)) == macs
    assert model.training and model.head.weight.device.type == "cpu" and identical(model.state_dict(), state)


def test_macs_of_vit_base():
    image = torch.zeros(1, 3, 224, 224)
    with torch.device("meta"):
        model = Classifier(ViT(), 1000)
    assert 17.56e9 < engine.count_macs(model, image) < 17.58e9
    # Drop ratio: ours after blocks 1 and 5 and the poster's, in 10^9.
    table = {0.1: (15.21, 15.34), 0.2: (13.07, 13.19), 0.3: (11.21, 11.29), 0.4: (9.51, 9.53)}
    for ratio, (ours, poster) in table.items():
        model.ptr = PTR((1, 5), ratio)
        macs = engine.count_macs(model, image) / 1e9
        assert macs == pytest.approx(ours, abs=0.01) and macs == pytest.approx(poster, rel=0.01)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless one adds to its list of seconds."""
    seconds = []
    monkeypatch.setattr(engine.time, "perf_counter", lambda: sum(seconds))
    return seconds


def test_speed_is_measured_by_turns(clock):
    calls = []

    def taking(name, *times):
        times = iter(times)

        def function():
            calls.append((name, torch.is_grad_enabled()))
            clock.append(next(times))

        return function

    fast = taking("fast", 100, 5, 2, 1, 4, 50, 3, 6)  # the first one warms up, the median of the others is 4
    slow = taking("slow", 0.1, 9, 8, 8, 70, 8, 1, 2)
    assert engine.images_per_second([fast, slow], 12, torch.device("cpu")) == [12 / 4, 12 / 8]
    assert calls == [("fast", False), ("slow", False)] * 8


def test_slower_functions_are_slower():
    numbers = torch.randn(2, 400, 400)
    once, often = (lambda: numbers @ numbers), (lambda: [numbers @ numbers for _ in range(10)])
    fast, slow = engine.images_per_second([once, often], 2, torch.device("cpu"))
    assert fast > 2 * slow > 0


# --- the loop ---------------------------------------------------------------------------------------------------------

SETTINGS = dict(
    epochs=4, batch_size=4, lr=0.5, blr=0.1, warmup_epochs=1, clip_grad=0.0, compile=False, seed=0, dry_run=False,
    resume=None,
)  # fmt: skip


class Tiny(engine.Trainer):
    """Tells twelve images of 4 x 4 pixels apart; all but the last layer learn a quarter as fast."""

    def __init__(self, args, accumulate, images):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.Linear(6, 12))
        groups = [
            dict(params=list(model[3].parameters()), lr_scale=1.0),
            dict(params=[*model[1].parameters(), *model[2].parameters()], lr_scale=0.25),
        ]
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.5)
        views = data.Views(images, data.CenterView((4, 4)))
        loader = data.training_loader(views, args.batch_size // accumulate, workers=0)
        world = World(0, 1, torch.device("cpu"))
        super().__init__(args, model, dict(model=model), optimizer, loader, accumulate, world)
        self.gradients = []

    def loss(self, images, labels):
        return nn.functional.cross_entropy(self.runner(data.Normalize()(images)), labels), torch.tensor([len(images)])

    def example(self):
        return torch.randint(256, (4, 3, 4, 4)).byte(), torch.arange(4)

    def metrics(self, statistics):
        return dict(size=statistics[0])

    def after_step(self, settings):
        self.gradients.append([[p.grad.clone() for p in group["params"]] for group in self.optimizer.param_groups])


def tiny(accumulate=1, broken=(), **changes):
    return Tiny(argparse.Namespace(**(SETTINGS | changes)), accumulate, Numbered(12, broken))


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def batches_of(trainer):
    trainer.loader.sampler.set_epoch(0)
    return iter(trainer.loader)


def norm(gradients):
    return torch.cat([gradient.flatten() for group in gradients for gradient in group]).norm().item()


def test_group_rates_are_the_schedule_times_their_scale():
    trainer = tiny()
    for epoch in range(4):
        trainer.loader.sampler.set_epoch(epoch)
        batches = iter(trainer.loader)
        for step in range(3 * epoch, 3 * epoch + 3):
            trainer.train_step(batches)
            t = (step - 3) / 9
            rate = 0.5 * step / 3 if step < 3 else 0.25 * (1 + math.cos(math.pi * t))
            assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([rate, rate / 4])


def test_each_group_moves_at_its_rate():
    trainer = tiny()
    batches = batches_of(trainer)
    trainer.train_step(batches)  # at a rate of 0: momentum holds this gradient, the weights have not moved
    groups = [[p.detach().clone() for p in group["params"]] for group in trainer.optimizer.param_groups]
    trainer.train_step(batches)
    for i, rate in enumerate((0.5 / 3, 0.5 / 12)):
        parameters = trainer.optimizer.param_groups[i]["params"]
        pairs = zip(parameters, groups[i], trainer.gradients[0][i], trainer.gradients[1][i], strict=True)
        for now, before, first, second in pairs:
            torch.testing.assert_close(now.detach(), before - rate * (0.5 * first + second))


def test_gradients_are_clipped_to_a_norm_but_not_to_0():
    norms = {}
    for clip in (0.0, 0.01, 1e6):
        trainer = tiny(clip_grad=clip)
        logged = trainer.train_step(batches_of(trainer))["grad_norm"]
        norms[clip] = logged, norm(trainer.gradients[0])
    assert norms[0.0][0] > 0.5 and norms[0.0] == norms[1e6]
    assert norms[0.0][1] == pytest.approx(norms[0.0][0]), "as they were"
    assert norms[0.01] == pytest.approx((norms[0.0][0], 0.01), rel=1e-3)


def test_peak_rate():
    assert tiny(lr=None, blr=0.4, batch_size=6).peak_lr == pytest.approx(0.4 * 6 / 256)
    assert tiny(lr=0.3).peak_lr == 0.3


def test_steps_of_an_epoch():
    assert [tiny(batch_size=n).steps_per_epoch for n in (4, 5, 12)] == [3, 2, 1]
    assert tiny(accumulate=2).steps_per_epoch == 3 and tiny(accumulate=2).total_steps == 12
    with pytest.raises(UserError, match="--batch-size 13 is more than the 12 images"):
        tiny(batch_size=13)


def test_an_epoch_in_numbers(clock):
    trainer = tiny(broken=[5])
    rows = []
    honest = trainer.train_step

    def step(batches):
        clock.append(2.0)
        rows.append(honest(batches))
        return rows[-1]

    trainer.train_step = step
    trainer.model.eval()
    row = trainer.train_epoch(1, 3)
    assert trainer.model.training and trainer.step == 3
    assert [(r["size"], list(r)) for r in rows] == [(4.0, ["loss", "size", "grad_norm"])] * 3
    loss, grad_norm = (sum(r[name] for r in rows) / 3 for name in ("loss", "grad_norm"))
    assert row == dict(
        epoch=2, step=3, loss=pytest.approx(loss), lr=pytest.approx(1 / 3), size=4.0,
        grad_norm=pytest.approx(grad_norm), skipped=0, images_per_second=2.0, data_wait=0.0,
    )  # fmt: skip
    assert trainer.unreadable.files == {"5.png: broken"}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_timing_the_steps_leaves_the_run_alone(monkeypatch, clock, accumulate):
    trainer = tiny(accumulate)
    before, buffers = weights_of(trainer), dict(trainer.model.named_buffers())
    optimizer = copy.deepcopy(trainer.optimizer.state_dict())
    times = iter([100, 50, 1, 2, 3])  # the first two are slow
    wrap(monkeypatch, Tiny, "loss", before=lambda *_: clock.append(next(times)))
    assert trainer.seconds_per_step() == pytest.approx(2 * accumulate)
    assert next(times, None) is None, "five passes"
    assert identical(weights_of(trainer), before) and identical(trainer.optimizer.state_dict(), optimizer)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert (trainer.step, trainer.gradients) == (0, [])
    assert dict(trainer.model.named_buffers()) == buffers, "the same tensors: DDP and compiled models hold on to them"
    trainer.model(torch.randn(4, 48))
    assert not identical(weights_of(trainer), before), "BatchNorm moves in a step"


def test_a_run_is_the_same_whether_it_is_timed_or_not():
    plain, timed = tiny(), tiny()
    timed.describe_steps()
    for trainer in (plain, timed):
        trainer.train_epoch(0, 3)
    assert identical(weights_of(plain), weights_of(timed))


def fit(out, trainer, scores, best="top1", resume=False, stop=None, images=12):
    """Train with scripted scores; returns the history, the calls of `score`, and the weights at each.

    `stop`: interrupted when that epoch is to be scored.
    """
    calls, weights = [], []
    trainer.args.out = str(out)
    trainer.args.resume = "" if resume else None

    def score(epoch, is_last):
        if epoch == stop:
            raise KeyboardInterrupt
        calls.append((epoch, is_last))
        weights.append(weights_of(trainer))
        return dict(top1=scores[epoch - 1]) if epoch else {}

    history = engine.fit(
        trainer,
        run=dict(method="tiny", config=dict(SETTINGS), num_images=images),
        checkpoint=load_checkpoint(out / "last.pt") if resume else None,
        announce=lambda: "here we go",
        score=score,
        describe=lambda row: f"epoch {row['epoch']}: {row.get('top1')}",
        best=best,
    )
    return history, calls, weights


@pytest.mark.parametrize(
    "scores, best", [([0.1, 0.4, 0.2, 0.3], 2), ([0.3, 0.5, 0.5, 0.4], 3), ([0.9, 0.5, 0.5, 0.4], 1), ([0, 0, 0, 0], 4)]
)
def test_best_checkpoint(tmp_path, capsys, scores, best):
    history, calls, weights = fit(tmp_path / "run", tiny(), scores)
    assert calls == [(0, False), (1, False), (2, False), (3, False), (4, True)]
    assert [row["top1"] for row in history] == scores and history == log(tmp_path / "run")
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["here we go", *(f"epoch {i + 1}: {value}" for i, value in enumerate(scores))]
    assert sorted(os.listdir(tmp_path / "run")) == ["args.json", "best.pt", "last.pt", "metrics.jsonl"]
    top, last = (load_checkpoint(tmp_path / "run" / name) for name in ("best.pt", "last.pt"))
    assert (top["epoch"], top["step"]) == (best, 3 * best) and identical(top["model"], weights[best])
    assert (last["epoch"], last["step"]) == (4, 12) and identical(last["model"], weights[4])
    assert top.keys() == last.keys() - {"optimizer"} and last["optimizer"]["state"]
    assert top["history"] == history[:best] and top["method"] == "tiny" and top["num_images"] == 12
    assert all(later["epoch"] > 0 for later in history), "nothing was scored at the start, so nothing is logged"


def test_no_best_checkpoint_unless_asked_for(tmp_path):
    fit(tmp_path, tiny(), [0.1, 0.2, 0.3, 0.4], best=None)
    assert sorted(os.listdir(tmp_path)) == ["args.json", "last.pt", "metrics.jsonl"]


@pytest.mark.parametrize(
    "scores, best", [([0.5, 0.4, 0.3, 0.45], 1), ([0.4, 0.5, 0.3, 0.5], 4), ([0.1, 0.2, 0.3, 0.0], 3)]
)
def test_best_checkpoint_of_a_resumed_run(tmp_path, scores, best):
    whole = fit(tmp_path / "whole", tiny(), scores)[0]
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", tiny(), scores, stop=3)
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["epoch"] == 2
    assert load_checkpoint(tmp_path / "parts" / "best.pt")["epoch"] == (1 if scores[0] > scores[1] else 2)
    history, calls, _ = fit(tmp_path / "parts", tiny(), scores, resume=True)
    assert calls == [(3, False), (4, True)] and [row["loss"] for row in history] == [row["loss"] for row in whole]
    for name in ("best.pt", "last.pt"):
        ours, theirs = (load_checkpoint(tmp_path / run / name) for run in ("parts", "whole"))
        assert ours["epoch"] == theirs["epoch"] == (best if name == "best.pt" else 4)
        assert identical(ours["model"], theirs["model"]) and [t.shape for t in tensors(ours)]
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 5}\n')  # as if it had been interrupted between the log and the checkpoint
    again = fit(tmp_path / "parts", tiny(), scores, resume=True)
    assert again[0] == history == log(tmp_path / "parts")
    assert again[1] == [], "a finished run has nothing left to do"


def test_scores_at_the_start_are_logged(tmp_path):
    trainer = tiny(epochs=2)
    trainer.args.out = str(tmp_path)
    options = dict(announce=str, score=lambda epoch, _: dict(knn=epoch / 10), describe=str)
    history = engine.fit(trainer, dict(num_images=12), None, **options)
    assert history[0] == dict(epoch=0, step=0, knn=0.0) and [row["knn"] for row in history] == [0, 0.1, 0.2]


def test_a_run_on_other_data_is_not_continued(tmp_path):
    fit(tmp_path, tiny(), [0.1, 0.2, 0.3, 0.4])
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(UserError, match="--data has 13 images here, 12 in the run to resume"):
        fit(tmp_path, tiny(), [], resume=True, images=13)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_dry_run_takes_two_steps_and_leaves_nothing(tmp_path):
    trainer = tiny(dry_run=True)
    history, calls, _ = fit(tmp_path / "run", trainer, [0.5])
    assert trainer.step == 2 and calls == [(0, False), (1, True)] and len(history) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "batch_size, micro_batch, processes, expected",
    [
        (64, None, 1, (64, 1)),
        (64, 16, 1, (16, 4)),
        (64, None, 4, (16, 1)),
        (64, 8, 4, (8, 2)),
        (64, 100, 4, (16, 1)),
        (64, 5, 1, "--micro-batch 5 .* 64 images"),
        (64, 5, 4, "--micro-batch 5 .* 16 images"),
        (66, None, 4, "--batch-size 66 .* 4 processes"),
    ],
)
def test_batch_sizes(batch_size, micro_batch, processes, expected):
    args = argparse.Namespace(batch_size=batch_size, micro_batch=micro_batch)
    world = World(0, processes, torch.device("cpu"))
    if isinstance(expected, tuple):
        assert engine.batch_sizes(args, world) == expected
    else:
        with pytest.raises(UserError, match=expected):
            engine.batch_sizes(args, world)


def test_unreadable_images_are_named_once(capsys):
    unreadable = Unreadable()
    for _ in range(3):
        unreadable.count(100, ["a.png: broken", "b.png: cut"])
    unreadable.count(100, ["a.png: broken", "c.png: empty"])
    assert unreadable.files == {"a.png: broken", "b.png: cut", "c.png: empty"}
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"skipped an unreadable image: {x}" for x in ("a.png: broken", "b.png: cut", "c.png: empty")]


def test_nine_unreadable_images_of_a_few_are_too_many():
    unreadable = Unreadable()
    unreadable.count(1, ["a.png: broken"] * 8)
    with pytest.raises(UserError, match="^--data: 9 of .* images are unreadable, such as b.png: cut$"):
        unreadable.count(1, ["b.png: cut"])


# --- writing files ----------------------------------------------------------------------------------------------------


class Unusual(Exception):
    pass


@pytest.mark.parametrize(
    "failure",
    [
        OSError(28, "No space left on device"),
        RuntimeError("unexpected pos 64 vs 0\nmore"),
        OSError(),
    ],
)
def test_a_failed_write_leaves_the_old_file(tmp_path, failure):
    def write(file):
        file.write(b"half of it")
        raise failure

    path = tmp_path / "last.pt"
    for before in ([], ["last.pt"]):
        with pytest.raises(UserError) as error:
            engine.replace_file(path, write)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        assert os.listdir(tmp_path) == before
        path.write_bytes(b"old")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, TypeError, Unusual])
def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, failure):
    def write(file):
        file.write(b"half of it")
        raise failure

    (tmp_path / "last.pt").write_bytes(b"old")
    with pytest.raises(failure):
        engine.replace_file(tmp_path / "last.pt", write)
    assert (tmp_path / "last.pt").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.pt"]


def test_replace_file_flushes_before_it_renames(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    (tmp_path / "a").write_bytes(b"a much longer old content")
    engine.replace_file(tmp_path / "a", lambda file: file.write(b"new"))
    assert calls == ["fsync", "replace"] and (tmp_path / "a").read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    engine.replace_file(path, write)
    assert path.read_bytes() == b"new"


def test_a_full_disk(tmp_path):
    pytest.importorskip("resource")  # not on Windows
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 7, "weights": torch.arange(5)})
    code = (
        "import resource, sys, torch, engine\n"
        "from pathlib import Path\n"
        "path = Path(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "for write in (lambda: engine.save_checkpoint(path, {'weights': torch.zeros(100000)}),\n"
        "              lambda: engine.write_log(path, [{'x': 'y' * 50000}])):\n"
        "    try:\n"
        "        write()\n"
        "    except engine.UserError as error:\n"
        "        print(error)\n"
    )
    lines = run_python(code, path).splitlines()
    assert len(lines) == 2 and all(str(path) in line for line in lines)
    assert os.listdir(tmp_path) == ["last.pt"]
    content = load_checkpoint(path)
    assert content["step"] == 7 and torch.equal(content["weights"], torch.arange(5))


def test_a_missing_folder_cannot_be_written_to(tmp_path):
    path = tmp_path / "missing" / "last.pt"
    with pytest.raises(UserError, match="cannot write") as error:
        save_checkpoint(path, {"step": 1})
    assert str(path) in str(error.value)


def test_a_file_in_place_of_the_folder_cannot_be_written_to(tmp_path):
    (tmp_path / "runs").write_text("a file")
    path = tmp_path / "runs" / "last.pt"
    with pytest.raises(UserError, match="cannot write") as error:
        save_checkpoint(path, {"step": 1})
    assert str(path) in str(error.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="no permission stops root")
def test_a_folder_without_permission_cannot_be_written_to(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot write"):
            save_checkpoint(tmp_path / "last.pt", {"step": 2})
    finally:
        tmp_path.chmod(0o700)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_log(tmp_path):
    rows = [dict(epoch=1, loss=0.9, knn=0.5), dict(epoch=2, loss=None, text="größe\nline")]
    for n in (1, 2):
        engine.write_log(tmp_path / "metrics.jsonl", rows[:n])
        lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
        assert lines.pop() == "" and [json.loads(line) for line in lines] == rows[:n]


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


# --- reading checkpoints ----------------------------------------------------------------------------------------------


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for item, other in zip(a, b, strict=True):
            assert_same(item, other)
    else:
        assert a == b


def test_checkpoints_come_back_as_they_were(tmp_path):
    model = small_pcae()
    optimizer = torch.optim.AdamW(engine.parameter_groups(model, 0.05), lr=1e-3)
    model(torch.randn(2, 3, 16, 24)).loss.backward()
    optimizer.step()
    content = dict(
        method="pcae", shape=(16, 24), model=model.state_dict(), optimizer=optimizer.state_dict(), step=3,
        config=dict(image_size=[16, 24], rate=0.1, resume=None, flag=True), history=[dict(epoch=1, loss=None)],
    )  # fmt: skip
    save_checkpoint(tmp_path / "last.pt", content)
    assert_same(load_checkpoint(tmp_path / "last.pt"), content)
    assert os.listdir(tmp_path) == ["last.pt"]


def refused(path):
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_missing_checkpoints(tmp_path):
    assert "no checkpoint" in refused(tmp_path / "missing.pt")
    refused(tmp_path)


class Code:
    """Unpickling it creates the file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def checkpoint_bytes(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zip_bytes(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


GOOD = checkpoint_bytes({"weights": torch.arange(2000.0), "step": 3})
LEGACY = checkpoint_bytes({"weights": torch.arange(2000.0)}, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(bytes(range(256)), id="random bytes"),
        pytest.param(b"\x80\x02" + bytes(range(100, 200)), id="random bytes after a pickle's first"),
        pytest.param(b"<!doctype html>\n<title>404</title>\n", id="a web page"),
        pytest.param(b"hello world\n", id="text"),
        pytest.param(b'{"step": 3}\n', id="JSON"),
        pytest.param(GOOD[:50], id="first bytes"),
        pytest.param(GOOD[: len(GOOD) // 2], id="first half"),
        pytest.param(GOOD[:-10], id="without its end"),
        pytest.param(LEGACY[: len(LEGACY) // 2], id="first half of an old format"),
        pytest.param(pickle.dumps({"step": 3}), id="a plain pickle"),
        pytest.param(zip_bytes(a="text"), id="a zip"),
        pytest.param(zip_bytes(**{"archive/data.pkl": b"x", "archive/version": b"3"}), id="a zip of the right names"),
        pytest.param(b"PK\x03\x04", id="first bytes of a zip"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x80\x02.", id="an empty stack"),  # IndexError in torch's unpickler
        pytest.param(b"\x80\x02G?", id="a cut number"),  # struct.error
    ],
)
def test_damage_that_only_the_unpickler_notices(tmp_path, content):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], 5, "text"], ids=lambda content: type(content).__name__)
def test_a_checkpoint_is_a_dict(tmp_path, content):
    torch.save(content, tmp_path / "last.pt")
    assert type(content).__name__ in refused(tmp_path / "last.pt")


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, how):
    canary, path = tmp_path / "canary", tmp_path / "last.pt"
    content = {"step": 3, "evil": Code(canary)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        path.write_bytes(checkpoint_bytes(content, _use_new_zipfile_serialization=how == "torch"))
    assert not canary.exists()
    refused(path)
    assert not canary.exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert canary.exists(), "the canary works"


def test_settings_in_a_namespace_are_let_in_but_no_code_in_them(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "public.pth"
    settings = argparse.Namespace(lr=1e-3, betas=[0.9, 0.95], resume=None)
    torch.save({"model": {"head.bias": torch.arange(3.0)}, "args": settings}, path)
    content = load_checkpoint(path)
    assert content["args"] == settings and content["model"]["head.bias"].tolist() == [0, 1, 2]
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # let in for that one file
    torch.save({"args": argparse.Namespace(evil=Code(canary))}, path)
    refused(path)
    assert not canary.exists()


# By the names in the format, each with a value that the type holds exactly.
NUMBERS = {"F64": torch.tensor([[0.1, -2.0]], dtype=torch.double), "F32": torch.tensor([[[0.1], [3.0]]]),
           "F16": torch.tensor(-0.5).half(), "BF16": torch.tensor([1.5, 3e38, 2.0]).bfloat16()}  # fmt: skip


def safetensors(tensors, **header):
    """A file of the format: length of the header (8 bytes, little-endian), JSON, raw numbers."""
    body = b""
    for dtype, tensor in tensors.items():
        raw = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        offsets = [len(body), len(body) + len(raw)]
        header |= {f"blocks.{dtype}": dict(dtype=dtype, shape=list(tensor.shape), data_offsets=offsets)}
        body += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def test_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    for header in ({}, {"__metadata__": {"format": "pt"}}):
        path.write_bytes(safetensors(NUMBERS, **header))
        content = load_checkpoint(path)
        assert content.keys() == {f"blocks.{dtype}" for dtype in NUMBERS}
        for dtype, tensor in NUMBERS.items():
            assert identical(content[f"blocks.{dtype}"], tensor)
    content["blocks.F32"].add_(1)  # each can be written to, and alone
    assert identical(content["blocks.F64"], NUMBERS["F64"])


@pytest.mark.parametrize("length", [0, 5, 8, 60, -1])
def test_damaged_safetensors(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(NUMBERS)[:length])
    assert "damaged" in refused(path)
    path.write_bytes(GOOD)  # a checkpoint of torch by that name
    refused(path)


# --- settings of a resumed run ----------------------------------------------------------------------------------------


SAVED = dict(
    method="tiny", config=dict(epochs=30, rate=0.2, out="elsewhere", workers=4, sizes=[8]), history=[], num_images=12,
    epoch=3, optimizer={},
)  # fmt: skip
ENDLESS: list = [8]
for _ in range(40):  # 2^40 numbers when written out, a few bytes in a file
    ENDLESS = [ENDLESS, ENDLESS]
COMMAND = dict(epochs=10, rate=0.5, out="runs/tiny", workers=0, sizes=[16], resume=None, new=1)


def resume(*words, **given):
    """What `engine.resume_settings` makes of the defaults above and the flags given."""
    parser = engine.flag_parser("")
    for name, default in COMMAND.items():
        engine.add_flag(parser, f"--{name}", default, "", **dict(type=int, nargs="+") if name == "sizes" else {})
    args = argparse.Namespace(**(COMMAND | given))
    return args, *engine.resume_settings(parser, args, given, ("tiny",))


def saved_run(folder, **changes):
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder / "last.pt", {name: value for name, value in (SAVED | changes).items() if value is not None})
    return folder


def test_without_resume_the_settings_stay(tmp_path):
    before, after, checkpoint = resume(out=str(saved_run(tmp_path)), epochs=5)
    assert after is before and checkpoint is None


def test_a_resumed_run_has_the_settings_of_its_checkpoint(tmp_path):
    run = str(saved_run(tmp_path / "run"))
    for given in (dict(out=run, resume=""), dict(resume=os.path.join(run, "last.pt"))):
        _, args, checkpoint = resume(**given)
        assert checkpoint["epoch"] == 3 and args.resume == given["resume"]
        expected = dict(epochs=30, rate=0.2, out=run, workers=4, sizes=[8], new=1)
        assert {name: value for name, value in vars(args).items() if name != "resume"} == expected


def test_flags_given_to_a_resumed_run(tmp_path):
    file, other = str(saved_run(tmp_path / "run") / "last.pt"), str(tmp_path / "other")
    _, args, _ = resume(resume=file, out=other, workers=2, epochs=30)
    assert (args.out, args.workers, args.epochs, args.rate) == (other, 2, 30, 0.2)
    with pytest.raises(UserError, match="--epochs 30 there, 10 here") as error:
        resume(resume=file, epochs=10, sizes=[8])
    assert file in str(error.value) and "--sizes" not in str(error.value)


@pytest.mark.parametrize("name", engine.FREE)
def test_flags_that_change_no_result_are_free(tmp_path, name):
    given = dict(out=str(saved_run(tmp_path)), resume="") | ({name: "new"} if name not in ("out", "resume") else {})
    assert getattr(resume(**given)[1], name) == given[name]


@pytest.mark.parametrize("name, value", [
    ("epochs", "x"), ("epochs", 1.5), ("epochs", None), ("epochs", True), ("epochs", [3]), ("epochs", 10**30),
    ("rate", "fast"), ("rate", math.nan), ("rate", torch.ones(2)), ("rate", "0.2"), ("sizes", 8),
    ("sizes", ["8", "--epochs", "3"]), ("sizes", [torch.tensor(8)]), ("sizes", []), ("out", torch.tensor(3)),
    ("out", 7), ("workers", {}), ("sizes", [8, "-h"]), ("sizes", ENDLESS),
], ids=lambda value: value if isinstance(value, str) else type(value).__name__)  # fmt: skip
def test_settings_that_no_flag_can_say(tmp_path, name, value):
    run = saved_run(tmp_path, config=SAVED["config"] | {name: value})
    with pytest.raises(UserError, match="that no run can have had: .*(sizes|epochs|rate|out|workers)") as error:
        resume(out=str(run), resume="")
    assert str(run / "last.pt") in str(error.value) and len(str(error.value)) < 400


def test_settings_of_another_age(tmp_path):
    """Flags that are no more are forgotten, new ones have their defaults, numbers may be whole."""
    run = saved_run(tmp_path, config=dict(epochs=30, rate=1, gone="x", resume="other.pt"))
    _, args, _ = resume(out=str(run), resume="")
    assert (args.epochs, args.rate, args.new, args.resume) == (30, 1, 1, "") and "gone" not in vars(args)


@pytest.mark.parametrize("changes", [dict(method="other")] + [{name: None} for name in SAVED], ids=str)
def test_checkpoints_that_cannot_be_continued(tmp_path, changes):
    run = saved_run(tmp_path, **changes)
    with pytest.raises(UserError, match="cannot|can be continued") as error:
        resume(out=str(run), resume="")
    assert str(run / "last.pt") in str(error.value) and "tiny" in str(error.value)


@pytest.mark.parametrize("history", [[1], [dict(loss="x")], [dict(loss=[1])], [dict(epoch=1), None]])
def test_a_log_that_no_run_can_have_written(tmp_path, history):
    with pytest.raises(UserError, match="last.pt holds a log that no run can have written"):
        resume(out=str(saved_run(tmp_path, history=history)), resume="")


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint .*last.pt"):
        resume(out=str(tmp_path), resume="")
    with pytest.raises(UserError, match="there is no checkpoint .*other.pt"):
        resume(out=str(saved_run(tmp_path)), resume=str(tmp_path / "other.pt"))


def test_check_settings_names_each_difference():
    saved = dict(epochs=10, mask_ratio=0.75, model="vit_mini", drop_blocks=None, image_size=[32])
    path = Path("runs/last.pt")
    engine.check_settings(saved, {}, path)
    engine.check_settings(saved, dict(epochs=10, image_size=[32], drop_blocks=None), path)
    wanted = dict(epochs=20, model="vit_mini", mask_ratio=0.5, drop_blocks=[0, 1], new_flag=3)
    with pytest.raises(UserError) as error:
        engine.check_settings(saved, wanted, path)
    message = str(error.value)
    for part in (str(path), "--epochs 10", "20", "--mask-ratio 0.75", "0.5", "--drop-blocks None", "[0, 1]",
                 "--new-flag"):  # fmt: skip
        assert part in message
    assert "--model" not in message and "--image-size" not in message and "\n" not in message


@pytest.mark.parametrize(
    "seconds, words",
    [(0.2, "0 seconds"), (42.4, "42 seconds"), (89, "89 seconds"), (90, "2 minutes"), (300, "5 minutes"),
     (5399, "90 minutes"), (6120, "1.7 hours"), (360000, "100.0 hours")],
)  # fmt: skip
def test_durations_in_words(seconds, words):
    assert engine.duration(seconds) == words


# --- the other one of two processes -----------------------------------------------------------------------------------

if __name__ == "__main__":
    torch.save(join_two_processes(1, Path(sys.argv[1])), Path(sys.argv[1]) / "seen.pt")


def test_unreadable_images_are_counted_once_and_all_of_them_are_an_error():
    """What stands for an unreadable image, with label -1, was not read."""
    batch = torch.zeros(4, 3, 2, 2).byte(), torch.tensor([1, -1, 2, -1]), ["a.png: broken", "b.png: broken"]
    unreadable = Unreadable()
    outputs, labels = engine.predict(lambda x: x.flatten(1), [batch], data.Normalize(), "fp32", unreadable)
    assert labels.tolist() == [1, 2] and len(outputs) == 2
    assert (unreadable.seen, unreadable.failures) == (4, 2)
    nothing = torch.zeros(1, 3, 2, 2).byte(), torch.tensor([-1]), ["a.png: broken"]
    with pytest.raises(UserError, match="--data: not one of the images to score can be read"):
        engine.predict(lambda x: x.flatten(1), [nothing], data.Normalize(), "fp32", Unreadable())
