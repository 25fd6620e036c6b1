"""Evaluate a classifier at several drop ratios of PTR, or the frozen features of an encoder.

    python evaluate.py runs/finetune/best.pt --drop-ratio 0 0.1 0.2 0.3 0.4        accuracy, MACs and speed
    python evaluate.py runs/pretrain/last.pt --knn                                 k-NN, ridge-regression probe
    python evaluate.py FILE --data FOLDER --pool class                             a public ViT with its head

The k-NN vote is weighted as in DINO (temperature 0.07). Unlike DINO's, the features are standardised and, by default,
the mean patch token (DINO: --pool class).
"""

import argparse
from typing import Any

import util.threads  # noqa: F401 (before torch)

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import data
import ptr
import weights
from model import Classifier, ViT, pool
from ptr import PTR
from util import metrics, profiling, runs, training

TOKENS = {"mean": "mean patch token", "class": "class token"}  # by --pool
DATA = (("data",), ("data_root",))  # settings of the checkpoint, unless a flag is given


def arguments() -> argparse.ArgumentParser:
    """Build the parser. Flags that are None by default depend on the file."""
    parser = runs.flag_parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="a checkpoint of finetune.py or pretrain.py, or a public ViT")
    knn = "evaluate frozen features by k-NN (K, 20 if left out) and a ridge-regression probe"
    parser.add_argument("--knn", type=training.positive, nargs="?", const=20, metavar="K", help=knn)

    add = parser.add_argument_group("data").add_argument
    limited = "of the test set, or with --knn of the training set"
    before = "the checkpoint's, else "
    data.add_flags(add, limited=limited, size_of="that of FILE", before=before)
    order = "order of a public file's classes if the class folders are numbers: by name (10 before 2) or by number"
    add("--class-order", default="name", choices=("name", "number"), help=order)

    add = parser.add_argument_group("model").add_argument
    weights.add_file_flags(add)
    add("--pool", choices=weights.POOLS, help="pooling: patch tokens or class token (default: the file's; --knn: mean)")

    add = parser.add_argument_group("token reduction (PTR)").add_argument
    ratios = "fractions of the tokens that PTR drops at each stage, one row each (default: a classifier's own, else 0)"
    add("--drop-ratio", type=float, nargs="+", default=[0.0], metavar="RATIO", help=ratios)
    ptr.add_flags(add, before="the classifier's, else ")

    add = parser.add_argument_group("run").add_argument
    add("--batch-size", type=training.positive, default=256, help="images per forward pass and process")
    runs.add_device_flags(add)
    return parser


def validation_images(args: argparse.Namespace, checkpoint: dict[str, Any], size: tuple[int, int]) -> Dataset:
    """Return validation images of `size` (H, W), with labels in the order of the classifier's classes.

    A public file does not record its classes: assumes the class folders in the order of `args.class_order`. Warns if
    they are numbers whose order by name is not the numeric one.
    """
    options = dict(limit=args.limit, download=args.download)
    known = checkpoint.get("classes")  # None for a public file: assumed to be the data's, in order
    val = data.validation_images(args.data, args.data_root, size, **options, classes=known)
    if known is not None or not all(name.isdecimal() for name in val.classes):
        return val
    by_number = sorted(val.classes, key=int)
    if args.class_order == "number":
        return data.validation_images(args.data, args.data_root, size, **options, classes=by_number)
    if by_number != val.classes:
        orders = [f"{', '.join(names[:3])}, ..." for names in (val.classes, by_number)]
        runs.print_once(f"warning: assumed the class order {orders[0]} (with --class-order number: {orders[1]})")
    return val


@torch.no_grad()
def evaluate_classifier(
    model: Classifier, loader: DataLoader, reductions: list[PTR], args: argparse.Namespace, world: training.World
) -> None:
    """Print accuracy, MACs and speed at each of the `reductions`."""
    encoder, normalize = model.encoder, data.normalize_for(model.encoder).to(world.device)
    rows = []
    for reduction in reductions:
        training.seed_generators(world.device, args.seed)  # of the criterion `random`
        logits, labels = metrics.predict(
            lambda images, reduction=reduction: model(images, ptr=reduction), loader, normalize, args.precision, world
        )
        rows.append(metrics.accuracies(logits, labels))
    if not world.is_main:
        return
    images = torch.randn(min(args.batch_size, 64), args.channels, *encoder.image_size, device=world.device)
    whole, *reduced = [lambda reduction=reduction: model(images, ptr=reduction) for reduction in (PTR(), *reductions)]
    with training.autocast(world.device, args.precision):
        speeds = profiling.speed_ups(whole, reduced, world.device)
    print(f"model   {encoder.describe()}; {model.pool} pooling; on {world.device}; {len(labels):,} images evaluated")
    print(f"dropping after blocks {list(max((reduction.blocks for reduction in reductions), key=len))} (0-based)")
    print("  ratio  tokens    GMACs   top-1   top-5      speed-up")
    for reduction, row, (speed, noise) in zip(reductions, rows, speeds, strict=True):
        tokens = ptr.token_counts(encoder.num_patches, len(encoder.blocks), reduction)[-1]
        macs = profiling.count_macs(model, images[:1], ptr=reduction) / 1e9
        accuracy = f"{row['top1']:6.1%}  {row['top5']:6.1%}"
        print(f"  {reduction.drop_ratio:5.3g}  {tokens:6}  {macs:7.4g}  {accuracy}  {speed:5.2f} +- {noise:.2f}")


