"""Fine-tune and score a classifier (panel b of the poster), with PTR to make it faster.

    python finetune.py                                           from runs/pretrain/last.pt, on the built-in data
    python finetune.py --init none                               the same from scratch, to compare
    python finetune.py --data FOLDER --recipe imagenet --init FILE            MAE's recipe, FILE ours or a public ViT
    python finetune.py --eval runs/finetune/best.pt --drop-ratio 0 0.1 0.2 0.3 0.4          accuracy against speed
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import data
import engine
from engine import UserError, World
from model import MODELS, Classifier, ViT, find_weights, load_classifier, load_encoder, pool
from ptr import PTR, token_counts

# What `--recipe` sets, and what `--linear-probe` sets on top; flags that are given win.
RECIPES: dict[str, dict[str, Any]] = {
    "laptop": {},  # the defaults below
    "imagenet": dict(
        epochs=100, warmup_epochs=5.0, batch_size=1024, blr=5e-4, layer_decay=0.65, weight_decay=0.05, clip_grad=0.0,
        drop_path=0.1, min_crop=0.08, rand_augment=9, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1,
        model="vit_base", patch_size=16, image_size=[224],
    ),
}  # fmt: skip
PROBE = dict(
    weight_decay=0.0, clip_grad=0.0, layer_decay=1.0, drop_path=0.0, rand_augment=0, erasing=0.0, mixup=0.0, cutmix=0.0,
    smoothing=0.0,
)  # fmt: skip
PROBE_RECIPES: dict[str, dict[str, Any]] = {
    "laptop": PROBE | dict(blr=0.1),
    "imagenet": PROBE | dict(epochs=90, warmup_epochs=10.0, batch_size=1024, blr=0.1),
}

# Table 5 of the poster (ViT-B/16, ImageNet), by drop ratio: GMACs, top-1 accuracy in %, speed-up.
POSTER = {
    0.0: (17.57, 83.8, 1.00),
    0.1: (15.34, 83.7, 1.15),
    0.2: (13.19, 83.5, 1.35),
    0.3: (11.29, 83.2, 1.57),
    0.4: (9.53, 82.6, 1.88),
}

# What `--eval` takes from the checkpoint where no flag says otherwise.
KEPT = ("data", "data_root", "drop_ratio", "drop_stages", "drop_at", "drop_blocks", "criterion")


def arguments() -> argparse.ArgumentParser:
    """All flags; those that are None by default take a value that depends on the data or the encoder."""
    parser = engine.flag_parser(__doc__)
    add = functools.partial(engine.add_flag, parser.add_argument_group("what to do, instead of fine-tuning"))
    add("--linear-probe", False, "train a linear classifier on the frozen encoder", action="store_true")
    add("--knn", None, "score the frozen features of --init by their K nearest neighbours (K: 20)", type=int, nargs="?",
        const=20, metavar="K")
    add("--eval", None, "score a classifier, a checkpoint of this script or a public ViT with its head, at each "
        "--drop-ratio, on all validation images or --limit of them", metavar="FILE")
    add("--export", None, "write the encoder of --init, and its head if it has one, for timm", metavar="FILE")

    engine.add_run_flags(parser, RECIPES, "runs/finetune", "args.json, metrics.jsonl, last.pt, best.pt")
    data.add_data_flags(parser)
    add = functools.partial(engine.add_flag, parser.add_argument_group("labels"))
    add("--label-fraction", None, "use this share of the training images of each class", type=float)
    add("--labels-per-class", None, "use this many training images of each class", type=int, metavar="N")
    add("--per-class", False, "print the accuracy of each class at the end", action="store_true")

    add = functools.partial(engine.add_flag, parser.add_argument_group("model"))
    add("--init", "runs/pretrain/last.pt", "encoder to start from: a checkpoint of ours, a public MAE, DINO, DeiT, "
        "MoCo v3 or timm ViT, or none: from scratch", metavar="FILE")
    add("--weights", "student", "which encoder of --init", choices=("student", "teacher"))
    add("--pool", None, "what the head sees: the mean of the patch tokens, or the class token (default: "
        "mean; with --eval what the file tells)", choices=("mean", "class"))
    add("--drop-path", 0.0, "stochastic depth")
    add("--heads", None, "attention heads, where --init does not say (MoCo v3's ViT-S without its projector: 12)",
        type=int)
    add("--model", "vit_mini", "encoder for --init none", choices=MODELS)
    add("--patch-size", None, "pixels, for --init none (default: 4 for shapes and CIFAR, 8 for STL, 16 for a folder)",
        type=int)
    add("--dim", None, "width, for --init none (default: the model's)", type=int)
    add("--depth", None, "blocks, for --init none (default: the model's)", type=int)
    add("--channels", 3, "for --init none; 3: colour, 1: grey", choices=(1, 3), type=int)

    add = functools.partial(engine.add_flag, parser.add_argument_group("token reduction (PTR)"))
    add("--drop-ratio", [0.0], "share of its patch tokens that each stage drops; several with --eval", type=float,
        nargs="+", metavar="RATIO")
    engine.add_ptr_flags(add)

    add = functools.partial(engine.add_flag, parser.add_argument_group("optimisation"))
    engine.add_optimisation_flags(add, epochs=10, blr=4e-3, warmup_epochs=1.0)
    add("--layer-decay", 0.75, "factor of the learning rate from each block to the one before; 1: the same for all")
    add("--smoothing", 0.1, "label smoothing")
    add("--rand-augment", 0, "strength of RandAugment, 0 (none) to 10")
    add("--erasing", 0.0, "probability that a rectangle of an image becomes noise")
    add("--mixup", 0.0, "alpha of MixUp; 0: none. With CutMix one of the two is drawn for each batch")
    add("--cutmix", 0.0, "alpha of CutMix; 0: none")
    return parser


# --- settings ---------------------------------------------------------------------------------------------------------


def read_settings(
    argv: list[str] | None,
) -> tuple[argparse.Namespace, dict[str, Any], dict[str, Any] | None]:
    """The arguments, checked as far as the encoder is not needed for it, the given ones, and what to resume from."""
    parser = arguments()
    args, given = engine.parse_arguments(parser, RECIPES, argv)
    if args.linear_probe:
        args = argparse.Namespace(**(vars(args) | PROBE_RECIPES[args.recipe] | given))
    modes = ["linear_probe", "knn", "eval", "export"]
    chosen = [f"--{mode.replace('_', '-')}" for mode in modes if getattr(args, mode) not in (None, False)]
    if args.resume is not None and not args.linear_probe:
        chosen.append("--resume")
    if len(chosen) > 1:
        raise UserError(f"choose one of {' and '.join(chosen)}")
    args, checkpoint = engine.resume_settings(parser, args, given, ("finetune",))
    args.pool = args.pool or (None if args.eval is not None else "mean")
    if args.label_fraction is not None and args.labels_per_class is not None:
        raise UserError("choose one of --label-fraction and --labels-per-class")
    if len(args.drop_ratio) > 1 and args.eval is None:
        raise UserError(f"--drop-ratio takes one number where nothing is to be scored by --eval, got {args.drop_ratio}")
    if args.init != "none":
        for name in ("model", "patch_size", "dim", "depth", "channels"):
            if name in given and not checkpoint:
                raise UserError(f"--{name.replace('_', '-')} goes with --init none: {args.init} says itself what it is")
    at_least = dict(labels_per_class=1, dim=1, depth=1, heads=1, drop_stages=0, knn=1, limit=1, mixup=0, cutmix=0)
    engine.check_values(args, at_least, [
        ("label_fraction", args.label_fraction is None or 0 < args.label_fraction <= 1, "in (0, 1]"),
        ("layer_decay", 0 < args.layer_decay <= 1, "in (0, 1]"),
        ("smoothing", 0 <= args.smoothing < 1, "in [0, 1)"),
        ("rand_augment", 0 <= args.rand_augment <= 10, "in [0, 10]"),
        ("erasing", 0 <= args.erasing <= 1, "in [0, 1]"),
        ("mixup", args.mixup == 0 or args.mixup >= 1e-3, "0 or at least .001"),
        ("cutmix", args.cutmix == 0 or args.cutmix >= 1e-3, "0 or at least .001"),
    ])  # fmt: skip
    return args, given, checkpoint


def build_encoder(args: argparse.Namespace, checkpoint: dict[str, Any] | None, log: Callable[[str], None]) -> ViT:
    """The encoder of the run to resume, of `--init`, or a new one; completes `args` by what it says."""
    engine.seed_generators(torch.device("cpu"), args.seed, "weights")
    size = None if args.image_size is None else data.sides(args.image_size)
    try:
        if checkpoint is not None:
            encoder = ViT(**checkpoint["encoder"], drop_path=args.drop_path)
        elif args.init == "none":
            data.fill_in(args)
            sizes = {name: value for name in ("dim", "depth", "heads") if (value := getattr(args, name)) is not None}
            sizes = MODELS[args.model] | sizes | dict(channels=args.channels)
            encoder = ViT(data.sides(args.image_size), args.patch_size, **sizes, drop_path=args.drop_path)
        else:
            source = engine.load_checkpoint(args.init)
            options = dict(weights=args.weights, image_size=size, heads=args.heads, drop_path=args.drop_path, log=log)
            encoder = load_encoder(source, **options)
    except (ValueError, KeyError, TypeError) as error:
        source = f"--init {args.init}" if checkpoint is None else "the checkpoint to resume"
        raise UserError(f"{source}: {error}") from None
    for name in ("patch_size", "channels"):
        setattr(args, name, encoder.arguments[name])
    if args.image_size is None:
        args.image_size = list(encoder.image_size)
    data.fill_in(args)
    return encoder


def read_images(args: argparse.Namespace, size: tuple[int, int], world: World) -> tuple[Dataset, Dataset]:
    """Training images, as many as are asked for, and all validation images. Raises UserError."""
    with engine.one_at_first(world, needed=args.download):
        limits = args.limit, None
        train, val = data.labelled_images(args.data, Path(args.data_root), args.download, size, limits)
    data.check_limit(args.limit, train)
    if args.label_fraction is not None or args.labels_per_class is not None:
        train = data.few_labels(train, args.label_fraction, args.labels_per_class, args.seed)
    if len(data.classes_of(train)) < 2:
        raise UserError(f"--data {args.data} has a single class: there is nothing to tell apart")
    return train, val


# --- training ---------------------------------------------------------------------------------------------------------


def mixing(mixup: float, cutmix: float, num_classes: int) -> nn.Module | None:
    """MixUp, CutMix, or one of the two for each batch: images (B, C, H, W), labels (B,) -> mixed, (B, classes)."""
    kinds = [
        kind(alpha=alpha, num_classes=num_classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha
    ]
    return v2.RandomChoice(kinds) if kinds else None


class Trainer(engine.Trainer):
    """Trains a classifier by cross-entropy; of a frozen encoder only its head."""

    def __init__(self, args: argparse.Namespace, model: Classifier, loader: DataLoader, accumulate: int, world: World):
        model.to(world.device)
        groups = engine.parameter_groups(model, args.weight_decay, args.layer_decay)
        if model.frozen:  # BatchNorm has made the features alike in scale: the plainest optimizer will do
            optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
        super().__init__(args, model, dict(model=model), optimizer, loader, accumulate, world)
        self.normalize = data.Normalize(args.channels).to(world.device)
        self.mix = mixing(args.mixup, args.cutmix, model.head.out_features)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy with smoothed labels, of mixed images where they are to be mixed; no statistics."""
        images, labels = self.normalize(images), labels.to(self.world.device, non_blocking=True)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        with engine.autocast(self.world.device, self.args.precision):
            logits = self.runner(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.args.smoothing)
        return loss, loss.new_zeros(0)

    def example(self) -> tuple[Tensor, Tensor]:
        size = self.loader.batch_size
        images = torch.randint(256, (size, self.args.channels, *self.model.encoder.image_size)).byte()
        return images, torch.randint(self.model.head.out_features, (size,))


