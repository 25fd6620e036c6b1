"""What a run needs around the method: schedules, optimizer groups, seeds, command line, scores, files."""

import argparse
import io
import json
import math
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import engine
from engine import (
    UserError,
    derive_seed,
    ema_momentum,
    knn_accuracy,
    linear_accuracy,
    load_checkpoint,
    save_checkpoint,
    standardise,
    warmup_cosine,
)
from model import PCAE, ViT
from ptr import PTR

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
    parser = argparse.ArgumentParser()
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


def test_wrong_flags_end_with_code_2(capsys):
    for argv in (["--recipe", "huge"], ["--epochs", "x"], ["--nope"]):
        with pytest.raises(SystemExit) as end:
            parse(*argv)
        assert end.value.code == 2
    capsys.readouterr()


def test_arguments_come_from_the_command_line_by_default(monkeypatch):
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="plain")
    monkeypatch.setattr(sys, "argv", ["script.py", "--recipe", "big"])
    assert engine.parse_arguments(parser, {"big": {}})[1] == {"recipe": "big"}


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


# --- settings of a resumed run ----------------------------------------------------------------------------------------


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
