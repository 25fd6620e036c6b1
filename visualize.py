"""Draw the patches that PTR keeps, the predictions of a classifier or detector, and learning curves.

    python visualize.py                                            synthetic images: input, stages 1, 2 and 3
    python visualize.py FOLDER PHOTO.jpg --checkpoint FILE         your images; FILE: ours or a public ViT (MAE, ...)
    python visualize.py --masked --heatmap                         as in pre-training, with the scores of the tokens
    python visualize.py --checkpoint runs/finetune/best.pt         with the classifier's predictions
    python visualize.py --checkpoint runs/detect/best.pt           boxes, masks and scores of the detector
    python visualize.py --log runs/pretrain runs/other             curves of metrics.jsonl, runs overlaid

Grey patches were dropped; light patches were not given to PTR. The colours of scores, from low to high: black, red,
yellow, white.
"""

import argparse
import itertools
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import util.threads  # noqa: F401 (before torch)

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

import coco
import data
import detect
import ptr
import weights
from model import ViT, patchify, split_patches
from ptr import CRITERIA, PTR, gather_tokens, scatter_tokens
from util import runs, training
from util.image_files import UnreadableImage, find_images, read_image
from util.shapes import draw_scene
from util.small_images import in_channels

# Groups of settings taken from the checkpoint, unless a flag of the group is given.
FROM_CHECKPOINT = (("data",), ("data_root",), ("mask_ratio",), *ptr.FLAG_GROUPS)

GAP, LINE = 8, 17  # pixels between tiles; height of a line of text
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b3fbf", "#8a8a00")  # of classes


def arguments() -> argparse.ArgumentParser:
    """Build the parser. Settings of the checkpoint override these defaults."""
    parser = runs.flag_parser(__doc__)
    parser.add_argument("images", nargs="*", help="files, or folders with image files (default: those of --data)")

    add = parser.add_argument_group("picture").add_argument
    add("--out", default="picture.png", metavar="FILE", help="image file to write")
    sets = f"show validation images of {', '.join(data.SETS)}, or a folder (default: the checkpoint's, else shapes)"
    add("--data", default="shapes", metavar="NAME", help=sets)
    root = "folder of torchvision's sets (default: the checkpoint's, else data)"
    add("--data-root", default="data", metavar="FOLDER", help=root)
    add("--limit", type=training.positive, default=8, metavar="N", help="number of images of --data or of each folder")
    add("--masked", action="store_true", help="give PTR only the masked patches, as in pre-training")
    add("--heatmap", action="store_true", help="also show the scores of the tokens")
    add("--score-threshold", type=float, default=0.5, metavar="SCORE", help="minimum score of drawn detections")
    add("--log", nargs="+", metavar="RUN", help="only draw the learning curves of these run folders")
    add("--metrics", nargs="+", metavar="NAME", help="columns to draw with --log (default: all)")

    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", default="runs/pretrain/last.pt", metavar="FILE", help="our checkpoint or a public ViT")
    weights.add_file_flags(add, default=None, usual="teacher of PCAE, else student")
    add("--pool", choices=weights.POOLS, help="pooling of a public classifier, if its file does not record it")
    runs.add_device_flags(add)

    add = parser.add_argument_group("token reduction (PTR)").add_argument
    masked = "fraction of the patches that are masked (with --masked) (default: the checkpoint's, else 0.75)"
    add("--mask-ratio", type=float, default=0.75, help=masked)
    ratio = "fraction of the tokens that PTR drops at each stage"
    default = "the checkpoint's; 0.5 if that is 0 or unknown, except for a detector"
    add("--drop-ratio", type=float, help=f"{ratio} (default: {default})")
    ptr.add_flags(add, before="the checkpoint's, else ")
    return parser


