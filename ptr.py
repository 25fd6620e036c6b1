"""PTR, progressive token reduction (panel c of the poster): drop the most redundant tokens.

The functions are pure and independent of the model; the scripts' flags are at the end. Use in any transformer:

    ptr = PTR(blocks=drop_blocks(depth=12, stages=3), drop_ratio=0.5)   # after blocks 0, 4, 8
    for i, block in enumerate(blocks):
        x = block(x)
        if i in ptr.blocks:
            x, kept = drop_tokens(x, ptr.drop_ratio, num_prefix=1)

One stage *keeps* some tokens and *drops* the others. The *prefix* (the class token) stands at the start of the sequence
and is neither scored, nor dropped, nor part of the mean.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from util import runs


def redundancy(x: Tensor) -> Tensor:
    """Return each token's mean cosine similarity to all tokens: (B, N, D) -> (B, N), in float32.

    mean_j cos(x_i, x_j) = u_i . mean_j(u_j) with u = x / |x|, so N dot products replace N^2. In half precision,
    scores at the cut would tie. Autocast runs matrix products in half precision, hence an element-wise product
    and a sum.
    """
    u = F.normalize(x.float(), dim=-1)
    return (u * u.mean(dim=1, keepdim=True)).sum(dim=-1)


# Scores (B, N) of tokens (B, N, D), by name; the lowest are kept. A new criterion is a new line.
CRITERIA = {
    "similarity": redundancy,  # drop the most redundant: the paper
    "random": lambda x: torch.rand(x.shape[:2], device=x.device),  # drop at random: the ablation
    "reverse": lambda x: -redundancy(x),  # drop the least redundant: a control that should be worse
}
PLACEMENTS = ("start", "late", "front")


@dataclass(frozen=True)
class PTR:
    """Schedule: drop the fraction `drop_ratio` of tokens after each of `blocks` (0-based). The default drops none.

    `criterion` is a name in CRITERIA. Raises ValueError for a ratio outside [0, 1) and for repeated or negative blocks.
    """

    blocks: tuple[int, ...] = ()
    drop_ratio: float = 0.0
    criterion: str = "similarity"

    def __post_init__(self):
        if not 0 <= self.drop_ratio < 1:
            raise ValueError(f"the drop ratio must be in [0, 1), got {self.drop_ratio}")
        if len(set(self.blocks)) != len(self.blocks) or min(self.blocks, default=0) < 0:
            raise ValueError(f"the blocks to drop after must be distinct and at least 0, got {list(self.blocks)}")


def num_kept(num_tokens: int, ratio: float) -> int:
    """Return the number of tokens kept at a drop ratio: floor(n (1 - ratio)).

    The added 1e-6 guards the floor against rounding: 100 * (1 - 0.9) is 9.999999999999998.
    """
    return math.floor(num_tokens * (1 - ratio) + 1e-6)


@torch.no_grad()
def select_tokens(x: Tensor, k: int, criterion: str = "similarity") -> Tensor:
    """Return indices (B, k) of the `k` tokens of (B, N, D) to keep, ascending, so that k = N is the identity."""
    kept = CRITERIA[criterion](x).topk(k, dim=1, largest=False, sorted=False).indices
    return kept.sort(dim=1).values


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens by index, per image: (B, N, D), (B, k) -> (B, k, D)."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def scatter_tokens(x: Tensor, tokens: Tensor, ids: Tensor) -> Tensor:
    """Return a copy of x (B, N, D) with `tokens` (B, k, D) at the places `ids` (B, k): the inverse of gathering."""
    return x.scatter(1, ids.unsqueeze(-1).expand_as(tokens), tokens.to(x.dtype))


def drop_tokens(
    x: Tensor, drop_ratio: float, num_prefix: int = 0, criterion: str = "similarity"
) -> tuple[Tensor, Tensor]:
    """Apply one PTR stage to tokens (B, num_prefix + N, D). The first `num_prefix` are protected.

    Returns the kept tokens (B, num_prefix + k, D) and their indices (B, k), counted without the prefix.
    """
    prefix, tokens = x[:, :num_prefix], x[:, num_prefix:]
    kept = select_tokens(tokens, num_kept(tokens.shape[1], drop_ratio), criterion)
    return torch.cat([prefix, gather_tokens(tokens, kept)], dim=1), kept


def drop_blocks(depth: int, stages: int, at: str = "start") -> tuple[int, ...]:
    """Return the blocks (0-based) after which tokens are dropped. Raises ValueError for invalid arguments.

    `start`: the first block of each of `stages` equal parts, floor(i L / S): 0, 4, 8 for L = 12, S = 3 (the paper's).
    `late`: the last block of each part: 3, 7, 11. `front`: the first blocks: 0, 1, 2.
    """
    if at not in PLACEMENTS:
        raise ValueError(f"invalid placement {at!r}: expected one of {', '.join(PLACEMENTS)}")
    if not 0 <= stages <= depth:
        raise ValueError(f"the number of drop stages must be between 0 and {depth}, the number of blocks, got {stages}")
    if at == "front":
        return tuple(range(stages))
    if at == "late":
        return tuple((i + 1) * depth // stages - 1 for i in range(stages))
    return tuple(i * depth // stages for i in range(stages))


def token_counts(num_tokens: int, depth: int, ptr: PTR) -> list[int]:
    """Return how many tokens enter each block, then how many are retained: `depth + 1` numbers, without the prefix.

    Raises ValueError if the schedule names a block that does not exist or drops all tokens.
    """
    if max(ptr.blocks, default=-1) >= depth:
        raise ValueError(f"cannot drop after blocks {list(ptr.blocks)} (0-based): the encoder has {depth} blocks")
    counts = [num_tokens]
    for i in range(depth):
        counts.append(num_kept(counts[-1], ptr.drop_ratio) if i in ptr.blocks else counts[-1])
    if counts[-1] < 1:
        raise ValueError(
            f"a drop ratio of {ptr.drop_ratio:g} after blocks {list(ptr.blocks)} drops all {num_tokens} tokens"
        )
    return counts


# --- on the command line ----------------------------------------------------------------------------------------------

# Groups of flags that a checkpoint also records. One given flag overrides the checkpoint for its whole group.
FLAG_GROUPS = (("drop_stages", "drop_at", "drop_blocks"), ("criterion",), ("drop_ratio",))
SCHEDULE = {*FLAG_GROUPS[0], *FLAG_GROUPS[1]}  # without effect at a drop ratio of 0


def add_flags(add: Callable[..., Any], before: str = "") -> None:
    """Add the flags about where and which tokens are dropped. Each script adds its own `--drop-ratio`.

    `before` names a source that overrides the defaults, for the help texts: "the checkpoint's, else ".
    """
    stages = f"number of times that PTR drops tokens, evenly spread over the blocks (default: {before}3)"
    at = "drop after the first block of each stage (start), after its last (late), or after the first blocks (front)"
    blocks = "0-based blocks to drop after, instead of --drop-stages and --drop-at"
    criterion = "drop the most redundant tokens (similarity), random ones (random), or the least redundant (reverse)"
    add("--drop-stages", type=int, default=3, metavar="N", help=stages)
    add("--drop-at", default="start", choices=PLACEMENTS, help=f"{at} (default: {before}start)")
    add("--drop-blocks", type=int, nargs="*", metavar="BLOCK", help=blocks)
    add("--criterion", default="similarity", choices=CRITERIA, help=f"{criterion} (default: {before}similarity)")


def check_flags(given: set[str], *drop_ratios: float | None) -> None:
    """End the script if flags about PTR are among the `given` ones although it is off by default."""
    if not any(drop_ratios) and "drop_ratio" not in given:
        runs.reject(given & SCHEDULE, "not used without --drop-ratio")


def from_args(args: argparse.Namespace, depth: int, drop_ratio: float) -> PTR:
    """Build the schedule that the flags describe, for `depth` blocks. Raises ValueError for invalid numbers.

    `token_counts` finds blocks that do not exist.
    """
    if not drop_ratio:
        return PTR()
    blocks = args.drop_blocks
    if blocks is None:
        blocks = drop_blocks(depth, args.drop_stages, args.drop_at)
    return PTR(tuple(blocks), drop_ratio, args.criterion)
