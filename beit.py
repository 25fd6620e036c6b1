"""BEiT's encoder (Bao et al., ICLR 2022): a ViT with relative instead of absolute positions.

Each block has a learned table with one number per head and distance of two patches. The entry for (row(i) - row(j),
column(i) - column(j)) is added to the attention score of token i for token j. Dropping a token also drops its entries.
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
    """Return the number of table rows for a grid: all pairs of row and column differences, 3 for the class token."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


@functools.lru_cache(maxsize=4)
def relative_index(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return the table row of each pair (query, key) of class token and patches, (1 + N, 1 + N), in BEiT's order.

    Rows: row difference, then column difference, ascending; class to patch, patch to class, class to class.
    """
    ids = torch.arange(math.prod(grid), device=device)
    row, column = ids // grid[1], ids % grid[1]
    rows = row[:, None] - row + grid[0] - 1  # (N, N)
    columns = column[:, None] - column + grid[1] - 1
    index = F.pad(rows * (2 * grid[1] - 1) + columns, (1, 0, 1, 0))
    index[0], index[:, 0], index[0, 0] = (num_distances(grid) - i for i in (3, 2, 1))
    return index


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a table (distances, heads) from one grid of patches to another, bicubic, with the ends aligned.

    BEiT's authors interpolate on a grid that is finer near zero. For similar sizes the difference is small.
    """
    if old == new:
        return table
    patches, cls = table[:-3], table[-3:]
    patches = rearrange(patches, "(h w) d -> 1 d h w", h=2 * old[0] - 1)
    patches = F.interpolate(patches, (2 * new[0] - 1, 2 * new[1] - 1), mode="bicubic", align_corners=True)
    return torch.cat([rearrange(patches, "1 d h w -> (h w) d"), cls])


class BEiT(ViT):
    """ViT with a `relative_position_bias_table` (distances, heads) in each block and zeros as absolute positions."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.arguments |= dict(relative_positions=True)
        del self.pos_embed
        self.register_buffer("pos_embed", torch.zeros(1, 1 + self.num_patches, self.dim), persistent=False)
        for block in self.blocks:
            table = torch.zeros(num_distances(self.grid), block.attn.heads)
            block.attn.relative_position_bias_table = nn.Parameter(table)

    def attention_bias(self, block: Block, patch_ids: Tensor, num_prefix: int, grid: tuple[int, int]) -> Tensor:
        """Return the bias (B, heads, t, t) of t = num_prefix + n tokens; the table is resized to `grid`.

        B is 1 if all images have the same patches.
        """
        alike = patch_ids if patch_ids.stride(0) else patch_ids[:1]  # stride 0: all images have the same patches
        tokens = F.pad(alike + 1, (num_prefix, 0))  # (B or 1, num_prefix + n); the class token is number 0
        index = relative_index(grid, patch_ids.device)[tokens[:, :, None], tokens[:, None, :]]
        table = resize_table(block.attn.relative_position_bias_table, self.grid, grid)
        return rearrange(table[index], "b q k h -> b h q k")


def build_encoder(arguments: dict[str, Any], drop_path: float = 0.0) -> ViT:
    """Build the encoder that `ViT.arguments` describe, a plain ViT or a BEiT, with new weights."""
    arguments = dict(arguments)
    kind = BEiT if arguments.pop("relative_positions", False) else ViT
    return kind(**arguments, drop_path=drop_path)
