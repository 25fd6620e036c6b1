"""Measure the cost of PCAE: the poster's tables of speed and MACs, with the poster's numbers for comparison.

python benchmark.py                                             all tables, ViT-Small, minutes on a CPU
python benchmark.py pretrain --model vit_base                   one table, ViT-Base
python benchmark.py --model vit_base --batch-size 256 --compile --markdown FILE.md          on a GPU
python benchmark.py --report FILE.md                            one page on a GPU, in ten minutes
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import util.threads  # noqa: F401 (before torch)

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms.v2 import functional as tvf
from tqdm import tqdm

import data
from model import MODELS, PCAE, Classifier, ViT
from ptr import PTR, token_counts
from report import IMAGENET, PRETRAINING, build, by_turns, report, report_models, speed, training_step
from util import profiling, runs, training
from util.image_files import ImageFiles
from util.shapes import Shapes

# Table 5 of the poster (ViT-B/16, ImageNet), by drop ratio: GMACs, speed-up.
CLASSIFIERS = {0.0: (17.57, 1.00), 0.1: (15.34, 1.15), 0.2: (13.19, 1.35), 0.3: (11.29, 1.57), 0.4: (9.53, 1.88)}
# Tables 6 and 7: stages and drop ratio, and the poster's GPU days. The first row is the paper's setting.
SCHEDULES = {(3, 0.5): 3.3, (1, 0.875): 3.0, (6, 0.29): 3.5, (12, 0.16): 3.6}
SCHEDULES |= {(3, 0.37): 3.6, (3, 0.415): 3.5, (3, 0.47): 3.4, (3, 0.536): 3.3}
ABLATIONS = [
    (f"{schedule[0]} x {schedule[1]:g}", PCAE, 0.75, 2, schedule, 3.3 / days, f"{days}")
    for schedule, days in SCHEDULES.items()
]

LEGEND = """
Speed: relative to the first row, median [min-max] of the rounds. Each row takes turns with the first row, step by
step, so a temporarily slow machine affects both. The speed of the first row itself shows the noise. By MACs: the speed
predicted by multiply-accumulates alone. Of a product: MACs per second, as a fraction of a large matrix product's in the
same rounds. Days: for 300 epochs of ImageNet at this speed, without waiting for data. The poster's days are for an
unnamed device."""


# --- measuring --------------------------------------------------------------------------------------------------------


def timed(args: argparse.Namespace, steps: list[Callable], macs: list[int], poster: float | None) -> tuple[float, str]:
    """Return images/s and the cells "images/s | speed | by MACs | poster | of a product" of a row.

    `steps` and `macs` are those of the table's first row and of this row; `poster` is the poster's speed, if any.
    """
    size = 1024 if args.device.type == "cpu" else 8192
    a = torch.randn(size, size, device=args.device)
    with training.autocast(args.device, args.precision):
        a = a @ a / size**0.5  # in the precision of the models' products
    # Each step follows a product, so the caches are in the same state for both steps.
    _, first, product, this = by_turns(args, lambda: a @ a, steps[0], lambda: a @ a, steps[1])
    images_per_second = args.batch_size / median(this)
    ratio = macs[1] * images_per_second / (size**3 / median(product))
    by_macs, by_poster = f"{macs[0] / macs[1]:.2f}", f"{poster:.2f}" if poster else ""
    return images_per_second, f"{images_per_second:,.2f} | {speed(first, this)} | {by_macs} | {by_poster} | {ratio:.0%}"


def kept_for_backward(model: nn.Module, images: Tensor) -> int:
    """Return the bytes that the forward pass of images (B, C, H, W) keeps for backward, each storage once.

    Includes weights: the difference of two batch sizes is without them.
    """
    storages: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        output = model(images)  # keeps the storages alive, so no address is reused
    del output
    return sum(storages.values())


# --- pre-training -----------------------------------------------------------------------------------------------------


def training_table(args: argparse.Namespace, title: str, cases: list[tuple]) -> Iterator[str]:
    """Yield the head of a table, and a row for each of `cases`, in the format of `report.PRETRAINING`.

    Rows take turns only with the first row, because not all weights may fit in memory.
    """
    yield f"""
## Pre-training: {title}

