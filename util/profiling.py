"""Cost of networks: multiply-accumulates (MACs) and seconds."""

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, *inputs: Tensor, backward: bool = False, **options: Any) -> int:
    """Count the MACs of convolutions, linear layers and attention products of `model(*inputs, **options)`.

    `backward` adds those of the gradients of the output's `loss`. Counts on a copy on the meta device, where attention
    is two matrix products that torch's counter sees.
    """
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = copy.deepcopy(model).to("meta").eval()(*(x.to("meta") for x in inputs), **options)
        if backward:
            output.loss.backward()
    return counter.get_total_flops() // 2


def seconds(function: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Measure the seconds per call, until the device has finished."""
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
    """Measure the speed of each function relative to `reference`: median and half the interquartile range.

    Function and reference are timed in turns of 0.2 seconds, so a temporarily slow machine affects both.
    """
    for function in (reference, *functions):
        function()  # warms up
    calls = max(1, round(0.2 / seconds(reference, device)))
    results = []
    for function in functions:
        ratios = sorted(seconds(reference, device, calls) / seconds(function, device, calls) for _ in range(rounds))
        results.append((median(ratios), (ratios[-1 - rounds // 4] - ratios[rounds // 4]) / 2))
    return results
