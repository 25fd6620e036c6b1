"""See it: the patches that PTR keeps, what a classifier or a detector says of an image, and learning curves.

    python visualize.py                                            built-in images: input, stage 1, stage 2, stage 3
    python visualize.py FOLDER PHOTO.jpg --checkpoint FILE         yours; FILE is ours or a public ViT (MAE, DINO, ...)
    python visualize.py --masked --heatmap                         as in pre-training, with the scores of the tokens
    python visualize.py --checkpoint runs/finetune/best.pt         with the classifier's answers
    python visualize.py --checkpoint runs/detect/best.pt           what the detector finds
    python visualize.py --log runs/pretrain runs/other             curves of metrics.jsonl, one run over the other

Grey patches were dropped, pale ones PTR was not given. Scores are black where they are lowest, then red, yellow, white.
"""

import argparse
import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

import data
import detect
import runs
import training
import weights
from image_files import UnreadableImage, find_images, read_image
from model import patchify, split_patches
from ptr import CRITERIA, gather_tokens, scatter_tokens, token_counts
from shapes import draw_scene
from weights import find_weights, load_classifier, load_encoder, told

# What is taken from the checkpoint, besides the drop ratio, where no flag says otherwise.
KEPT = ("data", "data_root", "drop_stages", "drop_at", "drop_blocks", "criterion", "mask_ratio")

GAP, LINE = 8, 17  # pixels between tiles, and of a line of text
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b3fbf", "#8a8a00")  # of classes


def arguments() -> argparse.ArgumentParser:
    """All flags; the checkpoint's settings of PTR take the place of these defaults."""
    parser = runs.flag_parser(__doc__)
    parser.add_argument("images", nargs="*", help="files, or folders with image files (default: those of --data)")
    add = parser.add_argument_group("picture").add_argument
    add("--out", default="picture.png", metavar="FILE", help="where it is written")
    add("--data", default="shapes", choices=data.SETS, help="set whose validation images are shown")
    add("--data-root", default="data", metavar="FOLDER", help="where torchvision's sets lie")
    add("--limit", type=int, default=8, metavar="N", help="take N images of --data, and N of each folder")
    add("--masked", action="store_true", help="give PTR the masked patches alone, as in pre-training")
    add("--heatmap", action="store_true", help="show the scores by which PTR chooses, too")
    add("--score-threshold", type=float, default=0.5, help="draw what a detector is at least so sure of")
    add("--log", nargs="+", metavar="RUN", help="draw the learning curves of these run folders instead")
    add("--metrics", nargs="+", metavar="NAME", help="with --log: these columns (default: all)")
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", default="runs/pretrain/last.pt", metavar="FILE", help="of ours, or a public ViT")
    add("--weights", choices=("student", "teacher"), help="which encoder of it (default: of PCAE the teacher)")
    weights.add_flags(add)
    add("--pool", choices=("mean", "class"), help="what the head of a public classifier sees, if its file does not say")
    add("--device", default="auto", help="cpu, cuda, mps, ...")
    add("--seed", type=int, default=0, help="of the masked patches and the random criterion")
    add = parser.add_argument_group("token reduction (PTR; defaults: the checkpoint's)").add_argument
    add("--mask-ratio", type=float, default=0.75, help="share of the patches that is masked")
    add("--drop-ratio", type=float, default=0.5, help="share of its tokens that each stage drops; also the default to "
        "show the patches of a checkpoint that drops none")
    runs.add_ptr_flags(add)
    return parser


