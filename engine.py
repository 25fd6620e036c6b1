"""What a run needs that is not the method: command line, processes, seeds, schedules, the loop, checkpoints, logs."""

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import pickle
import re
import shlex
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ptr import CRITERIA, PLACEMENTS, PTR, drop_blocks, token_counts

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_SKIPPED_IN_A_ROW = 10
MAX_WORKERS = 128  # of one process; a thousand would bring a machine to its knees
PATIENCE = timedelta(minutes=30)  # of a process with the others, which wait while one scores and saves

# Flags that a resumed run may change: they leave the result as it is, but for rounding, and with another micro-batch
# for what is drawn anew for each (drop path, MixUp, CutMix) or averaged over it (`--center`, a probe's BatchNorm).
FREE = (
    "data_root", "download", "workers", "device", "micro_batch", "compile", "checkpointing", "out", "resume", "dry_run",
    "per_class", "results",
)  # fmt: skip

# What a resumed run never takes from its checkpoint, which may be a stranger's: what else to do, and files to write.
OWN = ("resume", "dry_run", "download", "eval", "knn", "export", "results")


# What may differ between the processes of a run: they may be on several machines.
LOCAL = ("data", "data_root", "init", "workers", "device", "out", "resume", "results")


class UserError(Exception):
    """A mistake of the user's: one sentence naming the flag or file and what to do. Ends a script with exit code 2."""


