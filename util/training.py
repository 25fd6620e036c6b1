"""Helpers of the three training loops: flags, processes, batches, seeds, precision, schedules, parameter groups."""

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
    """Parse a number in [0, 1], as a flag's type."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {text}")
    return float(text)


def positive(text: str) -> int:
    """Parse an integer of at least 1, as a flag's type."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return int(text)


def add_flags(add: Callable[..., Any], *, epochs: int, batch_size: int, blr: float, warmup: str, drawn: str) -> None:
    """Add the flags of the optimisation, with a script's defaults.

    For the help texts (%% stands for %): `warmup` is the default warm-up, although the flag is None, and `drawn` lists
    what is drawn per micro-batch.
    """
    micro = "images per forward pass and process; gradients accumulate (default: no accumulation). "
    micro += f"Each forward pass draws anew: {drawn}"
    linear = "epochs of linear warm-up"
    add("--epochs", type=positive, default=epochs, help="number of epochs")
    add("--batch-size", type=positive, default=batch_size, help="images per step, over all processes")
    add("--micro-batch", type=positive, help=micro)
    add("--blr", type=float, default=blr, help="base learning rate: lr = blr * batch size / 256")
    add("--warmup-epochs", type=float, help=f"{linear} (default: {warmup}; also used if not less than --epochs)")
    add("--weight-decay", type=float, default=0.05, help="weight decay of matrices, not of biases, norms and tokens")
    add("--clip-grad", type=float, default=1.0, help="gradient clipping threshold (total norm); 0: off")


def add_drop_path_flag(add: Callable[..., Any]) -> None:
    """Add `--drop-path`, a flag of all three training scripts."""
    text = "stochastic depth: probability to skip a branch of the last block (less in the blocks below)"
    add("--drop-path", type=ratio, default=0.0, metavar="RATE", help=text)


# --- processes --------------------------------------------------------------------------------------------------------

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among all processes of torchrun, or the single process without torchrun."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1  # processes on this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Return whether torchrun started this process, even a single one."""
        return dist.is_initialized()

    @property
    def hides_bars(self) -> bool | None:
        """Return tqdm's `disable`: None in the main process (a bar only on a terminal), True in the others."""
        return None if self.is_main else True

    def describe(self) -> str:
        """Describe processes, device and threads."""
        text = f"{self.size} process(es) on {self.device.type}"
        if self.device.type == "cpu":
            text += f", each with {torch.get_num_threads()} thread(s)"
            if sys.platform == "linux" and "GOMP_SPINCOUNT" in os.environ:
                text += f", GOMP_SPINCOUNT={os.environ['GOMP_SPINCOUNT']}"
        return text


def start_world(device: str) -> World:
    """Join the processes of torchrun, if any, and choose the device: `auto`, `cpu`, `cuda`, `mps`, ...

    Without RANK, the other variables come from a job script and are ignored. Ends the script if the device is not
    available or a variable is missing.
    """
    launched = bool(os.environ.get("RANK"))
    missing = [name for name in TORCHRUN if not os.environ.get(name)]
    if launched and missing:
        raise SystemExit(f"error: the environment has RANK but not {', '.join(missing)}: use torchrun or unset RANK")
    rank, local_rank, size, local_size = (int(os.environ[name]) for name in TORCHRUN[:4]) if launched else (0, 0, 1, 1)
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator is not None else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank}"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"error: --device {device} is not available ({error})") from None
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if launched and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") and dist.is_nccl_available() else "gloo")
    return World(rank, size, torch.device(device), local_size)


def end_world() -> None:
    """Shut down the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the average of a tensor over all processes. Overwrites `values`."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


def gather_lists(items: list[Any]) -> list[Any]:
    """Concatenate the lists of all processes."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for of_one_process in lists for item in of_one_process]


def batch_sizes(batch_size: int, micro_batch: int | None, world: World) -> tuple[int, int]:
    """Return the micro-batch size and the number of micro-batches per step and process.

    `batch_size` counts the images of a step over all processes. Ends the script if it cannot be divided evenly.
    """
    local_batch = batch_size // world.size
    micro_batch = min(micro_batch or local_batch, local_batch)
    if not local_batch or local_batch * world.size != batch_size or local_batch % micro_batch:
        raise SystemExit(
            f"error: {batch_size} images per step are not divisible by {world.size} process(es) x micro-batches of "
            f"{max(1, micro_batch)}: change --batch-size or --micro-batch"
        )
    return micro_batch, local_batch // micro_batch


def describe_steps(total: int, batch_size: int, micro_batch: int, accumulate: int, blr: float, world: World) -> str:
    """Describe number and size of the steps and the peak learning rate."""
    parts = f"{world.size} process(es) x {accumulate} micro-batch(es) of {micro_batch}"
    peak = f"{blr * batch_size / 256:.3g} = {blr:g} * {batch_size} / 256"
    return f"{total:,}, each {batch_size} images = {parts}; peak learning rate {peak}"


# --- batches and steps ------------------------------------------------------------------------------------------------


