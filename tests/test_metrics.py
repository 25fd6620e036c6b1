"""Metrics and costs equal plain loops, formulas of linear algebra and closed forms."""

import argparse
import time

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import data
from model import Classifier, ViT
from ptr import PTR, token_counts
from util import metrics, profiling
from util.image_files import UnreadableImage
from util.training import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def test_directions():
    """By hand: two opposite tokens, two of equal direction, two at a right angle; lengths do not matter."""
    pairs = [[3.0, 0], [-0.1, 0]], [[2.0, 0], [5, 0]], [[7.0, 0], [0, 0.2]]
    for tokens, mean, spread in zip(pairs, ([0, 0], [1, 0], [0.5, 0.5]), (1, 0, 0.5**0.5), strict=True):
        direction = metrics.mean_direction(torch.tensor([tokens]))
        assert direction.tolist() == pytest.approx(mean) and metrics.spread(direction).item() == pytest.approx(spread)


@pytest.mark.parametrize(
    "target_std, knn, warns", [(0.0, 0.9, True), (0.19, 0.9, True), (0.5, 0.2, True), (0.5, 0.9, False)]
)
def test_collapse_and_useless_targets_are_told(target_std, knn, warns):
    history = [dict(epoch=0, knn=0.5), dict(epoch=2, knn=knn, target_std=target_std)]
    assert bool(metrics.collapse_warning(history, num_epochs=2)) == warns


def features():
    """Return a bank of 300 and 1,100 queries around class centres; channels of different scales, one constant."""
    random = torch.Generator().manual_seed(0)
    centres, scale = torch.randn(5, 8, generator=random), torch.logspace(-2, 2, 8)
    for count in (300, 1100):
        labels = torch.randint(5, (count,), generator=random)
        x = (centres[labels] + 1.5 * torch.randn(count, 8, generator=random)) * scale + 7
        yield from (torch.cat([x, torch.ones(count, 1)], dim=1), labels)


def standardised(bank, queries):
    return [(x.double() - bank.double().mean(0)) / (bank.double().std(0) + 1e-6) for x in (bank, queries)]


@pytest.mark.parametrize("k", [1, 20, 1000])
def test_knn_is_a_weighted_vote(k):
    bank, bank_labels, queries, labels = features()
    (x, y), right = standardised(bank, queries), 0
    for query, label in zip(y, labels, strict=True):
        similarity = (x @ query) / (x.norm(dim=1) * query.norm())
        nearest = similarity.argsort(descending=True)[:k]
        votes = [(similarity[nearest][bank_labels[nearest] == name] / 0.07).exp().sum() for name in range(5)]
        right += votes.index(max(votes)) == label.item()
    assert 0.4 < right / 1100 < 0.9
    assert metrics.knn_accuracy(bank, bank_labels, queries, labels, k) == pytest.approx(right / 1100, abs=1.5 / 1100)


def test_the_linear_probe_is_ridge_regression():
    """Least squares with sqrt(ridge) x identity as additional rows with target 0."""
    bank, bank_labels, queries, labels = features()
    x, y = (torch.cat([z, torch.ones(len(z), 1)], dim=1) for z in standardised(bank, queries))
    for ridge in (1, 10_000):
        rows = torch.cat([x, ridge**0.5 * torch.eye(10)])
        targets = torch.cat([torch.eye(5)[bank_labels], torch.zeros(10, 5)]).double()
        right = ((y @ torch.linalg.lstsq(rows, targets).solution).argmax(dim=1) == labels).double().mean().item()
        assert 0.4 < right < 0.9
        assert metrics.ridge_accuracy(bank, bank_labels, queries, labels, ridge) == pytest.approx(right, abs=1.5 / 1100)


def test_topk_accuracy():
    logits = torch.tensor([[5.0, 4, 3, 2], [0, 1, 2, 3], [1, 9, 8, 7]])
    labels = torch.tensor([0, 2, 0])  # first, second and last
    assert [metrics.topk_accuracy(logits, labels, k) for k in (1, 2, 4, 5)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


class Numbered(Dataset):
    """Eleven images whose pixels and label are their number; some are unreadable."""

    def __init__(self, broken=()):
        self.broken = broken

    def __len__(self):
        return 11

    def __getitem__(self, index):
        if index in self.broken:
            raise UnreadableImage(f"{index}.png")
        return torch.full((3, 4, 4), index).byte(), index


def predict(images, world=ALONE, batches=None):
    views = data.Views(images, data.CenterView((4, 4)), replace=False)
    loader = data.evaluation_loader(views, 3, workers=0, world=world)
    return metrics.predict(lambda x: x[:, :, 0, 0], loader, nn.Identity(), "fp32", world, batches)


@pytest.mark.filterwarnings("ignore:skipped an unreadable image")
def test_every_readable_image_is_predicted_once():
    outputs, labels = predict(Numbered(broken=(0, 6, 10)))
    assert labels.tolist() == [1, 2, 3, 4, 5, 7, 8, 9] and outputs.dtype == torch.float32
    assert torch.equal(outputs, labels[:, None].expand(-1, 3).float())
    shards = [predict(Numbered(), World(rank, 3, CPU))[1].tolist() for rank in range(3)]
    assert sorted(sum(shards, [])) == list(range(11)), "one of three processes has one image less"
    assert predict(Numbered(), batches=2)[1].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(SystemExit, match="--data"):
        predict(Numbered(broken=range(11)))


class Regression(nn.Linear):
    def forward(self, x):
        return argparse.Namespace(loss=super().forward(x).square().mean())


def test_macs_in_closed_form():
    assert profiling.count_macs(nn.Linear(6, 7), torch.zeros(2, 5, 6)) == 2 * 5 * 6 * 7
    assert profiling.count_macs(Regression(6, 7), torch.zeros(2, 6), backward=True) == 2 * (
        2 * 6 * 7
    )  # weights' gradient
    d, ptr = 16, PTR((0, 2), 0.4)
    expected = 24 * d * 3 * 4 * 4 + d * 5  # patch embedding and head
    for tokens in token_counts(24, 3, ptr)[:-1]:
        n = tokens + 1
        expected += n * 4 * d**2 + 2 * n**2 * d + n * 8 * d**2  # projections, attention's two products, MLP
    model = Classifier(ViT((16, 24), 4, dim=d, depth=3, heads=2), 5)
    assert profiling.count_macs(model, torch.zeros(1, 3, 16, 24), ptr=ptr) == expected


def test_speed_ups():
    """The second function takes three times as long as the first, a ratio that a busy machine does not reverse."""
    ((slow, noise),) = profiling.speed_ups(lambda: time.sleep(0.02), [lambda: time.sleep(0.06)], CPU, rounds=1)
    assert 0 < slow < 0.8 and noise >= 0