| trained | teacher's tokens | GMACs/image | images/s | speed | by MACs | poster | of a product | days | poster's days \
| activations, MiB/image | peak beyond weights and moments, MiB (CUDA) |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
    shape, first = (3, args.image_size, args.image_size), None
    images = torch.randint(256, (args.batch_size, *shape), dtype=torch.uint8, device=args.device)
    for name, method, *options, poster, poster_days in cases:
        try:
            model = build(args, method, *options).to(args.device)
        except ValueError as error:  # more stages than blocks, or too few patches
            yield f"| {name} | skipped: {error} |"
            continue
        step = training_step(model, images, args.precision, args.compile)
        macs = profiling.count_macs(model, torch.zeros(1, *shape), backward=True)
        first = first or (step, macs)
        images_per_second, cells = timed(args, [first[0], step], [first[1], macs], poster)
        days = 300 * IMAGENET / images_per_second / 86_400
        cells += f" | {days:,.0f}" if days >= 100 else f" | {days:.3g}"
        cells += f" | {poster_days}"
        with training.autocast(args.device, args.precision):  # the memory per image, without weights; not compiled
            one, two = (kept_for_backward(model, torch.randn(n, *shape, device=args.device)) for n in (1, 2))
        peak = ""
        if args.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            peak = f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f}"
        tokens = " ".join(map(str, model.token_counts)) if method is PCAE else ""
        yield f"| {name} | {tokens} | {macs / 1e9:#.4g} | {cells} | {(two - one) / 2**20:.2f} | {peak} |"


def pretraining(args: argparse.Namespace) -> Iterator[str]:
    """Yield Table 4 of the poster as measured here: one step of each method, also with other decoders."""
    yield from training_table(args, "one step of each method", PRETRAINING)
    yield """
The poster's numbers are for ViT-B/16 at 224 pixels. MAE's decoder has 8 blocks. The poster does not state PCAE's
decoder; 2 blocks fit its numbers. With 8 decoder blocks in both, PCAE's step is cheaper; with 2 in both, MAE's is."""


def ablations(args: argparse.Namespace) -> Iterator[str]:
    """Yield Tables 6 and 7 of the poster as measured here: schedules of PTR."""
    yield from training_table(args, "stages x drop ratio", ABLATIONS)
    yield "\nThe first row is the paper's setting. The poster does not state the number of epochs of these GPU days."


# --- inference and data -----------------------------------------------------------------------------------------------


@torch.no_grad()
def inference(args: argparse.Namespace) -> Iterator[str]:
    """Yield Table 5 of the poster: PTR in a classifier of 1,000 classes."""
    encoder = ViT((args.image_size, args.image_size), args.patch_size, **MODELS[args.model])
    classifier = Classifier(encoder, 1000).to(args.device).eval()
    forward = torch.compile(classifier, dynamic=False) if args.compile else classifier
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=args.device)

    def predict(ptr: PTR) -> None:
        with training.autocast(args.device, args.precision):
            forward(images, ptr=ptr)

    depth, first_macs = len(encoder.blocks), profiling.count_macs(classifier, images[:1])
    blocks = depth // 12, depth * 5 // 12
    yield f"""
## Inference: {args.model}, {args.batch_size} images, dropping after blocks {blocks[0]} and {blocks[1]}

| drop ratio | tokens at the end | GMACs/image | poster's | images/s | speed | by MACs | poster | of a product |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
    for ratio, (poster_gmacs, poster_speed) in CLASSIFIERS.items():
        ptr = PTR(blocks, ratio) if ratio else PTR()
        tokens = token_counts(encoder.num_patches, depth, ptr)[-1]
        macs = profiling.count_macs(classifier, images[:1], ptr=ptr)
        steps = [lambda: predict(PTR()), lambda ptr=ptr: predict(ptr)]
        _, cells = timed(args, steps, [first_macs, macs], poster_speed)
        yield f"| {ratio:g} | {tokens} | {macs / 1e9:#.4g} | {poster_gmacs:.2f} | {cells} |"
    yield """
The poster's numbers are for ViT-B/16. The poster does not state the blocks. Of all regular placements, blocks 1 and 5
of 12, counted from 0, are closest to its MACs."""


def loading(args: argparse.Namespace) -> Iterator[str]:
    """Yield a table of images/s on one core: our readers against one pipeline of Pillow, ToTensor and Normalize."""
    size, count, num_threads = (args.image_size, args.image_size), 32, torch.get_num_threads()
    crop = transforms.RandomResizedCrop(size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    usual = transforms.Compose([*steps, transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)])
    yield """
## Data: what one core reads

