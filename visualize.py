"""See it: the patches that PTR keeps, what a classifier or a detector says of an image, and learning curves.

    python visualize.py                                            built-in images: input, stage 1, stage 2, stage 3
    python visualize.py FOLDER PHOTO.jpg --checkpoint FILE         yours; FILE is ours or a public ViT (MAE, DINO, ...)
    python visualize.py --checkpoint runs/finetune/best.pt         with the classifier's answer
    python visualize.py --checkpoint runs/detect/best.pt           what the detector finds
    python visualize.py --coverage                                 numbers: how much of what PTR keeps is object?
    python visualize.py --log runs/pretrain runs/other             curves of metrics.jsonl, one run over the other
"""

import argparse
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import reduce, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid
from tqdm import tqdm

import data
import detect
import engine
import finetune
import pretrain
from data import UnreadableImage
from engine import UserError
from model import Classifier, ViT, count_visible, find_weights, load_classifier, load_encoder, split_patches
from ptr import CRITERIA, PTR, gather_tokens, num_kept, redundancy

# Of runs and classes: most are Okabe and Ito's, which colour-blind readers can tell apart. And a scale, dark to light.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b3fbf", "#8a8a00")
SCALE = torch.tensor([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]) / 255
GAP = 8  # pixels between the tiles of a picture
COUNTED = 2000  # images for --coverage, unless --limit says otherwise

# What is taken from a checkpoint of ours where no flag says otherwise.
KEPT = ("drop_ratio", "drop_stages", "drop_at", "drop_blocks", "criterion", "mask_ratio")

# The flags that each task has a use for.
MODEL = {"checkpoint", "device", "seed", "limit", *KEPT[:-1]}
USED = {
    "--log": {"log", "metrics", "out"},
    "--coverage": MODEL | {"coverage", "weights", "heads", "image_size", "mask_ratio"},
    "a detector": MODEL | {"images", "score_threshold", "out"},
    "the patches of PTR": MODEL | {
        "images", "weights", "heads", "image_size", "mask_ratio", "masked", "heatmap", "out",
    },
}  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """All flags; those that are None by default take a value that depends on the checkpoint."""
    parser = engine.flag_parser(__doc__)
    parser.add_argument("images", nargs="*", help="files, or folders with image files (default: built-in ones)")
    add = functools.partial(engine.add_flag, parser.add_argument_group("what to do, instead of a picture of images"))
    add("--log", None, "draw the curves of these runs' metrics.jsonl", nargs="+", metavar="RUN")
    add("--metrics", None, "with --log: these columns alone (default: all)", nargs="+", metavar="COLUMN")
    add("--coverage", False, "print how much of the patches that PTR keeps the object of a built-in image covers",
        action="store_true")

    add = functools.partial(engine.add_flag, parser.add_argument_group("model"))
    add("--checkpoint", "runs/pretrain/last.pt", "of pretrain.py, finetune.py or detect.py, or a public MAE, DINO, "
        "DeiT, MoCo v3 or timm ViT", metavar="FILE")
    add("--weights", None, "which encoder of it (default: of pre-training by PCAE the teacher, else the student)",
        choices=("student", "teacher"))
    add("--heads", None, "attention heads, where the file does not say", type=int)
    add("--image-size", None, "pixels: one number or height and width (default: the encoder's)", type=int, nargs="+",
        metavar="PIXELS")
    add("--device", "auto", "cpu, cuda, mps, ...")

    add = functools.partial(engine.add_flag, parser.add_argument_group("token reduction (PTR; defaults: the file's)"))
    add("--drop-ratio", None, "share of its tokens that each stage drops (default: the file's; .5 where it has none)",
        type=float)
    engine.add_ptr_flags(add)
    add("--masked", False, "give PTR the masked patches alone, as in pre-training; else the whole image",
        action="store_true")
    add("--mask-ratio", 0.75, "share of the patches that is masked")

    add = functools.partial(engine.add_flag, parser.add_argument_group("picture"))
    add("--out", "picture.png", "where it is written", metavar="FILE.png")
    add("--limit", None, "take N of the built-in images, and of each folder (default: 8; with --coverage 2000)",
        type=int, metavar="N")
    add("--heatmap", False, "paint the redundancy of the tokens at each stage", action="store_true")
    add("--score-threshold", 0.5, "draw what a detector is at least so sure of")
    add("--seed", 0, "of the masked patches, the random criterion and the untrained encoder")
    return parser