def read_images(names: list[str], limit: int) -> list[Tensor]:
    """Read image files, and at most `limit` of each folder, spread evenly, as uint8 (3, H, W).

    Skips unreadable images. Ends the script if all are.
    """
    images = []
    for name in names:
        paths = find_images(Path(name)) if Path(name).is_dir() else [name]
        count = min(limit, len(paths))
        for path in (paths[i * len(paths) // count] for i in range(count)):  # not only the first class
            try:
                images.append(read_image(path))
            except UnreadableImage as error:
                warnings.warn(f"skipped an unreadable image: {error}", stacklevel=2)
    if names and not images:
        raise SystemExit(f"error: all images of {', '.join(names)} are unreadable")
    return images


def single(drop_ratio: float | list[float] | None) -> float | None:
    """Return a recorded drop ratio as a number; detect.py records a list of length 1."""
    return drop_ratio[0] if isinstance(drop_ratio, list) else drop_ratio


def validation_images(name: str, root: str, size: tuple[int, int], limit: int) -> list[Tensor]:
    """Return validation images of a set, or images of a folder (its `val/`, if any), as uint8 (3, H, W)."""
    if name in data.SETS:
        return [image for image, _ in data.validation_images(name, root, size, limit)]
    val = Path(name) / "val"
    return read_images([str(val if val.is_dir() else name)], limit)


@torch.no_grad()
def draw_stages(
    encoder: ViT,
    images: Tensor,
    patch_ids: Tensor,
    reduction: PTR,
    *,
    class_token: bool = True,
    heatmap: bool = False,
    captions: Sequence[str] = (),
    seed: int = 0,
) -> Image.Image:
    """Draw the patches of images uint8 (B, 3, H, W) that each PTR stage keeps, given patches `patch_ids` (B, n).

    One row per image, with a caption below its first tile; `heatmap` adds the scores of each stage. Seeds torch's
    generators with `seed`, for the `random` criterion. Raises ValueError if `reduction` does not fit.
    """
    patch_size, device = encoder.patch_size, encoder.cls_token.device
    ptr.token_counts(patch_ids.shape[1], len(encoder.blocks), reduction)
    inputs = data.normalize_for(encoder).to(device)(in_channels(images, encoder.channels))

    # One pass: each stage gets what the stage before keeps. With the same seed, `random` draws the same scores again.
    training.seed_generators(device, seed)
    options = dict(class_token=class_token, ptr=reduction, taps=reduction.blocks)
    encoded = encoder(inputs, patch_ids.to(device), **options)
    given = [ids.cpu() for _, ids in encoded.tapped.values()] + [encoded.patch_ids.cpu()]
    training.seed_generators(device, seed)
    criterion, num_prefix = CRITERIA[reduction.criterion], int(class_token)
    scores = [criterion(tokens[:, num_prefix:]).cpu() for tokens, _ in encoded.tapped.values()]

    # The columns, as patches (B, N, 3 p p)
    images = in_channels(in_channels(images, encoder.channels), 3)
    patches = patchify(images, patch_size)
    grey = patchify(tvf.rgb_to_grayscale(images, 3), patch_size) // 4
    faded = scatter_tokens(grey // 4 + 200, gather_tokens(grey + 100, patch_ids), patch_ids)
    columns, texts = [patches], ["input"]
    for i, (before, after) in enumerate(itertools.pairwise(given)):
        if heatmap:
            low, high = scores[i].aminmax()
            heat = 3 * ((scores[i] - low) / (high - low).clamp(min=1e-9))
            colours = 255 * torch.stack([heat, heat - 1, heat - 2], dim=2).clamp(0, 1)  # (B, n, 3)
            columns.append(scatter_tokens(faded, colours.repeat_interleave(patch_size**2, dim=2), before))
            texts.append(f"scores\n{low:.2f} to {high:.2f}")
        columns.append(scatter_tokens(faded, gather_tokens(patches, after), after))
        texts.append(f"stage {i + 1}\n{after.shape[1]} of {before.shape[1]} kept")
    rows, p = encoder.grid[0], patch_size
    tiles = rearrange(torch.stack(columns, dim=1), "b k (h w) (c p q) -> (b k) c (h p) (w q)", h=rows, c=3, p=p, q=p)
    scale = math.ceil(128 / min(encoder.image_size))  # large enough for text
    return sheet(repeat(tiles, "b c h w -> b c (h s) (w t)", s=scale, t=scale), texts, captions)


@torch.no_grad()
def draw_checkpoint(args: argparse.Namespace, checkpoint: dict[str, Any], device: torch.device) -> Image.Image:
    """Draw the PTR stages of a checkpoint.

    Captions are the predictions of its classifier, if any, with PTR as in training.
    """
    method, options = checkpoint.get("method"), weights.told(args)
    which = args.weights or ("teacher" if method == "pcae" else "student")
    classifier = None
    if which == "student" and "head.weight" in weights.find_weights(checkpoint):
        classifier = weights.load_classifier(checkpoint, pool=args.pool, **options).to(device).eval()
    encoder = classifier.encoder if classifier else weights.load_encoder(checkpoint, weights=which, **options)
    encoder.to(device).eval()
    depth, size = len(encoder.blocks), encoder.image_size

    view = data.CenterView(size, data.evaluation_margin(size))
    images = read_images(args.images, args.limit) or validation_images(args.data, args.data_root, size, args.limit)
    images = torch.stack([view(image) for image in images])
    patch_ids = torch.arange(encoder.num_patches).expand(len(images), -1)
    if args.masked:
        noise = torch.rand(patch_ids.shape, generator=training.generator(args.seed, "split"))
        patch_ids = split_patches(noise, args.mask_ratio)[1]

    captions = []
    if classifier:
        training.seed_generators(device, args.seed)
        inputs = data.normalize_for(encoder).to(device)(in_channels(images, encoder.channels))
        config = checkpoint.get("config", {}) if "method" in checkpoint else {}
        trained = argparse.Namespace(**vars(args) | dict(drop_ratio=0.0) | config)
        logits = classifier(inputs, ptr=ptr.from_args(trained, depth, single(trained.drop_ratio)))
        confidences, labels = logits.softmax(dim=1).max(dim=1)
        names = checkpoint.get("classes") or [f"class {i}" for i in range(logits.shape[1])]
        pairs = zip(labels.tolist(), confidences.tolist(), strict=True)
        captions = [f"{names[i]} {confidence:.1%}" for i, confidence in pairs]
    reduction = ptr.from_args(args, depth, args.drop_ratio)
    class_token = (method, which) != ("pcae", "teacher")  # the teacher has no class token in pre-training
    shown = dict(class_token=class_token, heatmap=args.heatmap, captions=captions, seed=args.seed)
    return draw_stages(encoder, images, patch_ids, reduction, **shown)


def sheet(tiles: Tensor, texts: list[str], captions: Sequence[str]) -> Image.Image:
    """Arrange tiles uint8 (B K, 3, H, W) in K columns headed by `texts`, with `captions` (B or 0) below the first."""
    height, width = tiles.shape[-2:]
    head, below = 2 * LINE, LINE if captions else 0
    grid = make_grid(F.pad(tiles, (0, 0, 0, below), value=255), len(texts), GAP, pad_value=255)
    picture = tvf.to_pil_image(F.pad(grid, (0, 0, head, 0), value=255))
    write, font = ImageDraw.Draw(picture).text, ImageFont.load_default(12)
    for i, text in enumerate(texts):
        write((GAP + width / 2 + i * (width + GAP), (GAP + head) / 2), text, "black", font, "mm", align="center")
    for i, caption in enumerate(captions, start=1):
        write((GAP + width / 2, head + i * (GAP + height + below) - below / 2), caption, "black", font, "mm")
    return picture


@torch.no_grad()
def draw_detections(args: argparse.Namespace, checkpoint: dict[str, Any], device: torch.device) -> Image.Image:
    """Draw what a checkpoint of detect.py finds: boxes, masks, names and scores; four images per row."""
    trained = argparse.Namespace(**checkpoint["config"])
    model = detect.load_detector(trained, checkpoint).to(device).eval()
    encoder, short_side = model.backbone.encoder, trained.short_side[-1]
    reduction = ptr.from_args(args, len(encoder.blocks), args.drop_ratio)
    ptr.token_counts((short_side // encoder.patch_size) ** 2, len(encoder.blocks), reduction)
    images = read_images(args.images, args.limit)
    if not images and args.data != "shapes":
        folder = coco.find_annotations(Path(args.data_root if args.data == "coco" else args.data), "val")[0]
        images = read_images([str(folder)], args.limit)
    images = images or [draw_scene("val", i, (short_side, short_side))[0] for i in range(args.limit)]
    names, tiles = [name for _, name in checkpoint["categories"]], []
    training.seed_generators(device, args.seed)
    for image in images:
        seen = in_channels(image, encoder.channels)
        (found,) = model(detect.to_inputs([seen], device), ptr=reduction)
        sure = found["scores"] >= args.score_threshold
        boxes, labels, scores, masks = (found[name][sure].cpu() for name in ("boxes", "labels", "scores", "masks"))
        scale = 384 / max(image.shape[-2:])  # to a size that fits the text
        size = [round(scale * side) for side in image.shape[-2:]]
        image = tvf.resize(image, size)
        if len(boxes):
            labels = (labels - 1).tolist()  # 0 is the background
            colours = [COLOURS[i % len(COLOURS)] for i in labels]
            texts = [f"{names[i]} {score:.2f}" for i, score in zip(labels, scores.tolist(), strict=True)]
            image = draw_segmentation_masks(image, tvf.resize(masks, size)[:, 0] >= 0.5, 0.5, colours)
            style = dict(width=2, fill_labels=True, label_colors="white", label_background_colors=colours)
            image = draw_bounding_boxes(image, scale * boxes, texts, colours, **style)
        tiles.append(F.pad(image, (0, 384 - size[1], 0, 384 - size[0]), value=255))
    return tvf.to_pil_image(make_grid(tiles, 4, GAP, pad_value=255))


def draw_curves(folders: list[str], metrics: list[str] | None) -> Any:
    """Return a matplotlib figure with one panel per metric and one curve per run."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("error: --log needs matplotlib: pip install matplotlib") from None
    logs = {}
    for folder in folders:
        try:
            logs[folder] = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open(encoding="utf-8")]
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: --log {folder}: missing or unreadable metrics.jsonl ({error})") from None
    known = dict.fromkeys(name for log in logs.values() for row in log for name in row if name not in ("epoch", "step"))
    names = metrics or list(known)
    if not names or set(names) - set(known):
        raise SystemExit(f"error: --metrics {' '.join(names)}: columns of these logs: {', '.join(known) or 'none'}")
    rows, columns = math.ceil(len(names) / 3), min(3, len(names))
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    for i, name in enumerate(names, start=1):
        panel = figure.add_subplot(rows, columns, i, title=name, xlabel="epoch")
        for folder, log in logs.items():
            points = [row for row in log if row.get(name) is not None]
            panel.plot([row["epoch"] for row in points], [row[name] for row in points], ".-", label=folder)
        panel.legend(fontsize="small")
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    if args.log:
        save = draw_curves(args.log, args.metrics).savefig
    else:
        device, checkpoint = training.start_world(args.device).device, runs.load(args.checkpoint)
        args = runs.parse_with_checkpoint(parser, argv, checkpoint, FROM_CHECKPOINT)
        args.drop_ratio = single(args.drop_ratio)
        is_detector, given = checkpoint.get("method") == "detect", runs.given(parser, argv)
        if is_detector:
            runs.reject(given & {"masked", "mask_ratio", "heatmap", "weights", "pool"}, "not used for a detector")
            ptr.check_flags(given, args.drop_ratio)
        elif not (args.drop_ratio or "drop_ratio" in given):
            args.drop_ratio = 0.5  # also show PTR for a checkpoint that drops no tokens
        draw = draw_detections if is_detector else draw_checkpoint
        try:
            with training.autocast(device, args.precision):
                save = draw(args, checkpoint, device).save
        except ValueError as error:
            raise SystemExit(f"error: {args.checkpoint}: {error}") from None
    try:
        save(args.out)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --out {args.out} cannot be written ({error})") from None
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
