"""What features, classifiers and networks are worth, and what they cost."""

import copy
import itertools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from training import World, autocast, gather_lists

# --- is it learning? --------------------------------------------------------------------------------------------------


@torch.no_grad()
def mean_direction(tokens: Tensor) -> Tensor:
    """The mean (D,) of the unit vectors of tokens (B, R, D): short if they point everywhere, long if all in one way."""
    return F.normalize(tokens.float(), dim=-1).mean(dim=(0, 1))


def spread(direction: Tensor) -> Tensor:
    """Standard deviation of unit vectors around their mean (D,), over all directions: sqrt(1 - |mean|^2).

    About 1: they point everywhere. 0: all in one direction, which is what a collapsed teacher or predictor looks like.
    """
    return (1 - direction.square().sum()).clamp(min=0).sqrt()


@torch.no_grad()
def predict(
    function: Callable[[Tensor], Tensor],
    loader: DataLoader,
    normalize: nn.Module,
    precision: str,
    world: World,
    batches: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`function` of every readable image, each exactly once, and the labels: float32 (n, ...), (n,), on the CPU.

    Each process works on its share of the images, the first `batches` batches of it, and all get the results of all.
    """
    results: list[tuple[Tensor, Tensor, int]] = []
    some = itertools.islice(data.batches(loader), batches)
    for images, labels, readable in tqdm(some, "scoring", len(loader), leave=False, disable=not world.is_main):
        with autocast(world.device, precision):
            outputs = function(normalize(images)).float().cpu()
        results.append((outputs[readable], labels[readable], len(labels)))
    *parts, counts = zip(*gather_lists(results), strict=True)
    outputs, labels = map(torch.cat, parts)
    data.check_readable(sum(counts) - len(labels), sum(counts))
    if not len(labels):
        raise SystemExit("error: --data: not one of the images to score can be read")
    return outputs, labels


@torch.no_grad()
def feature_statistics(
    function: Callable[[Tensor], Tensor],
    loader: DataLoader,
    normalize: nn.Module,
    precision: str,
    world: World,
    batches: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and variance (D,) of `function`'s features (B, D) over the readable images of all processes, in float64."""
    sums = 0  # of ones, features and their squares: (3, D)
    some = itertools.islice(data.batches(loader), batches)
    for images, _, readable in tqdm(some, "statistics", len(loader), leave=False, disable=not world.is_main):
        with autocast(world.device, precision):
            features = function(normalize(images)).cpu().double()[readable]
        sums = sums + torch.stack([torch.ones_like(features), features, features.square()]).sum(dim=1)
    count, mean, square = sum(gather_lists([sums]))
    return mean / count, square / count - (mean / count).square()


# --- accuracy ---------------------------------------------------------------------------------------------------------


def topk_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share of labels (n,) among the `k` largest of their logits (n, classes); all of them where there are fewer."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).any(dim=1).double().mean().item()


def standardise(bank: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, D) with the bank's mean and deviation taken out, so that what all share says nothing."""
    mean, std = bank.mean(dim=0), bank.std(dim=0) + 1e-6
    return (bank - mean) / std, (queries - mean) / std


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int = 20) -> float:
    """Accuracy in [0, 1] of a vote among the `k` nearest of a bank (n, D), weighted by exp(cosine / .07) as in DINO."""
    bank, queries = (F.normalize(x, dim=1) for x in standardise(bank, queries))
    num_right = 0
    for some, labels in zip(queries.split(1000), query_labels.split(1000), strict=True):  # n x n would not fit
        similarity, neighbours = (some @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(some), int(bank_labels.max()) + 1, device=some.device)
        votes.scatter_add_(1, bank_labels[neighbours], (similarity / 0.07).exp())
        num_right += (votes.argmax(dim=1) == labels).sum().item()
    return num_right / len(queries)


def linear_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, ridge: float = 1.0
) -> float:
    """Accuracy in [0, 1] of the linear classifier that ridge regression of one-hot labels on the bank gives.

    A linear probe without a learning rate to tune: W = (X'X + ridge I)^-1 X'Y, with a column of ones for the bias.
    """
    bank, queries = standardise(bank, queries)
    num_classes, size = int(bank_labels.max()) + 1, bank.shape[1] + 1

    def inputs(x: Tensor) -> Tensor:
        return F.pad(x.cpu().double(), (0, 1), value=1.0)

    gram, moments = ridge * torch.eye(size).double(), torch.zeros(size, num_classes).double()
    for some, labels in zip(bank.split(10_000), bank_labels.split(10_000), strict=True):  # ImageNet as doubles: 20 GB
        x = inputs(some)
        gram += x.T @ x
        moments += x.T @ F.one_hot(labels.cpu(), num_classes).double()
    weights = torch.linalg.solve(gram, moments)
    return ((inputs(queries) @ weights).argmax(dim=1) == query_labels.cpu()).double().mean().item()


# --- cost -------------------------------------------------------------------------------------------------------------


def count_macs(model: nn.Module, *inputs: Tensor, backward: bool = False, **options: Any) -> int:
    """Multiply-accumulates of convolutions, linear layers and attention products of `model(*inputs, **options)`.

    With `backward` also those of the gradients of its output's `loss`. Counted on a copy without storage: there,
    attention is two matrix products that torch's counter sees.
    """
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = copy.deepcopy(model).to("meta").eval()(*(x.to("meta") for x in inputs), **options)
        if backward:
            output.loss.backward()
    return counter.get_total_flops() // 2


def seconds(function: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """How long a call takes, until the device has done it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return (time.perf_counter() - start) / calls


@torch.no_grad()
def speed_ups(
    reference: Callable[[], Any], functions: list[Callable[[], Any]], device: torch.device, rounds: int = 9
) -> list[tuple[float, float]]:
    """How many times as fast as `reference` each function is: the median, and half of the middle half's width.

    Each is timed right after the reference, for a fifth of a second: what slows the machine down for a while hits both.
    """
    for function in (reference, *functions):
        function()  # warms up
    calls = max(1, round(0.2 / seconds(reference, device)))
    results = []
    for function in functions:
        ratios = sorted(seconds(reference, device, calls) / seconds(function, device, calls) for _ in range(rounds))
        results.append((median(ratios), (ratios[-1 - rounds // 4] - ratios[rounds // 4]) / 2))
    return results
