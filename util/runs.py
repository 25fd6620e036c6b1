"""A run's command line, folder and checkpoints.

A run folder holds `args.json`, `metrics.jsonl` (one line an epoch), `last.pt` and, where there is a score to choose by,
`best.pt`. A checkpoint is a dict of tensors, numbers, strings and containers of them; that of pretrain.py has `config`
(all flags), `method`, `encoder` (the ViT's arguments), `student`, `teacher`, `decoder`, `optimizer`, `step`, `epoch`,
`history` (the rows of the log) and `num_images`. There is no generator state: draws are seeded by their place.
"""

import argparse
import io
import json
import os
import pickle
import re
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import Tensor

# Flags that a resumed run may change: they leave the result as it is, but for rounding and, with another micro-batch,
# for what is drawn per micro-batch (drop path, the `random` criterion, MixUp, CutMix). And `blr`, which a run may need
# lower from some epoch on.
FREE = ("data_root", "download", "workers", "device", "micro_batch", "compile", "knn_every", "out", "resume", "blr")


def flag_parser(description: str) -> argparse.ArgumentParser:
    """Shows a script's docstring as it is and each flag's default, and takes no abbreviated flags."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str | None:
            return action.help if action.default in (None, False) else super()._get_help_string(action)

    if isinstance(sys.stdout, io.TextIOWrapper):  # what the terminal cannot print, such as a class name, ends no run
        sys.stdout.reconfigure(errors="backslashreplace")
    usage = "python %(prog)s [--flag value ...]"  # the usual list of all flags would hide an error below it
    return argparse.ArgumentParser(usage=usage, description=description, formatter_class=Formatter, allow_abbrev=False)


def add_flags(parser: argparse.ArgumentParser, recipes: dict[str, Any], out: str, files: str) -> None:
    """The flags about a run as such. `out` is its folder, `files` what it holds."""
    add = parser.add_argument_group("run").add_argument
    resume = "continue FILE, or the run in --out, with its settings; where --out holds no run yet, start one"
    add("--recipe", default="laptop", choices=recipes, help="settings to start from; flags given win")
    add("--out", default=out, metavar="FOLDER", help=f"run folder: {files}")
    add("--resume", nargs="?", const="", metavar="FILE", help=resume)
    add("--dry-run", action="store_true", help="two steps of everything, saved in the folder dry-run below --out")
    add_device_flags(add)


def add_device_flags(add: Callable[..., Any]) -> None:
    """Where and how precisely to compute, and the seed."""
    add("--device", default="auto", help="cpu, cuda, mps, ...")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 on CUDA, else fp32")
    add("--seed", type=int, default=0, help="of everything that is random")


def given(parser: argparse.ArgumentParser, argv: list[str] | None) -> set[str]:
    """The names of the flags that stand on the command line."""
    blank = dict.fromkeys(vars(parser.parse_args(argv)))  # argparse keeps what is there, so no default is filled in
    filled = parser.parse_args(argv, argparse.Namespace(**blank))
    return {name for name, value in vars(filled).items() if value is not None}


def reject(names: set[str], why: str) -> None:
    """End the script if there are flags of these names, which contradict others."""
    if names:
        raise SystemExit(f"error: {', '.join('--' + name.replace('_', '-') for name in sorted(names))}: {why}")


def parse(
    parser: argparse.ArgumentParser,
    recipes: dict[str, dict[str, Any]],
    argv: list[str] | None,
    warmup_ratio: float,
    sets: Collection[str],
) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Arguments in layers, the later one wins: defaults, `--recipe`, the checkpoint to `--resume`, the flags given.

    Returns that checkpoint, too. Refuses, naming them, flags that would change what a resumed run trains; `--data`
    may change if it is a folder, none of the `sets`: where a folder lies is not what it is. For `warmup_ratio` see
    `settle_epochs`.
    """
    first = parser.parse_args(argv)
    parser.set_defaults(**recipes[first.recipe])
    path = Path(first.resume or first.out)
    path = path / "last.pt" if path.is_dir() or not first.resume else path
    begun = path.with_name("args.json")  # of a run that was interrupted before its first checkpoint
    if first.resume is not None and not path.exists() and begun.exists():
        settings = json.loads(begun.read_text(encoding="utf-8")) | dict(out=str(path.parent))
        parser.set_defaults(**{name: value for name, value in settings.items() if name in first})
        first.resume = ""
    if first.resume is None or not (first.resume or path.exists()):
        args = parser.parse_args(argv)
        args.resume = first.resume
        settle_epochs(args, warmup_ratio)
        if args.dry_run:
            args.out = str(Path(args.out) / "dry-run")  # not where a real run is looked for
        return args, None
    checkpoint = load(path)
    config = checkpoint.get("config", {})
    unknown = ", ".join(sorted(config.keys() - vars(first).keys()))
    if "optimizer" not in checkpoint or unknown:
        why = f"; it has settings that this one lacks: {unknown}" if unknown else ""
        raise SystemExit(f"error: --resume {path}: this is no last.pt of this script, so it cannot be continued{why}")
    parser.set_defaults(**config | dict(out=str(path.parent)))
    args = parser.parse_args(argv)
    args.resume = str(path)
    settle_epochs(args, warmup_ratio)
    free = {*FREE} if {args.data, config.get("data")} & {*sets} else {*FREE, "data"}
    changed = [name for name, value in config.items() if name not in free and getattr(args, name) != value]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')} ({config[name]} there)" for name in changed)
        raise SystemExit(f"error: --resume {path} was made with another {flags}: leave it out, or start a run anew")
    return args, checkpoint


