"""Baselines from the same parts as PCAE: MAE (He et al., CVPR 2022) and SimMIM (Xie et al., CVPR 2022).

They differ from `model.PCAE` in input, predicted patches, target and decoder:

            encoder input                    predicted patches       target                 decoder
    SimMIM  all patches, masked ones blank   all masked              pixels                 a linear layer
    MAE     visible patches                  all masked              normalised pixels      blocks on all patches
    PCAE    visible patches                  retained                the teacher's latents  blocks on visible, retained
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Decoder, ViT, count_visible, init_weights, patchify, split_patches
from ptr import gather_tokens


class PixelOutput(NamedTuple):
    """Loss and the tensors it is computed from: V visible and M masked patches of P = C p p numbers."""

    loss: Tensor  # scalar
    visible: Tensor  # (B, V) patch ids
    masked: Tensor  # (B, M) patch ids
    prediction: Tensor  # (B, M, P)
    target: Tensor  # (B, M, P)


class MAE(nn.Module):
    """Masked autoencoder: encode the visible patches, decode all patches, predict the pixels of the masked ones.

    Its authors' decoder for ImageNet has 8 blocks of width 512. They normalise the target by the unbiased standard
    deviation. Here it is the biased one, as in PCAE: a factor of 1.0007 for patches of 16 pixels. Raises ValueError if
    sizes do not fit together.
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
        self.student = student
        num_pixels = student.channels * student.patch_size**2
        self.decoder = Decoder(student.grid, student.dim, decoder_dim, decoder_depth, decoder_heads, num_pixels)

    def describe(self) -> str:
        """Describe in one line how many tokens are encoded."""
        return f"student: {self.num_visible} visible + class token; decoder: all {self.student.num_patches}"

    def forward(self, images: Tensor, noise: Tensor | None = None) -> PixelOutput:
        """Compute the loss of normalised images (B, C, H, W); `noise` (B, N) decides the split, as in `PCAE`."""
        if noise is None:
            noise = torch.rand(len(images), self.student.num_patches, device=images.device)
        visible, masked = split_patches(noise, self.mask_ratio)
        latent = self.student(images, visible).tokens
        prediction = self.decoder(latent, visible, masked).float()
        pixels = gather_tokens(patchify(images.float(), self.student.patch_size), masked)
        target = F.layer_norm(pixels, pixels.shape[-1:], eps=1e-6)  # per patch: mean 0, standard deviation 1
        return PixelOutput(F.mse_loss(prediction, target), visible, masked, prediction, target)


class SimMIM(nn.Module):
    """Simple masked image modelling: blank out the masked patches, encode all, predict the masked pixels linearly.

    Its authors mask 60 % of the image in squares of 32 pixels. Here 75 % of the single patches are masked, as in the
    other methods. Raises ValueError for an invalid mask ratio.
    """

    def __init__(self, student: ViT, *, mask_ratio: float = 0.75):
        super().__init__()
        self.mask_ratio = mask_ratio
        self.num_visible = count_visible(student.num_patches, mask_ratio)
        self.student = student
        self.decoder = PixelHead(student.dim, student.channels * student.patch_size**2)

    def describe(self) -> str:
        """Describe in one line how many tokens are encoded."""
        masked = self.student.num_patches - self.num_visible
        return f"student: {self.num_visible} visible + {masked} mask tokens + class token"

    def forward(self, images: Tensor, noise: Tensor | None = None) -> PixelOutput:
        """Compute the loss of normalised images (B, C, H, W); `noise` (B, N) decides the split, as in `PCAE`."""
        if noise is None:
            noise = torch.rand(len(images), self.student.num_patches, device=images.device)
        visible, masked = split_patches(noise, self.mask_ratio)
        latent = self.encode(images, visible, masked)
        prediction = self.decoder.pred(latent[:, -masked.shape[1] :]).float()
        target = gather_tokens(patchify(images.float(), self.student.patch_size), masked)
        return PixelOutput(F.l1_loss(prediction, target), visible, masked, prediction, target)

    def encode(self, images: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Return latents (B, 1 + V + M, D): class token, visible patches, then a mask token at each masked position."""
        seen = self.student.embed(images, visible, class_token=True)
        blank = self.decoder.mask_token + self.student.pos_embed[0, 1:][masked]
        return self.student.encode(torch.cat([seen, blank], dim=1), torch.cat([visible, masked], dim=1)).tokens


class PixelHead(nn.Module):
    """The parts of SimMIM that are discarded after pre-training: the mask token of its encoder, and a linear layer."""

    def __init__(self, dim: int, num_pixels: int):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pred = nn.Linear(dim, num_pixels)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
