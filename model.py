"""The networks of PCAE (panels a and b of the poster): ViT encoder, light decoder, and `PCAE`, which ties them up.

Read `PCAE` first: its `forward` is the method. `Classifier` is what fine-tuning trains; `load_encoder` takes any plain
ViT's weights, ours or public ones. Shapes: B images, N patches, n tokens of a sequence, D width. Encoder parameters
carry timm's names, so public ViT weights load without a mapping and ours load into timm.
"""

import copy
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ptr import PTR, drop_tokens, gather_tokens, num_kept, token_counts

# vit_mini is ours, for laptops; the others are the usual sizes. vit_huge is meant for patches of 14 pixels.
MODELS = {
    "vit_mini": dict(dim=64, depth=4, heads=4),
    "vit_tiny": dict(dim=192, depth=12, heads=3),
    "vit_small": dict(dim=384, depth=12, heads=6),
    "vit_base": dict(dim=768, depth=12, heads=12),
    "vit_large": dict(dim=1024, depth=24, heads=16),
    "vit_huge": dict(dim=1280, depth=32, heads=16),
}


MAX_PATCHES, MAX_DEPTH, MAX_PARAMETERS = 2**18, 256, 10**10  # beyond all that was ever trained

# --- parts of a transformer -------------------------------------------------------------------------------------------


def grid_size(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of an (H, W) image."""
    height, width = image_size
    if patch_size < 1 or height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"image size {height} x {width} (--image-size) is not a multiple of the patch size {patch_size} "
            "(--patch-size)"
        )
    return height // patch_size, width // patch_size


def num_parameters(
    image_size: tuple[int, int],
    patch_size: int,
    *,
    channels: int = 3,
    dim: int,
    depth: int,
    heads: int,
    mlp_ratio: float = 4.0,
) -> int:
    """How many numbers a ViT with these arguments has in its matrices, positions and patch projection, at least."""
    blocks = depth * (4 + 2 * mlp_ratio) * dim**2
    return int(blocks + dim * (math.prod(grid_size(image_size, patch_size)) + channels * patch_size**2))


def check_size(numbers: int, depth: int, num_patches: int, flags: str) -> None:
    """Raise ValueError for a network that no machine could hold: a slip of the finger, or a file that lies."""
    if num_patches > MAX_PATCHES or depth > MAX_DEPTH or numbers > MAX_PARAMETERS:
        raise ValueError(
            f"a transformer of {numbers // 10**6:,} million numbers in {depth:,} blocks, on {num_patches:,} patches, "
            f"is larger than any ({flags}, --image-size, --patch-size)"
        )


def sincos_position_embedding(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions (1, 1 + rows * columns, dim): zeros for the class token, then row-major patches.

    As in MAE: the first half of the channels encodes the column, the second the row, each as sin then cos of
    position / 10000^(k / (dim / 4)).
    """
    if dim % 4:
        raise ValueError(f"width {dim} (--dim, --decoder-dim) is not a multiple of 4, as sine-cosine positions need")
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
    frequencies = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    angles = [position.flatten()[:, None] * frequencies for position in (x, y)]  # two of (N, dim / 4)
    patches = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)  # (N, dim)
    return torch.cat([torch.zeros(1, dim), patches.float()])[None]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into square patches, row by row: (B, C, H, W) -> (B, N, C p p)."""
    p = patch_size
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)


class PatchEmbed(nn.Module):
    """Linear projection of square patches; a convolution's weights, applied only to the patches asked for."""

    def __init__(self, patch_size: int, channels: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor, patch_ids: Tensor | None = None) -> Tensor:
        """(B, C, H, W), ids (B, n) or None for all -> (B, n, D). Gathering first saves the work on the others."""
        patches = patchify(images, self.patch_size)
        if patch_ids is not None:
            patches = gather_tokens(patches, patch_ids)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)), each branch under drop path."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_weights(module: nn.Module) -> None:
    """As in MAE: Xavier-uniform projections, of which the patch convolution is one; all biases zero."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))
        nn.init.zeros_(module.bias)


# --- encoder ----------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What an encoder returns: normalised tokens (B, [1 +] n, D), and the patch (row-major) each patch token is of."""

    tokens: Tensor
    patch_ids: Tensor  # (B, n)


