"""What PCAE costs: the poster's tables of properties, measured here, with the poster's numbers beside them.

    python benchmark.py                                             all of it, ViT-Small, in three minutes on 2 cores
    python benchmark.py pretrain --model vit_base                   one section, ViT-Base, on a CPU in ten minutes
    python benchmark.py --model vit_base --batch-size 256 --compile --markdown FILE.md          on a GPU

What is compared takes turns step by step, so that a machine that is busy for a while is so for both. Speeds are ratios
within each round: given are their median and, in brackets, the least and the greatest; a first row, compared with
itself, shows the noise. Beside them stands what the multiply-accumulates (MACs) alone predict. A training step is that
of `pretrain.py`: normalisation, split, forward, backward, clipping, AdamW and EMA, on random images ready in memory.
"""

import argparse
import copy
import functools
import itertools
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision.transforms as v1
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

import data
import engine
import finetune
import pretrain
from engine import UserError, World
from model import MODELS, PCAE, Classifier, ViT
from ptr import PTR, token_counts

LIGHT, HEAVY = dict(decoder_depth=2), dict(decoder_depth=8)  # blocks: the poster's PCAE, as inferred, and MAE's own


@dataclass
class Case:
    """A row: what to train, as settings of pretrain.py, and the poster's speed as a multiple of the first row's."""

    name: str
    settings: dict[str, Any]
    poster: float | None = None


# Table 4 of the poster gives 550.5, 739.7 and 876.1 images a second; its GPU days for 300 epochs are 10.1 for PCAE and
# 15.4 for MAE. It has no time for SimMIM.
PRETRAINING = [
    Case("PCAE, mask .75, decoder 2", dict(method="pcae", mask_ratio=0.75) | LIGHT, 1.0),
    Case("PCAE, mask .85, decoder 2", dict(method="pcae", mask_ratio=0.85) | LIGHT, 739.7 / 550.5),
    Case("PCAE, mask .90, decoder 2", dict(method="pcae", mask_ratio=0.90) | LIGHT, 876.1 / 550.5),
    Case("MAE, mask .75, decoder 8", dict(method="mae", mask_ratio=0.75) | HEAVY, 10.1 / 15.4),
    Case("SimMIM, mask .75", dict(method="simmim", mask_ratio=0.75)),
    Case("MAE, mask .75, decoder 2", dict(method="mae", mask_ratio=0.75) | LIGHT),
    Case("PCAE, mask .75, decoder 8", dict(method="pcae", mask_ratio=0.75) | HEAVY),
    Case("PCAE without PTR, decoder 2", dict(method="pcae", mask_ratio=0.75, drop_ratio=0.0) | LIGHT),
]
# Tables 6 and 7: stages and drop ratio. The first row is the paper's setting, which the others are compared with.
SCHEDULES = [(3, 0.5), (1, 0.875), (6, 0.29), (12, 0.16), (3, 0.37), (3, 0.415), (3, 0.47), (3, 0.536)]


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What one row took: seconds in each round, for `batch_size` images of `macs` multiply-accumulates each."""

    seconds: list[float]
    batch_size: int
    macs: int

    @property
    def images_per_second(self) -> float:
        return self.batch_size / median(self.seconds)

    def speed(self, reference: "Measured") -> tuple[float, float, float]:
        """How many times as fast as another row, round by round: median, least, greatest."""
        ratios = [theirs / ours for ours, theirs in zip(self.seconds, reference.seconds, strict=True)]
        return median(ratios), min(ratios), max(ratios)


def measure(
    args: argparse.Namespace, runs: list[Callable[[], Any]], macs: list[int], device: torch.device
) -> tuple[list[Measured], float]:
    """Time all runs by turns, and among them a product of two square matrices: the MACs a second to compare with."""
    size = 1536 if device.type == "cpu" else 8192
    precision = dict(fp32=torch.float32, bf16=torch.bfloat16)[engine.resolve_precision(device, args.precision)]
    a, b = torch.randn(2, size, size, device=device, dtype=precision)
    *seconds, of_product = engine.take_turns([*runs, lambda: a @ b], device, args.rounds)
    measured = [Measured(s, args.batch_size, m) for s, m in zip(seconds, macs, strict=True)]
    return measured, size**3 / median(of_product)


def kept_for_backward(model: nn.Module, images: Tensor) -> int:
    """Bytes that the forward pass of images (B, C, H, W) keeps for the backward pass."""
    storages: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        output = model(images)  # holds them all until they are counted
    total = sum(storages.values())
    del output
    return total


def activation_memory(args: argparse.Namespace, model: nn.Module, device: torch.device) -> int:
    """Bytes an image that training keeps from forward to backward: what two images need more than one.

    It is measured without compilation, which may keep less.
    """
    one, two = (torch.randn(count, 3, args.image_size, args.image_size, device=device) for count in (1, 2))
    with engine.autocast(device, args.precision):
        return kept_for_backward(model, two) - kept_for_backward(model, one)


def peak_memory(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a step needs at its peak besides what is there before it, weights and moments; not on a CPU."""
    before = torch.accelerator.memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    step()
    return torch.accelerator.max_memory_allocated(device) - before