def evaluate_features(
    encoder: ViT, loaders: list[DataLoader], reductions: list[PTR], args: argparse.Namespace, world: training.World
) -> None:
    """Print the accuracies of k-NN and ridge regression on pooled tokens, one line per reduction.

    `loaders`: labelled images to fit, images to test.
    """
    by, normalize = args.pool or "mean", data.normalize_for(encoder).to(world.device)
    for reduction in reductions:
        training.seed_generators(world.device, args.seed)  # of the criterion `random`

        def features(images: Tensor, reduction: PTR = reduction) -> Tensor:
            return pool(encoder(images, ptr=reduction).tokens, by)

        train, val = (metrics.predict(features, loader, normalize, args.precision, world) for loader in loaders)
        if world.is_main:
            knn, ridge = metrics.knn_accuracy(*train, *val, k=args.knn), metrics.ridge_accuracy(*train, *val)
            print(
                f"top-1 accuracy {knn:.1%} by k-NN (k = {args.knn}), {ridge:.1%} by ridge regression; {TOKENS[by]}, "
                f"drop ratio {reduction.drop_ratio:g}, fitted on {len(train[1]):,}, tested on {len(val[1]):,} images"
            )


def main(argv: list[str] | None = None) -> None:
    # 1. Settings
    parser = arguments()
    first = parser.parse_args(argv)
    checkpoint = runs.load(first.file)
    groups = (*DATA, *ptr.FLAG_GROUPS) if first.knn is None else DATA  # with --knn, PTR only if a flag is given
    args = runs.parse_with_checkpoint(parser, argv, checkpoint, groups)
    ratios = args.drop_ratio if isinstance(args.drop_ratio, list) else [args.drop_ratio]  # a checkpoint records one
    ptr.check_flags(runs.given(parser, argv), *ratios)
    world = training.start_world(args.device)

    # 2. Model
    options = weights.told(args) | dict(image_size=args.image_size and data.sides(args.image_size))
    try:
        if args.knn is not None:
            model = weights.load_encoder(checkpoint, weights=args.weights, **options)
        elif args.weights == "teacher" or "head.weight" not in weights.find_weights(checkpoint):
            raise ValueError("the file has no classifier for this encoder: use --knn to evaluate features")
        else:
            model = weights.load_classifier(checkpoint, pool=args.pool, **options)
        encoder = model.encoder if args.knn is None else model
        reductions = [ptr.from_args(args, len(encoder.blocks), ratio) for ratio in ratios]
        for reduction in reductions:
            ptr.token_counts(encoder.num_patches, len(encoder.blocks), reduction)
    except ValueError as error:
        raise SystemExit(f"error: {args.file}: {error}") from None
    model.to(world.device).eval()

    # 3. Data, evaluation
    size, args.channels = encoder.image_size, encoder.channels
    scoring = dict(batch_size=args.batch_size, workers=args.workers, world=world)
    if args.knn is not None:
        train = data.labelled_images(args.data, args.data_root, size, args.limit, args.download)
        val = data.validation_images(args.data, args.data_root, size, None, args.download, train.classes)
        if world.is_main:
            print(f"data    {args.data}: {data.describe(train)}, {len(val):,} to test")
        loaders = [data.scoring_loader(images, size, args.channels, **scoring) for images in (train, val)]
        return evaluate_features(encoder, loaders, reductions, args, world)
    val = validation_images(args, checkpoint, size)
    if checkpoint.get("classes") not in (None, val.classes) or len(val.classes) != model.head.out_features:
        raise SystemExit(
            f"error: {args.file} has {model.head.out_features} classes, --data {args.data} has {len(val.classes)}, or "
            "other names: use the data that the classifier was trained on"
        )
    if world.is_main:
        print(f"data    {args.data}: {data.describe(val)}")
    evaluate_classifier(model, data.scoring_loader(val, size, args.channels, **scoring), reductions, args, world)


if __name__ == "__main__":
    main()
    training.end_world()
