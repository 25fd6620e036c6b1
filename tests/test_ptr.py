"""PTR: the score against hand-computed and float64 values, the selection's invariants, the schedules' tables."""

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
    select_tokens,
    token_counts,
)

# Four tokens of lengths 5, 3, 25, 2; as unit vectors (.6, .8), (0, 1), (.96, .28), (1, 0); their mean is (.64, .52).
# Score = unit vector . mean: .384 + .416 = .8, .52, .6144 + .1456 = .76, .64. In pairs, for the last one:
# cos = .6, 0, .96, 1, mean 2.56 / 4 = .64.
TOKENS = torch.tensor([[[3.0, 4.0], [0.0, 3.0], [24.0, 7.0], [2.0, 0.0]]])
SCORES = torch.tensor([[0.8, 0.52, 0.76, 0.64]])


def random_tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def complement(ids, n):
    return [sorted(set(range(n)) - set(row)) for row in ids.tolist()]


# --- the score --------------------------------------------------------------------------------------------------------


def test_redundancy_by_hand():
    torch.testing.assert_close(redundancy(TOKENS), SCORES)


def test_redundancy_is_the_mean_of_the_cosine_matrix():
    x = random_tokens(3, 37, 24) + 0.3
    cosines = F.cosine_similarity(x.double()[:, :, None], x.double()[:, None], dim=-1)  # (B, N, N)
    torch.testing.assert_close(redundancy(x).double(), cosines.mean(dim=2), atol=1e-6, rtol=0)


def test_redundancy_of_each_image_is_its_own():
    x = random_tokens(4, 10, 8)
    torch.testing.assert_close(redundancy(x)[1:2], redundancy(x[1:2]))


def test_redundancy_of_a_zero_token_is_zero():
    x = torch.cat([torch.zeros(1, 1, 8), random_tokens(1, 5, 8)], dim=1)
    assert redundancy(x)[0, 0] == 0 and redundancy(x).isfinite().all()


def redundancy_float64(x):
    u = x.double() / x.double().norm(dim=-1, keepdim=True)
    return (u @ u.mean(dim=1, keepdim=True).mT).squeeze(-1)


def redundancy_by_matmul(x):
    u = F.normalize(x.float(), dim=-1)
    return (u @ u.mean(dim=1, keepdim=True).mT).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_redundancy_is_float32(dtype, autocast):
    x = (random_tokens(2, 147, 64) + 0.5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        score, wrong = redundancy(x), redundancy_by_matmul(x)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), redundancy_float64(x), atol=1e-6, rtol=0)
    if autocast:  # the tolerance tells the two apart
        assert (wrong.double() - redundancy_float64(x)).abs().max() > 1e-4


# --- the selection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, similarity, reverse", [(1, [1], [0]), (2, [1, 3], [0, 2]), (3, [1, 2, 3], [0, 2, 3])])
def test_select_tokens_by_hand(k, similarity, reverse):
    assert select_tokens(TOKENS, k).tolist() == [similarity]
    assert select_tokens(TOKENS, k, "reverse").tolist() == [reverse]


