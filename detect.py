"""Detection and instance segmentation: a plain ViT under a feature pyramid and torchvision's Mask R-CNN.

    python detect.py                                             from runs/pretrain/last.pt, on built-in scenes
    python detect.py --init none                                 the same from scratch, to compare
    python detect.py --data coco --data-root DIR --recipe coco --init FILE    the poster's setting, FILE ours or public
    python detect.py --eval runs/detect/best.pt --drop-ratio 0 0.1 0.2 --per-class    with PTR: AP against speed
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed
from torch.utils.data import DataLoader
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper
from tqdm import tqdm

import data
import engine
from data import CocoDetection, Target
from engine import UserError, World
from model import MODELS, ViT, load_encoder, resize_positions, sincos_position_embedding
from ptr import PTR, drop_tokens, scatter_tokens, token_counts

# What `--recipe` sets; flags that are given win.
RECIPES: dict[str, dict[str, Any]] = {
    "laptop": {},  # the defaults below
    "coco": dict(
        epochs=12, warmup_steps=500, batch_size=32, lr=3e-4, weight_decay=0.05, layer_decay=0.75,
        drop_path=0.2, short_side=list(range(480, 801, 32)), long_side=1333, crop_share=0.5, channels=256, anchor=32,
        rois=512, proposals=1000, model="vit_base", patch_size=16,
    ),
}  # fmt: skip

STRIDES = (4, 8, 16, 32)  # of the pyramid's maps, whatever the patch size
LOSSES = {  # torchvision's names and ours
    "loss_objectness": "loss_object", "loss_rpn_box_reg": "loss_proposal", "loss_classifier": "loss_class",
    "loss_box_reg": "loss_box", "loss_mask": "loss_mask",
}  # fmt: skip
APS = ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")

# What `--eval` takes from the checkpoint where no flag says otherwise.
KEPT = (
    "data", "data_root", "workers", "short_side", "long_side", "channels", "anchor", "rois", "proposals", "drop_ratio",
    "drop_stages", "drop_at", "drop_blocks", "criterion",
)  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """All flags."""
    parser = engine.flag_parser(__doc__)
    add = functools.partial(engine.add_flag, parser.add_argument_group("what to do, instead of training"))
    add("--eval", None, "score a checkpoint of this script, at each --drop-ratio", metavar="FILE")

    engine.add_run_flags(parser, RECIPES, "runs/detect", "args.json, metrics.jsonl, last.pt, best.pt")
    add = functools.partial(engine.add_flag, parser.add_argument_group("data"))
    add("--data", "shapes", "shapes: scenes drawn into --data-root; coco: train2017, val2017 and annotations in "
        "--data-root; or a folder like that")
    add("--data-root", "data", "where coco lies and scenes are drawn", metavar="FOLDER")
    add("--limit", None, "use only N images to train and N to score (default: all; of shapes 400 and 100)", type=int,
        metavar="N")
    add("--workers", None, "processes that load data (default: none for shapes, else up to 8)", type=int)
    add("--short-side", [96], "pixels of an image's shorter side: several to draw from in training; scored at the "
        "last", type=int, nargs="+", metavar="PIXELS")
    add("--long-side", 160, "at most so many pixels of the longer side")
    add("--crop-share", 0.0, "share of the training images that are cropped at random, as DETR does")

    add = functools.partial(engine.add_flag, parser.add_argument_group("model"))
    add("--init", "runs/pretrain/last.pt", "encoder to start from: a checkpoint of ours, a public MAE, DINO, DeiT, "
        "MoCo v3 or timm ViT, or none: from scratch", metavar="FILE")
    add("--weights", "student", "which encoder of --init", choices=("student", "teacher"))
    add("--drop-path", 0.0, "stochastic depth")
    add("--checkpointing", False, "compute activations anew in the backward pass: less memory, about a third slower",
        action="store_true")
    add("--channels", 64, "of the pyramid and the heads")
    add("--anchor", 16, "side of the smallest anchors in pixels; each next level's are twice as large")
    add("--rois", 32, "regions of an image that the heads learn from in a step")
    add("--proposals", 100, "regions of an image that are scored; twice as many to choose --rois from")
    add("--heads", None, "attention heads, where --init does not say (MoCo v3's ViT-S without its projector: 12)",
        type=int)
    add("--model", "vit_mini", "encoder for --init none", choices=MODELS)
    add("--patch-size", 4, "pixels, a power of 2, for --init none")
    add("--dim", None, "width, for --init none (default: the model's)", type=int)
    add("--depth", None, "blocks, for --init none (default: the model's)", type=int)

    add = functools.partial(engine.add_flag, parser.add_argument_group("token reduction (PTR)"))
    add("--drop-ratio", [0.0], "share of its patch tokens that each stage drops: they skip the later blocks and return "
        "before the pyramid; several with --eval", type=float, nargs="+", metavar="RATIO")
    engine.add_ptr_flags(add)

    add = functools.partial(engine.add_flag, parser.add_argument_group("optimisation"))
    engine.add_optimisation_flags(add, epochs=12, blr=3.2e-2, warmup_epochs=0.5, batch_size=8)
    add("--warmup-steps", None, "steps of linear warm-up; overrides --warmup-epochs", type=int)
    add("--lr-drops", None, "epochs after which the learning rate falls to a tenth (default: 3/4 and 11/12 of them)",
        type=float, nargs="*", metavar="EPOCH")
    add("--layer-decay", 0.75, "factor of the learning rate from each block to the one before; 1: the same for all")

    add = functools.partial(engine.add_flag, parser.add_argument_group("results"))
    add("--per-class", False, "print the AP of each class at the end", action="store_true")
    add("--results", None, "write what is found in the end, in COCO's format for results", metavar="FILE.json")
    return parser


# --- settings ---------------------------------------------------------------------------------------------------------


def read_settings(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The arguments, checked as far as the encoder is not needed for it, and the checkpoint to resume or to score."""
    parser = arguments()
    args, given = engine.parse_arguments(parser, RECIPES, argv)
    if args.eval is not None:
        checkpoint = engine.load_checkpoint(Path(args.eval))
        if checkpoint.get("method") != "detect":
            raise UserError(f"--eval {args.eval} is not a checkpoint of this script")
        saved = engine.saved_settings(checkpoint, parser, args.eval)
        args = argparse.Namespace(**(vars(args) | engine.settings_left_to(saved, KEPT, given)))
    else:
        args, checkpoint = engine.resume_settings(parser, args, given, ("detect",))
    if checkpoint is not None:
        needed = dict(encoder=dict, model=dict, categories=list, learned_positions=bool)
        engine.require(checkpoint, args.eval or args.resume or Path(args.out) / "last.pt", **needed)
    if len(args.drop_ratio) > 1 and (args.results or args.eval is None):
        raise UserError(f"--drop-ratio takes one number, but with --eval and no --results; got {args.drop_ratio}")
    if args.eval is not None and args.resume is not None:
        raise UserError("choose one of --eval and --resume")
    if args.results and not Path(args.results).parent.is_dir():
        raise UserError(f"--results {args.results}: there is no folder {Path(args.results).parent}")
    if args.compile:
        raise UserError("--compile is not for detection: each size of an image would compile anew")
    if args.init != "none" and checkpoint is None:
        for name in ("model", "patch_size", "dim", "depth"):
            if name in given:
                raise UserError(f"--{name.replace('_', '-')} goes with --init none: {args.init} says itself what it is")
    if args.lr_drops is None:
        args.lr_drops = [args.epochs * 3 / 4, args.epochs * 11 / 12]
    if args.workers is None:
        args.workers = data.usual_workers(args.data)
    at_least = dict(
        limit=1, dim=1, depth=1, heads=1, drop_stages=0, channels=1, anchor=1, rois=1, proposals=1, warmup_steps=0,
    )  # fmt: skip
    engine.check_values(args, at_least, [
        ("short_side", min(args.short_side) > 0, "positive"),
        ("long_side", max(args.short_side) <= args.long_side, f"at least --short-side = {max(args.short_side)}"),
        ("patch_size", args.patch_size > 0 and args.patch_size & (args.patch_size - 1) == 0, "a power of 2"),
        ("crop_share", 0 <= args.crop_share <= 1, "in [0, 1]"),
        ("layer_decay", 0 < args.layer_decay <= 1, "in (0, 1]"),
        ("lr_drops", all(0 < epoch < args.epochs for epoch in args.lr_drops), f"in (0, --epochs = {args.epochs})"),
    ])  # fmt: skip
    return args, checkpoint


