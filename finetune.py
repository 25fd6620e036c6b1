"""Fine-tune and score a classifier (panel b of the poster), with PTR to make it faster.

    python finetune.py                                           from runs/pretrain/last.pt, on the built-in data
    python finetune.py --init none                               the same from scratch, to compare
    python finetune.py --data FOLDER --recipe imagenet --init FILE            MAE's recipe, FILE ours or a public ViT
    python finetune.py --eval runs/finetune/best.pt --drop-ratio 0 0.1 0.2 0.3 0.4          accuracy against speed
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import threads  # noqa: F401 (before torch)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

import beit
import data
import runs
import scores
import training
import weights
from model import MODELS, Classifier, ViT, pool
from ptr import PTR, token_counts
from weights import find_weights, load_classifier, load_encoder, model_name, timm_call, timm_weights, told

# What `--recipe` sets, and with `--linear-probe`; flags that are given win.
RECIPES = {
    "laptop": {},  # the defaults below
    "imagenet": dict(
        epochs=100, warmup_epochs=5.0, batch_size=1024, blr=5e-4, layer_decay=0.65, weight_decay=0.05, clip_grad=0.0,
        drop_path=0.1, min_crop=0.08, rand_augment=9, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1,
        model="vit_base", patch_size=16, image_size=[224],
    ),
}  # fmt: skip
PROBES = {
    "laptop": dict(blr=0.1, weight_decay=0.0, clip_grad=0.0, layer_decay=1.0, smoothing=0.0),
}
PROBES["imagenet"] = PROBES["laptop"] | dict(epochs=90, warmup_epochs=10.0, batch_size=1024)

# What `--eval` takes from the checkpoint where no flag says otherwise.
KEPT = ("data", "data_root", "drop_ratio", "drop_stages", "drop_at", "drop_blocks", "criterion")

# Table 5 of the poster (ViT-B/16, ImageNet), by drop ratio: GMACs, top-1 accuracy in %, speed-up.
POSTER = {
    0.0: (17.57, 83.8, 1.00),
    0.1: (15.34, 83.7, 1.15),
    0.2: (13.19, 83.5, 1.35),
    0.3: (11.29, 83.2, 1.57),
    0.4: (9.53, 82.6, 1.88),
}


def arguments() -> argparse.ArgumentParser:
    """All flags; what is None by default depends on the data, the encoder or other flags."""
    parser = runs.flag_parser(__doc__)
    add = parser.add_argument_group("what to do, instead of fine-tuning").add_argument
    add("--linear-probe", action="store_true", help="train a linear classifier on the frozen encoder")
    add("--knn", type=int, nargs="?", const=20, metavar="K", help="score the frozen features of --init by ridge "
        "regression and by a vote of their K (20) nearest neighbours, weighted as in DINO (temperature 0.07), but of "
        "standardised features of the mean patch token (--pool class: of the class token, as DINO's)")
    add("--eval", metavar="FILE", help="score a classifier, a checkpoint of this script or a public ViT with its head, "
        "at each --drop-ratio, on all validation images or --limit of them")
    add("--class-order", default="name", choices=("name", "number"), help="of class folders that are numbers, with "
        "--eval of a public file, which does not say")
    add("--export", metavar="FILE", help="write the encoder of --init, and its head if it has one, for timm")

    runs.add_flags(parser, RECIPES, out="runs/finetune", files="args.json, metrics.jsonl, last.pt, best.pt")
    data_group = parser.add_argument_group("data")
    data.add_flags(data_group.add_argument)
    data_group.add_argument("--label-fraction", type=runs.share, default=1.0, help="use this share of each class")

    add = parser.add_argument_group("model").add_argument
    add("--init", default="runs/pretrain/last.pt", metavar="FILE", help="encoder to start from: a checkpoint of "
        "ours, a public MAE, DINO, DeiT, MoCo v3, CAE, BEiT or timm ViT, or none: from scratch")
    add("--weights", default="student", choices=("student", "teacher"), help="which encoder of --init")
    weights.add_flags(add)
    add("--pool", choices=("mean", "class"), help="what the head sees: the mean of the patch tokens, or the class "
        "token (default: mean; with --eval what the file says)")
    add("--drop-path", type=runs.share, default=0.0, help="stochastic depth")
    add("--model", default="vit_mini", choices=MODELS, help="encoder for --init none")
    add("--patch-size", type=int, help="pixels, for --init none (default: 4 for small sets, 16 for a folder)")
    add("--channels", type=int, choices=(1, 3), help="for --init none; 3: colour, 1: grey (default: what the data are)")

    add = parser.add_argument_group("token reduction (PTR)").add_argument
    add("--drop-ratio", type=float, nargs="+", default=[0.0], metavar="RATIO", help="share of its patch tokens that "
        "each stage drops; several with --eval")
    runs.add_ptr_flags(add)

    add = parser.add_argument_group("optimisation").add_argument
    add("--compile", action="store_true", help="torch.compile the model: a slow start, faster steps")
    add("--epochs", type=int, default=10, help="passes over the data")
    add("--batch-size", type=int, default=64, help="images a step, over all processes")
    add("--micro-batch", type=int, help="images at once per process (default: all). Gradients accumulate: the step is "
        "the same, but for what is drawn per micro-batch (drop path, MixUp, CutMix, the random criterion)")
    add("--blr", type=float, default=4e-3, help="learning rate per 256 images: lr = blr * batch size / 256")
    add("--warmup-epochs", type=float, help="epochs of linear warm-up (default, and for runs that are no longer: 10 %% "
        "of the epochs)")
    add("--weight-decay", type=float, default=0.05, help="of matrices; none on biases, norms and tokens")
    add("--clip-grad", type=float, default=1.0, help="largest norm of the gradient; 0: any")
    add("--layer-decay", type=float, default=0.75, help="factor of the learning rate from each block to the one before")
    add("--smoothing", type=runs.share, default=0.1, help="label smoothing")
    add("--rand-augment", type=int, default=0, help="strength of RandAugment, 0 (none) to 10")
    add("--erasing", type=runs.share, default=0.0, help="probability that a rectangle of an image becomes noise")
    add("--mixup", type=float, default=0.0, help="alpha of MixUp; 0: none. With CutMix one of the two for each batch")
    add("--cutmix", type=float, default=0.0, help="alpha of CutMix; 0: none")
    return parser


# --- pieces -----------------------------------------------------------------------------------------------------------


def build_encoder(args: argparse.Namespace, checkpoint: dict[str, Any] | None, is_main: bool = True) -> ViT:
    """The encoder of the run to resume, of `--init`, or a new one. Raises ValueError."""
    if checkpoint is not None:
        return beit.build_encoder(checkpoint["encoder"], args.drop_path)
    if args.init == "none":
        data.fill_in(args)
        size, model = data.sides(args.image_size), MODELS[args.model]
        return ViT(size, args.patch_size, channels=args.channels, drop_path=args.drop_path, **model)
    return load_encoder(
        runs.load(args.init), weights=args.weights, image_size=args.image_size and data.sides(args.image_size),
        drop_path=args.drop_path, log=print if is_main else lambda text: None, **told(args),
    )  # fmt: skip


def mixing(mixup: float, cutmix: float, num_classes: int) -> nn.Module | None:
    """MixUp, CutMix, or one of the two for each batch: images (B, C, H, W), labels (B,) -> mixed, (B, classes)."""
    kinds = [
        kind(alpha=alpha, num_classes=num_classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha
    ]
    return v2.RandomChoice(kinds) if kinds else None


def scoring_loader(args: argparse.Namespace, images: Dataset, world: training.World) -> DataLoader:
    """Each image once, over all processes."""
    views = data.evaluation_views(images, args)
    return data.evaluation_loader(views, min(256, args.micro_batch or 256), args.workers, world)


def accuracies(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss, and top-1 and top-5 accuracy in [0, 1], of logits (n, classes) for labels (n,)."""
    return dict(
        val_loss=F.cross_entropy(logits, labels).item(),
        top1=scores.topk_accuracy(logits, labels, 1),
        top5=scores.topk_accuracy(logits, labels, 5),
    )