def parse_with_checkpoint(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    checkpoint: dict[str, Any],
    groups: Iterable[tuple[str, ...]],
) -> argparse.Namespace:
    """Arguments for looking at a checkpoint: flags given, else its settings, else defaults.

    Settings are taken in `groups`; of a group from which a flag is given none is taken from the checkpoint. Of a public
    file, whose `config` may be anything, none is taken.
    """
    config, names = checkpoint.get("config", {}) if "method" in checkpoint else {}, given(parser, argv)
    taken = [name for group in groups if not names & {*group} for name in group if name in config]
    parser.set_defaults(**{name: config[name] for name in taken})
    return parser.parse_args(argv)


def settle_epochs(args: argparse.Namespace, warmup_ratio: float) -> None:
    """Warm up for `warmup_ratio` of the epochs where no length is given, or one that is as long as the run."""
    if args.dry_run:
        args.epochs = 1
    if args.epochs < 1:
        raise SystemExit(f"error: --epochs must be 1 or more, got {args.epochs}")
    if args.warmup_epochs is None or args.warmup_epochs >= args.epochs:
        args.warmup_epochs = warmup_ratio * args.epochs


class RunFolder:
    """The folder `--out`, for one run alone: as long as this object lives, a second run there is refused.

    The files of an earlier run move into a folder within it, `earlier-1`, `earlier-2`, ...: `--out` itself may be a
    mounted volume, a link or ".".
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.path = args, Path(args.out)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.path / ".lock")  # the system frees it when the process ends, however it ends
            self.lock.acquire(blocking=False)
            if args.resume == "":
                print(f"there is no run in {self.path} to continue: a new one starts")
            self.keep_earlier()
            write(self.path / "args.json", lambda file: file.write((json.dumps(vars(args), indent=2) + "\n").encode()))
        except Timeout:
            raise SystemExit(f"error: another run is writing to --out {self.path}: name another folder") from None
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            raise SystemExit(f"error: --out {self.path} cannot be written ({error})") from None

    def keep_earlier(self) -> None:
        """Move another run's files out of the way; what a resumed run continues stays."""
        last, args = self.path / "last.pt", self.args
        if args.dry_run or not last.exists() or (args.resume and last.samefile(args.resume)):
            return
        number = 1
        while (aside := self.path / f"earlier-{number}").exists():
            number += 1
        aside.mkdir()
        for name in ("args.json", "metrics.jsonl", "best.pt", "last.pt"):
            if (self.path / name).exists():
                (self.path / name).rename(aside / name)
        print(f"the run that was in {self.path} is now in {aside} (to continue a run: --resume)")

    def save(self, content: dict[str, Any], is_best: bool = False) -> None:
        """Write last.pt, if this is the best epoch best.pt, and the log of both: no row is lost or twice in it."""
        content = dict(config=vars(self.args)) | content
        rows = "".join(json.dumps(row) + "\n" for row in content["history"]).encode()
        if is_best:
            save(self.path / "best.pt", {name: value for name, value in content.items() if name != "optimizer"})
        save(self.path / "last.pt", content)
        write(self.path / "metrics.jsonl", lambda file: file.write(rows))


def write(path: Path, content: Callable[[BinaryIO], Any]) -> None:
    """Write a file whole, beside it, flushed to disk, then renamed, or end the script and leave what was there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = error.__context__ if isinstance(error, RuntimeError) else error  # torch wraps what Python raised
        if not isinstance(reason, OSError):
            raise
        kept = "; the last one is whole" if path.exists() else ""
        raise SystemExit(f"error: {path} cannot be written ({reason}){kept}") from None
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    write(path, lambda file: torch.save(content, file))


def save_weights(path: Path, tensors: dict[str, Tensor], known: dict[str, Any]) -> None:
    """Write tensors and what is `known` of them, plain values, as the file's name says.

    .safetensors (by that package): `known` is JSON in the metadata. .pt, .pth, .bin (by torch): tensors under `model`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import save as pack
        except ImportError:
            raise SystemExit(f"error: to write {path}: pip install safetensors") from None
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write(path, lambda file: file.write(pack(tensors, dict(pcae=json.dumps(known)))))
    elif path.suffix in (".pt", ".pth", ".bin"):
        save(path, known | dict(model=tensors))
    else:
        raise SystemExit(f"error: {path} must end in .pt, .pth, .bin or .safetensors")


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, ours or a public one, to the CPU, without running anything a pickle may hold."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, "pt") as file:
                    known = json.loads((file.metadata() or {}).get("pcae", "{}"))
                    return known | dict(model={name: file.get_tensor(name) for name in file.keys()})
            except SafetensorError as error:
                raise ValueError(error) from None
        with torch.serialization.safe_globals([argparse.Namespace]):  # public files hold their settings in one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise SystemExit(f"error: to read {path}: pip install safetensors") from None
    except FileNotFoundError:
        raise SystemExit(f"error: there is no checkpoint {path}") from None
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds more than tensors and plain values: {refused[1]}" if refused else "is no checkpoint, or damaged"
        raise SystemExit(f"error: {path} {what}") from None
    if not isinstance(content, dict):
        raise SystemExit(f"error: {path} holds a {type(content).__name__}, not a checkpoint")
    return content


def describe(row: dict[str, Any], *names: str) -> str:
    """The columns `names` of a row of the log in one line, and how many steps or images were left out, if any were."""
    shown = [name for name in names if row.get(name) is not None]
    shown += [name for name in ("skipped", "unreadable") if row.get(name)]
    return "  ".join(f"{name} {row[name]:.4g}" for name in shown)
