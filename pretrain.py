"""Pre-train a vision transformer with PCAE (panel a of the poster), or with MAE or SimMIM for comparison.

python pretrain.py                                              synthetic images, two minutes on a laptop
python pretrain.py --data FOLDER                                your images
torchrun --nproc-per-node 8 pretrain.py --data FOLDER --recipe imagenet        the paper's run
python pretrain.py --method mae --out runs/mae                  MAE instead; or simmim
python pretrain.py --resume                                     continue the run in --out
"""

import argparse
import math
import shlex
import time

import util.threads  # noqa: F401 (before torch)

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import ptr
from baselines import MAE, SimMIM
from model import MODELS, PCAE, ViT, pool
from util import metrics, runs, training

# Settings of `--recipe`; flags on the command line override them.
RECIPES = {
    "laptop": {},  # the defaults below
    "imagenet": dict(
        model="vit_base",
        image_size=[224],
        patch_size=16,
        min_crop=0.2,
        mask_ratio=0.75,
        drop_stages=3,
        drop_ratio=0.5,
        decoder_depth=2,
        decoder_dim=512,
        decoder_heads=16,
        ema=0.9999,
        epochs=300,
        warmup_epochs=40.0,
        batch_size=4096,
        blr=1.5e-4,
        weight_decay=0.05,
    ),
}
# The decoder of MAE's authors, who train for 800 or 1600 epochs.
RECIPES["mae"] = RECIPES["imagenet"] | dict(method="mae", decoder_depth=8)

# Flags that a method does not use: they are rejected.
PCAE_ONLY = ptr.SCHEDULE | {"drop_ratio", "ema"}
MEANINGLESS = dict(pcae=set(), mae=PCAE_ONLY, simmim=PCAE_ONLY | {"decoder_dim", "decoder_depth", "decoder_heads"})


def arguments() -> argparse.ArgumentParser:
    """Build the parser. Flags that are None by default depend on the data or on other flags."""
    parser = runs.flag_parser(__doc__)
    runs.add_flags(parser, RECIPES, out="runs/pretrain", files="args.json, metrics.jsonl, last.pt")

    add = parser.add_argument_group("data").add_argument
    data.add_flags(add, limited="to train on")
    data.add_view_flags(add)

    add = parser.add_argument_group("model").add_argument
    add("--model", default="vit_mini", choices=MODELS, help="size of the encoder")
    add("--patch-size", type=int, help="patch side in pixels (default: 4; stl10: 8; a folder: 16)")
    add("--channels", type=int, choices=(1, 3), help="3: colour, 1: grey (default: 1 for mnist, fashionmnist, else 3)")
    training.add_drop_path_flag(add)
    add("--decoder-dim", type=int, default=64, help="width of the decoder")
    add("--decoder-depth", type=int, default=1, help="number of blocks of the decoder")
    add("--decoder-heads", type=int, default=4, help="number of attention heads of the decoder")

    add = parser.add_argument_group("method (--drop-*, --criterion, --ema: only pcae)").add_argument
    add("--method", default="pcae", choices=MEANINGLESS, help="pre-training method; --blr 0.008 is tuned for pcae")
    add("--mask-ratio", type=float, default=0.75, help="fraction of the patches that are masked")
    add("--drop-ratio", type=float, default=0.5, help="fraction of the tokens that PTR drops at each stage")
    ptr.add_flags(add)
    add("--ema", type=training.ratio, help="first momentum of the teacher, rises to 1 (default: 1 - 30 / steps)")

    add = parser.add_argument_group("optimisation").add_argument
    drawn = "drop path, the random criterion"
    training.add_flags(add, epochs=20, batch_size=64, blr=8e-3, warmup="15 %% of the epochs", drawn=drawn)
    add("--compile", action="store_true", help="compile the model with torch.compile: slow start, faster steps")
    knn = "evaluate frozen features by k-NN and a ridge-regression probe every N epochs; 0: never"
    add("--knn-every", type=int, metavar="N", help=f"{knn} (default: 5; a folder: 0)")
    return parser