def describe_run(args: argparse.Namespace, trainer: Trainer, train: Dataset, val: Dataset) -> str:
    """What is about to happen, and how long it will take here."""
    encoder, ptr = trainer.model.encoder, trainer.model.ptr
    counts = token_counts(encoder.num_patches, len(encoder.blocks), ptr)
    classes, present = data.classes_of(train), set(data.labels_of(val))
    absent = [name for i, name in enumerate(classes) if i not in present]
    note = f" (none of {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''})" if absent else ""
    optimizer = type(trainer.optimizer).__name__
    return "\n".join([
        f"data    {args.data}: {len(train):,} images{data.describe_classes(train)}, {len(val):,} to validate{note}",
        f"model   {encoder.describe()}, pooled by {args.pool}{', frozen' if trainer.model.frozen else ''}; {optimizer}",
        f"tokens  class token + {' '.join(map(str, counts))}",
        trainer.describe_steps(),
    ])  # fmt: skip


def describe_epoch(row: dict[str, Any], args: argparse.Namespace) -> str:
    """One line of the row for metrics.jsonl."""
    loss = "every step was skipped" if row["loss"] is None else f"loss {row['loss']:.3f}"
    return (
        f"epoch {row['epoch']}/{args.epochs}  {loss}  validation: loss {row['val_loss']:.3f}  top-1 {row['top1']:.1%}  "
        f"top-5 {row['top5']:.1%}  {row['images_per_second']:.0f} images/s"
    )


