"""Networks, from the method down to its parts: `PCAE`, decoder, ViT encoder, classifier.

`PCAE.forward` is the method (panel a of the poster). `Classifier` is the network that fine-tuning trains (panel b).
Shapes: B images, N patches per image, n tokens in a sequence, width D. Encoder parameters have timm's names, so public
ViT weights load without a mapping (`weights.py`), and our weights load into timm.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ptr import PTR, drop_tokens, gather_tokens, num_kept, token_counts

# vit_mini is ours, for laptops. The others are the usual sizes; vit_huge is meant for patches of 14 pixels.
MODELS = {
    "vit_mini": dict(dim=64, depth=4, heads=4),
    "vit_tiny": dict(dim=192, depth=12, heads=3),
    "vit_small": dict(dim=384, depth=12, heads=6),
    "vit_base": dict(dim=768, depth=12, heads=12),
    "vit_large": dict(dim=1024, depth=24, heads=16),
    "vit_huge": dict(dim=1280, depth=32, heads=16),
}

NO_PTR = PTR()  # drops nothing

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB pixels in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)

# --- the method -------------------------------------------------------------------------------------------------------


class PCAEOutput(NamedTuple):
    """Loss and the tensors it is computed from: V visible patches, R patches retained by the teacher."""

    loss: Tensor  # scalar
    visible: Tensor  # (B, V) patch ids that the student encodes
    masked: Tensor  # (B, N - V) patch ids that the teacher encodes
    retained: Tensor  # (B, R) patch ids that the last PTR stage keeps
    prediction: Tensor  # (B, R, D)
    target: Tensor  # (B, R, D)


class PCAE(nn.Module):
    """Progressively Compressed Auto-Encoder. `student` is kept after pre-training; `teacher` is its moving average.

    Raises ValueError if ratios, stages and sizes do not fit together.
    """

    def __init__(
        self,
        student: ViT,
        *,
        mask_ratio: float = 0.75,
        ptr: PTR = NO_PTR,
        decoder_dim: int = 512,
        decoder_depth: int = 2,
        decoder_heads: int = 16,
    ):
        super().__init__()
        self.mask_ratio, self.ptr = mask_ratio, ptr
        self.num_visible = count_visible(student.num_patches, mask_ratio)
        self.token_counts = token_counts(student.num_patches - self.num_visible, len(student.blocks), self.ptr)
        self.student = student
        self.teacher = copy.deepcopy(student).eval().requires_grad_(False)
        self.decoder = Decoder(student.grid, student.dim, decoder_dim, decoder_depth, decoder_heads, student.dim)

    def describe(self) -> str:
        """Describe in one line how many tokens are encoded."""
        teacher = " ".join(map(str, self.token_counts))
        return f"student: {self.num_visible} visible + class token; teacher: {teacher}"

    def train(self, mode: bool = True) -> PCAE:
        """Set the mode of student and decoder. The teacher stays in evaluation mode: targets without drop path."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor, noise: Tensor | None = None) -> PCAEOutput:
        """Compute the loss of normalised images (B, C, H, W). `noise` (B, N), by default uniform, decides the split.

        The same noise gives the same result, unless drop path or the `random` criterion draws from torch's generator.
        """
        if noise is None:
            noise = torch.rand(len(images), self.student.num_patches, device=images.device)
        visible, masked = split_patches(noise, self.mask_ratio)
        target, retained = self.forward_teacher(images, masked)
        latent = self.student(images, visible).tokens
        prediction = self.decoder(latent, visible, retained)
        return PCAEOutput(cosine_loss(prediction, target), visible, masked, retained, prediction, target)

    @torch.no_grad()
    def forward_teacher(self, images: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised latents (B, R, D) of the masked patches that PTR retains, and their patch ids (B, R)."""
        latent, retained, _ = self.teacher(images, masked, class_token=False, ptr=self.ptr)
        return F.layer_norm(latent.float(), latent.shape[-1:]), retained

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Set teacher = momentum * teacher + (1 - momentum) * student; called once after each optimizer step.

        `lerp` leaves equal weights equal. A product and a sum would let the fixed positions drift.
        """
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """Return the number of visible patches, floor(N (1 - mask_ratio)). Raises ValueError unless 1 to N - 1."""
    num_visible = num_kept(num_patches, mask_ratio) if 0 <= mask_ratio < 1 else 0
    if not 0 < num_visible < num_patches:
        raise ValueError(
            f"invalid mask ratio {mask_ratio:g}: expected a value in [0, 1) with at least one of the "
            f"{num_patches} patches visible and one masked"
        )
    return num_visible


def split_patches(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Split the patches by `noise` (B, N): the floor(N (1 - mask_ratio)) with the smallest noise are visible.

    Returns patch ids: visible (B, V), masked (B, N - V).
    """
    order = noise.argsort(dim=1)
    num_visible = count_visible(noise.shape[1], mask_ratio)
    return order[:, :num_visible], order[:, num_visible:]


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return 1 - mean cosine similarity over tokens (B, R, D), in float32: about 1 before training, 0 if perfect."""
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


# --- decoder ----------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Transformer that predicts `out_dim` numbers per queried patch from the student's tokens of width `encoder_dim`.

    Raises ValueError unless its width `dim` is a multiple of `heads` and of 4.
    """

    def __init__(self, grid: tuple[int, int], encoder_dim: int, dim: int, depth: int, heads: int, out_dim: int):
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"the decoder width {dim} is not a multiple of the number of its attention heads, {heads}")
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_position_embedding(dim, grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, out_dim)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, visible: Tensor, queried: Tensor) -> Tensor:
        """Predict (B, Q, out_dim) at the patches `queried` (B, Q).

        `tokens` (B, 1 + V, D) are the class token and the patches `visible` (B, V).
        """
        cls_position, patch_positions = self.pos_embed[:, :1], self.pos_embed[0, 1:]
        cls, patches = self.embed(tokens).split([1, visible.shape[1]], dim=1)
        masks = self.mask_token + patch_positions[queried]  # (B, Q, dim)
        x = torch.cat([cls + cls_position, patches + patch_positions[visible], masks], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, -queried.shape[1] :]))


# --- encoder ----------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Output of an encoder: normalised tokens, and the row-major patch index of each patch token.

    `tapped` holds tokens, not normalised, and patch ids after the blocks in `taps`, before PTR drops tokens there.
    """

    tokens: Tensor  # (B, [1 +] n, D)
    patch_ids: Tensor  # (B, n)
    tapped: dict[int, tuple[Tensor, Tensor]]  # block -> (B, [1 +] m, D), (B, m)


class ViT(nn.Module):
    """Vision transformer that encodes any subset of the patches, with or without class token, with or without PTR.

    Raises ValueError if sizes do not fit together, or if images are not of `image_size` (H, W).
    """

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
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise ValueError(f"the width {dim} is not a multiple of the number of attention heads, {heads}")
        sizes = dict(dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        pixels = dict(image_size=tuple(image_size), patch_size=patch_size, channels=channels)
        statistics = dict(mean=tuple(mean), std=tuple(std))  # of its input pixels (`data.Normalize`)
        self.arguments = pixels | sizes | statistics
        self.image_size, self.patch_size, self.channels = tuple(image_size), patch_size, channels
        self.grid = grid_size(image_size, patch_size)
        self.num_patches = math.prod(self.grid)
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
        """Describe the number of parameters and patches."""
        parameters = sum(parameter.numel() for parameter in self.parameters()) / 1e6
        return f"{parameters:.1f} M parameters, {self.num_patches} patches"

    def embed(self, images: Tensor, patch_ids: Tensor, class_token: bool) -> Tensor:
        """Embed patches, add positions, maybe prepend the class token: (B, C, H, W), ids (B, n) -> (B, [1 +] n, D)."""
        if images.shape[-2:] != self.image_size:
            raise ValueError(f"expected images of {self.image_size} pixels, got {tuple(images.shape[-2:])}")
        x = self.patch_embed(images, patch_ids) + self.pos_embed[0, 1:][patch_ids]
        if class_token:
            cls = self.cls_token + self.pos_embed[:, :1]
            x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
        return x

    def forward(
        self,
        images: Tensor,
        patch_ids: Tensor | None = None,
        *,
        class_token: bool = True,
        ptr: PTR = NO_PTR,
        taps: Collection[int] = (),
    ) -> Encoded:
        """Encode the patches `patch_ids` (B, n; default: all) of images (B, C, H, W), with PTR if given.

        `taps` lists blocks (0-based) whose output is also returned, as `tapped`.
        """
        if patch_ids is None:
            patch_ids = torch.arange(self.num_patches, device=images.device).expand(len(images), -1)
        x = self.embed(images, patch_ids, class_token)
        return self.encode(x, patch_ids, num_prefix=int(class_token), ptr=ptr, taps=taps)

    def encode(
        self,
        x: Tensor,
        patch_ids: Tensor,
        *,
        num_prefix: int = 1,
        ptr: PTR = NO_PTR,
        taps: Collection[int] = (),
        grid: tuple[int, int] | None = None,
    ) -> Encoded:
        """Run the blocks on tokens (B, num_prefix + n, D) of the patches `patch_ids` (B, n); `ptr`, `taps`: see above.

        `grid` (rows, columns) is that of the images, if it differs from the encoder's own (detection).
        """
        tapped = {}
        for i, block in enumerate(self.blocks):
            x = block(x, self.attention_bias(block, patch_ids, num_prefix, grid or self.grid))
            if i in taps:
                tapped[i] = x, patch_ids
            if i in ptr.blocks:
                x, kept = drop_tokens(x, ptr.drop_ratio, num_prefix, ptr.criterion)
                patch_ids = patch_ids.gather(1, kept)
        return Encoded(self.norm(x), patch_ids, tapped)

    def attention_bias(self, block: Block, patch_ids: Tensor, num_prefix: int, grid: tuple[int, int]) -> Tensor | None:
        """Return the term added to the attention scores of a block: None here; relative positions in BEiT."""


def pool(tokens: Tensor, by: str = "mean") -> Tensor:
    """Pool tokens (B, 1 + n, D) to one vector per image (B, D): `mean` of the patch tokens, or the `class` token."""
    return tokens[:, 1:].mean(dim=1) if by == "mean" else tokens[:, 0]


# --- classification ---------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A ViT on whole images with a linear head on one pooled vector. PTR never drops the class token (panel b).

    Order of the layers before the head, in timm's names:
        pool="mean"   mean of the retained patch tokens, then `fc_norm` (the paper, MAE)
        pool="class"  `norm` of the encoder, then the class token (DeiT)
        frozen=True   `norm` of the encoder, pooling, standardisation (`fc_norm`): a linear probe, only `head` trains
    MAE's probe standardises each batch by BatchNorm. Here finetune.py computes mean and variance once, over centre
    crops of all training images.
    Modifies `encoder` in place. Its parameters become trainable, or none if `frozen`. Its `norm` becomes the identity
    in the first case.
    """

    def __init__(self, encoder: ViT, num_classes: int, *, pool: str = "mean", frozen: bool = False):
        super().__init__()
        self.encoder, self.pool, self.frozen = encoder, pool, frozen
        encoder.requires_grad_()
        if frozen:
            encoder.requires_grad_(False).eval()
            self.fc_norm = nn.BatchNorm1d(encoder.dim, affine=False, eps=1e-6)
        elif pool == "mean":
            encoder.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(encoder.dim, eps=1e-6)
        else:
            self.fc_norm = nn.Identity()
        self.head = nn.Linear(encoder.dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # as in MAE: logits start near zero
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> Classifier:
        """Set the mode. A frozen encoder and its `fc_norm` stay in evaluation mode, without drop path."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
            self.fc_norm.eval()
        return self

    def forward(self, images: Tensor, ptr: PTR = NO_PTR) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, classes)."""
        return self.head(self.fc_norm(self.features(images, ptr)))

    def features(self, images: Tensor, ptr: PTR = NO_PTR) -> Tensor:
        """Map normalised images (B, C, H, W) to pooled tokens (B, D), the input of `fc_norm`."""
        return pool(self.encoder(images, ptr=ptr).tokens, self.pool)


# --- parts of a transformer -------------------------------------------------------------------------------------------


def grid_size(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return rows and columns of patches of an image (H, W). Raises ValueError unless `patch_size` divides both."""
    height, width = image_size
    if patch_size < 1 or height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"the image size {height} x {width} is not a positive multiple of the patch size {patch_size}")
    return height // patch_size, width // patch_size


def sincos_position_embedding(dim: int, grid: tuple[int, int]) -> Tensor:
    """Return 2-D sine-cosine positions (1, 1 + rows * columns, dim): zeros for the class token, then row-major patches.

    As in MAE: the first half of the channels encodes the column, the second the row, each as sin then cos of
    position / 10000^(k / (dim / 4)), k = 0, ..., dim / 4 - 1. Raises ValueError unless 4 divides `dim`.
    """
    if dim % 4:
        raise ValueError(f"the width {dim} is not a multiple of 4, which sine-cosine positions need")
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
    """Linear projection of square patches: a convolution's weights, applied only to the given patches."""

    def __init__(self, patch_size: int, channels: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor, patch_ids: Tensor | None = None) -> Tensor:
        """Project patches: (B, C, H, W), ids (B, n; None: all) -> (B, n, D). Other patches cost nothing."""
        patches = patchify(images, self.patch_size)
        if patch_ids is not None:
            patches = gather_tokens(patches, patch_ids)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention of tokens (B, n, D). `bias` (B, heads, n, n) is added to the attention scores."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, bias)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """Two linear layers with GELU between them, on each token of (B, n, D)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)), each branch under drop path.

    `bias` (B, heads, n, n) is added to the attention scores (see `ViT.attention_bias`).
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), bias))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_weights(module: nn.Module) -> None:
    """Initialise a linear layer, or the patch convolution as one, as in MAE: Xavier-uniform weights, zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))
        nn.init.zeros_(module.bias)