def build_model(args: argparse.Namespace) -> PCAE | MAE | SimMIM:
    """Build the networks of the method. Raises ValueError if sizes and ratios do not fit together."""
    size = data.sides(args.image_size)
    student = ViT(size, args.patch_size, channels=args.channels, drop_path=args.drop_path, **MODELS[args.model])
    decoder = {name: getattr(args, name) for name in ("decoder_dim", "decoder_depth", "decoder_heads")}
    if args.method == "simmim":
        return SimMIM(student, mask_ratio=args.mask_ratio)
    if args.method == "mae":
        return MAE(student, mask_ratio=args.mask_ratio, **decoder)
    reduction = ptr.from_args(args, len(student.blocks), args.drop_ratio)
    return PCAE(student, mask_ratio=args.mask_ratio, ptr=reduction, **decoder)


def probe_loaders(args: argparse.Namespace, world: training.World) -> list[DataLoader]:
    """Build two loaders of up to 7,000 labelled training images: 5/7 to fit probes, 2/7 to test them.

    The validation set is not used.
    """
    size, limit = data.sides(args.image_size), min(7000, args.limit or 7000)
    images = data.labelled_images(args.data, args.data_root, size, limit)
    order = torch.randperm(len(images), generator=training.generator("probe")).tolist()
    count = len(order) * 5 // 7
    parts = [data.subset(images, indices) for indices in (order[:count], order[count:])]
    options = dict(batch_size=16 if args.dry_run else 250, workers=args.workers, world=world)
    return [data.scoring_loader(part, size, args.channels, **options) for part in parts]


def probe(
    encoder: ViT, loaders: list[DataLoader], normalize: nn.Module, args: argparse.Namespace, world: training.World
) -> dict[str, float]:
    """Return accuracies in [0, 1] on mean patch tokens: `knn` (k = 20) and `ridge`, a ridge-regression probe."""
    encoder.eval()

    def features(images: Tensor) -> Tensor:
        return pool(encoder(images).tokens)

    num_batches = 2 if args.dry_run else None
    sets = [metrics.predict(features, loader, normalize, args.precision, world, num_batches) for loader in loaders]
    return dict(knn=metrics.knn_accuracy(*sets[0], *sets[1]), ridge=metrics.ridge_accuracy(*sets[0], *sets[1]))


