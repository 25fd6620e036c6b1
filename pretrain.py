"""Pre-train a vision transformer with PCAE (panel a of the poster), or with MAE or SimMIM to compare.

    python pretrain.py                                              built-in data, any laptop, about five minutes
    python pretrain.py --data FOLDER                                your images
    torchrun --nproc-per-node 8 pretrain.py --data FOLDER --recipe imagenet        the paper's run
    python pretrain.py --method mae --out runs/mae                  MAE in its place; or simmim
"""

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import data
import engine
from baselines import MAE, SimMIM
from engine import UserError, World
from model import MODELS, PCAE, ViT, mean_direction, pool, spread
from ptr import PTR, drop_blocks

METHODS = {"pcae": PCAE, "mae": MAE, "simmim": SimMIM}
# Flags that only some methods have a use for.
DECODER = ("decoder_dim", "decoder_depth", "decoder_heads")
PCAE_ONLY = ("ema", "center", "drop_ratio", "drop_stages", "drop_at", "drop_blocks", "criterion")
ONLY_FOR = {name: ("pcae",) for name in PCAE_ONLY}
ONLY_FOR |= {name: ("pcae", "mae") for name in DECODER}

NEXT = "--recipe imagenet --model vit_tiny --batch-size 64 --epochs 100 --out runs/mine"
COLLAPSED = 0.2  # spread of unit vectors below which more than 96 % of each is the direction that all share

# What `--recipe` sets; flags that are given win.
RECIPES: dict[str, dict[str, Any]] = {
    "laptop": {},  # the defaults below
    "imagenet": dict(
        model="vit_base", image_size=[224], patch_size=16, min_crop=0.2, mask_ratio=0.75, drop_stages=3, drop_ratio=0.5,
        decoder_depth=2, decoder_dim=512, decoder_heads=16, ema=0.9999, epochs=300, warmup_epochs=40, batch_size=4096,
        blr=1.5e-4, weight_decay=0.05,
    ),
}  # fmt: skip
# The decoder of MAE's authors, who train for 800 or 1600 epochs.
RECIPES["mae"] = RECIPES["imagenet"] | dict(method="mae", decoder_depth=8)


def arguments() -> argparse.ArgumentParser:
    """All flags; those that are None by default take a value that depends on the data or the model."""
    parser = engine.flag_parser(__doc__)
    engine.add_run_flags(parser, RECIPES, "runs/pretrain", "args.json, metrics.jsonl, last.pt")
    data.add_data_flags(parser)

    add = functools.partial(engine.add_flag, parser.add_argument_group("model"))
    add("--channels", 3, "3: colour, 1: grey", choices=(1, 3))
    add("--model", "vit_mini", "encoder", choices=MODELS)
    add("--patch-size", None, "pixels (default: 4 for shapes and CIFAR, 8 for STL, 16 for a folder)", type=int)
    add("--dim", None, "encoder width (default: the model's)", type=int)
    add("--depth", None, "encoder blocks (default: the model's)", type=int)
    add("--heads", None, "attention heads (default: the model's)", type=int)
    add("--drop-path", 0.0, "stochastic depth of the student")
    add("--decoder-dim", 64, "decoder width")
    add("--decoder-depth", 2, "decoder blocks")
    add("--decoder-heads", 4, "decoder heads")

    add = functools.partial(engine.add_flag, parser.add_argument_group("method"))
    add("--method", "pcae", "the paper's, or one to compare it with (the default --blr is tuned to pcae)",
        choices=METHODS)
    add("--mask-ratio", 0.75, "share of the patches hidden from the student and, in PCAE, shown to the teacher")
    add("--drop-ratio", 0.5, "share of its tokens that each stage drops")
    engine.add_ptr_flags(add)
    add("--ema", 0.9999, "momentum of the teacher at the start; rises to 1")
    add("--center", False, "take from the targets what all of a micro-batch share (not in the paper)",
        action="store_true")

    add = functools.partial(engine.add_flag, parser.add_argument_group("optimisation"))
    engine.add_optimisation_flags(add, epochs=20, blr=8e-3, warmup_epochs=3.0)
    add("--knn-every", None, "score the features on labelled images, by nearest neighbours and a linear classifier, at "
        "the start and every N epochs; 0: never (default: 5 for shapes, else 0)", type=int, metavar="N")
    return parser


# --- settings ---------------------------------------------------------------------------------------------------------