# --- training steps ---------------------------------------------------------------------------------------------------


def training_step(
    args: argparse.Namespace, settings: dict[str, Any], world: World
) -> tuple[nn.Module, Callable[[], Any]]:
    """A model and its step as in pretrain.py, with some settings other than that script's defaults."""
    dim = args.decoder_dim or min(512, max(32, MODELS[args.model]["dim"] * 2 // 3 // 32 * 32))
    config = vars(pretrain.arguments().parse_args([])) | dict(
        model=args.model, image_size=[args.image_size], patch_size=args.patch_size, batch_size=args.batch_size,
        decoder_dim=dim, decoder_heads=max(1, dim // 32), precision=args.precision, compile=args.compile, lr=1e-5,
        epochs=10**6, warmup_epochs=0.0,
    )  # fmt: skip
    config = argparse.Namespace(**(config | settings))
    model, _ = pretrain.build_model(config)
    images = torch.randint(256, (args.batch_size, 3, args.image_size, args.image_size)).byte()
    loader = DataLoader(TensorDataset(images), args.batch_size)  # only its length is asked for
    trainer = pretrain.Trainer(config, model, loader, accumulate=1, world=world)
    batches = itertools.repeat((images.to(world.device), None, []))
    return model, functools.partial(trainer.train_step, batches)


def training_rows(args: argparse.Namespace, cases: list[Case], world: World) -> tuple[list[dict[str, Any]], float]:
    """A row for each case, each by turns with the first one, also that itself; and the matrix rate.

    By turns with all others would be shorter, but needs memory for the weights and moments of all of them at once.
    """
    image = torch.zeros(1, 3, args.image_size, args.image_size)
    first_model, first_step = training_step(args, cases[0].settings, world)
    rows, rates = [], []
    for case in cases:
        is_first = case is cases[0]
        model, step = (first_model, first_step) if is_first else training_step(args, case.settings, world)
        macs = [engine.count_macs(m, image, backward=True) for m in (first_model, model)]
        (first, one), rate = measure(args, [first_step, step], macs, world.device)
        rates.append(rate)
        row = {
            "trained": case.name,
            "teacher's tokens": describe_tokens(model),
            "GMACs forward": engine.count_macs(model, image) / 1e9,
            "GMACs a step": one.macs / 1e9,
            "images/s": one.images_per_second,
            "speed": one.speed(first),
            "by MACs": first.macs / one.macs,
            "poster": case.poster,
            "of matrix rate": one.macs * one.images_per_second / rate,
            "activations, MiB/image": activation_memory(args, model, world.device) / 2**20,
        }
        if world.device.type != "cpu":
            row["peak beyond weights, MiB"] = peak_memory(step, world.device) / 2**20
        rows.append(row)
    return rows, median(rates)


def describe_tokens(model: nn.Module) -> str:
    """How many patches each block of a teacher sees, and how many leave the last: 147 73x4 36x4 18x3 -> 18."""
    if not isinstance(model, PCAE):
        return ""
    groups = [(count, len(list(same))) for count, same in itertools.groupby(model.token_counts[:-1])]
    seen = [f"{count}x{times}" if times > 1 else str(count) for count, times in groups]
    return f"{' '.join(seen)} -> {model.token_counts[-1]}"


# --- the tables -------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    title: str
    rows: list[dict[str, Any]]  # the same columns in all; a tuple is median, least, greatest
    notes: str

    def markdown(self) -> str:
        """As in GitHub's flavour, columns aligned."""
        cells = [list(self.rows[0])] + [[show(value) for value in row.values()] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        lines.insert(1, " | ".join("-" * width for width in widths))
        return "\n".join([f"## {self.title}", "", *(f"| {line} |" for line in lines), "", self.notes])


def show(value: Any) -> str:
    """A value in a table's cell."""
    if isinstance(value, tuple):
        middle, least, greatest = value
        return f"{middle:.2f} [{least:.2f}-{greatest:.2f}]"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"
    return "" if value is None else str(value)


def pretraining(args: argparse.Namespace, world: World) -> Table:
    """Table 4 of the poster, and its GPU days."""
    rows, rate = training_rows(args, PRETRAINING, world)
    pcae, _, _, mae, _, light_mae, heavy_pcae, _ = (row["speed"][0] for row in rows)
    return Table(
        "Pre-training: one step of each method",
        rows,
        "Speeds are multiples of the first row's. The poster's are of ViT-B/16 at 224 pixels: images a second at three "
        "mask ratios, and GPU days of 300 epochs for PCAE and MAE. MAE's decoder has 8 blocks; PCAE's it does not say, "
        f"and 2 fit. Here PCAE with 2 is {pcae / mae:.2f} times as fast as MAE with 8. Much of that is the "
        f"decoder: with 2 in both PCAE is {pcae / light_mae:.2f} times as fast, with 8 in both {heavy_pcae / mae:.2f} "
        f"times. {describe_rate(rate)}",
    )


def schedules(args: argparse.Namespace, world: World) -> Table:
    """Tables 6 and 7 of the poster: how often to drop, and how much."""
    depth = MODELS[args.model]["depth"]
    cases = [
        Case(f"{stages} x {ratio:g}", dict(drop_stages=stages, drop_ratio=ratio) | LIGHT)
        for stages, ratio in SCHEDULES
        if stages <= depth
    ]
    rows, rate = training_rows(args, cases, world)
    return Table(
        "Pre-training: stages x drop ratio",
        [{name: value for name, value in row.items() if name != "poster"} for row in rows],
        "Speeds are multiples of the first row's, the paper's setting. The poster's own costs of these rows, in GPU "
        f"days, were not at hand. {describe_rate(rate)}",
    )


@torch.no_grad()
def inference(args: argparse.Namespace, world: World) -> Table:
    """Table 5 of the poster: PTR in a classifier of 1,000 classes."""
    depth = MODELS[args.model]["depth"]
    blocks = depth // 12, depth * 5 // 12
    try:
        encoder = ViT((args.image_size, args.image_size), args.patch_size, **MODELS[args.model])
        tokens = [token_counts(encoder.num_patches, depth, PTR(blocks, ratio))[-1] for ratio in finetune.POSTER]
    except ValueError as error:
        raise UserError(str(error)) from None
    classifier = Classifier(encoder, 1000).to(world.device).eval()
    models = [copy.copy(classifier) for _ in finetune.POSTER]  # the same weights, each with a PTR of its own
    for model, ratio in zip(models, finetune.POSTER, strict=True):
        model.ptr = PTR(blocks, ratio)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=world.device)

    def predict(model: nn.Module) -> None:
        with engine.autocast(world.device, args.precision), torch.no_grad():
            model(images)

    macs = [engine.count_macs(model, images[:1]) for model in models]
    compiled = [torch.compile(model, dynamic=False) if args.compile else model for model in models]
    measured, rate = measure(args, [functools.partial(predict, model) for model in compiled], macs, world.device)
    rows = []
    for model, left, one in zip(models, tokens, measured, strict=True):
        poster_macs, _, poster_speed = finetune.POSTER[model.ptr.drop_ratio]
        rows.append({
            "drop ratio": f"{model.ptr.drop_ratio:g}",
            "tokens at the end": left,
            "GMACs": one.macs / 1e9,
            "poster's GMACs": poster_macs,
            "images/s": one.images_per_second,
            "speed": one.speed(measured[0]),
            "by MACs": measured[0].macs / one.macs,
            "poster": poster_speed,
            "of matrix rate": one.macs * one.images_per_second / rate,
        })  # fmt: skip
    return Table(
        f"Inference: dropping after blocks {blocks[0]} and {blocks[1]}",
        rows,
        "Speeds are multiples of the first row's. The poster's numbers are those of ViT-B/16. After which blocks it "
        "drops it does not say; of all regular placements 1 and 5 of 12 are nearest to its MACs. "
        f"{describe_rate(rate)}",
    )


# What an operation of torch is for, told by its name.
PARTS = {
    "matrix products, attention": (
        "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "_flash_attention", "_efficient_attention",
    ),
    "LayerNorm, GELU, sums": ("native_layer_norm", "gelu", "add", "sum"),
    "split, PTR, gathers": ("sort", "topk", "gather", "index", "scatter", "clamp_min"),
    "AdamW": ("_fused_adamw",),
    "teacher's step": ("lerp", "_foreach_lerp"),
    "gradient clipping": ("linalg_vector_norm", "mul_", "_foreach_norm", "_foreach_mul"),
}  # fmt: skip
REST = "copies, Python, the profiler, the rest"


def part_of(operation: str) -> str:
    """The part of a step that an operation of torch (aten::addmm, ...) belongs to, told by how its name begins."""
    name = operation.removeprefix("aten::")
    return next((part for part, beginnings in PARTS.items() if name.startswith(beginnings)), REST)


def operation_seconds(step: Callable[[], Any], device: torch.device, steps: int = 3) -> dict[str, float]:
    """Seconds that each part of a step takes by itself, as torch's profiler sees its operations."""
    on_cpu = device.type == "cpu"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not on_cpu)) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        engine.synchronize(device)
        wall = time.perf_counter() - start
    seconds = dict.fromkeys([*PARTS, REST], 0.0)
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            taken = event.self_cpu_time_total if on_cpu else event.self_device_time_total
            seconds[part_of(event.key)] += taken / 1e6 / steps
    seconds[REST] = wall / steps - sum(seconds[part] for part in PARTS)
    return seconds


def anatomy(args: argparse.Namespace, world: World) -> Table:
    """Where the time of PCAE's step goes, and how long the same work takes at its plainest."""
    eager = argparse.Namespace(**(vars(args) | dict(compile=False)))  # compiled kernels hide what they are for
    model, step = training_step(eager, PRETRAINING[0].settings, world)
    image = torch.zeros(1, 3, args.image_size, args.image_size)
    macs = engine.count_macs(model, image, backward=True)
    trained, followed = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, model.student))
    numbers = torch.randn(trained, device=world.device)
    (_, one_pass), rate = measure(args, [step, lambda: numbers.mul_(1.0)], [macs, 0], world.device)
    per_number = median(one_pass.seconds) / (2 * trained)  # each is read and written
    floors = {
        "matrix products, attention": macs * args.batch_size / rate,
        "AdamW": 7 * trained * per_number,  # weight, gradient and two moments; all but the gradient are written too
        "teacher's step": 3 * followed * per_number,
        "gradient clipping": 3 * trained * per_number,  # once for the norm, once to scale
    }
    seconds = operation_seconds(step, world.device)
    total = sum(seconds.values())
    rows = []
    for part, taken in seconds.items():
        floor = 1e3 * floors[part] if part in floors else None
        rows.append({"part": part, "ms": 1e3 * taken, "share": f"{taken / total:.1%}", "plainest, ms": floor})
    return Table(
        f"Anatomy of a step: {PRETRAINING[0].name}",
        rows,
        f"Plainest: as many MACs in a large matrix product, {rate / 1e9:,.0f} GMACs a second; reading and writing as "
        f"many numbers in one pass over all weights, {4e-9 / per_number:.1f} GB a second. Never compiled.",
    )


