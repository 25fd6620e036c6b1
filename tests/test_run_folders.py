"""A run folder belongs to one run; one command starts and resumes a run; printed advice works."""

import importlib
import math
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

import helpers
import pretrain
from helpers import ENVIRONMENT, ROOT, assert_same_run, evaluate, flags, log, train
from util import runs, training
from util.training import World

CPU = torch.device("cpu")
TINY = dict(data="shapes", limit=64, batch_size=16, epochs=2, image_size=16, patch_size=4, workers=0, device="cpu")
SETTINGS = dict(pretrain=TINY | dict(knn_every=0, decoder_dim=16), finetune=TINY | dict(init="none"))
scripts = pytest.mark.parametrize("script", SETTINGS)


def contents(folder):
    """Return the files of a folder, without subfolders, lock and temporary files."""
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix not in ("", ".tmp")]
    return {path.name: path.read_bytes() for path in files}


# --- one run ----------------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_rejected(tmp_path):
    """Runs of any script are rejected before and after the first checkpoint, until SIGKILL ends the first run."""
    out, endless = tmp_path / "run", SETTINGS["pretrain"] | dict(epochs=5000)
    with helpers.start("pretrain", out, **endless) as process:
        try:
            while not (out / "args.json").exists():
                assert process.poll() is None
            for count in (0, 2):
                helpers.wait_for_rows(process, out, count) if count else None
                recorded = (out / "args.json").read_bytes()
                for script, changes in (("pretrain", dict(seed=1)), ("finetune", {})):
                    with pytest.raises(SystemExit, match="--out"):
                        train(script, out, **SETTINGS[script] | changes)
                assert (out / "args.json").read_bytes() == recorded and not (out / "earlier-1").exists()
            with pytest.raises(SystemExit, match="--out"):
                train("pretrain", out, resume=True)
            train("pretrain", out, dry_run=True, **SETTINGS["pretrain"])  # uses another folder
        finally:
            process.send_signal(signal.SIGKILL)
    killed = contents(out)
    assert train("pretrain", out, **SETTINGS["pretrain"])["epoch"] == 2
    assert contents(out / "earlier-1") == killed


@scripts
def test_a_dry_run_is_not_resumed_as_a_run(tmp_path, script):
    settings = SETTINGS[script]
    assert train(script, tmp_path, dry_run=True, **settings)["step"] == 2
    assert contents(tmp_path) == {} and contents(tmp_path / "dry-run")
    assert train(script, tmp_path, resume=True, **settings)["step"] == 8, "a new run"
    before = contents(tmp_path)
    for seed in (1, 2):
        assert train(script, tmp_path, dry_run=True, **settings | dict(seed=seed))["config"]["seed"] == seed
    assert contents(tmp_path) == before and not (tmp_path / "dry-run" / "earlier-1").exists()


@pytest.mark.parametrize("kind", ["folder", "link", "here"])
def test_an_earlier_run_moves_within_its_folder(tmp_path, monkeypatch, kind):
    """--out itself does not move, because --out may be a mounted volume, a link or the working folder."""
    place = tmp_path / "disk" / "run"
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    (place / "earlier-1").mkdir()
    (tmp_path / "link").symlink_to(place)
    monkeypatch.chdir(place)
    out = dict(folder=str(place), link=str(tmp_path / "link"), here=".")[kind]
    before, saved = os.stat(out).st_ino, []
    for seed in range(3):
        pretrain.main(flags(out=out, **SETTINGS["pretrain"], seed=seed))
        saved.append({name: content for name, content in contents(place).items() if name != "notes.txt"})
    assert os.stat(out).st_ino == before and (tmp_path / "link").is_symlink()
    assert {path.name for path in place.parent.iterdir()} == {"run"} and (place / "notes.txt").read_text() == "mine"
    assert contents(place / "earlier-1") == {}
    assert [contents(place / name) for name in ("earlier-2", "earlier-3")] == saved[:2]


# --- one command ------------------------------------------------------------------------------------------------------


@scripts
def test_resume_starts_a_new_run_or_continues_an_existing_one(tmp_path, script):
    settings = SETTINGS[script] | dict(epochs=dict(pretrain=16, finetune=5)[script], drop_path=0.3)
    plain = train(script, tmp_path / "plain", **settings)
    assert_same_run(plain, train(script, tmp_path / "new", resume=True, **settings))
    killed = tmp_path / "killed"
    with helpers.start(script, killed, resume=True, **settings) as process:
        helpers.wait_for_rows(process, killed, 1)
        process.kill()
    assert len(log(killed)) < settings["epochs"], "the run ended before it was killed"
    assert_same_run(plain, train(script, killed, resume=True, **settings))
    assert_same_run(plain, train(script, killed, resume=killed, **settings)), "a folder works, too"
    assert not (killed / "earlier-1").exists()
    with pytest.raises(SystemExit, match="nothing.pt"):
        train(script, tmp_path / "other", resume=tmp_path / "nothing.pt")


