"""Pre-train a vision transformer with PCAE (panel a of the poster).

    python pretrain.py                                              built-in data, any laptop, about five minutes
    python pretrain.py --data FOLDER                                your images
    torchrun --nproc-per-node 8 pretrain.py --data FOLDER --recipe imagenet        the paper's run
"""

import argparse
import contextlib
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import engine
from engine import UserError, World
from model import MODELS, PCAE, ViT, mean_direction, spread
from ptr import CRITERIA, PLACEMENTS, PTR, drop_blocks

NEXT = "--recipe imagenet --model vit_tiny --batch-size 64 --epochs 100 --out runs/mine"
MAX_SKIPPED_IN_A_ROW = 10
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

# Flags that a resumed run may change: they leave the result as it is, but for rounding.
FREE = ("data_root", "download", "workers", "device", "micro_batch", "compile", "out", "resume", "dry_run")


def arguments() -> argparse.ArgumentParser:
    """All flags; those that are None by default take a value that depends on the data or the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def add(flag: str, default: Any, text: str, **options: Any) -> None:
        shown = "" if default is None or default is False else f" (default: {default})"
        if isinstance(default, int | float) and not isinstance(default, bool):
            options.setdefault("type", type(default))
        group.add_argument(flag, default=default, help=text + shown, **options)

    group = parser.add_argument_group("run")
    add("--recipe", "laptop", "settings to start from; flags given win", choices=RECIPES)
    add("--out", "runs/pretrain", "run folder: args.json, metrics.jsonl, last.pt", metavar="FOLDER")
    add("--resume", None, "continue the run in --out, or FILE, with its settings", nargs="?", const="", metavar="FILE")
    add("--dry-run", False, "two steps of everything in a temporary folder, then exit", action="store_true")
    add("--device", "auto", "cpu, cuda, mps, ...")
    add("--precision", "auto", "auto: bf16 on CUDA, else fp32", choices=("auto", "fp32", "bf16"))
    add("--compile", False, "torch.compile the model: a slow start, faster steps", action="store_true")
    add("--seed", 0, "of everything that is random")

    group = parser.add_argument_group("data")
    add("--data", "shapes", f"shapes, {', '.join(data.TORCHVISION_SETS)}, or a folder with image files at any depth")
    add("--data-root", "data", "where torchvision's sets lie", metavar="FOLDER")
    add("--download", False, "let torchvision download a set that is missing", action="store_true")
    add("--limit", None, "use only N training images (default: all)", type=int, metavar="N")
    add("--image-size", None, "pixels: one number or height and width (default: 32 for shapes, CIFAR; 96 for STL; "
        "224 for a folder)", type=int, nargs="+", metavar="PIXELS")
    add("--min-crop", None, "smallest share of an image that a random crop keeps; 1: whole images (default: .2; 1 for "
        "shapes)", type=float)
    add("--channels", 3, "3: colour, 1: grey", choices=(1, 3))
    add("--workers", None, "processes that load data (default: none for shapes, else up to 8)", type=int)

    group = parser.add_argument_group("model")
    add("--model", "vit_mini", "encoder", choices=MODELS)
    add("--patch-size", None, "pixels (default: 4 for shapes and CIFAR, 8 for STL, 16 for a folder)", type=int)
    add("--dim", None, "encoder width (default: the model's)", type=int)
    add("--depth", None, "encoder blocks (default: the model's)", type=int)
    add("--heads", None, "attention heads (default: the model's)", type=int)
    add("--drop-path", 0.0, "stochastic depth of the student")
    add("--decoder-dim", 64, "decoder width")
    add("--decoder-depth", 2, "decoder blocks")
    add("--decoder-heads", 4, "decoder heads")

    group = parser.add_argument_group("method")
    add("--mask-ratio", 0.75, "share of the patches hidden from the student and shown to the teacher")
    add("--drop-stages", 3, "how often the teacher drops tokens")
    add("--drop-ratio", 0.5, "share of its tokens that each stage drops")
    add("--drop-at", "start", "after the first block of each stage, the last, or the first blocks", choices=PLACEMENTS)
    add("--drop-blocks", None, "drop after these blocks instead (0-based)", type=int, nargs="*", metavar="BLOCK")
    add("--criterion", "similarity", "drop the most redundant tokens, any, or the least redundant", choices=CRITERIA)
    add("--ema", 0.9999, "momentum of the teacher at the start; rises to 1")

    group = parser.add_argument_group("optimisation")
    add("--epochs", 20, "passes over the data")
    add("--batch-size", 64, "images a step, over all processes")
    add("--micro-batch", None, "images at once in one process; gradients accumulate (default: all)", type=int)
    add("--blr", 8e-3, "learning rate per 256 images: lr = blr * batch size / 256")
    add("--lr", None, "learning rate; overrides --blr", type=float)
    add("--warmup-epochs", 3.0, "epochs of linear warm-up")
    add("--weight-decay", 0.05, "of matrices; none on biases, norms and tokens")
    add("--clip-grad", 1.0, "largest norm of the gradient")
    add("--knn-every", None, "score the features on labelled images, by nearest neighbours and a linear classifier, at "
        "the start and every N epochs; 0: never (default: 5 for shapes, else 0)", type=int, metavar="N")
    return parser


# --- settings ---------------------------------------------------------------------------------------------------------


def read_settings(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The arguments, complete and checked, and the checkpoint to resume from, if any. Raises UserError."""
    args, chosen = engine.parse_arguments(arguments(), RECIPES, argv)
    checkpoint = None
    if args.resume is not None:
        path = Path(args.resume or Path(args.out) / "last.pt")
        checkpoint = engine.load_checkpoint(path)
        if checkpoint.get("method") != "pcae" or not {"config", "history", "num_images", "epoch"} <= checkpoint.keys():
            raise UserError(f"{path} is not a checkpoint of pretrain.py")
        saved = checkpoint["config"]
        engine.check_settings(saved, {name: value for name, value in chosen.items() if name not in FREE}, path)
        args = argparse.Namespace(**(vars(args) | saved | {"out": str(path.parent)} | chosen))
    for name, value in data.defaults(args.data).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.workers is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = 0 if args.data == "shapes" else min(8, max(1, cores))
    check_values(args)
    return args, checkpoint