def write_photographs(folder: Path, count: int) -> list[Path]:
    """JPEG files of 500 x 375 pixels of smooth colours and some noise, of about the size of photographs (80 KB)."""
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for path in paths:
        smooth = tvf.resize(torch.rand(3, 24, 32), [375, 500], antialias=True)
        tvf.to_pil_image((0.85 * smooth + 0.15 * torch.rand(3, 375, 500)).clamp(0, 1)).save(path, quality=90)
    return paths


def loading(args: argparse.Namespace, world: World) -> Table:
    """Images a second that one core reads, beside Pillow, ToTensor and Normalize."""
    size, threads = (args.image_size, args.image_size), torch.get_num_threads()
    usual = v1.Compose([
        v1.RandomResizedCrop(size, (0.2, 1.0), interpolation=v1.InterpolationMode.BICUBIC),
        v1.RandomHorizontalFlip(),
        v1.ToTensor(),
        v1.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD),
    ])  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder), 32)
        files = data.Views(data.ImageFiles(Path(folder)), data.pretraining_view(size, 0.2))
        shapes = data.Views(data.Shapes("train", 512, (32, 32)), data.pretraining_view((32, 32), 1.0))
        torch.set_num_threads(1)
        times = engine.take_turns(
            [
                lambda: torch.stack([usual(Image.open(path).convert("RGB")) for path in paths]),
                lambda: data.collate([files[0, i] for i in range(len(files))]),
                lambda: data.collate([shapes[0, i] for i in range(len(shapes))]),
            ],
            torch.device("cpu"),
            args.rounds,
        )
        torch.set_num_threads(threads)
    names = "JPEG: Pillow, crop, ToTensor, Normalize", "JPEG, as pretrain.py reads it", "shapes, drawn once"
    measured = [Measured(times[i], len(images), macs=0) for i, images in enumerate((paths, files, shapes))]
    rows = [{"read": name, "images/s": one.images_per_second} for name, one in zip(names, measured, strict=True)]
    for row, one in zip(rows, measured, strict=True):
        row["speed"] = one.speed(measured[0]) if one.batch_size == len(paths) else None  # shapes are other images
    return Table(
        "Data: what one core reads",
        rows,
        "Files of 500 x 375 pixels, random crops resized to "
        f"{args.image_size}; what pretrain.py reads stays in bytes, and the device normalises it.",
    )