# --- settings ---------------------------------------------------------------------------------------------------------


def read_settings(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The arguments, checked as far as no file is needed for it, and the given ones. Raises UserError."""
    args, given = engine.parse_arguments(arguments(), {}, argv)
    if not args.images:  # argparse sets it anyway
        del given["images"]
    if args.log is not None or args.coverage:
        check_used(given, "--log" if args.log is not None else "--coverage")
    least = 2 if args.coverage else 1  # images; of one alone there is no standard error
    requirements = [
        (args.metrics is None or args.log is not None, "--metrics goes with --log"),
        (Path(args.out).suffix.lower() == ".png", f"--out must end in .png, got {args.out}"),
        (args.limit is None or args.limit >= least, f"--limit must be {least} or more, got {args.limit}"),
        (0 < args.mask_ratio < 1, f"--mask-ratio must be in (0, 1), got {args.mask_ratio}"),
        (0 <= args.score_threshold <= 1, f"--score-threshold must be in [0, 1], got {args.score_threshold}"),
        (0 <= args.seed < 2**32, f"--seed must be in [0, 2^32), got {args.seed}"),
        (len(args.image_size or ()) <= 2, f"--image-size must be one number or two, got {args.image_size}"),
    ]
    for holds, need in requirements:
        if not holds:
            raise UserError(need)
    return args, given


def check_used(given: dict[str, Any], task: str) -> None:
    """Raise UserError for a given flag that `task` has no use for."""
    for name in given.keys() - USED[task]:
        flag = "IMAGES" if name == "images" else f"--{name.replace('_', '-')}"
        raise UserError(f"{flag} means nothing to {task}: leave it out")


@dataclass(frozen=True)
class Subject:
    """An encoder to look into: with PTR, with or without its class token, and its classifier if it is one's."""

    encoder: ViT
    class_token: bool
    ptr: PTR
    classifier: Classifier | None = None
    classes: tuple[str, ...] = ()


def load_subject(args: argparse.Namespace, given: dict[str, Any], checkpoint: dict[str, Any]) -> Subject:
    """The encoder in a loaded checkpoint, as it is used: PCAE's teacher knows no class token. Raises UserError.

    Completes `args` by the settings of a checkpoint of ours.
    """
    saved = {}
    if "method" in checkpoint and "encoder" in checkpoint:  # ours
        script = finetune if checkpoint["method"] == "finetune" else pretrain
        saved = engine.saved_settings(checkpoint, script.arguments(), args.checkpoint)
    saved = engine.settings_left_to(saved, KEPT, given)
    if isinstance(saved.get("drop_ratio"), list):  # finetune.py takes several
        saved["drop_ratio"] = saved["drop_ratio"][0]
    vars(args).update(saved)
    drops = bool(args.drop_ratio)
    if "drop_ratio" not in given:
        args.drop_ratio = args.drop_ratio or 0.5
    teacher = checkpoint.get("method") == "pcae" and args.weights != "student"
    weights = args.weights or ("teacher" if teacher else "student")
    options = dict(image_size=args.image_size and data.sides(args.image_size), heads=args.heads)
    try:
        classifier = None
        if weights == "student" and "head.weight" in find_weights(checkpoint):
            classifier = load_classifier(checkpoint, **options).eval()
            encoder = classifier.encoder
        else:
            encoder = load_encoder(checkpoint, weights=weights, **options).eval()
        visible = count_visible(encoder.num_patches, args.mask_ratio) if args.masked or args.coverage else 0
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--checkpoint {args.checkpoint}: {error}") from None
    if classifier is not None and args.masked:
        raise UserError(f"--masked is not for {args.checkpoint}: a classifier sees whole images")
    ptr = engine.token_reduction(args, len(encoder.blocks), encoder.num_patches - visible, args.drop_ratio)
    if not ptr.blocks:
        raise UserError("nothing would be dropped: raise --drop-ratio and --drop-stages")
    classes = tuple(map(str, checkpoint.get("classes", ()))) if classifier is not None else ()
    if classifier is not None:
        classifier.ptr = ptr if drops else PTR()  # it answers as it was trained, whatever the picture shows
    return Subject(encoder, not teacher, ptr, classifier, classes)


def read_images(
    args: argparse.Namespace, read: Callable[[str], Tensor], channels: int, built_in: Callable[[int], list[Tensor]]
) -> list[Tensor]:
    """The images to draw, uint8 (C, H, W); an unreadable one is named and left out. Raises UserError if all are."""
    limit = args.limit or 8
    if not args.images:
        images = built_in(limit)
    else:
        found = [data.find_images(Path(name), flag="") if Path(name).is_dir() else [name] for name in args.images]
        images = []
        for path in tqdm([path for some in found for path in data.at_most(some, limit)], "reading", leave=False):
            try:
                images.append(read(path))
            except UnreadableImage as error:
                tqdm.write(f"skipped an unreadable image: {error}")
        if not images:
            raise UserError(f"not one image can be read of {', '.join(args.images)}")
    return images if channels == 3 else [tvf.rgb_to_grayscale(image) for image in images]


# --- what PTR does ----------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """One drop: the patches that were there (B, n), their tokens' redundancy (B, n), the patches it kept (B, k)."""

    given: Tensor
    redundancy: Tensor
    kept: Tensor


@torch.no_grad()
def trace(subject: Subject, images: Tensor, patch_ids: Tensor, *seed: int | str) -> list[Stage]:
    """What each stage of PTR does to patches `patch_ids` (B, n) of images (B, C, H, W), normalised.

    The encoder itself is run, once up to each stage: what a stage keeps does not depend on later ones. The `random`
    criterion draws the same each time, from `seed`.
    """
    encoder, ptr, stages, given = subject.encoder, subject.ptr, [], patch_ids
    blocks = sorted(ptr.blocks)
    for i, block in enumerate(tqdm(blocks, "stages", leave=False, delay=2)):
        outputs: list[Tensor] = []
        engine.seed_generators(images.device, *seed)
        with encoder.blocks[block].register_forward_hook(lambda *call, seen=outputs: seen.append(call[-1])):
            so_far = replace(ptr, blocks=tuple(blocks[: i + 1]))
            kept = encoder(images, patch_ids, class_token=subject.class_token, ptr=so_far).patch_ids
        scores = redundancy(outputs[0][:, int(subject.class_token) :])
        stages.append(Stage(given, scores, kept))
        given = kept
    return stages


@torch.no_grad()
def answers(subject: Subject, images: Tensor, *seed: int | str) -> list[str]:
    """What the classifier says of normalised images (B, C, H, W), and how sure it is."""
    engine.seed_generators(images.device, *seed)
    sure, labels = subject.classifier(images).softmax(dim=1).max(dim=1)
    names = subject.classes or [f"class {i}" for i in range(int(labels.max()) + 1)]
    return [f"{names[label]} {100 * share:.1f} %" for label, share in zip(labels.tolist(), sure.tolist(), strict=True)]


def chosen_patches(args: argparse.Namespace, subject: Subject, count: int, masked: bool, start: int = 0) -> Tensor:
    """The patches (B, n) that PTR is given of images `start` to `start + count`: all, or those masked at random."""
    num_patches = subject.encoder.num_patches
    if not masked:
        return torch.arange(num_patches).expand(count, -1)
    draws = [torch.rand(num_patches, generator=engine.generator(args.seed, "split", start + i)) for i in range(count)]
    return split_patches(torch.stack(draws), args.mask_ratio)[1]


# --- the picture ------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of the picture: lines of text, images uint8 (B, 3, H, W) below them, and what is under those."""

    header: list[str]
    images: Tensor
    footer: Tensor | None = None  # uint8 (3, h, W)


def enlarge(images: Tensor, side: int) -> tuple[Tensor, int]:
    """Images (..., H, W), each pixel a square so large that the shorter side has `side` pixels or more; how large."""
    scale = max(1, math.ceil(side / min(images.shape[-2:])))
    return images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1), scale