def check_values(args: argparse.Namespace) -> None:
    """Raise UserError for a number that makes no sense. Sizes and ratios that must fit together the model checks."""
    at_least = dict(epochs=1, batch_size=1, micro_batch=1, workers=0, knn_every=0, seed=0, dim=1, depth=1, heads=1)
    at_least |= dict(decoder_dim=1, decoder_depth=1, decoder_heads=1, weight_decay=0, drop_stages=0)
    requirements = [
        (name, getattr(args, name) is None or getattr(args, name) >= low, f"{low} or more")
        for name, low in at_least.items()
    ]
    requirements += [
        (name, value is None or 0 < value < math.inf, "positive and finite")
        for name, value in (("blr", args.blr), ("lr", args.lr), ("clip_grad", args.clip_grad))
    ]
    requirements += [
        ("seed", args.seed < 2**32, "below 2^32"),
        ("warmup_epochs", 0 <= args.warmup_epochs < args.epochs, f"in [0, --epochs = {args.epochs})"),
        ("ema", 0 <= args.ema <= 1, "in [0, 1]"),
        ("drop_path", 0 <= args.drop_path < 1, "in [0, 1)"),
        ("min_crop", 0 < args.min_crop <= 1, "in (0, 1]"),
        ("image_size", len(args.image_size) <= 2, "one number, or height and width"),
    ]
    for name, holds, need in requirements:
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} must be {need}, got {getattr(args, name)}")