def reason(error: Exception) -> str:
    """The first line of an error's text; its kind where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """Text as one line that any terminal can show: what is not printable is escaped. File names may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process of the run is gone or does not answer: a rank, or one of a loader."""
    words = ("DataLoader worker (pid", *(("gloo",) if dist.is_initialized() else ()))
    return isinstance(error, dist.DistError | ConnectionError) or any(word in str(error) for word in words)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was asked for and not there, of the machine or of its accelerator."""
    words = "allocate memory", "out of memory", "not enough memory"  # Linux, MPS, Windows
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def launch(main: Callable[[], None]) -> None:
    """Run a script's `main`; mistakes, interruptions and lost processes end it with one line on stderr.

    The exit code is 130 after Ctrl-C, 143 after SIGTERM, 1 where another process is lost, and 2 after a UserError or
    where a file, a folder or the memory is not as it should be. Anything else is a mistake of ours, with a traceback.
    """

    def fail(code: int, text: str) -> NoReturn:
        print(printable(f"error: {text}"), file=sys.stderr)
        sys.exit(code)

    def terminate(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that the terminal's encoding lacks
    try:
        main()
    except UserError as error:
        fail(2, str(error))
    except OSError as error:  # one from a loader's process brings its traceback along; the last line says what it was
        code = 1 if is_lost(error) else 2
        fail(code, (str(error).strip() or type(error).__name__).splitlines()[-1])
    except KeyboardInterrupt as interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one ends it at once
            signal.signal(number, signal.SIG_DFL)
        print("interrupted", file=sys.stderr)
        sys.exit(128 + (interrupt.args[0] if interrupt.args else signal.SIGINT))
    except (RuntimeError, MemoryError) as error:
        if is_lost(error):
            fail(1, f"another process of this run is gone or does not answer ({reason(error)})")
        if is_out_of_memory(error):
            fail(2, f"out of memory: take fewer images at once (--micro-batch) or smaller ones ({reason(error)})")
        raise
    if dist.is_initialized():  # not after an error: the others may never come to say goodbye
        dist.destroy_process_group()


@contextlib.contextmanager
def resumable(args: argparse.Namespace, world: "World") -> Iterator[None]:
    """Where the training in the block is interrupted, or another process lost, say how to continue it."""
    try:
        yield
    except (KeyboardInterrupt, RuntimeError) as error:
        lost, last = is_lost(error), Path(args.out) / "last.pt"
        speaks = lost or (world.is_main and isinstance(error, KeyboardInterrupt))
        if speaks and not args.dry_run and last.exists():
            processes = os.environ.get("LOCAL_WORLD_SIZE")
            start = f"torchrun --nproc-per-node {processes}" if processes else "python"
            if processes and int(processes) < world.size:
                start = "on every machine torchrun, as before, with"
            command = f"{start} {shlex.quote(sys.argv[0])} --resume {shlex.quote(last.as_posix())}"
            print(f"\nto continue from the last checkpoint: {command}", file=sys.stderr)
        raise


# --- command line -----------------------------------------------------------------------------------------------------


class FlagParser(argparse.ArgumentParser):
    """argparse's, with mistakes in one line: the usage of so many flags would hide it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows all flags)")


def flag_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it is and takes no abbreviated flags."""
    return FlagParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_flag(group: Any, flag: str, default: Any, text: str, **options: Any) -> None:
    """A flag whose help ends with its default, and whose type is that of its default unless `options` say another."""
    shown = "" if default is None or default is False else f" (default: {default})"
    if isinstance(default, int | float) and not isinstance(default, bool):
        options.setdefault("type", type(default))
    group.add_argument(flag, default=default, help=text + shown, **options)


def add_run_flags(parser: argparse.ArgumentParser, recipes: dict[str, dict[str, Any]], out: str, files: str) -> None:
    """The flags about a run as such. `out` is its folder, `files` what it holds."""
    add = functools.partial(add_flag, parser.add_argument_group("run"))
    add("--recipe", "laptop", "settings to start from; flags given win", choices=recipes)
    add("--out", out, f"run folder: {files}", metavar="FOLDER")
    add("--resume", None, "continue the run in --out, or FILE, with its settings", nargs="?", const="", metavar="FILE")
    add("--dry-run", False, "two steps of everything in a temporary folder, then exit", action="store_true")
    add("--device", "auto", "cpu, cuda, mps, ...")
    add("--precision", "auto", "auto: bf16 on CUDA, else fp32", choices=("auto", "fp32", "bf16"))
    add("--compile", False, "torch.compile the model: a slow start, faster steps", action="store_true")
    add("--seed", 0, "of everything that is random")


def add_ptr_flags(add: Callable[..., None]) -> None:
    """The flags about where tokens are dropped, and which; how many, each script says."""
    add("--drop-stages", 3, "how often tokens are dropped")
    add("--drop-at", "start", "after the first block of each stage, the last, or the first blocks", choices=PLACEMENTS)
    add("--drop-blocks", None, "drop after these blocks instead (0-based)", type=int, nargs="*", metavar="BLOCK")
    add("--criterion", "similarity", "drop the most redundant tokens, any, or the least redundant", choices=CRITERIA)


def token_reduction(args: argparse.Namespace, depth: int, num_tokens: int, drop_ratio: float) -> PTR:
    """PTR as the flags say, at this ratio, in an encoder of `depth` blocks. Raises UserError where it does not fit."""
    try:
        blocks = args.drop_blocks
        if blocks is None:
            blocks = drop_blocks(depth, args.drop_stages, args.drop_at) if drop_ratio else ()
        ptr = PTR(tuple(blocks), drop_ratio, args.criterion)
        token_counts(num_tokens, depth, ptr)
    except ValueError as error:
        raise UserError(str(error)) from None
    return ptr


def saved_settings(checkpoint: dict[str, Any], parser: argparse.ArgumentParser, path: str | Path) -> dict[str, Any]:
    """The settings in a checkpoint from `path`, but for OWN. Raises UserError for what the parser's flags cannot say.

    They are turned into words and parsed: a stranger's file may name anything a setting.
    """
    require(checkpoint, path, config=dict)
    unfit = f"{path} holds settings that no run can have had"
    known = vars(parser.parse_args([])).keys() - OWN
    saved = {name: value for name, value in checkpoint["config"].items() if name in known}
    for name, value in saved.items():  # before they are put into words: lists in lists may have no end
        numbers = isinstance(value, list) and all(isinstance(item, int | float) for item in value)
        if not numbers and not isinstance(value, str | int | float | None):
            raise UserError(f"{unfit}: {name} is a {type(value).__name__}")
    try:
        parsed, _ = parse_arguments(parser, {}, as_words(saved))
    except UserError as error:
        raise UserError(f"{unfit}: {str(error)[:200]}") from None
    for name, value in saved.items():
        if getattr(parsed, name) != value:  # such as words where there should be a number
            raise UserError(f"{unfit}: {name} is {str(value)[:80]}")
    return saved


def as_words(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line says them: numbers and words, lists of them, True; None and False go unsaid."""
    words = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words.append(f"{flag}={value}")
    return words


def lacks(checkpoint: dict[str, Any], **kinds: type) -> list[str]:
    """Which entries of these names and kinds a checkpoint does not have."""
    return [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name), kind)]


def require(checkpoint: dict[str, Any], path: str | Path, **kinds: type) -> None:
    """Raise UserError where a checkpoint from `path` lacks an entry of these names and kinds."""
    for name in lacks(checkpoint, **kinds):
        raise UserError(f"{path} is not a whole checkpoint of this script: it has no {kinds[name].__name__} {name!r}")


def settings_left_to(config: dict[str, Any], names: Collection[str], given: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint's settings those of `names` that the flags given do not decide.

    Stages, where they are given, replace the blocks that the checkpoint names, which would win over them.
    """
    decided = given.keys() | ({"drop_blocks"} if given.keys() & {"drop_stages", "drop_at"} else set())
    return {name: config[name] for name in names if name in config and name not in decided}


def add_optimisation_flags(
    add: Callable[..., None], *, epochs: int, blr: float, warmup_epochs: float, batch_size: int = 64
) -> None:
    """The flags about steps and learning rates, with a script's defaults."""
    add("--epochs", epochs, "passes over the data")
    add("--batch-size", batch_size, "images a step, over all processes")
    add("--micro-batch", None, "images at once in one process; gradients accumulate (default: all)", type=int)
    add("--blr", blr, "learning rate per 256 images: lr = blr * batch size / 256")
    add("--lr", None, "learning rate; overrides --blr", type=float)
    add("--warmup-epochs", warmup_epochs, "epochs of linear warm-up")
    add("--weight-decay", 0.05, "of matrices; none on biases, norms and tokens")
    add("--clip-grad", 1.0, "largest norm of the gradient; 0: any")


def parse_arguments(
    parser: argparse.ArgumentParser, recipes: dict[str, dict[str, Any]], argv: list[str] | None = None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse with three layers, the later one wins: the parser's defaults, `--recipe` (if any), the flags given.

    Returns the arguments and the given ones alone: what a resumed run must agree with.
    """
    defaults = vars(parser.parse_args([]))
    unset = object()
    parsed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in parsed.items() if value is not unset}
    for name, value in given.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and abs(number) > 10**12 for number in numbers):
            raise UserError(f"--{name.replace('_', '-')} is beyond all numbers that make sense")
    recipe = recipes[given.get("recipe", defaults["recipe"])] if recipes else {}
    return argparse.Namespace(**(defaults | recipe | given)), given


def resume_settings(
    parser: argparse.ArgumentParser, args: argparse.Namespace, given: dict[str, Any], methods: Collection[str]
) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """With `--resume`: the settings of the checkpoint under the given ones, and the checkpoint. Else (args, None).

    `parser` is the script's, `methods` are those that its checkpoints may name.
    Raises UserError where there is no such checkpoint, or a given flag would change what is being trained.
    """
    if args.resume is None:
        return args, None
    path = Path(args.resume or Path(args.out) / "last.pt")
    checkpoint = load_checkpoint(path)
    needed = dict(config=dict, history=list, num_images=int, epoch=int, optimizer=dict)
    if checkpoint.get("method") not in list(methods) or lacks(checkpoint, **needed):
        raise UserError(
            f"{path} is not a checkpoint of this script that can be continued (method {' or '.join(methods)}, last.pt)"
        )
    for row in checkpoint["history"]:
        if not isinstance(row, dict) or not all(isinstance(value, int | float | None) for value in row.values()):
            raise UserError(f"{path} holds a log that no run can have written")
    saved = saved_settings(checkpoint, parser, path)
    check_settings(saved, {name: value for name, value in given.items() if name not in FREE}, path)
    return argparse.Namespace(**(vars(args) | saved | {"out": str(path.parent)} | given)), checkpoint


def check_values(
    args: argparse.Namespace, at_least: dict[str, float], requirements: list[tuple[str, bool, str]]
) -> None:
    """Raise UserError for a number that makes no sense.

    `at_least` gives smallest values, `requirements` (name, whether it holds, what is needed); the flags that all
    training scripts share are checked besides. Sizes and ratios that must fit together the model checks.
    """
    at_least = dict(epochs=1, batch_size=1, micro_batch=1, workers=0, seed=0, weight_decay=0, clip_grad=0) | at_least
    checks = [
        (name, getattr(args, name) is None or low <= getattr(args, name) < math.inf, f"{low} or more, and finite")
        for name, low in at_least.items()
    ]
    checks += [
        (name, getattr(args, name) is None or 0 < getattr(args, name) < math.inf, "positive and finite")
        for name in ("blr", "lr")
    ]
    checks += [
        ("seed", args.seed < 2**32, "below 2^32"),
        ("workers", args.workers is None or args.workers <= MAX_WORKERS, f"at most {MAX_WORKERS}"),
        ("warmup_epochs", 0 <= args.warmup_epochs < args.epochs, f"in [0, --epochs = {args.epochs})"),
        ("drop_path", 0 <= args.drop_path < 1, "in [0, 1)"),
    ]
    if "min_crop" in args:  # the flags of data.add_data_flags
        checks += [
            ("min_crop", args.min_crop is None or 0 < args.min_crop <= 1, "in (0, 1]"),
            ("image_size", len(args.image_size or ()) <= 2, "one number, or height and width"),
        ]
    for name, holds, need in checks + requirements:
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} must be {need}, got {getattr(args, name)}")


# --- processes and devices --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """This process among all those that torchrun started, on this machine and others; a single one without it."""

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_world(device: str) -> World:
    """Join the processes of torchrun, if it started this one, and choose the device: `auto`, `cpu`, `cuda`, `mps`..."""
    rank, local_rank, size = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator is not None else "cpu"
        if device == "mps" and "RANK" in os.environ:
            device = "cpu"  # gloo cannot reduce what lies on a Mac's GPU
    try:
        chosen = torch.device(device)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
            torch.cuda.set_device(chosen)
        torch.zeros(1, device=chosen).item()  # a device that computes, which `meta` does not
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"--device {device} cannot be used here ({reason(error)})") from None
    if "RANK" in os.environ:
        backend = "nccl" if chosen.type == "cuda" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    return World(rank, max(size, 1), chosen, local_rank)


def check_agreement(values: dict[str, Any], world: World) -> None:
    """Raise UserError, in all processes, where `values` differ, but for those of LOCAL; the error names each."""
    if world.size > 1:
        every: list[dict[str, Any]] = [{}] * world.size
        dist.all_gather_object(every, {name: value for name, value in values.items() if name not in LOCAL})
        for rank, others in enumerate(every):
            differing = [name for name in every[0] if others.get(name) != every[0][name]]
            if differing:
                text = ", ".join(f"{name} is {every[0][name]} and {others.get(name)}" for name in differing)
                raise UserError(f"process 0 and process {rank} were started differently: {text}")


@contextlib.contextmanager
def one_at_first(world: World, needed: bool) -> Iterator[None]:
    """Where `needed`, let one process of each machine through the block first: it downloads what the others find."""
    if needed and world.size > 1 and world.local_rank > 0:
        dist.barrier()
    yield
    if needed and world.size > 1 and world.local_rank == 0:
        dist.barrier()


def mean_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over all processes (itself where there is one)."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from what identifies a random draw, such as (seed, epoch, index): equal parts, equal draws.

    With every draw seeded by its own place in the run there is no generator state to save, to restore or to keep equal
    across processes.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU random generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_generators(device: torch.device, *parts: int | str) -> None:
    """Seed torch's own generators, of the CPU and of `device`, with `derive_seed(*parts)`.

    `torch.manual_seed` does this for every kind of device, which takes milliseconds where there is none.
    """
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def resolve_precision(device: torch.device, precision: str) -> str:
    """`bf16` or `fp32`; `auto` is bf16 on CUDA cards that have it."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """bf16 autocast, or none, as `resolve_precision` says."""
    if device.type == "meta":  # nothing is computed there, and torch has no autocast for it
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve_precision(device, precision) == "bf16")


# --- optimisation -----------------------------------------------------------------------------------------------------


def warmup_cosine(step: float, *, peak: float, total: float, warmup: float, final: float = 0.0) -> float:
    """Learning rate at `step`: linear from 0 to `peak` over `warmup`, then half a cosine down to `final` at `total`."""
    if step < warmup:
        return peak * step / warmup
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def warmup_steps(step: float, *, peak: float, milestones: list[float], warmup: float, factor: float = 0.1) -> float:
    """Learning rate at `step`: linear from 0 to `peak` over `warmup`, times `factor` after each of `milestones`."""
    rate = peak * min(step / warmup, 1.0) if warmup else peak
    return rate * factor ** sum(step >= milestone for milestone in milestones)


def ema_momentum(step: float, *, base: float, total: float) -> float:
    """EMA momentum at `step`: half a cosine from `base` up to 1 at `total` (BYOL, DINO)."""
    return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * step / total))


def layer_index(name: str, depth: int) -> int:
    """Where a parameter of a ViT sits: 0 for what makes tokens, i + 1 for block i, depth + 1 for all behind them."""
    block = re.search(r"\bblocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if re.search(r"\b(cls_token|pos_embed|patch_embed)\b", name) else depth + 1


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Trainable parameters in groups: matrices decay; biases, norms, class, mask and position tokens do not.

    With `layer_decay` the learning rate falls by that factor from each block to the one before it (BEiT, MAE): a
    group's `lr_scale`, which is 1 for the head, is layer_decay^(depth + 1 - layer_index).
    """
    names = [name for name, _ in model.named_parameters()]
    depth = 1 + max((int(i) for name in names for i in re.findall(r"\bblocks\.(\d+)\.", name)), default=-1)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not name.endswith(("cls_token", "mask_token", "pos_embed"))
            lr_scale = layer_decay ** (depth + 1 - layer_index(name, depth))
            groups.setdefault((lr_scale, weight_decay * decays), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": lr_scale}
        for (lr_scale, decay), parameters in sorted(groups.items(), reverse=True)
    ]


def batch_sizes(args: argparse.Namespace, world: World) -> tuple[int, int]:
    """Images at once in one process, and how many times gradients accumulate to make `--batch-size`."""
    if args.batch_size % world.size:
        raise UserError(f"--batch-size {args.batch_size} is not divisible by the {world.size} processes")
    share = args.batch_size // world.size
    micro_batch = min(args.micro_batch or share, share)
    if share % micro_batch:
        raise UserError(f"--micro-batch {micro_batch} does not divide the {share} images a process takes each step")
    return micro_batch, share // micro_batch


# --- the loop ---------------------------------------------------------------------------------------------------------


class Unreadable:
    """Names each unreadable file once and stops the run when more than a quarter of the files are."""

    def __init__(self):
        self.files: set[str] = set()
        self.seen = self.failures = 0

    def count(self, num_images: int, messages: list[str]) -> None:
        """Take note of `num_images` that were read and of those that were not. Raises UserError if these are many."""
        self.seen += num_images + len(messages)
        self.failures += len(messages)
        for message in messages:
            if message not in self.files:
                self.files.add(message)
                tqdm.write(f"skipped an unreadable image: {message}")
        if self.failures > max(8, 0.25 * self.seen):
            raise UserError(f"--data: {self.failures} of {self.seen} images are unreadable, such as {messages[-1]}")

    def gather(self) -> None:
        """Let the first process know of what all have met: it reports."""
        self.files |= set(gather_lists(sorted(self.files)) or ())


class Trainer:
    """The state of a run, and its step. A script says in a subclass what the loss is.

    `model` is the bare model, `runner` what is called: under DDP, compiled. `parts` are the modules a checkpoint holds,
    by the names they have there. Group learning rates are the schedule's times the group's `lr_scale`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        parts: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        loader: DataLoader,
        accumulate: int,
        world: World,
    ):
        self.args, self.parts, self.optimizer, self.loader = args, parts, optimizer, loader
        self.accumulate, self.world = accumulate, world
        self.model = model
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.ddp = DistributedDataParallel(model) if world.size > 1 else None
        self.runner = self.ddp or model
        if args.compile:
            self.runner = torch.compile(self.runner, dynamic=False)  # all batches are of one size
        self.steps_per_epoch = len(loader) // accumulate
        if not self.steps_per_epoch:
            raise UserError(f"--batch-size {args.batch_size} is more than the {len(loader.dataset)} images to train on")
        self.total_steps = args.epochs * self.steps_per_epoch
        self.peak_lr = args.lr if args.lr is not None else args.blr * args.batch_size / 256
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.waited = 0.0  # seconds, for data
        self.unreadable = Unreadable()

    # What a script says:

    def loss(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch and statistics (K,), detached, to be averaged over the batch and all processes."""
        raise NotImplementedError

    def example(self) -> tuple[Tensor, ...]:
        """A micro-batch of noise, to time the step with."""
        raise NotImplementedError

    def metrics(self, statistics: Tensor) -> dict[str, Tensor]:
        """Scalars to log, from the averaged statistics (K,)."""
        return {}

    def schedule(self, step: int) -> dict[str, float]:
        """What changes with the step: the learning rate."""
        warmup = self.args.warmup_epochs * self.steps_per_epoch
        return dict(lr=warmup_cosine(step, peak=self.peak_lr, total=self.total_steps, warmup=warmup))

    def progress(self, row: dict[str, float]) -> dict[str, str]:
        """What the bar shows of a step."""
        return dict(loss=f"{row['loss']:.3f}")

    def after_step(self, settings: dict[str, float]) -> None:
        """What follows each optimizer step that was taken; `settings` are the schedule's."""

    def micro_batches(self, batches: Iterator) -> Iterator[tuple[Tensor, ...]]:
        """What `loss` gets, for each micro-batch of one step: images (b, C, H, W), uint8, and labels (b,)."""
        for _ in range(self.accumulate):
            start = time.perf_counter()
            images, labels, messages = next(batches)
            self.waited += time.perf_counter() - start
            self.unreadable.count(len(images), messages)
            yield images, labels

    # What is the same for all:

    def backward(self, *batch: Tensor, last: bool) -> Tensor:
        """Add the gradients of one micro-batch; returns the loss and the statistics, detached: (1 + K,)."""
        sync = contextlib.nullcontext() if last or self.ddp is None else self.ddp.no_sync()
        with sync:
            loss, statistics = self.loss(*batch)
            (loss / self.accumulate).backward()
        return torch.cat([loss.detach()[None], statistics])

    def train_step(self, batches: Iterator) -> dict[str, float]:
        """One optimizer step on `accumulate` micro-batches; skipped if anything is not finite."""
        settings = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = settings["lr"] * group["lr_scale"]
        # What drop path and the like draw from; each process draws its own.
        seed_generators(self.world.device, self.args.seed, "step", self.step, self.world.rank)
        total = torch.zeros((), device=self.world.device)
        for i, batch in enumerate(self.micro_batches(batches)):
            total = total + self.backward(*batch, last=i == self.accumulate - 1) / self.accumulate
        grad_norm = nn.utils.clip_grad_norm_(self.trainable, self.args.clip_grad or math.inf)

        # DDP has averaged the gradients and this the rest: all processes see, and decide, the same. Reading the numbers
        # waits for the device, once a step: a step that is not finite must not reach the weights.
        total = mean_over_processes(total)
        metrics = dict(loss=total[0], **self.metrics(total[1:]), grad_norm=grad_norm)
        metrics = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
        self.step += 1
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            self.optimizer.step()
            self.after_step(settings)
            self.skipped_in_a_row = 0
        else:
            self.skip()
        self.optimizer.zero_grad()
        return metrics

    def skip(self) -> None:
        """Count a step that was not taken. Raises UserError after too many in a row."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"the loss was not finite {MAX_SKIPPED_IN_A_ROW} steps in a row (step {self.step}): lower --blr or "
                "--lr, or use --precision fp32. The last checkpoint is from before"
            )

    def check_finite(self) -> None:
        """Raise UserError where a step of finite gradients has led to weights that are not: none of it is saved."""
        bad = not_finite(self.state())
        if bad:
            raise UserError(
                f"{bad[0]} is no longer finite (step {self.step}): lower --blr or --lr. The last checkpoint is from "
                "before"
            )

    def train_epoch(self, epoch: int, steps: int) -> dict[str, Any]:
        """`steps` steps of epoch number `epoch` (from 0); returns the row for metrics.jsonl."""
        self.model.train()
        self.loader.sampler.set_epoch(epoch)
        self.waited = 0.0
        batches, rows, start = iter(self.loader), [], time.perf_counter()
        bar = tqdm(range(steps), f"epoch {epoch + 1}/{self.args.epochs}", leave=False, disable=not self.world.is_main)
        for _ in bar:
            rows.append(self.train_step(batches))
            bar.set_postfix(self.progress(rows[-1]))
        seconds = time.perf_counter() - start
        if self.ddp is not None:  # BatchNorm's statistics are the first one's: what is saved is what is scored
            for buffer in self.model.buffers():
                dist.broadcast(buffer, src=0)
            self.unreadable.gather()
        self.check_finite()
        good = [row for row in rows if all(map(math.isfinite, row.values()))]
        mean = {name: sum(row[name] for row in good) / len(good) if good else None for name in rows[0]}
        row = dict(epoch=epoch + 1, step=self.step, loss=mean.pop("loss"), **self.schedule(self.step - 1), **mean)
        return row | dict(
            skipped=self.skipped,
            images_per_second=steps * self.args.batch_size / seconds,
            data_wait=self.waited / seconds,
        )

    def seconds_per_step(self) -> float:
        """Time a few forward and backward passes on noise, without a step: what the run will take."""
        example = self.example()
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]  # BatchNorm's would move
        for i in range(5):
            if i == 2:  # the first ones are slow: allocation, compilation
                start = time.perf_counter()
            self.backward(*example, last=True)[0].item()
            self.optimizer.zero_grad()
        seconds = (time.perf_counter() - start) / 3 * self.accumulate
        for buffer, value in buffers:
            buffer.copy_(value)
        return seconds

    def describe_steps(self) -> str:
        """Two lines on what is about to happen, and how long it will take here."""
        args = self.args
        rate = "--lr" if args.lr is not None else f"{args.blr:g} * {args.batch_size} / 256"
        seconds = self.seconds_per_step() * (self.total_steps - self.step)
        return (
            f"steps   {self.total_steps:,}, each {args.batch_size} images = {self.world.size} process(es) x "
            f"{self.accumulate} micro-batch(es) x {self.loader.batch_size}; "
            f"peak learning rate {self.peak_lr:.3g} = {rate}\n"
            f"time    about {duration(seconds)} on {self.world.device}"
        )

    def mishaps(self, unreadable: set[str]) -> str:
        """What went wrong on the way, in sentences to put behind a summary: skipped steps, `unreadable` files."""
        text = f" {self.skipped} steps were skipped because something was not finite." if self.skipped else ""
        return text + (f" {len(unreadable)} unreadable images were passed over." if unreadable else "")

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs. Random draws are seeded by step and image: there is no generator state."""
        return {name: part.state_dict() for name, part in self.parts.items()} | dict(
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            skipped=self.skipped,
            skipped_in_a_row=self.skipped_in_a_row,
            unreadable=sorted(self.unreadable.files),
        )

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned. Raises UserError where it does not fit, or is not finite."""
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.optimizer.load_state_dict(state["optimizer"])
            for parameter, moments in self.optimizer.state.items():
                for name, value in moments.items():
                    if name != "step" and value is not None and value.shape != parameter.shape:
                        raise ValueError(f"{name} is {tuple(value.shape)} there, {tuple(parameter.shape)} here")
            self.step, self.skipped = int(state["step"]), int(state["skipped"])
            self.skipped_in_a_row = int(state["skipped_in_a_row"])
            self.unreadable.files = set(state.get("unreadable", ()))
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            detail = (str(error).splitlines() or [type(error).__name__])[-1].strip()  # torch lists, the last is enough
            raise UserError(f"the checkpoint does not fit this version of the model ({detail})") from None
        bad = not_finite(self.state())
        if bad:
            raise UserError(f"the checkpoint holds NaN or infinity ({bad[0]}): go back to an earlier one")


def fit(
    trainer: Trainer,
    run: dict[str, Any],
    checkpoint: dict[str, Any] | None,
    announce: Callable[[], str],
    score: Callable[[int, bool], dict[str, float]],
    describe: Callable[[dict[str, Any]], str],
    best: str | None = None,
) -> list[dict[str, Any]]:
    """Train to the end, from the start or from where `checkpoint` was written; returns the rows of the log.

    `run` is what a checkpoint holds besides the trainer's state; `announce` says what is about to happen.
    `score(epoch, is_last)` runs on all processes, at the start (epoch 0) and after each epoch; the first one's result
    joins the row that `describe` puts into words. The epoch with the highest score of name `best` is kept in best.pt.
    """
    args, world = trainer.args, trainer.world
    epoch, history = 0, []
    check_agreement(dict(num_images=run["num_images"], epoch=(checkpoint or {}).get("epoch")), world)
    if checkpoint is not None:
        if checkpoint["num_images"] != run["num_images"]:
            raise UserError(
                f"--data has {run['num_images']} images here, {checkpoint['num_images']} in the run to resume"
            )
        trainer.load_state(checkpoint)
        epoch, history = checkpoint["epoch"], checkpoint["history"]

    announcement = announce()  # by all processes: it times their steps
    temporary = tempfile.TemporaryDirectory() if args.dry_run else contextlib.nullcontext(args.out)
    with resumable(args, world), temporary as folder, contextlib.ExitStack() as held:
        out = Path(folder)
        if world.is_main:
            held.enter_context(prepare_folder(args, out))
            print(announcement)

        def save() -> None:
            """Log, then checkpoints, which hold the log too: a resumed run writes it anew from there."""
            content = run | dict(epoch=epoch, history=history) | trainer.state()
            write_log(out / "metrics.jsonl", history)
            scores = [row[best] for row in history if math.isfinite(row[best])] if best else []
            if scores and history[-1][best] == max(scores):
                save_checkpoint(out / "best.pt", {name: content[name] for name in content if name != "optimizer"})
            save_checkpoint(out / "last.pt", content)

        if checkpoint is None:
            scores = score(0, False)
            if world.is_main:
                history += [dict(epoch=0, step=0) | scores] if scores else []
                save()  # --resume works from the first moment
        elif world.is_main:
            write_log(out / "metrics.jsonl", history)
            if best:
                take_best(Path(args.resume or out / "last.pt").with_name("best.pt"), out / "best.pt", history, best)

        steps, last = trainer.steps_per_epoch, args.epochs
        if args.dry_run:
            steps, last = min(2, steps), epoch + 1
        while epoch < last:
            row = trainer.train_epoch(epoch, steps)
            epoch += 1
            row |= score(epoch, epoch == last)
            if world.is_main:
                history.append(row)
                save()
                tqdm.write(describe(row))
    return history


# --- evaluation -------------------------------------------------------------------------------------------------------


def gather_lists(items: list[Any]) -> list[Any] | None:
    """The lists of all processes, one behind the other, for the first process; None for the others."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(items, lists)
    return None if lists is None else list(itertools.chain(*lists))


@torch.no_grad()
def predict(
    function: Callable[[Tensor], Tensor],
    loader: DataLoader,
    normalize: nn.Module,
    precision: str,
    unreadable: Unreadable,
) -> tuple[Tensor, Tensor] | None:
    """`function` of every readable image, each exactly once, and the labels: float32 (n, ...), (n,), on the CPU.

    Each process works on its share of the images (`data.evaluation_loader` deals them out). The first one gets the
    results of all, the others None.
    """
    device = normalize.mean.device
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    results: list[tuple[Tensor, Tensor]] = []
    for images, labels, messages in tqdm(loader, "scoring", leave=False, disable=not is_main):
        unreadable.count(int((labels >= 0).sum()), messages)
        with autocast(device, precision):
            outputs = function(normalize(images)).float().cpu()
        results.append((outputs[labels >= 0], labels[labels >= 0]))
    unreadable.gather()
    results = gather_lists(results)
    if results is None:
        return None
    all_outputs, all_labels = (torch.cat(parts) for parts in zip(*results, strict=True))
    if not len(all_labels):
        raise UserError("--data: not one of the images to score can be read")
    return all_outputs, all_labels


def topk_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share of labels (n,) among the `k` largest of their logits (n, classes); all of them where there are fewer."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).any(dim=1).double().mean().item()


def class_accuracy(logits: Tensor, labels: Tensor) -> list[tuple[int, float]]:
    """Per class, how many images it has and the share of them that is right (nan where it has none)."""
    right = (logits.argmax(dim=1) == labels).double()
    counts = torch.bincount(labels, minlength=logits.shape[1])
    hits = torch.bincount(labels, weights=right, minlength=logits.shape[1])
    return list(zip(counts.tolist(), (hits / counts).tolist(), strict=True))


def count_macs(model: nn.Module, image: Tensor, backward: bool = False) -> int:
    """Multiply-accumulates of convolutions, linear layers and attention products for one image (1, C, H, W).

    With `backward` also those of the gradients of its output's `loss`. Counted on a copy without storage: there,
    attention is two matrix products that torch's counter sees.
    """
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = copy.deepcopy(model).to("meta").eval()(image.to("meta"))
        if backward:
            output.loss.backward()
    return counter.get_total_flops() // 2


def take_turns(functions: list[Callable[[], Any]], device: torch.device, rounds: int = 7) -> list[list[float]]:
    """Seconds that each function takes in each of some rounds, in which they take turns: whatever slows the machine
    down for a while slows down all of them. One round more, before the others, warms up.
    """

    def seconds(function: Callable[[], Any]) -> float:
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        return time.perf_counter() - start

    times = [[seconds(function) for function in functions] for _ in range(rounds + 1)][1:]
    return [list(times_of_one) for times_of_one in zip(*times, strict=True)]


@torch.no_grad()
def images_per_second(functions: list[Callable[[], Any]], batch_size: int, device: torch.device) -> list[float]:
    """Median speed of each function, which takes `batch_size` images, measured by turns."""
    return [batch_size / median(times) for times in take_turns(functions, device)]


def standardise(bank: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, D) with the bank's mean and deviation taken out, so that what all share says nothing."""
    mean, std = bank.mean(dim=0), bank.std(dim=0) + 1e-6
    return (bank - mean) / std, (queries - mean) / std


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int = 20) -> float:
    """Accuracy in [0, 1] of a vote among the `k` nearest of a bank (n, D), weighted by exp(cosine / .07) as in DINO."""
    bank, queries = (F.normalize(x, dim=1) for x in standardise(bank, queries))
    num_right = 0
    for some, labels in zip(queries.split(1000), query_labels.split(1000), strict=True):  # n x n would not fit
        similarity, neighbours = (some @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(some), int(bank_labels.max()) + 1, device=some.device)
        votes.scatter_add_(1, bank_labels[neighbours], (similarity / 0.07).exp())
        num_right += (votes.argmax(dim=1) == labels).sum().item()
    return num_right / len(queries)


def linear_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, ridge: float = 1.0
) -> float:
    """Accuracy in [0, 1] of the linear classifier that ridge regression of one-hot labels on the bank gives.

    A linear probe without a learning rate to tune: W = (X'X + ridge I)^-1 X'Y, with a column of ones for the bias.
    """
    bank, queries = (F.pad(x.cpu().double(), (0, 1), value=1.0) for x in standardise(bank, queries))
    targets = F.one_hot(bank_labels.cpu()).double()
    weights = torch.linalg.solve(bank.T @ bank + ridge * torch.eye(bank.shape[1]).double(), bank.T @ targets)
    return ((queries @ weights).argmax(dim=1) == query_labels.cpu()).double().mean().item()


# --- files of a run ---------------------------------------------------------------------------------------------------


def claim(out: Path) -> BinaryIO:
    """Take a run folder for this process, until the file returned is closed or the process ends, however it does.

    Raises UserError where another process has taken it. Of two that start at the same instant both may pass. Nothing is
    guarded on file systems that have no locks, and on Windows, which at least does not move a folder with an open file.
    """
    file = open(out / "args.json", "r+b")
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"a run that is still going writes to {out}: end it, or choose another --out") from None
    except OSError:
        pass  # there are no locks here
    return file


