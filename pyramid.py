"""Backbone of detection: a plain ViT with global attention and a feature pyramid."""

import functools
import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from model import NO_PTR, ViT, sincos_position_embedding
from ptr import PTR, scatter_tokens
from weights import resize_positions

STRIDES = (4, 8, 16, 32)  # of the pyramid's maps, for all patch sizes


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def resample(dim: int, patch_size: int, stride: int) -> nn.Sequential:
    """Build layers that resample a map from one cell per patch to one cell per `stride` pixels; identity if equal."""
    layers: list[nn.Module] = []
    for i in range(round(math.log2(patch_size / stride))):
        layers += [LayerNorm2d(dim), nn.GELU()] if i else []
        layers.append(nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2))
    if stride > patch_size:
        layers.append(nn.MaxPool2d(stride // patch_size))
    return nn.Sequential(*layers)


def has_learned_positions(encoder: ViT) -> bool:
    """Return whether an encoder's positions differ from the fixed sine-cosine ones (a BEiT's are zeros, so True)."""
    return not torch.allclose(encoder.pos_embed, sincos_position_embedding(encoder.dim, encoder.grid), atol=1e-3)


@functools.lru_cache(maxsize=4)
def sincos_table(dim: int, side: int, device: torch.device) -> Tensor:
    """Return positions (1 + side * side, D) of the class token and a square grid of patches."""
    return sincos_position_embedding(dim, (side, side))[0].to(device)


class ViTPyramid(nn.Module):
    """A ViT and a feature pyramid on four of its blocks. Raises ValueError if the patch size is not a power of 2.

    The ViT encodes each image without its padding, on its own grid, so tokens do not depend on other images in the
    batch. The pyramid's convolutions see zeros beyond the image. Images with the same grid are encoded together.
    Dropped tokens skip the later blocks and return to their places before the pyramid (like preserved tokens in SViT,
    WACV 2024), so its maps are complete. Modifies `encoder` in place: removes the final norm, because a module without
    a gradient would break DDP.
    """

    def __init__(self, encoder: ViT, channels: int, *, learned_positions: bool = False):
        super().__init__()
        self.encoder, self.out_channels, self.learned_positions = encoder, channels, learned_positions
        encoder.norm = nn.Identity()
        if isinstance(encoder.pos_embed, nn.Parameter):  # a buffer of zeros in BEiT
            encoder.pos_embed.requires_grad_(learned_positions)
        depth = len(encoder.blocks)
        self.taps = [max(1, round(depth * part)) - 1 for part in (1 / 3, 1 / 2, 2 / 3, 1)]  # 3, 5, 7, 11 of 12
        if encoder.patch_size & (encoder.patch_size - 1):
            raise ValueError(f"the patch size {encoder.patch_size} is not a power of 2, which the pyramid needs")
        self.resample = nn.ModuleList(resample(encoder.dim, encoder.patch_size, stride) for stride in STRIDES)
        self.fpn = FeaturePyramidNetwork([encoder.dim] * 4, channels, LastLevelMaxPool(), norm_layer=LayerNorm2d)

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]] | None = None, ptr: PTR = NO_PTR
    ) -> dict[str, Tensor]:
        """Map padded images (B, C, H, W) of `sizes` (h, w) to float32 maps (B, channels, H / stride, W / stride).

        The maps of STRIDES are named "0" to "3". "pool" has half the size of "3". H and W must be multiples of 32 and
        of the patch size.
        """
        p = self.encoder.patch_size
        grids = [(math.ceil(h / p), math.ceil(w / p)) for h, w in sizes or [images.shape[-2:]] * len(images)]
        shape = len(images), self.encoder.dim, images.shape[2] // p, images.shape[3] // p
        maps = [images.new_zeros(shape) for _ in self.taps]  # zero in the padding
        for rows, columns in dict.fromkeys(grids):
            chosen = [i for i, grid in enumerate(grids) if grid == (rows, columns)]
            tapped = self.tapped_tokens(images[chosen, :, : rows * p, : columns * p], (rows, columns), ptr)
            for x, tokens in zip(maps, tapped, strict=True):
                x[chosen, :, :rows, :columns] = rearrange(tokens, "b (h w) d -> b d h w", h=rows).to(x.dtype)
        maps = self.fpn({str(i): scale(x) for i, (scale, x) in enumerate(zip(self.resample, maps, strict=True))})
        return {name: x.float() for name, x in maps.items()}

    def tapped_tokens(self, images: Tensor, grid: tuple[int, int], ptr: PTR) -> list[Tensor]:
        """Return the patch tokens (B, N, D) after each tapped block; a dropped token keeps its last value."""
        positions = self.positions(grid)
        patches = self.encoder.patch_embed(images) + positions[1:]
        cls = (self.encoder.cls_token + positions[:1]).expand(len(images), -1, -1)
        ids = torch.arange(patches.shape[1], device=images.device).expand(len(images), -1)  # (B, N)
        tokens, taps = torch.cat([cls, patches], dim=1), {*self.taps, *ptr.blocks}
        encoded = self.encoder.encode(tokens, ids, ptr=ptr, taps=taps, grid=grid)
        whole, tapped = patches, []
        for block, (tokens, ids) in encoded.tapped.items():
            whole = scatter_tokens(whole, tokens[:, 1:], ids)
            tapped += [whole] * self.taps.count(block)
        return tapped

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return positions (1 + rows * columns, D) of the class token and a grid of patches.

        Sine-cosine positions count from the image's corner, so those of any grid are a corner of a larger square.
        Learned positions (DeiT, DINO, fine-tuned models) are resized instead and trained further.
        """
        if self.learned_positions:
            return resize_positions(self.encoder.pos_embed, self.encoder.grid, grid)[0]
        side = 32 * math.ceil(max(grid) / 32)  # rounded up, so few tables serve many image sizes
        table = sincos_table(self.encoder.dim, side, self.encoder.cls_token.device)
        corner = table[1:].view(side, side, -1)[: grid[0], : grid[1]]
        return torch.cat([table[:1], corner.flatten(0, 1)])


class PyramidRoIAlign(MultiScaleRoIAlign):
    """RoIAlign with fixed strides. torchvision infers them from the first batch, wrongly if its padding is large.

    A region is pooled from the map with anchors of about its size: as in the FPN paper, if anchors start at 32 pixels.
    """

    def __init__(self, output_size: int, anchor: int):
        super().__init__(["0", "1", "2", "3"], output_size, sampling_ratio=2)
        self.scales = [1 / stride for stride in STRIDES]
        levels = [int(math.log2(stride)) for stride in STRIDES]
        self.map_levels = LevelMapper(levels[0], levels[-1], canonical_scale=7 * anchor, canonical_level=4)
