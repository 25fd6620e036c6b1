"""Predict on paper how fast a GPU trains (the tables in docs/speed.md): PYTHONPATH=. python docs/predict.py

A training step runs on fake tensors, which have shapes but no values, under a dispatch mode that sees each operation
that PyTorch sends to a device. An operation that only makes a view does not count as a launch. Each launch takes the
time of its arithmetic or of its memory traffic, whichever is longer.
"""

import argparse
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import report

# From the datasheets: FLOP/s in bf16 without sparsity, bytes/s, GiB.
GPUS = {"H200": (989e12, 4.8e12, 131), "A100, 80 GB": (312e12, 2.0e12, 74)}
NAMES = dict(vit_small="ViT-S", vit_base="ViT-B", vit_large="ViT-L")
# Assumed: the fraction of the peak that is reached, and the seconds that the host takes for each launch.
REACHED, TRAFFIC, LAUNCH = dict(product=0.7, attention=0.35, other=1.0), 0.8, 7e-6
VIEWS = ("aten._unsafe_view", "aten.detach", "aten.alias", "aten.unbind", "aten.empty_like")
STEPS = [report.PRETRAINING[row] for row in (0, 2, 3, 4)]  # PCAE with two mask ratios, MAE, SimMIM


class Launch(NamedTuple):
    """One operation of a step. Bytes are those of its inputs and outputs."""

    name: str
    kind: str  # of REACHED
    flop: float
    moved: float


class Recorder(TorchDispatchMode):
    """Collect the launches."""

    def __init__(self):
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = str(op.overloadpacket)
        if name.startswith("aten.") and not op.is_view and name not in VIEWS:
            kind, flop = "other", 0.0
            if op.overloadpacket in flop_registry:
                kind, flop = "product", flop_registry[op.overloadpacket](*args, **(kwargs or {}), out_val=out)
            elif "attention" in name:  # two products; four in the backward pass
                batch, heads, n, width = args["backward" in name].shape
                kind, flop = "attention", 2 * batch * heads * n * n * width * (4 if "backward" in name else 2)
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.launches.append(Launch(name, kind, flop, sum(x.numel() * x.element_size() for x in tensors)))
        return out


class Step:
    """A training step in bf16: its launches, and what does not depend on the batch, in bytes."""

    def __init__(self, model: str, case: tuple, batch_size: int):
        args = argparse.Namespace(model=model, image_size=224, patch_size=16, decoder_dim=None)
        with FakeTensorMode(allow_non_fake_inputs=True):
            networks = report.build(args, *case[1:-2])
            images = torch.randint(256, (batch_size, 3, 224, 224), dtype=torch.uint8)
            run = report.training_step(networks, images, "bf16", compiled=False)
            run()  # makes the optimizer's moments
            kept: dict[int, int] = {}
            with torch.autograd.graph.saved_tensors_hooks(lambda x: remember(x, kept), lambda x: x):
                with Recorder() as recorder:
                    run()
        sizes = {name: parameter.numel() for name, parameter in networks.named_parameters()}
        teacher = sum(size for name, size in sizes.items() if name.startswith("teacher."))
        trained = sum(parameter.numel() for parameter in networks.parameters() if parameter.requires_grad)
        # A GPU handles all tensors of an update in a few launches. Bytes per weight: clipping reads each gradient, then
        # reads and writes it; AdamW reads weight, gradient and two moments and writes all but the gradient.
        updates = dict(clip=12 * trained, adamw=28 * trained, ema=12 * teacher)
        one_by_one = ("aten.linalg_vector_norm", "aten.mul_", "aten._fused_adamw_", "aten._foreach_lerp_")
        self.launches = [x for x in recorder.launches if x.name not in one_by_one]
        self.launches += [Launch(name, "other", 0.0, moved) for name, moved in updates.items() if moved]
        self.update_traffic = sum(updates.values())
        self.fixed_memory = 4 * sum(sizes.values()) + 12 * trained  # weights; gradients and two moments
        self.kept, self.batch_size = sum(kept.values()), batch_size
        self.flop = sum(x.flop for x in self.launches)
        self.traffic = sum(x.moved for x in self.launches)

    def seconds(self, peak: float, bandwidth: float, kinds: tuple[str, ...] = tuple(REACHED)) -> float:
        """Return how long the device works on launches of these kinds."""
        return sum(
            max(x.flop / (REACHED[x.kind] * peak), x.moved / (TRAFFIC * bandwidth))
            for x in self.launches
            if x.kind in kinds
        )


def remember(tensor: Tensor, storages: dict[int, int]) -> Tensor:
    """Note the size of a tensor's storage, each storage once."""
    storages[StorageWeakRef(tensor.untyped_storage()).cdata] = tensor.untyped_storage().nbytes()
    return tensor


def row_of_costs(model: str, case: tuple) -> tuple[list[str], float, int]:
    """Return cells on what a step costs on any GPU; bytes kept for backward per image; and those beside them."""
    one, two = Step(model, case, 64), Step(model, case, 128)
    kept = (two.kept - one.kept) / 64
    traffic = (two.traffic - one.traffic) / 64 / 2**20
    cells = [f"{one.flop / 64 / 2e9:.1f}", f"{len(one.launches):,}", f"{kept / 2**20:.0f} MiB", f"{traffic:,.0f} MiB"]
    return cells + [f"{one.update_traffic / 2**30:.2f} GiB"], kept, one.fixed_memory


def row_of_speeds(model: str, case: tuple, gpu: str, kept: float, fixed: int) -> list[str]:
    """Return cells on the speed at the largest batch of a power of two, 4096 at most, that fits in a GPU's memory."""
    peak, bandwidth, memory = GPUS[gpu]
    batch_size = 4096
    while batch_size * kept + fixed > memory * 2**30:
        batch_size //= 2
    step = Step(model, case, batch_size)
    device, host = step.seconds(peak, bandwidth), LAUNCH * len(step.launches)
    rate = batch_size / max(device, host)
    mfu, bound = (step.flop / time / peak for time in (device, step.seconds(peak, bandwidth, ("product", "attention"))))
    return [
        f"{batch_size:,}",
        f"{(batch_size * kept + fixed) / 2**30:.0f} GiB",
        f"{float(f'{rate:.2g}'):,.0f}",
        f"{mfu:.0%}",
        f"{bound:.0%}",
        f"{300 * report.IMAGENET / rate / 86_400:.2g}",
        f"{host / device * batch_size:.0f}",
    ]


def main() -> None:
    warnings.filterwarnings("ignore")  # FakeTensorMode's
    columns = ["GMACs/image", "launches", "kept for backward/image", "traffic/image", "traffic of updates"]
    tables = {"Any GPU": [["step", *columns]]}
    for gpu in GPUS:
        columns = ["batch", "memory", "images/s", "MFU", "MFU, products alone", "days", "bound by the host below"]
        tables[gpu] = [["step", *columns]]
    for model in NAMES:
        for case in STEPS:
            name = f"{NAMES[model]}, {case[0]}"
            cells, kept, fixed = row_of_costs(model, case)
            tables["Any GPU"].append([name, *cells])
            for gpu in GPUS:
                tables[gpu].append([name, *row_of_speeds(model, case, gpu, kept, fixed)])
    for title, (head, *rows) in tables.items():
        print(f"\n{title}\n")
        for row in (head, ["---"] * len(head), *rows):
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
