"""The study: its commands are what the scripts take, its costs what arithmetic says, its tables what runs left."""

import json
import re
import shlex
import subprocess

import pytest

import data
import finetune
import pretrain
import study
from engine import UserError
from helpers import assert_same_run, interrupt
from ptr import PTR, drop_blocks, token_counts

EVERYTHING = study.needed(study.TABLES, None)
TINY = "--limit 40 --batch-size 20 --image-size 16 --dim 16 --depth 2"


def fabricate(out, name, seed=0, epoch=None, settings=(), **scores):
    """A run folder as the scripts leave it: finished, or at an earlier epoch."""
    folder = out / name / f"seed-{seed}"
    folder.mkdir(parents=True)
    words = study.command(name, seed, out, [])
    script = study.SCRIPTS[words[0]]
    args = vars(script.arguments().parse_args(words[1:])) | dict(settings)
    (folder / "args.json").write_text(json.dumps(args))
    rows = [dict(epoch=0, step=0, knn=0.99), dict(epoch=epoch or args["epochs"]) | scores]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def table_of(title):
    return next(table for table in study.TABLES if table.title == title)


def cells(text):
    """The rows of a Markdown table: label -> cells."""
    rows = [[word.strip() for word in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.fixture
def small_study(monkeypatch):
    """Three tiny runs, each from the one before, in place of the real ones."""
    runs = {
        "a": f"pretrain.py --epochs 2 --warmup-epochs 1 --knn-every 0 --heads 2 --drop-stages 2 {TINY}",
        "a-10%": "finetune.py --init {a} --limit 40 --batch-size 20 --epochs 2",
        "a-10%-eval": "finetune.py --eval {a-10%} --limit 40 --drop-stages 1 --drop-ratio 0 0.4",
    }
    columns = {"shared": ("", "shared"), "top-1": ("-10%", "top1")}
    columns |= {ratio: ("-10%-eval", ratio) for ratio in ("0.4", "0")}
    monkeypatch.setattr(study, "RUNS", runs)
    monkeypatch.setattr(study, "TABLES", [study.Table("1", "Small", columns, {"A": "a"}, seeds=(3,))])


# --- the design -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", study.RUNS)
def test_the_scripts_take_the_command(tmp_path, name):
    """Read and checked by the scripts themselves; pre-training builds the model, schedule and all."""
    script, *words = study.command(name, 1, tmp_path, [])
    if script == "pretrain.py":
        args, _ = pretrain.read_settings(words)
        pretrain.build_model(args)
        assert args.knn_every == args.epochs and args.warmup_epochs == pytest.approx(0.15 * args.epochs)
    else:
        args, given, _ = finetune.read_settings(words)
    if "--eval" not in words:
        assert args.seed == 1 and args.out == str(tmp_path / name / "seed-1")


def test_each_run_once_behind_its_start():
    assert len(set(study.RUNS.values())) == len(study.RUNS)
    assert len(set(EVERYTHING)) == len(EVERYTHING)
    assert {name for name, _ in EVERYTHING} == set(study.RUNS)  # none is idle
    for i, (name, seed) in enumerate(EVERYTHING):
        start = re.search(r"(--init|--eval) \{(.+)\}", study.RUNS[name])
        if start:
            assert (start[2], seed) in EVERYTHING[:i]
            words = study.command(name, seed, study.Path("out"), [])
            assert words[words.index(start[1]) + 1] == str(study.Path("out") / start[2] / f"seed-{seed}" / "last.pt")
        else:
            assert study.RUNS[name].startswith("pretrain.py") or "--init none" in study.RUNS[name]


def test_seeds():
    """Those of a table, or those asked for."""
    main, one = table_of("Does the criterion matter?"), table_of("Mask ratio")
    assert {seed for _, seed in study.needed([main], None)} == {0, 1, 2}
    assert {seed for _, seed in study.needed([one], None)} == {0}
    assert study.needed([one], [5]) == [(name, 5) for name in one.rows.values()]


def test_rows_differ_in_what_their_labels_say():
    """The labels of rows that have a run: the flags are those that they name."""
    totals = {"0 %": 0, "77 %": 0.77, "81 %": 0.81, "85 %": 0.85, "87.5 %": 0.875, "92 %": 0.917}
    for label, name in table_of("Dropped in all, in 3 stages").rows.items():
        args, _ = pretrain.read_settings(study.command(name, 0, study.Path("out"), [])[1:])
        counts = token_counts(48, 4, PTR(drop_blocks(4, args.drop_stages), args.drop_ratio))
        assert args.drop_stages == 3 and 1 - counts[-1] / 48 == pytest.approx(totals[label], abs=0.005)
    for label, name in table_of("Stages, 87.5 % dropped in all").rows.items():
        args, _ = pretrain.read_settings(study.command(name, 0, study.Path("out"), [])[1:])
        assert args.drop_stages == int(label)
        assert token_counts(48, 4, PTR(drop_blocks(4, args.drop_stages), args.drop_ratio))[-1] == 6
    for label, name in table_of("PTR in the classifier").rows.items():
        args, *_ = finetune.read_settings(study.command(name, 0, study.Path("out"), [])[1:])
        assert label == f"trained at {args.drop_ratio[0]:g}"


def test_cost():
    """SimMIM's by arithmetic, and that the rows at equal compute cost the same."""
    dim, pixels, visible, masked = 64, 48, 16, 48
    tokens = 1 + visible + masked
    blocks = 4 * (12 * tokens * dim**2 + 2 * tokens**2 * dim)
    forward_and_back = 3 * (blocks + masked * dim * pixels) + 2 * visible * pixels * dim  # images have no gradient
    costs = {name: study.cost(study.command(name, 0, study.Path("out"), [])) for name in (study.UNIT, study.MAE)}
    costs["without PTR"] = study.cost(study.command("pcae-drop-0-short", 0, study.Path("out"), []))
    costs["simmim"] = study.cost(study.command(study.SIMMIM, 0, study.Path("out"), []))
    assert costs["simmim"] == pytest.approx(5 * forward_and_back / 1e9)
    assert max(costs.values()) < 1.06 * min(costs.values())
    longer = study.command("simmim-long", 0, study.Path("out"), [])
    assert study.cost(longer) == pytest.approx(2 * costs["simmim"])


# --- tables -----------------------------------------------------------------------------------------------------------


def test_table_of_seeds(tmp_path):
    """The mean and the range of finished seeds, of the last epoch; dashes where there is none."""
    for seed, knn, std in ((0, 0.80, 0.6), (1, 0.85, 0.8), (7, 0.90, 1.0)):
        fabricate(tmp_path, study.UNIT, seed, knn=knn, linear=0.5, target_std=std)
    fabricate(tmp_path, study.UNIT, 8, epoch=9, knn=0.0, linear=0.0, target_std=0.0)  # on its way
    fabricate(tmp_path, "pcae-random", 2, knn=0.7123, linear=0.2, target_std=0.6)
    text = study.markdown(table_of("Does the criterion matter?"), tmp_path, [])
    cost = f"{study.cost(study.command(study.UNIT, 0, tmp_path, [])):.2f}"
    assert cells(text) == {
        "similarity": [cost, "85.0 (80.0 to 90.0)", "50.0 (50.0 to 50.0)", "33.3 (0.0 to 64.0)"],
        "random": [cost, "71.2", "20.0", "64.0"],
        "reverse": [cost, "-", "-", "-"],
    }
    some = cells(study.markdown(table_of("Does the criterion matter?"), tmp_path, [], [1, 2]))
    assert some["similarity"] == [cost, "85.0", "50.0", "36.0"] and some["random"][1:] == ["71.2", "20.0", "64.0"]


def test_scores_count_only_with_their_classifier(tmp_path):
    """That it was scored before it was trained anew, or at other ratios, is seen."""
    name = study.CLASSIFIERS["0.3"]
    folder = fabricate(tmp_path, name, epoch=2, top1=0.5)
    (folder / "scores.txt").write_text("  0.3  12  0.01  71.5%  99.0%\n")
    table = table_of("PTR in the classifier")
    assert set(cells(study.markdown(table, tmp_path, []))["trained at 0.3"]) == {"-"}
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    (fabricate(tmp_path, name, top1=0.5) / "scores.txt").write_text("  0.3  12  0.01  71.5%  99.0%\n")
    assert study.cell(f"{name}-eval", "0.3", tmp_path, [], None) == "71.5"
    with pytest.raises(UserError, match="scores.txt does not say what drop ratio 0 gives"):
        study.markdown(table, tmp_path, [])


def test_table_of_labels(tmp_path):
    """Each column has its own run; from scratch there is no pre-training to show."""
    fabricate(tmp_path, f"{study.MAE}-10%", top1=0.25)
    fabricate(tmp_path, f"{study.SCRATCH}-1%", top1=0.5)
    rows = cells(study.markdown(table_of("Does pre-training help? At equal compute, is PCAE better?"), tmp_path, []))
    assert rows["MAE, 7 epochs"][1:] == ["-", "-", "-", "25.0", "-"]
    assert rows["from scratch"] == ["", "", "", "50.0", "-", "-"]


def test_another_run_in_the_folder_is_refused(tmp_path):
    fabricate(tmp_path, study.UNIT, settings=dict(blr=0.5), knn=1, linear=1, target_std=1)
    with pytest.raises(UserError, match="--blr 0.5 there, 0.008 here"):
        study.main(["3", "--tables", "--out", str(tmp_path)])


# --- running ----------------------------------------------------------------------------------------------------------


def test_study(tmp_path, monkeypatch, capfd, small_study):
    """All runs, then none again; an interrupted one goes on to the same end; a table of the scripts' own numbers."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums in the same order in the processes that it starts as here
    out = tmp_path / "study"
    first = study.command("a", 3, out, [])[1:]
    with monkeypatch.context() as patch:
        interrupt(patch, pretrain.Trainer, "train_epoch", 1)
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(first)
    study.main(["--out", str(out)])
    shown = capfd.readouterr().out
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("python ") and "study" in line] == [
        "pretrain.py", "finetune.py", "finetune.py",
    ]  # fmt: skip
    assert "--resume" in next(line for line in shown.splitlines() if "pretrain.py" in line)
    pretrain.main([*first, "--out", str(tmp_path / "whole")])
    assert_same_run(tmp_path / "whole", out / "a" / "seed-3")
    assert not list(out.glob("*/*-1"))  # nothing was moved aside

    capfd.readouterr()
    monkeypatch.setattr(subprocess, "run", None)
    study.main(["--out", str(out)])
    (row,) = cells(capfd.readouterr().out).values()
    log = [json.loads(line) for line in (out / "a-10%" / "seed-3" / "metrics.jsonl").read_text().splitlines()]
    pretrained = [json.loads(line) for line in (out / "a" / "seed-3" / "metrics.jsonl").read_text().splitlines()]
    assert row[:2] == [f"{100 - 100 * pretrained[-1]['target_std'] ** 2:.1f}", f"{100 * log[-1]['top1']:.1f}"]
    told = (out / "a-10%" / "seed-3" / "scores.txt").read_text()
    assert row[2:] == [re.search(rf"^ +{ratio} .*?([\d.]+)%", told, re.M)[1] for ratio in ("0.4", "0")]


def test_dry_run(tmp_path, capsys, small_study):
    """The commands, ready to paste, other data's too; nothing happens."""
    fabricate(tmp_path, "a", 1, loss=1)
    study.main(["--dry-run", "--out", str(tmp_path), "--seeds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and [line.endswith("  # done") for line in lines] == [True, False, False]
    assert shlex.split(lines[1])[1:] == study.command("a-10%", 1, tmp_path, [])
    study.main(["--dry-run", "--out", str(tmp_path / "new"), "--data", "cifar10", "--data-root", "my sets"])
    line = capsys.readouterr().out.splitlines()[0]
    args, _ = pretrain.read_settings(shlex.split(line)[2:])
    assert (args.data, args.data_root, args.seed) == ("cifar10", "my sets", 3) and args.data in data.TORCHVISION_SETS
    assert not (tmp_path / "new").exists()


def test_failures_are_one_sentence(tmp_path, monkeypatch, small_study):
    with pytest.raises(UserError, match="there is no question 9: choose among 1"):
        study.main(["9"])
    monkeypatch.setitem(study.RUNS, "a", study.RUNS["a"].replace("--heads 2", "--heads 3"))
    with pytest.raises(UserError, match="the run above ended with code 2"):
        study.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
