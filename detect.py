"""Detection and instance segmentation: a plain ViT with a feature pyramid and torchvision's Mask R-CNN.

python detect.py                                             from runs/pretrain/last.pt, on synthetic scenes
python detect.py --init none --layer-decay 1                 the same from scratch, for comparison
python detect.py --data coco --data-root DIR --recipe coco --init FILE    the poster's setting; FILE: ours or public
python detect.py --eval runs/detect/best.pt --drop-ratio 0 0.1 0.2        with PTR: AP against speed
"""

import argparse
import math
import shlex
import time
from pathlib import Path
from typing import Any

import util.threads  # noqa: F401 (before torch)

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from tqdm import tqdm

import beit
import coco
import data
import ptr
import weights
from coco import CocoDetection, Target
from model import MODELS, NO_PTR, ViT
from ptr import PTR
from pyramid import STRIDES, LayerNorm2d, PyramidRoIAlign, ViTPyramid, has_learned_positions
from util import metrics, profiling, runs, training

# Settings of `--recipe`; flags on the command line override them.
RECIPES = {
    "laptop": {},  # the defaults below
    "coco": dict(
        model="vit_base",
        patch_size=16,
        short_side=list(range(480, 801, 32)),
        long_side=1333,
        crop_ratio=0.5,
        epochs=12,
        warmup_epochs=0.14,  # 500 steps
        batch_size=32,
        blr=2.4e-3,
        weight_decay=0.05,
        layer_decay=0.75,
        drop_path=0.2,
        channels=256,
        anchor=32,
        rois=512,
        proposals=1000,
    ),
}

LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")

# Groups of settings that `--eval` takes from the checkpoint unless a flag of the group is given, and the other flags
# that it uses.
FROM_CHECKPOINT = [
    *[(name,) for name in ("data", "data_root", "short_side", "long_side", "proposals")],
    *ptr.FLAG_GROUPS,
]
EVAL_FLAGS = {"eval", "limit", "workers", "dry_run", "device", "precision", "seed"}


def arguments() -> argparse.ArgumentParser:
    """Build the parser."""
    parser = runs.flag_parser(__doc__)
    parser.add_argument("--eval", metavar="FILE", help="only evaluate this checkpoint of detect.py, with its settings")
    runs.add_flags(parser, RECIPES, out="runs/detect", files="args.json, metrics.jsonl, last.pt, best.pt")

    add = parser.add_argument_group("data").add_argument
    sets = "shapes: synthetic scenes, written to --data-root; coco: COCO 2017 in --data-root; or a folder like COCO's"
    add("--data", default="shapes", help=sets)
    add("--data-root", default="data", metavar="FOLDER", help="folder of coco and of the synthetic scenes")
    limit = "use at most N images to train on and N to test (default: all); shapes has max(N, 400) and 100"
    add("--limit", type=training.positive, metavar="N", help=limit)
    data.add_workers_flag(add)
    sides = "shorter side in pixels; of several, training draws one per image and evaluation uses the last"
    add("--short-side", type=int, nargs="+", default=[96], metavar="PIXELS", help=sides)
    add("--long-side", type=int, default=160, help="maximum of the longer side in pixels")
    add("--crop-ratio", type=training.ratio, default=0.0, help="fraction of the training images to crop as in DETR")
    data.add_flip_flag(add)

    add = parser.add_argument_group("model").add_argument
    weights.add_init_flags(add)
    add("--patch-size", type=int, default=4, help="patch side in pixels, a power of 2, for --init none")
    training.add_drop_path_flag(add)
    add("--channels", type=int, default=64, help="channels of the feature pyramid and of the heads")
    add("--anchor", type=int, default=16, help="side in pixels of the smallest anchors; doubles from level to level")
    add("--rois", type=int, default=32, help="RoIs sampled per image in training")
    add("--proposals", type=int, default=100, help="RPN proposals kept in evaluation; twice as many in training")

    add = parser.add_argument_group("token reduction (PTR)").add_argument
    ratios = (
        "fraction of the patch tokens that PTR drops at each stage; several with --eval (default: its file's, else 0)"
    )
    add("--drop-ratio", type=float, nargs="+", default=[0.0], metavar="RATIO", help=ratios)
    ptr.add_flags(add, before="that of --eval, else ")

    add = parser.add_argument_group("optimisation").add_argument
    drawn = "drop path, image sizes, RoIs, the random criterion"
    training.add_flags(add, epochs=12, batch_size=8, blr=3.2e-2, warmup="4 %% of the epochs", drawn=drawn)
    add("--layer-decay", type=float, default=0.75, help="layer-wise learning-rate decay, per block; 1: off")
    return parser