def read_settings(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The arguments, complete and checked, and the checkpoint to resume from, if any. Raises UserError."""
    parser = arguments()
    args, given = engine.parse_arguments(parser, RECIPES, argv)
    args, checkpoint = engine.resume_settings(parser, args, given, METHODS)
    for name, methods in ONLY_FOR.items():
        if name in given and args.method not in methods:
            raise UserError(f"--{name.replace('_', '-')} means nothing to --method {args.method}: leave it out")
    data.fill_in(args)
    at_least = dict(knn_every=0, dim=1, depth=1, heads=1, decoder_dim=1, decoder_depth=1, decoder_heads=1)
    engine.check_values(args, at_least | dict(drop_stages=0), [("ema", 0 <= args.ema <= 1, "in [0, 1]")])
    return args, checkpoint


def build_model(args: argparse.Namespace) -> tuple[PCAE | MAE | SimMIM, dict[str, Any]]:
    """The method's networks, their weights drawn from `--seed`, and the encoder's arguments to build it again."""
    sizes = {name: value for name in ("dim", "depth", "heads") if (value := getattr(args, name)) is not None}
    encoder = dict(image_size=data.sides(args.image_size), patch_size=args.patch_size, channels=args.channels)
    encoder |= MODELS[args.model] | sizes
    engine.seed_generators(torch.device("cpu"), args.seed, "weights")
    try:
        student = ViT(**encoder, drop_path=args.drop_path)
        options = {name: getattr(args, name) for name in DECODER if args.method in ONLY_FOR[name]}
        if args.method == "pcae":
            blocks = args.drop_blocks
            if blocks is None:
                blocks = drop_blocks(len(student.blocks), args.drop_stages, args.drop_at)
            options |= dict(ptr=PTR(tuple(blocks), args.drop_ratio, args.criterion), center=args.center)
        model = METHODS[args.method](student, mask_ratio=args.mask_ratio, **options)
    except ValueError as error:
        raise UserError(str(error)) from None
    return model, encoder


# --- training ---------------------------------------------------------------------------------------------------------


class Trainer(engine.Trainer):
    """Trains on the loss of a split; in PCAE the teacher's step follows the student's."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: PCAE | MAE | SimMIM,
        loader: DataLoader,
        accumulate: int,
        world: World,
    ):
        model.to(world.device)
        optimizer = torch.optim.AdamW(
            engine.parameter_groups(model, args.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True
        )
        parts = dict(model.named_children())  # student, decoder and, in PCAE, teacher
        super().__init__(args, model, parts, optimizer, loader, accumulate, world)
        self.has_teacher = "teacher" in parts
        self.normalize = data.Normalize(args.channels).to(world.device)

    def loss(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of images under the split that `noise` (B, N) makes, and the two mean directions: (2 D,)."""
        with engine.autocast(self.world.device, self.args.precision):
            output = self.runner(self.normalize(images), noise)
        return output.loss, torch.cat([mean_direction(output.target), mean_direction(output.prediction)])

    def metrics(self, statistics: Tensor) -> dict[str, Tensor]:
        """The spread of targets and predictions."""
        target, prediction = statistics.chunk(2)
        return dict(target_std=spread(target), prediction_std=spread(prediction))

    def schedule(self, step: int) -> dict[str, float]:
        """The learning rate and the teacher's momentum."""
        settings = super().schedule(step)
        if self.has_teacher:
            settings["ema"] = engine.ema_momentum(step, base=self.args.ema, total=self.total_steps)
        return settings

    def after_step(self, settings: dict[str, float]) -> None:
        """The teacher follows, where there is one."""
        if self.has_teacher:
            self.model.update_teacher(settings["ema"])

    def micro_batches(self, batches: Iterator) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and the noise (b, N) that splits their patches.

        Drawn for the whole batch and dealt out as the sampler deals the images: no image's split depends on the number
        of processes.
        """
        shape = self.args.batch_size, self.model.student.num_patches
        noise = torch.rand(shape, generator=engine.generator(self.args.seed, "split", self.step))
        ours = noise[self.world.rank :: self.world.size].to(self.world.device, non_blocking=True)
        for (images, _), part in zip(super().micro_batches(batches), ours.chunk(self.accumulate), strict=True):
            yield images, part

    def example(self) -> tuple[Tensor, Tensor]:
        size = self.loader.batch_size
        student = self.model.student
        images = torch.randint(256, (size, self.args.channels, *student.image_size)).byte()
        return images, torch.rand(size, student.num_patches).to(self.world.device)


class Probe:
    """Scores an encoder's mean patch token on labelled images: by nearest neighbours and by a linear classifier."""

    def __init__(self, args: argparse.Namespace, size: tuple[int, int], world: World):
        sets = data.labelled_images(args.data, Path(args.data_root), args.download, size)
        self.loaders = [
            data.evaluation_loader(
                data.evaluation_views(s, size, args.channels), 250, args.workers, world.rank, world.size
            )
            for s in sets
        ]
        self.normalize = data.Normalize(args.channels).to(world.device)
        self.precision, self.unreadable = args.precision, engine.Unreadable()

    def __call__(self, encoder: ViT) -> dict[str, float]:
        """Accuracies in [0, 1], in the first process; nothing in the others, which only help."""
        encoder.eval()

        def features(images: Tensor) -> Tensor:
            return pool(encoder(images).tokens)

        results = [
            engine.predict(features, loader, self.normalize, self.precision, self.unreadable) for loader in self.loaders
        ]
        if None in results:
            return {}
        (bank, bank_labels), (queries, query_labels) = results
        sets = bank, bank_labels, queries, query_labels
        return dict(knn=engine.knn_accuracy(*sets), linear=engine.linear_accuracy(*sets))


# --- the run ----------------------------------------------------------------------------------------------------------


def describe_run(args: argparse.Namespace, trainer: Trainer, images: Dataset) -> str:
    """What is about to happen, and how long it will take here."""
    model = trainer.model
    return "\n".join([
        f"data    {args.data}: {len(images):,} images{data.describe_classes(images, ', labels not used')}",
        f"model   {args.model} by {args.method}: {model.student.describe()}",
        f"tokens  {model.describe()}",
        trainer.describe_steps(),
    ])  # fmt: skip


def describe_epoch(row: dict[str, Any], args: argparse.Namespace) -> str:
    """One line of the row for metrics.jsonl, and a warning where the features collapse."""
    if row["loss"] is None:
        return f"epoch {row['epoch']}/{args.epochs}  every step was skipped: no loss was finite"
    text = (
        f"epoch {row['epoch']}/{args.epochs}  loss {row['loss']:.3f}  spread of targets {row['target_std']:.2f}, of "
        f"predictions {row['prediction_std']:.2f}  {row['images_per_second']:.0f} images/s"
    )
    if "knn" in row:
        text += f"  knn {row['knn']:.1%} linear {row['linear']:.1%}"
    if args.method != "pcae":  # pixels may well be all alike
        return text
    if row["target_std"] < COLLAPSED:
        text += (
            f"\nwarning: target_std is {row['target_std']:.2f}: nearly all targets point in one direction (collapse), "
            "so a low loss means nothing. Raise --ema or lower --blr"
        )
    if row["prediction_std"] < COLLAPSED and row["epoch"] > args.warmup_epochs:  # they begin all alike
        text += (
            f"\nwarning: prediction_std is {row['prediction_std']:.2f}: the predictions hardly differ from token to "
            "token, so little is learnt yet. If this stays, change --blr or look at the images"
        )
    return text


def summarise(history: list[dict[str, Any]], trainer: Trainer, unreadable: set[str]) -> str:
    """One paragraph on how the run went; `unreadable` files were met on the way."""
    trained = [row for row in history if row.get("loss") is not None]
    text = f"{history[-1]['epoch']} epochs, {history[-1]['step']:,} steps."
    if trained:
        text += f" The loss went from {trained[0]['loss']:.3f} to {trained[-1]['loss']:.3f}"
        if trainer.has_teacher:
            text += (
                f", the spread of targets from {trained[0]['target_std']:.2f} to {trained[-1]['target_std']:.2f} "
                "(1: all directions, 0: collapsed)"
            )
        text += "."
    scores = [row for row in history if "knn" in row]
    if scores:
        text += (
            f" On the frozen features a linear classifier is right for {scores[-1]['linear']:.1%} (untrained encoder: "
            f"{scores[0]['linear']:.1%}), nearest neighbours for {scores[-1]['knn']:.1%} ({scores[0]['knn']:.1%})."
        )
    return text + trainer.mishaps(unreadable)


def main(argv: list[str] | None = None) -> None:
    args, checkpoint = read_settings(argv)
    world = engine.start_world(args.device)
    engine.check_agreement(vars(args), world)

    # 1. Model and data. Whatever is wrong with the settings is found out here, before the first step.
    micro_batch, accumulate = engine.batch_sizes(args, world)
    model, encoder = build_model(args)
    size = encoder["image_size"]
    with engine.one_at_first(world, needed=args.download):
        images = data.unlabelled_images(args.data, Path(args.data_root), args.download, args.limit, size)
    views = data.Views(images, data.pretraining_view(size, args.min_crop), args.channels, args.seed)
    loader = data.training_loader(views, micro_batch, args.workers, world.rank, world.size)
    probe = Probe(args, size, world) if args.knn_every else None
    trainer = Trainer(args, model, loader, accumulate, world)

    # 2. Train.
    def score(epoch: int, is_last: bool) -> dict[str, float]:
        return probe(model.student) if probe and (epoch % args.knn_every == 0 or is_last) else {}

    history = engine.fit(
        trainer,
        run=dict(method=args.method, config=vars(args), encoder=encoder, num_images=len(images)),
        checkpoint=checkpoint,
        announce=lambda: describe_run(args, trainer, images),
        score=score,
        describe=lambda row: describe_epoch(row, args),
    )

    # 3. Say how it went.
    if world.is_main:
        unreadable = trainer.unreadable.files | (probe.unreadable.files if probe else set())
        print(summarise(history, trainer, unreadable))
        if args.dry_run:
            print("That was a dry run: nothing was kept.")
        else:
            last = Path(args.out) / "last.pt"
            print(f"The student is in {last}. Next, train a classifier from it, or pre-train on your images:")
            print(f"  python finetune.py --init {last}")
            print(f"  python pretrain.py --method {args.method} --data FOLDER {NEXT}")


if __name__ == "__main__":
    engine.launch(main)
