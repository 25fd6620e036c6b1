"""What a run needs that is not the method: command line, processes, seeds, schedules, optimizer, checkpoints, logs."""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class UserError(Exception):
    """A mistake of the user's: one sentence naming the flag or file and what to do. Ends a script with exit code 2."""


def reason(error: Exception) -> str:
    """The first line of an error's text; its kind where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def launch(main: Callable[[], None]) -> None:
    """Run a script's `main`: a UserError ends as one line on stderr, Ctrl-C and SIGTERM as a short goodbye."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both arrive as KeyboardInterrupt
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():  # not after an error: the others may never come to say goodbye
        dist.destroy_process_group()


# --- command line -----------------------------------------------------------------------------------------------------


def parse_arguments(
    parser: argparse.ArgumentParser, recipes: dict[str, dict[str, Any]], argv: list[str] | None = None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse with three layers, the later one wins: the parser's defaults, `--recipe`, the flags given.

    Returns the arguments and the given ones alone: what a resumed run must agree with.
    """
    defaults = vars(parser.parse_args([]))
    unset = object()
    parsed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in parsed.items() if value is not unset}
    recipe = recipes[given.get("recipe", defaults["recipe"])]
    return argparse.Namespace(**(defaults | recipe | given)), given


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
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device} cannot be used here ({reason(error)})") from None
    if "RANK" in os.environ:
        backend = "nccl" if chosen.type == "cuda" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))  # the others wait while one scores and saves
    return World(rank, max(size, 1), chosen, local_rank)


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


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """bf16 autocast for `bf16`, none for `fp32`; `auto` is bf16 on CUDA cards that have it."""
    if precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp32"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# --- optimisation -----------------------------------------------------------------------------------------------------


def warmup_cosine(step: float, *, peak: float, total: float, warmup: float, final: float = 0.0) -> float:
    """Learning rate at `step`: linear from 0 to `peak` over `warmup`, then half a cosine down to `final` at `total`."""
    if step < warmup:
        return peak * step / warmup
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def ema_momentum(step: float, *, base: float, total: float) -> float:
    """EMA momentum at `step`: half a cosine from `base` up to 1 at `total` (BYOL, DINO)."""
    return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * step / total))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; biases, norms, class, mask and position tokens do not."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_token = name.endswith(("cls_token", "mask_token", "pos_embed"))
            (free if parameter.ndim < 2 or is_token else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def batch_sizes(args: argparse.Namespace, world: World) -> tuple[int, int]:
    """Images at once in one process, and how many times gradients accumulate to make `--batch-size`."""
    if args.batch_size % world.size:
        raise UserError(f"--batch-size {args.batch_size} is not divisible by the {world.size} processes")
    share = args.batch_size // world.size
    micro_batch = min(args.micro_batch or share, share)
    if share % micro_batch:
        raise UserError(f"--micro-batch {micro_batch} does not divide the {share} images a process takes each step")
    return micro_batch, share // micro_batch


# --- evaluation -------------------------------------------------------------------------------------------------------


def standardise(bank: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, D) with the bank's mean and deviation taken out, so that what all share says nothing."""
    mean, std = bank.mean(dim=0), bank.std(dim=0) + 1e-6
    return (bank - mean) / std, (queries - mean) / std


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int = 20) -> float:
    """Accuracy in [0, 1] of a vote among the `k` nearest of a bank (n, D), weighted by exp(cosine / .07) as in DINO."""
    bank, queries = (F.normalize(x, dim=1) for x in standardise(bank, queries))
    similarity, neighbours = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1, device=queries.device)
    votes.scatter_add_(1, bank_labels[neighbours], (similarity / 0.07).exp())
    return (votes.argmax(dim=1) == query_labels).float().mean().item()


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


def prepare_folder(args: argparse.Namespace, out: Path) -> Path:
    """Make the run folder; a run that is there already, and is not to be continued, is moved aside, not overwritten."""
    last = out / "last.pt"
    try:
        if last.exists() and (args.resume is None or not last.samefile(args.resume or last)):
            numbers = (out.with_name(f"{out.name}-{i}") for i in itertools.count(1))
            aside = next(folder for folder in numbers if not folder.exists())
            out.rename(aside)
            print(f"the run that was in {out} is now in {aside} (to continue a run: --resume)")
        out.mkdir(parents=True, exist_ok=True)
        (out / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    except (OSError, ValueError) as error:  # ValueError: "." has no name to add a number to
        raise UserError(f"--out {out} cannot be written ({reason(error)})") from None
    return out


def replace_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file whole or not at all: to a temporary one beside it, flushed to disk, then renamed.

    Raises UserError where the disk is full or the folder not writable; what was there before is unharmed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when the disk is full
        raise UserError(f"cannot write {path} ({reason(error)}); an earlier version of it is unharmed") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them, nothing else: it must load with `weights_only=True`."""
    replace_file(path, lambda file: torch.save(content, file))


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    """metrics.jsonl: one JSON object per epoch."""
    replace_file(path, lambda file: file.write("".join(json.dumps(row) + "\n" for row in rows).encode()))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU without running anything that a pickle may hold. Raises UserError."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not loaded: it is no checkpoint, or holds more than tensors and values") from None
    except Exception as error:  # on damaged files torch's unpickler raises nearly every kind
        raise UserError(f"{path} is damaged or no checkpoint ({reason(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


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