@scripts
def test_a_run_without_a_checkpoint_resumes_with_its_own_settings(tmp_path, script):
    """From args.json, so the printed command also continues a run that is interrupted in its first epoch."""
    plain = train(script, tmp_path / "run", **SETTINGS[script], seed=5)
    for path in (tmp_path / "run").glob("*.pt"):
        path.unlink()
    with pytest.raises(SystemExit, match="--seed 5"):
        train(script, tmp_path / "run", resume=True, seed=6)
    importlib.import_module(script).main(flags(resume=tmp_path / "run"))
    assert_same_run(plain, runs.load(tmp_path / "run/last.pt"))


@scripts
@pytest.mark.parametrize("epochs_done", [0, 1])
def test_a_lower_learning_rate_rescues_a_diverged_run(tmp_path, script, epochs_done):
    """By the command in the error message: in the first epoch, before a checkpoint, and in a later epoch."""
    settings = SETTINGS[script] | dict(batch_size=4, clip_grad=0, warmup_epochs=0.5)
    if epochs_done:
        checkpoint = train(script, tmp_path, **settings | dict(epochs=1))
        checkpoint["config"]["epochs"] = 2
        runs.save(tmp_path / "last.pt", checkpoint)
    with pytest.raises(SystemExit, match="--resume.*--blr|--blr.*--resume"):
        train(script, tmp_path, resume=True, **settings, blr=1e25)
    end = train(script, tmp_path, resume=True, **settings, blr=1e-3)
    assert end["epoch"] == 2 and end["config"]["blr"] == 1e-3 and end["history"][-1]["lr"] < 1e-3 * 4 / 256
    assert all(math.isfinite(row["loss"]) and row["skipped"] == 0 for row in end["history"])


# --- a full disk ------------------------------------------------------------------------------------------------------


def run_limited(script, limit, *words, **settings):
    """Run a script that cannot write files of more than `limit` bytes."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *words, *flags(**settings)]
    return subprocess.run(
        command,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def assert_one_line_error(result):
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1 and "error: " in result.stderr.strip().split("\n")[-1]


@scripts
@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_failed_write_gives_a_one_line_error_and_keeps_the_old_files(tmp_path, script, limit):
    """For args.json and for checkpoints."""
    checkpoint = train(script, tmp_path, **SETTINGS[script] | dict(epochs=1))
    checkpoint["config"]["epochs"] = 2
    runs.save(tmp_path / "last.pt", checkpoint)
    before = contents(tmp_path)
    result = run_limited(script, limit, out=tmp_path, resume=True)
    assert_one_line_error(result)
    after = contents(tmp_path)
    assert after.keys() == before.keys() and not list(tmp_path.glob("*.tmp"))
    assert [name for name in before if before[name] != after[name]] in ([], ["args.json"])
    train(script, tmp_path, resume=True)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_failed_export_gives_a_one_line_error(tmp_path, suffix):
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    train("finetune", tmp_path / "run", **SETTINGS["finetune"])
    words = [str(tmp_path / "run/last.pt"), str(tmp_path / f"new/vit.{suffix}")]
    result = run_limited("weights", 20_000, *words)
    assert_one_line_error(result)
    assert not list((tmp_path / "new").iterdir())


# --- flags and variables without effect ------------------------------------------------------------------------------

PCAE = dict(drop_ratio=0.5, drop_stages=3, drop_at="start", drop_blocks=1, criterion="similarity", ema=0.9)
DECODER = dict(decoder_dim=64, decoder_depth=1, decoder_heads=4)


@pytest.mark.parametrize(
    "method, name",
    [
        *(("mae", name) for name in PCAE),
        *(("simmim", name) for name in PCAE | DECODER),
    ],
)
def test_flags_of_other_methods_are_rejected(tmp_path, method, name):
    """Also with default values."""
    with pytest.raises(SystemExit, match="--" + name.replace("_", "-")):
        train("pretrain", tmp_path / "run", method=method, limit=64, dry_run=True, **{name: (PCAE | DECODER)[name]})
    assert not (tmp_path / "run").exists()


TORCHRUN = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1, MASTER_ADDR="localhost", MASTER_PORT=29555)


@pytest.fixture
def left_over(monkeypatch):
    """Set the variables that a job script may leave: of the second of two processes, without RANK."""
    for name, value in (TORCHRUN | dict(LOCAL_RANK=1, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("RANK")
    return monkeypatch


def test_torchruns_variables_are_ignored_without_rank(tmp_path, left_over, capsys):
    assert training.start_world("cpu") == World(0, 1, CPU)
    with_them = train("pretrain", tmp_path / "with", **SETTINGS["pretrain"])
    evaluate(tmp_path / "with/last.pt", knn=5, limit=100)
    for name in TORCHRUN:
        left_over.delenv(name, raising=False)
    assert_same_run(with_them, train("pretrain", tmp_path / "without", **SETTINGS["pretrain"]))
    assert "fitted on 100, tested on 2,000 images" in capsys.readouterr().out


@pytest.mark.parametrize("missing", [name for name in TORCHRUN if name != "RANK"])
def test_torchruns_variables_are_needed_together(left_over, missing):
    left_over.setenv("RANK", "0")
    left_over.delenv(missing)
    with pytest.raises(SystemExit, match=missing):
        training.start_world("cpu")