def build_encoder(
    args: argparse.Namespace, checkpoint: dict[str, Any] | None, log: Callable[[str], None] = print
) -> ViT:
    """The encoder of the run in `checkpoint`, or of `--init`, or a new one."""
    engine.seed_generators(torch.device("cpu"), args.seed, "weights")
    try:
        if checkpoint is not None:
            return ViT(**checkpoint["encoder"], drop_path=args.drop_path)
        if args.init == "none":
            sizes = {name: value for name in ("dim", "depth", "heads") if (value := getattr(args, name)) is not None}
            side = 16 * args.patch_size  # any: positions are made for each image's own grid
            return ViT((side, side), args.patch_size, **MODELS[args.model] | sizes, drop_path=args.drop_path)
        source = engine.load_checkpoint(Path(args.init))
        encoder = load_encoder(source, weights=args.weights, heads=args.heads, drop_path=args.drop_path, log=log)
        patch_size = encoder.arguments["patch_size"]
        usable = 2 ** round(math.log2(patch_size))
        if usable != patch_size:
            log(f"patches of {patch_size} pixels are resized to {usable}: the pyramid needs a power of 2")
            encoder = resize_patches(encoder, usable, args.drop_path)
        return encoder
    except (ValueError, KeyError, TypeError) as error:
        source = f"--init {args.init}" if checkpoint is None else "the checkpoint"
        raise UserError(f"{source}: {error}") from None