def test_gather_tokens():
    x, ids = random_tokens(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(gather_tokens(x, ids), torch.stack([x[0, [4, 0]], x[1, [1, 1]]]))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("ratio", [0.0, 0.29, 0.5, 0.9])
def test_kept_and_dropped_are_a_partition(criterion, ratio):
    x = random_tokens(3, 20, 8)
    out, kept = drop_tokens(x, ratio, criterion=criterion)
    assert kept.shape == (3, num_kept(20, ratio))
    assert torch.equal(out, gather_tokens(x, kept))
    for row in kept.tolist():
        assert row == sorted(set(row)) and set(row) <= set(range(20))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("criterion", ["similarity", "reverse"])
def test_permuting_the_tokens_permutes_the_selection(criterion, seed):
    x = random_tokens(1, 31, 16, seed=seed) + 0.2
    order = torch.randperm(31, generator=torch.Generator().manual_seed(seed))
    _, kept = drop_tokens(x, 0.5, criterion=criterion)
    _, kept_permuted = drop_tokens(x[:, order], 0.5, criterion=criterion)
    assert order[kept_permuted[0]].sort().values.tolist() == kept[0].tolist()


@pytest.mark.parametrize("criterion", ["similarity", "reverse"])
@pytest.mark.parametrize("num_prefix", [1, 3])
def test_prefix_is_protected(num_prefix, criterion):
    tokens = random_tokens(4, 20, 8) + 0.2
    without, expected = drop_tokens(tokens, 0.5, criterion=criterion)
    # like the tokens, opposite to them, and huge: if it were scored or in the mean, one of these would show
    like = tokens.mean(dim=1, keepdim=True).expand(-1, num_prefix, -1)
    for prefix in (like, -like, 1e4 * random_tokens(4, num_prefix, 8, seed=1)):
        out, kept = drop_tokens(torch.cat([prefix, tokens], dim=1), 0.5, num_prefix, criterion)
        assert torch.equal(kept, expected)
        assert torch.equal(out, torch.cat([prefix, without], dim=1))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_drop_ratio_zero_is_the_identity(num_prefix, criterion):
    x = random_tokens(2, 17, 8)
    out, kept = drop_tokens(x, 0.0, num_prefix, criterion)
    assert torch.equal(out, x)
    assert torch.equal(kept, torch.arange(17 - num_prefix).expand(2, -1))


def test_reverse_is_the_complement_of_similarity():
    x = random_tokens(3, 20, 8)
    _, kept = drop_tokens(x, 0.5)
    _, reverse = drop_tokens(x, 0.5, criterion="reverse")
    assert reverse.tolist() == complement(kept, 20)


def test_random_ignores_the_tokens():
    x = random_tokens(2, 40, 8) + 0.2
    torch.manual_seed(0)
    draws = [drop_tokens(x, 0.5, criterion="random")[1] for _ in range(200)]
    _, kept = drop_tokens(x, 0.5)
    assert all(draw.shape == kept.shape for draw in draws)
    assert not any(torch.equal(draw, kept) for draw in draws)
    assert not torch.equal(draws[0][0], draws[0][1]), "each image draws for itself"
    often = torch.stack(draws).flatten().bincount(minlength=40) / 400  # how often each token stays: half of the time
    assert (often - 0.5).abs().max() < 0.12


def test_gradient_flows_through_kept_tokens_only():
    x = random_tokens(2, 11, 8).requires_grad_()
    out, kept = drop_tokens(x, 0.5, num_prefix=1)
    out.sum().backward()
    expected = torch.zeros_like(x)
    expected[:, 0] = 1
    expected.scatter_(1, (kept + 1)[..., None].expand(-1, -1, 8), 1.0)
    assert torch.equal(x.grad, expected)


def test_selection_keeps_nothing_for_a_backward_pass():
    x, saved = random_tokens(2, 11, 8).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        select_tokens(x, 5)
    assert not saved


# --- how many ---------------------------------------------------------------------------------------------------------


def test_num_kept_is_guarded_against_float_error():
    assert int(100 * (1 - 0.9)) == 9 and num_kept(100, 0.9) == 10


def test_num_kept_equals_exact_arithmetic():
    ratios = [str(k / 100) for k in range(100)] + ["0.125", "0.415", "0.536", "0.667", "0.875", "0.999"]
    for ratio in ratios:
        rest = 1 - Fraction(ratio)
        for n in range(1025):
            assert num_kept(n, float(ratio)) == math.floor(n * rest), (n, ratio)


def test_num_kept_of_a_ratio_given_as_what_is_kept():
    for k in range(1, 101):
        assert num_kept(100, 1 - k / 100) == k
        assert num_kept(1000, 1 - k / 100) == 10 * k


# --- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "depth, stages, at, blocks",
    [
        (12, 3, "start", (0, 4, 8)),
        (12, 3, "late", (3, 7, 11)),
        (12, 3, "front", (0, 1, 2)),
        (12, 1, "start", (0,)),
        (12, 1, "late", (11,)),
        (12, 5, "start", (0, 2, 4, 7, 9)),
        (12, 5, "late", (1, 3, 6, 8, 11)),
        (12, 6, "start", (0, 2, 4, 6, 8, 10)),
        (24, 3, "start", (0, 8, 16)),
        (32, 3, "start", (0, 10, 21)),
        (32, 6, "start", (0, 5, 10, 16, 21, 26)),
        (12, 0, "start", ()),
    ],
)
def test_drop_blocks_table(depth, stages, at, blocks):
    assert drop_blocks(depth, stages, at) == blocks