# --- what to do, instead of fine-tuning -------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace, checkpoint: dict[str, Any], world: training.World) -> None:
    """`--eval`: accuracy, work and speed of a classifier at each drop ratio, beside the poster's."""
    size = args.image_size and data.sides(args.image_size)
    model = load_classifier(checkpoint, pool=args.pool, image_size=size, **told(args))
    encoder = model.to(world.device).eval().encoder
    args.channels, args.image_size = encoder.arguments["channels"], list(encoder.image_size)
    data.fill_in(args)
    depth = len(encoder.blocks)
    reductions = [runs.token_reduction(args, depth, ratio) for ratio in args.drop_ratio]
    left = [token_counts(encoder.num_patches, depth, ptr)[-1] for ptr in reductions]
    classes = checkpoint.get("classes")  # a public file's are taken to be the data's, in order
    val = data.validation_images(args, classes, args.limit)
    num_classes = model.head.out_features
    if classes is None and all(name.isdecimal() for name in val.classes):
        by_number = sorted(val.classes, key=int)
        if args.class_order == "number":
            val = data.validation_images(args, by_number, args.limit)
        elif by_number != val.classes:
            print(f"warning: the classes are taken in the order {', '.join(val.classes[:3])}, ...: should it be "
                  f"{', '.join(by_number[:3])}, ..., say --class-order number")  # fmt: skip
    if classes not in (None, val.classes) or len(val.classes) != num_classes:
        raise SystemExit(f"error: --eval {args.eval} tells {num_classes} classes apart, --data {args.data} has others")
    loader, normalize = scoring_loader(args, val, world), data.normalize_for(encoder).to(world.device)
    rows = []
    for ptr in reductions:
        logits, labels = scores.predict(
            lambda images, ptr=ptr: model(images, ptr=ptr), loader, normalize, args.precision, world
        )
        rows.append(accuracies(logits, labels))
    if not world.is_main:
        return
    images = torch.randn(min(args.batch_size, 64), args.channels, *encoder.image_size, device=world.device)
    whole, *reduced = [lambda ptr=ptr: model(images, ptr=ptr) for ptr in (PTR(), *reductions)]
    speeds = scores.speed_ups(whole, reduced, world.device)
    print(f"data    {args.data}: {data.describe(val)}, {len(labels):,} of them scored")
    print(f"model   {encoder.describe()}, pooled by {model.pool}, on {world.device}")
    blocks = max((ptr.blocks for ptr in reductions), key=len)
    print(f"dropping after blocks {list(blocks)} (0-based); the poster does not say after which")
    print("  ratio  tokens    GMACs   top-1   top-5      speed-up  |  "
          "poster (ViT-B/16, ImageNet): GMACs  top-1  speed-up")  # fmt: skip
    for ptr, tokens, row, (speed, noise) in zip(reductions, left, rows, speeds, strict=True):
        macs = scores.count_macs(model, images[:1], ptr=ptr) / 1e9
        line = f"  {ptr.drop_ratio:5.3g}  {tokens:6}  {macs:7.4g}  {row['top1']:6.1%}  {row['top5']:6.1%}  "
        line += f"{speed:5.2f} +- {noise:.2f}  |"
        if ptr.drop_ratio in POSTER:
            poster_macs, accuracy, speed_up = POSTER[ptr.drop_ratio]
            line += f"{poster_macs:37.2f}  {accuracy:4.1f}%  {speed_up:7.2f}x"
        print(line)


