"""What the three training loops share: flags, processes, batches, seeds, precision, schedules, parameter groups."""

import argparse
import contextlib
import hashlib
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from util.image_files import UnreadableImage

# --- flags ------------------------------------------------------------------------------------------------------------


def ratio(text: str) -> float:
    """A flag's number between 0 and 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def positive(text: str) -> int:
    """A flag's number of 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def add_flags(add: Callable[..., Any], *, epochs: int, batch_size: int, blr: float, warmup: str, drawn: str) -> None:
    """The flags of the optimisation, with a script's defaults; `drawn` is what is random in a micro-batch."""
    micro = f"images at once per process (default: all). Gradients accumulate; what is drawn differs ({drawn})"
    add("--epochs", type=int, default=epochs, help="passes over the data")
    add("--batch-size", type=int, default=batch_size, help="images per step, over all processes")
    add("--micro-batch", type=positive, help=micro)
    add("--blr", type=float, default=blr, help="learning rate per 256 images: lr = blr * batch size / 256")
    add("--warmup-epochs", type=float, help=f"epochs of linear warm-up (default, and if not below --epochs: {warmup})")
    add("--weight-decay", type=float, default=0.05, help="of matrices; none on biases, norms and tokens")
    add("--clip-grad", type=float, default=1.0, help="gradient clipping threshold (norm); 0: no clipping")


# --- processes --------------------------------------------------------------------------------------------------------

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among all those that torchrun started; a single one without it."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1  # processes on this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether torchrun started it, also as a single process."""
        return dist.is_initialized()

    @property
    def hides_bars(self) -> bool | None:
        """What `disable` of tqdm is to be: True in all processes but the first, None (not in a log file) there."""
        return None if self.is_main else True

    def describe(self) -> str:
        """Where it runs, in words."""
        text = f"{self.size} process(es) on {self.device.type}"
        if self.device.type == "cpu":
            text += f", each with {torch.get_num_threads()} thread(s)"
            if sys.platform == "linux" and "GOMP_SPINCOUNT" in os.environ:
                text += f", which wait for {os.environ['GOMP_SPINCOUNT']} turns before they sleep (GOMP_SPINCOUNT)"
        return text


def start_world(device: str) -> World:
    """Join the processes of torchrun, if it started this one, and choose the device: `auto`, `cpu`, `cuda`, `mps`...

    Without RANK the other variables are left over from a job script and do not count.
    """
    launched = bool(os.environ.get("RANK"))
    missing = [name for name in TORCHRUN if not os.environ.get(name)]
    if launched and missing:
        raise SystemExit(f"error: the environment has RANK but not {', '.join(missing)}: use torchrun, or unset RANK")
    rank, local_rank, size, local_size = (int(os.environ[name]) for name in TORCHRUN[:4]) if launched else (0, 0, 1, 1)
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator is not None else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank}"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"error: --device {device} cannot be used here ({error})") from None
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if launched and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") and dist.is_nccl_available() else "gloo")
    return World(rank, size, torch.device(device), local_size)


def end_world() -> None:
    """Leave the other processes in good order."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mean_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over all processes (itself where there is one)."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def gather_lists(items: list[Any]) -> list[Any]:
    """The lists of all processes, one behind the other."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for of_one_process in lists for item in of_one_process]


def batch_sizes(batch_size: int, micro_batch: int | None, world: World) -> tuple[int, int]:
    """Images at once in one process, and how many times gradients accumulate to make `--batch-size`."""
    local_batch = batch_size // world.size
    micro_batch = min(micro_batch or local_batch, local_batch)
    if not local_batch or local_batch * world.size != batch_size or local_batch % micro_batch:
        raise SystemExit(
            f"error: --batch-size {batch_size} is not {world.size} process(es) x some times --micro-batch {micro_batch}"
        )
    return micro_batch, local_batch // micro_batch