def prepare_folder(args: argparse.Namespace, out: Path) -> BinaryIO:
    """Make and claim the run folder; a run that is there already, and not to be continued, is moved aside."""
    last = out / "last.pt"
    try:
        if (out / "args.json").exists():
            claim(out).close()
        if last.exists() and (args.resume is None or not last.samefile(args.resume or last)):
            numbers = (out.with_name(f"{out.name}-{i}") for i in itertools.count(1))
            aside = next(folder for folder in numbers if not folder.exists())
            out.rename(aside)
            print(f"the run that was in {out} is now in {aside} (to continue a run: --resume)")
        out.mkdir(parents=True, exist_ok=True)
        for name in ("args.json", "metrics.jsonl", "last.pt", "best.pt"):
            temporary_name(out / name).unlink(missing_ok=True)  # of a run that was killed while it wrote
    except (OSError, ValueError) as error:  # ValueError: "." has no name to add a number to
        raise UserError(f"--out {out} cannot be written ({reason(error)})") from None
    replace_file(out / "args.json", lambda file: file.write((json.dumps(vars(args), indent=2) + "\n").encode()))
    return claim(out)


def best_checkpoint(out: str) -> Path:
    """The checkpoint of the best epoch of a run, where there is one, else the last."""
    best = Path(out) / "best.pt"
    return best if best.exists() else best.with_name("last.pt")


