"""Fine-tune a classifier (panel b of the poster), with PTR if --drop-ratio is set.

python finetune.py                                           from runs/pretrain/last.pt, on synthetic images
python finetune.py --init none --layer-decay 1               the same from scratch, for comparison
python finetune.py --linear-probe                            frozen encoder, a linear layer on standardised features
python finetune.py --data FOLDER --recipe imagenet --init FILE            MAE's recipe; FILE: ours or a public ViT
"""

import argparse
import math
import shlex
import time
from typing import Any

import util.threads  # noqa: F401 (before torch)

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from tqdm import tqdm

import beit
import data
import ptr
import weights
from model import MODELS, Classifier, ViT
from util import metrics, runs, training

# Settings of `--recipe`; with `--linear-probe`, PROBES instead of RECIPES. Flags on the command line override them.
RECIPES = {
    "laptop": {},  # the defaults below
    "imagenet": dict(
        model="vit_base",
        patch_size=16,
        image_size=[224],
        min_crop=0.08,
        epochs=100,
        warmup_epochs=5.0,
        batch_size=1024,
        blr=5e-4,
        layer_decay=0.65,
        weight_decay=0.05,
        clip_grad=0.0,
        drop_path=0.1,
        rand_augment=9,
        erasing=0.25,
        mixup=0.8,
        cutmix=1.0,
        smoothing=0.1,
    ),
}
PROBES = {"laptop": dict(blr=0.1, weight_decay=0.0, clip_grad=0.0, layer_decay=1.0, smoothing=0.0)}
PROBES["imagenet"] = PROBES["laptop"] | dict(epochs=90, warmup_epochs=10.0, batch_size=1024, min_crop=0.08)


def arguments() -> argparse.ArgumentParser:
    """Build the parser. Flags that are None by default depend on the data, the encoder or other flags."""
    parser = runs.flag_parser(__doc__)
    runs.add_flags(parser, RECIPES, out="runs/finetune", files="args.json, metrics.jsonl, last.pt, best.pt")

    add = parser.add_argument_group("data").add_argument
    data.add_flags(add, limited="to train on", size_of="that of --init, or of the data")
    data.add_view_flags(add)
    fraction = "fraction of the labelled training images to use, per class"
    add("--label-fraction", type=training.ratio, default=1.0, metavar="FRACTION", help=fraction)

    add = parser.add_argument_group("model").add_argument
    weights.add_init_flags(add)
    add("--patch-size", type=int, help="patch side in pixels, for --init none (default: 4; stl10: 8; a folder: 16)")
    channels = "3: colour, 1: grey, for --init none (default: 1 for mnist, fashionmnist, else 3)"
    add("--channels", type=int, choices=(1, 3), help=channels)
    training.add_drop_path_flag(add)
    add("--pool", default="mean", choices=weights.POOLS, help="input of the head: mean patch token, or class token")
    probe = "train only a linear layer, on standardised features; no decay, clipping, smoothing; default --blr: 0.1"
    add("--linear-probe", action="store_true", help=probe)

    add = parser.add_argument_group("token reduction (PTR)").add_argument
    add("--drop-ratio", type=float, default=0.0, help="fraction of the tokens that PTR drops at each stage")
    ptr.add_flags(add)

    add = parser.add_argument_group("optimisation").add_argument
    drawn = "drop path, MixUp, CutMix, the random criterion"
    training.add_flags(add, epochs=10, batch_size=64, blr=8e-3, warmup="10 %% of the epochs", drawn=drawn)
    repeats = "use each image N times per epoch (default: 1; with --label-fraction below 1, for about 2,000 steps, "
    repeats += "or up to 4,000 if the images fill fewer than 5 batches)"
    add("--repeats", type=training.positive, metavar="N", help=repeats)
    add("--layer-decay", type=float, default=0.75, help="layer-wise learning-rate decay, per block; 1: off")
    add("--compile", action="store_true", help="compile the model with torch.compile: slow start, faster steps")
    add("--smoothing", type=training.ratio, default=0.1, help="label smoothing")
    strength = "strength of RandAugment, 1 to 10; 0: off"
    add("--rand-augment", type=int, default=0, choices=range(11), metavar="N", help=strength)
    add("--erasing", type=training.ratio, default=0.0, help="probability of RandomErasing, filled with noise")
    one = "0: off. With both, each forward pass uses one of the two at random"
    add("--mixup", type=float, default=0.0, help=f"alpha of MixUp; {one}")
    add("--cutmix", type=float, default=0.0, help=f"alpha of CutMix; {one}")
    return parser