# --- model ------------------------------------------------------------------------------------------------------------


class Detector(MaskRCNN):
    """Mask R-CNN on a ViTPyramid: an RPN, a box head of 4 convolutions + 1 linear layer, a mask head.

    Images are lists of float tensors (C, H, W) in [0, 1] of any sizes. The detector normalises, resizes and pads them.
    `num_classes` does not count the background, unlike in torchvision.
    """

    def __init__(
        self,
        backbone: ViTPyramid,
        num_classes: int,
        *,
        short_side: list[int],
        long_side: int,
        anchor: int,
        rois: int,
        proposals: int,
    ):
        c = backbone.out_channels
        normalize = data.normalize_for(backbone.encoder)
        super().__init__(
            backbone,
            min_size=tuple(short_side),
            max_size=long_side,
            image_mean=normalize.mean.flatten().tolist(),
            image_std=normalize.std.flatten().tolist(),
            size_divisible=max(STRIDES[-1], backbone.encoder.patch_size),
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

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None, ptr: PTR = NO_PTR
    ) -> dict[str, Tensor] | list[Target]:
        """Return five losses in training, else the boxes, labels, scores, masks (n, 1, H, W) found in each image.

        Unlike in torchvision, the backbone gets the size of each image within the padded batch, and PTR. Autocast is
        for the backbone only: in half precision torchvision's heads would round anchors to whole pixels.
        """
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        batch, targets = self.transform(images, targets)
        features = self.backbone(batch.tensors, batch.image_sizes, ptr)
        with torch.autocast(batch.tensors.device.type, enabled=False):
            proposals, rpn_losses = self.rpn(batch, features, targets)
            found, losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
        if self.training:
            return losses | rpn_losses
        return self.transform.postprocess(found, batch.image_sizes, original_sizes)


def build_encoder(args: argparse.Namespace) -> ViT:
    """Build the encoder of `--init`, or a new one. Raises ValueError if the file or the sizes do not fit."""
    if args.init == "none":
        size = (16 * args.patch_size,) * 2  # any size: positions are made for the grid of each image
        return ViT(size, args.patch_size, **MODELS[args.model], drop_path=args.drop_path)
    options = weights.told(args) | dict(weights=args.weights, drop_path=args.drop_path)
    return weights.load_encoder(runs.load(args.init), **options)


def build_detector(args: argparse.Namespace, encoder: ViT, num_classes: int, learned_positions: bool) -> Detector:
    """Build the detector that the flags describe. Raises ValueError if the patch size is not a power of 2.

    `learned_positions`: resize and train the encoder's positions, instead of computing sine-cosine ones for each image.
    """
    backbone = ViTPyramid(encoder, args.channels, learned_positions=learned_positions)
    options = {name: getattr(args, name) for name in ("short_side", "long_side", "anchor", "rois", "proposals")}
    return Detector(backbone, num_classes, **options)