class ViT(nn.Module):
    """Vision transformer on any subset of an image's patches, with or without its class token, with or without PTR."""

    def __init__(
        self,
        image_size: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        *,
        channels: int = 3,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"width {dim} (--dim) is not a multiple of the number of heads {heads} (--heads)")
        self.arguments = dict(
            image_size=tuple(image_size), patch_size=patch_size, channels=channels,
            dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio,
        )  # fmt: skip
        self.image_size = tuple(image_size)
        self.grid = grid_size(image_size, patch_size)
        self.num_patches = math.prod(self.grid)
        check_size(num_parameters(**self.arguments), depth, self.num_patches, "--dim, --depth")
        self.dim = dim
        self.patch_embed = PatchEmbed(patch_size, channels, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_position_embedding(dim, self.grid), requires_grad=False)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]  # deeper blocks are skipped more often
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)

    def describe(self) -> str:
        """Its size in words."""
        parameters = sum(parameter.numel() for parameter in self.parameters()) / 1e6
        return f"{parameters:.1f} M parameters, {self.num_patches} patches"

    def embed(self, images: Tensor, patch_ids: Tensor, class_token: bool) -> Tensor:
        """Patches + positions, the class token first: (B, C, H, W), (B, n) -> (B, [1 +] n, D)."""
        if images.shape[-2:] != self.image_size:
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels given to a ViT made for {self.image_size}")
        x = self.patch_embed(images, patch_ids) + self.pos_embed[0, 1:][patch_ids]
        if class_token:
            cls = self.cls_token + self.pos_embed[:, :1]
            x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
        return x

    def forward(
        self, images: Tensor, patch_ids: Tensor | None = None, *, class_token: bool = True, ptr: PTR | None = None
    ) -> Encoded:
        """Encode patches `patch_ids` (B, n) (default: all) of images (B, C, H, W), dropping tokens as `ptr` says."""
        if patch_ids is None:
            patch_ids = torch.arange(self.num_patches, device=images.device).expand(len(images), -1)
        return self.encode(self.embed(images, patch_ids, class_token), patch_ids, ptr)

    def encode(self, x: Tensor, patch_ids: Tensor, ptr: PTR | None = None) -> Encoded:
        """The blocks, on embedded tokens (B, [1 +] n, D) of patches `patch_ids` (B, n)."""
        num_prefix = x.shape[1] - patch_ids.shape[1]
        for i, block in enumerate(self.blocks):
            x = block(x)
            if ptr is not None and i in ptr.blocks:
                x, kept = drop_tokens(x, ptr.drop_ratio, num_prefix, ptr.criterion)
                patch_ids = patch_ids.gather(1, kept)
        return Encoded(self.norm(x), patch_ids)


def pool(tokens: Tensor, by: str = "mean") -> Tensor:
    """One vector (B, D) for an image from its tokens (B, 1 + n, D): the `mean` of its patches, or its `class` token."""
    return tokens[:, 1:].mean(dim=1) if by == "mean" else tokens[:, 0]


def resize_positions(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions (1, 1 + N, D) of one grid of patches (rows, columns) for another one, bicubic as in MAE and DeiT."""
    patches = rearrange(pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=old[0], w=old[1])
    patches = F.interpolate(patches, size=new, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], rearrange(patches, "1 d h w -> 1 (h w) d")], dim=1)


# --- decoder ----------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Predicts the teacher's output at asked positions from the student's tokens: a few narrow blocks."""

    def __init__(self, grid: tuple[int, int], encoder_dim: int, dim: int, depth: int, heads: int, out_dim: int):
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(
                f"decoder width {dim} (--decoder-dim) is not a multiple of its heads {heads} (--decoder-heads)"
            )
        check_size(12 * depth * dim**2, depth, math.prod(grid), "--decoder-dim, --decoder-depth")
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_position_embedding(dim, grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, out_dim)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, visible: Tensor, queried: Tensor) -> Tensor:
        """Tokens (B, 1 + V, D) of class and patches `visible` (B, V) -> predictions (B, Q, out_dim) at `queried`."""
        cls_position, patch_positions = self.pos_embed[:, :1], self.pos_embed[0, 1:]
        cls, patches = self.embed(tokens).split([1, visible.shape[1]], dim=1)
        masks = self.mask_token + patch_positions[queried]  # (B, Q, dim)
        x = torch.cat([cls + cls_position, patches + patch_positions[visible], masks], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, -queried.shape[1] :]))


