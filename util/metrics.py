"""Training metrics, collapse diagnostics, and the evaluation of features and classifiers."""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from util.training import World, autocast, batches, check_readable, gather_lists, is_finite, mean_over_processes

# --- one step, one epoch ----------------------------------------------------------------------------------------------


class StepMetrics:
    """Metrics of one training step of `accumulate` micro-batches: means over micro-batches and processes."""

    def __init__(self, accumulate: int):
        self.accumulate, self.scalars, self.directions = accumulate, {}, {}

    def update(self, **values: Tensor) -> None:
        """Add the scalars of a micro-batch."""
        for name, value in values.items():
            self.scalars[name] = self.scalars.get(name, 0.0) + value.detach() / self.accumulate

    def update_spread(self, **tokens: Tensor) -> None:
        """Add tokens (B, R, D) of a micro-batch; their `spread` over the whole step is logged."""
        for name, value in tokens.items():
            self.directions[name] = self.directions.get(name, 0.0) + mean_direction(value) / self.accumulate

    def compute(self, grad_norm: Tensor) -> dict[str, float]:
        """Return all metrics by name, and `grad_norm`. Only here does the host wait for the device, once per step."""
        sums = mean_over_processes(torch.cat([torch.stack([*self.scalars.values()]), *self.directions.values()]))
        scalars, *directions = sums.split([len(self.scalars), *map(len, self.directions.values())])
        values = torch.stack([*scalars, *map(spread, directions), grad_norm]).tolist()
        return dict(zip([*self.scalars, *self.directions, "grad_norm"], values, strict=True))


def mean_of_steps(steps: list[dict[str, float]]) -> dict[str, float | None]:
    """Average the steps of an epoch whose loss and gradient are finite; values are None if there are none.

    `skipped` is the number of the other steps.
    """
    taken = [step for step in steps if is_finite(step)]
    mean = {name: sum(step[name] for step in taken) / len(taken) if taken else None for name in steps[0]}
    return mean | dict(skipped=len(steps) - len(taken))


# --- is it learning? --------------------------------------------------------------------------------------------------


@torch.no_grad()
def mean_direction(tokens: Tensor) -> Tensor:
    """Return the mean (D,) of the unit vectors of tokens (B, R, D): length 0 if spread evenly, 1 if all are equal."""
    return F.normalize(tokens.float(), dim=-1).mean(dim=(0, 1))


def spread(direction: Tensor) -> Tensor:
    """Return the standard deviation of unit vectors around their mean (D,): sqrt(1 - |mean|^2).

    About 1 if the vectors point everywhere; 0 if all are equal, as after a collapse of the teacher or the predictor.
    """
    return (1 - direction.square().sum()).clamp(min=0).sqrt()


def collapse_warning(history: list[dict[str, float | None]], num_epochs: int) -> str | None:
    """Return a warning if the last row of a pre-training log shows useless targets, else None.

    Either the targets have collapsed (`target_std` below 0.2), or the k-NN accuracy is below 0.9 times that of the
    untrained encoder. The second check starts after half of the epochs, because features can be worse at first.
    """
    row, first = history[-1], history[0].get("knn")
    if row.get("target_std") is not None and row["target_std"] < 0.2:
        return "nearly all targets point in one direction (collapse): raise --ema or lower --blr"
    if first is not None and "knn" in row and 2 * row["epoch"] >= num_epochs and row["knn"] < 0.9 * first:
        return (
            f"the targets may be useless: k-NN accuracy ({row['knn']:.1%}) is below 0.9 times that of the untrained "
            f"encoder ({first:.1%}), see docs/results.md"
        )
    return None


# --- every readable image, once ---------------------------------------------------------------------------------------