def main(argv: list[str] | None = None) -> None:
    # 1. Settings
    parser = arguments()
    args, checkpoint = runs.parse(parser, RECIPES, argv, warmup_ratio=0.15, sets=data.SETS)
    runs.reject(runs.given(parser, argv) & MEANINGLESS[args.method], f"not used by --method {args.method}")
    data.fill_in(args)
    world = training.start_world(args.device)
    micro_batch, accumulate = training.batch_sizes(args.batch_size, args.micro_batch, world)

    # 2. Model. Student and decoder are trained, the teacher is updated by EMA. DDP averages gradients over processes.
    training.seed_generators(torch.device("cpu"), args.seed, "weights")  # the same weights in all processes
    try:
        model = build_model(args).to(world.device)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    groups = training.parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    parallel = DistributedDataParallel(model) if world.is_distributed else model
    forward = training.compiled(parallel) if args.compile else parallel

    # 3. Data
    size = data.sides(args.image_size)
    images = data.unlabelled_images(args.data, args.data_root, size, args.limit, args.download)
    options = dict(flip=args.flip, channels=args.channels, seed=args.seed, device=world.device)
    views = data.training_views(images, size, args.min_crop, **options)
    loader = data.training_loader(views, micro_batch, seed=args.seed, workers=args.workers, world=world)
    loaders = probe_loaders(args, world) if args.knn_every else None
    normalize = data.normalize_for(model.student).to(world.device)
    steps_per_epoch = len(loader) // accumulate
    if not steps_per_epoch:
        raise SystemExit(f"error: --batch-size {args.batch_size} exceeds the {len(images)} images of --data")
    first_momentum = training.start_momentum(args.epochs * steps_per_epoch) if args.ema is None else args.ema
    if args.dry_run:
        steps_per_epoch = min(2, steps_per_epoch)
    total_steps, warmup_steps = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    peak_lr = args.blr * args.batch_size / 256

    # 4. Start, or continue from the checkpoint
    step, first_epoch, history = 0, 0, []
    if checkpoint is not None:
        if checkpoint["num_images"] != len(images):
            raise SystemExit(f"error: --data has {len(images)} images, the resumed run had {checkpoint['num_images']}")
        for name, part in model.named_children():  # student, decoder and, in PCAE, teacher
            part.load_state_dict(checkpoint[name])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, first_epoch, history = checkpoint["step"], checkpoint["epoch"], checkpoint["history"]
    elif loaders:
        history = [dict(epoch=0, step=0) | probe(model.student, loaders, normalize, args, world)]
    run = runs.RunFolder(args) if world.is_main else None
    if world.is_main:
        print(f"device  {world.describe()}")
        print(f"data    {args.data}: {data.describe(images)}")
        print(f"model   {args.model} by {args.method}: {model.student.describe()}; {model.describe()}")
        print(
            "steps  ", training.describe_steps(total_steps, args.batch_size, micro_batch, accumulate, args.blr, world)
        )
        if args.method == "pcae":
            print(f"teacher momentum {first_momentum:.6g} at the start, 1 at the end")
        print(f"to continue after an interruption: python pretrain.py --resume {shlex.quote(args.out)}")

    # 5. Train. Generators are seeded per step, so resuming is exact. The split's noise is drawn for the global batch
    # and then sharded like the images, so it does not depend on the number of processes.
    guard = training.StepGuard()
    bar = tqdm(initial=step, total=total_steps, unit=" steps", disable=world.hides_bars, leave=False)
    for epoch in range(first_epoch, args.epochs):
        model.train()
        loader.sampler.set_epoch(epoch)
        batches, steps, unreadable = training.batches(loader), [], 0
        start, waiting = time.perf_counter(), training.Stopwatch()
        for _ in range(steps_per_epoch):
            lr = training.warmup_cosine(step, peak=peak_lr, total=total_steps, warmup=warmup_steps)
            momentum = training.ema_momentum(step, base=first_momentum, total=total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            training.seed_generators(world.device, args.seed, "step", step, world.rank)  # drop path, `random`
            split = training.generator(args.seed, "split", step)
            noise = torch.rand(args.batch_size, model.student.num_patches, generator=split)
            noise = training.to_device(noise[world.rank :: world.size], world.device)

            step_metrics = metrics.StepMetrics(accumulate)
            for i, micro_noise in enumerate(noise.chunk(accumulate)):
                with waiting:
                    batch, _, readable = next(batches)
                unreadable += int((~readable).sum())
                if world.is_distributed:
                    parallel.require_backward_grad_sync = i == accumulate - 1  # average the gradients once per step
                with training.autocast(world.device, args.precision):
                    output = forward(normalize(batch), micro_noise)
                (output.loss / accumulate).backward()
                step_metrics.update(loss=output.loss)
                step_metrics.update_spread(target_std=output.target, prediction_std=output.prediction)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            steps.append(step_metrics.compute(grad_norm))
            if guard.allows(steps[-1]):
                optimizer.step()
                if args.method == "pcae":
                    model.update_teacher(momentum)
            optimizer.zero_grad()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{steps[-1]['loss']:.3f}")
            training.check_readable(unreadable, seen=len(steps) * args.batch_size // world.size)

        # 6. Log, evaluate, save
        seconds = time.perf_counter() - start
        row = dict(epoch=epoch + 1, step=step, lr=lr) | metrics.mean_of_steps(steps)
        if args.method == "pcae":
            row["ema"] = momentum
        speed = dict(images_per_second=len(steps) * args.batch_size / seconds, data_wait=waiting.seconds / seconds)
        row |= dict(unreadable=sum(training.gather_lists([unreadable]))) | speed
        if loaders and ((epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs):
            row |= probe(model.student, loaders, normalize, args, world)
        history.append(row)
        if world.is_main:
            content = {name: part.state_dict() for name, part in model.named_children()}
            content |= dict(optimizer=optimizer.state_dict(), step=step, epoch=epoch + 1, history=history)
            content |= dict(method=args.method, encoder=model.student.arguments, num_images=len(images))
            run.save(content)
            tqdm.write(runs.describe(row, "epoch", "loss", "target_std", "knn", "ridge", "images_per_second"))
            warning = metrics.collapse_warning(history, args.epochs)
            if warning and args.method == "pcae" and not args.dry_run:
                tqdm.write(f"warning: {warning}")
    bar.close()

    # 7. Summary
    if world.is_main:
        last, name, root = map(shlex.quote, (f"{args.out}/last.pt", args.data, args.data_root))
        source = "" if args.data == "shapes" else f" --data {name} --data-root {root}"
        print(f"student saved in {args.out}/last.pt; next: python finetune.py --init {last}{source}")


if __name__ == "__main__":
    main()
    training.end_world()