def take_best(source: Path, path: Path, history: list[dict[str, Any]], best: str) -> None:
    """A run continued in another folder needs the best epoch so far there, too, if that is what `source` holds."""
    if source.is_file() and not path.exists():
        try:
            content = load_checkpoint(source)
        except UserError as error:
            print(f"the best epoch so far is lost: {error}")
            return
        scores = {row["epoch"]: row[best] for row in history if math.isfinite(row[best])}
        if scores and scores.get(content.get("epoch")) == max(scores.values()):
            save_checkpoint(path, content)


def temporary_name(path: Path) -> Path:
    """Where a file is written before it is whole: beside it, also where a name is empty, and cannot be replaced."""
    return path.parent / (path.name + ".tmp")


def replace_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file whole or not at all: to a temporary one beside it, flushed to disk, then renamed.

    Raises UserError where the disk is full or the folder not writable; what was there before is unharmed.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides what happened behind RuntimeErrors of its own
        while isinstance(error, RuntimeError) and error.__context__:
            error = error.__context__
        if isinstance(error, KeyboardInterrupt):
            raise error from None
        unharmed = "; an earlier version of it is unharmed" if path.exists() else ""
        raise UserError(f"cannot write {path} ({reason(error)}){unharmed}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them, nothing else: it must load with `weights_only=True`."""
    replace_file(path, lambda file: torch.save(content, file))


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    """metrics.jsonl: one JSON object per epoch. JSON has no NaN or infinity: null stands for them."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    lines = [json.dumps({name: plain(value) for name, value in row.items()}) + "\n" for row in rows]
    replace_file(path, lambda file: file.write("".join(lines).encode()))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, ours or a public one, to the CPU without running anything a pickle may hold. Raises UserError.

    The settings that many public files hold as argparse.Namespace are plain values in a wrapper, and let in.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        check_container(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(content, path)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not loaded: it is no checkpoint, or holds more than tensors and values") from None
    except Exception as error:  # on damaged files torch's unpickler raises nearly every kind
        what = "is damaged or no checkpoint"
        if is_out_of_memory(error):
            what = "needs more memory than there is, or is damaged"
        raise UserError(f"{path} {what} ({reason(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def check_container(path: Path) -> None:
    """Raise ValueError for a file that would grow when read: a few kilobytes can ask for all of the memory.

    torch compresses nothing, and the parts of its zip files are no larger than the file. And of all that its safe
    reader may call, `bytearray` is the one that fills memory by a number alone.
    """
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise ValueError("it is compressed, as no checkpoint is")
            if sum(part.file_size for part in parts) > path.stat().st_size:
                raise ValueError("its parts claim to be larger than the file")
        elif not path.stat().st_size:
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"bytearray\n") >= 0:
                raise ValueError("it holds a bytearray, which no checkpoint needs")


def check_tensors(content: Any, path: Path) -> None:
    """Raise ValueError for tensors without all of their numbers in the file: a copy of one could fill the memory."""
    storages = {}
    for name, tensor in named_tensors(content):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{name} is not a plain tensor")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise ValueError(f"{name} claims {tuple(tensor.shape)}, more numbers than the file has for it")
    if sum(storages.values()) > path.stat().st_size:
        raise ValueError("its tensors claim to be larger than the file")


def named_tensors(content: Any, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """All tensors at any depth of dicts and lists, by where they are: student.blocks.0.norm1.weight, ...

    What is there several times is entered once: a small file can hold lists of lists of the same list without end.
    """
    seen = set() if seen is None else seen
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, dict | list | tuple) and id(content) not in seen:
        seen.add(id(content))
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from named_tensors(value, f"{name}.{key}" if name else str(key), seen)


def not_finite(content: Any) -> list[str]:
    """The names of the tensors, at any depth of dicts and lists, that hold NaN or infinity."""
    return [name for name, tensor in named_tensors(content) if not tensor.isfinite().all()]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file as timm's are published: length of a JSON header, the header, then the raw numbers."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    dtypes |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
    dtypes |= {"BOOL": torch.bool}
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    spans = [entry["data_offsets"] for entry in header.values()]
    if any(first < 0 or last < first for first, last in spans) or sum(b - a for a, b in spans) > len(content):
        raise ValueError("its tensors claim to be larger than the file")
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if entry["dtype"] not in dtypes:
            raise ValueError(f"{name} holds numbers of a kind that no ViT has: {entry['dtype']}")
        numbers, dtype = bytearray(content[start + first : start + last]), dtypes[entry["dtype"]]
        flat = torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def check_settings(saved: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Refuse to resume `saved` settings with other `wanted` ones; the error names each difference."""
    differing = [name for name in wanted if wanted[name] != saved.get(name)]
    if differing:
        flags = ", ".join(f"--{n.replace('_', '-')} {saved.get(n)} there, {wanted[n]} here" for n in differing)
        raise UserError(f"{path} was made with other settings: {flags}. Use its settings, or another --out folder")


def duration(seconds: float) -> str:
    """A time in words: 42 seconds, 5 minutes, 1.7 hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