def test_drop_blocks_default_is_the_papers():
    assert drop_blocks(12, 3) == drop_blocks(12, 3, "start")


@pytest.mark.parametrize("at", PLACEMENTS)
def test_drop_blocks_fit_every_depth(at):
    for depth in range(1, 33):
        for stages in range(depth + 1):
            blocks = drop_blocks(depth, stages, at)
            assert len(set(blocks)) == stages
            assert list(blocks) == sorted(blocks)
            assert all(0 <= block < depth for block in blocks)
            if stages and at == "start":
                assert blocks == tuple(math.floor(Fraction(i * depth, stages)) for i in range(stages))
            if stages and at == "late":
                assert blocks[-1] == depth - 1


def test_token_counts_table():
    ptr = PTR(drop_blocks(12, 3), 0.5)
    assert token_counts(147, 12, ptr) == [147, 73, 73, 73, 73, 36, 36, 36, 36, 18, 18, 18, 18]
    assert token_counts(147, 12, PTR((3, 7, 11), 0.5)) == [147] * 4 + [73] * 4 + [36] * 4 + [18]
    assert token_counts(147, 12, PTR()) == [147] * 13
    assert token_counts(10, 2, PTR((1, 0), 0.5)) == [10, 5, 2], "the order of the blocks says nothing"


@pytest.mark.parametrize(
    "stages, ratio, final",
    [(1, 0.875, 18), (3, 0.5, 18), (6, 0.29, 17), (12, 0.16, 16)]  # the poster's Table 6
    + [(3, 0.37, 35), (3, 0.415, 28), (3, 0.47, 21), (3, 0.5, 18), (3, 0.536, 14)],  # Table 7
)
def test_token_counts_of_the_posters_ablations(stages, ratio, final):
    assert token_counts(147, 12, PTR(drop_blocks(12, stages), ratio))[-1] == final


def test_token_counts_is_what_drop_tokens_does():
    ptr, x, counts = PTR(drop_blocks(12, 5), 0.29), random_tokens(2, 50, 4), []
    for i in range(12):
        counts.append(x.shape[1])
        if i in ptr.blocks:
            x, _ = drop_tokens(x, ptr.drop_ratio)
    assert token_counts(50, 12, ptr) == [*counts, x.shape[1]]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.nan])
def test_drop_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match="--drop-ratio"):
        PTR((0,), ratio)


def test_unknown_criterion():
    with pytest.raises(ValueError, match="--criterion.*similarity, random, reverse.*'best'"):
        PTR((0,), 0.5, "best")


@pytest.mark.parametrize("blocks", [(0, 4, 4), (-1, 3)])
def test_duplicate_or_negative_blocks(blocks):
    with pytest.raises(ValueError, match="--drop-blocks"):
        PTR(blocks, 0.5)


@pytest.mark.parametrize("at", PLACEMENTS)
@pytest.mark.parametrize("stages", [-1, 13])
def test_stages_do_not_fit_the_depth(stages, at):
    with pytest.raises(ValueError, match="--drop-stages.*12 blocks"):
        drop_blocks(12, stages, at)


def test_unknown_placement():
    with pytest.raises(ValueError, match="--drop-at.*'middle'"):
        drop_blocks(12, 3, "middle")


@pytest.mark.parametrize("block", [12, 40])
def test_block_that_is_not_there(block):
    with pytest.raises(ValueError, match="--drop-blocks.*12 blocks"):
        token_counts(147, 12, PTR((0, block), 0.5))


def test_no_token_left():
    assert token_counts(8, 12, PTR((0, 4, 8), 0.5))[-1] == 1
    with pytest.raises(ValueError, match="no token.*--drop-ratio"):
        token_counts(7, 12, PTR((0, 4, 8), 0.5))