def build_encoder(
    args: argparse.Namespace, asked_size: list[int] | None, checkpoint: dict[str, Any] | None = None
) -> ViT:
    """Build the encoder of the run to resume (`checkpoint`, without its weights), else of `--init`, else a new one.

    An encoder of `--init` is resized to `asked_size` ([H, W] or [side]) if given. Raises ValueError if the file or the
    sizes do not fit.
    """
    if checkpoint is not None:
        return beit.build_encoder(checkpoint["encoder"], args.drop_path)
    if args.init == "none":
        size, sizes = data.sides(args.image_size), MODELS[args.model]
        return ViT(size, args.patch_size, channels=args.channels, drop_path=args.drop_path, **sizes)
    options = weights.told(args) | dict(image_size=asked_size and data.sides(asked_size), drop_path=args.drop_path)
    return weights.load_encoder(runs.load(args.init), weights=args.weights, **options)


def mixing(mixup: float, cutmix: float, num_classes: int) -> nn.Module | None:
    """Return MixUp, CutMix, a random choice of the two per call, or None if both are 0.

    The result maps images (B, C, H, W) and labels (B,) to mixed images and labels (B, classes).
    """
    kinds = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
    kinds += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
    return v2.RandomChoice(kinds) if kinds else None


def main(argv: list[str] | None = None) -> None:
    # 1. Settings
    parser = arguments()
    recipes = PROBES if parser.parse_args(argv).linear_probe else RECIPES
    args, checkpoint = runs.parse(parser, recipes, argv, warmup_ratio=0.1, sets=data.SETS)
    given = runs.given(parser, argv)
    weights.check_flags(given, args.init)
    ptr.check_flags(given, args.drop_ratio)
    if args.linear_probe and (args.drop_path, args.layer_decay) != (0, 1):
        runs.reject(given & {"drop_path", "layer_decay"}, "not used with --linear-probe, which freezes the encoder")
    asked_size = args.image_size  # None: the size in the file
    data.fill_in(args)
    world = training.start_world(args.device)

    # 2. Model. The settings of the encoder are recorded as trained. A linear probe needs no more than SGD, because its
    # standardised features have equal scales.
    training.seed_generators(torch.device("cpu"), args.seed, "weights")
    try:
        encoder = build_encoder(args, asked_size, checkpoint)
        reduction = ptr.from_args(args, len(encoder.blocks), args.drop_ratio)
        counts = ptr.token_counts(encoder.num_patches, len(encoder.blocks), reduction)
    except ValueError as error:
        source = "" if args.init == "none" else f"{args.init}: "
        raise SystemExit(f"error: {source}{error}") from None
    size, args.model = encoder.image_size, weights.model_name(encoder)
    if asked_size is None and args.init != "none":
        args.image_size = list(size)
    args.patch_size, args.channels = encoder.patch_size, encoder.channels
    train = data.labelled_images(args.data, args.data_root, size, args.limit, args.download)
    if args.label_fraction < 1:
        train = data.few_labels(train, args.label_fraction, args.seed)
    model = Classifier(encoder, len(train.classes), pool=args.pool, frozen=args.linear_probe).to(world.device)
    groups = training.parameter_groups(model, args.weight_decay, args.layer_decay)
    if args.linear_probe:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    parallel = DistributedDataParallel(model) if world.is_distributed else model
    forward = training.compiled(parallel) if args.compile else parallel

    # 3. Data
    batch_size = min(args.batch_size, len(train) // world.size * world.size)  # there may be few images
    micro_batch, accumulate = training.batch_sizes(batch_size, args.micro_batch, world)
    options = dict(flip=args.flip, channels=args.channels, seed=args.seed, device=world.device)
    augment = data.augmentations(args.rand_augment, args.erasing)
    if args.repeats is None:
        few = args.label_fraction < 1 and not args.dry_run and checkpoint is None
        steps = 2000 if few else 0  # chosen in docs/study/length.md
        args.repeats = max(1, round(steps / (args.epochs * (len(train) // batch_size))))
    repeated = data.subset(train, [*range(len(train))] * args.repeats) if args.repeats > 1 else train
    views = data.training_views(repeated, size, args.min_crop, augment=augment, **options)
    loader = data.training_loader(views, micro_batch, seed=args.seed, workers=args.workers, world=world)
    val = data.validation_images(args.data, args.data_root, size, None, args.download, train.classes)
    scoring = dict(batch_size=min(256, args.micro_batch or 256), workers=args.workers, world=world)
    val_loader = data.scoring_loader(val, size, args.channels, **scoring)
    scored_batches = 2 if args.dry_run else None
    normalize = data.normalize_for(encoder).to(world.device)
    mix = mixing(args.mixup, args.cutmix, len(train.classes))
    steps_per_epoch = len(loader) // accumulate
    if args.dry_run:
        steps_per_epoch = min(2, steps_per_epoch)
    total_steps, warmup_steps = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    peak_lr = args.blr * batch_size / 256

    # 4. Start, or continue from the checkpoint
    step, first_epoch, history = 0, 0, []
    if checkpoint is not None:
        if checkpoint["num_images"] != len(train):
            raise SystemExit(f"error: --data has {len(train)} images, the resumed run had {checkpoint['num_images']}")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, first_epoch, history = checkpoint["step"], checkpoint["epoch"], checkpoint["history"]
    elif args.linear_probe:
        train_loader = data.scoring_loader(train, size, args.channels, **scoring)
        mean, variance = metrics.feature_statistics(
            lambda images: model.features(images, reduction),
            train_loader,
            normalize,
            args.precision,
            world,
            scored_batches,
        )
        model.fc_norm.running_mean.copy_(mean)
        model.fc_norm.running_var.copy_(variance)
    run = runs.RunFolder(args) if world.is_main else None
    if world.is_main:
        print(f"device  {world.describe()}")
        print(f"data    {args.data}: {data.describe(train)}, {len(val):,} validation images")
        tokens = f"class token + {' '.join(map(str, counts))}"
        print(f"model   --init {args.init}: {encoder.describe()}; {model.pool} pooling; {tokens}")
        print("steps  ", training.describe_steps(total_steps, batch_size, micro_batch, accumulate, args.blr, world))
        if args.repeats > 1:
            print(f"        each epoch uses each training image {args.repeats} times (--repeats)")
        print(f"to continue after an interruption: python finetune.py --resume {shlex.quote(args.out)}")

    # 5. Train. Generators are seeded per step, so resuming is exact.
    guard = training.StepGuard()
    bar = tqdm(initial=step, total=total_steps, unit=" steps", disable=world.hides_bars, leave=False)
    for epoch in range(first_epoch, args.epochs):
        model.train()
        loader.sampler.set_epoch(epoch)
        batches, steps, unreadable = training.batches(loader), [], 0
        start, waiting = time.perf_counter(), training.Stopwatch()
        for _ in range(steps_per_epoch):
            lr = training.warmup_cosine(step, peak=peak_lr, total=total_steps, warmup=warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            training.seed_generators(world.device, args.seed, "step", step, world.rank)  # drop path, mixing, `random`

            step_metrics = metrics.StepMetrics(accumulate)
            for i in range(accumulate):
                with waiting:
                    images, labels, readable = next(batches)
                unreadable += int((~readable).sum())
                images, labels = normalize(images), training.to_device(labels, world.device)
                if mix is not None:
                    images, labels = mix(images, labels)
                if world.is_distributed:
                    parallel.require_backward_grad_sync = i == accumulate - 1  # average the gradients once per step
                with training.autocast(world.device, args.precision):
                    logits = forward(images, ptr=reduction)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.smoothing)
                (loss / accumulate).backward()
                step_metrics.update(loss=loss)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            steps.append(step_metrics.compute(grad_norm))
            if guard.allows(steps[-1]):
                optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{steps[-1]['loss']:.3f}")
            training.check_readable(unreadable, seen=len(steps) * batch_size // world.size)

        # 6. Evaluate, log, save
        seconds = time.perf_counter() - start
        model.eval()
        logits, labels = metrics.predict(
            lambda images: model(images, ptr=reduction), val_loader, normalize, args.precision, world, scored_batches
        )
        row = dict(epoch=epoch + 1, step=step, lr=lr) | metrics.mean_of_steps(steps)
        speed = dict(images_per_second=len(steps) * batch_size / seconds, data_wait=waiting.seconds / seconds)
        row |= dict(unreadable=sum(training.gather_lists([unreadable]))) | speed
        row |= metrics.accuracies(logits, labels) | dict(scored=len(labels))
        history.append(row)
        best = max(row["top1"] for row in history)
        if world.is_main:
            content = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
            content |= dict(step=step, epoch=epoch + 1, history=history, method="finetune", num_images=len(train))
            content |= dict(encoder=encoder.arguments, pool=model.pool, classes=train.classes)
            run.save(content, is_best=row["top1"] == best)
            tqdm.write(runs.describe(row, "epoch", "loss", "val_loss", "top1", "top5", "images_per_second"))
    bar.close()

    # 7. Summary
    if world.is_main:
        best = max(row["top1"] for row in history)
        print(
            f"top-1 accuracy on {history[-1]['scored']:,} validation images: {history[-1]['top1']:.1%}, best {best:.1%}"
        )
        print(f"saved in {args.out}; next, accuracy against speed:")
        print(f"  python evaluate.py {shlex.quote(args.out)}/best.pt --drop-ratio 0 0.1 0.2 0.3 0.4")


if __name__ == "__main__":
    main()
    training.end_world()
