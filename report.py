"""Training steps that benchmark.py times in turns, and its `--report`, one page on the speed of a machine."""

import argparse
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
from baselines import MAE, SimMIM
from model import MODELS, PCAE, ViT
from ptr import PTR, drop_blocks
from util import profiling, training

IMAGENET = 1_281_167  # images

# Training steps: name, method, mask ratio, decoder blocks, stages and drop ratio of PTR; then the poster's speed, from
# its images/s (Table 4) or its GPU days per epoch, and these days, for 300 epochs unless stated otherwise.
PRETRAINING = [
    ("PCAE, mask 0.75, decoder 2", PCAE, 0.75, 2, (3, 0.5), 1.0, "10.1"),
    ("PCAE, mask 0.85, decoder 2", PCAE, 0.85, 2, (3, 0.5), 739.7 / 550.5, ""),
    ("PCAE, mask 0.90, decoder 2", PCAE, 0.90, 2, (3, 0.5), 876.1 / 550.5, ""),
    ("MAE, mask 0.75, decoder 8", MAE, 0.75, 8, None, 10.1 / 15.4, "15.4"),
    ("SimMIM, mask 0.75", SimMIM, 0.75, None, None, (10.1 / 300) / (54.1 / 800), "54.1 for 800 epochs"),
    ("MAE, mask 0.75, decoder 2", MAE, 0.75, 2, None, None, ""),
    ("PCAE, mask 0.75, decoder 8", PCAE, 0.75, 8, (3, 0.5), None, ""),
    ("PCAE without PTR, decoder 2", PCAE, 0.75, 2, (0, 0.0), None, ""),
]