@torch.no_grad()
def outputs_of(
    function: Callable[[Tensor], Tensor],
    loader: DataLoader,
    normalize: nn.Module,
    precision: str,
    world: World,
    num_batches: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield `function` of each batch of this process in float32 on the CPU, labels, and which images were readable."""
    chosen = itertools.islice(batches(loader), num_batches)
    for images, labels, readable in tqdm(chosen, "evaluating", len(loader), leave=False, disable=world.hides_bars):
        with autocast(world.device, precision):
            outputs = function(normalize(images)).float().cpu()
        yield outputs, labels, readable


def predict(
    function: Callable[[Tensor], Tensor],
    loader: DataLoader,
    normalize: nn.Module,
    precision: str,
    world: World,
    num_batches: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `function` of all readable images, each once, and the labels: float32 (n, ...), (n,), on the CPU.

    Each process computes its shard, or `num_batches` batches of it, and gets the results of all processes, ordered by
    process. Ends the script if many images are unreadable.
    """
    results: list[tuple[Tensor, Tensor, int]] = []
    for outputs, labels, readable in outputs_of(function, loader, normalize, precision, world, num_batches):
        results.append((outputs[readable], labels[readable], len(labels)))
    *parts, counts = zip(*gather_lists(results), strict=True)
    outputs, labels = map(torch.cat, parts)
    check_readable(sum(counts) - len(labels), sum(counts))
    if not len(labels):
        raise SystemExit("error: --data: all images of the evaluation are unreadable")
    return outputs, labels


def feature_statistics(
    function: Callable[[Tensor], Tensor],
    loader: DataLoader,
    normalize: nn.Module,
    precision: str,
    world: World,
    num_batches: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return mean and variance (D,) of the features `function` (B, D) of all readable images, in float64."""
    sums = 0  # of ones, features and their squares: (3, D)
    for outputs, _, readable in outputs_of(function, loader, normalize, precision, world, num_batches):
        features = outputs[readable].double()
        sums = sums + torch.stack([torch.ones_like(features), features, features.square()]).sum(dim=1)
    count, mean, square = sum(gather_lists([sums]))
    return mean / count, square / count - (mean / count).square()


# --- accuracy ---------------------------------------------------------------------------------------------------------


def topk_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Return the fraction of labels (n,) among the `k` largest logits (n, classes), or among all if there are fewer."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).any(dim=1).double().mean().item()


def accuracies(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return `val_loss` (mean cross-entropy), `top1` and `top5` (accuracy in [0, 1]) of logits (n, classes)."""
    return dict(
        val_loss=F.cross_entropy(logits, labels).item(),
        top1=topk_accuracy(logits, labels, 1),
        top5=topk_accuracy(logits, labels, 5),
    )


def standardise(bank: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise bank (n, D) and queries (m, D) by mean and standard deviation of the bank, and return both."""
    mean, std = bank.mean(dim=0), bank.std(dim=0) + 1e-6
    return (bank - mean) / std, (queries - mean) / std


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int = 20) -> float:
    """Return the k-NN accuracy in [0, 1] on features standardised by the bank.

    The `k` nearest of `bank` (n, D) vote with the weight exp(cosine / 0.07), as in DINO.
    """
    bank, queries = (F.normalize(x, dim=1) for x in standardise(bank, queries))
    num_right = 0
    for part, labels in zip(queries.split(1000), query_labels.split(1000), strict=True):  # n x n would not fit
        similarity, neighbours = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(part), int(bank_labels.max()) + 1, device=part.device)
        votes.scatter_add_(1, bank_labels[neighbours], (similarity / 0.07).exp())
        num_right += (votes.argmax(dim=1) == labels).sum().item()
    return num_right / len(queries)


def ridge_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, ridge: float = 1.0
) -> float:
    """Return the accuracy in [0, 1] of a ridge-regression probe: one-hot labels regressed on the standardised bank.

    A linear classifier without a learning rate to tune: W = (X'X + ridge I)^-1 X'Y, with a column of ones for the bias.
    """
    bank, queries = standardise(bank, queries)
    num_classes, size = int(bank_labels.max()) + 1, bank.shape[1] + 1

    def inputs(x: Tensor) -> Tensor:
        return F.pad(x.cpu().double(), (0, 1), value=1.0)

    gram, moments = ridge * torch.eye(size).double(), torch.zeros(size, num_classes).double()
    for part, labels in zip(bank.split(10_000), bank_labels.split(10_000), strict=True):  # ImageNet in float64: 20 GB
        x = inputs(part)
        gram += x.T @ x
        moments += x.T @ F.one_hot(labels.cpu(), num_classes).double()
    weights = torch.linalg.solve(gram, moments)
    return ((inputs(queries) @ weights).argmax(dim=1) == query_labels.cpu()).double().mean().item()