def batches(loader: DataLoader) -> Iterator[Any]:
    """Yield the batches of a loader.

    Too little memory, too many open files and unreadable images end the script with a one-line error.
    """
    try:
        yield from loader
    except UnreadableImage as error:  # from a loader's process, includes a traceback
        raise SystemExit(f"error: --data: {str(error).splitlines()[-1]}") from None
    except (RuntimeError, OSError) as error:
        signs = "DataLoader worker (pid", "No space left", "shared memory", "ancdata", "Too many open files"
        if not any(sign in str(error) for sign in signs):
            raise
        raise SystemExit(
            "error: the loader processes ran out of memory, shared memory (/dev/shm) or file descriptors: use fewer "
            f"--workers, or 0 to load in the main process ({str(error).splitlines()[-1]})"
        ) from None


def check_readable(unreadable: int, seen: int) -> None:
    """End the script if more than 8 and more than a quarter of the images are unreadable."""
    if unreadable > max(8, seen / 4):
        raise SystemExit(f"error: --data: {unreadable} of {seen} images are unreadable (named above)")


class Stopwatch:
    """Sum of the seconds spent in `with stopwatch:` blocks."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.seconds -= time.perf_counter()

    def __exit__(self, *exception: Any) -> None:
        self.seconds += time.perf_counter()


class StepGuard:
    """Skip steps whose loss or gradient is not finite; ten in a row end the script.

    All processes have the same metrics, so all decide alike.
    """

    def __init__(self):
        self.skipped_in_a_row = 0

    def allows(self, step: dict[str, float]) -> bool:
        """Return whether to apply the step with this `loss` and `grad_norm`."""
        if is_finite(step):
            self.skipped_in_a_row = 0
            return True
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == 10:
            raise SystemExit("error: loss or gradient not finite in ten steps in a row: --resume with a lower --blr")
        return False


def is_finite(step: dict[str, float]) -> bool:
    """Return whether loss and gradient norm are finite, whatever the other metrics."""
    return math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"])


# --- seeds and precision ----------------------------------------------------------------------------------------------


def derive_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed from the parts that identify a random draw, such as (seed, epoch, index).

    Because each draw is seeded by its place in the run, generator states need not be saved, restored or kept equal
    across processes.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a random generator on the CPU, seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_generators(device: torch.device, *parts: int | str) -> None:
    """Seed torch's default generators, of the CPU and of `device`, with `derive_seed(*parts)`.

    Faster than `torch.manual_seed`, which seeds every kind of device and takes milliseconds even without one.
    """
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy to a device without waiting.

    Copies to MPS wait, because PyTorch may free the source before it is read (pytorch#189690).
    """
    return x.to(device, non_blocking=torch.device(device).type != "mps")


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return bf16 autocast, enabled by `bf16`, or by `auto` on CUDA devices that support bf16."""
    if precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        precision = "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def compiled(model: nn.Module) -> nn.Module:
    """Compile a model with torch.compile, for batches of constant size."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise SystemExit("error: --compile needs a C++ compiler (g++, clang++), none found")
    return torch.compile(model, dynamic=False)


# --- schedules: functions of the global step --------------------------------------------------------------------------


def warmup_cosine(step: float, *, peak: float, total: float, warmup: float) -> float:
    """Return the learning rate: linear from 0 to `peak` over `warmup`, then half a cosine down to 0 at `total`."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def warmup_milestones(step: float, *, peak: float, milestones: list[float], warmup: float) -> float:
    """Return the learning rate: linear from 0 to `peak` over `warmup`, divided by 10 at each of `milestones`."""
    rate = peak * min(step / warmup, 1.0) if warmup else peak
    return rate * 0.1 ** sum(step >= milestone for milestone in milestones)


def ema_momentum(step: float, *, base: float, total: float) -> float:
    """Return the EMA momentum: half a cosine from `base` up to 1 at `total`, as in BYOL and DINO."""
    return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * step / total))


def start_momentum(total: float) -> float:
    """Return the default `base` of `ema_momentum` for a run of `total` steps: 1 - 30 / total.

    The teacher then first averages over about 1 / (1 - base) steps, a thirtieth of the run. The paper's averages
    over a ninth (0.9999, 93,600 steps). In short runs on small images, shorter averages are better (docs/study).
    """
    return max(0.0, 1 - 30 / total)


# --- parameter groups -------------------------------------------------------------------------------------------------


def layer_index(name: str, depth: int) -> int:
    """Return the layer of a ViT's parameter: 0 for embeddings, i + 1 for block i, depth + 1 for norm and head."""
    block = re.search(r"\bblocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if re.search(r"\b(cls_token|pos_embed|patch_embed)\b", name) else depth + 1


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Group trainable parameters: weight decay for matrices, not for biases, norms, class, mask and position tokens.

    `layer_decay` is the layer-wise learning-rate decay of BEiT and MAE: a group's `lr_scale` is
    layer_decay^(depth + 1 - layer_index), which is 1 for the head.
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
