"""BEiT's encoder: a ViT without absolute positions, whose attention knows how far apart two patches are.

Each block adds to the attention of token i to token j a number for each head, by row(i) - row(j) and column(i) -
column(j) of their patches, from a table that is learned (Bao et al., BEiT, ICLR 2022). With a token PTR drops its bias.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model import Block, ViT


def num_distances(grid: tuple[int, int]) -> int:
    """Rows of a table for a grid of patches: all differences of rows and of columns, and three for the class token."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


@functools.lru_cache(maxsize=4)
def relative_index(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """The table's row for each pair (query, key) of class token and patches, (1 + N, 1 + N), in BEiT's order.

    Differences of rows, then of columns, from the most negative on; class to patch, patch to class, class to class.
    """
    ids = torch.arange(math.prod(grid), device=device)
    row, column = ids // grid[1], ids % grid[1]
    rows = row[:, None] - row + grid[0] - 1  # (N, N)
    columns = column[:, None] - column + grid[1] - 1
    index = F.pad(rows * (2 * grid[1] - 1) + columns, (1, 0, 1, 0))
    index[0], index[:, 0], index[0, 0] = (num_distances(grid) - i for i in (3, 2, 1))
    return index


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table (distances, heads) of one grid of patches for another one, bicubic: the farthest stay the farthest.

    BEiT's authors interpolate on a grid that is finer near zero; sizes that are alike hardly differ.
    """
    if old == new:
        return table
    patches, cls = table[:-3], table[-3:]
    patches = rearrange(patches, "(h w) d -> 1 d h w", h=2 * old[0] - 1)
    patches = F.interpolate(patches, (2 * new[0] - 1, 2 * new[1] - 1), mode="bicubic", align_corners=True)
    return torch.cat([rearrange(patches, "1 d h w -> (h w) d"), cls])


class BEiT(ViT):
    """A ViT with a `relative_position_bias_table` (distances, heads) in each block and zeros for absolute positions."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.arguments |= dict(relative_positions=True)
        del self.pos_embed
        self.register_buffer("pos_embed", torch.zeros(1, 1 + self.num_patches, self.dim), persistent=False)
        for block in self.blocks:
            table = torch.zeros(num_distances(self.grid), block.attn.heads)
            block.attn.relative_position_bias_table = nn.Parameter(table)

    def attention_bias(self, block: Block, patch_ids: Tensor, num_prefix: int, grid: tuple[int, int]) -> Tensor:
        """(B or 1, heads, num_prefix + n, num_prefix + n) of patches (B, n); for another grid the table is resized."""
        alike = patch_ids if patch_ids.stride(0) else patch_ids[:1]  # an expanded row: all images show the same
        tokens = F.pad(alike + 1, (num_prefix, 0))  # (B or 1, num_prefix + n); the class token is number 0
        index = relative_index(grid, patch_ids.device)[tokens[:, :, None], tokens[:, None, :]]
        table = resize_table(block.attn.relative_position_bias_table, self.grid, grid)
        return rearrange(table[index], "b q k h -> b h q k")


def build_encoder(arguments: dict[str, Any], drop_path: float = 0.0) -> ViT:
    """The encoder that `ViT.arguments` describe, a plain one or a BEiT."""
    arguments = dict(arguments)
    kind = BEiT if arguments.pop("relative_positions", False) else ViT
    return kind(**arguments, drop_path=drop_path)