def reductions(args: argparse.Namespace, encoder: ViT) -> list[PTR]:
    """Build PTR for each `--drop-ratio`. Raises ValueError if it drops all tokens of the smallest square image."""
    num_tokens, depth = (min(args.short_side) // encoder.patch_size) ** 2, len(encoder.blocks)
    found = [ptr.from_args(args, depth, drop_ratio) for drop_ratio in args.drop_ratio]
    for reduction in found:
        ptr.token_counts(num_tokens, depth, reduction)
    return found


def load_detector(args: argparse.Namespace, checkpoint: dict[str, Any]) -> Detector:
    """Build the detector of a checkpoint of this script, with the settings in `args`. Other files end the script."""
    if "learned_positions" not in checkpoint:
        raise SystemExit("error: expected a checkpoint of detect.py, got another file")
    encoder = beit.build_encoder(checkpoint["encoder"], args.drop_path)
    model = build_detector(args, encoder, len(checkpoint["categories"]), checkpoint["learned_positions"])
    model.load_state_dict(checkpoint["model"])
    return model


# --- evaluation -------------------------------------------------------------------------------------------------------


def to_inputs(images: list[Tensor], device: torch.device) -> list[Tensor]:
    """Move uint8 images to the device, as float32 in [0, 1]."""
    return [training.to_device(image, device).float() / 255 for image in images]


def scoring_loader(images: CocoDetection, channels: int, workers: int | None, world: training.World) -> DataLoader:
    """Build a loader of single images, so results do not depend on other images in a batch. Processes share them."""
    return data.evaluation_loader(coco.DetectionViews(images, channels), 1, workers=workers, world=world)


@torch.no_grad()
def find_objects(
    model: Detector, loader: DataLoader, reduction: PTR, precision: str, world: training.World
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the objects found in all readable images, in COCO's result format, and the ids of these images.

    Each process computes its shard and gets the results of all processes. The model is left in evaluation mode.
    """
    model.eval()
    results, seen = [], []
    for batch in tqdm(training.batches(loader), "evaluating", len(loader), leave=False, disable=world.hides_bars):
        images, targets, readable = coco.unpack(batch)
        if readable.all():
            with training.autocast(world.device, precision):
                (found,) = model(to_inputs(images, world.device), ptr=reduction)
            seen.append(targets[0]["image_id"])
            results += coco.coco_results(found, seen[-1], loader.dataset.images.categories)
    results, seen = training.gather_lists(results), training.gather_lists(seen)
    training.check_readable(len(loader.dataset) - len(seen), len(loader.dataset))
    if not seen:
        raise SystemExit("error: --data: all images of the evaluation are unreadable")
    return results, seen


def evaluate(args: argparse.Namespace, checkpoint: dict[str, Any], val: CocoDetection, world: training.World) -> None:
    """Print AP, MACs and speed of a detector at each drop ratio (`--eval`)."""
    model = load_detector(args, checkpoint).to(world.device)
    val.use_categories([tuple(category) for category in checkpoint["categories"]])
    encoder, side = model.backbone.encoder, args.short_side[-1]
    ptrs = reductions(args, encoder)
    loader = scoring_loader(val, encoder.channels, args.workers, world)
    found = []
    for reduction in ptrs:
        training.seed_generators(world.device, args.seed)  # of the criterion `random`
        found.append(find_objects(model, loader, reduction, args.precision, world))
    if not world.is_main:
        return
    print(f"data    {args.data}: {val.describe()}; {len(found[0][1]):,} images evaluated")
    images = to_inputs([loader.dataset[0, i][0] for i in range(min(4, len(val)))], world.device)
    whole, *reduced = [lambda by=by: [model([image], ptr=by) for image in images] for by in (NO_PTR, *ptrs)]
    with training.autocast(world.device, args.precision):
        speeds = profiling.speed_ups(whole, reduced, world.device)
    square = torch.zeros(1, encoder.channels, *[math.ceil(side / 32) * 32] * 2)
    for reduction, (results, seen), (speed, noise) in zip(ptrs, found, speeds, strict=True):
        macs = profiling.count_macs(model.backbone, square, ptr=reduction) / 1e9
        blocks = f"drop ratio {reduction.drop_ratio:g} after blocks {list(reduction.blocks)}"
        print(f"\n{blocks}: speed-up {speed:.2f} +- {noise:.2f}")
        print(f"{macs:.4g} GMACs in ViT and pyramid for {square.shape[2]} x {square.shape[3]} pixels")
        coco.average_precision(val, results, seen, show=True)


# --- training ---------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    # 1. Settings
    parser = arguments()
    args, checkpoint = runs.parse(parser, RECIPES, argv, warmup_ratio=1 / 24, sets=("shapes", "coco"))
    given = runs.given(parser, argv)
    if args.eval:
        checkpoint = runs.load(args.eval)
        runs.reject(given - EVAL_FLAGS.union(*FROM_CHECKPOINT), "not used with --eval")
        sizes = [("channels",), ("anchor",), ("rois",)]  # of the trained heads
        args = runs.parse_with_checkpoint(parser, argv, checkpoint, FROM_CHECKPOINT + sizes)
    else:
        if len(args.drop_ratio) > 1:
            raise SystemExit("error: --drop-ratio takes several numbers only with --eval")
        weights.check_flags(given - {"channels"}, args.init)  # --channels is that of the pyramid
    ptr.check_flags(given, *args.drop_ratio)
    world = training.start_world(args.device)

    # 2. Data
    folder = Path(args.data_root if args.data == "coco" else args.data)
    if args.data == "shapes":
        folder = coco.write_scenes(Path(args.data_root), (args.short_side[-1],) * 2, args.limit)
    val = CocoDetection(*coco.find_annotations(folder, "val"), 8 if args.dry_run else args.limit)
    if args.eval:
        try:
            return evaluate(args, checkpoint, val, world)
        except ValueError as error:
            raise SystemExit(f"error: {args.eval}: {error}") from None
    train = CocoDetection(*coco.find_annotations(folder, "train"), args.limit)
    val.use_categories(train.categories)

    # 3. Model
    training.seed_generators(torch.device("cpu"), args.seed, "weights")
    try:
        if checkpoint is not None:
            model = load_detector(args, checkpoint)  # with its weights
        else:
            encoder = build_encoder(args)
            model = build_detector(args, encoder, len(train.categories), has_learned_positions(encoder))
        encoder = model.backbone.encoder
        (reduction,) = reductions(args, encoder)
    except ValueError as error:
        source = "" if args.init == "none" else f"{args.init}: "
        raise SystemExit(f"error: {source}{error}") from None
    args.model, args.patch_size = weights.model_name(encoder), encoder.patch_size  # recorded as trained
    model.to(world.device)
    channels = encoder.channels
    groups = training.parameter_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    parallel = DistributedDataParallel(model) if world.is_distributed else model

    # 4. Loaders and schedule
    micro_batch, accumulate = training.batch_sizes(args.batch_size, args.micro_batch, world)
    options = dict(augment=True, crop_ratio=args.crop_ratio, flip=args.flip)
    views = coco.DetectionViews(train, channels, args.seed, **options)
    loader = data.training_loader(views, micro_batch, seed=args.seed, workers=args.workers, world=world)
    val_loader = scoring_loader(val, channels, args.workers, world)
    steps_per_epoch = len(loader) // accumulate
    if not steps_per_epoch:
        raise SystemExit(f"error: --batch-size {args.batch_size} exceeds the {len(train)} images of --data")
    if args.dry_run:
        steps_per_epoch = min(2, steps_per_epoch)
    total_steps, warmup_steps = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    milestones = [args.epochs * part * steps_per_epoch for part in (3 / 4, 11 / 12)]
    peak_lr = args.blr * args.batch_size / 256

    # 5. Start, or continue from the checkpoint
    step, first_epoch, history = 0, 0, []
    if checkpoint is not None:
        if checkpoint["num_images"] != len(train):
            raise SystemExit(f"error: --data has {len(train)} images, the resumed run had {checkpoint['num_images']}")
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, first_epoch, history = checkpoint["step"], checkpoint["epoch"], checkpoint["history"]
    run = runs.RunFolder(args) if world.is_main else None
    if world.is_main:
        backbone, whole = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.backbone, model))
        print(f"device  {world.describe()}")
        print(f"data    {args.data}: {train.describe()}; validation: {val.describe()}")
        print(f"model   {backbone:.1f} M parameters in ViT and pyramid, {whole:.1f} M with the heads")
        print(
            "steps  ", training.describe_steps(total_steps, args.batch_size, micro_batch, accumulate, args.blr, world)
        )
        print(f"to continue after an interruption: python detect.py --resume {shlex.quote(args.out)}")

    # 6. Train. Generators are seeded per step, so resuming is exact.
    guard = training.StepGuard()
    bar = tqdm(initial=step, total=total_steps, unit=" steps", disable=world.hides_bars, leave=False)
    for epoch in range(first_epoch, args.epochs):
        model.train()
        loader.sampler.set_epoch(epoch)
        batches, steps, unreadable = training.batches(loader), [], 0
        start, waiting = time.perf_counter(), training.Stopwatch()
        for _ in range(steps_per_epoch):
            lr = training.warmup_milestones(step, peak=peak_lr, milestones=milestones, warmup=warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            training.seed_generators(world.device, args.seed, "step", step, world.rank)  # RoIs, image sizes, drop path

            step_metrics = metrics.StepMetrics(accumulate)
            for i in range(accumulate):
                with waiting:
                    images, targets, readable = coco.unpack(next(batches))
                unreadable += int((~readable).sum())
                names = ("boxes", "labels", "masks")
                targets = [{name: training.to_device(t[name], world.device) for name in names} for t in targets]
                if world.is_distributed:
                    parallel.require_backward_grad_sync = i == accumulate - 1  # average the gradients once per step
                with training.autocast(world.device, args.precision):
                    losses = parallel(to_inputs(images, world.device), targets, reduction)
                loss = torch.stack([losses[name] for name in LOSSES]).sum()
                (loss / accumulate).backward()
                step_metrics.update(loss=loss, **{name: losses[name] for name in LOSSES})
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            steps.append(step_metrics.compute(grad_norm))
            if guard.allows(steps[-1]):
                optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{steps[-1]['loss']:.3f}")
            training.check_readable(unreadable, seen=len(steps) * args.batch_size // world.size)

        # 7. Evaluate, log, save
        seconds = time.perf_counter() - start
        results, seen = find_objects(model, val_loader, reduction, args.precision, world)
        row = dict(epoch=epoch + 1, step=step, lr=lr) | metrics.mean_of_steps(steps)
        speed = dict(images_per_second=len(steps) * args.batch_size / seconds, data_wait=waiting.seconds / seconds)
        row |= dict(unreadable=sum(training.gather_lists([unreadable]))) | speed
        if world.is_main:
            row |= coco.average_precision(val, results, seen, show=epoch + 1 == args.epochs) | dict(scored=len(seen))
            history.append(row)
            content = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
            content |= dict(step=step, epoch=epoch + 1, history=history, method="detect", num_images=len(train))
            content |= dict(encoder=encoder.arguments, learned_positions=model.backbone.learned_positions)
            content |= dict(categories=[list(category) for category in train.categories])
            run.save(content, is_best=row["box_ap"] == max(row["box_ap"] for row in history))
            tqdm.write(runs.describe(row, "epoch", "loss", "box_ap", "mask_ap", "images_per_second"))
    bar.close()

    # 8. Summary
    if world.is_main:
        print(f"saved in {args.out}; next, AP against speed:")
        print(f"  python detect.py --eval {shlex.quote(args.out)}/best.pt --drop-ratio 0 0.1 0.2 0.3")


if __name__ == "__main__":
    main()
    training.end_world()
