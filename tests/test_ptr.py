"""PTR: redundancy by hand and in float64, properties of the selection by any criterion, schedules as tables."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from ptr import (
    CRITERIA,
    PLACEMENTS,
    PTR,
    drop_blocks,
    drop_tokens,
    gather_tokens,
    num_kept,
    redundancy,
    scatter_tokens,
    select_tokens,
    token_counts,
)

# Tokens of length 5, 3, 25, 2; unit vectors (0.6, 0.8), (0, 1), (0.96, 0.28), (1, 0); their mean is (0.64, 0.52).
TOKENS = torch.tensor([[[3.0, 4.0], [0.0, 3.0], [24.0, 7.0], [2.0, 0.0]]])

every_criterion = pytest.mark.parametrize("criterion", CRITERIA)


def random_tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drop(*args):
    """Call `drop_tokens` with a seeded generator, so the random criterion draws the same scores each time."""
    torch.manual_seed(0)
    return drop_tokens(*args)


def test_redundancy_by_hand():
    torch.testing.assert_close(redundancy(TOKENS), torch.tensor([[0.384 + 0.416, 0.52, 0.6144 + 0.1456, 0.64]]))


def test_redundancy_is_the_mean_of_the_cosine_matrix():
    x = random_tokens(3, 37, 24) + 0.3
    x[:, 5] = 0  # a token without a direction scores zero
    cosines = F.cosine_similarity(x.double()[:, :, None], x.double()[:, None], dim=-1)  # (B, N, N)
    torch.testing.assert_close(redundancy(x).double(), cosines.mean(dim=2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_redundancy_is_float32_under_autocast(dtype):
    x = (random_tokens(2, 147, 64) + 0.5).to(dtype)
    u = x.double() / x.double().norm(dim=-1, keepdim=True)
    exact = (u @ u.mean(dim=1, keepdim=True).mT).squeeze(-1)
    with torch.autocast("cpu", torch.bfloat16):
        score, u = redundancy(x), F.normalize(x.float(), dim=-1)
        rounded = (u @ u.mean(dim=1, keepdim=True).mT).squeeze(-1)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), exact, atol=1e-6, rtol=0)
    assert (rounded - exact).abs().max() > 1e-4, "the tolerance distinguishes the two"


@pytest.mark.parametrize("k, similarity, reverse", [(1, [1], [0]), (2, [1, 3], [0, 2]), (3, [1, 2, 3], [0, 2, 3])])
def test_selection_by_hand(k, similarity, reverse):
    assert select_tokens(TOKENS, k).tolist() == [similarity]
    assert select_tokens(TOKENS, k, "reverse").tolist() == [reverse]


def test_gather_and_scatter():
    x, ids = random_tokens(2, 5, 3), torch.tensor([[4, 0], [1, 3]])
    picked = gather_tokens(x, ids)
    assert torch.equal(picked, torch.stack([x[0, [4, 0]], x[1, [1, 3]]]))
    back = scatter_tokens(torch.zeros_like(x), picked.double(), ids)  # converted to the precision of x
    assert torch.equal(gather_tokens(back, ids), picked) and not back[0, 1:4].any() and not back[1, ::2].any()


@every_criterion
@pytest.mark.parametrize("num_prefix", [0, 1])
@pytest.mark.parametrize("ratio", [0.0, 0.29, 0.9])
def test_kept_tokens_keep_their_order(ratio, num_prefix, criterion):
    x = random_tokens(3, num_prefix + 20, 8)
    out, kept = drop_tokens(x, ratio, num_prefix, criterion)
    assert kept.shape == (3, num_kept(20, ratio)) and all(row == sorted(set(row)) for row in kept.tolist())
    assert torch.equal(out, torch.cat([x[:, :num_prefix], gather_tokens(x[:, num_prefix:], kept)], dim=1))
    assert ratio or torch.equal(out, x), "a ratio of 0 is the identity"


@every_criterion
def test_permuted_tokens_permute_the_selection(criterion):
    """The selection also does not depend on other images. Criteria that draw random numbers are skipped."""
    x = random_tokens(4, 31, 16) + 0.2
    order = torch.randperm(31, generator=torch.Generator().manual_seed(1))
    (_, kept), (_, permuted), (_, alone) = (drop(y, 0.5, 0, criterion) for y in (x, x[:, order], x[2:3]))
    if torch.equal(drop_tokens(x, 0.5, 0, criterion)[1], kept):  # deterministic criteria
        assert torch.equal(order[permuted].sort(dim=1).values, kept) and torch.equal(alone, kept[2:3])


@every_criterion
@pytest.mark.parametrize("num_prefix", [1, 3])
def test_prefix_is_protected(num_prefix, criterion):
    tokens = random_tokens(4, 20, 8) + 0.2
    without, expected = drop(tokens, 0.5, 0, criterion)
    # similar, opposite and huge prefixes: one would change the result if the prefix were scored or in the mean
    like = tokens.mean(dim=1, keepdim=True).expand(-1, num_prefix, -1)
    for prefix in (like, -like, 1e4 * random_tokens(4, num_prefix, 8, seed=1)):
        out, kept = drop(torch.cat([prefix, tokens], dim=1), 0.5, num_prefix, criterion)
        assert torch.equal(kept, expected) and torch.equal(out, torch.cat([prefix, without], dim=1))


def test_reverse_is_the_complement_of_similarity():
    x = random_tokens(3, 20, 8)
    both = torch.cat([select_tokens(x, 10), select_tokens(x, 10, "reverse")], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(20).expand(3, -1))


def test_random_keeps_all_tokens_equally_often():
    torch.manual_seed(0)
    kept = torch.stack([drop_tokens(random_tokens(2, 40, 8) + 0.2, 0.5, 0, "random")[1] for _ in range(200)])
    assert not torch.equal(kept[0, 0], kept[0, 1]), "images draw independently"
    often = kept.flatten().bincount(minlength=40) / 400  # 0.5, with a standard deviation of 0.025
    assert (often - 0.5).abs().max() < 0.12


def test_gradient_flows_through_kept_tokens_only():
    x = random_tokens(2, 11, 8).requires_grad_()
    out, kept = drop_tokens(x, 0.5, 1)
    out.sum().backward()
    passed = torch.eye(1, 11).repeat(2, 1).scatter(1, kept + 1, 1)  # (B, N), including the prefix
    assert torch.equal(x.grad, passed[..., None].expand_as(x))


def test_num_kept_equals_exact_arithmetic():
    assert int(100 * (1 - 0.9)) == 9 and num_kept(100, 0.9) == 10, "the reason to guard the floor"
    for ratio in [f"{k / 100}" for k in range(100)] + ["0.125", "0.415", "0.536", "0.667", "0.875", "0.999"]:
        for n in range(1025):
            assert num_kept(n, float(ratio)) == math.floor(n * (1 - Fraction(ratio))), (n, ratio)


@pytest.mark.parametrize(
    "depth, stages, at, blocks",
    [
        (12, 3, "start", (0, 4, 8)),
        (12, 3, "late", (3, 7, 11)),
        (12, 3, "front", (0, 1, 2)),
        (12, 5, "start", (0, 2, 4, 7, 9)),
        (12, 5, "late", (1, 3, 6, 8, 11)),
        (32, 3, "start", (0, 10, 21)),
        (24, 3, "start", (0, 8, 16)),
        (12, 12, "start", tuple(range(12))),
        (12, 1, "late", (11,)),
        (12, 0, "start", ()),
    ],
)
def test_drop_blocks(depth, stages, at, blocks):
    assert drop_blocks(depth, stages, at) == blocks
    assert at != "start" or drop_blocks(depth, stages) == blocks, "the default is the paper's"


@pytest.mark.parametrize("at", PLACEMENTS)
def test_drop_blocks_fit_every_depth(at):
    for depth in range(1, 33):
        for stages in range(depth + 1):
            blocks = drop_blocks(depth, stages, at)
            assert len(blocks) == stages and list(blocks) == sorted(set(blocks)) and set(blocks) <= set(range(depth))


@pytest.mark.parametrize(
    "stages, ratio, final",
    [(1, 0.875, 18), (3, 0.5, 18), (6, 0.29, 17), (12, 0.16, 16)]  # the poster's Table 6
    + [(3, 0.37, 35), (3, 0.415, 28), (3, 0.47, 21), (3, 0.536, 14)],  # Table 7
)
def test_token_counts_of_the_posters_ablations(stages, ratio, final):
    assert token_counts(147, 12, PTR(drop_blocks(12, stages), ratio))[-1] == final


@pytest.mark.parametrize("ptr", [PTR(), PTR(drop_blocks(12, 5), 0.29), PTR((11, 0, 3), 0.5)])
def test_token_counts_equal_those_of_drop_tokens(ptr):
    x, counts = random_tokens(2, 50, 4), []
    for i in range(12):
        counts.append(x.shape[1])
        if i in ptr.blocks:
            x, _ = drop_tokens(x, ptr.drop_ratio)
    assert token_counts(50, 12, ptr) == [*counts, x.shape[1]]


@pytest.mark.parametrize(
    "impossible",
    [
        lambda: PTR((0,), -0.1),
        lambda: PTR((0,), 1.0),
        lambda: PTR((0,), math.nan),
        lambda: PTR((0, 4, 4), 0.5),
        lambda: PTR((-1, 3), 0.5),
        lambda: drop_blocks(12, -1),
        lambda: drop_blocks(12, 13, "late"),
        lambda: drop_blocks(12, 13, "front"),
        lambda: token_counts(147, 12, PTR((0, 12), 0.5)),  # a block that does not exist
        lambda: token_counts(7, 12, PTR((0, 4, 8), 0.5)),  # 7, 3, 1, 0 tokens
    ],
)
def test_invalid_values(impossible):
    with pytest.raises(ValueError):
        impossible()