def describe_steps(total: int, batch_size: int, micro_batch: int, accumulate: int, blr: float, world: World) -> str:
    """Number and size of the steps and the peak learning rate, in words."""
    parts = f"{world.size} process(es) x {accumulate} x {micro_batch}"
    peak = f"{blr * batch_size / 256:.3g} = {blr:g} * {batch_size} / 256"
    return f"{total:,}, each {batch_size} images = {parts}; peak learning rate {peak}"


# --- batches and steps ------------------------------------------------------------------------------------------------


def batches(loader: DataLoader) -> Iterator[Any]:
    """A loader's batches. What its processes mostly die of, in a container or with few descriptors, gets one line."""
    try:
        yield from loader
    except UnreadableImage as error:  # one from a loader's process brings its traceback along
        raise SystemExit(f"error: --data: {str(error).splitlines()[-1]}") from None
    except (RuntimeError, OSError) as error:
        signs = "DataLoader worker (pid", "No space left", "shared memory", "ancdata", "Too many open files"
        if not any(sign in str(error) for sign in signs):
            raise
        raise SystemExit(
            "error: the processes that load data ran out of memory, shared memory (/dev/shm) or file descriptors: "
            f"take fewer --workers, 0 for none ({str(error).splitlines()[-1]})"
        ) from None


def check_readable(unreadable: int, seen: int) -> None:
    """Stop a run more than a quarter of whose images are unreadable."""
    if unreadable > max(8, seen / 4):
        raise SystemExit(f"error: --data: {unreadable} of {seen} images cannot be read (named above)")


class Stopwatch:
    """The seconds spent within `with stopwatch:`."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.seconds -= time.perf_counter()

    def __exit__(self, *exception: Any) -> None:
        self.seconds += time.perf_counter()


class StepGuard:
    """Keeps steps whose loss or gradient is not finite away from the weights; ten of them in a row end the run.

    All processes have the same numbers, so they decide the same.
    """

    def __init__(self):
        self.skipped_in_a_row = 0

    def allows(self, step: dict[str, float]) -> bool:
        """Whether the step with this `loss` and `grad_norm` is to be taken."""
        if is_finite(step):
            self.skipped_in_a_row = 0
            return True
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == 10:
            raise SystemExit("error: ten steps in a row not finite: repeat with --resume and a lower --blr")
        return False


def is_finite(step: dict[str, float]) -> bool:
    """Whether loss and gradient norm are finite; other logged numbers do not decide."""
    return math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"])


# --- seeds and precision ----------------------------------------------------------------------------------------------


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
    """bf16 autocast or none; `auto` is bf16 on CUDA cards that have it."""
    if precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        precision = "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def compiled(model: nn.Module) -> nn.Module:
    """torch.compile, for batches that are all of one size."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise SystemExit("error: --compile needs a C++ compiler (g++, clang++), and there is none")
    return torch.compile(model, dynamic=False)


# --- schedules: functions of the global step --------------------------------------------------------------------------


def warmup_cosine(step: float, *, peak: float, total: float, warmup: float) -> float:
    """Learning rate at `step`: linear from 0 to `peak` over `warmup`, then half a cosine down to 0 at `total`."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def warmup_milestones(step: float, *, peak: float, milestones: list[float], warmup: float) -> float:
    """Learning rate at `step`: linear from 0 to `peak` over `warmup`, a tenth of it after each of `milestones`."""
    rate = peak * min(step / warmup, 1.0) if warmup else peak
    return rate * 0.1 ** sum(step >= milestone for milestone in milestones)


def ema_momentum(step: float, *, base: float, total: float) -> float:
    """EMA momentum at `step`: half a cosine from `base` up to 1 at `total` (BYOL, DINO)."""
    return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * step / total))


def start_momentum(total: float) -> float:
    """The `base` of `ema_momentum` for a run of `total` steps: 1 - 30 / total.

    The teacher then remembers about 1 / (1 - base), a thirtieth, of the steps, at first. In the paper's run, of .9999
    in 93,600 steps, it is a ninth; in short ones of small images less is better (docs/study).
    """
    return max(0.0, 1 - 30 / total)


# --- parameter groups -------------------------------------------------------------------------------------------------


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
