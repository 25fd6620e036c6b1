"""Command line, folder and checkpoints of a run.

A run folder holds `args.json`, `metrics.jsonl` (one line per epoch), `last.pt` and, for finetune.py and detect.py,
`best.pt`. A checkpoint is a dict of tensors, numbers, strings and containers of them. pretrain.py saves `config` (all
flags), `method`, `encoder` (the ViT's arguments), `student`, `teacher`, `decoder`, `optimizer`, `step`, `epoch`,
`history` (the rows of the log) and `num_images`. Generator states are not saved: generators are seeded per step.
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

# Flags that a resumed run may change. They do not change the result, except by rounding and, with another micro-batch,
# in what is drawn per micro-batch (drop path, the `random` criterion, MixUp, CutMix, RoIs). `blr` may change, too,
# because a diverging run needs a lower one.
FREE = ("data_root", "download", "workers", "device", "micro_batch", "compile", "knn_every", "out", "resume", "blr")


def flag_parser(description: str) -> argparse.ArgumentParser:
    """Build a parser that shows the docstring unchanged, adds defaults to help texts, and rejects abbreviations."""

    class Formatter(argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str | None:
            default = action.default
            if default in (None, argparse.SUPPRESS) or isinstance(default, bool) or "(default" in action.help:
                return action.help
            values = default if isinstance(default, list) else [default]
            return f"{action.help} (default: {' '.join(f'{x:g}' if isinstance(x, float) else str(x) for x in values)})"

    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the terminal cannot print must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    usage = "python %(prog)s [--flag value ...]"  # a list of all flags would hide the error below
    return argparse.ArgumentParser(usage=usage, description=description, formatter_class=Formatter, allow_abbrev=False)


def add_flags(parser: argparse.ArgumentParser, recipes: dict[str, Any], out: str, files: str) -> None:
    """Add the flags about the run. `out` is the default folder, `files` lists its files."""
    add = parser.add_argument_group("run").add_argument
    resume = "continue the run in --out, with its settings, or start it if there is none; with FILE: continue that run"
    named = "named settings, listed at the top of this script; flags override them"
    add("--recipe", default="laptop", choices=recipes, help=named)
    add("--out", default=out, metavar="FOLDER", help=f"run folder: {files}")
    add("--resume", nargs="?", const="", metavar="FILE", help=resume)
    add("--dry-run", action="store_true", help="train two steps, evaluate a few images, save in dry-run below --out")
    add_device_flags(add)


def add_device_flags(add: Callable[..., Any]) -> None:
    """Add the flags about device, precision and seed."""
    add("--device", default="auto", help="cpu, cuda, mps, ...; auto: the accelerator if there is one, else cpu")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 on CUDA, else fp32")
    add("--seed", type=int, default=0, help="seed of all random draws")


def given(parser: argparse.ArgumentParser, argv: list[str] | None) -> set[str]:
    """Return the names of the flags on the command line, as in the namespace: `flip` for --no-flip."""
    blank = dict.fromkeys(vars(parser.parse_args(argv)))  # argparse does not set defaults of existing names
    filled = parser.parse_args(argv, argparse.Namespace(**blank))
    return {name for name, value in vars(filled).items() if value is not None}


def reject(names: set[str], why: str) -> None:
    """End the script if `names`, flags that contradict others, are not empty."""
    if names:
        raise SystemExit(f"error: {', '.join('--' + name.replace('_', '-') for name in sorted(names))}: {why}")


def parse(
    parser: argparse.ArgumentParser,
    recipes: dict[str, dict[str, Any]],
    argv: list[str] | None,
    warmup_ratio: float,
    sets: Collection[str],
) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Return the arguments and the checkpoint to resume, if any.

    Later sources override earlier ones: defaults, `--recipe`, the run to resume, the command line. Rejects flags that
    would change the training of a resumed run. `--data` may change if it is a folder, not one of `sets`, because a
    folder may have moved. For `warmup_ratio` see `settle_epochs`.
    """
    first = parser.parse_args(argv)
    parser.set_defaults(**recipes[first.recipe])
    path = Path(first.resume or first.out)
    path = path / "last.pt" if path.is_dir() or not first.resume else path
    begun = path.with_name("args.json")  # all there is of a run that was interrupted before its first checkpoint
    is_begun = path.name == "last.pt" and not path.exists() and begun.exists()
    if first.resume is None or not (first.resume or path.exists() or is_begun):
        args = parser.parse_args(argv)
        settle_epochs(args, warmup_ratio)
        if args.dry_run:
            args.out = str(Path(args.out) / "dry-run")  # separate from a real run
        return args, None
    checkpoint, path = (None, begun) if is_begun else (load(path), path)
    config = json.loads(begun.read_text(encoding="utf-8")) if is_begun else checkpoint.get("config", {})
    unknown = ", ".join(sorted(config.keys() - vars(first).keys()))
    if unknown or not (is_begun or "optimizer" in checkpoint):
        why = f" (unknown settings: {unknown})" if unknown else ""
        raise SystemExit(f"error: --resume {path}: expected the last.pt or args.json of a run of this script{why}")
    parser.set_defaults(**config | dict(out=str(path.parent)))
    args = parser.parse_args(argv)
    args.resume = "" if is_begun else str(path)
    settle_epochs(args, warmup_ratio)
    free = {*FREE} if {args.data, config.get("data")} & {*sets} else {*FREE, "data"}
    changed = [name for name, value in config.items() if name not in free and getattr(args, name) != value]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')} {config[name]}, not {getattr(args, name)}" for name in changed)
        raise SystemExit(f"error: --resume {path} was made with {flags}: drop the flag, or drop --resume for a new run")
    return args, checkpoint