def describe_rate(rate: float) -> str:
    """What "of matrix rate" is a share of."""
    return f"A product of two large matrices made {rate / 1e9:,.0f} GMACs a second meanwhile."


SECTIONS = {
    "pretrain": pretraining,
    "ablations": schedules,
    "inference": inference,
    "profile": anatomy,
    "data": loading,
}


# --- the command ------------------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    """All flags; the defaults take minutes on a CPU."""
    parser = engine.flag_parser(__doc__)
    parser.add_argument("section", nargs="?", default="all", choices=("all", *SECTIONS), help="which tables")
    add = functools.partial(engine.add_flag, parser)
    add("--model", "vit_small", "encoder", choices=MODELS)
    add("--image-size", 224, "pixels of a side")
    add("--patch-size", 16, "pixels of a side")
    add("--decoder-dim", None, "decoder width (default: two thirds of the encoder's, 512 at most)", type=int)
    add("--batch-size", 8, "images a step")
    add("--rounds", 3, "steps of each row that count, 3 at least; one more warms up")
    add("--device", "auto", "cpu, cuda, mps, ...")
    add("--precision", "auto", "auto: bf16 on CUDA, else fp32", choices=("auto", "fp32", "bf16"))
    add("--compile", False, "torch.compile the models: minutes for each row", action="store_true")
    add("--markdown", None, "write the tables to this file too", metavar="FILE")
    add("--json", None, "write the numbers to this file too", metavar="FILE")
    return parser