def read_images(names: list[str], limit: int) -> list[Tensor]:
    """Image files, and at most `limit` of each folder: uint8 (3, H, W). Those that cannot be read are left out."""
    images = []
    for name in names:
        paths = find_images(Path(name)) if Path(name).is_dir() else [name]
        for path in paths[:: max(1, len(paths) // limit)][:limit]:  # from all over a folder, not of its first class
            try:
                images.append(read_image(path))
            except UnreadableImage as error:
                warnings.warn(f"left out an unreadable image: {error}", stacklevel=2)
    if names and not images:
        raise SystemExit(f"error: not one image can be read of {', '.join(names)}")
    return images


@torch.no_grad()
def draw_patches(
    args: argparse.Namespace, trained: argparse.Namespace, checkpoint: dict[str, Any], device: torch.device
) -> Image.Image:
    """What PTR keeps of images, stage by stage, and what a classifier says of them, with PTR as it was `trained`."""
    method = checkpoint.get("method")
    which = args.weights or ("teacher" if method == "pcae" else "student")
    num_prefix = 0 if (method, which) == ("pcae", "teacher") else 1  # that one runs without class token
    classifier = None
    if which == "student" and "head.weight" in find_weights(checkpoint):
        classifier = load_classifier(checkpoint, pool=args.pool, **told(args)).to(device).eval()
    encoder = classifier.encoder if classifier else load_encoder(checkpoint, weights=which, **told(args))
    encoder.to(device).eval()
    channels, patch_size, depth = (encoder.arguments[name] for name in ("channels", "patch_size", "depth"))
    ptr = runs.token_reduction(args, depth, args.drop_ratio)

    # Images, uint8 (B, 3, H, W), and the patches of them that PTR is given, (B, n)
    view = data.CenterView(encoder.image_size, data.evaluation_margin(encoder.image_size))
    images = [view(image) for image in read_images(args.images, args.limit)]
    if not images:
        named = argparse.Namespace(**vars(args), image_size=encoder.image_size, download=False)
        images = [view(image) for image, _ in data.validation_images(named, limit=args.limit)]
    images = torch.stack(images)
    images = images if channels == 3 else tvf.rgb_to_grayscale(images, 3)
    inputs = data.normalize_for(encoder).to(device)(images[:, :channels])
    patch_ids = torch.arange(encoder.num_patches).expand(len(images), -1)
    if args.masked:
        noise = torch.rand(patch_ids.shape, generator=training.generator(args.seed, "split"))
        patch_ids = split_patches(noise, args.mask_ratio)[1]
    token_counts(patch_ids.shape[1], depth, ptr)  # raises ValueError where they do not fit

    # One pass: what a stage keeps is what the next one is given. Of the same seed `random` draws the same scores again.
    training.seed_generators(device, args.seed)
    encoded = encoder(inputs, patch_ids.to(device), class_token=num_prefix > 0, ptr=ptr, taps=ptr.blocks)
    given = [ids.cpu() for _, ids in encoded.tapped.values()] + [encoded.patch_ids.cpu()]
    training.seed_generators(device, args.seed)
    scores = [CRITERIA[ptr.criterion](tokens[:, num_prefix:]).cpu() for tokens, _ in encoded.tapped.values()]

    # The columns, patch by patch: (B, N, 3 p p)
    patches = patchify(images, patch_size)
    grey = patchify(tvf.rgb_to_grayscale(images, 3), patch_size) // 4
    faded = scatter_tokens(grey // 4 + 200, gather_tokens(grey + 100, patch_ids), patch_ids)
    columns, texts = [patches], ["input"]
    for i, (before, after) in enumerate(itertools.pairwise(given)):
        if args.heatmap:
            low, high = scores[i].aminmax()
            heat = 3 * ((scores[i] - low) / (high - low).clamp(min=1e-9))
            colours = 255 * torch.stack([heat, heat - 1, heat - 2], dim=2).clamp(0, 1)  # (B, n, 3)
            columns.append(scatter_tokens(faded, colours.repeat_interleave(patch_size**2, dim=2), before))
            texts.append(f"scores\n{low:.2f} to {high:.2f}")
        columns.append(scatter_tokens(faded, gather_tokens(patches, after), after))
        texts.append(f"stage {i + 1}\n{after.shape[1]} of {before.shape[1]} kept")
    scale = math.ceil(128 / min(encoder.image_size))  # large enough for text
    tiles = repeat(torch.stack(columns, dim=1), "b k (h w) (c p q) -> (b k) c (h p s) (w q t)",
                   h=encoder.grid[0], c=3, p=patch_size, s=scale, t=scale)  # fmt: skip

    captions = []
    if classifier:
        training.seed_generators(device, args.seed)
        logits = classifier(inputs, ptr=runs.token_reduction(trained, depth, trained.drop_ratio))
        shares, labels = logits.softmax(dim=1).max(dim=1)
        names = checkpoint.get("classes") or [f"class {i}" for i in range(logits.shape[1])]
        captions = [f"{names[i]} {share:.1%}" for i, share in zip(labels.tolist(), shares.tolist(), strict=True)]
    return sheet(tiles, texts, captions)


def sheet(tiles: Tensor, texts: list[str], captions: list[str]) -> Image.Image:
    """Tiles, uint8 (B K, 3, H, W), in a column for each of K `texts`, and `captions` (B or none) below the first."""
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
    """What a detector finds in images: boxes, masks, names and scores. Four images beside each other."""
    settings = argparse.Namespace(**checkpoint["config"])
    model = detect.load_detector(settings, checkpoint).to(device).eval()
    encoder, short_side = model.backbone.encoder, settings.short_side[-1]
    ptr = runs.token_reduction(args, len(encoder.blocks), args.drop_ratio)
    token_counts((short_side // model.backbone.patch_size) ** 2, len(encoder.blocks), ptr)
    images = read_images(args.images, args.limit)
    images = images or [draw_scene("val", i, (short_side, short_side))[0] for i in range(args.limit)]
    names, tiles = [name for _, name in checkpoint["categories"]], []
    training.seed_generators(device, args.seed)
    for image in images:
        seen = image if encoder.arguments["channels"] == 3 else tvf.rgb_to_grayscale(image)
        (found,) = model(detect.to_device([seen], device), ptr=ptr)
        sure = found["scores"] >= args.score_threshold
        boxes, labels, scores, masks = (found[name][sure].cpu() for name in ("boxes", "labels", "scores", "masks"))
        scale = 384 / max(image.shape[-2:])  # to a size that goes with that of the text
        size = [round(scale * side) for side in image.shape[-2:]]
        image = tvf.resize(image, size)
        if len(boxes):
            labels = (labels - 1).tolist()  # 0 is the background
            colours = [COLOURS[i % len(COLOURS)] for i in labels]
            texts = [f"{names[i]} {score:.2f}" for i, score in zip(labels, scores.tolist(), strict=True)]
            image = draw_segmentation_masks(image, tvf.resize(masks, size)[:, 0] >= 0.5, 0.5, colours)
            image = draw_bounding_boxes(image, scale * boxes, texts, colours, width=2, fill_labels=True,
                                        label_colors="white", label_background_colors=colours)  # fmt: skip
        tiles.append(F.pad(image, (0, 384 - size[1], 0, 384 - size[0]), value=255))
    return tvf.to_pil_image(make_grid(tiles, 4, GAP, pad_value=255))


def draw_curves(folders: list[str], metrics: list[str] | None) -> Any:
    """A matplotlib figure with a panel for each metric, and in it a curve for each run."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("error: --log draws with matplotlib, which is not there: pip install matplotlib") from None
    logs = {}
    for folder in folders:
        try:
            logs[folder] = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open(encoding="utf-8")]
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: --log {folder} holds no metrics.jsonl that can be read ({error})") from None
    known = dict.fromkeys(name for log in logs.values() for row in log for name in row if name not in ("epoch", "step"))
    names = metrics or list(known)
    if not names or set(names) - set(known):
        raise SystemExit(f"error: --metrics {' '.join(names)}: these logs have {', '.join(known) or 'no columns yet'}")
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
        device = training.start_world(args.device).device
        checkpoint = runs.load(args.checkpoint)
        config = checkpoint.get("config", {}) if "method" in checkpoint else {}  # of a public file nothing is known
        drop_ratio = config.get("drop_ratio", 0.0)
        if isinstance(drop_ratio, list):  # finetune.py and detect.py take several
            drop_ratio = drop_ratio[0]
        kept = {name: config[name] for name in KEPT if name in config}
        if runs.given(parser, argv) & {"drop_stages", "drop_at"}:
            kept["drop_blocks"] = None
        if kept.get("data") not in data.SETS:  # a folder, or a detector's scenes
            kept.pop("data", None)
        parser.set_defaults(**kept, drop_ratio=drop_ratio)
        trained = parser.parse_args([])
        try:
            if checkpoint.get("method") == "detect":
                save = draw_detections(parser.parse_args(argv), checkpoint, device).save
            else:
                parser.set_defaults(drop_ratio=drop_ratio or 0.5)
                save = draw_patches(parser.parse_args(argv), trained, checkpoint, device).save
        except ValueError as error:
            raise SystemExit(f"error: {args.checkpoint}: {error}") from None
    try:
        save(args.out)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --out {args.out} cannot be written ({error})") from None
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
