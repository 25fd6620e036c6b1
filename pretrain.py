"""Pre-train a vision transformer with PCAE (panel a of the poster), or with MAE or SimMIM to compare.

    python pretrain.py                                              built-in data, any laptop, two minutes
    python pretrain.py --data FOLDER                                your images
    torchrun --nproc-per-node 8 pretrain.py --data FOLDER --recipe imagenet        the paper's run
    python pretrain.py --method mae --out runs/mae                  MAE in its place; or simmim
    python pretrain.py --resume                                     go on with the run in --out
"""

import argparse
import math
import time

import threads  # noqa: F401 (before torch)

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import runs
import scores
import training
from baselines import MAE, SimMIM
from model import MODELS, PCAE, ViT, pool

# What `--recipe` sets; flags that are given win.
RECIPES = {
    "laptop": {},  # the defaults below
    "imagenet": dict(
        model="vit_base", image_size=[224], patch_size=16, min_crop=0.2, mask_ratio=0.75, drop_stages=3, drop_ratio=0.5,
        decoder_depth=2, decoder_dim=512, decoder_heads=16, ema=0.9999, epochs=300, warmup_epochs=40.0,
        batch_size=4096, blr=1.5e-4, weight_decay=0.05,
    ),
}  # fmt: skip
# The decoder of MAE's authors, who train for 800 or 1600 epochs.
RECIPES["mae"] = RECIPES["imagenet"] | dict(method="mae", decoder_depth=8)

PCAE_FLAGS = {"drop_ratio", "drop_stages", "drop_at", "drop_blocks", "criterion", "ema"}
DECODER_FLAGS = {"decoder_dim", "decoder_depth", "decoder_heads"}


def arguments() -> argparse.ArgumentParser:
    """All flags; what is None by default depends on the data or on other flags."""
    parser = runs.flag_parser(__doc__)
    runs.add_flags(parser, RECIPES, out="runs/pretrain", files="args.json, metrics.jsonl, last.pt")
    data.add_flags(parser.add_argument_group("data").add_argument)

    add = parser.add_argument_group("model").add_argument
    add("--model", default="vit_mini", choices=MODELS, help="encoder")
    add("--patch-size", type=int, help="pixels (default: 4 for small sets, 16 for a folder; see data.SETS)")
    add("--channels", type=int, choices=(1, 3), help="3: colour, 1: grey (default: what the data are)")
    add("--drop-path", type=runs.share, default=0.0, help="stochastic depth of the student")
    add("--decoder-dim", type=int, default=64, help="decoder width")
    add("--decoder-depth", type=int, default=1, help="decoder blocks")
    add("--decoder-heads", type=int, default=4, help="decoder heads")

    add = parser.add_argument_group("method").add_argument
    add("--method", default="pcae", choices=("pcae", "mae", "simmim"), help="the paper's, or one to compare it with "
        "(the default --blr is tuned to pcae)")
    add("--mask-ratio", type=float, default=0.75, help="share of the patches hidden from the student and, in PCAE, "
        "shown to the teacher")
    add("--drop-ratio", type=float, default=0.5, help="share of its tokens that each stage drops (pcae)")
    runs.add_ptr_flags(add)
    add("--ema", type=runs.share, help="first momentum of the teacher, rises to 1 (pcae; default: 1 - 30 / steps)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--compile", action="store_true", help="torch.compile the model: a slow start, faster steps")
    add("--epochs", type=int, default=20, help="passes over the data")
    add("--batch-size", type=int, default=64, help="images a step, over all processes")
    add("--micro-batch", type=int, help="images at once per process (default: all). Gradients accumulate: the step is "
        "the same, but for what is drawn per micro-batch (drop path, the random criterion)")
    add("--blr", type=float, default=8e-3, help="learning rate per 256 images: lr = blr * batch size / 256")
    add("--warmup-epochs", type=float, help="epochs of linear warm-up (default, and for runs that are no longer: 15 %% "
        "of the epochs)")
    add("--weight-decay", type=float, default=0.05, help="of matrices; none on biases, norms and tokens")
    add("--clip-grad", type=float, default=1.0, help="largest norm of the gradient; 0: any")
    add("--knn-every", type=int, metavar="N", help="score the features on labelled images, by nearest neighbours and a "
        "linear classifier, at the start and every N epochs; 0: never (default: 5 for sets with a name, else 0)")
    return parser