def nearest_neighbours(args: argparse.Namespace, encoder: ViT, ptr: PTR, world: training.World) -> None:
    """`--knn`: how many validation images the nearest training images name right, by the encoder's pooled tokens."""
    by = args.pool or "mean"
    encoder.to(world.device).eval()
    train = data.labelled_images(args, args.limit)
    val = data.validation_images(args, train.classes)
    normalize = data.normalize_for(encoder).to(world.device)
    results = [
        scores.predict(
            lambda images: pool(encoder(images, ptr=ptr).tokens, by), scoring_loader(args, images, world), normalize,
            args.precision, world,
        )
        for images in (train, val)
    ]  # fmt: skip
    if world.is_main:
        neighbours = scores.knn_accuracy(*results[0], *results[1], k=args.knn)
        linear = scores.linear_accuracy(*results[0], *results[1])
        counts = [len(labels) for _, labels in results]
        print(f"data    {args.data}: {data.describe(train)}; {counts[0]:,} searched, {counts[1]:,} scored")
        print(f"top-1 {neighbours:.1%} by {args.knn} nearest neighbours, {linear:.1%} by ridge regression, of the {by} "
              f"token features of {args.init}")  # fmt: skip


def export(args: argparse.Namespace) -> None:
    """`--export`: write the classifier in --init, or where it has no head the encoder, as timm's models load it."""
    checkpoint, size = runs.load(args.init), args.image_size and data.sides(args.image_size)
    if args.weights == "student" and "head.weight" in find_weights(checkpoint):
        model = load_classifier(checkpoint, pool=args.pool, image_size=size, **told(args))
        known = dict(pool=model.pool, classes=checkpoint.get("classes"), encoder=model.encoder.arguments)
    else:
        model = load_encoder(checkpoint, weights=args.weights, image_size=size, **told(args))
        known = dict(encoder=model.arguments)
    runs.save_weights(Path(args.export), timm_weights(model), dict(method="export", config={}) | known)
    print(f"written: {args.export}. It loads, strictly, into\n  {timm_call(model, args.export)}")