def summarise(history: list[dict[str, Any]], num_images: int) -> str:
    """How the run ended."""
    last, best = history[-1], max(reversed(history), key=lambda row: row["top1"])
    return (
        f"top-1 {last['top1']:.1%}, top-5 {last['top5']:.1%} on {num_images:,} validation images after {last['epoch']} "
        f"epochs; best top-1 {best['top1']:.1%} after epoch {best['epoch']}."
    )


def class_lines(names: list[str], *columns: list[tuple[int, float]]) -> str:
    """A line for each class: how many validation images, and the share of them that is right, for each column."""
    width = max(map(len, names))
    return "\n".join(
        f"  {name:{width}}  {cells[0][0]:>6,} images  " + "  ".join(f"{accuracy:>6.1%}" for _, accuracy in cells)
        for name, *cells in zip(names, *columns, strict=True)
    )


# --- evaluation -------------------------------------------------------------------------------------------------------


def validation_loader(args: argparse.Namespace, images: Dataset, size: tuple[int, int], world: World) -> DataLoader:
    """Each image once, over all processes."""
    views = data.evaluation_views(images, size, args.channels)
    batch_size = min(256, args.micro_batch or 256)
    return data.evaluation_loader(views, batch_size, args.workers, world.rank, world.size)


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss and accuracies in [0, 1] of logits (n, classes) for labels (n,)."""
    return dict(
        val_loss=F.cross_entropy(logits, labels).item(),
        top1=engine.topk_accuracy(logits, labels, 1),
        top5=engine.topk_accuracy(logits, labels, 5),
    )


def evaluate(args: argparse.Namespace, given: dict[str, Any], world: World) -> None:
    """`--eval`: accuracy, work and speed of a classifier at each drop ratio, beside the poster's."""
    checkpoint = engine.load_checkpoint(args.eval)
    ours = checkpoint.get("method") == "finetune"  # of a public file nothing is known
    saved = engine.saved_settings(checkpoint, arguments(), args.eval) if ours else {}
    args = argparse.Namespace(**(vars(args) | engine.settings_left_to(saved, KEPT, given)))
    size = data.sides(args.image_size) if "image_size" in given else None
    log = print if world.is_main else lambda text: None
    try:
        model = load_classifier(checkpoint, pool=args.pool, image_size=size, heads=args.heads, log=log)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--eval {args.eval}: {error}") from None
    encoder = model.to(world.device).eval().encoder
    args.channels = encoder.arguments["channels"]
    data.fill_in(args)
    reductions = [
        engine.token_reduction(args, len(encoder.blocks), encoder.num_patches, ratio) for ratio in args.drop_ratio
    ]
    names = None  # a public file's are taken to be the data's, in order
    if ours:
        engine.require(checkpoint, args.eval, classes=list)
        names = list(map(str, checkpoint["classes"]))
    with engine.one_at_first(world, needed=args.download):
        numbers = names and {name: i for i, name in enumerate(names)}
        root, size = Path(args.data_root), encoder.image_size
        val = data.validation_images(args.data, root, args.download, size, args.limit, numbers)
    data.check_limit(args.limit, val)
    found = data.classes_of(val)
    if found != (names or found) or len(found) != model.head.out_features:
        raise UserError(
            f"--eval {args.eval} tells {model.head.out_features} classes apart, but --data {args.data} has "
            f"{'other ones' if len(found) == model.head.out_features else len(found)}"
        )

    loader = validation_loader(args, val, encoder.image_size, world)
    normalize, unreadable, results = data.Normalize(args.channels).to(world.device), engine.Unreadable(), []
    for model.ptr in reductions:
        results.append(engine.predict(model, loader, normalize, args.precision, unreadable))
    if world.is_main:
        print(f"data    {args.data}: {len(results[0][1]):,} images to validate{data.describe_classes(val)}")
        print(f"model   {encoder.describe()}, pooled by {model.pool}, on {world.device}")
        whole, *speeds = measure_speed(args, model, [PTR(), *reductions], world)
        print(table(model, reductions, results, speeds, whole))
        if unreadable.files:
            print(f"{len(unreadable.files)} unreadable images were passed over.")
        if args.per_class:
            print(f"Each class, at drop ratios {' '.join(f'{ratio:g}' for ratio in args.drop_ratio)}:")
            print(class_lines(found, *(engine.class_accuracy(*result) for result in results)))


