"""Timing on a device: seconds of one call, and interleaved rounds of several cases."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

Case = TypeVar("Case", str, int)


def pick_device() -> torch.device:
    """Return the CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(call: Callable[[], object], device: torch.device, *, wait: bool = True) -> float:
    """Return the seconds that `call` takes, including the work that it queues on the device.

    Args:
        call: the function to time.
        device: the CUDA device to synchronize with; a CPU needs no synchronization.
        wait: whether to wait for the device after the call; False measures how long the call blocks the host.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if wait and device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(cases: Mapping[Case, Callable[[int], float]], repetitions: int) -> dict[Case, list[float]]:
    """Measure every case once per round and return [repetitions] values per case.

    Other work on the machine then slows all cases of a round alike. Round 0 warms up and is discarded.

    Args:
        cases: functions from the number of the round to the measured seconds.
        repetitions: rounds after the warm-up.
    """
    measured: dict[Case, list[float]] = {name: [] for name in cases}
    for number in range(repetitions + 1):
        for name, measure in cases.items():
            value = measure(number)
            if number:
                measured[name].append(value)
    return measured


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratio of two cases in each round."""
    return [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]


def rounded_medians(values: Mapping[Case, Sequence[float]], digits: int) -> dict[str, float]:
    """Return the rounded median of every case, by the name of the case."""
    return {str(name): round(statistics.median(numbers), digits) for name, numbers in values.items()}