def build_model(args: argparse.Namespace) -> tuple[PCAE, dict[str, Any]]:
    """PCAE as the arguments say, its weights drawn from `--seed`, and the encoder's arguments to build it again."""
    sizes = {name: value for name in ("dim", "depth", "heads") if (value := getattr(args, name)) is not None}
    height, width = args.image_size * 2 if len(args.image_size) == 1 else args.image_size
    encoder = dict(image_size=(height, width), patch_size=args.patch_size, channels=args.channels)
    encoder |= MODELS[args.model] | sizes
    engine.seed_generators(torch.device("cpu"), args.seed, "weights")
    try:
        student = ViT(**encoder, drop_path=args.drop_path)
        blocks = args.drop_blocks
        if blocks is None:
            blocks = drop_blocks(len(student.blocks), args.drop_stages, args.drop_at)
        ptr = PTR(tuple(blocks), args.drop_ratio, args.criterion)
        model = PCAE(
            student,
            mask_ratio=args.mask_ratio,
            ptr=ptr,
            decoder_dim=args.decoder_dim,
            decoder_depth=args.decoder_depth,
            decoder_heads=args.decoder_heads,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return model, encoder


# --- training ---------------------------------------------------------------------------------------------------------


class Trainer:
    """The state of a run, and its step. `model` is the bare PCAE; `runner` is what is called: under DDP, compiled."""

    def __init__(self, args: argparse.Namespace, model: PCAE, loader: DataLoader, accumulate: int, world: World):
        self.args, self.world, self.loader, self.accumulate = args, world, loader, accumulate
        self.model = model.to(world.device)
        self.normalize = data.Normalize(args.channels).to(world.device)
        self.optimizer = torch.optim.AdamW(
            engine.parameter_groups(model, args.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True
        )
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.ddp = DistributedDataParallel(model) if world.size > 1 else None
        self.runner = self.ddp or model
        if args.compile:
            self.runner = torch.compile(self.runner)
        self.steps_per_epoch = len(loader) // accumulate
        self.total_steps = args.epochs * self.steps_per_epoch
        self.peak_lr = args.lr if args.lr is not None else args.blr * args.batch_size / 256
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.unreadable = data.Unreadable()

    def backward(self, images: Tensor, noise: Tensor, last: bool) -> Tensor:
        """Add the gradients of one micro-batch; returns, detached, the loss and the mean directions: (1 + 2 D,)."""
        sync = contextlib.nullcontext() if last or self.ddp is None else self.ddp.no_sync()
        with sync:
            with engine.autocast(self.world.device, self.args.precision):
                output = self.runner(self.normalize(images), noise)
            (output.loss / self.accumulate).backward()
        directions = mean_direction(output.target), mean_direction(output.prediction)
        return torch.cat([output.loss.detach()[None], *directions])

    def split_noise(self) -> Tensor:
        """This process's rows of the noise (batch size, N) that splits the patches of the whole batch.

        Drawn whole and dealt out as the sampler deals the images: no image's split depends on the number of processes.
        """
        shape = self.args.batch_size, self.model.student.num_patches
        noise = torch.rand(shape, generator=engine.generator(self.args.seed, "split", self.step))
        return noise[self.world.rank :: self.world.size].to(self.world.device, non_blocking=True)

    def train_step(self, batches: Iterator) -> dict[str, float]:
        """One optimizer step on `accumulate` micro-batches, then the teacher's; skipped if anything is not finite."""
        args, dim = self.args, self.model.student.dim
        warmup = args.warmup_epochs * self.steps_per_epoch
        lr = engine.warmup_cosine(self.step, peak=self.peak_lr, total=self.total_steps, warmup=warmup)
        momentum = engine.ema_momentum(self.step, base=args.ema, total=self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # What drop path and the random criterion draw from; each process draws its own.
        engine.seed_generators(self.world.device, args.seed, "step", self.step, self.world.rank)

        stats, waited = torch.zeros((), device=self.world.device), 0.0
        for i, noise in enumerate(self.split_noise().chunk(self.accumulate)):
            start = time.perf_counter()
            images, _, messages = next(batches)
            waited += time.perf_counter() - start
            self.unreadable.count(len(images), messages)
            stats = stats + self.backward(images, noise, last=i == self.accumulate - 1) / self.accumulate

        grad_norm = torch.nn.utils.clip_grad_norm_(self.trainable, args.clip_grad)
        # DDP has averaged the gradients and this the rest: all processes see, and decide, the same. Reading the numbers
        # waits for the device, once a step: a step that is not finite must not reach the weights.
        loss, *directions = engine.mean_over_processes(stats).split([1, dim, dim])
        values = torch.stack([loss[0], *map(spread, directions), grad_norm]).tolist()
        loss, target_std, prediction_std, grad_norm = values
        self.step += 1
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizer.step()
            self.model.update_teacher(momentum)
            self.skipped_in_a_row = 0
        else:
            self.skip()
        self.optimizer.zero_grad()
        return dict(loss=loss, lr=lr, ema=momentum, target_std=target_std, prediction_std=prediction_std,
                    grad_norm=grad_norm, waited=waited)  # fmt: skip

    def skip(self) -> None:
        """Count a step that was not taken. Raises UserError after too many in a row."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"the loss was not finite {MAX_SKIPPED_IN_A_ROW} steps in a row (step {self.step}): lower --blr or "
                "--lr, or use --precision fp32. The last checkpoint is from before"
            )

    def train_epoch(self, epoch: int, steps: int) -> dict[str, float]:
        """`steps` steps of epoch number `epoch` (from 0); returns the row for metrics.jsonl."""
        self.model.train()
        self.loader.sampler.set_epoch(epoch)
        batches, rows, start = iter(self.loader), [], time.perf_counter()
        bar = tqdm(range(steps), f"epoch {epoch + 1}/{self.args.epochs}", leave=False, disable=not self.world.is_main)
        for _ in bar:
            rows.append(self.train_step(batches))
            bar.set_postfix(loss=f"{rows[-1]['loss']:.3f}")
        seconds = time.perf_counter() - start
        good = [row for row in rows if all(map(math.isfinite, row.values()))]
        mean = {name: sum(row[name] for row in good) / len(good) if good else None for name in rows[0]}
        return dict(
            epoch=epoch + 1,
            step=self.step,
            loss=mean["loss"],
            lr=rows[-1]["lr"],
            ema=rows[-1]["ema"],
            target_std=mean["target_std"],
            prediction_std=mean["prediction_std"],
            grad_norm=mean["grad_norm"],
            skipped=self.skipped,
            images_per_second=steps * self.args.batch_size / seconds,
            data_wait=sum(row["waited"] for row in rows) / seconds,
        )

    def seconds_per_step(self) -> float:
        """Time a few forward and backward passes on noise, without a step: what the run will take."""
        size = self.args.batch_size // self.world.size // self.accumulate
        channels, sides = self.args.channels, self.args.image_size
        images = torch.randint(256, (size, channels, sides[0], sides[-1])).byte()
        noise = torch.rand(size, self.model.student.num_patches)
        for i in range(5):
            if i == 2:  # the first ones are slow: allocation, compilation
                start = time.perf_counter()
            self.backward(images, noise.to(self.world.device), last=True)[0].item()
            self.optimizer.zero_grad()
        return (time.perf_counter() - start) / 3 * self.accumulate

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs. Random draws are seeded by step and image: there is no generator state."""
        return dict(
            student=self.model.student.state_dict(),
            teacher=self.model.teacher.state_dict(),
            decoder=self.model.decoder.state_dict(),
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            skipped=self.skipped,
            skipped_in_a_row=self.skipped_in_a_row,
        )

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned. Raises UserError where it does not fit."""
        try:
            for part in ("student", "teacher", "decoder"):
                getattr(self.model, part).load_state_dict(state[part])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.skipped = state["step"], state["skipped"]
            self.skipped_in_a_row = state["skipped_in_a_row"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"the checkpoint does not fit this version of the model ({error})") from None


class Probe:
    """Scores an encoder's mean patch token on labelled images: by nearest neighbours and by a linear classifier."""

    def __init__(self, args: argparse.Namespace, size: tuple[int, int], device: torch.device):
        sets = data.labelled_images(args.data, Path(args.data_root), args.download, size)
        view = data.CenterView(size, margin=8 / 7)  # 256 -> 224, as is usual
        self.loaders = [data.evaluation_loader(data.Views(s, view, args.channels), 250, args.workers) for s in sets]
        self.normalize = data.Normalize(args.channels).to(device)
        self.device, self.precision = device, args.precision

    @torch.no_grad()
    def features(self, encoder: ViT, loader: DataLoader) -> tuple[Tensor, Tensor]:
        """(n, D) features and (n,) labels."""
        features, labels, unreadable = [], [], data.Unreadable()
        for images, batch_labels, messages in loader:
            unreadable.count(len(images), messages)
            with engine.autocast(self.device, self.precision):
                tokens = encoder(self.normalize(images)).tokens
            features.append(tokens[:, 1:].float().mean(dim=1))
            labels.append(batch_labels.to(self.device))
        return torch.cat(features), torch.cat(labels)

    def __call__(self, encoder: ViT) -> dict[str, float]:
        """Accuracies in [0, 1]."""
        encoder.eval()
        sets = [tensor for loader in self.loaders for tensor in self.features(encoder, loader)]
        return dict(knn=engine.knn_accuracy(*sets), linear=engine.linear_accuracy(*sets))


# --- the run ----------------------------------------------------------------------------------------------------------


def describe_run(args: argparse.Namespace, trainer: Trainer, images: Dataset) -> str:
    """What is about to happen, and how long it will take here."""
    model, world = trainer.model, trainer.world
    classes = getattr(getattr(images, "dataset", images), "classes", ())  # --limit wraps the data set
    labels = f" of {len(classes)} classes ({', '.join(classes[:3])}, ...), labels not used" if classes else ""
    parameters = sum(parameter.numel() for parameter in model.student.parameters()) / 1e6
    visible = model.student.num_patches - model.token_counts[0]
    micro_batch = args.batch_size // world.size // trainer.accumulate
    rate = "--lr" if args.lr is not None else f"{args.blr:g} * {args.batch_size} / 256"
    seconds = trainer.seconds_per_step() * (trainer.total_steps - trainer.step)
    return "\n".join([
        f"data    {args.data}: {len(images):,} images{labels}",
        f"model   {args.model}: {parameters:.1f} M parameters, {model.student.num_patches} patches",
        f"tokens  student: {visible} visible + class token; teacher: {' '.join(map(str, model.token_counts))}",
        f"steps   {trainer.total_steps:,}, each {args.batch_size} images = {world.size} process(es) x "
        f"{trainer.accumulate} micro-batch(es) x {micro_batch}; peak learning rate {trainer.peak_lr:.3g} = {rate}",
        f"time    about {engine.duration(seconds)} on {world.device}",
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


def summarise(history: list[dict[str, Any]], trainer: Trainer) -> str:
    """One paragraph on how the run went."""
    trained = [row for row in history if row.get("loss") is not None]
    text = f"{history[-1]['epoch']} epochs, {history[-1]['step']:,} steps."
    if trained:
        text += (
            f" The loss went from {trained[0]['loss']:.3f} to {trained[-1]['loss']:.3f}, the spread of targets from "
            f"{trained[0]['target_std']:.2f} to {trained[-1]['target_std']:.2f} (1: all directions, 0: collapsed)."
        )
    scores = [row for row in history if "knn" in row]
    if scores:
        text += (
            f" On the frozen features a linear classifier is right for {scores[-1]['linear']:.1%} (untrained encoder: "
            f"{scores[0]['linear']:.1%}), nearest neighbours for {scores[-1]['knn']:.1%} ({scores[0]['knn']:.1%})."
        )
    if trainer.skipped:
        text += f" {trainer.skipped} steps were skipped because something was not finite."
    if trainer.unreadable.files:
        text += f" {len(trainer.unreadable.files)} unreadable images were passed over."
    return text


def save(out: Path, trainer: Trainer, run: dict[str, Any], epoch: int, history: list[dict[str, Any]]) -> None:
    """Write the log, then the checkpoint, which holds the log too: a resumed run writes it anew from there."""
    engine.write_log(out / "metrics.jsonl", history)
    engine.save_checkpoint(out / "last.pt", run | dict(epoch=epoch, history=history) | trainer.state())


def main(argv: list[str] | None = None) -> None:
    args, checkpoint = read_settings(argv)
    world = engine.start_world(args.device)

    # 1. Model and data. Whatever is wrong with the settings is found out here, before the first step.
    micro_batch, accumulate = engine.batch_sizes(args, world)
    model, encoder = build_model(args)
    size = encoder["image_size"]
    with engine.one_at_first(world, needed=args.download):
        images = data.unlabelled_images(args.data, Path(args.data_root), args.download, args.limit, size)
    if len(images) < args.batch_size:
        raise UserError(f"--batch-size {args.batch_size} is more than the {len(images)} images of --data {args.data}")
    views = data.Views(images, data.pretraining_view(size, args.min_crop), args.channels, args.seed)
    loader = data.training_loader(views, micro_batch, args.workers, world.rank, world.size)
    probe = Probe(args, size, world.device) if args.knn_every and world.is_main else None
    trainer = Trainer(args, model, loader, accumulate, world)

    # 2. Where the run stands.
    run = dict(method="pcae", config=vars(args), encoder=encoder, num_images=len(images))
    epoch, history = 0, []
    if checkpoint is not None:
        if checkpoint["num_images"] != len(images):
            raise UserError(f"--data has {len(images)} images here, {checkpoint['num_images']} in the run to resume")
        trainer.load_state(checkpoint)
        epoch, history = checkpoint["epoch"], checkpoint["history"]
    announcement = describe_run(args, trainer, images)

    with tempfile.TemporaryDirectory() if args.dry_run else contextlib.nullcontext(args.out) as folder:
        if world.is_main:
            out = engine.prepare_folder(args, Path(folder))
            print(announcement)
            if probe and not history:
                history.append(dict(epoch=0, step=0) | probe(model.student))
            if checkpoint is None:
                save(out, trainer, run, epoch, history)  # --resume works from the first moment
            else:
                engine.write_log(out / "metrics.jsonl", history)

        # 3. Train.
        steps, last = trainer.steps_per_epoch, args.epochs
        if args.dry_run:
            steps, last = min(2, steps), epoch + 1
        while epoch < last:
            row = trainer.train_epoch(epoch, steps)
            epoch += 1
            if world.is_main:
                if probe and (epoch % args.knn_every == 0 or epoch == last):
                    row |= probe(model.student)
                history.append(row)
                save(out, trainer, run, epoch, history)
                tqdm.write(describe_epoch(row, args))

        # 4. Say how it went.
        if world.is_main:
            print(summarise(history, trainer))
            if args.dry_run:
                print("That was a dry run: nothing was kept.")
            else:
                print(f"The student is in {out / 'last.pt'}. Next, the same on your images:")
                print(f"  python pretrain.py --data FOLDER {NEXT}")


if __name__ == "__main__":
    engine.launch(main)
