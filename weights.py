"""Load encoders and classifiers from our and public files (MAE, DINO, DeiT, MoCo v3, CAE, BEiT, timm); export to timm.

python weights.py runs/finetune/best.pt vit.pt              writes weights for timm, prints timm's call
"""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import ptr
from beit import BEiT, build_encoder, num_distances, resize_table
from data import evaluation_margin
from model import IMAGENET_MEAN, IMAGENET_STD, MODELS, Classifier, ViT, grid_size
from util import runs

# Parts of names that DDP, torch.compile, FSDP, checkpointing, Lightning, DINO and we add.
WRAPPERS = "module _orig_mod _fsdp_wrapped_module _checkpoint_wrapped_module model vit ema backbone encoder".split()
# Prefixes if one dict holds both: MoCo v3's encoders; CAE's teacher, beside an encoder, which is a wrapper above.
PAIRS = {"student": ("base_encoder.",), "teacher": ("momentum_encoder.", "teacher.")}
TABLE = "relative_position_bias_table"
# Tensors with these prefixes that our ViT lacks would change the output of the encoder.
ESSENTIAL = ("blocks.", "patch_embed.", "norm", "cls_token", "pos_embed", "rel_pos", "rope")
ESSENTIAL += ("dist_token", "reg_token", "register_tokens")

# --- flags ------------------------------------------------------------------------------------------------------------

POOLS = ("mean", "class")  # mean of the patch tokens, or the class token


def add_init_flags(add: Callable[..., Any]) -> None:
    """Add the flags about the encoder that a run starts from."""
    formats = "our checkpoint or a public MAE, DINO, DeiT, MoCo v3, CAE, BEiT or timm ViT"
    init = f"encoder to start from: {formats}; none: random weights"
    add("--init", default="runs/pretrain/last.pt", metavar="FILE", help=init)
    add("--model", default="vit_mini", choices=MODELS, help="size of the encoder for --init none")
    add_file_flags(add)


