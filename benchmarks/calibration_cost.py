"""What calibration costs: its time against the plain forward pass on ResNet-18, and its memory against the batches."""

from __future__ import annotations

import argparse
import resource
import statistics as summary
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from data import torchvision_models
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from nns_plugin import Statistics, UnitGroup, calibrate
from nns_plugin.adapters.torch_pruning.groups import unit_groups

GOAL, GRAM_GOAL = 1.15, 1.6  # calibration time / forward time, without and with Gram matrices
LABELS = 1000
BATCH_SIZE, IMAGE_SIZE = 32, 224
MEMORY_BATCHES = (1, 4, 16)
MEMORY_BATCH_SIZE, MEMORY_IMAGE_SIZE = 8, 64

Batch = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=4, help="batches in one measurement (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=7, help="pairs of measurements (default: %(default)s)")
    parser.add_argument("--gram", action="store_true", help="collect Gram matrices as well")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 110)
    model = torchvision_models().resnet18(weights=None).eval()
    groups = unit_groups(model, torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE), ignored_layers=["fc"])
    # Memory first: the peak of the process never falls again.
    console.print(memory_table(model, groups, arguments.gram))
    data = list(random_batches(arguments.batches, BATCH_SIZE, IMAGE_SIZE))
    pairs = measure_pairs(model, groups, data, arguments.repetitions, arguments.gram)
    console.print(cost_table(pairs, len(data), arguments.gram))


def random_batches(count: int, size: int, side_pixels: int) -> Iterator[Batch]:
    """Yield labelled random images, made when they are asked for."""
    for _ in range(count):
        yield torch.randn(size, 3, side_pixels, side_pixels), torch.randint(LABELS, (size,))


def measure_pairs(
    model: nn.Module, groups: Sequence[UnitGroup], data: Sequence[Batch], repetitions: int, gram: bool
) -> list[tuple[float, float]]:
    """Seconds of the plain forward and of calibration over the same data, in pairs whose order alternates."""

    def forward() -> None:
        with torch.no_grad():
            for images, _ in data:
                model(images)

    def calibration() -> None:
        calibrate(model, data, groups, gram=gram)

    forward()  # warm-up
    calibration()
    pairs = []
    for repetition in tqdm(range(repetitions), desc="measuring", leave=False, disable=None):
        if repetition % 2:
            calibration_seconds, forward_seconds = seconds(calibration), seconds(forward)
        else:
            forward_seconds, calibration_seconds = seconds(forward), seconds(calibration)
        pairs.append((forward_seconds, calibration_seconds))
    return pairs


def seconds(action: Callable[[], None]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def cost_table(pairs: Sequence[tuple[float, float]], batches: int, gram: bool) -> Table:
    """Times and ratios of the pairs, and whether the median ratio meets the goal."""
    table = Table(
        title=f"Calibration ({'with' if gram else 'no'} Gram) against the plain forward: ResNet-18, "
        f"{batches} batches of {BATCH_SIZE} inputs 3x{IMAGE_SIZE}x{IMAGE_SIZE}, {torch.get_num_threads()} threads, "
        f"{len(pairs)} pairs in one run"
    )
    for heading in ("", "median", "min", "max"):
        table.add_column(heading, justify="right" if heading else "left")
    ratios = [calibration / forward for forward, calibration in pairs]
    for name, values, digits in (
        ("forward, s", [forward for forward, _ in pairs], 2),
        ("calibration, s", [calibration for _, calibration in pairs], 2),
        ("ratio of a pair", ratios, 3),
    ):
        spread = (summary.median(values), min(values), max(values))
        table.add_row(name, *(f"{value:.{digits}f}" for value in spread))
    fastest = min(calibration for _, calibration in pairs) / min(forward for forward, _ in pairs)
    table.add_row("ratio of the fastest", f"{fastest:.3f}")  # what neighbours on the machine disturb least
    goal = GRAM_GOAL if gram else GOAL
    verdict = "holds" if summary.median(ratios) <= goal else "missed"
    table.caption = f"goal: median ratio at most {goal}: {verdict}"
    return table


def memory_table(model: nn.Module, groups: Sequence[UnitGroup], gram: bool) -> Table:
    """Size of the statistics, and growth of the process's peak memory, for more and more batches."""
    table = Table(title=f"Memory: batches of {MEMORY_BATCH_SIZE} inputs 3x{MEMORY_IMAGE_SIZE}x{MEMORY_IMAGE_SIZE}")
    for heading in ("batches", "statistics, bytes", "growth of the process's peak memory, MiB"):
        table.add_column(heading, justify="right")
    sizes = []
    for count in MEMORY_BATCHES:
        before = peak_memory_mib()
        batches = random_batches(count, MEMORY_BATCH_SIZE, MEMORY_IMAGE_SIZE)
        sizes.append(
            size_bytes(calibrate(model, batches, groups, gram=gram))
        )  # nothing of it stays beside the next one
        table.add_row(str(count), f"{sizes[-1]:,}", f"{peak_memory_mib() - before:.1f}")
    verdict = "holds" if len(set(sizes)) == 1 else "missed"
    table.caption = f"goal: the statistics' size does not depend on the number of batches: {verdict}"
    return table


def size_bytes(statistics: Statistics) -> int:
    """Bytes in the tensors of all records."""
    tensors = [
        tensor
        for record in statistics.records.values()
        for tensor in (*record.sums().values(), record.layout.channel, record.layout.slot)
    ]
    return sum(tensor.nbytes for tensor in tensors)


def peak_memory_mib() -> float:
    """The most memory that the process ever held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