def parse_with_checkpoint(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    checkpoint: dict[str, Any],
    groups: Iterable[tuple[str, ...]],
) -> argparse.Namespace:
    """Return the arguments to evaluate a checkpoint: flags on the command line, else its settings, else defaults.

    `groups` lists groups of settings. A group is taken from the checkpoint unless one of its flags is given. Public
    files are skipped, because their `config` may be anything.
    """
    config, names = checkpoint.get("config", {}) if "method" in checkpoint else {}, given(parser, argv)
    taken = [name for group in groups if not names & {*group} for name in group if name in config]
    parser.set_defaults(**{name: config[name] for name in taken})
    return parser.parse_args(argv)


def settle_epochs(args: argparse.Namespace, warmup_ratio: float) -> None:
    """Set the warm-up to `warmup_ratio` of the epochs if it is not given or not shorter than the run.

    A dry run has 1 epoch.
    """
    if args.dry_run:
        args.epochs = 1
    if args.warmup_epochs is None or args.warmup_epochs >= args.epochs:
        args.warmup_epochs = warmup_ratio * args.epochs


class RunFolder:
    """The folder `--out`, locked for a single run: while this object lives, a second run in the folder is rejected.

    Files of an earlier run move to `earlier-1`, `earlier-2`, ... within the folder, because `--out` itself may be a
    mounted volume, a link or ".". Writes args.json. Ends the script if the folder cannot be written.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.path = args, Path(args.out)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.path / ".lock")  # released by the system even if the process is killed
            self.lock.acquire(blocking=False)
            if args.resume == "":
                print(f"--resume: no checkpoint in {self.path} yet, starting from the beginning")
            self.keep_earlier()
            best = Path(args.resume or self.path / "last.pt").with_name("best.pt")
            if best.exists() and not (self.path / "best.pt").exists():  # continues a run of another folder
                write(self.path / "best.pt", lambda file: file.write(best.read_bytes()))
            write(self.path / "args.json", lambda file: file.write((json.dumps(vars(args), indent=2) + "\n").encode()))
        except Timeout:
            raise SystemExit(f"error: another run is using --out {self.path}: choose another folder") from None
        except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
            raise SystemExit(f"error: --out {self.path} cannot be written ({error})") from None

    def keep_earlier(self) -> None:
        """Move the files of an earlier run, unless this run resumes it."""
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
        print(f"moved the earlier run in {self.path} to {aside} (to continue a run instead: --resume)")

    def save(self, content: dict[str, Any], is_best: bool = False) -> None:
        """Write last.pt, best.pt if `is_best` (without the optimizer), and the whole log.

        `content["history"]` holds the rows of the log, so no row is lost or duplicated.
        """
        content = dict(config=vars(self.args)) | content
        rows = "".join(json.dumps(row) + "\n" for row in content["history"]).encode()
        if is_best:
            save(self.path / "best.pt", {name: value for name, value in content.items() if name != "optimizer"})
        save(self.path / "last.pt", content)
        write(self.path / "metrics.jsonl", lambda file: file.write(rows))


def write(path: Path, write_to: Callable[[BinaryIO], Any]) -> None:
    """Write a file atomically by `write_to`, which gets an open temporary file. Flushes, then renames it.

    On failure, ends the script and keeps the old file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write_to(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = error.__context__ if isinstance(error, RuntimeError) else error  # torch wraps Python's error
        if not isinstance(reason, OSError):
            raise
        kept = "; the earlier file is unchanged" if path.exists() else ""
        raise SystemExit(f"error: {path} cannot be written ({reason}){kept}") from None
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    write(path, lambda file: torch.save(content, file))


def save_weights(path: Path, tensors: dict[str, Tensor], known: dict[str, Any]) -> None:
    """Write tensors and `known`, a dict of plain values about them, in the format of the file's suffix.

    .safetensors: `known` is JSON in the metadata. .pt, .pth, .bin (torch): the tensors are under `model`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import save as pack
        except ImportError:
            raise SystemExit(f"error: writing {path} needs a package: pip install safetensors") from None
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write(path, lambda file: file.write(pack(tensors, dict(pcae=json.dumps(known)))))
    elif path.suffix in (".pt", ".pth", ".bin"):
        save(path, known | dict(model=tensors))
    else:
        raise SystemExit(f"error: unknown suffix of {path}: expected .pt, .pth, .bin or .safetensors")


def load(path: str | Path) -> dict[str, Any]:
    """Read our or a public checkpoint to the CPU, without executing code that a pickle may contain.

    Ends the script if the file is missing, invalid or not a dict. Tensors of .safetensors are under `model`.
    """
    try:
        if str(path).endswith(".safetensors"):
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, "pt") as file:
                    known = json.loads((file.metadata() or {}).get("pcae", "{}"))
                    return known | dict(model={name: file.get_tensor(name) for name in file.keys()})
            except SafetensorError as error:
                raise ValueError(error) from None
        with torch.serialization.safe_globals([argparse.Namespace]):  # for the settings in public files
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise SystemExit(f"error: reading {path} needs a package: pip install safetensors") from None
    except FileNotFoundError:
        raise SystemExit(f"error: checkpoint {path} not found") from None
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"contains more than tensors and plain values: {refused[1]}" if refused else "is not a valid checkpoint"
        raise SystemExit(f"error: {path} {what}") from None
    if not isinstance(content, dict):
        raise SystemExit(f"error: {path} contains a {type(content).__name__}, expected a dict")
    return content


def print_once(text: str) -> None:
    """Print in the main process only."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(text)


def describe(row: dict[str, Any], *names: str) -> str:
    """Format the columns `names` of a log row in one line, except missing ones and None.

    Adds the numbers of skipped steps and unreadable images if not 0.
    """
    shown = [name for name in names if row.get(name) is not None]
    shown += [name for name in ("skipped", "unreadable") if row.get(name)]
    return "  ".join(f"{name} {row[name]:.4g}" for name in shown)