def add_file_flags(add: Callable[..., Any], default: str | None = "student", usual: str = "student") -> None:
    """Add the flags that select an encoder in a file or give what a public file, unlike ours, does not record.

    `default` is that of `--weights`; `usual` names it in the help text.
    """
    which = f"which encoder of the file to use, if it has both (default: {usual})"
    heads = "number of attention heads, which a public file does not record (default: of the usual ViT of its width)"
    grid = "rows and columns of patches, which a public file does not record (default: a square)"
    pixels = "of pixels in [0, 1], which a public file does not record (default: ImageNet's"
    mean, std = (f"{pixels}, {' '.join(map(str, values))})" for values in (IMAGENET_MEAN, IMAGENET_STD))
    add("--weights", default=default, choices=("student", "teacher"), help=which)
    add("--heads", type=int, metavar="N", help=heads)
    add("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help=grid)
    add("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help=f"mean {mean}")
    add("--std", type=float, nargs=3, metavar=("R", "G", "B"), help=f"standard deviation {std}")


def told(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags tell about a public file, as options of `load_encoder` and `load_classifier`."""
    return {name: getattr(args, name) for name in ("heads", "grid", "mean", "std")}


def check_flags(given: set[str], init: str) -> None:
    """End the script if flags about a new encoder are given although `init` is a file, or the reverse.

    `given` are names as of `runs.given`. For a new encoder `init` is "none".
    """
    if init == "none":
        runs.reject(given & {"weights", "heads", "grid", "mean", "std"}, "only for a file, not for --init none")
    else:
        runs.reject(given & {"model", "patch_size", "channels"}, f"only for --init none; {init} defines the encoder")


# --- in ---------------------------------------------------------------------------------------------------------------


def find_weights(checkpoint: dict[str, Any], weights: str = "student") -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by timm's names, without the wrappers of other tools.

    Searches, in this order: the key `weights` (`student` or `teacher`: ours, DINO), `model` (MAE, DeiT), `state_dict`
    (timm, MoCo v3), an average of the weights, the checkpoint itself. Raises ValueError if `weights` is missing.
    """
    averages = ("model_ema", "state_dict_ema")
    places = [key for key in (weights, "model", "state_dict", *averages) if key in checkpoint]
    other = {"student": "teacher", "teacher": "student"}[weights]
    if not places and other in checkpoint:
        raise ValueError(f"the file holds only the weights of the {other}: use --weights {other}")
    if places and places[0] in averages:
        runs.print_once(f"the file holds only an average of the weights ({places[0]}), which is used")
    found = checkpoint[places[0]] if places else checkpoint
    tensors = {}
    for name, value in found.items():
        if isinstance(value, Tensor):
            tensors[".".join(part for part in name.split(".") if part not in WRAPPERS)] = value
    one = {name[len(p) :]: t for p in PAIRS[weights] for name, t in tensors.items() if name.startswith(p)}
    if weights == "teacher" and not one and "teacher" not in checkpoint:
        raise ValueError("the file holds one set of weights, without a teacher: use --weights student")
    return fold(one or tensors)


def fold(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold tensors by timm's names into the equivalent ones that a plain ViT or our BEiT has.

    LayerScale (`gamma_1`, `gamma_2` of BEiT and CAE, `ls1`, `ls2` of timm and DINOv2) is folded into the layer before,
    `q_bias` and `v_bias` into a bias of qkv. A table of relative positions shared by all blocks is copied to each.
    """
    folded = {name: tensor for name, tensor in tensors.items() if not name.endswith("relative_position_index")}
    shared = folded.pop(f"rel_pos_bias.{TABLE}", None)
    for block in [found[1] for name in tensors if (found := re.fullmatch(r"(blocks\.\d+\.)norm1\.weight", name))]:
        for layer, names in (("attn.proj", ("gamma_1", "ls1.gamma")), ("mlp.fc2", ("gamma_2", "ls2.gamma"))):
            weight, bias = f"{block}{layer}.weight", f"{block}{layer}.bias"
            for name in names:
                if {block + name, weight, bias} <= folded.keys():  # else incompatible: the name remains and is rejected
                    gamma = folded.pop(block + name)
                    folded |= {weight: folded[weight] * gamma[:, None], bias: folded[bias] * gamma}
        if {block + "attn.q_bias", block + "attn.v_bias"} <= folded.keys():
            q, v = folded.pop(block + "attn.q_bias"), folded.pop(block + "attn.v_bias")
            folded[block + "attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
        if shared is not None:
            folded[f"{block}attn.{TABLE}"] = shared
    return folded


def infer_arguments(
    tensors: dict[str, Tensor], heads: int | None = None, grid: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Infer `ViT.arguments`, without mean and std, from its weights. Raises ValueError if they are incompatible.

    Weights do not determine the number of `heads` (except BEiT's) or the `grid` (rows, columns). The defaults are the
    heads of the usual ViT of this width and a square grid.
    """
    table = tensors.get(f"blocks.0.attn.{TABLE}")
    positions = "pos_embed" if table is None else f"blocks.0.attn.{TABLE}"
    needed = ("cls_token", positions, "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    absent = [name for name in needed if name not in tensors]
    if absent:
        raise ValueError(f"not a plain ViT with a class token: {', '.join(absent)} missing")
    if table is not None and "pos_embed" in tensors:
        raise ValueError("absolute and relative positions in one file: not supported")
    for name, ndim in (("patch_embed.proj.weight", 4), (positions, 3 if table is None else 2)):
        if tensors[name].ndim != ndim:
            raise ValueError(f"not a plain ViT: {name} has shape {tuple(tensors[name].shape)}, expected {ndim} axes")
    dim, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    if channels not in (1, 3):
        raise ValueError(f"the encoder expects {channels} channels; supported are 3 (colour) and 1 (grey)")
    if table is None:
        count, count_of = tensors["pos_embed"].shape[1], lambda grid: 1 + math.prod(grid)
        square = math.isqrt(count - 1)
    else:
        count, count_of = len(table), num_distances
        square = (math.isqrt(count - 3) + 1) // 2
    grid = tuple(grid or (square, square))
    if count_of(grid) != count:
        expected = f"{count_of(grid)} for {grid[0]} x {grid[1]} patches and the class token"
        raise ValueError(f"{positions} has {count} rows, expected {expected}: set --grid if there are others")
    usual = {size["dim"]: size["heads"] for size in MODELS.values()}
    if table is not None:
        if heads not in (None, table.shape[1]):
            raise ValueError(f"the file has {table.shape[1]} attention heads, got --heads {heads}")
        heads = table.shape[1]
    if heads is None and dim not in usual:
        raise ValueError(f"cannot infer the number of attention heads from the width {dim}: set --heads")
    return dict(
        image_size=tuple(side * patch_size for side in grid),
        patch_size=patch_size,
        channels=channels,
        dim=dim,
        depth=1 + max(int(block[1]) for name in tensors if (block := re.match(r"blocks\.(\d+)\.", name))),
        heads=heads or usual[dim],
        mlp_ratio=len(tensors["blocks.0.mlp.fc1.weight"]) / dim,
    ) | ({} if table is None else dict(relative_positions=True))


def resize_positions(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize positions (1, 1 + N, D) from one grid (rows, columns) to another, bicubic as in MAE and DeiT."""
    patches = rearrange(pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=old[0], w=old[1])
    patches = F.interpolate(patches, size=new, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], rearrange(patches, "1 d h w -> 1 (h w) d")], dim=1)


def load_encoder(
    checkpoint: dict[str, Any],
    *,
    weights: str = "student",
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
    grid: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    drop_path: float = 0.0,
) -> ViT:
    """Build the encoder of a loaded checkpoint: ours or a public one of MAE, DINO, DeiT, MoCo v3, CAE, BEiT or timm.

    Another `image_size` (H, W) than the checkpoint's resizes the positions, absolute or relative. `heads`, `grid`,
    `mean` and `std` (of pixels) give what a public file does not record; ours does, so other values raise ValueError.
    Prints assumptions, resized positions and matched tensors. Raises ValueError if the file is not a plain ViT or BEiT,
    is incomplete, or a shape differs.
    """
    tensors = find_weights(checkpoint, weights)
    if "encoder" in checkpoint and "config" in checkpoint:  # our files record their settings
        arguments = checkpoint["encoder"]
        says = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD) | arguments
        says["grid"] = grid_size(arguments["image_size"], arguments["patch_size"])
        for name, value in dict(heads=heads, grid=grid, mean=mean, std=std).items():
            if value is not None and torch.tensor(value).tolist() != torch.tensor(says[name]).tolist():
                raise ValueError(f"the file records --{name} {says[name]}: remove the flag, which has another value")
    else:
        if not all(0 <= x <= 1 for x in mean or ()) or not all(0 < x <= 1 for x in std or ()):
            raise ValueError(f"expected --mean and --std of pixels in [0, 1] (divide by 255), got {mean} and {std}")
        statistics = {name: value for name, value in (("mean", mean), ("std", std)) if value}
        arguments = infer_arguments(tensors, heads, grid) | statistics
        is_moco = any("base_encoder." in name for name in checkpoint.get("state_dict", ()))
        if is_moco and heads is None and arguments["dim"] == 384:
            arguments["heads"] = 12  # MoCo v3's ViT-S has twice the usual number
        if not {"norm.weight", "fc_norm.weight"} & tensors.keys():
            raise ValueError("the final norm is missing: is the file one shard of a checkpoint?")
        rows, columns = grid_size(arguments["image_size"], arguments["patch_size"])
        assumed = [] if grid else [f"{rows} x {columns} patches (--grid)"]
        assumed += [] if heads or "relative_positions" in arguments else [f"{arguments['heads']} heads (--heads)"]
        assumed += [] if mean else ["ImageNet's mean of pixels (--mean)"]
        assumed += [] if std else ["ImageNet's standard deviation (--std)"]
        assumed += [f"the {weights} (--weights)"] if {"student", "teacher"} <= checkpoint.keys() else []
        assumed += ["the weights, not their average"] if {"model_ema", "state_dict_ema"} & checkpoint.keys() else []
        if assumed:
            found = f"found {arguments['depth']} blocks of width {arguments['dim']}"
            runs.print_once(f"{found}; assumed {', '.join(assumed)}")
    encoder = build_encoder(arguments | dict(image_size=image_size or arguments["image_size"]), drop_path)
    old_grid = grid_size(arguments["image_size"], arguments["patch_size"])
    if old_grid != encoder.grid:
        old, new = (" x ".join(map(str, grid)) for grid in (old_grid, encoder.grid))
        runs.print_once(f"positions resized from {old} to {new} patches")
        for name in tensors.keys() & encoder.state_dict().keys():  # not a decoder's positions
            if name.endswith(("pos_embed", TABLE)):
                resize = resize_table if name.endswith(TABLE) else resize_positions
                tensors[name] = resize(tensors[name].float(), old_grid, encoder.grid)
    copy_weights(encoder, tensors)
    return encoder


def copy_weights(encoder: ViT, tensors: dict[str, Tensor]) -> None:
    """Copy an encoder's weights from `tensors` and print what matched. Raises ValueError as `load_encoder` does.

    The final norm may be missing, as in a mean-pooled classifier, and biases of qkv, which are then zero.
    """
    own = encoder.state_dict()
    matched = {name: tensors[name] for name in own if name in tensors}
    missing = [name for name in own if name not in tensors]
    left_over = [name for name in tensors if name not in own and not name.startswith("fc_norm.")]  # of a classifier
    foreign = [name for name in left_over if name.startswith(ESSENTIAL)]
    if foreign:
        raise ValueError(f"not a plain ViT: unexpected tensors {', '.join(foreign[:3])}")
    for name, tensor in matched.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
    needed = [name for name in missing if not name.startswith("norm.") and not name.endswith("attn.qkv.bias")]
    if needed:
        raise ValueError(f"incomplete file: {len(needed)} tensors are missing: {', '.join(needed[:5])}, ...")
    encoder.load_state_dict(matched, strict=False)

    def few(names: list[str]) -> str:
        return f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""

    runs.print_once(
        f"weights {len(matched)} of {len(own)} tensors matched; {len(missing)} missing{few(missing)}; "
        f"{len(left_over)} unused{few(left_over)}"
    )


def load_classifier(checkpoint: dict[str, Any], *, pool: str | None = None, **options: Any) -> Classifier:
    """Build the classifier of a loaded checkpoint, ours or public.

    `pool` is `mean` or `class` (None: as the file records), `options` are those of `load_encoder`.

    A public file with `fc_norm` uses mean pooling (MAE). Without `fc_norm`, `pool` must be given. Raises ValueError if
    the file is incompatible or incomplete.
    """
    tensors = find_weights(checkpoint)
    head = tensors.get("head.weight")
    if head is None or any(name.startswith("pre_logits.") for name in tensors):
        raise ValueError("the file has no classifier with a linear head (head.weight)")
    known = checkpoint.get("pool") or ("mean" if "fc_norm.weight" in tensors else None)
    if pool not in (None, known or pool):
        raise ValueError(f"the classifier was trained with --pool {known}, got --pool {pool}: remove the flag")
    if (pool or known) is None:
        raise ValueError("the file does not record the pooling: set --pool class (DeiT, most of timm) or --pool mean")
    top = {name: tensor for name, tensor in tensors.items() if name.startswith(("fc_norm.", "head."))}
    below = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    ours = {name: checkpoint[name] for name in ("config", "encoder") if name in checkpoint}
    encoder = load_encoder(ours | dict(model=below), **options)
    by = "mean" if "fc_norm.weight" in tensors else "class"  # by the norm's place; probes have the encoder's
    model = Classifier(encoder, len(head), pool=by, frozen="fc_norm.running_mean" in tensors)
    model.pool = known or pool
    try:
        missing = model.load_state_dict(top, strict=False).missing_keys
    except RuntimeError as error:  # its last line names a tensor and the shapes
        raise ValueError(str(error).splitlines()[-1].strip()) from None
    absent = [name for name in missing if not name.startswith("encoder.")]
    if absent:
        raise ValueError(f"incomplete head: {', '.join(absent)} missing")
    return model


# --- out --------------------------------------------------------------------------------------------------------------


def timm_weights(model: ViT | Classifier) -> dict[str, Tensor]:
    """Return weights of an encoder or classifier by timm's names; a linear probe's BatchNorm is folded into the head.

    Raises ValueError for a BEiT.
    """
    if isinstance(model.encoder if isinstance(model, Classifier) else model, BEiT):
        raise ValueError("cannot export a BEiT: timm's plain ViT has no relative positions")
    tensors = {name.removeprefix("encoder."): tensor for name, tensor in model.state_dict().items()}
    if isinstance(model, Classifier) and model.frozen:
        mean, std = model.fc_norm.running_mean, (model.fc_norm.running_var + model.fc_norm.eps).sqrt()
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc_norm.")}
        tensors["head.weight"] = model.head.weight.detach() / std
        tensors["head.bias"] = model.head.bias.detach() - tensors["head.weight"] @ mean
    return tensors


def model_name(encoder: ViT) -> str | None:
    """Return the name in MODELS of an encoder's size, or None."""
    return next((name for name, size in MODELS.items() if size.items() <= encoder.arguments.items()), None)


def timm_call(model: ViT | Classifier, path: str | None = None) -> str:
    """Return the call that builds the timm model for these weights, loaded from the file `path` if given."""
    encoder = model.encoder if isinstance(model, Classifier) else model
    sizes = encoder.arguments
    usual = {size["dim"]: name for name, size in MODELS.items() if name != "vit_mini"}
    name = f"{usual.get(sizes['dim'], 'vit_base')}_patch16_224".replace("huge_patch16", "huge_patch14")
    options = dict(
        img_size=encoder.image_size,
        patch_size=sizes["patch_size"],
        in_chans=sizes["channels"],
        embed_dim=sizes["dim"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        mlp_ratio=sizes["mlp_ratio"],
        num_classes=0,
    )
    if isinstance(model, Classifier):
        options |= dict(num_classes=model.head.out_features, global_pool="avg" if model.pool == "mean" else "token")
        options |= dict(fc_norm=False) if model.frozen else {}
    # For timm's preprocessing: our evaluation's centre crop and, for grey images, one mean as in `data.Normalize`.
    mean, std = (x if encoder.channels == 3 else (sum(x) / 3,) for x in (sizes["mean"], sizes["std"]))
    expected = dict(input_size=(encoder.channels, *encoder.image_size), mean=mean, std=std)
    options |= dict(pretrained_cfg_overlay=expected | dict(crop_pct=1 / evaluation_margin(encoder.image_size)))
    options |= dict(checkpoint_path=path) if path else {}
    return f"timm.create_model({name!r}, {', '.join(f'{key}={value!r}' for key, value in options.items())})"


def main(argv: list[str] | None = None) -> None:
    """Export an encoder or classifier to a file that timm loads, and print timm's call."""
    parser = runs.flag_parser(__doc__)
    add = parser.add_argument
    add("file", metavar="FILE", help="our checkpoint or a public file")
    add("out", metavar="OUT", help="file to write: .pt, .pth, .bin or .safetensors")
    add_file_flags(add)
    add("--pool", choices=POOLS, help="pooling of a public classifier, if its file does not record it")
    size = "height and width in pixels, or one number for both (default: that of FILE)"
    add("--image-size", type=int, nargs="+", metavar="PIXELS", help=size)
    args = parser.parse_args(argv)
    if Path(args.out).resolve() == Path(args.file).resolve():
        raise SystemExit(f"error: {args.out} is the input file: choose another output file")
    checkpoint, size = runs.load(args.file), args.image_size and (args.image_size[0], args.image_size[-1])
    try:
        if args.weights == "student" and "head.weight" in find_weights(checkpoint):
            model = load_classifier(checkpoint, pool=args.pool, image_size=size, **told(args))
            known = dict(pool=model.pool, classes=checkpoint.get("classes"), encoder=model.encoder.arguments)
        else:
            model = load_encoder(checkpoint, weights=args.weights, image_size=size, **told(args))
            known = dict(encoder=model.arguments)
        config = checkpoint.get("config", {}) if "method" in checkpoint else {}
        config = {name: config[name] for group in ptr.FLAG_GROUPS for name in group if name in config}
        runs.save_weights(Path(args.out), timm_weights(model), dict(method="export", config=config) | known)
    except ValueError as error:
        raise SystemExit(f"error: {args.file}: {error}") from None
    print(f"saved {args.out}; timm loads the file by\n  {timm_call(model, args.out)}")
    if isinstance(model, Classifier) and config.get("drop_ratio"):
        print("timm runs it without PTR, which it was trained with: its accuracy may be lower there")


if __name__ == "__main__":
    main()