# --- the method -------------------------------------------------------------------------------------------------------


class PCAEOutput(NamedTuple):
    """The loss, and what it was made of, to look at. V visible patches, R retained by the teacher."""

    loss: Tensor  # scalar
    visible: Tensor  # (B, V) patch ids the student saw
    masked: Tensor  # (B, N - V) patch ids the teacher saw
    retained: Tensor  # (B, R) patch ids that PTR left
    prediction: Tensor  # (B, R, D)
    target: Tensor  # (B, R, D)


class PCAE(nn.Module):
    """Progressively Compressed Auto-Encoder. `student` is what you keep; `teacher` is its moving average.

    `center`, which is not in the paper, takes from the targets the mean over all tokens of the images.
    Raises ValueError where the ratios, stages and sizes do not fit together.
    """

    def __init__(
        self,
        student: ViT,
        *,
        mask_ratio: float = 0.75,
        ptr: PTR | None = None,
        center: bool = False,
        decoder_dim: int = 512,
        decoder_depth: int = 2,
        decoder_heads: int = 16,
    ):
        super().__init__()
        self.mask_ratio = mask_ratio
        self.ptr = ptr if ptr is not None else PTR()
        self.center = center
        self.num_visible = count_visible(student.num_patches, mask_ratio)
        self.token_counts = token_counts(student.num_patches - self.num_visible, len(student.blocks), self.ptr)
        self.student = student
        self.teacher = copy.deepcopy(student).eval().requires_grad_(False)
        self.decoder = Decoder(student.grid, student.dim, decoder_dim, decoder_depth, decoder_heads, student.dim)

    def describe(self) -> str:
        """What is encoded, in words."""
        teacher = " ".join(map(str, self.token_counts))
        return f"student: {self.num_visible} visible + class token; teacher: {teacher}"

    def train(self, mode: bool = True) -> "PCAE":
        """As usual, but the teacher always stays in evaluation mode: its targets know no drop path."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor, noise: Tensor | None = None) -> PCAEOutput:
        """Images (B, C, H, W), normalised. `noise` (B, N) decides the split; by default it is drawn uniformly.

        The same noise gives the same result, unless drop path or the `random` criterion draw from torch's generator.
        """
        if noise is None:
            noise = torch.rand(len(images), self.student.num_patches, device=images.device)
        visible, masked = split_patches(noise, self.mask_ratio)
        target, retained = self.forward_teacher(images, masked)
        latent = self.student(images, visible).tokens
        prediction = self.decoder(latent, visible, retained)
        goal = target - target.mean(dim=(0, 1)) if self.center else target  # what all share says nothing of any
        return PCAEOutput(cosine_loss(prediction, goal), visible, masked, retained, prediction, target)

    @torch.no_grad()
    def forward_teacher(self, images: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised latents (B, R, D) of the masked patches that PTR retains, and their patch ids (B, R)."""
        latent, retained = self.teacher(images, masked, class_token=False, ptr=self.ptr)
        return F.layer_norm(latent.float(), latent.shape[-1:]), retained

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, once after each optimizer step.

        By lerp, which leaves equal weights equal; a product and a sum would let the fixed positions drift.
        """
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """How many of the patches stay visible: floor(N (1 - mask_ratio)). ValueError if all or none of them are."""
    num_visible = num_kept(num_patches, mask_ratio) if 0 <= mask_ratio < 1 else 0
    if not 0 < num_visible < num_patches:
        raise ValueError(
            f"mask ratio {mask_ratio:g} (--mask-ratio) must be in [0, 1) and leave at least one of the "
            f"{num_patches} patches visible and one masked"
        )
    return num_visible


def split_patches(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Split the patches at random by `noise` (B, N): the floor(N (1 - mask_ratio)) smallest are visible.

    Returns patch ids: visible (B, V), masked (B, N - V).
    """
    order = noise.argsort(dim=1)
    num_visible = count_visible(noise.shape[1], mask_ratio)
    return order[:, :num_visible], order[:, num_visible:]


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - mean cosine similarity over tokens (B, R, D), in float32: 0 is perfect, about 1 is the start."""
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


@torch.no_grad()
def mean_direction(tokens: Tensor) -> Tensor:
    """The mean (D,) of the unit vectors of tokens (B, R, D): short if they point everywhere, long if all in one way."""
    return F.normalize(tokens.float(), dim=-1).mean(dim=(0, 1))


def spread(direction: Tensor) -> Tensor:
    """Standard deviation of unit vectors around their mean (D,), over all directions: sqrt(1 - |mean|^2).

    About 1: they point everywhere. 0: all in one direction, which is what a collapsed teacher or predictor looks like.
    """
    return (1 - direction.square().sum()).clamp(min=0).sqrt()


# --- classification ---------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A ViT over whole images with a linear head on one pooled vector; PTR spares the class token (panel b).

    Where the layers of norm are, in timm's names:
        pool="mean"   the mean of the patch tokens that PTR left, then `fc_norm` (the paper, MAE)
        pool="class"  the encoder's `norm`, then the class token (DeiT)
        frozen=True   the encoder's `norm`, pooling, BatchNorm without parameters: a linear probe, only `head` trains
    `encoder` becomes a part of it: its positions become trainable, or if `frozen` nothing of it is.
    """

    def __init__(
        self, encoder: ViT, num_classes: int, *, pool: str = "mean", frozen: bool = False, ptr: PTR | None = None
    ):
        super().__init__()
        self.encoder, self.pool, self.frozen, self.ptr = encoder, pool, frozen, ptr
        encoder.pos_embed.requires_grad_()
        if frozen:
            encoder.requires_grad_(False).eval()
            self.fc_norm = nn.BatchNorm1d(encoder.dim, affine=False, eps=1e-6)
        elif pool == "mean":
            encoder.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(encoder.dim, eps=1e-6)
        else:
            self.fc_norm = nn.Identity()
        self.head = nn.Linear(encoder.dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # as in MAE: logits start at zero
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> "Classifier":
        """As usual, but a frozen encoder stays in evaluation mode: no drop path in its features."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised -> logits (B, classes)."""
        tokens = self.encoder(images, ptr=self.ptr).tokens
        return self.head(self.fc_norm(pool(tokens, self.pool)))


# --- weights from files -----------------------------------------------------------------------------------------------

WRAPPERS = ("module.", "_orig_mod.", "backbone.", "encoder.")  # what DDP, torch.compile, DINO and we put before a name
MOCO = {"student": "base_encoder.", "teacher": "momentum_encoder."}
# Names that begin like this and that our ViT does not have would change what an encoder computes.
ESSENTIAL = (
    "blocks.", "patch_embed.", "norm", "cls_token", "pos_embed", "dist_token", "reg_token", "register_tokens",
    "rel_pos", "rope",
)  # fmt: skip


def find_weights(checkpoint: dict[str, Any], weights: str = "student") -> dict[str, Tensor]:
    """The tensors of a checkpoint by timm's names, whatever it wraps them in.

    Looks for the `weights` (`student` or `teacher`) of ours, DINO's and MoCo v3's files, else under `model` (MAE, DeiT)
    or `state_dict` (timm), else takes the checkpoint for the tensors themselves. Raises ValueError.
    """
    places = [key for key in (weights, "model", "state_dict") if key in checkpoint]
    other = {"student": "teacher", "teacher": "student"}[weights]
    if not places and other in checkpoint:
        raise ValueError(f"it holds the weights of the {other} alone: use --weights {other}")
    found = checkpoint[places[0]] if places else checkpoint
    if not isinstance(found, dict):
        raise ValueError("it holds no weights by name")
    tensors = {}
    for name, value in found.items():
        while wrapper := next((prefix for prefix in WRAPPERS if str(name).startswith(prefix)), None):
            name = name.removeprefix(wrapper)
        if isinstance(value, Tensor):
            tensors[name] = value
    moco = {name.removeprefix(MOCO[weights]): t for name, t in tensors.items() if name.startswith(MOCO[weights])}
    if weights == "teacher" and not moco and "teacher" not in checkpoint:
        raise ValueError("it holds one set of weights and no teacher's: use --weights student")
    return moco or tensors


def infer_arguments(
    tensors: dict[str, Tensor], heads: int | None = None, image_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """The arguments of the ViT that these weights are of. Raises ValueError.

    They do not say how many `heads` they are for: by default as many as the usual model of this width has; nor for
    which grid: that of `image_size` (H, W) where it has as many patches, else a square one.
    """
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    absent = [name for name in needed if name not in tensors]
    if absent:
        raise ValueError(f"it is not a plain ViT with a class token: {', '.join(absent)} missing")
    for name, ndim in (("patch_embed.proj.weight", 4), ("pos_embed", 3)):
        if tensors[name].ndim != ndim or not tensors[name].numel():
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, which is not a plain ViT's")
    dim, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    num_patches = tensors["pos_embed"].shape[1] - 1
    grid = (math.isqrt(num_patches),) * 2
    if image_size is not None and math.prod(grid_size(image_size, patch_size)) == num_patches:
        grid = grid_size(image_size, patch_size)
    if math.prod(grid) != num_patches:
        raise ValueError(
            f"its {1 + num_patches} positions are not a class token and a square of patches (--image-size can name "
            "another grid)"
        )
    usual = {size["dim"]: size["heads"] for size in MODELS.values()}
    if heads is None and dim not in usual:
        raise ValueError(f"its width {dim} is not a usual one: say how many heads it has (--heads)")
    return dict(
        image_size=tuple(side * patch_size for side in grid),
        patch_size=patch_size,
        channels=channels,
        dim=dim,
        depth=1 + max(int(block[1]) for name in tensors if (block := re.match(r"blocks\.(\d+)\.", name))),
        heads=heads or usual[dim],
        mlp_ratio=len(tensors["blocks.0.mlp.fc1.weight"]) / dim,
    )


def load_encoder(
    checkpoint: dict[str, Any],
    *,
    weights: str = "student",
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
    drop_path: float = 0.0,
    log: Callable[[str], None] = print,
) -> ViT:
    """The encoder in a loaded checkpoint of ours, or a public one of MAE, DINO, DeiT, MoCo v3 or timm.

    `image_size` (H, W) other than the checkpoint's resizes the positions. `log` gets a line on what matched. Raises
    ValueError where it is no plain ViT, a shape differs, or less than 90 % of the encoder's tensors are there.
    """
    tensors = find_weights(checkpoint, weights)
    if "method" in checkpoint and "encoder" in checkpoint:  # ours says what it is
        arguments = checkpoint["encoder"]
        if heads not in (None, arguments["heads"]):
            raise ValueError(f"it says itself that it has {arguments['heads']} heads, not {heads} (--heads)")
    else:
        is_moco = any("base_encoder." in name for name in checkpoint.get("state_dict") or ())
        arguments = infer_arguments(tensors, heads, image_size)
        if is_moco and heads is None and arguments["dim"] == 384:
            arguments["heads"] = 12  # its ViT-S has twice the usual number
    present = sum(tensor.numel() for tensor in tensors.values())
    if num_parameters(**arguments) > 2 * present:  # before memory is asked for
        raise ValueError(f"its weights are {present:,} numbers, much less than the ViT has that it says it is")
    encoder = ViT(**(arguments | dict(image_size=image_size or arguments["image_size"])), drop_path=drop_path)
    old_grid = grid_size(arguments["image_size"], arguments["patch_size"])
    expected = 1, 1 + math.prod(old_grid), encoder.dim
    if "pos_embed" in tensors and tensors["pos_embed"].shape != expected:
        raise ValueError(f"pos_embed is {tuple(tensors['pos_embed'].shape)} there, {expected} here")
    if old_grid != encoder.grid and "pos_embed" in tensors:
        log(f"positions resized from {' x '.join(map(str, old_grid))} to {' x '.join(map(str, encoder.grid))} patches")
        tensors = tensors | dict(pos_embed=resize_positions(tensors["pos_embed"].float(), old_grid, encoder.grid))
    take_weights(encoder, tensors, log)
    return encoder


def take_weights(encoder: ViT, tensors: dict[str, Tensor], log: Callable[[str], None] = print) -> None:
    """Copy what `tensors` have of an encoder's weights, and log it. Raises ValueError as `load_encoder` does."""
    own = encoder.state_dict()
    matched = {name: tensors[name] for name in own if name in tensors}
    missing = [name for name in own if name not in tensors]
    left_over = [name for name in tensors if name not in own]
    foreign = [name for name in left_over if name.startswith(ESSENTIAL)]
    if foreign:
        raise ValueError(f"it is not a plain ViT, but has {', '.join(foreign[:3])} besides")
    for name, tensor in matched.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} there, {tuple(own[name].shape)} here")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
    share = sum(own[name].numel() for name in matched) / sum(tensor.numel() for tensor in own.values())
    inner = [name for name in own if not name.startswith("norm.")]  # which a mean-pooled classifier lacks
    share = min(share, sum(name in matched for name in inner) / len(inner))  # biases and norms are few numbers
    if share < 0.9:
        raise ValueError(f"only {share:.0%} of the encoder is there; missing: {', '.join(missing[:5])}, ...")
    encoder.load_state_dict(matched, strict=False)

    def few(names: list[str]) -> str:
        return f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""

    log(
        f"weights {len(matched)} of {len(own)} tensors matched; {len(missing)} missing{few(missing)}; "
        f"{len(left_over)} left over{few(left_over)}"
    )


def load_classifier(
    checkpoint: dict[str, Any],
    *,
    pool: str | None = None,
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
    log: Callable[[str], None] = print,
) -> Classifier:
    """The classifier in a loaded checkpoint of `finetune.py`, or a public one. Raises ValueError.

    A public file with `fc_norm` pools the mean (MAE); one without it the class token (DeiT, timm), unless `pool` says
    otherwise.
    """
    tensors = find_weights(checkpoint)
    head = tensors.get("head.weight")
    if head is None or head.ndim != 2:
        raise ValueError("it holds an encoder alone, without the head of a classifier (head.weight)")
    if any(name.startswith("pre_logits.") for name in tensors):
        raise ValueError("its head is more than a linear layer (pre_logits)")
    top = {name: tensor for name, tensor in tensors.items() if name.startswith(("fc_norm.", "head."))}
    known = checkpoint.get("pool") or ("mean" if "fc_norm.weight" in tensors else None)
    if pool not in (None, known or pool):
        raise ValueError(f"it was made for the other way to pool (--pool {known})")
    below = {name: tensor for name, tensor in tensors.items() if name not in top}
    ours = {name: checkpoint[name] for name in ("method", "encoder") if name in checkpoint}
    encoder = load_encoder(ours | dict(model=below), image_size=image_size, heads=heads, log=log)
    model = Classifier(encoder, len(head), pool=known or "class", frozen="fc_norm.running_mean" in tensors)
    model.pool = known or pool or "class"
    bad = [name for name, tensor in top.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{bad[0]} holds NaN or infinity")
    try:
        absent = model.load_state_dict(top, strict=False).missing_keys
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[-1].strip()) from None
    absent = [name for name in absent if not name.startswith("encoder.")]
    if absent:
        raise ValueError(f"its head is not whole: {', '.join(absent)} missing")
    return model