def resize_patches(encoder: ViT, patch_size: int, drop_path: float = 0.0) -> ViT:
    """The encoder for patches of another size: its kernels resized, and scaled to answer even patches as before."""
    old = encoder.arguments["patch_size"]
    image_size = tuple(side * patch_size for side in encoder.grid)
    resized = ViT(**encoder.arguments | dict(image_size=image_size, patch_size=patch_size), drop_path=drop_path)
    tensors = encoder.state_dict()
    kernels = F.interpolate(tensors["patch_embed.proj.weight"], (patch_size, patch_size), mode="bicubic")
    tensors["patch_embed.proj.weight"] = kernels * (old / patch_size) ** 2
    resized.load_state_dict(tensors)
    return resized


def token_reduction(args: argparse.Namespace, encoder: ViT, drop_ratio: float) -> PTR:
    """PTR as the arguments say, at this ratio, judged by the smallest square image."""
    side = math.ceil(args.short_side[0] / encoder.arguments["patch_size"])
    return engine.token_reduction(args, len(encoder.blocks), side * side, drop_ratio)


# --- model ------------------------------------------------------------------------------------------------------------


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def resample(dim: int, patch_size: int, stride: int) -> nn.Sequential:
    """From a map with one cell for each patch to one with a cell every `stride` pixels; nothing where they agree."""
    layers: list[nn.Module] = []
    for i in range(round(math.log2(patch_size / stride))):
        layers += [LayerNorm2d(dim), nn.GELU()] if i else []
        layers.append(nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2))
    if stride > patch_size:
        layers.append(nn.MaxPool2d(stride // patch_size))
    return nn.Sequential(*layers)


@functools.lru_cache(maxsize=4)
def sincos_table(dim: int, side: int, device: torch.device) -> Tensor:
    """Positions (1 + side * side, D) of a square of patches, and the class token's before them."""
    return sincos_position_embedding(dim, (side, side))[0].to(device)


class ViTPyramid(nn.Module):
    """A plain ViT with global attention and a feature pyramid on four of its blocks.

    The blocks see each image alone, on the grid of its own size: no padding takes part in attention, positions or PTR's
    mean, and an image's tokens do not depend on the others of its batch (the pyramid's convolutions see zeros beyond
    the image). Images with the same grid go together. There is no final norm: `encoder` loses it, since a module
    without a gradient would break DDP.
    """

    def __init__(
        self,
        encoder: ViT,
        channels: int,
        *,
        learned_positions: bool = False,
        ptr: PTR | None = None,
        precision: str = "fp32",
        checkpointing: bool = False,
    ):
        super().__init__()
        self.encoder, self.out_channels = encoder, channels
        self.precision, self.checkpointing = precision, checkpointing
        self.ptr = ptr if ptr is not None else PTR()
        self.learned_positions = learned_positions
        encoder.norm = nn.Identity()
        encoder.pos_embed.requires_grad_(learned_positions)
        depth = len(encoder.blocks)
        self.taps = [max(1, round(depth * share)) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1)]  # 3, 5, 7, 11 of 12
        self.patch_size = encoder.arguments["patch_size"]
        self.resample = nn.ModuleList(resample(encoder.dim, self.patch_size, stride) for stride in STRIDES)
        self.fpn = FeaturePyramidNetwork([encoder.dim] * 4, channels, LastLevelMaxPool(), norm_layer=LayerNorm2d)

    def forward(self, images: Tensor, sizes: list[tuple[int, int]] | None = None) -> dict[str, Tensor]:
        """Padded images (B, C, H, W) of the given (h, w) -> float32 maps (B, channels, H / stride, W / stride).

        The maps of STRIDES are named "0" to "3", and "pool" is one of half the size. Autocast ends here: in half
        precision torchvision's heads would move anchors by pixels.
        """
        sizes = sizes or [tuple(images.shape[-2:])] * len(images)
        with engine.autocast(images.device, self.precision):
            maps = self.tapped_maps(images, sizes)
            maps = self.fpn({str(i): scale(x) for i, (scale, x) in enumerate(zip(self.resample, maps, strict=True))})
        return {name: x.float() for name, x in maps.items()}

    def tapped_maps(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """The tapped blocks' patch tokens as maps (B, D, H / p, W / p), zero where an image is only padded."""
        p = self.patch_size
        grids = [(math.ceil(height / p), math.ceil(width / p)) for height, width in sizes]
        shape = len(images), self.encoder.dim, images.shape[2] // p, images.shape[3] // p
        maps = [images.new_zeros(shape) for _ in self.taps]
        for rows, columns in dict.fromkeys(grids):
            chosen = [i for i, grid in enumerate(grids) if grid == (rows, columns)]
            tapped = self.tapped_tokens(images[chosen, :, : rows * p, : columns * p], (rows, columns))
            for x, tokens in zip(maps, tapped, strict=True):
                x[chosen, :, :rows, :columns] = rearrange(tokens, "b (h w) d -> b d h w", h=rows).to(x.dtype)
        return maps

    def tapped_tokens(self, images: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """The patch tokens (B, N, D) after each tapped block; one that PTR has dropped keeps its last value."""
        positions = self.positions(grid)
        patches = self.encoder.patch_embed(images) + positions[1:]
        cls = (self.encoder.cls_token + positions[:1]).expand(len(images), -1, -1)
        x = torch.cat([cls, patches], dim=1)  # (B, 1 + n, D), n falls with each drop
        whole, tapped = patches, []
        ids = torch.arange(patches.shape[1], device=images.device).expand(len(images), -1)  # (B, n)
        for i, block in enumerate(self.encoder.blocks):
            x = checkpointed(block, x, use_reentrant=False) if self.checkpointing else block(x)
            if i in self.taps or i in self.ptr.blocks:
                whole = scatter_tokens(whole, x[:, 1:], ids)
            tapped += [whole] * self.taps.count(i)
            if i in self.ptr.blocks:
                x, kept = drop_tokens(x, self.ptr.drop_ratio, num_prefix=1, criterion=self.ptr.criterion)
                ids = ids.gather(1, kept)
        return tapped

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Positions (1 + rows * columns, D) of the class token and a grid of patches.

        Sine-cosine ones count rows and columns from the image's corner, so those of any grid are a corner of a larger
        square's. Learned ones (DeiT, DINO, fine-tuned models) are resized instead, and go on learning.
        """
        if self.learned_positions:
            return resize_positions(self.encoder.pos_embed, self.encoder.grid, grid)[0]
        side = 32 * math.ceil(max(grid) / 32)  # few tables, as images have many sizes
        table = sincos_table(self.encoder.dim, side, self.encoder.cls_token.device)
        corner = table[1:].view(side, side, -1)[: grid[0], : grid[1]]
        return torch.cat([table[:1], corner.flatten(0, 1)])


def has_learned_positions(encoder: ViT) -> bool:
    """Whether an encoder's positions are others than the fixed sine-cosine ones."""
    return not torch.allclose(encoder.pos_embed, sincos_position_embedding(encoder.dim, encoder.grid), atol=1e-3)


class PyramidRoIAlign(MultiScaleRoIAlign):
    """torchvision's, told the strides: it would infer them from the first batch, wrongly where padding is large.

    A region goes to the map whose anchors are about its size: for anchors from 32 pixels on, as in the FPN paper.
    """

    def __init__(self, output_size: int, anchor: int):
        super().__init__(["0", "1", "2", "3"], output_size, sampling_ratio=2)
        self.scales = [1 / stride for stride in STRIDES]
        levels = [int(math.log2(stride)) for stride in STRIDES]
        self.map_levels = LevelMapper(levels[0], levels[-1], canonical_scale=7 * anchor, canonical_level=4)


class Detector(MaskRCNN):
    """Mask R-CNN on a ViTPyramid: a proposal network, a box head of 4 convolutions + 1 linear layer, a mask head.

    Images are lists of float (C, H, W) in [0, 1] of any sizes; it normalises, resizes and pads them itself.
    """

    def __init__(
        self,
        backbone: ViTPyramid,
        num_classes: int,
        *,
        short_side: list[int],
        long_side: int,
        anchor: int = 32,
        rois: int = 512,
        proposals: int = 1000,
    ):
        c = backbone.out_channels
        normalize = data.Normalize(backbone.encoder.arguments["channels"])
        super().__init__(
            backbone,
            min_size=tuple(short_side),
            max_size=long_side,
            image_mean=normalize.mean.flatten().tolist(),
            image_std=normalize.std.flatten().tolist(),
            size_divisible=max(STRIDES[-1], backbone.patch_size),
            rpn_anchor_generator=AnchorGenerator([[anchor * 2**i] for i in range(5)], [[0.5, 1.0, 2.0]] * 5),
            rpn_head=RPNHead(c, num_anchors=3),
            rpn_pre_nms_top_n_train=2 * proposals,
            rpn_post_nms_top_n_train=2 * proposals,
            rpn_pre_nms_top_n_test=proposals,
            rpn_post_nms_top_n_test=proposals,
            box_roi_pool=PyramidRoIAlign(7, anchor),
            box_head=FastRCNNConvFCHead((c, 7, 7), [c] * 4, [4 * c], norm_layer=LayerNorm2d),
            box_predictor=FastRCNNPredictor(4 * c, 1 + num_classes),  # 0 is the background
            box_batch_size_per_image=rois,
            mask_roi_pool=PyramidRoIAlign(14, anchor),
            mask_head=MaskRCNNHeads(c, [c] * 4, dilation=1, norm_layer=LayerNorm2d),
            mask_predictor=MaskRCNNPredictor(c, c, 1 + num_classes),
        )

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> dict[str, Tensor] | list[Target]:
        """In training the five losses, else the objects found in each image: boxes, labels, scores, masks (n, 1, H, W).

        As torchvision's, but the backbone is told each image's own size within the padded batch.
        """
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        batch, targets = self.transform(images, targets)
        features = self.backbone(batch.tensors, batch.image_sizes)
        proposals, rpn_losses = self.rpn(batch, features, targets)
        found, losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
        if self.training:
            return losses | rpn_losses
        return self.transform.postprocess(found, batch.image_sizes, original_sizes)


def load_detector(args: argparse.Namespace, checkpoint: dict[str, Any]) -> Detector:
    """The detector in a checkpoint of this script that `--eval` names, with PTR at the first drop ratio."""
    encoder = build_encoder(args, checkpoint)
    ptr = token_reduction(args, encoder, args.drop_ratio[0])
    model = build_detector(args, encoder, len(checkpoint["categories"]), ptr, checkpoint["learned_positions"])
    bad = engine.not_finite(checkpoint["model"])
    if bad:
        raise UserError(f"{args.eval}: {bad[0]} holds NaN or infinity")
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(
            f"{args.eval} does not fit the model (--channels?): {str(error).splitlines()[-1].strip()}"
        ) from None
    return model


def build_detector(
    args: argparse.Namespace, encoder: ViT, num_classes: int, ptr: PTR, learned_positions: bool
) -> Detector:
    """The detector that the arguments ask for."""
    backbone = ViTPyramid(
        encoder, args.channels, learned_positions=learned_positions, ptr=ptr, precision=args.precision,
        checkpointing=args.checkpointing,
    )  # fmt: skip
    return Detector(
        backbone, num_classes, short_side=args.short_side, long_side=args.long_side, anchor=args.anchor, rois=args.rois,
        proposals=args.proposals,
    )  # fmt: skip


# --- training ---------------------------------------------------------------------------------------------------------


def to_device(images: list[Tensor], device: torch.device) -> list[Tensor]:
    """uint8 images, on the device and in [0, 1]."""
    return [image.to(device, non_blocking=True).float() / 255 for image in images]


class Trainer(engine.Trainer):
    """Trains a detector by the sum of Mask R-CNN's five losses."""

    def __init__(self, args: argparse.Namespace, model: Detector, loader: DataLoader, accumulate: int, world: World):
        model.to(world.device)
        groups = engine.parameter_groups(model, args.weight_decay, args.layer_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
        super().__init__(args, model, dict(model=model), optimizer, loader, accumulate, world)

    def loss(self, images: list[Tensor], targets: list[Target]) -> tuple[Tensor, Tensor]:
        """The sum of the losses, and each of them."""
        device = self.world.device
        targets = [
            {name: target[name].to(device, non_blocking=True) for name in ("boxes", "labels", "masks")}
            for target in targets
        ]
        losses = self.runner(to_device(images, device), targets)
        losses = torch.stack([losses[name] for name in LOSSES])
        return losses.sum(), losses.detach()

    def metrics(self, statistics: Tensor) -> dict[str, Tensor]:
        return dict(zip(LOSSES.values(), statistics, strict=True))

    def progress(self, row: dict[str, float]) -> dict[str, str]:
        return {name: f"{row[name]:.2f}" for name in LOSSES.values()}

    def schedule(self, step: int) -> dict[str, float]:
        """Warm-up, then a constant learning rate that falls to a tenth after some epochs."""
        warmup = self.args.warmup_steps
        if warmup is None:
            warmup = self.args.warmup_epochs * self.steps_per_epoch
        milestones = [epoch * self.steps_per_epoch for epoch in self.args.lr_drops]
        return dict(lr=engine.warmup_steps(step, peak=self.peak_lr, milestones=milestones, warmup=warmup))

    def example(self) -> tuple[list[Tensor], list[Target]]:
        """Noise of the largest usual size, with four boxes and masks in each image."""
        number = self.loader.batch_size
        height = self.args.short_side[-1]
        width = min(self.args.long_side, height if self.args.data == "shapes" else height * 4 // 3)
        shape = self.model.backbone.encoder.arguments["channels"], height, width
        masks = torch.zeros(4, height, width, dtype=torch.uint8)
        masks[:, height // 4 : height // 2, width // 4 : width // 2] = 1
        boxes = torch.tensor([[width // 4, height // 4, width // 2, height // 2]] * 4).float()
        target = dict(boxes=boxes, labels=torch.ones(4, dtype=torch.int64), masks=masks)
        return [torch.randint(256, shape).byte() for _ in range(number)], [target] * number


def describe_images(images: CocoDetection) -> str:
    return f"{len(images):,} images with {images.num_objects():,} objects"


def token_list(args: argparse.Namespace, backbone: ViTPyramid) -> list[int]:
    """Patch tokens of a square image that enter each block, and leave the last."""
    side = math.ceil(args.short_side[-1] / backbone.patch_size)
    return token_counts(side * side, len(backbone.encoder.blocks), backbone.ptr)


def gigamacs(args: argparse.Namespace, backbone: ViTPyramid) -> float:
    """Work of the ViT and the pyramid for a square image, in 1e9 multiply-accumulates."""
    stride = max(STRIDES[-1], backbone.patch_size)
    side = stride * math.ceil(args.short_side[-1] / stride)
    return engine.count_macs(backbone, torch.zeros(1, backbone.encoder.arguments["channels"], side, side)) / 1e9


def describe_model(args: argparse.Namespace, model: Detector) -> str:
    """The detector's size, and where PTR drops tokens."""
    backbone, sides = model.backbone, args.short_side
    of_backbone, of_all = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (backbone, model))
    text = (
        f"model   ViT and pyramid of {of_backbone:.1f} M parameters, with the heads {of_all:.1f} M; maps of blocks "
        f"{', '.join(map(str, backbone.taps))}\n"
        f"images  shorter side {f'{sides[0]} to ' if len(sides) > 1 else ''}{sides[-1]} pixels, longer at most "
        f"{args.long_side}; {gigamacs(args, backbone):.3g} GMACs in ViT and pyramid for {sides[-1]} x {sides[-1]}"
    )
    if backbone.ptr.blocks:
        text += f"\ntokens  class token + {' '.join(map(str, token_list(args, backbone)))} of a square image"
    return text


def describe_run(args: argparse.Namespace, trainer: Trainer, train: CocoDetection, val: CocoDetection) -> str:
    """What is about to happen, and how long it will take here."""
    names = [name for _, name in train.categories]
    classes = f"{len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    return "\n".join([
        f"data    {args.data}: {describe_images(train)} of {classes}; to validate {describe_images(val)}",
        describe_model(args, trainer.model),
        trainer.describe_steps() + ", and the scoring after each epoch",
    ])  # fmt: skip


def describe_scores(row: dict[str, Any]) -> str:
    """box AP 70.1 AP50 86.2 AP75 78.0  mask AP ..., in percent as usual."""
    box, mask = ([f"{100 * row[name]:.1f}" for name in names] for names in (APS[:3], APS[3:]))
    return "  ".join(f"{kind} AP {a} AP50 {b} AP75 {c}" for kind, (a, b, c) in (("box", box), ("mask", mask)))


def describe_epoch(row: dict[str, Any], args: argparse.Namespace) -> str:
    """One line of the row for metrics.jsonl."""
    loss = "every step was skipped" if row["loss"] is None else f"loss {row['loss']:.3f}"
    return (
        f"epoch {row['epoch']}/{args.epochs}  {loss}  {describe_scores(row)}  {row['images_per_second']:.1f} images/s"
    )


def summarise(history: list[dict[str, Any]], num_images: int) -> str:
    """How the run ended."""
    last, best = history[-1], max(reversed(history), key=lambda row: row["box_ap"])
    return (
        f"{describe_scores(last)} on {num_images:,} validation images after {last['epoch']} epochs; best box AP "
        f"{100 * best['box_ap']:.1f} after epoch {best['epoch']}."
    )


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluation_loader(args: argparse.Namespace, images: CocoDetection, channels: int, world: World) -> DataLoader:
    """Each image once, over all processes, and alone: what is found in it does not depend on others."""
    views = data.DetectionViews(images, lambda image, target: (image, target), channels, replace=False)
    return data.evaluation_loader(views, 1, args.workers, world.rank, world.size, data.collate_detection)


def coco_results(found: Target, image_id: int, category_ids: list[int]) -> list[dict[str, Any]]:
    """What a detector found in one image, in COCO's format for results."""
    boxes = box_convert(found["boxes"], "xyxy", "xywh")
    return [
        dict(
            image_id=image_id, category_id=category_ids[label - 1], bbox=box, score=score,
            segmentation=data.encode_mask(mask[0] >= 0.5),
        )
        for box, label, score, mask in zip(
            boxes.tolist(), found["labels"].tolist(), found["scores"].tolist(), found["masks"], strict=True
        )
    ]  # fmt: skip


@torch.no_grad()
def find_objects(
    model: Detector, loader: DataLoader, category_ids: list[int], world: World, unreadable: engine.Unreadable
) -> dict[int, list[dict[str, Any]]] | None:
    """What the model finds in each readable image, by image id, for the first process; None for the others."""
    model.eval()
    results = []
    for images, targets, messages in tqdm(loader, "scoring", leave=False, disable=not world.is_main):
        unreadable.count(len(images) - len(messages), messages)
        if messages:
            continue
        for found, target in zip(model(to_device(images, world.device)), targets, strict=True):
            results.append((target["image_id"], coco_results(found, target["image_id"], category_ids)))
    unreadable.gather()
    results = engine.gather_lists(results)
    return None if results is None else dict(sorted(results))


def score_objects(
    images: CocoDetection, results: dict[int, list[dict[str, Any]]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """COCO's own evaluation of what was found in these images: the six of APS, and box and mask AP of each class.

    Numbers are in [0, 1], or nan where the images hold no such object.
    """
    scores, of_classes = {}, {}
    flat = [result for some in results.values() for result in some]
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        with contextlib.redirect_stdout(io.StringIO()):
            copies = [dict(result) for result in flat]  # loadRes adds to them, and takes no empty list
            found = images.coco.loadRes(copies) if copies else COCO()
            evaluation = COCOeval(images.coco, found, kind)
            evaluation.params.imgIds, evaluation.params.catIds = list(results), images.category_ids
            evaluation.evaluate()
            evaluation.accumulate()
        precision = torch.from_numpy(evaluation.eval["precision"])[:, :, :, 0, -1]  # (IoUs, recalls, classes)
        for suffix, ious in (("ap", slice(None)), ("ap50", slice(0, 1)), ("ap75", slice(5, 6))):
            scores[f"{name}_{suffix}"] = mean_precision(precision[ious])
        of_classes[name] = [mean_precision(precision[:, :, i]) for i in range(precision.shape[2])]
    return scores, of_classes


def mean_precision(precision: Tensor) -> float:
    """The mean but for -1, which stands where there was no object to find."""
    return precision[precision > -1].mean().item()


def class_lines(images: CocoDetection, of_classes: dict[str, list[float]]) -> str:
    """A line for each class: box and mask AP."""
    width = max(len(name) for _, name in images.categories)
    return "\n".join(
        f"  {name:{width}}  box AP {100 * box:5.1f}  mask AP {100 * mask:5.1f}"
        for (_, name), box, mask in zip(images.categories, of_classes["box"], of_classes["mask"], strict=True)
    )


def write_results(path: str, results: dict[int, list[dict[str, Any]]]) -> None:
    """All that was found, as one JSON list."""
    flat = [result for some in results.values() for result in some]
    engine.replace_file(Path(path), lambda file: file.write(json.dumps(flat).encode()))


def evaluate(args: argparse.Namespace, checkpoint: dict[str, Any], world: World) -> None:
    """`--eval`: AP, work and speed of a detector at each drop ratio."""
    model = load_detector(args, checkpoint).to(world.device).eval()
    encoder = model.backbone.encoder
    reductions = [token_reduction(args, encoder, ratio) for ratio in args.drop_ratio]
    (val,) = read_images(args, world, "val")
    val.use_categories([tuple(category) for category in checkpoint["categories"]])
    loader, unreadable = evaluation_loader(args, val, encoder.arguments["channels"], world), engine.Unreadable()
    found = []
    for model.backbone.ptr in reductions:
        found.append(find_objects(model, loader, val.category_ids, world, unreadable))
    if world.is_main:
        model.backbone.ptr = reductions[0]
        print(f"data    {args.data}: {describe_images(val)} to score")
        print(describe_model(args, model))
        scored = [score_objects(val, results) for results in found]
        if args.results:
            write_results(args.results, found[0])
        print(table(args, model, reductions, [scores for scores, _ in scored], loader, world))
        if args.per_class:
            for ratio, (_, of_classes) in zip(args.drop_ratio, scored, strict=True):
                print(f"Each class, at drop ratio {ratio:g}:\n{class_lines(val, of_classes)}")


def table(
    args: argparse.Namespace,
    model: Detector,
    reductions: list[PTR],
    scores: list[dict[str, float]],
    loader: DataLoader,
    world: World,
) -> str:
    """AP, work and speed at each reduction; speed is the whole detector's, on some of the images one by one."""
    readable = (batch for batch, _, messages in loader if not messages)
    images = [image for batch in itertools.islice(readable, 4) for image in to_device(batch, world.device)]

    def run(ptr: PTR) -> None:
        model.backbone.ptr = ptr
        for image in images:
            model([image])

    runs = [functools.partial(run, ptr) for ptr in (PTR(), *reductions)]
    whole, *speeds = engine.images_per_second(runs, len(images), world.device)
    blocks = max((ptr.blocks for ptr in reductions), key=len)
    lines = [
        f"dropping after blocks {list(blocks)} (0-based); work of ViT and pyramid for a square image",
        "  ratio  tokens    GMACs  images/s  speed-up     box AP   AP50   AP75    mask AP   AP50   AP75",
    ]
    for model.backbone.ptr, speed, row in zip(reductions, speeds, scores, strict=True):
        aps = [f"{100 * row[name]:5.1f}" for name in APS]
        lines.append(
            f"  {model.backbone.ptr.drop_ratio:5.3g}  {token_list(args, model.backbone)[-1]:6}  "
            f"{gigamacs(args, model.backbone):7.4g}  {speed:8.2f}  {speed / whole:7.2f}x      "
            f"{'  '.join(aps[:3])}      {'  '.join(aps[3:])}"
        )
    return "\n".join(lines)


# --- the run ----------------------------------------------------------------------------------------------------------


def read_images(args: argparse.Namespace, world: World, *splits: str) -> list[CocoDetection]:
    """The images of each split, train or val, as many as are asked for. Raises UserError."""
    side = args.short_side[-1]
    with engine.one_at_first(world, needed=args.data == "shapes"):
        folder = data.detection_folder(args.data, Path(args.data_root), args.limit, (side, side))
    images = [CocoDetection(*data.find_annotations(folder, split), args.limit) for split in splits]
    for split, some in zip(splits, images, strict=True):
        if not some.num_objects():
            raise UserError(f"--data {args.data}: no object is marked in the {len(some)} images of {split}")
    return images


def main(argv: list[str] | None = None) -> None:
    args, checkpoint = read_settings(argv)
    world = engine.start_world(args.device)
    engine.check_agreement(vars(args), world)
    if args.eval is not None:
        return evaluate(args, checkpoint, world)

    # 1. Encoder, data and detector. Whatever is wrong with the settings is found out here, before the first step.
    micro_batch, accumulate = engine.batch_sizes(args, world)
    encoder = build_encoder(args, checkpoint, log=print if world.is_main else lambda text: None)
    ptr = token_reduction(args, encoder, args.drop_ratio[0])
    train, val = read_images(args, world, "train", "val")
    val.use_categories(train.categories)
    if args.dry_run:
        val.ids = val.ids[:8]
    learned_positions = checkpoint["learned_positions"] if checkpoint else has_learned_positions(encoder)
    model = build_detector(args, encoder, len(train.categories), ptr, learned_positions)
    channels = encoder.arguments["channels"]
    views = data.DetectionViews(train, data.detection_view(args.crop_share), channels, args.seed)
    loader = data.training_loader(
        views, micro_batch, args.workers, world.rank, world.size, collate_fn=data.collate_detection
    )
    trainer = Trainer(args, model, loader, accumulate, world)
    val_loader, val_unreadable = evaluation_loader(args, val, channels, world), engine.Unreadable()
    of_classes: dict[str, list[float]] = {}
    results: dict[int, list[dict[str, Any]]] | None = None

    # 2. Train.
    def score(epoch: int, is_last: bool) -> dict[str, float]:
        nonlocal of_classes, results
        if epoch == 0:
            return {}
        results = find_objects(model, val_loader, val.category_ids, world, val_unreadable)
        if results is None:
            return {}
        scores, of_classes = score_objects(val, results)
        return scores

    history = engine.fit(
        trainer,
        run=dict(
            method="detect", config=vars(args), encoder=encoder.arguments, learned_positions=learned_positions,
            categories=[list(category) for category in train.categories], num_images=len(train),
        ),
        checkpoint=checkpoint,
        announce=lambda: describe_run(args, trainer, train, val),
        score=score,
        describe=lambda row: describe_epoch(row, args),
        best="box_ap",
    )  # fmt: skip

    # 3. Say how it went.
    if world.is_main:
        if args.results and results is not None:
            write_results(args.results, results)
        if args.per_class and of_classes:
            print(class_lines(val, of_classes))
        mishaps = trainer.mishaps(trainer.unreadable.files | val_unreadable.files)
        print(summarise(history, len(val)) + mishaps)
        if args.dry_run:
            print("That was a dry run: nothing was kept.")
        else:
            limit = f" --limit {args.limit}" if args.limit else ""
            print("Next, AP against speed when tokens are dropped, or with --per-class the AP of each class:")
            print(f"  python detect.py --eval {engine.best_checkpoint(args.out)} --drop-ratio 0 0.1 0.2 0.3{limit}")


if __name__ == "__main__":
    engine.launch(main)