| read | images/s | speed |
| --- | --- | --- |"""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):  # smooth colours and noise: 80 KB per file, like photographs
            pixels = 0.85 * tvf.resize(torch.rand(3, 24, 32), [375, 500]) + 0.15 * torch.rand(3, 375, 500)
            tvf.to_pil_image(pixels.clamp(0, 1)).save(f"{folder}/{i}.jpg", quality=90)
        paths = list(Path(folder).iterdir())
        views = data.Views(ImageFiles(Path(folder)), data.pretraining_view(size, 0.2))
        small = Shapes("train", count, (32, 32))
        one_by_one = data.Views(small, data.pretraining_view((32, 32), 0.2))
        at_once = data.BatchViews(small, (32, 32), 0.2)
        readers = {
            "JPEG: Pillow, crop, ToTensor, Normalize": lambda: [usual(Image.open(p).convert("RGB")) for p in paths],
            "JPEG, as pretrain.py reads it": lambda: [views[0, i][0] for i in range(count)],
            "32 pixels in memory, one by one": lambda: [one_by_one[0, i][0] for i in range(count)],
            "32 pixels in memory, a batch at once": lambda: at_once.__getitems__([(0, i) for i in range(count)]),
        }
        torch.set_num_threads(1)
        times = by_turns(args, *readers.values())
        torch.set_num_threads(num_threads)
    for name, this in zip(readers, times, strict=True):
        yield f"| {name} | {count / median(this):,.0f} | {speed(times[0], this)} |"
    yield f"""
Files of 500 x 375 pixels, random crops resized to {args.image_size}; {count} images at once. pretrain.py keeps images
as bytes, and the device normalises them."""


# --- the command ------------------------------------------------------------------------------------------------------

SECTIONS = {"pretrain": pretraining, "ablations": ablations, "inference": inference, "data": loading}


def main(argv: list[str] | None = None) -> None:
    parser = runs.flag_parser(__doc__)
    add = parser.add_argument
    usual = "vit_small; --report: vit_small, vit_base and vit_large; on a CPU vit_mini and vit_tiny"
    batch = "images per step (default: 8; --report on a GPU: 4096, halved until they fit in its memory)"
    page = (
        "write only one page to this file, within ten minutes (three on a CPU): machine, training, inference and data"
    )
    add("section", nargs="?", default="all", choices=("all", *SECTIONS), help="tables to measure")
    add("--model", choices=MODELS, help=f"size of the encoder (default: {usual})")
    add("--image-size", type=int, default=224, help="height and width in pixels")
    add("--patch-size", type=int, default=16, help="patch side in pixels")
    add("--decoder-dim", type=int, help="decoder width (default: two thirds of the encoder's, at most 512)")
    add("--batch-size", type=training.positive, help=batch)
    add("--rounds", type=training.positive, default=3, help="timed steps per row, after one untimed")
    add("--compile", action="store_true", help="compile the models with torch.compile, which takes minutes per row")
    add("--markdown", metavar="FILE", help="also write the tables to this file")
    add("--report", metavar="FILE", help=page)
    runs.add_device_flags(add)
    args = parser.parse_args(argv)
    if args.report and (args.markdown or args.section != "all"):
        raise SystemExit("error: --report writes a page of its own, without a section or --markdown")
    args.device = training.start_world(args.device).device
    args.batch_size = args.batch_size or (4096 if args.report and args.device.type == "cuda" else 8)
    usual = report_models(args.device) if args.report else ["vit_small"]
    models = [args.model] if args.model else usual
    args.model = models[-1]
    try:
        with torch.device("meta"):
            build(args, *PRETRAINING[0][1:-2])
    except ValueError as error:  # sizes that do not fit together
        raise SystemExit(f"error: {error}") from None
    torch._dynamo.config.recompile_limit = 64  # one static graph per row; torch's limit is 8
    torch.manual_seed(args.seed)
    on = torch.cuda.get_device_name() if args.device.type == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    head = f"{args.model}/{args.patch_size} at {args.image_size} pixels, {args.batch_size} images per step, "
    head += f"precision {args.precision}{', compiled' * args.compile}; {on}, torch {torch.__version__}"
    tables = [[head, LEGEND]] + [make(args) for name, make in SECTIONS.items() if args.section in (name, "all")]
    if args.report:
        tables = [report(args, models, [inference, loading])]
    with open(args.report or args.markdown or os.devnull, "w", encoding="utf-8") as file:
        for table in tables:
            for text in table:  # as soon as measured
                tqdm.write(text)
                print(text, file=file, flush=True)


if __name__ == "__main__":
    main()