def build(args: argparse.Namespace, method: type, mask: float, depth: int, schedule: tuple[int, float]) -> nn.Module:
    """Build the networks of a method: `mask` ratio, `depth` of the decoder, `schedule` (stages, drop ratio) of PTR.

    The decoder's heads have width 32, as in MAE. Raises ValueError if sizes and ratios do not fit together.
    """
    student = ViT((args.image_size, args.image_size), args.patch_size, **MODELS[args.model])
    if method is SimMIM:
        return SimMIM(student, mask_ratio=mask)
    dim = args.decoder_dim or min(512, max(32, student.dim * 2 // 3 // 32 * 32))
    options = dict(mask_ratio=mask, decoder_dim=dim, decoder_depth=depth, decoder_heads=max(1, dim // 32))
    if method is MAE:
        return MAE(student, **options)
    stages, drop_ratio = schedule
    return PCAE(student, ptr=PTR(drop_blocks(len(student.blocks), stages), drop_ratio), **options)


def training_step(model: PCAE | MAE | SimMIM, images: Tensor, precision: str, compiled: bool) -> Callable[[], None]:
    """Return the step of pretrain.py without its log, on uint8 images (B, 3, H, W) in the device's memory."""
    groups = training.parameter_groups(model, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), fused=True)
    normalize = data.Normalize().to(images.device)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        noise = torch.rand(len(images), model.student.num_patches, device=images.device)
        with training.autocast(images.device, precision):
            output = forward(normalize(images), noise)
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(model, PCAE):
            model.update_teacher(0.9999)

    return step


def by_turns(args: argparse.Namespace, *functions: Callable) -> list[list[float]]:
    """Return the seconds of each function in each round. Functions take turns; an extra first round warms up."""
    times = [[profiling.seconds(function, args.device) for function in functions] for _ in range(args.rounds + 1)]
    return [list(of_one) for of_one in zip(*times[1:], strict=True)]


def speed(first: list[float], this: list[float]) -> str:
    """Format the speed of `this` relative to `first` over rounds in turns: median [min-max]."""
    ratios = [theirs / ours for theirs, ours in zip(first, this, strict=True)]
    return f"{median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"


# --- the report -------------------------------------------------------------------------------------------------------

SECONDS = dict(cuda=540, cpu=150)  # time limit of the report, by kind of device
PEAKS = {"H200": 989e12, "H100 80GB": 989e12, "A100": 312e12}  # FLOP/s in bf16 without sparsity, from the datasheets

HEAD = """
| trained | batch | images/s | speed | by MACs | MFU | of a product | memory | days |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
LEGEND = """
Batch: {batch} images, halved until they fit in the GPU's memory. Speed: images/s relative to the first row of the
table; the two take turns, and the cell shows the median [min-max] of the rounds. By MACs: the speed predicted by
multiply-accumulates alone. MFU: two FLOP per MAC, as a fraction of the datasheet's peak. Of a product: the same, as a
fraction of a large matrix product's speed. Memory: peak during a step, including weights and optimizer. Days: for 300
epochs of ImageNet."""


def report_models(device: torch.device) -> list[str]:
    """Return the encoders of a report on this device."""
    return ["vit_mini", "vit_tiny"] if device.type == "cpu" else ["vit_small", "vit_base", "vit_large"]


def report(
    args: argparse.Namespace, models: list[str], sections: list[Callable[[argparse.Namespace], Iterator[str]]]
) -> Iterator[str]:
    """Yield the page in parts: machine, training steps, `sections`, compiled steps. Errors of torch end only a row."""
    kind = args.device.type
    end = time.perf_counter() + SECONDS.get(kind, 540)
    pcae, _, _, mae, simmim = eager = PRETRAINING[:5]
    compiled = [[pcae], [mae, simmim]] if kind == "cuda" or args.compile else []
    bar = tqdm(total=len(models) * (5 + 5 * bool(compiled)) + len(sections), unit=" rows", leave=False)
    batch_sizes: dict[tuple[str, str], int] = {}  # that fit in memory, by encoder and name of the step

    def table(model: str, cases: list[tuple[tuple, bool]]) -> Iterator[str]:
        """Yield the rows of one encoder. `cases`: step, and whether to compile it, which takes one or two minutes."""
        yield f"\n## {model}/{args.patch_size} at {args.image_size} pixels, training\n{HEAD}"
        first: list = []
        for case, is_compiled in cases:
            key = model, case[0]
            settings = with_settings(args, model=model, batch_size=batch_sizes.get(key, args.batch_size))
            try:
                if end - time.perf_counter() < (150 if is_compiled else 30 if kind == "cuda" else 15):
                    raise RuntimeError("skipped: time limit of the report")
                batch_sizes[key], cells = training_cells(settings, case, is_compiled, first)
            except RuntimeError as error:
                cells = one_line(error)
            yield f"| {case[0]}{', compiled' * is_compiled} | {cells} |"
            bar.update()

    args.product = matrix_product(args)
    args.peak = next((PEAKS[name] for name in PEAKS if kind == "cuda" and name in torch.cuda.get_device_name()), None)
    yield from machine(args)
    yield LEGEND.format(batch=args.batch_size)
    for model in models:
        yield from table(model, [(case, False) for case in eager])
    middle = with_settings(args, model=models[len(models) // 2], batch_size=min(256, args.batch_size), compile=False)
    for section in sections:
        try:
            yield from section(middle)
        except RuntimeError as error:
            yield f"| {one_line(error)} |"
        bar.update()
    for cases in compiled:
        for model in models:
            yield from table(model, [(pcae, False), *((case, True) for case in cases)])
    bar.close()


def with_settings(args: argparse.Namespace, **settings: object) -> argparse.Namespace:
    """Return a copy of the settings with these changes."""
    return argparse.Namespace(**vars(args) | settings)


def one_line(error: Exception) -> str:
    """Shorten an error to one line for a row of a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return (str(error).splitlines() or [type(error).__name__])[0][:120].replace("|", "/")


def machine(args: argparse.Namespace) -> Iterator[str]:
    """Yield a table of hardware, software and precision."""
    on_card = args.device.type == "cuda"
    name = torch.cuda.get_device_name() if on_card else args.device.type
    yield f"# Speed on {name}\n\n| | |\n| --- | --- |\n| system | {platform.platform()}, {os.cpu_count()} cores |"
    yield f"| Python, torch | {platform.python_version()}, {torch.__version__}, {torch.get_num_threads()} thread(s) |"
    if on_card:
        card, driver = torch.cuda.get_device_properties(), "unknown"
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        yield f"| GPU | {name}, {card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} multiprocessors |"
        yield f"| driver, CUDA, cuDNN | {driver}, {torch.version.cuda}, {torch.backends.cudnn.version()} |"
    peak = f"{args.peak / 1e12:g} TFLOP/s in bf16" if args.peak else "unknown"
    yield f"| precision | {args.precision} |\n| peak on the datasheet | {peak} |"
    yield f"| large matrix product | {args.product / 1e12:.3g} TFLOP/s |"


def matrix_product(args: argparse.Namespace) -> float:
    """Measure the FLOP/s of a large matrix product in the precision of the models."""
    size = 1024 if args.device.type == "cpu" else 8192
    a = torch.randn(size, size, device=args.device)
    with training.autocast(args.device, args.precision):
        a = a @ a / size**0.5
    times = [profiling.seconds(lambda: a @ a, args.device, calls=5) for _ in range(4)]
    return 2 * size**3 / median(times[1:])


def at_largest_batch(make_step: Callable[[int], Callable], batch_size: int) -> tuple[Callable, int]:
    """Return a step that fits in memory, which has run once, and its batch size: `batch_size`, halved until it fits.

    Raises torch.OutOfMemoryError if a single image does not fit.
    """
    while True:
        try:
            step = make_step(batch_size)
            step()
            return step, batch_size
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        step, batch_size = None, batch_size // 2  # after the `except`, whose error keeps the step's tensors alive


def training_cells(args: argparse.Namespace, case: tuple, compiled: bool, first: list) -> tuple[int, str]:
    """Measure the training step of `case`, an entry of PRETRAINING: return its batch size and the cells of its row.

    The batch size is `args.batch_size`, halved until it fits in memory. `report` has set `args.peak` and `product`.
    `first` is an empty list for the first row, which fills it with step, batch size and MACs. Later rows take turns
    with this step.
    """
    _, method, *options, _, _ = case
    shape, on_card = (3, args.image_size, args.image_size), args.device.type == "cuda"
    model = build(args, method, *options)
    macs = profiling.count_macs(model, torch.zeros(1, *shape), backward=True)
    if on_card:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    model.to(args.device)

    def make_step(batch_size: int) -> Callable[[], None]:
        model.zero_grad()
        images = torch.randint(256, (batch_size, *shape), dtype=torch.uint8, device=args.device)
        return training_step(model, images, args.precision, compiled)

    step, batch_size = at_largest_batch(make_step, args.batch_size)
    first[:] = first or [step, batch_size, macs]
    memory = ""
    if on_card:
        torch.cuda.reset_peak_memory_stats()
        step()
        memory = f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.1f} GiB"
    turns, times = [(first[0], first[1]), (step, batch_size)], []  # seconds per image, by rounds
    for _ in range(args.rounds):
        times.append([])
        for function, size in turns:
            function()  # reallocates memory after the other step, which takes time
            times[-1].append(profiling.seconds(function, args.device, calls=2) / size)
    reference, this = zip(*times, strict=True)
    images_per_second = 1 / median(this)
    flops = 2 * macs * images_per_second
    cells = [
        batch_size,
        f"{images_per_second:,.4g}",
        speed(reference, this),
        f"{first[2] / macs:.2f}",
        f"{flops / args.peak:.1%}" if args.peak else "",
        f"{flops / args.product:.1%}",
        memory,
        f"{300 * IMAGENET / images_per_second / 86_400:,.3g}",
    ]
    return batch_size, " | ".join(map(str, cells))