def measure_speed(args: argparse.Namespace, model: Classifier, reductions: list[PTR], world: World) -> list[float]:
    """Images per second of the model alone at each reduction, measured by turns on random images."""
    batch_size = min(args.batch_size, 64)
    images = torch.randn(batch_size, args.channels, *model.encoder.image_size, device=world.device)

    def run(ptr: PTR) -> None:
        model.ptr = ptr
        with engine.autocast(world.device, args.precision):
            model(images)

    return engine.images_per_second([functools.partial(run, ptr) for ptr in reductions], batch_size, world.device)


def table(
    model: Classifier, reductions: list[PTR], results: list[tuple[Tensor, Tensor]], speeds: list[float], whole: float
) -> str:
    """The poster's Table 5 with our columns beside it; speed-ups are over `whole`, the speed without drops."""
    image = torch.zeros(1, model.encoder.arguments["channels"], *model.encoder.image_size)
    blocks = max((ptr.blocks for ptr in reductions), key=len)
    lines = [
        f"dropping after blocks {list(blocks)} (0-based); the poster does not say after which",
        "  ratio  tokens    GMACs   top-1   top-5  images/s  speed-up  |  poster (ViT-B/16, ImageNet): GMACs  top-1  "
        "speed-up",
    ]
    for model.ptr, (logits, labels), speed in zip(reductions, results, speeds, strict=True):
        ratio, score = model.ptr.drop_ratio, scores(logits, labels)
        tokens = token_counts(model.encoder.num_patches, len(model.encoder.blocks), model.ptr)[-1]
        macs = engine.count_macs(model, image) / 1e9
        line = (
            f"  {ratio:5.3g}  {tokens:6}  {macs:7.4g}  {score['top1']:6.1%}  {score['top5']:6.1%}  {speed:8,.1f}  "
            f"{speed / whole:7.2f}x  |"
        )
        if ratio in POSTER:
            poster_macs, accuracy, speed_up = POSTER[ratio]
            line += f"{poster_macs:37.2f}  {accuracy:4.1f}%  {speed_up:7.2f}x"
        lines.append(line)
    return "\n".join(lines)