def describe_machine(args: argparse.Namespace, device: torch.device) -> str:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    precision = engine.resolve_precision(device, args.precision)
    return (
        f"{name} ({device.type}{threads}), torch {torch.__version__}, {precision}"
        f"{', compiled' if args.compile else ''}; {args.model}/{args.patch_size} at {args.image_size} pixels, "
        f"{args.batch_size} images a step, {args.rounds} rounds"
    )


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    for name, least in dict(batch_size=1, rounds=3, image_size=1, patch_size=1).items():
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more, got {getattr(args, name)}")
    if args.decoder_dim is not None and (args.decoder_dim < 1 or args.decoder_dim % 32):
        raise UserError(f"--decoder-dim must be a multiple of 32, the width of a head, got {args.decoder_dim}")
    for name in ("markdown", "json"):
        file = getattr(args, name)
        if file is not None and (not Path(file).parent.is_dir() or Path(file).is_dir()):
            raise UserError(f"--{name} {file} is not a file in a folder that is there")
    world = engine.start_world(args.device)
    if world.size > 1:
        raise UserError("benchmark.py measures one process: start it without torchrun")
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # one static graph for each row; beyond 8 torch would give up
    torch.manual_seed(0)
    header = describe_machine(args, world.device)
    print(header, flush=True)
    tables = {}
    for name in SECTIONS if args.section == "all" else (args.section,):
        tables[name] = SECTIONS[name](args, world)
        print(f"\n{tables[name].markdown()}", flush=True)
        write_files(args, header, tables)  # each time: what is measured is not lost


def write_files(args: argparse.Namespace, header: str, tables: dict[str, Table]) -> None:
    """What `--markdown` and `--json` ask for."""
    if args.markdown is not None:
        text = "\n\n".join([header, *(table.markdown() for table in tables.values())])
        engine.replace_file(Path(args.markdown), lambda file: file.write(f"{text}\n".encode()))
    if args.json is not None:
        content = dict(machine=header, settings=vars(args)) | {name: asdict(table) for name, table in tables.items()}
        engine.replace_file(Path(args.json), lambda file: file.write(f"{json.dumps(content, indent=2)}\n".encode()))


if __name__ == "__main__":
    engine.launch(main)
