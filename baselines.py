"""What PCAE is compared with: MAE (He et al., CVPR 2022) and SimMIM (Xie et al., CVPR 2022), made of the same parts.

Read each beside `model.PCAE`, which differs from them in what it predicts, and where:

            encoder sees                     predicts, at            target                 decoder
    SimMIM  all patches, masked ones blank   all masked patches      pixels                 a linear layer
    MAE     visible patches                  all masked patches      normalised pixels      blocks over all patches
    PCAE    visible patches                  what its teacher keeps  the teacher's latents  blocks over those it needs
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Decoder, ViT, count_visible, init_weights, patchify, split_patches
from ptr import gather_tokens


class PixelOutput(NamedTuple):
    """The loss, and what it was made of, to look at. V visible and M masked patches of P = C p p numbers."""

    loss: Tensor  # scalar
    visible: Tensor  # (B, V) patch ids
    masked: Tensor  # (B, M) patch ids
    prediction: Tensor  # (B, M, P)
    target: Tensor  # (B, M, P)


class MAE(nn.Module):
    """Masked autoencoder: encode the visible patches, decode all of them, compare the pixels of the masked ones.

    Its authors' decoder for ImageNet is 8 blocks of width 512. They divide by the deviation with n - 1, here it is that
    of n numbers, as in PCAE's target: with patches of 16 pixels a factor of 1.0007. Raises ValueError where sizes do
    not fit together.
    """

    def __init__(
        self,
        student: ViT,
        *,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ):
        super().__init__()
        self.mask_ratio = mask_ratio
        self.num_visible = count_visible(student.num_patches, mask_ratio)
        self.patch_size = student.patch_embed.patch_size
        num_pixels = student.arguments["channels"] * self.patch_size**2
        self.student = student
        self.decoder = Decoder(student.grid, student.dim, decoder_dim, decoder_depth, decoder_heads, num_pixels)

    def describe(self) -> str:
        """What is encoded, in words."""
        return f"student: {self.num_visible} visible + class token; decoder: all {self.student.num_patches}"

    def forward(self, images: Tensor, noise: Tensor | None = None) -> PixelOutput:
        """Images (B, C, H, W), normalised; `noise` (B, N) decides the split, as in `PCAE`."""
        if noise is None:
            noise = torch.rand(len(images), self.student.num_patches, device=images.device)
        visible, masked = split_patches(noise, self.mask_ratio)
        latent = self.student(images, visible).tokens
        prediction = self.decoder(latent, visible, masked).float()
        pixels = gather_tokens(patchify(images.float(), self.patch_size), masked)
        target = F.layer_norm(pixels, pixels.shape[-1:], eps=1e-6)  # each patch with mean 0 and deviation 1
        return PixelOutput(F.mse_loss(prediction, target), visible, masked, prediction, target)


class SimMIM(nn.Module):
    """Simple masked image modelling: blank out the masked patches, encode all, read their pixels off linearly.

    Its authors mask 60 % of the image in squares of 32 pixels; here it is 75 % of the single patches, as in the other
    methods. Raises ValueError where the mask ratio leaves nothing to see or to predict.
    """

    def __init__(self, student: ViT, *, mask_ratio: float = 0.75):
        super().__init__()
        self.mask_ratio = mask_ratio
        self.num_visible = count_visible(student.num_patches, mask_ratio)
        self.patch_size = student.patch_embed.patch_size
        self.student = student
        self.decoder = PixelHead(student.dim, student.arguments["channels"] * self.patch_size**2)

    def describe(self) -> str:
        """What is encoded, in words."""
        masked = self.student.num_patches - self.num_visible
        return f"student: {self.num_visible} visible + {masked} mask tokens + class token"

    def forward(self, images: Tensor, noise: Tensor | None = None) -> PixelOutput:
        """Images (B, C, H, W), normalised; `noise` (B, N) decides the split, as in `PCAE`."""
        if noise is None:
            noise = torch.rand(len(images), self.student.num_patches, device=images.device)
        visible, masked = split_patches(noise, self.mask_ratio)
        latent = self.encode(images, visible, masked)
        prediction = self.decoder.pred(latent[:, -masked.shape[1] :]).float()
        target = gather_tokens(patchify(images.float(), self.patch_size), masked)
        return PixelOutput(F.l1_loss(prediction, target), visible, masked, prediction, target)

    def encode(self, images: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Latents (B, 1 + V + M, D): class token, visible patches, then a mask token at each masked position."""
        seen = self.student.embed(images, visible, class_token=True)
        blank = self.decoder.mask_token + self.student.pos_embed[0, 1:][masked]
        return self.student.encode(torch.cat([seen, blank], dim=1), torch.cat([visible, masked], dim=1)).tokens


class PixelHead(nn.Module):
    """What SimMIM adds to its encoder and throws away after pre-training: the encoder's mask token, a linear layer."""

    def __init__(self, dim: int, num_pixels: int):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pred = nn.Linear(dim, num_pixels)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