def nearest_neighbours(args: argparse.Namespace, encoder: ViT, world: World) -> None:
    """`--knn`: how many validation images the nearest training images name right, by the encoder's pooled tokens."""
    ptr = engine.token_reduction(args, len(encoder.blocks), encoder.num_patches, args.drop_ratio[0])
    sets = read_images(args, encoder.image_size, world)
    encoder.to(world.device).eval()
    normalize = data.Normalize(args.channels).to(world.device)

    def features(images: Tensor) -> Tensor:
        return pool(encoder(images, ptr=ptr).tokens, args.pool)

    loaders = [validation_loader(args, images, encoder.image_size, world) for images in sets]
    unreadable = engine.Unreadable()
    results = [engine.predict(features, loader, normalize, args.precision, unreadable) for loader in loaders]
    if world.is_main:
        accuracy = engine.knn_accuracy(*results[0], *results[1], k=args.knn)
        classes = data.describe_classes(sets[0])
        print(f"data    {args.data}: {len(sets[0]):,} images{classes}, {len(sets[1]):,} to score")
        k = min(args.knn, len(results[0][1]))
        print(f"top-1 {accuracy:.1%} by {k} nearest neighbours of the {args.pool} token features of {args.init}")
        if unreadable.files:
            print(f"{len(unreadable.files)} unreadable images were passed over.")


# --- for timm ---------------------------------------------------------------------------------------------------------


def timm_weights(model: ViT | Classifier) -> dict[str, Tensor]:
    """An encoder's or classifier's weights by timm's names; a linear probe's BatchNorm is folded into its head."""
    tensors = {name.removeprefix("encoder."): tensor for name, tensor in model.state_dict().items()}
    if isinstance(model, Classifier) and model.frozen:
        mean, std = model.fc_norm.running_mean, (model.fc_norm.running_var + model.fc_norm.eps).sqrt()
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc_norm.")}
        tensors["head.weight"] = model.head.weight.detach() / std
        tensors["head.bias"] = model.head.bias.detach() - tensors["head.weight"] @ mean
    return tensors