def build_model(args: argparse.Namespace) -> PCAE | MAE | SimMIM:
    """The method's networks. Raises ValueError where sizes and ratios do not fit together."""
    student = ViT(
        data.sides(args.image_size), args.patch_size, channels=args.channels, drop_path=args.drop_path,
        **MODELS[args.model],
    )  # fmt: skip
    decoder = dict(
        decoder_dim=args.decoder_dim, decoder_depth=args.decoder_depth, decoder_heads=args.decoder_heads
    )  # fmt: skip
    if args.method == "simmim":
        return SimMIM(student, mask_ratio=args.mask_ratio)
    if args.method == "mae":
        return MAE(student, mask_ratio=args.mask_ratio, **decoder)
    ptr = runs.token_reduction(args, len(student.blocks), args.drop_ratio)
    return PCAE(student, mask_ratio=args.mask_ratio, ptr=ptr, **decoder)


def probe_loaders(args: argparse.Namespace, world: training.World) -> list[DataLoader]:
    """Labelled training images in two parts, to score features on: no choice made here has seen the validation set."""
    images = data.labelled_images(args, limit=7000)
    order = torch.randperm(len(images), generator=training.generator("probe")).tolist()
    count = len(order) * 5 // 7
    sets = [data.subset(images, part) for part in (order[:count], order[count:])]
    batch = 16 if args.dry_run else 250
    return [data.evaluation_loader(data.evaluation_views(some, args), batch, args.workers, world) for some in sets]


def probe(
    encoder: ViT, loaders: list[DataLoader], normalize: nn.Module, args: argparse.Namespace, world: training.World
) -> dict[str, float]:
    """Accuracies in [0, 1] of the frozen encoder's mean patch token."""
    encoder.eval()

    def features(images: Tensor) -> Tensor:
        return pool(encoder(images).tokens)

    batches = 2 if args.dry_run else None
    sets = [scores.predict(features, loader, normalize, args.precision, world, batches) for loader in loaders]
    return dict(knn=scores.knn_accuracy(*sets[0], *sets[1]), linear=scores.linear_accuracy(*sets[0], *sets[1]))