# --- fine-tuning ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    # 1. Settings
    parser = arguments()
    recipes = PROBES if parser.parse_args(argv).linear_probe else RECIPES
    args, checkpoint = runs.parse(parser, recipes, argv, warmup_ratio=0.1, kept=KEPT)
    weights.check_flags(runs.given(parser, argv), args.eval or args.init)
    if not args.eval and len(args.drop_ratio) > 1:
        raise SystemExit("error: --drop-ratio takes several numbers only with --eval")
    world = training.start_world(args.device)

    # 2. Model. A frozen encoder's features are alike in scale (BatchNorm): the plainest optimizer will do for its head.
    training.seed_generators(torch.device("cpu"), args.seed, "weights")
    try:
        if args.export:
            return export(args) if world.is_main else None
        if args.eval:
            return evaluate(args, checkpoint, world)
        encoder = build_encoder(args, checkpoint, world.is_main)
        ptr = runs.token_reduction(args, len(encoder.blocks), args.drop_ratio[0])
        counts = token_counts(encoder.num_patches, len(encoder.blocks), ptr)
    except ValueError as error:
        raise SystemExit(f"error: {args.eval or args.init}: {error}") from None
    args.model = model_name(encoder)  # what is recorded is what is trained
    args.patch_size, args.channels = encoder.arguments["patch_size"], encoder.arguments["channels"]
    args.image_size = args.image_size or list(encoder.image_size)
    data.fill_in(args)
    if args.knn is not None:
        return nearest_neighbours(args, encoder, ptr, world)
    train = data.labelled_images(args, args.limit)
    if args.label_fraction < 1:
        train = data.few_labels(train, args.label_fraction, args.seed)
    model = Classifier(encoder, len(train.classes), pool=args.pool or "mean", frozen=args.linear_probe)
    model.to(world.device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = training.parameter_groups(model, args.weight_decay, args.layer_decay)
    if args.linear_probe:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    ddp = DistributedDataParallel(model) if world.size > 1 else None
    forward = training.compiled(ddp or model) if args.compile else ddp or model

    # 3. Data
    batch_size = min(args.batch_size, len(train) // world.size * world.size)  # few labels are few
    micro_batch, accumulate = training.batch_sizes(batch_size, args.micro_batch, world)
    augment = data.augmentations(args.rand_augment, args.erasing)
    views = data.training_views(train, args, encoder.image_size, world.device, augment)
    loader = data.training_loader(views, micro_batch, args.workers, world)
    val = data.validation_images(args, train.classes)
    val_loader = scoring_loader(args, val, world)
    normalize = data.normalize_for(encoder).to(world.device)
    mix = mixing(args.mixup, args.cutmix, len(train.classes))
    steps_per_epoch = len(loader) // accumulate
    if args.dry_run:
        steps_per_epoch = min(2, steps_per_epoch)
    total_steps, warmup_steps = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    peak_lr = args.blr * batch_size / 256

    # 4. Start, or go on from where the checkpoint was written
    step, first_epoch, history = 0, 0, []
    if checkpoint is not None:
        if checkpoint["num_images"] != len(train):
            raise SystemExit(f"error: --data has {len(train)} images, {checkpoint['num_images']} in the run to resume")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, first_epoch, history = checkpoint["step"], checkpoint["epoch"], checkpoint["history"]
    elif args.linear_probe:
        mean, variance = scores.feature_statistics(
            lambda images: model.features(images, ptr), scoring_loader(args, train, world), normalize, args.precision,
            world, batches=2 if args.dry_run else None,
        )  # fmt: skip
        model.fc_norm.running_mean.copy_(mean)
        model.fc_norm.running_var.copy_(variance)
    run = runs.RunFolder(args) if world.is_main else None
    if world.is_main:
        print(f"device  {world.describe()}")
        print(f"data    {args.data}: {data.describe(train)}, {len(val):,} to validate")
        print(f"model   {encoder.describe()}, pooled by {model.pool}; class token + {' '.join(map(str, counts))}")
        print(f"steps   {total_steps:,}, each {batch_size} images = {world.size} x {accumulate} x {micro_batch}; "
              f"peak learning rate {peak_lr:.3g} = {args.blr:g} * {batch_size} / 256")
        print(f"to continue after an interruption: python finetune.py --resume {args.out}/last.pt")

    # 5. Train
    skipped_in_a_row = 0
    bar = tqdm(initial=step, total=total_steps, unit=" steps", disable=not world.is_main, leave=False)
    for epoch in range(first_epoch, args.epochs):
        model.train()
        loader.sampler.set_epoch(epoch)
        batches, rows, start = data.batches(loader), [], time.perf_counter()
        unreadable, waited = 0, 0.0
        for _ in range(steps_per_epoch):
            lr = training.warmup_cosine(step, peak=peak_lr, total=total_steps, warmup=warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            training.seed_generators(world.device, args.seed, "step", step, world.rank)  # drop path, mixing, `random`

            # Forward and backward, in micro-batches
            total = torch.zeros((), device=world.device)
            for i in range(accumulate):
                waited -= time.perf_counter()
                images, labels, readable = next(batches)
                waited += time.perf_counter()
                unreadable += int((~readable).sum())
                images, labels = normalize(images), labels.to(world.device, non_blocking=True)
                if mix is not None:
                    images, labels = mix(images, labels)
                if ddp is not None:
                    ddp.require_backward_grad_sync = i == accumulate - 1  # average the gradients once a step
                with training.autocast(world.device, args.precision):
                    logits = forward(images, ptr=ptr)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.smoothing)
                (loss / accumulate).backward()
                total = total + loss.detach() / accumulate
            grad_norm = nn.utils.clip_grad_norm_(trainable, args.clip_grad or math.inf)
            values = torch.stack([training.mean_over_processes(total), grad_norm])
            row = dict(zip(("loss", "grad_norm"), values.tolist(), strict=True))
            rows.append(row)

            # A step that is not finite must not reach the weights; all processes decide the same.
            if runs.is_finite(row):
                optimizer.step()
                skipped_in_a_row = 0
            else:
                skipped_in_a_row += 1
                if skipped_in_a_row == 10:
                    raise SystemExit("error: ten steps in a row not finite: repeat with --resume and a lower --blr")
            optimizer.zero_grad()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            data.check_readable(unreadable, seen=len(rows) * batch_size // world.size)

        # 6. Score, log, save
        seconds = time.perf_counter() - start
        model.eval()
        logits, labels = scores.predict(
            lambda images: model(images, ptr=ptr), val_loader, normalize, args.precision, world,
            batches=2 if args.dry_run else None,
        )  # fmt: skip
        row = dict(epoch=epoch + 1, step=step, lr=lr) | runs.mean_of_steps(rows)
        row |= dict(
            unreadable=unreadable, images_per_second=len(rows) * batch_size / seconds, data_wait=waited / seconds
        )
        row |= accuracies(logits, labels) | dict(scored=len(labels))
        history.append(row)
        if world.is_main:
            run.save(dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, epoch=epoch + 1, history=history,
                method="finetune", encoder=encoder.arguments, pool=model.pool, classes=train.classes,
                num_images=len(train),
            ), is_best=row["top1"] == max(some["top1"] for some in history))  # fmt: skip
            tqdm.write(runs.describe(row))
    bar.close()

    # 7. Say how it went
    if world.is_main:
        last, best = history[-1]["top1"], max(row["top1"] for row in history)
        scored = f"{history[-1]['scored']:,} validation images"
        print(f"top-1 {last:.1%} of {scored}, best epoch {best:.1%}; next, accuracy against speed:")
        print(f"  python finetune.py --eval {args.out}/best.pt --drop-ratio 0 0.1 0.2 0.3 0.4")


if __name__ == "__main__":
    main()
    training.end_world()