def timm_call(model: ViT | Classifier) -> str:
    """The call that makes the timm model which these weights fit, strictly."""
    encoder = model.encoder if isinstance(model, Classifier) else model
    sizes = encoder.arguments
    usual = {size["dim"]: name for name, size in MODELS.items() if name != "vit_mini"}
    name = f"{usual.get(sizes['dim'], 'vit_base')}_patch16_224".replace("huge_patch16", "huge_patch14")
    options = dict(
        img_size=encoder.image_size, patch_size=sizes["patch_size"], in_chans=sizes["channels"], embed_dim=sizes["dim"],
        depth=sizes["depth"], num_heads=sizes["heads"], mlp_ratio=sizes["mlp_ratio"], num_classes=0,
    )  # fmt: skip
    if isinstance(model, Classifier):
        options |= dict(num_classes=model.head.out_features, global_pool="avg" if model.pool == "mean" else "token")
        options |= dict(fc_norm=False) if model.frozen else {}
    return f"timm.create_model({name!r}, {', '.join(f'{key}={value!r}' for key, value in options.items())})"


def export(args: argparse.Namespace) -> None:
    """`--export`: write the classifier in --init, or where it has no head the encoder, as timm's models load it."""
    size = None if args.image_size is None else data.sides(args.image_size)
    checkpoint = engine.load_checkpoint(args.init)
    try:
        if args.weights == "student" and "head.weight" in find_weights(checkpoint):
            model = load_classifier(checkpoint, image_size=size, heads=args.heads)
        else:
            model = load_encoder(checkpoint, weights=args.weights, image_size=size, heads=args.heads)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--init {args.init}: {error}") from None
    engine.save_checkpoint(Path(args.export), timm_weights(model))
    print(f"written: {args.export}. It loads, strictly, into")
    print(f"  {timm_call(model)}")


# --- the run ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args, given, checkpoint = read_settings(argv)
    if args.export is not None:
        return export(args)
    world = engine.start_world(args.device)
    engine.check_agreement(vars(args), world)
    if args.eval is not None:
        return evaluate(args, given, world)

    # 1. Encoder, data and classifier. Whatever is wrong with the settings is found out here, before the first step.
    encoder = build_encoder(args, checkpoint, log=print if world.is_main else lambda text: None)
    if args.knn:
        return nearest_neighbours(args, encoder, world)
    ptr = engine.token_reduction(args, len(encoder.blocks), encoder.num_patches, args.drop_ratio[0])
    train, val = read_images(args, encoder.image_size, world)
    if "batch_size" not in given:
        args.batch_size = min(args.batch_size, max(1, len(train) // world.size) * world.size)  # few labels are few
    micro_batch, accumulate = engine.batch_sizes(args, world)
    if args.linear_probe and micro_batch < 2:
        raise UserError("--linear-probe needs two images at once for BatchNorm: raise --batch-size or --micro-batch")
    names = data.classes_of(train)
    model = Classifier(encoder, len(names), pool=args.pool, frozen=args.linear_probe, ptr=ptr)
    view = data.finetuning_view(encoder.image_size, args.min_crop, args.rand_augment, args.erasing)
    views = data.Views(train, view, args.channels, args.seed)
    loader = data.training_loader(views, micro_batch, args.workers, world.rank, world.size)
    trainer = Trainer(args, model, loader, accumulate, world)
    val_loader = validation_loader(args, val, encoder.image_size, world)
    val_unreadable, result = engine.Unreadable(), None

    # 2. Train.
    def score(epoch: int, is_last: bool) -> dict[str, float]:
        nonlocal result
        if epoch == 0:
            return {}
        result = engine.predict(model.eval(), val_loader, trainer.normalize, args.precision, val_unreadable)
        return {} if result is None else scores(*result)

    history = engine.fit(
        trainer,
        run=dict(
            method="finetune", config=vars(args), encoder=encoder.arguments, pool=args.pool, classes=names,
            num_images=len(train),
        ),
        checkpoint=checkpoint,
        announce=lambda: describe_run(args, trainer, train, val),
        score=score,
        describe=lambda row: describe_epoch(row, args),
        best="top1",
    )  # fmt: skip

    # 3. Say how it went.
    if world.is_main:
        if args.per_class and result is not None:
            print(class_lines(names, engine.class_accuracy(*result)))
        mishaps = trainer.mishaps(trainer.unreadable.files | val_unreadable.files)
        print(summarise(history, len(val) - len(val_unreadable.files)) + mishaps)
        if args.dry_run:
            print("That was a dry run: nothing was kept.")
        else:
            print("Next, accuracy against speed when tokens are dropped:")
            print(f"  python finetune.py --eval {engine.best_checkpoint(args.out)} --drop-ratio 0 0.1 0.2 0.3 0.4")


if __name__ == "__main__":
    engine.launch(main)