def main(argv: list[str] | None = None) -> None:
    # 1. Settings
    parser = arguments()
    args, checkpoint = runs.parse(parser, RECIPES, argv, warmup_ratio=0.15)
    meaningless = dict(pcae=set(), mae=PCAE_FLAGS, simmim=PCAE_FLAGS | DECODER_FLAGS)[args.method]
    runs.reject(runs.given(parser, argv) & meaningless, f"not a flag of --method {args.method}")
    data.fill_in(args)
    world = training.start_world(args.device)
    micro_batch, accumulate = training.batch_sizes(args.batch_size, args.micro_batch, world)

    # 2. Model: student and decoder are trained, the teacher follows. DDP averages their gradients over the processes.
    training.seed_generators(torch.device("cpu"), args.seed, "weights")  # all processes begin with the same ones
    try:
        model = build_model(args).to(world.device)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = training.parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    ddp = DistributedDataParallel(model) if world.size > 1 else None
    forward = training.compiled(ddp or model) if args.compile else ddp or model

    # 3. Data
    images = data.unlabelled_images(args)
    views = data.training_views(images, args, data.sides(args.image_size), world.device)
    loader = data.training_loader(views, micro_batch, args.workers, world)
    loaders = probe_loaders(args, world) if args.knn_every else None
    normalize = data.normalize_for(model.student).to(world.device)
    steps_per_epoch = len(loader) // accumulate
    if not steps_per_epoch:
        raise SystemExit(f"error: --batch-size {args.batch_size} is more than the {len(images)} images of --data")
    if args.ema is None:
        args.ema = training.start_momentum(args.epochs * steps_per_epoch)
    if args.dry_run:
        steps_per_epoch = min(2, steps_per_epoch)
    total_steps, warmup_steps = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    peak_lr = args.blr * args.batch_size / 256

    # 4. Start, or go on from where the checkpoint was written
    step, first_epoch, history = 0, 0, []
    if checkpoint is not None:
        if checkpoint["num_images"] != len(images):
            raise SystemExit(f"error: --data has {len(images)} images, {checkpoint['num_images']} in the run to resume")
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
        print(f"steps   {total_steps:,}, each {args.batch_size} images = {world.size} x {accumulate} x {micro_batch}; "
              f"peak learning rate {peak_lr:.3g} = {args.blr:g} * {args.batch_size} / 256")
        if args.method == "pcae":
            print(f"teacher momentum {args.ema:.6g} at the start, 1 at the end")
        print(f"to continue after an interruption: python pretrain.py --resume {args.out}/last.pt")

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
            momentum = training.ema_momentum(step, base=args.ema, total=total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Each draw is seeded by its place in the run: what is resumed goes on as if it had not stopped. The split's
            # noise is drawn for the whole batch and dealt out as the images are: no image's depends on the processes.
            training.seed_generators(world.device, args.seed, "step", step, world.rank)  # drop path, `random`
            noise = torch.rand(args.batch_size, model.student.num_patches,
                               generator=training.generator(args.seed, "split", step))  # fmt: skip
            noise = noise[world.rank :: world.size].to(world.device, non_blocking=True)

            # Forward and backward, in micro-batches
            sums = 0.0  # of the loss and two mean directions: (1 + 2 D,)
            for i, part in enumerate(noise.chunk(accumulate)):
                waited -= time.perf_counter()
                batch, _, readable = next(batches)
                waited += time.perf_counter()
                unreadable += int((~readable).sum())
                if ddp is not None:
                    ddp.require_backward_grad_sync = i == accumulate - 1  # average the gradients once a step
                with training.autocast(world.device, args.precision):
                    output = forward(normalize(batch), part)
                (output.loss / accumulate).backward()
                directions = scores.mean_direction(output.target), scores.mean_direction(output.prediction)
                sums = sums + torch.cat([output.loss.detach()[None], *directions]) / accumulate
            grad_norm = nn.utils.clip_grad_norm_(trainable, args.clip_grad or math.inf)

            # What to log. Reading the numbers waits for the device, once a step.
            sums = training.mean_over_processes(sums)
            target_direction, prediction_direction = sums[1:].chunk(2)
            row = dict(
                loss=sums[0], target_std=scores.spread(target_direction),
                prediction_std=scores.spread(prediction_direction), grad_norm=grad_norm,
            )  # fmt: skip
            row = dict(zip(row, torch.stack(list(row.values())).tolist(), strict=True))
            rows.append(row)

            # The student's step, then the teacher's. One that is not finite must not reach the weights; all processes
            # have the same numbers and decide the same.
            if runs.is_finite(row):
                optimizer.step()
                if args.method == "pcae":
                    model.update_teacher(momentum)
                skipped_in_a_row = 0
            else:
                skipped_in_a_row += 1
                if skipped_in_a_row == 10:
                    raise SystemExit("error: ten steps in a row not finite: repeat with --resume and a lower --blr")
            optimizer.zero_grad()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            data.check_readable(unreadable, seen=len(rows) * args.batch_size // world.size)

        # 6. Log, score, save
        row = dict(epoch=epoch + 1, step=step, lr=lr) | runs.mean_of_steps(rows)
        if args.method == "pcae":
            row["ema"] = momentum
        seconds = time.perf_counter() - start
        row |= dict(
            unreadable=unreadable, images_per_second=len(rows) * args.batch_size / seconds, data_wait=waited / seconds
        )
        if loaders and ((epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs):
            row |= probe(model.student, loaders, normalize, args, world)
        history.append(row)
        if world.is_main:
            parts = {name: part.state_dict() for name, part in model.named_children()}
            run.save(parts | dict(
                optimizer=optimizer.state_dict(), step=step, epoch=epoch + 1, history=history, method=args.method,
                encoder=model.student.arguments, num_images=len(images),
            ))  # fmt: skip
            tqdm.write(runs.describe(row))
            if args.method == "pcae" and row["target_std"] is not None and row["target_std"] < 0.2:
                tqdm.write("warning: nearly all targets point in one direction (collapse): raise --ema or lower --blr")
    bar.close()

    # 7. Say how it went
    if world.is_main:
        source = "" if args.data == "shapes" else f" --data {args.data} --data-root {args.data_root}"
        print(f"the student is in {args.out}/last.pt; next: python finetune.py --init {args.out}/last.pt{source}")


if __name__ == "__main__":
    main()
    training.end_world()
