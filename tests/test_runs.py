"""Settings in layers, run folders, and checkpoints, which are written atomically and read safely."""

import argparse
import json
import pickle

import pytest
import torch

import data
import detect
import finetune
import pretrain
from util import runs

RECIPES = {"laptop": {}, "big": dict(epochs=300, rate=2.0)}
HISTORY = [dict(epoch=1, loss=0.5), dict(epoch=2, loss=None)]


def script():
    """Build the parser of a small script."""
    parser = runs.flag_parser("A script.")
    runs.add_flags(parser, RECIPES, out="runs/script", files="some")
    for flag, kind, default in (("epochs", int, 10), ("rate", float, 0.5), ("workers", int, 0), ("data", str, "set")):
        parser.add_argument(f"--{flag}", type=kind, default=default)
    parser.add_argument("--warmup-epochs", type=float)
    return parser


def parse(*words):
    """Return the settings of a small script."""
    return vars(runs.parse(script(), RECIPES, [str(word) for word in words], warmup_ratio=0.1, sets=["set"])[0])


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run with settings from defaults, a recipe and flags."""
    out = tmp_path / "run"
    args = argparse.Namespace(**parse("--recipe", "big", "--rate", 3, "--workers", 2, "--out", out))
    content = dict(method="script", weights=torch.arange(3.0), optimizer={}, history=HISTORY)
    runs.RunFolder(args).save(content, is_best=True)
    return out


def test_layers_of_settings(run):
    """Defaults < recipe < checkpoint < flags. A flag that repeats a default still overrides."""
    for words, epochs, rate in (
        ([], 10, 0.5),
        (["--recipe", "big"], 300, 2),
        (["--epochs", 10, "--recipe", "big"], 10, 2),
        (["--resume", "--out", run], 300, 3),
    ):
        args = parse(*words)
        assert (args["epochs"], args["rate"]) == (epochs, rate)


def test_settings_of_an_evaluated_checkpoint(run):
    """A group is not taken from the checkpoint if one of its flags is given. Public files are ignored."""
    best, groups = runs.load(run / "best.pt"), [("rate",), ("epochs", "workers"), ("unheard_of",)]
    for words, expected in (([], (300, 3, 2)), (["--rate", "1"], (300, 1, 2)), (["--epochs", "5"], (5, 3, 0))):
        args = runs.parse_with_checkpoint(script(), words, best, groups)
        assert (args.epochs, args.rate, args.workers) == expected
    public = dict(config=dict(rate=9))  # `config` of another project
    assert runs.parse_with_checkpoint(script(), [], public, groups).rate == 0.5


def test_what_a_resumed_run_may_change(run, tmp_path):
    args = parse("--resume", run / "last.pt", "--workers", 7, "--device", "cpu", "--rate", 3)
    assert (args["workers"], args["device"], args["rate"], args["out"]) == (7, "cpu", 3, str(run))
    assert parse("--resume", run / "last.pt", "--out", tmp_path / "other")["out"] == str(tmp_path / "other")
    for flag, value in (("--rate", 4), ("--seed", 1), ("--recipe", "laptop"), ("--precision", "bf16")):
        with pytest.raises(SystemExit, match=flag):
            parse("--resume", run / "last.pt", flag, value)


def test_what_cannot_be_resumed(run, tmp_path):
    """A missing file, a best.pt, a checkpoint of a script with other flags, a file that is not a checkpoint."""
    last = runs.load(run / "last.pt")
    runs.save(tmp_path / "flags.pt", last | dict(config=last["config"] | dict(other=1)))
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "weights.pt")
    missing = tmp_path / "nothing.pt", run / "nothing.pt"
    for path in (*missing, run / "best.pt", tmp_path / "flags.pt", tmp_path / "weights.pt"):
        with pytest.raises(SystemExit, match=path.name):
            parse("--resume", path)


@pytest.mark.parametrize("script", [pretrain, finetune, detect])
def test_one_epoch_of_any_recipe(script):
    """Warm-ups that are too long for the run are shortened; others are not."""
    for recipe in script.RECIPES:
        for words in (["--epochs", "1"], ["--dry-run"]):
            args, _ = runs.parse(script.arguments(), script.RECIPES, ["--recipe", recipe, *words], 0.1, data.SETS)
            assert args.epochs == 1 and 0 < args.warmup_epochs < 1
    args, _ = runs.parse(script.arguments(), script.RECIPES, ["--epochs", "4", "--warmup-epochs", "3"], 0.1, data.SETS)
    assert args.warmup_epochs == 3


def test_a_run_folder(run):
    """The log equals the history in last.pt. Another run moves the files to earlier-N, a resumed one does not."""
    last, best = runs.load(run / "last.pt"), runs.load(run / "best.pt")
    assert last.keys() - best.keys() == {"optimizer"} and torch.equal(last["weights"], torch.arange(3.0))
    assert [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == HISTORY
    assert json.loads((run / "args.json").read_text()) == last["config"]
    runs.RunFolder(argparse.Namespace(**parse("--resume", run / "last.pt")))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert before.keys() == {".lock", "args.json", "metrics.jsonl", "last.pt", "best.pt"}
    for seed in (1, 2):
        runs.RunFolder(argparse.Namespace(**parse("--out", run, "--seed", seed))).save(dict(history=[]))
    assert before == {path.name: path.read_bytes() for path in (run / "earlier-1").iterdir()} | {".lock": b""}
    assert [runs.load(path / "last.pt")["config"]["seed"] for path in (run / "earlier-2", run)] == [1, 2]


def test_a_run_continued_in_another_folder_keeps_its_best_checkpoint(run, tmp_path):
    other = runs.RunFolder(argparse.Namespace(**parse("--resume", run / "last.pt", "--out", tmp_path / "other")))
    other.save(dict(history=HISTORY), is_best=False)
    assert (tmp_path / "other/best.pt").read_bytes() == (run / "best.pt").read_bytes()


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="--out"):
        runs.RunFolder(argparse.Namespace(**parse("--out", tmp_path / "file")))


def test_a_failed_write_leaves_the_old_file(run):
    before = (run / "last.pt").read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        runs.save(run / "last.pt", dict(weights=torch.zeros(3), code=lambda: None))
    assert (run / "last.pt").read_bytes() == before


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path / "made"), "w")  # called by unpickling


def test_files_that_are_not_read(run, tmp_path):
    """Missing, empty, cut and damaged files, and files that would execute code, which is not executed."""
    whole = (run / "last.pt").read_bytes()
    contents = dict(empty=b"", text=b"no checkpoint", head=whole[:100], half=whole[: len(whole) // 2], end=whole[:-10])
    contents["pickle"] = pickle.dumps(Code(tmp_path), protocol=2)
    for name, content in contents.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
    torch.save(dict(code=Code(tmp_path)), tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in (*contents, "code", "list", "missing"):
        with pytest.raises(SystemExit, match=f"{name}.pt"):
            runs.load(tmp_path / f"{name}.pt")
    assert not (tmp_path / "made").exists()


def test_settings_in_a_namespace_are_accepted(tmp_path):
    torch.save(dict(model={"w": torch.ones(2)}, args=argparse.Namespace(lr=1.0)), tmp_path / "public.pt")
    assert runs.load(tmp_path / "public.pt")["args"].lr == 1