def patch_map(values: Tensor, ids: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Values (B, n) of patches `ids` for each of their `size` x `size` pixels, 0 elsewhere: (B, 1, H, W)."""
    whole = values.new_zeros(len(ids), math.prod(grid)).scatter(1, ids, values)
    return repeat(whole, "b (h w) -> b 1 (h p) (w q)", h=grid[0], p=size, q=size)


def fade(images: Tensor) -> Tensor:
    """Grey images of little contrast, as dropped patches are shown: uint8 (B, 3, H, W)."""
    return (0.25 * tvf.rgb_to_grayscale(images, 3).float() + 100).byte()


def hatch(height: int, width: int) -> Tensor:
    """Diagonal stripes, as the patches that PTR is not given are shown: uint8 (H, W)."""
    return torch.where((torch.arange(height)[:, None] + torch.arange(width)) // 4 % 2 == 0, 255, 215).byte()


def paint(values: Tensor) -> Tensor:
    """Values in [0, 1] on the scale of colours, from dark to light: (B, 1, H, W) -> uint8 (B, 3, H, W)."""
    place = values[:, 0].clamp(0, 1) * (len(SCALE) - 1)
    low = place.long().clamp(max=len(SCALE) - 2)
    mixed = torch.lerp(SCALE[low], SCALE[low + 1], (place - low)[..., None])  # (B, H, W, 3)
    return (255 * mixed).round().byte().movedim(-1, 1)


def text_strip(lines: list[str], width: int) -> Tensor:
    """Lines of text in the middle of a white strip: uint8 (3, H, `width`)."""
    strip, font = Image.new("RGB", (width, 17 * len(lines)), "white"), ImageFont.load_default(12)
    for i, line in enumerate(lines):
        ImageDraw.Draw(strip).text((width / 2, 17 * i + 8), line, "black", font, "mm")
    return tvf.pil_to_tensor(strip)


def colour_bar(low: float, high: float, width: int) -> Tensor:
    """The scale of colours between the two values it stands for: uint8 (3, H, `width`)."""
    ends = [text_strip([f"{value:.2f}"], 36) for value in (low, high)]
    bar = paint(torch.linspace(0, 1, width - 72).expand(1, 1, ends[0].shape[1], -1))[0]
    return torch.cat([ends[0], bar, ends[1]], dim=2)


def patch_columns(args: argparse.Namespace, encoder: ViT, images: Tensor, stages: list[Stage]) -> list[Column]:
    """The input, uint8 (B, 3, H, W), and what each stage makes of it; `legend` says how to read them.

    Kept patches look as they are; with `--heatmap` all that a stage is given have the colour of their redundancy, and
    those it keeps a dot.
    """
    given = stages[0].given
    images, scale = enlarge(images, 128)
    size = encoder.arguments["patch_size"] * scale
    height, width = images.shape[-2:]
    on_patches = functools.partial(patch_map, grid=encoder.grid, size=size)

    def mark(ids: Tensor) -> Tensor:
        return on_patches(torch.ones_like(ids, dtype=torch.bool), ids)

    rest = torch.where(mark(given), fade(images), hatch(height, width))
    down, right = (torch.arange(n) % size + 0.5 - size / 2 for n in (height, width))  # from a patch's middle
    dot = torch.hypot(down[:, None], right) < size / 7

    columns = [Column(["input", ""], images)]
    if args.masked:
        text = f"{given.shape[1]} of {encoder.num_patches} patches"
        columns.append(Column(["masked part", text], torch.where(mark(given), images, rest)))
    for i, stage in enumerate(stages, start=1):
        shown, on_top, footer = images, mark(stage.kept), None
        if args.heatmap:
            low, high = stage.redundancy.aminmax()
            heat = on_patches((stage.redundancy - low) / (high - low).clamp(min=1e-9), stage.given)
            dots = mark(stage.kept) & dot
            shown = torch.where(dots, torch.where(heat < 0.6, 255, 0).byte(), paint(heat))
            on_top, footer = mark(stage.given), colour_bar(low.item(), high.item(), width)
        text = f"{stage.kept.shape[1]} of {given.shape[1]} patches"
        columns.append(Column([f"stage {i}", text], torch.where(on_top, shown, rest), footer))
    return columns


def legend(args: argparse.Namespace) -> list[str]:
    """How to read the picture."""
    lines = ["grey: dropped"]
    if args.heatmap:
        lines = ["colour: redundancy", "dot: kept", "no dot: dropped here", "grey: dropped before"]
    return lines + (["hatched: for the student"] if args.masked else [])


def tile(images: list[Tensor], columns: int) -> Tensor:
    """Images uint8 (3, H, W) of one size beside and below each other, on white."""
    return make_grid(torch.stack(images), nrow=columns, padding=GAP, pad_value=255)


def sheet(columns: list[Column], captions: list[str], legend: list[str]) -> Tensor:
    """Columns beside each other, captions (if any) under the first one's images, all on one sheet: uint8 (3, H, W)."""
    count, width = len(columns), columns[0].images.shape[-1]
    rows = [image for row in zip(*(column.images for column in columns), strict=True) for image in row]
    if captions:
        below = [text_strip([captions[i // count] if i % count == 0 else ""], width) for i in range(len(rows))]
        rows = [torch.cat(pair, dim=1) for pair in zip(rows, below, strict=True)]
    parts = [tile([text_strip(column.header, width) for column in columns], count)[:, :-GAP], tile(rows, count)]
    if any(column.footer is not None for column in columns):
        blank = text_strip([""], width)
        parts.append(tile([blank if column.footer is None else column.footer for column in columns], count)[:, GAP:])
    return torch.cat([*parts, text_strip([*legend, ""], parts[0].shape[-1])], dim=1)


def draw_patches(args: argparse.Namespace, subject: Subject, device: torch.device) -> Tensor:
    """What PTR keeps of images, stage by stage, as one picture: uint8 (3, H, W)."""
    encoder = subject.encoder
    size, channels = encoder.image_size, encoder.arguments["channels"]
    view = data.evaluation_view(size)
    images = read_images(
        args, lambda path: view(data.read_image(path)), channels, lambda n: list(data.Shapes("val", n, size).images)
    )
    images = torch.stack(images)
    normalized = data.Normalize(channels).to(device)(images)
    ids = chosen_patches(args, subject, len(images), args.masked)
    stages = [Stage(*(x.cpu() for x in stage)) for stage in trace(subject, normalized, ids.to(device), args.seed)]
    captions = answers(subject, normalized, args.seed) if subject.classifier is not None else []
    return sheet(patch_columns(args, encoder, images.expand(-1, 3, -1, -1), stages), captions, legend(args))


# --- the picture in numbers -------------------------------------------------------------------------------------------


def coverage(args: argparse.Namespace, subject: Subject, masked: bool, device: torch.device) -> Tensor:
    """Of `--limit` validation images of `shapes`, how the object lies on the patches left at each stage.

    Returns (n, 1 + S, 3), first of all that PTR is given: the share of their pixels that the object covers, and the
    share of the patches that it covers in part and as a whole.
    """
    encoder, results = subject.encoder, []
    size, channels, patch_size = encoder.image_size, encoder.arguments["channels"], encoder.arguments["patch_size"]
    normalize = data.Normalize(channels).to(device)
    for start in tqdm(range(0, args.limit or COUNTED, 100), "counting", leave=False):
        indices = range(start, min(start + 100, args.limit or COUNTED))
        images, _, covered = data.draw_shapes("val", indices, size)
        images = images if channels == 3 else tvf.rgb_to_grayscale(images)
        covered = reduce(covered, "b (h p) (w q) -> b (h w)", "mean", p=patch_size, q=patch_size)
        each = torch.stack([covered, (covered > 0) & (covered < 1), covered == 1], dim=-1)  # (B, N, 3)
        ids = chosen_patches(args, subject, len(indices), masked, start)
        stages = trace(subject, normalize(images), ids.to(device), args.seed, start)
        left = [ids, *(stage.kept.cpu() for stage in stages)]
        results.append(torch.stack([gather_tokens(each, some).mean(dim=1) for some in left], dim=1))
    return torch.cat(results)


def coverage_table(args: argparse.Namespace, subject: Subject, masked: bool, device: torch.device) -> str:
    """Coverage by the object at each stage, for each criterion and for an encoder that was never trained."""
    engine.seed_generators(torch.device("cpu"), args.seed, "weights")  # as pretrain.py begins
    untrained = ViT(**subject.encoder.arguments).to(device).eval()
    subjects = {criterion: replace(subject, ptr=replace(subject.ptr, criterion=criterion)) for criterion in CRITERIA}
    subjects["untrained"] = replace(subject, encoder=untrained, ptr=subjects["similarity"].ptr)
    found = {name: coverage(args, some, masked, device) for name, some in subjects.items()}
    counts = [chosen_patches(args, subject, 1, masked).shape[1]]
    for _ in subject.ptr.blocks:
        counts.append(num_kept(counts[-1], subject.ptr.drop_ratio))

    def cells(shares: list[Tensor]) -> str:
        return "".join(f"{100 * x.mean():8.1f} ± {100 * x.std() / len(x) ** 0.5:.1f}" for x in shares)

    title = f"of {'the masked part' if masked else 'the whole image'}"
    lines = [f"{title:22}" + "".join(f"{name:>14}" for name in subjects) + "  |  by similarity: outline, inside"]
    for i, count in enumerate(counts):
        name = f"  {f'stage {i}' if i else 'given'}: {count} patches"
        right = cells([found["similarity"][:, i, j] for j in (1, 2)])
        lines.append(f"{name:22}{cells([some[:, i, 0] for some in found.values()])}  |{right}")
    return "\n".join(lines)


def print_coverage(args: argparse.Namespace, subject: Subject, device: torch.device) -> None:
    """`--coverage`: both tables, and what the numbers are."""
    print(
        "How much of the patches that PTR keeps the object covers, in % of their pixels: the mean of\n"
        f"{args.limit or COUNTED:,} validation images of shapes ± its standard error. What PTR is given is what chance "
        "would keep;\n`untrained` has random weights. On the right: the share of patches on the object's outline "
        "(covered\nin part) and inside it (covered as a whole)."
    )
    for masked in (False, True):
        print(coverage_table(args, subject, masked, device))


# --- detections -------------------------------------------------------------------------------------------------------


def read_for_detector(path: str | Path) -> Tensor:
    """An image of any size that a detector can resize, uint8 (3, H, W). Raises UnreadableImage."""
    image = data.read_image(path)
    data.refuse_thin(path, tuple(image.shape[-2:]))
    return image


def draw_objects(image: Tensor, found: dict[str, Tensor], names: list[str], threshold: float) -> Tensor:
    """An image, uint8 (3, H, W), with boxes, masks, names and scores of what scores `threshold` or more.

    Small images are enlarged and large ones reduced, so that the text can be read.
    """
    short = min(image.shape[-2:])
    scale = math.ceil(256 / short) if short < 256 else min(1.0, 480 / short)
    size = [round(scale * side) for side in image.shape[-2:]]
    sure = found["scores"] >= threshold
    boxes, labels, scores = (found[name][sure] for name in ("boxes", "labels", "scores"))
    masks = tvf.resize(found["masks"][sure][:, 0] >= 0.5, size, InterpolationMode.NEAREST)
    image = tvf.resize(image, size, InterpolationMode.NEAREST if scale > 1 else InterpolationMode.BILINEAR)
    if not len(boxes):
        return image
    labels = [label - 1 for label in labels.tolist()]  # 0 is the background
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    texts = [f"{names[label]} {score:.2f}" for label, score in zip(labels, scores.tolist(), strict=True)]
    return draw_bounding_boxes(
        draw_segmentation_masks(image, masks, alpha=0.5, colors=colours), boxes * scale, texts, colours, width=2,
        fill_labels=True, label_colors="white", label_background_colors=colours,
    )  # fmt: skip


@torch.no_grad()
def draw_detections(args: argparse.Namespace, given: dict[str, Any], device: torch.device) -> Tensor:
    """What a detector finds in images, up to four of them beside each other: uint8 (3, H, W)."""
    check_used(given, "a detector")
    flags = engine.as_words({name: given[name] for name in KEPT if name in given})
    settings, checkpoint = detect.read_settings(["--eval", args.checkpoint, *flags])
    model = detect.load_detector(settings, checkpoint).to(device).eval()
    engine.seed_generators(device, args.seed)
    size = (settings.short_side[-1],) * 2
    images = read_images(
        args, read_for_detector, model.backbone.encoder.arguments["channels"],
        lambda count: [data.draw_scene("val", i, size)[0] for i in range(count)],
    )  # fmt: skip
    names, drawn = [name for _, name in checkpoint["categories"]], []
    for image in tqdm(images, "detecting", leave=False):
        (found,) = model(detect.to_device([image], device))
        found = {name: tensor.cpu() for name, tensor in found.items()}
        drawn.append(draw_objects(image.expand(3, -1, -1), found, names, args.score_threshold))
    height, width = (max(image.shape[i] for image in drawn) for i in (1, 2))
    padded = [F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1]), value=255) for x in drawn]
    return tile(padded, columns=4)


# --- curves -----------------------------------------------------------------------------------------------------------

Curve = list[tuple[float, float]]  # epoch, value


def read_log(run: str) -> list[dict[str, Any]]:
    """The rows of a run folder's metrics.jsonl, but for a last line that was cut short. Raises UserError."""
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--log {run}: {path} cannot be read ({engine.reason(error)})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append(row | dict(epoch=float(row["epoch"])))
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise UserError(f"--log {run}: line {number} of {path} is no row of a log") from None
            print(f"warning: the last line of {path} is cut short, and left out")
    if not rows:
        raise UserError(f"--log {run}: there is no row in {path} yet")
    return rows


def read_curves(rows: list[dict[str, Any]]) -> dict[str, Curve]:
    """The curve of each column that holds numbers; what is missing or not finite is left out."""
    curves: dict[str, Curve] = {}
    for row in sorted(rows, key=len, reverse=True):  # the longest ones know the columns' order
        for name, value in row.items():
            if name not in ("epoch", "step") and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((row["epoch"], value))
    return {name: sorted(curve) for name, curve in curves.items()}


def ticks(low: float, high: float, most: int = 5) -> list[tuple[float, str]]:
    """At most `most` round numbers in [low, high], 1, 2 or 5 times a power of ten apart, and how they are written."""
    power = math.floor(math.log10((high - low) / most))
    step = next(f * 10.0**power for f in (1, 2, 5, 10, 20) if (high - low) / (f * 10.0**power) <= most - 1)
    decimals = max(0, -math.floor(math.log10(step) + 1e-6))
    numbers = [step * i for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]
    return [(x, f"{x:.{decimals}f}" if decimals < 7 and abs(x) < 1e6 else f"{x:g}") for x in numbers]


def limits(values: list[float]) -> tuple[float, float]:
    """Where an axis begins and ends: a little beyond the values."""
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


class Paper:
    """A white page in units of half a pixel of the final picture: drawn larger still and reduced, for smooth lines."""

    ZOOM = 4

    def __init__(self, width: int, height: int):
        self.page = Image.new("RGB", (self.ZOOM * width, self.ZOOM * height), "white")
        self.draw = ImageDraw.Draw(self.page)

    def line(self, points: list[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        zoomed = [(self.ZOOM * x, self.ZOOM * y) for x, y in points]
        self.draw.line(zoomed, colour, round(self.ZOOM * width), joint="curve")

    def dot(self, x: float, y: float, colour: str, radius: float = 2.2) -> None:
        self.draw.circle((self.ZOOM * x, self.ZOOM * y), self.ZOOM * radius, colour)

    def text(self, x: float, y: float, text: str, anchor: str, colour: str = "#444444", size: int = 11) -> None:
        """`anchor` says which part of the text is at (x, y): l, m or r, then t, m or b (Pillow's names)."""
        self.draw.text((self.ZOOM * x, self.ZOOM * y), text, colour, ImageFont.load_default(self.ZOOM * size), anchor)

    def picture(self) -> Image.Image:
        return self.page.reduce(2)


def draw_panel(
    paper: Paper, box: tuple[float, float, float, float], title: str, curves: list[tuple[str, Curve]]
) -> None:
    """Axes with ticks inside `box` (left, top, right, bottom), and a line for each (colour, curve) over the epochs."""
    left, top, right, bottom = box
    xs, ys = zip(*(point for _, curve in curves for point in curve), strict=True)
    (x0, x1), (y0, y1) = limits(xs), limits(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    for y, text in ticks(y0, y1):
        paper.line([place(x0, y), place(x1, y)], "#e4e4e4")
        paper.text(left - 6, place(x0, y)[1], text, "rm")
    for x, text in ticks(x0, x1, most=7):
        paper.line([place(x, y0), (place(x, y0)[0], bottom + 3)], "#444444")
        paper.text(place(x, y0)[0], bottom + 5, text, "mt")
    paper.line([(left, top), (left, bottom), (right, bottom)], "#444444")
    paper.text(left, top - 12, title, "ls", "black", 12)
    paper.text(right, bottom + 17, "epoch", "rt")
    for colour, curve in curves:
        points = [place(x, y) for x, y in curve]
        paper.line(points, colour, 1.5)
        for point in points if len(points) <= 30 else ():
            paper.dot(*point, colour)


def draw_curves(logs: dict[str, dict[str, Curve]], metrics: list[str] | None) -> Image.Image:
    """A panel for each metric, with a curve for each run that has it. Raises UserError."""
    known = list(dict.fromkeys(name for curves in logs.values() for name in curves))
    unknown = [name for name in metrics or () if name not in known]
    if unknown or not known:
        missing = f"--metrics {unknown[0]}" if unknown else "column with numbers"
        raise UserError(f"there is no {missing} in these logs, but {', '.join(known) or 'nothing to draw'}")
    if len(logs) > len(COLOURS):
        raise UserError(f"--log takes at most {len(COLOURS)} runs: more could not be told apart")
    names, width, height = metrics or known, 290, 190
    columns, top = min(3, len(names)), 16 + 18 * len(logs)
    paper = Paper(columns * width, top + math.ceil(len(names) / columns) * height)
    for i, (run, colour) in enumerate(zip(logs, COLOURS, strict=False)):
        paper.line([(16, 18 + 18 * i), (40, 18 + 18 * i)], colour, 2)
        paper.text(48, 18 + 18 * i, run, "lm", "black", 12)
    for i, name in enumerate(names):
        x, y = i % columns * width, top + i // columns * height
        curves = [(colour, log[name]) for log, colour in zip(logs.values(), COLOURS, strict=False) if name in log]
        draw_panel(paper, (x + 58, y + 30, x + width - 16, y + height - 36), name, curves)
    return paper.picture()


# --- the run ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args, given = read_settings(argv)
    if args.log is not None:
        picture = draw_curves({run: read_curves(read_log(run)) for run in args.log}, args.metrics)
    else:
        device = engine.start_world(args.device).device
        checkpoint = engine.load_checkpoint(args.checkpoint)
        if checkpoint.get("method") == "detect":
            picture = tvf.to_pil_image(draw_detections(args, given, device))
        else:
            if not args.coverage:
                check_used(given, "the patches of PTR")
            subject = load_subject(args, given, checkpoint)
            (subject.classifier or subject.encoder).to(device)
            if args.coverage:
                return print_coverage(args, subject, device)
            picture = tvf.to_pil_image(draw_patches(args, subject, device))
    engine.replace_file(Path(args.out), lambda file: picture.save(file, "PNG", optimize=True))
    print(f"written: {args.out}")


if __name__ == "__main__":
    engine.launch(main)
